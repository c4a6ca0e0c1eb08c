"""Calls that are written down (backends/straight.py) launch, in Triton's interpreter, to the same bits."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from fused_resnet.backends import straight, triton

from .common import bn_params, lay, rand
from .test_bn_act_conv import inputs
from .test_bn_act_conv_bwd import arguments as backward_of_conv
from .test_pointwise import call as pointwise_call
from .test_pointwise import given as pointwise_given

EPS = 1e-3


class Interpreted:
    """What Triton's dispatch returns where kernels are compiled: by its grid called with all of the arguments."""

    def __init__(self, kernel, constants):
        self.kernel, self.constants = kernel, constants

    def __getitem__(self, grid):
        names = [name for name in self.kernel.arg_names if name in self.constants]
        options = {k: v for k, v in self.constants.items() if k not in names}

        def launch(*args):
            given, values = args[: len(args) - len(names)], args[len(args) - len(names) :]
            with _disable_current_modes():  # nor does PyTorch see what a GPU does
                self.kernel[grid](*given, **dict(zip(names, values, strict=True)), **options)

        return launch


@pytest.fixture(autouse=True)
def dispatch(monkeypatch):
    def dispatched(kernel, grid, *args, **constants):
        kernel[grid](*args, **constants)
        return Interpreted(kernel, constants)

    monkeypatch.setattr(triton, "_dispatch", dispatched)


def conv(dtype, layout="channels_last", residual=True):
    x, weight, _, places = inputs("3x3_stride2", dtype, layout)
    gamma, beta, mean, var = bn_params(weight.shape[0])
    added = lay(rand(x.shape[0], weight.shape[0], 4, 5, dtype=dtype, seed=7), layout) if residual else None
    return x, weight, gamma, beta, mean, var, EPS, added, *places, 1, True


def conv_backward(dtype, layout="channels_last", mask=(True,) * 5):
    x, weight, gamma, _, mean, var, eps, grad, *rest = conv(dtype, layout)
    y = lay(rand(*grad.shape, dtype=dtype, seed=9).relu(), layout)
    return grad, y, x, weight, gamma, mean, var, eps, *rest, list(mask)


def norm(dtype, layout="channels_last"):
    x, added = (lay(rand(3, 20, 5, 6, dtype=dtype, seed=seed), layout) for seed in (1, 2))
    gamma, beta, mean, var = bn_params(20)
    return x, mean, var, gamma, beta, EPS, added, True, True


def norm_backward(dtype, layout="channels_last", mask=(True,) * 4):
    x, mean, var, gamma, _, eps, grad, *flags = norm(dtype, layout)
    return grad, torch.relu(x), x, mean, var, gamma, eps, *flags, list(mask)


def loaded(case, dtype, layout="channels_last", stats=True):
    x, weight, bn, places = inputs(case, dtype, layout)
    return x, weight, *bn, EPS, True, *places, 1, stats


def expand(dtype, shape="expand"):
    _, _, before, out, stride, out_relu = pointwise_given(shape, dtype)
    x, weight = before[:2]
    p, q = (-(-size // stride[0]) for size in x.shape[2:])
    added = lay(rand(x.shape[0], weight.shape[0], p, q, dtype=dtype, seed=8), "channels_last")
    return *before, *out, EPS, added if out_relu else None, stride, out_relu


def expand_backward(dtype, shape="expand", mask=(True,) * 7):
    args, mask = pointwise_call(shape, dtype, mask)
    return *args, mask


CALLS = {
    "conv": ("conv_bn_act", conv, {}),
    "conv-contiguous": ("conv_bn_act", conv, {"layout": "contiguous", "residual": False}),
    "conv-backward": ("conv_bn_act_bwd", conv_backward, {}),
    "conv-backward-sliced": ("conv_bn_act_bwd", conv_backward, {"layout": "sliced"}),
    "conv-backward-of-a-part": ("conv_bn_act_bwd", conv_backward, {"mask": (True, False, False, True, False)}),
    "stats": ("bn_stats", lambda *a, **k: norm(*a, **k)[:1], {}),
    "norm": ("bn_act", norm, {}),
    "norm-contiguous": ("bn_act", norm, {"layout": "contiguous"}),
    "norm-backward": ("bn_act_bwd", norm_backward, {}),
    "norm-backward-of-a-part": ("bn_act_bwd", norm_backward, {"mask": (True, False, False, False)}),
    "loaded-3x3": ("bn_act_conv", loaded, {"case": "3x3_stride2"}),
    "loaded-1x1": ("bn_act_conv", loaded, {"case": "1x1", "layout": "contiguous", "stats": False}),
    "loaded-backward": ("bn_act_conv_bwd", lambda dtype: backward_of_conv("1x1", dtype), {}),
    "expand": ("pointwise_bn_act", expand, {}),
    "project": ("pointwise_bn_act", expand, {"shape": "projection"}),
    "expand-backward": ("pointwise_bn_act_bwd", expand_backward, {}),
    "project-backward": ("pointwise_bn_act_bwd", expand_backward, {"shape": "projection"}),
    "weight-alone": ("pointwise_bn_act_bwd", expand_backward, {"mask": (False, True, *[False] * 5)}),
}


def other(args):
    """Arguments of the same kind, of other values; variances stay positive."""

    def changed(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t.double() * 0.7 + 0.01)

    return tuple(changed(a) if isinstance(a, torch.Tensor) else a for a in args)


CASES = [(name, torch.float16) for name in CALLS]
CASES += [("conv", torch.float32), ("norm-backward", torch.float32), ("expand-backward", torch.bfloat16)]


@pytest.mark.parametrize("name, dtype", CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_the_same_bits(name, dtype):
    op, build, options = CALLS[name]
    args = build(dtype=dtype, **options)
    serve = triton.prepare(op, *args)
    first = serve(*args)
    assert serve.found, "the first call found no kernels"
    result, function = straight.watch(serve, args)
    assert callable(function), function
    for found in (result, function(*args)):
        for a, b in zip(straight._flat(found), straight._flat(first), strict=True):
            assert straight._agrees(a, b, 0.0)
    args = other(args)
    for a, b in zip(straight._flat(function(*args)), straight._flat(serve(*args)), strict=True):
        assert straight._agrees(a, b, 0.0)
        assert a is None or not a.isnan().any()


def test_a_launch_by_the_dispatch_is_not_written_down(monkeypatch):
    monkeypatch.undo()
    args = norm(torch.float32)
    serve = triton.prepare("bn_act", *args)
    serve(*args)  # the interpreter finds nothing
    _, reason = straight.watch(serve, args)
    assert reason == "a kernel is launched by Triton's dispatch"
