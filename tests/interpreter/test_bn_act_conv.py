"""bn_act_conv and pointwise, which normalise what they convolve as they load it, against float64."""

from __future__ import annotations

import pytest
import torch

import fused_resnet
from fused_resnet.backends import reference, triton
from fused_resnet.backends import triton_train as backend
from fused_resnet.backends.layout import output_format
from fused_resnet.backends.verify import TOLERANCE as VERIFIED
from fused_resnet.backends.verify import difference
from fused_resnet.kernels import tiles

from . import common
from .common import CL, DTYPES, TOLERANCE, assert_close, bn_params, each_dtype, each_value, lay, rand

EPS = 1e-3

# name: N, C, H, W, K, R, S, stride, padding, dilation
CASES = {
    "3x3": (5, 16, 7, 9, 24, 3, 3, (1, 1), (1, 1), (1, 1)),
    "3x3_stride2": (1, 33, 7, 9, 40, 3, 3, (2, 2), (1, 1), (1, 1)),
    "3x3_dilation2": (1, 64, 7, 9, 16, 3, 3, (1, 1), (2, 2), (2, 2)),
    "3x3_unpadded": (1, 16, 7, 9, 16, 3, 3, (1, 1), (0, 0), (1, 1)),
    "3x3_two_channel_blocks": (1, 70, 7, 9, 16, 3, 3, (1, 1), (1, 1), (1, 1)),
    "3x3_few_channels": (5, 3, 7, 9, 5, 3, 3, (2, 2), (1, 1), (1, 1)),
    "asymmetric": (1, 18, 9, 7, 10, 3, 5, (2, 1), (1, 3), (1, 2)),
    "1x1": (5, 32, 7, 9, 64, 1, 1, (1, 1), (0, 0), (1, 1)),
    "1x1_odd": (1, 70, 7, 9, 5, 1, 1, (1, 1), (0, 0), (1, 1)),
    "1x1_stride2": (5, 33, 7, 9, 70, 1, 1, (2, 2), (0, 0), (1, 1)),
    "1x1_padded": (1, 5, 7, 9, 16, 1, 1, (1, 1), (1, 1), (1, 1)),
    "1x1_few_channels": (5, 3, 7, 9, 16, 1, 1, (1, 1), (0, 0), (1, 1)),
    "1x1_map": (5, 64, 1, 1, 33, 1, 1, (1, 1), (0, 0), (1, 1)),
    "7x7_few_channels": (1, 3, 17, 19, 5, 7, 7, (2, 2), (3, 3), (1, 1)),
}
SMALL = {"3x3", "3x3_stride2", "3x3_few_channels", "1x1", "1x1_stride2", "7x7_few_channels"}


def inputs(case, dtype, layout="channels_last"):
    """x, weight, BatchNorm's (mean, var, weight, bias), [stride, padding, dilation]."""
    n, c, h, w, k, r, s, *conv = CASES[case]
    x = lay(rand(n, c, h, w, dtype=dtype), layout)
    weight = rand(k, c, r, s, seed=1).div((c * r * s) ** 0.5).to(dtype)
    weight = weight.contiguous() if layout == "contiguous" else weight.contiguous(memory_format=CL)
    gamma, beta, mean, var = bn_params(c)
    return x, weight, (mean, var, gamma, beta), [*map(list, conv)]


def stored(t, dtype):
    """t: float64 in dtype, as the kernels round it here: Triton's interpreter truncates to bfloat16."""
    if dtype is torch.bfloat16:
        return (t.float().view(torch.int32) & -(2**16)).view(torch.float32).to(dtype)
    return t.to(dtype)


def activation(x, mean, var, gamma, beta, relu):
    """What the convolution reads, in float64 holding values of x's dtype."""
    if mean is None:
        return x.double()
    a = common.bn_act(x, mean, var, gamma, beta, EPS, None, relu)
    return a if x.dtype is torch.float32 else stored(a, x.dtype).double()


def convolved(x, weight, bn, relu, conv):
    return torch.nn.functional.conv2d(activation(x, *bn, relu), weight.double(), None, *conv)


def check(x, weight, bn, relu, conv, factor=1.0):
    """The convolution against float64; the statistics against those of what was stored."""
    y, mean, var = backend.bn_act_conv(x, weight, *bn, EPS, relu, *conv, 1, True)
    assert y.dtype is x.dtype and mean.dtype is var.dtype is torch.float32
    assert_close(y, convolved(x, weight, bn, relu, conv), factor=factor, name="y")
    want_var, want_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert_close(mean, want_mean, name="mean")
    assert_close(var, want_var, name="var")
    return y, mean, var


@pytest.fixture
def small_tiles(monkeypatch):
    """Small tiles, narrow bands: every row tile writes its partials, many are merged, several at a time."""
    chosen = tiles.bn_act_conv_tile

    def small(*args):
        return chosen(*args)._replace(block_m=32, block_n=16, block_k=16, group_m=2)

    monkeypatch.setattr(tiles, "bn_act_conv_tile", small)
    monkeypatch.setattr(tiles, "finish_tile", lambda splits, c: (4, min(4, tiles.power_of_2(c))))


@pytest.mark.parametrize("case, dtype", [*each_dtype(CASES, ("3x3_stride2", "1x1_odd", "7x7_few_channels"))])
def test_parity(case, dtype):
    # A float32 activation one place off is a value of 16 bits one place off where it lay half way between two.
    x, weight, bn, conv = inputs(case, dtype)
    if not case.startswith("7x7"):
        check(x, weight, bn, True, conv)
    check(x, weight, [None] * 4, True, conv)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("affine", ["none", "weight", "bias", "fp16_params"])
def test_variants_of_the_batch_norm(affine, relu):
    dtype = torch.float16 if affine == "fp16_params" else torch.float32
    x, weight, (mean, var, gamma, beta), conv = inputs("3x3_stride2", dtype)
    gamma, beta = {
        "none": (None, None),
        "weight": (gamma, None),
        "bias": (None, beta),
        "fp16_params": (gamma.half(), beta.half()),
    }[affine]
    check(x, weight, (mean, var, gamma, beta), relu, conv)


@pytest.mark.parametrize("case", ["3x3", "1x1", "1x1_stride2", "7x7_few_channels"])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "sliced_nchw"])
def test_layouts(case, layout):
    x, weight, bn, conv = inputs(case, torch.float32, layout)
    y, *_ = check(x, weight, bn, True, conv)
    assert y.stride() == torch.empty(y.shape, memory_format=output_format(x, weight)).stride()
    check(x[:1].expand(3, -1, -1, -1), weight, [None] * 4, False, conv)


def test_strided_parameters():
    """Every other element of a longer vector; a weight that is a slice."""
    x, weight, bn, conv = inputs("3x3", torch.float32)
    wide = torch.full((24, 20, 3, 4), float("nan"))
    wide[:, 2:18, :, 1:] = weight
    bn = [torch.stack([p, torch.full_like(p, float("nan"))], 1)[:, 0] for p in bn]
    check(x, wide[:, 2:18, :, 1:], bn, True, conv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", ["3x3", "3x3_stride2", "3x3_two_channel_blocks", "1x1_stride2", "7x7_few_channels"])
def test_several_tiles_each_way(case, dtype, small_tiles):
    x, weight, bn, conv = inputs(case, dtype)
    check(x, weight, [None] * 4 if case.startswith("7x7") else bn, True, conv)


@pytest.mark.parametrize("case", ["3x3", "3x3_stride2", "3x3_dilation2", "asymmetric", "1x1_padded"])
def test_padding_is_zero_behind_the_batch_norm(case):
    """A bias of 1e3 on channels of zeros: padding that went through the BatchNorm would be as large as the rest."""
    x, weight, (mean, var, gamma, beta), conv = inputs(case, torch.float32)
    check(torch.zeros_like(x), weight, (mean, var, gamma, beta + 1e3), True, conv)


def far_mean(k, c):
    """A weight whose convolution of ones in the first channel is 1e4, and of the rest of deviation one."""
    weight = rand(k, c, 1, 1, seed=1).div(c**0.5)
    weight[:, 0] = 1e4
    return weight.contiguous(memory_format=CL)


def test_statistics_survive_a_mean_far_above_the_deviation(small_tiles):
    """mean 1e4, deviation 1: the mean squared minus the squared mean would have no correct digit."""
    x = rand(5, 33, 7, 9)
    x[:, 0] = 1.0
    x = x.contiguous(memory_format=CL)
    y, mean, var = backend.bn_act_conv(x, far_mean(20, 33), *[None] * 4, EPS, False, [1, 1], [0, 0], [1, 1], 1, True)
    want_var, want_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert 0.3 < want_var.min() and want_var.max() < 3 and want_mean.min() > 9e3
    assert_close(mean, want_mean)
    # A tile's mean is a float32: good to 2^-24 of 1e4, against tile means about a quarter of a deviation apart.
    assert_close(var, want_var, factor=2 * 0.25 * 1e4 * 2.0**-24 / TOLERANCE[torch.float32])


def test_a_batch_norm_whose_mean_is_far_above_its_deviation():
    x, weight, (_, _, gamma, beta), conv = inputs("3x3", torch.float32)
    x = x + 1e4
    var, mean = (t.float() for t in torch.var_mean(x.double(), (0, 2, 3), correction=0))
    check(x, weight, (mean, var, gamma, beta), True, conv)


def test_statistics_of_a_constant(small_tiles):
    x = torch.full((2, 16, 5, 7), 0.5).contiguous(memory_format=CL)
    weight = torch.full((5, 16, 1, 1), 0.25).contiguous(memory_format=CL)
    y, mean, var = backend.bn_act_conv(x, weight, *[None] * 4, EPS, False, [1, 1], [0, 0], [1, 1], 1, True)
    assert torch.equal(y, torch.full_like(y, 2.0))
    assert torch.equal(mean, torch.full((5,), 2.0)) and torch.equal(var, torch.zeros(5))


@pytest.mark.parametrize("case, value, relu", [*each_value(["3x3", "1x1_stride2", "7x7_few_channels"])])
def test_not_finite_travels_as_in_torch(case, value, relu, small_tiles):
    """Through the BatchNorm, ReLU and convolution, into the statistics of the channels that it reached, no others."""
    x, weight, bn, conv = inputs(case, torch.float32)
    x[0, x.shape[1] // 2, 4, 4] = value
    weight[0] = 0.0  # 0 * inf is NaN
    bn = [None] * 4 if case.startswith("7x7") else bn
    got, mean, var = backend.bn_act_conv(x, weight, *bn, EPS, relu, *conv, 1, True)
    want = convolved(x, weight, bn, relu, conv)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite()
    assert_close(got[finite], want[finite])
    sound = finite.all(3).all(2).all(0)
    assert torch.equal(mean.isfinite(), sound) and torch.equal(var.isfinite(), sound)
    assert not (mean.isfinite() ^ var.isfinite()).any()


def test_a_channel_that_is_not_finite_spoils_no_padding():
    """Nothing but padding in the windows of the corners: zero, though BatchNorm would have made it NaN."""
    x, weight, (mean, var, gamma, beta), _ = inputs("3x3", torch.float32)
    mean = mean.index_fill(0, torch.tensor([3]), float("nan"))
    y, *_ = backend.bn_act_conv(x, weight, mean, var, gamma, beta, EPS, True, [1, 1], [3, 3], [1, 1], 1, True)
    assert torch.count_nonzero(y[:, :, 0, 0]) == 0
    assert y[:, :, 1:-1, 1:-1].isnan().all()


def test_what_is_declined():
    x, weight, bn, (stride, padding, dilation) = inputs("1x1", torch.float32)
    out = [rand(64), rand(64), EPS, None]

    def declined(x=x, weight=weight, stride=stride):
        return triton.declines("bn_act_conv", x, weight, *bn, EPS, True, stride, padding, dilation, 1, True)

    assert declined() is None
    assert "float64" in declined(x.double())
    assert "empty batch" in declined(x[:0])
    assert "empty output" in declined(weight=rand(64, 32, 9, 9))
    assert "needs 16 bits" in triton.declines("pointwise_bn_act", x, weight, *bn, EPS, True, *out, stride, True)
    narrow = (t.half() for t in (x, weight))
    assert triton.declines("pointwise_bn_act", *narrow, *bn, EPS, True, *out, stride, True) is None


@pytest.mark.parametrize("stats", [True, False], ids=["stats", "no-stats"])
@pytest.mark.parametrize("case", ["1x1", "3x3"])
def test_the_op(case, stats):
    """torch.ops.fused_resnet.bn_act_conv on this backend, twice: the second call takes what the first prepared."""
    x, weight, bn, conv = inputs(case, torch.float32)
    args = (x, weight, *bn, EPS, True, *conv, 1, stats)
    expected = reference.bn_act_conv(*args)
    with fused_resnet.backend("triton"):
        for _ in range(2):
            for got, want in zip(torch.ops.fused_resnet.bn_act_conv(*args), expected, strict=True):
                assert got.numel() == 0 if want is None else (assert_close(got, want, factor=4) is None)


@pytest.mark.parametrize("residual, out_relu", [(True, True), (False, False)], ids=["last", "projection"])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_pointwise_op(stride, residual, out_relu):
    x, weight, bn, _ = inputs("1x1", torch.float16)
    added = rand(x.shape[0], weight.shape[0], *(-(-size // stride) for size in x.shape[2:]), dtype=torch.float16)
    out = rand(weight.shape[0], seed=3).add(1), rand(weight.shape[0], seed=4), EPS, added if residual else None
    args = (x, weight, *bn, EPS, True, *out, [stride] * 2, out_relu)
    expected = reference.pointwise_bn_act(*args)
    with fused_resnet.backend("triton"):
        got = torch.ops.fused_resnet.pointwise_bn_act(*args)
    for v, e in zip(got, expected, strict=True):
        assert difference(v, e) < VERIFIED[torch.float16]


POINTWISE = [case for case in CASES if case.startswith("1x1") and case != "1x1_padded"]


def check_pointwise(case, dtype, normalises=True, residual=True, out_relu=True, layout="channels_last"):
    x, weight, bn, (stride, *conv) = inputs(case, dtype, layout)
    bn = bn if normalises else [None] * 4
    k = weight.shape[0]
    scale, shift = rand(k, seed=5).add(1), rand(k, seed=6)
    want = convolved(x, weight, bn, True, (stride, *conv))
    want = want * common.channels(scale.double()) + common.channels(shift.double())
    added = lay(rand(*want.shape, dtype=dtype, seed=7), layout) if residual else None
    want = want + added.double() if residual else want
    y = backend.pointwise(x, weight, *bn, EPS, True, scale, shift, added, stride, out_relu)
    assert y.dtype is dtype
    assert y.stride() == torch.empty(y.shape, memory_format=output_format(x, weight)).stride()
    assert_close(y, want.relu() if out_relu else want)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", POINTWISE)
def test_pointwise(case, dtype):
    check_pointwise(case, dtype)


@pytest.mark.parametrize("out_relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("normalises", [False, True], ids=["raw", "normalised"])
def test_pointwise_variants(normalises, residual, out_relu, small_tiles):
    check_pointwise("1x1_stride2", torch.float32, normalises, residual, out_relu)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "sliced_nchw"])
def test_pointwise_layouts(layout):
    check_pointwise("1x1", torch.float32, layout=layout)


def test_pointwise_of_few_raw_channels():
    check_pointwise("1x1_few_channels", torch.float16, normalises=False)


def test_a_second_run_has_the_same_bits(small_tiles):
    for case in ("3x3", "1x1_stride2"):
        x, weight, bn, conv = inputs(case, torch.float16)
        first, second = (backend.bn_act_conv(x, weight, *bn, EPS, True, *conv, 1, True) for _ in range(2))
        assert all(map(torch.equal, first, second))


def test_a_planted_error_is_found():
    """One per cent in one output channel fails the comparison that every test here relies on."""
    x, weight, bn, conv = inputs("3x3", torch.float16)
    y, *_ = backend.bn_act_conv(x, weight, *bn, EPS, True, *conv, 1, True)
    want = convolved(x, weight, bn, True, conv)
    assert_close(y, want)
    y[:, 5] *= 1.01
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(y, want)
