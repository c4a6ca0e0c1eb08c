"""bn_act_conv and pointwise_bn_act: what PyTorch asks of an op, derivatives, statistics, the choice by measurement."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS
from torch.autograd import gradcheck, gradgradcheck

import fused_resnet
from fused_resnet import backends
from fused_resnet.backends import aten, choice, composed, cpu, cpu_gradients, reference, verify

ops = torch.ops.fused_resnet
EPS = 1e-3
layouts = pytest.mark.parametrize("layout", LAYOUTS)
# kernel, stride, padding, dilation, groups, normalised
CONVOLUTIONS = {
    "3x3": (3, 1, 1, 1, 1, True),
    "1x1": (1, 1, 0, 1, 1, True),
    "1x1-stride2": (1, 2, 0, 1, 1, True),
    "3x3-stride2": (3, 2, 1, 1, 1, True),
    "dilated": (3, 1, 2, 2, 1, True),
    "groups": (3, 1, 1, 1, 2, True),
    "raw": (3, 1, 1, 1, 1, False),
}
POINTWISE = {"last": (1, True, True), "stride2": (2, True, True), "projection": (2, False, False)}


def normal(*shape, dtype=torch.float64, layout="contiguous", seed=0, device="cpu"):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)
    return t.contiguous(memory_format=LAYOUTS[layout]) if t.dim() == 4 else t


def conv_case(name, dtype=torch.float64, layout="contiguous", n=3, c=4, k=6, size=(5, 7), device="cpu"):
    kernel, stride, padding, dilation, groups, normalised = CONVOLUTIONS[name]
    kind = dict(dtype=dtype, layout=layout, device=device)
    x = normal(n, c, *size, **kind)
    weight = normal(k, c // groups, kernel, kernel, seed=1, **kind) * (c * kernel**2) ** -0.5
    vectors = torch.promote_types(dtype, torch.float32)
    bn = (None, None)
    if normalised:
        bn = tuple(normal(c, dtype=vectors, seed=s, device=device) * 0.3 + 1 for s in (2, 3))
    return x, weight, *bn, ([stride] * 2, [padding] * 2, [dilation] * 2, groups)


def run_conv(x, weight, bn_weight, bn_bias, places, stats=True):
    mean, var = (None, None) if bn_weight is None else ops.bn_stats(x)
    return ops.bn_act_conv(x, weight, mean, var, bn_weight, bn_bias, EPS, True, *places, stats)


def as_written(x, bn_weight, bn_bias):
    return x if bn_weight is None else F.batch_norm(x, None, None, bn_weight, bn_bias, True, 0.0, EPS).relu()


def pointwise_case(name, dtype=torch.float64, layout="contiguous", n=3, c=4, k=10, size=(5, 7), device="cpu"):
    stride, normalised, last = POINTWISE[name]
    kind = dict(dtype=dtype, layout=layout, device=device)
    vectors = torch.promote_types(dtype, torch.float32)
    x, weight = normal(n, c, *size, **kind), normal(k, c, 1, 1, seed=1, **kind) * c**-0.5

    def affine(channels, seed):
        return tuple(normal(channels, dtype=vectors, seed=s, device=device) * 0.3 + 1 for s in (seed, seed + 1))

    bn = affine(c, 2) if normalised else (None, None)
    residual = normal(n, k, *(-(-s // stride) for s in size), seed=6, **kind) if last else None
    return x, weight, *bn, *affine(k, 4), residual, [stride] * 2, last


def run_pointwise(x, weight, bn_weight, bn_bias, out_weight, out_bias, residual, stride, last):
    mean, var = (None, None) if bn_weight is None else ops.bn_stats(x)
    loaded = (mean, var, bn_weight, bn_bias, EPS, True)
    return ops.pointwise_bn_act(x, weight, *loaded, out_weight, out_bias, EPS, residual, stride, last)


def pointwise_as_written(x, weight, bn_weight, bn_bias, out_weight, out_bias, residual, stride, last):
    raw = F.conv2d(as_written(x, bn_weight, bn_bias), weight, None, stride)
    y = F.batch_norm(raw, None, None, out_weight, out_bias, True, 0.0, EPS)
    y = y if residual is None else y + residual
    return y.relu() if last else y


def leaves(args):
    return [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]


def gradients(function, args, away_from_zero=0.0):
    """The output, and the gradients of all tensors among args for one random gradient of it."""
    args = leaves(args)
    y = function(*args)
    grad = normal(*y.shape, dtype=torch.float64, seed=9).to(y) * (y.detach().abs() > away_from_zero)
    y.backward(grad)
    return y.detach(), [a.grad for a in args if isinstance(a, torch.Tensor)]


def off(got, want):
    """The largest relative 2-norm of the differences."""
    return max(((g.double() - w).norm() / w.norm().clamp_min(1e-12)).item() for g, w in zip(got, want, strict=True))


# --- what PyTorch asks of an op ---


@layouts
@pytest.mark.parametrize("name", ["3x3-stride2", "raw"])
@pytest.mark.parametrize("stats", [True, False], ids=["stats", "no-stats"])
def test_opcheck_bn_act_conv(name, stats, layout, device):
    x, weight, bn_weight, bn_bias, places = conv_case(name, torch.float32, layout, device=device)
    mean, var = (None, None) if bn_weight is None else ops.bn_stats(x)
    args = leaves((x, weight))
    bn = leaves((bn_weight, bn_bias))
    torch.library.opcheck(ops.bn_act_conv.default, (*args, mean, var, *bn, EPS, True, *places, stats))


@pytest.mark.parametrize("stats", [True, False], ids=["stats", "no-stats"])
def test_opcheck_in_16_bits(stats, device):
    x, weight, *bn, places = conv_case("3x3", torch.bfloat16, "channels_last", device=device)
    torch.library.opcheck(ops.bn_act_conv.default, (x, weight, *ops.bn_stats(x), *bn, EPS, True, *places, stats))


@layouts
@pytest.mark.parametrize("mask", [[True] * 4, [False, True, False, False], [False, False, True, True]], ids=str)
def test_opcheck_bn_act_conv_bwd(mask, layout, device):
    x, weight, *bn, places = conv_case("3x3-stride2", torch.float32, layout, device=device)
    y, _, _ = run_conv(x, weight, *bn, places)
    args = (y, x, weight, *ops.bn_stats(x), *bn, EPS, True, *places, mask)
    torch.library.opcheck(ops.bn_act_conv_bwd.default, args)


@layouts
@pytest.mark.parametrize("name", POINTWISE)
def test_opcheck_pointwise(name, layout, device):
    case = pointwise_case(name, torch.float32, layout, device=device)
    x, weight, bn_weight, bn_bias, out_weight, out_bias, residual, stride, last = leaves(case)
    mean, var = (None, None) if bn_weight is None else ops.bn_stats(x.detach())
    loaded = (mean, var, bn_weight, bn_bias, EPS, True)
    args = (x, weight, *loaded, out_weight, out_bias, EPS, residual, stride, last)
    torch.library.opcheck(ops.pointwise_bn_act.default, args)
    statistics = [t.detach() for t in ops.pointwise_bn_act(*args)]
    y, y_mean, y_var, a_mean, a_cov = statistics
    bwd = (
        torch.ones_like(y),
        y if last else None,
        x.detach(),
        weight.detach(),
        *loaded,
        out_weight,
        y_mean,
        y_var,
        EPS,
    )
    bwd = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in bwd)
    normalised = bn_weight is not None
    mask = [True, True, normalised, normalised, True, True, last]
    torch.library.opcheck(ops.pointwise_bn_act_bwd.default, (*bwd, a_mean, a_cov, stride, last, mask))


# --- derivatives ---


@pytest.mark.parametrize("forced", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["3x3-stride2", "1x1-stride2", "raw"])
def test_gradcheck_bn_act_conv(name, forced):
    *tensors, places = conv_case(name, n=2, c=2, k=3, size=(3, 4))
    inputs = [t for t in leaves(tensors) if t is not None]

    def function(*inputs):
        given = (*inputs, None, None)[:4]
        return run_conv(*given, places)[0]

    with fused_resnet.backend(forced):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("forced", ["cpu", "reference"])
@pytest.mark.parametrize("name", POINTWISE)
def test_gradcheck_pointwise(name, forced):
    case = pointwise_case(name, n=2, c=2, k=3, size=(3, 4))
    inputs = [t for t in leaves(case) if isinstance(t, torch.Tensor)]

    def function(*inputs):
        given = iter(inputs)
        return run_pointwise(*(next(given) if isinstance(a, torch.Tensor) else a for a in case))[0]

    with fused_resnet.backend(forced):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@layouts
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_bn_act_conv_is_what_it_stands_for(name, layout, backend, device):
    if device == "cuda":
        pytest.skip("float64 is the CPU's")
    *tensors, places = conv_case(name, layout=layout, c=130 if name.startswith("3x3") else 4)

    def function(x, weight, *bn):
        return run_conv(x, weight, *bn, places)[0]

    def written(x, weight, *bn):
        return F.conv2d(as_written(x, *bn), weight, None, *places)

    with fused_resnet.backend(backend):
        got, want = gradients(function, tensors), gradients(written, tensors)
        assert off([got[0], *got[1]], [want[0], *want[1]]) < 1e-12
        y, mean, var = run_conv(*tensors, places)
    assert off([mean, var], [y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)]) < 1e-12


@layouts
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_is_what_it_stands_for(name, layout, backend, device):
    if device == "cuda":
        pytest.skip("float64 is the CPU's")
    case = pointwise_case(name, layout=layout)
    with fused_resnet.backend(backend):
        got, want = gradients(lambda *a: run_pointwise(*a)[0], case), gradients(pointwise_as_written, case)
    assert off([got[0], *got[1]], [want[0], *want[1]]) < 1e-12


@pytest.mark.parametrize("name", POINTWISE)
def test_products_left_to_convolutions(name, monkeypatch):
    """As a GPU does it in float32."""
    monkeypatch.setattr(composed, "_is_a_convolution", lambda rows: True)
    test_pointwise_is_what_it_stands_for(name, "channels_last", "cpu", "cpu")


@pytest.mark.parametrize("dtype, floor", [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_in_narrow_types(name, dtype, floor, backend, device):
    """Against float64, beside PyTorch's own error; no gradient where rounding could decide the last ReLU."""
    case = pointwise_case(name, dtype, "channels_last", c=32, k=80, device=device)
    wide = [a.double().cpu() if isinstance(a, torch.Tensor) else a for a in case]
    away = 0.1 if POINTWISE[name][2] else 0.0
    with fused_resnet.backend(backend):
        got = gradients(lambda *a: run_pointwise(*a)[0], case, away)
    want, theirs = gradients(pointwise_as_written, wide, away), gradients(pointwise_as_written, case, away)
    for g, w, t in zip((got[0], *got[1]), (want[0], *want[1]), (theirs[0], *theirs[1]), strict=True):
        assert off([g.cpu()], [w]) <= 3 * off([t.cpu()], [w]) + floor


def test_one_percent_in_one_gradient_is_found(monkeypatch):
    right = composed._through_bn

    def wrong(*args):
        dx, dbn_weight, dbn_bias = right(*args)
        return dx, dbn_weight * 1.01, dbn_bias

    monkeypatch.setattr(composed, "_through_bn", wrong)
    with pytest.raises(AssertionError):
        test_pointwise_is_what_it_stands_for("last", "channels_last", "cpu", "cpu")
    with pytest.raises(AssertionError):
        test_bn_act_conv_is_what_it_stands_for("3x3", "channels_last", "cpu", "cpu")


@pytest.mark.parametrize("wanted", range(7), ids=["x", "weight", "bn_weight", "bn_bias", "out_w", "out_b", "residual"])
def test_a_single_gradient_equals_that_of_all(wanted, backend, device):
    if device == "cuda":
        pytest.skip("float64 is the CPU's")
    case = pointwise_case("last")
    with fused_resnet.backend(backend):
        _, every = gradients(lambda *a: run_pointwise(*a)[0], case)
        args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in case]
        args[wanted].requires_grad_()
        y, *_ = run_pointwise(*args)
        y.backward(normal(*y.shape, seed=9))
    torch.testing.assert_close(args[wanted].grad, every[wanted], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("stride, padding, dilation", [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 0, 1)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_gradients_as_products(kernel, stride, padding, dilation, dtype, monkeypatch):
    """cpu_gradients against PyTorch's own, the windows of one and of several images at once."""
    monkeypatch.setattr(cpu_gradients, "WINDOW_ELEMENTS", 130 * 9 * 70)
    padding = padding if kernel == 3 else 0
    shapes = [(5, 130, 7, 9), (33, 130, kernel, kernel)]
    x, weight = (normal(*s, dtype=dtype, layout="channels_last", seed=i) for i, s in enumerate(shapes))
    places = ([stride] * 2, [padding] * 2, [dilation] * 2, 1)
    grad = torch.randn_like(F.conv2d(x, weight, None, *places))
    got = cpu_gradients.conv_gradients(grad, x, weight, *places, [True, True])
    want = aten.conv_gradients(*(t.double() for t in (grad, x, weight)), *places, [True, True])
    assert off(got, want) < (1e-6 if dtype is torch.float32 else 1e-13)
    assert got[1].stride() == weight.stride()


# --- statistics, corners ---


def test_statistics_where_the_mean_is_far_above_the_deviation(backend, device):
    """y = 1e4 + something of deviation 1: E[y^2] - mean^2 would have no correct digit in float32."""
    x = normal(3, 8, 9, 7, dtype=torch.float32, layout="channels_last", device=device)
    x[:, 0] = 1e4
    weight = normal(5, 8, 1, 1, dtype=torch.float32, seed=1, layout="channels_last", device=device)
    weight[:, 0] = 1
    with fused_resnet.backend(backend):
        y, mean, var = ops.bn_act_conv(x, weight, None, None, None, None, 0.0, False, [1, 1], [0, 0], [1, 1], 1, True)
    want = y.double().var((0, 2, 3), correction=0)
    assert ((var - want).abs() / want).max() < 1e-3
    assert ((mean - y.double().mean((0, 2, 3))).abs()).max() < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_statistics_by_the_covariance(dtype):
    """Of 16-bit operands that have a mean, as behind a ReLU: the variance to six digits."""
    a = normal(4000, 24).relu().to(dtype)
    weight = normal(50, 24, 1, 1, seed=1).to(dtype)
    mean, var = composed.statistics_of_product(weight, *composed.covariance(a))
    raw = a.double() @ weight.flatten(1).double().t()
    assert off([mean, var], [raw.mean(0), raw.var(0, correction=0)]) < 1e-6


def test_what_tf32_holds_of_a_covariance():
    """11 significant bits, and the rest exactly: products of both with 16-bit values lose nothing under TF32."""
    a = normal(50, 50, dtype=torch.float32)
    upper = composed.upper_bits(a)
    assert torch.equal(upper + (a - upper), a)
    assert torch.equal(upper.view(torch.int32) & (2**13 - 1), torch.zeros(50, 50, dtype=torch.int32))
    assert ((a - upper).abs() <= a.abs() * 2.0**-10).all()


def test_statistics_where_channels_hardly_differ():
    """A common part and a tenth of it in differences, of which the filters take differences: digits cancel."""
    a = (normal(4000, 1, seed=3).abs() + 0.1 * normal(4000, 24)).half()
    weight = normal(50, 24, 1, 1, seed=1)
    weight = (weight - weight.mean(1, keepdim=True)).half()
    _, var = composed.statistics_of_product(weight, *composed.covariance(a))
    raw = a.double() @ weight.flatten(1).double().t()
    assert off([var], [raw.var(0, correction=0)]) < 1e-3


def test_a_channel_without_variance(backend, device):
    case = pointwise_case("last", torch.float32, "channels_last", device=device)
    case[0][:, 1] = 3.0
    case[1][2] = 0
    wide = [a.double().cpu() if isinstance(a, torch.Tensor) else a for a in case]
    with fused_resnet.backend(backend):
        got = gradients(lambda *a: run_pointwise(*a)[0], case, 0.1)
    want = gradients(pointwise_as_written, wide, 0.1)
    assert off([t.cpu() for t in (got[0], *got[1])], [want[0], *want[1]]) < 1e-4


def test_what_is_not_finite_spreads_as_in_pytorch():
    case = pointwise_case("last", torch.float32, "channels_last")
    case[0][1, 2, 3, 4] = float("nan")
    assert torch.equal(run_pointwise(*case)[0].isnan(), pointwise_as_written(*case).isnan())
    case[-3][0, 0, 0, 0] = float("inf")
    case[0][1, 2, 3, 4] = 0
    assert torch.equal(run_pointwise(*case)[0].isinf(), pointwise_as_written(*case).isinf())
    *tensors, places = conv_case("3x3", torch.float32, "channels_last")
    tensors[0][0, 0, 0, 0] = float("nan")
    got, want = run_conv(*tensors, places)[0], F.conv2d(as_written(tensors[0], *tensors[2:]), tensors[1], None, *places)
    assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("op", ["bn_act_conv", "pointwise_bn_act"])
def test_one_value_a_channel_raises_as_in_pytorch(op):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        if op == "bn_act_conv":
            *tensors, places = conv_case("raw", n=1, size=(1, 1))
            run_conv(*tensors, places)
        else:
            run_pointwise(*pointwise_case("projection", n=1, size=(1, 1)))


def test_an_empty_batch():
    case = leaves(pointwise_case("last", torch.float32, n=0))
    y, *_ = run_pointwise(*case)
    assert y.shape == (0, 10, 5, 7)
    y.sum().backward()
    assert torch.count_nonzero(case[1].grad) == 0 and torch.count_nonzero(case[4].grad) == 0


WRONG = {
    "weight: expected a 1x1": lambda a: (a[0], torch.randn(10, 4, 3, 3, dtype=torch.float64), *a[2:]),
    "residual: expected the output's shape": lambda a: (*a[:6], a[6][:, :3], *a[7:]),
    "bn_weight: expected": lambda a: (*a[:2], a[2][:2], *a[3:]),
    "out_weight: expected": lambda a: (*a[:4], a[4][:2], *a[5:]),
    "x: expected": lambda a: (a[0][:, :3], *a[1:]),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(message):
    with pytest.raises(RuntimeError, match=message):
        run_pointwise(*WRONG[message](pointwise_case("last")))


def test_mean_and_var_go_together():
    x, weight, bn_weight, bn_bias, places = conv_case("3x3")
    with pytest.raises(RuntimeError, match="mean and var: expected both or neither"):
        ops.bn_act_conv(x, weight, x[0, :, 0, 0], None, bn_weight, bn_bias, EPS, True, *places, True)
    with pytest.raises(RuntimeError, match="mean: bn_weight and bn_bias need mean and var"):
        ops.bn_act_conv(x, weight, None, None, bn_weight, bn_bias, EPS, True, *places, True)


def test_autocast_casts_maps_and_no_vectors():
    case = pointwise_case("last", torch.float32, "channels_last")
    with torch.autocast("cpu", torch.bfloat16):
        y, y_mean, _, _, a_cov = run_pointwise(*case)
        assert y.dtype is torch.bfloat16 and y_mean.dtype is a_cov.dtype is torch.float32
        *tensors, places = conv_case("3x3", torch.float32)
        assert run_conv(*tensors, places)[0].dtype is torch.bfloat16


# --- the choice by measurement ---


class Fake(types.SimpleNamespace):
    __hash__ = object.__hash__

    def unavailable(self):
        return None

    def declines(self, *args):
        return None


def fake(name, microseconds):
    return Fake(NAME=name, microseconds=microseconds, bn_act_conv=lambda *args: (name, None, None))


@pytest.fixture
def timed(monkeypatch):
    """Backends that agree with the reference, in an order that is not that of their speed."""
    candidates = fake("slow", 30.0), fake("fast", 10.0), fake("other", 20.0)
    asked = []

    def microseconds(call, args):
        name = call(*args)[0]
        asked.append(name)
        return next(c.microseconds for c in candidates if name == c.NAME)

    monkeypatch.setitem(backends.ORDER, "cpu", candidates)
    monkeypatch.setattr(backends, "TRUSTED", set())
    monkeypatch.setattr(backends, "objection", lambda *args: (None, True))
    monkeypatch.setattr(choice, "microseconds", microseconds)
    return asked


def call():
    x, weight, *bn, places = conv_case("3x3", torch.float32)
    return backends.run("bn_act_conv", x, weight, None, None, *bn, EPS, True, *places, True)[0]


def test_the_fastest_that_agrees_serves(timed):
    assert call() == "fast"
    assert len(timed) == 3 * (1 + choice.ROUNDS)
    assert call() == "fast" and len(timed) == 3 * (1 + choice.ROUNDS)  # asked once


def test_one_that_disagrees_is_not_timed(timed, monkeypatch):
    monkeypatch.setattr(backends, "objection", lambda c, *args: ("off" if c.NAME == "fast" else None, True))
    assert call() == "other" and "fast" not in timed


def test_a_last_resort_is_not_timed_beside_others_and_serves_without_them(timed, monkeypatch):
    fast = backends.ORDER["cpu"][1]
    fast.LAST_RESORT = ("bn_act_conv",)
    with monkeypatch.context() as here:
        here.setattr(backends, "objection", lambda c, *args: (None if c is fast else "off", True))
        assert call() == "fast"
    backends._ready.clear()
    timed.clear()
    assert call() == "other" and "fast" not in timed


def test_nothing_is_timed_where_runs_have_to_repeat(timed):
    torch.use_deterministic_algorithms(True)
    try:
        assert call() == "slow" and not timed
    finally:
        torch.use_deterministic_algorithms(False)
    assert call() == "fast"


def test_nothing_is_timed_while_a_graph_is_captured(timed, monkeypatch):
    monkeypatch.setattr(backends, "capturing", lambda device: True)
    assert call() == "slow" and not timed
    monkeypatch.setattr(backends, "capturing", lambda device: False)
    assert call() == "fast"


def test_too_little_memory_to_time(timed, monkeypatch):
    """The first serves from then on: the next step has no more room."""
    asked = []

    def microseconds(call, args):
        asked.append(1)
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(choice, "microseconds", microseconds)
    assert call() == "slow" and call() == "slow" and len(asked) == 1


def test_maps_of_about_one_size_are_timed_once(timed):
    for height in (8, 9, 10, 11, 8):
        x, weight, *bn, places = conv_case("3x3", torch.float32, size=(height, 7))
        assert backends.run("bn_act_conv", x, weight, None, None, *bn, EPS, True, *places, True)[0] == "fast"
    assert len(timed) == 3 * (1 + choice.ROUNDS)


@pytest.mark.parametrize("op", sorted(backends.MEASURED))
def test_every_measured_op_is_compared_on_random_tensors_of_its_own(op):
    """The comparison that precedes all trust, run on the CPU backend: it agrees, and one that is 1 % off does not."""
    from fused_resnet.doctor import sample_arguments

    args = sample_arguments(op, "cpu", torch.float32)
    assert verify.objection(cpu, op, args) == (None, True)
    right = getattr(reference, op)

    def off_by_a_percent(*args):
        result = right(*args)
        if isinstance(result, torch.Tensor):
            return result * 1.01
        first, *rest = result
        return first * 1.01, *rest

    wrong = Fake(NAME="wrong", **{op: off_by_a_percent})
    reason, settled = verify.objection(wrong, op, args)
    assert settled and "output 0 differs" in reason


def test_small_terms_survive_rounding_over_many_rows():
    """The terms by which a batch norm's derivative differs from a product are as small as 1 / sqrt(rows), and the same
    in every row. Added to what is rounded already they were lost: an error of a twentieth at 2^16 rows."""
    rows, errors = 2**16, []
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(1, 16, 64, rows // 64).bfloat16().contiguous(memory_format=torch.channels_last)
        weight = (torch.randn(64, 16, 1, 1) / 4).bfloat16()
        before = (x, weight, *reference.bn_stats(x), torch.ones(16), torch.ones(16), 1e-3, True)
        out = reference.pointwise_bn_act(*before, torch.ones(64), None, 1e-3, None, [1, 1], False)
        grad = torch.randn_like(out[0])
        args = (grad, None, *before, torch.ones(64), out[1], out[2], 1e-3, out[3], out[4], [1, 1], False, [True] * 7)
        found = composed.pointwise_bn_act_bwd(aten, *args)[3]
        exact = reference.pointwise_bn_act_bwd(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))[3]
        errors.append((found - exact).norm() / (16 * rows) ** 0.5)
    assert max(errors) < 0.012, errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("stride, normalised", [(1, True), (2, False)])
def test_the_pointwise_backward_by_way_of_the_raw_result(stride, normalised, dtype):
    """What serves where the short way is off by more than may be."""
    torch.manual_seed(0)
    channels_last = dict(memory_format=torch.channels_last)
    x = torch.randn(3, 16, 8, 6).to(dtype).contiguous(**channels_last)
    weight = (torch.randn(64, 16, 1, 1) / 4).to(dtype).contiguous(**channels_last)
    wide = reference.accumulator(dtype)
    bn = (torch.rand(16, dtype=wide) + 0.5, torch.randn(16, dtype=wide))
    loaded = (*reference.bn_stats(x), *bn) if normalised else (None,) * 4
    out = torch.rand(64, dtype=wide) + 0.5, torch.randn(64, dtype=wide)
    before = (x, weight, *loaded, EPS, True)
    forward = reference.pointwise_bn_act(*before, *out, EPS, None, [stride] * 2, normalised)
    y, y_mean, y_var, a_mean, a_cov = forward
    grad = torch.randn_like(y)
    args = (
        grad,
        y if normalised else None,
        *before,
        out[0],
        y_mean,
        y_var,
        EPS,
        a_mean,
        a_cov,
        [stride] * 2,
        normalised,
    )
    found = composed.recomputed_bwd(aten, *args, [True] * 7)
    expected = reference.pointwise_bn_act_bwd(*args, [True] * 7)
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            limit = 1e-10 if dtype is torch.float64 else verify.TOLERANCE[dtype]
            assert got.dtype == want.dtype and verify.difference(got, want) <= limit


@pytest.mark.parametrize("together", [True, False])
def test_vectors_are_converted_together_or_one_by_one(together, monkeypatch):
    from fused_resnet.backends.layout import in_dtypes

    calls = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *args: calls.append(len(args[0])) or copy(*args))
    half, wide = torch.randn(6).bfloat16()[::2], torch.randn(3)
    given, dtypes = (half, None, wide, half), (torch.float32, torch.float32, torch.float32, torch.float16)
    found = in_dtypes(given, dtypes, together)
    assert found[1] is None and found[2] is wide and [t.dtype for t in (found[0], found[3])] == [dtypes[0], dtypes[3]]
    assert torch.equal(found[0], half.float()) and torch.equal(found[3], half.half())
    assert calls == [2] * together


def test_second_gradients_go_through_converted_vectors():
    """Vectors of 16 bits get their gradients converted, where the conversion is differentiated in turn."""
    case = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in pointwise_case("last", torch.bfloat16)]
    for i in (2, 3, 4, 5):
        case[i] = case[i].detach().bfloat16().requires_grad_()
    y = run_pointwise(*case)[0]
    first = torch.autograd.grad(y.float().square().sum(), case[2:6], create_graph=True)
    assert all(g.dtype is torch.bfloat16 and g.grad_fn is not None for g in first)
    (second,) = torch.autograd.grad(sum(g.float().square().sum() for g in first), case[0])
    assert second.isfinite().all() and second.float().norm() > 0


@pytest.fixture
def guarded(monkeypatch):
    """Launches of Triton's host side on tensors without data: (kernel, whether the tensors' device was the current)."""
    from fused_resnet.backends import triton, triton_pointwise, triton_train

    seen, depth = [], [0]

    @contextlib.contextmanager
    def device_of(x):
        depth[0] += 1
        yield
        depth[0] -= 1

    for module in (triton, triton_pointwise):
        monkeypatch.setattr(module, "_device_of", device_of)
    launch = lambda kernel, *args, **more: seen.append((kernel.fn.__name__, depth[0] > 0))  # noqa: E731
    return seen, launch, triton_train


def _meta(*shape, dtype=torch.bfloat16):
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def test_every_piece_is_launched_on_its_tensors_device(guarded):
    pytest.importorskip("triton")
    seen, launch, host = guarded
    vectors = [_meta(16) for _ in range(2)]
    host.gram(_meta(2, 16, 5, 7), *[None] * 4, 0.0, False, [1, 1], launch=launch)
    statistics = _meta(16, dtype=torch.float32), _meta(16, 16, dtype=torch.float32)
    host.product_statistics(_meta(32, 16, 1, 1), *statistics, _meta(32), _meta(32), 1e-5, launch=launch)
    norm = (*(_meta(16, dtype=torch.float32) for _ in range(2)), *vectors, 1e-5, True)
    host.pointwise_bn_act(
        _meta(2, 16, 5, 7), _meta(32, 16, 1, 1), *norm, None, None, 1e-5, None, [1, 1], True, launch=launch
    )
    assert len(seen) > 6 and all(inside for _, inside in seen), seen


def test_a_gradient_that_is_a_view_of_one_value_a_channel_is_laid_out_once(guarded, monkeypatch):
    pytest.importorskip("triton")
    from fused_resnet.backends import triton, triton_pointwise

    _, launch, _ = guarded
    layouts, bn_act_bwd = [], triton.bn_act_bwd

    def recorded(grad, *args, **more):
        layouts.append(grad.is_contiguous(memory_format=torch.channels_last))
        return bn_act_bwd(grad, *args, **more)

    monkeypatch.setattr(triton, "bn_act_bwd", recorded)
    monkeypatch.setattr(triton_pointwise, "_inner", lambda g, a: _meta(32, 16, dtype=torch.float32))
    x, y, weight = _meta(2, 16, 5, 7), _meta(2, 32, 5, 7), _meta(32, 16, 1, 1)
    grad = torch.empty(2, 32, 1, 1, dtype=torch.bfloat16, device="meta").expand(y.shape)
    of_a = _meta(16, dtype=torch.float32), _meta(16, 16, dtype=torch.float32)
    norm = (*(_meta(16, dtype=torch.float32) for _ in range(2)), _meta(16), _meta(16), 1e-5, True)
    statistics = (_meta(32), *(_meta(32, dtype=torch.float32) for _ in range(2)), 1e-5, *of_a)
    found = triton_pointwise.pointwise_bn_act_bwd(
        grad, y, x, weight, *norm, *statistics, [1, 1], True, [True] * 7, launch=launch
    )
    assert layouts == [True, True] and found[-1].is_contiguous(memory_format=torch.channels_last)
