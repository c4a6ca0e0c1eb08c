"""swap_blocks, restore_blocks, swap_report: one test a clause, each on the output and on what the report says."""

from __future__ import annotations

import copy
import io
import itertools

import parity
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrize, prune
from torchvision.models.quantization.resnet import QuantizableBasicBlock, QuantizableBottleneck
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1, conv3x3

from fused_resnet import FusedBasicBlock, FusedBottleneck, restore_blocks, swap_blocks, swap_report
from fused_resnet.convert import SwapReport

FORMATS = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
    "preserve": torch.preserve_format,
}


def network(block=Bottleneck, layers=(2, 1), device="cpu", train=False, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = parity.randomize_norms(parity.Short(block, layers, **kwargs), 0, branch=0.3).to(device)
    return parity.calibrate(model, image(device)).train(train)


def image(device="cpu") -> torch.Tensor:
    return torch.randn(2, 3, 33, 33, generator=torch.Generator().manual_seed(1)).to(device)


def strides(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: t.stride() for n, t in itertools.chain(model.named_parameters(), model.named_buffers())}


def entry(model: nn.Module, name: str):
    return next(b for b in swap_report(model).blocks if b.name == name)


def assert_same(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """The eval-mode output in float32; then, in float64 where no ReLU flips, output, all gradients and buffers."""
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)
    for train in (False, True):
        a, b = (parity.observe(m.double().train(train), x.double()) for m in (ours, theirs))
        assert a.keys() == b.keys()
        for key in b:
            torch.testing.assert_close(a[key], b[key], rtol=1e-8, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")


# --- what is swapped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_swaps_in_place_and_returns_the_model(block, device):
    model = network(block, device=device)
    expected = copy.deepcopy(model)
    parameters, keys, types = list(model.parameters()), list(model.state_dict()), [type(m) for m in model.modules()]
    assert swap_blocks(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    fused = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck}
    assert [type(m) for m in model.modules()] == [fused.get(t, t) for t in types]
    assert not any(m.training for m in model.modules())
    assert_same(model, expected, image(device))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("before", ["contiguous", "channels_last"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_layouts_and_restore(block, before, format, device):
    """The weights get the layout that was asked for; restore gives back types and strides to the last one."""
    model = network(block, device=device).to(memory_format=FORMATS[before])
    expected, kept = copy.deepcopy(model), strides(model)
    types = [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    swap_blocks(model, memory_format=FORMATS[format])
    if format == "preserve":
        assert strides(model) == kept
    else:
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert all(c.weight.is_contiguous(memory_format=FORMATS[format]) for c in convs)
        assert any(strides(model)[n] != kept[n] for n in kept) == (format != before)
    state = expected.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert_same(model, copy.deepcopy(expected), image(device))
    assert restore_blocks(model) is model
    assert [type(m) for m in model.modules()] == types
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert strides(model) == kept


def test_restore_goes_back_to_the_layout_before_the_first_swap(device):
    for before in ("contiguous", "channels_last"):
        model = network(device=device).to(memory_format=FORMATS[before])
        kept = strides(model)
        for format in ("channels_last", "contiguous", "channels_last"):
            swap_blocks(model, memory_format=FORMATS[format])
        assert strides(restore_blocks(model)) == kept


def test_default_layout_is_channels_last_throughout(device):
    """The stem's weight decides what the first block reads, so an image of any layout arrives as channels_last."""
    model = swap_blocks(network(device=device))
    seen = []
    model.layer1[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(image(device))
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()


def test_idempotent(device):
    model = network(device=device)
    kept = strides(model)
    once = copy.deepcopy(strides(swap_blocks(model)))
    report = swap_report(model)
    swap_blocks(swap_blocks(model))
    assert strides(model) == once and swap_report(model) == report
    assert strides(restore_blocks(restore_blocks(model))) == kept
    assert {type(m) for m in model.modules()} & {FusedBasicBlock, FusedBottleneck} == set()


def test_again_after_restore_and_new_blocks(device):
    """A block put in after the first swap is found by the second, and all of it is undone at once."""
    model = swap_blocks(network(device=device))
    model.layer1[1] = Bottleneck(256, 64).to(device).eval()
    assert [b.name for b in swap_report(model).blocks if b.status == "fusable"] == ["layer1.1"]
    swap_blocks(model)
    assert len(swap_report(model).fused) == 3
    restore_blocks(model)
    assert not swap_report(model).fused
    assert all(m.weight.is_contiguous() for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam], ids=lambda o: o.__name__)
def test_optimizer_made_before_goes_on(optimizer, device):
    """Swapped and restored in the middle of a training: the steps are those of the model that was left alone."""
    ours = network(device=device, train=True)
    theirs = copy.deepcopy(ours)
    options = dict(lr=1e-3, momentum=0.9) if optimizer is torch.optim.SGD else dict(lr=1e-3, eps=1e-2)
    updates = [optimizer(m.parameters(), **options) for m in (ours, theirs)]
    x = image(device)
    for change in (lambda m: m, swap_blocks, lambda m: m, restore_blocks):
        change(ours)
        for model, update in zip((ours, theirs), updates, strict=True):
            update.zero_grad()
            model(x).logsumexp(1).sum().backward()
            update.step()
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_checkpoints_go_both_ways(device):
    ours, theirs = swap_blocks(network(device=device)), network(device=device)
    for source, target in ((ours, theirs), (theirs, ours)):
        for p in source.parameters():
            p.data.mul_(1.01)
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        target.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
        torch.testing.assert_close(ours(image(device)), theirs(image(device)), rtol=1e-3, atol=1e-4)


def test_a_block_is_a_model_too(device):
    block = parity.randomize_norms(Bottleneck(16, 4), 0).to(device).eval()
    expected = copy.deepcopy(block)
    assert swap_blocks(block) is block and type(block) is FusedBottleneck
    assert [b.name for b in swap_report(block).fused] == [""]
    x = torch.randn(2, 16, 7, 9, device=device)
    torch.testing.assert_close(block(x), expected(x))
    assert type(restore_blocks(block)) is Bottleneck


def test_two_networks_in_one_model(device):
    """Any tree: two ResNets of different kinds, one of them twice, in a dict in a list."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList([nn.ModuleDict({"a": network()}), network(BasicBlock)])
            self.again = self.branches[0]["a"]

        def forward(self, x):
            return self.branches[0]["a"](x) + self.branches[1](x) + self.again(x.flip(3))

    model = Two().to(device)
    expected = copy.deepcopy(model)
    assert swap_blocks(model) is model
    report = swap_report(model)
    assert len(report.fused) == len(report.blocks) == 6
    assert report.blocks[0].name == "branches.0.a.layer1.0" and report.blocks[-1].name == "branches.1.layer2.0"
    assert_same(model, expected, image(device))


def test_without_blocks_nothing_happens(device):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).to(device)
    kept = strides(model)
    assert swap_blocks(model) is model and strides(model) == kept
    assert swap_report(model) == SwapReport(()) and str(swap_report(model)) == "0 of 0 residual blocks fused"
    assert restore_blocks(model) is model


@pytest.mark.parametrize("function", [swap_blocks, restore_blocks, swap_report])
@pytest.mark.parametrize("wrong", [None, 3, "resnet50", [nn.Identity()], Bottleneck], ids=str)
def test_refuses_what_is_no_module(function, wrong):
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got"):
        function(wrong)


@pytest.mark.parametrize("format", [None, "channels_last", torch.channels_last_3d], ids=str)
def test_refuses_an_unknown_layout(format):
    model = network()
    with pytest.raises(ValueError, match="memory_format"):
        swap_blocks(model, memory_format=format)
    assert not swap_report(model).fused


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_hooks_of_the_block_survive(device):
    """Hooks on a block are called by Module.__call__, whatever its forward: they are no reason to leave it."""
    model = network(device=device)
    calls = []
    for b in (model.layer1[0], model.layer2):
        b.register_forward_hook(lambda m, a, out: calls.append(type(m).__name__) or out * 1.1)
        b.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    expected = model(image(device))
    assert len(calls) == 4
    swap_blocks(model)
    torch.testing.assert_close(model(image(device)), expected, rtol=1e-4, atol=1e-5)
    assert calls[4:] == ["pre", "FusedBottleneck", "pre", "Sequential"]
    assert entry(model, "layer1.0").status == "fused"


def test_attributes_modes_and_requires_grad_survive(device):
    model = network(device=device)
    model.layer1[0].note = "mine"
    model.layer1[0].register_buffer("extra", torch.ones(3))
    model.layer2.train()
    model.layer1.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    frozen = [p.requires_grad for p in model.parameters()]
    p = model.layer1[0].conv1.weight
    p.mark = "tensor attribute"
    keys = list(model.state_dict())
    swap_blocks(model)
    assert model.layer1[0].note == "mine" and torch.equal(model.layer1[0].extra, torch.ones(3))
    assert [m.training for m in model.modules()] == modes
    assert [q.requires_grad for q in model.parameters()] == frozen
    assert model.layer1[0].conv1.weight is p and p.mark == "tensor attribute" and p.is_leaf
    assert list(model.state_dict()) == keys


def test_gradients_there_before_are_added_to(device):
    ours = network(device=device)
    theirs = copy.deepcopy(ours)
    for model in (ours, theirs):
        model(image(device)).sum().backward()
    swap_blocks(ours)
    for model in (ours, theirs):
        model(image(device)).square().sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=name)


# --- what is left, and why --------------------------------------------------------------------------------------------


class Mine(Bottleneck):
    """A user's subclass, with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 2


class Unchanged(BasicBlock):
    """A subclass that changes nothing."""


class MyConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class MyReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x).clamp(max=0.5)


class MyNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 0.9


def replaced(name, make):
    def change(block):
        setattr(block, name, make(getattr(block, name)))

    return change


def reflecting(conv):
    conv.padding_mode = "reflect"
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return conv


def same_padding(conv):
    new = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding="same", bias=False)
    new.weight = conv.weight
    return new


def subclassed(cls):
    def make(m):
        m.__class__ = cls
        return m

    return make


def share_convolution(block):
    block.conv3 = conv1x1(64, 64)
    block.bn3, block.conv2 = nn.BatchNorm2d(64), nn.Conv2d(64, 64, 1, bias=False)
    block.conv3 = block.conv2
    block.downsample = nn.Sequential(conv1x1(64, 64), nn.BatchNorm2d(64))


def hooked(name, register):
    def change(block):
        getattr(block.get_submodule(name), register)(lambda m, *a: None)

    return change


def instance_forward(block):
    block.forward = lambda x, forward=block.forward: forward(x) * 3


def submodule_forward(block):
    block.bn2.forward = lambda x, forward=block.bn2.forward: forward(x) * 3


def parametrized(block):
    parametrize.register_parametrization(block.conv2, "weight", nn.Tanh())


def pruned(block):
    prune.l1_unstructured(block.conv2, "weight", amount=0.3)


LEFT = {
    "replaced_relu": (replaced("relu", lambda m: nn.LeakyReLU(0.1)), "relu: LeakyReLU is not ReLU"),
    "silu": (replaced("relu", lambda m: nn.SiLU()), "relu: SiLU is not ReLU"),
    "relu6": (replaced("relu", lambda m: nn.ReLU6()), "relu: ReLU6 is not ReLU"),
    "relu_subclass": (replaced("relu", lambda m: MyReLU()), "relu: MyReLU is not ReLU"),
    "reflect": (replaced("conv2", reflecting), "conv2: padding_mode is 'reflect', not 'zeros'"),
    "same": (replaced("conv2", same_padding), "conv2: padding is 'same', not two integers"),
    "conv_subclass": (replaced("conv1", subclassed(MyConv)), "conv1: MyConv is not Conv2d"),
    "not_a_conv": (replaced("conv3", lambda m: nn.Sequential(m)), "conv3: Sequential is not Conv2d"),
    "identity_norm": (replaced("bn2", lambda m: nn.Identity()), "bn2: Identity is none of BatchNorm2d"),
    "group_norm": (replaced("bn2", lambda m: nn.GroupNorm(4, 64)), "bn2: GroupNorm is none of BatchNorm2d"),
    "instance_norm": (replaced("bn1", lambda m: nn.InstanceNorm2d(64)), "bn1: InstanceNorm2d is none of BatchNorm2d"),
    "norm_subclass": (replaced("bn3", subclassed(MyNorm)), "bn3: MyNorm is none of BatchNorm2d"),
    "shared_conv": (share_convolution, "conv2: is shared with another batch norm"),
    "hook_on_conv": (hooked("conv1", "register_forward_hook"), "conv1: has hooks"),
    "pre_hook_on_norm": (hooked("bn3", "register_forward_pre_hook"), "bn3: has hooks"),
    "hook_on_relu": (hooked("relu", "register_forward_hook"), "relu: has hooks"),
    "backward_pre_hook": (hooked("conv3", "register_full_backward_pre_hook"), "conv3: has hooks"),
    "parametrization": (parametrized, "conv2: ParametrizedConv2d is not Conv2d"),
    "pruned": (pruned, "conv2: has hooks"),
    "instance_forward": (instance_forward, "forward is overridden on the instance"),
    "submodule_forward": (submodule_forward, "bn2: forward is overridden on the instance"),
}


@pytest.mark.parametrize("clause", LEFT)
def test_left_with_its_reason(clause, device):
    """The block that breaks the clause is left with its reason, the others are fused, and nothing changes its value."""
    change, reason = LEFT[clause]
    ours, theirs = network(device=device), network(device=device)
    for model in (ours, theirs):
        torch.manual_seed(5)
        change(model.layer1[0])
        if clause == "shared_conv":
            model.layer1[1].conv1, model.layer1[1].downsample = conv1x1(64, 64), conv1x1(64, 256)
        model.to(device).eval()
    if clause == "shared_conv":
        reference = ours(image(device))
    assert reason in entry(ours, "layer1.0").reason and entry(ours, "layer1.0").status == "left"
    swap_blocks(ours)
    report = swap_report(ours)
    assert type(ours.layer1[0]) is Bottleneck
    assert [b.name for b in report.left] == ["layer1.0"] and reason in report.left[0].reason
    assert len(report.fused) == 2
    assert reason in str(report) and "2 of 3 residual blocks fused" in str(report)
    if clause == "shared_conv":
        torch.testing.assert_close(ours(image(device)), reference, rtol=1e-4, atol=1e-4)
    if "backward" in clause:  # torchvision's own `out += identity` does not go with a hook on the last BN
        torch.testing.assert_close(ours(image(device)), theirs(image(device)), rtol=1e-4, atol=1e-4)
    else:
        assert_same(ours, theirs, image(device))


@pytest.mark.parametrize("where", ["two_blocks", "downsample"])
def test_convolution_shared_by_two_batch_norms(where, device):
    ours, theirs = network(layers=(3, 1), device=device), network(layers=(3, 1), device=device)
    for model in (ours, theirs):
        if where == "two_blocks":
            model.layer1[2].conv2 = model.layer1[1].conv2
        else:
            model.layer1[0].downsample[0] = model.layer1[0].conv3
    swap_blocks(ours)
    report = swap_report(ours)
    left = ["layer1.1", "layer1.2"] if where == "two_blocks" else ["layer1.0"]
    assert [b.name for b in report.left] == left
    assert all("is shared with another batch norm" in b.reason for b in report.left)
    assert_same(ours, theirs, image(device))


def test_users_subclass_with_another_forward(device):
    ours, theirs = network(Mine, device=device), network(Mine, device=device)
    with pytest.warns(UserWarning, match="none of its 3 .* Mine is not exactly BasicBlock or Bottleneck"):
        swap_blocks(ours)
    report = swap_report(ours)
    assert len(report.left) == 3 and all(type(m) is Mine for m in ours.layer1)
    assert report.left[0].reason.startswith("Mine is not exactly BasicBlock or Bottleneck")
    assert report.left[0].type == "Mine"
    assert_same(ours, theirs, image(device))


def test_users_subclass_with_the_same_forward(device):
    ours, theirs = network(Unchanged, device=device), network(Unchanged, device=device)
    swap_blocks(ours)
    assert len(swap_report(ours).fused) == 3 and all(isinstance(m, Unchanged) for m in ours.layer1)
    assert_same(ours, theirs, image(device))
    restore_blocks(ours)
    assert all(type(m) is Unchanged for m in ours.layer1)


@pytest.mark.parametrize("block", [QuantizableBasicBlock, QuantizableBottleneck])
def test_quantizable(block, device):
    """torchvision's own fusion asks for the exact class of these."""
    ours, theirs = network(block, device=device), network(block, device=device)
    with pytest.warns(UserWarning, match=f"{block.__name__} is not exactly BasicBlock or Bottleneck"):
        swap_blocks(ours)
    assert all(type(m) is block for m in ours.layer1)
    assert_same(ours, theirs, image(device))


def test_foreign_norm_layer_throughout(device):
    ours, theirs = (network(norm_layer=lambda c: nn.GroupNorm(8, c), device=device) for _ in range(2))
    swap_blocks(ours)
    assert [b.status for b in swap_report(ours).blocks] == ["left"] * 3
    assert strides(ours) == strides(theirs)
    assert_same(ours, theirs, image(device))


def test_global_hook(device):
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: None)
    try:
        model = swap_blocks(network(device=device))
        assert all(b.reason == "a global module hook is registered" for b in swap_report(model).left)
        assert len(swap_report(model).left) == 3
    finally:
        handle.remove()
    assert len(swap_report(swap_blocks(model)).fused) == 3


# --- unusual shortcuts ------------------------------------------------------------------------------------------------


def maxpool_projection():
    return nn.Sequential(nn.MaxPool2d(2, 2, ceil_mode=True), conv1x1(256, 512), nn.BatchNorm2d(512))


def hooked_pool():
    pool = nn.AvgPool2d(2, 2, ceil_mode=True)
    pool.register_forward_hook(lambda m, args, out: out * 2)
    return nn.Sequential(pool, conv1x1(256, 512), nn.BatchNorm2d(512))


def three_by_three():
    return nn.Sequential(conv3x3(256, 512, 2), nn.BatchNorm2d(512))


def other_norm():
    return nn.Sequential(conv1x1(256, 512, 2), nn.GroupNorm(8, 512))


def bare_convolution():
    return conv1x1(256, 512, 2)


def with_dropout():
    return nn.Sequential(conv1x1(256, 512, 2), nn.BatchNorm2d(512), nn.Dropout(0.0))


class Projection(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 0.5


def subclass_of_sequential():
    return Projection(conv1x1(256, 512, 2), nn.BatchNorm2d(512))


def hooked_projection():
    m = nn.Sequential(conv1x1(256, 512, 2), nn.BatchNorm2d(512))
    m.register_forward_hook(lambda m, a, out: out * 0.5)
    return m


def hooked_inside():
    m = nn.Sequential(conv1x1(256, 512, 2), nn.BatchNorm2d(512))
    m[1].register_forward_hook(lambda m, a, out: out * 0.5)
    return m


def pooled_to_one():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), conv1x1(256, 512))


SHORTCUTS = {
    maxpool_projection: "Sequential is not Sequential(Conv2d, BatchNorm2d)",
    hooked_pool: "has hooks",
    three_by_three: "kernel_size is (3, 3), not (1, 1)",
    other_norm: "GroupNorm is none of",
    bare_convolution: "Conv2d is not Sequential(Conv2d, BatchNorm2d)",
    with_dropout: "Sequential is not Sequential(Conv2d, BatchNorm2d)",
    subclass_of_sequential: "Projection is not Sequential(Conv2d, BatchNorm2d)",
    hooked_projection: "has hooks",
    hooked_inside: "has hooks",
    pooled_to_one: "AdaptiveAvgPool2d is not Conv2d",
}


@pytest.mark.parametrize("make", [pytest.param(m, id=m.__name__) for m in SHORTCUTS])
def test_unusual_downsample_is_called_as_it_is(make, device):
    """The block is fused all the same, and a note says what is not."""
    ours, theirs = network(device=device), network(device=device)
    for model in (ours, theirs):
        torch.manual_seed(5)
        model.layer2[0].downsample = make().to(device).eval()
    swap_blocks(ours)
    block = entry(ours, "layer2.0")
    assert block.status == "fused" and block.reason == ""
    assert block.note.startswith("downsample is called as it is: ") and SHORTCUTS[make] in block.note
    assert block.note in str(swap_report(ours))
    calls = []
    handle = ours.layer2[0].downsample.register_forward_hook(lambda *a: calls.append(1))
    ours(image(device))
    assert calls == [1]
    handle.remove()
    assert_same(ours, theirs, image(device))


@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize("ceil_mode, size", [(True, 33), (False, 32)])
def test_a_projection_behind_an_average_pool_is_fused(ceil_mode, size, memory, device):
    """ResNet-D's (arXiv 1812.01187, figure 2c); where there is no stride an Identity may stand in the pool's place."""
    ours, theirs = network(device=device), network(device=device)
    for model in (ours, theirs):
        torch.manual_seed(5)
        pool = nn.AvgPool2d(2, 2, ceil_mode=ceil_mode, count_include_pad=False)
        model.layer2[0].downsample = nn.Sequential(pool, conv1x1(256, 512), nn.BatchNorm2d(512)).to(device).eval()
        model.layer1[0].downsample.insert(0, nn.Identity())
    swap_blocks(ours, memory=memory)
    assert all(b.status == "fused" and not b.reason and b.note in ("", "lean") for b in swap_report(ours).blocks)
    x = torch.randn(2, 3, size, size).to(device)
    calls = []
    handle = ours.layer2[0].downsample[1].register_forward_hook(lambda *a: calls.append(1))
    ours(x)
    handle.remove()
    assert calls == [1]  # while it has a hook, the convolution is called
    assert_same(ours, theirs, x)


def test_identity_downsample(device):
    ours, theirs = network(device=device), network(device=device)
    for model in (ours, theirs):
        model.layer1[1].downsample = nn.Identity()
    swap_blocks(ours)
    assert "Identity is not Sequential" in entry(ours, "layer1.1").note
    assert_same(ours, theirs, image(device))


def test_pool_shared_by_shortcuts_is_no_shared_convolution(device):
    pool = nn.AvgPool2d(2, 2)
    model = network(layers=(2, 1, 1), device=device)
    for layer, width in ((model.layer2, 512), (model.layer3, 1024)):
        layer[0].downsample = nn.Sequential(pool, conv1x1(width // 2, width), nn.BatchNorm2d(width)).to(device)
    assert len(swap_report(swap_blocks(model)).fused) == 4


# --- the report -------------------------------------------------------------------------------------------------------


def test_report_before_and_after(device):
    model = network(device=device)
    assert [b.status for b in swap_report(model).blocks] == ["fusable"] * 3
    assert not swap_report(model).fused and not swap_report(model).left
    swap_blocks(model)
    report = swap_report(model)
    assert [b.name for b in report.fused] == ["layer1.0", "layer1.1", "layer2.0"]
    assert all(b.type == "FusedBottleneck" and b.reason == b.note == "" for b in report.blocks)
    lines = str(report).splitlines()
    assert lines[0] == "3 of 3 residual blocks fused" and len(lines) == 4 and "layer1.0" in lines[1]


def test_report_tells_of_a_fused_block_that_falls_back(device):
    """Asked of the model as it is now: a hook that came after the swap."""
    model = swap_blocks(network(device=device))
    handle = model.layer1[0].conv1.register_forward_hook(lambda *a: None)
    block = entry(model, "layer1.0")
    assert block.status == "fused" and block.reason == "runs unfused: conv1: has hooks"
    handle.remove()
    assert entry(model, "layer1.0").reason == ""


class OnFused(FusedBottleneck):
    """A user's subclass of a fused block."""


def test_report_on_a_subclass_of_a_fused_block(device):
    """It is fused by its own doing; to restore_blocks it is nobody's business."""
    model = network(OnFused, device=device)
    assert [b.status for b in swap_report(model).blocks] == ["fused"] * 3
    assert {type(m) for m in swap_blocks(restore_blocks(model)).layer1} == {OnFused}
    theirs = network(device=device)
    theirs.load_state_dict(model.state_dict())
    assert_same(model, theirs, image(device))


def test_report_on_built_models(device):
    model = torchvision.models.resnet18()
    model.layer1[0] = FusedBasicBlock(64, 64)
    statuses = [b.status for b in swap_report(model).blocks]
    assert statuses == ["fused"] + ["fusable"] * 7
