"""detectron2's residual blocks, whose convolutions call their batch norms: fused, beside its own forward."""

from __future__ import annotations

import copy
import pickle

import detectron2_standin
import parity
import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from fused_resnet import optimize_for_inference, restore_blocks, stem, swap_blocks, swap_report

resnet = detectron2_standin.imported()
modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
norms = pytest.mark.parametrize("norm", ["BN", "FrozenBN"])


class Network(nn.Module):
    """A stem and three blocks, two of which change channels."""

    def __init__(self, kind: str, norm: str, **options):
        super().__init__()
        self.conv1 = resnet.Conv2d(3, 16, 3, stride=2, padding=1, bias=False, norm=nn.BatchNorm2d(16))
        options["norm"] = norm
        if kind == "bottleneck":

            def block(inputs, outputs, **more):
                return resnet.BottleneckBlock(inputs, outputs, bottleneck_channels=8, **more, **options)
        else:

            def block(inputs, outputs, **more):
                return resnet.BasicBlock(inputs, outputs, **more, **options)

        self.res2, self.res3 = nn.Sequential(block(16, 32), block(32, 32)), block(32, 48, stride=2)

    def forward(self, x):
        return self.res3(self.res2(torch.relu(self.conv1(x))))


def untouched(kind: str, norm: str = "BN", train: bool = True, device="cpu", **options):
    torch.manual_seed(0)
    model, x = Network(kind, norm, **options).to(device), torch.randn(3, 3, 17, 22).to(device)
    parity.calibrate(parity.randomize_norms(model, 0), x)
    for m in model.modules():
        if type(m).__name__ == "FrozenBatchNorm2d":
            for tensor in (m.weight, m.running_var):
                tensor.uniform_(0.5, 1.5)
            m.running_mean.normal_().mul_(0.1)
    return model.double().train(train), x.double()


def same(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    for _ in range(2):
        found = parity.errors(parity.observe(ours, x), parity.observe(theirs, x))
        assert max(found.values()) < 1e-9, max((e, n) for n, e in found.items())


@modes
@norms
@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_equals_its_own_forward(kind, norm, memory, train, device):
    model, x = untouched(kind, norm, train, device)
    ours = swap_blocks(copy.deepcopy(model), memory=memory)
    report = swap_report(ours)
    assert len(report.fused) == len(report.blocks) == 3 and {b.reason for b in report.blocks} == {""}
    assert {b.type for b in report.fused} <= {"FusedDetectron2BasicBlock", "FusedDetectron2BottleneckBlock"}
    assert ours.res3.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    same(ours, model, x)
    same(restore_blocks(ours), model, x)
    assert [type(m) for m in ours.modules()] == [type(m) for m in model.modules()]


def test_synchronised_norms():
    """In evaluation: to train, PyTorch's needs a GPU."""
    model, x = untouched("bottleneck", "SyncBN", train=False)
    ours = swap_blocks(copy.deepcopy(model))
    assert len(swap_report(ours).fused) == 3
    same(ours, model, x)


@modes
@pytest.mark.parametrize(
    "options", [{"stride_in_1x1": True}, {"dilation": 2}, {"num_groups": 4}], ids=lambda o: next(iter(o))
)
def test_bottlenecks_of_all_kinds(options, train):
    model, x = untouched("bottleneck", train=train, **options)
    same(swap_blocks(copy.deepcopy(model)), model, x)


def hook(block):
    block.conv1.register_forward_hook(lambda m, args, y: y * 2)


def hook_on_a_norm(block):
    block.conv2.norm.register_forward_hook(lambda m, args, y: y * 2)


def activation(block):
    block.conv1.activation = nn.Softplus()


def another_norm(block):
    block.conv1.norm = nn.GroupNorm(2, block.conv1.out_channels).double()


def no_norm(block):
    block.conv1.norm = None


@modes
@pytest.mark.parametrize("later", [True, False], ids=["later", "before"])
@pytest.mark.parametrize("change", [hook, hook_on_a_norm, activation, another_norm, no_norm], ids=lambda f: f.__name__)
def test_what_is_not_fused_runs_its_own_forward(change, later, train):
    model, x = untouched("bottleneck", train=train)
    ours = copy.deepcopy(model)
    if later:
        swap_blocks(ours)
    for m in (ours, model):
        change(m.res2[1])
    swap_blocks(ours)
    report = swap_report(ours)
    assert [bool(b.reason) for b in report.blocks] == [False, True, False]
    same(ours, model, x)


def hook_on_the_shortcut(shortcut):
    shortcut.register_forward_hook(lambda m, args, y: y * 2)


def hook_on_the_shortcuts_norm(shortcut):
    shortcut.norm.register_forward_hook(lambda m, args, y: y * 2)


def shortcut_without_a_norm(shortcut):
    shortcut.norm = None


def shortcut_with_an_activation(shortcut):
    shortcut.activation = nn.Softplus()


SHORTCUTS = (hook_on_the_shortcut, hook_on_the_shortcuts_norm, shortcut_without_a_norm, shortcut_with_an_activation)


@modes
@pytest.mark.parametrize("change", SHORTCUTS, ids=lambda f: f.__name__)
def test_shortcuts_that_are_called_as_they_are(change, train):
    model, x = untouched("basic", train=train)
    ours = swap_blocks(copy.deepcopy(model))
    for m in (ours, model):
        change(m.res3.shortcut)
    report = swap_report(ours).blocks[-1]
    assert report.reason == "" and report.note.startswith("downsample is called as it is: Conv2d is not Sequential")
    same(ours, model, x)


def test_a_norm_that_is_called_twice():
    """By its convolution, and by torchvision's block, which knows nothing of that."""
    block = BasicBlock(8, 8)
    block.conv1 = resnet.Conv2d(8, 8, 3, padding=1, bias=False, norm=block.bn1)
    swap_blocks(detectron2 := Network("basic", "BN"))
    assert len(swap_report(detectron2).fused) == 3
    with pytest.warns(UserWarning, match="conv1: calls no norm that could be fused"):
        swap_blocks(block)
    block = BasicBlock(8, 8, downsample=nn.Sequential(resnet.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)))
    block.downsample[0].norm = block.downsample[1]
    x = torch.randn(2, 8, 9, 9)
    ours = swap_blocks(copy.deepcopy(block)).eval()
    assert "calls no norm" in swap_report(ours).blocks[0].note
    torch.testing.assert_close(ours(x), block.eval()(x))


def test_group_norm_is_left():
    with pytest.warns(UserWarning, match="none of its 3 .* conv1.norm: GroupNorm is none of BatchNorm2d"):
        swap_blocks(Network("basic", lambda channels: nn.GroupNorm(2, channels)))


def test_its_way_to_freeze():
    """freeze() puts other norms in place; a block that is fused already goes on with those."""
    model, x = untouched("bottleneck")
    ours = swap_blocks(copy.deepcopy(model))
    for m in (ours, model):
        m.res2[0].freeze().double()
    assert type(ours.res2[0].conv1.norm) is not nn.BatchNorm2d and swap_report(ours).blocks[0].reason == ""
    same(ours, model, x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies(copied):
    model, x = untouched("basic", train=False)
    ours = copied(swap_blocks(model))
    assert len(swap_report(ours).fused) == 3
    torch.testing.assert_close(ours(x), model(x))


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_planned_whole(kind, norm, device):
    model, x = untouched(kind, norm, train=False, device=device)
    model, x = model.float(), x.float()
    fast = optimize_for_inference(swap_blocks(copy.deepcopy(model)), x, tune="off")
    assert fast.plan.flop_share == 1.0 and not fast.plan.traced
    judge = copy.deepcopy(model).double()
    with torch.no_grad():
        assert parity.errors({"y": fast(x)}, {"y": judge(x.double())})["y"] < 1e-5
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.mul_(1.125)
        assert (
            parity.errors({"y": fast.refresh(model)(x)}, {"y": copy.deepcopy(model).double()(x.double())})["y"] < 1e-5
        )


class Stemmed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.stem = resnet.BasicStem(norm=norm)
        self.res2 = resnet.BasicBlock(64, 16, norm=norm)

    def forward(self, x):
        return self.res2(self.stem(x))


@modes
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "SyncBN"])
def test_its_stem(monkeypatch, norm, train, device):
    monkeypatch.setattr(stem, "_PIXELS", 0)
    torch.manual_seed(0)
    model = parity.randomize_norms(Stemmed(norm), 0).to(device).train(train)
    ours, found, real = swap_blocks(copy.deepcopy(model)), [], stem.pooled_stem
    monkeypatch.setattr(stem, "pooled_stem", lambda *args: found.append(real(*args)) or found[-1])
    if norm == "SyncBN":  # detectron2's own refuses a CPU in training
        for m in model.modules():
            m.__class__ = nn.BatchNorm2d if type(m) is nn.SyncBatchNorm else type(m)
    x = torch.randn(2, 3, 30, 34, device=device)
    y, want = ours(x), model(x)
    assert isinstance(ours.stem, resnet.BasicStem) and found[0] is not None
    torch.testing.assert_close(y, want, rtol=1e-3, atol=1e-4)
    assert type(restore_blocks(ours).stem) is resnet.BasicStem


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.conv1.norm.register_forward_hook(lambda *args: None),
        lambda s: s.conv1.register_forward_hook(lambda *args: None),
        lambda s: setattr(s.conv1, "norm", None),
        lambda s: setattr(s.conv1, "activation", nn.ReLU()),
        lambda s: setattr(s.conv1, "norm", nn.GroupNorm(2, 64)),
    ],
    ids="norm-hook conv-hook no-norm activation group-norm".split(),
)
def test_a_stem_that_is_not_fused_runs_its_own_forward(monkeypatch, change):
    monkeypatch.setattr(stem, "_PIXELS", 0)
    torch.manual_seed(0)
    model = Stemmed("BN").eval()
    ours = swap_blocks(copy.deepcopy(model))
    change(model.stem), change(ours.stem)
    x = torch.randn(1, 3, 20, 22)
    assert stem.pooled_stem(ours.stem, x, type(ours.stem)._stem) is None
    torch.testing.assert_close(ours.stem(x), model.stem(x))
