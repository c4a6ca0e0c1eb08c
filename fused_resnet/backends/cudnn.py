"""What PyTorch binds of cuDNN: the folded convolution with add and ReLU in one call; PyTorch's kernels around it."""

from __future__ import annotations

import functools

import torch

from ..folding import fold
from . import aten
from .aten import bn_act, bn_act_bwd, bn_stats, conv_bn_act_bwd  # noqa: F401  (the backend's functions)
from .layout import output_format

NAME = "cudnn"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
    if not relu:  # cuDNN's bindings have no form without it
        return aten.conv_bn_act(*args)
    format = output_format(x, weight)
    folded, bias = fold(weight, *bn, eps)
    x = x.contiguous(memory_format=format)
    folded = folded.contiguous(memory_format=format)
    conv = (bias, stride, padding, dilation, groups)
    if residual is None:
        y = torch.cudnn_convolution_relu(x, folded, *conv)
    else:
        y = torch.cudnn_convolution_add_relu(x, folded, residual.contiguous(memory_format=format), 1.0, *conv)
    return y.contiguous(memory_format=format)
