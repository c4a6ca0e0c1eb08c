"""Blocks whose batch norms use the batch's statistics: convolutions hand on raw results, BN is applied on load.

conv1 -> raw, statistics -> conv2 of relu(BN(raw)) -> raw, statistics -> ... -> BN, shortcut and ReLU. Autograd keeps
the raw results and the block's input; of an expanding 1x1 convolution at the end, or of a projection, not even the raw
result (backends/composed.py has the arithmetic). With memory="lean" a block keeps its input and its statistics alone
and runs its convolutions again in the backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import pool_ops, training_ops  # noqa: F401  (register their ops)
from .backends.layout import is_channels_last
from .backends.reference import rows_of
from .functional import update_running_stats
from .ops import apply, direct, lowered_by_autocast, needs_gradient

_bn_stats, _bn_act = direct("bn_stats"), direct("bn_act")
_bn_act_conv, _bn_act_conv_bwd = direct("bn_act_conv"), direct("bn_act_conv_bwd")
_pointwise_bn_act = direct("pointwise_bn_act")
MEMORY = ("default", "lean")


class Norm(NamedTuple):
    """A batch norm with the statistics of a batch, for an op to apply: mean, var, weight, bias: [C]."""

    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float


NOTHING = Norm(None, None, None, None, 0.0)


def norm_of(conv: nn.Conv2d | None, bn: nn.Module, mean: Tensor, var: Tensor) -> Norm:
    """bn as the norm of a raw convolution with these statistics, which conv gives without its bias.

    The mean takes that bias away again, so that no result depends on it and its gradient is zero. (PyTorch's is the
    rounding error of a sum that should be.)
    """
    bias = bn.bias
    if conv is not None and conv.bias is not None:
        nothing = conv.bias * 0
        bias = nothing if bias is None else bias + nothing
    return Norm(mean, var, bn.weight, bias, bn.eps)


class Statistics:
    """Where a block's batch statistics come from: the ops; or, when its convolutions run again, the first time's."""

    def __init__(self):
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.complete = False
        self.next = 0

    def begin(self) -> None:
        self.next = 0

    def known(self) -> tuple[Tensor, Tensor] | None:
        """Mean and variance of the next batch norm, if this is not the first time."""
        if not self.complete:
            return None
        self.next += 1
        return self.kept[self.next - 1]

    def of(self, x: Tensor, bn: nn.Module) -> Norm:
        """bn as the norm of x."""
        known = self.known()
        if known is not None:
            return norm_of(None, bn, *known)
        mean, var = _bn_stats(x)  # torch.fx can take a result apart, but not spread it
        return self.norm(None, None, bn, x, mean, var)

    def norm(self, known, conv: nn.Conv2d | None, bn: nn.Module, y: Tensor, mean: Tensor, var: Tensor) -> Norm:
        """bn as the norm of y, with the statistics that are `known`; where none are, these, which are kept."""
        if known is None:
            self.keep(conv, bn, y, mean, var)
            known = mean, var
        return norm_of(conv, bn, *known)

    def keep(self, conv: nn.Conv2d | None, bn: nn.Module, y: Tensor, mean: Tensor, var: Tensor) -> None:
        """y: what conv gives without its bias."""
        biased = conv is not None and conv.bias is not None
        update_running_stats(bn, y, mean + conv.bias.detach() if biased else mean, var)
        self.kept.append((mean, var))


def convolve(x: Tensor, norm: Norm, conv: nn.Conv2d, bn: nn.Module, statistics: Statistics) -> tuple[Tensor, Norm]:
    """(raw convolution of relu(norm(x)), or of x where norm is NOTHING; bn as the norm of that result)."""
    known = statistics.known()
    y, mean, var = _bn_act_conv(
        x, conv.weight, *norm, True, conv.stride, conv.padding, conv.dilation, conv.groups, known is None
    )
    return y, statistics.norm(known, conv, bn, y, mean, var)


def convolve_shared(
    x: Tensor, conv: nn.Conv2d, bn: nn.Module, statistics: Statistics, own: bool
) -> tuple[Tensor, Norm, Tensor]:
    """`convolve` of x itself, and x for what else reads it: a shortcut.

    The gradients of both meet at x. Where the convolution's is a matrix product, the shortcut's is what the product
    adds to, so that no pass over the largest maps of a block is needed for the sum. own: whether what else reads x is
    an op of this package, which makes the gradient that it hands back and keeps none.
    """
    weight = conv.weight
    if type(x) is Tensor and x.is_cuda:
        weight = lowered_by_autocast(weight)  # as the op would
    if not _product(x, weight, conv):
        return *convolve(x, NOTHING, conv, bn, statistics), x
    known = statistics.known()
    y, mean, var, x = apply(_Shared, x, weight, known is None, own)
    return y, statistics.norm(known, conv, bn, y, mean, var), x


def _product(x: Tensor, weight: Tensor, conv: nn.Conv2d) -> bool:
    """Whether x's gradient behind this convolution is one of 16-bit matrices on a GPU."""
    return (
        type(x) is Tensor
        and x.is_cuda
        and x.dtype is weight.dtype
        and x.dtype in (torch.float16, torch.bfloat16)
        and needs_gradient(x)
        and not torch.compiler.is_compiling()
        and is_channels_last(x)
        and expands(conv, 0)
        and conv.stride == (1, 1)
    )


class _Shared(torch.autograd.Function):
    """(y, mean, var, x): the op bn_act_conv of x, 1x1 and of stride 1, with x handed on."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stats: bool, own: bool):
        ctx.set_materialize_grads(False)
        ctx.own = own
        ctx.save_for_backward(x, weight)
        y, mean, var = _bn_act_conv(x, weight, *NOTHING, True, *_POINTWISE, stats)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var, x

    @staticmethod
    def backward(ctx, dy, _mean, _var, dx):
        x, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        if dy is None:
            return dx, None, None, None
        mask = [need_x and dx is None, need_weight, False, False]
        whole = dweight = None
        if any(mask):
            whole, dweight, _, _ = _bn_act_conv_bwd(dy, x, weight, *NOTHING, True, *_POINTWISE, mask)
        if need_x and dx is not None:
            rows, columns = rows_of(dx, (1, 1)), (rows_of(dy, (1, 1)), weight.flatten(1))
            if ctx.own and is_channels_last(dx) and not torch.is_grad_enabled():
                rows.addmm_(*columns)  # a view
                whole = dx
            else:
                n, c, h, w = x.shape
                whole = torch.addmm(rows, *columns).view(n, h, w, c).permute(0, 3, 1, 2)
        return whole if need_x else None, dweight if need_weight else None, None, None


_POINTWISE = ([1, 1], [0, 0], [1, 1], 1)


def normalised(
    x: Tensor,
    norm: Norm,
    conv: nn.Conv2d,
    bn: nn.Module,
    residual: Tensor | None,
    statistics: Statistics,
    relu: bool = True,
) -> Tensor:
    """relu?(bn(convolution of relu(norm(x))) + residual)."""
    if not expands(conv, 2 if relu else 4):
        y, after = convolve(x, norm, conv, bn, statistics)
        return _bn_act(y, *after, residual, relu, True)
    _, _, weight, bias, eps = norm_of(conv, bn, None, None)
    results = _pointwise_bn_act(x, conv.weight, *norm, True, weight, bias, eps, residual, conv.stride, relu)
    if statistics.known() is None:
        statistics.keep(conv, bn, results[0], results[1], results[2])
    return results[0]  # taken out last: torch.fx's feature extractors return what a block does last


def activated(x: Tensor, norm: Norm) -> Tensor:
    """relu(norm(x)), kept."""
    return _bn_act(x, *norm, None, True, True)


def convolved(x: Tensor, norm: Norm, conv: nn.Conv2d) -> Tensor:
    """Convolution of relu(norm(x)), of which nobody wants the statistics."""
    y, _, _ = _bn_act_conv(x, conv.weight, *norm, True, conv.stride, conv.padding, conv.dilation, conv.groups, False)
    return y if conv.bias is None else y + conv.bias.to(y.dtype)[:, None, None]


def check_memory(memory: str) -> None:
    if memory not in MEMORY:
        raise ValueError(f"memory: expected 'default' or 'lean', got {memory!r}")


def expands(conv: nn.Conv2d, times: int) -> bool:
    """Whether a convolution's raw result is better not kept: 1x1, to at least so many times its channels.

    What stands for it is a product with [C, C] in the forward and one in the backward, C being the channels that come
    in; what it saves are passes over the channels that come out. A projection, once a stage, has to save more.
    """
    plain = conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    return plain and times * conv.in_channels <= conv.out_channels


def lean(function, x: Tensor, block: nn.Module) -> Tensor:
    """function(x, statistics), nothing in it kept for the backward but x and the statistics: the rest runs again.

    Unlike under an activation checkpoint around a block, running statistics are updated once, and those of the batch
    computed once. Under torch.compile, whose partitioner decides what is kept, function runs as it is. block: the
    module whose parameters function reads; if they are others by the backward, that raises RuntimeError.
    """
    statistics = Statistics()
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(x, statistics)

    parameters = [(p, p._version) for p in block.parameters()]

    def run(x):
        now = block.parameters()
        if any(p is not q or p._version != version for (p, version), q in zip(parameters, now, strict=True)):
            raise RuntimeError(
                "memory: a parameter was modified or replaced between this block's forward and its backward, which "
                'has to compute the forward again under memory="lean"'
            )
        statistics.begin()
        y = function(x, statistics)
        statistics.complete = True
        return y

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
