"""The plain-PyTorch twin of every op of the engine: the definition of correct."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    relu: bool = True,
    segment: tuple[Tensor, Tensor, int] | None = None,
    groups: int = 1,
) -> Tensor:
    """y: [N, K, P, Q] = act(conv(x: [N, C, H, W], weight: [K, C / groups, R, S]) + bias: [K] + residual: [N, K, P, Q]).

    segment: (x2: [N, C2, H2, W2], weight2: [K, C2, 1, 1], stride2), whose 1x1 convolution is added: a projection.
    """
    y = F.conv2d(x, weight, bias.to(x.dtype), stride, padding, dilation, groups)
    if residual is not None:
        y = y + residual
    if segment is not None:
        x2, weight2, stride2 = segment
        y = y + F.conv2d(x2, weight2, None, stride2)
    return y.relu() if relu else y


def stem_pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y: [N, K, P, Q] = max_pool3x3s2p1(relu(conv7x7s2p3(x: [N, 3, H, W], weight: [K, 3, 7, 7]) + bias: [K])), of the
    dtype of weight."""
    y = F.conv2d(x.to(weight.dtype), weight, bias.to(weight.dtype), 2, 3).relu()
    return F.max_pool2d(y, 3, 2, 1)


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
    h = _bias(F.conv2d(x, weight1, stride=stride, padding=1), bias1).relu()
    y = _bias(F.conv2d(h, weight2), bias2)
    if residual is not None:
        y = y + residual
    if segment is not None:
        x2, projection, stride2 = segment
        y = y + F.conv2d(x2, projection, stride=stride2)
    y = y.relu() if relu else y
    z = None if next is None else _bias(F.conv2d(y, next[0]), next[1]).relu()
    if pool:
        return F.adaptive_avg_pool2d(y, 1), z
    return y[:, :, ::2, ::2] if quarter else y, z
