"""The ops of a stem, torch.ops.fused_resnet.*:

    stem_conv        y = convolution 7x7 stride 2 padding 3 of x; the gradient of x is PyTorch's
    stem_conv_weight_grad
    bn_act_pool      (y, winner) of y = max_pool 3x3 stride 2 padding 1 of relu(BN(x)), with x's own statistics
    bn_act_pool_bwd
    conv_bn_act_pool y = max_pool 3x3 stride 2 padding 1 of relu(BN(stem_conv)), with given (running) statistics

winner: uint8, each window's first largest position (3 * row + column), 9 where nothing is above zero; a constant to
autograd. mean and var are constants too, as everywhere: the op carries their derivative.
"""

from __future__ import annotations

import torch

from . import backends
from .backends import aten, pooled, reference
from .backends.layout import output_format
from .backends.reference import accumulator
from .backends.stem_conv import KERNEL, PLACES
from .ops import (
    as_given,
    as_they_are,
    check_4d,
    check_conv,
    check_given,
    check_like,
    check_places,
    check_values,
    check_vectors,
    empty,
    lowered,
    optional,
    register,
    register_autocast,
    register_autograd,
    register_double_backward,
)

_SCHEMAS = {
    "stem_conv": "(Tensor x, Tensor weight) -> Tensor",
    "stem_conv_weight_grad": "(Tensor grad, Tensor x, Tensor weight) -> Tensor",
    "bn_act_pool": "(Tensor x, Tensor mean, Tensor var, Tensor? bn_weight, Tensor? bn_bias, float eps) "
    "-> (Tensor, Tensor)",
    "bn_act_pool_bwd": "(Tensor grad, Tensor x, Tensor winner, Tensor mean, Tensor var, Tensor? bn_weight, float eps, "
    "bool[] output_mask) -> (Tensor, Tensor, Tensor)",
    "conv_bn_act_pool": "(Tensor x, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, "
    "Tensor? running_var, float eps) -> Tensor",
}


def _check_stem_conv(x, weight):
    shape = check_places(x, weight, *PLACES)
    _check_kernel(weight)
    return shape


def _check_kernel(weight):
    if weight.shape[2:] != KERNEL:
        raise RuntimeError(f"weight: expected a 7x7 convolution's [K, C, 7, 7], got {list(weight.shape)}")


def _stem_conv(x, weight):
    check_given(x=x, weight=weight)
    return backends.run("stem_conv", x, weight, check=_check_stem_conv)


def _stem_conv_fake(x, weight):
    check_given(x=x, weight=weight)
    return empty(_check_stem_conv(x, weight), x, output_format(x, weight))


def _stem_conv_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _stem_conv_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    if grad is None:
        return None, None
    dx, _ = aten.conv_gradients(grad, x, weight, *PLACES, [True, False]) if need_x else (None, None)
    return dx, torch.ops.fused_resnet.stem_conv_weight_grad.default(grad, x, weight) if need_weight else None


def _check_stem_conv_weight_grad(grad, x, weight):
    shape = _check_stem_conv(x, weight)
    check_like(grad, "grad", x)
    if list(grad.shape) != list(shape):
        raise RuntimeError(f"grad: expected the convolution's {list(shape)}, got {list(grad.shape)}")


def _stem_conv_weight_grad(grad, x, weight):
    check_given(grad=grad, x=x, weight=weight)
    return backends.run("stem_conv_weight_grad", grad, x, weight, check=_check_stem_conv_weight_grad)


def _stem_conv_weight_grad_fake(grad, x, weight):
    check_given(grad=grad, x=x, weight=weight)
    _check_stem_conv_weight_grad(grad, x, weight)
    return torch.empty_like(weight)


def _cast_stem_conv(dtype, args):
    return tuple(lowered(t, dtype) for t in args)


def _check(x, mean, var, bn_weight, bn_bias, eps) -> None:
    check_4d(x, ValueError)
    check_vectors(x.shape[1], "x", x, mean=mean, var=var, bn_weight=bn_weight, bn_bias=bn_bias)
    check_values(x.shape)
    if min(x.shape[2:]) < 1:
        raise RuntimeError(f"x: expected maps that are not empty, got {list(x.shape)}")


def _bn_act_pool(*args):
    check_given(x=args[0], mean=args[1], var=args[2])
    return backends.run("bn_act_pool", *args, check=_check)


def _bn_act_pool_fake(x, mean, *args):
    check_given(x=x, mean=mean, var=args[0])
    _check(x, mean, *args)
    shape, format = (*x.shape[:2], *pooled.size(*x.shape[2:])), output_format(x)
    return empty(shape, x, format), empty(shape, x, format, torch.uint8)


def _bn_act_pool_bwd(*args):
    return backends.run("bn_act_pool_bwd", *args, finish=_finish_bn_act_pool_bwd)


def _finish_bn_act_pool_bwd(args, result):
    x, (dx, *of_bn) = args[1], result
    acc = accumulator(x.dtype)
    return optional((dx, *(d if d is None else d.to(acc) for d in of_bn)), args[-1], x)


def _bn_act_pool_bwd_fake(grad, x, *args):
    channel = x.new_empty(x.shape[1], dtype=accumulator(x.dtype))
    return optional((empty(x.shape, x, output_format(x)), channel, torch.empty_like(channel)), args[-1], x)


def _setup(ctx, inputs, output):
    x, mean, var, bn_weight, bn_bias, ctx.eps = inputs
    ctx.save_for_backward(x, output[1], mean, var, bn_weight)
    ctx.bias_dtype = None if bn_bias is None else bn_bias.dtype
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    needs = ctx.needs_input_grad
    mask = [needs[0], needs[3], needs[4]]
    if grad is None or not any(mask):
        return (None,) * 6
    x, winner, mean, var, bn_weight = ctx.saved_tensors
    dx, dbn_weight, dbn_bias = torch.ops.fused_resnet.bn_act_pool_bwd.default(
        grad, x, winner, mean, var, bn_weight, ctx.eps, mask
    )
    return (
        dx if mask[0] else None,
        None,
        None,
        dbn_weight.to(bn_weight.dtype) if mask[1] else None,
        dbn_bias.to(ctx.bias_dtype) if mask[2] else None,
        None,
    )


def _bwd_from_input(grad, x, winner, mean, var, *args):
    """The reference with the statistics as functions of x."""
    return reference.bn_act_pool_bwd(grad, x, winner, *reference.bn_stats(x), *args)


def _check_conv_bn_act_pool(x, weight, *bn):
    shape = check_conv(x, weight, *bn, None, *PLACES, True)
    _check_kernel(weight)
    return (*shape[:2], *pooled.size(*shape[2:]))


def _conv_bn_act_pool(*args):
    check_given(x=args[0], weight=args[1])
    return backends.run("conv_bn_act_pool", *args, check=_check_conv_bn_act_pool)


def _conv_bn_act_pool_fake(*args):
    check_given(x=args[0], weight=args[1])
    return empty(_check_conv_bn_act_pool(*args), args[0], output_format(*args[:2]))


def _conv_bn_act_pool_setup(ctx, inputs, output):
    x, weight, bn_weight, bn_bias, mean, var, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bn_weight, bn_bias, *as_they_are(mean, var))
    ctx.bias_dtype = None if bn_bias is None else bn_bias.dtype


def _conv_bn_act_pool_backward(ctx, grad):
    """By way of the map in front of the pool, which is computed again: the op is for those that want no gradient."""
    needs = ctx.needs_input_grad[:4]
    if grad is None or not any(needs):
        return (None,) * 7
    x, weight, bn_weight, bn_bias, *statistics = ctx.saved_tensors
    conv = (ctx.eps, None, *PLACES, True)
    a = torch.ops.fused_resnet.conv_bn_act.default(x, weight, bn_weight, bn_bias, *statistics, *conv)
    window = ([3, 3], [2, 2], [1, 1], [1, 1], False)
    _, at = torch.ops.aten.max_pool2d_with_indices.default(a, *window)
    g = torch.ops.aten.max_pool2d_with_indices_backward.default(grad, a, *window, at)
    dx, dweight, dbn_weight, dbn_bias, _ = torch.ops.fused_resnet.conv_bn_act_bwd.default(
        g, a, x, weight, bn_weight, *statistics, ctx.eps, *PLACES, True, [*needs, False]
    )
    return (
        dx if needs[0] else None,
        dweight if needs[1] else None,
        dbn_weight.to(bn_weight.dtype) if needs[2] else None,
        dbn_bias.to(ctx.bias_dtype) if needs[3] else None,
        *(None,) * 3,
    )


register("stem_conv", _SCHEMAS["stem_conv"], _stem_conv, _stem_conv_fake)
register(
    "stem_conv_weight_grad", _SCHEMAS["stem_conv_weight_grad"], _stem_conv_weight_grad, _stem_conv_weight_grad_fake
)
register("bn_act_pool", _SCHEMAS["bn_act_pool"], _bn_act_pool, _bn_act_pool_fake)
register("bn_act_pool_bwd", _SCHEMAS["bn_act_pool_bwd"], _bn_act_pool_bwd, _bn_act_pool_bwd_fake)
register("conv_bn_act_pool", _SCHEMAS["conv_bn_act_pool"], _conv_bn_act_pool, _conv_bn_act_pool_fake)
register_autograd("conv_bn_act_pool", _conv_bn_act_pool_setup, _conv_bn_act_pool_backward)
register_autograd("stem_conv", _stem_conv_setup, _stem_conv_backward)
register_autograd("bn_act_pool", _setup, _backward)
register_double_backward("stem_conv_weight_grad", lambda *args: (reference.stem_conv_weight_grad(*args),), (0, 1))
register_double_backward("bn_act_pool_bwd", _bwd_from_input, (0, 1, 5))
register_autocast("stem_conv", _cast_stem_conv)
register_autocast("stem_conv_weight_grad", as_given)
register_autocast("conv_bn_act_pool", lambda dtype, args: (*_cast_stem_conv(dtype, args[:2]), *args[2:]))
register_autocast("bn_act_pool", as_given)
register_autocast("bn_act_pool_bwd", as_given)
