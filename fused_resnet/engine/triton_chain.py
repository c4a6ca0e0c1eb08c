"""Host side of the chained bottleneck (rungs 4 and 5): which tiles are worth trying, why a chain cannot run, launches.

Every function takes the op's own arguments, `chain` in reference.py: tensors may be meta tensors, except in a launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.triton import interpreting
from ..kernels import tiles

try:
    from ..kernels import chain as _chain

    import_error = None
except ImportError as error:
    import_error = str(error)

_MAX_ROWS = 2**31 - 2**10  # positions are counted in 32 bits, up to the end of the last tile
_MAX_ROW = 2**26  # values of a row of a map: a tile and the rows around it lie within 32 bits
_POOL_BLOCK = 256

# block_m, block_n, block_k, warps, stages of the 3x3, stages of the expand
_ROWS_64 = (64, 64, 64, 4, 3, 2)
_ROWS_128 = (128, 64, 64, 8, 3, 2)
_ROWS_128_SLIM = (128, 32, 64, 8, 3, 2)  # half the columns: two programs on an SM where the middle is 64
_WIDE = (64, 64, 64, 8, 3, 2)
_WIDE_SLIM = (64, 32, 64, 8, 3, 2)
_WIDEST = (64, 64, 64, 8, 2, 2)
_WIDEST_SLIM = (64, 32, 32, 8, 3, 2)
_WIDEST_SMALL = (64, 32, 32, 8, 2, 1)  # one stage of the expand: two do not fit in 99 KiB

# (up to so many middle channels, up to so many next ones, with a projection): tiles, the likeliest first. What is here
# compiles without a spill and fits the shared memory: tests/test_engine_aot_chain.py. A tile one size up does not.
_EVERYWHERE = {
    (64, 0, False): (_ROWS_64, _ROWS_128),
    (64, 0, True): (_ROWS_128,),
    (64, 64, False): (_ROWS_128_SLIM, _ROWS_64),
    (64, 64, True): (_ROWS_128_SLIM, _ROWS_64),
    (64, 128, False): (_ROWS_128_SLIM, _ROWS_64),
    (128, 0, False): (_ROWS_64, _ROWS_128),
    (128, 0, True): (_ROWS_128,),
    (128, 128, False): (_ROWS_64, _ROWS_128),
    (128, 128, True): (_ROWS_128,),
    (128, 256, False): (_ROWS_128_SLIM, _ROWS_64),
    (256, 0, False): (_WIDE, _ROWS_128),
    (256, 0, True): (_WIDE,),
    (256, 256, False): (_WIDE, _WIDE_SLIM),
    (256, 256, True): (_WIDE,),
    (256, 512, False): (_WIDE_SLIM,),
    (512, 0, False): (_WIDEST, _WIDEST_SLIM),
    (512, 0, True): (_WIDEST,),
}
TILES = {
    80: _EVERYWHERE,
    89: _EVERYWHERE
    | {
        (128, 128, True): (_ROWS_128_SLIM,),
        (256, 0, False): (_WIDE,),
        (256, 256, False): (_WIDE_SLIM,),
        (512, 0, False): (_WIDEST_SMALL,),
        (512, 0, True): (_WIDEST_SLIM,),
    },
    90: _EVERYWHERE | {(256, 0, True): (_WIDE, _ROWS_128)},
    100: _EVERYWHERE
    | {
        (128, 128, True): (_ROWS_128_SLIM,),
        (256, 0, True): (_WIDE, _ROWS_128),
        (256, 256, False): (_ROWS_128, _WIDE),
    },
}


def _padded(channels: int) -> int:
    """The width of a tile that holds all of so many channels; 0 for none."""
    return max(16, tiles.power_of_2(channels)) if channels else 0


def output_size(x: Tensor, weight1: Tensor, weight2: Tensor, stride: int) -> tuple[int, int, int, int]:
    """[N, K, P, Q] of y before quarter or pool."""
    n, _, h, w = x.shape
    return n, weight2.shape[0], (h - 1) // stride + 1, (w - 1) // stride + 1


def declines(
    arch: int,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    residual: Tensor | None = None,
    segment: tuple[Tensor, Tensor, int] | None = None,
    stride: int = 1,
    relu: bool = True,
    next: tuple[Tensor, Tensor] | None = None,
    quarter: bool = False,
    pool: bool = False,
) -> str | None:
    """Why this chain cannot run on sm_<arch>, as the rest of a sentence; None where it can."""
    if import_error is not None:
        return f"cannot import triton: {import_error}"
    if arch < 80:
        return f"needs compute capability 8.0 or newer, got {arch // 10}.{arch % 10}"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {x.dtype}: a float32 tile is twice what a program has registers for"
    if x.numel() == 0:
        return "needs a non-empty batch"
    mid, c, r, s = weight1.shape
    if c != x.shape[1]:
        return f"needs groups == 1, got {x.shape[1] // c}"
    if (r, s) != (3, 3):
        return f"needs a 3x3 convolution first, got {r}x{s}"
    k = weight2.shape[0]
    if tuple(weight2.shape[1:]) != (mid, 1, 1):
        return f"needs a 1x1 convolution of {mid} channels second, got a weight {list(weight2.shape)}"
    if stride not in (1, 2):
        return f"needs stride 1 or 2, got {stride}"
    if residual is not None and segment is not None:
        return "takes a residual or a projection segment, got both"
    if quarter and pool:
        return "takes quarter or pool, got both"
    if pool and next is not None:
        return "takes pool or a next reduce, got both"
    n, _, p, q = output_size(x, weight1, weight2, stride)
    if residual is not None and list(residual.shape) != [n, k, p, q]:
        return f"needs a residual {[n, k, p, q]}, got {list(residual.shape)}"
    for name, t in ("x", x), ("residual", residual), ("segment", segment and segment[0]):
        if t is not None and not t.is_contiguous(memory_format=torch.channels_last):
            return f"needs dense channels_last activations, got {name} with strides {t.stride()}"
    channels = {"input": c, "middle": mid, "output": k}
    positions, row = n * x.shape[2] * x.shape[3], x.shape[3] * c
    if segment is not None:
        x2, projection, stride2 = segment
        if tuple(projection.shape) != (k, x2.shape[1], 1, 1):
            return f"needs a 1x1 projection of {x2.shape[1]} to {k} channels, got a weight {list(projection.shape)}"
        if [(size - 1) // stride2 + 1 for size in x2.shape[2:]] != [p, q]:
            return f"needs a projection to a map of {p}x{q}, got one of {list(x2.shape[2:])} by stride {stride2}"
        channels["projected"] = x2.shape[1]
        positions = max(positions, n * x2.shape[2] * x2.shape[3])
        row = max(row, x2.shape[3] * x2.shape[1])
    if next is not None:
        if tuple(next[0].shape[1:]) != (k, 1, 1):
            return f"needs a next 1x1 convolution of {k} channels, got a weight {list(next[0].shape)}"
        channels["next"] = next[0].shape[0]
    for name, size in channels.items():
        power = size >= 16 and size == tiles.power_of_2(size)
        if name in ("middle", "next") and not power:
            return f"needs a power of two of {name} channels, at least 16, got {size}: one tile holds them all"
        if size % 64 and not power:
            return f"needs {name} channels that 64 divides, or a power of two of at least 16, got {size}"
    if positions > _MAX_ROWS:
        return f"needs at most {_MAX_ROWS} positions, got {positions}"
    if max(row, q * k) > _MAX_ROW:
        return f"needs at most {_MAX_ROW} values in a row of a map, got {max(row, q * k)}"
    following = channels.get("next", 0)
    if not _tiles(arch, mid, following, segment):
        what = f"{mid} middle" + f" and {following} next" * bool(following) + " channels"
        what += " beside a projection" if segment is not None and _tiles(arch, mid, following, None) else ""
        return f"has no tile for {what} on sm_{arch}: the accumulators outgrow the registers or the shared memory"
    return None


def _tiles(arch: int, mid: int, following: int, segment) -> tuple:
    key = max(64, _padded(mid)), following and max(64, _padded(following)), segment is not None
    return TILES[tiles.family(arch)].get(key, ())


def configs(arch: int, *args, **options) -> list[dict]:
    """The configurations worth trying on sm_<arch>, the likeliest first; none where the chain declines."""
    if declines(arch, *args, **options) is not None:
        return []
    _, weight1, *_ = args
    following = options.get("next")
    names = ("block_m", "block_n", "block_k", "num_warps", "stages_conv", "stages_expand")
    found = _tiles(arch, weight1.shape[0], 0 if following is None else following[0].shape[0], options.get("segment"))
    return [dict(zip(names, tile, strict=True)) for tile in found]


def pack(weight: Tensor) -> Tensor:
    """A weight [K, C, R, S] as the kernel reads it: channels last, dense."""
    return weight.contiguous(memory_format=torch.channels_last)


def workspace(
    config: dict, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, *_, stride=1, pool=False, **__
) -> int:
    """Bytes of scratch memory that a launch needs."""
    n, k, p, q = output_size(x, weight1, weight2, stride)
    partials = tiles.ceil_div(p * q, config["block_m"])
    return 4 * n * partials * k if pool and partials > 1 else 0


def launch(
    config: dict,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    residual: Tensor | None = None,
    segment: tuple[Tensor, Tensor, int] | None = None,
    stride: int = 1,
    relu: bool = True,
    next: tuple[Tensor, Tensor] | None = None,
    quarter: bool = False,
    pool: bool = False,
    y: Tensor,
    z: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:
    """Writes y and, with next, z (see reference.chain) on the current stream. Activations are dense channels_last,
    weights packed, biases float32; workspace: as many bytes as `workspace()` says, 16-byte aligned.

    y may be the residual's own memory, except with quarter: a program reads what it is about to write, and no more."""
    n, k, p, q = output_size(x, weight1, weight2, stride)
    mid, c = weight1.shape[:2]
    x2, projection, stride2 = segment or (None, None, 1)
    weight3, bias3 = next or (None, None)
    following = weight3.shape[0] if next else 0
    h2, w2 = (1, 1) if x2 is None else x2.shape[2:]
    block_m = config["block_m"]
    partials = tiles.ceil_div(p * q, block_m)
    sums = workspace.view(torch.float32) if pool and partials > 1 else None
    _chain._chain_fwd_kernel[(n * partials if pool else tiles.ceil_div(n * p * q, block_m),)](
        x,
        weight1,
        bias1,
        weight2,
        bias2,
        residual,
        x2,
        projection,
        weight3,
        bias3,
        None if pool else y,
        z,
        (y if sums is None else sums) if pool else None,
        n * p * q,
        p,
        q,
        *x.shape[2:],
        h2,
        w2,
        C=c,
        MID=mid,
        K=k,
        C2=0 if x2 is None else x2.shape[1],
        NEXT=following,
        STRIDE=stride,
        STRIDE2=stride2,
        RELU=relu,
        QUARTER=quarter,
        POOL_MEAN=pool and sums is None,
        UPCAST=interpreting() and x.dtype is torch.bfloat16,
        INPUT_PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
        BLOCK_M=block_m,
        BLOCK_N=config["block_n"],
        BLOCK_K=config["block_k"],
        BLOCK_MID=_padded(mid),
        BLOCK_NEXT=_padded(following),
        STAGES_CONV=config["stages_conv"],
        STAGES_EXPAND=config["stages_expand"],
        num_warps=config["num_warps"],
        num_stages=config["stages_conv"],
    )
    if sums is not None:
        grid = (n, tiles.ceil_div(k, _POOL_BLOCK))
        _chain._chain_pool_kernel[grid](sums, y, partials, p * q, K=k, BLOCK=_POOL_BLOCK, num_warps=4)
