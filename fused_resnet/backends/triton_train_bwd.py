"""Host side of the Triton kernels for the backward of a convolution that normalises while it loads.

Forward: y = conv(a, weight), a = relu((x - mean) * (bn_weight * rsqrt(var + eps)) + bn_bias), mean and var those of x.
Neither a nor its gradient is ever in memory whole: what is, is x, the gradient of bn(x), and sums of it.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import tiles
from . import triton as _base
from .layout import output_format, with_strides_of
from .triton import (
    _channels_last,
    _device_of,
    _dispatch,
    _finish,
    _floats,
    _launch_bwd_input,
    _Output,
    _per_channel,
    _result,
    _rows,
    interpreting,
    tf32_allowed,
)
from .triton_groups import FEWEST, bundle_constants, bundle_of, bundled, declines_groups

try:
    from ..kernels import bn_act_conv_bwd as _conv_bwd
except ImportError:  # backends/triton.py says so
    pass

_PROGRAMS = 256  # of the weight gradient: two for each multiprocessor of a large chip
_PARTIAL_BYTES = 16 << 20  # of the weight gradient, at most, unless the rows are not split at all


class Tile(NamedTuple):
    """Tile of one GEMM: rows, columns and reduction of a step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@cache
def input_tile(m: int, c: int, k: int, taps: int, itemsize: int, arch: int, sms: int, fma: bool = False) -> Tile:
    """Tile of the input gradient: m positions, c columns, taps * k reduction."""
    tile = tiles.conv_tile(m, c, k, 1, taps, itemsize, arch, sms, fma)
    block_m, block_n, block_k, num_warps, stages = *tile[:3], tile.num_warps, tile.num_stages
    if c * itemsize % 16 != 0:
        # The weight, x and g then move a few bytes at a time, and each load takes a register for its pointer.
        block_n, block_k = min(block_n, 64), min(block_k, 32)
    return Tile(block_m, block_n, block_k, num_warps, stages)


class WeightTile(NamedTuple):
    """Tile of the weight gradient, and how its rows are split."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int
    steps: int  # row blocks a split walks


@cache
def weight_tile(m: int, k: int, c: int, taps: int, itemsize: int, fma: bool = False, bundles: int = 1) -> WeightTile:
    """Tile of the weight gradient [k, taps, c] over m rows, a bundle's. It and the split depend on the shape alone, so
    sums come out the same on every run and every GPU."""
    scattered = math.gcd(k, c) * itemsize % 16 != 0
    widest = 64 if fma or scattered else 128
    block_m = 128 if widest == 128 and k > 64 else 64  # a warp group's matrix instruction is 64 rows
    block_n = min(widest, block_m, tiles.power_of_2(c))  # 64 x 128 spills on sm_100
    block_k = 16 if fma else 32 if scattered else 128 // itemsize
    # Behind BN and ReLU a step's columns pass through registers: four warps would spill.
    num_warps = 8 if widest == 128 and block_n >= 64 else 4
    tiles_mn = tiles.ceil_div(k, block_m) * tiles.ceil_div(c, block_n) * taps * bundles
    blocks = tiles.ceil_div(m, block_k)
    most = min(_PROGRAMS // tiles_mn, _PARTIAL_BYTES // (4 * k * c * taps * bundles), blocks)
    steps = tiles.ceil_div(blocks, max(1, most))
    return WeightTile(block_m, block_n, block_k, num_warps, 3, tiles.ceil_div(blocks, steps), steps)


def declines(op: str, grad: Tensor, x: Tensor, weight: Tensor, *args) -> str | None:
    """Why `bn_act_conv_bwd` cannot run with these arguments, as the rest of a sentence; None where it can."""
    *_, groups, _ = args
    k, c = weight.shape[:2]
    if not x.dtype == weight.dtype == grad.dtype:
        return f"needs grad, x and weight of one dtype, got {grad.dtype}, {x.dtype} and {weight.dtype}"
    if declined := declines_groups(x, weight, groups):
        return declined
    if groups == 1 and min(k, c) < FEWEST:
        return f"needs at least {FEWEST} input and output channels, got {c} and {k}"
    if weight.numel() == 0:
        return "needs a non-empty weight"
    rows = max(x.numel() // x.shape[1], grad.numel() // grad.shape[1])
    if rows > _base._MAX_ROWS:
        return f"needs at most {_base._MAX_ROWS} positions, got {rows}"
    return None


def variant(op: str, grad: Tensor, x: Tensor, weight: Tensor, *args) -> tuple:
    """The tiles, which are picked by the number of rows."""
    tile, of_weight = _tiles(grad, x, weight, args[-2])
    return tile, of_weight[:5]


def _tiles(grad: Tensor, x: Tensor, weight: Tensor, groups: int) -> tuple[Tile, WeightTile]:
    r, s = weight.shape[2:]
    c, k = x.shape[1], grad.shape[1]
    fma = x.dtype is torch.float32 and not tf32_allowed()
    size = x.element_size()
    bundle, of_weight = bundle_of(weight, groups), bundle_of(weight, groups, width=tiles.WEIGHT_BUNDLE_WIDTH)
    rows = x.numel() // c * (groups // bundle.size)  # each bundle has rows of its own
    tile = input_tile(rows, bundle.c, bundle.k, r * s, size, *_base._chip(x), fma)
    bundles = groups // of_weight.size
    return tile, weight_tile(grad.numel() // k, of_weight.k, of_weight.c, r * s, size, fma, bundles)


def bn_act_conv_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_mask: list[bool],
    *,
    launch=_dispatch,
) -> tuple[Tensor | None, ...]:
    """(dx: [N, C, H, W], dweight: [K, C / groups, R, S], dbn_weight: [C], dbn_bias: [C]) for grad: [N, K, P, Q]; None
    where output_mask is off.

    mean, var: [C] float32, the batch statistics of x, through which dx goes as well; None: no BN and no ReLU, a is x.
    """
    need_x, need_weight, need_bn_weight, need_bn_bias = output_mask
    with _device_of(x):
        dx = _Output(x.shape, output_format(x, weight), x) if need_x else None
        grad, x = _channels_last(grad), _channels_last(x)
        bn = *map(_per_channel, (mean, var, bn_weight, bn_bias)), eps, relu and mean is not None
        conv = stride, padding, dilation, groups
        dweight = dbn_weight = dbn_bias = None
        if need_weight:
            dweight = _weight_gradient(launch, grad, x, weight, *bn, *conv)
        if need_x or need_bn_weight or need_bn_bias:
            partials = _masked_input_gradient(launch, grad, x, _channels_last(weight), *bn, *conv, _rows(dx))
            if mean is not None:
                mean, var, bn_weight, *_ = bn
                sum_g, sum_gx, dbn_weight = _finish(launch, *partials, var, eps)
                dbn_bias = sum_g
                if need_x:
                    # In place: an element is read, then written, by one thread, and no other depends on it.
                    _launch_bwd_input(launch, dx.rows, None, x, mean, var, bn_weight, sum_g, sum_gx, dx, eps)
        return _result(dx), dweight, dbn_weight if need_bn_weight else None, dbn_bias if need_bn_bias else None


def _masked_input_gradient(
    launch, grad, x, weight, mean, var, bn_weight, bn_bias, eps, relu, stride, padding, dilation, groups, g
) -> tuple[Tensor, Tensor] | None:
    """Writes the gradient of bn(x) into g: [N, C, H, W] channels_last; with BN, partials [*, C] of sum g and of
    sum g * (x - mean)."""
    n, c, h, w = x.shape
    r, s = weight.shape[2:]
    k, p, q = grad.shape[1:]
    tile, _ = _tiles(grad, x, weight, groups)
    bundle = bundle_of(weight, groups)
    # The largest class of positions: those of one remainder by the stride.
    class_rows = n * tiles.ceil_div(h, stride[0]) * tiles.ceil_div(w, stride[1])
    tiles_m, classes = tiles.ceil_div(class_rows, tile.block_m), stride[0] * stride[1]
    partials = None
    if mean is not None:
        partials = _floats(x, classes * tiles_m, c), _floats(x, classes * tiles_m, c)
    launch(
        _conv_bwd._bn_act_conv_bwd_input_kernel,
        (tiles_m * (c // bundle.c) * tiles.ceil_div(bundle.c, tile.block_n), classes),
        grad,
        None if mean is None else x,
        bundled(launch, weight, groups),
        mean,
        var,
        bn_weight,
        bn_bias,
        g,
        *((None, None) if partials is None else partials),
        eps,
        n,
        h,
        w,
        p,
        q,
        c,
        k,
        *padding,
        tiles_m,
        R=r,
        S=s,
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        DILATION_H=dilation[0],
        DILATION_W=dilation[1],
        STEP_H=stride[0] // math.gcd(stride[0], dilation[0]),
        STEP_W=stride[1] // math.gcd(stride[1], dilation[1]),
        ROWS=_same_rows(weight, stride, padding),
        EVEN_C=bundle.c % tile.block_n == 0,
        EVEN_K=bundle.k % tile.block_k == 0,
        **_shared_constants(x, c, k, relu),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=8,
        BUNDLE=bundle.size,
        **bundle_constants(bundle, groups),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return partials


def _weight_gradient(
    launch, grad, x, weight, mean, var, bn_weight, bn_bias, eps, relu, stride, padding, dilation, groups
) -> Tensor:
    """dweight: [K, C / groups, R, S], in weight's dtype and strides."""
    _, c, h, w = x.shape
    r, s = weight.shape[2:]
    k, p, q = grad.shape[1:]
    m = grad.numel() // k
    _, tile = _tiles(grad, x, weight, groups)
    bundle = bundle_of(weight, groups, width=tiles.WEIGHT_BUNDLE_WIDTH)
    dweight = torch.empty_like(weight)
    if not dweight.is_contiguous(memory_format=torch.channels_last):
        dweight = torch.empty_like(weight, memory_format=torch.channels_last)
    partial = _floats(x, tile.splits, dweight.numel() * bundle.size)
    launch(
        _conv_bwd._bn_act_conv_bwd_weight_kernel,
        (_tiles_of_weight(bundle, tile) * (k // bundle.k) * r * s, tile.splits),
        grad,
        x,
        mean,
        var,
        bn_weight,
        bn_bias,
        partial,
        eps,
        m,
        h,
        w,
        p,
        q,
        c,
        k,
        *stride,
        *padding,
        *dilation,
        tile.steps,
        R=r,
        S=s,
        PADDED=any(padding),
        ROWS=_same_rows(weight, stride, padding),
        EVEN_C=bundle.c % tile.block_n == 0,
        EVEN_K=bundle.k % tile.block_m == 0,
        **_shared_constants(x, c, k, relu),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **bundle_constants(bundle, groups),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    block_s = min(16, tiles.power_of_2(tile.splits))
    block_e = 1024 // block_s
    launch(
        _conv_bwd._bn_act_conv_bwd_weight_finish_kernel,
        (tiles.ceil_div(dweight.numel(), block_e),),
        partial,
        dweight,
        dweight.numel(),
        tile.splits,
        K_GROUP=k // groups,
        C_GROUP=c // groups,
        TAPS=r * s,
        BUNDLE=bundle.size,
        BLOCK_S=block_s,
        BLOCK_E=block_e,
    )
    return with_strides_of(weight, dweight)


def _tiles_of_weight(bundle: tiles.Bundle, tile: WeightTile) -> int:
    return tiles.ceil_div(bundle.k, tile.block_m) * tiles.ceil_div(bundle.c, tile.block_n)


def _same_rows(weight: Tensor, stride, padding) -> bool:
    """Whether output position m is made of input position m alone."""
    return weight.shape[2] * weight.shape[3] == 1 and max(stride) == 1 and not any(padding)


def _shared_constants(x: Tensor, c: int, k: int, relu: bool) -> dict:
    """What both GEMMs are specialised on."""
    tf32 = x.dtype is torch.float32 and tf32_allowed()
    return {
        "ALIGN_C": math.gcd(c, 16),
        "ALIGN_K": math.gcd(k, 16),
        "RELU": relu,
        "INPUT_PRECISION": "tf32" if x.dtype is not torch.float32 or tf32 else "ieee",
        "ROUND_TF32": tf32 and not interpreting(),
        "UPCAST": interpreting() and x.dtype is torch.bfloat16,
    }
