"""Which tile a kernel runs with. Arithmetic only, no torch and no triton: an ahead-of-time compile picks what a launch
picks.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

SHARED_BYTES = {80: 163 << 10, 87: 163 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10}
SHARED_BYTES_ELSEWHERE = 99 << 10  # sm_86, sm_89, sm_120 and whatever comes next
GROUPED_SPAN = 32  # channels a block-diagonal tile spans: the tensor core wastes span / C_group of its work, and gains
#                    whole 64-byte lines of x and a K it can use
FLAT_BELOW = 16  # fewer input channels than this cannot fill a tensor core's K: flatten (tap, channel)


class ConvTile(NamedTuple):
    """Tile and specialisation of one `_conv_bn_act_fwd_kernel` launch."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    groups_per_tile: int
    flat: bool


# (block_m, block_n, warps, share of the tensor cores' speed such a tile reaches): loads per multiply-add fall with the
# tile's size. No block_m below 64: a warp group's matrix instruction is 64 rows. No 128 x 256: its epilogue spills.
_CANDIDATES = (
    (128, 128, 8, 1.0),
    (128, 64, 4, 0.8),
    (64, 64, 4, 0.65),
    (128, 32, 4, 0.55),
    (64, 32, 4, 0.45),
)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def family(arch: int) -> int:
    """The chip whose compiled kernels stand for sm_<arch>'s: same tensor cores, no more shared memory."""
    if arch in (80, 87):
        return 80
    if arch in (100, 103):
        return 100
    return 90 if arch == 90 else 89


def shared_bytes(arch: int) -> int:
    """Shared memory one block may use on sm_<arch>."""
    return SHARED_BYTES.get(arch, SHARED_BYTES_ELSEWHERE)


BUNDLE_WIDTH = GROUPED_SPAN  # channels, for the same reasons
WEIGHT_BUNDLE_WIDTH = 64  # of the weight's gradient, whose rows are channels: a warp group's instruction has 64


class Bundle(NamedTuple):
    """Groups next to each other whose convolutions are one product: zeros stand off the diagonal of its weight."""

    size: int  # groups
    c: int  # channels of x and of y in them
    k: int


@cache
def bundle(groups: int, c: int, k: int, width: int = BUNDLE_WIDTH) -> Bundle:
    """As many of the groups, of c and k channels each, as fit into `width` and divide their number; at least one."""
    most = max(1, width // max(c, k, 1))
    size = max(n for n in range(1, most + 1) if groups % n == 0)
    return Bundle(size, size * c, size * k)


@cache
def conv_tile(
    m: int, k: int, c_group: int, groups: int, taps: int, itemsize: int, arch: int, sms: int, fma: bool = False
) -> ConvTile:
    """The tile for an implicit GEMM of m rows, k output channels and taps * c_group reduction.

    The cost of a candidate is (waves over the SMs) * (tile area) / (share of peak): small problems get small tiles
    until the chip is full, large ones the largest tile. `fma` says that the dot runs on plain FMA units (float32
    without TF32), whose operands live in registers and want small tiles.
    """
    k_group = k // groups
    per_tile = max(1, min(groups, GROUPED_SPAN // max(c_group, k_group)))
    flat = per_tile == 1 and c_group < FLAT_BELOW
    reduction = taps * c_group if flat else per_tile * c_group
    columns = max(16, power_of_2(per_tile * k_group))
    block_k = max(16, min(power_of_2(reduction), 16 if fma else 128 // itemsize))
    scattered = flat or c_group * itemsize % 16 != 0
    if scattered:
        block_k = min(block_k, 32)

    def cost(candidate) -> float:
        block_m, block_n, _, share = candidate
        block_n = min(block_n, columns)
        tiles = ceil_div(m, block_m) * ceil_div(groups, per_tile) * ceil_div(per_tile * k_group, block_n)
        return ceil_div(tiles, sms) * block_m * block_n / share

    # Loads of a few bytes each take a register for every pointer: less is left for the accumulator.
    largest = (64 * 32 if flat else 64 * 64) if fma else 128 * 64 if scattered else 128 * 128
    fits = [c for c in _CANDIDATES if c[1] <= max(columns, 32) and c[0] * c[1] <= largest]
    block_m, block_n, num_warps, _ = min(fits, key=cost)
    block_n = min(block_n, columns)
    if block_m == 128 and (scattered or arch >= 100):
        # Four warps would not have the registers: for the pointers of loads of a few bytes each, or, on sm_100, where a
        # thread gets a whole row of the accumulator, for the epilogue of that row.
        num_warps = 8
    stage = (block_m + block_n) * block_k * itemsize
    num_stages = max(2, min(4, (shared_bytes(arch) - 1024) // stage))
    return ConvTile(block_m, block_n, block_k, 8, num_warps, num_stages, per_tile, flat)


@cache
def bn_act_conv_tile(
    m: int, k: int, c: int, taps: int, itemsize: int, arch: int, sms: int, fma: bool, normalises: bool
) -> ConvTile:
    """The tile of one `_bn_act_conv_fwd_kernel` launch: the plain convolution's, unless x is normalised on the way in.

    It then passes through registers, which eight warps have and four are short of, but on sm_100 for the narrower tile
    in 16 bits (ptxas caps eight warps at 80 registers there, and spills one or two). With three stages two blocks of
    128 x 64 find room on an SM, so that one normalises while the other multiplies. Channels are never flattened with
    the taps: each has its own scale.
    """
    tile = conv_tile(m, k, c, 1, taps, itemsize, arch, sms, fma)
    if not normalises:
        return tile
    roomy = family(arch) == 100 and itemsize == 2 and (tile.block_m, tile.block_n) == (128, 64)
    return tile._replace(
        flat=False,
        block_k=16 if tile.flat else tile.block_k,
        num_warps=4 if roomy else 8 if tile.block_m == 128 else tile.num_warps,
        num_stages=min(tile.num_stages, 3),
    )


class GramTile(NamedTuple):
    """Tile of `_gram_partial_kernel`, and how its reduction is split."""

    block_r: int
    block_c: int
    pairs: int  # tiles of the upper triangle
    splits: int
    steps: int  # row blocks a split walks
    num_warps: int


GRAM_PARTIALS = 16 << 20  # bytes of [splits, C, C]: written and read once, they should cost less than x


def upper_tiles(c: int, block_c: int) -> int:
    """Tiles of block_c on or above the diagonal of [c, c]."""
    return ceil_div(c, block_c) * (ceil_div(c, block_c) + 1) // 2


@cache
def gram_tile(m: int, c: int, itemsize: int, programs: int = 256) -> GramTile:
    """The tile for the covariance of c channels over m rows. It depends on the shape alone, so sums come out the same
    on every run and every GPU."""
    # Float32 runs on FMA units, whose operands live in registers.
    largest = 64 if itemsize == 4 or c % 128 != 0 else 128
    block_c = max(16, min(largest, power_of_2(c)))
    block_r = 16 if itemsize == 4 else 32
    pairs = upper_tiles(c, block_c)
    blocks = ceil_div(m, block_r)
    splits = max(1, min(blocks, programs // pairs, GRAM_PARTIALS // (4 * c * c)))
    steps = ceil_div(blocks, splits)
    return GramTile(block_r, block_c, pairs, ceil_div(blocks, steps), steps, 8 if block_c * itemsize == 256 else 4)


class RowTile(NamedTuple):
    """Tile of a kernel over channels_last rows [M, C], and how its reduction is split."""

    block_r: int
    block_c: int
    splits: int
    steps: int  # row blocks a split walks
    align: int  # what divides the channels, up to 16


@cache
def row_tile(m: int, c: int, elements: int = 2048, programs: int = 1024) -> RowTile:
    """Tile of `elements` elements; the rows split among about `programs` programs.

    The split depends on the shape alone, so sums come out the same on every run and every GPU.
    """
    block_c = min(64, power_of_2(c))
    block_r = min(elements // block_c, 512)  # narrower columns than 4: registers go to row offsets
    blocks = ceil_div(m, block_r)
    steps = ceil_div(blocks, min(blocks, max(1, programs // ceil_div(c, block_c))))
    return RowTile(block_r, block_c, ceil_div(blocks, steps), steps, math.gcd(c, 16))


def finish_tile(splits: int, c: int) -> tuple[int, int]:
    """(rows, channels) of a block of the kernels that add up partials [splits, C].

    These wait for memory and do little else: 8 channels, a 32-byte sector, make many programs of few steps.
    """
    return min(256, power_of_2(splits)), min(8, power_of_2(c))
