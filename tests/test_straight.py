"""Calls that were written down (backends/straight.py) do what the host code did, and nothing that cannot be written
down is."""

from __future__ import annotations

import gc
import logging
import math
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import torchvision
from cases import SHAPES, bn_case, bwd_input_case, conv_case

import fused_resnet
from fused_resnet import backends
from fused_resnet.backends import cpu, cudnn, reference, straight, verify

aten = torch.ops.aten


def written(serve, *args):
    """The function that a call of serve was written down as, which gave the same."""
    result, function = straight.watch(serve, args)
    assert callable(function), function
    same(function(*args), result)
    return function


def same(found, expected) -> None:
    for a, b in zip(straight._flat(found), straight._flat(expected), strict=True):
        assert straight._agrees(a, b, 0.0)


def refusal(serve, *args) -> str:
    result, function = straight.watch(serve, args)
    assert isinstance(function, str), "it was written down"
    return function


# --- what is written down ---


def test_a_call_is_a_line():
    def serve(x, bias, eps):
        rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        total = torch.empty(rows.shape[1], dtype=torch.float64)
        total.copy_(rows.sum(0))
        scratch = torch.empty_like(rows)
        scratch.copy_(rows).add_(eps)
        product = torch.mm(scratch.t(), rows)
        product.addmm_(rows.t(), rows, alpha=-1)
        return product.add_(bias), total, None, rows.view(x.shape[0], -1)

    x, bias = torch.randn(2, 5, 3, 3).contiguous(memory_format=torch.channels_last), torch.randn(5)
    function = written(serve, x, bias, 0.25)
    for seed in range(3):
        torch.manual_seed(seed)
        other = torch.randn_like(x), torch.randn_like(bias), 0.25
        same(function(*other), serve(*other))


def test_views_of_all_kinds():
    def serve(x):
        columns = x.t()[1:]  # from another element on
        halves = torch.split(x, 2)
        x2 = x.view(-1).view(2, -1)
        halves[1].mul_(2)  # seen through every view of x
        bits = x.view(torch.int32)
        wide = x[:, :1].expand(-1, 7)
        return columns + 1, halves[0].clone(), x2 * 3, bits & -(2**13), wide.contiguous(), wide.detach()

    x = torch.randn(4, 6)
    function = written(lambda x: serve(x.clone()), x)
    shifted = torch.randn(5, 6)[1:]  # another offset in its storage
    same(function(shifted), serve(shifted.clone()))


def test_lists_names_and_numbers():
    def serve(a, b):
        found = [torch.empty_like(t, dtype=torch.float64) for t in (a, b)]
        torch._foreach_copy_(found, [a, b])
        infinite = torch.full_like(a, math.inf)
        nan = torch.full_like(b, math.nan, dtype=torch.float16)
        return *found, infinite, nan, torch.cat([a, b]), torch.stack((a, b)).unbind()[1], a.sum(0, dtype=torch.float64)

    a, b = torch.randn(2, 5).unbind()
    function = written(serve, a, b)
    a, b = torch.randn(5), torch.full((5,), math.nan)
    same(function(a, b), serve(a, b))


def test_operators_with_several_results_and_none():
    def serve(g, x, w):
        places = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        dx, dw, nothing = aten.convolution_backward(g, x, w, None, *places, [True, True, False])
        none, dw2, _ = aten.convolution_backward(g, x, w, None, *places, [False, True, False])
        return dx, dw + dw2, nothing, none

    args = torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    function = written(serve, *args)
    args = [torch.randn_like(a) for a in args]
    same(function(*args), serve(*args))


def test_an_argument_that_comes_back_does():
    function = written(lambda a, b: (b, a + 1, b), torch.ones(3), torch.zeros(3))
    a, b = torch.randn(3), torch.randn(3)
    found = function(a, b)
    assert found[0] is b and found[2] is b and torch.equal(found[1], a + 1)


def test_no_tensor_is_kept_longer_than_it_is_read():
    alive: list[int] = []
    living = weakref.WeakSet()

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            living.add(result)
            alive.append(len(living))
            return result

    def serve(x):
        for _ in range(20):
            x = x * 2
        return x

    x = torch.ones(2)
    function = written(serve, x)
    with Count():
        function(x)
    assert max(alive) <= 2


def test_watching_keeps_nothing_alive():
    seen = []

    def serve(x):
        y = x + 1
        seen.append(weakref.ref(y))
        z = y * 2
        del y
        gc.collect()
        assert seen[0]() is None
        return z + torch.empty_like(z).fill_(3)  # which may have the id of what is gone

    function = written(serve, torch.ones(2))
    assert torch.equal(function(torch.ones(2)), torch.full((2,), 7.0))


def test_launches_are_written_down_with_their_arguments():
    """A launch is a call that PyTorch does not see."""
    told = []

    def launch(*args):
        told.append(args)
        args[1].copy_(args[0] * args[2])

    def serve(x, factor):
        y = torch.empty_like(x)
        with torch.utils._python_dispatch._disable_current_modes():
            launch(x, y, factor)
        if straight.watched() is not None:
            straight.watched().launched(launch, (x, y, factor))
        return y.t()

    function = written(serve, torch.ones(2, 3), 3)
    x = torch.randn(2, 3)
    assert torch.equal(function(x, 3), 3 * x.t())
    assert told[-1][0] is x and told[-1][2] == 3
    assert straight.watched() is None


@pytest.mark.parametrize("value, expected", [(None, "{'cuda'}"), ("run", "set()"), ("written", "{'cuda'}")])
def test_it_can_be_switched_off(value, expected):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)} | (
        {backends.HOST_CODE: value} if value else {}
    )
    code = "from fused_resnet import backends; print(backends.WRITTEN_DOWN)"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected


# --- what is not ---


def test_what_cannot_be_written_down():
    x, constant = torch.randn(3, 3), torch.randn(3, 3)
    assert "other results each time" in refusal(torch.rand_like, x)
    assert "other results each time" in refusal(lambda x: x * x.sum().item(), x)
    assert "other results each time" in refusal(lambda x: x.nonzero(), x)
    assert "other results each time" in refusal(lambda x: x[x > 0], x)
    assert "from nowhere" in refusal(lambda x: x + constant, x)
    assert "from nowhere" in refusal(lambda x: constant, x)
    assert "one tensor is two arguments" in refusal(torch.add, x, x)

    def unseen(x):
        y = torch.empty_like(x)
        straight.watched().refuse("a kernel is launched by Triton's dispatch")
        return y

    assert "Triton's dispatch" in refusal(unseen, x)


def test_a_call_that_fails_is_no_longer_watched():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        straight.watch(torch.mm, (torch.ones(2, 3), torch.ones(2, 3)))
    assert straight.watched() is None


def test_results_that_differ_are_found():
    def shared(x):
        y = x + 1
        y.numpy()[:] *= 2  # PyTorch is not told
        return y

    x = torch.ones(3)
    result, function = straight.write_down(shared, (x,), 1e-4)
    assert torch.equal(result, 2 * (x + 1)) and function == "written down, it gave something else"


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
def test_what_nobody_writes_is_found(dtype):
    """Though the memory that is taken for it held the right values a moment ago."""

    def launch(x, y):  # a launch that nobody tells of
        with torch.utils._python_dispatch._disable_current_modes():
            y.copy_(x)

    def serve(x):
        scratch = torch.empty_like(x)
        launch(x, scratch)
        return scratch + 1

    x = torch.ones(1000, dtype=dtype)
    result, function = straight.write_down(serve, (x,), 1e-4)
    assert torch.equal(result, x + 1) and function == "written down, it gave something else"


def test_a_check_that_fails_is_nobodys_error():
    """The result of the call that was watched is there."""
    calls = []

    def serve(x):
        calls.append(x)
        return torch.mm(x, x.t())

    def failing(*args, **kind):
        raise RuntimeError("Unable to find an engine to execute this computation")

    x = torch.ones(3, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(straight, "_agrees", failing)
        result, function = straight.write_down(serve, (x,), 1e-4)
    assert torch.equal(result, 3 * x) and function.startswith("RuntimeError: Unable to find an engine")
    assert len(calls) == 1


def test_places_that_the_next_call_may_not_have():
    whole = torch.randn(40)
    assert "elsewhere" in refusal(lambda x: torch.as_strided(x, (2, 2), (2, 1), 3) + 1, whole[8:])
    assert "elsewhere" in refusal(lambda x: torch.empty(0).set_(x.untyped_storage(), 8, (4,)), whole)
    assert "another device" in refusal(lambda x: x.to("meta") if x.dim() else x, whole)
    assert "another device" in refusal(lambda x: torch.empty_like(x, device="meta").copy_(x), whole)
    assert "another device" in refusal(lambda x: x.sum().to("meta"), whole)
    _, function = straight.watch(lambda x: x + torch.full((), 2.0, device="cpu"), (whole.to("meta"),))
    assert callable(function)  # a number may come
    function = written(lambda x: torch.as_strided(x, (2, 2), (2, 1)) + 1, whole)
    assert torch.equal(function(whole[8:]), whole[8:12].view(2, 2) + 1)


def test_a_watch_inside_a_watch():
    def inner(x):
        return x * 2

    def outer(x):
        y = torch.empty_like(x)
        straight.watch(inner, (x,))
        straight.watched().launched(torch.Tensor.copy_, (y, x))
        with torch.utils._python_dispatch._disable_current_modes():
            y.copy_(x)
        return y + 1

    function = written(outer, torch.ones(3))
    assert torch.equal(function(torch.zeros(3)), torch.ones(3)) and straight.watched() is None


def test_two_threads_at_once():
    """One is watched, the other served; and PyTorch does not go on believing in a mode."""
    inside, go = threading.Event(), threading.Event()

    def slow(x):
        inside.set()
        assert go.wait(10)
        return x + 1

    became, results = [], []
    first = straight.Repeated("op", slow, 1e-4, became.append)
    other = straight.Repeated("op", lambda x: x + 2, 1e-4, became.append)
    first.calls = other.calls = straight.WATCH_AT
    thread = threading.Thread(target=lambda: results.append(first(torch.ones(2))))
    thread.start()
    assert inside.wait(10)
    results.append(other(torch.ones(2)))
    assert not became
    go.set()
    thread.join()
    assert [r[0].item() for r in results] == [3.0, 2.0] and len(became) == 1
    other(torch.ones(2))
    assert len(became) == 2
    assert not torch.utils._python_dispatch.is_in_torch_dispatch_mode()


def test_what_may_pass_is_tried_again(caplog):
    """One tensor as two arguments, and then two."""
    became, calls = [], []

    def serve(a, b):
        calls.append(a)
        return a + b

    repeated = straight.Repeated("op", serve, 1e-4, became.append)
    x, y = torch.ones(2), torch.ones(2)
    with caplog.at_level(logging.INFO, logger="fused_resnet"):
        for _ in range(straight.WATCH_AT):
            repeated(x, x)
        assert not became and "one tensor is two arguments" in caplog.text
        for _ in range(straight.WATCH_AT):
            repeated(x, y)
        assert len(became) == 1
        hopeless = straight.Repeated("op", serve, 1e-4, became.append)
        for _ in range(10 * straight.WATCH_AT):
            hopeless(x, x)
    assert len(became) == 1 and hopeless.tries == straight.TRIES
    assert {r.levelname for r in caplog.records} == {"INFO"}


def test_what_differs_again_and_again_is_told(caplog):
    def serve(x):
        y = x + 1
        y.numpy()[:] *= 2  # PyTorch is not told
        return y

    repeated = straight.Repeated("op", serve, 1e-4, None)
    for _ in range(4 * straight.WATCH_AT):
        assert torch.equal(repeated(torch.ones(2)), torch.full((2,), 4.0))
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert told == ["op: the host code runs at every call: written down, it gave something else"]


def test_nan_agrees_with_itself_and_rounding_within_the_limit():
    nan = torch.tensor([1.0, math.nan, math.inf])
    assert straight._agrees(nan, nan.clone(), 0.0)
    assert not straight._agrees(nan, torch.tensor([1.0, math.nan, -math.inf]), 1.0)
    one = torch.ones(4)
    assert straight._agrees(one + 1e-5, one, 1e-4) and not straight._agrees(one + 1e-3, one, 1e-4)
    assert not straight._agrees(one.half(), one, 1.0) and not straight._agrees(one, one.view(2, 2), 1.0)
    assert not straight._agrees(one.int(), one.int() + 1, 1.0)
    assert straight._agrees(None, None, 0.0) and not straight._agrees(None, one, 1.0)


# --- ops ---


@pytest.fixture
def soon(monkeypatch):
    """Calls on a CPU are written down, at the second one of a kind; returns the ops that were, in their order."""
    ops = []
    original = straight.write_down

    def write_down(serve, args, limit):
        result, function = original(serve, args, limit)
        assert callable(function), function
        return result, function

    class Noted(straight.Repeated):
        def __init__(self, op, serve, limit, became):
            super().__init__(op, serve, limit, lambda function: ops.append(op) or became(function))

    monkeypatch.setattr(straight, "write_down", write_down)
    monkeypatch.setattr(backends, "Repeated", Noted)
    monkeypatch.setattr(straight, "WATCH_AT", 2)
    monkeypatch.setattr(backends, "WRITTEN_DOWN", {"cpu"})
    return ops


def cases(dtype) -> dict[str, tuple]:
    conv, bn = conv_case(SHAPES["3x3"], dtype), bn_case(dtype=dtype)
    return {
        "conv_bn_act": conv.args,
        "conv_bn_act_bwd": (*conv.bwd, [True] * 5),
        "bn_stats": bn.args[:1],
        "bn_act": bn.args,
        "bn_act_bwd": (*bn.bwd, [True] * 4),
        "bn_act_bwd_input": bwd_input_case(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ops_by_the_reference(soon, dtype):
    for op, args in cases(dtype).items():
        call = getattr(torch.ops.fused_resnet, op).default
        with fused_resnet.backend("reference"):
            for _ in range(2):
                call(*args)
            others = [torch.randn_like(a).abs() if isinstance(a, torch.Tensor) else a for a in args]
            found = call(*others)
        assert soon == [op]
        soon.clear()
        expected = verify._tuple(getattr(reference, op)(*others))
        for v, e in zip(straight._flat(found), expected, strict=True):
            assert torch.equal(v, e) or verify.difference(v, e) <= verify.TOLERANCE[dtype]


@pytest.mark.parametrize("served_by", [cudnn, cpu], ids=lambda b: b.NAME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_pytorchs_kernels_compose_can_be_written_down(served_by, dtype, monkeypatch):
    """Where they run on a GPU, calls are alike."""
    monkeypatch.setattr(cudnn, "_fuses", lambda *args: False)  # asks a GPU
    x, weight = (
        torch.randn(2, 16, 6, 5).to(dtype).contiguous(memory_format=torch.channels_last),
        torch.randn(64, 16, 1, 1),
    )
    weight, added = weight.to(dtype), torch.randn(2, 64, 6, 5).to(dtype)
    c, k = torch.rand(4, 16).add(0.5).unbind(), torch.rand(4, 64).add(0.5).unbind()
    places, eps = ([1, 1], [0, 0], [1, 1], 1), 1e-3
    expanded = reference.pointwise_bn_act(x, weight, *c, eps, True, *k[:2], eps, added, [1, 1], True)
    y, *statistics = expanded
    winner = torch.randint(0, 9, (2, 16, 3, 3), dtype=torch.uint8)
    calls = {
        "conv_bn_act": (x, weight, *k, eps, added, *places, True),
        "conv_bn_act_bwd": (added, y, x, weight, k[0], *k[2:], eps, *places, True, [True] * 5),
        "bn_act_conv": (x, weight, *c, eps, True, *places, True),
        "bn_act_conv_bwd": (added, x, weight, *c, eps, True, *places, [True] * 4),
        "pointwise_bn_act": (x, weight, *c, eps, True, *k[:2], eps, added, [1, 1], True),
        "pointwise_bn_act_bwd": (added, y, x, weight, *c, eps, True, k[0], *statistics[:2], eps, *statistics[2:])
        + ([1, 1], True, [True] * 7),
        "bn_act_pool": (x, *c, eps),
        "bn_act_pool_bwd": (torch.randn(2, 16, 3, 3).to(dtype), x, winner, *c[:3], eps, [True] * 3),
    }
    for op, args in calls.items():
        if served_by is cpu and op.startswith("conv_bn_act"):
            continue  # it keeps folded weights, and no GPU comes to it
        function = straight.watch(getattr(served_by, op), args)[1]
        assert callable(function), (op, function)


def test_float64_is_left_alone(monkeypatch):
    monkeypatch.setattr(backends, "WRITTEN_DOWN", {"cpu"})
    monkeypatch.setattr(straight, "WATCH_AT", 2)
    monkeypatch.setattr(straight, "write_down", None)
    args = cases(torch.float64)["bn_act"]
    for _ in range(4):
        torch.ops.fused_resnet.bn_act(*args)


@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_network_trains_to_the_same_bits(soon, monkeypatch, dtype, memory):
    def trained(places):
        monkeypatch.setattr(backends, "WRITTEN_DOWN", places)
        backends._ready.clear()
        torch.manual_seed(1)
        blocks = [torchvision.models.resnet.Bottleneck(16, 16, 2, torch.nn.Sequential(
            torch.nn.Conv2d(16, 64, 1, 2, bias=False), torch.nn.BatchNorm2d(64)))]  # fmt: skip
        model = torch.nn.Sequential(*blocks, torchvision.models.resnet.Bottleneck(64, 16)).to(dtype)
        fused_resnet.swap_blocks(model, memory=memory)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for seed in range(5):
            x = torch.randn(4, 16, 9, 9, generator=torch.Generator().manual_seed(seed)).to(dtype)
            optimizer.zero_grad()
            model(x.contiguous(memory_format=torch.channels_last)).float().square().mean().backward()
            optimizer.step()
        model.eval()
        return [*model.state_dict().values(), model(x), *(p.grad for p in model.parameters())]

    with fused_resnet.backend("reference"):
        expected = trained(set())
        assert not soon
        found = trained({"cpu"})
    for op in ("bn_act_conv", "bn_act_conv_bwd", "pointwise_bn_act", "pointwise_bn_act_bwd"):
        assert op in soon
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_what_is_written_down_serves_all_later_calls(soon, monkeypatch):
    args = cases(torch.float32)["bn_act"]
    calls = []
    original = reference.bn_act
    monkeypatch.setattr(reference, "bn_act", lambda *a: calls.append(a) or original(*a))
    with fused_resnet.backend("reference"):
        for _ in range(5):
            torch.ops.fused_resnet.bn_act(*args)
    assert len(calls) == 2 and soon == ["bn_act"]


def test_nothing_is_written_down_while_a_graph_is_captured(soon, monkeypatch):
    args = cases(torch.float32)["bn_act"]
    with fused_resnet.backend("reference"):
        monkeypatch.setattr(straight, "capturing", lambda device: True)
        for _ in range(5):
            torch.ops.fused_resnet.bn_act(*args)
        assert not soon
        monkeypatch.setattr(straight, "capturing", lambda device: False)
        torch.ops.fused_resnet.bn_act(*args)
    assert soon == ["bn_act"]


def test_where_memory_is_short_the_host_code_goes_on(monkeypatch):
    def short(x):
        raise torch.OutOfMemoryError("the second result")

    monkeypatch.setattr(straight, "watch", lambda serve, args: (serve(*args), short))
    x = torch.ones(2)
    result, function = straight.write_down(lambda x: x + 1, (x,), 1e-4)
    assert torch.equal(result, x + 1) and function == "OutOfMemoryError: the second result"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(monkeypatch, dtype):
    """Whatever backend serves: a network's steps after its calls are written down are those before, but for what
    PyTorch's own kernels vary."""
    monkeypatch.setattr(straight, "WATCH_AT", 2)
    made = []
    original = straight.write_down
    monkeypatch.setattr(straight, "write_down", lambda *a: made.append(r := original(*a)) or r)
    model = torchvision.models.resnet50().cuda().to(dtype)
    fused_resnet.swap_blocks(model)
    x = torch.randn(4, 3, 64, 64, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    grads = []
    for _ in range(4):
        model.zero_grad()
        model(x).float().square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    reasons = {function for _, function in made if isinstance(function, str)}
    assert made and not reasons
    for first, last in zip(grads[0], grads[-1], strict=True):
        norm = first.double().norm()
        assert (first.double() - last.double()).norm() <= 5e-2 * norm + 1e-6
