"""bn_act_pool from a backend's batch norm and PyTorch's max-pool, and conv_bn_act_pool from its convolution: what every
backend can do.

What is kept for the backward is each window's winner, in a byte: 3 * row + column of the first largest of its nine
positions, or LOST where none is above zero and the ReLU lets no gradient through.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import conv_map_size, output_format
from .stem_conv import PLACES

OPS = ("bn_act_pool", "bn_act_pool_bwd")
LOST = 9


def pooled_of(backend) -> tuple:
    """The functions of OPS, in that order, from this backend's bn_act and bn_act_bwd."""
    return functools.partial(bn_act_pool, backend), functools.partial(bn_act_pool_bwd, backend)


def conv_bn_act_pool(conv_bn_act, x, weight, *bn):
    """conv_bn_act: a backend's."""
    stride, padding, dilation, groups = PLACES
    y = conv_bn_act(x, weight, *bn, None, list(stride), list(padding), list(dilation), groups, True)
    return F.max_pool2d(y, 3, 2, 1).contiguous(memory_format=output_format(x, weight))


def is_apart(x: Tensor, mean: Tensor | None) -> bool:
    """Whether a stem has a batch norm that is not to be folded into its filters: they may leave float16's range."""
    return x.dtype is torch.float16 and mean is not None


def size(h: int, w: int) -> list[int]:
    """Of the pooled map."""
    return conv_map_size((h, w), (3, 3), (2, 2), (1, 1), (1, 1))


def bn_act_pool(backend, x, mean, var, bn_weight, bn_bias, eps):
    a = backend.bn_act(x, mean, var, bn_weight, bn_bias, eps, None, True, True)
    y, at = F.max_pool2d(a, 3, 2, 1, return_indices=True)
    h, w = at // x.shape[3], at % x.shape[3]
    top, left = _corners(y)
    winner = (3 * (h - top) + w - left).to(torch.uint8).masked_fill_(y <= 0, LOST)
    format = output_format(x)
    return y.contiguous(memory_format=format), winner.contiguous(memory_format=format)


def bn_act_pool_bwd(backend, grad, x, winner, mean, var, bn_weight, eps, output_mask):
    wide = torch.promote_types(grad.dtype, torch.float32)
    g = scattered(grad.to(wide), winner, x.shape).to(x.dtype, memory_format=output_format(x))
    return backend.bn_act_bwd(g, None, x, mean, var, bn_weight, eps, False, True, [*output_mask, False])[:3]


def scattered(grad: Tensor, winner: Tensor, shape: torch.Size) -> Tensor:
    """The pool's gradient: of shape [N, C, H, W], zero where no window was won."""
    g = grad.new_zeros(shape)
    for p, row, row_ok in _windows(shape[2], winner.shape[2], winner.device):
        for q, column, column_ok in _windows(shape[3], winner.shape[3], winner.device):
            won = winner[:, :, p][:, :, :, q] == (3 * row)[:, None] + column[None, :]
            won = won & row_ok[:, None] & column_ok[None, :]
            g = g + torch.where(won, grad[:, :, p][:, :, :, q], 0)
    return g


def _windows(size: int, windows: int, device):
    """Of every row (or column): a window that it lies in, its place there, whether there is such a window; twice."""
    h = torch.arange(size, device=device)
    for i in (0, 1):
        p = (h + i) // 2  # even rows lie in one window, odd ones at the end of one and the beginning of the next
        yield p.clamp(max=windows - 1), h - 2 * p + 1, (p < windows) & ((h % 2 == 1) | (i == 0))


def walks(n: int, c: int, h: int, w: int, element: int, sms: int) -> tuple[bool, bool]:
    """Whether windows below one another are walked by several threads of the compiled kernel, and whether a walk is cut
    short at the edge: csrc/bn_act.cu, `divide`. element: bytes of one."""
    p, q = size(h, w)
    steps, vectors = 8, -(-c * element // 16)
    while steps > 2 and n * q * vectors * -(-p // steps) < 4 * sms * 256:
        steps //= 2
    return p > steps, p % steps > 0


def winning(a: Tensor, winner: Tensor) -> Tensor:
    """The values of a: [N, C, H, W] at the windows' winners; zero where there is none."""
    place, there = _places(winner, a.shape)
    return a.flatten(2).gather(2, place.flatten(2)).view(winner.shape) * there


def _places(winner: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """(where in a map of H * W each winner lies, whether there is one)."""
    top, left = _corners(winner)
    h, w = top + winner.long() // 3, left + winner.long() % 3
    there = (winner < LOST) & (h >= 0) & (h < shape[2]) & (w >= 0) & (w < shape[3])
    return (h * shape[3] + w) * there, there


def _corners(y: Tensor) -> tuple[Tensor, Tensor]:
    """First row and column of the windows, [P, 1] and [1, Q]."""
    p, q = (torch.arange(n, device=y.device) * 2 - 1 for n in y.shape[2:])
    return p[:, None], q[None, :]
