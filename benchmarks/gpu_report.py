"""What gpu-check leaves for a reader: a page over all parts, and the table of what was tuned."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.caselog import Log
from benchmarks.conv_table import table

PARTS = ("smoke", "test", "sanitize", "bench", "tune")


def summary(out: Path) -> str:
    """One page over all parts in the folder: counts, what failed, and the figures."""
    lines = []
    for part in PARTS:
        done = Log(out / "results.jsonl", part).done()
        if not done:
            continue
        counts = Counter(line["status"] for line in done.values())
        lines += [f"== {part}: " + ", ".join(f"{n} {status}" for status, n in counts.most_common())]
        for case, line in done.items():
            if line["status"] not in ("passed", "skipped"):
                lines.append(f"  {line['status']}: {case}: {_told(line.get('message', ''))}")
        if part == "smoke":
            refused = {r for line in done.values() for r in line.get("refused", [])}
            lines += [f"  refused at first use: {r}" for r in sorted(refused)]
        lines += _engine_lines(done)
        lines += table(done)
        if part == "bench" and any("measured" in line for line in done.values()):
            lines += _bench_lines(done)
        if part == "tune":
            lines += _tune_lines(done)
    return "\n".join(lines) + "\n"


def _told(message: str) -> str:
    """The line of a message that says what is wrong: pytest marks it with an E."""
    lines = message.strip().splitlines() or [""]
    return next((line[1:].strip() for line in lines if line.startswith("E ")), lines[0])[:200]


def _engine_lines(done: dict[str, dict]) -> Iterator[str]:
    """Where networks were timed: images a second, and the host's time of a call. The plans are in log.txt."""
    for case, line in done.items():
        if speed := line.get("images_per_s"):
            told = ", ".join(f"{what} {n:g}" for what, n in speed.items())
            host = f"; host {line['host_us']:.0f} us a call" if "host_us" in line else ""
            yield f"  {case}, images/s: {told}{host}"
        elif "ready_s" in line:
            again = f", {line['warm_s']:.0f} s with warm compilers" if "warm_s" in line else ""
            yield f"  {case}: ready in {line['ready_s']:.0f} s{again}; {'; '.join(line['notes'])[:160]}"


def _bench_lines(done: dict[str, dict]) -> Iterator[str]:
    """A line a module, mode, batch and dtype: eager's time, and every variant's speed relative to it."""
    groups: dict[str, dict[str, dict]] = {}
    for line in done.values():
        if m := line.get("measured"):
            groups.setdefault(m["group"], {})[m["variant"]] = m
    others = dict.fromkeys(v for measured in groups.values() for v in measured if v != "eager")
    yield f"  {'speed / eager':<48} {'eager ms':>10}" + "".join(f" {v:>19}" for v in others) + "  noise   MiB"
    for group, measured in groups.items():
        ratios = "".join(f" {measured[v]['ratio']:19.2f}" if v in measured else f" {'-':>19}" for v in others)
        eager = f"{measured['eager']['p50_ms']:10.3f}" if "eager" in measured else f"{'-':>10}"
        noise = max(m["noise"] for m in measured.values())
        peak = max((m["peak_mib"] for v, m in measured.items() if v.startswith("fused") and m["peak_mib"]), default=0)
        yield f"  {group:<48} {eager}{ratios}  {noise:5.0%} {peak:5.0f}"


def _tune_lines(done: dict[str, dict]) -> Iterator[str]:
    """By op and dtype how often each backend was fastest; then where ours lost by most. All of it is in tune.json."""
    wins: dict[str, Counter] = {}
    lost = []
    for case, line in done.items():
        if us := line.get("us"):
            best = min(us, key=us.get)
            wins.setdefault(f"{line['op']}, {case.rsplit('/', 1)[-1]}", Counter())[best] += 1
            ours = min((t for b, t in us.items() if b in ("cuda", "triton")), default=None)
            if ours is not None and best not in ("cuda", "triton"):
                lost.append((ours / us[best], f"{case}: {ours:.1f} us, {best} {us[best]:.1f} us"))
    for what, counts in wins.items():
        yield f"  fastest, {what}: " + ", ".join(f"{b} {n}" for b, n in counts.most_common())
    for _, told in sorted(lost, reverse=True)[:15]:
        yield f"  lost: {told}"


def write_summary(out: Path) -> None:
    (out / "summary.txt").write_text(summary(out))
    tuned = {case: line for case, line in Log(out / "results.jsonl", "tune").done().items() if "us" in line}
    if tuned:
        keys = ("op", "spec", "dtype", "occurs", "us", "error", "declined")
        table = {case: {key: line[key] for key in keys} for case, line in tuned.items()}
        text = json.dumps({"schema": 1, "environment": _environment(out), "timings": table}, indent=1)
        (out / "tune.json").write_text(text + "\n")


def _environment(out: Path) -> dict | None:
    path = out / "environment.json"
    return json.loads(path.read_text()) if path.exists() else None
