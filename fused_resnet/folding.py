"""BatchNorm folded into the convolution before it: (scale, shift) of a BN, and folded weight and bias."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_shift(
    bn_weight: Tensor | None, bn_bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(scale, shift), each [C] in float64, with BN(v) = v * scale + shift.

    mean, var: [C] statistics (running or of a batch), any floating dtype; bn_weight, bn_bias: [C], or None for 1 and 0.
    """
    scale = torch.rsqrt(var.double() + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.double()
    shift = -mean.double() * scale
    return scale, shift if bn_bias is None else shift + bn_bias.double()


def fold(
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Weight [K, C/groups, R, S] and bias [K], in weight's dtype and strides, of the convolution that is conv then BN.

    Without BN (mean is None) the weight comes back as it is, and None for the bias. The per-channel scale and shift are
    formed in float64; the weight is scaled in at least float32 and cast once.
    """
    if mean is None:
        return weight, None
    scale, shift = scale_shift(bn_weight, bn_bias, mean, var, eps)
    acc = torch.promote_types(weight.dtype, torch.float32)
    folded = weight.to(acc) * scale.to(acc).view(-1, 1, 1, 1)
    return folded.to(weight.dtype), shift.to(weight.dtype)
