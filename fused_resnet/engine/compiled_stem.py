"""stem_pool by the compiled kernel (csrc/conv/stem_kernel.cuh), for any GPU from sm_80 on: the functions of
triton_stem. It reads x in the compute dtype, two pixels at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import cuda_conv, library
from ..backends.stem_conv import CHANNELS, START_OF_POOL, TILE_OF_POOL, pack, rows_by_cost  # noqa: F401  (pack: for who launches)
from ..kernels.tiles import ceil_div
from . import triton_stem

_MOST_CONFIGS = 3


def declines(
    shape, dtype: torch.dtype, arch: int, k: int = 64, *, input_dtype: torch.dtype | None = None
) -> str | None:
    """Why the kernel cannot run on x of this shape and dtype in this compute dtype, as the rest of a sentence; None if
    it can."""
    n, c, h, w = shape
    if arch < 80:
        return f"needs compute capability 8.0 or newer, got {arch // 10}.{arch % 10}"
    if library.load() is not None or not hasattr(torch.ops.fused_resnet_cuda, "stem_out"):
        return "was not compiled"
    if not library.covers(library.build_facts().get("archs", []), divmod(arch, 10)):
        return f"was not compiled for sm_{arch}"
    if dtype not in cuda_conv.DTYPES:
        return f"needs float16 or bfloat16, got {dtype}"
    if input_dtype not in (None, dtype):
        return f"needs x in {dtype}, got {input_dtype}"
    if c != 3:
        return f"needs 3 input channels, got {c}"
    if min(n, h, w) < 1:
        return f"needs a non-empty input, got {n} x {h}x{w}"
    if k % CHANNELS or k < 1:
        return f"needs a multiple of {CHANNELS} output channels, got {k}"
    if w % 2:
        return f"needs an even width, got {w}"
    if 3 * h * w >= 2**31 or triton_stem.sizes(h, w)[2] * _across(shape, k) >= 2**31:
        return f"needs images of less than 2^31 elements, and less than 2^31 blocks, got {n} x {h}x{w}"
    return None


def _across(shape, k: int) -> int:
    """Blocks side by side: of images, columns and channels."""
    n, _, h, w = shape
    return n * ceil_div(triton_stem.sizes(h, w)[3], TILE_OF_POOL) * (k // CHANNELS)


def configs(
    shape, dtype: torch.dtype, arch: int, sms: int, k: int = 64, *, input_dtype: torch.dtype | None = None
) -> list[dict]:
    """What is worth trying: how many pooled rows a block walks, the most promising first."""
    if declines(shape, dtype, arch, k, input_dtype=input_dtype) is not None:
        return []
    p = triton_stem.sizes(*shape[2:])[2]
    rows = rows_by_cost(p, _across(shape, k), START_OF_POOL, arch, sms)
    return [{"rows": r} for r in rows[:_MOST_CONFIGS]]


def launch(
    config: dict,
    x: Tensor,  # [N, 3, H, W], NCHW or channels_last, in weight's dtype
    weight: Tensor,  # [K, 224], packed
    bias: Tensor,  # [K] float32
    out: Tensor,  # [N, K, P, Q], channels_last
) -> None:
    """out = max_pool(relu(conv(x, weight) + bias)) on the current stream of x's device. Allocates nothing."""
    library.load()  # a process that was handed the config has not asked whether there is a kernel
    torch.ops.fused_resnet_cuda.stem_out(x, weight, bias, config["rows"], out)
