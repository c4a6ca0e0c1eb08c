"""The family of residual networks against twins in plain PyTorch (twins.py), torchvision's models, and the papers."""

from __future__ import annotations

import copy
import itertools
import json
import pickle

import parity
import pytest
import torch
import torchvision
import twins
from torch import fx, nn

import fused_resnet
from fused_resnet import cli, models, swap_blocks, swap_report, zoo
from fused_resnet.blocks import PlainBasicBlock, PlainBottleneck
from fused_resnet.engine import roofline
from fused_resnet.preact import PlainPreActBasicBlock, PlainPreActBottleneck
from fused_resnet.shortcuts import ZeroPad

SMALLEST = {"basic": 8, "bottleneck": 11}  # one block a stage
SHORTCUTS = ("projection", "zero_pad", "projection_all", None)
MEMBERS = [*itertools.product(SMALLEST, ("post", "pre"), SHORTCUTS)]
members = pytest.mark.parametrize("kind, activation, shortcut", MEMBERS)


def build(kind, activation, shortcut, n=1, seed=0, **kwargs):
    torch.manual_seed(seed)
    depth = (SMALLEST[kind] - 2) * n + 2
    how = {"residual": False} if shortcut is None else {"shortcut": shortcut}
    return models.cifar_resnet(depth, block=kind, activation=activation, **how, **kwargs)


def pair(kind, activation, shortcut, n=1, seed=0):
    """(ours, its twin with the same state), float64, batch norms away from where they begin."""
    ours = parity.randomize_norms(build(kind, activation, shortcut, n, seed), seed, branch=0.5)
    twin = twins.Network(kind, n, activation == "pre", shortcut)
    twin.load_state_dict(ours.state_dict(), strict=True)
    return ours.double(), twin.double()


def image(n=3, size=(9, 7), dtype=torch.float64, seed=5):
    return torch.randn(n, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def same(got: parity.Seen, expected: parity.Seen, limit=1e-9):
    """1e-9 of float64's 1e-16: what rounding grows to in a few batch norms over small batches."""
    wrong = {name: e for name, e in parity.errors(got, expected).items() if e > limit and expected[name].norm() > 1e-12}
    assert not wrong, wrong


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@members
def test_equals_its_twin(kind, activation, shortcut, training, layout):
    """Output, gradients of the input and of every parameter, running statistics."""
    ours, twin = pair(kind, activation, shortcut, n=2)
    ours, twin = ours.train(training).to(memory_format=layout), twin.train(training)
    same(parity.observe(ours, image().to(memory_format=layout)), parity.observe(twin, image()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@members
def test_with_the_large_stem(kind, activation, shortcut, training):
    """The networks for ImageNet, in small."""
    how = {"residual": False} if shortcut is None else {"shortcut": shortcut}
    ours = models.ResidualNetwork(kind, [1, 1, 1], width=16, num_classes=10, activation=activation, **how)
    twin = twins.Network(kind, 1, activation == "pre", shortcut, large=True)
    twin.load_state_dict(parity.randomize_norms(ours, 0, branch=0.5).state_dict(), strict=True)
    ours, twin = ours.double().train(training), twin.double().train(training)
    same(parity.observe(ours, image(size=(37, 41))), parity.observe(twin, image(size=(37, 41))))


def test_a_planted_error_is_seen():
    ours, twin = pair("basic", "pre", "zero_pad")
    ours.layer2[0].conv1.weight.register_hook(lambda grad: grad * 1.01)
    with pytest.raises(AssertionError, match=r"layer2\.0\.conv1"):
        same(parity.observe(ours, image()), parity.observe(twin, image()))


@members
def test_float32_by_the_rule(kind, activation, shortcut):
    """As far from float64 as the twin's own variants are; the median of three seeds, since ReLUs flip."""
    found = []
    for seed in parity.SEEDS:
        ours, twin = pair(kind, activation, shortcut, seed=seed)
        x = image(2, (12, 12), torch.float32, seed)
        judge = parity.judge_of(twin, x)
        yardstick = parity.yardstick_of(twin.float(), x, judge)
        found.append(parity.violations(parity.errors(parity.observe(ours.float(), x), judge), yardstick))
    assert sorted(map(len, found))[1] == 0, found


@members
def test_lean_computes_the_same(kind, activation, shortcut):
    ours, _ = pair(kind, activation, shortcut)
    lean = swap_blocks(copy.deepcopy(ours), memory="lean", memory_format=torch.preserve_format)
    assert all(b.note == "lean" for b in swap_report(lean).blocks)
    a, b = (parity.observe(m, image()) for m in (ours, lean))
    assert all(torch.equal(a[name], b[name]) for name in a)


@members
def test_modules_one_by_one(kind, activation, shortcut):
    """With a hook on each convolution every block and the stem call their modules; so does the graph of torch.fx."""
    ours, twin = pair(kind, activation, shortcut)
    calls = []
    hooked = copy.deepcopy(ours)
    for m in hooked.modules():
        if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)):
            m.register_forward_hook(lambda m, inputs, y: calls.append(m))
    expected = parity.observe(twin, image())
    same(parity.observe(hooked, image()), expected)
    assert len(calls) == sum(isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) for m in ours.modules())
    graph = fx.symbolic_trace(ours.eval())
    assert not any(node.op == "call_function" and "fused_resnet" in str(node.target) for node in graph.graph.nodes)
    _, twin = pair(kind, activation, shortcut)  # the other's running statistics have moved
    torch.testing.assert_close(graph(image()), twin.eval()(image()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "kind, activation, shortcut",
    [("basic", "post", "zero_pad"), ("bottleneck", "pre", "zero_pad"), ("basic", "pre", "projection"), MEMBERS[3]],
)
def test_compiles_whole(kind, activation, shortcut):
    torch._dynamo.reset()
    ours, twin = pair(kind, activation, shortcut)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = image()
    (compiled(x) ** 2).sum().backward()
    (twin(x) ** 2).sum().backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, twin.get_parameter(name).grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind, activation, shortcut", [m for m in MEMBERS if m[2] != "projection_all"])
def test_optimized_for_inference(kind, activation, shortcut):
    ours, twin = pair(kind, activation, shortcut)
    ours, twin = ours.float().eval(), twin.eval()
    x = image(2, (12, 12), torch.float32)
    fast = fused_resnet.optimize_for_inference(ours, example_input=x, tune="off")
    assert parity.error(fast(x), twin(x.double())) < 1e-5


@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "unfused"])
@pytest.mark.parametrize("norm", ["batch", "frozen", "group"])
@members
def test_autocast(kind, activation, shortcut, norm, hooked):
    """Whatever the dtypes that meet at the add: float32 norms beside bfloat16 convolutions, as in PyTorch."""
    norms = {
        "batch": nn.BatchNorm2d,
        "frozen": torchvision.ops.FrozenBatchNorm2d,
        "group": lambda channels: Float32GroupNorm(4, channels),
    }
    model = build(kind, activation, shortcut, norm_layer=norms[norm])
    if hooked:
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                m.register_forward_hook(lambda *_: None)
    x = image(4, (8, 8), torch.float32)
    for training in (True, False):
        model.train(training)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        with torch.no_grad():
            assert parity.error(low.float(), model(x)) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().logsumexp(1).sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


class Float32GroupNorm(nn.GroupNorm):
    """Returns float32 under autocast, as PyTorch's does on a GPU."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


@pytest.mark.parametrize("cls", [fused_resnet.FusedPreActBasicBlock, fused_resnet.FusedPreActBottleneck])
def test_no_norm_and_no_change_of_the_input(cls):
    """Without a norm the first ReLU reads the block's input, and the shortcut carries that input as it was."""
    block = cls(4 * cls.expansion, 4, norm_layer=lambda channels: nn.Identity())
    x = torch.randn(2, 4 * cls.expansion, 5, 5)
    out = before = x.clone()
    for conv in (m for m in block.children() if isinstance(m, nn.Conv2d)):
        out = conv(torch.relu(out))
    torch.testing.assert_close(block(x), before + out)
    assert torch.equal(x, before)


def test_restored_networks_are_pytorchs_own():
    """Stem and last norm included: not one op of this package is left in a post-activation network."""
    network = build("basic", "post", "zero_pad")

    def ours() -> set[str]:
        with torch.profiler.profile() as seen:
            network(image(dtype=torch.float32))
        return {event.name for event in seen.events() if event.name.startswith("fused_resnet::")}

    assert ours()
    fused_resnet.restore_blocks(network)
    assert not ours()
    swap_blocks(network)
    assert ours()


def test_copies_and_pickles():
    ours, _ = pair("bottleneck", "pre", "zero_pad")
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin.eval()(image()), ours.eval()(image()))


def test_half_precision_trains():
    for kind, activation, shortcut in MEMBERS:
        model = build(kind, activation, shortcut).bfloat16()
        model(image(4, (8, 8), torch.bfloat16)).float().logsumexp(1).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


# --- twins, parameters ------------------------------------------------------------------------------------------------


def main_path(model):
    return {name: p for name, p in model.named_parameters() if ".downsample." not in name}


@pytest.mark.parametrize("activation", ["post", "pre"])
@pytest.mark.parametrize("kind", SMALLEST)
def test_twins_begin_alike(kind, activation):
    """Residual or plain and whatever the shortcut, one seed gives the layers in common the same weights."""
    states = [main_path(build(kind, activation, shortcut, n=2)) for shortcut in SHORTCUTS]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    other = main_path(build(kind, activation, None, n=2, seed=1))
    assert not torch.equal(other["fc.weight"], states[0]["fc.weight"])


@pytest.mark.parametrize("activation", ["post", "pre"])
@pytest.mark.parametrize("kind", SMALLEST)
def test_zero_pad_adds_no_parameters(kind, activation):
    padded, plain = (build(kind, activation, shortcut, n=3) for shortcut in ("zero_pad", None))
    assert {n: p.shape for n, p in padded.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}


def test_drawing_weights_leaves_one_trace():
    """The generator moves on by what the network begins with, so two networks after one seed differ."""
    torch.manual_seed(0)
    a, b = models.cifar_resnet8(), models.cifar_resnet8()
    assert not torch.equal(a.conv1.weight, b.conv1.weight)


def count(model):
    return sum(p.numel() for p in model.parameters())


# arXiv 1512.03385, table 6, in millions, where the shortcuts are zero-padded.
PAPER = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}


@pytest.mark.parametrize("depth", PAPER)
def test_parameters_are_the_papers(depth):
    millions = count(models.cifar_resnet(depth, shortcut="zero_pad")) / 1e6
    places = len(str(PAPER[depth]).split(".")[1])
    assert abs(millions - PAPER[depth]) < 10**-places


@pytest.mark.parametrize(
    "model, parameters",
    [
        (lambda: models.cifar_resnet20(), 272_474),
        (lambda: models.cifar_bottleneck47(), 498_586),
        (lambda: models.cifar_resnet20(shortcut="zero_pad"), 269_722),
        (lambda: models.cifar_resnet20(residual=False), 269_722),
    ],
    ids=["basic 20", "bottleneck 47", "zero-padded 20", "plain 20"],
)
def test_parameters_to_the_digit(model, parameters):
    assert count(model()) == parameters


@pytest.mark.parametrize("kind, n", [("basic", 3), ("basic", 9), ("bottleneck", 5), ("bottleneck", 18)])
@pytest.mark.parametrize("pre", [False, True], ids=["post", "pre"])
def test_parameters_are_the_twins(kind, n, pre):
    for shortcut in SHORTCUTS:
        ours = build(kind, "pre" if pre else "post", shortcut, n)
        assert count(ours) == count(twins.Network(kind, n, pre, shortcut))


def test_parameters_of_the_five():
    found = [f"{zoo.entry(f'resnet{depth}').parameters / 1e6:.1f}" for depth in (18, 34, 50, 101, 152)]
    assert found == ["11.7", "21.8", "25.6", "44.5", "60.2"]


# --- torchvision's networks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_imagenet_networks_have_torchvisions_state(depth):
    with torch.device("meta"):
        ours, theirs = models.imagenet_resnet(depth), getattr(torchvision.models, f"resnet{depth}")()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize(
    "depth, options",
    [
        (18, {}),
        (18, {"zero_init_residual": True}),
        (50, {"replace_stride_with_dilation": [False, True, True]}),
        (50, {"groups": 4, "width_per_group": 8}),
    ],
    ids=["18", "zero-init", "dilated", "groups"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_imagenet_networks_are_torchvisions(depth, options, training):
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=5, **options)
    ours = models.imagenet_resnet(depth, num_classes=5, **options)
    if options.get("zero_init_residual"):
        zero = [name for name, p in theirs.named_parameters() if not p.any() and name.endswith("weight")]
        assert zero and zero == [name for name, p in ours.named_parameters() if not p.any() and name.endswith("weight")]
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = image(2, (33, 47))
    a, b = (parity.observe(m.double().train(training), x) for m in (ours, theirs))
    same(a, b)


@pytest.mark.parametrize("kind, depth", [("basic", 8), ("bottleneck", 11)])
def test_zero_init_residual_makes_preactivation_blocks_identities(kind, depth):
    model = models.cifar_resnet(depth, block=kind, activation="pre", shortcut="zero_pad", zero_init_residual=True)
    x = torch.randn(2, 16, 6, 6)
    block = model.layer1[0]
    assert torch.equal(block.eval()(x), block.downsample(torch.relu(block.bn1(x))))


@pytest.mark.slow
def test_very_deep():
    """1,001 layers of pre-activation blocks: a step in finite numbers."""
    torch.manual_seed(0)
    model = models.cifar_bottleneck1001(activation="pre")
    loss = nn.functional.cross_entropy(model(image(4, (8, 8), torch.float32)), torch.tensor([1, 2, 3, 4]))
    loss.backward()
    assert zoo.entry("cifar_bottleneck1001").depth == 1001
    assert loss.isfinite() and all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


# --- ZeroPad and plain blocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_zero_pad(stride, dtype):
    x = torch.randn(2, 3, 7, 9).to(dtype)
    for format in (torch.contiguous_format, torch.channels_last):
        y = ZeroPad(3, 8, stride)(x.to(memory_format=format))
        assert torch.equal(y[:, :3], x[:, :, ::stride, ::stride]) and y.shape[1] == 8 and not y[:, 3:].any()
        assert y.dtype == dtype and y.is_contiguous(memory_format=format)


def test_zero_pad_refuses():
    with pytest.raises(ValueError, match="^outplanes: "):
        ZeroPad(8, 4)
    with pytest.raises(ValueError, match="^stride: "):
        ZeroPad(4, 8, 0)
    for shape in ((1, 3, 5, 5), (4, 5, 5)):
        with pytest.raises(RuntimeError, match=r"^x: expected \[N, 4, H, W\], got "):
            ZeroPad(4, 8)(torch.zeros(shape))


@pytest.mark.parametrize("cls", [PlainBasicBlock, PlainBottleneck, PlainPreActBasicBlock, PlainPreActBottleneck])
def test_plain_blocks_have_no_shortcut(cls):
    with pytest.raises(ValueError, match="^downsample: a plain block has no shortcut, got Identity"):
        cls(8, 8, 1, nn.Identity())


@pytest.mark.parametrize("kind", SMALLEST)
def test_restore_leaves_plain_blocks(kind):
    """torchvision has none: its own block would add."""
    model = build(kind, "post", None).eval()
    before = model(image(dtype=torch.float32))
    fused_resnet.restore_blocks(model)
    assert torch.equal(model(image(dtype=torch.float32)), before)


def test_report_tells_of_preactivation_blocks():
    model = models.cifar_resnet8(activation="pre")
    model.layer2[0].conv1.register_forward_hook(lambda *_: None)
    report = swap_report(model)
    assert [b.status for b in report.blocks] == ["fused"] * 3
    assert [b.reason for b in report.blocks] == ["", "runs unfused: conv1: has hooks", ""]
    model.layer3[0].bn2.eval()
    report = swap_report(swap_blocks(model, memory="lean"))
    notes = ["lean", "", "not lean: a batch norm is frozen or synchronised"]
    assert [b.note for b in report.blocks] == notes


# --- known mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "cls",
    [
        fused_resnet.FusedBasicBlock,
        fused_resnet.FusedBottleneck,
        fused_resnet.FusedPreActBasicBlock,
        fused_resnet.FusedPreActBottleneck,
    ],
)
@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "unfused"])
def test_a_shortcut_that_does_not_fit(cls, training, hooked):
    block = cls(8, 4, 2).train(training)
    out = 4 * cls.expansion
    expected = rf"^residual: .*\[2, {out}, 3, 3\].*\[2, 8, 6, 6\].*projection.*zero_pad"
    if hooked:
        block.conv1.register_forward_hook(lambda *_: None)
        if not cls.__name__.startswith("FusedPreAct"):
            expected = "size of tensor"  # torchvision's own forward, and its words
    with pytest.raises(RuntimeError, match=expected):
        block(torch.randn(2, 8, 6, 6))


@pytest.mark.parametrize("activation", ["post", "pre"])
def test_an_identity_where_shapes_change(activation):
    expected = r"^shortcut: .*\[N, 16, H, W\].*\[N, 32, H/2, W/2\].*'projection' or 'zero_pad'"
    with pytest.raises(ValueError, match=expected):
        models.cifar_resnet(20, shortcut="identity", activation=activation)
    with pytest.raises(ValueError, match=r"\[N, 16, H, W\] to a branch of \[N, 64, H, W\]"):
        models.cifar_resnet(20, block="bottleneck", shortcut="identity", activation=activation)


def test_identity_where_nothing_changes():
    net = models.ResidualNetwork("basic", [3], stem="cifar", width=8, shortcut="identity", num_classes=10)
    assert net(image(dtype=torch.float32)).shape == (3, 10)
    assert all(block.downsample is None for block in net.layer1)


def test_a_bias_before_a_batch_norm_warns():
    model = torchvision.models.resnet18(num_classes=3)
    model.layer1[1].conv2 = nn.Conv2d(64, 64, 3, padding=1)
    model.layer2[0].downsample[0] = nn.Conv2d(64, 128, 1, 2)
    with pytest.warns(UserWarning, match=r"^bias: layer1\.1\.conv2, layer2\.0\.downsample\.0: .*bias=False"):
        swap_blocks(model)
    assert len(swap_report(model).fused) == 8 and {b.note for b in swap_report(model).blocks} == {""}
    model = models.cifar_resnet8(activation="pre")
    model.layer1[0].conv1 = nn.Conv2d(16, 16, 3, padding=1)
    with pytest.warns(UserWarning, match=r"^bias: layer1\.0\.conv1: "):
        swap_blocks(model)
    assert {b.reason for b in swap_report(model).blocks} == {""}


def test_a_bias_that_is_needed_does_not_warn(recwarn):
    """Folded batch norms, other norms, and the convolution that a pre-activation block ends with."""
    folded = torchvision.models.resnet18().eval()
    block = folded.layer1[0]
    block.conv1 = torch.nn.utils.fuse_conv_bn_eval(block.conv1, block.bn1)
    block.bn1 = nn.Identity()
    swap_blocks(folded)
    group = torchvision.models.resnet18(norm_layer=lambda channels: nn.GroupNorm(4, channels))
    group.layer1[0].conv1 = nn.Conv2d(64, 64, 3, padding=1)
    swap_blocks(group)
    pre = models.cifar_resnet8(activation="pre")
    pre.layer1[0].conv2 = nn.Conv2d(16, 16, 3, padding=1)
    swap_blocks(pre)
    assert not [w for w in recwarn if "takes away the bias" in str(w.message)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"activation": "relu_before_add"}, "^activation: expected one of 'post', 'pre', got 'relu_before_add'"),
        (
            {"shortcut": "none"},
            "^shortcut: expected one of 'projection', 'zero_pad', 'projection_all', 'identity', got",
        ),
        ({"block": "wide"}, "^block: expected 'basic' or 'bottleneck', got 'wide'"),
        ({"depth": 47}, r"^depth: three stages of n basic blocks have 6n \+ 2 layers \(44 or 50\), got 47"),
        ({"depth": 2}, r"^depth: .*\(8 or 14\), got 2"),
        ({"depth": 20.0}, r"^depth: .*got 20\.0"),
        ({"depth": 48, "block": "bottleneck"}, r"^depth: .*9n \+ 2 layers \(47 or 56\), got 48"),
        ({"replace_stride_with_dilation": [True]}, "^replace_stride_with_dilation: expected 2 values"),
        ({"stem": "cifar"}, "stem"),
        ({"width": 0}, "^width: expected an integer of at least 1, got 0"),
        ({"in_channels": "3"}, "^in_channels: expected an integer of at least 1, got '3'"),
        ({"num_classes": 0}, "^num_classes: "),
        ({"replace_stride_with_dilation": [True, False]}, "^replace_stride_with_dilation, groups, width_per_group: "),
        ({"replace_stride_with_dilation": True}, "^replace_stride_with_dilation: expected 2 values"),
        ({"residual": False, "zero_init_residual": True}, "^zero_init_residual: a plain network"),
        ({"block": ["basic"]}, "^block: "),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_cannot_be_built(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        models.cifar_resnet(**{"depth": 8, **arguments})


@pytest.mark.parametrize("layers", [[], [0, 1], [1.5], 3, [-1]])
def test_layers_that_cannot_be(layers):
    with pytest.raises(ValueError, match="^layers: expected "):
        models.ResidualNetwork("basic", layers)


def test_other_refusals():
    with pytest.raises(ValueError, match="^depth: expected one of 18, 34, 50, 101, 152, 200, got 20"):
        models.imagenet_resnet(20)
    with pytest.raises(ValueError, match="^weights: nobody has published any for cifar_resnet20"):
        models.cifar_resnet20(weights="DEFAULT")


# --- the zoo ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "cifar_resnet1202" else []) for n in models.FAMILY]
)
def test_names_tell_the_depth(name):
    entry = zoo.entry(name)
    digits = "".join(c for c in name.removesuffix("_4stage") if c.isdigit())
    assert entry.depth == int(digits)
    assert getattr(models, name).__name__ == name and name in getattr(models, name).__doc__ + name


def test_flop_are_the_rooflines():
    for name, macs in (("resnet18", 1.814e9), ("resnet50", 4.089e9)):  # torchvision's documentation: 1.81, 4.09 GFLOPS
        counted = zoo.entry(name).flop
        assert counted == sum(op.flops for op in roofline.network(getattr(torchvision.models, name)(), (3, 224, 224)))
        assert abs(counted / 2 - macs) < 1e-3 * macs


def test_maps():
    assert zoo.entry("cifar_resnet20").maps == ((16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8))
    assert zoo.entry("preact_resnet50").maps[1:] == ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
    with pytest.raises(ValueError, match="^name: "):
        zoo.entry("resnet19")


def test_zoo_command(capsys, monkeypatch):
    monkeypatch.setattr(models, "TORCHVISION", ("resnet50", "resnet152"))
    monkeypatch.setattr(models, "FAMILY", ("cifar_resnet56", "plain18"))
    assert cli.main(["zoo"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*models.TORCHVISION, *models.FAMILY)) and "25,557,032" in shown
    assert cli.main(["zoo", "--json"]) == 0
    found = {e["name"]: e for e in json.loads(capsys.readouterr().out)}
    assert found["cifar_resnet56"]["depth"] == 56 and found["resnet152"]["parameters"] == 60_192_808
