"""Functions that work in memory of their own, as CUDA graphs or not, and the order between their calls."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .cases import library

ROUNDS = 20  # of a race

_broken: list = []  # captures that did not end: allocators may still ask them whether a stream is theirs


class Turns:
    """One device's calls that share memory: each waits there, not here, for the one before it, whatever streams they
    are asked for on."""

    def __init__(self, device: torch.device):
        self.device = device
        self.done = torch.cuda.Event()  # of the call before
        # Memory of a pool is used again by what is captured on the same stream only, so there is one for all graphs.
        self.side = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def begin(self):
        """The current stream, which waits for the call before."""
        stream = torch.cuda.current_stream(self.device)
        self.done.wait(stream)
        return stream

    def end(self, stream) -> None:
        self.done.record(stream)


class Ordered:
    """A function of a tuple of tensors, one call after the other. What it returns is the caller's: no later call writes
    to it. apart: the same function in memory that no other call uses, for a graph that the caller captures."""

    def __init__(self, run: Callable, turns: Turns, apart: Callable | None = None):
        self.run, self.turns, self.apart = run, turns, apart or run

    def __call__(self, inputs: tuple):
        if torch.cuda.is_current_stream_capturing():
            return self._in_a_graph(inputs)
        stream = self.turns.begin()
        try:
            result = fresh(self.run(inputs))
            for x in inputs:
                x.record_stream(stream)
            return result
        finally:
            self.turns.end(stream)

    def _in_a_graph(self, inputs: tuple):
        """For a graph that the caller captures: the kernels one by one, in that graph's memory."""
        with torch.no_grad(), torch.autocast("cuda", enabled=False):
            return fresh(self.apart(inputs))

    def __del__(self):
        """Its memory goes, and the allocator knows nothing of the streams that may still use it."""
        with contextlib.suppress(Exception):  # at the interpreter's end
            if not torch.cuda.is_current_stream_capturing():
                self.turns.done.synchronize()


class Captured(Ordered):
    """The same as a CUDA graph: the function runs here twice, then never again but in a caller's graph."""

    def __init__(
        self,
        run: Callable,
        inputs: tuple,
        turns: Turns,
        apart: Callable | None = None,
        pool=None,
        first: Callable | None = None,
    ):
        """inputs: become the graph's own. pool: of memory, None for one of its own. first: what a call begins with,
        not captured; it alone reads the inputs, where the caller has them, and there is no copy of them."""
        super().__init__(run, turns, apart)
        self.static, self.first, self.index = inputs, first, turns.device.index
        side = turns.side
        side.wait_stream(torch.cuda.current_stream(turns.device))
        turns.done.wait(side)
        # The outer context gives the caller's stream back even where the capture's own does not.
        with library(), torch.cuda.stream(side):
            for _ in range(2):  # compiles, and lets cuDNN measure
                if first is not None:
                    first(inputs)
                run(inputs)
            side.synchronize()
            self.graph, self.result = _capture(lambda: run(inputs), turns, pool)
        torch.cuda.current_stream(turns.device).wait_stream(side)
        turns.end(torch.cuda.current_stream(turns.device))
        self.leaves, self.spec = tree_flatten(self.result)
        self.single = isinstance(self.result, Tensor)
        if first is not None:
            self.static = ()

    def __call__(self, inputs: tuple):
        if torch.cuda.current_device() != self.index:
            with torch.cuda.device(self.index):
                return self(inputs)
        if torch.cuda.is_current_stream_capturing():
            return self._in_a_graph(inputs)
        stream = self.turns.begin()
        try:
            self._take(inputs)
            for x in inputs:
                x.record_stream(stream)
            self.graph.replay()
            if self.single:
                return self.result.clone()
            return tree_unflatten([v.clone() if isinstance(v, Tensor) else v for v in self.leaves], self.spec)
        finally:
            self.turns.end(stream)

    def again(self, inputs: tuple) -> None:
        """The work of a call without the copy of what the caller gets."""
        self._take(inputs)
        self.graph.replay()

    def _take(self, inputs: tuple) -> None:
        if self.first is not None:
            self.first(inputs)
        for static, x in zip(self.static, inputs, strict=self.first is None):
            static.copy_(x)


def _capture(run: Callable, turns: Turns, pool):
    """(graph, what run returned) on the current stream, which is the side stream."""
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    return graph_of(run, turns.side, pool, turns.device.index, "thread_local")


def graph_of(run: Callable, stream: torch.cuda.Stream, pool, index: int, mode: str):
    """(graph, what run returned) on the current stream, which is this one, of the device with this index. mode: whose
    calls of CUDA end the capture. Whatever run raises is raised, and the device is as it was."""
    graph = torch.cuda.CUDAGraph()
    failures = []
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
            try:
                result = run()
            except Exception as failure:  # ending a capture that failed raises once more, and says less
                failures.append(failure)
                raise
    except Exception as failure:
        _broken.append(graph)
        # Else the allocator takes the capture to go on, and frees nothing that other streams have used.
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(index, pool)
        raise failures[0] if failures else failure from None
    return graph, result


def fresh(result):
    """Copies of the tensors in a result, so that the next run leaves them alone."""
    if isinstance(result, Tensor):
        return result.clone()
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, result)


def race(runs: dict[str, Callable[[], None]], rounds: int = ROUNDS, calls: int = 5) -> dict[str, float]:
    """Median seconds of each on the current stream, the runs taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(rounds):
        for name, run in runs.items():
            run()  # the other's data have left the cache
            start.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / (1e3 * calls))
    return {name: statistics.median(t) for name, t in times.items()}
