"""The first convolution of an ImageNet ResNet, its weight's gradient, and with given statistics the whole stem, by the
compiled kernels (csrc/conv/stem_kernel.cuh, stem_weight_kernel.cuh): 7x7, stride 2, padding 3, of three channels in 16
bits, which are too few for a convolution by tensor cores as others are.

Also home of what it shares with the engine's whole stem: filters as the kernel reads them, and rows of a block.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..folding import scale_shift
from ..kernels.tiles import ceil_div, family
from .layout import as_rows, conv_map_size
from .library import chip

COMPILED = {  # each op's kernel in the library
    "stem_conv": "stem_conv",
    "stem_conv_weight_grad": "stem_conv_weight_shares",
    "conv_bn_act_pool": "stem_out",
}
OPS = tuple(COMPILED)
PLACES = (2, 2), (3, 3), (1, 1), 1  # stride, padding, dilation, groups
KERNEL = (7, 7)
DTYPES = (torch.float16, torch.bfloat16)
CHANNELS = 64  # of a block
_TILE, _TILE_OF_WEIGHT = 124, 112  # columns of a block of the convolution, of its weight's gradient
_ROWS = (1, 2, 4, 7, 14, 28, 56)
_MOST_ROWS = 28  # so that ImageNet's maps are in parts at any batch, and have one variant
_SHARED_KIB = {80: 164, 89: 100, 90: 228, 100: 228}  # of a multiprocessor, by family; a block has 1 beside its own
_KIB_OF_WEIGHT = 85
TILE_OF_POOL = 56  # pooled columns: those of 112 of the convolution
# What a block does beside its pairs of rows, in such pairs: to wait, to store; of pooled rows the one above the first.
_START, _START_OF_WEIGHT, START_OF_POOL = 1.0, 2.0, 1.5


def declines(x: Tensor, weight: Tensor, op: str = "stem_conv") -> str | None:
    """Why the kernel cannot run on these tensors, on a GPU that there is code for; None if it can."""
    if not hasattr(torch.ops.fused_resnet_cuda, COMPILED[op]):
        return f"has no {op}: the compiled library is older than the package"
    arch, _ = chip(x.device)
    if arch < 80:
        return f"has {op} for compute capability 8.0 or newer, got {arch // 10}.{arch % 10}"
    if x.dtype not in DTYPES:
        return f"has {op} for float16 and bfloat16, got {x.dtype}"
    if weight.dtype is not x.dtype:
        return f"needs weight in {x.dtype}, got {weight.dtype}"
    n, c, h, w = x.shape
    k = weight.shape[0]
    if c != 3:
        return f"has {op} for 3 channels, got {c}"
    if weight.shape[2:] != KERNEL:
        return f"has {op} for kernels of 7x7, got {weight.shape[2]}x{weight.shape[3]}"
    if k < 1 or k % CHANNELS:
        return f"has {op} for a multiple of {CHANNELS} output channels, got {k}"
    if w % 2:
        return f"has {op} for an even width, got {w}"
    if x.data_ptr() % 4:
        return "needs x at a multiple of 4 bytes"
    if 3 * h * w >= 2**31 or n * _pairs(h) * _across(w, k, _TILE_OF_WEIGHT) >= 2**31:
        return f"has {op} for images of less than 2^31 elements, and less than 2^31 blocks, got {n} x {h}x{w}"
    return None


def declines_weight_grad(grad: Tensor, x: Tensor, weight: Tensor) -> str | None:
    if grad.dtype is not x.dtype:
        return f"needs grad in {x.dtype}, got {grad.dtype}"
    if grad.data_ptr() % 16:
        return "needs grad at a multiple of 16 bytes"
    return declines(x, weight, "stem_conv_weight_grad")


def variant(x: Tensor, weight: Tensor) -> tuple:
    """What the kernel does differently by the sizes of x: at the edges of its map, and further down or to the right."""
    h, w = x.shape[2:]
    rows = _rows(*_sizes(x, weight), *chip(x.device))
    return h % 4, w % 4, *_parts(x, weight, rows, _TILE)


def pool_variant(x: Tensor, weight: Tensor) -> tuple:
    h, w = x.shape[2:]
    rows = _rows_of_pool(*_sizes(x, weight), *chip(x.device))
    return h % 4, w % 4, _pooled(w) > TILE_OF_POOL, rows > 1, rows < _pooled(h)


def weight_grad_variant(grad: Tensor, x: Tensor, weight: Tensor) -> tuple:
    h, w = x.shape[2:]
    rows = _rows_of_weight(*_sizes(x, weight), *chip(x.device))
    return h % 4, w % 32 > 0, *_parts(x, weight, rows, _TILE_OF_WEIGHT)


def _parts(x: Tensor, weight: Tensor, rows: int, tile: int) -> tuple:
    k = weight.shape[0]
    return _across(x.shape[3], k, tile) > k // CHANNELS, rows > 1, rows < _pairs(x.shape[2])


def stem_conv(x: Tensor, weight: Tensor) -> Tensor:
    """y: [N, K, P, Q], channels_last, of x: [N, 3, H, W], NCHW or channels_last, and weight: [K, 3, 7, 7]."""
    rows = _rows(*_sizes(x, weight), *chip(x.device))
    return torch.ops.fused_resnet_cuda.stem_conv(_readable(x), pack(weight), rows)


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of weight, float32 [K, 3, 7, 7], from that of the convolution's output, [N, K, P, Q]."""
    rows = _rows_of_weight(*_sizes(x, weight), *chip(x.device))
    shares = torch.ops.fused_resnet_cuda.stem_conv_weight_shares(as_rows(grad), _readable(x), rows)
    return shares.sum(0).view(-1, 7, 8, 4)[:, :, 1:, :3].permute(0, 3, 1, 2)


def conv_bn_act_pool(x, weight, bn_weight, bn_bias, running_mean, running_var, eps) -> Tensor:
    """max_pool(relu(BN(convolution of x))): [N, K, P, Q], channels_last. x, weight: as `stem_conv`'s. BN is folded into
    the filters."""
    bias = None
    if running_mean is not None:
        scale, bias = scale_shift(bn_weight, bn_bias, running_mean, running_var, eps, torch.float32)
        weight = (weight * scale.view(-1, 1, 1, 1)).to(x.dtype)
    n, h, w, k = _sizes(x, weight)
    bias = x.new_zeros(k, dtype=torch.float32) if bias is None else bias
    y = x.new_empty(n, _pooled(h), _pooled(w), k).permute(0, 3, 1, 2)
    rows = _rows_of_pool(n, h, w, k, *chip(x.device))
    torch.ops.fused_resnet_cuda.stem_out(_readable(x), pack(weight), bias, rows, y)
    return y


def _readable(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else as_rows(x)


def pack(weight: Tensor) -> Tensor:
    """weight: [K, 3, 7, 7] as the kernel reads it, [K, 224]: 7 rows of 8 columns, the first of zeros, of 4 channels,
    the last of zeros. Filters are in the order in which a thread's sums are eight neighbours of y, twice."""
    k = weight.shape[0]
    taps = torch.nn.functional.pad(weight, (1, 0, 0, 0, 0, 1)).permute(0, 2, 3, 1)  # [K, 7, 8, 4]
    # A filter's number is 32 i + 8 q + 2 j + e, its place 32 i + 8 j + 2 q + e: e of lane q's pair in the tile 4 i + j.
    return taps.reshape(-1, 2, 4, 4, 2, 224).transpose(2, 3).reshape(k, 224)


def rows_by_cost(pairs: int, across: int, start: float, arch: int, sms: int, kib: int = 68) -> list[int]:
    """How many pairs of rows a block may walk, of `pairs` that a map has, the most promising first. The more, the less
    is done `start` times anew; fewer blocks than the chip holds leave it idle. across: blocks side by side. kib: of
    shared memory, at most, in a block."""
    resident = sms * (2 if 2 * (kib + 1) <= _SHARED_KIB[family(arch)] else 1)

    def cost(rows: int) -> float:
        return ceil_div(across * ceil_div(pairs, rows), resident) * (rows + start)

    return sorted({min(pairs, rows) for rows in _ROWS}, key=cost)


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
    n, _, h, w = x.shape
    return n, h, w, weight.shape[0]


@functools.lru_cache(maxsize=1024)
def _rows(n: int, h: int, w: int, k: int, arch: int, sms: int) -> int:
    return _first(rows_by_cost(_pairs(h), n * _across(w, k, _TILE), _START, arch, sms))


@functools.lru_cache(maxsize=1024)
def _rows_of_weight(n: int, h: int, w: int, k: int, arch: int, sms: int) -> int:
    across = n * _across(w, k, _TILE_OF_WEIGHT)
    return _first(rows_by_cost(_pairs(h), across, _START_OF_WEIGHT, arch, sms, _KIB_OF_WEIGHT))


@functools.lru_cache(maxsize=1024)
def _rows_of_pool(n: int, h: int, w: int, k: int, arch: int, sms: int) -> int:
    across = n * ceil_div(_pooled(w), TILE_OF_POOL) * (k // CHANNELS)
    return _first(rows_by_cost(_pooled(h), across, START_OF_POOL, arch, sms))


def _first(promising: list[int]) -> int:
    return next(rows for rows in promising if rows <= _MOST_ROWS)


def _pairs(size: int) -> int:
    """Of the map's rows, by the rows of x."""
    return ceil_div(_columns(size), 2)


def _columns(size: int) -> int:
    """Of the map, or its rows, by those of x."""
    return conv_map_size((size, size), KERNEL, *PLACES[:3])[0]


def _pooled(size: int) -> int:
    """Of the pooled map, by the rows (or columns) of x."""
    return (_columns(size) - 1) // 2 + 1


def _across(w: int, k: int, tile: int) -> int:
    """Blocks side by side in an image, along columns and channels."""
    return ceil_div(_columns(w), tile) * (k // CHANNELS)
