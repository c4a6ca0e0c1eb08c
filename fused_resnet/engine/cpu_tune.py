"""Choosing among the CPU's kernels by measurement, in place: the whole network runs once with each kind of choice, so a
step is timed with the caches as they are when it really runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, fx

from . import cpu_program as cp
from .graph import Graph
from .steps import Network, Step

BUDGET = 1.0  # seconds
ROUNDS = 2  # at least
BATCH = 4  # a larger batch is tuned on this many of its images: what is fastest there hardly changes beyond


def kinds(program: cp.Program) -> list[Callable[[Step], cp.Choice]]:
    """Functions that choose for a convolution, the default choice first."""

    def rows(step: Step) -> tuple[int, int]:
        n, p, q, k = program.nhwc(step.output)
        return k, program.size[step.output] * p * q

    def gemm(block: int):
        return lambda step: cp.gemm_choice(program, *rows(step), block)

    def winograd(m: int, shared: bool | None):
        def choose(step: Step) -> cp.Choice:
            if not cp.fits_winograd(step, program.target):
                return cp.gemm_choice(program, *rows(step), 192 if m == 4 else 48)
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


class Wrong(Exception):
    """A program's result differs from PyTorch's."""


def tune(
    program: cp.Program,
    run: Callable[[cp.Program, dict | None], None],
    build: Callable[[dict], cp.Program],
    wrong: list[str],
    budget: float = BUDGET,
) -> dict[str, cp.Choice]:
    """Choices by a step's output, the fastest of those that proved right.

    build(choices) makes a program; run(program, None) runs it, and raises Wrong; run(program, times) times its steps.
    wrong: gets a sentence for every kind of choice that was dropped. budget: seconds; one kind alone is not timed.
    """
    steps = [s for s in program.network.steps if s.op in ("conv", "linear") and not cp.unsupported(s, program.target)]
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
        return programs[0].choices
    return {output: choice for output, (_, choice) in best.items()}
