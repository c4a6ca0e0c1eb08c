"""What the backend says of itself: reasons, and tiles that fit the chips."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.backends import triton as backend
from fused_resnet.kernels import tiles

from .common import rand


def conv_args(x, weight, stride=1, padding=1):
    return (x, weight, *[None] * 4, 1e-5, None, [stride] * 2, [padding] * 2, [1, 1], 1, True)


def test_available_here():
    assert backend.unavailable() is None
    assert backend.declines("conv_bn_act", *conv_args(rand(1, 3, 7, 9), rand(4, 3, 3, 3))) is None


def test_reasons(monkeypatch):
    x, weight = rand(1, 3, 7, 9), rand(4, 3, 3, 3)
    decline = backend.declines
    assert decline("max_pool", x) == "has no max_pool"
    assert decline("bn_stats", x.double()) == "needs float16, bfloat16 or float32, got torch.float64"
    assert decline("bn_stats", x[:0]) == "needs a non-empty batch"
    assert decline("conv_bn_act", *conv_args(x, weight, padding=0)) is None
    assert decline("bn_act_bwd", x[:0], None, x[:0]) == "needs a non-empty batch"
    huge = torch.empty(2**16, 1, 1, 1).expand(2**16, 1, 2**8, 2**8)
    assert decline("bn_stats", huge) == f"needs at most {2**31 - 1024} values a channel, got {2**32}"
    assert decline("conv_bn_act", *conv_args(huge, rand(4, 1, 3, 3))) == (
        f"needs at most {2**31 - 1024} output positions, got {2**32}"
    )
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert decline("bn_stats", x) == "needs a CUDA tensor, got cpu"


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit(arch, itemsize):
    """Every tile that ResNets lead to: shared memory for its stages, and whole groups where it spans several."""
    for k, c, groups, taps in [
        (64, 3, 1, 49),
        (64, 64, 1, 9),
        (256, 64, 1, 1),
        (512, 512, 1, 9),
        (2048, 1024, 1, 1),
        (128, 4, 32, 9),
        (1024, 32, 32, 9),
        (32, 1, 32, 9),
    ]:
        for m in (49, 3136, 100352, 2**30):
            tile = tiles.conv_tile(m, k, c, groups, taps, itemsize, arch, 132, False)
            assert tile.num_stages * (tile.block_m + tile.block_n) * tile.block_k * itemsize <= tiles.shared_bytes(arch)
            assert tile.groups_per_tile == 1 or tile.block_n >= tile.groups_per_tile * (k // groups)
            assert tile.block_k >= 16 and tile.block_n >= 16
            assert tile.flat == (c < tiles.FLAT_BELOW and tile.groups_per_tile == 1)


def test_row_tiles_cover_every_row_once():
    for m in (1, 45, 3136, 100353, 10**7):
        for c in (1, 3, 64, 70, 2048):
            tile = tiles.row_tile(m, c)
            rows = tile.steps * tile.block_r
            assert (tile.splits - 1) * rows < m <= tile.splits * rows


def test_float32_convolutions_are_left_to_cudnn(monkeypatch):
    """Everything else is this backend's, and a forced choice is not asked."""
    for dtype, left in ((torch.float32, True), (torch.float16, False), (torch.bfloat16, False)):
        for tf32 in (False, True):
            monkeypatch.setattr(backend, "tf32_allowed", lambda tf32=tf32: tf32)
            x, weight = rand(1, 3, 7, 9, dtype=dtype), rand(4, 3, 3, 3, dtype=dtype)
            assert (backend.defers("conv_bn_act", *conv_args(x, weight)) is not None) is left
            assert backend.defers("bn_stats", x) is None


def test_what_strides_allow_is_part_of_the_variant():
    """Two 1x1 convolutions of one layout flag may still run two kernels: their verdicts are two."""
    weight = rand(4, 16, 1, 1, dtype=torch.float16)
    wide = rand(2, 32, 6, 8, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    some_channels, some_columns, odd = wide[:, :16], wide[:, :16, :, :5], wide[:, 3:19]
    variants = {backend.variant("conv_bn_act", *conv_args(x, weight, padding=0)) for x in (some_channels, some_columns)}
    assert len(variants) == 2
    assert odd.stride() == some_channels.stride()
    # 1x1 maps are contiguous and channels_last at once; their strides of 1 must not spoil the alignment of the rest.
    tiny = rand(2, 32, 1, 1, dtype=torch.float16)
    assert backend.variant("conv_bn_act", *conv_args(tiny, rand(4, 32, 1, 1, dtype=torch.float16), padding=0))[-1] == 16
