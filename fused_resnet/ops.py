"""The ops under the package, torch.ops.fused_resnet.*: schema, fake, autograd, autocast and validation of each.

    conv_bn_act             y = act(BN(conv(x, weight)) + residual) with given (running) statistics
    bn_stats                mean and biased variance per channel
    bn_act                  y = act(BN(x) + residual) with given statistics
    update_running_stats_   the only op that mutates
    conv_bn_act_bwd, bn_act_bwd
    bn_act_bwd_input        dx of bn_act from sums over a batch that is not all here (sync.py)
    bn_act_conv, pointwise_bn_act   and their backwards, in training_ops.py
    stem_conv, bn_act_pool, conv_bn_act_pool  and backwards, in pool_ops.py

To autograd, the statistics of a batch are constants: the op that normalises with them (`bn_act(..., batch_stats=True)`,
`bn_act_conv`, `pointwise_bn_act`) carries their derivative. The `_bwd` ops are differentiable in turn, through the
reference. vmap, torch.func and forward-mode AD raise.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import (
    _after_autograd_keyset,
    _any_requires_grad,
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _dispatch_keys,
    _ExcludeDispatchKeyGuard,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import _profiler_enabled, forward_ad

from . import backends
from .backends import reference, triton_running
from .backends.layout import conv_output_size, output_format
from .backends.reference import accumulator

_lib = torch.library.Library("fused_resnet", "DEF")
_kernels: dict[str, Callable] = {}
_functions: dict[str, type[torch.autograd.Function]] = {}
_casts: dict[str, Callable] = {}
formulas: dict[str, tuple[Callable, Callable]] = {}  # of each op that autograd knows: what it keeps, its derivative

PLACES = "int[] stride, int[] padding, int[] dilation, int groups"
_CONV = f"{PLACES}, bool relu"
_SCHEMAS = {
    "conv_bn_act": "(Tensor x, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, "
    f"Tensor? running_var, float eps, Tensor? residual, {_CONV}) -> Tensor",
    "conv_bn_act_bwd": "(Tensor grad, Tensor? y, Tensor x, Tensor weight, Tensor? bn_weight, Tensor? running_mean, "
    f"Tensor? running_var, float eps, {_CONV}, bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "bn_stats": "(Tensor x) -> (Tensor, Tensor)",
    "bn_act": "(Tensor x, Tensor mean, Tensor var, Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor? residual, "
    "bool relu, bool batch_stats) -> Tensor",
    "bn_act_bwd": "(Tensor grad, Tensor? y, Tensor x, Tensor mean, Tensor var, Tensor? bn_weight, float eps, "
    "bool relu, bool batch_stats, bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    "bn_act_bwd_input": "(Tensor grad, Tensor? y, Tensor x, Tensor mean, Tensor scale, Tensor mean_g, Tensor slope, "
    "bool relu) -> Tensor",
    "update_running_stats_": "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, "
    "Tensor mean, Tensor var, SymInt count, float? momentum) -> ()",
}


def register(name: str, schema: str, kernel, fake) -> None:
    _lib.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def batched(info, in_dims, *args):
        raise NotImplementedError(
            f"fused_resnet::{name} has no batching rule for vmap; put the batch into x: [N, C, H, W]"
        )

    _kernels[name] = kernel
    _lib.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_resnet::{name}", fake, lib=_lib)
    torch.library.register_vmap(f"fused_resnet::{name}", batched, lib=_lib)


def register_autograd(name: str, setup, formula) -> None:
    """torch.library.register_autograd, at a quarter of its cost a call, and with forward mode refused."""
    op = getattr(torch.ops.fused_resnet, name).default
    formulas[name] = setup, formula

    def below(keyset, args):
        with _AutoDispatchBelowAutograd():
            if keyset is None:  # of a call that `direct` makes
                return _kernels[name](*args)
            return op.redispatch(keyset & _after_autograd_keyset, *args)

    def forward(ctx, *args):
        *inputs, keyset = args
        output = below(keyset, inputs)
        ctx.set_materialize_grads(False)
        setup(ctx, inputs, output)
        return output

    def backward(ctx, *grads):
        return *formula(ctx, *grads), None

    _functions[name] = function = type(
        f"{name}_autograd",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def kernel(keyset, *args):
        if forward_ad._current_level >= 0 and any(
            isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args
        ):
            raise NotImplementedError(f"fused_resnet::{name} has no forward-mode derivative; use reverse mode")
        if not (torch.is_grad_enabled() and _any_requires_grad(*args)):
            return below(keyset, args)
        if _are_functorch_transforms_active():
            raise NotImplementedError(f"fused_resnet::{name} has no torch.func derivative; use torch.autograd")
        return function.apply(*args, keyset)

    _lib.impl(name, kernel, "Autograd", with_keyset=True)


# --- past the dispatcher, which would lead through two Python kernels to the same function ---

_local = threading.local()


def handler():
    """What takes the calls of ops in this thread, in place of autograd (one_node.py); None as a rule."""
    return None if torch.compiler.is_compiling() else getattr(_local, "handler", None)


@contextlib.contextmanager
def handed_to(handler):
    """Inside, handler takes the calls: call(name, args), apply(function, args), needs_gradient(t), lowered(t)."""
    before, _local.handler = getattr(_local, "handler", None), handler
    try:
        yield
    finally:
        _local.handler = before


def apply(function: type[torch.autograd.Function], *args):
    """function.apply(*args)."""
    own = handler()
    return function.apply(*args) if own is None else own.apply(function, args)


def needs_gradient(t: Tensor) -> bool:
    own = handler()
    return t.requires_grad and torch.is_grad_enabled() if own is None else own.needs_gradient(t)


def added(a: Tensor, b: Tensor) -> Tensor:
    """a + b."""
    own = handler()
    return a + b if own is None else own.apply(_Sum, (a, b))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.parts = (a.shape, a.dtype), (b.shape, b.dtype)
        return a + b

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.sum_to_size(shape).to(dtype) for shape, dtype in ctx.parts)


def lowered_by_autocast(t: Tensor) -> Tensor:
    """t as an op takes it that autocast lowers, on a device where that is enabled."""
    own = handler()
    if own is not None:
        return own.lowered(t)
    device = t.device.type
    return lowered(t, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else t


def cast(name: str, dtype: torch.dtype, args):
    """The arguments that an op takes under autocast to this dtype."""
    own = _casts.get(name)
    return args if own is None else own(dtype, args)


def direct(name: str) -> Callable:
    """The op, called without the dispatcher where nothing but autograd and autocast have to see it. Of a change in
    place autograd knows from the operators that make it, so such an op must have no function of its own."""
    op = getattr(torch.ops.fused_resnet, name).default
    kinds = [str(argument.type) for argument in op._schema.arguments]
    tensors = [i for i, kind in enumerate(kinds) if "Tensor" in kind]
    numbers = [i for i, kind in enumerate(kinds) if "Tensor" not in kind]
    floats = [i for i in numbers if kinds[i] == "float"]
    lists = [i for i in numbers if kinds[i].startswith("List")]

    def called(args):
        function = _functions.get(name)
        if function is None:
            return _kernels[name](*args)
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            return function.apply(*args, None)
        with _AutoDispatchBelowAutograd():
            return _kernels[name](*args)

    def call(*args):
        own = handler()
        if own is not None:
            return own.call(name, [list(a) if type(a) is tuple else a for a in args])
        if not plain(args, tensors, numbers) or args[0] is None or any(type(args[i]) is not float for i in floats):
            return op(*args)
        if any(type(args[i]) is tuple for i in lists):
            args = [list(a) if type(a) is tuple else a for a in args]  # as the dispatcher has it
        if name not in _casts or not _is_any_autocast_enabled():
            return called(args)
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return called(args)
        with _ExcludeDispatchKeyGuard(AUTOCAST):
            return called(cast(name, torch.get_autocast_dtype(device), args))

    return call


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is at work, which the ops refuse."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def plain(args, tensors: list[int], numbers: list[int]) -> bool:
    """Whether these are an eager call's: plain tensors and numbers, at these places, and no tracer, transform, mode or
    profiler that has to see the op."""
    if (
        torch.compiler.is_compiling()
        or _profiler_enabled()
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or _get_tracing_state() is not None
        or transformed()
    ):
        return False
    for i in tensors:
        a = args[i]
        if a is not None:
            kind = type(a)
            if kind is not Tensor and kind is not torch.nn.Parameter:
                return False
            if not _is_dense(_dispatch_keys(a).raw_repr()):
                return False
    return all(type(args[i]) in _PLAIN for i in numbers)


_PLAIN = {float, int, bool, list, tuple, type(None)}
_DENSE = {*("CPU", "AutogradCPU", "AutocastCPU", "CUDA", "AutogradCUDA", "AutocastCUDA", "ADInplaceOrView")}


@functools.cache
def _is_dense(keys: int) -> bool:
    """Whether a tensor with these dispatch keys is dense, of a CPU or GPU, and neither batched nor lazily negated."""
    named = str(torch._C.DispatchKeySet.from_raw_repr(keys)).partition("(")[2].rstrip(")").split(", ")
    return _DENSE.issuperset(named)


# --- validation: the same in the op and in its fake; every message names the argument ---


def check_given(**tensors: Tensor | None) -> None:
    """The dispatcher takes None for a tensor that is not defined."""
    for name, t in tensors.items():
        if t is None:
            raise TypeError(f"{name}: expected a tensor, got None")


def check_4d(x: Tensor, error: type[Exception]) -> None:
    if x.layout is not torch.strided:
        raise RuntimeError(f"x: expected a strided tensor, got layout {x.layout}")
    if x.dim() != 4:
        raise error(f"x: expected 4D input [N, C, H, W] (got {x.dim()}D input)")
    if not x.is_floating_point():
        raise RuntimeError(f"x: expected a floating dtype, got {x.dtype}")


def check_like(t: Tensor, name: str, x: Tensor) -> None:
    if t.dtype != x.dtype:
        raise RuntimeError(f"{name}: expected {x.dtype}, the type of x, got {t.dtype}")
    _check_device(t, name, x)


def _check_device(t: Tensor, name: str, x: Tensor) -> None:
    if t.device != x.device:
        raise RuntimeError(f"{name}: expected on {x.device}, the device of x, got {t.device}")


def check_vectors(channels, owner: str, x: Tensor, **vectors: Tensor | None) -> None:
    for name, v in vectors.items():
        if v is None:
            continue
        if v.dim() != 1 or v.shape[0] != channels:
            raise RuntimeError(f"{name}: expected [{channels}], one value a channel of {owner}, got {list(v.shape)}")
        if not v.is_floating_point():
            raise RuntimeError(f"{name}: expected a floating dtype, got {v.dtype}")
        _check_device(v, name, x)


def check_residual(residual: Tensor | None, shape, x: Tensor) -> None:
    if residual is not None:
        check_shortcut(residual, shape)
        check_like(residual, "residual", x)


def check_shortcut(residual: Tensor, shape) -> None:
    if residual.dim() != 4 or any(a != b for a, b in zip(residual.shape, shape, strict=True)):
        raise RuntimeError(
            f"residual: expected the output's shape {list(shape)}, got {list(residual.shape)}; where a block changes "
            "channels or size, its shortcut needs a projection (1x1 convolution) or zero_pad"
        )


def check_conv(
    x, weight, bn_weight, bn_bias, running_mean, running_var, eps, residual, stride, padding, dilation, groups, relu
):
    """Raise for what no backend could compute; return the output's shape [N, K, P, Q]."""
    shape = check_places(x, weight, stride, padding, dilation, groups)
    if (running_mean is None) != (running_var is None):
        raise RuntimeError("running_mean and running_var: expected both or neither")
    if running_mean is None and not (bn_weight is None and bn_bias is None):
        raise RuntimeError("running_mean: bn_weight and bn_bias need running_mean and running_var")
    bn = dict(bn_weight=bn_weight, bn_bias=bn_bias, running_mean=running_mean, running_var=running_var)
    check_vectors(weight.shape[0], "the output", x, **bn)
    check_residual(residual, shape, x)
    return shape


def check_places(x, weight, stride, padding, dilation, groups):
    # Conv2d takes 3-D (no batch), so BatchNorm2d is who refuses it, with a ValueError.
    check_4d(x, ValueError if x.dim() == 3 else RuntimeError)
    if weight.dim() != 4:
        raise RuntimeError(f"weight: expected [K, C/groups, R, S], got {list(weight.shape)}")
    check_like(weight, "weight", x)
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise RuntimeError(f"{name}: expected two integers of at least {least}, got {list(pair)}")
    if groups < 1 or weight.shape[0] % groups:
        raise RuntimeError(f"groups: expected a divisor of the {weight.shape[0]} output channels, got {groups}")
    if x.shape[1] != weight.shape[1] * groups:
        raise RuntimeError(
            f"x: expected {weight.shape[1] * groups} channels for weight {list(weight.shape)} and groups={groups}, "
            f"got {list(x.shape)}"
        )
    shape = conv_output_size(x, weight, stride, padding, dilation)
    if shape[2] <= 0 or shape[3] <= 0:
        raise RuntimeError(
            f"x: after padding, maps of {x.shape[2]}x{x.shape[3]} are smaller than the kernel {list(weight.shape[2:])}"
        )
    return shape


def _check_bn(x, mean, var, bn_weight, bn_bias, eps, residual, relu, batch_stats) -> None:
    check_4d(x, ValueError)
    check_vectors(x.shape[1], "x", x, mean=mean, var=var, bn_weight=bn_weight, bn_bias=bn_bias)
    check_residual(residual, x.shape, x)


def _check_stats(x) -> None:
    check_4d(x, ValueError)
    check_values(x.shape)


def check_values(shape) -> None:
    if shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(f"x: expected more than 1 value per channel when training, got input size {list(shape)}")


# --- outputs: shapes and strides, for the fakes ---


def empty(shape, like: Tensor, format: torch.memory_format, dtype=None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=format)


def optional(result, output_mask, like: Tensor):
    """An op cannot return None: gradients that nobody asked for are empty."""
    return tuple(r if on else like.new_empty(0) for r, on in zip(result, output_mask, strict=True))


def _run_bwd(op: str, *args):
    return backends.run(op, *args, finish=_finish_bwd)


def _finish_bwd(args, result):
    grad, _, x, *_ = args
    *gradients, dbn_weight, dbn_bias, dresidual = result
    acc = accumulator(x.dtype)
    of_bn = (d if d is None else d.to(acc) for d in (dbn_weight, dbn_bias))
    if dresidual is not None and dresidual.data_ptr() == grad.data_ptr():
        dresidual = dresidual.clone()  # an op's output may not be its input
    return optional((*gradients, *of_bn, dresidual), args[-1], x)


# --- conv_bn_act ---


def conv_bn_act_kernel(*args):
    check_given(x=args[0], weight=args[1])
    y = backends.repeated(*args)
    return backends.run("conv_bn_act", *args, check=check_conv) if y is None else y


def _conv_bn_act_fake(*args):
    check_given(x=args[0], weight=args[1])
    shape = check_conv(*args)
    return empty(shape, args[0], output_format(*args[:2]))


def _conv_bn_act_bwd_fake(grad, y, x, weight, *args):
    acc, format = accumulator(x.dtype), output_format(x, weight)
    channel = x.new_empty(weight.shape[0], dtype=acc)
    result = (
        empty(x.shape, x, format),
        torch.empty_like(weight),
        channel,
        torch.empty_like(channel),
        empty(grad.shape, x, format),
    )
    return optional(result, args[-1], x)


def _conv_setup(ctx, inputs, output):
    x, weight, bn_weight, bn_bias, running_mean, running_var, eps, residual, *conv = inputs
    statistics = as_they_are(running_mean, running_var)
    ctx.save_for_backward(x, weight, bn_weight, *statistics, output if conv[-1] else None)
    ctx.options = (eps, *conv)
    ctx.bias_dtype = None if bn_bias is None else bn_bias.dtype


def as_they_are(mean: Tensor | None, var: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Copies of running statistics for the backward: a training step in between would update them in place."""
    if mean is None:
        return None, None
    if mean.dtype is var.dtype:
        return torch.stack((mean, var)).unbind()  # one launch
    return mean.clone(), var.clone()


def _conv_backward(ctx, grad):
    none = (None,) * 13
    if grad is None:
        return none
    x, weight, bn_weight, running_mean, running_var, y = ctx.saved_tensors
    needs = ctx.needs_input_grad
    mask = [needs[0], needs[1], needs[2], needs[3], needs[7] and ctx.options[-1]]
    dx = dweight = dbn_weight = dbn_bias = None
    dresidual = grad if needs[7] else None
    if any(mask):
        dx, dweight, dbn_weight, dbn_bias, masked = _conv_bn_act_bwd(
            grad, y, x, weight, bn_weight, running_mean, running_var, *ctx.options, mask
        )
        dresidual = masked if mask[4] else dresidual
    return (
        dx if mask[0] else None,
        dweight if mask[1] else None,
        dbn_weight.to(bn_weight.dtype) if mask[2] else None,
        dbn_bias.to(ctx.bias_dtype) if mask[3] else None,
        *none[4:7],
        dresidual,
        *none[8:],
    )


# --- batch norm ---


def _bn_stats(x):
    return backends.run("bn_stats", x, check=_check_stats)


def _bn_stats_fake(x):
    _check_stats(x)
    mean = x.new_empty(x.shape[1], dtype=accumulator(x.dtype))
    return mean, torch.empty_like(mean)


def _bn_act(*args):
    return backends.run("bn_act", *args, check=_check_bn)


def _bn_act_fake(x, *args):
    _check_bn(x, *args)
    return empty(x.shape, x, output_format(x))


def _bn_act_bwd_fake(grad, y, x, *args):
    format = output_format(x)
    channel = x.new_empty(x.shape[1], dtype=accumulator(x.dtype))
    result = (empty(x.shape, x, format), channel, torch.empty_like(channel), empty(x.shape, x, format))
    return optional(result, args[-1], x)


def _bn_act_bwd_input(*args):
    return backends.run("bn_act_bwd_input", *args, check=_check_bwd_input)


def _check_bwd_input(grad, y, x, mean, scale, mean_g, slope, relu) -> None:
    check_4d(x, RuntimeError)
    for name, t in (("grad", grad), ("y", y)):
        if t is not None and t.shape != x.shape:
            raise RuntimeError(f"{name}: expected {list(x.shape)}, the shape of x, got {list(t.shape)}")
    if relu and y is None:
        raise RuntimeError("y: expected the output under the ReLU, got None")
    check_vectors(x.shape[1], "x", x, mean=mean, scale=scale, mean_g=mean_g, slope=slope)


def _bn_act_bwd_input_fake(grad, y, x, *args):
    _check_bwd_input(grad, y, x, *args)
    return empty(x.shape, x, output_format(x))


def _bn_setup(ctx, inputs, output):
    x, mean, var, bn_weight, bn_bias, eps, residual, relu, batch_stats = inputs
    if not batch_stats:
        mean, var = as_they_are(mean, var)
    ctx.save_for_backward(x, mean, var, bn_weight, output if relu else None)
    ctx.options = (eps, relu, batch_stats)
    ctx.bias_dtype = None if bn_bias is None else bn_bias.dtype


def _bn_backward(ctx, grad):
    if grad is None:
        return (None,) * 9
    x, mean, var, bn_weight, y = ctx.saved_tensors
    needs = ctx.needs_input_grad
    mask = [needs[0], needs[3], needs[4], needs[6] and ctx.options[1]]
    dx = dbn_weight = dbn_bias = None
    dresidual = grad if needs[6] else None
    if any(mask):
        dx, dbn_weight, dbn_bias, masked = _bn_act_bwd(grad, y, x, mean, var, bn_weight, *ctx.options, mask)
        dresidual = masked if mask[3] else dresidual
    return (
        dx if mask[0] else None,
        None,
        None,
        dbn_weight.to(bn_weight.dtype) if mask[1] else None,
        dbn_bias.to(ctx.bias_dtype) if mask[2] else None,
        None,
        dresidual,
        None,
        None,
    )


def _update_running_stats_(running_mean, running_var, num_batches_tracked, mean, var, count, momentum):
    check_vectors(mean.shape[0], "x", mean, running_mean=running_mean, running_var=running_var)
    tensors = (running_mean, running_var, num_batches_tracked, mean, var)
    if momentum is not None and count > 1 and triton_running.follow(*tensors, count, momentum):
        return
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if count == 0:
        return
    follow(running_mean, running_var, num_batches_tracked, mean, var * (count / (count - 1)), momentum)


def follow(running_mean, running_var, num_batches_tracked, mean, unbiased, momentum) -> None:
    """Running statistics after one more batch, which num_batches_tracked counts already."""
    if momentum is None:  # the cumulative average over all batches so far
        momentum = 0.0 if num_batches_tracked is None else 1.0 / float(num_batches_tracked)
    running, batch = [running_mean, running_var], [mean, unbiased]
    if running_mean.dtype is running_var.dtype is mean.dtype:
        torch._foreach_mul_(running, 1 - momentum)  # one launch for both
        torch._foreach_add_(running, batch, alpha=momentum)
        return
    for r, b in zip(running, batch, strict=True):  # other buffers: one rounding, at the store
        r.copy_(r.to(b.dtype) * (1 - momentum) + b * momentum)


def _update_running_stats_fake(running_mean, running_var, num_batches_tracked, mean, var, count, momentum):
    check_vectors(mean.shape[0], "x", mean, running_mean=running_mean, running_var=running_var)


# --- double backward: the derivative of a `_bwd` op is that of its reference ---


def _vjp(function, tensors: dict[int, Tensor | None], args: tuple, grads, needs):
    """Gradients of function(*args) by the tensors at these positions; differentiable in turn."""
    create_graph = torch.is_grad_enabled()
    device = args[0].device.type
    # Autocast would lower the convolutions in the derivative of the reference.
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        leaves = {i: t.view_as(t) if t.requires_grad else t.detach() for i, t in tensors.items() if t is not None}
        wanted = [i for i in leaves if needs[i]]
        for i in wanted:
            if not leaves[i].requires_grad:
                leaves[i].requires_grad_()
        outputs = function(*(leaves.get(i, a) for i, a in enumerate(args)))
        pairs = [
            (o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None and o.requires_grad
        ]
        result = [None] * len(args)
        if wanted and pairs:
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [leaves[i] for i in wanted],
                [g.to(o.dtype) for o, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
            for i, g in zip(wanted, found, strict=True):
                result[i] = g
        return tuple(result)


def _batch_norm_bwd_from_input(grad, y, x, mean, var, bn_weight, eps, relu, batch_stats, output_mask):
    """The reference with the statistics as functions of x, where they are."""
    if batch_stats:
        mean, var = reference.bn_stats(x)
    return reference.bn_act_bwd(grad, y, x, mean, var, bn_weight, eps, relu, batch_stats, output_mask)


def register_double_backward(name: str, function, differentiable: tuple[int, ...]) -> None:
    def setup(ctx, inputs, output):
        tensors = [a for a in inputs if isinstance(a, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.rest = [None if isinstance(a, Tensor) else a for a in inputs]
        ctx.is_tensor = [isinstance(a, Tensor) for a in inputs]

    def backward(ctx, *grads):
        saved = iter(ctx.saved_tensors)
        args = tuple(next(saved) if t else a for t, a in zip(ctx.is_tensor, ctx.rest, strict=True))
        if isinstance(args[-1], list):  # the output mask
            grads = [g if on else None for g, on in zip(grads, args[-1], strict=True)]
        return _vjp(function, {i: args[i] for i in differentiable}, args, grads, ctx.needs_input_grad)

    register_autograd(name, setup, backward)


# --- autocast: activations, weights and the shortcut are cast; BN's vectors stay as they are ---


AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def register_autocast(name: str, cast) -> None:
    """cast(dtype, args): the arguments that the op takes under autocast to this dtype."""
    op = getattr(torch.ops.fused_resnet, name).default
    _casts[name] = cast

    def kernel(device):
        def autocast(keyset, *args):
            with _ExcludeDispatchKeyGuard(AUTOCAST):
                return op(*cast(torch.get_autocast_dtype(device), args))

        return autocast

    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _lib.impl(name, kernel(device), key, with_keyset=True)


def lowered(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype is torch.float64 or not t.is_floating_point() else t.to(dtype)


def _cast_conv(dtype, args):
    x, weight, *bn, residual, stride, padding, dilation, groups, relu = args
    x, weight, residual = (lowered(t, dtype) for t in (x, weight, residual))
    return x, weight, *bn, residual, stride, padding, dilation, groups, relu


def _cast_bn(dtype, args):
    x, *middle, residual, relu, batch_stats = args
    return x, *middle, residual if residual is None else residual.to(x.dtype), relu, batch_stats


for _name, _kernel, _fake in (
    ("conv_bn_act", conv_bn_act_kernel, _conv_bn_act_fake),
    ("conv_bn_act_bwd", functools.partial(_run_bwd, "conv_bn_act_bwd"), _conv_bn_act_bwd_fake),
    ("bn_stats", _bn_stats, _bn_stats_fake),
    ("bn_act", _bn_act, _bn_act_fake),
    ("bn_act_bwd", functools.partial(_run_bwd, "bn_act_bwd"), _bn_act_bwd_fake),
    ("bn_act_bwd_input", _bn_act_bwd_input, _bn_act_bwd_input_fake),
    ("update_running_stats_", _update_running_stats_, _update_running_stats_fake),
):
    register(_name, _SCHEMAS[_name], _kernel, _fake)


def _stats_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output)


register_autograd("conv_bn_act", _conv_setup, _conv_backward)
register_autograd("bn_act", _bn_setup, _bn_backward)
register_autograd("bn_stats", _stats_setup, lambda ctx, *grads: (None,))
register_double_backward("conv_bn_act_bwd", reference.conv_bn_act_bwd, (0, 2, 3, 4))
register_double_backward("bn_act_bwd", _batch_norm_bwd_from_input, (0, 2, 5))
register_double_backward("bn_act_bwd_input", lambda *args: (reference.bn_act_bwd_input(*args),), (0, 2, 3, 4, 5, 6))


_conv_bn_act_bwd, _bn_act_bwd = direct("conv_bn_act_bwd"), direct("bn_act_bwd")


def as_given(dtype, args):
    """A backward inside an autocast region: the types were decided in the forward."""
    return args


register_autocast("conv_bn_act", _cast_conv)
register_autocast("bn_act", _cast_bn)
for _name in ("conv_bn_act_bwd", "bn_act_bwd", "bn_act_bwd_input"):
    register_autocast(_name, as_given)
