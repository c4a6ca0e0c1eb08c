"""The chained bottleneck against float64: rung 4, rung 5, projection, quarter store and pool."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fused_resnet.engine import reference
from fused_resnet.engine import triton_chain as chain

from .common import CL, assert_close, each_dtype, rand

SMALL = {
    "block_m": 32,
    "block_n": 32,
    "block_k": 16,
    "num_warps": 4,
    "stages_conv": 2,
    "stages_expand": 2,
}
OFFERED = sorted({tile[:3] for chip in chain.TILES.values() for found in chip.values() for tile in found})


def config(block_m, block_n, block_k):
    return SMALL | {"block_m": block_m, "block_n": block_n, "block_k": block_k}


def nans(*shape, dtype):
    return torch.full(shape, math.nan, dtype=dtype).contiguous(memory_format=CL)


def inputs(n, c, h, w, mid, k, *, stride=1, following=0, projected=0, stride2=None, shortcut=True, dtype=torch.float32):
    """The op's tensors and options; weights scaled so that every activation is of order one."""
    seeds = itertools.count()

    def tensor(*shape, scale=1.0):
        return chain.pack((rand(*shape, seed=next(seeds)) * scale).to(dtype))

    def bias(size):
        return rand(size, seed=next(seeds)) * 0.5

    p, q = (h - 1) // stride + 1, (w - 1) // stride + 1
    x = tensor(n, c, h, w)
    weights = (
        tensor(mid, c, 3, 3, scale=(9 * c) ** -0.5),
        bias(mid),
        tensor(k, mid, 1, 1, scale=mid**-0.5),
        bias(k),
    )
    options = {"stride": stride}
    if projected:
        stride2 = stride2 or stride
        x2 = tensor(n, projected, (p - 1) * stride2 + 1 + (h + 1) % 2, (q - 1) * stride2 + 1)
        if stride2 == 1:
            x2 = tensor(n, projected, p, q)
        options["segment"] = x2, tensor(k, projected, 1, 1, scale=projected**-0.5), stride2
    elif shortcut:
        options["residual"] = tensor(n, k, p, q)
    if following:
        options["next"] = tensor(following, k, 1, 1, scale=k**-0.5), bias(following)
    return (x, *weights), options


def run(args, options, tile=SMALL):
    """(y, z) of the kernel, into outputs and a workspace that hold NaN."""
    x, weight1, _, weight2, _ = args
    n, k, p, q = chain.output_size(x, weight1, weight2, options.get("stride", 1))
    following = options.get("next")
    z = None if following is None else nans(n, following[0].shape[0], p, q, dtype=x.dtype)
    scratch = torch.full((chain.workspace(tile, *args, **options) // 4,), math.nan)
    shape = (n, k, p, q)
    if options.get("quarter"):
        shape = (n, k, (p + 1) // 2, (q + 1) // 2)
    if options.get("pool"):
        shape = (n, k, 1, 1)
    y = nans(*shape, dtype=x.dtype)
    chain.launch(tile, *args, **options, y=y, z=z, workspace=scratch)
    return y, z


def in_double(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    return tuple(map(in_double, value)) if isinstance(value, tuple) else value


def check(args, options, tile=SMALL):
    got = run(args, options, tile)
    want = reference.chain(*map(in_double, args), **{k: in_double(v) for k, v in options.items()})
    # float32: sums of sums; 16 bits: the middle and, for z, y are rounded on the way as well.
    for name, one, other, factor in zip("yz", got, want, (2.0, 3.0), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, factor=factor, name=name)
    return got


CASES = {
    "rung4": (dict(), {}),
    "rung4_no_shortcut": (dict(shortcut=False), {}),
    "rung4_no_relu": (dict(), {"relu": False}),
    "rung4_stride2": (dict(stride=2), {}),
    "rung4_projection": (dict(projected=16), {}),
    "rung4_projection_stride2": (dict(stride=2, projected=24), {}),
    "rung4_quarter": (dict(), {"quarter": True}),
    "rung4_quarter_stride2": (dict(stride=2), {"quarter": True}),
    "rung5": (dict(following=16), {}),
    "rung5_stride2": (dict(stride=2, following=16), {}),
    "rung5_projection": (dict(projected=16, following=16), {}),
    "rung5_projection_wide": (dict(projected=40, following=16), {}),
    "rung5_projection_stride2": (dict(stride=2, projected=33, following=16), {}),
    "rung5_projection_of_its_own_stride": (dict(projected=24, stride2=2, following=16), {}),
    "rung5_twice_as_wide": (dict(following=32), {}),
    "rung5_quarter": (dict(following=32), {"quarter": True}),
    "rung5_projection_quarter": (dict(stride=2, projected=40, following=32), {"quarter": True}),
    "pool": (dict(), {"pool": True}),
    "pool_projection_stride2": (dict(stride=2, projected=24), {"pool": True}),
}


FEW = ("rung4", "rung5_projection_quarter", "pool")


@pytest.mark.parametrize("case, dtype", [*each_dtype(CASES, FEW, whole=("fp32", "fp16"))])
def test_every_form(case, dtype):
    """Channels that the tile divides: two blocks of the 3x3's, two column blocks."""
    shape, options = CASES[case]
    args, more = inputs(3 if dtype is torch.float32 else 1, 32, 7, 9, 16, 64, dtype=dtype, **shape)
    check(args, more | options)


@pytest.mark.parametrize("case, dtype", [*each_dtype(CASES, FEW)])
def test_channels_that_no_tile_divides(case, dtype):
    """Ragged everywhere: input, middle, output and next channels; rows of a map longer than a tile."""
    shape, options = CASES[case]
    if shape.get("following"):
        shape = shape | {"following": shape["following"] + 3}
    args, more = inputs(2, 19, 3, 18, 13, 37, dtype=dtype, **shape)
    check(args, more | options)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (8, 6)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("options", [{}, {"quarter": True}, {"pool": True}], ids=["whole", "quarter", "pool"])
def test_small_and_even_maps(size, stride, options):
    shape = {} if options.get("pool") else {"following": 16}
    args, more = inputs(3, 16, *size, 16, 32, stride=stride, projected=16 * stride, **shape)
    check(args, more | options)


@pytest.mark.parametrize("tile", OFFERED, ids=lambda t: "x".join(map(str, t)))
@pytest.mark.parametrize("projected", [0, 16, 72], ids=lambda c: f"projected{c}")
def test_every_tile_that_is_offered(tile, projected):
    args, more = inputs(3, 24, 7, 9, 32, 144, stride=2 if projected else 1, projected=projected, dtype=torch.float16)
    tile = config(*tile)
    check(args, more, tile)
    check(args, more | {"pool": True}, tile)
    following = chain.pack(rand(64, 144, 1, 1, seed=50).mul(1 / 12).half()), rand(64, seed=51)
    check(args, more | {"next": following, "quarter": True}, tile)


def test_an_image_of_several_tiles_is_pooled_in_a_fixed_order():
    """Sums of tiles go through the workspace, are added first to last, and come out the same bits every time."""
    args, options = inputs(2, 16, 13, 11, 16, 300, dtype=torch.float16)
    options["pool"] = True
    assert chain.workspace(SMALL, *args, **options) == 4 * 2 * 5 * 300
    first, _ = check(args, options)
    assert torch.equal(first, run(args, options)[0])
    assert chain.workspace(config(256, 64, 16), *args, **options) == 0
    check(args, options, config(256, 64, 16))


def test_nan_and_infinity_stay_where_they_belong():
    """A NaN comes out of every ReLU; what a tile has beyond the last channel or row turns no infinity into a NaN."""
    args, options = inputs(2, 11, 7, 9, 13, 37, following=19)
    x = args[0]
    x[0, 3, 0, 0] = math.nan
    x[1, 5, 6, 8] = math.inf
    options["residual"][0, 7, 3, 4] = math.nan
    options["residual"][0, 36, 5, 6] = math.inf
    for more in ({}, {"quarter": True}):
        got, want = run(args, options | more), reference.chain(*args, **options | more)
        for one, other in zip(got, want, strict=True):
            assert other.isnan().any() and not other.isnan().all()
            assert torch.equal(one.isnan(), other.isnan())
            assert torch.equal(one.isinf(), other.isinf())
    del options["next"]
    pooled, _ = run(args, options | {"pool": True})
    assert torch.equal(pooled.isnan(), reference.chain(*args, **options, pool=True)[0].isnan())


def test_the_output_may_take_the_residuals_place():
    args, options = inputs(3, 16, 7, 9, 16, 64, following=16)
    apart = run(args, options)
    z = torch.full_like(apart[1], math.nan)
    chain.launch(SMALL, *args, **options, y=options["residual"], z=z)
    assert torch.equal(options["residual"], apart[0]) and torch.equal(z, apart[1])


def test_a_neighbouring_image_is_left_alone():
    """Tiles reach over images; taps must not."""
    args, options = inputs(3, 16, 3, 3, 16, 16, following=16)
    alone = run(args, options, config(32, 16, 16))
    args[0][1] = math.nan
    together = run(args, options, config(32, 16, 16))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one[::2], other[::2])
        assert other[1].isnan().all()


def test_reasons():
    half = torch.float16
    args, options = inputs(1, 64, 7, 9, 64, 256, following=64, dtype=half)
    x, weight1, bias1, weight2, bias2 = args

    def decline(*changed, arch=90, **more):
        return chain.declines(arch, *(changed + args[len(changed) :]), **options | more)

    assert decline() is None and chain.configs(90, *args, **options)
    assert decline(arch=75) == "needs compute capability 8.0 or newer, got 7.5"
    assert decline(x.float()).startswith("needs float16 or bfloat16, got torch.float32")
    assert decline(x[:0]) == "needs a non-empty batch"
    assert decline(x, weight1[:, :2]) == "needs groups == 1, got 32"
    assert decline(x, weight1[:, :, :1, :1]) == "needs a 3x3 convolution first, got 1x1"
    assert decline(stride=3) == "needs stride 1 or 2, got 3"
    assert decline(quarter=True, pool=True) == "takes quarter or pool, got both"
    assert decline(pool=True) == "takes pool or a next reduce, got both"
    assert decline(residual=rand(1, 256, 7, 8)) == "needs a residual [1, 256, 7, 9], got [1, 256, 7, 8]"
    assert decline(x.contiguous()) == ("needs dense channels_last activations, got x with strides (4032, 63, 9, 1)")
    segment = chain.pack(rand(1, 64, 7, 9, dtype=half)), rand(256, 64, 1, 1, dtype=half), 1
    assert decline(segment=segment) == "takes a residual or a projection segment, got both"
    assert decline(residual=None, segment=segment) is None
    assert decline(residual=None, segment=(*segment[:2], 2)) == (
        "needs a projection to a map of 7x9, got one of [7, 9] by stride 2"
    )
    for sizes, reason in {
        (64, 96, 256, 64): "needs a power of two of middle channels, at least 16, got 96: one tile holds them all",
        (64, 64, 256, 8): "needs a power of two of next channels, at least 16, got 8: one tile holds them all",
        (24, 64, 256, 64): "needs input channels that 64 divides, or a power of two of at least 16, got 24",
        (64, 64, 200, 64): "needs output channels that 64 divides, or a power of two of at least 16, got 200",
    }.items():
        c, mid, k, following = sizes
        args, options = inputs(1, c, 7, 9, mid, k, following=following, dtype=half)
        assert decline() == reason


def test_wide_middles_are_declined_with_the_reason():
    def meta(mid, following=0, projected=0):
        def empty(*shape):
            format = CL if len(shape) == 4 else torch.contiguous_format
            return torch.empty(shape, dtype=torch.float16, device="meta", memory_format=format)

        args = empty(8, mid, 14, 14), empty(mid, mid, 3, 3), empty(mid), empty(4 * mid, mid, 1, 1), empty(4 * mid)
        options = {"segment": (empty(8, 64, 14, 14), empty(4 * mid, 64, 1, 1), 1)} if projected else {}
        return args, options | ({"next": (empty(following, 4 * mid, 1, 1), empty(following))} if following else {})

    for arch in (80, 86, 89, 90, 100, 120):
        for projected in (0, 64):
            for mid, following, what in [
                (512, 512, "512 middle and 512 next channels"),
                (1024, 0, "1024 middle channels"),
                (64, 256, "64 middle and 256 next channels"),
            ]:
                args, options = meta(mid, following, projected)
                assert chain.configs(arch, *args, **options) == []
                assert chain.declines(arch, *args, **options) == (
                    f"has no tile for {what} on sm_{arch}: the accumulators outgrow the registers or the shared memory"
                )
        args, options = meta(128, 256, 64)
        assert "128 middle and 256 next channels beside a projection" in chain.declines(arch, *args, **options)
