"""Times of candidates that were found right: on rotated buffers, in turns."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .guard import synchronize
from .problem import Candidate, Case, describe

SAMPLE_S = 1e-3  # a sample lasts about this long: one launch, or one tick of a clock, is nothing beside it
MOST_SETS = {"cuda": 128, "cpu": 8}
MOST_BYTES_CPU = 2**28
CALLS_A_GRAPH = 20  # if they are short: they share the launch of the graph
ROUNDS = 21
LEAST_ROUNDS = 5
NARROW = ((3, 1.5), (9, 1.15))  # after so many rounds, who never came below so many times the best time is out
RACE_S = 1.5  # once every candidate had its LEAST_ROUNDS, rounds end after this


class CaptureFailed(RuntimeError):
    """A graph could not be captured: the allocator may take the capture to go on, and the process is of no more use."""


class Timer:
    """Times candidates of one case on copies of its tensors that together do not fit the last-level cache."""

    def __init__(self, case: Case, device: torch.device, inputs: dict[str, Tensor], outputs: dict[str, Tensor]):
        self.case, self.device = case, device
        count = sets(sum(t.nbytes for t in [*inputs.values(), *outputs.values()]), device)
        self.buffers = [(_copies(inputs), _copies(outputs)) for _ in range(count)]
        # By candidate: (what runs, how many calls that is, the tensors, which a graph does not keep alive).
        self.armed: dict[str, tuple[Callable[[], None], int, list]] = {}

    def sample(self, candidate: Candidate) -> float:
        """Seconds of one call."""
        if candidate.id not in self.armed:
            self.armed[candidate.id] = self._arm(candidate)
        run, calls, _ = self.armed[candidate.id]
        return elapsed(run, self.device) / calls

    def drop(self, candidate: Candidate) -> None:
        self.armed.pop(candidate.id, None)

    def _arm(self, candidate: Candidate) -> tuple[Callable[[], None], int, list]:
        buffers = [(self.case.pack(candidate, inputs), outputs) for inputs, outputs in self.buffers]
        turn = itertools.cycle(buffers)

        def once():
            inputs, outputs = next(turn)
            self.case.timed(candidate, inputs, outputs)

        def times(count: int, run: Callable[[], None]) -> Callable[[], None]:
            return lambda: [run() for _ in range(count)]

        calls = 1
        if self.device.type == "cuda":
            # As in the network: replayed from a graph. A launch from Python takes longer than many a kernel.
            calls = len(buffers)
            everything = times(calls, once)
            everything()
            turns = min(-(-CALLS_A_GRAPH // calls), max(1, round(SAMPLE_S / elapsed(everything, self.device))))
            calls *= turns
            once = capture(everything, times(calls, once), self.device)
        else:
            once()
        repeats = max(1, round(SAMPLE_S / min(elapsed(once, self.device) for _ in range(2))))
        return times(repeats, once), calls * repeats, buffers


def capture(warm_up: Callable[[], None], run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A CUDA graph of what `run` does; called, it is replayed on the current stream."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        warm_up()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    failures = []
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            try:
                run()
            except Exception as failure:  # ending a capture that failed raises once more, and says less
                failures.append(failure)
                raise
    except Exception as failure:
        first = failures[0] if failures else failure
        raise CaptureFailed(f"cannot be captured in a CUDA graph: {describe(first)}") from failure
    torch.cuda.synchronize(device)
    graph.replay()
    torch.cuda.synchronize(device)
    return graph.replay


def elapsed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds, never 0: between CUDA events on a GPU, by the clock elsewhere."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        synchronize(device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return max(start.elapsed_time(end) / 1e3, 1e-9)
    begin = time.perf_counter()
    run()
    return max(time.perf_counter() - begin, 1e-9)


def sets(size: int, device: torch.device) -> int:
    """How many copies of `size` bytes the calls go through, so that none finds its data in the cache."""
    count = 1 + -(-5 * cache_bytes(device) // (4 * max(size, 1)))
    room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else MOST_BYTES_CPU
    return max(1, min(count, MOST_SETS[device.type], room // max(size, 1)))


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: L2 on a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    found = [2**25]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            found.append(int(path.read_text().strip().removesuffix("K")) * 1024)
        except (OSError, ValueError):  # a machine that tells otherwise, or nothing
            continue
    return max(found)


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    copies = {n: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for n, t in tensors.items()}
    for name, copy in copies.items():
        copy.copy_(tensors[name])
    return copies


def race(
    candidates: list[Candidate],
    sample: Callable[[Candidate], float | None],
    drop: Callable[[Candidate], None] = lambda candidate: None,
    deadline: float = float("inf"),
) -> dict[str, list[float]]:
    """The samples by candidate id. Every round samples each candidate that is still in, starting with another one.

    sample(candidate) returns None for one that failed: it is out. drop(candidate): it will not be sampled again.
    deadline: on time.monotonic; the round during which it comes is the last.
    """
    active = list(candidates)
    times: dict[str, list[float]] = {c.id: [] for c in candidates}
    begin = time.monotonic()
    for r in range(ROUNDS):
        k = r % len(active)
        for candidate in active[k:] + active[:k]:
            if time.monotonic() > deadline and times[candidate.id]:
                continue
            seconds = sample(candidate)
            if seconds is None:
                active.remove(candidate)
                times.pop(candidate.id)
            else:
                times[candidate.id].append(seconds)
        for rounds, factor in NARROW:
            if r + 1 == rounds and active:
                # What else the machine does only ever adds: the least time is the candidate's own.
                least = {c.id: min(times[c.id]) for c in active}
                best = min(least.values())
                for candidate in [c for c in active if least[c.id] > factor * best]:
                    active.remove(candidate)
                    drop(candidate)
        now = time.monotonic()
        if not active or now > deadline or (r + 1 >= LEAST_ROUNDS and (now - begin > RACE_S or len(active) == 1)):
            break
    return times


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    tenths = statistics.quantiles(samples * 2 if len(samples) == 1 else samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]
