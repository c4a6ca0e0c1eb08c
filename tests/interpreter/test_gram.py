"""gram: mean and covariance of a normalised tensor that is not stored, against float64."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.backends import triton_train as backend
from fused_resnet.kernels import tiles

from .common import CL, TOLERANCE, assert_close, bn_params, each_dtype, lay, rand
from .test_bn_act_conv import EPS, activation

SHAPES = {
    "3ch": (5, 3, 7, 9),
    "5ch": (1, 5, 7, 9),
    "33ch": (1, 33, 7, 9),
    "64ch": (5, 64, 7, 3),
    "70ch": (1, 70, 7, 9),
    "1x1_map": (5, 64, 1, 1),
    "one_row": (1, 5, 1, 1),
}


@pytest.fixture(params=["chosen", "small"])
def tile(request, monkeypatch):
    """The tile a launch picks, and a small one: several column tiles and many splits, the last of them not whole."""
    if request.param == "small":

        def small(m, c, itemsize):
            splits = tiles.ceil_div(tiles.ceil_div(m, 16), 3)
            return tiles.GramTile(16, 16, tiles.upper_tiles(c, 16), splits, 3, 4)

        monkeypatch.setattr(tiles, "gram_tile", small)


def statistics(a, stride):
    """(mean, biased covariance) in float64."""
    rows = a[:, :, :: stride[0], :: stride[1]].movedim(1, 3).flatten(0, 2)
    mean = rows.mean(0)
    return mean, (rows - mean).T @ (rows - mean) / rows.shape[0]


def check(x, bn, relu, stride, factor=1.0):
    mean, cov = backend.gram(x, *bn, EPS, relu, stride)
    want_mean, want_cov = statistics(activation(x, *bn, relu), stride)
    assert mean.dtype is cov.dtype is torch.float32
    assert torch.equal(cov, cov.T) and (cov.diagonal() >= 0).all()
    # In 16 bits, an activation that lies half way between two values may have become the other one.
    if x.dtype is not torch.float32:
        factor *= TOLERANCE[x.dtype] / TOLERANCE[torch.float32] / x[:, 0].numel() ** 0.5
    assert_close(mean, want_mean, factor=factor, name="mean")
    assert_close(cov, want_cov, factor=factor, name="cov")
    return mean, cov


@pytest.mark.parametrize("shape, dtype", [*each_dtype(SHAPES, ("5ch", "70ch"))])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=["stride1", "stride2"])
def test_parity(shape, stride, dtype, tile):
    shape = SHAPES[shape]
    x = rand(*shape, dtype=dtype).contiguous(memory_format=CL)
    gamma, beta, mean, var = bn_params(shape[1])
    if shape[2:] == (1, 1) and shape[0] == 1:
        mean, cov = backend.gram(x, mean, var, gamma, beta, EPS, True, list(stride))
        assert torch.count_nonzero(cov) == 0
        return
    check(x, (mean, var, gamma, beta), True, list(stride))


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced_nchw"])
def test_layouts(layout, relu):
    x = lay(rand(5, 6, 7, 9), layout)
    gamma, beta, mean, var = bn_params(6)
    check(x, (mean, var, gamma, beta), relu, [1, 2])
    check(x, (mean, var, None, None), relu, [1, 1])
    check(x, [None] * 4, relu, [2, 1])
    check(x[:1].expand(3, -1, -1, -1), [None] * 4, relu, [1, 1])


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_mean_far_above_the_deviation(offset, tile):
    """mean 1e4, deviation 1 in float32: the mean product minus the product of means would have no correct digit."""
    check((rand(5, 6, 7, 9) + offset).contiguous(memory_format=CL), [None] * 4, False, [1, 1])


def test_of_16_bits_products_are_exact(tile):
    """Deviations of a unit about 64: what is left of sums 4096 times as large."""
    x = (rand(5, 6, 7, 9) * 2).round().add(64).half().contiguous(memory_format=CL)
    mean, cov = backend.gram(x, *[None] * 4, EPS, False, [1, 1])
    want_mean, want_cov = statistics(x.double(), [1, 1])
    assert_close(mean, want_mean)
    assert_close(cov, want_cov)


def test_of_a_constant(tile):
    for value, dtype in ((0.1, torch.float32), (0.1, torch.float16), (3.7, torch.bfloat16)):
        x = torch.full((2, 5, 5, 7), value, dtype=dtype).contiguous(memory_format=CL)
        mean, cov = backend.gram(x, *[None] * 4, EPS, False, [1, 1])
        assert_close(mean, x[0, :, 0, 0].double(), torch.float32)
        assert (cov.diagonal() >= 0).all() and cov.abs().max() < 1e-6 * value**2


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_stays_in_its_channel(value, tile):
    x = rand(1, 33, 7, 9).contiguous(memory_format=CL)
    x[0, 3, 2, 1] = value
    gamma, beta, mean, var = bn_params(33)
    got_mean, got_cov = backend.gram(x, mean, var, gamma.abs(), beta, EPS, True, [1, 1])
    want_mean, want_cov = statistics(activation(x, mean, var, gamma.abs(), beta, True), [1, 1])
    others = torch.arange(33) != 3
    assert not got_mean[3].isfinite() and got_cov[3, 3].isnan() and not got_cov[3].isfinite().any()
    assert_close(got_mean[others], want_mean[others])
    assert_close(got_cov[others][:, others], want_cov[others][:, others])


def test_a_mean_that_is_not_finite_spoils_no_rows_that_are_not_there(tile):
    x = rand(1, 5, 7, 9).contiguous(memory_format=CL)
    gamma, beta, mean, var = bn_params(5)
    mean[2] = float("nan")
    got_mean, got_cov = backend.gram(x, mean, var, gamma, beta, EPS, False, [1, 1])
    others = torch.arange(5) != 2
    assert got_mean[2].isnan() and got_mean[others].isfinite().all()
    assert got_cov[others][:, others].isfinite().all()


def test_a_second_run_has_the_same_bits(tile):
    x = rand(1, 33, 7, 9, dtype=torch.float16).contiguous(memory_format=CL)
    gamma, beta, mean, var = bn_params(33)
    first, second = (backend.gram(x, mean, var, gamma, beta, EPS, True, [1, 1]) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("c", [1, 3, 64, 72, 128, 256, 512, 1024, 2048])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_partials_stay_small(c, itemsize):
    """And every row block has a split, every pair of column tiles a program."""
    for m in (1, 49, 25088, 401408):
        tile = tiles.gram_tile(m, c, itemsize)
        assert tile.splits == 1 or 4 * tile.splits * c * c <= tiles.GRAM_PARTIALS
        assert (tile.splits - 1) * tile.steps * tile.block_r < m <= tile.splits * tile.steps * tile.block_r
        columns = tiles.ceil_div(c, tile.block_c)
        assert tile.pairs == columns * (columns + 1) // 2
