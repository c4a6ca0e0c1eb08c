"""The ops of a stem, and the networks that use them. What only a GPU does the tests make a CPU do."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import ResNet

import fused_resnet
from fused_resnet import stem
from fused_resnet.backends import cuda, library, pooled, reference, stem_conv, verify
from fused_resnet.stem import FusedLayerGetter, FusedResNet
from tests import parity

ops = torch.ops.fused_resnet
CL = torch.channels_last
EPS = 1e-5


@pytest.fixture(autouse=True)
def small_images_pay(monkeypatch):
    monkeypatch.setattr(stem, "_PIXELS", 0)


@pytest.fixture
def worth_it(monkeypatch):
    monkeypatch.setattr(stem, "_has_pool", lambda x: True)


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


# --- bn_act_pool ------------------------------------------------------------------------------------------------------


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


# --- stem_conv --------------------------------------------------------------------------------------------------------


def convolution(shape=(2, 3, 9, 12), k=4, dtype=torch.float64, format=torch.contiguous_format, weight_format=CL):
    """x and weight of stem_conv."""
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(k, shape[1], 7, 7).to(dtype)
    x, weight = x.contiguous(memory_format=format), weight.contiguous(memory_format=weight_format)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("weight_format", [CL, torch.contiguous_format])
@pytest.mark.parametrize("format", [CL, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(2, 3, 9, 12), (1, 3, 1, 5), (3, 5, 8, 7), (0, 3, 8, 8)])
def test_the_convolution_is_pytorchs(shape, format, weight_format):
    args = convolution(shape, format=format, weight_format=weight_format)
    y, wanted = ops.stem_conv(*args), F.conv2d(*args, None, 2, 3)
    last = CL in (format, weight_format)
    assert not y.numel() or y.is_contiguous(memory_format=CL if last else torch.contiguous_format)
    grad = torch.randn_like(wanted)
    found, expected = (torch.autograd.grad(v, args, grad) for v in (y, wanted))
    for got, want in zip((y, *found), (wanted, *expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert found[1].stride() == args[1].stride(), "a weight's gradient lies in memory as the weight"


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["x", "weight"])
def test_a_single_gradient_of_the_convolution(wanted):
    args = tuple(t.requires_grad_(on) for t, on in zip(convolution(), wanted, strict=True))
    grads = torch.autograd.grad(ops.stem_conv(*args).sum(), [t for t in args if t.requires_grad])
    (index,) = (i for i, on in enumerate(wanted) if on)
    both = convolution()
    expected = torch.autograd.grad(F.conv2d(*both, None, 2, 3).sum(), both)[index]
    torch.testing.assert_close(grads[0], expected)


def test_gradcheck_of_the_convolution():
    args = convolution((1, 3, 5, 6), k=2)
    assert torch.autograd.gradcheck(ops.stem_conv, args)
    assert torch.autograd.gradgradcheck(ops.stem_conv, args, fast_mode=True)


@pytest.mark.parametrize("format", [CL, torch.contiguous_format])
@pytest.mark.parametrize("weight_format", [CL, torch.contiguous_format])
def test_the_weight_gradient_is_pytorchs(format, weight_format):
    x, weight = (t.detach() for t in convolution((2, 3, 9, 12), 4, format=format, weight_format=weight_format))
    grad = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    found = ops.stem_conv_weight_grad(grad, x, weight)
    expected = torch.nn.grad.conv2d_weight(x, weight.shape, grad, stride=2, padding=3)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert found.stride() == weight.stride()
    # torch 2.11's own double backward of a convolution does not take symbolic sizes, so the sizes are fixed.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    args = grad.requires_grad_(), x.requires_grad_(), weight
    torch.library.opcheck(ops.stem_conv_weight_grad.default, args, test_utils=utils)


def test_gradients_of_the_weight_gradient():
    x, weight = (t.detach() for t in convolution((1, 3, 5, 6), k=2))
    args = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True), x.requires_grad_()
    assert torch.autograd.gradcheck(lambda grad, x: ops.stem_conv_weight_grad(grad, x, weight), args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(1, 64, 5, 5)}, r"grad: expected the convolution's \[1, 64, 5, 6\], got \[1, 64, 5, 5\]"),
        ({"grad": torch.zeros(1, 64, 5, 6).double()}, "grad: expected torch.float32, the type of x, got torch.float64"),
        ({"x": torch.zeros(3, 9, 12)}, "x: expected 4D input"),
        ({"weight": torch.zeros(64, 3, 5, 5)}, r"weight: expected a 7x7 convolution's \[K, C, 7, 7\], got"),
    ],
)
def test_bad_arguments_of_the_weight_gradient(change, message):
    given = dict(grad=torch.zeros(1, 64, 5, 6), x=torch.zeros(1, 3, 9, 12), weight=torch.zeros(64, 3, 7, 7))
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.stem_conv_weight_grad(**(given | change))


@pytest.mark.parametrize("format", [CL, torch.contiguous_format])
def test_opcheck_of_the_convolution(format):
    torch.library.opcheck(ops.stem_conv.default, convolution(dtype=torch.float32, format=format))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree_on_the_convolution(dtype):
    args = tuple(t.detach() for t in convolution((3, 3, 21, 34), 64, dtype))
    with fused_resnet.backend("cpu"):
        found = ops.stem_conv(*args)
    assert verify.difference(found, reference.stem_conv(*args)) <= verify.TOLERANCE[dtype]


def test_autocast_lowers_the_convolution():
    x, weight = convolution(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.stem_conv(x, weight)
    y.float().sum().backward()
    assert y.dtype is torch.bfloat16 and x.grad.dtype is weight.grad.dtype is torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 9, 12)}, "x: expected 4D input"),
        ({"x": torch.zeros(1, 4, 9, 12)}, "x: expected 3 channels"),
        ({"weight": torch.zeros(64, 3, 5, 5)}, r"weight: expected a 7x7 convolution's \[K, C, 7, 7\], got"),
        ({"weight": torch.zeros(64, 3, 7, 7).double()}, "weight: expected torch.float32"),
    ],
)
def test_bad_arguments_of_the_convolution(change, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.stem_conv(**(dict(x=torch.zeros(1, 3, 9, 12), weight=torch.zeros(64, 3, 7, 7)) | change))


def halves(*shape):
    return torch.zeros(shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("x", "weight", "sentence"),
    [
        (halves(1, 3, 9, 12).float(), halves(64, 3, 7, 7).float(), "has stem_conv for float16 and bfloat16, got"),
        (halves(1, 3, 9, 12), halves(64, 3, 7, 7).float(), "needs weight in torch.float16, got torch.float32"),
        (halves(1, 4, 9, 12), halves(64, 4, 7, 7), "has stem_conv for 3 channels, got 4"),
        (halves(1, 3, 9, 12), halves(64, 3, 3, 3), "has stem_conv for kernels of 7x7, got 3x3"),
        (halves(1, 3, 9, 12), halves(96, 3, 7, 7), "has stem_conv for a multiple of 64 output channels, got 96"),
        (halves(1, 3, 9, 13), halves(64, 3, 7, 7), "has stem_conv for an even width, got 13"),
        (halves(325)[1:].view(1, 3, 9, 12), halves(64, 3, 7, 7), "needs x at a multiple of 4 bytes"),
        (halves(1, 3, 1, 1).expand(1, 3, 2**15, 2**15), halves(64, 3, 7, 7), r"has stem_conv for images of less"),
        (halves(1, 3, 9, 12), halves(64, 3, 7, 7), None),
    ],
    ids=["float32", "mixed", "4-channels", "3x3", "96-filters", "odd-width", "misaligned", "large", "it-runs"],
)  # fmt: skip
def test_the_kernel_declines_with_a_sentence(monkeypatch, x, weight, sentence):
    if library.load() is not None or not library.build_facts().get("cuda"):
        pytest.skip("the compiled kernels are absent")
    monkeypatch.setattr(stem_conv, "chip", lambda device: (90, 132))
    found = stem_conv.declines(x, weight)
    assert found is None if sentence is None else re.match(sentence, found)
    monkeypatch.setattr(stem_conv, "chip", lambda device: (75, 40))
    assert stem_conv.declines(x, weight) == "has stem_conv for compute capability 8.0 or newer, got 7.5"


def gradient_of(x, k=64):
    """Of stem_conv's output, channels_last."""
    n, _, h, w = x.shape
    return torch.zeros(n, k, (h + 1) // 2, (w + 1) // 2, dtype=x.dtype, device=x.device).contiguous(memory_format=CL)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": halves(1, 3, 9, 13)}, "has stem_conv_weight_grad for an even width, got 13"),
        ({"grad": gradient_of(halves(1, 3, 9, 12)).float()}, "needs grad in torch.float16, got torch.float32"),
        ({"grad": halves(64 * 30 + 4)[4:].view(1, 64, 5, 6)}, "needs grad at a multiple of 16 bytes"),
        ({}, None),
    ],
    ids=["odd-width", "mixed", "misaligned", "it-runs"],
)
def test_the_weight_gradients_kernel_declines_with_a_sentence(monkeypatch, change, sentence):
    if library.load() is not None or not library.build_facts().get("cuda"):
        pytest.skip("the compiled kernels are absent")
    x = halves(1, 3, 9, 12)
    given = dict(grad=gradient_of(x), x=x, weight=halves(64, 3, 7, 7)) | change
    monkeypatch.setattr(stem_conv, "chip", lambda device: (90, 132))
    assert stem_conv.declines_weight_grad(**given) == sentence


def test_the_rows_of_a_block_fill_the_chip_and_no_more():
    assert stem_conv._rows(1, 224, 224, 64, 90, 132) == 1
    for batch in (64, 256):
        rows = stem_conv._rows(batch, 224, 224, 64, 90, 132)
        assert rows > 4 and batch * -(-56 // rows) >= 0.9 * 2 * 132
    assert stem_conv._rows(4, 7, 30, 64, 90, 1) <= 2
    # Of its weight's gradient one block fits on an A100's multiprocessor, two on an H100's.
    for arch, sms, resident in ((80, 108, 1), (90, 132, 2)):
        for batch in (4, 8, 16, 32, 128):
            rows = stem_conv._rows_of_weight(batch, 224, 224, 64, arch, sms)
            turns = {r: -(-batch * -(-56 // r) // (sms * resident)) * (r + 2) for r in (1, 2, 4, 7, 14, 28)}
            assert turns[rows] == min(turns.values())


def test_what_is_verified_apart(monkeypatch):
    """What the kernel does at edges, and beyond its first pair of rows and its first tile."""
    monkeypatch.setattr(stem_conv, "chip", lambda device: (90, 132))
    weight = halves(64, 3, 7, 7)
    shapes = [(256, 224, 224), (256, 222, 224), (256, 224, 222), (256, 223, 224), (256, 224, 256), (1, 224, 224)]
    shapes += [(512, 8, 16)]  # all of its rows by one block
    found = [stem_conv.variant(torch.empty(n, 3, h, w, device="meta"), weight) for n, h, w in shapes]
    assert len(set(found)) == len(shapes)
    sample = torch.empty(41, 3, 224, 224, device="meta")
    assert stem_conv.variant(sample, weight) == found[0], "or the whole batch would be compared"


def test_what_is_verified_apart_of_the_weight_gradient(monkeypatch):
    """The same, and columns that fill no step of 16."""
    monkeypatch.setattr(stem_conv, "chip", lambda device: (90, 132))
    weight = halves(64, 3, 7, 7)

    def variant(n, h, w):
        x = torch.empty(n, 3, h, w, device="meta")
        return stem_conv.weight_grad_variant(gradient_of(x), x, weight)

    shapes = [(256, 224, 224), (256, 222, 224), (256, 224, 222), (256, 223, 224), (256, 224, 256), (1, 224, 224)]
    found = [variant(*shape) for shape in [*shapes, (512, 8, 32)]]
    assert len(set(found)) == len(found)
    assert variant(41, 224, 224) == found[0], "or the whole batch would be compared"


# --- conv_bn_act_pool -------------------------------------------------------------------------------------------------


def whole(shape=(2, 3, 9, 12), k=4, dtype=torch.float64, format=torch.contiguous_format, weight_format=CL, without=()):
    """The arguments of conv_bn_act_pool but eps. without: places of vectors that are None."""
    x, weight = convolution(shape, k, dtype, format, weight_format)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    vectors = [torch.rand(k, dtype=wide) + 0.5 for _ in range(4)]
    for v in vectors[:2]:
        v.requires_grad_()
    return x, weight, *(None if i in without else v for i, v in enumerate(vectors))


def whole_by_modules(x, weight, bn_weight, bn_bias, mean, var):
    y = F.conv2d(x, weight, None, 2, 3)
    if mean is not None:
        y = F.batch_norm(y, mean, var, bn_weight, bn_bias, False, 0.0, EPS)
    return F.max_pool2d(y.relu(), 3, 2, 1)


@pytest.mark.parametrize("without", [(), (0,), (1,), (0, 1), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("format", [CL, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(2, 3, 9, 12), (1, 5, 1, 5)])
def test_the_whole_stem_is_that_of_the_modules(shape, format, without):
    args = whole(shape, format=format, without=without)
    y, wanted = ops.conv_bn_act_pool(*args, EPS), whole_by_modules(*args)
    assert y.is_contiguous(memory_format=CL)
    grad = torch.randn_like(wanted)
    wrt = [a for a in args if a is not None and a.requires_grad]
    found, expected = (torch.autograd.grad(v, wrt, grad) for v in (y, wanted))
    for got, want in zip((y, *found), (wanted, *expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wanted", range(4))
def test_a_single_gradient_of_the_whole_stem(wanted):
    args = tuple(a.detach().requires_grad_(i == wanted) for i, a in enumerate(whole()))
    found = torch.autograd.grad(ops.conv_bn_act_pool(*args, EPS).sum(), args[wanted])
    torch.testing.assert_close(found, torch.autograd.grad(whole_by_modules(*args).sum(), args[wanted]))


def test_gradcheck_of_the_whole_stem():
    args = whole((1, 3, 5, 6), k=2)
    assert torch.autograd.gradcheck(lambda *a: ops.conv_bn_act_pool(*a, EPS), args)
    assert torch.autograd.gradgradcheck(lambda *a: ops.conv_bn_act_pool(*a, EPS), args, fast_mode=True)


def test_running_statistics_may_change_before_the_backward_of_the_whole_stem():
    args = whole()
    expected = torch.autograd.grad(ops.conv_bn_act_pool(*args, EPS).sum(), args[:4])
    y = ops.conv_bn_act_pool(*args, EPS)
    with torch.no_grad():
        args[4].add_(1), args[5].mul_(2)
    for got, want in zip(torch.autograd.grad(y.sum(), args[:4]), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("format", [CL, torch.contiguous_format])
def test_opcheck_of_the_whole_stem(format):
    # torch 2.11's own double backward of a convolution does not take symbolic sizes, so the sizes are fixed.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    args = *whole(dtype=torch.float32, format=format), EPS
    torch.library.opcheck(ops.conv_bn_act_pool.default, args, test_utils=utils)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree_on_the_whole_stem(dtype):
    args = *(t.detach() for t in whole((3, 3, 21, 34), 64, dtype)), EPS
    with fused_resnet.backend("cpu"):
        found = ops.conv_bn_act_pool(*args)
    assert verify.difference(found, reference.conv_bn_act_pool(*args)) <= verify.TOLERANCE[dtype]


def test_autocast_lowers_the_whole_stem():
    args = whole(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.conv_bn_act_pool(*args, EPS)
    y.float().sum().backward()
    assert y.dtype is torch.bfloat16 and {a.grad.dtype for a in args[:4]} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 9, 12)}, "x: expected 4D input"),
        ({"x": torch.zeros(1, 4, 9, 12)}, "x: expected 3 channels"),
        ({"weight": torch.zeros(64, 3, 5, 5)}, r"weight: expected a 7x7 convolution's \[K, C, 7, 7\], got"),
        ({"bn_bias": torch.zeros(63)}, r"bn_bias: expected \[64\]"),
        ({"running_var": None}, "running_mean and running_var: expected both or neither"),
        ({"running_mean": None, "running_var": None}, "running_mean: bn_weight and bn_bias need"),
    ],
)
def test_bad_arguments_of_the_whole_stem(change, message):
    given = dict(x=torch.zeros(1, 3, 9, 12), weight=torch.zeros(64, 3, 7, 7), bn_weight=torch.ones(64))
    given |= dict(bn_bias=torch.ones(64), running_mean=torch.ones(64), running_var=torch.ones(64), eps=EPS)
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.conv_bn_act_pool(**(given | change))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_verified_apart_of_the_whole_stem(monkeypatch, dtype):
    """In float16 its batch norm is not folded, and two kernels run."""
    for module in (stem_conv, cuda):
        monkeypatch.setattr(module, "chip", lambda device: (90, 132))
    weight = halves(64, 3, 7, 7).to(dtype)
    vectors = (torch.ones(64),) * 4

    def variant(n, h, w):
        x = torch.empty(n, 3, h, w, dtype=dtype, device="meta")
        return cuda.variant("conv_bn_act_pool", x, weight, *vectors, EPS)

    shapes = [(256, 224, 224), (256, 222, 224), (256, 224, 222), (256, 223, 224), (256, 224, 256), (1, 224, 224)]
    shapes += [(512, 8, 16)]  # all of its rows by one block
    found = [variant(*shape) for shape in shapes]
    assert len(set(found)) == len(shapes)
    assert variant(41, 224, 224) == found[0], "or the whole batch would be compared"
    assert stem_conv.declines(halves(1, 3, 9, 13), weight, "conv_bn_act_pool")  # with a sentence of its own


def test_walks_are_those_of_the_kernel():
    root = Path(__file__).parent.parent / "csrc"
    if not root.exists():
        pytest.skip("needs the sources")
    text = "".join((root / name).read_text() for name in ("bn_act.cu", "kernels/bn_act.cuh", "kernels/bn_act_pool.cuh"))
    constants = {name: int(value) for name, value in re.findall(r"constexpr int (k\w+) = (\d+);", text)}
    names = ("kLongestWalk", "kShortestWalk", "kPoolBlocks", "kThreads")
    assert [constants[name] for name in names] == [8, 2, 2, 256]
    # A whole batch walks by eights, few images by fours: 56 windows are whole walks of both, 60 are not.
    assert [pooled.walks(n, 64, 112, 112, 2, 132) for n in (256, 41)] == [(True, False)] * 2
    assert [pooled.walks(n, 64, 120, 120, 2, 132) for n in (256, 30)] == [(True, True), (True, False)]
    assert pooled.walks(1, 64, 4, 4, 2, 132) == (False, False)


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
        (lambda m: m.bn1.eval(), None),
        (lambda m: setattr(m, "bn1", nn.GroupNorm(2, 64)), "bn1: GroupNorm is none of"),
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
    if reason is not None:
        assert stem.pooled_stem(model, torch.zeros(2, 3, 32, 32).double()) is None


@pytest.fixture
def has_kernel(monkeypatch):
    """Which dtypes came where a kernel for three channels would serve."""
    seen = []
    monkeypatch.setattr(stem, "_has_kernel", lambda x, weight: seen.append((x.dtype, weight.dtype)) or True)
    return seen


def test_a_resnet_whose_convolution_is_the_op_trains_as_torchvisions(worth_it, has_kernel):
    model = network()
    fused = fused_resnet.swap_blocks(copy.deepcopy(model))
    x = torch.randn(3, 3, 33, 40, dtype=torch.float64)
    judge = parity.observe(model, x)
    parity.check(parity.errors(parity.observe(fused, x), judge), dict.fromkeys(judge, 0.0), torch.float64)
    assert has_kernel


def test_the_op_is_differentiable_twice_in_a_network(worth_it, has_kernel):
    def twice(model):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 33, 40, dtype=torch.float64)
        wanted = [model.conv1.weight, model.bn1.weight]
        once = torch.autograd.grad(model(x).pow(2).sum(), wanted, create_graph=True)
        return *once, *torch.autograd.grad(sum(g.pow(2).sum() for g in once), wanted)

    model = network()
    fused = fused_resnet.swap_blocks(copy.deepcopy(model))
    for got, want in zip(twice(fused), twice(model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    assert has_kernel


def _replaced(**options):
    def replace(model):
        model.conv1 = nn.Conv2d(3, 64, **(dict(kernel_size=7, stride=2, padding=3, bias=False) | options)).double()

    return replace


def _watched(model):
    model.conv1.register_forward_hook(lambda *args: None)


@pytest.mark.parametrize(
    "change",
    [
        _watched,
        lambda m: setattr(m.conv1, "forward", lambda x: F.conv2d(x, m.conv1.weight, None, 2, 3)),
        lambda m: nn.utils.parametrize.register_parametrization(m.conv1, "weight", nn.Identity()),
        _replaced(bias=True),
        _replaced(stride=1),
        _replaced(padding=2),
        _replaced(padding=6, dilation=2),
        _replaced(kernel_size=5, padding=3),
        _replaced(padding_mode="circular"),
        lambda m: setattr(m, "conv1", nn.Sequential(m.conv1)),
    ],
    ids="hook forward parametrized bias stride padding dilation kernel circular sequential".split(),
)
def test_what_is_no_plain_convolution_is_called(worth_it, has_kernel, change):
    model = fused_resnet.swap_blocks(network())
    change(model)
    assert stem.pooled_stem(model, torch.randn(2, 3, 32, 32).double()) is not None and not has_kernel


def test_on_a_cpu_the_convolution_is_called(worth_it, monkeypatch):
    model, called = fused_resnet.swap_blocks(network()), []
    real = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda conv, x: called.append(conv) or real(conv, x))
    stem.pooled_stem(model, torch.randn(2, 3, 32, 32).double())
    assert called == [model.conv1] and cuda.declines("stem_conv", torch.ones(1, 3, 8, 8), model.conv1.weight)


def test_the_kernel_serves_where_it_agreed_and_nothing_else_is_forced(monkeypatch):
    reasons = {"refuses": None, "objection": None}
    monkeypatch.setattr(stem, "refuses", lambda *args: reasons["refuses"])
    monkeypatch.setattr(stem, "objection", lambda *args: (reasons["objection"], True))
    args = halves(1, 3, 8, 8), halves(64, 3, 7, 7)
    assert stem._has_kernel(*args)
    for name, serves in {"cuda": True, "triton": False, "cudnn": False, "reference": False}.items():
        with fused_resnet.backend(name):
            assert stem._has_kernel(*args) is serves
    for which in reasons:
        monkeypatch.setitem(reasons, which, "cuda: a reason")
        assert not stem._has_kernel(*args)
        monkeypatch.setitem(reasons, which, None)


def test_feature_extractors_see_the_modules(worth_it):
    model = fused_resnet.swap_blocks(network())
    features = create_feature_extractor(model, ["relu", "maxpool", "layer1"])
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = features(x)
    assert found["relu"].shape == (2, 64, 16, 16) and found["maxpool"].shape == (2, 64, 8, 8)


def test_a_forced_backend_without_the_op_leaves_the_modules(monkeypatch):
    monkeypatch.setattr(stem, "refuses", lambda *args: None)
    x = type("OnAGpu", (), {"is_cuda": True, "dim": lambda self: 4})()
    assert stem._has_pool(x)
    for name, has in {"triton": True, "cuda": True, "cudnn": False, "reference": False}.items():
        with fused_resnet.backend(name):
            assert stem._has_pool(x) is has


@pytest.mark.parametrize("train", [True, False])
def test_a_cpu_fuses_float32_and_channels_last_only(monkeypatch, train):
    """What was measured to be faster."""
    x = torch.zeros(2, 3, 32, 32)
    model = fused_resnet.swap_blocks(network(torch.float32)).train(train)
    assert stem.pooled_stem(model, x) is not None
    monkeypatch.setattr(stem, "_PIXELS", 32 * 32)
    assert stem.pooled_stem(model, x) is not None and stem.pooled_stem(model, x[:1]) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert stem.pooled_stem(model, x) is None
    model.conv1.register_forward_hook(lambda *args: None)
    assert stem.pooled_stem(model, x) is None
    for dtype in (torch.float64, torch.bfloat16):
        assert stem.pooled_stem(fused_resnet.swap_blocks(network(dtype)).train(train), x.to(dtype)) is None
    contiguous = fused_resnet.swap_blocks(network(torch.float32), memory_format=torch.preserve_format)
    assert stem.pooled_stem(contiguous.train(train), x) is None


# --- stems of given statistics, and of other networks -----------------------------------------------------------------


def frozen(model):
    """With a FrozenBatchNorm2d, as detectors have, and a stem that does not train."""
    model.bn1 = torchvision.ops.FrozenBatchNorm2d(64)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(model.bn1, name).copy_(torch.rand(64) + 0.5)
    model.conv1.requires_grad_(False)
    return model


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What a GPU does with tensors of a CPU; the ops that were called."""
    called = []
    monkeypatch.setattr(stem, "_pays", lambda *args: True)
    monkeypatch.setattr(stem, "_on_gpu", lambda x: True)

    class Ops:
        def __getattr__(self, name):
            called.append(name)
            return getattr(ops, name)

    monkeypatch.setattr(stem, "_ops", Ops())
    return called


@pytest.mark.parametrize("kind", ["eval", "eval, gradients", "frozen"])
def test_with_given_statistics_a_gpu_has_one_op(on_a_gpu, kind):
    model = network()
    model = frozen(model).double() if kind == "frozen" else model.eval()
    fused = fused_resnet.swap_blocks(copy.deepcopy(model))
    x = torch.randn(2, 3, 33, 40, dtype=torch.float64)
    with torch.set_grad_enabled(kind != "eval"):
        torch.testing.assert_close(stem.pooled_stem(fused, x), model.maxpool(model.relu(model.bn1(model.conv1(x)))))
    assert on_a_gpu == ([] if kind == "eval, gradients" else ["conv_bn_act_pool"])


def test_gradients_through_given_statistics(on_a_gpu):
    model = network().eval()
    fused = fused_resnet.swap_blocks(copy.deepcopy(model))
    x = torch.randn(3, 3, 33, 40, dtype=torch.float64)
    judge = parity.observe(model, x)
    parity.check(parity.errors(parity.observe(fused, x), judge), dict.fromkeys(judge, 0.0), torch.float64)


@pytest.mark.parametrize("kind", ["train", "eval", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stems_by_the_rule(dtype, kind, device):
    """Beside torchvision's own variants, float64 the judge."""
    if device == "cpu" and dtype is not torch.float32:
        pytest.skip("a CPU calls the modules in 16 bits")
    model = parity.randomize_norms(network(torch.float32), 0, firm=True).train(kind != "eval")
    model = (frozen(model) if kind == "frozen" else model).to(device, dtype)
    x = torch.randn(4, 3, 64, 64).to(device, dtype)
    judge = parity.judge_of(model, x)
    fused = fused_resnet.swap_blocks(copy.deepcopy(model))
    assert stem.pooled_stem(copy.deepcopy(fused), x) is not None
    parity.check(parity.errors(parity.observe(fused, x), judge), parity.yardstick_of(model, x, judge), dtype)


def test_a_cpus_stem_counts_its_batches_once():
    model = network(torch.float32)
    fused = fused_resnet.swap_blocks(copy.deepcopy(model))
    x = torch.randn(2, 3, 32, 32)
    for m in (model, fused):
        m(x), m(x)
    assert fused.bn1.num_batches_tracked == 2
    torch.testing.assert_close(fused.bn1.running_var, model.bn1.running_var)


def noted(monkeypatch, module) -> list:
    """What this module's pooled_stem gives from now on."""
    found, real = [], stem.pooled_stem
    monkeypatch.setattr(module, "pooled_stem", lambda *args: found.append(real(*args)) or found[-1])
    return found


BODIES = {
    "detector": lambda: (
        torchvision.models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=3
        ).backbone.body
    ),
    "segmenter": lambda: (
        torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3).backbone
    ),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", BODIES)
def test_bodies_of_detectors_and_segmenters(monkeypatch, name, train):
    torch.manual_seed(0)
    body = parity.randomize_norms(BODIES[name](), 0, branch=0.2).train(train)
    fused = fused_resnet.swap_blocks(copy.deepcopy(body))
    assert type(fused) is FusedLayerGetter and list(fused.state_dict()) == list(body.state_dict())
    assert type(pickle.loads(pickle.dumps(fused))) is FusedLayerGetter
    found = noted(monkeypatch, stem)
    x = torch.randn(2, 3, 64, 96)
    got, want = fused(x), body(x)
    assert list(got) == list(want) and found[0] is not None
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-3)
    assert type(fused_resnet.restore_blocks(fused)) is IntermediateLayerGetter


def test_a_body_that_hands_the_stem_out_keeps_its_modules(monkeypatch):
    monkeypatch.setattr(stem, "pooled_stem", lambda *a: pytest.fail("was asked"))
    body = IntermediateLayerGetter(network(torch.float32).eval(), {"relu": "0", "layer2": "1"})
    fused = fused_resnet.swap_blocks(copy.deepcopy(body))
    x = torch.randn(1, 3, 32, 32)
    for key, want in body(x).items():
        torch.testing.assert_close(fused(x)[key], want, rtol=1e-4, atol=1e-4)


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1])
    if name == "resnet":
        return transformers.ResNetModel(transformers.ResNetConfig(**sizes))
    return transformers.RTDetrResNetBackbone(transformers.RTDetrResNetConfig(**sizes))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["resnet", "rt_detr"])
def test_stems_of_hugging_face(monkeypatch, tmp_path, name, train):
    model = parity.randomize_norms(hugging_face(name), 0, branch=0.2).train(train)
    own = type(model.embedder)
    fused = fused_resnet.swap_blocks(copy.deepcopy(model))
    found = noted(monkeypatch, stem)
    assert isinstance(fused.embedder, own) and isinstance(fused.embedder, stem.ModuleStem)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(fused.embedder(x), model.embedder(x), rtol=1e-4, atol=1e-5)
    assert found[0] is not None
    for got, want in zip(fused.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    again = pickle.loads(pickle.dumps(fused))
    assert isinstance(again.embedder, stem.ModuleStem) and isinstance(copy.deepcopy(fused).embedder, stem.ModuleStem)
    with pytest.raises(ValueError, match="channel dimension"):
        fused.embedder(torch.randn(2, 4, 64, 64))
    torch.testing.assert_close(fused.embedder(pixel_values=x), fused.embedder(x), rtol=1e-4, atol=1e-5)
    fused.embedder.embedder.register_forward_hook(lambda *args: found.append("hook"))
    fused.embedder(x)
    assert found[-1] == "hook" and found[-2] is None
    assert type(fused_resnet.restore_blocks(fused).embedder) is own


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "resnet18d"])
def test_stems_of_timm(monkeypatch, name, train):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = parity.randomize_norms(timm.create_model(name, num_classes=5), 0, branch=0.2).train(train)
    fused = fused_resnet.swap_blocks(copy.deepcopy(model))
    from fused_resnet import timm_blocks

    found = noted(monkeypatch, timm_blocks)
    x = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-3)
    assert found[0] is not None
    for got, want in zip(fused.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", ["resnet18", "resnet18d"])
def test_feature_extractors_of_timm(monkeypatch, name, first, kind):
    """Those that hand out the stem's inside, too."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, out_indices=(first, 2, 4), feature_cls=kind)
    model = parity.randomize_norms(model, 0, branch=0.2).eval()
    fused = fused_resnet.swap_blocks(copy.deepcopy(model))
    found = noted(monkeypatch, stem)
    x = torch.randn(3, 3, 64, 64)
    for got, want in zip(*(list(y.values()) if kind == "dict" else y for y in (fused(x), model(x))), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert len(found) == first and all(y is not None for y in found)
    assert type(pickle.loads(pickle.dumps(fused))) is type(fused) is not type(model)
    assert type(fused_resnet.restore_blocks(fused)) is type(model)


def test_a_deep_stem_on_a_gpu(on_a_gpu):
    """Its first convolution, of a picture's channels, is PyTorch's."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = parity.randomize_norms(timm.create_model("resnet18d", num_classes=5), 0, branch=0.2).double().eval()
    fused = fused_resnet.swap_blocks(copy.deepcopy(model))
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))


class Shifted(nn.Module):
    def forward(self, x):
        return 2 * x + 1


class Doubled(nn.Module):
    """Another layer of the same parts."""

    def __init__(self, layer):
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)

    def forward(self, x):
        return 2 * self.activation(self.normalization(self.convolution(x)))


@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
@pytest.mark.parametrize("name", ["timm", "resnet", "rt_detr", "rt_detr, a layer"])
def test_what_has_other_parts_is_called(name, later):
    """Modules behind those that the stem names, and layers of other classes."""
    if name == "timm":
        model = pytest.importorskip("timm").create_model("resnet18d", num_classes=4)
        model.bn1, model.layer1[0].conv1 = nn.BatchNorm2d(16), nn.Conv2d(16, 64, 3, padding=1, bias=False)
        model.layer1[0].downsample = nn.Sequential(nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64))
        tail = nn.Conv2d(64, 16, 1)
    else:
        model = hugging_face(name.partition(",")[0])

    def change(model):
        if name == "timm":
            model.conv1.append(copy.deepcopy(tail))
        elif name == "rt_detr":
            model.embedder.embedder.append(Shifted())
        elif name == "resnet":
            model.embedder.embedder = Doubled(model.embedder.embedder)
        else:
            model.embedder.embedder[1] = Doubled(model.embedder.embedder[1])

    model.eval()
    parity.randomize_norms(model, 0)
    if not later:
        change(model)
    fused = fused_resnet.swap_blocks(copy.deepcopy(model))
    if later:
        change(model), change(fused)
    x = torch.randn(2, 3, 64, 64)
    part = (lambda m: m.forward_features) if name == "timm" else (lambda m: m.embedder)
    torch.testing.assert_close(part(fused)(x), part(model)(x), rtol=1e-3, atol=1e-3)


def compilable():
    yield fused_resnet.swap_blocks(BODIES["segmenter"]().eval())
    timm = pytest.importorskip("timm")
    yield fused_resnet.swap_blocks(timm.create_model("resnet18", features_only=True, out_indices=(1, 2)).eval())
    yield fused_resnet.swap_blocks(hugging_face("resnet").eval()).embedder


def test_compilers_see_the_modules():
    x = torch.randn(1, 3, 32, 32)
    for model in compilable():
        torch._dynamo.reset()
        kept = EagerAndRecordGraphs()
        torch.compile(model, fullgraph=True, backend=kept)(x)
        (compiled,) = kept.graphs
        for graph in (compiled.graph, torch.export.export(model, (x,), strict=True).graph):
            called = [str(n.target) for n in graph.nodes if n.op.startswith("call")]
            assert sum("batch_norm" in target for target in called) == 1, "the blocks have ops for theirs"


def test_a_stem_is_called_as_before():
    embeddings = fused_resnet.swap_blocks(hugging_face("resnet").eval()).embedder
    assert list(inspect.signature(embeddings.forward).parameters) == ["pixel_values"]
    batch = {"pixel_values": {0: torch.export.Dim("batch")}}
    torch.export.export(embeddings, (torch.randn(2, 3, 32, 32),), dynamic_shapes=batch)
    with pytest.raises(TypeError):
        embeddings(x=torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("name", ["triton", "cuda", "cudnn", "reference"])
def test_a_forced_backend_without_the_op_of_given_statistics(on_a_gpu, name):
    """Where its others run."""
    model = network(torch.float32).eval()
    fused = fused_resnet.swap_blocks(copy.deepcopy(model))
    args = torch.randn(2, 3, 33, 41), fused.conv1.weight, *(torch.ones(64),) * 4, EPS
    refused = stem.refuses(stem.BACKENDS[name], "conv_bn_act_pool", args) is not None
    with torch.no_grad(), fused_resnet.backend(name):
        if refused:
            with pytest.raises(RuntimeError, match="conv_bn_act_pool|needs a CUDA device"):
                ops.conv_bn_act_pool(*args)
    with torch.no_grad(), fused_resnet.backend("reference"):
        stem.pooled_stem(fused, args[0])
    assert on_a_gpu == ["conv_bn_act_pool"]
    on_a_gpu.clear()
    with torch.no_grad(), contextlib.suppress(RuntimeError), fused_resnet.backend(name):  # the norm's: no GPU is here
        stem.pooled_stem(fused, args[0])
    assert on_a_gpu == ([] if refused else ["conv_bn_act_pool"])


def test_an_unknown_backend_is_told(on_a_gpu, monkeypatch):
    monkeypatch.setattr(fused_resnet.backends, "_forced", ["bogus"])
    model = fused_resnet.swap_blocks(network()).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="there is no backend 'bogus'"):
        stem.pooled_stem(model, torch.zeros(2, 3, 32, 32).double())


def test_restored_networks_keep_what_is_theirs():
    model = network()
    model.memory = "mine"
    assert fused_resnet.restore_blocks(fused_resnet.swap_blocks(model)).memory == "mine"
    model = fused_resnet.swap_blocks(hugging_face("resnet"))
    old = stem._fused_stem(type(model.embedder)._original, stem.Stem("of", "another", "version", ""))
    model.embedder.__class__ = old
    assert type(fused_resnet.restore_blocks(model).embedder) is old._original


@pytest.mark.parametrize("name", ["mobilenet", "vgg11"])
def test_what_has_no_fused_block_keeps_its_class(name):
    if name == "mobilenet":
        model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    else:
        model = pytest.importorskip("timm").create_model(name, features_only=True)
    kinds = [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match="no residual block was found"):
        fused_resnet.swap_blocks(model)
    assert [type(m) for m in model.modules()] == kinds


def test_transforms_see_the_modules():
    """The ops refuse them."""
    model = fused_resnet.swap_blocks(network(torch.float32)).eval()
    x = torch.randn(2, 3, 16, 16)
    seen = []

    def stemmed(x):
        seen.append(stem.pooled_stem(model, x))
        return model.maxpool(model.relu(model.bn1(model.conv1(x)))).sum()

    torch.func.grad(stemmed)(x)
    torch.vmap(stemmed)(x[None])
    torch.func.jvp(stemmed, (x,), (x,))
    assert seen == [None] * 3
    assert stem.pooled_stem(model, x) is not None


def test_under_sync_batch_norm_a_stem_is_the_one_of_a_process_alone():
    model = network(torch.float32)
    fused = fused_resnet.swap_blocks(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)))
    assert type(fused.bn1) is nn.SyncBatchNorm
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_average_and_its_gradient_are_those_of_pytorch(dtype):
    pool = torch.nn.AdaptiveAvgPool2d((1, 1))
    x = torch.randn(3, 5, 7, 9, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    y, expected = stem.averaged(pool, x), pool(x)
    assert torch.equal(y, expected) and "_Average" in type(y.grad_fn).__name__
    grad = torch.randn_like(expected)
    (dx,), (wanted,) = (torch.autograd.grad(v, x, grad) for v in (y, expected))
    assert torch.equal(dx, wanted) and dx.stride()[2:] == (0, 0)  # no memory behind it but one value a channel


def test_second_gradients_of_the_average():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    function = functools.partial(stem.averaged, torch.nn.AdaptiveAvgPool2d(1))
    assert torch.autograd.gradcheck(function, x) and torch.autograd.gradgradcheck(lambda x: function(x.sin()), x)


@pytest.mark.parametrize("kind", ["contiguous", "2x2", "hooked"])
def test_other_averages_are_called(kind):
    pool, seen = torch.nn.AdaptiveAvgPool2d(2 if kind == "2x2" else 1), []
    if kind == "hooked":
        pool.register_forward_hook(lambda *args: seen.append(1))
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    x = x if kind == "contiguous" else x.contiguous(memory_format=torch.channels_last)
    y = stem.averaged(pool, x)
    assert torch.equal(y, pool(x)) and len(seen) == (2 if kind == "hooked" else 0)
    assert "_Average" not in type(y.grad_fn).__name__
