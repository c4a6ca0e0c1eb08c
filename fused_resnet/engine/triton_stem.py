"""Host side of stem_pool in Triton: which configurations are worth trying, the packed weight, and the launch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends.triton import interpreting
from ..kernels import tiles
from .triton_conv import _round_tf32

try:
    from ..kernels import stem as _stem
except ImportError:  # no Triton: backends.triton.unavailable says so, and nothing here is launched
    pass

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TAPS = 8  # columns of a line: the filter's seven, and one before them that makes lines start at even columns
_LINES = {"nchw": (21, _TAPS, 3), "channels_last": (7, 3 * _TAPS, 1)}  # lines, elements of one, lines a filter row
_SIZE = 192  # elements of a packed filter: 168, up to whole blocks

_MOST_COLUMNS = 128

# (block_m, block_n, block_k, warps); registers are what limits them, most of all where lines load element by element.
_TILES = ((128, 64, 32, 8), (64, 64, 32, 8))
_TILES_89 = ((128, 32, 32, 8), (64, 64, 32, 8))  # in 64 columns, channels_last and 128 rows spill under Triton 3.6
_UNALIGNED_TILES = ((64, 64, 32, 8),)
_TF32_TILES = ((64, 64, 16, 8),)
_OLDER_TF32_TILES = ((64, 32, 16, 8),)  # sm_80 and sm_89
_FMA_TILES = ((64, 16, 16, 8),)  # without TF32; ptxas spills a register or two of larger ones, or with three stages


def sizes(h: int, w: int) -> tuple[int, int, int, int]:
    """Height and width of the convolution's map and of the pooled one."""
    p1, q1 = (h - 1) // 2 + 1, (w - 1) // 2 + 1
    return p1, q1, (p1 - 1) // 2 + 1, (q1 - 1) // 2 + 1


def layout_of(x: Tensor) -> str | None:
    """The layout in which the kernel can read x; None if it has to be copied first."""
    if x.is_contiguous():
        return "nchw"
    return "channels_last" if x.is_contiguous(memory_format=torch.channels_last) else None


def declines(shape, dtype: torch.dtype, arch: int, k: int = 64) -> str | None:
    """Why the kernel cannot run on x of this shape in this compute dtype, as the rest of a sentence; None if it can."""
    n, c, h, w = shape
    if dtype not in _DTYPES:
        return f"needs float16, bfloat16 or float32, got {dtype}"
    if arch < 80:
        return f"needs compute capability 8.0 or newer, got {arch // 10}.{arch % 10}"
    if c != 3:
        return f"needs 3 input channels, got {c}"
    if min(n, h, w) < 1:
        return f"needs a non-empty input, got {n} x {h}x{w}"
    q = sizes(h, w)[3]
    if 3 * h * w * (_MOST_COLUMNS // q + 2) >= 2**31 or n * q >= 2**31 - 2**10:
        return f"needs the images of a tile to have less than 2^31 elements, got {n} x {h}x{w}"
    return None


def configs(shape, dtype: torch.dtype, arch: int, sms: int, k: int = 64, *, tf32: bool = True) -> list[dict]:
    """What is worth trying for x: [N, 3, H, W] of this shape in this compute dtype, and k output channels."""
    if declines(shape, dtype, arch, k):
        return []
    n, _, h, w = shape
    _, _, p, q = sizes(h, w)
    fma = dtype is torch.float32 and not tf32
    candidates = _TILES_89 if tiles.family(arch) == 89 else _TILES
    if w % 4:
        candidates = _UNALIGNED_TILES
    if dtype is torch.float32:
        candidates = _FMA_TILES if fma else _TF32_TILES if arch >= 90 else _OLDER_TF32_TILES
    found = []
    for block_m, block_n, block_k, warps in candidates:
        columns = tiles.ceil_div(n * q, block_m - 1) * tiles.ceil_div(k, block_n)
        # The more rows a program walks, the fewer rows are computed twice; fewer than the chip holds leave it idle.
        for rows in sorted({min(p, rows) for rows in (1, 4, 14)}):
            programs = columns * tiles.ceil_div(p, rows)
            if rows > 1 and programs < sms or rows == 1 and programs > 4 * sms:
                continue
            found.append(
                {
                    "block_m": block_m,
                    "block_n": block_n,
                    "block_k": block_k,
                    "rows": rows,
                    "num_warps": warps,
                    "num_stages": 2 if fma else 3,
                    "precision": "ieee" if fma else "tf32",
                }
            )
    return found


def pack(weight: Tensor, layout: str, *, tf32: bool = True) -> Tensor:
    """weight: [K, 3, 7, 7] as the kernel reads it beside x of this layout: [K, 192], line after line."""
    k = weight.shape[0]
    taps = torch.nn.functional.pad(weight, (1, 0))  # [K, 3, 7, 8]
    lines = taps.permute(0, 2, 1, 3) if layout == "nchw" else taps.permute(0, 2, 3, 1)
    packed = torch.nn.functional.pad(lines.reshape(k, 7 * 3 * _TAPS), (0, _SIZE - 7 * 3 * _TAPS))
    return _round_tf32(packed) if weight.dtype is torch.float32 and tf32 else packed


def launch(
    config: dict,
    x: Tensor,  # [N, 3, H, W], NCHW or channels_last, any floating dtype
    weight: Tensor,  # [K, 192], packed for x's layout
    bias: Tensor,  # [K] float32
    out: Tensor,  # [N, K, P, Q], channels_last
) -> None:
    """out = max_pool(relu(conv(x, weight) + bias)) on the current stream of the current device. Allocates nothing."""
    layout = layout_of(x)
    lines, line, per_row = _LINES[layout]
    n, _, h, w = x.shape
    k = weight.shape[0]
    p1, q1, p, q = sizes(h, w)
    pitch = w if per_row == 3 else 3 * w
    block_m, block_n, rows = config["block_m"], config["block_n"], config["rows"]
    tf32 = weight.dtype is torch.float32 and config["precision"] == "tf32"
    grid = (tiles.ceil_div(n * q, block_m - 1), tiles.ceil_div(p, rows), tiles.ceil_div(k, block_n))
    _stem._stem_pool_kernel[grid](
        x,
        weight,
        bias,
        out,
        n * q,
        p,
        q,
        p1,
        q1,
        h,
        pitch,
        k,
        rows,
        LINES=lines,
        LINE=line,
        PER_ROW=per_row,
        SIZE=_SIZE,
        ALIGN=math.gcd(pitch, 16),
        EVEN_K=k % block_n == 0,
        ALIGN_K=math.gcd(k, 16),
        INPUT_PRECISION=config["precision"],
        ROUND_TF32=tf32 and not interpreting(),
        UPCAST=weight.dtype is torch.bfloat16 and interpreting(),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=config["block_k"],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
