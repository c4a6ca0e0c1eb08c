"""Every backend that runs here against float64, the choice among them, and the check before one is trusted."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading

import parity
import pytest
import torch
import torch.nn.functional as F
from cases import (
    BN,
    DTYPES,
    LAYOUTS,
    SHAPES,
    Conv,
    Shape,
    bn_case,
    bwd_input_case,
    conv_case,
    outputs_and_grads,
    same_strides,
    to,
    unfused_bn,
    unfused_conv,
)
from torch._subclasses import FakeTensorMode

import fused_resnet
from fused_resnet import backends, ops
from fused_resnet.backends import reference, verify

conv_bn_act = torch.ops.fused_resnet.conv_bn_act.default
conv_bn_act_bwd = torch.ops.fused_resnet.conv_bn_act_bwd.default
bn_act = torch.ops.fused_resnet.bn_act.default
bn_act_bwd = torch.ops.fused_resnet.bn_act_bwd.default
bn_act_bwd_input = torch.ops.fused_resnet.bn_act_bwd_input.default
bn_stats = torch.ops.fused_resnet.bn_stats.default

layouts = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def refused(backend: str, op: str, *args) -> bool:
    """Whether a backend says that it cannot run this call; such a call is another test's business."""
    return backends.refuses(backends.BACKENDS[backend], op, args) is not None


# --- parity: the rule of parity.py, op by op ---


def check_parity(ours, unfused, make) -> None:
    """ours and PyTorch's unfused composition, in its variants and for three seeds, against float64."""
    measured, yardstick = [], []
    for seed in parity.SEEDS:
        case = make(seed=seed)
        dtype = case.args[0].dtype
        judge = outputs_and_grads(unfused, to(torch.float64, case.args), case.grad.double())
        measured.append(parity.errors(outputs_and_grads(ours, case.args, case.grad), judge))
        for variant in parity.VARIANTS:
            with parity.library(variant):
                format = torch.channels_last if variant == "channels_last" else torch.contiguous_format
                args = [
                    a.detach().contiguous(memory_format=format).requires_grad_(a.requires_grad)
                    if isinstance(a, torch.Tensor) and a.dim() == 4
                    else a
                    for a in case.args
                ]
                yardstick.append(parity.errors(outputs_and_grads(unfused, args, case.grad), judge))
    parity.check(parity.worst(measured), parity.worst(yardstick), dtype)


# The gradient of one channel's weight is a single number, which may be near zero by chance: no norm to be relative to.
SEVERAL = {name: shape for name, shape in SHAPES.items() if shape.k > 1}


@layouts
@dtypes
@pytest.mark.parametrize("shape", SEVERAL.values(), ids=SEVERAL)
def test_conv_bn_act_parity(backend, device, shape, dtype, layout):
    def make(seed):
        return conv_case(shape, dtype, layout, device=device, requires_grad=True, seed=seed)

    if refused(backend, "conv_bn_act", *make(0).args):
        pytest.skip(f"{backend} declines")
    with fused_resnet.backend(backend):
        check_parity(conv_bn_act, unfused_conv, make)


@layouts
@dtypes
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("bn", ["affine", "plain", None], ids=["affine", "plain", "no-bn"])
def test_conv_bn_act_options(backend, device, bn, residual, relu, dtype, layout):
    def make(seed):
        options = dict(bn=bn, residual=residual, relu=relu, requires_grad=True, seed=seed)
        return conv_case(SHAPES["3x3-stride2"], dtype, layout, device=device, **options)

    if refused(backend, "conv_bn_act", *make(0).args):
        pytest.skip(f"{backend} declines")
    with fused_resnet.backend(backend):
        check_parity(conv_bn_act, unfused_conv, make)


@layouts
@dtypes
@pytest.mark.parametrize("options", [dict(), dict(residual=False), dict(relu=False), dict(affine=False)], ids=str)
@pytest.mark.parametrize("batch_stats", [True, False], ids=["batch", "frozen"])
def test_bn_act_parity(backend, device, batch_stats, options, dtype, layout):
    def make(seed):
        case = bn_case(dtype, layout, batch_stats=batch_stats, device=device, requires_grad=True, seed=seed, **options)
        if batch_stats:  # the backend's own statistics, as batch_norm_act chains them
            mean, var = bn_stats(case.args[0].detach())
            case = case._replace(args=(case.args[0], mean, var, *case.args[3:]))
        return case

    if refused(backend, "bn_act", *bn_case(dtype, device=device).args):
        pytest.skip(f"{backend} declines")
    with fused_resnet.backend(backend):
        check_parity(bn_act, unfused_bn, make)


@layouts
@dtypes
@pytest.mark.parametrize("offset", [0, 1000], ids=["centred", "mean-1000-std"])
@pytest.mark.parametrize("size", [(5, 3, 7, 9), (1, 6, 1, 3), (2, 1, 5, 1)], ids=str)
def test_bn_stats_parity(backend, device, size, offset, dtype, layout):
    """Two passes or Welford: the mean of squares minus the square of the mean would lose (mean / std)**2 eps."""
    accumulator = reference.accumulator(dtype)
    measured, yardstick = [], []
    for seed in parity.SEEDS:
        g = torch.Generator().manual_seed(seed)
        x = (torch.randn(size, dtype=torch.float64, generator=g) + offset).to(dtype).to(device)
        x = x.contiguous(memory_format=LAYOUTS[layout])
        if refused(backend, "bn_stats", x):
            pytest.skip(f"{backend} declines")
        with fused_resnet.backend(backend):
            mean, var = bn_stats(x)
        assert mean.dtype is var.dtype is accumulator
        judge = dict(
            zip(("output var", "output mean"), torch.var_mean(x.double(), (0, 2, 3), correction=0), strict=True)
        )
        measured.append(parity.errors({"output mean": mean, "output var": var}, judge))
        for format in LAYOUTS.values():
            mean, var = torch.zeros_like(mean), torch.zeros_like(var)
            F.batch_norm(x.contiguous(memory_format=format), mean, var, training=True, momentum=1.0)
            count = x.numel() // x.shape[1]
            biased = var * ((count - 1) / count)
            yardstick.append(parity.errors({"output mean": mean, "output var": biased}, judge))
    parity.check(parity.worst(measured), parity.worst(yardstick), accumulator)


@layouts
def test_a_channel_without_variance(backend, device, layout):
    x = bn_case(torch.float32, layout, device=device).args[0]
    x[:, 1] = 7.25
    with fused_resnet.backend(backend):
        if refused(backend, "bn_stats", x):
            pytest.skip(f"{backend} declines")
        mean, var = bn_stats(x)
        assert mean[1] == 7.25 and var[1] == 0
        y = bn_act(x, mean, var, None, None, 1e-5, None, False, True)
    # x * scale + shift and (x - mean) * scale differ by this much, and PyTorch uses the one here, the other there.
    assert y[:, 1].abs().max() <= 7.25 / 1e-5**0.5 * torch.finfo(torch.float32).eps


@layouts
def test_float16_gradients_in_range_do_not_overflow_on_the_way(backend, device, layout):
    """With a large variance the weight's gradient is small, and that of the plain convolution out of range."""
    case = conv_case(SHAPES["3x3"], torch.float16, layout, relu=False, residual=False, device=device)
    x, weight, bn_weight, bn_bias, mean, var, *rest = case.args
    bwd = (case.grad * 200, None, x * 50, weight, bn_weight, mean * 100, var * 1e8, rest[0], *rest[2:], [True] * 5)
    if refused(backend, "conv_bn_act_bwd", *bwd):
        pytest.skip(f"{backend} declines")
    with fused_resnet.backend(backend):
        found = conv_bn_act_bwd(*bwd)
    wide = to(torch.float64, bwd)
    plain = reference.conv_bn_act_bwd(*wide[:4], None, None, None, *wide[7:-1], [False, True, False, False, False])[1]
    assert plain.abs().max() > torch.finfo(torch.float16).max
    for v, e in zip(found, reference.conv_bn_act_bwd(*wide), strict=True):
        assert parity.error(v, e) < 4 * torch.finfo(torch.float16).eps


# --- layout, strides and partial outputs ---


def strange(t: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in memory that is neither contiguous nor channels_last."""
    if how == "sliced":
        wide = torch.full((t.shape[0] + 1, *[2 * s for s in t.shape[1:]]), float("nan"), dtype=t.dtype, device=t.device)
        wide[1:, ::2, ::2, ::2] = t
        return wide[1:, ::2, ::2, ::2]
    if how == "permuted":
        return t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    if how == "offset":
        flat = torch.zeros(t.numel() + 1, dtype=t.dtype, device=t.device)
        flat[1:] = t.reshape(-1)
        return flat[1:].view(t.shape)
    raise AssertionError(how)


def fake_of(op, args):
    with FakeTensorMode() as mode:
        return op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))


def assert_as_fake(op, args, result) -> None:
    for found, fake in zip(
        result if isinstance(result, tuple) else (result,), verify._tuple(fake_of(op, args)), strict=True
    ):
        assert found.dtype is fake.dtype
        assert same_strides(found, fake), f"{found.shape} {found.stride()}, the fake has {fake.shape} {fake.stride()}"


@dtypes
@pytest.mark.parametrize("how", ["sliced", "permuted", "offset", "contiguous", "channels_last"])
@pytest.mark.parametrize("shape", ["3x3", "1x1-stride2", "32x4d", "depthwise", "1x1-map", "grey", "one-output"])
def test_conv_bn_act_takes_any_strides(backend, device, shape, how, dtype):
    case = conv_case(SHAPES[shape], dtype, device=device)
    if refused(backend, "conv_bn_act", *case.args):
        pytest.skip(f"{backend} declines")

    def placed(t):
        if not isinstance(t, torch.Tensor) or t.dim() != 4:
            return t
        return t.contiguous(memory_format=LAYOUTS[how]) if how in LAYOUTS else strange(t, how)

    args = tuple(placed(a) for a in case.args)
    bwd = (*(placed(a) for a in case.bwd), [True] * 5)
    with fused_resnet.backend(backend):
        y, grads = conv_bn_act(*args), conv_bn_act_bwd(*bwd)
    assert_as_fake(conv_bn_act, args, y)
    assert_as_fake(conv_bn_act_bwd, bwd, grads)
    assert grads[1].stride() == torch.empty_like(bwd[3]).stride()  # to the last dimension of size 1: DDP compares
    # Strides change the order of sums and nothing else: an eps for the square root of the number of terms.
    close = dict(rtol=0, atol=torch.finfo(dtype).eps * (case.grad.numel() // case.grad.shape[1]) ** 0.5)
    expected = (reference.conv_bn_act(*case.args), *reference.conv_bn_act_bwd(*case.bwd, [True] * 5))
    for v, e in zip((y, *grads), expected, strict=True):
        scale = e.abs().max().clamp(min=1)
        torch.testing.assert_close(v / scale, e.to(v.dtype) / scale, **close)


@pytest.mark.parametrize("x", LAYOUTS)
@pytest.mark.parametrize("weight", LAYOUTS)
@pytest.mark.parametrize("residual", LAYOUTS)
def test_x_and_weight_decide_the_layout(backend, device, residual, weight, x):
    """channels_last if one of the two is; the shortcut and the gradient that comes in follow."""
    case = conv_case(SHAPES["3x3"], torch.float32, device=device, requires_grad=True)
    if refused(backend, "conv_bn_act", *case.args):
        pytest.skip(f"{backend} declines")
    formats = {0: LAYOUTS[x], 1: LAYOUTS[weight], 7: LAYOUTS[residual]}
    args = tuple(
        a.detach().contiguous(memory_format=formats[i]).requires_grad_() if i in formats else a
        for i, a in enumerate(case.args)
    )
    with fused_resnet.backend(backend):
        y = conv_bn_act(*args)
        dx, dweight, dresidual = torch.autograd.grad(y, [args[0], args[1], args[7]], case.grad)
    expected = torch.channels_last if "channels_last" in (x, weight) else torch.contiguous_format
    for t in (y, dx, dresidual):
        assert t.is_contiguous(memory_format=expected)
    assert dweight.stride() == args[1].stride()
    torch.testing.assert_close(y, unfused_conv(*case.args))
    assert_as_fake(conv_bn_act, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args), y)


@dtypes
@pytest.mark.parametrize("how", ["sliced", "permuted", "offset", "contiguous", "channels_last"])
@pytest.mark.parametrize("batch_stats", [True, False], ids=["batch", "frozen"])
def test_bn_act_takes_any_strides(backend, device, batch_stats, how, dtype):
    case = bn_case(dtype, batch_stats=batch_stats, device=device)
    if refused(backend, "bn_act", *case.args):
        pytest.skip(f"{backend} declines")

    def placed(t):
        if not isinstance(t, torch.Tensor) or t.dim() != 4:
            return t
        return t.contiguous(memory_format=LAYOUTS[how]) if how in LAYOUTS else strange(t, how)

    args = tuple(placed(a) for a in case.args)
    bwd = (*(placed(a) for a in case.bwd), [True] * 4)
    with fused_resnet.backend(backend):
        stats, y, grads = bn_stats(args[0]), bn_act(*args), bn_act_bwd(*bwd)
    for op, full, found in ((bn_stats, args[:1], stats), (bn_act, args, y), (bn_act_bwd, bwd, grads)):
        assert_as_fake(op, full, found)
    close = dict(rtol=0, atol=torch.finfo(dtype).eps * (case.grad.numel() // case.grad.shape[1]) ** 0.5)
    expected = (*reference.bn_stats(case.args[0]), reference.bn_act(*case.args))
    for v, e in zip((*stats, y, *grads), (*expected, *reference.bn_act_bwd(*case.bwd, [True] * 4)), strict=True):
        scale = e.abs().max().clamp(min=1)
        torch.testing.assert_close(v / scale, e.to(v.dtype) / scale, **close)


@dtypes
@pytest.mark.parametrize("how", ["sliced", "permuted", "offset", "contiguous", "channels_last"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_bn_act_bwd_input(backend, device, relu, how, dtype):
    """Against the formula in float64, whatever the strides; a mean of the maps hands over an expanded gradient."""
    grad, y, x, *vectors, _ = bwd_input_case(dtype, relu=relu, device=device)
    grad = grad[:, :, :1, :1]
    if refused(backend, "bn_act_bwd_input", grad, y, x, *vectors, relu):
        pytest.skip(f"{backend} declines")
    mean, scale, mean_g, slope = (v.double().view(1, -1, 1, 1) for v in vectors)
    g = grad.double().expand_as(x)
    g = g.masked_fill(y <= 0, 0) if relu else g
    expected = (g - mean_g - (x.double() - mean) * slope) * scale
    y, x = (
        t if t is None else t.contiguous(memory_format=LAYOUTS[how]) if how in LAYOUTS else strange(t, how)
        for t in (y, x)
    )
    args = (grad.expand_as(x), y, x, *vectors, relu)
    with fused_resnet.backend(backend):
        dx = bn_act_bwd_input(*args)
    assert_as_fake(bn_act_bwd_input, args, dx)
    assert parity.error(dx, expected) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_an_expanded_gradient_is_as_good_as_a_dense_one(backend, device, relu):
    """y.sum().backward() and a mean over the maps hand over a gradient of stride zero."""
    dtype = torch.float32
    for op, case in (
        (conv_bn_act_bwd, conv_case(SHAPES["3x3"], dtype, relu=relu, device=device)),
        (bn_act_bwd, bn_case(dtype, relu=relu, device=device)),
    ):
        name = op._schema.name.split("::")[1]
        grad = torch.randn(5, case.grad.shape[1], 1, 1, device=device).expand_as(case.grad)
        mask = [True] * (5 if name.startswith("conv") else 4)
        if refused(backend, name, grad, *case.bwd[1:], mask):
            continue
        with fused_resnet.backend(backend):
            found = op(grad, *case.bwd[1:], mask)
            expected = op(grad.contiguous(), *case.bwd[1:], mask)
        for v, e in zip(found, expected, strict=True):
            torch.testing.assert_close(v, e)


@pytest.mark.parametrize("op", ["conv_bn_act_bwd", "bn_act_bwd"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_only_the_gradients_asked_for(backend, device, relu, op):
    if op == "conv_bn_act_bwd":
        case, outputs = conv_case(SHAPES["3x3"], torch.float32, relu=relu, device=device), 5
    else:
        case, outputs = bn_case(torch.float32, relu=relu, device=device), 4
    call = getattr(torch.ops.fused_resnet, op).default
    if refused(backend, op, *case.bwd, [True] * outputs):
        pytest.skip(f"{backend} declines")
    with fused_resnet.backend(backend):
        everything = call(*case.bwd, [True] * outputs)
        for bits in range(2**outputs):
            mask = [bool(bits >> i & 1) for i in range(outputs)]
            for on, v, e in zip(mask, call(*case.bwd, mask), everything, strict=True):
                if on:  # a sum may be taken another way where less is asked for
                    assert v.shape == e.shape and (v - e).norm() <= 1e-6 * e.norm()
                else:
                    assert v.numel() == 0


# kernel, stride, padding, dilation, groups: taps that find padding on every side, on several lines, or nowhere
WINDOWS = {
    "1x1": ((1, 1), 1, 0, 1, 1),
    "1x1-stride2": ((1, 1), 2, 0, 1, 1),
    "3x3": ((3, 3), 1, 1, 1, 1),
    "3x3-stride2": ((3, 3), 2, 1, 1, 1),
    "3x3-dilated-groups": ((3, 3), 1, 2, 2, 2),
    "3x3-no-padding": ((3, 3), 1, 0, 1, 1),
    "3x1-stride3": ((3, 1), 3, 2, 1, 1),
    "5x5-wide-padding": ((5, 5), 1, 4, 2, 1),
    "7x7-stride2": ((7, 7), 2, 3, 1, 2),
}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_what_values_have_in_common_does_not_drown_a_gradient(window, backend, device, monkeypatch):
    """x with a mean, as behind a ReLU, and a gradient with one: in the gradient of BN's weight two large sums cancel.
    Taken as they stand they leave it off by up to 2e-5 here."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    kernel, stride, padding, dilation, groups = window
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 64, 17, 23, generator=g).relu() + 1
    weight = torch.randn(16, 64 // groups, *kernel, generator=g) * 0.2
    conv = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    raw = torch.conv2d(x.double(), weight.double(), None, *conv)
    var, mean = (t.float() for t in torch.var_mean(raw, (0, 2, 3)))
    grad = torch.randn(raw.shape, generator=g) + 0.5
    args = [t.to(device) for t in (grad, raw.float(), x, weight, torch.ones(16), mean, var)]
    args[:3] = [t.contiguous(memory_format=torch.channels_last) for t in args[:3]]
    rest = (1e-5, *conv, False, [False, True, True, False, False])
    if refused(backend, "conv_bn_act_bwd", *args, *rest):
        pytest.skip(f"{backend} declines")
    with fused_resnet.backend(backend):
        _, *found, _, _ = conv_bn_act_bwd(*args, *rest)
    _, *exact, _, _ = reference.conv_bn_act_bwd(*(t.double() for t in args), *rest)
    as_they_stand = backend in ("reference", "triton")
    for v, e, limit in zip(found, exact, (1e-6, 1e-4 if as_they_stand else 1e-6), strict=True):
        assert (v - e).norm() <= limit * e.norm()


def test_no_output_is_an_input(backend, device):
    """An op's output may not alias what came in: autograd and functionalization would both be wrong."""
    for op, case, outputs in (
        (conv_bn_act_bwd, conv_case(SHAPES["1x1"], torch.float32, relu=False, device=device), 5),
        (bn_act_bwd, bn_case(torch.float32, relu=False, device=device), 4),
    ):
        if refused(backend, op._schema.name.split("::")[1], *case.bwd, [True] * outputs):
            continue
        with fused_resnet.backend(backend):
            found = op(*case.bwd, [True] * outputs)
        known = {a.data_ptr() for a in case.bwd if isinstance(a, torch.Tensor)}
        assert not known & {v.data_ptr() for v in found}


# --- NaN and inf travel as in PyTorch ---


@layouts
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", ["x", "residual", "grad"])
@pytest.mark.parametrize("op", ["conv_bn_act", "bn_act-batch", "bn_act-frozen"])
def test_nan_and_inf_travel_as_in_pytorch(backend, device, op, where, bad, layout):
    if op == "conv_bn_act":
        case = conv_case(SHAPES["3x3"], torch.float32, layout, device=device, requires_grad=True)
        ours, theirs = conv_bn_act, unfused_conv
        at = {"x": 0, "weight": 1, "residual": 7, "grad": None}[where]
    else:
        case = bn_case(torch.float32, layout, batch_stats=op.endswith("batch"), device=device, requires_grad=True)
        ours, theirs = bn_act, unfused_bn
        at = {"x": 0, "weight": 3, "residual": 6, "grad": None}[where]
    victim = case.grad if at is None else case.args[at]
    with torch.no_grad():
        victim[0, 1, 1, 0] = bad
    if refused(backend, op.split("-")[0], *case.args):
        pytest.skip(f"{backend} declines")
    args = case.args
    with fused_resnet.backend(backend):
        if op == "bn_act-batch":
            args = (args[0], *bn_stats(args[0].detach()), *args[3:])
        found = outputs_and_grads(ours, args, case.grad)
    expected = outputs_and_grads(theirs, case.args, case.grad)
    for name, e in expected.items():
        v = found[name]
        if (op, where, name) == ("conv_bn_act", "grad", "grad 2"):
            # A product with the weight here, with the raw convolution there: inf or NaN is a matter of the signs.
            v, e = (t.where(t.isfinite(), torch.nan) for t in (v, e))
        assert torch.equal(v.isnan(), e.isnan()), f"{name}: NaN elsewhere"
        assert torch.equal(v.isinf(), e.isinf()), f"{name}: inf elsewhere"
        torch.testing.assert_close(v, e, equal_nan=True, rtol=1e-4, atol=1e-4)


@layouts
def test_nan_in_a_weight_travels(backend, device, layout):
    case = conv_case(SHAPES["3x3"], torch.float32, layout, device=device, requires_grad=True)
    with torch.no_grad():
        case.args[1][1, 2, 0, 0] = torch.nan
    if refused(backend, "conv_bn_act", *case.args):
        pytest.skip(f"{backend} declines")
    with fused_resnet.backend(backend):
        found = outputs_and_grads(conv_bn_act, case.args, case.grad)
    for name, e in outputs_and_grads(unfused_conv, case.args, case.grad).items():
        torch.testing.assert_close(found[name], e, equal_nan=True, rtol=1e-4, atol=1e-4)


# --- the choice ---


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'cudann'.*triton, cudnn, cpu, reference"), fused_resnet.backend("cudann"):
        pass


def test_forced_backend_that_cannot_run_says_why():
    x = torch.randn(2, 3, 7, 9)
    with fused_resnet.backend("cudnn"), pytest.raises(RuntimeError, match="bn_stats: cudnn: needs .*forced"):
        bn_stats(x)


def test_forced_backend_that_declines_says_why(monkeypatch):
    monkeypatch.setattr(backends.cpu, "declines", lambda op, *args: "needs a Tuesday")
    with fused_resnet.backend("cpu"), pytest.raises(RuntimeError, match="cpu: needs a Tuesday"):
        bn_stats(torch.randn(2, 3, 7, 9))


def test_contexts_nest_and_survive_an_exception():
    assert backends.forced() is None
    with fused_resnet.backend("reference"):
        with pytest.raises(KeyError), fused_resnet.backend("cpu"):
            assert backends.forced() == "cpu"
            raise KeyError
        assert backends.forced() == "reference"
    assert backends.forced() is None


def test_contexts_of_two_threads_may_end_in_any_order():
    entered, leave = threading.Event(), threading.Event()

    def first():
        with fused_resnet.backend("reference"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    with fused_resnet.backend("cpu"):
        leave.set()
        thread.join()
        assert backends.forced() == "cpu"
    assert backends.forced() is None


def test_forced_backend_serves_the_backward(monkeypatch):
    seen = []
    original = reference.conv_bn_act_bwd
    monkeypatch.setattr(reference, "conv_bn_act_bwd", lambda *args: seen.append(1) or original(*args))
    case = conv_case(SHAPES["3x3"], torch.float32, requires_grad=True)
    with fused_resnet.backend("reference"):
        conv_bn_act(*case.args).sum().backward()
    assert seen


@pytest.mark.parametrize(
    "name, expected",
    [("reference", "reference"), ("cudann", "ValueError: FUSED_RESNET_BACKEND: there is no backend 'cudann'")],
    ids=["reference", "unknown"],
)
def test_environment_forces_a_backend(name, expected):
    script = "import torch, fused_resnet as f; f.functional.conv_bn_act(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1))"
    script += "; print(f.backends.forced())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "FUSED_RESNET_BACKEND": name, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert expected in done.stdout + done.stderr
    assert (done.returncode == 0) is (name == "reference")


def test_automatic_choice_falls_back_and_logs_once(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_told", set())
    monkeypatch.setattr(backends.cpu, "declines", lambda op, *args: "needs a Tuesday")
    x = torch.randn(2, 3, 7, 9)
    with caplog.at_level(logging.INFO, logger="fused_resnet"):
        for _ in range(3):
            mean, _ = bn_stats(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    assert [r.getMessage() for r in caplog.records] == ["bn_stats: cpu: needs a Tuesday"]


# --- trust: a GPU's backends are compared with the reference before they serve; a fake one plays the part here ---


class Fake:
    """A backend that is the reference, but for what a test makes of it."""

    NAME = "fake"

    def __init__(self, spoil=lambda op, result, args: result):
        self.calls, self.spoil = [], spoil

    def unavailable(self):
        return None

    def declines(self, op, *args):
        return None

    def __getattr__(self, op):
        if not hasattr(reference, op) or op not in ops._SCHEMAS:
            raise AttributeError(op)

        def call(*args):
            self.calls.append(op)
            return self.spoil(op, getattr(reference, op)(*args), args)

        return call


@pytest.fixture
def trial(monkeypatch):
    """install(spoil) -> the fake backend, first in the order of the CPU, judged as a GPU's is."""
    monkeypatch.setattr(verify, "_verdicts", {})
    monkeypatch.setattr(backends, "_told", set())

    def install(spoil=lambda op, result, args: result):
        fake = Fake(spoil)
        monkeypatch.setitem(backends.ORDER, "cpu", (fake,))
        monkeypatch.setattr(backends, "TRUSTED", set())
        return fake

    return install


def conv_args(n=2, seed=0, **options) -> Conv:
    return conv_case(Shape(n=n), options.pop("dtype", torch.float32), seed=seed, **options)


def bn_args(**options) -> BN:
    return bn_case(torch.float32, **options)


def scaled(factor):
    def spoil(op, result, args):
        return tuple(r if r is None else r * factor for r in result) if isinstance(result, tuple) else result * factor

    return spoil


def one_wrong_element(op, result, args):
    first = result[0] if isinstance(result, tuple) else result
    first.view(-1)[-1] += 1
    return result


def raising(error):
    def spoil(op, result, args):
        raise error("out of shared memory\nand a long trace")

    return spoil


def without_last(op, result, args):
    return (*result[:-1], None) if isinstance(result, tuple) else None


def transposed(op, result, args):
    return verify._tuple(result)[0].contiguous(memory_format=torch.channels_last)


SPOILS = {
    "one-percent": (scaled(1.01), "differs from the reference by"),
    "one-element": (one_wrong_element, "differs from the reference by"),
    "nan": (scaled(float("nan")), "differs from the reference by inf"),
    "raises": (raising(RuntimeError), "RuntimeError: out of shared memory$"),
    "raises-its-own": (raising(type("OutOfResources", (Exception,), {})), "OutOfResources: out of shared memory$"),
    "wrong-dtype": (lambda op, r, args: verify._tuple(r)[0].double() if op == "conv_bn_act" else r, "torch.float64"),
    "wrong-strides": (transposed, "strides"),
    "nothing": (without_last, "is None"),
}


@pytest.mark.parametrize("spoil, reason", SPOILS.values(), ids=SPOILS)
def test_a_backend_that_is_wrong_is_dropped_with_its_reason(trial, caplog, spoil, reason):
    fake = trial(spoil)
    case = conv_args()
    with caplog.at_level(logging.WARNING, logger="fused_resnet"):
        for _ in range(3):
            torch.testing.assert_close(conv_bn_act(*case.args), reference.conv_bn_act(*case.args))
    assert fake.calls == ["conv_bn_act"]  # judged once, never asked again
    assert len(caplog.records) == 1
    assert "conv_bn_act: fake: " in caplog.text
    (verdict,) = verify._verdicts.values()
    assert re.search(reason, verdict), verdict


def test_a_backend_that_is_right_serves(trial):
    fake = trial()
    case = conv_args()
    for _ in range(3):
        conv_bn_act(*case.args)
    assert fake.calls == ["conv_bn_act"] * 5  # two in the comparison, and the three
    assert list(verify._verdicts.values()) == [None]


@pytest.mark.parametrize("op", ["conv_bn_act_bwd", "bn_stats", "bn_act", "bn_act_bwd", "bn_act_bwd_input"])
def test_every_op_is_judged(trial, op, caplog):
    fake = trial(scaled(1.01))
    args = {
        "conv_bn_act_bwd": (*conv_args().bwd, [True] * 5),
        "bn_stats": bn_args().args[:1],
        "bn_act": bn_args().args,
        "bn_act_bwd": (*bn_args().bwd, [True] * 4),
        "bn_act_bwd_input": bwd_input_case(torch.float32),
    }[op]
    found = verify._tuple(getattr(torch.ops.fused_resnet, op)(*args))
    for v, e in zip(found, verify._tuple(getattr(reference, op)(*args)), strict=True):
        torch.testing.assert_close(v, e)
    assert fake.calls == [op] and f"{op}: fake: output 0 differs" in caplog.text


def test_a_repetition_that_goes_wrong_is_found(trial, caplog):
    """What a backend prepared at its first call serves the second, on another path: both are compared."""
    trial(lambda op, result, args: result if len(fake.calls) == 1 else result * 1.01)
    (fake,) = backends.ORDER["cpu"]
    args = conv_args().args
    torch.testing.assert_close(conv_bn_act(*args), reference.conv_bn_act(*args))
    assert "conv_bn_act: fake: output 0 differs" in caplog.text and len(fake.calls) == 2


def test_the_verdict_does_not_depend_on_the_data(trial):
    """NaN, zeros and constants are no reason to distrust or to trust."""
    fake = trial()
    for value in (float("nan"), 0.0, 1.0):
        verify._verdicts.clear()
        backends._ready.clear()
        args = [torch.full_like(a, value) if isinstance(a, torch.Tensor) else a for a in conv_args().args]
        conv_bn_act(*args)
        assert list(verify._verdicts.values()) == [None]
    trial(scaled(1.01))
    verify._verdicts.clear()
    backends._ready.clear()
    conv_bn_act(*[torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in conv_args().args])
    assert None not in verify._verdicts.values()
    assert fake.calls


def test_a_signature_leaves_out_batch_and_maps_only(trial):
    trial()

    def judged(case):
        before = len(verify._verdicts)
        conv_bn_act(*case.args)
        return len(verify._verdicts) - before

    assert judged(conv_args()) == 1
    assert judged(conv_args(n=5, seed=3)) == 0
    assert judged(conv_case(Shape(n=2, size=(5, 4)), torch.float32)) == 0
    assert judged(conv_args(layout="channels_last")) == 1
    assert judged(conv_args(relu=False)) == 1
    assert judged(conv_args(residual=False)) == 1
    assert judged(conv_args(dtype=torch.bfloat16)) == 1
    assert judged(conv_case(Shape(n=2, k=6), torch.float32)) == 1
    assert judged(conv_case(Shape(n=2, stride=(2, 2)), torch.float32)) == 1


def test_verification_touches_neither_arguments_nor_random_state(trial):
    trial()
    case = conv_args()
    before = [a.clone() for a in case.args if isinstance(a, torch.Tensor)]
    state = torch.get_rng_state()
    conv_bn_act(*case.args)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip((a for a in case.args if isinstance(a, torch.Tensor)), before, strict=True):
        assert torch.equal(a, b)


def test_the_sample_lies_in_memory_as_the_call_does():
    x, weight = torch.empty(6, 3, 7, 9)[1:5:2, :, ::2], torch.empty(5, 3, 3, 3).to(memory_format=torch.channels_last)
    expanded = torch.empty(2, 5, 1, 1).expand(2, 5, 4, 9)
    args = (x, weight, None, None, None, None, 1e-5, expanded, [1, 1], [1, 1], [1, 1], 1, True)
    sample = verify._sample("conv_bn_act", args)
    for a, b in zip((x, weight, expanded), (sample[0], sample[1], sample[7]), strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.data_ptr() % 16 == b.data_ptr() % 16
        assert b.isfinite().all() and b.data_ptr() != a.data_ptr()
    assert sample[2:7] == args[2:7] and sample[8:] == args[8:]


def test_a_large_batch_is_sampled(monkeypatch, trial):
    monkeypatch.setattr(verify, "MAX_SAMPLE", 2 * 5 * 7 * 9)  # two images of the largest tensor, which is the output
    sizes = []
    trial(lambda op, result, args: sizes.append(args[0].shape[0]) or result)
    case = conv_args(n=5)
    assert conv_bn_act(*case.args).shape[0] == 5
    assert sizes == [2, 2, 5]


def test_nothing_is_judged_while_a_cuda_graph_is_captured(trial, monkeypatch, caplog):
    fake = trial()
    args = conv_args().args
    monkeypatch.setattr(verify, "capturing", lambda device: True)
    torch.testing.assert_close(conv_bn_act(*args), reference.conv_bn_act(*args))
    assert not fake.calls and not verify._verdicts
    assert "a CUDA graph is being captured (call once before the capture)" in caplog.text
    monkeypatch.setattr(verify, "capturing", lambda device: False)
    conv_bn_act(*args)
    monkeypatch.setattr(verify, "capturing", lambda device: True)
    fake.calls.clear()
    conv_bn_act(*args)
    assert fake.calls == ["conv_bn_act"]


def test_tf32_is_another_signature(trial):
    trial()
    args = conv_args().args
    for allowed in (False, True):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            assert verify.tf32_allowed() is allowed
            limit = verify.tolerance("conv_bn_act", args)
            assert limit == (verify.TOLERANCE_TF32 if allowed else verify.TOLERANCE[torch.float32])
            assert verify.tolerance("bn_act", args) == verify.TOLERANCE[torch.float32]
            conv_bn_act(*args)
    assert len(verify._verdicts) == 2


def test_out_of_memory_is_no_verdict(trial, caplog):
    fake, args = trial(raising(torch.OutOfMemoryError)), conv_args().args
    torch.testing.assert_close(conv_bn_act(*args), reference.conv_bn_act(*args))
    assert not verify._verdicts and "too little memory" in caplog.text
    fake.spoil = lambda op, result, args: result
    conv_bn_act(*args)
    assert list(verify._verdicts.values()) == [None]


def test_with_little_memory_a_smaller_sample_is_compared(trial, monkeypatch):
    monkeypatch.setattr(verify, "MAX_SAMPLE", 16 * 2 * 5 * 7 * 9)
    sizes = []

    def spoil(op, result, args):
        sizes.append(args[0].shape[0])
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("a whole batch")
        return result

    trial(spoil)
    conv_bn_act(*conv_args(n=5).args)
    assert sizes == [5, 2, 2, 5] and list(verify._verdicts.values()) == [None]


@pytest.mark.parametrize("why", ["memory", "capture"])
def test_pytorchs_own_kernels_serve_where_nothing_can_be_compared(trial, monkeypatch, why):
    """And not the reference, which would need several times the memory; asked again at the next call."""
    own, first = Fake(), trial()
    monkeypatch.setattr(backends, "cudnn", own)
    monkeypatch.setitem(backends.ORDER, "cpu", (first, own))
    args = conv_args().args
    if why == "capture":
        monkeypatch.setattr(verify, "capturing", lambda device: True)
    else:
        out_of_memory = raising(torch.OutOfMemoryError)
        monkeypatch.setattr(verify, "_judge", lambda candidate, op, args, limit: out_of_memory(op, None, args))
    conv_bn_act(*args)
    assert own.calls == ["conv_bn_act"] and not first.calls and not backends._ready
    monkeypatch.undo()


def test_a_sample_that_took_another_tile_is_the_whole_batch(trial, monkeypatch):
    monkeypatch.setattr(verify, "MAX_SAMPLE", 2 * 5 * 7 * 9)
    sizes = []
    fake = trial(lambda op, result, args: sizes.append(args[0].shape[0]) or result)
    fake.variant = lambda op, *args: args[0].shape[0] > 2
    conv_bn_act(*conv_args(n=5).args)
    assert sizes == [5, 5, 5]


def test_a_comparison_in_parts_is_a_comparison_of_the_whole(monkeypatch):
    e = torch.randn(5, 3, 7, 9)
    v = e.clone()
    v[4, 2, 6, 8] += 1
    whole = verify.difference(v, e)
    monkeypatch.setattr(verify, "CHUNK", 3 * 7 * 9)
    assert verify.difference(v, e) == pytest.approx(whole) and whole > 0.1
    assert verify.difference(e, e) == 0
    assert verify.difference(torch.full_like(e, torch.nan), e) == float("inf")
    assert verify.difference(torch.full((3,), 1e-9), torch.zeros(3)) == pytest.approx(1e-9)


def test_the_variant_that_a_backend_picks_is_part_of_the_signature(trial):
    fake = trial()
    fake.variant = lambda op, *args: args[0].shape[0] > 2
    for n, judged in ((1, 1), (2, 1), (3, 2), (4, 2)):
        conv_bn_act(*conv_args(n=n).args)
        assert len(verify._verdicts) == judged


def test_a_backend_may_leave_a_call_to_the_next(trial, monkeypatch, caplog):
    fake, args = trial(), conv_args().args
    fake.defers = lambda op, *args: "slower than the next on a Tuesday"
    with caplog.at_level(logging.INFO, logger="fused_resnet"):
        conv_bn_act(*args)
    assert not fake.calls and "conv_bn_act: fake: slower than the next on a Tuesday" in caplog.text
    monkeypatch.setitem(backends.BACKENDS, "fake", fake)
    with fused_resnet.backend("fake"):
        conv_bn_act(*args)
    assert fake.calls == ["conv_bn_act"]


# --- a call like one before is neither checked nor chosen for again ---


@pytest.fixture
def chosen(trial, monkeypatch):
    """choices(call) -> how often a backend had to be chosen in it; the chosen one is judged right without a look."""
    fake, count = trial(), []
    monkeypatch.setattr(verify, "_judge", lambda *args: None)
    original = backends._choose
    monkeypatch.setattr(backends, "_choose", lambda op, args: count.append(op) or original(op, args))

    def choices(call) -> int:
        before = len(count)
        call()
        return len(count) - before

    choices.fake = fake
    return choices


def test_what_makes_a_call_another_one(chosen):
    case = conv_args()
    x, weight, *vectors, eps, residual, stride, padding, dilation, groups, relu = case.args
    conv = (stride, padding, dilation, groups, relu)

    def call(x=x, weight=weight, vectors=vectors, eps=eps, residual=residual, conv=conv):
        return lambda: conv_bn_act(x, weight, *vectors, eps, residual, *conv)

    assert chosen(call()) == 1
    assert chosen(call()) == 0
    assert chosen(call(x=torch.randn_like(x), weight=torch.randn_like(weight))) == 0  # values do not
    shifted = torch.empty(x.numel() + 1).as_strided(x.shape, x.stride(), 1).copy_(x)
    assert shifted.data_ptr() % 16 != x.data_ptr() % 16
    larger = torch.randn(x.shape[0] + 1, *x.shape[1:]), torch.randn(residual.shape[0] + 1, *residual.shape[1:])
    others = {
        "alignment": call(x=shifted),
        "batch": call(x=larger[0], residual=larger[1]),
        "layout of x": call(x=x.contiguous(memory_format=torch.channels_last)),
        "layout of weight": call(weight=weight.contiguous(memory_format=torch.channels_last)),
        "layout of residual": call(residual=residual.contiguous(memory_format=torch.channels_last)),
        "strides of a vector": call(vectors=[v.repeat_interleave(2)[::2] for v in vectors]),
        "dtype of a vector": call(vectors=[vectors[0].double(), *vectors[1:]]),
        "no bn_weight": call(vectors=[None, *vectors[1:]]),
        "eps": call(eps=eps * 2),
        "no residual": call(residual=None),
        "relu": call(conv=(*conv[:-1], not relu)),
        "stride": call(conv=([2, 2], *conv[1:]), residual=None),
    }
    for what, other in others.items():
        assert chosen(other) == 1, what
        assert chosen(other) == 0, what
    with torch.backends.cudnn.flags(enabled=False):
        assert chosen(call()) == 1
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=not verify.tf32_allowed()):
        assert chosen(call()) == 1
    with fused_resnet.backend("reference"):
        calls = len(chosen.fake.calls)
        assert chosen(call()) == 1
        assert chosen(call()) == 0
        assert len(chosen.fake.calls) == calls
    assert chosen(call()) == 0


def test_wrong_arguments_after_right_ones_are_still_refused(chosen):
    x, weight, *rest = conv_args().args
    conv_bn_act(x, weight, *rest)
    for wrong, name in [
        ((x.double(), weight, *rest), "weight"),
        ((x[:, :-1], weight, *rest), "x"),
        ((x, weight, rest[0][:-1], *rest[1:]), "bn_weight"),
        ((x, weight, *rest[:5], rest[5][:, :, :-1], *rest[6:]), "residual"),
        ((x, weight, *rest[:6], [1], *rest[7:]), "stride"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=f"^{name}: expected"):
            conv_bn_act(*wrong)
    bn_stats(torch.randn(2, 3, 1, 1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bn_stats(torch.randn(1, 3, 1, 1))


def test_every_op_is_served_without_a_choice(chosen):
    calls = {
        "conv_bn_act_bwd": (*conv_args().bwd, [True] * 5),
        "bn_stats": bn_args().args[:1],
        "bn_act": bn_args().args,
        "bn_act_bwd": (*bn_args().bwd, [True] * 4),
        "bn_act_bwd_input": bwd_input_case(torch.float32),
    }
    for op, args in calls.items():
        call = getattr(torch.ops.fused_resnet, op).default
        first = verify._tuple(call(*args))
        again = []
        assert chosen(lambda call=call, args=args, again=again: again.extend(verify._tuple(call(*args)))) == 0, op
        for a, b in zip(again, first, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    mask = [True, True, True, False]
    assert chosen(lambda: torch.ops.fused_resnet.bn_act_bwd(*bn_args().bwd, mask)) == 1


def test_what_is_remembered_is_bounded(chosen, monkeypatch):
    monkeypatch.setattr(backends, "MOST_READY", 3)
    for n in range(2, 12):
        bn_stats(torch.randn(n, 3, 2, 2))
        assert len(backends._ready) <= 3
    assert chosen(lambda: bn_stats(torch.randn(11, 3, 2, 2))) == 0


def test_tensors_without_strides_are_refused_as_ever(device):
    x = torch.randn(1, 3, 5, 5, device=device).to_sparse()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ops.fused_resnet.bn_stats(x)
    assert not backends._ready


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["conv_bn_act", "conv_bn_act_bwd"])
def test_tolerance_admits_4608_terms_and_not_a_lost_one(op, dtype):
    """PyTorch's own kernels (folded weights, 3x3 over 512 channels) pass; a kernel that skips one tap does not."""
    case = conv_case(Shape(n=1, c=512, k=8, size=(4, 5)), dtype)
    args = case.args if op == "conv_bn_act" else (*case.bwd, [True] * 5)
    assert verify._judge(backends.cpu, op, args) is None

    def skip_a_tap(name, result, sample):
        sample = list(sample)
        at = verify.WEIGHT_AT[op]
        sample[at] = sample[at].clone()
        sample[at][:, :, 2, 2] = 0
        return getattr(reference, op)(*sample)

    assert "differs" in verify._judge(Fake(skip_a_tap), op, args)
