"""FusedPreActBasicBlock and FusedPreActBottleneck: batch norm and ReLU before every convolution, the add at the end.

He et al., "Identity Mappings in Deep Residual Networks", arXiv 1603.05027, figure 4 (e): nothing but the add stands on
the path from a block to the next. torchvision has no such block; attributes, constructor and state_dict keys are those
of its post-activation ones, with each batch norm in front of the convolution of its number. The projection is a
convolution alone, of relu(bn1(x)) like conv1, as in the authors' code; so are the other things that may stand in
`downsample`, ZeroPad and Identity (the network's first block, where no add stands before the batch norm). After the
last block a network needs one more batch norm and ReLU.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torchvision.models.resnet import conv1x1, conv3x3

from . import one_node, training
from .backends.layout import conv_output_size
from .blocks import conv_bn, convolution_unfusable, part, parts_unfusable, recorded, summed, tampered
from .functional import batch_norm_act, conv_bn_act, on_own_batch
from .ops import check_shortcut
from .shortcuts import Plain, ZeroPad


class Shortcut(NamedTuple):
    """What a pre-activation block adds: its input, or relu(bn1(input)), led through modules one after another.

    projection: the convolution that is all of these, where it is. activated: whether relu(bn1(x)) goes in. late:
    whether the modules are called when the last convolution has been, and not as soon as their input is there. absent:
    whether nothing is added.
    """

    modules: tuple[nn.Module, ...] = ()
    projection: nn.Conv2d | None = None
    activated: bool = False
    late: bool = False
    absent: bool = False

    def __call__(self, x: Tensor) -> Tensor | None:
        return None if self.absent else _through(self.modules, x)

    def trained(self, x: Tensor, norm: training.Norm) -> Tensor | None:
        """What is added, of relu(norm(x)); norm is NOTHING where modules have to be called."""
        return self(x) if self.projection is None else training.convolved(x, norm, self.projection)


class PreAct:
    """What fused pre-activation blocks share: pairs of a batch norm, with a ReLU behind it, and a convolution.

    Its names are few: the class behind it may be anybody's. _anatomy: which modules the block computes with, and how;
    like the class NamedPreAct.
    """

    memory = "default"
    _anatomy: type[NamedPreAct]

    def forward(self, x: Tensor) -> Tensor:
        if unfusable(self) is not None or recorded(x):
            return self._unfused(x)
        anatomy = self._anatomy
        pairs = _pairs(self)
        if all(on_own_batch(bn) for bn, _ in pairs):
            return _trained(x, self, pairs)
        side, tail = anatomy.side(self), anatomy.tail(self)
        before, between = anatomy.before(self), anatomy.between(self)
        (bn, conv), *rest = pairs
        shortcut = None if side.activated or side.late else side(x)
        out = batch_norm_act(x, bn)
        begun = out if side.activated else x
        if side.activated and not side.late:
            shortcut = side(begun)
        for i, (bn, following) in enumerate(rest):
            out = _through(between[i], out)
            if before[i]:
                out = batch_norm_act(_through(before[i], _convolved(out, conv)), bn)
            else:
                out = conv_bn(out, conv, bn)
            conv = following
        out = _through(between[-1], out)
        if not (tail or side.late) and (shortcut is None or _joins(shortcut, out, conv, anatomy.apart)):
            return _convolved(out, conv, shortcut)
        out = _through(tail, _convolved(out, conv))
        return _added(side(begun) if side.late else shortcut, out, anatomy)

    def _unfused(self, x: Tensor) -> Tensor:
        return super().forward(x)


class NamedPreAct(PreAct):
    """Fused pre-activation blocks whose parts are found by attributes of known names.

    in_place: whether the sum has the dtype of what the shortcut is added to.
    apart: whether the add is PyTorch's, which broadcasts. The static methods say where a block's parts are; the block
    may be a fused one, or one that may become one.
    """

    in_place = False
    apart = False

    @property
    def _anatomy(self) -> type[NamedPreAct]:
        return type(self)

    @staticmethod
    def parts(block: nn.Module) -> tuple[list[str], list[str], list[str]]:
        """The names of its convolutions, of its batch norms in front of them, and of its ReLUs."""
        return *numbered(block, "conv", "bn"), ["relu"]

    @staticmethod
    def obstacle(block: nn.Module) -> str | None:
        """Why a block cannot be fused for what it has beside its pairs."""
        return None

    @classmethod
    def before(cls, block: nn.Module) -> list[list[nn.Module]]:
        """Modules that stand in front of the second batch norm, of the next, and so on."""
        return [[]] * (len(cls.parts(block)[0]) - 1)

    @classmethod
    def between(cls, block: nn.Module) -> list[list[nn.Module]]:
        """Modules that stand between the first ReLU and its convolution, the next, and so on."""
        return [[]] * len(cls.parts(block)[0])

    @staticmethod
    def tail(block: nn.Module) -> list[nn.Module]:
        """Modules that stand between the last convolution and the add."""
        return []

    @staticmethod
    def side(block: nn.Module) -> Shortcut:
        """What is added."""
        raise NotImplementedError


def _through(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _pairs(block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    convolutions, norms, _ = block._anatomy.parts(block)
    return [(part(block, bn), part(block, conv)) for bn, conv in zip(norms, convolutions, strict=True)]


def _joins(shortcut: Tensor, x: Tensor, conv: nn.Conv2d, apart: bool) -> bool:
    """Whether this shortcut may be added where conv(x) is computed."""
    if isinstance(x, fx.Proxy):
        return not apart
    if shortcut.dtype is not x.dtype:
        return False
    places = conv.stride, conv.padding, conv.dilation
    return not apart or list(shortcut.shape) == conv_output_size(x, conv.weight, *places)


def _trained(x: Tensor, block: nn.Module, pairs: list[tuple[nn.Module, nn.Module]]) -> Tensor:
    training.check_memory(block.memory)
    # Decided once: by the time a lean block runs again, modes and hooks may be others.
    anatomy = block._anatomy
    before, between, tail, side = (
        find(block) for find in (anatomy.before, anatomy.between, anatomy.tail, anatomy.side)
    )

    def run(x: Tensor, statistics: training.Statistics) -> Tensor:
        (bn, conv), *rest = pairs
        begun = x, training.NOTHING
        shortcut = None if side.activated or side.late else side.trained(*begun)
        out, norm = x, statistics.of(x, bn)
        if side.activated:
            if side.projection is None:  # what stands there wants relu(bn1(x)): there it is
                out, norm = training.activated(x, norm), training.NOTHING
            begun = out, norm
            shortcut = None if side.late else side.trained(*begun)
        for i, (bn, following) in enumerate(rest):
            if between[i]:
                out, norm = _through(between[i], training.activated(out, norm)), training.NOTHING
            if before[i]:
                out = _through(before[i], training.convolved(out, norm, conv))
                norm = statistics.of(out, bn)
            else:
                out, norm = training.convolve(out, norm, conv, bn, statistics)
            conv = following
        if between[-1]:
            out, norm = _through(between[-1], training.activated(out, norm)), training.NOTHING
        out = _through(tail, training.convolved(out, norm, conv))
        return _added(side.trained(*begun) if side.late else shortcut, out, anatomy)

    lean = block.memory == "lean" and runs_once(block) is None
    if side.projection is not None or not side.modules:
        if isinstance(x, Tensor) and not (tail or any(before) or any(between) or _widens(x, side)):
            modules = [m for pair in pairs for m in pair] + ([] if side.projection is None else [side.projection])
            chain = _CHAINS[side.activated, side.projection is not None, side.absent, anatomy.apart, anatomy.in_place]
            y = one_node.run(block, chain, training.Statistics, x, modules, lean)
            if y is not None:
                return y
    return training.lean(run, x, block) if lean else run(x, training.Statistics())


class _Sum(NamedTuple):
    """How a sum is made, of NamedPreAct's attributes."""

    apart: bool
    in_place: bool


def _chain(
    x: Tensor, statistics, modules: list, *, activated: bool, projected: bool, absent: bool, sum: _Sum
) -> Tensor:
    """What `_trained` computes of a block that has no modules to be called. modules: batch norms and convolutions in
    turns, the projection last."""
    norms, convolutions = modules[: len(modules) - projected : 2], modules[1::2]
    out, norm = x, statistics.of(x, norms[0])
    if activated and not projected:
        out, norm = training.activated(x, norm), training.NOTHING
    begun = (out, norm) if activated else (x, training.NOTHING)
    shortcut = training.convolved(*begun, modules[-1]) if projected else begun[0]
    for conv, bn in zip(convolutions[:-1], norms[1:], strict=True):
        out, norm = training.convolve(out, norm, conv, bn, statistics)
    out = training.convolved(out, norm, convolutions[-1])
    return out if absent else _added(shortcut, out, sum)


_CHAINS = {
    flags: functools.partial(_chain, activated=flags[0], projected=flags[1], absent=flags[2], sum=_Sum(*flags[3:]))
    for flags in itertools.product((False, True), repeat=5)
}


def _widens(x: Tensor, side: Shortcut) -> bool:
    """Whether the sum may have another dtype than the convolutions' results: under autocast x itself does."""
    dtype = one_node.autocast_dtype(x)
    return side.projection is None and not side.activated and dtype is not None and x.dtype is not dtype


def _added(shortcut: Tensor | None, out: Tensor, anatomy) -> Tensor:
    if shortcut is None:
        return out
    if not (anatomy.apart or isinstance(out, fx.Proxy)):
        check_shortcut(shortcut, out.shape)  # the add would broadcast
    return summed(out, shortcut, anatomy.in_place)


def _convolved(x: Tensor, conv: nn.Conv2d, residual: Tensor | None = None) -> Tensor:
    norm = ()
    if conv.bias is not None:
        nothing = torch.zeros_like(conv.bias, requires_grad=False)
        norm = (None, conv.bias, nothing, nothing + 1, 0.0)
    places = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
    return conv_bn_act(x, conv.weight, *norm, residual=residual, relu=False, **places)


# --- what may be fused: asked at every forward, since hooks come and go -----------------------------------------------


def numbered(block: nn.Module, *kinds: str) -> list[list[str]]:
    """The names of a block's modules that begin with each of these."""
    return [[name for name in block._modules if name.startswith(kind)] for kind in kinds]


def unfusable(block: nn.Module, anatomy: type[NamedPreAct] | None = None) -> str | None:
    """Why a block must run its own forward, or None if its batch norms, ReLUs and convolutions may be fused.

    anatomy: that of the fused block that it is asked for, if it is none yet.
    """
    anatomy = anatomy or block._anatomy
    reason = anatomy.obstacle(block)
    return reason or parts_unfusable(block, *anatomy.parts(block))


def not_lean(block: nn.Module) -> str | None:
    """Why a fused block whose memory is "lean" keeps what others keep; None if it does not."""
    if not all(on_own_batch(bn) for bn, _ in _pairs(block)):
        return "a batch norm is frozen or synchronised"
    return runs_once(block)


def runs_once(block: nn.Module) -> str | None:
    """What in a block may not be computed again in the backward: no module may run twice."""
    anatomy = block._anatomy
    places = {
        "a batch norm": sum(anatomy.before(block), []),
        "a convolution": sum(anatomy.between(block), []),
        "the add": anatomy.tail(block),
    }
    for place, modules in places.items():
        if modules:
            return f"{', '.join(type(module).__name__ for module in modules)} in front of {place}"
    kind = called(anatomy.side(block))
    return kind and f"shortcut: {kind} is called as it is"


def called(side: Shortcut) -> str | None:
    """The class of what has to be called on a shortcut, if anything has."""
    if side.projection is not None:
        return None
    modules = (m for m in side.modules if type(m) not in (ZeroPad, nn.Identity) or tampered(m))
    return next((type(m).__name__ for m in modules), None)


class _Own(NamedPreAct, nn.Module):
    """This package's own blocks."""

    residual = True

    @staticmethod
    def obstacle(block: nn.Module) -> str | None:
        return None if block.downsample is None else _downsample_unfusable(block.downsample)

    @staticmethod
    def side(block: nn.Module) -> Shortcut:
        own = block.downsample
        if own is None:
            return Shortcut(absent=not block.residual)
        return Shortcut((own,), own[0] if isinstance(own, nn.Sequential) else None, activated=True)

    def _unfused(self, x: Tensor) -> Tensor:
        (bn, conv), *rest = _pairs(self)
        out, side = self.relu(bn(x)), self.side(self)
        shortcut = side(out if side.activated else x)
        for bn, following in rest:
            out = self.relu(bn(conv(out)))
            conv = following
        return _added(shortcut, conv(out), self._anatomy)


class FusedPreActBasicBlock(_Own):
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


class FusedPreActBottleneck(_Own):
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


def _downsample_unfusable(downsample: nn.Module) -> str | None:
    if type(downsample) in (ZeroPad, nn.Identity):
        reason = tampered(downsample)
    elif type(downsample) is not nn.Sequential or len(downsample) != 1:
        reason = f"{type(downsample).__name__} is not Sequential(Conv2d)"
    else:
        reason = tampered(downsample) or convolution_unfusable(downsample[0])
    return reason and f"downsample: {reason}"
