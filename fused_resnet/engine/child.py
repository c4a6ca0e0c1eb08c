"""A bench in another process: a candidate that dies or hangs there costs that candidate only.

An illegal address poisons a CUDA context and a stuck barrier never returns. Requests and replies are JSON on a pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import torch

from .bench import Bench, Dropped, Unusable
from .nursery import Nursery, last_line
from .problem import Candidate, Problem


class Lost(Dropped):
    """The process ended while it had this candidate at hand."""


@dataclass(frozen=True)
class Limits:
    """Seconds after which a child is taken to hang."""

    start: float = 180
    warm_up: float = 120
    open: float = 120
    load: float = 120
    compile: float = 300
    prepare: float = 300
    verify: float = 60
    sample: float = 60
    drop: float = 60


class Child:
    """A bench that lives in another process, started when it is first needed and again after each loss."""

    def __init__(self, nursery: Nursery, device: torch.device | str | None, limits: Limits, threads: int | None = None):
        self.nursery, self.device, self.limits, self.threads = nursery, device, limits, threads
        self.pid: int | None = None
        self.problem: Problem | None = None
        self.seed: int | None = None
        self._prepared: set[str] = set()
        self._used = False  # whether the running process has had any candidate
        self._at: tuple[Problem | None, int | None] = (None, None)  # what the running process has open and loaded

    def warm_up(self) -> None:
        """The process, if it can be started, with its device at hand, before anything is opened."""
        with contextlib.suppress(Unusable):
            if self.pid is None:
                self._start()
            self._request("warm_up", Unusable)

    def open(self, problem: Problem) -> None:
        self.problem, self.seed = problem, None
        self._catch_up()

    def load(self, seed: int) -> None:
        self.seed = seed
        self._catch_up()

    def compile(self, candidate: Candidate) -> None:
        self._ask("compile", candidate)

    def prepare(self, candidate: Candidate) -> None:
        self._catch_up()
        if candidate.id not in self._prepared:
            self._ask("prepare", candidate)
            self._prepared.add(candidate.id)

    def verify(self, candidate: Candidate) -> None:
        used = self._used and self.pid is not None
        try:
            self.prepare(candidate)
            self._ask("verify", candidate)
        except Lost:  # an earlier candidate may have damaged the process
            if not used:
                raise
            self.prepare(candidate)
            self._ask("verify", candidate)

    def sample(self, candidate: Candidate) -> float:
        self.prepare(candidate)
        return self._ask("sample", candidate)

    def drop(self, candidate: Candidate) -> None:
        if self.pid is not None:
            self._ask("drop", candidate)

    def close(self) -> None:
        if self.pid is None:
            return
        with contextlib.suppress(ProcessLookupError, EOFError):
            os.kill(self.pid, signal.SIGKILL)
            self.nursery.status(self.pid, 10)  # a driver may hold it for longer: not our wait
        self._forget()

    def _forget(self) -> None:
        self.pid, self._at = None, (None, None)
        self._connection.close()
        self._stderr.close()

    def _ask(self, step: str, candidate: Candidate):
        self._catch_up()
        facts = {"backend": candidate.backend, "label": candidate.label, "config": candidate.config}
        try:
            return self._request(step, Dropped, candidate=facts)
        finally:
            self._used = self.pid is not None

    def _catch_up(self) -> None:
        """A process that has this problem open and this seed loaded."""
        if self.pid is None:
            self._start()
        if self._at[0] is not self.problem:
            self._request("open", Unusable, problem=self.problem.as_json())
            self._at = self.problem, None
            self._prepared.clear()
        if self._at[1] != self.seed:
            self._request("load", Unusable, seed=self.seed)
            self._at = self.problem, self.seed

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        self._stderr = tempfile.TemporaryFile()
        try:
            with theirs:
                self.pid = self.nursery.fork(theirs.fileno(), self._stderr.fileno())
        except EOFError as failure:
            self._forget()
            raise Unusable(f"cannot be tried: {failure}") from None
        settings = {"device": None if self.device is None else str(self.device), **flags()}
        if self.threads is not None:
            settings["threads"] = self.threads
        self._request("start", Unusable, settings=settings)

    def _request(self, step: str, error: type[Exception], **facts):
        """The reply's value. Raises `error` with the reason, and ends the process if it is of no more use."""
        limit = getattr(self.limits, step)
        try:
            self._connection.send_bytes(json.dumps({"step": step, **facts}).encode())
            if not self._connection.poll(limit):
                self.close()
                raise error(f"did not return from {step!r} within {limit:g} s")
            reply = json.loads(self._connection.recv_bytes())
        except (OSError, EOFError):
            raise (Lost if error is Dropped else error)(self._epitaph()) from None
        if reply.get("spent"):
            self.close()
        if "reason" in reply:
            raise (Unusable if reply["unusable"] else error)(reply["reason"])
        return reply["value"]

    def _epitaph(self) -> str:
        """Why the pipe ended; the process is done with."""
        try:
            status = self.nursery.status(self.pid, 10)
        except EOFError as failure:
            self._forget()
            return str(failure)
        if status is None:
            self.close()
            return "its process closed the pipe"
        said = last_line(self._stderr)
        self._forget()
        if status >= 0:
            return f"its process ended with exit status {status}{said}"
        with contextlib.suppress(ValueError):
            return f"its process died by {signal.Signals(-status).name}"
        return f"its process died by signal {-status}"


def flags() -> dict:
    """This process's settings that a kernel's numbers and speed depend on."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    found = {"threads": torch.get_num_threads(), "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    try:
        found["allow_tf32"] = [cudnn.allow_tf32, matmul.allow_tf32]
    except RuntimeError:  # set through the newer interface, which must not be mixed with the older one
        found["fp32_precision"] = [cudnn.conv.fp32_precision, matmul.fp32_precision]
    return found


def set_flags(found: dict) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    torch.set_num_threads(found["threads"])
    cudnn.benchmark, cudnn.deterministic = found["benchmark"], found["deterministic"]
    if "allow_tf32" in found:
        cudnn.allow_tf32, matmul.allow_tf32 = found["allow_tf32"]
    else:
        cudnn.conv.fp32_precision, matmul.fp32_precision = found["fp32_precision"]


def serve(pipe: int) -> None:
    """The child's side, until the pipe ends."""
    connection, bench = Connection(pipe), Bench()
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        reply = _reply(bench, request)
        connection.send_bytes(json.dumps(reply).encode())
        if reply.get("spent"):
            return


def _reply(bench: Bench, request: dict) -> dict:
    step = request["step"]
    try:
        if step == "start":
            set_flags(request["settings"])
            bench.device = request["settings"]["device"]
            return {"value": None}
        if step == "warm_up":
            return {"value": bench.warm_up()}
        if step == "open":
            return {"value": bench.open(Problem(**request["problem"]))}
        if step == "load":
            return {"value": bench.load(request["seed"])}
        return {"value": getattr(bench, step)(Candidate(**request["candidate"]))}
    except (Dropped, Unusable) as failure:
        return {"reason": str(failure), "unusable": isinstance(failure, Unusable), "spent": bench.spent or _poisoned()}


def _poisoned() -> bool:
    """Whether nothing can run on the GPU any more in this process."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the failure left behind
        return False
    except Exception:
        return True


def compile_all(
    work: list[tuple[Problem, Candidate]],
    nursery: Nursery,
    jobs: int,
    device: torch.device | str | None,
    limits: Limits,
    done: Callable[[Candidate], None] = lambda candidate: None,
    deadline: float = float("inf"),
) -> dict[tuple[str, str], str]:
    """Compile candidates in `jobs` processes at a time; (problem id, candidate id): why it does not compile.

    What it leaves undone at the deadline (on time.monotonic) is compiled when it is verified.
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for item in work:
        waiting.put(item)
    reasons: dict[tuple[str, str], str] = {}
    children = [Child(nursery, device, limits, threads=1) for _ in range(min(jobs, len(work)))]
    stop = threading.Event()

    def serve(child: Child) -> None:
        try:
            while not stop.is_set() and time.monotonic() < deadline:
                try:
                    problem, candidate = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    if child.problem is not problem:
                        child.open(problem)
                    child.compile(candidate)
                except (Lost, Unusable):  # perhaps of something else, such as want of memory: it is tried again alone
                    pass
                except Dropped as failure:
                    reasons[problem.id, candidate.id] = str(failure)
                done(candidate)
        finally:
            child.close()

    threads = [threading.Thread(target=serve, args=(child,), daemon=True) for child in children]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:  # Ctrl-C: the threads end with the item at hand, and with the process in any case
        stop.set()
    return reasons
