"""timm's ResNets, RegNets and ResNetV2: blocks and stems fused, beside timm's own; what torchvision's do not have."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import statistics
import subprocess
import sys
import textwrap

import parity
import pytest
import timm
import torch
from timm.layers.norm_act import freeze_batch_norm_2d
from timm.models import regnet, resnetv2
from timm.models import resnet as timm_resnet
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import fused_resnet
from fused_resnet import preact, stem, swap_blocks, swap_report, timm_blocks, training
from fused_resnet.timm_blocks import (
    FusedTimmBasicBlock,
    FusedTimmBottleneck,
    FusedTimmPreActBasic,
    FusedTimmPreActBottleneck,
    FusedTimmRegNetBottleneck,
    FusedTimmResNet,
)

# name: blocks that are fused, of how many, a reason of the others
NETWORKS = {
    "resnet10t": (4, 4, ""),  # average pools in front of projections, a stem of three convolutions
    "resnet18": (8, 8, ""),
    "resnet26": (8, 8, ""),
    "resnet26d": (8, 8, ""),
    "seresnet18": (8, 8, ""),
    "ecaresnet26t": (8, 8, ""),
    "resnetblur18": (8, 8, ""),  # BlurPool in front of convolutions
    "regnetx_002": (13, 13, ""),  # batch norms with a ReLU inside
    "regnety_002": (13, 13, ""),  # squeeze-and-excitation in front of the last convolution
    "resnetv2_18": (8, 8, ""),  # pre-activation
    "resnetv2_18d": (8, 8, ""),
    "resnetv2_50": (16, 16, ""),
    "resnetv2_50d_gn": (0, 16, "norm1: GroupNormAct is none of"),
    "resnet50_gn": (0, 16, "bn1: GroupNorm is none of"),
}
FUSED = [name for name, (fused, _, _) in NETWORKS.items() if fused]
SIZE = (3, 3, 64, 64)
modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
# Others have what these do.
REPEATED = ("resnet18", "resnet26", "resnet10t", "regnetx_002", "resnetv2_18d", "resnetv2_50")
networks = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in REPEATED else []) for name in FUSED]
)


def untouched(name: str, device="cpu", seed: int = 0, train: bool = True, firm: bool = False, **options):
    """(model, input): timm's, with every batch norm away from its initial state."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10, **options).to(device)
    x = torch.randn(SIZE).to(device)
    parity.calibrate(parity.randomize_norms(model, seed, branch=0.2, firm=firm), x)
    return model.train(train), x


def same(a: parity.Seen, b: parity.Seen, limit: float = 1e-9) -> None:
    found = parity.errors(a, b)
    assert max(found.values()) < limit, max((e, n) for n, e in found.items())


def seen(model: nn.Module, x: torch.Tensor) -> parity.Seen:
    torch.manual_seed(7)  # of what is dropped
    return parity.observe(model, x)


# --- what is swapped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_fused_and_what_is_left(name):
    fused, blocks, reason = NETWORKS[name]
    model = timm.create_model(name)
    keys, types, parameters = list(model.state_dict()), [type(m) for m in model.modules()], list(model.parameters())
    if fused:
        assert swap_blocks(model) is model
        assert type(model) is (FusedTimmResNet if types[0] is timm_resnet.ResNet else types[0])
    else:
        with pytest.warns(UserWarning, match=f"model: none of its {blocks} residual blocks.*{reason}"):
            swap_blocks(model)
    report = swap_report(model)
    assert (len(report.fused), len(report.blocks)) == (fused, blocks)
    kinds = {"FusedTimmBasicBlock", "FusedTimmBottleneck", "FusedTimmRegNetBottleneck"}
    kinds |= {"FusedTimmPreActBasic", "FusedTimmPreActBottleneck"}
    called = "shortcut: DownsampleAvg is called as it is"
    assert all(b.type in kinds and b.reason == "" and b.note in ("", called) for b in report.fused)
    assert any(b.note for b in report.fused) == (name == "resnetv2_18d")
    assert all(b.reason.startswith(reason) for b in report.left)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    fused_resnet.restore_blocks(model)
    assert [type(m) for m in model.modules()] == types


def test_blocks_of_other_classes_are_none_of_ours():
    with pytest.warns(UserWarning, match="^model: no residual block was found in it$"):
        swap_blocks(timm.create_model("resnext26ts"))


def test_a_subclass_with_another_forward_is_left():
    class Own(timm_resnet.BasicBlock):
        def forward(self, x):
            return super().forward(x) - 1

    model = timm_resnet.ResNet(Own, (1, 1, 1, 1))
    with pytest.warns(UserWarning, match="none of its 4 .* Own is not exactly BasicBlock or Bottleneck"):
        swap_blocks(model)


def test_a_stem_alone_is_swapped():
    """Of a network whose blocks are of other classes; the warning is about the blocks."""
    model = timm.create_model("skresnet18")
    with pytest.warns(UserWarning, match="^model: no residual block was found in it$"):
        swap_blocks(model)
    assert type(model) is FusedTimmResNet and type(fused_resnet.restore_blocks(model)) is timm_resnet.ResNet


def test_a_timm_that_is_too_old_is_left_alone():
    program = """
        import sys, types, torchvision
        old = types.ModuleType("timm.models.resnet")
        old.Bottleneck = type("Bottleneck", (), {})
        sys.modules |= {"timm": types.ModuleType("timm"), "timm.models": types.ModuleType("timm.models")}
        sys.modules["timm.models.resnet"] = old
        import fused_resnet
        model = fused_resnet.swap_blocks(torchvision.models.resnet18())
        assert len(fused_resnet.swap_report(model).fused) == 8
        fused_resnet.restore_blocks(model)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_blocks_inside_other_networks():
    """HRNet is made of the same blocks."""
    model = timm.create_model("hrnet_w18_small", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    want = model(x)
    assert len(swap_report(swap_blocks(model)).fused) == 23
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def test_timm_is_not_imported_for_others():
    """A torchvision model is swapped where timm is not installed; where it is, it stays unimported."""
    program = """
        import sys, torchvision
        if sys.argv[1] == "absent":
            sys.modules["timm"] = None
        import fused_resnet
        model = fused_resnet.swap_blocks(torchvision.models.resnet18())
        assert len(fused_resnet.swap_report(model).fused) == 8
        assert sys.argv[1] == "absent" or "timm" not in sys.modules
        fused_resnet.restore_blocks(model)
    """
    for argument in ("absent", "there"):
        subprocess.run([sys.executable, "-c", textwrap.dedent(program), argument], check=True)


# --- parity -----------------------------------------------------------------------------------------------------------


@modes
@networks
def test_equals_timm_in_float64(name, train, device):
    model, x = untouched(name, device, train=train)
    ours = swap_blocks(copy.deepcopy(model).double())
    for _ in range(2):
        same(seen(ours, x.double()), seen(model.double(), x.double()))


@modes
@pytest.mark.parametrize(
    "name",
    [
        "regnety_002",
        "resnetv2_18d",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("seresnet18", "resnet26d", "resnet18")),
    ],
)
def test_equals_timm_by_the_rule(name, train, device):
    """float32, beside timm's own variants, float64 the judge; of the seeds the worst, in training the median."""
    ours, yardsticks = {"contiguous": [], "channels_last": []}, []
    for seed in parity.SEEDS:
        model, x = untouched(name, device, seed, train, firm=not train)
        judge = parity.judge_of(model, x)
        yardsticks.append(parity.yardstick_of(model, x, judge))
        for layout, found in ours.items():
            fused, image = parity.as_variant(layout, swap_blocks(copy.deepcopy(model)), x)
            found.append(parity.errors(parity.observe(fused, image), judge))
    pick = statistics.median if train else max
    for found in ours.values():
        parity.check({key: pick(e[key] for e in found) for key in found[0]}, parity.worst(yardsticks))


@modes
@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize(
    "name", ["resnet26d", "resnetv2_18", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "seresnet18"))]
)
def test_stochastic_depth(name, memory, train, device):
    """The same paths are dropped from the same seed; a lean block does not draw twice, and says that it is not lean."""
    model, x = untouched(name, device, train=train, drop_path_rate=0.6)
    ours = swap_blocks(copy.deepcopy(model).double(), memory=memory)
    assert len(swap_report(ours).fused) == 8 and all(b.reason == "" for b in swap_report(ours).blocks)
    same(seen(ours, x.double()), seen(model.double(), x.double()))
    notes = [b.note for b in swap_report(ours).blocks]
    if memory == "lean" and train:
        attention = {"seresnet18": "SEModule"}.get(name)
        first = f"not lean: {attention} in front of the add" if attention else "lean"  # it drops nothing
        last = ", ".join(filter(None, (attention, "DropPath")))
        assert (notes[0], notes[-1]) == (first, f"not lean: {last} in front of the add")


@pytest.mark.parametrize("swapped_in", ["train", "eval"])
def test_drop_block(swapped_in, device):
    """While it drops, blocks run timm's forward; in eval mode they are fused, whatever the mode at the swap."""
    model, x = untouched("resnet18", device, drop_block_rate=0.4)
    model.double()
    ours = swap_blocks(copy.deepcopy(model).train(swapped_in == "train"))
    assert len(swap_report(ours).fused) == 8
    for train in (True, False):
        model.train(train), ours.train(train)
        reasons = [b.reason for b in swap_report(ours).blocks]
        assert [r.startswith("runs unfused: drop_block: DropBlock2d stands") for r in reasons] == [False] * 4 + 4 * [
            train
        ]
        same(seen(ours, x.double()), seen(model, x.double()))


@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "ecaresnet26t", "regnetx_002", "resnetv2_18"])
def test_lean_equals_default_to_the_bit(name, device):
    model, x = untouched(name, device)
    default, lean = swap_blocks(copy.deepcopy(model)), swap_blocks(copy.deepcopy(model), memory="lean")
    found = [parity.observe(m, x) for m in (default, lean)]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    notes = {b.note for b in swap_report(lean).blocks}
    assert notes == ({"not lean: EcaModule in front of the add"} if name == "ecaresnet26t" else {"lean"})


@modes
def test_frozen_batch_norms(train, device):
    model, x = untouched("resnet26d", device, train=train)
    model = freeze_batch_norm_2d(model)
    ours = swap_blocks(copy.deepcopy(model).double())
    assert len(swap_report(ours).fused) == 8
    same(parity.observe(ours, x.double()), parity.observe(model.double(), x.double()))


def each_hook_is_heeded(names: list[str], ours: nn.Module, block: nn.Module, x: torch.Tensor) -> None:
    """The results of the modules of these names, one at a time, replaced in both blocks."""
    for name in names:
        handles = [b.get_submodule(name).register_forward_hook(lambda m, a, y: y * 1.25) for b in (ours, block)]
        same(seen(ours, x), seen(block, x))
        for handle in handles:
            handle.remove()


def hooks(block: nn.Module):
    for name, module in block.named_modules():
        if name and not any(module.children()):
            yield name


@modes
@pytest.mark.parametrize("memory", ["default", "lean"])
def test_a_hook_anywhere_is_called_and_heeded(memory, train):
    """Each module inside a block, one at a time, has its result replaced."""
    model, x = untouched("resnet26d", train=train, drop_path_rate=0.5)
    block = model.layer2[0].double()
    ours = swap_blocks(nn.Sequential(copy.deepcopy(block)), memory=memory)[0]
    assert type(ours) is FusedTimmBottleneck
    names = list(hooks(block))
    assert {"act1", "aa", "drop_block", "drop_path", "downsample.0", "conv3"} <= set(names)
    x = torch.randn(2, block.conv1.in_channels, 9, 9, dtype=torch.float64)
    each_hook_is_heeded(names, ours, block, x)


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("resnet26", {}, [True] * 8),
        ("resnet26d", {}, [False, True] * 4),  # the projection reads what a pool, be it an Identity, makes of x
        ("seresnet50", {}, [True] + 2 * [False] + [True] + 3 * [False] + [True] + 5 * [False] + [True] + 2 * [False]),
        ("resnet26", {"drop_path_rate": 0.3}, [True, False] * 4),
    ],
)
def test_whose_gradient_the_shortcut_hands_back(name, options, expected, monkeypatch):
    """The first convolution adds its product to that of an op of ours only: PyTorch's add and pools may keep theirs."""
    real, seen = training.convolve_shared, []
    monkeypatch.setattr(training, "convolve_shared", lambda *a: seen.append(a[-1]) or real(*a))
    swap_blocks(timm.create_model(name, num_classes=2, **options)).train()(torch.randn(2, 3, 32, 32))
    assert seen == expected


@modes
@pytest.mark.parametrize("attention", ["se", "eca"])
def test_dtypes_under_autocast(attention, train):
    """The branch gives the sum its dtype, as in timm's `x += shortcut`."""
    block = timm_resnet.BasicBlock(16, 16, attn_layer=attention).train(train)
    ours = swap_blocks(nn.Sequential(copy.deepcopy(block)))[0]
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(torch.randn(2, 16, 8, 8)), block(torch.randn(2, 16, 8, 8))
    assert type(ours) is FusedTimmBasicBlock and a.dtype is b.dtype is torch.bfloat16


def test_numbers_are_drawn_in_timms_order():
    """A shortcut that drops something, and a branch that does."""
    block = untouched("resnet26", drop_path_rate=0.5)[0].layer4[0].double()
    block.drop_path = timm_resnet.DropPath(0.5)
    block.downsample.append(nn.Dropout(0.5))
    ours = swap_blocks(nn.Sequential(copy.deepcopy(block)))[0]
    x = torch.randn(4, 1024, 5, 5).double()
    same(seen(ours, x), seen(block, x))


def test_a_lean_block_decides_once():
    """A hook put on the pool between forward and backward is none of that backward's."""
    block, x = untouched("resnet26d")[0].layer2[0].double(), torch.randn(2, 256, 9, 9).double()
    grads = []
    for memory in ("default", "lean"):
        ours, x = swap_blocks(nn.Sequential(copy.deepcopy(block)), memory=memory)[0], x.detach().requires_grad_()
        y = ours(x)
        ours.downsample[0].register_forward_hook(lambda m, a, out: out * 100)
        y.square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


# --- RegNets ----------------------------------------------------------------------------------------------------------


def regnet_block(train: bool = True, channels: tuple[int, int] = (24, 56), **options) -> regnet.Bottleneck:
    torch.manual_seed(0)
    block = regnet.Bottleneck(*channels, **{"stride": 2, "group_size": 8, **options}).double().train(train)
    return parity.randomize_norms(block, 0)


@modes
@pytest.mark.parametrize("options", [{}, {"stride": 1, "channels": (56, 56)}, {"downsample": "avg"}], ids=str)
def test_a_hook_anywhere_in_a_regnets_block_is_called_and_heeded(options, train):
    """Of the layers around a convolution and a batch norm as well, and of what acts inside of one."""
    block = regnet_block(train, drop_path_rate=0.5, **options)
    ours = swap_blocks(nn.Sequential(copy.deepcopy(block)))[0]
    assert type(ours) is FusedTimmRegNetBottleneck
    x = torch.randn(2, block.conv1.in_channels, 9, 9, dtype=torch.float64)
    same(seen(ours, x), seen(block, x))
    names = [name for name, _ in block.named_modules() if name]
    assert {"conv1", "conv2.bn.act", "conv3.bn.drop", "se", "downsample", "drop_path", "act3"} <= set(names)
    each_hook_is_heeded(names, ours, block, x)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"linear_out": True}, "act3: Identity is not ReLU"),
        ({"act_layer": "silu"}, "conv1.bn.act: SiLU is not ReLU"),
        ({"downsample": None}, "downsample: there is no shortcut"),
        ({"dilation": (2, 2), "stride": 1, "downsample": "avg"}, "downsample: Sequential is called as it is"),
        ({"drop_block": lambda: timm_resnet.DropBlock2d(0.3)}, "conv2.bn: drop: DropBlock2d is not Identity"),
        ({"norm_layer": "groupnorm1"}, "downsample: GroupNorm1Act is none of"),
    ],
    ids=["linear", "silu", "no-shortcut", "pool-of-timms", "drop-block", "group-norm"],
)
def test_what_a_regnets_block_may_not_be(options, reason):
    model = nn.Sequential(regnet.Bottleneck(24, 56, **{"stride": 2, "group_size": 8, **options}))
    with pytest.warns(UserWarning, match=reason):
        swap_blocks(model)
    (block,) = swap_report(model).left
    assert re.match(reason, block.reason)


def test_a_regnets_block_that_changes_runs_timms_forward():
    x = torch.randn(2, 24, 9, 9).double()
    for name, module in (("conv1.bn.act", nn.SiLU()), ("conv3.bn.act", nn.ReLU()), ("conv2", nn.Identity())):
        block = regnet_block()
        ours = swap_blocks(nn.Sequential(copy.deepcopy(block)))[0]
        for b in (ours, block):
            b.set_submodule(name, module)
        assert swap_report(nn.Sequential(ours)).fused[0].reason.startswith("runs unfused: ")
        if name != "conv2":
            same(seen(ours, x), seen(block, x))


@pytest.mark.parametrize("swapped_first", [True, False])
def test_pytorchs_conversion_takes_the_activation_out_of_a_batch_norm(swapped_first):
    """It keeps the module that acted as a child of a batch norm that does not call it."""
    block, convert = regnet_block(train=False), nn.SyncBatchNorm.convert_sync_batchnorm
    x = torch.randn(2, 24, 9, 9).double()
    ours = nn.Sequential(copy.deepcopy(block))
    if swapped_first:
        (report,) = swap_report(convert(swap_blocks(ours))).fused
        assert report.reason == "runs unfused: conv1.bn: SyncBatchNorm does not call its act"
    else:
        with pytest.warns(UserWarning, match="conv1.bn: SyncBatchNorm does not call its act"):
            swap_blocks(convert(ours))
    torch.testing.assert_close(ours(x), convert(block)(x), rtol=1e-9, atol=1e-9)


class Wide(nn.Module):
    """A shortcut of one channel, in another dtype."""

    def forward(self, x):
        return x[:, :1, ::2, ::2].float()


def test_another_shortcut_of_a_regnets_block_is_timms_to_add():
    for block in (regnet_block(), regnet_block(train=False)):
        ours = swap_blocks(nn.Sequential(copy.deepcopy(block)))[0]
        ours.downsample = block.downsample = Wide()
        assert swap_report(nn.Sequential(ours)).fused[0].reason == "runs unfused: downsample: Wide is called as it is"
        x = torch.randn(2, 24, 9, 9).double()
        same(seen(ours, x), seen(block, x))


@pytest.mark.parametrize("name", ["conv1.bn", "conv3.bn", "downsample.bn"])
def test_dtypes_of_a_regnets_block_with_a_frozen_batch_norm_under_autocast(name):
    """Its vectors are float32."""
    block = regnet_block().float()
    block.set_submodule(name, FrozenBatchNorm2d(block.get_submodule(name).num_features))
    ours = copy.deepcopy(block)
    if name == "conv1.bn":
        pytest.warns(UserWarning, swap_blocks, nn.Sequential(ours))
    else:
        ours = swap_blocks(nn.Sequential(ours))[0]
        assert type(ours) is FusedTimmRegNetBottleneck
    with torch.autocast("cpu", torch.bfloat16):
        a, b = (m(torch.randn(2, 24, 8, 8).bfloat16()) for m in (ours, block))
    assert a.dtype is b.dtype is (torch.bfloat16 if name == "conv1.bn" else torch.float32)


@modes
@pytest.mark.parametrize("channels", [(24, 56), (56, 56)], ids=["projection", "identity"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_dtypes_of_a_regnets_block_under_autocast(given, channels, train):
    """A wider shortcut gives the sum its dtype."""
    block = regnet_block(train, channels, stride=1).float()
    ours = swap_blocks(nn.Sequential(copy.deepcopy(block)))[0]
    x = torch.randn(2, channels[0], 8, 8).to(given)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x), block(x)
    assert a.dtype is b.dtype
    torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05)


def test_batch_norms_with_an_activation_elsewhere():
    """In a block that does not know of it, what acts behind a batch norm is an obstacle; Identity is none."""
    for acts, reason in ((True, "bn1: act: ReLU is not Identity"), (False, "")):
        block = timm_resnet.BasicBlock(8, 8)
        for name in ("bn1", "bn2"):
            setattr(block, name, timm.layers.BatchNormAct2d(8, apply_act=acts))
        x = torch.randn(2, 8, 7, 7)
        want = block(x)
        if acts:
            with pytest.warns(UserWarning, match=reason):
                swap_blocks(nn.Sequential(block))
        else:
            swap_blocks(nn.Sequential(block))
            assert type(block) is FusedTimmBasicBlock
        torch.testing.assert_close(block(x), want)


# --- ResNetV2 ---------------------------------------------------------------------------------------------------------


def preact_block(kind=resnetv2.PreActBottleneck, train: bool = True, channels=(24, 48), side="conv", **options):
    torch.manual_seed(0)
    norm, conv = timm.layers.BatchNormAct2d, timm.layers.create_conv2d
    proj = {"conv": resnetv2.DownsampleConv, "avg": resnetv2.DownsampleAvg, None: None}[side]
    layers = {"norm_layer": norm, "conv_layer": conv, "proj_layer": proj}
    stride = 1 if side is None else 2
    block = kind(*channels, **{"stride": stride, **layers, **options}).double().train(train)
    return parity.randomize_norms(block, 0)


@modes
@pytest.mark.parametrize(
    "kind, options",
    [
        (resnetv2.PreActBasic, {}),
        (resnetv2.PreActBottleneck, {"drop_path_rate": 0.5}),
        (resnetv2.PreActBottleneck, {"side": "avg"}),
        (resnetv2.PreActBottleneck, {"side": None, "channels": (48, 48), "groups": 4}),
    ],
    ids=["basic", "drops", "pooled", "identity"],
)
@pytest.mark.parametrize("memory", ["default", "lean"])
def test_a_hook_anywhere_in_a_pre_activation_block_is_called_and_heeded(kind, options, memory, train):
    block = preact_block(kind, train, **options)
    ours = swap_blocks(nn.Sequential(copy.deepcopy(block)), memory=memory)[0]
    assert type(ours) in (FusedTimmPreActBasic, FusedTimmPreActBottleneck) and isinstance(ours, kind)
    x = torch.randn(2, block.conv1.in_channels, 9, 9, dtype=torch.float64)
    same(seen(ours, x), seen(block, x))
    names = [name for name, _ in block.named_modules() if name]
    assert {"conv1", "norm1.act", "norm2.drop", "drop_path"} <= set(names)
    each_hook_is_heeded(names, ours, block, x)
    (report,) = swap_report(nn.Sequential(ours)).fused
    drops, pools = "drop_path_rate" in options, options.get("side") == "avg"
    called = "shortcut: DownsampleAvg is called as it is" if pools else ""
    why = "DropPath in front of the add" if drops else called
    if memory == "lean" and train:
        assert report.note == "; ".join(filter(None, [called, f"not lean: {why}" if why else "lean"]))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"norm_layer": lambda c, **kw: timm.layers.BatchNormAct2d(c, act_layer="silu")},
            "norm1.act: SiLU is not ReLU",
        ),
        ({"norm_layer": lambda c, **kw: timm.layers.GroupNormAct(c, 4)}, "norm1: GroupNormAct is none of"),
        ({"norm_layer": lambda c, **kw: timm.layers.BatchNormAct2d(c, apply_act=False)}, "norm1.act: Identity is not"),
        ({"conv_layer": timm.layers.StdConv2d}, "conv1: StdConv2d is not Conv2d"),
    ],
    ids=["silu", "group-norm", "no-activation", "standardised"],
)
def test_what_a_pre_activation_block_may_not_be(options, reason):
    model = nn.Sequential(preact_block(**options))
    with pytest.warns(UserWarning, match=reason):
        swap_blocks(model)
    (block,) = swap_report(model).left
    assert block.reason.startswith(reason)
    ours = preact_block()
    ours.forward = ours.forward
    assert swap_report(nn.Sequential(ours)).left[0].reason == "forward is overridden on the instance"
    assert swap_report(nn.Sequential(preact_block())).blocks[0].status == "fusable"


def test_a_pre_activation_block_that_changes_runs_timms_forward():
    x = torch.randn(2, 24, 9, 9).double()
    changes = {
        "norm2.act": nn.SiLU(),
        "norm1": timm.layers.GroupNormAct(24, 4).double(),
        "conv2": nn.Conv2d(16, 16, 3, 2, 1, bias=False, padding_mode="circular").double(),
        "conv3": nn.Conv2d(16, 48, 1).double(),
        "downsample": nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(24, 48, 1)).double(),
        "downsample.norm": nn.Hardtanh(),
        "downsample.conv": nn.Conv2d(24, 48, 1, 2, bias=True).double(),
        "drop_path": nn.Tanh(),
    }
    for train in (True, False):
        for name, module in changes.items():
            block = preact_block(train=train)
            ours = swap_blocks(nn.Sequential(copy.deepcopy(block)))[0]
            for b in (ours, block):
                b.set_submodule(name, copy.deepcopy(module))
            reason = swap_report(nn.Sequential(ours)).fused[0].reason
            assert reason.startswith("runs unfused: ") == name.startswith(("norm", "conv2")), name
            same(seen(ours, x), seen(block, x))


@pytest.mark.parametrize("convert", [freeze_batch_norm_2d, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_converted_batch_norms_of_a_pre_activation_block_are_timms_to_call(convert):
    block = preact_block(train=False)
    ours = swap_blocks(nn.Sequential(copy.deepcopy(block)))
    block, (ours,) = convert(block), convert(ours)
    assert type(ours) is FusedTimmPreActBottleneck and preact.unfusable(ours).startswith("norm1: ")
    x = torch.randn(2, 24, 9, 9).double()
    torch.testing.assert_close(ours(x), block(x), rtol=1e-9, atol=1e-9)


@modes
@pytest.mark.parametrize("options", [{}, {"side": None, "channels": (48, 48)}], ids=["projection", "identity"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_dtypes_of_a_pre_activation_block_under_autocast(given, options, train):
    """A wider shortcut gives the sum its dtype."""
    block = preact_block(train=train, **options).float()
    ours = swap_blocks(nn.Sequential(copy.deepcopy(block)))[0]
    x = torch.randn(2, block.conv1.in_channels, 8, 8).to(given)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x), block(x)
    assert a.dtype is b.dtype
    torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05)


def test_a_lean_pre_activation_block_decides_once():
    """A hook put on the projection between forward and backward is none of that backward's."""
    block, x = preact_block(), torch.randn(2, 24, 9, 9).double()
    grads = []
    for memory in ("default", "lean"):
        ours, x = swap_blocks(nn.Sequential(copy.deepcopy(block)), memory=memory)[0], x.detach().requires_grad_()
        y = ours(x)
        ours.downsample.conv.register_forward_hook(lambda m, a, out: out * 100)
        y.square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_a_batch_norm_in_eval_mode_in_a_training_pre_activation_block():
    for name in ("norm1", "norm2", "norm3"):
        block = preact_block()
        block.get_submodule(name).eval()
        ours = swap_blocks(nn.Sequential(copy.deepcopy(block)))[0]
        x = torch.randn(2, 24, 9, 9).double()
        same(seen(ours, x), seen(block, x))


# --- the stem ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet26d"])
def test_the_stem_is_fused_in_training(name, monkeypatch):
    monkeypatch.setattr(stem, "_has_pool", lambda x: True)
    calls, real = [], stem.pooled_stem
    monkeypatch.setattr("fused_resnet.timm_blocks.pooled_stem", lambda *a: calls.append(1) or real(*a))
    model, x = untouched(name)
    ours = swap_blocks(copy.deepcopy(model).double())
    assert stem.unpoolable(ours, timm_blocks._stem(ours)) is None
    same(parity.observe(ours, x.double()), parity.observe(model.double(), x.double()))
    assert len(calls) == 1
    ours.set_grad_checkpointing(), model.set_grad_checkpointing()
    again = [
        parity.observe(m, x.double()) for m in (ours, model)
    ]  # buffers: a checkpoint stops once it has what it needs
    same(*({key: v for key, v in s.items() if not key.startswith("buffer")} for s in again))
    assert len(calls) == 1
    ours.set_grad_checkpointing(False)
    ours.act1.register_forward_hook(lambda m, a, y: y * 2)
    assert stem.unpoolable(ours, timm_blocks._stem(ours)) == "act1: has hooks"


def test_a_stem_that_pools_otherwise_is_called():
    model = swap_blocks(timm.create_model("resnetrs50", num_classes=2))
    assert stem.unpoolable(model, timm_blocks._stem(model)) == "maxpool: Sequential is not MaxPool2d"


# --- around it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    model, x = untouched("resnet26d", train=False)
    ours = swap_blocks(model)
    other = copied(ours)
    assert [type(m) for m in other.modules()] == [type(m) for m in ours.modules()]
    assert torch.equal(other(x), ours(x))


def test_a_pickle_is_read_where_timm_has_not_been_imported(tmp_path):
    model, x = untouched("resnet10t", train=False)
    torch.save((swap_blocks(model), x, model(x)), tmp_path / "model.pt")
    program = f"""
        import torch, fused_resnet
        model, x, y = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        torch.testing.assert_close(model(x), y)
        assert len(fused_resnet.swap_report(model).fused) == 4
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_checkpoints_load_both_ways():
    model, x = untouched("resnet10t", train=False)
    ours = swap_blocks(timm.create_model("resnet10t", num_classes=10)).eval()
    ours.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    model.load_state_dict(ours.state_dict(), strict=True)


def test_features():
    """timm's ways to the maps inside, and torchvision's."""
    model, x = untouched("resnet26d", train=False)
    ours = swap_blocks(copy.deepcopy(model))
    for a, b in zip(ours.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    nodes = ["layer1", "layer3"]
    found, expected = (create_feature_extractor(m, nodes)(x) for m in (ours, model))
    for node in nodes:
        torch.testing.assert_close(found[node], expected[node], rtol=1e-4, atol=1e-4)
    backbone = timm.create_model("resnet26d", features_only=True).eval()
    want = backbone(x)
    assert len(swap_report(swap_blocks(backbone)).fused) == 8
    for a, b in zip(backbone(x), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, train",
    [
        ("seresnet18", True),
        *(
            pytest.param(name, train, marks=pytest.mark.slow)
            for name, train in (("seresnet18", False), *itertools.product(("resnet10t", "resnetv2_18"), (True, False)))
        ),
    ],
)
def test_compiles_whole(name, train, device):
    torch._dynamo.reset()
    model, x = untouched(name, device, train=train)
    ours = swap_blocks(copy.deepcopy(model).double())
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.double()), model.double()(x.double()))
    torch._dynamo.reset()


def test_exports():
    model, x = untouched("resnet26d", train=False)
    program = torch.export.export(swap_blocks(copy.deepcopy(model)), (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


PLANNED = ("resnet26d", "seresnet18", "resnetblur18", "regnetx_002", "resnetv2_18")


@pytest.mark.parametrize("name, swapped", [(n, s) for n in PLANNED for s in (False, True) if not s or n in FUSED])
def test_planned(name, swapped, device):
    """The whole network for inference, of timm's modules or of swapped ones: every convolution is in the plan, and the
    batch norm behind it, which in the last two is of a class of timm's."""
    model, x = untouched(name, device, train=False)
    judge = parity.judge_of(model, x, lambda m, x: {"output": m(x)})
    yardstick = parity.yardstick_of(model, x, judge, lambda m, x: {"output": m(x)})
    fast = fused_resnet.optimize_for_inference(swap_blocks(model) if swapped else model, example_input=x)
    parity.check(parity.errors({"output": fast(x)}, judge), yardstick)
    assert fast.plan.flop_share > 0.99
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert not any(norms & set(s.layers) for s in fast.plan.traced)
    alone = [s for s in fast.plan.steps if s.op == "norm"]
    assert len(alone) == {"resnetv2_18": 9}.get(name, 0)  # of each block the first, behind an add; and the last of all


def test_constructed_on_fused_blocks():
    model = timm_resnet.ResNet(FusedTimmBasicBlock, (1, 1, 1, 1), num_classes=3)
    assert len(swap_report(model).fused) == 4
    assert model(torch.randn(2, 3, 33, 33)).shape == (2, 3)
