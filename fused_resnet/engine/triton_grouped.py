"""Host side of the grouped conv_bias_act in Triton: how groups are bundled, which configurations are worth trying, and
the launch. A config is as in triton_conv, with `bundle`: the groups that are one product."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels import tiles
from . import triton_conv
from .triton_conv import Conv, Pair

try:
    from ..kernels import conv_bias_act_grouped as _grouped
except ImportError:  # no Triton: backends.triton.unavailable says so, and nothing here is launched
    pass

_WIDTHS = (32, 64)  # channels that a bundle of small groups is filled up to
_ROWS = ((128, 4), (64, 4))  # positions of a tile, warps


def declines(shape: Conv, groups: int, dtype: torch.dtype, arch: int) -> str | None:
    """Why the kernel cannot run this, as the rest of a sentence; None where it can."""
    if shape.c % groups or shape.k % groups:
        return f"needs groups that divide the channels, got {groups} of {shape.c} and {shape.k}"
    if shape.segment:
        return "takes no second segment"
    return triton_conv.declines(shape, dtype, arch)


def bundles(shape: Conv, groups: int) -> list[tiles.Bundle]:
    """How many groups to take at a time, each number once."""
    found = (tiles.bundle(groups, shape.c // groups, shape.k // groups, width) for width in _WIDTHS)
    return sorted(set(found))


def configs(shape: Conv, groups: int, dtype: torch.dtype, arch: int, sms: int, *, tf32: bool = True) -> list[dict]:
    """What is worth trying. tf32: float32 may run on the tensor cores; where it may not, a bundle's zeros would cost
    several times the convolution."""
    if declines(shape, groups, dtype, arch) or (dtype is torch.float32 and not tf32):
        return []
    found = []
    for bundle, c, k in bundles(shape, groups):
        block_n = max(16, min(128, tiles.power_of_2(k)))
        block_k = max(16, min(128 // dtype.itemsize, tiles.power_of_2(c)))
        for block_m, warps in _ROWS:
            if block_m * 2 > _ROWS[0][0] and tiles.ceil_div(shape.m, block_m) * (shape.k // k) < sms:
                continue  # smaller ones leave fewer multiprocessors without work
            if block_m * block_n > 128 * 32 and bundle > 1 and dtype is torch.float32:
                continue  # its sums spill
            warps = 8 if block_m * block_n > 128 * 64 else warps
            # One stage: nothing is copied ahead, and a tile's taps find each other's rows in the first-level cache.
            for stages in (3,) if c > _WIDTHS[-1] else (1, 3):
                config = {
                    "kernel": "grouped",
                    "bundle": bundle,
                    "block_m": block_m,
                    "block_n": block_n,
                    "block_k": block_k,
                    "num_warps": warps,
                    "num_stages": stages,
                    "splits": 1,
                    "precision": "tf32",
                }
                if config not in found:
                    found.append(config)
    return found


def pack(weight: Tensor, bundle: int, groups: int, *, tf32: bool = True) -> Tensor:
    """weight: [K, C / groups, R, S] -> [K, bundle * C / groups, R, S], channels_last: each output's own group stands
    where it is in the bundle, zeros elsewhere. float32 is rounded to TF32 where that is used."""
    k, c, r, s = weight.shape
    wide = weight.new_zeros(groups // bundle, bundle, k // groups, bundle, c, r, s)
    parts = weight.reshape(groups // bundle, bundle, k // groups, c, r, s)
    for i in range(bundle):
        wide[:, i, :, i] = parts[:, i]
    return triton_conv.pack(wide.view(k, bundle * c, r, s), tf32=tf32)


def launch(
    config: dict,
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, bundle * C / groups, R, S], packed
    bias: Tensor,  # [K] float32
    residual: Tensor | None,  # [N, K, P, Q]
    out: Tensor,  # [N, K, P, Q]
    *,
    groups: int,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    relu: bool = True,
) -> None:
    """out = act(conv(x, weight, groups) + bias + residual) on the current stream of the current device. Activations are
    dense channels_last. Allocates nothing."""
    shape = triton_conv.shape_of(x, weight, residual, None, stride, padding, dilation)
    bundle_c, bundle_k = (channels // groups * config["bundle"] for channels in (shape.c, shape.k))
    block_m, block_n = config["block_m"], config["block_n"]
    tiles_n = shape.k // bundle_k * tiles.ceil_div(bundle_k, block_n)
    _grouped._conv_bias_act_grouped_kernel[(tiles.ceil_div(shape.m, block_m) * tiles_n,)](
        x,
        weight,
        bias,
        residual,
        out,
        shape.m,
        shape.p,
        shape.q,
        shape.h,
        shape.w,
        shape.k,
        shape.c,
        *shape.stride,
        *shape.padding,
        *shape.dilation,
        R=shape.r,
        S=shape.s,
        PADDED=any(shape.padding),
        BUNDLE=config["bundle"],
        BUNDLE_C=bundle_c,
        BUNDLE_K=bundle_k,
        ALIGN_C=math.gcd(shape.c, 16),
        ALIGN_K=math.gcd(shape.k, 16),
        RELU=relu,
        INPUT_PRECISION=config["precision"],
        ROUND_TF32=triton_conv._rounds(config, x),
        UPCAST=triton_conv._upcasts(x),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=config["block_k"],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
