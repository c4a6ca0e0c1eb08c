"""Backward of the convolution that normalises while it loads, against float64 autograd through the statistics."""

from __future__ import annotations

import itertools

import pytest
import torch

from fused_resnet.backends import triton as base
from fused_resnet.backends import triton_train_bwd as backend
from fused_resnet.backends.layout import output_format
from fused_resnet.kernels import tiles

from .common import CL, assert_close, bn_params, channels, lay, rand

EPS = 1e-3
NAMES = ("dx", "dweight", "dbn_weight", "dbn_bias")
# a, g and the result are each rounded to 16 bits, or are each a float32 sum.
FACTOR = 3.0

# name: N, C, H, W, K, R, S, stride, padding, dilation
CASES = {
    "3x3": (1, 16, 7, 9, 33, 3, 3, (1, 1), (1, 1), (1, 1)),
    "3x3_64": (1, 64, 7, 9, 64, 3, 3, (1, 1), (1, 1), (1, 1)),
    "3x3_unpadded": (1, 33, 7, 9, 16, 3, 3, (1, 1), (0, 0), (1, 1)),
    "3x3_stride2": (5, 16, 7, 9, 16, 3, 3, (2, 2), (1, 1), (1, 1)),
    "3x3_stride2_even": (1, 16, 8, 6, 70, 3, 3, (2, 2), (1, 1), (1, 1)),
    "3x3_stride2_unpadded": (1, 20, 7, 9, 16, 3, 3, (2, 2), (0, 0), (1, 1)),
    "3x3_dilation2": (1, 17, 7, 9, 16, 3, 3, (1, 1), (2, 2), (2, 2)),
    "3x3_stride2_dilation2": (1, 16, 9, 11, 16, 3, 3, (2, 2), (1, 2), (2, 2)),
    "5x5_stride2": (1, 16, 7, 9, 16, 5, 5, (2, 2), (1, 1), (1, 1)),
    "asymmetric": (1, 18, 9, 7, 16, 3, 5, (3, 1), (1, 3), (2, 2)),
    "1x1": (5, 33, 7, 9, 16, 1, 1, (1, 1), (0, 0), (1, 1)),
    "1x1_wide": (1, 132, 7, 9, 70, 1, 1, (1, 1), (0, 0), (1, 1)),
    "1x1_stride2": (5, 16, 7, 9, 40, 1, 1, (2, 2), (0, 0), (1, 1)),
    "1x1_stride3_padded": (1, 16, 7, 9, 16, 1, 1, (3, 3), (1, 1), (1, 1)),
    "1x1_map": (5, 16, 1, 1, 24, 1, 1, (1, 1), (0, 0), (1, 1)),
    "3x3_of_a_row_stride2": (5, 16, 1, 2, 16, 3, 3, (2, 2), (1, 1), (1, 1)),
}


@pytest.fixture(autouse=True)
def nan_filled_here(nan_filled, monkeypatch):
    """Of this module's own allocations as well."""
    monkeypatch.setattr(backend, "torch", base.torch)


@pytest.fixture
def small_tiles(monkeypatch):
    """A small shape then has many row tiles, splits and channel blocks."""

    def weight_tile(m, *_):
        blocks = tiles.ceil_div(m, 16)
        return backend.WeightTile(16, 16, 16, 4, 2, tiles.ceil_div(blocks, 2), 2)

    monkeypatch.setattr(backend, "input_tile", lambda *_: backend.Tile(16, 16, 16, 4, 2))
    monkeypatch.setattr(backend, "weight_tile", weight_tile)
    monkeypatch.setattr(tiles, "finish_tile", lambda splits, c: (2, min(4, tiles.power_of_2(c))))


@pytest.fixture
def wide_tiles(monkeypatch):
    """Columns of which the epilogue takes one half after the other."""
    monkeypatch.setattr(backend, "input_tile", lambda *_: backend.Tile(128, 64, 16, 8, 2))


def inputs(case, dtype=torch.float32, layout="channels_last", affine=True):
    """(grad, x, weight, mean, var, bn_weight, bn_bias, conv) of which no pre-activation lies within 1e-4 of zero."""
    n, c, h, w, k, r, s, *conv = CASES[case]
    x = lay(rand(n, c, h, w, dtype=dtype).add(0.5), layout)
    weight = rand(k, c, r, s, seed=1).div((c * r * s) ** 0.5).to(dtype)
    weight = weight.contiguous() if layout == "contiguous" else weight.contiguous(memory_format=CL)
    gamma, beta = bn_params(c)[:2] if affine else (None, None)
    var, mean = (t.float() for t in torch.var_mean(x.double(), (0, 2, 3), correction=0))
    if affine:
        beta = away_from_zero(x, mean, var, gamma, beta)
    out = torch.nn.functional.conv2d(x.float(), weight.float(), None, *conv)
    grad = lay(rand(*out.shape, dtype=dtype, seed=2), layout)
    return grad, x, weight, mean, var, gamma, beta, [*map(list, conv), 1]


def normalised(x, mean, var, gamma, beta):
    """bn(x) in x's dtype, mean and var as given."""
    z = (x - channels(mean)) / channels((var + EPS).sqrt())
    if gamma is not None:
        z = z * channels(gamma)
    return z if beta is None else z + channels(beta)


def away_from_zero(x, mean, var, gamma, beta):
    """beta, moved in each channel until no bn(x) lies within 1e-4 of zero."""
    for _ in range(100):
        close = (normalised(x.double(), mean, var, gamma, beta).abs() < 1e-4).amax((0, 2, 3))
        if not close.any():
            return beta
        beta = beta + close * 3e-3
    raise AssertionError("no such beta")


def expected(grad, x, weight, mean, var, gamma, beta, eps, relu, *conv_and_mask):
    """float64 autograd of the definition, mean and var being those of x; without a mean the plain convolution's."""
    *conv, _ = conv_and_mask
    c = x.shape[1]
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    gamma = (torch.ones(c) if gamma is None else gamma.detach()).double().requires_grad_()
    beta = (torch.zeros(c) if beta is None else beta.detach()).double().requires_grad_()
    a = x
    if mean is not None:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        a = normalised(x, mean, var, gamma, beta)
        a = a.relu() if relu else a
    torch.nn.functional.conv2d(a, weight, None, *conv).backward(grad.double())
    return x.grad, weight.grad, gamma.grad, beta.grad


def arguments(case, dtype=torch.float32, layout="channels_last", affine=True, bn=True, relu=True, mask=(True,) * 4):
    *args, conv = inputs(case, dtype, layout, affine)
    if not bn:
        args[3:] = [None] * 4
        mask = (*mask[:2], False, False)
    return *args, EPS, relu, *conv, list(mask)


def check(*args):
    """Against autograd, in dtype and strides as well."""
    grad, x, weight, *_, mask = args
    assert base.declines("bn_act_conv_bwd", *args) is None
    got, want = backend.bn_act_conv_bwd(*args), expected(*args)
    for name, on, g, w in zip(NAMES, mask, got, want, strict=True):
        assert (g is not None) == on, name
        if on:
            assert g.dtype is (torch.float32 if name.startswith("dbn") else x.dtype)
            assert_close(g, w, x.dtype, FACTOR, name)
    if mask[0]:
        assert got[0].stride() == torch.empty(x.shape, memory_format=output_format(x, weight)).stride()
        assert got[0].data_ptr() not in (x.data_ptr(), grad.data_ptr())
    if mask[1]:
        assert got[1].stride() == torch.empty_like(weight).stride()
    return got


@pytest.mark.parametrize("case", CASES)
def test_parity(case):
    check(*arguments(case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", ["3x3_stride2", "asymmetric", "1x1"])
def test_parity_of_16_bits(case, dtype):
    check(*arguments(case, dtype))


@pytest.mark.parametrize("case", ["3x3_dilation2", "asymmetric", "1x1_stride2", "1x1_stride3_padded"])
def test_small_tiles(case, small_tiles):
    """Many partials to merge, and blocks at the edges of everything."""
    check(*arguments(case))


def test_a_second_run_gives_the_same_bits(small_tiles):
    args = arguments("3x3_stride2")
    for name, first, second in zip(NAMES, check(*args), backend.bn_act_conv_bwd(*args), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", ["1x1_wide", "3x3_stride2"])
def test_wide_tiles(case, dtype, wide_tiles):
    check(*arguments(case, dtype))


@pytest.mark.parametrize("case", ["3x3_stride2", "1x1"])
@pytest.mark.parametrize("variant", ["no_affine", "linear", "plain"])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_variants(case, variant, layout):
    check(*arguments(case, layout=layout, affine=variant != "no_affine", bn=variant != "plain", relu=False))


def test_no_affine_behind_a_relu():
    x = lay(rand(1, 16, 7, 9, seed=9), "channels_last")
    x = x + 2e-3 * (x - x.mean((0, 2, 3), keepdim=True)).sign()
    var, mean = (t.float() for t in torch.var_mean(x.double(), (0, 2, 3), correction=0))
    assert normalised(x.double(), mean, var, None, None).abs().min() > 1e-4
    grad, _, weight, *_ = arguments("3x3_unpadded")
    check(grad, x, weight[:, :16].contiguous(), mean, var, None, None, EPS, True, [1, 1], [0, 0], [1, 1], 1, [True] * 4)


@pytest.mark.parametrize("bn", [True, False], ids=["bn", "plain"])
def test_every_output_mask(bn):
    args = arguments("1x1_map", bn=bn)
    for mask in itertools.product((False, True), repeat=4 if bn else 2):
        check(*args[:-1], [*mask, False, False][:4])


def test_vectors_of_16_bits_and_odd_strides():
    grad, x, weight, mean, var, gamma, beta, *rest = arguments("1x1", torch.float16)
    gamma, beta = (torch.stack([v, v], 1).half()[:, 0] for v in (gamma, beta))
    beta = away_from_zero(x, mean, var, gamma.double(), beta.double()).half()
    assert normalised(x.double(), mean, var, gamma.double(), beta.double()).abs().min() > 1e-5
    check(grad, x, weight, mean, var, gamma, beta, *rest)


def test_expanded_grad_and_sliced_weight():
    grad, x, weight, *rest = arguments("3x3")
    wide = torch.full((33, 20, 3, 4), float("nan"))
    wide[:, 2:18, :, 1:] = weight
    check(torch.tensor(0.25).expand(grad.shape), x, wide[:, 2:18, :, 1:], *rest)


@pytest.mark.parametrize("case", ["3x3", "3x3_stride2", "1x1_stride3_padded"])
def test_padding_is_zero_behind_a_large_bias(case):
    grad, x, weight, mean, var, gamma, beta, *rest = arguments(case)
    check(grad, x, weight, mean, var, gamma, beta + 1e3, *rest)


def test_a_channel_of_zero_variance():
    _, x, *_ = args = arguments("3x3")
    x[:, 3], x[:, 4] = 0.25, -0.5
    var, mean = (t.float() for t in torch.var_mean(x.double(), (0, 2, 3), correction=0))
    assert var[3] == var[4] == 0
    args[6][3], args[6][4] = 1.0, -1.0
    dx, *_ = check(*args[:3], mean, var, *args[5:])
    assert dx[:, 3].norm() > 0 and torch.count_nonzero(dx[:, 4]) == 0


def test_bn_weight_zero():
    grad, x, weight, mean, var, gamma, beta, *rest = arguments("3x3")
    dx, _, dbn_weight, _ = check(grad, x, weight, mean, var, torch.zeros_like(gamma), beta, *rest)
    assert torch.count_nonzero(dx) == 0 and dbn_weight.norm() > 0


def test_a_mean_far_above_the_deviation():
    grad, x, weight, _, _, gamma, beta, *rest = arguments("1x1")
    x = x + 1e3
    var, mean = (t.float() for t in torch.var_mean(x.double(), (0, 2, 3), correction=0))
    args = grad, x, weight, mean, var, gamma, away_from_zero(x, mean, var, gamma, beta), *rest
    # float32 holds a mean of 1e3 to 2^-14 of the deviation: that, not the kernel, bounds the gradients. Twice that.
    for name, g, w in zip(NAMES, backend.bn_act_conv_bwd(*args), expected(*args), strict=True):
        assert_close(g, w, factor=2.0**-13 / 1e-6, name=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_in_x_stays_in_its_channel(value):
    _, x, *_ = args = arguments("3x3_stride2")
    x[1, 3, 2, 1] = value
    var, mean = (t.float() for t in torch.var_mean(x.double(), (0, 2, 3), correction=0))
    args = *args[:3], mean, var, *args[5:]
    got, want = backend.bn_act_conv_bwd(*args), expected(*args)
    sound = torch.arange(16) != 3
    for name, g, w in zip(NAMES, got, want, strict=True):
        g, w = (t if t.dim() == 1 else t.transpose(0, 1) for t in (g, w))
        assert torch.equal(g[3].isnan(), w[3].isnan()), name
        assert_close(g[sound], w[sound], factor=FACTOR, name=name)


@pytest.mark.parametrize("case", ["1x1", "3x3_stride2"])
def test_nan_in_the_gradient(case):
    """It comes through where the ReLU is open, and nowhere else."""
    grad, *_ = args = arguments(case)
    grad[2, 5, 3, 3] = float("nan")
    for name, g, w in zip(NAMES, backend.bn_act_conv_bwd(*args), expected(*args), strict=True):
        assert torch.equal(g.isnan(), w.isnan()), name
        finite = ~w.isnan()
        assert finite.any() and not finite.all(), name
        assert_close(g[finite], w[finite], factor=FACTOR, name=name)


def test_a_nan_passes_the_mask():
    """A single normalised value that is NaN lets its gradient through, as in PyTorch."""
    grad, x, weight, mean, var, gamma, beta, *rest = arguments("1x1")
    x[1, 3, 2, 1] = float("nan")
    dx, _, dbn_weight, dbn_bias = backend.bn_act_conv_bwd(grad, x, weight, mean, var, gamma, beta, *rest)
    da = torch.einsum("nkhw,kc->nchw", grad.double(), weight[:, :, 0, 0].double())
    want = da.masked_fill(normalised(x.double(), mean, var, gamma, beta) <= 0, 0).sum((0, 2, 3))
    assert_close(dbn_bias, want, factor=FACTOR)
    assert dbn_weight.isnan().nonzero().tolist() == [[3]] and dx[:, 3].isnan().all()


def test_more_splits_than_are_added_at_once(small_tiles):
    x = lay(rand(1, 16, 30, 20).add(0.5), "channels_last")
    _, _, weight, _, _, gamma, beta, *rest = arguments("3x3_stride2")
    var, mean = (t.float() for t in torch.var_mean(x.double(), (0, 2, 3), correction=0))
    beta = away_from_zero(x, mean, var, gamma, beta)
    assert backend.weight_tile(30 * 20).splits > 16
    grad = rand(1, 16, 30, 20, seed=4)
    check(grad, x, weight[:, :, 1:2, 1:2], mean, var, gamma, beta, EPS, True, [1, 1], [0, 0], [1, 1], 1, rest[-1])


def test_float16_sums_beyond_its_range():
    """Partials are float32: what cancels or is scaled behind them may lie outside float16."""
    grad, x, weight, mean, var, gamma, beta, *rest = arguments("1x1", torch.float16)
    grad = torch.full_like(grad, 500.0)
    _, dweight, _, dbn_bias = check(grad, x, weight, mean, var, gamma * 0.01, beta.abs() * 0.01 + 0.1, *rest)
    assert dweight.isfinite().all() and dbn_bias.abs().max() > 65504


def test_reasons():
    args = arguments("1x1")

    def declines(*args):
        return base.declines("bn_act_conv_bwd", *args)

    def changed(**new):
        names = ("grad", "x", "weight", *"mean var bn_weight bn_bias eps relu stride padding dilation groups".split())
        return [new.get(name, a) for name, a in zip(names, args, strict=False)] + [args[-1]]

    assert declines(*args) is None
    assert declines(*changed(x=args[1].double())) == "needs float16, bfloat16 or float32, got torch.float64"
    assert declines(*changed(weight=args[2].half())) == (
        "needs grad, x and weight of one dtype, got torch.float32, torch.float32 and torch.float16"
    )
    assert declines(*changed(x=args[1][:, :3], weight=args[2][:, :3])) == (
        "needs at least 16 input and output channels, got 3 and 16"
    )
    assert declines(*changed(x=args[1][:0], grad=args[0][:0])) == "needs a non-empty batch"
    huge = torch.empty(2**16, 1, 1, 1).expand(2**16, 33, 2**8, 2**8)
    assert declines(*changed(x=huge)) == f"needs at most {2**31 - 1024} positions, got {2**32}"


@pytest.mark.parametrize("itemsize", [2, 4])
def test_weight_tiles(itemsize):
    """Every row in one split, no split empty, partials of bounded size."""
    for m, k, c, taps in itertools.product((1, 49, 1568, 100352, 2**30), (16, 64, 2048), (33, 64, 512), (1, 9, 25)):
        for fma in (False, True):
            tile = backend.weight_tile(m, k, c, taps, itemsize, fma)
            blocks = tiles.ceil_div(m, tile.block_k)
            assert (tile.splits - 1) * tile.steps < blocks <= tile.splits * tile.steps
            assert tile.splits == 1 or 4 * tile.splits * k * c * taps <= 16 << 20
            assert tile.splits == 1 or tiles.ceil_div(k, tile.block_m) * taps * tile.splits <= 256
