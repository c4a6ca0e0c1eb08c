"""Inputs, layouts and the float64 formulas that the kernels are held against."""

from __future__ import annotations

import itertools

import pytest
import torch

CL = torch.channels_last

# Relative 2-norm of the error. What the inputs are is exact and sums are float32, so what is left is the rounding of a
# float32 sum, or the one rounding at the store: 2^-11 in fp16, 2^-7 in bf16, where the interpreter truncates.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def each_dtype(cases, few, whole=("fp32",)):
    """(case, dtype) for parametrize: every case in the dtypes of `whole`, a few in the others, which differ in what is
    loaded and stored alone; the rest goes with the slow tests."""
    for case, dtype in itertools.product(cases, DTYPES):
        marks = [] if dtype in whole or case in few else pytest.mark.slow
        yield pytest.param(case, DTYPES[dtype], id=f"{case}-{dtype}", marks=marks)


def each_value(cases):
    """(case, value, relu): all that is not finite, with a ReLU and without, for the first case; a NaN before a ReLU and
    an infinity without one for the others, whose rest goes with the slow tests."""
    nan, inf = float("nan"), float("inf")
    for case, value, relu in itertools.product(cases, (nan, inf, -inf), (False, True)):
        default = case == cases[0] or (value, relu) in ((nan, True), (inf, False))
        name = f"{case}-{value}-{'relu' if relu else 'linear'}"
        yield pytest.param(case, value, relu, id=name, marks=[] if default else pytest.mark.slow)


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lay(t, layout):
    """t with the same values in another memory layout."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=CL)
    n, c, h, w = t.shape
    if layout == "sliced":  # every other column of a wider channels_last tensor with more channels
        wide = torch.full((n, c + 3, h, 2 * w), float("nan"), dtype=t.dtype).contiguous(memory_format=CL)
        out = wide[:, 2 : c + 2, :, ::2]
    elif layout == "sliced_nchw":
        out = torch.full((n, c, h, w + 3), float("nan"), dtype=t.dtype)[..., 1 : w + 1]
    else:
        raise ValueError(layout)
    return out.copy_(t)


def error(got, want):
    """|got - want| / |want| in the 2-norm."""
    want = want.double()
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def assert_close(got, want, dtype=None, factor=1.0, name=""):
    assert got.shape == want.shape, (name, got.shape, want.shape)
    e = error(got, want)
    limit = factor * TOLERANCE[dtype or got.dtype]
    assert e <= limit, f"{name}: relative error {e:.2e} > {limit:.2e}"


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def channels(v):
    return v.view(1, -1, 1, 1)


def bn_params(c, dtype=torch.float32, seed=10):
    """bn_weight, bn_bias, running_mean, running_var: [C]."""
    return (
        rand(c, seed=seed).add(1).to(dtype),
        rand(c, seed=seed + 1, dtype=dtype),
        rand(c, seed=seed + 2).mul(0.3).to(dtype),
        rand(c, seed=seed + 3).square().add(0.5).to(dtype),
    )


def conv_bn_act(x, weight, bn_weight, bn_bias, mean, var, eps, residual, stride, padding, dilation, groups, relu):
    """The op in float64."""
    x, weight, bn_weight, bn_bias, mean, var, residual = double(x, weight, bn_weight, bn_bias, mean, var, residual)
    y = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)
    if mean is not None:
        y = (y - channels(mean)) / channels((var + eps).sqrt())
        if bn_weight is not None:
            y = y * channels(bn_weight)
        if bn_bias is not None:
            y = y + channels(bn_bias)
    if residual is not None:
        y = y + residual
    return y.relu() if relu else y


def bn_act(x, mean, var, bn_weight, bn_bias, eps, residual, relu):
    """The op in float64, mean and var as given."""
    x, mean, var, bn_weight, bn_bias, residual = double(x, mean, var, bn_weight, bn_bias, residual)
    y = (x - channels(mean)) / channels((var + eps).sqrt())
    if bn_weight is not None:
        y = y * channels(bn_weight)
    if bn_bias is not None:
        y = y + channels(bn_bias)
    if residual is not None:
        y = y + residual
    return y.relu() if relu else y
