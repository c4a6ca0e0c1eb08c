"""One system of benchmarks/peers.py in a process of its own, at both ends of the pipe."""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fused_resnet import measure

from .peer_systems import SYSTEMS, Cell, Dispatched, Step, System

BURST_S = 0.1
READY_LIMIT_S, CALL_LIMIT_S = 1800, 600
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
QUIET_S, QUIET_TRIES = 0.005, 60
WARM_BELOW_S = 0.5


def serve(connection, name: str, cell: Cell) -> None:
    """Build a system, then time as many calls as the other end asks for, and answer seconds a call; None ends it.

    The first message is {'built_s', 'ready_s', 'export_s', 'peak_mib', 'call_s', 'output'} or {'failed'};
    ready_s is built_s and the first result, which is when a lazy system compiles.
    """
    try:
        first, step = _prepare(SYSTEMS[name], cell)
    except Exception as error:  # whatever a peer raises: this cell goes on without it
        words = next(iter(str(error).splitlines()), "")
        connection.send({"failed": f"{type(error).__name__}: {words}"[:300]})
        return
    quiet()
    connection.send(first)
    device = torch.device(cell.device)
    while (calls := connection.recv()) is not None:
        if first["call_s"] < WARM_BELOW_S:  # what ran in between took the caches, and threads went to sleep
            _finished(step, device)
        seconds = time_burst(step, device, calls)
        quiet()
        connection.send(seconds)


def _prepare(system: System, cell: Cell) -> tuple[dict, Step]:
    torch.set_num_threads(cell.threads)
    for module in system.needs:
        importlib.import_module(module)
    if cell.folder:  # what an earlier run compiled would make torch.compile ready sooner than a user's first time is
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=cell.folder)
    torch.backends.cudnn.benchmark = True
    model, x, device = cell.untouched(), cell.input(), torch.device(cell.device)
    export_s = 0.0
    if system.export is not None:
        begin = time.perf_counter()
        system.export(cell, model, x)
        export_s = time.perf_counter() - begin
    seen = {}

    def build():
        begin = time.perf_counter()
        seen["step"] = system.build(cell, model, x)
        seen["built_s"] = time.perf_counter() - begin
        output = _finished(seen["step"], device)
        seen["ready_s"] = time.perf_counter() - begin
        seen["output"] = ends(output).tolist()  # before the next call: a CUDA graph's output is overwritten by it
        _finished(seen["step"], device)

    # On a CPU, what a compiler needs and what the model needs cannot be told apart.
    peak = build() if system.compiles and cell.device == "cpu" else measure.peak_memory(build, device)
    step = seen["step"]
    first = {
        "built_s": seen["built_s"],
        "ready_s": seen["ready_s"],
        "export_s": export_s,
        "peak_mib": peak,
        "call_s": time_burst(step, device, 1),
        "output": seen["output"],
    }
    return first, step


def time_burst(step: Step, device: torch.device, calls: int) -> float:
    """Seconds a call, over a burst of calls; what is dispatched is waited for once, at the end."""
    if not isinstance(step, Dispatched):
        return measure.time_once(step, device, calls)
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    step.wait()
    return (time.perf_counter() - begin) / calls


def _finished(step: Step, device: torch.device) -> object:
    output = step()
    if isinstance(step, Dispatched):
        step.wait()
    measure.synchronize(device)
    return output


def ends(output) -> Tensor:
    """The first and the last row (of one, the one), in float64: parity is checked on these."""
    if not isinstance(output, Tensor):
        import numpy

        output = torch.from_numpy(numpy.array(output, dtype=numpy.float64))
    rows = sorted({0, output.shape[0] - 1})
    return output.detach()[rows].double().cpu()


def quiet() -> None:
    """Wait until this process's threads have stopped spinning, so that they take nothing from whoever runs next."""
    for _ in range(QUIET_TRIES):
        before = time.process_time()
        time.sleep(QUIET_S)
        if time.process_time() - before < 0.1 * QUIET_S:
            return


class Worker:
    """A system in its own process: started, first result there, nothing running."""

    def __init__(self, name: str, cell: Cell, serving: Callable = serve):
        context = multiprocessing.get_context("spawn")
        self.end, theirs = context.Pipe()
        self.process = context.Process(target=serving, args=(theirs, name, cell), daemon=True)
        with _surroundings(cell.threads):
            self.process.start()
        theirs.close()
        self.first = self._answer(READY_LIMIT_S)
        if "failed" in self.first:
            self.stop()
            raise RuntimeError(self.first["failed"])
        self.calls = max(1, math.ceil(BURST_S / self.first["call_s"]))

    def burst(self) -> float:
        """Seconds a call, over a burst of calls."""
        self.end.send(self.calls)
        return self._answer(CALL_LIMIT_S + self.calls * self.first["call_s"])

    def _answer(self, limit: float):
        try:
            if self.end.poll(limit):
                return self.end.recv()
        except (EOFError, OSError):
            self.process.join(10)
            raise RuntimeError(f"its process ended with exit code {self.process.exitcode}") from None
        self.stop()
        raise RuntimeError(f"no answer in {limit:.0f} s")

    def stop(self) -> None:
        if self.process.is_alive():
            try:
                self.end.send(None)
                self.process.join(5)
            except OSError:
                pass
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
        self.end.close()


@contextmanager
def _surroundings(count: int) -> Iterator[None]:
    """The environment and the cores that a process started now inherits."""
    # JAX would take most of a GPU's memory for itself, and the other systems hold theirs at the same time.
    asked = {**dict.fromkeys(THREAD_VARIABLES, str(count)), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    before = {name: os.environ.get(name) for name in asked}
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    os.environ.update(asked)
    if cores:
        os.sched_setaffinity(0, sorted(cores)[:count])
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        if cores:
            os.sched_setaffinity(0, cores)
