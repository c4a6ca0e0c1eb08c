"""Parity and speed of a model with fused blocks beside the untouched one, for `bench`, `classify` and benchmarks/.

Parity: a tensor v has the error e(v) = |v - v64| / |v64| (2-norms; v64 from the same model in float64). The yardstick
is the largest e over torchvision's own variants (contiguous, channels_last, oneDNN and cuDNN off) and over the seeds.
Ours may be 2 times that for outputs and running statistics, 3 times for gradients, plus a floor.

Speed: the variants take turns, round by round, in rotating order, so that what else the machine does hits all alike.
The untouched model runs twice a round; the noise is half the distance from the 20th to the 80th percentile of the ratio
of its two times.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from . import capture
from .convert import swap_blocks

FACTOR = {"output": 2.0, "buffer": 2.0, "gradient": 3.0}
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}
OWN_VARIANTS = ("contiguous", "channels_last", "library_off")
VARIANTS = ("eager", "channels_last", "compile", "fused", "fused_channels_last", "fused_captured", "optimized")
Step = Callable[[], object]


# --- models and inputs ------------------------------------------------------------------------------------------------


def build_model(name: str, *, firm: bool = False, seed: int = 0) -> nn.Module:
    """A torchvision model, randomly initialised from the seed, in eval mode; see `calibrate`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision.models.get_model(name, weights=None)
        return calibrate(model, torch.randn(4, 3, 64, 64), firm=firm).eval()


@torch.no_grad()
def calibrate(module: nn.Module, x: Tensor, *, firm: bool = False) -> nn.Module:
    """Set the running statistics to those of x, and BN weights and biases away from 1 and 0.

    The last BN of a block is small, as in a trained network: its branch is a correction, and rounding errors do not
    grow from block to block. firm: biases so large that hardly any pre-activation lies near zero, where a rounding
    error would flip a ReLU and with it whole gradients; what is left is the error of the kernels.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    blocks = [m for m in module.modules() if isinstance(m, (BasicBlock, Bottleneck))]
    joining = [m.bn3 if isinstance(m, Bottleneck) else m.bn2 for m in blocks]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 0.9
        m.weight.uniform_(0.5, 1.2)
        m.bias.uniform_(-0.3, 0.3)
    for m in joining:
        m.weight.mul_(0.2)
    if firm:
        joining += [m.downsample[1] for m in blocks if m.downsample is not None]
        for m in norms:
            m.bias.uniform_(5, 6)
            if m not in joining:  # inside a branch a quarter of the channels is off; where branches are joined, none
                m.bias[::4] *= -1
    module.train()(x)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return module


def random_input(shape: tuple[int, ...], seed: int, device, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(device=device, dtype=dtype)


# --- parity -----------------------------------------------------------------------------------------------------------


def error(v: Tensor, judge: Tensor, least: float = 0.0) -> float:
    """|v - judge| / max(|judge|, least); infinite where one is finite and the other is not."""
    v, judge = v.double(), judge.double()
    if v.shape != judge.shape or not torch.equal(v.isfinite(), judge.isfinite()):
        return float("inf")
    v, judge = v.nan_to_num(0, 0, 0), judge.nan_to_num(0, 0, 0)
    distance, norm = (v - judge).norm().item(), max(judge.norm().item(), least)
    return distance / norm if norm else (0.0 if distance == 0 else float("inf"))


def observe(module: nn.Module, x: Tensor, *, train: bool) -> dict[str, Tensor]:
    """The output; in training also the gradients of the input and of every parameter, and the buffers afterwards."""
    if not train:
        with torch.no_grad():
            module.eval()  # not all return themselves
            return {"output": module(x)}
    module.train()
    module.zero_grad(set_to_none=True)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    y.backward(_cotangent(y))
    seen = {"output": y.detach(), "gradient of the input": x.grad}
    seen |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return seen | {f"buffer {name}": b for name, b in module.named_buffers()}


def _cotangent(y: Tensor) -> Tensor:
    return random_input(tuple(y.shape), 1234, y.device, torch.float32).to(y.dtype)


@contextlib.contextmanager
def _libraries_off() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # entering mkldnn.flags warns about GPUs of another maker
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            yield


def _own_variant(variant: str, module: nn.Module, x: Tensor, train: bool) -> dict[str, Tensor]:
    format = torch.channels_last if variant == "channels_last" else torch.contiguous_format
    off = _libraries_off() if variant == "library_off" else contextlib.nullcontext()
    with off:
        module = copy.deepcopy(module).to(memory_format=format)
        return observe(module, x.contiguous(memory_format=format), train=train)


def parity(
    untouched: nn.Module,
    fused: nn.Module,
    inputs: list[Tensor],
    *,
    train: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> dict:
    """Compare `fused` with `untouched` (both of one dtype, on one device) on each of the inputs, contiguous and
    channels_last, by the rule above. Neither module is changed. fused: swapped, or what optimize_for_inference
    returned. Returns what a JSON file can hold; its key 'ok' is the verdict."""
    from .engine import OptimizedModel  # it is built on this module

    ours: dict[str, float] = {}
    yardstick: dict[str, float] = {}
    for i, x in enumerate(inputs):
        progress(f"parity {i + 1} of {len(inputs)}: float64")
        judge = observe(copy.deepcopy(untouched).double(), x.double(), train=train)
        for variant in OWN_VARIANTS:
            progress(f"parity {i + 1} of {len(inputs)}: torchvision {variant}")
            _keep_worst(yardstick, _own_variant(variant, untouched, x, train), judge)
        for format in (torch.contiguous_format, torch.channels_last):
            progress(f"parity {i + 1} of {len(inputs)}: fused")
            ours_now = fused if isinstance(fused, OptimizedModel) else copy.deepcopy(fused)
            seen = observe(ours_now, x.contiguous(memory_format=format), train=train)
            _keep_worst(ours, seen, judge)
    return verdict(ours, yardstick, inputs[0].dtype)


def own_error(untouched: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, float]:
    """(float64 output on the first of the inputs, the largest error of torchvision's own variants on any of them)."""
    judges = [observe(copy.deepcopy(untouched).double(), x.double(), train=False) for x in inputs]
    worst: dict[str, float] = {}
    for x, judge in zip(inputs, judges, strict=True):
        for variant in OWN_VARIANTS:
            _keep_worst(worst, _own_variant(variant, untouched, x, train=False), judge)
    return judges[0]["output"].cpu(), worst["output"]


def _keep_worst(worst: dict[str, float], seen: dict[str, Tensor], judge: dict[str, Tensor]) -> None:
    # A gradient may vanish (of a bias whose channel is on everywhere, in front of a batch norm): there is nothing that
    # its rounding errors could be relative to but the other gradients.
    largest = max((g.double().norm().item() for name, g in judge.items() if name.startswith("gradient")), default=0.0)
    for name in judge.keys() | seen.keys():
        least = 1e-3 * largest if name.startswith("gradient") else 0.0
        e = error(seen[name], judge[name], least) if name in seen and name in judge else float("inf")
        worst[name] = max(e, worst.get(name, 0.0))


def verdict(ours: dict[str, float], yardstick: dict[str, float], dtype: torch.dtype) -> dict:
    """The rule, applied to the errors by tensor: per kind of tensor the one nearest its limit, and every violation."""
    kinds: dict[str, dict] = {}
    violations = []
    for name, e in ours.items():
        kind = name.split()[0]
        limit = FACTOR[kind] * yardstick[name] + FLOOR[dtype]
        share = e / limit
        if not e <= limit:
            violations.append(f"{name}: off by {e:.1e}, torchvision's own variants by {yardstick[name]:.1e}")
        if kind not in kinds or not share <= kinds[kind]["share_of_limit"]:
            kinds[kind] = {
                "tensor": name,
                "error": e,
                "torchvision": yardstick[name],
                "limit": limit,
                "share_of_limit": share,
                "tensors": 0,
            }
    for kind, entry in kinds.items():
        entry["tensors"] = sum(name.split()[0] == kind for name in ours)
    return {"ok": not violations, "nearest": kinds, "violations": violations}


# --- speed ------------------------------------------------------------------------------------------------------------


def variants_of(device: torch.device, *, train: bool, compiled: bool, optimized: bool = False) -> list[str]:
    """Those of VARIANTS that there are: of training alone, and on a GPU, a captured one, of inference alone
    optimize_for_inference; that and torch.compile, which take their time, if they are wanted."""
    absent = set() if compiled else {"compile"}
    if not train or device.type != "cuda":
        absent.add("fused_captured")
    if train or not optimized:
        absent.add("optimized")
    return [v for v in VARIANTS if v not in absent]


def build_variant(variant: str, module: nn.Module, x: Tensor, *, train: bool) -> Step:
    """A call of one variant of `module` (deep-copied) on x: forward, or forward and backward."""
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    if variant == "optimized":
        if train:
            raise ValueError("variant: 'optimized' is for inference, and train is True")
        fast = _optimized(module, x)
        return lambda: fast(x)
    module = copy.deepcopy(module)
    module.train(train)
    if variant.startswith("fused"):
        swap_blocks(module)
    if variant not in ("eager", "fused"):
        module, x = module.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    called = module
    if variant == "compile":
        torch.compiler.reset()  # what another batch size left behind would make this one's shapes dynamic
        called = torch.compile(module)
    if variant == "fused_captured":
        called = capture.capture_training(module, x)
    if not train:

        def step():
            with torch.no_grad():
                return called(x)

        return step
    with torch.no_grad():
        cotangent = _cotangent(copy.deepcopy(module)(x))

    def step():
        module.zero_grad(set_to_none=True)
        called(x).backward(cotangent)

    return step


def _optimized(module: nn.Module, x: Tensor) -> nn.Module:
    from .engine import optimize_for_inference  # it is built on this module

    return optimize_for_inference(module, x)


class Variants:
    """Several variants of one module on one input, built and warmed up: peak memory, time to be ready, and times."""

    def __init__(self, module: nn.Module, x: Tensor, variants, *, train: bool, progress=lambda what: None):
        self.steps: dict[str, Step] = {}
        self.peak_mib: dict[str, float | None] = {}
        self.ready_s: dict[str, float] = {}
        self.device = x.device
        for variant in variants:
            progress(f"warm-up: {variant}")

            def build(variant=variant):
                start = time.perf_counter()
                step = self.steps[variant] = build_variant(variant, module, x, train=train)
                step()
                synchronize(x.device)
                self.ready_s[variant] = time.perf_counter() - start
                step()

            # What a compiler needs while it compiles is not the model's: on a CPU the two cannot be told apart, and of
            # what plans and measures nowhere.
            measured = variant != "optimized" and (x.is_cuda or variant != "compile")
            self.peak_mib[variant] = peak_memory(build, x.device) if measured else build()

    def measure(self, seconds: float, progress=lambda what: None) -> dict:
        """Times in milliseconds by variant, the ratio of speed to 'eager', and the noise; takes about `seconds`."""
        times, again = interleave(self.steps, self.device, seconds, progress)
        result = {}
        for variant, t in times.items():
            base = [(a + b) / 2 for a, b in zip(times["eager"], again, strict=True)] if variant != "eager" else t
            result[variant] = {
                **percentiles(t),
                "ratio": statistics.median(a / b for a, b in zip(base, t, strict=True)),
                "rounds": len(t),
                "peak_mib": self.peak_mib[variant],
                "ready_s": self.ready_s[variant],
            }
        low, _, high = quantiles([a / b for a, b in zip(times["eager"], again, strict=True)])
        return {"variants": result, "noise": (high - low) / 2}


@contextlib.contextmanager
def fastest_library() -> Iterator[None]:
    """cuDNN's benchmark mode while variants are built and timed: the untouched model deserves its best."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds."""
    return {name: 1e3 * q for name, q in zip(("p20_ms", "p50_ms", "p80_ms"), quantiles(seconds), strict=True)}


def quantiles(values: list[float]) -> list[float]:
    """The 20th, 50th and 80th percentile."""
    cuts = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(cuts).tolist()


def interleave(
    steps: dict[str, Step],
    device: torch.device,
    seconds: float,
    progress=lambda what: None,
    baseline: str = "eager",
    least_calls: int = 1,
) -> tuple[dict[str, list[float]], list[float]]:
    """Times of one call in seconds, by step and round, and a second series of the baseline's. Every round times each
    step once, in so many calls in a row at least, starting with another one; a GPU is timed by events."""
    turns = [*steps, None]  # None: the baseline once more
    calls = {name: max(least_calls, round(0.01 / time_once(step, device, 1))) for name, step in steps.items()}
    estimate = sum(time_once(steps[t or baseline], device, 1) * calls[t or baseline] for t in turns)
    rounds = min(200, max(5, int(seconds / estimate)))
    times: dict[str | None, list[float]] = {t: [] for t in turns}
    for r in range(rounds):
        progress(f"round {r + 1} of {rounds}")
        for i in range(len(turns)):
            t = turns[(r + i) % len(turns)]
            times[t].append(time_once(steps[t or baseline], device, calls[t or baseline]))
    again = times.pop(None)
    return times, again


def time_once(step: Step, device: torch.device, calls: int) -> float:
    """Seconds a call, over `calls` of them: by CUDA events on a GPU, by the clock elsewhere."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return max(start.elapsed_time(end) / 1e3 / calls, 1e-9)
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return max((time.perf_counter() - begin) / calls, 1e-9)


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_memory(step: Step, device: torch.device) -> float | None:
    """How far memory rises above where it was while `step` runs, in MiB: allocated memory on a GPU, resident memory of
    the process elsewhere (None where the system does not tell)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = _resident_mib("VmRSS", reset=True)
    step()
    peak = _resident_mib("VmHWM")
    return None if before is None or peak is None else peak - before


def _resident_mib(field: str, reset: bool = False) -> float | None:
    try:
        if reset:
            ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and kept would be used again, unseen
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except (OSError, AttributeError):
        return None
    return int(found.group(1)) / 1024 if found else None
