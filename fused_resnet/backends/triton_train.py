"""Host side of the Triton kernels that train with batch statistics without storing a normalised tensor.

As in backends/triton.py, whose helpers these are: checks nothing, guards the device, allocates, launches.
"""

from __future__ import annotations

import math

from torch import Tensor, float32
from torch import bfloat16 as _bfloat16

from ..kernels import tiles
from . import triton as _base
from .layout import conv_output_size, output_format
from .triton import _dispatch
from .triton_groups import bundle_constants, bundle_of, bundled, declines_groups
from .triton_pointwise import product_statistics

try:
    from ..kernels import bn_act as _bn
    from ..kernels import bn_act_conv as _conv
    from ..kernels import gram as _gram
except ImportError:  # backends/triton.py says so
    pass

OPS = ("bn_act_conv", "pointwise_bn_act")
_AFFINE_BLOCK = 128  # channels; whole channel blocks of any tile, so that the convolution reads vectors without a mask


def declines(op: str, *args) -> str | None:
    """Why this call cannot run here, as the rest of a sentence; None where it can."""
    x, weight = args[:2]
    stride, padding, dilation, groups = args[8:12] if op == "bn_act_conv" else (args[12], [0, 0], [1, 1], 1)
    if declined := declines_groups(x, weight, groups):
        return declined
    if op == "pointwise_bn_act" and x.dtype is float32:
        return "needs 16 bits: float32 deserves better statistics than those of a float32 covariance"
    return _base.declines("conv_bn_act", x, weight, *[None] * 6, stride, padding, dilation)


def variant(op: str, x: Tensor, weight: Tensor, mean: Tensor | None, *args) -> tuple:
    """The tile, which is picked by the number of rows, and what x's strides allow."""
    stride, padding, dilation = args[5:8] if op == "bn_act_conv" else (args[9], [0, 0], [1, 1])
    xn, _, xh, xw = _base._strides(x)
    rows = _base._row_stride((x.shape[0], *x.shape[2:]), (xn, xh, xw)) is not None
    merged = gram_variant(x, stride) if op == "pointwise_bn_act" else None
    groups = args[8] if op == "bn_act_conv" else 1
    return _tile(x, weight, stride, padding, dilation, groups, mean is not None), rows, math.gcd(xn, xh, xw, 16), merged


def gram_variant(x: Tensor, stride) -> int:
    """What `gram` does by the number of rows: how many partial results it adds up at a time."""
    n, c, *size = x.shape
    positions = n * math.prod(tiles.ceil_div(length, step) for length, step in zip(size, stride, strict=True))
    return _merged(tiles.gram_tile(positions, c, x.element_size()))


def _merged(tile) -> int:
    return min(64, tiles.power_of_2(tile.splits))


def _tile(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int, normalises: bool) -> tiles.ConvTile:
    n, k, p, q = conv_output_size(x, weight, stride, padding, dilation)
    _, c, r, s = weight.shape
    fma = x.dtype is float32 and not _base.tf32_allowed()
    bundle = bundle_of(weight, groups)
    rows = n * p * q * (groups // bundle.size)  # each bundle has rows of its own
    return tiles.bn_act_conv_tile(rows, bundle.k, bundle.c, r * s, x.element_size(), *_base._chip(x), fma, normalises)


def bn_act_conv(
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
    stats: bool,
    *,
    launch=_dispatch,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y: [N, K, P, Q], its mean: [K], its biased variance: [K]) of y = conv(a, weight: [K, C/groups, R, S]), where a =
    act((x - mean) / sqrt(var + eps) * bn_weight + bn_bias), rounded to x's dtype, of x: [N, C, H, W]; without a mean a
    is x. The statistics are float32, of y as it is stored; None without stats."""
    with _base._device_of(x):
        affine = _affine(launch, x, mean, var, bn_weight, bn_bias, eps, spare=groups > 1)
        out, partial_mean, partial_m2, block_m = _convolve(
            launch, x, weight, affine, relu, None, None, None, stride, padding, dilation, False, stats, groups
        )
        if not stats:
            return out.result(), None, None
        k = weight.shape[0]
        m = out.rows.numel() // k
        y_mean, y_var = _base._floats(x, k), _base._floats(x, k)
        splits = partial_mean.shape[0]
        block_s, block_c = tiles.finish_tile(splits, k)
        launch(
            _bn._bn_stats_merge_kernel,
            (tiles.ceil_div(k, block_c),),
            None,
            partial_mean,
            partial_m2,
            y_mean,
            y_var,
            m,
            k,
            splits,
            block_m,
            BLOCK_S=block_s,
            BLOCK_C=block_c,
        )
        return out.result(), y_mean, y_var


def pointwise_bn_act(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    relu: bool,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    out_eps: float,
    residual: Tensor | None,
    stride: list[int],
    out_relu: bool,
    *,
    launch=_dispatch,
) -> tuple[Tensor, ...]:
    """(y: [N, K, P, Q], y_mean: [K], y_var: [K], a_mean: [C], a_cov: [C, C]): the convolution's result before its batch
    norm is never stored; its statistics follow from those of what it reads."""
    loaded = (mean, var, bn_weight, bn_bias, eps, relu)
    a_mean, a_cov = gram(x, *loaded, stride, launch=launch)
    y_mean, y_var, scale, shift = product_statistics(
        weight, a_mean, a_cov, out_weight, out_bias, out_eps, launch=launch
    )
    y = pointwise(x, weight, *loaded, scale, shift, residual, stride, out_relu, launch=launch)
    return y, y_mean, y_var, a_mean, a_cov


def pointwise(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    relu: bool,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: list[int],
    out_relu: bool,
    *,
    launch=_dispatch,
) -> Tensor:
    """y: [N, K, P, Q] = out_act(conv(a, weight: [K, C, 1, 1]) * scale + shift + residual), a as in `bn_act_conv`, for
    a scale and a shift: [K] of float32."""
    with _base._device_of(x):
        affine = _affine(launch, x, mean, var, bn_weight, bn_bias, eps)
        scale, shift = map(_base._per_channel, (scale, shift))
        out, *_ = _convolve(
            launch, x, weight, affine, relu, scale, shift, residual, stride, [0, 0], [1, 1], out_relu, stats=False
        )
        return out.result()


def gram(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    relu: bool,
    stride: list[int],
    *,
    launch=_dispatch,
) -> tuple[Tensor, Tensor]:
    """(mean: [C], biased covariance: [C, C]), in float32, of a as in `bn_act_conv` over the positions that a 1x1
    convolution of this stride reads."""
    with _base._device_of(x):
        affine = _affine(launch, x, mean, var, bn_weight, bn_bias, eps)
        if x.stride(1) != 1:
            x = _base._channels_last(x)
        n, c, h, w = x.shape
        p, q = (tiles.ceil_div(size, step) for size, step in zip((h, w), stride, strict=True))
        m = n * p * q
        xn, xc, xh, xw = _base._strides(x)
        xh, xw = xh * stride[0], xw * stride[1]
        row_stride = _base._row_stride((n, p, q), (xn, xh, xw))
        tile = tiles.gram_tile(m, c, x.element_size())
        partial, sums = _base._floats(x, tile.splits, c, c), _base._floats(x, tile.splits, c)
        pivot = x.dtype is float32  # of 16 bits a difference would be rounded, while products of values are exact
        affine_stride = 0 if affine is None else affine.shape[1]
        launch(
            _gram._gram_partial_kernel,
            (tile.pairs, tile.splits),
            x,
            affine,
            partial,
            sums,
            m,
            p,
            q,
            c,
            affine_stride,
            xn,
            xh,
            xw if row_stride is None else row_stride,
            xc,
            tile.steps,
            ROWS=row_stride is not None,
            PIVOT=pivot,
            EVEN_C=c % tile.block_c == 0,
            ALIGN_X=math.gcd(c, xn, xh, xw, 16),
            RELU=relu,
            INPUT_PRECISION="ieee" if x.dtype is float32 else "tf32",
            UPCAST=_base.interpreting() and x.dtype is _bfloat16,
            BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c,
            num_warps=tile.num_warps,
        )
        a_mean, a_cov = _base._floats(x, c), _base._floats(x, c, c)
        block_s, block_c = _merged(tile), 8
        launch(
            _gram._gram_merge_kernel,
            (tiles.upper_tiles(c, block_c),),
            x if pivot else None,
            affine,
            partial,
            sums,
            a_mean,
            a_cov,
            m,
            c,
            tile.splits,
            affine_stride,
            xc,
            RELU=relu,
            BLOCK_S=block_s,
            BLOCK_C=block_c,
        )
        return a_mean, a_cov


def _affine(launch, x: Tensor, mean, var, bn_weight, bn_bias, eps: float, spare: bool = False) -> Tensor | None:
    """[3, C and up to the next whole block] float32: mean, scale and bias of a BatchNorm; None without one. spare: and
    another block, which a tile of the last groups may read."""
    if mean is None:
        return None
    c = x.shape[1]
    blocks = tiles.ceil_div(c, _AFFINE_BLOCK) + spare
    affine = _base._floats(x, 3, blocks * _AFFINE_BLOCK)
    launch(
        _conv._bn_affine_kernel,
        (blocks,),
        *map(_base._per_channel, (mean, var, bn_weight, bn_bias)),
        affine,
        eps,
        c,
        affine.shape[1],
        BLOCK=_AFFINE_BLOCK,
    )
    return affine


def _convolve(
    launch,
    x: Tensor,
    weight: Tensor,
    affine: Tensor | None,
    relu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out_relu: bool,
    stats: bool,
    groups: int = 1,
):
    """(y, partial means and sums of squared distances: [row tiles, K] or None, rows of a tile)."""
    shape = n, k, p, q = conv_output_size(x, weight, stride, padding, dilation)
    out = _base._Output(shape, output_format(x, weight), x)
    r, s = weight.shape[2:]
    c, h, w = x.shape[1:]
    m = n * p * q
    tile = _tile(x, weight, stride, padding, dilation, groups, affine is not None)
    bundle = bundle_of(weight, groups)
    fma = x.dtype is float32 and not _base.tf32_allowed()
    if not tile.flat and x.stride(1) != 1:
        x = _base._channels_last(x)
    weight = bundled(launch, _base._channels_last(weight), groups)
    xn, xc, xh, xw = _base._strides(x)
    rows = r * s == 1 and not any(padding) and max(stride) == 1
    row_stride = _base._row_stride((n, h, w), (xn, xh, xw)) if rows else None
    row_tiles = tiles.ceil_div(m, tile.block_m)
    partials = [_base._floats(x, row_tiles, k) if stats else None for _ in range(2)]
    launch(
        _conv._bn_act_conv_fwd_kernel,
        (row_tiles * (k // bundle.k) * tiles.ceil_div(bundle.k, tile.block_n),),
        x,
        weight,
        affine,
        scale,
        shift,
        None if residual is None else _base._channels_last(residual),
        out.rows,
        *partials,
        m,
        p,
        q,
        h,
        w,
        k,
        c,
        0 if affine is None else affine.shape[1],
        xn,
        xh,
        xw if row_stride is None else row_stride,
        xc,
        *stride,
        *padding,
        *dilation,
        R=r,
        S=s,
        PADDED=any(padding),
        ROWS=row_stride is not None,
        FLAT_C=bundle.c if tile.flat else 0,
        EVEN_C=bundle.c % tile.block_k == 0,
        EVEN_K=bundle.k % tile.block_n == 0,
        ALIGN_X=math.gcd(c, xn, xh, xw, 16),
        ALIGN_K=math.gcd(k, 16),
        RELU=relu,
        OUT_RELU=out_relu,
        INPUT_PRECISION="ieee" if fma else "tf32",
        ROUND_TF32=x.dtype is float32 and not fma and not _base.interpreting(),
        UPCAST=_base.interpreting() and x.dtype is _bfloat16,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        BUNDLE=bundle.size,
        **bundle_constants(bundle, groups),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, *partials, tile.block_m
