"""Both ends of an ImageNet ResNet in training, on a GPU: of the stem batch norm, ReLU and max-pool in one pass, and in
16 bits a convolution of three channels by a kernel of its own; of the last average a gradient that costs no pass.

Between the first convolution and the pool lie a network's largest maps. PyTorch's kernels go over them four times in
the forward and four in the backward; `bn_act_pool` reads them once and twice. torch.compile fuses the modules itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torchvision.models.resnet import ResNet

from .backends import cuda, forced, objection, refuses, triton
from .backends.layout import is_channels_last
from .backends.stem_conv import KERNEL, PLACES
from .blocks import convolution_unfusable, on_own_batch, parts_unfusable, tampered
from .functional import update_running_stats
from .ops import lowered

_ops = torch.ops.fused_resnet
POOL = dict(kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False, return_indices=False)


def pooled_stem(network: nn.Module, x: Tensor, relu: str = "relu") -> Tensor | None:
    """maxpool(relu(bn1(conv1(x)))) of a network with these modules; None where they have to be called one by one.

    relu: the name of that module.
    """
    if unpoolable(network, relu) is not None or not _worth_it(x):
        return None
    y, bn = _convolved(network.conv1, x), network.bn1
    mean, var = _ops.bn_stats.default(y)
    args = (y, mean, var, bn.weight, bn.bias, bn.eps)
    if y.is_cuda and all(refuses(b, "bn_act_pool", args) or objection(b, "bn_act_pool", args)[0] for b in _own()):
        return network.maxpool(network._modules[relu](bn(y)))
    update_running_stats(bn, y, mean, var)
    return _ops.bn_act_pool.default(*args)[0]


def _convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), by the kernel for three channels where it may serve."""
    if type(x) is Tensor and x.shape[-1] % 2 == 0 and _is_plain(conv):
        operands = x, conv.weight
        if torch.is_autocast_enabled("cuda") and x.is_cuda:
            operands = tuple(lowered(t, torch.get_autocast_dtype("cuda")) for t in operands)  # as the op would
        if _has_kernel(*operands):
            return _ops.stem_conv.default(*operands)
    return conv(x)


def _is_plain(conv: nn.Module) -> bool:
    """Whether this is the convolution that the op computes, and its module need not be called."""
    if convolution_unfusable(conv) is not None or type(conv.weight) not in (Tensor, nn.Parameter):
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


def unpoolable(network: nn.Module, relu: str = "relu") -> str | None:
    """Why batch norm, ReLU and pool of this network's stem are called as modules now, or None."""
    modules = network._modules
    if reason := parts_unfusable(network, (), ("bn1",), (relu,)):
        return reason
    if not on_own_batch(modules["bn1"]):
        return "bn1: does not use the batch's own statistics"
    pool = modules.get("maxpool")
    if type(pool) is not nn.MaxPool2d:
        return f"maxpool: {type(pool).__name__} is not MaxPool2d"
    for name, expected in POOL.items():
        if getattr(pool, name) not in (expected, [expected] * 2, (expected, expected)):
            return f"maxpool: {name} is {getattr(pool, name)}, not {expected}"
    reason = tampered(pool)
    return reason and f"maxpool: {reason}"


def _worth_it(x: Tensor) -> bool:
    """Whether the op would run on a kernel of its own for an input like x."""
    if isinstance(x, fx.Proxy) or torch.compiler.is_compiling() or not x.is_cuda or x.dim() != 4:
        return False
    return any(refuses(backend, "bn_stats", (x,)) is None for backend in _own())


def _own() -> list:
    """The backends that have a kernel for it and may serve."""
    return [backend for backend in (cuda, triton) if forced() in (None, backend.NAME)]


class FusedResNet(ResNet):
    """torchvision's ResNet with its stem fused while it trains; `swap_blocks` makes one of it, in place."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        stem = pooled_stem(self, x)
        if stem is None:
            return super()._forward_impl(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(stem))))
        return self.fc(torch.flatten(averaged(self.avgpool, x), 1))


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
