"""Host side of the Triton kernels of batch norm, ReLU and max-pool in one: checks nothing, allocates, launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import tiles
from . import triton as _base
from .layout import output_format
from .pooled import size
from .triton import _channels_last, _device_of, _dispatch, _floats, _Output, _output, _per_channel, _result

try:
    from ..kernels import bn_act_pool as _pool
except ImportError:  # backends/triton.py says so
    pass


def declines(op: str, *args) -> str | None:
    """Why this call cannot run here, as the rest of a sentence; None where it can."""
    x = args[0] if op == "bn_act_pool" else args[1]
    rows = x.numel() // x.shape[1]
    return f"needs at most {_base._MAX_ROWS} values a channel, got {rows}" if rows > _base._MAX_ROWS else None


def variant(op: str, *args) -> None:
    """The tile is picked by the number of channels alone."""


def bn_act_pool(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    *,
    launch=_dispatch,
) -> tuple[Tensor, Tensor]:
    """(y: [N, C, P, Q], winner: the same in uint8) of x: [N, C, H, W] and its statistics; see pooled.py."""
    with _device_of(x):
        n, c, h, w = x.shape
        p, q = size(h, w)
        out = _Output((n, c, p, q), output_format(x), x)
        winner = torch.empty((n, c, p, q), dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
        m = n * p * q
        tile = tiles.row_tile(m, c)
        launch(
            _pool._bn_act_pool_fwd_kernel,
            (tiles.ceil_div(m, tile.block_r) * tiles.ceil_div(c, tile.block_c),),
            _channels_last(x),
            *map(_per_channel, (mean, var, bn_weight, bn_bias)),
            out.rows,
            winner,
            eps,
            m,
            p,
            q,
            h,
            w,
            c,
            BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c,
            ALIGN=tile.align,
        )
        return out.result(), winner.contiguous(memory_format=output_format(x))


def bn_act_pool_bwd(
    grad: Tensor,
    x: Tensor,
    winner: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    eps: float,
    output_mask: list[bool],
    *,
    launch=_dispatch,
) -> tuple[Tensor | None, ...]:
    """(dx: [N, C, H, W], dbn_weight: [C], dbn_bias: [C]); None where output_mask is off. mean and var are x's own."""
    need_x, need_bn_weight, need_bn_bias = output_mask
    with _device_of(x):
        dx = _output(need_x, x.shape, output_format(x), x)
        grad, x, winner = _channels_last(grad), _channels_last(x), _channels_last(winner)
        mean, var, bn_weight = map(_per_channel, (mean, var, bn_weight))
        n, c, h, w = x.shape
        m, sizes = n * h * w, (*size(h, w), h, w, c)
        tile = tiles.row_tile(m, c)
        blocks_c = tiles.ceil_div(c, tile.block_c)
        partial_g, partial_gx = _floats(x, tile.splits, c), _floats(x, tile.splits, c)
        block = dict(BLOCK_R=tile.block_r, BLOCK_C=tile.block_c, ALIGN=tile.align)
        launch(
            _pool._bn_act_pool_bwd_reduce_kernel,
            (blocks_c, tile.splits),
            grad,
            winner,
            x,
            mean,
            partial_g,
            partial_gx,
            m,
            *sizes,
            tile.steps,
            **block,
        )
        sum_g, sum_gx, dbn_weight = _base._finish(launch, partial_g, partial_gx, var, eps)
        if need_x:
            launch(
                _pool._bn_act_pool_bwd_input_kernel,
                (tiles.ceil_div(m, tile.block_r) * blocks_c,),
                grad,
                winner,
                x,
                mean,
                var,
                bn_weight,
                sum_g,
                sum_gx,
                dx.rows,
                eps,
                m,
                *sizes,
                **block,
            )
        return _result(dx), dbn_weight if need_bn_weight else None, sum_g if need_bn_bias else None
