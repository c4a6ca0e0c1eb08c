"""bn_stats, bn_act, bn_act_bwd and bn_act_bwd_input against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from fused_resnet.backends import triton as backend
from fused_resnet.backends.layout import output_format
from fused_resnet.kernels import tiles

from . import common
from .common import CL, assert_close, bn_params, each_dtype, lay, rand

EPS = 1e-3
LAYOUTS = ("contiguous", "channels_last", "sliced", "sliced_nchw")
SHAPES = {
    "3ch": (5, 3, 7, 9),
    "1ch": (1, 1, 7, 9),
    "70ch": (1, 70, 7, 9),
    "64ch": (5, 64, 7, 9),
    "1x1_map": (5, 33, 1, 1),
    "one_row": (1, 5, 1, 1),
    "many_rows": (1, 3, 90, 70),
}
FEW = ("3ch", "70ch")
NAMES = ("dx", "dbn_weight", "dbn_bias", "dresidual")


@pytest.fixture(params=["chosen", "small"])
def tile(request, monkeypatch):
    """The tiles a launch picks, and small ones: a small shape then has many row blocks, splits and channel blocks."""
    if request.param == "small":
        chosen = tiles.row_tile.__wrapped__
        monkeypatch.setattr(tiles, "row_tile", lambda m, c: chosen(m, c, elements=256, programs=5))
        monkeypatch.setattr(tiles, "finish_tile", lambda splits, c: (2, min(4, tiles.power_of_2(c))))


@pytest.mark.parametrize("shape, dtype", [*each_dtype(SHAPES, FEW)])
def test_stats(shape, dtype, tile):
    x = rand(*SHAPES[shape], dtype=dtype).add(0.5).contiguous(memory_format=CL)
    mean, var = backend.bn_stats(x)
    assert mean.dtype == var.dtype == torch.float32
    want_var, want_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert_close(mean, want_mean)
    assert_close(var, want_var)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stats_layouts(layout):
    x = lay(rand(5, 6, 7, 9).add(0.5), layout)
    mean, var = backend.bn_stats(x)
    assert_close(mean, x.double().mean((0, 2, 3)))
    assert_close(var, x.double().var((0, 2, 3), correction=0))
    expanded = x[:1].expand(4, -1, -1, -1)
    assert_close(backend.bn_stats(expanded)[1], expanded.double().var((0, 2, 3), correction=0))


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
def test_stats_survive_a_mean_far_above_the_deviation(offset, tile):
    """mean 1e4, deviation 1 in float32: E[x^2] - mean^2 would have no correct digit."""
    x = (rand(5, 5, 17, 19) + offset).contiguous(memory_format=CL)
    mean, var = backend.bn_stats(x)
    assert_close(mean, x.double().mean((0, 2, 3)))
    assert_close(var, x.double().var((0, 2, 3), correction=0))


def test_stats_with_an_outlier_for_a_pivot():
    """The first row is the pivot; where it is the odd one out, Welford's recurrence has to carry the sums.

    The mean is then good to the pivot's last place, which is small against the deviation that the outlier itself makes.
    """
    x = rand(5, 5, 17, 19).contiguous(memory_format=CL)
    x[0, :, 0, 0] = 1e3
    mean, var = backend.bn_stats(x)
    want = x.double().var((0, 2, 3), correction=0)
    assert ((mean - x.double().mean((0, 2, 3))).abs() / want.sqrt()).max() < 5e-6
    assert_close(var, want)


def test_stats_of_a_constant():
    mean, var = backend.bn_stats(torch.full((2, 3, 5, 7), 0.1).contiguous(memory_format=CL))
    assert torch.equal(mean, torch.full((3,), 0.1))
    assert torch.equal(var, torch.zeros(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_stats_not_finite(value, tile):
    x = rand(1, 70, 7, 9).contiguous(memory_format=CL)
    x[0, 3, 2, 1] = value
    mean, var = backend.bn_stats(x)
    assert not mean[3].isfinite() and var[3].isnan()
    others = torch.arange(70) != 3
    assert_close(mean[others], x.double().mean((0, 2, 3))[others])
    assert_close(var[others], x.double().var((0, 2, 3), correction=0)[others])


def bn_inputs(shape, dtype=torch.float32, layout="channels_last", batch_stats=True):
    x = lay(rand(*shape, dtype=dtype).add(0.5), layout)
    gamma, beta, mean, var = bn_params(shape[1])
    if batch_stats:
        var, mean = (t.float() for t in torch.var_mean(x.double(), (0, 2, 3), correction=0))
    return x, mean, var, gamma, beta, lay(rand(*shape, dtype=dtype, seed=7), layout)


@pytest.mark.parametrize("shape, dtype", [*each_dtype(SHAPES, FEW)])
def test_forward(shape, dtype, tile):
    x, mean, var, gamma, beta, residual = bn_inputs(SHAPES[shape], dtype)
    y = backend.bn_act(x, mean, var, gamma, beta, EPS, residual, True, True)
    assert y.dtype == dtype
    assert_close(y, common.bn_act(x, mean, var, gamma, beta, EPS, residual, True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("affine", ["none", "weight", "fp16"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_forward_variants(layout, relu, affine, residual):
    dtype = torch.float16 if affine == "fp16" else torch.float32
    x, mean, var, gamma, beta, r = bn_inputs((5, 6, 7, 9), dtype, layout)
    gamma, beta = {"none": (None, None), "weight": (gamma, None), "fp16": (gamma.half(), beta.half())}[affine]
    args = (x, mean, var, gamma, beta, EPS, r if residual else None, relu)
    y = backend.bn_act(*args, True)
    assert_close(y, common.bn_act(*args))
    assert y.stride() == torch.empty(y.shape, memory_format=output_format(x)).stride()


def test_forward_far_mean():
    x = (rand(5, 6, 7, 9) + 1e4).contiguous(memory_format=CL)
    var, mean = (t.float() for t in torch.var_mean(x.double(), (0, 2, 3), correction=0))
    y = backend.bn_act(x, mean, var, None, None, EPS, None, False, True)
    assert_close(y, common.bn_act(x, mean, var, None, None, EPS, None, False))


def test_forward_not_finite():
    x, mean, var, gamma, beta, residual = bn_inputs((5, 6, 7, 9))
    x[0, 0, 0, 0], x[0, 1, 0, 0], residual[0, 2, 0, 0] = float("nan"), -float("inf"), float("nan")
    y = backend.bn_act(x, mean, var, gamma, beta, EPS, residual, True, True)
    want = common.bn_act(x, mean, var, gamma, beta, EPS, residual, True)
    assert y[0, 0, 0, 0].isnan() and y[0, 2, 0, 0].isnan()
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())


def check_bwd(
    shape, dtype=torch.float32, layout="channels_last", relu=True, batch_stats=True, affine=True, mask=(True,) * 4
):
    x, mean, var, gamma, beta, residual = bn_inputs(shape, dtype, layout, batch_stats)
    gamma, beta = (gamma, beta) if affine else (None, None)
    y = lay(common.bn_act(x, mean, var, gamma, beta, EPS, residual, relu).to(dtype), layout)
    grad = lay(rand(*shape, dtype=dtype, seed=8), layout)
    args = (grad, y if relu else None, x, mean, var, gamma, EPS, relu, batch_stats, list(mask))
    got = backend.bn_act_bwd(*args)
    want = expected_bwd(*args)
    for name, on, g, w in zip(NAMES, mask, got, want, strict=True):
        assert (g is not None) == on, name
        if on:
            # Sums are float32 whatever the tensors are; a few float32 roundings more than the forward has.
            assert_close(g, w, factor=3.0, name=name)
            assert g.dtype == (torch.float32 if name.startswith("dbn") else dtype)
            if name in ("dx", "dresidual"):
                assert g.stride() == torch.empty(shape, memory_format=output_format(x)).stride()
                assert g.data_ptr() not in (grad.data_ptr(), y.data_ptr(), x.data_ptr())
    for first, second in zip(got, backend.bn_act_bwd(*args), strict=True):
        assert (first is None and second is None) or torch.equal(first, second)


def expected_bwd(grad, y, x, mean, var, gamma, eps, relu, batch_stats, output_mask):
    """float64 autograd through the definition; with batch_stats, through mean and variance as well."""
    leaf = x.double().requires_grad_()
    c = x.shape[1]
    weight = torch.ones(c).double() if gamma is None else gamma.double().clone()
    bias = torch.zeros(c).double().requires_grad_()
    weight.requires_grad_()
    if batch_stats:
        centred = leaf - leaf.mean((0, 2, 3), keepdim=True)
        xhat = centred / (centred.square().mean((0, 2, 3), keepdim=True) + eps).sqrt()
    else:
        xhat = (leaf - common.channels(mean.double())) / (common.channels(var.double()) + eps).sqrt()
    g = grad.double()
    if relu:
        g = g.masked_fill(y <= 0, 0)
    (xhat * common.channels(weight) + common.channels(bias)).backward(g)
    return leaf.grad, weight.grad, bias.grad, g


@pytest.mark.parametrize("shape, dtype", [*each_dtype([n for n in SHAPES if n != "one_row"], FEW)])
@pytest.mark.parametrize("batch_stats", [False, True], ids=["frozen", "batch"])
def test_backward(shape, dtype, batch_stats, tile):
    check_bwd(SHAPES[shape], dtype, batch_stats=batch_stats)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("affine", [False, True], ids=["no_affine", "affine"])
@pytest.mark.parametrize("batch_stats", [False, True], ids=["frozen", "batch"])
def test_backward_variants(layout, relu, affine, batch_stats):
    check_bwd((5, 6, 7, 9), layout=layout, relu=relu, affine=affine, batch_stats=batch_stats)


@pytest.mark.parametrize("affine", [False, True], ids=["no_affine", "affine"])
@pytest.mark.parametrize("mask", [(True, True, True, False), (False, False, True, True), (True,) * 4])
@pytest.mark.parametrize("shape, dtype", [("3ch", torch.float32), ("70ch", torch.bfloat16), ("1x1_map", torch.float16)])
def test_backward_with_the_mask_of_x(shape, dtype, mask, affine, tile):
    """The gradients are those with the mask of the output, to the bit."""
    x, grad = (rand(*SHAPES[shape], seed=seed, dtype=dtype).contiguous(memory_format=CL) for seed in (1, 2))
    gamma, beta = bn_params(SHAPES[shape][1])[:2] if affine else (None, None)
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    y = backend.bn_act(x, mean, var, gamma, beta, EPS, None, True, True)
    bn = (x, mean, var, gamma, EPS, True, True, list(mask))
    found, wanted = backend.bn_act_bwd(grad, None, *bn, beta), backend.bn_act_bwd(grad, y, *bn)
    for needed, f, w in zip(mask, found, wanted, strict=True):
        assert (f is None) == (not needed) and (f is None or torch.equal(f, w))


@pytest.mark.parametrize("batch_stats", [False, True], ids=["frozen", "batch"])
def test_backward_every_output_mask(batch_stats):
    for mask in itertools.product((False, True), repeat=4):
        check_bwd((1, 5, 7, 9), batch_stats=batch_stats, mask=mask)


def test_backward_expanded_grad_and_zero_weight():
    x, mean, var, _, beta, residual = bn_inputs((5, 6, 7, 9))
    gamma = torch.zeros(6)
    y = common.bn_act(x, mean, var, gamma, beta, EPS, residual, True).float()
    args = (torch.tensor(0.5).expand(x.shape), y, x, mean, var, gamma, EPS, True, True, [True] * 4)
    got, want = backend.bn_act_bwd(*args), expected_bwd(*args)
    assert torch.count_nonzero(got[0]) == 0
    for i in (1, 2, 3):
        assert_close(got[i], want[i], factor=3.0, name=NAMES[i])


def test_backward_far_mean():
    x = (rand(5, 6, 7, 9) + 1e4).contiguous(memory_format=CL)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    args = (rand(*x.shape, seed=8), None, x, mean.float(), var.float(), torch.ones(6), EPS, False, True, [True] * 4)
    got = backend.bn_act_bwd(*args)
    # float32 holds a mean of 1e4 to 2^-11 of the deviation: that, not the kernel, bounds dx and dbn_weight. Twice that.
    for name, g, w in zip(NAMES, got, expected_bwd(*args), strict=True):
        assert_close(g, w, factor=2.0**-10 / common.TOLERANCE[torch.float32], name=name)


@pytest.mark.parametrize("batch_stats", [False, True], ids=["frozen", "batch"])
def test_backward_not_finite(batch_stats, tile):
    """A NaN output passes the mask; what is not finite stays in its channel."""
    x, mean, var, gamma, beta, residual = bn_inputs((5, 6, 7, 9), batch_stats=batch_stats)
    y = common.bn_act(x, mean, var, gamma, beta, EPS, residual, True).float().contiguous(memory_format=CL)
    grad = rand(*x.shape, seed=8)
    y[0, 1, 0, 0], grad[1, 2, 0, 0], y[1, 2, 0, 0], mean[4] = float("nan"), float("inf"), 1.0, float("inf")
    got = backend.bn_act_bwd(grad, y, x, mean, var, gamma, EPS, True, batch_stats, [True] * 4)
    assert got[3][0, 1, 0, 0] == grad[0, 1, 0, 0] != 0
    assert got[2][2].isinf() and not got[1][4].isfinite()
    sound = torch.tensor([0, 1, 3, 5])
    want = expected_bwd(grad, y, x, mean, var, gamma, EPS, True, batch_stats, None)
    for name, g, w in zip(NAMES, got, want, strict=True):
        pick = (lambda t: t[sound]) if g.dim() == 1 else (lambda t: t[:, sound])
        assert_close(pick(g), pick(w), factor=3.0, name=name)


@pytest.mark.parametrize("shape, dtype", [*each_dtype(SHAPES, FEW)])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_backward_from_given_sums(shape, relu, dtype, tile):
    check_bwd_input(*bwd_input_args(SHAPES[shape], dtype, "channels_last", relu))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_from_given_sums_layouts(layout):
    *args, relu = bwd_input_args((5, 6, 7, 9), torch.float32, layout, True)
    check_bwd_input(*args, relu)
    wide = [torch.stack((v, v), 1)[:, 0] for v in args[3:]]  # vectors with a stride
    assert torch.equal(backend.bn_act_bwd_input(*args[:3], *wide, relu), backend.bn_act_bwd_input(*args, relu))


def test_backward_from_given_sums_not_finite(tile):
    """A NaN output passes the mask; a sum that is not finite stays in its channel."""
    *args, relu = bwd_input_args((1, 70, 7, 9), torch.float32, "channels_last", True)
    args[1][0, 1, 0, 0], args[5][3] = float("nan"), float("inf")
    check_bwd_input(*args, relu, sound=[c for c in range(70) if c != 3])
    assert not backend.bn_act_bwd_input(*args, relu)[:, 3].isfinite().any()


def bwd_input_args(shape, dtype, layout, relu):
    """(grad, y, x, mean, scale, mean_g, slope, relu)"""
    x, grad, y = (lay(rand(*shape, dtype=dtype, seed=seed), layout) for seed in (1, 2, 3))
    return grad, y if relu else None, x, *(rand(shape[1], seed=seed) for seed in (4, 5, 6, 7)), relu


def check_bwd_input(grad, y, x, *vectors, sound=slice(None)):
    *vectors, relu = vectors
    mean, scale, mean_g, slope = (common.channels(v.double()) for v in vectors)
    g = grad.double().masked_fill(y <= 0, 0) if relu else grad.double()
    dx = backend.bn_act_bwd_input(grad, y, x, *vectors, relu)
    want = (g - mean_g - (x.double() - mean) * slope) * scale
    assert_close(dx[:, sound], want[:, sound])
    assert dx.dtype == x.dtype and dx.stride() == torch.empty(x.shape, memory_format=output_format(x)).stride()
