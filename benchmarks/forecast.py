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

from fused_resnet.engine import chain_cases, path
from fused_resnet.engine.cache import TABLES, read
from fused_resnet.engine.forecast import Forecast
from fused_resnet.engine.graph import capture, propagate
from fused_resnet.engine.pieces import Piece, Pieces
from fused_resnet.engine.problem import Candidate, Work
from fused_resnet.engine.steps import match

COMMAND = "python benchmarks/forecast.py --json benchmarks/results/forecast-h100.json"


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

    def forecast(self, others: Iterable[Problem]) -> tuple[float | None, float] | None:
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
    """The forecast's choices for these problems, each by its others; ratios are of seconds as measured."""
    told = [(p, found) for p in problems if (found := p.forecast(others(p))) is not None]
    over = [measured / p.best for p, (_, measured) in told]
    pytorch = [p.pytorch / p.best for p, _ in told if p.pytorch]
    off = [expected / measured for _, (expected, measured) in told if expected]
    found = {"problems": len(problems), "forecast": len(told)}
    if not told:
        return found
    return found | {
        "over_the_fastest": round(statistics.geometric_mean(over), 3),
        "most_over_the_fastest": round(max(over), 2),
        "pytorch_over_the_fastest": round(statistics.geometric_mean(pytorch), 2) if pytorch else None,
        "expected_over_measured": [round(q, 2) for q in statistics.quantiles(off, n=10)[::4]] if len(off) > 1 else None,
    }


def network(problems: list[Problem], batch: int, others: Callable[[Problem], Iterable[Problem]]) -> dict:
    """ResNet-50, float16, NHWC: microseconds, each step's as it was measured, of the way that forecasts choose, of
    the fastest, and of PyTorch's kernels."""
    known = {p.key: p for p in problems}
    graph = capture(torchvision.models.resnet50().eval())
    x = torch.empty(batch, 3, 224, 224, dtype=torch.float16, device="meta").to(memory_format=torch.channels_last)
    propagate(graph, (x,))
    steps = match(graph)
    with mock.patch.object(chain_cases.ChainArgs, "configs", lambda self: [{}]):  # which there are, the tables know
        pieces = Pieces(steps, torch.float16, torch.device("cuda"), False, {steps.placeholders[0].name: x})
    pieces.keep(known)
    keys = {piece.key for piece in pieces.all() if piece.key}
    told = {key: found for key in keys if (found := known[key].forecast(others(known[key]))) is not None}

    def way(cost: Callable[[Piece], float]) -> list[str]:
        _, chosen = path.cheapest(len(steps.steps), pieces.moves(lambda piece: cost(piece) if piece.key else 0.0))
        return [piece.key for piece in chosen if piece.key]

    def expected(piece: Piece) -> float:  # as in engine/gpu.py
        return (piece.key in told and told[piece.key][0]) or float(len(piece.steps) > 1)

    def pytorch(piece: Piece) -> float:
        return known[piece.key].pytorch or 1.0  # a chain has none

    ways = {
        "forecast": [told[key][1] if key in told else known[key].pytorch for key in way(expected)],
        "fastest": [known[key].best for key in way(lambda piece: known[piece.key].best)],
        "pytorch": [known[key].pytorch for key in way(pytorch)],
    }
    return {name: round(1e6 * sum(seconds), 1) for name, seconds in ways.items()}


def report(environment: dict, problems: list[Problem]) -> dict:
    def one(p: Problem) -> Iterable[Problem]:
        return (q for q in problems if q is not p)

    def batches(p: Problem) -> Iterable[Problem]:
        return (q for q in problems if q.batch != p.batch)

    found: dict = {
        "command": {"line": COMMAND, "times": "those of the package's tables, in microseconds where not quotients"},
        "measured in": environment,
        "one left out": {},
        "its batch left out": {},
        "resnet50, its batch left out": {},
    }
    for what in ("conv", "chain", "stem"):
        these = [p for p in problems if p.work.kind.startswith(what)]
        found["one left out"][what] = judge(these, one)
        for batch in sorted({p.batch for p in these}):
            found["its batch left out"][f"{what}, batch {batch}"] = judge(
                [p for p in these if p.batch == batch], batches
            )
    for batch in (1, 128):
        found["resnet50, its batch left out"][f"batch {batch}"] = network(problems, batch, batches)
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
