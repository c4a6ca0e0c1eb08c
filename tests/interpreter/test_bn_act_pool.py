"""bn_act_pool and its backward against PyTorch's own modules in float64, ties and NaN included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.backends import pooled, reference
from fused_resnet.backends import triton_pool as backend
from fused_resnet.kernels import tiles

from . import common
from .common import CL, assert_close, bn_params, each_dtype, lay, rand

EPS = 1e-3
SHAPES = {
    "5ch": (3, 5, 7, 9),
    "70ch": (1, 70, 6, 8),
    "one_row": (2, 3, 1, 6),
    "one_value": (2, 3, 1, 1),
    "even": (2, 8, 12, 10),
}
FEW = ("5ch", "70ch")


@pytest.fixture(params=["chosen", "small"], autouse=True)
def tile(request, monkeypatch):
    if request.param == "small":
        chosen = tiles.row_tile.__wrapped__
        monkeypatch.setattr(tiles, "row_tile", lambda m, c: chosen(m, c, elements=128, programs=5))
        monkeypatch.setattr(tiles, "finish_tile", lambda splits, c: (2, min(4, tiles.power_of_2(c))))


def given(shape, dtype, layout="channels_last"):
    x = lay(rand(*shape, dtype=dtype).add(0.2), layout)
    gamma, beta, _, _ = bn_params(shape[1])
    var, mean = (t.float() for t in torch.var_mean(x.double(), (0, 2, 3), correction=0))
    return x, mean, var, gamma, beta


def torchs(x, mean, var, gamma, beta):
    """What PyTorch's modules say in float64, of BN's result in x's dtype: where values tie there, they tie here."""
    a = reference.bn_act(x, mean, var, gamma, beta, EPS, None, True, True)
    return F.max_pool2d(a.double(), 3, 2, 1, return_indices=True)


@pytest.mark.parametrize("shape, dtype", [*each_dtype(SHAPES, FEW)])
def test_forward(shape, dtype):
    x, *bn = given(SHAPES[shape], dtype)
    y, winner = backend.bn_act_pool(x, *bn, EPS)
    expected, _ = torchs(x, *bn)
    assert y.dtype == dtype and winner.dtype == torch.uint8 and y.is_contiguous(memory_format=CL)
    assert_close(y, expected)
    a = reference.bn_act(x, *bn, EPS, None, True, True)
    assert_close(pooled.winning(a, winner), expected, dtype)
    assert torch.equal(winner == pooled.LOST, y <= 0)


def test_the_first_of_equal_values_wins():
    x = torch.randint(-2, 3, (3, 6, 9, 8), generator=torch.Generator().manual_seed(1)).float()
    x = x.contiguous(memory_format=CL)
    plain = torch.zeros(6), torch.ones(6) - EPS, None, None
    _, winner = backend.bn_act_pool(x, *plain, EPS)
    _, wanted = reference.bn_act_pool(x, *plain, EPS)
    assert torch.equal(winner, wanted)


def test_nan_wins_and_lets_the_gradient_through():
    x, *bn = given((2, 5, 7, 9), torch.float32)
    x[0, 1, 3, 4] = x[0, 1, 2, 3] = float("nan")
    y, winner = backend.bn_act_pool(x, *bn, EPS)
    wanted, places = reference.bn_act_pool(x, *bn, EPS)
    assert torch.equal(y.isnan(), wanted.isnan()) and y.isnan().any()
    assert torch.equal(winner[y.isnan()], places[y.isnan()])


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "sliced_nchw"])
def test_layouts(layout):
    x, *bn = given((2, 6, 7, 9), torch.float32, layout)
    y, winner = backend.bn_act_pool(x, *bn, EPS)
    expected, _ = torchs(x, *bn)
    assert_close(y, expected)
    grad = lay(rand(*y.shape, seed=3), layout if layout == "contiguous" else "channels_last")
    dx, *_ = backend.bn_act_pool_bwd(grad, x, winner, bn[0], bn[1], bn[2], EPS, [True] * 3)
    assert dx.stride() == torch.empty_like(dx).stride()
    assert_close(
        dx, reference.bn_act_pool_bwd(*common.double(grad, x), winner, *common.double(*bn[:3]), EPS, [True] * 3)[0]
    )


@pytest.mark.parametrize("shape, dtype", [*each_dtype(SHAPES, FEW)])
def test_backward(shape, dtype):
    x, mean, var, gamma, beta = given(SHAPES[shape], dtype)
    y, winner = backend.bn_act_pool(x, mean, var, gamma, beta, EPS)
    grad = rand(*y.shape, dtype=dtype, seed=5).contiguous(memory_format=CL)
    found = backend.bn_act_pool_bwd(grad, x, winner, mean, var, gamma, EPS, [True] * 3)
    wide = common.double(grad, x), common.double(mean, var, gamma)
    expected = reference.bn_act_pool_bwd(*wide[0], winner, *wide[1], EPS, [True] * 3)
    if shape == "one_value":  # no gradient through a batch norm of next to nothing: rounding alone
        expected, found = expected[1:], found[1:]
    for got, want in zip(found, expected, strict=True):
        assert_close(got, want, factor=2)


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, True)])
def test_a_part_of_the_backward(mask):
    x, mean, var, gamma, beta = given((2, 5, 7, 9), torch.float32)
    y, winner = backend.bn_act_pool(x, mean, var, None, beta, EPS)
    grad = torch.ones_like(y)
    whole = backend.bn_act_pool_bwd(grad, x, winner, mean, var, None, EPS, [True] * 3)
    part = backend.bn_act_pool_bwd(grad, x, winner, mean, var, None, EPS, list(mask))
    for wanted, got, all_of_it in zip(mask, part, whole, strict=True):
        assert torch.equal(got, all_of_it) if wanted else got is None


def test_a_second_run_gives_the_same_bits():
    x, *bn = given((3, 5, 17, 15), torch.float16)
    first, second = (backend.bn_act_pool(x, *bn, EPS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
