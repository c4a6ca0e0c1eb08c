"""One case on the bench: prepared, verified and sampled, in this process. `child.py` has the same in another one."""

from __future__ import annotations

import torch

from .guard import Verifier
from .problem import Candidate, Case, Problem, default_device, describe
from .timing import CaptureFailed, Timer


class Dropped(Exception):
    """Why a candidate is out."""


class Unusable(Exception):
    """Why nothing can be tried: the case itself cannot be built, or has no reference."""


class Bench:
    """compile, prepare, verify and sample raise Dropped. verify and sample use the inputs of the seed named last."""

    def __init__(self, device: torch.device | str | None = None):
        self.device = device
        self.case: Case | None = None
        self.prepared: set[str] = set()
        self.spent = False  # whether this process is not what it was: nothing more should be judged in it
        self._clear()

    def _clear(self) -> None:
        self.seed: int | None = None
        self.verifier: Verifier | None = None
        self.timer: Timer | None = None

    def warm_up(self) -> None:
        """What a device does once a process: its context, and the libraries' handles."""
        if self.device is None or torch.device(self.device).type != "cuda":
            return
        try:
            ones = torch.ones(1, 8, 8, 8, dtype=torch.float16, device=self.device)
            torch.conv2d(ones, torch.ones_like(ones)).sum().item()
        except Exception as failure:
            raise Unusable(f"has no device: {describe(failure)}") from failure

    def open(self, problem: Problem, case: Case | None = None) -> None:
        self._clear()
        self.prepared.clear()
        try:
            self.case = problem.build() if case is None else case
        except Exception as failure:
            raise Unusable(f"cannot be built: {describe(failure)}") from failure
        self.where = default_device(self.case, self.device)

    def load(self, seed: int) -> None:
        """Random inputs, and their reference."""
        if seed == self.seed:
            return
        self._clear()
        try:
            with self._context():
                self.verifier = Verifier(self.case, self.where, seed)
        except Exception as failure:
            raise Unusable(f"has no reference: {describe(failure)}") from failure
        self.seed = seed

    def compile(self, candidate: Candidate) -> None:
        self._attempt(self.case.compile, candidate)

    def prepare(self, candidate: Candidate) -> None:
        if candidate.id not in self.prepared:
            self._attempt(self.case.prepare, candidate)
            self.prepared.add(candidate.id)

    def verify(self, candidate: Candidate) -> None:
        self.prepare(candidate)
        reason = self._attempt(self.verifier.objection, candidate)
        self.spent = self.spent or self.verifier.breached
        if reason:
            raise Dropped(reason)

    def sample(self, candidate: Candidate) -> float:
        def sample(candidate: Candidate) -> float:
            if self.timer is None:
                self.timer = Timer(self.case, self.where, *self.verifier.tensors())
            return self.timer.sample(candidate)

        self.prepare(candidate)
        return self._attempt(sample, candidate)

    def drop(self, candidate: Candidate) -> None:
        """This candidate will not be sampled again."""
        if self.timer is not None:
            self.timer.drop(candidate)

    def close(self) -> None:
        self._clear()
        self.case = None

    def _attempt(self, step, candidate: Candidate):
        try:
            with self._context():
                return step(candidate)
        except CaptureFailed as failure:
            self.spent = True
            raise Dropped(str(failure)) from failure
        except Exception as failure:
            raise Dropped(f"raised {describe(failure)}") from failure

    def _context(self):
        return _Context(self.where)


class _Context:
    """No gradients, and the device is the current one."""

    def __init__(self, device: torch.device):
        self.contexts = [torch.no_grad()]
        if device.type == "cuda":
            self.contexts.append(torch.cuda.device(device))

    def __enter__(self):
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *failure):
        for context in reversed(self.contexts):
            context.__exit__(*failure)
