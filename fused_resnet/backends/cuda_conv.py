"""Host side of the compiled convolutions (csrc/conv): which instances there are, what each can run, which one to take.

A shape is what `csrc/conv_bn_act.h` has under conv_plan: N, H, W, C, K, R, S, stride, padding, dilation (height and
width each), H2, W2, C2, stride2; the last four are 0, 0, 0, 1 without a second segment. The library itself says why an
instance cannot run a shape, and needs no GPU for that.
"""

from __future__ import annotations

import functools
import json
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.tiles import ceil_div
from . import library
from .layout import conv_map_size

Shape = tuple[int, ...]
DTYPES = (torch.float16, torch.bfloat16)

# Share of the tensor cores' speed that a tile reaches, larger ones loading less for a multiplication: by the times of
# ResNet-50's convolutions at batch 128 on an H100, of which the tuner measures each.
_SHARES = {(256, 128): 1.0, (192, 128): 1.02, (128, 256): 0.97, (128, 128): 0.97, (128, 64): 0.75, (64, 64): 0.55}
_LINES_SHARE = 1.4  # a line is loaded once, for all nine taps
_SPLIT_SHARE = 0.85  # of a stream-K kernel, which adds up parts of tiles
_EXCHANGE = 3  # steps of a reduction that blocks take to add up their parts of a tile: a guess


class Instance(NamedTuple):
    """A compiled convolution. index: its number in the library; arch: 90 runs on 9.0 only, 80 on what is newer; tile:
    positions (of one line for those by lines), channels, values of the reduction a step; parts: of those for few
    positions, how many blocks share the reduction of a tile; 0 for all others."""

    index: int
    name: str
    arch: int
    dtype: torch.dtype
    tile: tuple[int, int, int]
    cluster: tuple[int, int]
    stages: int
    threads: int
    shared_bytes: int
    splits: bool
    parts: int

    @property
    def by_lines(self) -> bool:
        """For one convolution alone, 3x3 of 64 channels."""
        return self.tile[0] % 64 != 0

    @property
    def general(self) -> bool:
        """Neither for few positions nor by lines."""
        return not self.parts and not self.by_lines


@functools.cache
def instances() -> tuple[Instance, ...]:
    """All that the library has; none where it is absent or was built without CUDA."""
    if library.load() is not None or not hasattr(torch.ops.fused_resnet_cuda, "conv_instances"):
        return ()  # or a library of an older build
    if not library.build_facts().get("cuda"):
        return ()
    listed = json.loads(bytes(torch.ops.fused_resnet_cuda.conv_instances().tolist()))
    return tuple(
        Instance(
            i, **d | {"dtype": getattr(torch, d["dtype"]), "tile": tuple(d["tile"]), "cluster": tuple(d["cluster"])}
        )
        for i, d in enumerate(listed)
    )


@functools.cache
def runs_on(arch: int) -> tuple[Instance, ...]:
    """The instances with code for sm_<arch>: on Hopper its own, and sm_80's only where CUTLASS was not at hand."""
    own = tuple(i for i in instances() if i.arch == 90 == arch)
    if any(i.general for i in own):
        return own
    archs = [a for a in library.build_facts().get("archs", []) if a != "sm_90a"]
    return own + tuple(i for i in instances() if i.arch == 80 <= arch and library.covers(archs, divmod(arch, 10)))


class Chain(NamedTuple):
    """A compiled bottleneck, for sm_90 only. middle: channels of its 3x3; following: of the next convolution; segment:
    whether it has a projection in the residual's place; by_lines: whether its tiles are lines of an image, or else 64
    positions; stages: of the rings of x (tiles or lines), and of the residual or of weights that do not stay."""

    index: int
    name: str
    dtype: torch.dtype
    middle: int
    following: int
    segment: bool
    by_lines: bool
    stages: tuple[int, int]
    threads: int
    shared_bytes: int


@functools.cache
def chains() -> tuple[Chain, ...]:
    """All that the library has; none where it is absent or was built without sm_90a."""
    if not instances() or not hasattr(torch.ops.fused_resnet_cuda, "chain_instances"):
        return ()
    listed = json.loads(bytes(torch.ops.fused_resnet_cuda.chain_instances().tolist()))
    return tuple(
        Chain(i, **d | {"dtype": getattr(torch, d["dtype"]), "stages": tuple(d["stages"])})
        for i, d in enumerate(listed)
    )


def chains_of(dtype: torch.dtype, middle: int, following: int, segment: bool) -> list[Chain]:
    """Those of one kind."""
    kind = (dtype, middle, following, segment)
    return [c for c in chains() if (c.dtype, c.middle, c.following, c.segment) == kind]


def shape_of(x_size, weight_size, stride, padding, dilation, segment: tuple[int, int, int, int] | None = None) -> Shape:
    """x_size: (N, C, H, W); weight_size: (K, C, R, S); segment: channels, height, width of x2, and its stride."""
    n, c, h, w = x_size
    k, _, r, s = weight_size
    c2, h2, w2, stride2 = segment or (0, 0, 0, 1)
    return (n, h, w, c, k, r, s, *stride, *padding, *dilation, h2, w2, c2, stride2)


_plans: dict[tuple, int | str] = {}
_MOST_PLANS = 4096


def plan(index: int, shape: Shape, sms: int) -> int | str:
    """Bytes of workspace that an instance needs for a shape on a GPU of `sms` multiprocessors; the reason, a str, why
    it cannot run it."""
    key = (index, shape, sms)
    if key not in _plans:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        try:
            _plans[key] = int(torch.ops.fused_resnet_cuda.conv_plan(index, list(shape), sms))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if not reason.startswith("conv_plan: "):  # not about the shape: a fake tensor mode, say
                raise
            _plans[key] = reason.removeprefix("conv_plan: ")
    return _plans[key]


def candidates(shape: Shape, dtype: torch.dtype, arch: int, sms: int) -> list[Instance]:
    """The instances that can run a shape, the most promising first."""
    able = [i for i in runs_on(arch) if i.dtype is dtype and isinstance(plan(i.index, shape, sms), int)]
    able = [i for i in able if not _too_small(i, shape, sms)] or able
    return sorted(able, key=lambda i: _cost(i, shape, sms))


def declines(shape: Shape, dtype: torch.dtype, arch: int, sms: int) -> str | None:
    """Why no instance can run this, as the rest of a sentence; None where one can."""
    if dtype not in DTYPES:
        return f"needs float16 or bfloat16, got {dtype}"
    found = [i for i in runs_on(arch) if i.dtype is dtype]
    if not found:
        return library.build_facts().get("conv_missing") or f"has no convolution for sm_{arch}"
    reasons = [plan(i.index, shape, sms) for i in found]
    return None if any(isinstance(r, int) for r in reasons) else reasons[0]


def _tiles(instance: Instance, shape: Shape) -> int:
    """Of a shape, in whole clusters along its positions: it has those along its channels, or was refused."""
    (tile_m, tile_n, _), (along_m, _) = instance.tile, instance.cluster
    return ceil_div(positions(shape), tile_m * along_m) * along_m * ceil_div(shape[4], tile_n)


def _too_small(instance: Instance, shape: Shape, sms: int) -> bool:
    """Whether an instance for few positions has too many: more clusters of blocks than find room at once, two blocks
    an SM."""
    return instance.parts > 0 and _tiles(instance, shape) > 2 * (sms // instance.parts)


def _cost(instance: Instance, shape: Shape, sms: int) -> float:
    """Waves over the multiprocessors, in whole tiles, by what a tile costs; in parts of tiles where stream-K divides
    them, which its need for a workspace tells. By lines: the lines of a warp group, however short, and two beside."""
    tile_m, tile_n, tile_k = instance.tile
    if instance.by_lines:
        n, p, q = map_of(shape)
        return 2 * (ceil_div(n * p * ceil_div(q, tile_m), 2 * sms) + 2) * 64 * tile_n / _LINES_SHARE
    count = _tiles(instance, shape)
    area = tile_m * tile_n / _SHARES.get((tile_m, tile_n), 0.5)
    if instance.parts:
        _, _, _, c, _, r, s, *_, c2, _, _, _ = shape
        exchange = _EXCHANGE / (r * s * ceil_div(c, tile_k) + ceil_div(c2, tile_k)) if instance.parts > 1 else 0.0
        return max(1.0, instance.parts * count / sms) * area * (1 / instance.parts + exchange)
    if instance.splits and plan(instance.index, shape, sms) > 0:
        return max(count / sms, 0.5) * area / _SPLIT_SHARE
    return ceil_div(count, sms) * area


def map_of(shape: Shape) -> tuple[int, int, int]:
    """Images, and rows and columns of the result."""
    n, h, w, _, _, r, s, *conv = shape
    return n, *conv_map_size((h, w), (r, s), conv[:2], conv[2:4], conv[4:6])


def positions(shape: Shape) -> int:
    """Rows of the implicit GEMM."""
    n, p, q = map_of(shape)
    return n * p * q


def conv_bias_act_out(
    instance: Instance,
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C, R, S]
    bias: Tensor | None,  # [K] float32
    residual: Tensor | None,  # [N, K, P, Q]
    segment: tuple[Tensor, Tensor, int] | None,  # x2: [N, C2, H2, W2], weight2: [K, C2, 1, 1], stride2
    out: Tensor,  # [N, K, P, Q]
    workspace: Tensor | None,  # bytes
    *,
    stride,
    padding,
    dilation,
    relu: bool,
    constant_weights: bool = False,
) -> None:
    """out = act(conv(x, weight) + bias + residual + conv1x1(x2, weight2)) on the current stream of x's device. Maps and
    filters are dense channels_last, in the instance's dtype. Allocates nothing if it gets the workspace it needs.

    constant_weights: a promise that weights and bias were written before the last kernel of the stream that did not
    overlap another, if not earlier: they may be read while the kernels before still run.
    """
    x2, weight2, stride2 = segment or (None, None, 1)
    torch.ops.fused_resnet_cuda.conv_bias_act_out(
        instance.index, x, weight, bias, None, residual, x2, weight2, stride2, stride, padding, dilation, relu,
        workspace, out, constant_weights,
    )  # fmt: skip
