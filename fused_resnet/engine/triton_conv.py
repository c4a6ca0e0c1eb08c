"""Host side of conv_bias_act in Triton: which configurations are worth trying, what they need, and the launch.

A config is a plain dict that JSON can hold: `kernel` ("pointers" or "tma"), the tile, warps and stages, `splits` of the
reduction, and what `kernel` needs beyond that. It holds for one shape, dtype and chip.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.triton import interpreting
from ..kernels import tiles

try:
    from ..kernels import conv_bias_act as _pointers
    from ..kernels import conv_bias_act_tma as _tma
except ImportError:  # no Triton: backends.triton.unavailable says so, and nothing here is launched
    pass

Pair = tuple[int, int]

_MAX_ROWS = 2**31 - 2**10  # rows are counted in 32 bits, up to the end of the last tile
_MAX_OFFSET = 2**31 - 1  # what one program adds to a tile's first address
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_SPLITS = 16
_BEST = 2  # tiles tried of each kernel

# (block_m, block_n, warps, share of the tensor cores' speed that such a tile reaches): the order in which shapes are
# given tiles; measuring decides among the few that are left.
_TILES = (
    (128, 128, 8, 1.0),
    (128, 64, 4, 0.8),
    (64, 64, 4, 0.65),
)
_TMA_TILES = ((128, 256, 8, 1.1), *_TILES)
_FMA_TILES = ((64, 64, 4, 1.0), (64, 32, 4, 0.7))  # float32 without TF32: operands live in registers
_FMA_SEGMENT_TILES = ((64, 32, 8, 0.7),)  # a second segment takes registers: the others spill beside one, somewhere


class Conv(NamedTuple):
    """The shape of one conv_bias_act."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    residual: bool = False
    segment: tuple[int, int, int, int] | None = None  # x2's channels, height and width, and its stride

    @property
    def p(self) -> int:
        return (self.h + 2 * self.padding[0] - self.dilation[0] * (self.r - 1) - 1) // self.stride[0] + 1

    @property
    def q(self) -> int:
        return (self.w + 2 * self.padding[1] - self.dilation[1] * (self.s - 1) - 1) // self.stride[1] + 1

    @property
    def m(self) -> int:
        return self.n * self.p * self.q

    @property
    def rows(self) -> bool:
        """Output row m reads input row m, and nothing else."""
        return self.r == self.s == 1 and not any(self.padding) and max(self.stride) == 1

    @property
    def c2(self) -> int:
        return self.segment[0] if self.segment else 0


def shape_of(x: Tensor, weight: Tensor, residual, segment, stride: Pair, padding: Pair, dilation: Pair) -> Conv:
    """The shape of a call with these tensors."""
    second = None
    if segment is not None:
        x2, _, stride2 = segment
        second = (*x2.shape[1:], stride2)
    conv = (tuple(stride), tuple(padding), tuple(dilation))
    return Conv(*x.shape, weight.shape[0], *weight.shape[2:], *conv, residual is not None, second)


def declines(shape: Conv, dtype: torch.dtype, arch: int) -> str | None:
    """Why no kernel here can run this, as the rest of a sentence; None where one can."""
    if dtype not in DTYPES:
        return f"needs float16, bfloat16 or float32, got {dtype}"
    if arch < 80:
        return f"needs compute capability 8.0 or newer, got {arch // 10}.{arch % 10}"
    if shape.p <= 0 or shape.q <= 0:
        return f"needs a non-empty output, got {shape.p}x{shape.q}"
    if shape.m > _MAX_ROWS:
        return f"needs at most {_MAX_ROWS} output positions, got {shape.m}"
    reach = ((shape.r - 1) * shape.dilation[0] * shape.w + shape.s * shape.dilation[1]) * shape.c
    if reach > _MAX_OFFSET:
        return f"needs a filter that spans at most {_MAX_OFFSET} elements of x, got {reach}"
    if shape.residual and shape.segment:
        return "takes a residual or a second segment, got both"
    if shape.segment:
        _, h2, w2, stride2 = shape.segment
        size = (tiles.ceil_div(h2, stride2), tiles.ceil_div(w2, stride2))
        if size != (shape.p, shape.q):
            return f"needs a second segment of {shape.p}x{shape.q} positions, got {size[0]}x{size[1]}"
    return None


def declines_tma(shape: Conv, dtype: torch.dtype, arch: int) -> str | None:
    """The same for the kernel that the tensor memory accelerator feeds."""
    if arch < 90 or 110 <= arch:
        return f"needs the tensor memory accelerator of sm_90 or sm_100, got sm_{arch}"
    vector = 16 // dtype.itemsize
    for name, channels in (("C", shape.c), ("K", shape.k), ("C2", shape.c2)):
        if channels % vector:
            return f"needs rows of whole 16 bytes, got {name} = {channels}"
    if shape.stride not in ((1, 1), (2, 2)):
        return f"needs stride 1 or 2, got {shape.stride}"
    if shape.stride == (2, 2) and (shape.h % 2 or shape.w % 2):
        return f"needs an even map for stride 2, got {shape.h}x{shape.w}"
    if not shape.rows and shape.c % 16:
        return f"needs channels that 16 divides where it reads taps, got {shape.c}"
    if shape.rows and shape.m > _MAX_ROWS:
        return f"needs at most {_MAX_ROWS} rows, got {shape.m}"
    return None


def configs(
    shape: Conv, dtype: torch.dtype, arch: int, sms: int, *, tf32: bool = True, split: bool = True
) -> list[dict]:
    """What is worth trying. tf32: float32 may run on the tensor cores; split: there may be a workspace."""
    if declines(shape, dtype, arch):
        return []
    fma = dtype is torch.float32 and not tf32
    precision = "ieee" if fma else "tf32"
    itemsize = dtype.itemsize
    found = []
    candidates = (_FMA_SEGMENT_TILES if shape.segment else _FMA_TILES) if fma else _TILES
    for block_m, block_n, warps in _ranked(candidates, shape, sms):
        block_k = 16 if fma else max(16, min(tiles.power_of_2(shape.c), 128 // itemsize))
        if shape.c * itemsize % 16 or shape.c2 * itemsize % 16:
            block_k = min(block_k, 32)  # loads of a few bytes each take a register for every pointer
        if arch >= 100 and shape.rows and shape.c % block_k and declines_tma(shape, dtype, arch) is None:
            continue  # the mask along the channels spills; the accelerator needs none
        if arch >= 100 and block_m == 128:
            if block_n < 128 and shape.rows:
                block_m = 64  # spills by a hair
            else:
                warps = 8  # a thread gets a whole row of the accumulator: four warps have no registers for its epilogue
        stages = _stages(block_m, block_n, block_k, itemsize, arch, 0)
        config = {
            "kernel": "pointers",
            "block_m": block_m,
            "block_n": block_n,
            "block_k": block_k,
            "group_m": 8,
            "num_warps": warps,
            "num_stages": stages,
            "splits": 1,
            "precision": precision,
        }
        if config in found:
            continue
        splits = _splits(config, shape, sms) if split else []
        if max(splits, default=1) < 4:
            found.append(config)
        found += [config | {"splits": s} for s in splits]
    if not fma and declines_tma(shape, dtype, arch) is None:
        for block_m, block_n, warps in _ranked(_TMA_TILES, shape, sms):
            config = _tma_config(shape, itemsize, arch, sms, block_m, block_n, warps)
            if config is not None:
                found.append(config)
    return found


def _ranked(candidates, shape: Conv, sms: int) -> list[tuple[int, int, int]]:
    """The few tiles of the lowest cost (waves over the SMs) * (tile area) / (share of peak)."""
    columns = max(32, tiles.power_of_2(shape.k))

    def cost(candidate) -> float:
        block_m, block_n, _, share = candidate
        count = tiles.ceil_div(shape.m, block_m) * tiles.ceil_div(shape.k, block_n)
        return tiles.ceil_div(count, sms) * block_m * block_n / share

    fitting = [c for c in candidates if c[1] <= columns] or [(64, 32, 4, 1.0)]
    return [c[:3] for c in sorted(fitting, key=cost)[:_BEST]]


def _stages(block_m: int, block_n: int, block_k: int, itemsize: int, arch: int, held: int) -> int:
    """Stages of the software pipeline that fit beside `held` bytes."""
    stage = (block_m + block_n) * block_k * itemsize
    return max(2, min(4, (tiles.shared_bytes(arch) - 1024 - held) // stage))


def _splits(config: dict, shape: Conv, sms: int) -> list[int]:
    """Numbers of splits that fill the chip, where tiles alone do not. Powers of two; two steps or more each."""
    count = tiles.ceil_div(shape.m, config["block_m"]) * tiles.ceil_div(shape.k, config["block_n"])
    most = min(_MOST_SPLITS, sms // count, _steps(config, shape) // 2)
    if most < 2:
        return []
    largest = 1 << (most.bit_length() - 1)
    return [s for s in (largest, largest // 2) if s > 1]


def _steps(config: dict, shape: Conv) -> int:
    block = config["block_k"]
    return tiles.ceil_div(shape.c, block) * shape.r * shape.s + tiles.ceil_div(shape.c2, block)


def _flat(shape: Conv) -> bool:
    """Whether positions are rows of a matrix, whatever the map."""
    return shape.rows and (shape.segment is None or shape.segment[3] == 1)


def _tma_config(shape: Conv, itemsize: int, arch: int, sms: int, block_m: int, block_n: int, warps: int) -> dict | None:
    block_k = 128 // itemsize  # a row of one swizzle
    if not shape.rows:
        # A block past the last channel would read the next tap's.
        block_k = math.gcd(shape.c, block_k)
    box = (1, 1, block_m) if _flat(shape) else _box(shape, block_m)
    count = math.prod(tiles.ceil_div(*pair) for pair in zip((shape.n, shape.p, shape.q), box, strict=True))
    if _flat(shape):
        count = tiles.ceil_div(shape.m, block_m)
    count *= tiles.ceil_div(shape.k, block_n)
    if 4 * count < sms:
        return None  # split reductions are for these
    held = block_m * block_n * itemsize * (2 if shape.residual else 1)
    stages = _stages(block_m, block_n, block_k, itemsize, arch, held)
    shared = (block_m + block_n) * block_k * itemsize * stages + held
    if shared + 1024 > tiles.shared_bytes(arch):
        return None
    resident = max(1, min(2048 // 32 // warps // 4, tiles.shared_bytes(arch) // (shared + 1024)))
    return {
        "kernel": "tma",
        "block_m": block_m,
        "block_n": block_n,
        "block_k": block_k,
        "group_m": 8,
        "num_warps": warps,
        "num_stages": stages,
        "splits": 1,
        "precision": "tf32",
        "box": list(box),
        "programs": min(count, sms * resident),
    }


def _box(shape: Conv, block_m: int) -> tuple[int, int, int]:
    """Images x rows x columns of a tile, powers of two: the least work outside the map, then the squarest."""
    powers = [1 << i for i in range(block_m.bit_length())]

    def cost(box) -> tuple[int, int, int]:
        padded = math.prod(
            tiles.ceil_div(size, side) * side for size, side in zip((shape.n, shape.p, shape.q), box, strict=True)
        )
        return padded, box[0], abs(box[1] - box[2])

    boxes = [(block_m // (bh * bw), bh, bw) for bh in powers for bw in powers if bh * bw <= block_m]
    return min(boxes, key=cost)


def pack(weight: Tensor, *, tf32: bool = True) -> Tensor:
    """weight: [K, C, R, S] as the kernels read it: channels_last, and float32 rounded to TF32 where that is used, once
    here instead of at every load."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    if weight.dtype is torch.float32 and tf32:
        weight = _round_tf32(weight)
    return weight


def _round_tf32(t: Tensor) -> Tensor:
    """To the nearest of 10 mantissa bits, ties away from zero, as cvt.rna.tf32 does."""
    rounded = ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(t.isfinite(), rounded, t)


def workspace(config: dict, shape: Conv) -> int:
    """Bytes of workspace that a launch needs, for float32."""
    return 4 * config["splits"] * shape.m * shape.k if config["splits"] > 1 else 0


def launch(
    config: dict,
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C, R, S], packed
    bias: Tensor,  # [K] float32
    residual: Tensor | None,  # [N, K, P, Q]
    segment: tuple[Tensor, Tensor, int] | None,  # x2: [N, C2, H2, W2], weight2: [K, C2, 1, 1], packed, stride2
    out: Tensor,  # [N, K, P, Q]
    workspace: Tensor | None,  # bytes
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    relu: bool = True,
) -> None:
    """out = act(conv(x, weight) + bias + residual [+ conv1x1(x2, weight2, stride2)]) on the current stream of the
    current device. Activations are dense channels_last. Allocates nothing."""
    shape = shape_of(x, weight, residual, segment, stride, padding, dilation)
    launcher = _launch_tma if config["kernel"] == "tma" else _launch_pointers
    workspace = None if workspace is None else workspace.view(torch.float32)
    launcher(config, shape, x, weight, bias, residual, segment, out, workspace, relu)


def _launch_pointers(config, shape: Conv, x, weight, bias, residual, segment, out, workspace, relu) -> None:
    m, k, splits = shape.m, shape.k, config["splits"]
    block_m, block_n, block_k = config["block_m"], config["block_n"], config["block_k"]
    x2, weight2, stride2 = segment or (None, None, 1)
    c2, h2, w2 = shape.segment[:3] if segment else (16, 1, 1)
    split = splits > 1
    _pointers._conv_bias_act_kernel[tiles.ceil_div(m, block_m) * tiles.ceil_div(k, block_n), splits](
        x,
        weight,
        bias,
        None if split else residual,
        x2,
        weight2,
        workspace if split else out,
        m,
        shape.p,
        shape.q,
        shape.h,
        shape.w,
        k,
        shape.c,
        h2,
        w2,
        c2,
        *shape.stride,
        *shape.padding,
        *shape.dilation,
        stride2,
        stride2,
        tiles.ceil_div(_steps(config, shape), splits),
        R=shape.r,
        S=shape.s,
        ROWS=shape.rows,
        ROWS2=stride2 == 1,
        PADDED=any(shape.padding),
        EVEN_C=shape.c % block_k == 0,
        EVEN_C2=c2 % block_k == 0,
        EVEN_K=k % block_n == 0,
        ALIGN_C=math.gcd(shape.c, 16),
        ALIGN_C2=math.gcd(c2, 16),
        ALIGN_K=math.gcd(k, 16),
        RELU=relu and not split,
        SPLIT=split,
        INPUT_PRECISION=config["precision"],
        ROUND_TF32=_rounds(config, x),
        UPCAST=_upcasts(x),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=config["group_m"],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    if not split:
        return
    block_c = min(64, tiles.power_of_2(k))
    block_r = 1024 // block_c
    _pointers._conv_bias_act_finish_kernel[(tiles.ceil_div(m, block_r) * tiles.ceil_div(k, block_c),)](
        workspace,
        bias,
        residual,
        out,
        m,
        k,
        SPLITS=splits,
        ALIGN_K=math.gcd(k, 16),
        RELU=relu,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=4,
    )


def _rounds(config: dict, x: Tensor) -> bool:
    return x.dtype is torch.float32 and config["precision"] == "tf32" and not interpreting()


def _upcasts(x: Tensor) -> bool:
    return x.dtype is torch.bfloat16 and interpreting()


def _launch_tma(config, shape: Conv, x, weight, bias, residual, segment, out, workspace, relu) -> None:
    n, p, q, c, k = shape.n, shape.p, shape.q, shape.c, shape.k
    if _flat(shape):
        n, p, q = 1, 1, shape.m
    box, block_n, block_k = config["box"], config["block_n"], config["block_k"]
    stride = shape.stride[0]
    if stride == 1:
        h, w = (1, shape.m) if _flat(shape) else (shape.h, shape.w)
        x_desc = _descriptor(x, (n, h, w, c), (h * w * c, w * c, c, 1), (*box, block_k))
    else:
        h, w = shape.h, shape.w
        sizes, strides = (n, h // 2, 2, w // 2, 2 * c), (h * w * c, 2 * w * c, w * c, 2 * c, 1)
        x_desc = _descriptor(x, sizes, strides, (box[0], box[1], 1, box[2], block_k))
    reduction = shape.r * shape.s * c
    rows = (n, p, q, k), (p * q * k, q * k, k, 1), (*box, block_n)
    x2_desc = weight2_desc = None
    if segment is not None:
        x2, weight2, stride2 = segment
        c2, h2, w2, _ = shape.segment
        strides = (p * q * c2, q * c2, c2, 1)
        if stride2 > 1:
            strides = (h2 * w2 * c2, stride2 * w2 * c2, stride2 * c2, 1)
        x2_desc = _descriptor(x2, (n, p, q, c2), strides, (*box, block_k))
        weight2_desc = _descriptor(weight2, (k, c2), (c2, 1), (block_n, block_k))
    _tma._conv_bias_act_tma_kernel[(config["programs"],)](
        x_desc,
        _descriptor(weight, (k, reduction), (reduction, 1), (block_n, block_k)),
        bias,
        None if residual is None else _descriptor(residual, *rows),
        x2_desc,
        weight2_desc,
        _descriptor(out, *rows),
        n,
        p,
        q,
        k,
        c,
        shape.c2,
        *shape.padding,
        *shape.dilation,
        R=shape.r,
        S=shape.s,
        STRIDE=stride,
        EVEN_K=k % block_n == 0,
        RELU=relu,
        ROUND_TF32=_rounds(config, x),
        UPCAST=_upcasts(x),
        BOX_N=box[0],
        BOX_H=box[1],
        BOX_W=box[2],
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=config["group_m"],
        FLATTEN=segment is None,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


def _descriptor(t: Tensor, sizes, strides, block):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(sizes), list(strides), list(block))
