"""Convolutions with a bias in front of a batch norm: it is fused, and is in the running mean, where PyTorch puts it."""

from __future__ import annotations

import copy
import itertools

import parity
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fused_resnet import optimize_for_inference, swap_blocks, swap_report

pytestmark = pytest.mark.filterwarnings("ignore:bias")


class Own(nn.Module):
    """As people write them who leave PyTorch's defaults."""

    def __init__(self, inputs, outputs, stride=1, downsample=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        self.downsample = downsample

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def block_of(kind, planes, stride=1, **norm):
    """From 64 channels to as many, or with a projection to others."""
    outputs, side = planes * getattr(kind, "expansion", 1), None
    if stride > 1:
        side = nn.Sequential(nn.Conv2d(64, outputs, 1, stride), nn.BatchNorm2d(outputs, **norm))
    options = {} if kind is Own else {"norm_layer": lambda channels: nn.BatchNorm2d(channels, **norm)}
    return kind(64, planes, stride, side, **options)


def untouched(kind=Bottleneck, device="cpu", train=True, dtype=torch.float64, **norm):
    """Two blocks, the second with a projection; every convolution with a bias that is not small."""
    torch.manual_seed(0)
    planes = (16, 24) if kind is Bottleneck else (64, 96)
    model = nn.Sequential(block_of(kind, planes[0], **norm), block_of(kind, planes[1], 2, **norm)).to(device)
    parity.randomize_norms(model, 0)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.bias = nn.Parameter(torch.randn(m.out_channels, device=device) * 3)
    return model.to(dtype).train(train), torch.randn(3, 64, 9, 14, device=device, dtype=dtype)


def biases(model):
    return {f"grad {name}.bias" for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def swapped(model, **options):
    ours = swap_blocks(copy.deepcopy(model), **options)
    assert len(swap_report(ours).fused) == 2 and {(b.reason, b.note) for b in swap_report(ours).blocks} <= {
        ("", ""),
        ("", "lean"),
    }
    return ours


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize(
    "kind, norm",
    [(Own, {}), *itertools.product((BasicBlock, Bottleneck), ({}, {"affine": False}, {"momentum": None}))],
    ids=str,
)
def test_equals_its_own_forward(kind, norm, memory, train, device):
    model, x = untouched(kind, device, train, **norm)
    ours = swapped(model, memory=memory)
    for _ in range(2):
        mine, theirs = parity.observe(ours, x), parity.observe(model, x)
        none = biases(model) if train else set()
        for name in none:  # theirs: a sum that is nothing but rounding errors
            assert torch.equal(mine.pop(name), torch.zeros_like(theirs[name])) and theirs.pop(name).abs().max() < 1e-9
        assert not train or any("running_mean" in name for name in mine)
        found = parity.errors(mine, theirs)
        assert max(found.values()) < 1e-9, max((e, n) for n, e in found.items())


@pytest.mark.parametrize("frozen", ["bn1", "bn3", "downsample.1", "bn2"])
def test_norms_that_are_frozen_one_by_one(frozen, device):
    """The bias in front of a frozen one has a gradient; the batch norms around it use their batches."""
    model, x = untouched(device=device)
    ours = swapped(model)
    for m in (ours, model):
        m[1].get_submodule(frozen).eval()
    mine, theirs = parity.observe(ours, x), parity.observe(model, x)
    conv = "1." + {"downsample.1": "downsample.0"}.get(frozen, frozen.replace("bn", "conv"))
    assert theirs[f"grad {conv}.bias"].abs().max() > 1e-3
    for name in biases(model) - {f"grad {conv}.bias"}:
        assert mine.pop(name).abs().max() < 1e-9 and theirs.pop(name).abs().max() < 1e-9
    assert max(parity.errors(mine, theirs).values()) < 1e-9


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_float32_by_the_rule(train, device):
    model, x = untouched(device=device, train=train, dtype=torch.float32)
    judge = parity.judge_of(model, x)
    yardstick = parity.yardstick_of(model, x, judge)
    seen = parity.observe(swapped(model), x)
    if train:
        for name in biases(model):
            seen.pop(name), judge.pop(name), yardstick.pop(name)
    parity.check(parity.errors(seen, judge), yardstick)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_half_precision(train):
    """Statistics and the bias' part of them in float32: a mean of 100 beside a spread of 1."""
    model, x = untouched(train=train, dtype=torch.float32)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.bias.data += 100
        if isinstance(m, nn.BatchNorm2d) and not train:
            m.running_mean += 100
    ours = swapped(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert torch.isfinite(y).all()
    judge = copy.deepcopy(model).double()
    assert parity.error(y, judge(x.double())) < 0.03
    for mine, theirs in zip(ours.buffers(), judge.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=0.01, atol=0.05)


def test_what_is_no_number_goes_through():
    model, x = untouched()
    ours = swapped(model)
    for m in (ours, model):
        m[0].conv2.bias.data[3], m[0].conv2.bias.data[5] = float("nan"), float("inf")
    a, b = ours(x), model(x)
    assert torch.equal(a.isnan(), b.isnan()) and a.isnan().any()


def test_frozen_biases_and_double_backward(device):
    model, x = untouched(BasicBlock, device, train=False)
    for block in model:
        block.conv1.bias.requires_grad_(False)
    ours = swapped(model)
    results = []
    for m in (ours, model):
        given = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(m(given).square().sum(), given, create_graph=True)
        first.square().sum().backward()
        results.append([given.grad, *(p.grad for p in m.parameters())])
    for mine, theirs in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def test_the_stem_keeps_its_bias(device):
    """Of a network whose first convolution has one, trained and not."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4).to(device)
    model.conv1 = nn.Conv2d(3, 64, 7, 2, 3, device=device)
    model, x = model.double(), torch.randn(2, 3, 64, 64, device=device).double()
    ours = swap_blocks(copy.deepcopy(model))
    for train in (True, False):
        mine, theirs = (parity.observe(m.train(train), x) for m in (ours, model))
        if train:
            assert mine.pop("grad conv1.bias").abs().max() < 1e-9 > theirs.pop("grad conv1.bias").abs().max()
        assert max(parity.errors(mine, theirs).values()) < 1e-9


def test_compiles_whole():
    model, x = untouched(dtype=torch.float32)
    ours = swapped(model)
    compiled = torch.compile(copy.deepcopy(ours), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ours(x), rtol=1e-4, atol=1e-4)


def test_planned(device):
    model, x = untouched(device=device, train=False, dtype=torch.float32)
    fast = optimize_for_inference(model, x, tune="off")
    assert fast.plan.flop_share == 1.0 and not fast.plan.traced
    assert parity.error(fast(x), copy.deepcopy(model).double()(x.double())) < 1e-5
