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
