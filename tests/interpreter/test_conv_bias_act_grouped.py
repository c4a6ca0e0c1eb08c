"""The grouped conv_bias_act: every bundle and tile offered, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.engine import reference, triton_grouped
from fused_resnet.engine.triton_conv import Conv

from .common import CL, assert_close, double, each_dtype, rand

CASES = {  # shape, groups
    "4 channels": (Conv(2, 64, 5, 7, 64, 3, 3, padding=(1, 1), residual=True), 16),
    "8 channels, stride 2": (Conv(3, 64, 6, 9, 64, 3, 3, (2, 2), (1, 1)), 8),
    "24 channels": (Conv(2, 72, 5, 7, 72, 3, 3, padding=(1, 1)), 3),
    "5 of 12 channels": (Conv(1, 60, 5, 7, 60, 3, 3, padding=(1, 1)), 5),
    "112 channels": (Conv(1, 224, 3, 5, 224, 3, 3, padding=(1, 1)), 2),
    "136 channels, two tiles": (Conv(1, 272, 3, 2, 272, 3, 3, padding=(1, 1)), 2),
    "depthwise": (Conv(1, 96, 5, 7, 96, 3, 3, padding=(1, 1)), 96),
    "three channels": (Conv(1, 21, 5, 7, 21, 3, 3, padding=(1, 1)), 7),
    "more out than in": (Conv(1, 16, 5, 7, 96, 3, 3, padding=(1, 1), residual=True), 4),
    "fewer out than in": (Conv(1, 96, 5, 7, 32, 3, 3, padding=(1, 1)), 4),
    "1x1": (Conv(2, 64, 5, 7, 32, 1, 1), 8),
    "uneven": (Conv(1, 32, 9, 7, 64, 3, 5, (2, 1), (1, 3), (1, 2)), 4),
    "unpadded": (Conv(2, 32, 5, 7, 32, 3, 3), 4),
}


def tensors(shape, groups, dtype):
    x = rand(shape.n, shape.c, shape.h, shape.w, dtype=dtype).contiguous(memory_format=CL)
    weight = rand(shape.k, shape.c // groups, shape.r, shape.s, seed=1)
    weight = weight.div((shape.c // groups * shape.r * shape.s) ** 0.5).to(dtype)
    residual = None
    if shape.residual:
        residual = rand(shape.n, shape.k, shape.p, shape.q, dtype=dtype, seed=2).contiguous(memory_format=CL)
    return x, weight, rand(shape.k, seed=5), residual


def options(shape, groups):
    return dict(stride=shape.stride, padding=shape.padding, dilation=shape.dilation, groups=groups)


def run(config, shape, groups, x, weight, bias, residual, relu=True):
    """The launch, into an output that holds NaN."""
    out = torch.full((shape.n, shape.k, shape.p, shape.q), float("nan"), dtype=x.dtype).contiguous(memory_format=CL)
    packed = triton_grouped.pack(weight, config["bundle"], groups, tf32=False)
    triton_grouped.launch(config, x, packed, bias, residual, out, **options(shape, groups), relu=relu)
    return out


def expected(shape, groups, x, weight, bias, residual, relu=True):
    return reference.conv_bias_act(*double(x, weight, bias, residual), **options(shape, groups), relu=relu)


def offered(shape, groups, dtype, arch=90):
    """One config of each bundle and tile: stages are nothing to the interpreter."""
    kinds = {}
    for config in triton_grouped.configs(shape, groups, dtype, arch, 4):
        kinds.setdefault((config["bundle"], config["block_m"]), config)
    return kinds.values()


@pytest.mark.parametrize("case, dtype", [*each_dtype(CASES, ("4 channels", "112 channels"), whole=("fp32", "fp16"))])
def test_parity(case, dtype):
    shape, groups = CASES[case]
    args = tensors(shape, groups, dtype)
    for relu in (True, False) if case == "4 channels" else (True,):
        want = expected(shape, groups, *args, relu)
        for config in offered(shape, groups, dtype):
            small = config | {"block_m": 32}
            assert_close(run(small, shape, groups, *args, relu), want, name=config)


def test_every_config_offered():
    """As they are launched, on both kinds of chip."""
    shape, groups = CASES["4 channels"]
    args = tensors(shape, groups, torch.float16)
    want = expected(shape, groups, *args)
    for arch in (80, 90):
        configs = triton_grouped.configs(shape, groups, torch.float16, arch, 132)
        assert {(c["bundle"], c["num_stages"]) for c in configs} == {(8, 1), (8, 3), (16, 1), (16, 3)}
        for config in configs:
            assert_close(run(config, shape, groups, *args), want, name=config)


def test_bundles_divide_the_groups():
    """And fill 32 or 64 channels as far as they can; a group that is wider stays alone."""

    def of(groups, c, k=None):
        shape = Conv(1, groups * c, 5, 5, groups * (k or c), 3, 3)
        return [bundle.size for bundle in triton_grouped.bundles(shape, groups)]

    assert of(32, 4) == [8, 16] and of(32, 8) == [4, 8] and of(32, 16) == [2, 4] and of(32, 32) == [1, 2]
    assert of(5, 24) == [1] and of(6, 24) == [1, 2] and of(2, 232) == [1]
    assert of(96, 1) == [32, 48] and of(4, 4, 24) == [1, 2]


@pytest.mark.parametrize("bundle", [1, 2, 4])
def test_a_packed_weight_is_the_same_convolution(bundle):
    """Of `bundle` times fewer groups; float32 is rounded where it is told."""
    x, weight = rand(1, 24, 5, 6).double(), rand(48, 6, 3, 2, seed=1)
    packed = triton_grouped.pack(weight, bundle, 4, tf32=False)
    assert packed.is_contiguous(memory_format=CL) and packed.shape == (48, 6 * bundle, 3, 2)
    got = F.conv2d(x, packed.double(), groups=4 // bundle)
    torch.testing.assert_close(got, F.conv2d(x, weight.double(), groups=4))
    rounded = triton_grouped.pack(weight, bundle, 4, tf32=True)
    assert not torch.equal(rounded, packed) and (rounded - packed).abs().max() < 2.0**-10


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_not_finite_travels_as_in_torch(value, relu):
    """Groups that share a bundle, in which zeros are multiplied with it, do not touch each other."""
    for case in ("4 channels", "5 of 12 channels", "1x1"):
        shape, groups = CASES[case]
        x, weight, bias, residual = tensors(shape, groups, torch.float32)
        x[0, 17, 3, 4] = value
        want = expected(shape, groups, x, weight, bias, residual, relu)
        finite = want.isfinite()
        assert finite.any() and (relu or not finite.all())
        for config in offered(shape, groups, torch.float32):
            got = run(config, shape, groups, x, weight, bias, residual, relu)
            assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf()), config
            assert_close(got[finite], want[finite], name=config)


def test_a_planted_error_is_found():
    """One weight of one group."""
    shape, groups = CASES["24 channels"]
    args = tensors(shape, groups, torch.float32)
    want = expected(shape, groups, *args)
    weight = args[1].clone()
    weight[30, 3] = 0
    for config in offered(shape, groups, torch.float32):
        with pytest.raises(AssertionError, match="relative error"):
            assert_close(run(config, shape, groups, args[0], weight, *args[2:]), want)


def test_declines_with_a_sentence():
    shape, groups = CASES["4 channels"]
    decline = triton_grouped.declines
    assert decline(shape, groups, torch.float16, 80) is None
    assert decline(shape, groups, torch.float64, 80) == "needs float16, bfloat16 or float32, got torch.float64"
    assert decline(shape, 3, torch.float16, 80) == "needs groups that divide the channels, got 3 of 64 and 64"
    segment = shape._replace(residual=False, segment=(8, 5, 7, 1))
    assert decline(segment, groups, torch.float16, 80) == "takes no second segment"
    assert not triton_grouped.configs(segment, groups, torch.float16, 90, 132)
    assert triton_grouped.configs(shape, groups, torch.float32, 90, 132)
    assert not triton_grouped.configs(shape, groups, torch.float32, 90, 132, tf32=False)
