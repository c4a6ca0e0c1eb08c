"""`python -m fused_resnet explore`: recorded gradients and training runs as one interactive HTML file.

The page is `page.html` with `page.css`, the SCRIPTS and the records in their places: it loads nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from .. import __version__, cli

HERE = Path(__file__).parent
SCRIPTS = ("chart.js", "choice.js", "page.js")
RECORDS = ("degradation", "gradients")
KINDS = ("plain", "residual")
NOT_FINITE = ("inf", "-inf", "nan")


def add_command(commands) -> None:
    """Add the command to the sub-parsers of cli.parser()."""
    parser = commands.add_parser("explore", help="write an interactive page of recorded gradients and training runs")
    parser.add_argument("--out", default="explore.html", metavar="FILE", help="default: explore.html")
    parser.add_argument(
        "--results",
        metavar="FOLDER",
        help="where degradation.json and gradients.json lie; default: those recorded with this package",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Write the page."""
    records = {name: load(Path(arguments.results or HERE / "results", f"{name}.json")) for name in RECORDS}
    cli.writable("--out", arguments.out)
    page = render(records)
    Path(arguments.out).write_text(page, encoding="utf-8")
    console.print(f"written: {arguments.out} ({len(page.encode()) / 1000:.0f} kB); open it in a browser", markup=False)
    return 0


def render(records: dict[str, dict]) -> str:
    """The page of {"degradation": ..., "gradients": ...}."""
    parts = {
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "script": "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "version": __version__,
        # "</script>" or "<!--" in a string would be HTML's; in JSON "<" stands in strings only, and may be escaped.
        "records": json.dumps(records, ensure_ascii=False, allow_nan=False).replace("<", r"\u003c"),
    }
    page = (HERE / "page.html").read_text(encoding="utf-8")
    for name, text in parts.items():  # the records last: what looks like a place in them stays
        page = page.replace(f"[[{name}]]", text, 1)
    return page


def load(path: Path) -> dict:
    """The record in a file, as far as the page relies on it checked."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
        {"degradation": _check_runs, "gradients": _check_stacks}[path.stem](record)
    except OSError as error:
        raise cli.CliError(f"--results: cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise cli.CliError(f"--results: {path}: {error}") from None
    return record


def _constant(name: str):
    raise ValueError(f"{name} is not JSON; write one of {', '.join(map(json.dumps, NOT_FINITE))}")


def _check_runs(record) -> None:
    for where, run in _entries(record, "runs"):
        for field in ("train_loss", "test_accuracy"):
            _expect(_numbers(run.get(field)), f"{where}.{field}", "a list of numbers", run.get(field))
        if "train_loss_eval" in run:
            _expect(_numbers(run["train_loss_eval"]), f"{where}.train_loss_eval", "a list of numbers")


def _check_stacks(record) -> None:
    for where, stack in _entries(record, "stacks"):
        norms, layers = stack.get("weight_grad_norm"), stack.get("layers")
        _expect(_numbers(norms), f"{where}.weight_grad_norm", "a list of numbers", norms)
        named = isinstance(layers, list) and len(layers) == len(norms) and all(isinstance(n, str) for n in layers)
        _expect(named, f"{where}.layers", f"the names of {len(norms)} layers", layers)
        _expect(_integer(stack.get("step")), f"{where}.step", "an integer", stack.get("step"))


def _entries(record, name: str):
    """(where, entry) of the list that a record is about."""
    entries = record.get(name) if isinstance(record, dict) else None
    _expect(isinstance(entries, list) and entries, name, "a list that is not empty", entries)
    for i, entry in enumerate(entries):
        where = f"{name}[{i}]"
        _expect(isinstance(entry, dict), where, "an object", entry)
        _expect(entry.get("kind") in KINDS, f"{where}.kind", " or ".join(KINDS), entry.get("kind"))
        _expect(_integer(entry.get("depth")), f"{where}.depth", "an integer", entry.get("depth"))
        yield where, entry


def _expect(holds, where: str, what: str, got=None) -> None:
    if not holds:
        text = json.dumps(got)
        raise ValueError(f"{where}: expected {what}, got {text if len(text) < 60 else text[:60] + ' ...'}")


def _integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(values) -> bool:
    """Whether it is a list of numbers, or of the strings that stand for those that JSON has not; not empty."""
    if not isinstance(values, list) or not values:
        return False
    return all(v in NOT_FINITE if isinstance(v, str) else type(v) in (int, float) for v in values)
