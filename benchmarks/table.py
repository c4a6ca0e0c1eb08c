"""The README's measured tables, from benchmarks/results/*.json: blocks swapped, whole models beside the peers, on GPUs.

python benchmarks/table.py           write it between the markers
python benchmarks/table.py --check   fail if the README says anything else
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

from benchmarks import peers  # noqa: E402

BEGIN, END = "<!-- measured: written by benchmarks/table.py -->", "<!-- /measured -->"
PEERS_BEGIN, PEERS_END = "<!-- peers: written by benchmarks/table.py -->", "<!-- /peers -->"
ENGINE_BEGIN, ENGINE_END = "<!-- engine: written by benchmarks/table.py -->", "<!-- /engine -->"
TRAINING_BEGIN, TRAINING_END = "<!-- training: written by benchmarks/table.py -->", "<!-- /training -->"
PEERS = {
    "channels_last": "channels_last",
    "compile": "torch.compile",
    "compile_freezing": "torch.compile, freezing",
    "cudnn_graph": "cuDNN, CUDA graph",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "fused_resnet": "**fused_resnet**",
}
COLUMNS = {
    "channels_last": "channels_last",
    "compile": "torch.compile",
    "fused": "fused_resnet",
    "fused_channels_last": "fused_resnet, NHWC input",
    "fused_captured": "fused_resnet, NHWC, captured",
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


def render_peers(results: list[dict]) -> str:
    """Markdown: one table a file of benchmarks/peers.py."""
    return "\n\n".join(_peers_table(r) for r in results) if results else "No figures yet; `make peers` measures them."


def _peers_table(result: dict) -> str:
    cells = list(result["cells"].values())
    systems = [name for name in PEERS if any(name in cell["systems"] for cell in cells)]
    ratios = [f"{PEERS[name]}, ×" for name in systems]
    header = [
        "",
        "eager, ms",
        *ratios,
        "over the faster of the two (95 %)",
        "ready, s",
        "first result, s",
        "peak memory, MiB",
        "parity",
    ]
    e, first = result["environment"], cells[0]
    on = ", ".join(gpu["name"] for gpu in e["gpus"]) if first["device"] == "cuda" else e["cpu"]
    titles = {"torch": "torch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    versions = ", ".join(f"{title} {e[key]}" for key, title in titles.items() if e.get(key))
    about = (
        f"{on}, {first['threads']} threads; {versions}; images of {first['size']}×{first['size']}, {first['rounds']} "
        "rounds; × is the median over the rounds of speed relative to torchvision eager, then of fused_resnet over "
        "the faster of ONNX Runtime and OpenVINO; ready is the time that optimize_for_inference takes, first result "
        "that and the first call; peak memory is eager → fused_resnet."
    )
    lines = [about, "", _row(header), _row(["---", *["--:"] * (len(header) - 1)])]
    for cell in cells:
        lines.append(_row(_peers_row(cell, systems)))
    return "\n".join(lines)


def _peers_row(cell: dict, systems: list[str]) -> list[str]:
    timed = cell["systems"]
    ours, eager = timed["fused_resnet"], timed["eager"]
    ratios = [f"{timed[name]['to_baseline']['ratio']:.2f}" if name in timed else "–" for name in systems]
    over = peers.speed_over(cell, "fused_resnet", peers.fastest_peer(cell))
    over = "–" if over is None else f"{over['ratio']:.2f} ({over['low']:.2f} to {over['high']:.2f})"
    memory = [t.get("peak_mib") for t in (eager, ours)]
    memory = "–" if None in memory else "{:.0f} → {:.0f}".format(*memory)
    parity = "holds" if ours["parity"]["ok"] else "**fails**"
    what = f"{cell['model']}, batch {cell['batch']}, {cell['dtype']}"
    ready = [f"{ours[key]:.1f}" if key in ours else "–" for key in ("built_s", "ready_s")]
    return [what, f"{eager['p50_ms']:.1f}", *ratios, over, *ready, memory, parity]


def render_engine(results: list[dict]) -> str:
    """Markdown: one table a GPU, of what `make gpu-check PART=bench` says of planned networks."""
    return "\n\n".join(_engine_table(result) for result in results)


def _gpu(result: dict) -> str:
    e = result["environment"]
    return f"{e['gpus'][0]['name']}; torch {e['torch']}, Triton {e['triton']}, cuDNN {e['cudnn']}; images of 224×224, "


def render_training(results: list[dict]) -> str:
    """Markdown: one table a GPU, of what it says of whole training steps."""
    return "\n\n".join(_training_table(result) for result in results)


def _training_table(result: dict) -> str:
    ways = list(result["training"][0]["images_per_s"])
    about = _gpu(result) + "images/s by the median of alternating rounds; below, the most MiB a step adds."
    ours = {"fused": "**fused_resnet**", "fused lean": "**fused_resnet**, lean"}
    ours["fused, captured"] = "**fused_resnet**, captured"
    lines = [about, "", _row(["", *(ours.get(way, way) for way in ways)]), _row(["---", *["--:"] * len(ways)])]
    for case in result["training"]:
        model, dtype, batch = case["case"].split("/")[2:]
        lines.append(_row([f"{model}, batch {batch}, {dtype}", *(f"{case['images_per_s'][way]:,.0f}" for way in ways)]))
        lines.append(_row(["", *("–" if (mib := case["peak_mib"][way]) is None else f"{mib:,.0f}" for way in ways)]))
    return "\n".join(lines)


def _engine_table(result: dict) -> str:
    ways = list(result["engine"][0]["images_per_s"])
    about = (
        f"{_gpu(result)}images/s by the median of alternating rounds, each of several calls without a pause; off is "
        "the result's distance from float64's, beside the largest of torchvision's own variants."
    )
    header = ["", *("**fused_resnet**" if way == "engine" else way for way in ways), "off"]
    lines = [about, "", _row(header), _row(["---", *["--:"] * (len(header) - 1)])]
    for case in result["engine"]:
        model, dtype, batch = case["case"].split("/")[2:]
        off = f"{max(case['error'].values()):.1e} ({case['torchvision']:.1e})"
        speeds = [f"{case['images_per_s'][way]:,.0f}" for way in ways]
        lines.append(_row([f"{model}, batch {batch}, {dtype}", *speeds, off]))
    if "convolutions" in result:
        lines += ["", *_convolutions(result["convolutions"])]
    return "\n".join(lines)


def _convolutions(measured: dict) -> list[str]:
    """The 3x3 convolutions that the tuner timed there: microseconds, and TFLOP/s of ours."""
    about = f"Its 3x3 convolutions with bias and ReLU, {measured['dtype']}, batch {measured['batch']}, "
    about += "by the tuner's medians:"
    header = ["channels, map", "PyTorch, µs", "Triton, µs", "**compiled**, µs", "TFLOP/s"]
    lines = [about, "", _row(header), _row(["---", *["--:"] * (len(header) - 1)])]
    for row in measured["rows"]:
        what = f"{row['c']}, {row['maps']}×{row['maps']}" + (f", stride {row['stride']}" if row["stride"] > 1 else "")
        times = [f"{row['us'][name]:.1f}" for name in ("pytorch", "triton", "compiled")]
        lines.append(_row([what, *times, f"{row['tflops']['compiled']:.0f}"]))
    return lines


def _about(result: dict) -> str:
    e, size = result["environment"], result["cases"][0]["size"]
    on = ", ".join(gpu["name"] for gpu in e["gpus"]) if result["cases"][0]["device"] == "cuda" else e["cpu"]
    return (
        f"{on}, {e['threads']} threads; torch {e['torch']}, torchvision {e['torchvision']}; images of {size}×{size}; "
        "× is speed relative to torchvision eager, peak memory is eager → fused, noise is that of a ratio."
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def updated(readme: str, results: list[dict], begin: str = BEGIN, end: str = END, render=render) -> str:
    """The README with the text between the markers replaced."""
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise SystemExit(f"README.md: expected the markers {begin} and {end}, once each")
    head, rest = readme.split(begin)
    return f"{head}{begin}\n{render(results)}\n{end}{rest.split(end)[1]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    results = [json.loads(path.read_text()) for path in sorted(arguments.results.glob("*.json"))]
    beside_peers = [result for result in results if "cells" in result]
    readme = arguments.readme.read_text()
    new = updated(readme, [result for result in results if "cases" in result])
    new = updated(new, beside_peers, PEERS_BEGIN, PEERS_END, render_peers)
    if on_gpus := [result for result in results if "engine" in result]:
        new = updated(new, on_gpus, ENGINE_BEGIN, ENGINE_END, render_engine)
    if training := [result for result in results if "training" in result]:
        new = updated(new, training, TRAINING_BEGIN, TRAINING_END, render_training)
    if arguments.check:
        if new != readme:
            print("README.md does not say what benchmarks/results/*.json say: run `python benchmarks/table.py`")
        return int(new != readme)
    arguments.readme.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
