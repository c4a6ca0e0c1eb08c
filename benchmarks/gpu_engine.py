"""gpu-check's cases of the engine: its kernels one by one, whole networks, their speed, and the tuning of ResNets.

Networks are planned with kernels that are forced (nothing is measured: all of ours that can run do), or tuned within a
budget of seconds.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torchvision
from torch import Tensor

import fused_resnet
from fused_resnet import measure
from fused_resnet.engine import cache, cases, chain_cases, gpu
from fused_resnet.engine import tune as tuning
from fused_resnet.engine.guard import Verifier
from fused_resnet.engine.problem import distinct

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MODELS = (
    "resnet50", "resnet18", "resnet34", "resnext50_32x4d", "wide_resnet50_2", "resnet101", "resnet152",
    "resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2",
)  # fmt: skip
TARGETS_S = {"cold": 300, "warm": 60}  # ResNet-50, one shape: with nothing compiled before, and with everything
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}
TUNE_S, BENCH_TUNE_S, SMOKE_TUNE_S = 75, 75, 40  # of tuning in a case; what was measured is kept for the next
ROUNDS = 11

_CONV = dict(n=2, c=32, h=7, w=9, k=48, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), relu=True)
_CONV |= dict(residual=False, segment=None)
_POINT = _CONV | dict(kernel=(1, 1), padding=(0, 0))
_CHAIN = dict(n=2, c=32, h=7, w=9, middle=32, k=64, following=0, stride=1, relu=True)
_CHAIN |= dict(residual=False, segment=None, quarter=False, pool=False)
OPS = {
    "conv-3x3": (cases.ConvArgs, _CONV),
    "chain-next-quarter": (chain_cases.ChainArgs, _CHAIN | dict(residual=True, following=32, quarter=True)),
    "stem-nchw": (cases.StemArgs, dict(n=2, h=19, w=37, k=64, channels_last=False)),
    "conv-1x1-residual": (cases.ConvArgs, _POINT | dict(residual=True)),
    "conv-1x1-segment": (cases.ConvArgs, _POINT | dict(segment=(16, 13, 17, 2))),
    "chain-pool": (chain_cases.ChainArgs, _CHAIN | dict(pool=True)),
    "chain-segment-stride2": (chain_cases.ChainArgs, _CHAIN | dict(stride=2, segment=(32, 7, 9, 2), following=64)),
    "conv-3x3-stride2": (cases.ConvArgs, _CONV | dict(stride=(2, 2))),
    "stem-nhwc": (cases.StemArgs, dict(n=2, h=19, w=37, k=64, channels_last=True)),
    "conv-3x3-deep": (cases.ConvArgs, _CONV | dict(n=1, c=136, k=72)),
    "conv-1x1-segment-deep": (cases.ConvArgs, _POINT | dict(n=1, c=264, k=72, segment=(264, 13, 17, 2))),
    "conv-3x3-grouped": (cases.GroupedArgs, _CONV | dict(c=64, k=64, groups=16)),
    "conv-3x3-grouped-residual": (cases.GroupedArgs, _CONV | dict(c=72, k=72, groups=3, residual=True)),
    "conv-3x3-grouped-wide": (cases.GroupedArgs, _CONV | dict(n=1, c=224, k=224, groups=2, stride=(2, 2))),
    "linear": (cases.LinearArgs, _POINT | dict(n=3, c=520, h=1, w=1, k=72, relu=False)),
    "avg_pool": (cases.PoolArgs, dict(n=3, c=66, h=7, w=9)),
    "stem-nchw-even": (cases.StemArgs, dict(n=2, h=19, w=38, k=64, channels_last=False)),
    "stem-nhwc-even": (cases.StemArgs, dict(n=2, h=19, w=38, k=64, channels_last=True)),
}


# --- the kernels ------------------------------------------------------------------------------------------------------


def op_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], dict]]]:
    for dtype in DTYPES:
        for name, (args, facts) in OPS.items():
            if args is chain_cases.ChainArgs and dtype == "float32":
                continue
            if args is cases.PoolArgs and device.type != "cuda":
                continue  # compiled only
            more = dict(device=device.type, dtype=dtype)
            if args not in (chain_cases.ChainArgs, cases.PoolArgs):
                more["tf32"] = False
            if args is cases.StemArgs:
                more["input_dtype"] = dtype
            yield f"engine-op/{name}/{dtype}", functools.partial(_op, args(**facts, **more), device)


def _op(args, device: torch.device) -> dict:
    """Every candidate between guard zones, twice."""
    case, found = args.problem().build(), {}
    with torch.no_grad():
        verifier = Verifier(case, device, 0)
        ours = [c for c in distinct(case) if c.backend in cases.OWN]
        assert ours, "no kernel of ours is offered"
        for candidate in ours:
            case.prepare(candidate)
            found[str(candidate)] = verifier.objection(candidate)
    wrong = {name: reason for name, reason in found.items() if reason}
    assert not wrong, wrong
    return {"candidates": len(found)}


# --- networks ---------------------------------------------------------------------------------------------------------


def _model(name: str, device, seed: int = 0):
    torch.manual_seed(seed)
    return measure.build_model(name).to(device).eval()


def _input(shape, seed, device, dtype) -> Tensor:
    return measure.random_input(shape, seed, device, torch.float32).to(dtype)


@contextlib.contextmanager
def forced(long: bool, backend: str = "triton"):
    """Kernels of ours wherever there are some, unmeasured, this backend's first; long: several steps in one where that
    can be."""

    def seconds(problem) -> float:
        return 1e-3 if not problem.key.startswith("chain") else 1e-6 if long else 1.0

    def tune(problems, mode, device=None):
        results = tuning.Results()
        for problem in problems:
            found = problem.build().candidates()
            ours = min(found, key=lambda c: (c.backend != backend, c.backend not in cases.OWN))
            trial = tuning.Trial(ours, (seconds(problem),) * 3)
            results[problem.key] = tuning.Result(problem.key, ours, "default", False, [trial])
        return results

    def expected(problems, device=None):
        return {problem.key: seconds(problem) for problem in problems}

    with mock.patch.multiple(gpu, tune=tune, expected=expected):
        yield


def within(seconds: float):
    """Tuning that ends."""
    return mock.patch.object(gpu, "tune", functools.partial(tuning.tune, budget_s=seconds))


def _told(fast) -> dict:
    print(fast.plan, flush=True)  # log.txt
    counts = Counter(f"rung {s.rung} {s.backend}" for s in fast.plan.steps)
    return {"kernels": dict(counts), "notes": fast.plan.notes}


def _parity(model, fast, x: Tensor, dtype) -> dict:
    """By the project's rule: at most twice the worst of torchvision's own variants, and a floor."""
    untouched = copy.deepcopy(model).to(dtype)
    wanted, own = measure.own_error(untouched, [x])
    found = {}
    for layout in ("contiguous_format", "channels_last"):
        y = fast(x.contiguous(memory_format=getattr(torch, layout)))
        found[layout] = measure.error(y.cpu(), wanted)
    limit = 2 * own + FLOOR[dtype]
    assert max(found.values()) <= limit, f"off by {found}, torchvision {own:.1e}"
    return {"error": found, "torchvision": own}


def smoke_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], dict]]]:
    on_gpu = device.type == "cuda"
    plan = [("resnet18", "forced"), ("resnet50", "compiled"), ("resnet50", "forced"), ("resnet50", "full")]
    plan += [("resnet18", "compiled"), ("resnet50", "off")]
    plan += [("resnet18", "full"), ("resnet18", "off")]
    for name, how in plan if on_gpu else [("resnet18", "off")]:
        dtype = "float16" if on_gpu else "float32"
        yield f"engine/{name}/{dtype}/{how}", functools.partial(_smoke, name, dtype, how, device)
    yield from op_cases(device)


def _smoke(name: str, dtype: str, how: str, device) -> dict:
    model, dtype = _model(name, device), DTYPES[dtype]
    x = _input((2, 3, *(2 * (224 if device.type == "cuda" else 40,))), 0, device, dtype)
    unmeasured = {"forced": forced(True), "compiled": forced(False, "cuda")}.get(how)
    with unmeasured or within(SMOKE_TUNE_S):
        start = time.time()
        fast = fused_resnet.optimize_for_inference(
            copy.deepcopy(model).to(dtype), x, tune="cached" if unmeasured else how
        )
        ready = time.time() - start
        return _parity(model.to(dtype), fast, x, dtype) | _told(fast) | {"ready_s": ready}


def test_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], dict]]]:
    on_gpu = device.type == "cuda"
    name, dtypes = ("resnet50", ("float16", "float32", "bfloat16")) if on_gpu else ("resnet18", ("float32",))
    for what in (_turns, _refresh, _refused):
        yield f"engine/{what.__name__[1:]}/{name}", functools.partial(what, name, dtypes[0], device)
    sizes = [(2, 224), (1, 224), (7, 224), (32, 224), (2, (97, 161)), (1, 32)] if on_gpu else [(1, 32), (2, (33, 47))]
    for model in MODELS if on_gpu else (name,):
        for dtype in dtypes:
            yield f"engine/parity/{model}/{dtype}", functools.partial(_networks, model, dtype, sizes, device)


def _networks(name: str, dtype: str, sizes, device) -> dict:
    dtype = DTYPES[dtype]
    model, found = _model(name, device).to(dtype), {}
    for way in ((True, "triton"), (False, "triton"), (False, "cuda")):
        with forced(*way):
            fast = None
            for batch, size in sizes:
                shape = (batch, 3, *(size if isinstance(size, tuple) else (size, size)))
                x, other = (_input(shape, seed, device, dtype) for seed in (0, 1))
                fast = fast or fused_resnet.optimize_for_inference(model, x, tune="cached")
                key = f"{list(shape)} {'long' if way[0] else 'short'} {way[1]}"
                found[key] = _parity(model, fast, x, dtype)["error"]
                y, kept = fast(x), None
                kept = y.clone()
                _parity(model, fast, other, dtype)  # a replay with other numbers
                assert torch.equal(y, kept), "a later call changed a result"
                assert torch.equal(fast(x), kept), "two calls gave different bits"
            notes = [n for plan in fast.plans for n in plan.notes]
            assert device.type != "cuda" or not any("not used" in n or "without" in n for n in notes), notes
    return {"errors": found}


def _turns(name: str, dtype: str, device) -> dict:
    """Eight threads on two streams: what each gets is what it gets alone."""
    dtype = DTYPES[dtype]
    shapes = [(2, 3, 64, 64), (1, 3, 96, 64)]
    with forced(True):
        inputs = [_input(shapes[i % 2], i, device, dtype) for i in range(8)]
        fast = fused_resnet.optimize_for_inference(_model(name, device).to(dtype), inputs[0], tune="cached")
        alone = [fast(x).clone() for x in inputs]
        measure.synchronize(device)
        streams = [torch.cuda.Stream() for _ in range(2)] if device.type == "cuda" else [None] * 2
        wrong: list[str] = []

        def work(i: int) -> None:
            with torch.cuda.stream(streams[i % 2]) if streams[0] else contextlib.nullcontext():
                for _ in range(25):
                    if not torch.equal(fast(inputs[i].clone()), alone[i]):
                        wrong.append(f"thread {i}")
                        return

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong, wrong
    return {}


def _refresh(name: str, dtype: str, device) -> dict:
    dtype = DTYPES[dtype]
    old, new = (_model(name, device, seed).to(dtype) for seed in (0, 1))
    x = _input((2, 3, 64, 64), 0, device, dtype)
    with forced(True):
        fast = fused_resnet.optimize_for_inference(old, x, tune="cached")
        before = fast(x)
        fast.refresh(new)
        found = _parity(new, fast, x, dtype)
        fast.refresh(old)
        assert torch.equal(fast(x), before)
    return found


def _refused(name: str, dtype: str, device) -> dict:
    """A kernel that is wrong by a hundredth does not serve."""
    if device.type != "cuda":
        return {}
    dtype, launch = DTYPES[dtype], gpu.triton_conv.launch

    def wrong(config, x, weight, bias, residual, segment, out, workspace, **options):
        launch(config, x, weight, bias, residual, segment, out, workspace, **options)
        out.mul_(1.01)

    x = _input((2, 3, 64, 64), 0, device, dtype)
    model = _model(name, device).to(dtype)
    with forced(False), mock.patch.object(gpu.triton_conv, "launch", wrong):
        fast = fused_resnet.optimize_for_inference(model, x, tune="cached")
    assert any("is not used: result 0 differs" in n for n in fast.plan.notes), fast.plan.notes
    return _parity(model, fast, x, dtype)


# --- speed ------------------------------------------------------------------------------------------------------------


def bench_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], dict]]]:
    on_gpu = device.type == "cuda"
    first = [("resnet50", "float16", 128), ("resnet50", "float16", 1)]
    rest = [
        (name, dtype, batch)
        for dtype in ("float16", "bfloat16")
        for name in ("resnet50", "resnet18", "resnet101")
        for batch in (32, 128, 1, 8, 256)
    ]
    unmeasured = [("resnet50", "float16", 32), ("resnet50", "bfloat16", 64), ("resnet18", "float16", 128)]
    plan = [(_speed, n) for n in first] + [(_cached, n) for n in first + unmeasured] + [(_speed, n) for n in rest]
    dry = [(run, ("resnet18", "float32", 1)) for run in (_speed, _cached)]
    for run, (name, dtype, batch) in dict.fromkeys(plan) if on_gpu else dry:
        yield f"engine/{run.__name__[1:]}/{name}/{dtype}/{batch}", functools.partial(run, name, dtype, batch, device)


@torch.no_grad()
def _speed(name: str, dtype: str, batch: int, device) -> dict:
    """Images a second beside PyTorch's own ways, in turns; the first figures are of the network that is served."""
    on_gpu, dtype = device.type == "cuda", DTYPES[dtype]
    model = _model(name, device).to(dtype)
    x = _input((batch, 3, *(2 * (224 if on_gpu else 32,))), 0, device, dtype)
    with within(BENCH_TUNE_S):
        fast = fused_resnet.optimize_for_inference(model, x, tune="full")
    runs = {"engine": fast, "pytorch in a graph": fused_resnet.optimize_for_inference(model, x, tune="off")}
    eager = copy.deepcopy(model).to(memory_format=torch.channels_last)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    runs["eager channels_last"] = lambda _: eager(nhwc)
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        compiled = torch.compile(eager)
        runs["torch.compile"] = lambda _: compiled(nhwc)
    found = _parity(model, fast, x, dtype) | _told(fast)
    seconds: dict[str, list[float]] = {what: [] for what in runs}
    for run in runs.values():
        for _ in range(3):
            run(x)
    calls = max(1, round(0.03 / measure.time_once(lambda: fast(x), device, 1)))
    for _ in range(ROUNDS if on_gpu else 2):
        for what, run in runs.items():
            seconds[what].append(measure.time_once(lambda run=run: run(x), device, calls))
    host = _host(fast, x, device)
    cuts = {what: [1e3 * q for q in statistics.quantiles(t, n=10)[1::3]] for what, t in seconds.items()}
    speed = {what: round(batch / statistics.median(t), 1) for what, t in seconds.items()}
    return found | {"images_per_s": speed, "p20_p50_p80_ms": cuts, "host_us": host, "calls": calls}


@torch.no_grad()
def _cached(name: str, dtype: str, batch: int, device) -> dict:
    """What a user gets who does not tune: by the package's tables and forecasts alone, how soon and how fast."""
    on_gpu, dtype = device.type == "cuda", DTYPES[dtype]
    model = _model(name, device).to(dtype)
    x = _input((batch, 3, *(2 * (224 if on_gpu else 32,))), 0, device, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {cache.VARIABLE: folder}):
        start = time.time()
        fast = fused_resnet.optimize_for_inference(model, x, tune="cached")
        ready = time.time() - start
    found = _parity(model, fast, x, dtype) | _told(fast)
    for _ in range(3):
        fast(x)
    calls = max(1, round(0.03 / measure.time_once(lambda: fast(x), device, 1)))
    seconds = [measure.time_once(lambda: fast(x), device, calls) for _ in range(ROUNDS if on_gpu else 2)]
    speed = {"not tuned": round(batch / statistics.median(seconds), 1)}
    return found | {"ready_s": round(ready, 1), "images_per_s": speed}


def _host(fast, x: Tensor, device) -> float:
    """Microseconds until a call returns, nothing waited for."""
    measure.synchronize(device)
    start = time.perf_counter()
    for _ in range(50):
        fast(x)
    took = time.perf_counter() - start
    measure.synchronize(device)
    return 1e6 * took / 50


# --- tuning -----------------------------------------------------------------------------------------------------------


def tune_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], dict]]]:
    """What is measured lies in the cache, a file that can be copied to fused_resnet/engine/tables/."""
    plan = [("resnet50", "float16", 128), ("resnet50", "float16", 1), ("resnet18", "float16", 128)]
    plan += [("resnet50", "float16", 32), ("resnet50", "bfloat16", 128), ("resnet18", "float16", 1)]
    plan += [("resnet50", "float16", 8), ("resnet50", "float16", 256), ("resnet101", "float16", 128)]
    for name, dtype, batch in plan if device.type == "cuda" else [("resnet18", "float32", 1)]:
        yield f"engine/tune/{name}/{dtype}/{batch}", functools.partial(_tune, name, dtype, batch, device)


def _tune(name: str, dtype: str, batch: int, device) -> dict:
    """Cold, then for ResNet-50 at batch 128 again with the compiled kernels alone: raises if that takes too long."""
    dtype = DTYPES[dtype]
    model = torchvision.models.get_model(name).eval().to(device, dtype)
    x = torch.randn(batch, 3, *(2 * (224 if device.type == "cuda" else 32,)), device=device).to(dtype)
    whole = device.type == "cpu" or (name, dtype, batch) == ("resnet50", torch.float16, 128)

    def ready_s(limit: float) -> float:
        start = time.time()
        with within(limit):
            told.update(_told(fused_resnet.optimize_for_inference(model, x, tune="full")))
        return round(time.time() - start, 1)

    told: dict = {}
    found = {"ready_s": ready_s(TARGETS_S["cold"] if whole else TUNE_S)}
    if whole:
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {cache.VARIABLE: folder}):
            found["warm_s"] = ready_s(TARGETS_S["warm"])
        took = {"cold": found["ready_s"], "warm": found["warm_s"]}
        late = [f"{how}: {took[how]} s, more than {limit}" for how, limit in TARGETS_S.items() if took[how] > limit]
        assert not late, f"the search takes too long: {'; '.join(late)}"
    return told | found
