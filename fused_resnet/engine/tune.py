"""Choose among candidates by measurement, and never a wrong one.

    results = tune([Problem("layer1.conv", "package.module:make_case", {"n": 8})], mode="full")
    print(results)
    results["layer1.conv"].chosen

Every candidate is compared with the case's reference on random inputs before it is timed and, on other inputs, after.
What the cache does not know runs in another process (child.py), unless the case says that its candidates are trusted.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import cache as caches
from .bench import Bench, Dropped, Unusable
from .cache import Cache
from .child import Child, Limits, compile_all
from .forecast import Forecast
from .nursery import Nursery
from .problem import Candidate, Case, Problem, candidates_digest, default_device, distinct
from .progress import Bar
from .timing import percentiles, race

logger = logging.getLogger("fused_resnet")

MODES = ("full", "cached", "off")
BEFORE, AFTER = 0, 1  # the seeds of the inputs on which a candidate is verified
ENOUGH_ROUNDS = 3  # of a result that is worth keeping
FORECASTS = 3  # so many that fail, and the default is tried
NOT_TRIED = "not tried: the time for tuning ran out"


@dataclass
class Trial:
    """One candidate: its p20, p50 and p80 in seconds, or (reason) why it is out."""

    candidate: Candidate
    seconds: tuple[float, float, float] | None = None
    reason: str | None = None

    def __str__(self):
        if self.reason:
            return f"{self.candidate}: {self.reason}"
        if self.seconds is None:
            return f"{self.candidate}: not timed"
        p20, p50, p80 = (1e6 * s for s in self.seconds)
        return f"{self.candidate}: {p50:.1f} us ({p20:.1f} to {p80:.1f})"


@dataclass
class Result:
    """source: 'measured' now; 'cache' or 'table': measured earlier; 'forecast': the first that is right in the order of
    what was fastest in problems like it, not timed; 'default': the first that is right, not timed; 'fallback': none was
    right. verified: whether it was compared with the reference in this call. expected: seconds, by the forecast."""

    key: str
    chosen: Candidate
    source: str
    verified: bool
    trials: list[Trial] = field(default_factory=list)
    flops: int = 0
    bytes: int = 0
    expected: float | None = None

    @property
    def seconds(self) -> tuple[float, float, float] | None:
        """p20, p50 and p80 of the chosen candidate, if it was ever timed."""
        return next((t.seconds for t in self.trials if t.candidate.id == self.chosen.id), None)

    def __str__(self):
        head = f"{self.key}: {Trial(self.chosen, self.seconds)}, {self.source}"
        if self.expected and not self.seconds:
            head += f", expected {1e6 * self.expected:.1f} us"
        if self.seconds and self.flops:
            per_s = 1 / self.seconds[1]
            head += f", {self.flops * per_s / 1e12:.2f} TFLOP/s, {self.bytes * per_s / 1e9:.0f} GB/s"
        return "\n".join([head, *(f"    {t}" for t in self.trials if t.candidate.id != self.chosen.id)])


class Results(dict[str, Result]):
    """Results by the problem's key."""

    def __str__(self):
        return "\n".join(str(result) for result in self.values())


def tune(
    problems: Iterable[Problem],
    mode: str = "full",
    *,
    cache: Cache | Path | str | bool | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    budget_s: float | None = None,
    jobs: int | None = None,
    limits: Limits | None = None,
) -> Results:
    """The best candidate of each problem.

    mode: 'full' measures what the cache does not know; 'cached' measures nothing: what neither the cache nor the
    package's tables know gets the first of its candidates that is right, in the order that is forecast of what they do
    know, of this GPU and others of its generation; 'off' takes the first candidate as it is, and nothing runs, is read
    or written.
    cache: its folder (None: FUSED_RESNET_CACHE or ~/.cache/fused_resnet), False for none, or a Cache.
    device: None for the cases' own. progress: a bar on stderr; None: if that is a terminal.
    budget_s: about how long to measure; a candidate that was not reached is out, and its problem is not cached.
    jobs: processes that compile; None: one a core, 16 at most. limits: when a child is taken to hang.
    Raises RuntimeError if no candidate of a problem is right and it has no fallback; what was measured is kept.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    work: dict[str, tuple[Problem, Case]] = {}
    for problem in problems:
        if problem.key not in work:
            work[problem.key] = problem, problem.build()
        elif work[problem.key][0] != problem:
            raise ValueError(f"problems: two different ones have the key {problem.key!r}")
    for key, (_, case) in work.items():
        if not case.candidates():
            raise RuntimeError(f"{key}: there is no candidate")
    if mode == "off" or not work:
        return Results((k, _result(k, case, case.candidates()[0], "default", False)) for k, (_, case) in work.items())
    tuner = _Tuner(_one_device([case for _, case in work.values()], device), cache, limits or Limits(), budget_s)
    try:
        return tuner.tune(work, mode, progress, _cores() if jobs is None else jobs)
    finally:
        tuner.close()


def _timed(result: Result) -> int:
    return sum(trial.seconds is not None for trial in result.trials)


def _cores() -> int:
    """At most 16: each process that compiles may hold a context on the GPU."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(here, 16)


def _result(key: str, case: Case, chosen: Candidate, source: str, verified: bool, trials: list[Trial] = ()) -> Result:
    work = (case.work.flops, case.work.bytes) if case.work else (0, 0)
    return Result(key, chosen, source, verified, list(trials), *work)


def _cache(cache: Cache | Path | str | bool | None, device: torch.device) -> Cache:
    if isinstance(cache, Cache):
        return cache
    folder = None if cache is False else caches.folder() if cache is None or cache is True else Path(cache)
    return Cache(folder, caches.environment(device))


def expected(
    problems: Iterable[Problem],
    *,
    cache: Cache | Path | str | bool | None = None,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """key: seconds that the problem takes with what `tune(..., "cached")` would choose, as it was measured, or as it is
    forecast of problems like it. Nothing runs; where nothing is known, nothing is said.

    cache, device: as in `tune`.
    """
    work = [(problem, problem.build()) for problem in problems]
    if not work:
        return {}
    known = _cache(cache, _one_device([case for _, case in work], device))
    forecast, found = Forecast(known.alike()), {}
    for problem, case in work:
        result, seconds = _known(known, problem, case), None
        if result is not None:
            seconds = result.seconds and result.seconds[0]  # of one that nothing was right for, none
        elif order := forecast.order(case.work, distinct(case)):
            seconds = forecast.seconds(case.work, order[0])
        if seconds is not None:
            found[problem.key] = seconds
    return found


def _one_device(found: Iterable[Case], device: torch.device | str | None) -> torch.device:
    places = {default_device(case, device) for case in found}
    if len(places) > 1:
        raise ValueError(f"device: the problems are on several devices: {', '.join(sorted(map(str, places)))}")
    return places.pop()


def _known(cache: Cache, problem: Problem, case: Case) -> Result | None:
    """What the cache or a table has of it, if there still is such a candidate; not verified."""
    entry, source, _ = cache.find(problem.id)
    if entry is None:
        return None
    chosen = Candidate(**entry["chosen"])
    if chosen.id not in {c.id for c in [*case.candidates(), *([case.fallback] if case.fallback else [])]}:
        return None
    seconds = ((t, t["seconds"]) for t in entry["trials"])
    trials = [Trial(Candidate(**t["candidate"]), s and tuple(s), t["reason"]) for t, s in seconds]
    return _result(problem.key, case, chosen, source, False, trials)


class _Tuner:
    def __init__(self, device: torch.device, cache, limits: Limits, budget_s: float | None):
        self.device, self.limits = device, limits
        self.deadline = time.monotonic() + (float("inf") if budget_s is None else budget_s)
        self.cache = _cache(cache, device)
        self.forecast = Forecast(self.cache.alike())
        self.failed: dict[tuple[str, str], str] = {}  # by problem and candidate: why what was chosen earlier is not now
        self.untold: dict[str, dict] = {}  # entries of the cache's from before they told what work they are of
        self.nursery = Nursery()
        self.local, self.child = Bench(device), Child(self.nursery, device, limits)

    def close(self) -> None:
        self.local.close()
        self.child.close()
        self.nursery.close()

    def tune(self, work: dict[str, tuple[Problem, Case]], mode: str, progress: bool | None, jobs: int) -> Results:
        results = Results.fromkeys(work)  # in the order that was asked for
        units = {key: 2 * len(distinct(case)) for key, (_, case) in work.items()}
        with Bar(sum(units.values()), progress) as bar:
            for key, (problem, case) in work.items():
                bar.tell(f"{key}: what is known")
                results[key] = self._recall(problem, case, mode)
                if results[key] is not None:
                    bar.advance(units[key])
            self.cache.store(self.untold)
            left = {key: work[key] for key, result in results.items() if result is None}
            if self.device.type == "cuda" and left:
                torch.cuda.empty_cache()  # the child needs room beside this process
            if mode != "full":
                failed = self._compile(left, jobs, bar, most=1) | self.failed
                for key, (problem, case) in left.items():
                    bar.tell(key)
                    results[key] = self._first(problem, case, failed)
                    bar.advance(units[key])
                return results
            failed = self._compile(left, jobs, bar)
            if any(not case.trusted for _, case in left.values()):
                self.child.warm_up()  # or the first problem pays for it
            shares: dict[str, float] = {}
            count = len(left)
            for i, (key, (problem, case)) in enumerate(list(left.items())):
                bar.tell(key)
                start, now = bar.count, time.monotonic()
                shares[key] = max(0.0, self.deadline - now) / (count - i)
                results[key], complete = self._measure(problem, case, failed, now + shares[key], bar)
                bar.advance(start + units[key] - bar.count)
                if complete:
                    left.pop(key)
            self._again(left, shares, failed, results)
        return results

    def _again(self, left: dict[str, tuple[Problem, Case]], shares: dict[str, float], failed: dict, results: Results):
        """Once more, those that had too little time, where others left more than they had."""
        for i, (key, (problem, case)) in enumerate(left.items()):
            now = time.monotonic()
            share = (self.deadline - now) / (len(left) - i)
            if not share > shares[key]:
                continue
            try:
                again, complete = self._measure(problem, case, failed, now + share, Bar(0, False))
            except RuntimeError as failure:  # it has a result
                logger.warning("%s", failure)
                continue
            if complete or _timed(again) > _timed(results[key]):
                results[key] = again

    def _bench(self, case: Case) -> Bench | Child:
        return self.local if case.trusted else self.child

    def _open(self, bench: Bench | Child, problem: Problem, case: Case, seed: int) -> None:
        if isinstance(bench, Bench):
            bench.open(problem, case)
        else:
            bench.open(problem)
        bench.load(seed)

    def _recall(self, problem: Problem, case: Case, mode: str) -> Result | None:
        """What the cache or a table knows, if it is still right."""
        entry, _, known = self.cache.find(problem.id)
        result = _known(self.cache, problem, case)
        if result is None:
            return None
        if mode == "full" and not (known and entry["candidates"] == candidates_digest(distinct(case))):
            return None
        chosen = result.chosen
        bench = self.local if known or case.trusted else self.child
        try:
            self._open(bench, problem, case, BEFORE)
            bench.verify(chosen)
        except (Dropped, Unusable) as failure:
            logger.warning("%s: %s, chosen earlier, %s; the choice is made again", problem.key, chosen, failure)
            if isinstance(failure, Dropped) and "OutOfMemoryError" not in str(failure):  # else it may do another time
                self.failed[problem.id, chosen.id] = f"chosen earlier, {failure}"
            return None
        finally:
            self.local.close()
        if mode == "full" and case.work and "work" not in entry:
            self.untold[problem.id] = entry | {"work": asdict(case.work)}
        result.verified = True
        return result

    def _ordered(self, case: Case, first: int = 1) -> list[Candidate]:
        """The candidates: so many of those that are expected to be fastest, then the default, then the others."""
        candidates = distinct(case)
        order = self.forecast.order(case.work, candidates) or candidates
        return list({c.id: c for c in [*order[:first], candidates[0], *order]}.values())

    def _compile(
        self, work: dict[str, tuple[Problem, Case]], jobs: int, bar: Bar, most: int | None = None
    ) -> dict[tuple[str, str], str]:
        """Of each problem's candidates, those first that are expected to be fastest; most: how many."""
        cases = [(p, case) for p, case in work.values() if not case.trusted]
        todo = [(p, c) for p, case in cases for c in self._ordered(case)[:most] if case.compiles(c)]
        if jobs < 2 or len(todo) < 2:
            return {}
        bar.extend(len(todo))
        now = time.monotonic()
        half = now + (self.deadline - now) / 2

        def done(candidate: Candidate) -> None:
            bar.tell(f"compiled {candidate}")
            bar.advance(1)

        return compile_all(todo, self.nursery, jobs, self.device, self.limits, done, half)

    def _first(self, problem: Problem, case: Case, failed: dict) -> Result:
        """The first candidate that is right."""
        bench, trials = self._bench(case), []
        source = "default" if self.forecast.order(case.work, distinct(case)) is None else "forecast"
        try:
            self._open(bench, problem, case, BEFORE)
            for candidate in self._ordered(case, first=FORECASTS):
                trial = Trial(candidate, None, failed.get((problem.id, candidate.id)))
                trials.append(trial)
                if trial.reason is None and self._try(bench.verify, trial):
                    result = _result(problem.key, case, candidate, source, True, trials)
                    result.expected = self.forecast.seconds(case.work, candidate)
                    return result
        except Unusable as failure:
            trials = [Trial(c, None, str(failure)) for c in distinct(case)]
        finally:
            self.local.close()
        return self._fall_back(problem, case, trials)

    def _measure(self, problem: Problem, case: Case, failed: dict, until: float, bar: Bar) -> tuple[Result, bool]:
        """The result, and whether there was time for it."""
        bench = self._bench(case)
        trials = {c.id: Trial(c, None, failed.get((problem.id, c.id))) for c in self._ordered(case)}
        complete = True
        try:
            self._open(bench, problem, case, BEFORE)
            complete = self._verify_and_time(bench, trials, until, bar)
        except Unusable as failure:
            complete = False
            for trial in trials.values():
                trial.seconds, trial.reason = None, trial.reason or f"the problem {failure}"
        finally:
            self.local.close()
        timed = [t for t in trials.values() if t.seconds and not t.reason]
        if timed:
            best = min(timed, key=lambda t: t.seconds[0])  # what else the machine does only ever adds to a time
            result = _result(problem.key, case, best.candidate, "measured", True, list(trials.values()))
        else:
            result = self._fall_back(problem, case, list(trials.values()))
        # What failed for want of memory may not, another time.
        if complete and not any(t.reason and "OutOfMemoryError" in t.reason for t in trials.values()):
            self.cache.store({problem.id: _entry(result, case)})
        return result, complete

    def _verify_and_time(self, bench: Bench | Child, trials: dict[str, Trial], until: float, bar: Bar) -> bool:
        """Fills in the trials; whether there was time enough."""
        now = time.monotonic()
        enough = now + (until - now) / 2
        right: list[Candidate] = []
        for trial in trials.values():
            if trial.reason is None and right and time.monotonic() > enough:
                trial.reason = NOT_TRIED
            if trial.reason is None and self._try(bench.verify, trial):
                right.append(trial.candidate)
            bar.advance(1)
        if not right:
            return True

        def sample(candidate: Candidate) -> float | None:
            return self._try(bench.sample, trials[candidate.id], "while timed: ")

        def drop(candidate: Candidate) -> None:
            self._try(bench.drop, trials[candidate.id], "while timed: ")
            bar.advance(1)

        times = race(right, sample, drop, until)
        for id, samples in times.items():
            if not trials[id].reason:
                trials[id].seconds = percentiles(samples)
        bench.load(AFTER)
        for trial in trials.values():
            if trial.seconds and not trial.reason:
                self._try(bench.verify, trial, "after it was timed: ")
        tried = all(trial.reason != NOT_TRIED for trial in trials.values())
        return tried and all(len(samples) >= ENOUGH_ROUNDS for samples in times.values())

    def _try(self, step, trial: Trial, stage: str = ""):
        """What the step returns for this candidate, or True; None if it failed: the trial has the reason then."""
        try:
            value = step(trial.candidate)
        except Dropped as failure:
            trial.seconds, trial.reason = None, f"{stage}{failure}"
            logger.info("%s", trial)
            return None
        return True if value is None else value

    def _fall_back(self, problem: Problem, case: Case, trials: list[Trial]) -> Result:
        if case.fallback is not None:
            bench, trial = self._bench(case), Trial(case.fallback)
            try:
                self._open(bench, problem, case, BEFORE)
                if self._try(bench.verify, trial):
                    return _result(problem.key, case, case.fallback, "fallback", True, trials)
            except Unusable as failure:
                trial.reason = f"the problem {failure}"
            finally:
                self.local.close()
            trials = [*trials, trial]
        reasons = "\n".join(f"  {trial}" for trial in trials)
        raise RuntimeError(f"{problem.key}: no candidate is right:\n{reasons}")


def _entry(result: Result, case: Case) -> dict:
    def facts(c: Candidate) -> dict:
        return {"backend": c.backend, "label": c.label, "config": c.config}

    trials = [
        {"candidate": facts(t.candidate), "seconds": t.seconds and list(t.seconds), "reason": t.reason}
        for t in result.trials
    ]
    entry = {"chosen": facts(result.chosen), "candidates": candidates_digest(distinct(case)), "trials": trials}
    return entry | ({"work": asdict(case.work)} if case.work else {})
