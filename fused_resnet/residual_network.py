"""ResidualNetwork: any member of the family, from its blocks up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.resnet import conv1x1

from .blocks import (
    FusedBasicBlock,
    FusedBottleneck,
    PlainBasicBlock,
    PlainBottleneck,
    conv_bn,
    parts_unfusable,
    recorded,
)
from .functional import batch_norm_act
from .preact import FusedPreActBasicBlock, FusedPreActBottleneck, PlainPreActBasicBlock, PlainPreActBottleneck
from .shortcuts import ZeroPad
from .stem import pooled_stem

BLOCKS = {  # residual, plain
    ("basic", "post"): (FusedBasicBlock, PlainBasicBlock),
    ("bottleneck", "post"): (FusedBottleneck, PlainBottleneck),
    ("basic", "pre"): (FusedPreActBasicBlock, PlainPreActBasicBlock),
    ("bottleneck", "pre"): (FusedPreActBottleneck, PlainPreActBottleneck),
}
SHORTCUTS = ("projection", "zero_pad", "projection_all", "identity")


class ResidualNetwork(nn.Module):
    """A residual network, or its plain twin, of the shape that He et al. gave it (arXiv 1512.03385, 1603.05027).

    block: "basic" or "bottleneck". layers: blocks of each stage; a stage after the first halves the maps and doubles
    the planes. activation: "post", the ReLU after the add (2015), or "pre", BN and ReLU before each convolution and
    nothing after the add (2016).

    shortcut: where a block changes channels or size,
        "projection" has a 1x1 convolution, with a BN after it in post-activation blocks (the paper's option B),
        "zero_pad" every stride-th pixel and zeros for the new channels (option A: no parameters),
        "projection_all" a projection, and in all other blocks as well (option C),
        "identity" nothing, which cannot be built for such a block and raises ValueError.
    residual: False builds the plain twin: the same layers, no add and no shortcut.

    stem: "imagenet" is a 7x7 convolution of stride 2 and a 3x3 max pool of stride 2, "cifar" a 3x3 convolution.
    width: planes of the first stage, and of the stem. in_channels: of the images. num_classes: logits.
    groups, width_per_group, replace_stride_with_dilation, zero_init_residual, norm_layer: torchvision's. In
    pre-activation blocks zero_init_residual zeroes the last convolution, there being no batch norm after it.

    Modules are named as torchvision's: conv1, bn1, relu, maxpool, layer1, ..., avgpool, fc; with the defaults it has
    torchvision's state_dict, and for the same state_dict its values. In pre-activation networks bn1 and relu come after
    the last stage, and the first block's shortcut carries relu(bn1(x)): its activation is adopted before the paths part
    (1603.05027, appendix).

    From one seed, networks that differ in shortcut and residual alone begin with the same weights in every layer that
    they share.

    x: [N, in_channels, H, W] -> logits [N, num_classes]. Raises ValueError, naming the argument, for what cannot be.
    """

    fused = True  # whether stem and last batch norm are; `restore_blocks` and `swap_blocks` set it

    def __init__(
        self,
        block: str,
        layers: Sequence[int],
        *,
        activation: str = "post",
        shortcut: str = "projection",
        residual: bool = True,
        stem: str = "imagenet",
        width: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        zero_init_residual: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("in_channels", in_channels), ("num_classes", num_classes)):
            _check_count(name, value)
        if not isinstance(layers, Sequence) or not layers:
            raise ValueError(f"layers: expected the number of blocks of each stage, got {layers!r}")
        for count in layers:
            _check_count("layers", count)
        if not residual and zero_init_residual:
            raise ValueError("zero_init_residual: a plain network would compute zeros alone; expected residual=True")
        _check_one_of("block", block, ("basic", "bottleneck"))
        _check_one_of("activation", activation, ("post", "pre"))
        _check_one_of("shortcut", shortcut, SHORTCUTS)
        _check_one_of("stem", stem, ("imagenet", "cifar"))
        dilated = replace_stride_with_dilation or [False] * (len(layers) - 1)
        if not isinstance(dilated, Sequence) or len(dilated) != len(layers) - 1:
            raise ValueError(
                f"replace_stride_with_dilation: expected {len(layers) - 1} values, one for each stage but the first, "
                f"got {replace_stride_with_dilation}"
            )
        if block == "basic" and (any(dilated) or groups != 1 or width_per_group != 64):
            raise ValueError(
                "replace_stride_with_dilation, groups, width_per_group: basic blocks have neither dilation nor groups"
            )
        design = _Design(
            BLOCKS[block, activation][not residual],
            activation == "pre",
            shortcut if residual else None,
            norm_layer or nn.BatchNorm2d,
            {"groups": groups, "base_width": width_per_group},
        )
        # What constructors draw for parameters depends on the shortcuts; it is thrown away and drawn again in order.
        device = torch.get_default_device()
        accelerated = device.type not in ("cpu", "meta")
        forked = {"devices": [device], "device_type": device.type} if accelerated else {"devices": []}
        with torch.random.fork_rng(**forked):
            self._build(design, layers, dilated, stem, width, in_channels, num_classes)
        self._initialise(design, zero_init_residual)

    def _build(self, design: _Design, layers, dilated, stem, width, in_channels, num_classes) -> None:
        large = stem == "imagenet"
        kernel, stride = (7, 2) if large else (3, 1)
        expansion = design.block.expansion
        self.pre, self.stages = design.pre, len(layers)
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = design.norm_layer(width * expansion * 2 ** (len(layers) - 1) if self.pre else width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        inplanes, dilation = width, 1
        for i, count in enumerate(layers):
            planes, stride = width * 2**i, 1 if i == 0 else 2
            before = dilation
            if i and dilated[i - 1]:
                dilation, stride = dilation * stride, 1
            blocks = []
            for j in range(count):
                places = (stride, before) if j == 0 else (1, dilation)
                blocks.append(design.make(inplanes, planes, *places, entry=i == j == 0))
                inplanes = planes * expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)

    def _initialise(self, design: _Design, zero_init_residual: bool) -> None:
        convolutions = [(name, m) for name, m in self.named_modules() if isinstance(m, nn.Conv2d)]
        for shortcuts in (False, True):
            for name, conv in convolutions:
                if (".downsample." in name) == shortcuts:
                    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if not shortcuts:
                self.fc.reset_parameters()
        for block in self.modules() if zero_init_residual else ():
            if isinstance(block, design.block):
                last = "conv" if self.pre else "bn"
                nn.init.zeros_(getattr(block, f"{last}{3 if hasattr(block, 'conv3') else 2}").weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x)) if self.pre else self._stem(x)
        for i in range(1, self.stages + 1):
            x = getattr(self, f"layer{i}")(x)
        if self.pre:
            x = self._last(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def _stem(self, x: Tensor) -> Tensor:
        if self.fused and (pooled := pooled_stem(self, x)) is not None:
            return pooled
        if not self.fused or parts_unfusable(self, ("conv1",), ("bn1",)) is not None or recorded(x):
            return self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.maxpool(conv_bn(x, self.conv1, self.bn1))

    def _last(self, x: Tensor) -> Tensor:
        if not self.fused or parts_unfusable(self, (), ("bn1",)) is not None or recorded(x):
            return self.relu(self.bn1(x))
        return batch_norm_act(x, self.bn1)


@dataclass(frozen=True)
class _Design:
    """How the blocks of a network are made. shortcut: None for a plain one."""

    block: type[nn.Module]
    pre: bool
    shortcut: str | None
    norm_layer: Callable[..., nn.Module]
    sizes: dict[str, int]

    def make(self, inplanes: int, planes: int, stride: int, dilation: int, entry: bool) -> nn.Module:
        """A block; entry: the network's first."""
        downsample = self._downsample(inplanes, planes * self.block.expansion, stride, entry)
        return self.block(
            inplanes, planes, stride, downsample, dilation=dilation, norm_layer=self.norm_layer, **self.sizes
        )

    def _downsample(self, inplanes: int, outplanes: int, stride: int, entry: bool) -> nn.Module | None:
        if self.shortcut is None:
            return None
        changes = stride != 1 or inplanes != outplanes
        if self.shortcut == "projection_all" or (changes and self.shortcut == "projection"):
            projection = conv1x1(inplanes, outplanes, stride)
            return nn.Sequential(projection) if self.pre else nn.Sequential(projection, self.norm_layer(outplanes))
        if not changes:
            return nn.Identity() if self.pre and entry else None
        if self.shortcut == "zero_pad":
            return ZeroPad(inplanes, outplanes, stride)
        size = "H, W" if stride == 1 else f"H/{stride}, W/{stride}"
        raise ValueError(
            f"shortcut: 'identity' cannot add x [N, {inplanes}, H, W] to a branch of [N, {outplanes}, {size}]; "
            "expected 'projection' or 'zero_pad' for a network whose blocks change channels or size"
        )


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")


def _check_one_of(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
