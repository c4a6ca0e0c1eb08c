"""Both ends of an ImageNet ResNet: its stem, whose maps are a network's largest, and its last average.

On a GPU, with the statistics of the batch, batch norm, ReLU and pool are one pass: PyTorch's kernels go over the maps
between convolution and pool four times in the forward and four in the backward, `bn_act_pool` reads them once and
twice. With given statistics (eval mode, frozen batch norms) a convolution of three channels, batch norm, ReLU and pool
are one op where no gradient is wanted; elsewhere batch norm and ReLU are a pass, or join a convolution of more
channels. In 16 bits a convolution of three channels has a kernel of its own. On a CPU, in float32 and channels_last,
batch norm and ReLU join the convolution, and with statistics of the batch are one pass. torch.compile fuses the modules
itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import ResNet

from .backends import BACKENDS, ORDER, cuda, forced, objection, refuses, triton
from .backends.layout import is_channels_last
from .backends.stem_conv import KERNEL, PLACES
from .blocks import Derived, conv_bn, convolution_unfusable, part, parts_unfusable, tampered
from .frozen import eps_of
from .functional import batch_norm_act, on_own_batch, update_running_stats, uses_batch_statistics
from .ops import lowered_by_autocast, needs_gradient, transformed

_ops = torch.ops.fused_resnet
_FEW = 16  # channels
_PIXELS = 224 * 224  # the checks take as long as what so many would gain
POOL = dict(kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False, return_indices=False)


class Stem(NamedTuple):
    """Where in a network the modules of its stem are: paths. relu, pool: '' for functions. before: convolution, norm
    and ReLU of each that stands in front. around: what those are children of, but for the network: path, class, and all
    children there. joined: whether the convolution calls the norm."""

    convolution: str = "conv1"
    norm: str = "bn1"
    relu: str = "relu"
    pool: str = "maxpool"
    before: tuple[tuple[str, str, str], ...] = ()
    around: tuple[tuple[str, type[nn.Module], tuple[str, ...]], ...] = ()
    joined: bool = False


TORCHVISIONS = Stem()


def pooled_stem(network: nn.Module, x: Tensor, stem: Stem = TORCHVISIONS) -> Tensor | None:
    """maxpool(relu(norm(convolution(x)))) of a network with these modules; None where they have to be called one by
    one, or are as fast."""
    if _is_recorded(x) or x.dim() != 4 or unpoolable(network, stem):
        return None
    norm = part(network, stem.norm)
    on_maps = on_own_batch(norm) and _has_pool(x)
    if not (on_maps or _pays(network, x, stem)):
        return None
    for paths in stem.before:
        x = _normed(x, part(network, paths[0]), part(network, paths[1]))
    conv, pool = part(network, stem.convolution), _pool(network, stem)
    if on_maps:
        return _of_the_batch(_convolved(conv, x, stem.joined), norm, pool)
    if uses_batch_statistics(norm):
        return pool(batch_norm_act(_convolved(conv, x, stem.joined), norm))
    if _on_gpu(x) and _is_plain(conv, stem.joined) and not _differentiated(x, conv.weight, norm.weight, norm.bias):
        given = norm.weight, norm.bias, norm.running_mean, norm.running_var, eps_of(norm)
        args = lowered_by_autocast(x), lowered_by_autocast(conv.weight), *given
        own = BACKENDS.get(forced())
        if own is None or refuses(own, "conv_bn_act_pool", args) is None:
            return _ops.conv_bn_act_pool.default(*args)
    return pool(_normed(x, conv, norm, stem.joined))


def _normed(x: Tensor, conv: nn.Module, bn: nn.Module, joined: bool = False) -> Tensor:
    """relu(bn(convolution of x)): one op, but for a picture's channels, of which a kernel has little to multiply."""
    few = _on_gpu(x) and (x.shape[1] < _FEW or forced() is not None)  # what is forced may have the norm alone
    if few or convolution_unfusable(conv, joined) is not None:
        return batch_norm_act(_convolved(conv, x, joined), bn)
    return conv_bn(x, conv, bn)


def _is_recorded(x: Tensor) -> bool:
    """Whether somebody writes down the path that this call takes, or transforms it."""
    return isinstance(x, fx.Proxy) or torch.compiler.is_compiling() or transformed()


def _of_the_batch(y: Tensor, bn: nn.Module, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """pool(relu(bn(y))), in one pass where a kernel has agreed with the reference."""
    mean, var = _ops.bn_stats.default(y)
    args = (y, mean, var, bn.weight, bn.bias, bn.eps)
    if y.is_cuda and all(refuses(b, "bn_act_pool", args) or objection(b, "bn_act_pool", args)[0] for b in _own()):
        return pool(F.relu_(bn(y)))
    update_running_stats(bn, y, mean, var)
    return _ops.bn_act_pool.default(*args)[0]


def _pays(network: nn.Module, x: Tensor, stem: Stem) -> bool:
    """Whether fused ops are faster than PyTorch's modules: on a CPU in float32 and channels_last, of more pixels than
    one image of ImageNet's has."""
    if x.device.type != "cpu":
        return x.is_cuda and any(refuses(b, "bn_stats", (x,)) is None for b in ORDER["cuda"])
    conv = part(network, stem.convolution)
    if convolution_unfusable(conv, stem.joined) is not None or torch.is_autocast_enabled("cpu"):
        return False
    large = x.numel() > _PIXELS * x.shape[1]
    return large and x.dtype is conv.weight.dtype is torch.float32 and is_channels_last(conv.weight)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _differentiated(*tensors: Tensor | None) -> bool:
    return any(t is not None and needs_gradient(t) for t in tensors)


def _pool(network: nn.Module, stem: Stem) -> Callable[[Tensor], Tensor]:
    return part(network, stem.pool) if stem.pool else lambda x: F.max_pool2d(x, 3, 2, 1)


def _convolved(conv: nn.Module, x: Tensor, joined: bool = False) -> Tensor:
    """The convolution of x, by the kernel for three channels where it may serve."""
    if type(x) is Tensor and x.shape[-1] % 2 == 0 and _is_plain(conv, joined):
        operands = lowered_by_autocast(x), lowered_by_autocast(conv.weight)  # as the op would
        if _has_kernel(*operands):
            return _ops.stem_conv.default(*operands)
    return conv._conv_forward(x, conv.weight, conv.bias) if joined else conv(x)


def _is_plain(conv: nn.Module, joined: bool = False) -> bool:
    """Whether this is the convolution that the ops compute, and its module need not be called."""
    if convolution_unfusable(conv, joined) is not None or type(conv.weight) not in (Tensor, nn.Parameter):
        return False
    if conv.bias is not None:
        return False
    places = conv.stride, conv.padding, conv.dilation, conv.groups
    return conv.in_channels == 3 and conv.kernel_size == KERNEL and places == PLACES


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether a kernel of this package can convolve these, and agreed with the reference. Whether it is faster than
    PyTorch's is the op's question."""
    args = x, weight
    if forced() not in (None, cuda.NAME) or refuses(cuda, "stem_conv", args) is not None:
        return False
    return objection(cuda, "stem_conv", args)[0] is None


def unpoolable(network: nn.Module, stem: Stem = TORCHVISIONS) -> str | None:
    """Why norm, ReLU and pool of this network's stem are called as modules now, or None."""
    for path, kind, children in stem.around:
        around = part(network, path)
        if type(around) is not kind or tuple(around._modules) != children:
            return f"{path}: is not {kind.__name__} of {', '.join(children)}"
        if reason := tampered(around):
            return f"{path}: {reason}"
    first, norms, relus = zip(*stem.before, strict=True) if stem.before else ((), (), ())
    convolutions = (*first, stem.convolution) if stem.joined else first
    norms, relus = (*norms, stem.norm), (*relus, stem.relu) if stem.relu else relus
    if reason := parts_unfusable(network, convolutions, norms, relus, stem.joined):
        return reason
    if part(network, stem.convolution) is None:
        return f"{stem.convolution}: is not there"
    if not stem.pool:
        return None
    pool = part(network, stem.pool)
    if type(pool) is not nn.MaxPool2d:
        return f"{stem.pool}: {type(pool).__name__} is not MaxPool2d"
    for name, expected in POOL.items():
        if getattr(pool, name) not in (expected, [expected] * 2, (expected, expected)):
            return f"{stem.pool}: {name} is {getattr(pool, name)}, not {expected}"
    reason = tampered(pool)
    return reason and f"{stem.pool}: {reason}"


def _has_pool(x: Tensor) -> bool:
    """Whether `bn_act_pool` would run on a kernel of its own for an input like x."""
    return x.is_cuda and any(refuses(backend, "bn_stats", (x,)) is None for backend in _own())


def _own() -> list:
    """The backends that have a kernel for it and may serve."""
    return [backend for backend in (cuda, triton) if forced() in (None, backend.NAME)]


class FusedResNet(ResNet):
    """torchvision's ResNet with its stem fused; `swap_blocks` makes one of it, in place."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        stem = pooled_stem(self, x)
        if stem is None:
            return super()._forward_impl(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(stem))))
        return self.fc(torch.flatten(averaged(self.avgpool, x), 1))


class FusedLayerGetter(IntermediateLayerGetter):
    """The body of torchvision's detectors and segmentation models, its stem fused; `swap_blocks` makes one of it, in
    place."""

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        found = collected(self, x, TORCHVISIONS)
        return super().forward(x) if found is None else found

    @staticmethod
    def takes(network: nn.Module) -> bool:
        return begins(network, TORCHVISIONS)


def collected(network: nn.ModuleDict, x: Tensor, stem: Stem) -> OrderedDict[str, Tensor] | None:
    """What a network hands out that calls its children one after another, its stem fused; None where that cannot be:
    where it hands out what is inside of the stem, say."""
    names, wanted = list(network), network.return_layers
    if not begins(network, stem) or any(name in wanted for name in names[:4]):
        return None
    pooled = pooled_stem(network, x, stem)
    if pooled is None:
        return None
    x, out = pooled, OrderedDict()
    for name in names[4:]:
        x = network[name](x)
        if name in wanted:
            out[wanted[name]] = x
    return out


def begins(network: nn.ModuleDict, stem: Stem) -> bool:
    """Whether a network's first children are those of such a stem, in their order."""
    return list(network._modules)[:4] == [path.partition(".")[0] for path in stem[:4]]


class ModuleStem(Derived):
    """A stem that is a module by itself, fused; `_fused_stem` derives one of its class."""

    _stem: Stem

    def _pooled(self, x) -> Tensor | None:
        """What the forward of the class behind would give, if that would not say anything against x."""
        fits = isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] == getattr(self, "num_channels", x.shape[1])
        return pooled_stem(self, x, self._stem) if fits else None


@functools.cache
def _fused_stem(original: type[nn.Module], stem: Stem) -> type[ModuleStem]:
    """The subclass of a stem's class whose forward is fused."""
    _, argument = inspect.signature(original.forward).parameters

    @functools.wraps(original.forward)  # its argument has the name that it had
    def forward(self, *args, **kwargs):
        if args and not kwargs or list(kwargs) == [argument]:
            given = *args, *kwargs.values()
            pooled = self._pooled(given[0]) if len(given) == 1 else None
            if pooled is not None:
                return pooled
        return original.forward(self, *args, **kwargs)

    names = {"__module__": original.__module__, "__doc__": original.__doc__, "forward": forward}
    names |= {"_original": original, "_again": (_blank, (original, stem)), "_stem": stem}
    return type(original)(f"Fused{original.__name__}", (ModuleStem, original), names)


def restore(m: ModuleStem) -> None:
    if "_original" in vars(type(m)):  # FSDP makes subclasses
        m.__class__ = type(m)._original


def _blank(original: type[nn.Module], stem: Stem) -> ModuleStem:
    """A stem before it gets its state, for copies and pickles."""
    return object.__new__(_fused_stem(original, stem))


def _basic_stem(module: types.ModuleType) -> Stem:
    """detectron2's BasicStem."""
    return Stem("conv1", "conv1.norm", "", "", joined=True)


def _embeddings(kind: str, *more: str):
    """A function of the module that has Hugging Face's embeddings: their stem, of layers of that class in the module.
    more: the numbers of the layers, where there are several."""

    def stem(module: types.ModuleType) -> Stem:
        paths = [f"embedder.{i}" for i in more] or ["embedder"]
        parts = "convolution", "normalization", "activation"
        *before, last = (tuple(f"{path}.{part}" for part in parts) for path in paths)
        around = [(path, getattr(module, kind), parts) for path in paths]
        if more:
            around.append(("embedder", nn.Sequential, more))
        return Stem(*last, "pooler", before=tuple(before), around=tuple(around))

    return stem


# By module and class: a function of that module, which gives the class' stem. What its forward is, is known.
_MODULES = {
    ("detectron2.modeling.backbone.resnet", "BasicStem"): _basic_stem,
    ("transformers.models.resnet.modeling_resnet", "ResNetEmbeddings"): _embeddings("ResNetConvLayer"),
    ("transformers.models.rt_detr.modeling_rt_detr_resnet", "RTDetrResNetEmbeddings"): _embeddings(
        "RTDetrResNetConvLayer", "0", "1", "2"
    ),
}


def networks() -> dict[type[nn.Module], type[nn.Module]]:
    """By class, as far as imported: the one whose stem is fused."""
    found = {ResNet: FusedResNet, IntermediateLayerGetter: FusedLayerGetter}
    for (name, kind), stem in _MODULES.items():
        module = sys.modules.get(name)
        original = getattr(module, kind, None)
        if original is not None:
            with contextlib.suppress(AttributeError, ValueError):  # of a version that has other parts: it stays
                found[original] = _fused_stem(original, stem(module))
    return found


def averaged(pool: nn.Module, x: Tensor) -> Tensor:
    """pool(x); an average over whole channels_last maps with the gradient that `_Average` has."""
    whole = type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1)) and tampered(pool) is None
    if not whole or type(x) is not Tensor or torch.compiler.is_compiling() or not is_channels_last(x):
        return pool(x)
    return _Average.apply(x)


class _Average(torch.autograd.Function):
    """The mean over a map, whose gradient is a view of one value a channel. PyTorch writes it out, in contiguous maps
    that the next backward has to turn into channels_last ones."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return (grad / (ctx.shape[2] * ctx.shape[3])).expand(ctx.shape)
