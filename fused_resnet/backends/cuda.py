"""The compiled extension: kernels of csrc/, or the reason why they are absent.

Also home of what else the library carries: `fingerprint` for tensors on a CPU, and the facts of the build. The kernels
work on channels_last tensors; the functions here bring arguments there and results into the layout of the contract.
"""

from __future__ import annotations

import functools
import types

import torch
from torch import Tensor

from . import aten, composed, cuda_conv, cudnn, pooled, triton
from . import stem_conv as stem
from .layout import as_float32_vectors, as_rows, conv_output_size, output_format, with_strides_of
from .library import FACTS, build_facts, chip, covers, load

NAME = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = (
    *("conv_bn_act", "bn_stats", "bn_act", "bn_act_bwd", "bn_act_bwd_input", "conv_bn_act_bwd"),
    *composed.OPS,
    *pooled.OPS,
    *stem.OPS,
)


def fingerprint(tensors: list[Tensor]) -> Tensor | None:
    """128 bits a tensor over its bytes, dtype, shape and strides: int64 [len(tensors), 2] on the CPU.

    Two different tensors agree with probability below 2**-62 (csrc/cpu/hash128.h). tensors: on the CPU. None, for
    there is no proof then, if the compiled ops are absent or a tensor is neither contiguous nor channels_last.
    """
    if load() is not None or not tensors:
        return None
    if not all(t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last) for t in tensors):
        return None
    return torch.ops.fused_resnet_cpu.fingerprint(tensors)


def unchanged(tensors: list[Tensor], proof: Tensor) -> bool:
    """Whether `fingerprint(tensors)` would be `proof`, which came from it."""
    return torch.ops.fused_resnet_cpu.unchanged.default(tensors, proof)


@functools.cache
def unavailable() -> str | None:
    if reason := load():
        return reason
    if not build_facts().get("cuda"):
        return build_facts().get("cuda_missing") or f"{FACTS.name} is missing, so nothing tells of CUDA kernels"
    return None if torch.cuda.is_available() else "needs a CUDA device"


@functools.cache
def _lacks_code_for(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    archs = build_facts()["archs"]
    if covers(archs, capability):
        return None
    return f"has code for {', '.join(archs)}, the device is sm_{capability[0]}{capability[1]}"


def declines(op: str, x: Tensor, *args) -> str | None:
    if op not in OPS:
        return f"has no {op}"
    if not x.is_cuda:
        return f"needs CUDA tensors, got {x.device}"
    if x.dtype not in DTYPES:
        return f"needs {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, got {x.dtype}"
    if x.numel() == 0:
        return "needs a non-empty batch"
    if reason := _lacks_code_for(x.device.index):
        return reason
    if op in ("stem_conv", "conv_bn_act_pool"):
        return stem.declines(x, args[0], op)
    if op == "stem_conv_weight_grad":
        return stem.declines_weight_grad(x, *args)
    return _declines_conv(x, *args) if op == "conv_bn_act" else None


def _declines_conv(x: Tensor, weight: Tensor, *args) -> str | None:
    stride, padding, dilation, groups, _ = args[6:]
    if groups != 1:
        return f"has conv_bn_act for groups == 1, got {groups}"
    for name, t in (("x", x), ("weight", weight), ("residual", args[5])):
        if t is not None and t.dtype is not x.dtype:
            return f"needs {name} in {x.dtype}, got {t.dtype}"
        if t is not None and t.data_ptr() % 16:
            return f"needs {name} at a multiple of 16 bytes"
    shape = cuda_conv.shape_of(x.shape, weight.shape, stride, padding, dilation)
    return cuda_conv.declines(shape, x.dtype, *chip(x.device))


def defers(op: str, *args) -> str | None:
    """Why an automatic choice passes over this call, though it can run here."""
    if op == "conv_bn_act":
        return "its convolutions are the tuner's, which tries them in a process of its own"
    if op == "conv_bn_act_bwd" and not args[-2]:
        return "without a ReLU all of it is PyTorch's"
    return None


def variant(op: str, x: Tensor, *args) -> tuple | None:
    """The compiled convolution that a call takes and whether it divides the reduction; the edges of a pool's map."""
    if op in pooled.OPS:
        maps = args[0] if op == "bn_act_pool_bwd" else x
        return _pool_variant(maps.shape, maps)
    if op == "stem_conv":
        return stem.variant(x, *args)
    if op == "conv_bn_act_pool":
        if not pooled.is_apart(x, args[3]):
            return stem.pool_variant(x, args[0])
        shape = conv_output_size(x, args[0], *stem.PLACES[:3])
        return *stem.variant(x, args[0]), *_pool_variant(shape, x)
    if op == "stem_conv_weight_grad":
        return stem.weight_grad_variant(x, *args)
    places = None
    if op == "conv_bn_act":
        places = args[7:10]
    elif op == "pointwise_bn_act" and _compiles_pointwise(x, *args):
        places = (args[11], *_POINTWISE)
    if places is None:
        return None
    instance, shape = _instance(x, args[0], *places)
    found = instance.name, cuda_conv.plan(instance.index, shape, chip(x.device)[1]) > 0
    return found if op == "conv_bn_act" else (*found, triton.gram_variant(x, args[11]))


def _instance(x: Tensor, weight: Tensor, *places) -> tuple[cuda_conv.Instance, cuda_conv.Shape]:
    """places: stride, padding, dilation."""
    shape = cuda_conv.shape_of(x.shape, weight.shape, *places)
    return cuda_conv.candidates(shape, x.dtype, *chip(x.device))[0], shape


class _Convolution:
    """conv_bn_act for calls of one kind: the instance is chosen once."""

    def __init__(self, x, weight, *rest):
        self.instance, _ = _instance(x, weight, *rest[6:9])
        self.format = output_format(x, weight)

    def __call__(self, x, weight, *rest):
        *bn, eps, residual, stride, padding, dilation, _, relu = rest
        tensors = (as_rows(x), as_rows(weight), *as_float32_vectors(*bn), eps, as_rows(residual))
        y = torch.ops.fused_resnet_cuda.conv_bn_act(self.instance.index, *tensors, stride, padding, dilation, relu)
        return _laid_out(y, self.format)


def prepare(op: str, *args):
    """The function for this call and for all of the same shapes, strides, alignments, dtypes and options."""
    if op == "conv_bn_act":
        return _Convolution(*args)
    if op == "pointwise_bn_act" and _compiles_pointwise(*args):
        return _Pointwise(*args)
    return globals()[op]


_POINTWISE = [0, 0], [1, 1]  # padding, dilation


def _compiles_pointwise(x: Tensor, weight: Tensor, *args) -> bool:
    """Whether `_Pointwise` can run this call of pointwise_bn_act: what it takes of Triton is there, and a convolution
    with a batch norm in its epilogue."""
    if x.dtype not in cuda_conv.DTYPES or triton.unavailable() is not None or triton.interpreting():
        return False
    residual, stride, out_relu = args[9:]
    reason = _declines_conv(x, weight, *[None] * 5, residual, stride, *_POINTWISE, 1, out_relu)
    return reason is None and triton.launches(x.device)


class _Pointwise:
    """pointwise_bn_act for calls of one kind: what the convolution reads is written once; its covariance, and from that
    the statistics of what is never stored, come from Triton's kernels; the compiled convolution does all else."""

    def __init__(self, x, weight, *args):
        stride = args[-2]
        self.instance, _ = _instance(x, weight, stride, *_POINTWISE)
        self.format = output_format(x, weight)
        self.gram, self.statistics = triton.prepared_training("gram"), triton.prepared_training("product_statistics")

    def __call__(self, x, weight, mean, var, bn_weight, bn_bias, eps, relu, *after):
        out_weight, out_bias, out_eps, residual, stride, out_relu = after
        a = as_rows(x if mean is None else bn_act(x, mean, var, bn_weight, bn_bias, eps, None, relu, True))
        a_mean, a_cov = self.gram(a, *[None] * 4, 0.0, False, stride)
        y_mean, y_var, scale, shift = self.statistics(weight, a_mean, a_cov, out_weight, out_bias, out_eps)
        y = torch.ops.fused_resnet_cuda.conv_bias_act(
            self.instance.index, a, as_rows(weight), shift, scale, as_rows(residual), None, None, 1, stride,
            *_POINTWISE, out_relu,
        )  # fmt: skip
        return _laid_out(y, self.format), y_mean, y_var, a_mean, a_cov


def _laid_out(t: Tensor, format: torch.memory_format) -> Tensor:
    """t in this format, with the strides torch.empty gives it: dimensions of one included, as the fakes have them."""
    t = t.contiguous(memory_format=format)
    n, c, h, w = t.shape
    strides = (c * h * w, 1, w * c, c) if format is torch.channels_last else (c * h * w, h * w, w, 1)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


def conv_bn_act(*args):
    """One kernel, and before it a small one for scale and shift of a BN."""
    return _Convolution(*args)(*args)


def bn_stats(x):
    return torch.ops.fused_resnet_cuda.bn_stats(as_rows(x))


def bn_act(x, mean, var, bn_weight, bn_bias, eps, residual, relu, batch_stats):
    mean, var, bn_weight, bn_bias = as_float32_vectors(mean, var, bn_weight, bn_bias)
    y = torch.ops.fused_resnet_cuda.bn_act(as_rows(x), mean, var, bn_weight, bn_bias, eps, as_rows(residual), relu)
    return _laid_out(y, output_format(x))


def bn_act_bwd(grad, y, x, mean, var, bn_weight, eps, relu, batch_stats, output_mask):
    need_x, need_weight, need_bias, need_residual = output_mask
    mean, var, bn_weight = as_float32_vectors(mean, var, bn_weight)
    dx, dweight, dbias, g = torch.ops.fused_resnet_cuda.bn_act_bwd(
        as_rows(grad),
        as_rows(y) if relu else None,
        as_rows(x),
        mean,
        var,
        bn_weight,
        eps,
        batch_stats,
        need_x,
        need_weight or need_bias,
        need_residual,
    )
    format = output_format(x)
    return (
        _laid_out(dx, format) if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        _laid_out(g, format) if need_residual else None,
    )


def _bn_relu_bwd(grad, x, mean, var, bn_weight, bn_bias, eps, needs):
    """(dx, dbn_weight, dbn_bias) of relu(BN(x)) with x's own statistics: the mask comes from x."""
    need_x, need_weight, need_bias = needs
    vectors = as_float32_vectors(mean, var, bn_weight, bn_bias)
    dx, dweight, dbias = torch.ops.fused_resnet_cuda.bn_relu_bwd(as_rows(grad), as_rows(x), *vectors, eps, need_x)
    return (
        _laid_out(dx, output_format(x)) if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
    )


def bn_act_bwd_input(grad, y, x, mean, scale, mean_g, slope, relu):
    vectors = as_float32_vectors(mean, scale, mean_g, slope)
    y = as_rows(y) if relu else None
    dx = torch.ops.fused_resnet_cuda.bn_act_bwd_input(as_rows(grad), y, as_rows(x), *vectors)
    return _laid_out(dx, output_format(x))


def bn_act_pool(x, *args):
    *bn, eps = args
    y, winner = torch.ops.fused_resnet_cuda.bn_act_pool(as_rows(x), *as_float32_vectors(*bn), eps)
    format = output_format(x)
    return _laid_out(y, format), _laid_out(winner, format)


def bn_act_pool_bwd(grad, x, winner, mean, var, bn_weight, eps, output_mask):
    need_x, need_weight, need_bias = output_mask
    maps, vectors = map(as_rows, (grad, x, winner)), as_float32_vectors(mean, var, bn_weight)
    dx, dweight, dbias = torch.ops.fused_resnet_cuda.bn_act_pool_bwd(*maps, *vectors, eps, need_x)
    return (
        _laid_out(dx, output_format(x)) if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
    )


def stem_conv(x, weight):
    return _laid_out(stem.stem_conv(x, weight), output_format(x, weight))


def _pool_variant(shape, like: Tensor) -> tuple:
    """Of a map of this shape in the dtype and on the device of `like`."""
    return shape[2] % 2, shape[3] % 2, *pooled.walks(*shape, like.element_size(), chip(like.device)[1])


def conv_bn_act_pool(x, weight, bn_weight, bn_bias, mean, var, eps):
    if pooled.is_apart(x, mean):
        y = bn_act_pool(stem.stem_conv(x, weight), mean, var, bn_weight, bn_bias, eps)[0]
    else:
        y = stem.conv_bn_act_pool(x, weight, bn_weight, bn_bias, mean, var, eps)
    return _laid_out(y, output_format(x, weight))


def stem_conv_weight_grad(grad, x, weight):
    return with_strides_of(weight, stem.weight_grad(grad, x, weight))


def conv_bn_act_bwd(grad, y, x, weight, *rest):
    """The mask and the sum of the masked gradient in one pass; the convolution's gradients by PyTorch's own kernels."""
    if not rest[-2]:
        return aten.conv_bn_act_bwd(grad, y, x, weight, *rest)
    g, sum_g = torch.ops.fused_resnet_cuda.relu_bwd_sum(as_rows(grad), as_rows(y))
    g = g.contiguous(memory_format=output_format(x, weight))
    return aten.conv_bn_act_bwd_masked(g, sum_g, x, weight, *rest)


# Convolutions are PyTorch's here, all else is compiled.
_parts = types.SimpleNamespace(
    bn_stats=bn_stats,
    bn_act=bn_act,
    bn_act_bwd=bn_act_bwd,
    bn_relu_bwd=_bn_relu_bwd,
    conv_bn_act=cudnn.conv_bn_act,
    conv_gradients=aten.conv_gradients,
    relu_bwd_sum=lambda grad, y: torch.ops.fused_resnet_cuda.relu_bwd_sum(as_rows(grad), as_rows(y)),
)
bn_act_conv, bn_act_conv_bwd, pointwise_bn_act, pointwise_bn_act_bwd = composed.composed_of(_parts)
