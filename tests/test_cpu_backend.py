"""The CPU's fast path: gradients in spite of private ops; a folded copy that is never stale nor outlives its weight."""

from __future__ import annotations

import copy
import gc
import re
import threading

import pytest
import torch
import torch.nn.functional as F
from cases import SHAPES, conv_case, outputs_and_grads, to, unfused_conv
from torch import nn

import fused_resnet
from fused_resnet.backends import aten, cpu, cuda, reference
from fused_resnet.functional import conv_bn_act

fingerprinted = pytest.mark.skipif(cuda.load() is not None, reason=f"nothing is kept: {cuda.load()}")


def broken(*args, **kwargs):
    raise RuntimeError("no such primitive\nand a long trace")


class Pair(nn.Module):
    """conv -> BN -> ReLU, fused; channels_last, which is what oneDNN's path takes."""

    def __init__(self, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3, padding=1, bias=False, groups=groups)
        self.bn = nn.BatchNorm2d(8).eval()
        with torch.no_grad():
            for t in (self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var):
                t.uniform_(0.5, 1.5)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, residual=None, relu=True):
        conv, bn = self.conv, self.bn
        bns = (bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        options = dict(stride=conv.stride, padding=conv.padding, groups=conv.groups, relu=relu)
        return conv_bn_act(x, conv.weight, *bns, residual, **options)

    def unfused(self, x, residual=None, relu=True):
        y = F.batch_norm(
            self.conv(x),
            self.bn.running_mean,
            self.bn.running_var,
            self.bn.weight,
            self.bn.bias,
            False,
            0.0,
            self.bn.eps,
        )
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y


@pytest.fixture
def x():
    return torch.randn(2, 6, 7, 9).contiguous(memory_format=torch.channels_last)


def kept(pair: Pair):
    return cpu._kept_for(pair.conv.weight)


@torch.no_grad()
def warmed(pair: Pair, x) -> Pair:
    """Called until a copy is kept, and checked."""
    for _ in range(3):
        torch.testing.assert_close(pair(x), pair.unfused(x))
    assert kept(pair).packed is not None
    return pair


# --- fresh ---


def step(pair):
    with torch.enable_grad():
        pair.unfused(torch.randn(2, 6, 7, 9)).mean().backward()
    torch.optim.SGD(pair.parameters(), lr=1.0).step()


def swap_two(pair):
    """Every sum over the weight stays what it was."""
    flat = pair.conv.weight.data.permute(0, 2, 3, 1).reshape(-1)
    a, b = flat[0].item(), flat[-1].item()
    pair.conv.weight.data[0, 0, 0, 0], pair.conv.weight.data[-1, -1, -1, -1] = b, a


def one_bit(pair):
    w = pair.conv.weight.data
    w[3, 2, 1, 0] = torch.nextafter(w[3, 2, 1, 0], torch.tensor(9.0))


def write_through_numpy(pair):
    pair.conv.weight.detach().numpy()[...] *= 2


def exchange_affine(pair):
    pair.bn.weight, pair.bn.bias = pair.bn.bias, pair.bn.weight


CHANGES = {
    "optimizer": step,
    "load_state_dict": lambda p: p.load_state_dict(Pair().state_dict()),
    "data-mul": lambda p: p.conv.weight.data.mul_(1.5),
    "data-flip": lambda p: p.conv.weight.data.copy_(p.conv.weight.data.flip(0)),
    "data-set": lambda p: setattr(p.conv.weight, "data", torch.randn_like(p.conv.weight)),
    "swap-two": swap_two,
    "one-bit": one_bit,
    "numpy": write_through_numpy,
    "contiguous": lambda p: p.to(memory_format=torch.contiguous_format),
    "running_mean": lambda p: p.bn.running_mean.add_(1),
    "running_var": lambda p: p.bn.running_var.data.mul_(2),
    "bn-weight": lambda p: p.bn.weight.data.neg_(),
    "bn-bias": lambda p: p.bn.bias.data.add_(0.5),
    "eps": lambda p: setattr(p.bn, "eps", 0.5),
    "stride": lambda p: setattr(p.conv, "stride", (2, 2)),
    "padding": lambda p: setattr(p.conv, "padding", (0, 1)),
    "other-bn": lambda p: setattr(p, "bn", Pair().bn),
    "exchange-affine": exchange_affine,
    "bn-without-weight": lambda p: setattr(p.bn, "weight", None),
    "bn-without-bias": lambda p: setattr(p.bn, "bias", None),
}


@fingerprinted
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_change_leaves_the_copy_stale(change, x):
    pair = warmed(Pair(), x)
    before = kept(pair)
    with torch.no_grad():
        change(pair)
        torch.testing.assert_close(pair(x), pair.unfused(x))
        after = kept(pair)
        assert after is None or after is not before
        warmed(pair, x)


@fingerprinted
def test_the_copy_is_used_again(x, monkeypatch):
    pair = warmed(Pair(), x)
    monkeypatch.setattr(cpu, "fold", None)  # to fold again would raise
    with torch.no_grad():
        torch.testing.assert_close(pair(x), pair.unfused(x))
        small = x[:1, :, :4, :5].contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(pair(small), pair.unfused(small))


def channels_last(*size, dtype=torch.float32):
    return torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)


OTHER_CALLS = {
    "batch": lambda: (channels_last(5, 6, 7, 9),),
    "maps": lambda: (channels_last(2, 6, 4, 5),),
    "contiguous": lambda: (torch.randn(2, 6, 7, 9),),
    "sliced": lambda: (channels_last(2, 6, 14, 9)[:, :, ::2],),
    "residual": lambda: (channels_last(2, 6, 7, 9), channels_last(2, 8, 7, 9)),
    "contiguous-residual": lambda: (channels_last(2, 6, 7, 9), torch.randn(2, 8, 7, 9)),
    "linear": lambda: (channels_last(2, 6, 7, 9), None, False),
    "linear-residual": lambda: (channels_last(2, 6, 7, 9), channels_last(2, 8, 7, 9), False),
    "empty": lambda: (torch.empty(0, 6, 7, 9),),
}


@pytest.mark.parametrize("warm", [False, True], ids=["residual-cold", "residual-warm"])
@pytest.mark.parametrize("call", OTHER_CALLS.values(), ids=OTHER_CALLS)
def test_another_call_after_many_of_a_kind(call, warm, x):
    """What the first calls were like decides nothing about the next."""
    pair = Pair()
    before = (x, channels_last(2, 8, 7, 9)) if warm else (x,)
    args = call()
    with torch.no_grad():
        for _ in range(3):
            pair(*before)
        for _ in range(2):
            y, expected = pair(*args), pair.unfused(*args)
            torch.testing.assert_close(y, expected)
            assert y.numel() == 0 or y.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(pair(*before), pair.unfused(*before))


BAD_CALLS = {
    "x-3d": (lambda: (torch.randn(6, 7, 9),), ValueError, "x: expected 4D"),
    "x-channels": (lambda: (channels_last(2, 3, 7, 9),), RuntimeError, "x: expected 6 channels"),
    "x-dtype": (
        lambda: (channels_last(2, 6, 7, 9, dtype=torch.double),),
        RuntimeError,
        "weight: expected torch.float64",
    ),
    "residual-shape": (lambda: (channels_last(2, 6, 7, 9), channels_last(2, 8, 7, 8)), RuntimeError, "residual: "),
    "residual-dtype": (
        lambda: (channels_last(2, 6, 7, 9), channels_last(2, 8, 7, 9, dtype=torch.double)),
        RuntimeError,
        "residual: expected torch.float32",
    ),
    "residual-device": (
        lambda: (channels_last(2, 6, 7, 9), channels_last(2, 8, 7, 9).to("meta")),
        RuntimeError,
        "residual: expected on cpu|meta",
    ),
}


@pytest.mark.parametrize("call, error, word", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_found_after_many_good_calls(call, error, word, x):
    pair, args = Pair(), call()
    good = (x, channels_last(2, 8, 7, 9))[: len(args)]
    with torch.no_grad():
        for _ in range(3):
            pair(*good)
        with pytest.raises(error, match=word):
            pair(*args)
        pair.bn.running_mean = torch.zeros(7)
        with pytest.raises(RuntimeError, match="running_mean: expected"):
            pair(x)


def test_a_forced_backend_serves_after_many_calls(x, monkeypatch):
    pair = Pair()
    with torch.no_grad():
        for _ in range(3):
            pair(x)
        monkeypatch.setattr(reference, "conv_bn_act", broken)
        with fused_resnet.backend("reference"), pytest.raises(RuntimeError, match="no such primitive"):
            pair(x)


def test_gradients_after_many_calls_without(x):
    pair = Pair()
    with torch.no_grad():
        for _ in range(3):
            pair(x)
    x.requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(pair(x).sum(), x), torch.autograd.grad(pair.unfused(x).sum(), x), rtol=1e-4, atol=1e-4
    )


@fingerprinted
def test_a_weight_under_two_norms_keeps_one_copy(x):
    first = Pair()
    second = Pair()
    second.conv = first.conv
    before = len(cpu._kept)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(first(x), first.unfused(x))
            torch.testing.assert_close(second(x), second.unfused(x))
    assert len(cpu._kept) == before + 1


@fingerprinted
def test_weights_in_one_buffer_have_copies_of_their_own(x):
    """As optimizers and FSDP lay them: views of one storage, each at its place."""
    pairs = [Pair(), Pair(), Pair()]
    flat = torch.cat([p.conv.weight.detach().permute(0, 2, 3, 1).flatten() for p in pairs])
    size = flat.numel() // 3
    for i, pair in enumerate(pairs):
        k, c, r, s = pair.conv.weight.shape
        pair.conv.weight.data = flat[i * size : (i + 1) * size].view(k, r, s, c).permute(0, 3, 1, 2)
        warmed(pair, x)
    assert len({id(kept(p).packed) for p in pairs}) == 3
    flat.mul_(-1)
    for pair in pairs:
        warmed(pair, x)


@fingerprinted
def test_tensors_can_be_swapped(x):
    """torch.utils.swap_tensors refuses a tensor that has a weak reference; module.to() may swap parameters too."""
    pair = warmed(Pair(), x)
    assert kept(pair) is not None
    torch.utils.swap_tensors(pair.conv.weight, torch.nn.Parameter(-pair.conv.weight.detach()))
    warmed(pair, x)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        pair.double()
        pair.float()
        pair.load_state_dict({k: v * 2 for k, v in pair.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    warmed(pair, x)


@fingerprinted
def test_a_deepcopy_has_a_copy_of_its_own(x):
    pair = warmed(Pair(), x)
    twin = copy.deepcopy(pair)
    twin.conv.weight.data.mul_(2)
    warmed(twin, x)
    assert kept(twin) is not kept(pair)
    warmed(pair, x)


@fingerprinted
def test_the_copy_goes_with_its_weight(x):
    gc.collect()
    before = len(cpu._kept)
    pair = warmed(Pair(), x)
    assert len(cpu._kept) == before + 1
    del pair
    gc.collect()
    assert len(cpu._kept) == before


@fingerprinted
def test_training_keeps_no_copy():
    pair = Pair()
    for _ in range(3):
        pair(channels_last(2, 6, 7, 9)).mean().backward()
        torch.optim.SGD(pair.parameters(), lr=1.0).step()
    entry = kept(pair)
    assert entry is None or entry.packed is None


def test_nothing_of_it_is_in_the_module(x):
    pair = Pair()
    names = set(pair.__dict__) | set(pair.conv.__dict__) | set(pair.conv.weight.__dict__)
    with torch.no_grad():
        for _ in range(3):
            pair(x)
    assert set(pair.__dict__) | set(pair.conv.__dict__) | set(pair.conv.weight.__dict__) == names


def test_nothing_is_kept_without_a_fingerprint(x, monkeypatch):
    monkeypatch.setattr(cuda, "fingerprint", lambda tensors: None)
    pair = Pair()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(pair(x), pair.unfused(x))
            assert kept(pair) is None
            pair.conv.weight.data.mul_(1.5)


def test_threads_share_weights(x):
    """One thread reads while another's weights and its own change: every result is that of its weights."""
    pairs = [Pair() for _ in range(2)]
    failures = []

    def work():
        try:
            with torch.no_grad():
                for _ in range(20):
                    for pair in pairs:
                        torch.testing.assert_close(pair(x), pair.unfused(x))
                    copy.deepcopy(pairs[0])(x)
        except Exception as error:  # a failure in a thread would pass unseen
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- gradients: oneDNN's ops, called directly, drop them ---


@pytest.mark.parametrize("shape", ["3x3", "1x1-stride2", "32x4d", "depthwise", "7x7-stem"])
def test_gradients_through_the_fused_path(shape):
    case = conv_case(SHAPES[shape], torch.float32, "channels_last", requires_grad=True)
    for _ in range(3):  # afresh, and from the kept copy
        found = outputs_and_grads(torch.ops.fused_resnet.conv_bn_act.default, case.args, case.grad)
        expected = outputs_and_grads(unfused_conv, to(torch.float64, case.args), case.grad.double())
        assert len(found) == 6
        for name, e in expected.items():
            torch.testing.assert_close(found[name].double(), e, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_module(x):
    pair = Pair()
    residual = torch.randn(2, 8, 7, 9).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, 8, 7, 9) * (pair.unfused(x, residual) > 0.1)
    found = torch.autograd.grad(pair(x, residual), list(pair.parameters()), grad)
    expected = torch.autograd.grad(pair.unfused(x, residual), list(pair.parameters()), grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- where oneDNN does not serve ---


@pytest.fixture
def fresh_probe():
    cpu.onednn_lacks.cache_clear()
    yield
    cpu.onednn_lacks.cache_clear()


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("_mkldnn", torch.ops.there_is_no_such_namespace, "there_is_no_such_namespace"),
        ("_pack", broken, "no such primitive$"),
        ("_pointwise", lambda x, *args: x.repeat(1, 1, 1, 1) * 1.01, "is off by"),
    ],
    ids=["absent", "raises", "wrong"],
)
def test_a_private_op_that_fails_its_probe_is_not_used(name, value, reason, monkeypatch, fresh_probe, x):
    monkeypatch.setattr(cpu, name, value)
    assert re.search(reason, cpu.onednn_lacks(torch.float32))
    pair = Pair()
    with torch.no_grad():
        torch.testing.assert_close(pair(x), pair.unfused(x))


def test_onednn_turned_off_is_respected(x, monkeypatch):
    monkeypatch.setattr(cpu, "_pointwise", broken)
    pair = Pair()
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(pair(x), pair.unfused(x))


@fingerprinted
def test_onednn_turned_off_later_is_respected_too(x, monkeypatch):
    pair = warmed(Pair(), x)
    assert kept(pair).packed is not None
    monkeypatch.setattr(cpu, "_pointwise", broken)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(pair(x), pair.unfused(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_probe_says_yes_or_why_not(dtype):
    reason = cpu.onednn_lacks(dtype)
    assert reason is None or reason.startswith("oneDNN")


@pytest.mark.parametrize(
    "tensor, reason",
    [
        (torch.empty(0, 3, 4, 4), "needs a non-empty batch"),
        (torch.empty(1, 3, 4, 4, device="meta"), "needs CPU tensors, got meta"),
        (torch.empty(1, 3, 4, 4, dtype=torch.float8_e4m3fn), "needs torch.float32.*got torch.float8_e4m3fn"),
    ],
    ids=["empty", "meta", "float8"],
)
def test_declines_with_a_sentence(tensor, reason):
    assert re.match(reason, cpu.declines("conv_bn_act", tensor))


def test_contiguous_tensors_stay_out_of_the_fused_path(monkeypatch):
    monkeypatch.setattr(cpu, "_pointwise", broken)
    case = conv_case(SHAPES["3x3"], torch.float32)
    with fused_resnet.backend("cpu"):
        y = torch.ops.fused_resnet.conv_bn_act(*case.args)
    torch.testing.assert_close(y, aten.conv_bn_act(*case.args))
