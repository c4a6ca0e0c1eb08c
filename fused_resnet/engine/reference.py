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
) -> Tensor:
    """y: [N, K, P, Q] = act(conv(x: [N, C, H, W], weight: [K, C, R, S]) + bias: [K] + residual: [N, K, P, Q]).

    segment: (x2: [N, C2, H2, W2], weight2: [K, C2, 1, 1], stride2), whose 1x1 convolution is added: a projection.
    """
    y = F.conv2d(x, weight, bias.to(x.dtype), stride, padding, dilation)
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
