"""What a run says of itself: a bar, a line an epoch, metrics.jsonl and curve.png, and what made a record's numbers."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fused_resnet import doctor

from .checkpoint import write_whole


class Report:
    """Of the first process; the others' is silent. shown: the bar, None for where stdout is a terminal."""

    def __init__(self, folder: Path, first: bool, steps: int, shown: bool | None = None):
        self.console = Console(quiet=not first)
        self.progress = bar(self.console, first and (self.console.is_terminal if shown is None else shown))
        self.task = self.progress.add_task("", total=steps)
        self.path = folder / "metrics.jsonl" if first else None
        self.file = None
        self.speed = 0.0  # images/s, of the last steps more than of those before

    def open(self, epochs: int, step: int) -> None:
        """Go on after `epochs` whole ones and `step` steps: what was written after those is taken out."""
        self.progress.update(self.task, completed=step)
        if self.path is None:
            return
        kept = [r for r in read(self.path) if r["epoch"] <= epochs or ("accuracy" not in r and r["step"] <= step)]
        write_whole(self.path, lambda f: f.writelines(json.dumps(r).encode() + b"\n" for r in kept))
        self.file = open(self.path, "a", buffering=1)  # a line is in the file when its step has ended

    def __enter__(self) -> Report:
        self.progress.start()
        return self

    def __exit__(self, *failure) -> None:
        self.progress.stop()
        if self.file is not None:
            self.file.close()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, epoch: int, step: int, loss: float, lr: float, images_per_s: float) -> None:
        self.speed = 0.9 * self.speed + 0.1 * images_per_s if self.speed else images_per_s
        text = f"epoch {epoch}  loss {loss:.4f}  lr {lr:.4f}  {self.speed:,.0f} images/s"
        self.progress.update(self.task, completed=step, description=text)
        self._write(step=step, epoch=epoch, loss=loss, lr=lr, images_per_s=images_per_s)

    def epoch(self, epoch: int, step: int, train_loss: float, test_loss: float, accuracy: float, best: bool) -> None:
        losses = f"loss {train_loss:.4f}, on test images {test_loss:.4f}"
        mark = " (best so far)" if best else ""
        self.say(f"epoch {epoch}: {losses}, accuracy {accuracy:.2%}{mark}, {self.speed:,.0f} images/s")
        self._write(step=step, epoch=epoch, train_loss=train_loss, test_loss=test_loss, accuracy=accuracy)

    def _write(self, **record) -> None:
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")


def bar(console: Console, shown: bool) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not shown)


def read(path: Path) -> list[dict]:
    """The records of a metrics file, but not a last line that a killed process left unfinished."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def draw(metrics: Path, picture: Path) -> str:
    """The losses and the accuracy over the epochs. Returns what became of the picture, in a sentence."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"no {picture.name}: it needs matplotlib (pip install matplotlib)"
    records = read(metrics)
    steps = [r for r in records if "loss" in r]
    epochs = [r for r in records if "accuracy" in r]
    in_an_epoch = epochs[0]["step"] / epochs[0]["epoch"]

    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.plot([r["step"] / in_an_epoch for r in steps], [r["loss"] for r in steps], lw=0.7, label="a step's batch")
    above.plot([r["epoch"] for r in epochs], [r["test_loss"] for r in epochs], "o-", ms=3, label="test images")
    above.set_ylabel("loss")
    above.set_yscale("log")
    above.legend()
    below.plot([r["epoch"] for r in epochs], [100 * r["accuracy"] for r in epochs], "o-", ms=3, color="C1")
    below.set_ylabel("accuracy on test images, %")
    below.set_xlabel("epoch")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    write_whole(picture, lambda f: figure.savefig(f, format="png", dpi=120))
    return f"{picture.name} shows loss and accuracy"


def command(script: str, arguments: Sequence[str] | None) -> str:
    """What main(arguments) of an example was started as."""
    return shlex.join(["python", f"examples/{script}", *(sys.argv[1:] if arguments is None else arguments)])


def machine() -> dict:
    """What the numbers were made on; no host and no path."""
    found = doctor.environment()
    del found["variables"]
    return {**found, "date": date.today().isoformat()}


def write_record(path: Path, record: dict) -> None:
    """JSON that every reader takes: a number that is none raises ValueError."""
    write_whole(path, lambda f: f.write(json.dumps(record, allow_nan=False).encode() + b"\n"))


def digits(value: float, count: int = 6) -> float:
    """`value` to so many significant digits: what a record keeps of it."""
    return float(f"{value:.{count}g}")
