"""conv_bn_act backward: mask, folded weight and weight gradients against float64 autograd."""

from __future__ import annotations

import itertools

import pytest
import test_float16_range
import torch

from fused_resnet.backends import reference
from fused_resnet.backends import triton as backend
from fused_resnet.backends.layout import output_format

from . import common
from .common import CL, assert_close, bn_params, each_dtype, lay, rand
from .test_conv_bn_act import CASES, EPS, FEW, inputs

NAMES = ("dx", "dweight", "dbn_weight", "dbn_bias", "dresidual")
# Gradients that aten computes from 16-bit g and folded weights, and rounds to 16 bit, carry two or three roundings.
FACTOR = 3.0


def setup(case, dtype, bn=True, relu=True, layout="channels_last"):
    x, weight, conv = inputs(case, dtype, layout=layout)
    k = weight.shape[0]
    params = bn_params(k) if bn else (None,) * 4
    plain = torch.nn.functional.conv2d(x.float(), weight.float(), None, *conv)
    residual = lay(rand(*plain.shape, dtype=dtype, seed=7), layout)
    grad = lay(rand(*plain.shape, dtype=dtype, seed=8), layout)
    y = lay(common.conv_bn_act(x, weight, *params, EPS, residual, *conv, relu).to(dtype), layout)
    return grad, y, x, weight, params, conv


def expected(grad, y, x, weight, params, conv, relu):
    """float64 autograd, with the mask that the op gets: the sign of the y that was saved."""
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, weight, *params[:2])]
    mean, var = (None if t is None else t.double() for t in params[2:])
    out = common.conv_bn_act(*leaves, mean, var, EPS, None, *conv, False)
    g = grad.double()
    if relu:
        g = g.masked_fill(y <= 0, 0)
    out.backward(g)
    return [None if t is None else t.grad for t in leaves] + [g]


def check(case, dtype, bn=True, relu=True, layout="channels_last", mask=(True,) * 5):
    grad, y, x, weight, params, conv = setup(case, dtype, bn, relu, layout)
    if not bn:
        mask = (mask[0], mask[1], False, False, mask[4])
    args = (grad, y if relu else None, x, weight, params[0], params[2], params[3], EPS, *conv, relu, list(mask))
    got = backend.conv_bn_act_bwd(*args)
    want = expected(grad, y, x, weight, params, conv, relu)
    for name, on, g, w in zip(NAMES, mask, got, want, strict=True):
        assert (g is not None) == on, name
        if on:
            assert g.dtype == (torch.float32 if name.startswith("dbn") else dtype)
            # dbn_weight and dbn_bias are float32, from sums over 16-bit tensors
            assert_close(g, w, dtype, FACTOR, name)
    format = output_format(x, weight)
    if mask[0]:
        assert got[0].stride() == torch.empty(x.shape, memory_format=format).stride()
    if mask[1]:
        assert got[1].stride() == torch.empty_like(weight).stride()
    if mask[4]:
        assert got[4].stride() == torch.empty(y.shape, memory_format=format).stride()
        assert got[4].data_ptr() not in (grad.data_ptr(), y.data_ptr())
        assert torch.equal(got[4].double(), want[4])
    return got


@pytest.mark.parametrize("case, dtype", [*each_dtype(CASES, FEW)])
def test_parity(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("case", ["stem_7x7", "3x3_stride2", "1x1_odd", "resnext_8_stride2"])
@pytest.mark.parametrize("bn", [False, True], ids=["plain", "bn"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_variants(case, bn, relu, layout):
    check(case, torch.float32, bn, relu, layout)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_every_output_mask(relu):
    for mask in itertools.product((False, True), repeat=5):
        check("1x1_odd", torch.float32, relu=relu, mask=mask)


def test_no_affine():
    """BN without weight and bias has a scale all the same."""
    grad, y, x, weight, (_, _, mean, var), conv = setup("3x3", torch.float32)
    params = (None, None, mean, var)
    got = backend.conv_bn_act_bwd(
        grad, y, x, weight, None, mean, var, EPS, *conv, True, [True, True, False, False, True]
    )
    want = expected(grad, y, x, weight, params, conv, True)
    for i in (0, 1, 4):
        assert_close(got[i], want[i], factor=FACTOR, name=NAMES[i])


def test_bn_weight_zero():
    """zero_init_residual: dbn_weight must not come from a folded weight that is zero."""
    grad, y, x, weight, (_, beta, mean, var), conv = setup("3x3", torch.float32)
    gamma = torch.zeros_like(beta)
    got = backend.conv_bn_act_bwd(grad, y, x, weight, gamma, mean, var, EPS, *conv, True, [True] * 5)
    want = expected(grad, y, x, weight, (gamma, beta, mean, var), conv, True)
    assert torch.count_nonzero(got[0]) == torch.count_nonzero(got[1]) == 0
    assert want[2].norm() > 0.1
    for i in (2, 3, 4):
        assert_close(got[i], want[i], factor=FACTOR, name=NAMES[i])


def test_expanded_grad_and_sliced_weight():
    _, y, x, weight, params, conv = setup("3x3", torch.float32)
    grad = torch.tensor(0.25).expand(y.shape)
    wide = torch.full((24, 20, 3, 4), float("nan"))
    wide[:, 2:18, :, 1:] = weight
    sliced = wide[:, 2:18, :, 1:]
    got = backend.conv_bn_act_bwd(grad, y, x, sliced, params[0], *params[2:], EPS, *conv, True, [True] * 5)
    assert got[1].stride() == torch.empty_like(sliced).stride()
    for name, g, w in zip(NAMES, got, expected(grad, y, x, weight, params, conv, True), strict=True):
        assert_close(g, w, factor=FACTOR, name=name)


def test_nan_passes_the_mask():
    """An output that is NaN lets its gradient through, as PyTorch's ReLU does."""
    grad, y, x, weight, params, conv = setup("1x1", torch.float32)
    y[0, 3, 2, 1] = float("nan")
    y[0, 4, 2, 1] = float("inf")
    grad[0, 4, 2, 1] = float("nan")
    got = backend.conv_bn_act_bwd(grad, y, x, weight, params[0], *params[2:], EPS, *conv, True, [True] * 5)
    want = expected(grad, y, x, weight, params, conv, True)
    assert got[4][0, 3, 2, 1] == grad[0, 3, 2, 1] != 0
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert torch.equal(g.isnan(), w.isnan()), name
        finite = ~w.isnan()
        assert finite.any(), name
        assert_close(g[finite], w[finite], factor=FACTOR, name=name)
    assert got[2][4].isnan() and got[3][4].isnan() and got[3][3].isfinite()


def test_sums_over_many_rows_and_a_second_run():
    """More rows than one split takes; the same bits again."""
    x = rand(1, 4, 90, 70).contiguous(memory_format=CL)
    weight = rand(5, 4, 1, 1, seed=1)
    params = bn_params(5)
    conv = [[1, 1], [0, 0], [1, 1], 1]
    y = common.conv_bn_act(x, weight, *params, EPS, None, *conv, True).float().contiguous(memory_format=CL)
    grad = rand(*y.shape, seed=3)
    args = (grad, y, x, weight, params[0], *params[2:], EPS, *conv, True, [True] * 5)
    first, second = backend.conv_bn_act_bwd(*args), backend.conv_bn_act_bwd(*args)
    for name, f, s, w in zip(NAMES, first, second, expected(grad, y, x, weight, params, conv, True), strict=True):
        assert torch.equal(f, s), name
        assert_close(f, w, factor=FACTOR, name=name)


@pytest.mark.parametrize("offset", [0.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_gradient_of_bn_weight_is_exact(dtype, offset):
    test_float16_range.check_bn_weight_gradient(backend.conv_bn_act_bwd, dtype, offset)


@pytest.mark.parametrize("all_of_them", [True, False], ids=["all", "weight-alone"])
@pytest.mark.parametrize("case", test_float16_range.CASES)
def test_float16_weight_gradients_stay_in_range(case, all_of_them):
    args = test_float16_range.stem_bwd(**test_float16_range.CASES[case])
    args = args if all_of_them else (*args[:-1], [True, True, False, True, True])
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    for name, v, e in zip(NAMES, backend.conv_bn_act_bwd(*args), reference.conv_bn_act_bwd(*wide), strict=True):
        assert (v is None) == (e is None)
        assert v is None or ((v.double() - e).norm() / e.norm()).item() < 2e-3, name
