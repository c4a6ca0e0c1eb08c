"""The README's measured table, from benchmarks/results/*.json.

python benchmarks/table.py           write it between the markers
python benchmarks/table.py --check   fail if the README says anything else
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measured: written by benchmarks/table.py -->", "<!-- /measured -->"
COLUMNS = {
    "channels_last": "channels_last",
    "compile": "torch.compile",
    "fused": "fused_resnet",
    "fused_channels_last": "fused_resnet, NHWC input",
}


def render(results: list[dict]) -> str:
    """Markdown: one table a results file."""
    if not results:
        return "No figures have been recorded yet; `make results` measures them."
    return "\n\n".join(_table(result) for result in results)


def _table(result: dict) -> str:
    cases = result["cases"]
    variants = [v for v in COLUMNS if any(v in case["variants"] for case in cases)]
    header = ["", "eager, ms", *(f"{COLUMNS[v]}, ×" for v in variants), "peak memory, MiB", "noise", "parity"]
    lines = [_about(result), "", _row(header), _row(["---", *["--:"] * (len(header) - 1)])]
    for case in cases:
        timed = case["variants"]
        what = f"{case['model']} {case['mode']}, batch {case['batch']}, {case['dtype']}"
        ratios = [f"{timed[v]['ratio']:.2f}" if v in timed else "–" for v in variants]
        eager, fused = (timed[v]["peak_mib"] for v in ("eager", "fused"))
        memory = "–" if eager is None or fused is None else f"{eager:.0f} → {fused:.0f}"
        parity = "holds" if case["parity"]["ok"] else "**fails**"
        lines.append(_row([what, f"{timed['eager']['p50_ms']:.1f}", *ratios, memory, f"{case['noise']:.0%}", parity]))
    return "\n".join(lines)


def _about(result: dict) -> str:
    e, size = result["environment"], result["cases"][0]["size"]
    on = ", ".join(gpu["name"] for gpu in e["gpus"]) if result["cases"][0]["device"] == "cuda" else e["cpu"]
    return (
        f"{on}, {e['threads']} threads; torch {e['torch']}, torchvision {e['torchvision']}; images of {size}×{size}; "
        "× is speed relative to torchvision eager, peak memory is eager → fused, noise is that of a ratio."
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def updated(readme: str, results: list[dict]) -> str:
    """The README with the text between the markers replaced."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SystemExit(f"README.md: expected the markers {BEGIN} and {END}, once each")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{render(results)}\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    results = [json.loads(path.read_text()) for path in sorted(arguments.results.glob("*.json"))]
    results = [result for result in results if "cases" in result]  # peers*.json are plot_peers.py's
    readme = arguments.readme.read_text()
    new = updated(readme, results)
    if arguments.check:
        if new != readme:
            print("README.md does not say what benchmarks/results/*.json say: run `python benchmarks/table.py`")
        return int(new != readme)
    arguments.readme.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
