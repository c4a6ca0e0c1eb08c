"""conv_bias_act by the compiled convolutions (csrc/conv), as candidates of the tuner: the functions of triton_conv."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import cuda_conv
from .problem import Candidate
from .triton_conv import Conv, Pair


def sizes(shape: Conv) -> cuda_conv.Shape:
    """The shape as the library counts it."""
    conv = (shape.stride, shape.padding, shape.dilation)
    filter = (shape.k, shape.c, shape.r, shape.s)
    return cuda_conv.shape_of((shape.n, shape.c, shape.h, shape.w), filter, *conv, shape.segment)


def configs(shape: Conv, dtype: torch.dtype, arch: int, sms: int) -> list[dict]:
    """All that can run it, the most promising first: trying one costs no compilation."""
    if shape.residual and shape.segment:
        return []
    return [{"instance": i.name} for i in cuda_conv.candidates(sizes(shape), dtype, arch, sms)]


def splits(candidate: Candidate) -> bool:
    """Whether it is one of those for few positions, whose blocks share a reduction."""
    names = {i.name for i in cuda_conv.instances() if i.parts}
    return candidate.backend == "cuda" and candidate.config.get("instance") in names


def _instance(config: dict, dtype: torch.dtype) -> cuda_conv.Instance:
    for instance in cuda_conv.instances():
        if instance.name == config["instance"] and instance.dtype is dtype:
            return instance
    raise RuntimeError(f"this build has no convolution {config['instance']!r} for {dtype}")


def workspace(config: dict, shape: Conv, dtype: torch.dtype, sms: int) -> int:
    """Bytes of workspace that a launch needs."""
    needed = cuda_conv.plan(_instance(config, dtype).index, sizes(shape), sms)
    if isinstance(needed, str):
        raise RuntimeError(needed)
    return needed


def launch(
    config: dict,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    segment: tuple[Tensor, Tensor, int] | None,
    out: Tensor,
    workspace: Tensor | None,  # bytes
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    relu: bool = True,
) -> None:
    """As triton_conv.launch. Weights and bias are not what the kernel before writes: see `cases.settle`."""
    instance, conv = _instance(config, x.dtype), dict(stride=stride, padding=padding, dilation=dilation)
    cuda_conv.conv_bias_act_out(
        instance, x, weight, bias, residual, segment, out, workspace, **conv, relu=relu, constant_weights=True
    )
