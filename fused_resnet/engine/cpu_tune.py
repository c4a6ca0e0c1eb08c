"""Choosing among the CPU's kernels by measurement, in place: the whole network runs once with each kind of choice, so a
step is timed with the caches as they are when it really runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace

from torch import Tensor, fx

from . import cpu_program as cp
from .cache import Cache
from .graph import Graph
from .steps import Network, Step

BUDGET = 1.0  # seconds
MANY_TILES = 64
ROUNDS = 2  # at least
BATCH = 4  # a larger batch is tuned on this many of its images: what is fastest there hardly changes beyond


def kinds(program: cp.Program) -> list[Callable[[Step], cp.Choice]]:
    """Functions that choose for a convolution, the default choice first."""

    def rows(step: Step) -> tuple[int, int]:
        n, p, q, k = program.nhwc(step.output)
        return k, program.size[step.output] * p * q

    def gemm(block: int):
        def choose(step: Step) -> cp.Choice:
            if step.conv.groups > 1:
                return cp.grouped_choice(program, step, channels=64 if block > 48 else 32)
            return cp.gemm_choice(program, *rows(step), block)

        return choose

    def winograd(m: int, shared: bool | None):
        def choose(step: Step) -> cp.Choice:
            if step.conv.groups > 1:
                return cp.grouped_choice(program, step, 1 << (14 if m == 4 else 15))
            if not cp.fits_winograd(step, program.target):
                return cp.gemm_choice(program, *rows(step), 192 if m == 4 else 48)
            # Four times fewer multiplications, or two, for four times the weights, or two: with many tiles the former.
            if m == 2 and cp.tiles_of(program, step, 4, program.size[step.output]) > MANY_TILES:
                return cp.default_choice(program, step)
            return cp.winograd_choice(program, step, m, program.size[step.output], shared)

        return choose

    default = lambda step: cp.default_choice(program, step)  # noqa: E731
    return [default, gemm(96), winograd(4, True), winograd(4, False), winograd(2, True), winograd(2, False), gemm(48)]


class _Scaled:
    """A graph whose values have fewer images."""

    def __init__(self, graph: Graph, batch: int, images: int):
        self.graph, self.batch, self.images = graph, batch, images

    def __getattr__(self, name: str):
        return getattr(self.graph, name)

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        shape = self.graph.shape(node)
        return (self.images, *shape[1:]) if shape and shape[0] == self.batch else shape


def smaller(network: Network, inputs: tuple[Tensor, ...]) -> tuple[Network, tuple[Tensor, ...]]:
    """The same for at most BATCH images, the first and the last among them; as it is where traced steps may mind."""
    if not inputs or any(not x.dim() for x in inputs):
        return network, inputs
    batch = inputs[0].shape[0]
    if batch <= BATCH or any(x.shape[0] != batch for x in inputs) or any(s.op == "traced" for s in network.steps):
        return network, inputs
    rows = [*range(BATCH - 1), batch - 1]
    return replace(network, graph=_Scaled(network.graph, batch, BATCH)), tuple(x[rows] for x in inputs)


def tunable(program: cp.Program) -> list[Step]:
    """The steps that can be computed in more than one way."""
    return [s for s in program.network.steps if s.op in ("conv", "linear") and not cp.unsupported(s, program.target)]


def without_winograd(program: cp.Program) -> dict[str, cp.Choice]:
    """What else to choose for the steps that go by Winograd's filtering, by their outputs."""
    steps = [s for s in tunable(program) if program.choice(s).kernel == "winograd"]
    return {s.output: cp.default_gemm(program, s) for s in steps}


def problem(program: cp.Program, step: Step) -> str:
    """The step's name in the cache: all that its time depends on but the machine."""
    shapes = [program.nhwc(step.x), program.nhwc(step.output)]
    conv = step.conv
    parts = [program.target.name, *shapes, conv.kernel, conv.stride, conv.padding, conv.dilation, step.relu]
    parts += [f"groups{conv.groups}"] if conv.groups > 1 else []
    parts += [program.size[step.output], program.workers, step.residual is not None]
    if step.segment is not None:
        parts += [program.nhwc(step.segment[0]), step.segment[1].stride]
    return "cpu " + " ".join(str(p).replace(" ", "") for p in parts)


def recall(program: cp.Program, cache: Cache) -> dict[str, cp.Choice]:
    """What the cache has for the steps, by output."""
    found = {}
    for step in tunable(program):
        entry, _, known = cache.find(problem(program, step))
        choice = _choice(entry["chosen"]["config"], program, step) if entry is not None and known else None
        if choice is not None:
            found[step.output] = choice
    return found


def remember(program: cp.Program, chosen: dict[str, tuple[float | None, cp.Choice]], cache: Cache) -> None:
    """Keep what was measured."""
    entries = {}
    for step in tunable(program):
        seconds, choice = chosen.get(step.output, (None, None))
        if seconds is not None:
            candidate = {"backend": "cpu", "label": str(choice), "config": asdict(choice)}
            trial = {"candidate": candidate, "seconds": [seconds] * 3, "reason": None}
            entries[problem(program, step)] = {"chosen": candidate, "candidates": "", "trials": [trial]}
    cache.store(entries)


def _choice(config: dict, program: cp.Program, step: Step) -> cp.Choice | None:
    """A choice that was remembered, if it is one for this step."""
    try:
        choice = cp.Choice(**config)
    except TypeError:
        return None
    sizes = (choice.rows, choice.columns, *((choice.m, choice.tiles) if choice.kernel == "winograd" else ()))
    if not all(type(n) is int and 0 < n < 1 << 20 for n in sizes):
        return None
    if choice.kernel != "winograd" and (choice.shared or choice.m or choice.tiles):
        return None
    if choice.kernel == "grouped" or step.conv.groups > 1:
        return choice if choice.kernel == "grouped" and step.conv.groups > 1 else None
    if choice.columns % program.target.columns:
        return None
    if choice.kernel == "gemm":
        return choice
    fits = choice.kernel == "winograd" and choice.m in (2, 4) and type(choice.shared) is bool
    return choice if fits and cp.fits_winograd(step, program.target) else None


class Wrong(Exception):
    """A program's result differs from PyTorch's."""


def tune(
    program: cp.Program,
    run: Callable[[cp.Program, dict | None], None],
    build: Callable[[dict], cp.Program],
    wrong: list[str],
    budget: float = BUDGET,
) -> dict[str, tuple[float | None, cp.Choice]]:
    """(seconds or None, choice) by a step's output, the fastest of those that proved right.

    build(choices) makes a program; run(program, None) runs it, and raises Wrong; run(program, times) times its steps.
    wrong: gets a sentence for every kind of choice that was dropped. budget: seconds; one kind alone is not timed.
    """
    steps = tunable(program)
    best: dict[str, tuple[float, cp.Choice]] = {}
    programs: list[cp.Program] = []
    seen: dict[str, set[cp.Choice]] = {s.output: set() for s in steps}
    start = time.perf_counter()
    for kind in kinds(program):
        choices = {s.output: kind(s) for s in steps}
        if all(choices[s.output] in seen[s.output] for s in steps):
            continue
        for output, choice in choices.items():
            seen[output].add(choice)
        candidate = build(choices)
        began = time.perf_counter()
        try:
            run(candidate, None)
        except Wrong as error:
            wrong.append(f"dropped {', '.join(sorted({str(c) for c in choices.values()}))}: {error}")
            continue
        programs.append(candidate)
        once = time.perf_counter() - began
        # The next kind, its packing included, and two rounds of all: is there time for them?
        if time.perf_counter() - start + once * (2 + ROUNDS * (len(programs) + 1)) > budget:
            break
    rounds = 0
    while len(programs) > 1 and (rounds < ROUNDS or (rounds < 8 and time.perf_counter() - start < budget)):
        for candidate in programs:
            times: dict[str, float] = {}
            run(candidate, times)
            for step in steps:
                took = (times[step.output], candidate.choices[step.output])
                best[step.output] = min(best.get(step.output, took), took, key=lambda t: t[0])
        rounds += 1
    if len(programs) == 1:  # the only one that is right need not be the default
        return {output: (None, choice) for output, choice in programs[0].choices.items()}
    return best
