"""torchvision's ten ResNets on fused blocks: the same signatures, weights enums, parameters and state_dict keys.

weights: a member of the weights enum in the signature, its name, or None for a random initialisation; progress: show the
download; kwargs go to torchvision.models.ResNet (num_classes, zero_init_residual, replace_stride_with_dilation, norm_layer).
x: [N, 3, H, W] -> logits [N, num_classes].
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models import resnet as _tv
from torchvision.models.resnet import ResNet, WeightsEnum

from .blocks import FusedBasicBlock, FusedBottleneck

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


def _resnet(block: type[nn.Module], layers: list[int], enum, weights, progress: bool, **kwargs: Any) -> ResNet:
    weights: WeightsEnum | None = enum.verify(weights)
    if weights is None:
        return ResNet(block, layers, **kwargs)
    classes = len(weights.meta["categories"])
    if kwargs.setdefault("num_classes", classes) != classes:
        raise ValueError(f"num_classes: expected {classes} for weights={weights}, got {kwargs['num_classes']}")
    model = ResNet(block, layers, **kwargs)
    model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model


def _fixed(kwargs: dict[str, Any], **values: int) -> dict[str, Any]:
    """kwargs with the values that make the model what its name says; a different one is an error."""
    for name, value in values.items():
        if kwargs.setdefault(name, value) != value:
            raise ValueError(f"{name}: expected {value} for this model, got {kwargs[name]}")
    return kwargs


def resnet18(*, weights: _tv.ResNet18_Weights | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18, arXiv 1512.03385."""
    return _resnet(FusedBasicBlock, [2, 2, 2, 2], _tv.ResNet18_Weights, weights, progress, **kwargs)


def resnet34(*, weights: _tv.ResNet34_Weights | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34, arXiv 1512.03385."""
    return _resnet(FusedBasicBlock, [3, 4, 6, 3], _tv.ResNet34_Weights, weights, progress, **kwargs)


def resnet50(*, weights: _tv.ResNet50_Weights | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 (V1.5: the stride is in the 3x3 convolution), arXiv 1512.03385."""
    return _resnet(FusedBottleneck, [3, 4, 6, 3], _tv.ResNet50_Weights, weights, progress, **kwargs)


def resnet101(*, weights: _tv.ResNet101_Weights | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 (V1.5), arXiv 1512.03385."""
    return _resnet(FusedBottleneck, [3, 4, 23, 3], _tv.ResNet101_Weights, weights, progress, **kwargs)


def resnet152(*, weights: _tv.ResNet152_Weights | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152 (V1.5), arXiv 1512.03385."""
    return _resnet(FusedBottleneck, [3, 8, 36, 3], _tv.ResNet152_Weights, weights, progress, **kwargs)


def resnext50_32x4d(
    *, weights: _tv.ResNeXt50_32X4D_Weights | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNeXt-50 32x4d, arXiv 1611.05431."""
    return _resnet(
        FusedBottleneck,
        [3, 4, 6, 3],
        _tv.ResNeXt50_32X4D_Weights,
        weights,
        progress,
        **_fixed(kwargs, groups=32, width_per_group=4),
    )


def resnext101_32x8d(
    *, weights: _tv.ResNeXt101_32X8D_Weights | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNeXt-101 32x8d, arXiv 1611.05431."""
    return _resnet(
        FusedBottleneck,
        [3, 4, 23, 3],
        _tv.ResNeXt101_32X8D_Weights,
        weights,
        progress,
        **_fixed(kwargs, groups=32, width_per_group=8),
    )


def resnext101_64x4d(
    *, weights: _tv.ResNeXt101_64X4D_Weights | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """ResNeXt-101 64x4d, arXiv 1611.05431."""
    return _resnet(
        FusedBottleneck,
        [3, 4, 23, 3],
        _tv.ResNeXt101_64X4D_Weights,
        weights,
        progress,
        **_fixed(kwargs, groups=64, width_per_group=4),
    )


def wide_resnet50_2(
    *, weights: _tv.Wide_ResNet50_2_Weights | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """Wide ResNet-50-2, arXiv 1605.07146."""
    return _resnet(
        FusedBottleneck,
        [3, 4, 6, 3],
        _tv.Wide_ResNet50_2_Weights,
        weights,
        progress,
        **_fixed(kwargs, width_per_group=128),
    )


def wide_resnet101_2(
    *, weights: _tv.Wide_ResNet101_2_Weights | str | None = None, progress: bool = True, **kwargs: Any
) -> ResNet:
    """Wide ResNet-101-2, arXiv 1605.07146."""
    return _resnet(
        FusedBottleneck,
        [3, 4, 23, 3],
        _tv.Wide_ResNet101_2_Weights,
        weights,
        progress,
        **_fixed(kwargs, width_per_group=128),
    )
