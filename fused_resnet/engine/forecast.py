"""What was measured of some problems says of others like them: which candidate is fastest, and about how long it takes.

On a GPU that nobody tuned for, or at another batch size, what won in the most similar problems is nearly as fast as the
best (`python benchmarks/forecast.py` says how nearly). It is a guess all the same: what it names is compared with the
reference like anything else, its time is called expected, never measured, and `tune="full"` measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean

from .problem import Candidate, Work

# Of an H100, about. What is forecast depends on quotients of two floors only, which other GPUs hardly change.
FLOP_RATE, BYTE_RATE, LAUNCH = 8e14, 3e12, 1.5e-6  # per second, per second, seconds
# Distances: the square of how many doublings lie between the positions of two problems counts whole, those of other
# sizes half, and traits that differ as much as here.
OTHER_SIZES, TRAITS = 0.5, {"stride": 0.5, "segment": 0.5, "residual": 1.0}
ANY_TRAIT = 0.5
FAR = 16.0  # four doublings of the positions; farther away others tell which is fastest, but not how fast it is
REACH = 2.0  # so much farther away evidence counts 1/e
UNKNOWN, FAILED = 4.0, 16.0  # how much slower is a backend that nobody tried, and what was wrong or did not run
UNTRIED = 1.1  # and what was not tried beside its backend's others


class _Measured:
    """One problem: how fast the best candidate was, and how much slower the others, in logarithms."""

    def __init__(self, work: Work, seconds: dict[Candidate, float], failed: list[Candidate]):
        self.work, self.best = work, min(seconds.values())
        self.slower = {c.id: math.log(FAILED) for c in failed}
        self.slower |= {c.id: math.log(s / self.best) for c, s in seconds.items()}
        of_backends: dict[str, list[float]] = {}
        for c in seconds:
            of_backends.setdefault(c.backend, []).append(self.slower[c.id])
        self.backends = {backend: fmean(logs) for backend, logs in of_backends.items()}


class Forecast:
    """Of the entries of a Cache that tell what work they are of; others say nothing."""

    def __init__(self, entries: Iterable[dict]):
        self.by_kind: dict[str, list[_Measured]] = {}
        for entry in entries:
            if not (facts := entry.get("work")):
                continue
            trials = [(Candidate(**t["candidate"]), t) for t in entry["trials"]]
            seconds = {c: t["seconds"][0] for c, t in trials if t["seconds"] and not t["reason"]}
            if seconds:
                known = _Measured(Work(**facts), seconds, [c for c, t in trials if t["reason"]])
                self.by_kind.setdefault(known.work.kind, []).append(known)

    def order(self, work: Work | None, candidates: Iterable[Candidate]) -> list[Candidate] | None:
        """The candidates, those first that are expected to be fastest; None where no work of this kind was measured."""
        near = self._near(work)
        return sorted(candidates, key=lambda c: _slowdown(c, near)) if near else None

    def seconds(self, work: Work | None, candidate: Candidate) -> float | None:
        """About how long it takes; None where nothing was measured that is near enough to tell."""
        near = self._near(work, FAR)
        if not near:
            return None
        total = sum(weight for _, weight in near)
        log_share = sum(weight * math.log(known.best / floor(known.work)) for known, weight in near) / total
        return floor(work) * math.exp(log_share) * _slowdown(candidate, near)

    def _near(self, work: Work | None, far: float = math.inf) -> list[tuple[_Measured, float]]:
        """(what was measured, its weight) of this kind; the nearest has the weight 1."""
        kind = [] if work is None else self.by_kind.get(work.kind, [])
        known = [(m, distance(work, m.work)) for m in kind if m.work.sizes.keys() == work.sizes.keys()]
        nearest = min((d for _, d in known), default=math.inf)
        return [(m, math.exp((nearest - d) / REACH)) for m, d in known] if nearest <= far else []


def _slowdown(candidate: Candidate, near: list[tuple[_Measured, float]]) -> float:
    """How much slower than the best it is expected to be: the mean over those near it, in logarithms. Where it was not
    among the candidates, its backend's others stand for it."""
    others = _mean([(m.backends.get(candidate.backend), weight) for m, weight in near], math.log(UNKNOWN / UNTRIED))
    return math.exp(_mean([(m.slower.get(candidate.id), weight) for m, weight in near], others + math.log(UNTRIED)))


def _mean(evidence: list[tuple[float | None, float]], guess: float) -> float:
    """Of the values that are there, by their weights; the guess, where none is."""
    there = [(value, weight) for value, weight in evidence if value is not None]
    total = sum(weight for _, weight in there)
    return sum(weight * value for value, weight in there) / total if total else guess


def floor(work: Work) -> float:
    """Seconds that the work takes at least."""
    return max(work.flops / FLOP_RATE, work.bytes / BYTE_RATE) + LAUNCH


def distance(a: Work, b: Work) -> float:
    """Between two works of one kind, which have the same sizes by name."""
    doublings = {name: math.log2(size / b.sizes[name]) for name, size in a.sizes.items()}
    found = sum((1.0 if name == "positions" else OTHER_SIZES) * d * d for name, d in doublings.items())
    names = a.traits.keys() | b.traits.keys()
    return found + sum(TRAITS.get(n, ANY_TRAIT) for n in names if a.traits.get(n) != b.traits.get(n))
