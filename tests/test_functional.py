"""The public functions against the unfused composition a user would write: every kind of BN, bad input, odd input."""

from __future__ import annotations

import copy
import re

import numpy
import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, bn_case, same_strides
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import FrozenBatchNorm2d

import fused_resnet
from fused_resnet.functional import batch_norm_act, conv_bn_act, uses_batch_statistics

layouts = pytest.mark.parametrize("layout", LAYOUTS)


# --- what a user calls ---


def test_conv_bn_act_has_conv2ds_defaults():
    x, weight = torch.randn(2, 3, 7, 9), torch.randn(5, 3, 3, 3)
    torch.testing.assert_close(conv_bn_act(x, weight), F.relu(F.conv2d(x, weight)))
    torch.testing.assert_close(conv_bn_act(x, weight, relu=False), F.conv2d(x, weight))


@pytest.mark.parametrize(
    "conv",
    [dict(stride=2), dict(stride=(2, 1)), dict(padding=(0, 2)), dict(dilation=2, padding=2), dict(groups=3)],
    ids=str,
)
def test_conv_bn_act_takes_conv2ds_arguments(conv):
    x, weight = torch.randn(2, 3, 7, 9), torch.randn(6, 3 // conv.get("groups", 1), 3, 3)
    torch.testing.assert_close(conv_bn_act(x, weight, relu=False, **conv), F.conv2d(x, weight, **conv))


def test_integers_of_other_kinds_are_integers():
    x, weight = torch.randn(2, 3, 7, 9), torch.randn(5, 3, 3, 3)
    expected = conv_bn_act(x, weight, stride=2, padding=1)
    for two, one in ((numpy.int64(2), numpy.int32(1)), (torch.tensor(2), torch.tensor(1)), ((2, 2), [1, 1])):
        assert torch.equal(conv_bn_act(x, weight, stride=two, padding=one), expected)


def test_a_tensor_without_strides_is_refused_by_name():
    with pytest.raises(RuntimeError, match="^x: expected a strided tensor, got layout torch._mkldnn"):
        conv_bn_act(torch.ones(1, 3, 7, 9).to_mkldnn(), W)


def test_eps_has_batch_norms_default():
    conv, bn = nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5).eval()
    bn.running_var.fill_(1e-5)
    x = torch.randn(2, 3, 7, 9)
    y = conv_bn_act(x, conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, relu=False)
    torch.testing.assert_close(y, bn(conv(x)))


def norms() -> dict[str, nn.Module]:
    """Every kind of BN that batch_norm_act takes, away from its initial state."""
    kinds = {
        "default": nn.BatchNorm2d(3),
        "not-affine": nn.BatchNorm2d(3, affine=False),
        "untracked": nn.BatchNorm2d(3, track_running_stats=False),
        "cumulative": nn.BatchNorm2d(3, momentum=None),
        "eps": nn.BatchNorm2d(3, eps=0.5, momentum=0.7),
        "bf16": nn.BatchNorm2d(3, dtype=torch.bfloat16),
        "sync": nn.SyncBatchNorm(3),
        "frozen": FrozenBatchNorm2d(3, eps=0.25),
        "not-counted": nn.BatchNorm2d(3),
        "tracking-turned-off": nn.BatchNorm2d(3),
    }
    kinds["not-counted"].num_batches_tracked = None
    kinds["tracking-turned-off"].track_running_stats = False
    g = torch.Generator().manual_seed(1)
    for bn in kinds.values():
        for name in ("weight", "bias", "running_mean", "running_var"):
            t = getattr(bn, name, None)
            if t is not None:
                t.data.copy_(torch.rand(3, generator=g) + 0.5)
    return kinds


@layouts
@pytest.mark.parametrize("kind", norms())
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_act_is_the_modules_own(mode, kind, layout, device):
    ours = norms()[kind].to(device).train(mode == "train")
    theirs = copy.deepcopy(ours)
    for step in range(3):
        x = torch.randn(5 - step, 3, 7, 9, device=device) * 2 + 1
        x = x.contiguous(memory_format=LAYOUTS[layout]).to(torch.bfloat16 if kind == "bf16" else torch.float32)
        x = x.requires_grad_()
        residual = torch.randn_like(x, requires_grad=True)
        y, expected = batch_norm_act(x, ours, residual), F.relu(theirs(x) + residual)
        # In bfloat16 the module rounds before the add and after: two eps of the largest value.
        tolerance = 2**-6 if kind == "bf16" else 2e-5
        grad = torch.randn_like(y) * (expected.detach().abs() > 0.1)
        found = [y, *torch.autograd.grad(y, [x, residual, *ours.parameters()], grad)]
        wanted = [expected, *torch.autograd.grad(expected, [x, residual, *theirs.parameters()], grad)]
        for a, b in zip(found, wanted, strict=True):
            scale = max(1.0, b.abs().max().item())
            torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=tolerance)
            assert same_strides(a, b)
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", norms())
def test_uses_batch_statistics_exactly_when_the_module_does(kind, mode):
    bn = norms()[kind].train(mode == "train")
    x = torch.randn(5, 3, 7, 9).to(torch.bfloat16 if kind == "bf16" else torch.float32)
    depends_on_the_others = not torch.equal(bn(x)[:1], bn(torch.cat([x[:1], 9 * x[1:]]))[:1])
    assert uses_batch_statistics(bn) is depends_on_the_others


# --- bad input: the exception of the unfused composition where it raises one, and the name of the argument always ---


def t(*size, dtype=torch.float32, device="cpu"):
    return torch.ones(size, dtype=dtype, device=device)


def unfused(
    x,
    weight,
    bn_weight=None,
    bn_bias=None,
    running_mean=None,
    running_var=None,
    eps=1e-5,
    residual=None,
    *,
    relu=True,
    **conv,
):
    y = F.conv2d(x, weight, **conv)
    if running_mean is not None:
        bn = nn.BatchNorm2d(weight.shape[0], eps).eval()
        bn._check_input_dim(y)
        y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, False, 0.0, eps)
    y = y if residual is None else y.add_(residual)
    return F.relu(y) if relu else y


X, W, C = t(2, 3, 7, 9), t(5, 3, 3, 3), t(5)
FULL = (C, C, C, C, 1e-5)
# (arguments, keywords, the word that the message must hold, whether PyTorch raises as well)
BAD_CONV = {
    "x-3d": ((X[0], W, *FULL), {}, "x: expected 4D", True),
    "x-2d": ((X[0, 0], W, *FULL), {}, "x: expected 4D", True),
    "x-5d": ((X[None], W, *FULL), {}, "x: expected 4D", True),
    "x-int": ((X.long(), W, *FULL), {}, "x: expected a floating", True),
    "x-none": ((None, W, *FULL), {}, "x: expected a tensor", True),
    "weight-none": ((X, None, *FULL), {}, "weight: expected a tensor", True),
    "stride-float": ((X, W, *FULL), dict(stride=1.5), "stride: expected an integer", True),
    "x-channels": ((t(2, 4, 7, 9), W, *FULL), {}, "x: expected 3 channels", True),
    "x-smaller-than-kernel": ((t(2, 3, 2, 9), W, *FULL), {}, "x: after padding", True),
    "x-other-device": ((t(2, 3, 7, 9, device="meta"), W, *FULL), {}, "weight: expected on", True),
    "weight-2d": ((X, t(5, 3), *FULL), {}, "weight: expected", True),
    "weight-dtype": ((X, W.double(), *FULL), {}, "weight: expected torch.float32", True),
    "stride-zero": ((X, W, *FULL), dict(stride=0), "stride: expected", True),
    "stride-three": ((X, W, *FULL), dict(stride=(1, 1, 1)), "stride: expected", True),
    "padding-negative": ((X, W, *FULL), dict(padding=-1), "padding: expected", True),
    "dilation-zero": ((X, W, *FULL), dict(dilation=0), "dilation: expected", True),
    "groups-no-divisor": ((X, t(5, 1, 3, 3), *FULL), dict(groups=3), "groups: expected", True),
    "groups-zero": ((X, W, *FULL), dict(groups=0), "groups: expected", True),
    "mean-alone": ((X, W, None, None, C), {}, "running_mean and running_var", True),
    "affine-alone": ((X, W, C, C), {}, "running_mean: bn_weight and bn_bias need", False),
    "bn-weight-length": ((X, W, t(4), C, C, C), {}, r"bn_weight: expected \[5\]", True),
    "bn-bias-length": ((X, W, C, t(6), C, C), {}, r"bn_bias: expected \[5\]", True),
    "mean-length": ((X, W, C, C, t(4), C), {}, r"running_mean: expected \[5\]", True),
    "var-length": ((X, W, C, C, C, t(4)), {}, r"running_var: expected \[5\]", True),
    "var-2d": ((X, W, C, C, C, t(5, 1)), {}, r"running_var: expected \[5\]", True),
    "mean-int": ((X, W, C, C, C.long(), C), {}, "running_mean: expected a floating", True),
    "mean-other-device": ((X, W, C, C, t(5, device="meta"), C), {}, "running_mean: expected on cpu", True),
    "residual-channels": ((X, W, *FULL, t(2, 4, 5, 7)), {}, "residual: expected the output's shape", True),
    "residual-size": ((X, W, *FULL, t(2, 5, 7, 9)), {}, "residual: .* zero_pad", True),
    "residual-broadcast": ((X, W, *FULL, t(2, 5, 1, 1)), {}, "residual: expected the output's", False),
    "residual-3d": ((X, W, *FULL, t(5, 5, 7)), {}, "residual: expected the output's", False),
    "residual-dtype": ((X, W, *FULL, t(2, 5, 5, 7, dtype=torch.double)), {}, "residual: expected torch.float32", False),
}


def exception_of(function, *args, **kwargs) -> Exception | None:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return None


def check_error(error, theirs, word):
    """The type is PyTorch's (NotImplementedError is told as the RuntimeError that it is), the words are ours."""
    expected = RuntimeError if theirs is None or isinstance(theirs, RuntimeError) else type(theirs)
    assert type(error) is expected, f"{error!r}, PyTorch raises {theirs!r}"
    assert re.search(word, str(error)), str(error)


@pytest.mark.parametrize("args, kwargs, word, pytorch_raises", BAD_CONV.values(), ids=BAD_CONV)
def test_bad_input_conv_bn_act(args, kwargs, word, pytorch_raises):
    error = exception_of(conv_bn_act, *args, **kwargs)
    theirs = exception_of(unfused, *args, **kwargs)
    assert (theirs is not None) is pytorch_raises, f"PyTorch: {theirs!r}"
    check_error(error, theirs, word)


# A fake tensor on another device is refused before it reaches the op.
TRACED = {k: v[:3] for k, v in BAD_CONV.items() if not k.endswith("other-device")}


@pytest.mark.parametrize("args, kwargs, word", TRACED.values(), ids=TRACED)
def test_bad_input_is_found_while_tracing(args, kwargs, word):
    with FakeTensorMode() as mode, pytest.raises((RuntimeError, ValueError, TypeError), match=word):
        conv_bn_act(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args), **kwargs)


BN3 = nn.BatchNorm2d(3)
# (module, x, residual, the words, whether PyTorch raises as well)
BAD_BN = {
    "x-3d": (BN3, X[0], None, "x: expected 4D", True),
    "x-5d": (BN3, X[None], None, "x: expected 4D", True),
    "x-int": (BN3, X.long(), None, "x: expected a floating", True),
    "x-channels-train": (BN3, t(2, 4, 7, 9), None, r"running_mean: expected \[4\]", True),
    "x-channels-eval": (nn.BatchNorm2d(3).eval(), t(2, 4, 7, 9), None, r"mean: expected \[4\]", True),
    "one-value-a-channel": (BN3, t(1, 3, 1, 1), None, "x: expected more than 1 value per channel", True),
    "residual-size": (BN3, X, t(2, 3, 5, 9), "residual: expected the output's shape", True),
    "residual-dtype": (BN3, X, X.double(), "residual: expected torch.float32", False),
}


@pytest.mark.parametrize("bn, x, residual, word, pytorch_raises", BAD_BN.values(), ids=BAD_BN)
def test_bad_input_batch_norm_act(bn, x, residual, word, pytorch_raises):
    ours, bn, untouched = copy.deepcopy(bn), copy.deepcopy(bn), bn
    error = exception_of(batch_norm_act, x, ours, residual)
    theirs = exception_of(lambda: bn(x) if residual is None else bn(x).add_(residual))
    assert (theirs is not None) is pytorch_raises, f"PyTorch: {theirs!r}"
    check_error(error, theirs, word)
    for (name, a), b in zip(ours.named_buffers(), untouched.buffers(), strict=True):
        assert name == "num_batches_tracked" or "residual" in word or torch.equal(a, b), f"{name} was changed"


def test_one_value_a_channel_is_fine_with_running_statistics():
    bn = nn.BatchNorm2d(3).eval()
    x = torch.randn(1, 3, 1, 1)
    torch.testing.assert_close(batch_norm_act(x, bn, relu=False), bn(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@layouts
def test_16_bits_do_on_a_cpu_what_they_do_in_pytorch(dtype, layout):
    conv, bn = nn.Conv2d(3, 5, 3, bias=False).to(dtype), nn.BatchNorm2d(5).to(dtype).eval()
    x = torch.randn(2, 3, 7, 9).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    args = (x, conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    theirs = exception_of(unfused, *args)
    error = exception_of(conv_bn_act, *args)
    assert type(error) is type(theirs)
    if theirs is None:
        y, expected = conv_bn_act(*args), unfused(*args)
        assert y.dtype is expected.dtype
        torch.testing.assert_close(y, expected, rtol=0, atol=2 * torch.finfo(dtype).eps * expected.abs().max().item())


# --- the empty batch ---


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["default", "not-affine", "cumulative", "untracked"])
def test_empty_batch_batch_norm_act(kind, mode, device):
    ours = norms()[kind].to(device).train(mode == "train")
    theirs = copy.deepcopy(ours)
    x = torch.empty(0, 3, 7, 9, device=device, requires_grad=True)
    residual = torch.empty(0, 3, 7, 9, device=device, requires_grad=True)
    y, expected = batch_norm_act(x, ours, residual), F.relu(theirs(x) + residual)
    assert y.shape == expected.shape and y.dtype is expected.dtype
    inputs = [x, residual]
    for a, b in zip(
        torch.autograd.grad(y.sum(), [*inputs, *ours.parameters()]),
        torch.autograd.grad(expected.sum(), [*inputs, *theirs.parameters()]),
        strict=True,
    ):
        assert torch.equal(a, b)
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(a, b), name


@layouts
def test_empty_batch_conv_bn_act(layout, device):
    conv, bn = nn.Conv2d(3, 5, 3, bias=False, device=device), nn.BatchNorm2d(5, device=device).eval()
    conv = conv.to(memory_format=LAYOUTS[layout])
    x = torch.empty(0, 3, 7, 9, device=device, requires_grad=True)
    residual = torch.empty(0, 5, 5, 7, device=device, requires_grad=True)
    y = conv_bn_act(x, conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, residual)
    expected = F.relu(bn(conv(x)) + residual)
    assert y.shape == expected.shape and y.dtype is expected.dtype
    inputs = [x, residual, conv.weight, *bn.parameters()]
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        assert torch.equal(a, b)


# --- inference: whatever has to see the op sees it, though nothing records a gradient ---


class Seen(TorchDispatchMode):
    """The names of the ops that pass."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Overridden(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def inference():
    """A convolution with BN as a function of x, and its value by the unfused composition."""
    conv, bn = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5).eval()
    conv.requires_grad_(False), bn.requires_grad_(False)
    x = torch.randn(2, 3, 7, 9)
    with torch.no_grad():
        yield (
            lambda x: conv_bn_act(x, conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps),
            x,
            F.relu(bn(conv(x))),
        )


OP = "fused_resnet.conv_bn_act"


@pytest.mark.parametrize("mode", [Seen, Overridden])
def test_a_mode_sees_the_op(mode, inference):
    call, x, expected = inference
    with mode() as seen:
        torch.testing.assert_close(call(x), expected)
    assert any(OP in name for name in seen.names)


def test_a_tracer_sees_the_op(inference):
    call, x, expected = inference
    traced = make_fx(call)(x)
    assert any(OP in str(node.target) for node in traced.graph.nodes)
    torch.testing.assert_close(traced(x), expected)
    scripted = torch.jit.trace(call, (x,))
    assert OP.replace(".", "::") in str(scripted.graph)
    torch.testing.assert_close(scripted(x), expected)


def test_a_compiler_sees_the_op(inference):
    call, x, expected = inference
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend=backend)(x), expected)
    torch._dynamo.reset()
    assert any(OP in str(node.target) for node in graphs[0].graph.nodes)


def test_a_subclass_sees_the_op(inference, monkeypatch):
    call, x, expected = inference
    names, dispatch = [], TwoTensor.__torch_dispatch__.__func__
    spy = classmethod(lambda cls, func, *rest: names.append(str(func)) or dispatch(cls, func, *rest))
    monkeypatch.setattr(TwoTensor, "__torch_dispatch__", spy)
    y = call(TwoTensor(x, 2 * x))
    assert any(OP in name for name in names)
    torch.testing.assert_close(y.a, expected)
    torch.testing.assert_close(y.b, call(2 * x))


def test_the_profiler_sees_the_op(inference):
    call, x, expected = inference
    with torch.profiler.profile() as profile:
        torch.testing.assert_close(call(x), expected)
    assert any(event.key == OP.replace(".", "::") for event in profile.key_averages())


def test_a_lazy_negation_is_resolved(inference):
    call, x, _ = inference
    torch.testing.assert_close(call(torch._neg_view(x)), call(-x))


@layouts
def test_autocast_is_heard_in_inference(layout, inference):
    call, x, expected = inference
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(x.contiguous(memory_format=LAYOUTS[layout]))
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=2**-6 * expected.abs().max().item())


def test_transforms_raise_in_inference_as_well(inference):
    call, x, _ = inference
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(call)(x[None])
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(call, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        call(forward_ad.make_dual(x, x))


def test_inference_leaves_no_inference_tensor_behind(inference):
    call, x, expected = inference
    assert not call(x).is_inference() and not call(x).requires_grad
    with torch.inference_mode():
        y = call(x)
    assert y.is_inference()
    torch.testing.assert_close(y, expected)


# --- autocast, and a frozen BN in a training step ---


@layouts
def test_autocast_batch_norm_act(layout, device):
    """conv -> BN -> ReLU in a training step under autocast: dtypes and values of the unfused composition."""
    conv, ours = nn.Conv2d(3, 5, 3, bias=False, device=device), nn.BatchNorm2d(5, device=device)
    theirs = copy.deepcopy(ours)
    x = torch.randn(5, 3, 7, 9, device=device).contiguous(memory_format=LAYOUTS[layout])
    with torch.autocast(device, dtype=torch.bfloat16):
        y, expected = batch_norm_act(conv(x), ours), F.relu(theirs(conv(x)))
    assert y.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0, atol=2**-7 * expected.abs().max().item())
    grad = torch.randn_like(y) * (expected > 0.1)
    found = torch.autograd.grad(y, [conv.weight, *ours.parameters()], grad)
    for a, b in zip(found, torch.autograd.grad(expected, [conv.weight, *theirs.parameters()], grad), strict=True):
        assert a.dtype is torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=2**-6 * b.abs().max().item())
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_statistics_follow_the_buffers_that_functional_call_puts_in(device):
    bn = nn.BatchNorm2d(3, device=device)
    swapped = {"running_mean": torch.zeros(3, device=device), "running_var": torch.ones(3, device=device)}
    x = torch.randn(5, 3, 7, 9, device=device)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = bn

        def forward(self, x):
            return batch_norm_act(x, self.bn)

    before = bn.running_mean.clone()
    torch.func.functional_call(Net(), {f"bn.{k}": v for k, v in swapped.items()}, (x,))
    assert torch.equal(bn.running_mean, before)
    torch.testing.assert_close(swapped["running_mean"], 0.1 * x.mean((0, 2, 3)))


def test_inference_mode():
    case = bn_case(torch.float32)
    bn = nn.BatchNorm2d(3)
    with torch.inference_mode():
        y = batch_norm_act(case.args[0], bn)
    assert y.is_inference()
    torch.testing.assert_close(bn.running_mean, 0.1 * case.args[0].mean((0, 2, 3)))


def test_public_names_are_documented():
    for function in (conv_bn_act, batch_norm_act, uses_batch_statistics, fused_resnet.backend):
        assert function.__doc__
