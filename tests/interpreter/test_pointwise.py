"""The pointwise convolution between batch norms: its small kernels, and the backward, against float64."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.backends import composed, reference
from fused_resnet.backends import triton_pointwise as backend

from .common import CL, assert_close, rand

EPS = 1e-3
# name: (N, C, H, W, K, stride, normalised)
SHAPES = {
    "expand": (2, 16, 5, 7, 64, 1, True),
    "72-channels": (3, 72, 4, 5, 144, 1, True),
    "projection": (2, 24, 7, 6, 48, 2, False),
    "one-channel": (4, 1, 3, 3, 4, 1, True),
}
NAMES = ("dx", "dweight", "dbn_weight", "dbn_bias", "dout_weight", "dout_bias", "dresidual")


def given(shape, dtype):
    n, c, h, w, k, stride, normalised = SHAPES[shape]
    x = rand(n, c, h, w, dtype=dtype).add(0.3).contiguous(memory_format=CL)
    weight = (rand(k, c, 1, 1, seed=2) / c**0.5).to(dtype).contiguous(memory_format=CL)
    loaded = (None, None, None, None)
    if normalised:
        loaded = (*reference.bn_stats(x), rand(c, seed=3).abs() + 0.5, rand(c, seed=4))
    out = rand(k, seed=5).abs() + 0.5, rand(k, seed=6)
    p, q = (-(-size // stride) for size in (h, w))
    grad = rand(n, k, p, q, dtype=dtype, seed=7).contiguous(memory_format=CL)
    residual = rand(n, k, p, q, dtype=dtype, seed=8).contiguous(memory_format=CL) if normalised else None
    before = (x, weight, *loaded, EPS, True)
    forward = reference.pointwise_bn_act(*before, *out, EPS, residual, [stride] * 2, normalised)
    return grad, forward, before, out, [stride] * 2, normalised


def wide(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(shape, dtype):
    _, (_, _, _, a_mean, a_cov), before, (out_weight, out_bias), *_ = given(shape, dtype)
    weight = before[1]
    mean, var, scale, shift = backend.product_statistics(weight, a_mean, a_cov, out_weight, out_bias, EPS)
    wanted_mean, wanted_var = composed.statistics_of_product(*wide((weight, a_mean, a_cov)))
    wanted_scale = out_weight / (wanted_var + EPS).sqrt()
    for got, want in ((mean, wanted_mean), (var, wanted_var), (scale, wanted_scale)):
        assert_close(got, want, torch.float32, factor=4)
    assert_close(shift, out_bias - wanted_mean * wanted_scale, torch.float32, factor=4)
    plain = backend.product_statistics(weight, a_mean, a_cov, None, None, EPS)
    assert_close(plain[2], (wanted_var + EPS).rsqrt(), torch.float32, factor=4)


def test_statistics_that_cancel():
    """Channels that hardly differ, and a weight that takes their differences: float32's digits, not TF32's."""
    a_cov = torch.full((64, 64), 1.0) + torch.diag(torch.linspace(1e-4, 2e-4, 64))
    weight = (torch.arange(64) % 2 * 2.0 - 1).half().repeat(16, 1).view(16, 64, 1, 1)
    _, var, *_ = backend.product_statistics(weight, torch.zeros(64), a_cov, None, None, EPS)
    wanted = torch.einsum("kc,cd,kd->k", *wide((weight.flatten(1), a_cov, weight.flatten(1))))
    torch.testing.assert_close(var.double(), wanted, rtol=5e-3, atol=0)


def call(shape, dtype, mask=(True,) * 7):
    grad, (y, y_mean, y_var, a_mean, a_cov), before, (out_weight, _), stride, out_relu = given(shape, dtype)
    args = (grad, y if out_relu else None, *before, out_weight, y_mean, y_var, EPS, a_mean, a_cov, stride, out_relu)
    return args, list(mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, dtype):
    args, mask = call(shape, dtype)
    found = backend.pointwise_bn_act_bwd(*args, mask)
    expected = reference.pointwise_bn_act_bwd(*wide(args), mask)
    for name, got, want in zip(NAMES, found, expected, strict=True):
        assert (got is None) == (want is None), name
        # The gradient before the batch norm inside is rounded to 16 bits on the way.
        # Of one channel a weight's size does not matter to the batch norm, so its gradient vanishes.
        if want is not None and (shape, name) != ("one-channel", "dweight"):
            assert_close(got, want, dtype, factor=4, name=name)


@pytest.mark.parametrize("wanted", range(7), ids=NAMES)
def test_a_part(wanted):
    args, whole_mask = call("expand", torch.float16)
    whole = backend.pointwise_bn_act_bwd(*args, whole_mask)
    part = backend.pointwise_bn_act_bwd(*args, [i == wanted for i in range(7)])
    for i, (got, all_of_it) in enumerate(zip(part, whole, strict=True)):
        assert torch.equal(got, all_of_it) if i == wanted else got is None, NAMES[i]
