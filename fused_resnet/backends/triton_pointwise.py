"""Host side of the pointwise convolution between batch norms in Triton: its small kernels, and the backward.

Of the backward's large products the one over all rows, g^T a, is cuBLAS's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels import tiles
from . import triton as _base
from .composed import _inner
from .cpu_gradients import spread
from .layout import output_format, with_strides_of
from .reference import rows_of
from .triton import _channels_last, _device_of, _dispatch, _floats, _per_channel
from .triton_train_bwd import input_tile

try:
    from ..kernels import pointwise as _pointwise
except ImportError:  # backends/triton.py says so
    pass

_ROWS = 16  # of a weight, in a program: the least that a tensor core takes
_TILE = 64


def declines(op: str, grad: Tensor, y: Tensor | None, x: Tensor, weight: Tensor, *args) -> str | None:
    """Why `pointwise_bn_act_bwd` cannot run with these arguments, as the rest of a sentence; None where it can."""
    if x.dtype is torch.float32:
        return "needs 16 bits: float32 deserves better statistics than those of a float32 covariance"
    if not grad.dtype == x.dtype == weight.dtype:
        return f"needs grad, x and weight of one dtype, got {grad.dtype}, {x.dtype} and {weight.dtype}"
    if weight.numel() == 0:
        return "needs a non-empty weight"
    rows = max(x.numel() // weight.shape[1], grad.numel() // weight.shape[0])
    return f"needs at most {_base._MAX_ROWS} positions, got {rows}" if rows > _base._MAX_ROWS else None


def variant(op: str, grad: Tensor, y: Tensor | None, x: Tensor, weight: Tensor, *args) -> tuple:
    """The tile of the input gradient, which is picked by the number of rows."""
    k, c = weight.shape[:2]
    return input_tile(grad.numel() // k, c, k, 1, x.element_size(), *_base._chip(x))


def _matrix(weight: Tensor) -> Tensor:
    """weight: [K, C, 1, 1] as a dense [K, C]."""
    return weight.flatten(1).contiguous()


def _reduced(k: int, c: int) -> int:
    """Values of a reduction a step, where an operand is in two parts. Rows that no vector load fits take a register for
    each value's address, and would spill."""
    return _TILE if math.gcd(k, c) % 16 == 0 else _TILE // 2


def product_statistics(
    weight: Tensor, a_mean: Tensor, a_cov: Tensor, out_weight, out_bias, eps: float, *, launch=_dispatch
) -> tuple[Tensor, ...]:
    """(mean, biased variance, scale, shift), each [K] in float32, of the batch norm after a product with weight:
    [K, C, 1, 1] of 16 bits, from the mean and covariance of what it multiplies."""
    with _device_of(weight):
        k, c = weight.shape[:2]
        found = [_floats(a_cov, k) for _ in range(4)]
        launch(
            _pointwise._product_statistics_kernel,
            (tiles.ceil_div(k, _ROWS),),
            _matrix(weight),
            a_mean,
            a_cov,
            *map(_per_channel, (out_weight, out_bias)),
            *found,
            eps,
            k,
            c,
            BLOCK_K=_ROWS,
            BLOCK_C=_TILE,
            BLOCK_J=_reduced(k, c),
        )
        return tuple(found)


def pointwise_bn_act_bwd(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    relu: bool,
    out_weight: Tensor | None,
    y_mean: Tensor,
    y_var: Tensor,
    out_eps: float,
    a_mean: Tensor,
    a_cov: Tensor,
    stride: list[int],
    out_relu: bool,
    output_mask: list[bool],
    *,
    launch=_dispatch,
) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbn_weight, dbn_bias, dout_weight, dout_bias, dresidual), None where output_mask is off; a_mean and
    a_cov are of what the convolution multiplies, as `pointwise_bn_act` returned them."""
    need_x, need_weight, need_bn_weight, need_bn_bias, need_out_weight, need_out_bias, need_residual = output_mask
    need_a = need_x or need_bn_weight or need_bn_bias
    with _device_of(x):
        grad = _channels_last(grad)  # an average's is one value a channel, and tells nothing of the layout
        _, _, sum_g, g = _base.bn_act_bwd(
            grad, y, grad, y_mean, y_var, None, out_eps, out_relu, False, [False, False, True, out_relu], launch=launch
        )
        g = _channels_last(grad) if g is None else g
        dresidual = g.contiguous(memory_format=output_format(x, weight)) if need_residual else None
        a = x
        if mean is not None:
            a = _base.bn_act(x, mean, var, bn_weight, bn_bias, eps, None, relu, True, launch=launch)
        rows_g, rows_a = rows_of(_channels_last(g), (1, 1)), rows_of(_channels_last(a), stride)
        k, c = weight.shape[:2]
        w, count = _matrix(weight), float(rows_g.shape[0])
        product = _inner(rows_g, rows_a)
        y_var, out_weight = _per_channel(y_var), _per_channel(out_weight)
        slope, dout_weight = _floats(x, k), _floats(x, k)
        folded = torch.empty_like(w) if need_a else None
        launch(
            _pointwise._pointwise_bwd_rows_kernel,
            (tiles.ceil_div(k, _ROWS),),
            product,
            sum_g,
            a_mean,
            w,
            out_weight,
            y_var,
            slope,
            dout_weight,
            folded,
            out_eps,
            count,
            k,
            c,
            BLOCK_K=_ROWS,
            BLOCK_C=_TILE,
        )
        dx = dweight = dbn_weight = dbn_bias = None
        if need_weight:
            dweight = torch.empty_like(w)
            launch(
                _pointwise._pointwise_bwd_weight_kernel,
                (tiles.ceil_div(k, _TILE), tiles.ceil_div(c, _TILE)),
                product,
                sum_g,
                a_mean,
                a_cov,
                w,
                out_weight,
                y_var,
                slope,
                dweight,
                out_eps,
                count,
                k,
                c,
                BLOCK_K=_TILE,
                BLOCK_C=_TILE,
                num_warps=8,
            )
            dweight = with_strides_of(weight, dweight.view(weight.shape))
        if need_a:
            turn, shift = _turn(launch, w, slope, folded, a_mean, sum_g, count)
            da = spread(_input_gradient(launch, rows_g, folded, rows_a, turn, shift), x.shape, stride)
            if mean is None:
                dx = da
            else:
                needs = [need_x, need_bn_weight, need_bn_bias, False]
                dx, dbn_weight, dbn_bias, _ = _base.bn_act_bwd(
                    da, None, x, mean, var, bn_weight, eps, relu, True, needs, bn_bias, launch=launch
                )
            dx = dx.contiguous(memory_format=output_format(x, weight)) if need_x else None
        of_out = dout_weight if need_out_weight else None, sum_g if need_out_bias else None
        return dx, dweight, dbn_weight, dbn_bias, *of_out, dresidual


def _turn(launch, w: Tensor, slope: Tensor, folded: Tensor, a_mean: Tensor, sum_g: Tensor, count: float):
    """(turn: [C, C] in w's dtype, shift: [C] in float32): what `_input_gradient` takes."""
    k, c = w.shape
    turn, shift = w.new_empty(c, c), _floats(w, c)
    blocks = tiles.ceil_div(c, _TILE)
    launch(
        _pointwise._pointwise_bwd_turn_kernel,
        (blocks, blocks),
        w,
        slope,
        turn,
        k,
        c,
        BLOCK_K=_TILE // 2,  # with all of _TILE two operands in two parts take all registers that sm_80 has
        BLOCK_C=_TILE,
    )
    launch(
        _pointwise._pointwise_bwd_shift_kernel,
        (tiles.ceil_div(c, 16),),
        turn,
        folded,
        a_mean,
        sum_g,
        shift,
        count,
        k,
        c,
        BLOCK_K=128,
        BLOCK_C=16,
    )
    return turn, shift


def _input_gradient(launch, g: Tensor, folded: Tensor, a: Tensor, turn: Tensor, shift: Tensor) -> Tensor:
    """g: [M, K] folded + a: [M, C] turn + shift, as rows [M, C]."""
    (m, k), c = g.shape, a.shape[1]
    da = torch.empty_like(a)
    tile = input_tile(m, c, k, 1, g.element_size(), *_base._chip(g))
    launch(
        _pointwise._pointwise_bwd_input_kernel,
        (tiles.ceil_div(m, tile.block_m) * tiles.ceil_div(c, tile.block_n),),
        g,
        folded,
        a,
        turn,
        shift,
        da,
        m,
        k,
        c,
        EVEN_K=k % tile.block_k == 0,
        EVEN_C=c % tile.block_n == 0 and c % tile.block_k == 0,
        ALIGN=math.gcd(k, c, 16),
        UPCAST=_base.interpreting() and g.dtype is torch.bfloat16,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=8,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return da
