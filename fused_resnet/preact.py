"""FusedPreActBasicBlock and FusedPreActBottleneck: batch norm and ReLU before every convolution, the add at the end.

He et al., "Identity Mappings in Deep Residual Networks", arXiv 1603.05027, figure 4 (e): nothing but the add stands on
the path from a block to the next. torchvision has no such block; attributes, constructor and state_dict keys are those
of its post-activation ones, with each batch norm in front of the convolution of its number. The projection is a
convolution alone, of relu(bn1(x)) like conv1, as in the authors' code; so are the other things that may stand in
`downsample`, ZeroPad and Identity (the network's first block, where no add stands before the batch norm). After the
last block a network needs one more batch norm and ReLU.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx, nn
from torchvision.models.resnet import conv1x1, conv3x3

from . import training
from .blocks import conv_bn, convolution_unfusable, part, parts_unfusable, recorded, tampered
from .functional import batch_norm_act, conv_bn_act, on_own_batch
from .ops import check_shortcut
from .shortcuts import Plain, ZeroPad


class PreAct(nn.Module):
    """What pre-activation blocks share: pairs (batch norm, convolution), each batch norm with a ReLU behind it, and a
    shortcut. The static methods say where these are in a block of this kind, or in one that may become one."""

    memory = "default"
    residual = True

    @staticmethod
    def parts(block: nn.Module) -> tuple[list[str], list[str], list[str]]:
        """The names of its convolutions, of its batch norms in front of them, and of its ReLUs."""
        return *numbered(block, "conv", "bn"), ["relu"]

    @staticmethod
    def projection(block: nn.Module) -> nn.Module | None:
        """The convolution that is all of its shortcut, where it is one."""
        return block.downsample[0] if isinstance(block.downsample, nn.Sequential) else None

    @staticmethod
    def obstacle(block: nn.Module) -> str | None:
        """Why a block cannot be fused for what it has beside its pairs."""
        return None if block.downsample is None else _projection_unfusable(block.downsample)

    @staticmethod
    def tail(block: nn.Module) -> list[nn.Module]:
        """Modules that stand between the last convolution and the add."""
        return []

    @staticmethod
    def runs_once(block: nn.Module) -> str | None:
        """What in a block may not be computed again in the backward."""
        return None

    def _pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        convolutions, norms, _ = self.parts(self)
        return [(part(self, bn), part(self, conv)) for bn, conv in zip(norms, convolutions, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        if self.unfusable() is not None or recorded(x):
            return self._unfused(x)
        pairs = self._pairs()
        if all(on_own_batch(bn) for bn, _ in pairs):
            return self._trained(x, pairs)
        (bn, conv), *rest = pairs
        out = batch_norm_act(x, bn)
        shortcut = self._shortcut(x, out)
        for bn, following in rest:
            out = conv_bn(out, conv, bn)
            conv = following
        return self._ended(out, conv, shortcut)

    def _ended(self, out: Tensor, conv: nn.Conv2d, shortcut: Tensor | None) -> Tensor:
        """The last convolution and the add, where no batch norm uses the batch's statistics."""
        return convolved(out, conv, shortcut)

    def _shortcut(self, x: Tensor, activated: Tensor) -> Tensor | None:
        if not self.residual:
            return None
        return x if self.downsample is None else self.downsample(activated)

    def _trained(self, x: Tensor, pairs) -> Tensor:
        training.check_memory(self.memory)
        # Decided once: by the time a lean block runs again, modes and hooks may be others.
        tail, projection = self.tail(self), self.projection(self)

        def run(x: Tensor, statistics: training.Statistics) -> Tensor:
            (bn, conv), *rest = pairs
            out, norm = x, statistics.of(x, bn)
            if projection is not None:
                shortcut = training.convolved(x, norm, projection)
            else:
                if self.downsample is not None:  # it wants relu(bn1(x)): there it is
                    out, norm = training.activated(x, norm), training.NOTHING
                shortcut = self._shortcut(x, out)
            for bn, following in rest:
                out, norm = training.convolve(out, norm, conv, bn, statistics)
                conv = following
            out = training.convolved(out, norm, conv)
            for module in tail:
                out = module(out)
            return _added(shortcut, out)

        lean = self.memory == "lean" and self.runs_once(self) is None
        return training.lean(run, x, self) if lean else run(x, training.Statistics())

    def _unfused(self, x: Tensor) -> Tensor:
        (bn, conv), *rest = self._pairs()
        out = self.relu(bn(x))
        shortcut = self._shortcut(x, out)
        for bn, following in rest:
            out = self.relu(bn(conv(out)))
            conv = following
        return _added(shortcut, conv(out))

    def not_lean(self) -> str | None:
        """Why a block whose memory is "lean" keeps what others keep; None if it does not."""
        if reason := self.unfusable():
            return reason
        if not all(on_own_batch(bn) for bn, _ in self._pairs()):
            return "a batch norm is frozen or synchronised"
        return self.runs_once(self)

    def unfusable(self) -> str | None:
        """Why the block runs its modules one by one, or None if it is fused."""
        return preact_unfusable(self, type(self))


def numbered(block: nn.Module, *kinds: str) -> list[list[str]]:
    """The names of a block's modules that begin with each of these."""
    return [[name for name in block._modules if name.startswith(kind)] for kind in kinds]


def preact_unfusable(block: nn.Module, kind: type[PreAct]) -> str | None:
    """Why this block cannot be fused as one of this kind, or None."""
    convolutions, norms, activations = kind.parts(block)
    reason = parts_unfusable(block, convolutions, norms, activations)
    reason = reason or next((f"{name}: has a bias" for name in convolutions if _has_bias(part(block, name))), None)
    return reason or kind.obstacle(block)


class FusedPreActBasicBlock(PreAct):
    """BN, ReLU, 3x3, BN, ReLU, 3x3, add (He et al., arXiv 1603.05027), fused.

    inplanes, planes: channels in and out. stride: of the first convolution. downsample: None, or
    nn.Sequential(1x1 convolution) to `planes` channels with that stride, applied to relu(bn1(x)); needed where channels
    or stride change. norm_layer: a class like nn.BatchNorm2d, the default. groups, base_width, dilation: as
    torchvision's BasicBlock, 1, 64 and 1 only. memory, an attribute: as FusedBasicBlock's.
    forward: x [N, inplanes, H, W] -> [N, planes, H/stride, W/stride], any float dtype.

    Raises ValueError for other groups or base_width, NotImplementedError for a dilation, as torchvision's.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError("groups, base_width: FusedPreActBasicBlock only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError("dilation: FusedPreActBasicBlock only supports dilation=1")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU()  # in place it would change x where a norm returns its input
        self.downsample = downsample
        self.stride = stride


class FusedPreActBottleneck(PreAct):
    """BN, ReLU, 1x1, BN, ReLU, 3x3 with the stride, BN, ReLU, 1x1, add (He et al., arXiv 1603.05027), fused.

    inplanes: channels in; 4 * planes come out. stride: of the 3x3 convolution. downsample: None, or
    nn.Sequential(1x1 convolution) to 4 * planes channels with that stride, applied to relu(bn1(x)); needed where
    channels or stride change. groups, base_width, dilation, norm_layer: as torchvision's Bottleneck. memory, an
    attribute: as FusedBottleneck's.
    forward: x [N, inplanes, H, W] -> [N, 4 * planes, H/stride, W/stride], any float dtype.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv1x1(inplanes, width)
        self.bn2 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn3 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.relu = nn.ReLU()  # in place it would change x where a norm returns its input
        self.downsample = downsample
        self.stride = stride


class PlainPreActBasicBlock(Plain, FusedPreActBasicBlock):
    """FusedPreActBasicBlock without its shortcut: BN-ReLU-conv twice."""


class PlainPreActBottleneck(Plain, FusedPreActBottleneck):
    """FusedPreActBottleneck without its shortcut: BN-ReLU-conv thrice."""


def _projection_unfusable(downsample: nn.Module) -> str | None:
    if type(downsample) in (ZeroPad, nn.Identity):
        reason = tampered(downsample)
        return reason and f"downsample: {reason}"
    if type(downsample) is not nn.Sequential or len(downsample) != 1:
        return f"downsample: {type(downsample).__name__} is not Sequential(Conv2d)"
    reason = tampered(downsample) or convolution_unfusable(downsample[0])
    if reason is None and _has_bias(downsample[0]):
        reason = "has a bias"
    return reason and f"downsample: {reason}"


def _has_bias(conv: nn.Conv2d) -> bool:
    return conv.bias is not None


def _added(shortcut: Tensor | None, out: Tensor) -> Tensor:
    if shortcut is None:
        return out
    if not isinstance(out, fx.Proxy):
        check_shortcut(shortcut, out.shape)  # the add would broadcast
    return shortcut + out


def convolved(x: Tensor, conv: nn.Conv2d, residual: Tensor | None) -> Tensor:
    places = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
    return conv_bn_act(x, conv.weight, residual=residual, relu=False, **places)
