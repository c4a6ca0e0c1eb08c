"""bn_act_conv and its backward with groups: bundles of them are one product; against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.backends import reference, triton_groups
from fused_resnet.backends import triton_train as forward
from fused_resnet.backends import triton_train_bwd as backward
from fused_resnet.kernels import tiles

from .common import CL, assert_close, bn_params, double, each_dtype, lay, rand

EPS = 1e-3

# name: N, groups, channels of x and of y in a group, H, W, R, S, stride, padding, dilation
CASES = {
    "4 channels": (1, 8, 4, 4, 5, 4, 3, 3, (1, 1), (1, 1), (1, 1)),
    "8 channels, stride 2": (2, 4, 8, 8, 4, 5, 3, 3, (2, 2), (1, 1), (1, 1)),
    "20 channels": (1, 3, 20, 20, 4, 3, 3, 3, (1, 1), (1, 1), (1, 1)),
    "36 channels": (1, 2, 36, 36, 3, 2, 3, 3, (1, 1), (1, 1), (1, 1)),
    "depthwise": (1, 32, 1, 1, 4, 5, 3, 3, (1, 1), (1, 1), (1, 1)),
    "more out than in": (1, 2, 8, 24, 4, 5, 3, 3, (1, 1), (1, 1), (1, 1)),
    "fewer out than in": (1, 2, 24, 16, 4, 5, 3, 3, (1, 1), (1, 1), (1, 1)),
    "1x1": (2, 8, 8, 4, 5, 7, 1, 1, (1, 1), (0, 0), (1, 1)),
    "dilated, stride 2": (1, 2, 8, 8, 5, 7, 3, 3, (2, 2), (2, 2), (2, 2)),
    "uneven": (1, 2, 8, 16, 5, 4, 2, 3, (2, 1), (1, 2), (1, 2)),
}
FEW = ("4 channels",)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Small tiles: bundles of several tiles each way, many rows of tiles and splits."""
    chosen = tiles.bn_act_conv_tile

    def conv_tile(*args):
        return chosen(*args)._replace(block_m=32, block_n=16, block_k=16, group_m=2)

    def weight_tile(m, *_):
        blocks = tiles.ceil_div(m, 16)
        return backward.WeightTile(16, 16, 16, 4, 2, tiles.ceil_div(blocks, 2), 2)

    monkeypatch.setattr(tiles, "bn_act_conv_tile", conv_tile)
    monkeypatch.setattr(backward, "input_tile", lambda *_: backward.Tile(16, 16, 16, 4, 2))
    monkeypatch.setattr(backward, "weight_tile", weight_tile)


def inputs(case, dtype, layout="channels_last"):
    """x, weight, (mean, var, weight, bias) of the batch norm, [stride, padding, dilation, groups]."""
    n, groups, c, k, h, w, r, s, *conv = CASES[case]
    x = lay(rand(n, groups * c, h, w, dtype=dtype), layout)
    weight = rand(groups * k, c, r, s, seed=1).div((c * r * s) ** 0.5).to(dtype)
    weight = weight.contiguous() if layout == "contiguous" else weight.contiguous(memory_format=CL)
    gamma, beta = bn_params(groups * c)[:2]
    var, mean = (t.float() for t in torch.var_mean(x.double(), (0, 2, 3), correction=0))
    # No pre-activation near zero: a ReLU that flips moves whole gradients.
    shape = (1, -1, 1, 1)
    z = (x.double() - mean.view(shape)) * (gamma.view(shape) / (var.double().view(shape) + EPS).sqrt())
    near = (z + beta.view(shape)).abs() < (1e-4 if dtype is torch.float32 else 1e-2)
    x = (
        torch.where(near, x + 0.5, x)
        .to(dtype)
        .contiguous(memory_format=CL if layout == "channels_last" else torch.contiguous_format)
    )
    return x, weight, (mean, var, gamma, beta), [*map(list, conv), groups]


def gradient(x, weight, conv):
    stride, padding, dilation, groups = conv
    return rand(*torch.conv2d(x.double(), weight.double(), None, stride, padding, dilation, groups).shape, seed=7)


def check_forward(x, weight, bn, conv, dtype, relu=True):
    y, mean, var = forward.bn_act_conv(x, weight, *bn, EPS, relu, *conv, True)
    want, *_ = reference.bn_act_conv(*double(x, weight, *bn), EPS, relu, *conv, False)
    assert y.is_contiguous(memory_format=CL) or x.is_contiguous()
    assert_close(y, want, factor=1.0 if dtype is torch.float32 else 4.0, name="y")  # in 16 bits a is rounded as well
    want_var, want_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert_close(mean, want_mean, name="mean")
    assert_close(var, want_var, name="var")


def check_backward(x, weight, bn, conv, dtype, relu=True):
    grad = gradient(x, weight, conv).to(dtype).contiguous(memory_format=CL)
    mask = [True, True, bn[0] is not None, bn[0] is not None]
    got = backward.bn_act_conv_bwd(grad, x, weight, *bn, EPS, relu, *conv, mask)
    want = reference.bn_act_conv_bwd(*double(grad, x, weight, *bn), EPS, relu, *conv, mask)
    for name, a, b in zip(("dx", "dweight", "dbn_weight", "dbn_bias"), got, want, strict=True):
        assert (a is None) == (b is None), name
        if b is not None:
            assert a.shape == b.shape and (name != "dweight" or a.stride() == weight.stride()), name
            assert_close(a, b, dtype, factor=4.0, name=name)


@pytest.mark.parametrize("case, dtype", [*each_dtype(CASES, FEW)])
def test_forward(case, dtype):
    x, weight, bn, conv = inputs(case, dtype)
    check_forward(x, weight, bn, conv, dtype)
    if case in FEW:
        check_forward(x, weight, [None] * 4, conv, dtype)


@pytest.mark.parametrize("case, dtype", [*each_dtype(CASES, FEW)])
def test_backward(case, dtype):
    x, weight, bn, conv = inputs(case, dtype)
    check_backward(x, weight, bn, conv, dtype)
    if case in FEW:
        check_backward(x, weight, [None] * 4, conv, dtype, relu=False)


@pytest.mark.parametrize("case", ["4 channels", "36 channels"])
def test_as_it_is_launched(case, monkeypatch):
    """With the tiles of a GPU, contiguous tensors, no parameters."""
    monkeypatch.undo()
    x, weight, (mean, var, *_), conv = inputs(case, torch.float32, "contiguous")
    for bn in ((mean, var, None, None), (mean, var, None, torch.ones(x.shape[1]))):
        check_forward(x, weight, bn, conv, torch.float32, relu=False)
        check_backward(x, weight, bn, conv, torch.float32, relu=False)


@pytest.mark.parametrize(
    "case, value", [("4 channels", float("inf")), ("uneven", float("nan")), ("1x1", -float("inf"))], ids=str
)
def test_not_finite_travels_as_in_torch(case, value):
    """Groups that share a bundle, in which zeros are multiplied with it, do not touch each other."""
    x, weight, (mean, var, gamma, beta), conv = inputs(case, torch.float32)
    grad = gradient(x, weight, conv).float().contiguous(memory_format=CL)
    x[0, 1, 2, 1] = value
    grad[0, 1, 1, 1] = value
    for bn in ((mean, var, gamma, beta), (None,) * 4):
        want = reference.bn_act_conv(*double(x, weight, *bn), EPS, True, *conv, False)[0]
        got = forward.bn_act_conv(x, weight, *bn, EPS, True, *conv, False)[0]
        mask = [True, True, False, False]
        wanted = reference.bn_act_conv_bwd(*double(grad, x, weight, *bn), EPS, True, *conv, mask)
        given = backward.bn_act_conv_bwd(grad, x, weight, *bn, EPS, True, *conv, mask)
        for a, b in zip((got, *given[:2]), (want, *wanted[:2]), strict=True):
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
            finite = b.isfinite()
            assert finite.any() and (value == -float("inf") or not finite.all())
            assert_close(a[finite], b[finite], factor=4.0)


def test_the_next_groups_statistics_do_not_matter():
    """Of channels that a tile reads past its bundle: a mean that is NaN there, or behind the last."""
    x, weight, (mean, var, gamma, beta), conv = inputs("20 channels", torch.float32)
    clean, *_ = forward.bn_act_conv(x, weight, mean, var, gamma, beta, EPS, True, *conv, False)
    for channels in (slice(20, 40), slice(40, 60)):
        spoilt = mean.clone()
        spoilt[channels] = float("nan")
        y, *_ = forward.bn_act_conv(x, weight, spoilt, var, gamma, beta, EPS, True, *conv, False)
        others = [k for k in range(60) if not channels.start <= k < channels.stop]
        assert torch.equal(y[:, others], clean[:, others]) and y[:, channels].isnan().all()


def test_a_second_run_has_the_same_bits():
    x, weight, bn, conv = inputs("8 channels, stride 2", torch.float16)
    grad = gradient(x, weight, conv).half()
    runs = [backward.bn_act_conv_bwd(grad, x, weight, *bn, EPS, True, *conv, [True] * 4) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_planted_error_is_found(monkeypatch):
    """Weights that stand in the wrong group of their bundle."""
    x, weight, bn, conv = inputs("4 channels", torch.float32)
    right = forward.bundled

    def wrong(launch, weight, groups):
        return right(launch, weight.roll(1, 0), groups)

    monkeypatch.setattr(forward, "bundled", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        check_forward(x, weight, bn, conv, torch.float32)


def test_bundles():
    """As many groups as fit and divide; a wide group stays alone, and one group has no others."""
    of = tiles.bundle
    assert of(32, 4, 4) == (8, 32, 32) and of(32, 4, 4, 64) == (16, 64, 64) and of(5, 24, 24) == (1, 24, 24)
    assert of(6, 12, 12) == (2, 24, 24) and of(2, 232, 232) == (1, 232, 232) and of(1, 512, 64) == (1, 512, 64)
    assert of(4, 4, 24) == (1, 4, 24) and of(96, 1, 1) == (32, 32, 32)


def test_declines_with_a_sentence(monkeypatch):
    """Groups so narrow that no bundle fills an instruction of the tensor cores are others'."""
    x, weight, bn, conv = inputs("4 channels", torch.float16)
    options = (*bn, EPS, True, *conv)
    assert forward.declines("bn_act_conv", x, weight, *options, True) is None
    grad = gradient(x, weight, conv).half()
    assert backward.declines("bn_act_conv_bwd", grad, x, weight, *options, [True] * 4) is None
    wide = [t.float() for t in (grad, x, weight)]
    for allowed in (True, False):
        monkeypatch.setattr(triton_groups, "tf32_allowed", lambda allowed=allowed: allowed)
        reasons = (
            forward.declines("bn_act_conv", *wide[1:], *options, True),
            backward.declines("bn_act_conv_bwd", *wide, *options, [True] * 4),
        )
        assert all(why is None if allowed else why == "needs 16 bits, or TF32 allowed, for 8 groups" for why in reasons)
    narrow = (rand(2, 6, 5, 7).half(), rand(6, 3, 3, 3).half())
    grad = rand(2, 6, 5, 7).half()
    options = (*[None] * 4, EPS, True, *conv[:3], 2)
    reasons = (
        forward.declines("bn_act_conv", *narrow, *options, True),
        backward.declines("bn_act_conv_bwd", grad, *narrow, *options, [True] * 4),
    )
    assert set(reasons) == {"needs groups that fill 16 input and output channels, got bundles of 6 and 6"}
