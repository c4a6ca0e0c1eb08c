"""The ops of convolutions that stand between batch norms of the batch's own statistics, torch.ops.fused_resnet.*.

    bn_act_conv        raw convolution of relu(BN(x)), BN applied while loading, and the statistics of the result
    pointwise_bn_act   y = act(BN(1x1 convolution of relu(BN(x))) + residual), the raw result not kept
    bn_act_conv_bwd, pointwise_bn_act_bwd

mean and var are x's own statistics (`bn_stats`, or what the op before returned): gradients flow through them. Without
them x is convolved as it is. The mean and variance returned are constants to autograd, as those of `bn_stats`.
"""

from __future__ import annotations

import torch

from . import backends
from .backends import reference
from .backends.layout import in_dtypes, output_format
from .backends.reference import accumulator
from .ops import (
    PLACES,
    as_given,
    check_given,
    check_places,
    check_residual,
    check_values,
    check_vectors,
    direct,
    empty,
    lowered,
    optional,
    register,
    register_autocast,
    register_autograd,
    register_double_backward,
)

_LOADED = "Tensor? mean, Tensor? var, Tensor? bn_weight, Tensor? bn_bias, float eps, bool relu"
_SCHEMAS = {
    "bn_act_conv": f"(Tensor x, Tensor weight, {_LOADED}, {PLACES}, bool stats) -> (Tensor, Tensor, Tensor)",
    "bn_act_conv_bwd": f"(Tensor grad, Tensor x, Tensor weight, {_LOADED}, {PLACES}, bool[] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "pointwise_bn_act": f"(Tensor x, Tensor weight, {_LOADED}, Tensor? out_weight, Tensor? out_bias, float out_eps, "
    "Tensor? residual, int[] stride, bool out_relu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "pointwise_bn_act_bwd": f"(Tensor grad, Tensor? y, Tensor x, Tensor weight, {_LOADED}, Tensor? out_weight, "
    "Tensor y_mean, Tensor y_var, float out_eps, Tensor a_mean, Tensor a_cov, int[] stride, bool out_relu, "
    "bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def _check_loaded(x, mean, var, bn_weight, bn_bias) -> None:
    """The batch norm that a convolution applies to x while loading it."""
    if (mean is None) != (var is None):
        raise RuntimeError("mean and var: expected both or neither")
    if mean is None and not (bn_weight is None and bn_bias is None):
        raise RuntimeError("mean: bn_weight and bn_bias need mean and var")
    check_vectors(x.shape[1], "x", x, mean=mean, var=var, bn_weight=bn_weight, bn_bias=bn_bias)


def _check_bn_act_conv(
    x, weight, mean, var, bn_weight, bn_bias, eps, relu, stride, padding, dilation, groups, stats
):  # fmt: skip
    shape = check_places(x, weight, stride, padding, dilation, groups)
    _check_loaded(x, mean, var, bn_weight, bn_bias)
    if stats:
        check_values(shape)
    return shape


def _check_pointwise(
    x, weight, mean, var, bn_weight, bn_bias, eps, relu, out_weight, out_bias, out_eps, residual, stride, out_relu
):
    shape = check_places(x, weight, stride, [0, 0], [1, 1], 1)
    if weight.shape[2:] != (1, 1):
        raise RuntimeError(f"weight: expected a 1x1 convolution's [K, C, 1, 1], got {list(weight.shape)}")
    _check_loaded(x, mean, var, bn_weight, bn_bias)
    check_vectors(weight.shape[0], "the output", x, out_weight=out_weight, out_bias=out_bias)
    check_residual(residual, shape, x)
    check_values(shape)
    return shape


def _bn_act_conv(*args):
    check_given(x=args[0], weight=args[1])
    return backends.run("bn_act_conv", *args, check=_check_bn_act_conv, finish=_finish_bn_act_conv)


def _finish_bn_act_conv(args, result):
    y, *stats = result
    return result if args[-1] else (y, *optional(stats, (False, False), y.new_empty(0, dtype=accumulator(y.dtype))))


def _bn_act_conv_fake(*args):
    check_given(x=args[0], weight=args[1])
    x, weight = args[:2]
    y = empty(_check_bn_act_conv(*args), x, output_format(x, weight))
    mean, var = (y.new_empty(weight.shape[0] if args[-1] else 0, dtype=accumulator(x.dtype)) for _ in range(2))
    return y, mean, var


def _bn_act_conv_bwd(*args):
    return backends.run("bn_act_conv_bwd", *args, finish=_finish_bn_act_conv_bwd)


def _finish_bn_act_conv_bwd(args, result):
    dx, dweight, *of_bn = result
    acc = accumulator(args[0].dtype)
    return optional((dx, dweight, *(d if d is None else d.to(acc) for d in of_bn)), args[-1], args[1])


def _bn_act_conv_bwd_fake(grad, x, weight, *args):
    channel = x.new_empty(x.shape[1], dtype=accumulator(x.dtype))
    result = (
        empty(x.shape, x, output_format(x, weight)),
        torch.empty_like(weight),
        channel,
        torch.empty_like(channel),
    )
    return optional(result, args[-1], x)


def _bn_act_conv_setup(ctx, inputs, output):
    x, weight, mean, var, bn_weight, bn_bias, *options, stats = inputs
    ctx.save_for_backward(x, weight, mean, var, bn_weight, bn_bias)
    ctx.options = options
    ctx.mark_non_differentiable(*output[1:])


def _bn_act_conv_backward(ctx, grad, *_):
    none = (None,) * 13
    needs = ctx.needs_input_grad
    mask = [needs[0], needs[1], needs[4], needs[5]]
    if grad is None or not any(mask):
        return none
    *tensors, bn_weight, bn_bias = ctx.saved_tensors
    dx, dweight, dbn_weight, dbn_bias = _bn_act_conv_bwd_op(grad, *tensors, bn_weight, bn_bias, *ctx.options, mask)
    vectors = dbn_weight if mask[2] else None, dbn_bias if mask[3] else None
    dtypes = (None if v is None else v.dtype for v in (bn_weight, bn_bias))
    return (
        dx if mask[0] else None,
        dweight if mask[1] else None,
        *none[2:4],
        *in_dtypes(vectors, list(dtypes), not torch.is_grad_enabled()),
        *none[6:],
    )


def _pointwise(*args):
    check_given(x=args[0], weight=args[1])
    return backends.run("pointwise_bn_act", *args, check=_check_pointwise)


def _pointwise_fake(*args):
    check_given(x=args[0], weight=args[1])
    x, weight = args[:2]
    acc = accumulator(x.dtype)
    y = empty(_check_pointwise(*args), x, output_format(x, weight))
    y_mean, y_var = (x.new_empty(weight.shape[0], dtype=acc) for _ in range(2))
    return y, y_mean, y_var, x.new_empty(x.shape[1], dtype=acc), x.new_empty(x.shape[1], x.shape[1], dtype=acc)


def _pointwise_bwd(*args):
    return backends.run("pointwise_bn_act_bwd", *args, finish=_finish_pointwise_bwd)


def _finish_pointwise_bwd(args, result):
    grad, *gradients, dresidual = args[0], *result
    acc = accumulator(grad.dtype)
    gradients = (*gradients[:2], *(d if d is None else d.to(acc) for d in gradients[2:]))
    if dresidual is not None and dresidual.data_ptr() == grad.data_ptr():
        dresidual = dresidual.clone()  # an op's output may not be its input
    return optional((*gradients, dresidual), args[-1], grad)


def _pointwise_bwd_fake(grad, y, x, weight, *args):
    format = output_format(x, weight)
    c, k = (x.new_empty(n, dtype=accumulator(x.dtype)) for n in (x.shape[1], weight.shape[0]))
    vectors = (c, torch.empty_like(c), k, torch.empty_like(k))
    result = (empty(x.shape, x, format), torch.empty_like(weight), *vectors, empty(grad.shape, x, format))
    return optional(result, args[-1], x)


def _pointwise_setup(ctx, inputs, output):
    *before, out_weight, out_bias, out_eps, residual, stride, out_relu = inputs
    y, y_mean, y_var, a_mean, a_cov = output
    x, weight, mean, var, bn_weight, bn_bias, *ctx.loaded = before
    tensors = (x, weight, mean, var, bn_weight, bn_bias, out_weight, y_mean, y_var, a_mean, a_cov)
    ctx.save_for_backward(y if out_relu else None, *tensors)
    ctx.options = (out_eps, stride, out_relu)
    ctx.bias_dtype = None if out_bias is None else out_bias.dtype
    ctx.mark_non_differentiable(*output[1:])


def _pointwise_backward(ctx, grad, *_):
    none = (None,) * 14
    if grad is None:
        return none
    y, x, weight, mean, var, bn_weight, bn_bias, out_weight, y_mean, y_var, a_mean, a_cov = ctx.saved_tensors
    out_eps, stride, out_relu = ctx.options
    needs = ctx.needs_input_grad
    mask = [*(needs[i] for i in (0, 1, 4, 5, 8, 9)), needs[11] and out_relu]
    gradients = (None,) * 7
    if any(mask):
        given = (mean, var, bn_weight, bn_bias, *ctx.loaded, out_weight, y_mean, y_var, out_eps, a_mean, a_cov)
        gradients = _pointwise_bwd_op(grad, y, x, weight, *given, stride, out_relu, mask)
    dx, dweight, dbn_weight, dbn_bias, dout_weight, dout_bias, dresidual = (
        g if on else None for g, on in zip(gradients, mask, strict=True)
    )
    dtypes = [*(None if v is None else v.dtype for v in (bn_weight, bn_bias, out_weight)), ctx.bias_dtype]
    vectors = in_dtypes((dbn_weight, dbn_bias, dout_weight, dout_bias), dtypes, not torch.is_grad_enabled())
    return (
        dx,
        dweight,
        *none[2:4],
        *vectors[:2],
        *none[6:8],
        *vectors[2:],
        None,
        dresidual if out_relu or not needs[11] else grad,
        *none[12:],
    )


def _bn_act_conv_bwd_from_input(grad, x, weight, mean, var, *args):
    if mean is not None:
        mean, var = reference.bn_stats(x)
    return reference.bn_act_conv_bwd(grad, x, weight, mean, var, *args)


def _pointwise_bwd_from_input(grad, y, x, weight, mean, var, *args):
    *loaded, out_weight, y_mean, y_var, out_eps, a_mean, a_cov, stride, out_relu, output_mask = args
    if mean is not None:
        mean, var = reference.bn_stats(x)
    _, y_mean, y_var, *_ = reference.pointwise_bn_act(
        x, weight, mean, var, *loaded, out_weight, None, out_eps, None, stride, False
    )
    args = (*loaded, out_weight, y_mean, y_var, out_eps, a_mean, a_cov, stride, out_relu, output_mask)
    return reference.pointwise_bn_act_bwd(grad, y, x, weight, mean, var, *args)


def _cast_bn_act_conv(dtype, args):
    x, weight, *rest = args
    return *(lowered(t, dtype) for t in (x, weight)), *rest


def _cast_pointwise(dtype, args):
    x, weight, *middle, residual, stride, out_relu = args
    x, weight, residual = (lowered(t, dtype) for t in (x, weight, residual))
    return x, weight, *middle, residual, stride, out_relu


register("bn_act_conv", _SCHEMAS["bn_act_conv"], _bn_act_conv, _bn_act_conv_fake)
register("bn_act_conv_bwd", _SCHEMAS["bn_act_conv_bwd"], _bn_act_conv_bwd, _bn_act_conv_bwd_fake)
register("pointwise_bn_act", _SCHEMAS["pointwise_bn_act"], _pointwise, _pointwise_fake)
register("pointwise_bn_act_bwd", _SCHEMAS["pointwise_bn_act_bwd"], _pointwise_bwd, _pointwise_bwd_fake)
register_autograd("bn_act_conv", _bn_act_conv_setup, _bn_act_conv_backward)
register_autograd("pointwise_bn_act", _pointwise_setup, _pointwise_backward)
register_double_backward("bn_act_conv_bwd", _bn_act_conv_bwd_from_input, (0, 1, 2, 5, 6))
register_double_backward("pointwise_bn_act_bwd", _pointwise_bwd_from_input, (0, 2, 3, 6, 7, 10))
register_autocast("bn_act_conv", _cast_bn_act_conv)
register_autocast("pointwise_bn_act", _cast_pointwise)
register_autocast("bn_act_conv_bwd", as_given)
register_autocast("pointwise_bn_act_bwd", as_given)
_bn_act_conv_bwd_op, _pointwise_bwd_op = direct("bn_act_conv_bwd"), direct("pointwise_bn_act_bwd")
