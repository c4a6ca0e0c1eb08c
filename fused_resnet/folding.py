"""BatchNorm folded into the convolution before it: (scale, shift) of a BN, and folded weight and bias."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_shift(
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(scale, shift), each [C] in `dtype`, with BN(v) = v * scale + shift.

    mean, var: [C] statistics (running or of a batch), any floating dtype; bn_weight, bn_bias: [C], or None for 1 and 0.
    """
    scale = torch.rsqrt(var.to(dtype) + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.to(dtype)
    mean = mean.to(dtype)
    return scale, -mean * scale if bn_bias is None else torch.addcmul(bn_bias.to(dtype), mean, scale, value=-1)


def fold(
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Weight [K, C/groups, R, S] and bias [K], in weight's dtype and strides, of the convolution that is conv then BN.

    Without BN (mean is None) the weight comes back as it is, and None for the bias. Computed in float32 (float64 for
    float64) and cast once: it runs at every call, so the fewest operations count.
    """
    if mean is None:
        return weight, None
    acc = torch.promote_types(weight.dtype, torch.float32)
    scale, shift = scale_shift(bn_weight, bn_bias, mean, var, eps, acc)
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)
