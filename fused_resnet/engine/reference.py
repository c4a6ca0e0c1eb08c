"""The engine's ops in plain PyTorch: the definition of correct. Weights hold BatchNorm already."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d


def _bias(conv: Tensor, bias: Tensor) -> Tensor:
    return conv + bias.to(conv.dtype).view(1, -1, 1, 1)


def chain(
    x: Tensor,  # [N, C, H, W]
    weight1: Tensor,  # [MID, C, 3, 3]
    bias1: Tensor,  # [MID]
    weight2: Tensor,  # [K, MID, 1, 1]
    bias2: Tensor,  # [K]
    *,
    residual: Tensor | None = None,  # [N, K, P, Q]
    segment: tuple[Tensor, Tensor, int] | None = None,  # [N, C2, H2, W2], [K, C2, 1, 1], spatial stride
    stride: int = 1,
    relu: bool = True,
    next: tuple[Tensor, Tensor] | None = None,  # [NEXT, K, 1, 1], [NEXT]
    quarter: bool = False,
    pool: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y: [N, K, P, Q], with quarter its even rows and columns, with pool its average [N, K, 1, 1]; and, with next,
    z: [N, NEXT, P, Q], else None."""
    h = _bias(conv2d(x, weight1, stride=stride, padding=1), bias1).relu()
    y = _bias(conv2d(h, weight2), bias2)
    if residual is not None:
        y = y + residual
    if segment is not None:
        x2, projection, stride2 = segment
        y = y + conv2d(x2, projection, stride=stride2)
    y = y.relu() if relu else y
    z = None if next is None else _bias(conv2d(y, next[0]), next[1]).relu()
    if pool:
        return torch.nn.functional.adaptive_avg_pool2d(y, 1), z
    return y[:, :, ::2, ::2] if quarter else y, z
