"""What a network became: its steps in order, what computes each, what it must move and compute, and its time."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import fx

from . import machine
from .steps import Network, Step, weights_of

RUNGS = {"conv": 1, "stem": 2, "norm": 0, "linear": 1, "max_pool": 0, "avg_pool": 0, "traced": 0}


@dataclass
class PlannedStep:
    """layers: names of the model's layers, in order. rung: of the ladder of fusion (0: a layer by itself). backend and
    config: what computes it, and how. bytes, flops (2 x MAC, of the direct method): what it must move and compute.
    measured_s: seconds, None until measured. why: for a step that no kernel here computes, the reason.
    """

    layers: tuple[str, ...]
    op: str  # of the steps, joined by +
    rung: int
    backend: str
    config: str
    bytes: int
    flops: int
    measured_s: float | None = None
    why: str = ""

    def floor_s(self, rates: tuple[float, float]) -> float:
        """Seconds that no implementation by the direct method undercuts, at (FLOP/s, bytes/s)."""
        return max(self.flops / rates[0], self.bytes / rates[1])


@dataclass
class Plan:
    """The plan of one input shape. `str()` of it is a table."""

    model: str
    device: str
    dtype: torch.dtype
    shapes: tuple
    steps: list[PlannedStep]
    notes: list[str] = field(default_factory=list)

    @property
    def rates(self) -> tuple[float, float] | None:
        """(FLOP/s, bytes/s) that this device was measured to reach in this process; None for a dtype without a rate."""
        return _rates(torch.device(self.device), self.dtype)

    @property
    def flop_share(self) -> float:
        """Share of the FLOP that planned steps compute, 0 to 1; the rest runs as it was traced."""
        total = sum(s.flops for s in self.steps)
        return sum(s.flops for s in self.steps if s.op != "traced") / total if total else 1.0

    @property
    def traced(self) -> list[PlannedStep]:
        """The nodes that matched nothing and run as they were traced."""
        return [s for s in self.steps if s.op == "traced"]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        rates = self.rates
        lines = [
            f"{self.model}, {dtype} {' '.join(str(list(s)) for s in self.shapes)} on {self.device}: {len(self.steps)} "
            f"steps, {100 * self.flop_share:.1f} % of {sum(s.flops for s in self.steps) / 1e9:.2f} GFLOP planned"
        ]
        rows = [("", "layers", "rung", "backend", "how", "MFLOP", "MB", "floor us", "us", "of floor")]
        for i, s in enumerate(self.steps):
            floor = s.floor_s(rates) if rates else None
            share = f"{100 * floor / s.measured_s:.0f} %" if floor and s.measured_s else ""
            name = s.layers[0] if len(s.layers) == 1 else f"{s.layers[0]} .. {s.layers[-1]} ({len(s.layers)})"
            rows.append(
                (
                    str(i), name, str(s.rung or "-"), s.backend, s.config or s.why, f"{s.flops / 1e6:.1f}",
                    f"{s.bytes / 1e6:.2f}", _us(floor), _us(s.measured_s), share,
                )
            )  # fmt: skip
        widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
        for r in rows:
            cells = [
                t.ljust(w) if c in (1, 3, 4) else t.rjust(w) for c, (t, w) in enumerate(zip(r, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        measured = [s.measured_s for s in self.steps]
        if rates and all(t is not None for t in measured):
            floor = sum(s.floor_s(rates) for s in self.steps)
            lines.append(
                f"sum {1e3 * sum(measured):.3f} ms, floor {1e3 * floor:.3f} ms at {rates[0] / 1e9:.0f} GFLOP/s and "
                f"{rates[1] / 1e9:.1f} GB/s, both measured here (Winograd multiplies less than the floor counts)"
            )
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


@functools.cache
def _rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float] | None:
    try:
        found = machine.measured(device, dtype)
    except (RuntimeError, ValueError):
        return None
    return found.rate, found.bandwidth


def _us(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.1f}"


@dataclass(frozen=True)
class Group:
    """Steps that are computed together, and how. seconds: measured, or None. why: for what no kernel here computes."""

    steps: tuple[Step, ...]
    rung: int
    backend: str
    config: str = ""
    seconds: float | None = None
    why: str = ""


def alone(step: Step, backend: str, config: str = "", seconds: float | None = None, why: str = "") -> Group:
    """The group of one step."""
    return Group((step,), 3 if step.segment is not None else RUNGS[step.op], backend, config, seconds, why or step.why)


def describe(network: Network, dtype: torch.dtype, groups: list[Group]) -> list[PlannedStep]:
    """The groups of a network as a plan lists them."""
    graph, source = network.graph, network.source
    by_name = {n.name: n for n in graph.nodes}
    wanted = network.outputs | {source(name) for g in groups for s in g.steps for name in s.reads}
    planned = []
    for group in groups:
        nodes = [by_name[name] for step in group.steps for name in step.layers]
        made = [step.output for step in group.steps]
        read = {source(name) for step in group.steps for name in step.reads} - set(made)
        inner = {source(name) for step in group.steps for name in step.reads} & set(made)
        outer = {source(n) for g in groups if g is not group for s in g.steps for n in s.reads}
        written = [m for m in made if m in wanted and not (m in inner and m not in outer)] or made[-1:]
        moved = sum(_numel(graph.shape(by_name[v])) for v in (*read, *written) if v in by_name)
        planned.append(
            PlannedStep(
                tuple(_label(n) for n in nodes),
                "+".join(step.op for step in group.steps),
                group.rung,
                group.backend,
                group.config,
                (moved + sum(weights_of(step) for step in group.steps)) * dtype.itemsize,
                sum(graph.flops.get(n, 0) for n in nodes),
                group.seconds,
                group.why,
            )
        )
    return planned


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _numel(shape) -> int:
    total = 1
    for n in shape or (0,):
        total *= n
    return total
