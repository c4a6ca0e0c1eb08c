"""How good are forecasts? Problems that were measured are left out of the tables and chosen for by what remains.

    python benchmarks/forecast.py --json benchmarks/results/forecast-h100.json

What is printed are times that were measured when the tables were: of the candidate that the forecast names, beside the
fastest there was and beside PyTorch's kernels. Nothing runs, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import torch
import torchvision

from fused_resnet.engine import chain_cases, gpu
from fused_resnet.engine.cache import TABLES, read
from fused_resnet.engine.forecast import Forecast
from fused_resnet.engine.graph import capture, propagate
from fused_resnet.engine.pieces import Pieces
from fused_resnet.engine.problem import Candidate, Work
from fused_resnet.engine.steps import match
from fused_resnet.engine.tune import Result, Results

COMMAND = "python benchmarks/forecast.py --json benchmarks/results/forecast-h100.json"


Chosen = tuple[float | None, float]  # expected and measured seconds of what is chosen


class Problem:
    """One that was measured: what work it is, and the seconds of its candidates."""

    def __init__(self, id: str, entry: dict):
        self.id, self.key, self.entry, self.work = id, id.rpartition(" #")[0], entry, Work(**entry["work"])
        trials = [t for t in entry["trials"] if t["seconds"] and not t["reason"]]
        self.candidates = [Candidate(**t["candidate"]) for t in trials]
        self.seconds = {c.id: t["seconds"][0] for c, t in zip(self.candidates, trials, strict=True)}
        self.best = min(self.seconds.values())
        # cuDNN's, and of those with an add the quicker of two.
        self.pytorch = min((self.seconds[c.id] for c in self.candidates if c.backend == "cudnn"), default=None)

    @property
    def batch(self) -> int:
        """conv 3x3/1 128x64x56x56 -> 64, chain 128x64x56x56/1 -> 64, linear 128x2048 -> 1000, stem 128x3x224x224"""
        place = 2 if self.key.startswith("conv") else 1
        return int(self.key.split()[place].split("x")[0])

    def forecast(self, others: Iterable[Problem]) -> Chosen | None:
        """(expected, measured) seconds of what is chosen by what was measured of others; None if those say nothing."""
        known = Forecast(p.entry for p in others)
        if (order := known.order(self.work, self.candidates)) is None:
            return None
        return known.seconds(self.work, order[0]), self.seconds[order[0].id]


def tables(folder: Path = TABLES) -> tuple[dict, list[Problem]]:
    """(environment, problems) of the package's tables; those of a later one replace an earlier one's."""
    entries, environment = {}, {}
    for file in sorted(folder.glob("*.json"), reverse=True):
        measured_in, found = read(file, print)
        entries |= {id: entry for id, entry in found.items() if entry["work"] and id not in entries}
        environment = environment or measured_in
    return environment, [
        Problem(id, entry) for id, entry in entries.items() if any(t["seconds"] for t in entry["trials"])
    ]


def judge(problems: list[Problem], others: Callable[[Problem], Iterable[Problem]]) -> dict:
    """The forecast's choices for these problems, each by its others; quotients are of seconds as measured."""
    told = [(p, found) for p in problems if (found := p.forecast(others(p))) is not None]
    over = [measured / p.best for p, (_, measured) in told]
    pytorch = [p.pytorch / p.best for p, _ in told if p.pytorch]
    off = [expected / measured for _, (expected, measured) in told if expected]
    return {
        "problems": len(problems),
        "forecast": len(told),
        "over_the_fastest": round(statistics.geometric_mean(over), 3) if over else None,
        "most_over_the_fastest": round(max(over), 2) if over else None,
        "pytorch_over_the_fastest": round(statistics.geometric_mean(pytorch), 2) if pytorch else None,
        "expected_over_measured": [round(q, 2) for q in statistics.quantiles(off, n=10)[::4]] if len(off) > 1 else None,
    }


def network(problems: list[Problem], batch: int, choose: Callable[[Problem], Chosen | None]) -> dict:
    """ResNet-50, float16, NHWC: microseconds, each step's as it was measured, by the way that "cached" goes where
    choose tells what is known, by the fastest, and by PyTorch's kernels."""
    known = {p.key: p for p in problems}
    graph = capture(torchvision.models.resnet50().eval())
    x = torch.empty(batch, 3, 224, 224, dtype=torch.float16, device="meta").to(memory_format=torch.channels_last)
    propagate(graph, (x,))
    steps = match(graph)
    with mock.patch.object(chain_cases.ChainArgs, "configs", lambda self: [{}]):  # which there are, the tables know
        pieces = Pieces(steps, torch.float16, torch.device("cuda"), False, {steps.placeholders[0].name: x})
    pieces.keep(known)
    keys = {piece.key: piece.args.problem() for piece in pieces.all() if piece.args is not None}
    chosen = {key: found for key in keys if (found := choose(known[key])) is not None}

    def result(key: str, expected: float | None) -> Result:
        return Result(key, known[key].candidates[0], "forecast", True, expected=expected)

    def tuned(some: Iterable[str]) -> Results:  # where nothing is known, a step is PyTorch's, and a chain is not there
        there = [key for key in some if key in chosen or known[key].pytorch]
        return Results((key, result(key, chosen[key][0] if key in chosen else None)) for key in there)

    def best(seconds: Callable[[Problem], float | None]) -> list[str]:
        costs = {key: cost for key in keys if (cost := seconds(known[key]))}
        results = Results((key, result(key, cost)) for key, cost in costs.items())
        return [piece.key for piece in gpu.cheapest(steps, pieces, results) if piece.key]

    fastest, library = best(lambda p: p.best), best(lambda p: p.pytorch)
    costs = {key: expected for key, (expected, _) in chosen.items() if expected}
    results = gpu.on_the_way(steps, pieces, keys, costs, tuned)
    way = [piece.key for piece in gpu.cheapest(steps, pieces, results) if piece.key]
    seconds = {
        "forecast": [chosen[key][1] if key in chosen else known[key].pytorch for key in way],
        "fastest": [known[key].best for key in fastest],
        "pytorch": [known[key].pytorch for key in library],
    }
    return {name: round(1e6 * sum(times), 1) for name, times in seconds.items()}


def report(environment: dict, problems: list[Problem]) -> dict:
    def other_sizes(p: Problem) -> Iterable[Problem]:  # so that no near-twin with another shortcut knows it
        return (q for q in problems if q.work.sizes != p.work.sizes)

    def other_batches(p: Problem) -> Iterable[Problem]:
        return (q for q in problems if q.batch != p.batch)

    found: dict = {
        "command": {"line": COMMAND, "times": "those of the package's tables; microseconds where not quotients"},
        "measured in": environment,
        "its sizes left out": {},
        "its batch left out": {},
        "resnet50, its batch left out": {},
    }
    for what in ("conv", "chain", "stem", "avg_pool"):
        these = [p for p in problems if p.work.kind.startswith(what)]
        found["its sizes left out"][what] = judge(these, other_sizes)
        for batch in sorted({p.batch for p in these}):
            alike = [p for p in these if p.batch == batch]
            found["its batch left out"][f"{what}, batch {batch}"] = judge(alike, other_batches)
    for batch in (1, 128):
        way = network(problems, batch, lambda p: p.forecast(other_batches(p)))
        found["resnet50, its batch left out"][f"batch {batch}"] = way
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="a file to write")
    arguments = parser.parse_args()
    found = report(*tables())
    for title, rows in found.items():
        print(title)
        for name, row in rows.items():
            print(f"  {name}: {row}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
