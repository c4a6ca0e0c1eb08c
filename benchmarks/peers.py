"""Whole models in inference: fused_resnet beside what else a user could pick.

    python benchmarks/peers.py --models resnet18 resnet50 --batches 1 8 32 --out benchmarks/results/peers-cpu.json
    python benchmarks/plot_peers.py benchmarks/results/peers-cpu.json

A cell is one model, batch size and dtype. In it every system lives in a process of its own, so that no thread pool,
allocator or compiler cache of one is in another's way; only one of them runs at a time. Each round runs every system
once, starting with another one: a burst of as many calls as fill 0.1 s (one, if a call takes longer), after a call that
is not timed where a call is short. Then its process waits until its threads have stopped spinning: every system may
spin while it runs (ONNX Runtime's default, and its best) and disturbs nobody afterwards. The ratio to the baseline is
taken round by round; its median comes with the 95 % interval of 10,000 bootstrap resamples.

Parity: the first and the last image's output against float64, by the rule of fused_resnet/measure.py.
Cells that the file has already are not measured again; --cells does those that it names, whatever the file has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

from benchmarks.peer_systems import BASELINE, OURS, SYSTEMS, Cell  # noqa: E402
from benchmarks.peer_worker import Worker  # noqa: E402
from fused_resnet import doctor, measure  # noqa: E402
from fused_resnet.engine import machine, roofline  # noqa: E402

SCHEMA = 1
RESAMPLES = 10_000
LOG_EVERY_S = 60.0
PACKAGES = ("onnxruntime", "openvino", "onnx", "jax", "timm")


# --- statistics -------------------------------------------------------------------------------------------------------


def interval(ratios: list[float], seed: int = 0) -> dict[str, float]:
    """The median of ratios and its 95 % interval, by RESAMPLES bootstrap resamples of the rounds."""
    values = numpy.asarray(ratios, dtype=numpy.float64)
    picks = numpy.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = numpy.quantile(numpy.median(values[picks], axis=1), (0.025, 0.975))
    return {"ratio": float(numpy.median(values)), "low": float(low), "high": float(high)}


def speed_over(cell: dict, system: str, other: str) -> dict[str, float] | None:
    """How many times as fast as another a system is, round by round; None where one of them did not run."""
    timed = cell["systems"]
    if system not in timed or other not in timed:
        return None
    return interval([b / a for a, b in zip(timed[system]["times_s"], timed[other]["times_s"], strict=True)])


def fastest_peer(cell: dict) -> str | None:
    """The faster of ONNX Runtime and OpenVINO, by the median."""
    those = [name for name in ("onnxruntime", "openvino") if name in cell["systems"]]
    return min(those, key=lambda name: cell["systems"][name]["p50_ms"], default=None)


def turns(names: list[str], round: int) -> list[str]:
    """The order of a round: each system once, another one first."""
    return names[round % len(names) :] + names[: round % len(names)]


# --- one cell ---------------------------------------------------------------------------------------------------------


def judge(cell: Cell, seeds: int = 3) -> tuple[torch.Tensor, float]:
    """(float64 output of the first and the last image, the largest error of torchvision's own variants).

    The variants run on that input and, in the same number of images, on those of further seeds.
    """
    model, x = cell.untouched(), cell.input()
    x = x[sorted({0, cell.batch - 1})]
    others = [measure.random_input(tuple(x.shape), seed, x.device, x.dtype) for seed in range(1, seeds)]
    return measure.own_error(model, [x, *others])


def run_cell(cell: Cell, names: list[str], rounds: int, progress: Callable[[str], None] = lambda what: None) -> dict:
    """Measure a cell; JSON-able. Calls progress once a system that gets ready or not, and once a round and system."""
    load, begin = os.getloadavg()[0], time.time()
    progress("float64")
    truth, own = judge(cell)
    skipped: dict[str, str] = {}  # not tried
    failed: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in names:
                progress(f"getting ready: {name}")
                if reason := SYSTEMS[name].declines(cell.device, cell.dtype):
                    skipped[name] = reason
                    continue
                try:
                    workers[name] = Worker(name, replace(cell, folder=folder))
                    times[name] = []
                except RuntimeError as error:
                    failed[name] = str(error)
            for r in range(rounds):
                for name in turns(list(workers), r):
                    progress(f"round {r + 1} of {rounds}: {name}")
                    if name not in failed:
                        try:
                            times[name].append(workers[name].burst())
                        except RuntimeError as error:
                            failed[name] = f"in round {r + 1}: {error}"
        finally:
            for worker in workers.values():
                worker.stop()
    systems = {}
    for name, seconds in times.items():
        if name not in failed:
            systems[name] = summary(cell, workers[name], seconds, truth, own)
    found = {
        **{key: getattr(cell, key) for key in ("model", "batch", "dtype", "size", "device", "threads")},
        "rounds": rounds,
        "load_before": load,
        "took_s": time.time() - begin,
        "systems": systems,
        "skipped": skipped,
        "failed": failed,
    }
    for name in systems:
        systems[name]["to_baseline"] = speed_over(found, name, BASELINE)
    return found


def summary(cell: Cell, worker: Worker, seconds: list[float], truth: torch.Tensor, own: float) -> dict:
    e = measure.error(torch.tensor(worker.first["output"], dtype=torch.float64), truth)
    verdict = measure.verdict({"output": e}, {"output": own}, getattr(torch, cell.dtype))
    return {
        **measure.percentiles(seconds),
        "images_per_s": cell.batch / statistics.median(seconds),
        "calls": worker.calls,
        "times_s": seconds,
        **{key: worker.first[key] for key in ("built_s", "ready_s", "export_s", "peak_mib")},
        "parity": {"ok": verdict["ok"], **{k: verdict["nearest"]["output"][k] for k in ("error", "limit")}},
    }


# --- the file ---------------------------------------------------------------------------------------------------------


def environment() -> dict:
    found = doctor.environment()
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def opened(path: Path, now: dict) -> dict:
    """What the file has, if it was measured here and with the same versions; else a new result."""
    if not path.exists():
        return {"schema": SCHEMA, "environment": now, "load_before": os.getloadavg()[0], "rates": {}, "cells": {}}
    found = json.loads(path.read_text())
    if found.get("schema") != SCHEMA:
        raise SystemExit(f"--out: {path} has schema {found.get('schema')!r}, expected {SCHEMA}")
    different = [key for key in now if found["environment"].get(key) != now[key]]
    if different:
        raise SystemExit(f"--out: {path} was measured with other {', '.join(different)}; give a new file")
    return found


def write(path: Path, result: dict) -> None:
    """Atomically: an interrupted run leaves the file of the cell before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)


def wanted(arguments: argparse.Namespace, names: list[str], result: dict) -> list[Cell]:
    """The cells to measure: those that --cells names, or those that the file has not with these systems and rounds."""
    every = [
        Cell(model, batch, arguments.dtype, arguments.size, arguments.device, arguments.threads)
        for model in arguments.models
        for batch in arguments.batches
    ]
    if arguments.cells:
        unknown = set(arguments.cells) - {cell.name for cell in every}
        if unknown:
            known = ", ".join(cell.name for cell in every)
            raise SystemExit(f"--cells: expected some of {known}, got {', '.join(sorted(unknown))}")
        return [cell for cell in every if cell.name in arguments.cells]

    def has(cell: Cell) -> bool:
        there = result["cells"].get(cell.name)
        tried = {*there["systems"], *there["failed"]} if there else ()
        return (
            there is not None
            and there["rounds"] >= arguments.rounds
            and there["size"] == cell.size
            and all(name in tried or SYSTEMS[name].declines(cell.device, cell.dtype) for name in names)
        )

    return [cell for cell in every if not has(cell)]


def share(result: dict, cell: dict, name: str, rung: str = "1") -> float | None:
    """Measured speed over the ceiling of a rung, by the rates measured in the same run."""
    rates = result["rates"].get(cell["dtype"])
    if not rates:
        return None
    limits = (cell["batch"], getattr(torch, cell["dtype"]).itemsize, rates["flop_per_s"], rates["bytes_per_s"])
    floor = roofline.floor_s(_ops(cell["model"], cell["size"]), rung, *limits)
    return 1e3 * floor / cell["systems"][name]["p50_ms"]


_traced: dict[tuple[str, int], list] = {}


def _ops(model: str, size: int) -> list:
    if (model, size) not in _traced:
        _traced[model, size] = roofline.network(measure.build_model(model), (3, size, size))
    return _traced[model, size]


def note_rates(result: dict, device: str, dtype: str) -> None:
    """The matrix rate and copy bandwidth of the device: the best that any moment of the run has seen."""
    now = machine.measured(torch.device(device), getattr(torch, dtype))
    before = result["rates"].get(dtype, {"flop_per_s": 0.0, "bytes_per_s": 0.0})
    result["rates"][dtype] = {
        "name": now.name,
        "flop_per_s": max(before["flop_per_s"], now.rate),
        "bytes_per_s": max(before["bytes_per_s"], now.bandwidth),
        "source": now.source,
    }


# --- the command ------------------------------------------------------------------------------------------------------


def show(result: dict, cell: dict, console: Console) -> None:
    """The table of one cell."""
    table = Table(
        title=f"{cell['model']}, batch {cell['batch']}, {cell['dtype']}, {cell['device']}, {cell['threads']} threads, "
        f"{cell['rounds']} rounds",
        title_justify="left",
    )
    for heading in ("", "p20 ms", "p50 ms", "p80 ms", "speed / eager (95 %)", "of rung 1", "ready s", "MiB", "parity"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    for name, t in sorted(cell["systems"].items(), key=lambda item: item[1]["p50_ms"]):
        part, over = share(result, cell, name), t["to_baseline"]
        exported = f" + {t['export_s']:.0f}" if t["export_s"] >= 0.5 else ""
        table.add_row(
            SYSTEMS[name].title,
            *(f"{t[p]:.2f}" for p in ("p20_ms", "p50_ms", "p80_ms")),
            "-" if over is None else f"{over['ratio']:.2f} ({over['low']:.2f}-{over['high']:.2f})",
            "-" if part is None else f"{part:.0%}",
            f"{t['ready_s']:.1f}{exported}",
            "-" if t["peak_mib"] is None else f"{t['peak_mib']:.0f}",
            "holds" if t["parity"]["ok"] else f"FAILS {t['parity']['error']:.0e}",
        )
    console.print(table)
    for name, reason in cell["skipped"].items():
        console.print(f"  left out: {SYSTEMS[name].title}: {reason}", markup=False)
    for name, reason in cell["failed"].items():
        console.print(f"  failed: {SYSTEMS[name].title}: {reason}", markup=False)
    if OURS in cell["systems"] and (peer := fastest_peer(cell)):
        over = speed_over(cell, OURS, peer)
        console.print(
            f"  {OURS} over {SYSTEMS[peer].title}: {over['ratio']:.3f} (95 %: {over['low']:.3f} to {over['high']:.3f})"
        )


def show_geometric_mean(result: dict, console: Console) -> None:
    ratios = [
        speed_over(cell, OURS, peer)["ratio"]
        for cell in result["cells"].values()
        if OURS in cell["systems"] and (peer := fastest_peer(cell))
    ]
    if ratios:
        console.print(
            f"{OURS} over the faster of ONNX Runtime and OpenVINO, geometric mean of {len(ratios)} cells: "
            f"{statistics.geometric_mean(ratios):.3f}"
        )


class Log:
    """A line a minute where no terminal shows the bar."""

    def __init__(self, console: Console):
        self.console, self.next = console, 0.0

    def __call__(self, what: str, task) -> None:
        if not self.console.is_terminal and time.monotonic() >= self.next:
            self.next = time.monotonic() + LOG_EVERY_S
            left = "" if task.time_remaining is None else f", about {task.time_remaining / 60:.0f} min left"
            self.console.print(f"{what} ({task.percentage:.0f} %{left})", soft_wrap=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--models", nargs="+", default=["resnet18", "resnet34", "resnet50"])
    p.add_argument("--batches", nargs="+", type=int, help="default: 1 8 32, on a GPU 1 8 32 128")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32, on a GPU float16")
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--rounds", type=int, default=21)
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of every system")
    p.add_argument("--systems", nargs="+", choices=SYSTEMS, help="default: all that are not slow to get ready")
    p.add_argument("--slow", action="store_true", help="torch.compile's max-autotune and freezing as well")
    p.add_argument("--cells", nargs="+", metavar="MODEL/bN/DTYPE", help="only these, measured anew")
    p.add_argument("--out", type=Path, help="default: benchmarks/results/peers-<device>.json")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    gpu = arguments.device == "cuda"
    arguments.batches = arguments.batches or ([1, 8, 32, 128] if gpu else [1, 8, 32])
    arguments.dtype = arguments.dtype or ("float16" if gpu else "float32")
    arguments.out = arguments.out or ROOT / "benchmarks" / "results" / f"peers-{arguments.device}.json"
    names = arguments.systems or [name for name, system in SYSTEMS.items() if arguments.slow or not system.slow]
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    result = opened(arguments.out, environment())
    cells = wanted(arguments, names, result)
    console.print(f"{len(cells)} cells: {', '.join(cell.name for cell in cells) or 'nothing is left to do'}")
    log = Log(console)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left:"))
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console) as bar:
        weights = [8 + cell.batch * sum(op.flops for op in _ops(cell.model, cell.size)) / 1e9 for cell in cells]
        task = bar.add_task("", total=sum(weights))
        for i, cell in enumerate(cells):
            step = weights[i] / (1 + len(names) * (1 + arguments.rounds))

            def tell(what: str, i=i, cell=cell, step=step) -> None:
                what = f"{i + 1} of {len(cells)}, {cell.name}: {what}"
                bar.update(task, description=what, advance=step)
                log(what, bar.tasks[0])

            note_rates(result, cell.device, cell.dtype)
            result["cells"][cell.name] = run_cell(cell, names, arguments.rounds, tell)
            note_rates(result, cell.device, cell.dtype)
            write(arguments.out, result)
            bar.update(task, completed=sum(weights[: i + 1]))
            show(result, result["cells"][cell.name], bar.console)
    show_geometric_mean(result, console)
    console.print(f"written: {arguments.out}")
    failed = [
        f"{cell}: {name}"
        for cell, found in result["cells"].items()
        for name in ("swap_blocks", OURS)
        if name in found["systems"] and not found["systems"][name]["parity"]["ok"]
    ]
    for what in failed:
        console.print(f"parity fails: {what}")
    return int(bool(failed))


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:  # the cells that were finished are in the file, and the next run goes on from there
        raise SystemExit("interrupted: the same command goes on with the cells that are left") from None
