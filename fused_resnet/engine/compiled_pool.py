"""The average over whole maps by the compiled kernel (csrc/kernels/avg_pool.cuh)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import library
from .triton_conv import DTYPES


def declines(shape, dtype: torch.dtype, arch: int) -> str | None:
    """Why the kernel cannot run on x of this shape and dtype, as the rest of a sentence; None if it can."""
    n, c, h, w = shape
    if library.load() is not None or not hasattr(torch.ops.fused_resnet_cuda, "avg_pool_out"):
        return "was not compiled"
    if not library.covers(library.build_facts().get("archs", []), divmod(arch, 10)):
        return f"was not compiled for sm_{arch}"
    if dtype not in DTYPES:
        return f"needs float32, float16 or bfloat16, got {dtype}"
    if c % 2:
        return f"needs an even number of channels, got {c}"
    if min(n, c, h, w) < 1 or n > 65535 or h * w >= 2**31:
        return f"needs 1 to 65535 images of less than 2^31 positions, got {n} x {h}x{w}"
    return None


def launch(
    x: Tensor,  # [N, C, H, W], dense channels_last
    out: Tensor,  # [N, C, 1, 1]
) -> None:
    """out = the mean of each channel over the map, on the current stream of x's device. Allocates nothing."""
    library.load()  # a process that was handed the candidate has not asked whether there is a kernel
    torch.ops.fused_resnet_cuda.avg_pool_out(x, out)
