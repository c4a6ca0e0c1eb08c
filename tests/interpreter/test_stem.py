"""stem_pool: the fused stem against float64."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.engine import reference, triton_stem

from .common import CL, assert_close, double, each_dtype, rand

# N, H, W, K
CASES = {
    "odd": (1, 17, 19, 8),
    "one_more": (5, 18, 12, 24),
    "even": (3, 12, 16, 40),
    "pixel": (1, 8, 24, 8),
    "wide": (1, 7, 41, 3),
    "tiny": (5, 3, 2, 8),
    "one_pixel": (1, 1, 1, 8),
}
SMALL = {"block_m": 16, "block_n": 16, "block_k": 64, "rows": 2, "num_warps": 4, "num_stages": 2, "precision": "ieee"}


def tensors(case, dtype, x_dtype=None, layout="nchw", seed=0):
    n, h, w, k = CASES[case]
    x = rand(n, 3, h, w, dtype=x_dtype or dtype, seed=seed)
    if layout == "channels_last":
        x = x.contiguous(memory_format=CL)
    return x, rand(k, 3, 7, 7, seed=1).div(147**0.5).to(dtype), rand(k, seed=2).mul(0.3)


def run(config, x, weight, bias):
    """The launch, into an output that holds NaN."""
    p, q = triton_stem.sizes(*x.shape[2:])[2:]
    out = torch.full((x.shape[0], weight.shape[0], p, q), float("nan"), dtype=weight.dtype).contiguous(memory_format=CL)
    packed = triton_stem.pack(weight, triton_stem.layout_of(x), tf32=False)
    triton_stem.launch(config, x, packed, bias, out)
    return out


def expected(x, weight, bias):
    return reference.stem_pool(*double(x.to(weight.dtype), weight, bias))


@pytest.mark.parametrize("case, dtype", [*each_dtype(CASES, ("odd", "wide"))])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_parity(case, layout, dtype):
    args = tensors(case, dtype, layout=layout)
    assert_close(run(SMALL, *args), expected(*args))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("x_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_input_may_have_another_dtype(x_dtype, layout):
    args = tensors("odd", torch.float16, x_dtype, layout)
    assert_close(run(SMALL, *args), expected(*args))


@pytest.mark.parametrize("tf32", [True, False], ids=["tensor_cores", "fma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_config_offered(dtype, tf32):
    args = tensors("pixel", dtype)
    want = expected(*args)
    for sms in (1, 132):
        found = triton_stem.configs(args[0].shape, dtype, 80, sms, 8, tf32=tf32)
        assert found
        for config in found:
            assert_close(run(config, *args), want, name=config)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_not_finite_travels_as_in_torch(value, layout):
    """At every alignment of a pixel within its lines and windows."""
    for column in range(8, 12):
        x, weight, bias = tensors("pixel", torch.float32, layout=layout)
        x[0, 1, 5, column] = value
        got, want = run(SMALL, x, weight, bias), expected(x, weight, bias)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())
        finite = want.isfinite()
        assert finite.any() and not finite.all()
        assert_close(got[finite], want[finite])


def test_all_below_zero():
    """The pool's padding is no zero that wins: it is the ReLU that makes zeros."""
    x, weight, bias = tensors("odd", torch.float32)
    assert torch.count_nonzero(run(SMALL, x, weight, bias - 1e3)) == 0


def test_a_second_run_has_the_same_bits():
    args = tensors("one_more", torch.float16)
    assert torch.equal(run(SMALL, *args), run(SMALL, *args))


def test_layouts():
    x = torch.empty(2, 3, 8, 8)
    assert triton_stem.layout_of(x) == "nchw"
    assert triton_stem.layout_of(x.contiguous(memory_format=CL)) == "channels_last"
    assert triton_stem.layout_of(x[..., ::2]) is None


def test_declines_with_a_sentence():
    decline = triton_stem.declines
    assert decline((1, 3, 7, 9), torch.float16, 80) is None
    assert decline((1, 4, 7, 9), torch.float16, 80) == "needs 3 input channels, got 4"
    assert decline((1, 3, 7, 9), torch.float64, 80) == "needs float16, bfloat16 or float32, got torch.float64"
    assert decline((1, 3, 7, 9), torch.float16, 75) == "needs compute capability 8.0 or newer, got 7.5"
    assert "non-empty" in decline((0, 3, 7, 9), torch.float16, 80)
