"""The stem's batch norm, ReLU and pool in one op, and the networks that use it. A CPU calls the modules: the tests make
it believe that the op pays."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import ResNet

import fused_resnet
from fused_resnet import stem
from fused_resnet.backends import pooled, reference, verify
from fused_resnet.stem import FusedResNet
from tests import parity

ops = torch.ops.fused_resnet
CL = torch.channels_last
EPS = 1e-5


@pytest.fixture
def worth_it(monkeypatch):
    monkeypatch.setattr(stem, "_worth_it", lambda x: not isinstance(x, torch.fx.Proxy))


def modules(x, weight, bias):
    return F.max_pool2d(F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS).relu(), 3, 2, 1)


def op(x, weight, bias):
    return ops.bn_act_pool(x, *ops.bn_stats(x), weight, bias, EPS)[0]


def given(shape, dtype=torch.float64, format=CL, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=format).requires_grad_()
    vectors = [
        torch.randn(shape[1], dtype=torch.float64 if dtype is torch.float64 else torch.float32) for _ in range(2)
    ]
    return x, *(v.requires_grad_() for v in vectors)


# --- the op -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [CL, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(2, 8, 7, 9), (3, 4, 8, 6), (2, 3, 1, 5), (1, 5, 2, 1)])
def test_values_and_gradients_are_those_of_the_modules(shape, format):
    args = given(shape, format=format)
    y, wanted = op(*args), modules(*args)
    assert y.is_contiguous(memory_format=format)
    grad = torch.randn_like(wanted)
    found, expected = (torch.autograd.grad(v, args, grad) for v in (y, wanted))
    for got, want in zip((y, *found), (wanted, *expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    args = given((2, 3, 5, 6))
    assert torch.autograd.gradcheck(op, args)
    assert torch.autograd.gradgradcheck(op, args)


def test_opcheck():
    x, weight, bias = given((2, 3, 5, 6), torch.float32)
    bn = (*ops.bn_stats(x.detach()), weight, bias)
    torch.library.opcheck(ops.bn_act_pool.default, (x, *bn, EPS))
    y, winner = ops.bn_act_pool(x.detach(), *bn, EPS)
    torch.library.opcheck(ops.bn_act_pool_bwd.default, (y.detach(), x.detach(), winner, *bn[:3], EPS, [True] * 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree(dtype):
    x, weight, bias = (t.detach() for t in given((3, 8, 9, 12), dtype))
    args = (x, *reference.bn_stats(x), weight, bias, EPS)
    expected = reference.bn_act_pool(*args)
    with fused_resnet.backend("cpu"):
        found = ops.bn_act_pool(*args)
    wanted = verify.comparable("bn_act_pool", args, expected)
    for got, want in zip(verify.comparable("bn_act_pool", args, found), wanted, strict=True):
        assert verify.difference(got, want) <= verify.TOLERANCE[dtype]


def test_a_window_is_won_once_by_the_first():
    y, winner = reference.bn_act_pool(torch.ones(1, 1, 4, 4), torch.zeros(1), torch.ones(1) - EPS, None, None, EPS)
    assert winner.tolist() == [[[[4, 3], [1, 0]]]]
    lost = reference.bn_act_pool(-torch.ones(1, 1, 4, 4), torch.zeros(1), torch.ones(1) - EPS, None, None, EPS)[1]
    assert (lost == pooled.LOST).all()
    g = pooled.scattered(torch.ones_like(y), winner, torch.Size((1, 1, 4, 4)))
    assert g.flatten().nonzero().flatten().tolist() == [0, 1, 4, 5] and g.sum() == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, "x: expected 4D input"),
        ({"mean": torch.zeros(4)}, r"mean: expected \[3\]"),
        ({"bn_bias": torch.zeros(2)}, r"bn_bias: expected \[3\]"),
        ({"x": torch.zeros(1, 3, 1, 1)}, "more than 1 value per channel"),
    ],
)
def test_bad_arguments(change, message):
    given = dict(
        x=torch.zeros(2, 3, 4, 4), mean=torch.zeros(3), var=torch.ones(3), bn_weight=None, bn_bias=None, eps=EPS
    )
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.bn_act_pool(**(given | change))


# --- networks ---------------------------------------------------------------------------------------------------------


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return (
        torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5).to(dtype).train()
    )


def test_a_resnet_trains_as_torchvisions(worth_it):
    model = network()
    fused = fused_resnet.swap_blocks(copy.deepcopy(model))
    assert type(fused) is FusedResNet and stem.unpoolable(fused) is None
    x = torch.randn(3, 3, 33, 40, dtype=torch.float64)
    judge = parity.observe(model, x)
    parity.check(parity.errors(parity.observe(fused, x), judge), dict.fromkeys(judge, 0.0), torch.float64)
    fused.eval(), model.eval()
    torch.testing.assert_close(fused(x), model(x))


def test_the_familys_networks_too(worth_it, monkeypatch):
    torch.manual_seed(0)
    model = fused_resnet.models.imagenet_resnet(18, num_classes=5).double().train()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    calls, real = [], stem.pooled_stem
    monkeypatch.setattr(fused_resnet.residual_network, "pooled_stem", lambda *a: calls.append(1) or real(*a))
    y = copy.deepcopy(model)(x)
    assert calls
    monkeypatch.setattr(fused_resnet.residual_network, "pooled_stem", lambda *a: None)
    torch.testing.assert_close(y, model(x))


def test_swap_and_restore():
    model = network()
    keys = list(model.state_dict())
    fused_resnet.swap_blocks(model)
    assert type(model) is FusedResNet and isinstance(model, ResNet) and list(model.state_dict()) == keys
    assert type(pickle.loads(pickle.dumps(model))) is FusedResNet
    assert type(fused_resnet.restore_blocks(model)) is ResNet


def test_what_is_no_plain_resnet_keeps_its_forward():
    class Own(ResNet):
        pass

    own = Own(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    assert type(fused_resnet.swap_blocks(own)) is Own
    model = network()
    model.forward = lambda x: x
    assert type(fused_resnet.swap_blocks(model)) is ResNet


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.relu.register_forward_hook(lambda *a: None), "relu: has hooks"),
        (lambda m: m.maxpool.register_forward_hook(lambda *a: None), "maxpool: has hooks"),
        (lambda m: m.bn1.register_forward_pre_hook(lambda *a: None), "bn1: has hooks"),
        (lambda m: m.bn1.eval(), "bn1: does not use the batch's own statistics"),
        (lambda m: setattr(m, "maxpool", nn.Identity()), "maxpool: Identity is not MaxPool2d"),
        (lambda m: setattr(m, "maxpool", nn.MaxPool2d(2, 2, 1)), "maxpool: kernel_size is 2, not 3"),
        (lambda m: setattr(m, "maxpool", nn.MaxPool2d(3, 2, 1, ceil_mode=True)), "maxpool: ceil_mode is True"),
        (lambda m: setattr(m, "relu", nn.GELU()), "relu: GELU is not ReLU"),
        (lambda m: setattr(m, "maxpool", nn.MaxPool2d((3, 3), (2, 2), (1, 1))), None),
    ],
)
def test_what_the_op_cannot_honour_is_called(worth_it, change, reason):
    model = fused_resnet.swap_blocks(network())
    change(model)
    found = stem.unpoolable(model)
    assert found is None if reason is None else found.startswith(reason)
    assert stem.pooled_stem(model, torch.zeros(2, 3, 32, 32).double()) is None or reason is None


def test_feature_extractors_see_the_modules(worth_it):
    model = fused_resnet.swap_blocks(network())
    features = create_feature_extractor(model, ["relu", "maxpool", "layer1"])
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = features(x)
    assert found["relu"].shape == (2, 64, 16, 16) and found["maxpool"].shape == (2, 64, 8, 8)


def test_a_forced_backend_without_the_op_leaves_the_modules(monkeypatch):
    monkeypatch.setattr(stem, "refuses", lambda *args: None)
    x = type("OnAGpu", (), {"is_cuda": True, "dim": lambda self: 4})()
    assert stem._worth_it(x)
    for name, has in {"triton": True, "cuda": True, "cudnn": False, "reference": False}.items():
        with fused_resnet.backend(name):
            assert stem._worth_it(x) is has


def test_on_a_cpu_the_modules_are_called():
    model = fused_resnet.swap_blocks(network())
    assert stem.pooled_stem(model, torch.zeros(2, 3, 32, 32).double()) is None


# --- the gradients of a block's two readers ---------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["default", "lean"])
def test_a_shortcuts_gradient_is_added_by_the_product(monkeypatch, memory):
    """What a GPU does in 16 bits, here in float64, twice differentiated."""
    from fused_resnet import training

    shared, seen = training.convolve_shared, []
    monkeypatch.setattr(training, "convolve_shared", lambda *a: seen.append(a[-1]) or shared(*a))

    def run(product):
        monkeypatch.setattr(
            training, "_product", lambda x, weight, conv: product and x.requires_grad and torch.is_grad_enabled()
        )
        torch.manual_seed(0)
        blocks = nn.Sequential(*torchvision.models.resnet50().layer1[:2]).double().train()
        fused_resnet.swap_blocks(blocks, memory=memory)
        x = torch.randn(2, 64, 6, 5, dtype=torch.float64).contiguous(memory_format=CL).requires_grad_()
        y = blocks(x)
        wanted = [x, *blocks.parameters()]
        once = torch.autograd.grad(
            y.pow(3).sum(), wanted, retain_graph=memory == "default", create_graph=memory == "default"
        )
        if memory == "lean":
            return once
        return *once, *torch.autograd.grad(sum(g.pow(2).sum() for g in once), wanted)

    for got, want in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert seen and all(seen)
