"""The first convolution of an ImageNet ResNet in training by the compiled kernel (csrc/conv/stem_kernel.cuh): 7x7,
stride 2, padding 3, of three channels in 16 bits, which are too few for a convolution by tensor cores as others are.

Also home of what it shares with the engine's whole stem: filters as the kernel reads them, and rows of a block.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..kernels.tiles import ceil_div, family
from .layout import as_rows, conv_map_size
from .library import chip

PLACES = (2, 2), (3, 3), (1, 1), 1  # stride, padding, dilation, groups
KERNEL = (7, 7)
DTYPES = (torch.float16, torch.bfloat16)
CHANNELS = 64  # of a block
_TILE = 62  # pairs of columns of a block
_ROWS = (1, 2, 4, 7, 14, 28, 56)
_MOST_ROWS = 28  # so that ImageNet's maps are in parts at any batch, and have one variant
_START = 1.0  # what a block does before its first pair of rows, in such pairs: to wait


def declines(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel cannot run on these tensors, on a GPU that there is code for; None if it can."""
    if not hasattr(torch.ops.fused_resnet_cuda, "stem_conv"):
        return "has no stem_conv: the compiled library is older than the package"
    arch, _ = chip(x.device)
    if arch < 80:
        return f"has stem_conv for compute capability 8.0 or newer, got {arch // 10}.{arch % 10}"
    if x.dtype not in DTYPES:
        return f"has stem_conv for float16 and bfloat16, got {x.dtype}"
    if weight.dtype is not x.dtype:
        return f"needs weight in {x.dtype}, got {weight.dtype}"
    n, c, h, w = x.shape
    k = weight.shape[0]
    if c != 3:
        return f"has stem_conv for 3 channels, got {c}"
    if weight.shape[2:] != KERNEL:
        return f"has stem_conv for kernels of 7x7, got {weight.shape[2]}x{weight.shape[3]}"
    if k < 1 or k % CHANNELS:
        return f"has stem_conv for a multiple of {CHANNELS} output channels, got {k}"
    if w % 2:
        return f"has stem_conv for an even width, got {w}"
    if x.data_ptr() % 4:
        return "needs x at a multiple of 4 bytes"
    if 3 * h * w >= 2**31 or n * _pairs(h) * _across(w, k) >= 2**31:
        return f"has stem_conv for images of less than 2^31 elements, and less than 2^31 blocks, got {n} x {h}x{w}"
    return None


def variant(x: Tensor, weight: Tensor) -> tuple:
    """What the kernel does differently by the sizes of x: at the edges of its map, and further down or to the right."""
    n, _, h, w = x.shape
    k = weight.shape[0]
    rows = _rows(n, h, w, k, *chip(x.device))
    return h % 4, w % 4, _across(w, k) > k // CHANNELS, rows > 1, rows < _pairs(h)


def stem_conv(x: Tensor, weight: Tensor) -> Tensor:
    """y: [N, K, P, Q], channels_last, of x: [N, 3, H, W], NCHW or channels_last, and weight: [K, 3, 7, 7]."""
    if not x.is_contiguous():
        x = as_rows(x)
    n, _, h, w = x.shape
    k = weight.shape[0]
    return torch.ops.fused_resnet_cuda.stem_conv(x, pack(weight), _rows(n, h, w, k, *chip(x.device)))


def pack(weight: Tensor) -> Tensor:
    """weight: [K, 3, 7, 7] as the kernel reads it, [K, 224]: 7 rows of 8 columns, the first of zeros, of 4 channels,
    the last of zeros. Filters are in the order in which a thread's sums are eight neighbours of y, twice."""
    k = weight.shape[0]
    taps = torch.nn.functional.pad(weight, (1, 0, 0, 0, 0, 1)).permute(0, 2, 3, 1)  # [K, 7, 8, 4]
    # A filter's number is 32 i + 8 q + 2 j + e, its place 32 i + 8 j + 2 q + e: e of lane q's pair in the tile 4 i + j.
    return taps.reshape(-1, 2, 4, 4, 2, 224).transpose(2, 3).reshape(k, 224)


def rows_by_cost(pairs: int, across: int, start: float, arch: int, sms: int) -> list[int]:
    """How many pairs of rows a block may walk, of `pairs` that a map has, the most promising first. The more, the less
    is done `start` times anew; fewer blocks than the chip holds leave it idle. across: blocks side by side."""
    resident = sms * (1 if family(arch) == 89 else 2)  # by their shared memory, 63 to 68 KiB

    def cost(rows: int) -> float:
        return ceil_div(across * ceil_div(pairs, rows), resident) * (rows + start)

    return sorted({min(pairs, rows) for rows in _ROWS}, key=cost)


@functools.lru_cache(maxsize=1024)
def _rows(n: int, h: int, w: int, k: int, arch: int, sms: int) -> int:
    return next(rows for rows in rows_by_cost(_pairs(h), n * _across(w, k), _START, arch, sms) if rows <= _MOST_ROWS)


def _pairs(size: int) -> int:
    """Of the map's rows, by the rows of x; or of columns."""
    return ceil_div(conv_map_size((size, size), KERNEL, *PLACES[:3])[0], 2)


def _across(w: int, k: int) -> int:
    """Blocks side by side in an image, along columns and channels."""
    return ceil_div(_pairs(w), _TILE) * (k // CHANNELS)
