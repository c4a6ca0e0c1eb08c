"""conv_bn_act forward: the implicit-GEMM kernel against float64."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.backends import triton as backend
from fused_resnet.backends.layout import output_format
from fused_resnet.kernels import tiles

from . import common
from .common import CL, assert_close, bn_params, each_dtype, each_value, lay, rand

EPS = 1e-3

# name: N, C, H, W, K, R, S, stride, padding, dilation, groups
CASES = {
    "stem_7x7": (1, 3, 17, 19, 5, 7, 7, (2, 2), (3, 3), (1, 1), 1),
    "stem_3x3_cifar": (5, 3, 7, 9, 16, 3, 3, (1, 1), (1, 1), (1, 1), 1),
    "one_channel": (1, 1, 7, 9, 3, 3, 3, (1, 1), (1, 1), (1, 1), 1),
    "3x3": (5, 16, 7, 9, 24, 3, 3, (1, 1), (1, 1), (1, 1), 1),
    "3x3_stride2": (1, 20, 7, 9, 33, 3, 3, (2, 2), (1, 1), (1, 1), 1),
    "3x3_dilation2": (1, 17, 7, 9, 16, 3, 3, (1, 1), (2, 2), (2, 2), 1),
    "3x3_unpadded": (1, 16, 7, 9, 16, 3, 3, (1, 1), (0, 0), (1, 1), 1),
    "3x3_two_channel_blocks": (1, 72, 5, 3, 16, 3, 3, (1, 1), (1, 1), (1, 1), 1),
    "asymmetric": (1, 18, 9, 7, 10, 3, 5, (2, 1), (1, 3), (1, 2), 1),
    "1x1": (5, 32, 7, 9, 40, 1, 1, (1, 1), (0, 0), (1, 1), 1),
    "1x1_odd": (1, 35, 7, 9, 7, 1, 1, (1, 1), (0, 0), (1, 1), 1),
    "1x1_stride2": (5, 32, 7, 9, 40, 1, 1, (2, 2), (0, 0), (1, 1), 1),
    "1x1_padded": (1, 16, 7, 9, 16, 1, 1, (1, 1), (1, 1), (1, 1), 1),
    "1x1_map": (5, 16, 1, 1, 24, 1, 1, (1, 1), (0, 0), (1, 1), 1),
    "resnext_4": (1, 64, 7, 9, 64, 3, 3, (1, 1), (1, 1), (1, 1), 16),
    "resnext_8_stride2": (5, 32, 7, 9, 32, 3, 3, (2, 2), (1, 1), (1, 1), 4),
    "resnext_32": (1, 64, 5, 7, 64, 3, 3, (1, 1), (1, 1), (1, 1), 2),
    "groups_odd": (1, 35, 7, 9, 49, 3, 3, (1, 1), (1, 1), (1, 1), 7),
    "groups_few_in": (1, 6, 7, 9, 70, 3, 3, (1, 1), (1, 1), (1, 1), 2),
    "groups_1x1": (1, 32, 7, 9, 32, 1, 1, (1, 1), (0, 0), (1, 1), 8),
    "depthwise": (5, 6, 7, 9, 6, 3, 3, (2, 2), (1, 1), (1, 1), 6),
    "depthwise_wide": (1, 37, 5, 7, 37, 3, 3, (1, 1), (2, 2), (2, 2), 37),
    "depthwise_multiplier": (1, 6, 7, 9, 18, 3, 3, (1, 1), (1, 1), (1, 1), 6),
}
FEW = ("stem_7x7", "3x3_stride2", "1x1_odd", "resnext_8_stride2", "groups_odd", "depthwise")


def inputs(case, dtype, seed=0, layout="channels_last"):
    n, c, h, w, k, r, s, *conv, groups = CASES[case]
    x = lay(rand(n, c, h, w, dtype=dtype, seed=seed), layout)
    weight = rand(k, c // groups, r, s, seed=seed + 1).div((c // groups * r * s) ** 0.5).to(dtype)
    weight = weight.contiguous() if layout == "contiguous" else weight.contiguous(memory_format=CL)
    return x, weight, [*map(list, conv), groups]


def residual_of(case, dtype, layout="channels_last"):
    x, weight, conv = inputs(case, dtype)
    shape = torch.nn.functional.conv2d(x.float(), weight.float(), None, *conv).shape
    return lay(rand(*shape, dtype=dtype, seed=7), layout)


def check(x, weight, bn, residual, conv, relu):
    got = backend.conv_bn_act(x, weight, *bn, EPS, residual, *conv, relu)
    assert got.dtype == x.dtype
    assert_close(got, common.conv_bn_act(x, weight, *bn, EPS, residual, *conv, relu))
    return got


@pytest.mark.parametrize("case, dtype", [*each_dtype(CASES, FEW)])
def test_parity(case, dtype):
    x, weight, conv = inputs(case, dtype)
    check(x, weight, bn_params(weight.shape[0]), residual_of(case, dtype), conv, True)


@pytest.mark.parametrize("case", ["stem_7x7", "3x3_stride2", "1x1_odd", "resnext_8_stride2"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("bn", ["none", "no_affine", "no_bias", "fp16_params"])
def test_epilogue(case, bn, relu):
    dtype = torch.float16 if bn == "fp16_params" else torch.float32
    x, weight, conv = inputs(case, dtype)
    gamma, beta, mean, var = bn_params(weight.shape[0], dtype)
    params = {"none": [None] * 4, "no_affine": [None, None, mean, var], "no_bias": [gamma, None, mean, var]}
    check(x, weight, params.get(bn, [gamma, beta, mean, var]), None, conv, relu)


@pytest.mark.parametrize("case", ["stem_7x7", "3x3", "1x1", "1x1_stride2", "resnext_4", "depthwise"])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "sliced_nchw"])
def test_layouts(case, layout):
    x, weight, conv = inputs(case, torch.float32, layout=layout)
    residual = residual_of(case, torch.float32, layout)
    y = check(x, weight, bn_params(weight.shape[0]), residual, conv, True)
    assert y.stride() == torch.empty(y.shape, memory_format=output_format(x, weight)).stride()
    expanded = x[:1].expand(3, -1, -1, -1)
    check(expanded, weight, [None] * 4, None, conv, False)


def test_strided_parameters():
    """Every other element of a longer vector; a weight that is a slice."""
    x, weight, conv = inputs("3x3", torch.float32)
    wide = torch.full((24, 20, 3, 4), float("nan"))
    wide[:, 2:18, :, 1:] = weight
    params = [torch.stack([p, torch.full_like(p, float("nan"))], 1)[:, 0] for p in bn_params(24)]
    check(x, wide[:, 2:18, :, 1:], params, None, conv, True)


@pytest.mark.parametrize("block", [(64, 16, 16), (64, 32, 16), (128, 16, 32)], ids=str)
@pytest.mark.parametrize("case", ["3x3", "1x1", "resnext_32", "stem_3x3_cifar"])
def test_several_tiles_each_way(case, block, monkeypatch):
    """Small tiles, narrow bands: the program order visits every tile, those of the last band and column included."""
    chosen = tiles.conv_tile

    def small(*args):
        tile = chosen(*args)
        return tile._replace(block_m=block[0], block_n=block[1], block_k=block[2], group_m=2)

    monkeypatch.setattr(tiles, "conv_tile", small)
    x, weight, conv = inputs(case, torch.float32)
    check(x, weight, bn_params(weight.shape[0]), residual_of(case, torch.float32), conv, True)


@pytest.mark.parametrize(
    "case, value, relu", [*each_value(["3x3", "1x1", "stem_7x7", "resnext_4", "depthwise", "groups_odd"])]
)
def test_not_finite_travels_as_in_torch(case, value, relu):
    """NaN, inf and finite are where they are in PyTorch: groups that share a tile do not contaminate each other."""
    x, weight, conv = inputs(case, torch.float32)
    x[0, x.shape[1] // 2, 3, 4] = value
    bn = bn_params(weight.shape[0])
    got = backend.conv_bn_act(x, weight, *bn, EPS, None, *conv, relu)
    want = common.conv_bn_act(x, weight, *bn, EPS, None, *conv, relu)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite()
    assert finite.any() and (relu or not finite.all())
    assert_close(got[finite], want[finite])


def test_bn_weight_zero():
    x, weight, conv = inputs("3x3", torch.float32)
    _, beta, mean, var = bn_params(24)
    check(x, weight, [torch.zeros(24), beta, mean, var], residual_of("3x3", torch.float32), conv, True)


def test_a_second_run_has_the_same_bits():
    for case in ("3x3", "resnext_4", "stem_7x7"):
        x, weight, conv = inputs(case, torch.float16)
        bn = bn_params(weight.shape[0])
        first, second = (backend.conv_bn_act(x, weight, *bn, EPS, None, *conv, True) for _ in range(2))
        assert torch.equal(first, second)


def test_a_planted_error_is_found():
    """One per cent in one output channel fails the comparison that every test here relies on."""
    x, weight, conv = inputs("3x3", torch.float16)
    bn = bn_params(24)
    y = backend.conv_bn_act(x, weight, *bn, EPS, None, *conv, False)
    want = common.conv_bn_act(x, weight, *bn, EPS, None, *conv, False)
    assert_close(y, want)
    y[:, 5] *= 1.01
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(y, want)
