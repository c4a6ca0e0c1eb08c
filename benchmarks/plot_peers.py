"""Draw what benchmarks/peers.py measured: speed by batch size for each system, and its share of the roofline.

    python benchmarks/plot_peers.py [FILE.json ...] [--out FILE.png]

By default of all benchmarks/results/peers-*.json. One PNG a file, beside it unless --out says where. Needs matplotlib:
pip install 'fused_resnet[plot]'.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

from benchmarks import peers  # noqa: E402
from benchmarks.peer_systems import SYSTEMS  # noqa: E402
from fused_resnet.roofline_cli import pyplot  # noqa: E402

RUNG = "1"


def series(result: dict) -> dict[str, dict[str, list[tuple]]]:
    """By model and dtype, by system: (batch, p20, p50, p80 in images/s, share of rung 1's ceiling or None)."""
    found: dict[str, dict[str, list[tuple]]] = {}
    for cell in sorted(result["cells"].values(), key=lambda cell: cell["batch"]):
        systems = found.setdefault(f"{cell['model']}, {cell['dtype']}", {})
        for name, t in cell["systems"].items():
            speeds = (1e3 * cell["batch"] / t[p] for p in ("p80_ms", "p50_ms", "p20_ms"))
            systems.setdefault(name, []).append((cell["batch"], *speeds, peers.share(result, cell, name, RUNG)))
    return found


def draw(result: dict, path: Path) -> None:
    plt = pyplot()
    models = series(result)
    figure, axes = plt.subplots(
        2, len(models), figsize=(1.5 + 4.2 * len(models), 7.5), layout="constrained", squeeze=False, sharex=True
    )
    names = [name for name in SYSTEMS if any(name in systems for systems in models.values())]
    colours = {name: plt.get_cmap("tab20")(i / 20) for i, name in enumerate(SYSTEMS)}
    for column, (model, systems) in enumerate(models.items()):
        speed, part = axes[:, column]
        for name in names:
            points = systems.get(name, [])
            batches, low, middle, high, shares = zip(*points, strict=True) if points else ((),) * 5
            look = {"color": colours[name], "linewidth": 2.5 if name == peers.OURS else 1.3, "marker": "o"}
            speed.plot(batches, middle, label=SYSTEMS[name].title, markersize=4, **look)
            speed.fill_between(batches, low, high, color=colours[name], alpha=0.15, linewidth=0)
            if None not in shares:
                part.plot(batches, [100 * v for v in shares], markersize=4, **look)
        speed.set_title(model)
        speed.set_ylim(bottom=0)
        part.set_ylim(bottom=0)
        part.axhline(100, color="#888888", linewidth=0.8, linestyle=":")
        part.set_xscale("log", base=2)
        every = sorted({point[0] for points in systems.values() for point in points})
        part.set_xticks(every, [str(batch) for batch in every])
        part.set_xlabel("batch")
    axes[0, 0].set_ylabel("images/s (median; band: p20 to p80)")
    axes[1, 0].set_ylabel("% of the ceiling, one kernel a convolution")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(about(result), fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def about(result: dict) -> str:
    e, cell = result["environment"], next(iter(result["cells"].values()))
    on = ", ".join(gpu["name"] for gpu in e["gpus"]) if cell["device"] == "cuda" else e["cpu"]
    rates = "; ".join(
        f"{dtype}: {r['flop_per_s'] / 1e12:.3g} TFLOP/s, {r['bytes_per_s'] / 1e9:.3g} GB/s measured"
        for dtype, r in result["rates"].items()
    )
    return f"{on}; {cell['threads']} threads; torch {e['torch']}\n{rates}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: benchmarks/results/peers-*.json")
    parser.add_argument("--out", type=Path, help="for one FILE: the picture's name")
    arguments = parser.parse_args(argv)
    files = arguments.files or sorted((ROOT / "benchmarks" / "results").glob("peers-*.json"))
    if not files:
        parser.error("FILE: there is no benchmarks/results/peers-*.json; benchmarks/peers.py writes one")
    if arguments.out and len(files) > 1:
        parser.error("--out: with one FILE only")
    try:
        pyplot()
    except ImportError as error:
        parser.error(str(error))
    for file in files:
        result = json.loads(file.read_text())
        if not result.get("cells"):
            parser.error(f"{file} is not a result of benchmarks/peers.py, or has no cells yet")
        path = arguments.out or file.with_suffix(".png")
        draw(result, path)
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
