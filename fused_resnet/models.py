"""Residual networks on fused blocks: torchvision's ten, and the family of He et al. around them.

TORCHVISION names the ten: the same signatures, weights enums, parameters and state_dict keys. weights: a member of the
model's weights enum, its name, or None for a random initialisation; progress: show the download; kwargs go to
torchvision.models.ResNet (num_classes, zero_init_residual, replace_stride_with_dilation, norm_layer).
x: [N, 3, H, W] -> logits [N, num_classes].

FAMILY names those without published weights: plain twins, pre-activation, the networks for CIFAR; `imagenet_resnet`
and `cifar_resnet` build any of them and their variants.

Papers: ResNet arXiv 1512.03385 (V1.5: a bottleneck's stride is in its 3x3 convolution), pre-activation arXiv
1603.05027, ResNeXt arXiv 1611.05431, Wide ResNet arXiv 1605.07146.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torchvision.models import resnet as _tv

from .convert import swap_blocks
from .residual_network import ResidualNetwork

TORCHVISION = (
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
)
FAMILY = (
    "plain18",
    "plain34",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet152",
    "preact_resnet200",
    "cifar_resnet8",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet110",
    "cifar_resnet1202",
    "cifar_bottleneck47",
    "cifar_bottleneck56",
    "cifar_bottleneck164",
    "cifar_bottleneck1001",
    "cifar_resnet50_4stage",
)
__all__ = [*TORCHVISION, *FAMILY, "ResidualNetwork", "cifar_resnet", "imagenet_resnet"]


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


# --- the family of He et al.: plain and residual, post- and pre-activation, for ImageNet and CIFAR --------------------

_IMAGENET = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
    200: ("bottleneck", (3, 24, 36, 3)),
}
_CONVOLUTIONS = {"basic": 2, "bottleneck": 3}


def imagenet_resnet(depth: int, **kwargs) -> ResidualNetwork:
    """A residual network for large images (arXiv 1512.03385, table 1; 200: arXiv 1603.05027), or its plain twin.

    depth: 18, 34 (basic blocks), 50, 101, 152, 200 (bottlenecks). kwargs go to ResidualNetwork: activation, shortcut,
    residual, num_classes, ... With the defaults it is torchvision's network, parameters and state_dict keys included.
    x: [N, in_channels, H, W] -> logits [N, num_classes]. Raises ValueError, naming the argument, for what cannot be.
    """
    if not isinstance(depth, int) or depth not in _IMAGENET:
        raise ValueError(f"depth: expected one of {', '.join(map(str, _IMAGENET))}, got {depth!r}")
    return ResidualNetwork(*_IMAGENET[depth], **kwargs)


def cifar_resnet(
    depth: int, *, block: str = "basic", width: int = 16, num_classes: int = 10, **kwargs
) -> ResidualNetwork:
    """A residual network for small images (arXiv 1512.03385, section 4.2; 1603.05027), or its plain twin.

    A 3x3 convolution and three stages of n blocks with width, 2 width and 4 width planes. depth: 6n + 2 with block =
    "basic", 9n + 2 with "bottleneck", whose results have four times as many channels. kwargs go to ResidualNetwork:
    activation, shortcut (the paper has "zero_pad" here; the default is "projection"), residual, in_channels, ...
    x: [N, in_channels, H, W] -> logits [N, num_classes]. Raises ValueError, naming the argument, for what cannot be.
    """
    if not isinstance(block, str) or block not in _CONVOLUTIONS:
        raise ValueError(f"block: expected 'basic' or 'bottleneck', got {block!r}")
    step = 3 * _CONVOLUTIONS[block]
    if not isinstance(depth, int) or depth < step + 2 or (depth - 2) % step:
        near = (depth - 2) // step if isinstance(depth, int) else 1
        examples = " or ".join(str(step * max(n, 1) + 2) for n in sorted({max(near, 1), max(near, 1) + 1}))
        raise ValueError(f"depth: three stages of n {block} blocks have {step}n + 2 layers ({examples}), got {depth!r}")
    layers = 3 * [(depth - 2) // step]
    return ResidualNetwork(block, layers, stem="cifar", width=width, num_classes=num_classes, **kwargs)


def _named(name: str, about: str, builder: Callable[..., ResidualNetwork], *args, **fixed) -> Callable:
    def build(*, weights: None = None, progress: bool = True, **kwargs) -> ResidualNetwork:
        if weights is not None:
            raise ValueError(f"weights: nobody has published any for {name}: expected None, got {weights!r}")
        return builder(*args, **fixed, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{about}

    weights: None; progress has no meaning then: the signature is torchvision's. kwargs: as for {builder.__name__}.
    """
    return build


def _preact(depth: int) -> Callable:
    about = f"The pre-activation network of {depth} layers for large images (arXiv 1603.05027)."
    return _named(f"preact_resnet{depth}", about, imagenet_resnet, depth, activation="pre")


def _plain(depth: int) -> Callable:
    about = f"The plain network of {depth} layers for large images (arXiv 1512.03385, figure 3): no shortcuts."
    return _named(f"plain{depth}", about, imagenet_resnet, depth, residual=False)


def _cifar(depth: int, block: str = "basic") -> Callable:
    name = {"basic": "cifar_resnet", "bottleneck": "cifar_bottleneck"}[block]
    about = f"The network of {depth} layers, of {block} blocks, for small images (arXiv 1512.03385; 1603.05027)."
    return _named(f"{name}{depth}", about, cifar_resnet, depth, block=block)


plain18 = _plain(18)
plain34 = _plain(34)
preact_resnet18 = _preact(18)
preact_resnet34 = _preact(34)
preact_resnet50 = _preact(50)
preact_resnet101 = _preact(101)
preact_resnet152 = _preact(152)
preact_resnet200 = _preact(200)
cifar_resnet8 = _cifar(8)
cifar_resnet20 = _cifar(20)
cifar_resnet32 = _cifar(32)
cifar_resnet44 = _cifar(44)
cifar_resnet56 = _cifar(56)
cifar_resnet110 = _cifar(110)
cifar_resnet1202 = _cifar(1202)
cifar_bottleneck47 = _cifar(47, "bottleneck")
cifar_bottleneck56 = _cifar(56, "bottleneck")
cifar_bottleneck164 = _cifar(164, "bottleneck")
cifar_bottleneck1001 = _cifar(1001, "bottleneck")
cifar_resnet50_4stage = _named(
    "cifar_resnet50_4stage",
    "ResNet-50 (stages of 3, 4, 6, 3 bottlenecks) for small images: a 3x3 stem, no pool. In no paper of He et al.",
    ResidualNetwork,
    "bottleneck",
    (3, 4, 6, 3),
    stem="cifar",
    num_classes=10,
)
