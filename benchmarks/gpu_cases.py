"""The cases of gpu-check's parts that are not pytest's, and the process that runs them one after the other.

    python -m benchmarks.gpu_cases smoke|test|bench|tune --log FILE --deadline EPOCH [--device cpu] [--only CASE ...]

Every case is guarded and logged by itself. An error that spoils the CUDA context ends the process with POISONED; the
one that watches (gpu_check.py) starts the next.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fused_resnet
from benchmarks import gpu_conv, gpu_engine, gpu_training
from benchmarks.caselog import Declined, Log, poisoned, stands_for
from benchmarks.resnet_shapes import resnet_shapes
from fused_resnet import backends, doctor, measure
from fused_resnet.backends import reference, verify

POISONED = 77
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# name: (N, C, H, W, K, kernel, stride, padding, dilation, groups, residual, BN, ReLU); odd maps make ragged tiles
CONVOLUTIONS = {
    "3x3": (2, 64, 7, 9, 64, 3, 1, 1, 1, 1, True, True, True),
    "1x1": (3, 64, 7, 9, 96, 1, 1, 0, 1, 1, True, True, True),
    "3x3-stride2": (2, 32, 15, 13, 64, 3, 2, 1, 1, 1, False, True, True),
    "1x1-stride2": (2, 64, 9, 7, 128, 1, 2, 0, 1, 1, False, True, False),
    "7x7-stem": (1, 3, 31, 33, 64, 7, 2, 3, 1, 1, False, True, True),
    "3x3-groups": (2, 64, 7, 9, 64, 3, 1, 1, 1, 4, False, True, True),
    "3x3-dilated": (1, 32, 9, 11, 32, 3, 1, 2, 2, 1, False, True, True),
    "3x3-72-channels": (2, 72, 7, 9, 72, 3, 1, 1, 1, 1, True, True, True),
    "1x1-maps-of-one": (5, 40, 1, 1, 136, 1, 1, 0, 1, 1, True, True, True),
    "plain": (1, 32, 7, 9, 64, 3, 1, 1, 1, 1, False, False, False),
}
CONVOLUTIONS_OF_A_RESNET = {
    "layer1-3x3": (32, 64, 56, 56, 64, 3, 1, 1, 1, 1, False, True, True),
    "layer3-1x1": (32, 256, 14, 14, 1024, 1, 1, 0, 1, 1, True, True, True),
    "layer4-3x3-stride2": (32, 512, 14, 14, 512, 3, 2, 1, 1, 1, False, True, True),
}
# name: (N, C, H, W, residual, batch statistics)
NORMS = {
    "batch": (5, 48, 7, 9, True, True),
    "72-channels": (2, 72, 7, 9, True, True),
    "running": (3, 64, 5, 7, False, False),
    "one-channel": (4, 1, 3, 5, True, True),
}
NORMS_OF_A_RESNET = {"layer1": (32, 256, 56, 56, True, True)}


# --- arguments --------------------------------------------------------------------------------------------------------


def _maps(shape, device, dtype, format, seed) -> Tensor:
    return measure.random_input(shape, seed, device, dtype).contiguous(memory_format=format)


def _bn(channels: int, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    weight, bias, mean, var = (torch.rand(channels, generator=g) for _ in range(4))
    return tuple(t.to(device) for t in (weight + 0.5, bias - 0.5, mean - 0.5, var + 0.5))


def convolution_arguments(op: str, spec, device, dtype, format) -> tuple:
    n, c, h, w, k, kernel, stride, padding, dilation, groups, residual, bn, relu = spec
    x = _maps((n, c, h, w), device, dtype, format, 1)
    weight = _maps((k, c // groups, kernel, kernel), device, torch.float32, format, 2)
    weight = (weight / (c // groups * kernel * kernel) ** 0.5).to(dtype)
    vectors = _bn(k, device) if bn else (None,) * 4
    conv = ([stride] * 2, [padding] * 2, [dilation] * 2, groups, relu)
    shape = backends.layout.conv_output_size(x, weight, *conv[:3])
    other = _maps(shape, device, dtype, format, 3)
    if op == "conv_bn_act":
        return x, weight, *vectors, 1e-5, other if residual else None, *conv
    y = _maps(shape, device, dtype, format, 4).relu() if relu else None
    mask = [True, True, bn, bn, residual]
    return other, y, x, weight, *(vectors[i] for i in (0, 2, 3)), 1e-5, *conv, mask


def norm_arguments(op: str, spec, device, dtype, format) -> tuple:
    n, c, h, w, residual, batch_stats = spec
    x, other = (_maps((n, c, h, w), device, dtype, format, seed) for seed in (1, 2))
    weight, bias, mean, var = _bn(c, device)
    if op == "bn_stats":
        return ((x.float() * 2 + 3).to(dtype),)
    if batch_stats:
        mean, var = reference.bn_stats(x)
    if op == "bn_act":
        return x, mean, var, weight, bias, 1e-5, other if residual else None, True, batch_stats
    y = _maps((n, c, h, w), device, dtype, format, 4).relu()
    if op == "bn_act_bwd_input":
        return other, y, x, mean, weight, bias, var, True
    return other, y, x, mean, var, weight, 1e-5, True, batch_stats, [True, True, True, residual]


def _arguments(op: str, spec, device, dtype, format) -> tuple:
    if op in gpu_training.OPS:
        return gpu_training.arguments(op, spec, device, dtype, format)
    build = convolution_arguments if op.startswith("conv") else norm_arguments
    return build(op, spec, device, dtype, format)


# --- smoke ------------------------------------------------------------------------------------------------------------


def smoke_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(name, case), the most telling first: every op once on every backend, whole models, then all the rest."""
    yield "choices", lambda: {"choices": doctor.report()["choices"], "backends": doctor.unavailable()}
    yield from gpu_engine.smoke_cases(device)
    yield from gpu_conv.odd_cases(device)
    on_gpu = device.type == "cuda"
    names = [b.NAME for b in backends.ORDER[device.type]] + ([] if on_gpu else ["triton"])
    convolutions = CONVOLUTIONS | (CONVOLUTIONS_OF_A_RESNET if on_gpu else {})
    norms = NORMS | (NORMS_OF_A_RESNET if on_gpu else {})
    first, rest = [], []
    for dtype in DTYPES:
        for backend in names:
            for op in doctor.OPS:
                specs = convolutions if op.startswith("conv") else norms
                if op in gpu_training.OPS:
                    specs = gpu_training.specs(op, on_gpu)
                for i, (variant, spec) in enumerate(specs.items()):
                    for layout in ("channels_last", "contiguous"):
                        early = i == 0 and layout == "channels_last"
                        case = (op, backend, variant, spec, dtype, layout)
                        (first if early else rest).append(case)
    yield from (_op_case(*case, device) for case in first)
    for model in ("resnet18", "resnet50") if on_gpu else ("resnet18",):
        for dtype in ("float16", "float32", "bfloat16") if on_gpu else ("float32",):
            for mode in ("eval", "train") if on_gpu else ("eval",):
                yield f"parity/{model}/{mode}/{dtype}", lambda a=(model, mode, dtype): _model_parity(*a, device)
    if on_gpu:
        yield "cuda-graph/resnet18/float16", lambda: _cuda_graph(device)
        yield "compile/resnet18/float32", lambda: _compiled(device)
        yield "autocast/resnet18/float16", lambda: _autocast(device)
    yield from (_op_case(*case, device) for case in rest)


def _op_case(op, backend, variant, spec, dtype, layout, device) -> tuple[str, Callable[[], dict]]:
    def case() -> dict:
        format = getattr(torch, "channels_last" if layout == "channels_last" else "contiguous_format")
        args = _arguments(op, spec, device, DTYPES[dtype], format)
        return _against_reference(op, backend, args)

    return f"{op}/{backend}/{variant}/{dtype}/{layout}", case


def _against_reference(op: str, backend: str, args: tuple) -> dict:
    candidate = backends.BACKENDS[backend]
    if reason := backends.refuses(candidate, op, args):
        raise Declined(reason)
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    call = backends.prepare(candidate, op, args)
    result = call(*args)
    again = call(*args)  # by what the first call prepared
    for a, b in zip(before, args, strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b), "an input was written to"
    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    expected = verify.comparable(op, wide, getattr(reference, op)(*wide))
    found = (verify.comparable(op, args, r) for r in (result, again))
    error, limit = max(_difference(r, expected) for r in found), verify.tolerance(op, args)
    assert error <= limit, f"off by {error:.2e}, allowed {limit:.0e}"
    pairs = zip(result, again, strict=True) if isinstance(result, tuple) else [(result, again)]
    same = all(a is None or torch.equal(a, b) for a, b in pairs)
    assert same or backend not in ("cuda", "triton"), "two calls gave different bits"
    return {"error": error, "limit": limit, "deterministic": same}


def _difference(result, expected) -> float:
    """The largest elementwise difference over an op's outputs, relative to the expected value and its tensor's rms."""
    pairs = zip(result, expected, strict=True) if isinstance(expected, tuple) else [(result, expected)]
    return max(verify.difference(v, e) for v, e in pairs if e is not None)


def refusals() -> list[str]:
    """What the registry found wrong with a backend on this machine, so far."""
    return sorted({f"{key[1]}: {key[0]}: {reason}" for key, reason in verify._verdicts.items() if reason})


def _model_parity(model: str, mode: str, dtype: str, device: torch.device) -> dict:
    untouched = measure.build_model(model, firm=mode == "train").to(device=device, dtype=DTYPES[dtype])
    size = 224 if device.type == "cuda" else 40
    inputs = [measure.random_input((2, 3, size, size), seed, device, DTYPES[dtype]) for seed in range(3)]
    fused = fused_resnet.swap_blocks(copy.deepcopy(untouched))
    verdict = measure.parity(untouched, fused, inputs, train=mode == "train")
    found = {"parity": verdict, "refused": refusals()}
    assert verdict["ok"], f"{verdict['violations'][:4]}; refused: {found['refused']}"
    return found


def _swapped(device, dtype) -> tuple[torch.nn.Module, Tensor]:
    model = fused_resnet.swap_blocks(measure.build_model("resnet18")).to(device=device, dtype=dtype)
    return model, measure.random_input((2, 3, 224, 224), 0, device, dtype)


@torch.no_grad()
def _cuda_graph(device) -> dict:
    model, x = _swapped(device, torch.float16)
    expected = model(x).clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    y.fill_(float("nan"))
    graph.replay()
    error = measure.error(y, expected)
    assert error < 1e-3, f"the replay is off by {error:.1e}"
    return {"error": error}


def _compiled(device) -> dict:
    model = fused_resnet.swap_blocks(measure.build_model("resnet18", firm=True)).to(device)
    x = measure.random_input((2, 3, 224, 224), 0, device, torch.float32)
    compiled = torch.compile(model, fullgraph=True)
    x = x.requires_grad_()
    expected, y = model(x), compiled(x)
    (wanted,), (got,) = (torch.autograd.grad(v.sum(), x) for v in (expected, y))
    errors = {"output": measure.error(y, expected), "gradient": measure.error(got, wanted)}
    assert max(errors.values()) < 1e-2, errors  # TF32
    return errors


def _autocast(device) -> dict:
    model = fused_resnet.swap_blocks(measure.build_model("resnet18")).to(device).train()
    x = measure.random_input((4, 3, 96, 96), 0, device, torch.float32)
    with torch.autocast("cuda", torch.float16):
        loss = torch.nn.functional.cross_entropy(model(x), torch.arange(4, device=device))
    loss.backward()
    bad = [name for name, p in model.named_parameters() if p.grad is None or p.grad.dtype is not torch.float32]
    assert loss.isfinite() and not bad, (loss, bad)
    return {"loss": loss.item()}


# --- tune -------------------------------------------------------------------------------------------------------------


def tune_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(name, case): a ResNet's convolution, or its batch norms, timed on every backend that can run it."""
    yield from gpu_engine.tune_cases(device)
    on_gpu = device.type == "cuda"
    names = [b.NAME for b in backends.ORDER[device.type]] + ["reference"]
    plan = (("float16", 32), ("float16", 1), ("float16", 128), ("bfloat16", 32)) if on_gpu else (("float32", 1),)
    shapes = resnet_shapes() if on_gpu else resnet_shapes()[:2]
    for dtype, batch in plan:
        for (c, k, kernel, stride, padding, maps), count in shapes:
            spec = (batch, c, maps, maps, k, kernel, stride, padding, 1, 1, kernel == 1 and k > c, True, True)
            name = f"n{batch}-c{c}-{maps}x{maps}-k{k}-{kernel}x{kernel}-s{stride}"
            for op in ("conv_bn_act", "conv_bn_act_bwd") if (dtype, batch) == plan[0] else ("conv_bn_act",):
                yield f"{op}/{name}/{dtype}", lambda a=(op, spec, dtype, names, count): _timed(*a, device)
        for op in ("bn_stats", "bn_act", "bn_act_bwd"):
            for c, maps in ((256, 56), (64, 56), (512, 28), (1024, 14), (2048, 7)) if on_gpu else ((64, 14),):
                case = (op, (batch, c, maps, maps, True, True), dtype, names, 1)
                yield f"{op}/n{batch}-c{c}-{maps}x{maps}/{dtype}", lambda a=case: _timed(*a, device)


def _timed(op: str, spec, dtype: str, names: list[str], count: int, device: torch.device) -> dict:
    args = _arguments(op, spec, device, DTYPES[dtype], torch.channels_last)
    expected = getattr(reference, op)(*args)
    found = {"op": op, "spec": list(spec), "dtype": dtype, "occurs": count, "us": {}, "error": {}, "declined": {}}
    found["not_captured"] = {}
    steps = {}
    for name in names:
        candidate = backends.BACKENDS[name]
        if reason := backends.refuses(candidate, op, args):
            found["declined"][name] = reason
            continue
        error = _difference(getattr(candidate, op)(*args), expected)
        found["error"][name] = error
        if not error <= verify.tolerance(op, args):
            found["declined"][name] = f"differs from the reference by {error:.1e}"
            continue

        prepared = backends.prepare(candidate, op, args)

        def call(prepared=prepared):
            return prepared(*args)

        try:
            steps[name] = gpu_conv.capture(call, device)
        except RuntimeError as error:  # what cannot be captured is timed with its launches, and says so
            found["not_captured"][name] = str(error).splitlines()[0]
            steps[name] = call, 1
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(15):
        for name, (step, calls) in steps.items():
            times[name].append(1e6 * measure.time_once(step, device, 1) / calls)
    found["us"] = {name: statistics.median(t) for name, t in times.items()}
    found["calls_in_a_graph"] = {name: calls for name, (_, calls) in steps.items()}
    return found


# --- test, bench ------------------------------------------------------------------------------------------------------


def test_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], dict]]]:
    yield from gpu_conv.test_cases(device)
    yield from gpu_engine.test_cases(device)


def bench_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], dict]]]:
    """The networks that matter most, then the convolutions, then all the rest."""
    networks = gpu_engine.bench_cases(device)
    for _, case in zip(range(2), networks, strict=False):
        yield case
    yield from gpu_training.bench_cases(device)
    yield from gpu_conv.bench_cases(device)
    yield from networks


# --- the process that runs them ---------------------------------------------------------------------------------------

PARTS = {
    "smoke": smoke_cases,
    "test": test_cases,
    "bench": bench_cases,
    "tune": tune_cases,
}


def run(part: str, log: Log, device: torch.device, deadline: float, only: list[str] | None = None) -> int:
    """Run the cases that have no status yet; 0 when none is left, POISONED when the CUDA context is spoilt."""
    done, unused = log.done(), dict.fromkeys(only or ())
    for name, case in PARTS[part](device):
        meant = [pattern for pattern in only or () if stands_for(pattern, name)]
        for pattern in meant:
            unused.pop(pattern, None)
        if name in done or (only and not meant):
            continue
        if time.time() > deadline:
            log.write(event="stopped", reason="the time for this part is over")
            return 0
        log.write(case=name, event="start")
        start, status, found = time.time(), "passed", {}
        try:
            found = case()
            measure.synchronize(device)
        except Declined as reason:
            status, found = "skipped", {"message": str(reason)}
        except Exception as error:  # whatever a kernel does wrong, the other cases still have something to tell
            status, found = "failed", {"message": f"{type(error).__name__}: {error}"[:2000]}
            found["message"] += _late_error(device)
        log.write(case=name, status=status, seconds=round(time.time() - start, 3), **found)
        if status == "failed" and poisoned(found["message"]):
            return POISONED
    for pattern in unused:
        log.write(case=pattern, status="failed", seconds=0, message=f"no case of {part} has this name")
    log.write(event="finished", reason="")
    return 0


def _late_error(device: torch.device) -> str:
    """What a GPU has to say only when it is waited for."""
    try:
        measure.synchronize(device)
    except Exception as error:
        return f"; then {type(error).__name__}: {error}"[:1000]
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--log", required=True)
    parser.add_argument("--as-part", help="the part that the lines name; default: the part itself")
    parser.add_argument("--deadline", type=float, default=float("inf"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+")
    arguments = parser.parse_args()
    # Uninitialised outputs hold NaN: an element that no kernel writes cannot pass.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = arguments.part == "smoke"
    if arguments.part in ("tune", "bench"):
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = True
        logging.basicConfig(level=logging.WARNING)  # in log.txt: which backend serves what, and the times of all
        logging.getLogger("fused_resnet").setLevel(logging.INFO)
    log = Log(arguments.log, arguments.as_part or arguments.part)
    return run(arguments.part, log, torch.device(arguments.device), arguments.deadline, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
