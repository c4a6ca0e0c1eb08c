"""What is tuned: a problem, which any process can rebuild from JSON, and the candidates that solve it."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

# Of |v - reference| / |reference|, 2-norms. One element may be off by ten times that of |reference| + rms(reference).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Candidate:
    """One way to solve a problem: the backend's name, a label for people, and a config that JSON can hold."""

    backend: str
    label: str
    config: dict = field(default_factory=dict, hash=False)

    @functools.cached_property
    def id(self) -> str:
        """What tells candidates of one problem apart; the label does not."""
        return json.dumps([self.backend, self.config], sort_keys=True)

    def __str__(self):
        return f"{self.backend}: {self.label}"


@dataclass(frozen=True)
class Problem:
    """key: its name in reports and in the cache; factory: 'module:function'; args: what JSON can hold, the function's
    keyword arguments. The function returns a Case."""

    key: str
    factory: str
    args: dict = field(default_factory=dict, hash=False)

    def build(self) -> Case:
        module, colon, name = self.factory.partition(":")
        if not colon:
            raise ValueError(f"factory: expected 'module:function', got {self.factory!r}")
        return getattr(importlib.import_module(module), name)(**self.args)

    @functools.cached_property
    def id(self) -> str:
        """The key, and a digest of what it stands for: two networks may use one key for different things."""
        digest = hashlib.sha256(json.dumps([self.factory, self.args], sort_keys=True).encode()).hexdigest()
        return f"{self.key} #{digest[:16]}"

    def as_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """What a problem computes and moves, and what tells how alike two are: of one kind, by the quotients of their
    sizes, and by their traits. flops: 2 x MAC; bytes: what has to be read and written once."""

    kind: str
    sizes: dict[str, int]
    traits: dict[str, bool | int | str]
    flops: int
    bytes: int


class Case:
    """A problem ready to run. Subclasses define candidates, inputs, outputs, reference and run.

    device: where it runs.
    trusted: its candidates may run in this process before they were verified; for a CPU's libraries.
    tolerance: by dtype of the output, the relative error (2-norm) that a candidate may have.
    work: what it computes; None says nothing, and nothing is forecast.
    fallback: the candidate to take when none of `candidates()` is right; None: that is an error.
    """

    device: torch.device | str = "cpu"
    trusted: bool = False
    tolerance: dict[torch.dtype, float] = TOLERANCE
    work: Work | None = None
    fallback: Candidate | None = None

    def candidates(self) -> list[Candidate]:
        """The first is the default: what runs where nothing was measured."""
        raise NotImplementedError

    def inputs(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """Random inputs, fresh, strided as the network's own."""
        raise NotImplementedError

    def outputs(self, device: torch.device) -> dict[str, Tensor]:
        """Empty outputs, fresh. One that the reference does not return is workspace: guarded, not compared."""
        raise NotImplementedError

    def reference(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the outputs have to be, in float32 or float64."""
        raise NotImplementedError

    def run(self, candidate: Candidate, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Write the outputs, on the current stream, without waiting for it. On a GPU it is captured in a graph."""
        raise NotImplementedError

    def timed(self, candidate: Candidate, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> object:
        """What of `run` is timed: all of it, unless a network has no use for some, as for a copy of a result."""
        return self.run(candidate, inputs, outputs)

    def prepare(self, candidate: Candidate) -> None:
        """What is done once in a process before a candidate runs, and not timed: compile."""

    def compile(self, candidate: Candidate) -> None:
        """What fills an on-disk cache that `prepare` then reads; called in several processes at a time."""
        self.prepare(candidate)

    def compiles(self, candidate: Candidate) -> bool:
        """Whether calling `compile` in other processes first is worth it."""
        return candidate.backend == "triton"

    def pack(self, candidate: Candidate, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs as `run` wants them (weights in another layout, workspace added); not timed. A tensor handed on
        as it is stays guarded."""
        return inputs


def default_device(case: Case, device: torch.device | str | None) -> torch.device:
    device = torch.device(case.device if device is None else device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def distinct(case: Case) -> list[Candidate]:
    """The candidates without repetitions, in their order."""
    return list({c.id: c for c in reversed(case.candidates())}.values())[::-1]


def candidates_digest(candidates: list[Candidate]) -> str:
    """Changes when a choice was made among other candidates than those there are now."""
    return hashlib.sha256(json.dumps(sorted(c.id for c in candidates)).encode()).hexdigest()[:16]


def describe(failure: BaseException) -> str:
    """An exception in one line."""
    text = next((line.strip() for line in str(failure).splitlines() if line.strip()), "")
    return f"{type(failure).__name__}: {text}"[:500].rstrip(": ")
