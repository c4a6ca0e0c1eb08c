"""conv_bias_act: both kernels, every tile offered, against float64."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.engine import reference, triton_conv
from fused_resnet.engine.triton_conv import Conv

from .common import CL, assert_close, double, each_dtype, each_value, rand

SMS = 64

CASES = {
    "3x3": Conv(5, 24, 7, 9, 40, 3, 3, padding=(1, 1)),
    "3x3_residual": Conv(1, 40, 7, 9, 24, 3, 3, padding=(1, 1), residual=True),
    "3x3_stride2": Conv(5, 8, 7, 9, 24, 3, 3, (2, 2), (1, 1)),
    "3x3_stride2_even": Conv(5, 16, 6, 10, 24, 3, 3, (2, 2), (1, 1)),
    "3x3_dilation2": Conv(1, 16, 7, 9, 8, 3, 3, (1, 1), (2, 2), (2, 2)),
    "3x3_dilation2_stride2": Conv(1, 32, 8, 10, 8, 3, 3, (2, 2), (2, 2), (2, 2)),
    "3x3_unpadded": Conv(5, 16, 7, 9, 17, 3, 3),
    "3x3_three_channels": Conv(1, 3, 7, 9, 24, 3, 3, (1, 1), (1, 1)),
    "3x3_two_channel_blocks": Conv(1, 72, 5, 3, 16, 3, 3, padding=(1, 1)),
    "asymmetric": Conv(1, 18, 9, 7, 10, 3, 5, (2, 1), (1, 3), (1, 2)),
    "3x3_segment": Conv(5, 32, 7, 9, 24, 3, 3, padding=(1, 1), segment=(16, 13, 17, 2)),
    "3x3_segment_odd": Conv(1, 40, 7, 9, 24, 3, 3, padding=(1, 1), segment=(3, 14, 18, 2)),
    "1x1": Conv(5, 24, 7, 9, 40, 1, 1),
    "1x1_residual": Conv(1, 40, 7, 9, 136, 1, 1, residual=True),
    "1x1_three_channels": Conv(5, 3, 7, 9, 8, 1, 1),
    "1x1_stride2": Conv(5, 24, 7, 9, 40, 1, 1, (2, 2)),
    "1x1_stride2_even": Conv(5, 32, 8, 6, 40, 1, 1, (2, 2)),
    "1x1_padded": Conv(1, 16, 7, 9, 16, 1, 1, (1, 1), (1, 1)),
    "1x1_segment": Conv(5, 16, 7, 9, 40, 1, 1, segment=(24, 7, 9, 1)),
    "1x1_segment_stride2": Conv(5, 16, 7, 9, 40, 1, 1, segment=(24, 13, 18, 2)),
    "1x1_map": Conv(5, 16, 1, 1, 24, 1, 1),
}


def tensors(shape, dtype, seed=0):
    """x, weight, bias, residual, segment; the weights scaled so that outputs are about one."""
    x = rand(shape.n, shape.c, shape.h, shape.w, dtype=dtype, seed=seed).contiguous(memory_format=CL)
    weight = rand(shape.k, shape.c, shape.r, shape.s, seed=1).div((shape.c * shape.r * shape.s) ** 0.5).to(dtype)
    residual = segment = None
    if shape.residual:
        residual = rand(shape.n, shape.k, shape.p, shape.q, dtype=dtype, seed=2).contiguous(memory_format=CL)
    if shape.segment:
        c2, h2, w2, stride2 = shape.segment
        x2 = rand(shape.n, c2, h2, w2, dtype=dtype, seed=3).contiguous(memory_format=CL)
        segment = x2, rand(shape.k, c2, 1, 1, seed=4).div(c2**0.5).to(dtype), stride2
    return x, weight, rand(shape.k, seed=5), residual, segment


def run(config, shape, x, weight, bias, residual, segment, relu=True):
    """The launch, into an output and a workspace that hold NaN."""
    nan = float("nan")
    out = torch.full((shape.n, shape.k, shape.p, shape.q), nan, dtype=x.dtype).contiguous(memory_format=CL)
    size = triton_conv.workspace(config, shape)
    space = torch.full((size // 4,), nan) if size else None
    if segment is not None:
        segment = segment[0], triton_conv.pack(segment[1], tf32=False), segment[2]
    weight = triton_conv.pack(weight, tf32=False)
    conv = {"stride": shape.stride, "padding": shape.padding, "dilation": shape.dilation, "relu": relu}
    triton_conv.launch(config, x, weight, bias, residual, segment, out, space, **conv)
    return out


def expected(shape, x, weight, bias, residual, segment, relu=True):
    if segment is not None:
        segment = (*double(*segment[:2]), segment[2])
    conv = shape.stride, shape.padding, shape.dilation
    return reference.conv_bias_act(*double(x, weight, bias, residual), *conv, relu, segment)


def offered(shape, dtype, arch=90):
    """One config of each kind: plain, the most splits, tensor memory accelerator."""
    kinds = {}
    for config in triton_conv.configs(shape, dtype, arch, SMS):
        kinds.setdefault((config["kernel"], config["splits"] > 1), config)
    return kinds.values()


FEW = ("3x3_residual", "3x3_segment", "1x1_stride2_even", "1x1_segment")


@pytest.mark.parametrize("case, dtype", [*each_dtype(CASES, FEW, whole=("fp32", "fp16"))])
def test_parity(case, dtype):
    shape = CASES[case]
    args = tensors(shape, dtype)
    want = expected(shape, *args)
    for config in offered(shape, dtype):
        assert_close(run(config, shape, *args), want, name=config)


def test_every_kernel_takes_part():
    """A residual, a segment, stride 2 and dilation have run through the accelerator's kernel and in splits."""
    for case in ("3x3_residual", "3x3_segment", "3x3_stride2_even", "3x3_dilation2_stride2", "1x1_segment_stride2"):
        shape = CASES[case]
        kernels = {c["kernel"] for c in offered(shape, torch.float16)}
        taps = shape.r * shape.s > 1
        assert kernels == {"pointers"} if taps and shape.c % 16 else {"pointers", "tma"}, case
    assert any(c["splits"] > 1 for c in offered(CASES["3x3_segment"], torch.float16))


@pytest.mark.parametrize("case", ["3x3_segment", "1x1", "1x1_segment", "3x3_stride2_even"])
def test_every_config_offered(case):
    shape = CASES[case]
    args = tensors(shape, torch.float16)
    want = expected(shape, *args)
    for arch in (80, 100):
        for config in triton_conv.configs(shape, torch.float16, arch, 132):
            assert_close(run(config, shape, *args), want, name=config)


@pytest.mark.parametrize("case", ["3x3", "3x3_stride2_even", "1x1", "1x1_segment"])
def test_several_tiles_each_way(case):
    """Small tiles, narrow bands, two persistent programs: every tile is visited once."""
    shape = CASES[case]._replace(n=3)
    args = tensors(shape, torch.float32)
    want = expected(shape, *args)
    for config in offered(shape, torch.float32):
        small = config | {"block_m": 32, "block_n": 16, "block_k": 16, "group_m": 2}
        if "box" in config:
            flat = triton_conv._flat(shape)
            for box in [[1, 1, 32]] if flat else [[2, 4, 4], [1, 2, 16], [4, 8, 1]]:
                assert_close(run(small | {"box": box, "programs": 2}, shape, *args), want, name=box)
        else:
            assert_close(run(small, shape, *args), want, name=small)


@pytest.mark.parametrize("case, value, relu", [*each_value(["3x3_residual", "3x3_segment", "1x1", "1x1_residual"])])
def test_not_finite_travels_as_in_torch(case, value, relu):
    shape = CASES[case]
    x, weight, bias, residual, segment = tensors(shape, torch.float32)
    x[0, shape.c // 2, 3, 4] = value
    if residual is not None:
        residual[0, 3, 0, 0] = value
    if segment is not None:
        segment[0][0, 2, 0, 2] = value
    args = x, weight, bias, residual, segment
    want = expected(shape, *args, relu)
    finite = want.isfinite()
    assert finite.any() and (relu or not finite.all())
    for config in offered(shape, torch.float32):
        got = run(config, shape, *args, relu)
        assert torch.equal(got.isnan(), want.isnan()), config
        assert torch.equal(got.isinf(), want.isinf()), config
        assert_close(got[finite], want[finite], name=config)


def test_a_second_run_has_the_same_bits():
    shape = CASES["3x3_segment"]
    args = tensors(shape, torch.float16)
    for config in triton_conv.configs(shape, torch.float16, 90, 132):
        assert torch.equal(run(config, shape, *args), run(config, shape, *args))


def test_a_planted_error_is_found():
    """A step of the reduction that no split takes, and a padding of one too few."""
    shape = CASES["3x3"]
    args = tensors(shape, torch.float32)
    want = expected(shape, *args)
    config = next(c for c in offered(shape, torch.float32) if c["splits"] > 1)
    weight = args[1].clone()
    weight[7, 3] = 0
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(run(config, shape, args[0], weight, *args[2:]), want)


def test_declines_with_a_sentence():
    shape = CASES["3x3"]
    decline = triton_conv.declines
    assert decline(shape, torch.float16, 80) is None
    assert decline(shape, torch.float64, 80) == "needs float16, bfloat16 or float32, got torch.float64"
    assert decline(shape, torch.float16, 75) == "needs compute capability 8.0 or newer, got 7.5"
    assert "non-empty output, got -1x" in decline(shape._replace(h=1, padding=(0, 0)), torch.float16, 80)
    assert "4x5" in decline(shape._replace(segment=(8, 7, 9, 2)), torch.float16, 80)
    assert "got both" in decline(shape._replace(residual=True, segment=(8, 7, 9, 1)), torch.float16, 80)
    assert "sm_80" in triton_conv.declines_tma(shape, torch.float16, 80)
    assert "C = 3" in triton_conv.declines_tma(CASES["1x1_three_channels"], torch.float16, 90)
    assert "even map" in triton_conv.declines_tma(CASES["1x1_stride2"], torch.float16, 90)
    assert not triton_conv.configs(shape, torch.float64, 90, 132)


def test_weights_are_rounded_to_tf32():
    """To nearest, ties away from zero; what is not finite stays."""
    ulp = 2.0**-10
    v = torch.tensor([1 + ulp / 2, 1 + ulp / 2 - 2**-23, -1 - ulp / 2, 1 + 1.5 * ulp, float("inf"), float("nan")])
    got = triton_conv.pack(v.view(-1, 1, 1, 1)).flatten()
    assert got[:5].tolist() == [1 + ulp, 1.0, -1 - ulp, 1 + 2 * ulp, float("inf")] and got[5].isnan()
    assert torch.equal(triton_conv.pack(v[:4].view(-1, 1, 1, 1), tf32=False).flatten(), v[:4])
