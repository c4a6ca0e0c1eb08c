"""What PyTorch binds of cuDNN: the folded convolution with add and ReLU in one call; PyTorch's kernels around it."""

from __future__ import annotations

import functools
import sys

import torch

from ..folding import fold
from . import aten, composed, pooled
from .aten import (  # noqa: F401  (the backend's functions)
    bn_act,
    bn_act_bwd,
    bn_act_bwd_input,
    bn_stats,
    conv_bn_act_bwd,
    conv_gradients,
    relu_bwd_sum,
    stem_conv,
    stem_conv_weight_grad,
)
from .layout import output_format

NAME = "cudnn"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAST_RESORT = pooled.OPS  # passes over the largest maps, indices of eight bytes a value: not worth the memory to time


@functools.cache
def unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device, and torch.cuda.is_available() is False"
    if not torch.backends.cudnn.is_available():
        return "this build of PyTorch has no cuDNN"
    return None


def declines(op: str, x, *args) -> str | None:
    if x.device.type != "cuda":
        return f"needs CUDA tensors, got {x.device}"
    if not torch.backends.cudnn.enabled:
        return "torch.backends.cudnn.enabled is False"
    if x.dtype not in DTYPES:
        return f"needs float16, bfloat16 or float32, got {x.dtype}"
    if x.numel() == 0:
        return "needs a non-empty batch"
    return None


def conv_bn_act(*args):
    x, weight, *bn, eps, residual, stride, padding, dilation, groups, relu = args
    # cuDNN's bindings know no form without a ReLU, and their form without an addend reads an uninitialised one.
    if not relu or residual is None or groups > 1 or not _fuses(x.device.index, x.dtype):
        return aten.conv_bn_act(*args)
    format = output_format(x, weight)
    folded, bias = fold(weight, *bn, eps)
    if bias is None:
        bias = x.new_zeros(weight.shape[0])
    x, folded, residual = (t.contiguous(memory_format=format) for t in (x, folded, residual))
    y = torch.cudnn_convolution_add_relu(x, folded, residual, 1.0, bias, stride, padding, dilation, groups)
    return y.contiguous(memory_format=format)


_fused: dict[tuple, bool] = {}


def _fuses(device: int, dtype: torch.dtype) -> bool:
    """Whether the fused call runs for this dtype on this device and lets NaN and inf through its ReLU: asked once."""
    key = (device, dtype)
    if key not in _fused:
        if torch.cuda.is_current_stream_capturing():
            return False
        try:
            x = torch.ones(1, 64, 8, 8, device=f"cuda:{device}", dtype=dtype)
            x[0, 0, 0, 0], x[0, 0, 7, 7] = float("nan"), float("inf")
            x = x.contiguous(memory_format=torch.channels_last)
            weight = torch.eye(64, device=x.device, dtype=dtype).view(64, 64, 1, 1)
            conv = ([1, 1], [0, 0], [1, 1], 1)
            y = torch.cudnn_convolution_add_relu(x, weight, torch.zeros_like(x), 1.0, x.new_zeros(64), *conv)
            _fused[key] = torch.equal(y.isnan(), torch.conv2d(x, weight).isnan())
        except RuntimeError:
            _fused[key] = False
    return _fused[key]


bn_act_conv, bn_act_conv_bwd, pointwise_bn_act, _ = composed.composed_of(sys.modules[__name__])
pointwise_bn_act_bwd = functools.partial(composed.recomputed_bwd, sys.modules[__name__])
bn_act_pool, bn_act_pool_bwd = pooled.pooled_of(sys.modules[__name__])


def conv_bn_act_pool(x, *args):
    return pooled.conv_bn_act_pool(aten.conv_then_bn_act if pooled.is_apart(x, args[3]) else conv_bn_act, x, *args)
