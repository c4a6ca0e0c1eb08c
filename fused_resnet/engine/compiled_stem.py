"""stem_pool by the compiled kernel (csrc/conv/stem_kernel.cuh), for any GPU from sm_80 on: the functions of
triton_stem. It reads x in the compute dtype, two pixels at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import cuda_conv, library
from ..kernels.tiles import ceil_div, family
from . import triton_stem

_TILE = 56  # pooled columns of a block
_CHANNELS = 64  # of a block
_ROWS = (1, 2, 4, 7, 14, 28, 56)
_START = 1.5  # what a block does before its first pooled row, in pooled rows: a row of the convolution, and to wait
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
    if k % _CHANNELS or k < 1:
        return f"needs a multiple of {_CHANNELS} output channels, got {k}"
    if w % 2:
        return f"needs an even width, got {w}"
    if 3 * h * w >= 2**31 or _blocks(shape, 1, k) >= 2**31:
        return f"needs images of less than 2^31 elements, and less than 2^31 blocks, got {n} x {h}x{w}"
    return None


def _blocks(shape, rows: int, k: int) -> int:
    n, _, h, w = shape
    _, _, p, q = triton_stem.sizes(h, w)
    return n * ceil_div(p, rows) * ceil_div(q, _TILE) * (k // _CHANNELS)


def configs(
    shape, dtype: torch.dtype, arch: int, sms: int, k: int = 64, *, input_dtype: torch.dtype | None = None
) -> list[dict]:
    """What is worth trying: how many pooled rows a block walks, the most promising first. The more, the less is
    computed twice; fewer blocks than the chip holds leave it idle."""
    if declines(shape, dtype, arch, k, input_dtype=input_dtype) is not None:
        return []
    p = triton_stem.sizes(*shape[2:])[2]
    resident = sms * (1 if family(arch) == 89 else 2)  # by their shared memory, 68 KiB

    def cost(rows: int) -> float:
        return ceil_div(_blocks(shape, rows, k), resident) * (rows + _START)

    return [{"rows": rows} for rows in sorted({min(p, rows) for rows in _ROWS}, key=cost)[:_MOST_CONFIGS]]


def pack(weight: Tensor) -> Tensor:
    """weight: [K, 3, 7, 7] as the kernel reads it, [K, 224]: 7 rows of 8 columns, the first of zeros, of 4 channels,
    the last of zeros. Filters are in the order in which a thread's sums are eight neighbours of y, twice."""
    k = weight.shape[0]
    taps = torch.nn.functional.pad(weight, (1, 0, 0, 0, 0, 1)).permute(0, 2, 3, 1)  # [K, 7, 8, 4]
    # A filter's number is 32 i + 8 q + 2 j + e, its place 32 i + 8 j + 2 q + e: e of lane q's pair in the tile 4 i + j.
    return taps.reshape(-1, 2, 4, 4, 2, 224).transpose(2, 3).reshape(k, 224)


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
