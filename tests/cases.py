"""Inputs worth trying, at odd sizes, and the unfused compositions that the ops must equal."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Shape(NamedTuple):
    """x: [n, c, *size], weight: [k, c / groups, *kernel]."""

    n: int = 5
    c: int = 3
    k: int = 5
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    size: tuple[int, int] = (7, 9)


SHAPES = {
    "3x3": Shape(),
    "1x1": Shape(kernel=(1, 1), padding=(0, 0)),
    "1x1-stride2": Shape(c=6, k=7, kernel=(1, 1), padding=(0, 0), stride=(2, 2)),
    "3x3-stride2": Shape(n=1, c=8, k=16, stride=(2, 2)),
    "3x3-dilated": Shape(n=1, padding=(2, 2), dilation=(2, 2)),
    "7x7-stem": Shape(n=1, kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    "32x4d": Shape(n=2, c=16, k=16, groups=4),
    "depthwise": Shape(c=6, k=6, groups=6, stride=(2, 2)),
    "uneven": Shape(kernel=(3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    "1x1-map": Shape(c=4, k=4, size=(1, 1)),
    "grey": Shape(c=1, k=4),
    "one-output": Shape(c=4, k=1, kernel=(1, 1), padding=(0, 0)),
}


class Conv(NamedTuple):
    """The arguments of conv_bn_act, in the op's order, and the gradient of its output."""

    args: tuple
    grad: Tensor

    @property
    def bwd(self) -> tuple:
        """The arguments of conv_bn_act_bwd but for output_mask."""
        x, weight, bn_weight, _, mean, var, eps, _, *conv = self.args
        return self.grad, unfused_conv(*self.args) if conv[-1] else None, x, weight, bn_weight, mean, var, eps, *conv


def conv_case(
    shape: Shape,
    dtype=torch.float64,
    layout="contiguous",
    bn="affine",
    residual=True,
    relu=True,
    device="cpu",
    requires_grad=False,
    seed=0,
    margin=0.1,
) -> Conv:
    """bn: 'affine', 'plain' (no weight, no bias) or None. The gradient is zero where the pre-activation is within the
    margin of zero: there a rounding error decides the ReLU."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

    def uniform(low, high):
        return torch.empty(shape.k, dtype=torch.float64).uniform_(low, high, generator=g).to(vector)

    vector = torch.promote_types(dtype, torch.float32)
    x = normal(shape.n, shape.c, *shape.size)
    weight = normal(shape.k, shape.c // shape.groups, *shape.kernel) * (shape.c / shape.groups * 4) ** -0.5
    affine = bn == "affine"
    norm = (
        uniform(0.5, 1.5) if affine else None,
        uniform(-0.5, 0.5) if affine else None,
        uniform(-0.5, 0.5) if bn else None,
        uniform(0.5, 2.0) if bn else None,
    )
    conv = (list(shape.stride), list(shape.padding), list(shape.dilation), shape.groups)
    raw = torch.conv2d(x.double(), weight.double(), None, *conv)
    other = normal(*raw.shape) if residual else None
    wide = [t if t is None else t.double() for t in (x, weight, *norm)]
    pre = unfused_conv(*wide, 1e-3, other if other is None else other.double(), *conv, False)
    grad = normal(*raw.shape) * (pre.abs() > margin)

    def placed(t):
        if t is None:
            return None
        t = t.to(device)
        if t.dim() == 4:
            t = t.contiguous(memory_format=LAYOUTS[layout])
        return t

    x, weight, other, grad = (placed(t) for t in (x, weight, other, grad))
    norm = [placed(t) for t in norm]
    if requires_grad:
        for t in (x, weight, other, *norm[:2]):
            if t is not None:
                t.requires_grad_()
    return Conv((x, weight, *norm, 1e-3, other, *conv, relu), grad)


def unfused_conv(
    x, weight, bn_weight, bn_bias, running_mean, running_var, eps, residual, stride, padding, dilation, groups, relu
) -> Tensor:
    """conv_bn_act as a user writes it."""
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    if running_mean is not None:
        y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, False, 0.0, eps)
    if residual is not None:
        y = y + residual
    return F.relu(y) if relu else y


class BN(NamedTuple):
    """The arguments of bn_act, in the op's order, and the gradient of its output."""

    args: tuple
    grad: Tensor

    @property
    def bwd(self) -> tuple:
        x, mean, var, bn_weight, _, eps, _, relu, batch_stats = self.args
        return self.grad, unfused_bn(*self.args) if relu else None, x, mean, var, bn_weight, eps, relu, batch_stats


def bn_case(
    dtype=torch.float64,
    layout="contiguous",
    affine=True,
    residual=True,
    relu=True,
    batch_stats=True,
    device="cpu",
    requires_grad=False,
    seed=0,
    margin=0.1,
    size=(5, 3, 7, 9),
) -> BN:
    g = torch.Generator().manual_seed(seed)
    vector = torch.promote_types(dtype, torch.float32)
    c = size[1]

    def normal():
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

    def uniform(low, high):
        return torch.empty(c, dtype=torch.float64).uniform_(low, high, generator=g).to(vector)

    x = normal() * 2 + 1
    norm = (uniform(0.5, 1.5), uniform(-0.5, 0.5)) if affine else (None, None)
    mean, var = uniform(-0.5, 0.5), uniform(0.5, 2.0)
    if batch_stats:
        var, mean = (t.to(vector) for t in torch.var_mean(x.double(), (0, 2, 3), correction=0))
    other = normal() if residual else None
    wide = [t if t is None else t.double() for t in (x, mean, var, *norm)]
    pre = unfused_bn(*wide, 1e-3, other if other is None else other.double(), False, batch_stats)
    grad = normal() * (pre.abs() > margin)
    x, other, grad = (
        t if t is None else t.to(device).contiguous(memory_format=LAYOUTS[layout]) for t in (x, other, grad)
    )
    mean, var, *norm = (t if t is None else t.to(device) for t in (mean, var, *norm))
    if requires_grad:
        for t in (x, other, *norm):
            if t is not None:
                t.requires_grad_()
    return BN((x, mean, var, *norm, 1e-3, other, relu, batch_stats), grad)


def bwd_input_case(dtype=torch.float64, layout="contiguous", relu=True, device="cpu", size=(5, 3, 7, 9)) -> tuple:
    """The arguments of bn_act_bwd_input, in the op's order."""
    case = bn_case(dtype, layout, relu=relu, batch_stats=False, device=device, size=size)
    grad, y, x, mean, var, weight, *_ = case.bwd
    return grad, y, x, mean, weight, var - 1, mean + 0.25, relu


def unfused_bn(x, mean, var, bn_weight, bn_bias, eps, residual, relu, batch_stats) -> Tensor:
    """bn_act as a user writes it; with batch_stats, mean and var are found anew."""
    stats = (None, None) if batch_stats else (mean, var)
    y = F.batch_norm(x, *stats, bn_weight, bn_bias, batch_stats, 0.0, eps)
    if residual is not None:
        y = y + residual
    return F.relu(y) if relu else y


def to(dtype, args: tuple) -> tuple:
    """The arguments with every tensor in another dtype, cut off from their graph, gradients asked for as before."""
    return tuple(a.detach().to(dtype).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args)


def outputs_and_grads(function, args: tuple, grad: Tensor) -> dict[str, Tensor]:
    """function(*args) and the gradients of all arguments that ask for one."""
    y = function(*args)
    wanted = {str(i): a for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), grad.to(y.dtype)) if wanted else ()
    return {"output": y.detach(), **{f"grad {i}": g for i, g in zip(wanted, grads, strict=True)}}


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Equal where they mean something: a dimension of size 1 has any stride."""
    return a.shape == b.shape and all(s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1)
