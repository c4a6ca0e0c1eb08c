"""PyTorch's own kernels, composed: what the backends `cpu` and `cudnn` share. Not a backend by itself."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..folding import fold
from .layout import as_channels, output_format, with_strides_of
from .reference import accumulator, inverse_and_scale
from .stem_conv import PLACES

_aten = torch.ops.aten
CACHED = 2**16  # elements in float64


def conv_bn_act(*args):
    """BN folded into the weight at the call: one pass over the activations, one over the weight."""
    x, weight, *bn, eps, residual, stride, padding, dilation, groups, relu = args
    folded, bias = fold(weight, *bn, eps)
    y = torch.conv2d(x, folded, bias, stride, padding, dilation, groups)
    return _add_relu_(y.contiguous(memory_format=output_format(x, weight)), residual, relu)


def conv_then_bn_act(*args):
    """The convolution, then BN in a pass of its own, as PyTorch runs them."""
    x, weight, bn_weight, bn_bias, mean, var, eps, residual, stride, padding, dilation, groups, relu = args
    y = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
    y = y.contiguous(memory_format=output_format(x, weight))
    if mean is None:
        return _add_relu_(y, residual, relu)
    return bn_act(y, mean, var, bn_weight, bn_bias, eps, residual, relu, False)


def _add_relu_(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        y.add_(residual)
    return y.relu_() if relu else y


def relu_bwd(grad: Tensor, y: Tensor | None, relu: bool) -> Tensor:
    """grad * mask; zero where y <= 0, so that a NaN output passes its gradient on, as PyTorch's ReLU does."""
    return _aten.threshold_backward(grad, y, 0) if relu else grad


def relu_bwd_sum(grad: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient that the ReLU lets through, and its sum per channel."""
    g = relu_bwd(grad, y, True)
    return g, g.sum((0, 2, 3), dtype=accumulator(g.dtype))


def stem_conv(x, weight):
    return torch.conv2d(x, weight, None, *PLACES).contiguous(memory_format=output_format(x, weight))


def stem_conv_weight_grad(grad, x, weight):
    return conv_gradients(grad, x, weight, *PLACES, [False, True])[1]


def conv_gradients(grad, a, weight, stride, padding, dilation, groups, output_mask):
    """(da, dweight) of a convolution of a; None where output_mask is off."""
    conv = (None, stride, padding, dilation, False, [0, 0], groups)
    da, dweight, _ = _aten.convolution_backward(grad, a, weight, *conv, [*output_mask, False])
    return da, dweight if dweight is None else with_strides_of(weight, dweight)


def conv_bn_act_bwd(grad, y, x, weight, *rest):
    *_, relu, output_mask = rest
    g = relu_bwd(grad, y, relu).contiguous(memory_format=output_format(x, weight))
    return conv_bn_act_bwd_masked(g, None, x, weight, *rest)


def conv_bn_act_bwd_masked(g, sum_g, x, weight, *rest, gradients=conv_gradients):
    """conv_bn_act_bwd from g, the gradient that the ReLU let through, and its sum per channel (None: not known yet).

    gradients: conv_gradients, or what does the same faster."""
    bn_weight, mean, var, eps, stride, padding, dilation, groups, _, output_mask = rest
    need_x, need_weight, need_bn_weight, need_bn_bias, need_residual = output_mask
    acc = accumulator(x.dtype)
    conv = (None, stride, padding, dilation, False, [0, 0], groups)
    inv = scale = None
    if mean is not None:
        inv, scale = inverse_and_scale(acc, bn_weight, var, eps)
        scale = scale.view(-1, 1, 1, 1)
    if sum_g is None and (need_bn_weight or need_bn_bias):
        sum_g = g.sum((0, 2, 3), dtype=acc)
    need_raw = need_weight or need_bn_weight
    center = None
    if need_bn_weight and x.dtype is torch.float32:
        finite = sum_g.isfinite().all()  # else the plain sums, in which inf and NaN travel as in PyTorch
        center = torch.where(finite, centered(x), 0)
    # dbn_weight is a difference of two sums, of which one is over the plain convolution's weight gradient: in 16 bits
    # its rounding would be most of the error. (TF32 holds every 16-bit operand.)
    exact = need_bn_weight and x.dtype is not acc
    # That gradient is the real one divided by BN's scale: out of float16's range where the real one is well inside.
    # There g takes the power of two nearest to 1 / sqrt(var + eps) along.
    ahead = need_weight and not exact and inv is not None and x.dtype is torch.float16
    where = (stride, padding, dilation, groups)
    dx = dweight = dbn_weight = None
    if need_x or need_raw:
        folded = weight if scale is None or not need_x else (weight * scale).to(weight.dtype)
        mask = [need_x, need_raw and not (ahead or exact)]
        around = x if center is None else x - center
        dx, raw = gradients(g, around, folded, *where, mask) if any(mask) else (None, None)
    if need_x:
        dx = dx.contiguous(memory_format=output_format(x, weight))
    if exact:
        raw = _aten.convolution_backward(*_to(acc, g, x, weight), *conv, [False, True, False])[1]
    if ahead:
        power = nearest_power_of_2(inv)
        ahead_g = g * power.to(g.dtype).view(1, -1, 1, 1)
        raw = _aten.convolution_backward(ahead_g, x, weight, *conv, [False, True, False])[1]
        scale = scale / power.view(-1, 1, 1, 1)
    if center is not None:
        dbn_weight = (raw * weight).sum((1, 2, 3))
        center = center.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)[:, :, None, None]  # as weight
        of_taps = _conv_of_constant(weight, center)
        window = (weight.shape[2:], stride, padding, dilation)
        rows, columns = map(_spans, g.shape[2:], x.shape[2:], *window)
        sums = _sums_of_regions(g, sum_g, rows, columns)
        of_constant = _sums_of_ranges(of_taps, rows.taps, columns.taps)  # [K, I, J]: conv(center) in each region
        rest = (sums * (of_constant - mean.view(-1, 1, 1))).sum((1, 2))
        dbn_weight = inv * (dbn_weight + rest.to(acc))
        if need_weight:
            of_ones = _sums_of_ranges(sums, rows.of_taps, columns.of_taps)  # [K, R, S]: wgrad(ones, g)
            raw.addcmul_(center, torch.where(finite, of_ones, 0)[:, None])
    elif need_bn_weight:
        dbn_weight = inv * ((raw * weight.to(acc)).sum((1, 2, 3)) - mean.to(acc) * sum_g)
    if need_weight:
        dweight = with_strides_of(weight, raw if scale is None else raw * scale)
    return dx, dweight, dbn_weight, sum_g if need_bn_bias else None, g if need_residual else None


def centered(x: Tensor) -> Tensor:
    """Each channel's mean, [1, C, 1, 1], or zero where that is no number.

    The gradient of BN's weight is sum(g * (conv(x) - mean)), here a sum over weight * wgrad(x, g) less mean * sum(g).
    What a channel's values have in common is most of either, after a ReLU, and cancels: float32's rounding in wgrad
    came out 6 to 50 times larger. So wgrad is taken around the mean, and what a constant adds is computed by itself.
    """
    return x.mean((0, 2, 3), keepdim=True).nan_to_num_(0.0, 0.0, 0.0)


def _conv_of_constant(weight: Tensor, center: Tensor) -> Tensor:
    """[K, R, S]: the sum over C of weight * center: [K, C, 1, 1], in float64; on a CPU as much at once as a cache
    holds."""
    at_once = max(1, CACHED // weight[0].numel()) if weight.is_cpu else len(weight)
    parts = zip(weight.split(at_once), center.split(at_once), strict=True)
    return torch.cat([(w.double() * c).sum(1) for w, c in parts])


class _Spans(NamedTuple):
    """A convolution's outputs along one dimension, in spans in each of which a tap finds x everywhere or nowhere."""

    spans: list[slice]  # of outputs
    taps: list[slice]  # of each span: those that find x
    of_taps: list[slice]  # of each tap: the spans where it finds x


def _spans(outputs: int, size: int, taps: int, stride: int, padding: int, dilation: int) -> _Spans:
    found = []  # of each tap, the outputs with 0 <= output * stride + tap * dilation - padding < size: from, to
    for tap in range(taps):
        start = tap * dilation - padding
        first = min(max(0, -(start // stride)), outputs)
        found.append((first, min(max(first, -((start - size) // stride)), outputs)))
    cuts = sorted({0, outputs, *itertools.chain.from_iterable(found)})
    spans = list(itertools.pairwise(cuts))

    def those(flags: list[bool]) -> slice:  # next to each other, all of them
        return slice(flags.index(True), len(flags) - flags[::-1].index(True)) if any(flags) else slice(0)

    inside = [[first <= begin and end <= last for first, last in found] for begin, end in spans]
    return _Spans(
        [slice(*s) for s in spans], list(map(those, inside)), [those(list(f)) for f in zip(*inside, strict=True)]
    )


def _sums_of_regions(g: Tensor, sum_g: Tensor, rows: _Spans, columns: _Spans) -> Tensor:
    """[K, I, J]: the sums of g: [N, K, P, Q] over I x J regions."""
    if len(rows.spans) == len(columns.spans) == 1:
        return sum_g.view(-1, 1, 1)
    sums = [g[:, :, row, column].sum((0, 2, 3)) for row, column in itertools.product(rows.spans, columns.spans)]
    return torch.stack(sums, 1).unflatten(1, (len(rows.spans), -1))


def _sums_of_ranges(t: Tensor, rows: list[slice], columns: list[slice]) -> Tensor:
    """[K, I, J] of t: [K, .., ..]: its sums over each of rows and each of columns."""
    sums = [t[:, row, column].sum((1, 2)) for row, column in itertools.product(rows, columns)]
    return torch.stack(sums, 1).unflatten(1, (len(rows), -1))


def nearest_power_of_2(scale: Tensor) -> Tensor:
    """The nearest that float16 has: multiplying by it moves an exponent and rounds nothing."""
    return scale.log2().round_().clamp_(-14, 15).exp2_()


def bn_stats(x):
    # The running statistics passed are dummies: their dtype decides the dtype of what comes back.
    dummy = x.new_zeros(x.shape[1], dtype=accumulator(x.dtype))
    return torch.batch_norm_update_stats(x, dummy, dummy, 0.0)


def _to(acc: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.to(acc) for t in tensors]


def bn_act(x, mean, var, bn_weight, bn_bias, eps, residual, relu, batch_stats):
    bn_weight, bn_bias, mean, var = _to(accumulator(x.dtype), bn_weight, bn_bias, mean, var)
    y = torch.native_batch_norm(x, bn_weight, bn_bias, mean, var, False, 0.0, eps)[0]
    return _add_relu_(y.contiguous(memory_format=output_format(x)), residual, relu)


def bn_act_bwd(grad, y, x, mean, var, bn_weight, eps, relu, batch_stats, output_mask):
    need_x, need_bn_weight, need_bn_bias, need_residual = output_mask
    g = relu_bwd(grad, y, relu).contiguous(memory_format=output_format(x))
    bn_weight, mean, var = _to(accumulator(x.dtype), bn_weight, mean, var)
    dx, dbn_weight, dbn_bias = _aten.native_batch_norm_backward(
        g,
        x,
        bn_weight,
        mean,
        var,
        mean,
        torch.rsqrt(var + eps),
        batch_stats,
        eps,
        [need_x, need_bn_weight, need_bn_bias],
    )
    if need_x:
        dx = dx.contiguous(memory_format=output_format(x))
    return dx, dbn_weight, dbn_bias, g if need_residual else None


def bn_act_bwd_input(grad, y, x, mean, scale, mean_g, slope, relu):
    mean, scale, mean_g, slope = map(as_channels, _to(accumulator(x.dtype), mean, scale, mean_g, slope))
    expected = (x - mean).mul_(slope).add_(mean_g)  # in the accumulator's dtype, as the vectors are
    dx = torch.sub(relu_bwd(grad, y, relu), expected, out=expected).mul_(scale)
    return dx.to(x.dtype).contiguous(memory_format=output_format(x))
