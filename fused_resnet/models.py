"""torchvision's ten ResNets on fused blocks: the same signatures, weights enums, parameters and state_dict keys.

weights: a member of the model's weights enum, its name, or None for a random initialisation; progress: show the
download; kwargs go to torchvision.models.ResNet (num_classes, zero_init_residual, replace_stride_with_dilation,
norm_layer).
x: [N, 3, H, W] -> logits [N, num_classes].

Papers: ResNet arXiv 1512.03385 (V1.5: a bottleneck's stride is in its 3x3 convolution), ResNeXt arXiv 1611.05431, Wide
ResNet arXiv 1605.07146.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torchvision.models import resnet as _tv

from .convert import swap_blocks

__all__ = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


def _on_fused_blocks(builder: Callable[..., _tv.ResNet]) -> Callable[..., _tv.ResNet]:
    """torchvision's own builder, and then its blocks swapped: whatever it accepts or refuses, so does this one.

    The memory layout stays torchvision's; `.to(memory_format=torch.channels_last)` is the faster one.
    """

    # Everything but __module__: pickle finds a function by its module and name.
    @functools.wraps(builder, assigned=("__name__", "__qualname__", "__doc__", "__annotations__"))
    def build(*args, **kwargs) -> _tv.ResNet:
        return swap_blocks(builder(*args, **kwargs), memory_format=torch.preserve_format)

    return build


resnet18 = _on_fused_blocks(_tv.resnet18)
resnet34 = _on_fused_blocks(_tv.resnet34)
resnet50 = _on_fused_blocks(_tv.resnet50)
resnet101 = _on_fused_blocks(_tv.resnet101)
resnet152 = _on_fused_blocks(_tv.resnet152)
resnext50_32x4d = _on_fused_blocks(_tv.resnext50_32x4d)
resnext101_32x8d = _on_fused_blocks(_tv.resnext101_32x8d)
resnext101_64x4d = _on_fused_blocks(_tv.resnext101_64x4d)
wide_resnet50_2 = _on_fused_blocks(_tv.wide_resnet50_2)
wide_resnet101_2 = _on_fused_blocks(_tv.wide_resnet101_2)
