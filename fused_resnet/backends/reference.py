"""Plain PyTorch: the definition of correct. Runs on every device and dtype, and is differentiable any number of times.

Computes in float32 (float64 for float64 inputs) and casts once at the end, as the fused kernels do.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from . import pooled
from .layout import as_channels, output_format, with_strides_of
from .stem_conv import PLACES

NAME = "reference"


def unavailable() -> str | None:
    return None


def declines(op: str, *args) -> str | None:
    return None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def inverse_and_scale(acc: torch.dtype, bn_weight: Tensor | None, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """1 / sqrt(var + eps), and that times bn_weight: both [C] in the accumulator's dtype."""
    inv = torch.rsqrt(var.to(acc) + eps)
    return inv, inv if bn_weight is None else inv * bn_weight.to(acc)


def _masked(grad: Tensor, y: Tensor | None, relu: bool, acc: torch.dtype) -> Tensor:
    """grad where the ReLU let it through: a NaN output lets it through, as in PyTorch."""
    grad = grad.to(acc)
    return grad.masked_fill(y <= 0, 0) if relu else grad


def conv_bn_act(
    x, weight, bn_weight, bn_bias, running_mean, running_var, eps, residual, stride, padding, dilation, groups, relu
):
    acc = accumulator(x.dtype)
    y = torch.conv2d(x.to(acc), weight.to(acc), None, stride, padding, dilation, groups)
    if running_mean is not None:
        _, scale = inverse_and_scale(acc, bn_weight, running_var, eps)
        y = (y - as_channels(running_mean.to(acc))) * as_channels(scale)
        if bn_bias is not None:
            y = y + as_channels(bn_bias.to(acc))
    if residual is not None:
        y = y + residual.to(acc)
    if relu:
        y = torch.relu(y)
    return y.to(x.dtype).contiguous(memory_format=output_format(x, weight))


def conv_bn_act_bwd(
    grad,
    y,
    x,
    weight,
    bn_weight,
    running_mean,
    running_var,
    eps,
    stride,
    padding,
    dilation,
    groups,
    relu,
    output_mask,
):
    """The raw convolution is neither stored nor recomputed: with g = grad * mask and G = wgrad(x, g), the sum over
    N, P, Q of its product with g is the sum over C, R, S of W * G."""
    need_x, need_weight, need_bn_weight, need_bn_bias, need_residual = output_mask
    acc = accumulator(x.dtype)
    g = _masked(grad, y, relu, acc)
    w = weight.to(acc)
    scale = None
    if running_mean is not None:
        inv, scale = inverse_and_scale(acc, bn_weight, running_var, eps)
    folded = w if scale is None else w * scale.view(-1, 1, 1, 1)
    conv = (stride, padding, dilation, False, [0, 0], groups)
    dx = dweight = dbn_weight = dbn_bias = None
    if need_x:
        dx = torch.ops.aten.convolution_backward(g, x.to(acc), folded, None, *conv, [True, False, False])[0]
        dx = dx.to(x.dtype).contiguous(memory_format=output_format(x, weight))
    if need_weight or need_bn_weight:
        raw = torch.ops.aten.convolution_backward(g, x.to(acc), w, None, *conv, [False, True, False])[1]
        if need_weight:
            scaled = raw if scale is None else raw * scale.view(-1, 1, 1, 1)
            dweight = with_strides_of(weight, scaled)
    if need_bn_weight or need_bn_bias:
        total = g.sum((0, 2, 3))
    if need_bn_weight:
        dbn_weight = inv * ((w * raw).sum((1, 2, 3)) - running_mean.to(acc) * total)
    if need_bn_bias:
        dbn_bias = total
    dresidual = g.to(x.dtype).contiguous(memory_format=output_format(x, weight)) if need_residual else None
    return dx, dweight, dbn_weight, dbn_bias, dresidual


def bn_stats(x):
    acc = accumulator(x.dtype)
    if x.numel() == 0:  # as in PyTorch, an empty batch has gradients of zero, not of NaN
        return x.new_zeros(x.shape[1], dtype=acc), x.new_zeros(x.shape[1], dtype=acc)
    var, mean = torch.var_mean(x.to(acc), (0, 2, 3), correction=0)
    return mean, var


def bn_act(x, mean, var, bn_weight, bn_bias, eps, residual, relu, batch_stats):
    acc = accumulator(x.dtype)
    _, scale = inverse_and_scale(acc, bn_weight, var, eps)
    y = (x.to(acc) - as_channels(mean.to(acc))) * as_channels(scale)
    if bn_bias is not None:
        y = y + as_channels(bn_bias.to(acc))
    if residual is not None:
        y = y + residual.to(acc)
    if relu:
        y = torch.relu(y)
    return y.to(x.dtype).contiguous(memory_format=output_format(x))


def bn_act_bwd(grad, y, x, mean, var, bn_weight, eps, relu, batch_stats, output_mask):
    need_x, need_bn_weight, need_bn_bias, need_residual = output_mask
    acc = accumulator(x.dtype)
    g = _masked(grad, y, relu, acc)
    inv, scale = inverse_and_scale(acc, bn_weight, var, eps)
    centred = x.to(acc) - as_channels(mean.to(acc))
    total = g.sum((0, 2, 3))
    moment = (g * centred).sum((0, 2, 3))
    dx = dresidual = None
    if need_x:
        dx = g
        if batch_stats:
            count = x.numel() // x.shape[1]
            dx = dx - as_channels(total / count) - centred * as_channels(inv * inv * moment / count)
        dx = (dx * as_channels(scale)).to(x.dtype).contiguous(memory_format=output_format(x))
    if need_residual:
        dresidual = g.to(x.dtype).contiguous(memory_format=output_format(x))
    return dx, moment * inv if need_bn_weight else None, total if need_bn_bias else None, dresidual


def bn_act_bwd_input(grad, y, x, mean, scale, mean_g, slope, relu):
    acc = accumulator(x.dtype)
    mean, scale, mean_g, slope = (as_channels(v.to(acc)) for v in (mean, scale, mean_g, slope))
    dx = (_masked(grad, y, relu, acc) - mean_g - (x.to(acc) - mean) * slope) * scale
    return dx.to(x.dtype).contiguous(memory_format=output_format(x))


def _operand(x, mean, var, bn_weight, bn_bias, eps, relu):
    """What the convolution multiplies: x after BN with these statistics and ReLU, as it would be stored; else x."""
    return x if mean is None else bn_act(x, mean, var, bn_weight, bn_bias, eps, None, relu, True)


def bn_act_conv(x, weight, mean, var, bn_weight, bn_bias, eps, relu, stride, padding, dilation, groups, stats):
    acc = accumulator(x.dtype)
    a = _operand(x, mean, var, bn_weight, bn_bias, eps, relu)
    y = torch.conv2d(a.to(acc), weight.to(acc), None, stride, padding, dilation, groups).to(x.dtype)
    y = y.contiguous(memory_format=output_format(x, weight))
    return y, *(bn_stats(y) if stats else (None, None))


def bn_act_conv_bwd(
    grad, x, weight, mean, var, bn_weight, bn_bias, eps, relu, stride, padding, dilation, groups, output_mask
):
    need_x, need_weight, *need_bn = output_mask
    acc = accumulator(x.dtype)
    a = _operand(x, mean, var, bn_weight, bn_bias, eps, relu)
    conv = (None, stride, padding, dilation, False, [0, 0], groups)
    mask = [need_x or any(need_bn), need_weight, False]
    operands = (t.to(acc) for t in (grad, a, weight))
    da, dweight, _ = torch.ops.aten.convolution_backward(*operands, *conv, mask)
    dx, dbn_weight, dbn_bias = da, None, None
    if mean is not None and mask[0]:
        dx, dbn_weight, dbn_bias, _ = bn_act_bwd(
            da, a, x, mean, var, bn_weight, eps, relu, True, [need_x, *need_bn, False]
        )
    if need_x:
        dx = dx.to(x.dtype).contiguous(memory_format=output_format(x, weight))
    return dx if need_x else None, with_strides_of(weight, dweight) if need_weight else None, dbn_weight, dbn_bias


def covariance(a):
    """Mean [C] and biased covariance [C, C] over the rows a: [M, C]; zeros for no rows."""
    if a.numel() == 0:
        return a.new_zeros(a.shape[1]), a.new_zeros(a.shape[1], a.shape[1])
    mean = a.mean(0)
    centred = a - mean
    return mean, centred.t() @ centred / a.shape[0]


def rows_of(x, stride):
    """x: [N, C, H, W] at every stride-th position, as rows [M, C]."""
    return x[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def pointwise_bn_act(
    x, weight, mean, var, bn_weight, bn_bias, eps, relu, out_weight, out_bias, out_eps, residual, stride, out_relu
):
    acc = accumulator(x.dtype)
    a = _operand(x, mean, var, bn_weight, bn_bias, eps, relu).to(acc)
    raw = torch.conv2d(a, weight.to(acc), None, stride)
    y_mean, y_var = bn_stats(raw)
    residual = residual if residual is None else residual.to(acc)
    y = bn_act(raw, y_mean, y_var, out_weight, out_bias, out_eps, residual, out_relu, True)
    y = y.to(x.dtype).contiguous(memory_format=output_format(x, weight))
    return y, y_mean, y_var, *covariance(rows_of(a, stride))


def pointwise_bn_act_bwd(
    grad, y, x, weight, mean, var, bn_weight, bn_bias, eps, relu, out_weight, y_mean, y_var, out_eps, a_mean, a_cov,
    stride, out_relu, output_mask,
):  # fmt: skip
    """By way of the convolution's raw result, computed again; a_mean and a_cov are for backends that spare it."""
    *need_in, need_out_weight, need_out_bias, need_residual = output_mask
    acc = accumulator(x.dtype)
    a = _operand(x, mean, var, bn_weight, bn_bias, eps, relu)
    raw = torch.conv2d(a.to(acc), weight.to(acc), None, stride)
    draw, dout_weight, dout_bias, dresidual = bn_act_bwd(
        grad.to(acc), y, raw, y_mean, y_var, out_weight, out_eps, out_relu, True,
        [any(need_in), need_out_weight, need_out_bias, need_residual],
    )  # fmt: skip
    gradients = (None,) * 4
    if any(need_in):
        conv = (stride, [0, 0], [1, 1], 1)
        gradients = bn_act_conv_bwd(draw, x, weight, mean, var, bn_weight, bn_bias, eps, relu, *conv, need_in)
    if need_residual:
        dresidual = dresidual.to(x.dtype).contiguous(memory_format=output_format(x, weight))
    return *gradients, dout_weight, dout_bias, dresidual


def stem_conv(x, weight):
    acc = accumulator(x.dtype)
    y = torch.conv2d(x.to(acc), weight.to(acc), None, *PLACES).to(x.dtype)
    return y.contiguous(memory_format=output_format(x, weight))


def conv_bn_act_pool(*args):
    return pooled.conv_bn_act_pool(conv_bn_act, *args)


def stem_conv_weight_grad(grad, x, weight):
    acc = accumulator(x.dtype)
    wide = (t.to(acc) for t in (grad, x, weight))
    *places, groups = PLACES
    mask = [False, True, False]
    dweight = torch.ops.aten.convolution_backward.default(*wide, None, *places, False, [0, 0], groups, mask)[1]
    return with_strides_of(weight, dweight)


bn_act_pool, _ = pooled.pooled_of(sys.modules[__name__])


def bn_act_pool_bwd(grad, x, winner, mean, var, bn_weight, eps, output_mask):
    g = pooled.scattered(grad.to(accumulator(x.dtype)), winner, x.shape)
    return bn_act_bwd(g, None, x, mean, var, bn_weight, eps, False, True, [*output_mask, False])[:3]
