"""FusedBasicBlock and FusedBottleneck: torchvision's residual blocks, every conv-BN-ReLU and the shortcut add fused.

They are subclasses that replace `forward` alone: constructor, parameters and state_dict are torchvision's. Each BN
decides for itself whether it is frozen (running statistics, folded into the convolution) or uses the batch's. What the
fused path cannot honour (hooks, parametrizations, foreign norm layers) runs through torchvision's own forward.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import avg_pool2d
from torch.nn.modules import module as _module
from torchvision.models.feature_extraction import NodePathTracer
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from . import one_node, ops, training
from .folding import scale_shift
from .frozen import eps_of, is_frozen
from .functional import batch_norm_act, conv_bn_act, on_own_batch, uses_batch_statistics
from .shortcuts import Plain, ZeroPad

NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d, nn.SyncBatchNorm)
# Classes of other libraries.
ACTIVATED: set[type[nn.Module]] = set()  # batch norms with modules drop and act behind them
NORMED: set[type[nn.Module]] = set()  # convolutions with modules norm and activation behind them
POOLS = (nn.Identity, nn.AvgPool2d)


class Fused:
    """What fused blocks share; the class of the library's block stands behind it, with the forward that is not fused.

    Its names are few: the class behind it may be anybody's. _anatomy: which modules the block computes with, and how;
    like the class Named.
    """

    memory = "default"
    _anatomy: type[Named]

    def forward(self, x: Tensor) -> Tensor:
        if unfusable(self) is not None or recorded(x):
            return self._unfused(x)
        anatomy = self._anatomy
        *first, conv, bn = (part(self, name) for name in anatomy.parts)
        tail = anatomy.tail(self)
        between = anatomy.between(self)
        if all(map(on_own_batch, (*first[1::2], bn))):
            return _trained(x, self, first, conv, bn, between, tail)
        out = x
        for i in range(0, len(first), 2):
            out = conv_bn(out, first[i], first[i + 1])
            for module in between[i // 2]:
                out = module(out)
        if not tail and not anatomy.apart:
            return conv_bn(out, conv, bn, _shortcut(x, self, out))
        return _joined(conv_bn(out, conv, bn, relu=False), self, tail, lambda: _shortcut(x, self, out))

    def _unfused(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Derived:
    """A module of a class that was derived from its own when it was needed. _again: a function and its arguments that
    give one without state, for copies and pickles."""

    _original: type[nn.Module]
    _again: tuple[Callable, tuple]

    def __reduce_ex__(self, protocol):
        build, args, *rest = super().__reduce_ex__(protocol)
        own = build in (copyreg.__newobj__, copyreg._reconstructor) and "_original" in vars(type(self))
        return (*self._again, *rest) if own else (build, args, *rest)  # FSDP makes subclasses


class Named(Fused):
    """Fused blocks whose parts are attributes of known names.

    parts: the convolutions and batch norms, in the order of their calls. joined: whether those convolutions call those
    batch norms. activations: the ReLUs. residual: whether there is a shortcut. in_place: whether the sum has the dtype
    of what the shortcut is added to. apart: whether the add is PyTorch's, which broadcasts.
    """

    parts: tuple[str, ...]
    joined = False
    activations: tuple[str, ...] = ("relu",)
    residual = True
    in_place = True
    apart = False

    @property
    def _anatomy(self) -> type[Named]:
        return type(self)

    @staticmethod
    def obstacle(block: nn.Module) -> str | None:
        """Why a block of this kind, fused or not yet, cannot be fused for what it has beside its parts and ReLUs."""
        return None

    @staticmethod
    def between(block: nn.Module) -> list[list[nn.Module]]:
        """Modules that stand behind each ReLU but the last, in front of the next convolution."""
        return [[]] * (len(block._anatomy.parts) // 2 - 1)

    @staticmethod
    def tail(block: nn.Module) -> list[nn.Module]:
        """Modules that stand between the last batch norm and the add."""
        return []

    @staticmethod
    def last(block: nn.Module) -> Callable[[Tensor], Tensor]:
        """The ReLU behind the add."""
        return block._modules[block.activations[-1]]

    @staticmethod
    def side(block: nn.Module) -> Side:
        """What stands on the shortcut."""
        return block.downsample


class Joined(tuple):
    """A convolution that calls its module `norm`, and that batch norm."""


Side = nn.Module | tuple[nn.Module, ...] | None
"""A shortcut: None hands the block's input on; a tuple's modules are called one after another, unless Joined."""


class FusedBasicBlock(Named, BasicBlock):
    """torchvision's BasicBlock (two 3x3 convolutions; He et al., arXiv 1512.03385, figure 5 left), fused.

    The constructor's arguments are torchvision's: inplanes, planes, stride=1, downsample=None, groups=1, base_width=64,
    dilation=1, norm_layer=None. forward: x [N, inplanes, H, W] -> [N, planes, H/stride, W/stride], any float dtype.
    memory, an attribute: "lean" keeps only x for the backward and computes the rest again (`swap_blocks` sets it).
    """

    parts = ("conv1", "bn1", "conv2", "bn2")


class FusedBottleneck(Named, Bottleneck):
    """torchvision's Bottleneck (1x1, 3x3 with the stride, 1x1; ResNet V1.5), fused.

    The constructor's arguments are torchvision's: inplanes, planes, stride=1, downsample=None, groups=1, base_width=64,
    dilation=1, norm_layer=None. forward: x [N, inplanes, H, W] -> [N, 4 * planes, H/stride, W/stride], any float dtype.
    memory, an attribute: "lean" keeps only x for the backward and computes the rest again (`swap_blocks` sets it).
    """

    parts = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")


class _Plain(Plain):
    def _unfused(self, x: Tensor) -> Tensor:
        for conv, bn in zip(self.parts[::2], self.parts[1::2], strict=True):
            x = self.relu(self._modules[bn](self._modules[conv](x)))
        return x


class PlainBasicBlock(_Plain, FusedBasicBlock):
    """FusedBasicBlock without its shortcut: conv-BN-ReLU twice. Arguments, but for downsample, and shapes are its."""


class PlainBottleneck(_Plain, FusedBottleneck):
    """FusedBottleneck without its shortcut: conv-BN-ReLU thrice. Arguments, but for downsample, and shapes are its."""


def _trained(
    x: Tensor,
    block: nn.Module,
    first: list[nn.Module],
    conv: nn.Conv2d,
    bn: nn.Module,
    between: list[list[nn.Module]],
    tail: list[nn.Module],
) -> Tensor:
    training.check_memory(block.memory)
    # Decided once: by the time a lean block runs again, modes and hooks may be others.
    anatomy = block._anatomy
    downsample = anatomy.side(block)
    projected = downsample is not None and projection_unfusable(downsample) is None and on_own_batch(downsample[-1])
    *pools, into, after = downsample if projected else (None, None)

    def run(x: Tensor, statistics: training.Statistics) -> Tensor:
        if anatomy.residual:
            # What PyTorch's add hands back is the gradient of its other operand, too.
            added = not tail and not anatomy.apart
            own = len(pools) == 0 if projected else downsample is None and added and first[0].in_channels > 1
            out, norm, x = training.convolve_shared(x, *first[:2], statistics, own)
        else:
            out, norm = training.convolve(x, training.NOTHING, *first[:2], statistics)
        for i, modules in enumerate(between):
            if modules:
                out, norm = training.activated(out, norm), training.NOTHING
            for module in modules:
                out = module(out)
            if 2 * i + 2 < len(first):
                out, norm = training.convolve(out, norm, first[2 * i + 2], first[2 * i + 3], statistics)

        def shortcut() -> Tensor | None:
            if not projected:
                return _shortcut(x, block, out)
            return training.normalised(_pooled(x, pools), training.NOTHING, into, after, None, statistics, relu=False)

        if not tail and not anatomy.apart:
            return training.normalised(out, norm, conv, bn, shortcut(), statistics)
        return _joined(training.normalised(out, norm, conv, bn, None, statistics, relu=False), block, tail, shortcut)

    lean = block.memory == "lean" and not tail and not any(between) and (projected or stateless(downsample))
    simple = projected or (downsample is None and (not anatomy.residual or first[0].in_channels > 1))
    if simple and not (pools or tail or any(between) or anatomy.apart):
        modules = [*first, conv, bn, *((into, after) if projected else ())]
        chain = _PROJECTED if projected else _IDENTITY if anatomy.residual else _ALONE
        y = one_node.run(block, chain, training.Statistics, x, modules, lean)
        if y is not None:
            return y
    return training.lean(run, x, block) if lean else run(x, training.Statistics())


def _chain(x: Tensor, statistics: training.Statistics, modules: list, *, residual: bool, projected: bool) -> Tensor:
    """What `_trained` computes of a block that has no modules to be called. modules: convolutions and batch norms in
    turns, those of the projection last."""
    *first, conv, bn = modules[:-2] if projected else modules
    if residual:
        out, norm, x = training.convolve_shared(x, *first[:2], statistics, True)
    else:
        out, norm = training.convolve(x, training.NOTHING, *first[:2], statistics)
    for i in range(2, len(first), 2):
        out, norm = training.convolve(out, norm, first[i], first[i + 1], statistics)
    shortcut = x if residual else None
    if projected:
        shortcut = training.normalised(x, training.NOTHING, *modules[-2:], None, statistics, relu=False)
    return training.normalised(out, norm, conv, bn, shortcut, statistics)


_PROJECTED = functools.partial(_chain, residual=True, projected=True)
_IDENTITY = functools.partial(_chain, residual=True, projected=False)
_ALONE = functools.partial(_chain, residual=False, projected=False)


def _joined(out: Tensor, block: nn.Module, tail: list[nn.Module], shortcut: Callable[[], Tensor]) -> Tensor:
    """The end of a block by its own modules, in the order of timm's forward; out gives the sum its dtype."""
    for module in tail:
        out = module(out)
    return block._anatomy.last(block)(summed(out, shortcut(), block._anatomy.in_place))


def summed(out: Tensor, shortcut: Tensor, in_place: bool) -> Tensor:
    """out + shortcut. in_place: as if it took the place of out."""
    total = ops.added(out, shortcut)
    if not in_place or isinstance(total, fx.Proxy):
        return total
    if total.shape != out.shape:
        raise RuntimeError(f"output with shape {list(out.shape)} doesn't match the broadcast shape {list(total.shape)}")
    return total.to(out.dtype)


def _pooled(x: Tensor, pools: list[nn.Module]) -> Tensor:
    """x as the convolution of a projection reads it. Not by the modules: a lean block comes here twice."""
    for pool in pools:
        if type(pool) is nn.AvgPool2d:
            sizes = pool.kernel_size, pool.stride, pool.padding
            x = avg_pool2d(x, *sizes, pool.ceil_mode, pool.count_include_pad, pool.divisor_override)
    return x


def not_lean(block: nn.Module) -> str | None:
    """Why a block whose memory is "lean" keeps what others keep; None if it does not: no module may run twice."""
    anatomy = block._anatomy
    for modules, place in ((sum(anatomy.between(block), []), "a convolution"), (anatomy.tail(block), "the add")):
        if modules:
            return f"{', '.join(type(module).__name__ for module in modules)} in front of {place}"
    downsample = anatomy.side(block)
    if stateless(downsample):
        return None
    reason = projection_unfusable(downsample)
    if reason is None and not on_own_batch(downsample[-1]):
        reason = "its batch norm does not use the batch's own statistics"
    return reason and f"downsample: {reason}"


def stateless(downsample: Side) -> bool:
    """Whether this shortcut may be computed again without anybody noticing."""
    return downsample is None or (type(downsample) is ZeroPad and tampered(downsample) is None)


def conv_bn(x: Tensor, conv: nn.Conv2d, bn: nn.Module, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    if uses_batch_statistics(bn):
        y = conv._conv_forward(x, conv.weight, conv.bias)  # not conv(x): some call their norm
        return batch_norm_act(y, bn, residual, relu=relu)
    bias = bn.bias
    if conv.bias is not None:  # a mean that lies as much lower, the gradient of which is wanted
        dtype = torch.promote_types(conv.bias.dtype, torch.float32)
        _, bias = scale_shift(bn.weight, bias, -conv.bias, bn.running_var, eps_of(bn), dtype)
    return conv_bn_act(
        x,
        conv.weight,
        bn.weight,
        bias,
        bn.running_mean,
        bn.running_var,
        eps_of(bn),
        residual,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        relu=relu,
    )


def _shortcut(x: Tensor, block: nn.Module, out: Tensor) -> Tensor | None:
    """What is added to the last convolution's result, whose maps are as large as those of `out`."""
    anatomy = block._anatomy
    if not anatomy.residual:
        return None
    downsample = anatomy.side(block)
    if downsample is None:
        if anatomy.apart:
            return x
        if part(block, anatomy.parts[0]).in_channels > 1:
            return x
        last = part(block, anatomy.parts[-2])
        return x.expand(-1, last.out_channels, -1, -1)  # as torchvision's add broadcasts a single channel
    if projection_unfusable(downsample) is not None:
        # Any module may stand here, a global pool say, and torchvision's add broadcasts maps.
        for module in downsample if isinstance(downsample, tuple) else (downsample,):
            x = module(x)
        if anatomy.apart:
            return x
        return x.expand(out.shape[0], -1, out.shape[2], out.shape[3])
    *pools, conv, bn = downsample
    return conv_bn(_pooled(x, pools), conv, bn, relu=False)


def recorded(x: Tensor) -> bool:
    """Whether torch.fx writes down the path that this call takes.

    Called as modules, BNs can still be switched between training and eval in its graph, and quantized. torchvision's
    feature extractors trace both modes, so they may have the fused path.
    """
    return isinstance(x, fx.Proxy) and not isinstance(x.tracer, NodePathTracer)


# --- what may be fused: asked at every forward, since hooks come and go; convert.py tells the reasons -----------------


def unfusable(block: nn.Module, anatomy: type[Named] | None = None) -> str | None:
    """Why a block must run its library's forward, or None if its convolutions, BNs and ReLUs may be fused.

    anatomy: that of the fused block that it is asked for, if it is none yet.
    """
    anatomy = anatomy or block._anatomy
    parts = anatomy.parts
    reason = anatomy.obstacle(block)
    return reason or parts_unfusable(block, parts[::2], parts[1::2], anatomy.activations, anatomy.joined)


def parts_unfusable(
    block: nn.Module,
    convolutions: Iterable[str],
    norms: Iterable[str],
    activations: Iterable[str] = Named.activations,
    joined: bool = False,
) -> str | None:
    """Why convolutions, BNs and ReLUs of these names must be called as modules; None if they need not.

    joined: the convolutions call the BNs, their modules `norm`.
    """
    if _module._has_any_global_hook():
        return "a global module hook is registered"
    asked = [(name, convolution_unfusable(part(block, name), joined)) for name in convolutions]
    asked += [(name, norm_unfusable(part(block, name), f"{name}.act" in activations)) for name in norms]
    for name, reason in asked:
        if reason is not None:
            return f"{name}: {reason}"
    for name in activations:
        relu = part(block, name)
        reason = tampered(relu) if type(relu) is nn.ReLU else f"{type(relu).__name__} is not ReLU"
        if reason is not None:
            return f"{name}: {reason}"
    return None


def projection_unfusable(downsample: Side) -> str | None:
    """Why a downsample is called as the module it is; None if it is a 1x1 convolution and a BN to be fused.

    An average pool may stand in front of them (He et al., arXiv 1812.01187, figure 2c).
    """
    plain = type(downsample) in (nn.Sequential, tuple, Joined)
    if not plain or not (len(downsample) == 2 or (len(downsample) == 3 and type(downsample[0]) in POOLS)):
        return f"{type(downsample).__name__} is not Sequential(Conv2d, BatchNorm2d)"
    *pools, conv, bn = downsample
    containers = () if isinstance(downsample, tuple) else (downsample,)
    reason = next(filter(None, map(tampered, (*containers, *pools))), None)
    reason = reason or convolution_unfusable(conv, type(downsample) is Joined)
    if reason is None and conv.kernel_size != (1, 1):
        reason = f"kernel_size is {conv.kernel_size}, not (1, 1)"
    return reason or norm_unfusable(bn)


def part(block: nn.Module, path: str) -> nn.Module | None:
    """The module at this path inside a block; None where there is none."""
    module = block
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def tampered(m: nn.Module) -> str | None:
    """Why this module must be called, rather than its parameters read."""
    if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
        return "has hooks"
    overridden = next((name for name in ("forward", "_conv_forward") if name in m.__dict__), None)
    return overridden and f"{overridden} is overridden on the instance"


def convolution_unfusable(conv: nn.Module, joined: bool = False) -> str | None:
    """joined: whether its module `norm` is the batch norm that is fused with it."""
    if joined and type(conv) in NORMED:
        if conv.activation is not None:
            return f"{type(conv).__name__} calls an activation"
    elif type(conv) is not nn.Conv2d:
        return "calls no norm that could be fused" if type(conv) in NORMED else f"{type(conv).__name__} is not Conv2d"
    if conv.padding_mode != "zeros":
        return f"padding_mode is {conv.padding_mode!r}, not 'zeros'"
    if isinstance(conv.padding, str):
        return f"padding is {conv.padding!r}, not two integers"
    return tampered(conv)


def norm_unfusable(bn: nn.Module, activated: bool = False) -> str | None:
    """activated: what acts behind a batch norm of ACTIVATED is one of the block's ReLUs."""
    if type(bn) in ACTIVATED:
        for name in ("drop",) if activated else ("drop", "act"):
            module = bn._modules.get(name)
            reason = tampered(module) if type(module) is nn.Identity else f"{type(module).__name__} is not Identity"
            if reason is not None:
                return f"{name}: {reason}"
    elif activated and type(bn) in NORMS:  # what converts modules keeps the children of those it replaces
        return f"{type(bn).__name__} does not call its act"
    elif type(bn) not in NORMS and not is_frozen(bn):
        return f"{type(bn).__name__} is none of {', '.join(t.__name__ for t in NORMS)}"
    return tampered(bn)
