"""bn_act_conv and pointwise_bn_act from a backend's batch norm and PyTorch's convolutions: what every backend can do.

The normalised tensor lives for the length of a call and is computed again in the backward, so that autograd keeps the
raw results of convolutions only. Of a pointwise convolution not even that is kept. With a: [M, C] its input's rows,
raw = a W^T, A the covariance of a, s = gamma * inv and inv = 1 / sqrt(var + eps):

    mean(raw) = W mean(a),   var(raw)_k = (W A W^T)_kk
    G = g^T (a - mean(a)),   m_k = sum_c W_kc G_kc,   dgamma = inv * m,   dbeta = sum g
    t = s * inv^2 * m / M
    dW = s * G - M * t * W A
    da = g (s W) - (a - mean(a)) (W^T t W) - (s * dbeta / M) W

(s, t and inv scale rows), which is batch norm's derivative with raw - mean(raw) = (a - mean(a)) W^T put in: two
products with [C, C] in place of the passes over raw, which has four times as many channels as a in a bottleneck.

Where the channels of a hardly differ and W takes their differences, digits cancel in W A W^T: with differences of a
hundredth of the common part the variance, in 16 bits on a GPU, is good to three digits.

`backend` below is a module with bn_stats, bn_act, bn_act_bwd, conv_bn_act, conv_gradients and relu_bwd_sum. If it has
them, it also lends bn_act_ and bn_act_bwd_, which may write their result over the first argument, and bn_relu_bwd,
which takes the ReLU's mask from x.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .cpu_gradients import spread
from .layout import output_format, with_strides_of
from .reference import accumulator, inverse_and_scale, rows_of

OPS = ("bn_act_conv", "bn_act_conv_bwd", "pointwise_bn_act", "pointwise_bn_act_bwd")


def composed_of(backend) -> tuple:
    """The functions of OPS, in that order, from this backend's parts."""
    return tuple(functools.partial(globals()[op], backend) for op in OPS)


def _operand(backend, x, mean, var, bn_weight, bn_bias, eps, relu) -> Tensor:
    """What the convolution multiplies: x after BN and ReLU, or x itself."""
    return x if mean is None else backend.bn_act(x, mean, var, bn_weight, bn_bias, eps, None, relu, True)


def bn_act_conv(backend, x, weight, mean, var, bn_weight, bn_bias, eps, relu, *conv):
    *places, stats = conv
    a = _operand(backend, x, mean, var, bn_weight, bn_bias, eps, relu)
    y = torch.conv2d(a, weight, None, *places).contiguous(memory_format=output_format(x, weight))
    del a
    return y, *(backend.bn_stats(y) if stats else (None, None))


def bn_act_conv_bwd(backend, grad, x, weight, mean, var, bn_weight, bn_bias, eps, relu, *conv):
    *places, (need_x, need_weight, *need_bn) = conv
    format = output_format(x, weight)
    a = _operand(backend, x, mean, var, bn_weight, bn_bias, eps, relu)
    grad = grad.contiguous(memory_format=format)
    da, dweight = backend.conv_gradients(grad, a, weight, *places, [need_x or any(need_bn), need_weight])
    if mean is None:
        return da if da is None else da.contiguous(memory_format=format), dweight, None, None
    bn = (mean, var, bn_weight, bn_bias, eps, relu)
    dx, dbn_weight, dbn_bias = _through_bn(backend, da, a, x, bn, [need_x, *need_bn])
    return dx if dx is None else dx.contiguous(memory_format=format), dweight, dbn_weight, dbn_bias


def _through_bn(backend, da, a, x, bn: tuple, needs):
    if da is None:
        return None, None, None
    da = da.contiguous(memory_format=output_format(x))
    mean, var, bn_weight, bn_bias, eps, relu = bn
    if relu and hasattr(backend, "bn_relu_bwd"):
        return backend.bn_relu_bwd(da, x, mean, var, bn_weight, bn_bias, eps, needs)
    bn_act_bwd = getattr(backend, "bn_act_bwd_", backend.bn_act_bwd)
    return bn_act_bwd(da, a, x, mean, var, bn_weight, eps, relu, True, [*needs, False])[:3]


def covariance(a: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C] and biased covariance [C, C] of the rows a: [M, C], in the accumulator's dtype.

    In 16 bits from the plain products, which float32 holds exactly: their difference is as good as the rounded values.
    """
    acc = accumulator(a.dtype)
    mean = a.mean(0, dtype=acc)
    if a.dtype is acc:
        centred = a - mean
        return mean, _inner(centred, centred).div_(a.shape[0])
    return mean, _inner(a, a).div_(a.shape[0]).addr_(mean, mean, alpha=-1)


def _is_a_convolution(rows: Tensor) -> bool:
    """Whether a product of these rows is left to cuDNN: in float32 a GPU's convolutions may use TF32 where its matrix
    products, by PyTorch's defaults, may not, and are several times slower."""
    return rows.is_cuda and rows.dtype is torch.float32


def _as_maps(rows: Tensor) -> Tensor:
    # The map is one line, not one column: so PyTorch sees by its strides that it is channels_last.
    return rows.reshape(1, 1, *rows.shape).permute(0, 3, 1, 2)


def _inner(g: Tensor, a: Tensor) -> Tensor:
    """g^T a: [K, C], in the accumulator's dtype, of rows g: [M, K] and a: [M, C]."""
    acc = accumulator(a.dtype)
    if _is_a_convolution(a):
        weight = a.new_empty(g.shape[1], a.shape[1], 1, 1)
        conv = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        _, product, _ = torch.ops.aten.convolution_backward(
            _as_maps(g), _as_maps(a), weight, *conv, [False, True, False]
        )
        return product.flatten(1)
    if a.dtype is acc:
        return torch.mm(g.t(), a)
    return torch.mm(g.t(), a, out_dtype=acc) if a.is_cuda else torch.mm(g.t().to(acc), a.to(acc))


def _input_gradient(g: Tensor, folded: Tensor, a: Tensor, turn: Tensor, shift: Tensor) -> Tensor:
    """g folded - a turn + shift, as rows [M, C].

    The small terms come first. Added to what is rounded to 16 bits already, those below half of its last digit would be
    lost in every row: an error that grows with the number of rows, where one of rounding does with its square root.
    """
    return torch.addmm(shift, a, turn, alpha=-1).addmm_(g, folded)


def statistics_of_product(weight: Tensor, a_mean: Tensor, a_cov: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a W^T, both [K], from those of a; weight: [K, C, 1, 1]."""
    w = weight.flatten(1).to(a_cov.dtype)
    return (w * a_mean).sum(1), _exact_product(w, a_cov).mul_(w).sum(1).clamp_min_(0)


def _exact_product(w: Tensor, a_cov: Tensor) -> Tensor:
    """w a_cov for a w of 16-bit values, where TF32, if it is allowed, would leave nothing of what cancels in
    w a_cov w^T: TF32 holds w, and a_cov in two parts."""
    if a_cov.dtype is not torch.float32:
        return torch.mm(w, a_cov)
    upper = upper_bits(a_cov)
    return torch.mm(w, upper).add_(torch.mm(w, a_cov - upper))


def upper_bits(t: Tensor) -> Tensor:
    """What TF32 holds of a float32 tensor, cut off; the rest is t minus that, exactly."""
    return (t.contiguous().view(torch.int32) & -(2**13)).view(torch.float32)


def pointwise_bn_act(backend, x, weight, mean, var, bn_weight, bn_bias, eps, relu, *after):
    out_weight, out_bias, out_eps, residual, stride, out_relu = after
    a = _operand(backend, x, mean, var, bn_weight, bn_bias, eps, relu)
    a_mean, a_cov = covariance(rows_of(a, stride))
    if a.dtype is a_cov.dtype:
        # Exact statistics cost a pass over the raw result; from the covariance they would be off by its rounding.
        raw = torch.conv2d(a, weight, None, stride).contiguous(memory_format=output_format(x, weight))
        del a
        y_mean, y_var = backend.bn_stats(raw)
        bn_act = getattr(backend, "bn_act_", backend.bn_act)
        y = bn_act(raw, y_mean, y_var, out_weight, out_bias, out_eps, residual, out_relu, True)
        return y, y_mean, y_var, a_mean, a_cov
    y_mean, y_var = statistics_of_product(weight, a_mean, a_cov)
    bn = (out_weight, out_bias, y_mean, y_var, out_eps)
    y = backend.conv_bn_act(a, weight, *bn, residual, stride, [0, 0], [1, 1], 1, out_relu)
    return y.contiguous(memory_format=output_format(x, weight)), y_mean, y_var, a_mean, a_cov


def pointwise_bn_act_bwd(backend, grad, y, x, weight, mean, var, bn_weight, bn_bias, eps, relu, *after):
    if _is_a_convolution(x):
        # Where TF32 cuts digits off, an error that is the same in every row would be left of what should cancel.
        loaded = (mean, var, bn_weight, bn_bias, eps, relu)
        return recomputed_bwd(backend, grad, y, x, weight, *loaded, *after)
    out_weight, y_mean, y_var, out_eps, a_mean, a_cov, stride, out_relu, output_mask = after
    need_x, need_weight, need_bn_weight, need_bn_bias, need_out_weight, need_out_bias, need_residual = output_mask
    format, acc = output_format(x, weight), accumulator(x.dtype)
    if out_relu:
        g, sum_g = backend.relu_bwd_sum(*(t.contiguous(memory_format=format) for t in (grad, y)))
    else:
        g, sum_g = grad.contiguous(memory_format=format), grad.sum((0, 2, 3), dtype=acc)
    rows_g = rows_of(g, (1, 1))
    count = rows_g.shape[0]
    dresidual = g.contiguous(memory_format=format) if need_residual else None
    need_a = need_x or need_bn_weight or need_bn_bias
    if not (need_a or need_weight or need_out_weight):
        return None, None, None, None, None, sum_g if need_out_bias else None, dresidual

    a = _operand(backend, x, mean, var, bn_weight, bn_bias, eps, relu)
    rows_a = rows_of(a, stride)
    w = weight.flatten(1)
    wide = w.to(acc)
    inv, scale = inverse_and_scale(acc, out_weight, y_var, out_eps)
    product = _inner(rows_g, rows_a).addr_(sum_g, a_mean, alpha=-1)
    moment = (product * wide).sum(1)
    slope = scale * inv * inv * moment / count
    tilted = slope.unsqueeze(1) * wide
    dx = dweight = dbn_weight = dbn_bias = None
    if need_weight:
        dweight = product.mul_(scale.unsqueeze(1)).sub_(torch.mm(tilted, a_cov), alpha=count)
        dweight = with_strides_of(weight, dweight.view(weight.shape))
    if need_a:
        # The shift of what the products will multiply by, rounded: a gradient whose mean cancels then still does so.
        turn, folded = (t.to(x.dtype) for t in (torch.mm(wide.t(), tilted), scale.unsqueeze(1) * wide))
        shift = torch.mv(turn.t().to(acc), a_mean) - torch.mv(folded.t().to(acc), sum_g / count)
        da = _input_gradient(rows_g, folded, rows_a, turn, shift.to(x.dtype))
        da = spread(da, x.shape, stride)
        if mean is None:
            dx = da
        else:
            needs = [need_x, need_bn_weight, need_bn_bias]
            bn = (mean, var, bn_weight, bn_bias, eps, relu)
            dx, dbn_weight, dbn_bias = _through_bn(backend, da, a, x, bn, needs)
        dx = dx.contiguous(memory_format=format) if need_x else None
    of_out = inv * moment if need_out_weight else None, sum_g if need_out_bias else None
    return dx, dweight, dbn_weight, dbn_bias, *of_out, dresidual


def recomputed_bwd(backend, grad, y, x, weight, mean, var, bn_weight, bn_bias, eps, relu, *after):
    """pointwise_bn_act_bwd by way of the raw result, computed again: more passes, and the rounding of PyTorch's own
    modules, where the short way is off by more."""
    out_weight, y_mean, y_var, out_eps, _, _, stride, out_relu, output_mask = after
    *need_in, need_out_weight, need_out_bias, need_residual = output_mask
    format, loaded = output_format(x, weight), (mean, var, bn_weight, bn_bias, eps, relu)
    raw, _, _ = bn_act_conv(backend, x, weight, *loaded, stride, [0, 0], [1, 1], 1, False)
    grad, y = (t if t is None else t.contiguous(memory_format=format) for t in (grad, y))
    of_out = [any(need_in), need_out_weight, need_out_bias, need_residual]
    draw, dout_weight, dout_bias, dresidual = backend.bn_act_bwd(
        grad, y, raw, y_mean, y_var, out_weight, out_eps, out_relu, True, of_out
    )
    del raw
    gradients = (None,) * 4
    if any(need_in):
        gradients = bn_act_conv_bwd(backend, draw, x, weight, *loaded, stride, [0, 0], [1, 1], 1, need_in)
    return *gradients, dout_weight, dout_bias, dresidual
