"""The compiled extension: kernels of csrc/, or the reason why they are absent.

Also home of what else the library carries: `fingerprint` for tensors on a CPU, and the facts of the build. The kernels
work on channels_last tensors; the functions here bring arguments there and results into the layout of the contract.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from . import aten
from .layout import output_format

NAME = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = ("bn_stats", "bn_act", "bn_act_bwd", "conv_bn_act_bwd")

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARY = _PACKAGE / "libfused_resnet_ops.so"
_FACTS = _PACKAGE / "_build_facts.json"


@functools.cache
def build_facts() -> dict:
    """What was built: versions, compilers, archs, kernels, why what is missing is missing. Empty if nothing was."""
    return json.loads(_FACTS.read_text()) if _FACTS.exists() else {}


@functools.cache
def load() -> str | None:
    """Load the compiled ops; the reason if that fails, else None."""
    if hasattr(torch.ops.fused_resnet_cpu, "fingerprint"):
        return None  # loaded from elsewhere: a second copy could not register the same ops
    if not _LIBRARY.exists():
        return build_facts().get("missing") or f"{_LIBRARY.name} was not built; `pip install` builds it"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"{_LIBRARY.name} does not load: {error}"
    return None


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
        return build_facts().get("cuda_missing") or f"{_FACTS.name} is missing, so nothing tells of CUDA kernels"
    return None if torch.cuda.is_available() else "needs a CUDA device"


def covers(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a device: SASS within its major version, PTX on what is newer."""
    for arch in archs:
        kind, _, number = arch.partition("_")
        major, minor = divmod(int(number.rstrip("af")), 10)
        if number[-1].isalpha():
            fits = capability == (major, minor)
        elif kind == "sm":
            fits = capability[0] == major and capability[1] >= minor
        else:
            fits = capability >= (major, minor)
        if fits:
            return True
    return False


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
    if op == "conv_bn_act_bwd" and not args[-2]:
        return "has conv_bn_act_bwd for a ReLU only"
    return _lacks_code_for(x.device.index)


def _rows(t: Tensor | None) -> Tensor | None:
    """Dense and channels_last, as the kernels read it."""
    return t if t is None else t.contiguous(memory_format=torch.channels_last)


def _laid_out(t: Tensor, format: torch.memory_format) -> Tensor:
    """t in this format, with the strides torch.empty gives it: dimensions of one included, as the fakes have them."""
    t = t.contiguous(memory_format=format)
    n, c, h, w = t.shape
    strides = (c * h * w, 1, w * c, c) if format is torch.channels_last else (c * h * w, h * w, w, 1)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


def _vectors(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.to(torch.float32).contiguous() for t in tensors]


def bn_stats(x):
    return torch.ops.fused_resnet_cuda.bn_stats(_rows(x))


def bn_act(x, mean, var, bn_weight, bn_bias, eps, residual, relu, batch_stats):
    mean, var, bn_weight, bn_bias = _vectors(mean, var, bn_weight, bn_bias)
    y = torch.ops.fused_resnet_cuda.bn_act(_rows(x), mean, var, bn_weight, bn_bias, eps, _rows(residual), relu)
    return _laid_out(y, output_format(x))


def bn_act_bwd(grad, y, x, mean, var, bn_weight, eps, relu, batch_stats, output_mask):
    need_x, need_weight, need_bias, need_residual = output_mask
    mean, var, bn_weight = _vectors(mean, var, bn_weight)
    dx, dweight, dbias, g = torch.ops.fused_resnet_cuda.bn_act_bwd(
        _rows(grad),
        _rows(y) if relu else None,
        _rows(x),
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


def conv_bn_act_bwd(grad, y, x, weight, *rest):
    """The mask and the sum of the masked gradient in one pass; the convolution's gradients by PyTorch's own kernels."""
    g, sum_g = torch.ops.fused_resnet_cuda.relu_bwd_sum(_rows(grad), _rows(y))
    g = g.contiguous(memory_format=output_format(x, weight))
    return aten.conv_bn_act_bwd_masked(g, sum_g, x, weight, *rest)
