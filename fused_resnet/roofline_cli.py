"""`python -m fused_resnet roofline`: per layer, what a device allows and what PyTorch's own ops take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from rich.table import Table

from . import cli, doctor, models
from .engine import machine, roofline


def add_command(commands) -> None:
    """Add the command to the sub-parsers of cli.parser()."""
    parser = commands.add_parser("roofline", help="per layer, what a device allows and what PyTorch's own ops take")
    parser.add_argument("model", metavar="MODEL", choices=models.TORCHVISION, help=", ".join(models.TORCHVISION))
    parser.add_argument("--batch", type=cli.positive, default=128, metavar="N", help="default: 128")
    parser.add_argument(
        "--size", type=cli.at_least(32), default=224, help="height and width of the images; default: 224"
    )
    parser.add_argument("--dtype", choices=cli.DTYPES, help="default: float32 on a CPU, float16 elsewhere")
    parser.add_argument(
        "--device",
        default="auto",
        help=f"cpu, cuda, cuda:1: measured now, layers too; or by name: {', '.join(machine.KNOWN)}; "
        "default: cuda if there is one",
    )
    rungs = "; ".join(f"{rung}: {what}" for rung, what in roofline.RUNGS.items())
    parser.add_argument("--rung", default="1", choices=roofline.RUNGS, help=f"of fusion. {rungs}. Default: 1")
    parser.add_argument("--threads", type=cli.positive, help="CPU threads")
    parser.add_argument("--png", metavar="FILE", help="draw it; needs matplotlib: pip install 'fused_resnet[plot]'")
    parser.add_argument("--json", metavar="FILE", help="write everything, and what it was measured on")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Floors by layer; of a device that is here, measured."""
    named = machine.KNOWN.get(arguments.device)
    device = named or cli.named_device(arguments.device, known=machine.KNOWN)
    default = "float32" if named is None and device.type == "cpu" else "float16"
    dtype = cli.DTYPES[arguments.dtype or default]
    if named and dtype.itemsize != 2:
        raise cli.CliError(
            f"--dtype: of {arguments.device} the rate is known for float16 and bfloat16, not for float32"
        )
    for option in ("png", "json"):
        if getattr(arguments, option) is not None:
            cli.writable(f"--{option}", getattr(arguments, option))
    if arguments.png is not None:
        try:
            pyplot()
        except ImportError as error:
            raise cli.CliError(f"--png: {error}") from None
    with console.status(f"tracing {arguments.model}") as status:
        found = report(
            arguments.model,
            batch=arguments.batch,
            size=arguments.size,
            dtype=dtype,
            rung=arguments.rung,
            device=device,
            progress=status.update,
        )
    show(found, console)
    for option, write in (("png", draw), ("json", write_json)):
        if getattr(arguments, option) is not None:
            write(found, getattr(arguments, option))
            console.print(f"written: {getattr(arguments, option)}")
    return 0


def report(
    model: str,
    *,
    batch: int,
    size: int,
    dtype: torch.dtype,
    rung: str,
    device: torch.device | machine.Device,
    progress: Callable[[str], None] = lambda what: None,
) -> dict:
    """The roofline of a torchvision model as JSON-able data. A torch.device is measured, and so is each layer on it; of
    a known device there are floors only."""
    graph = roofline.traced(torchvision.models.get_model(model, weights=None), (3, size, size))
    ops = roofline.ops_of(graph)
    kernels = roofline.kernels(ops, rung)
    here = isinstance(device, torch.device)
    if here:
        progress(f"measuring {device}")
    rates = machine.measured(device, dtype) if here else device
    times: list[float | None] = [None] * len(kernels)
    if here:
        for i, kernel in enumerate(kernels):
            progress(f"layer {i + 1} of {len(kernels)}: {short(kernel.layers)}")
            times[i] = machine.time_unfused(machine.unfused(graph, kernel, batch, device, dtype), device)
        # What else the machine did may have hit the first measurement: a floor takes the better of two.
        rates = rates.best(machine.measured(device, dtype))
    limits = (batch, dtype.itemsize, rates.rate, rates.bandwidth)
    layers = []
    for kernel, seconds in zip(kernels, times, strict=True):
        floor = kernel.floor_s(*limits)
        layers.append(
            {
                "layers": kernel.layers,
                "ops": [op.label for op in kernel.ops],
                "flops": batch * kernel.flops,
                "bytes": kernel.bytes(*limits[:2]),
                "floor_s": floor,
                "bound": "compute" if floor <= batch * kernel.flops / rates.rate else "memory",
                "measured_s": seconds,
                "share": None if seconds is None else floor / seconds,
            }
        )
    return {
        "schema": 1,
        "environment": doctor.environment(),
        "model": model,
        "batch": batch,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "rung": rung,
        "device": {
            "name": rates.name,
            "flop_per_s": rates.rate,
            "bytes_per_s": rates.bandwidth,
            "source": rates.source,
        },
        "layers": layers,
        "ceilings": {r: batch / roofline.floor_s(ops, r, *limits) for r in roofline.RUNGS},
    }


def short(layers: list[str]) -> str:
    """['layer1.0.conv2', 'layer1.0.conv3', 'layer1.1.conv1'] -> 'layer1.0.conv2 + conv3 + layer1.1.conv1'"""
    said, before = [], None
    for layer in layers:
        owner, _, own = layer.rpartition(".")
        said.append(own if owner == before else layer)
        before = owner
    return " + ".join(said)


def show(found: dict, console: Console) -> None:
    """The table of layers and the ladder of ceilings."""
    device = found["device"]
    console.print(
        f"\n[bold]{found['model']}[/], batch {found['batch']}, {found['size']}x{found['size']}, {found['dtype']}; "
        f"{roofline.RUNGS[found['rung']]}"
    )
    console.print(
        f"{device['name']}: {device['flop_per_s'] / 1e12:.4g} TFLOP/s, {device['bytes_per_s'] / 1e9:.4g} GB/s "
        f"({device['source']})"
    )
    table = Table()
    for heading in ("", "GFLOP", "MB", "floor us", "bound", "measured us", "share"):
        table.add_column(heading, justify="right" if heading not in ("", "bound") else "left", overflow="fold")
    for layer in found["layers"]:
        table.add_row(*_row(short(layer["layers"]), layer))
    table.add_section()
    table.add_row(*_row("all", total(found)))
    console.print(table)
    if found["layers"][0]["measured_s"] is not None:
        console.print("measured: each kernel's ops alone, PyTorch's own, channels_last, batch norm folded; not a plan")
    ladder = Table(title="the most images/s that each rung could reach", title_justify="left", show_header=False)
    ladder.add_column("")
    ladder.add_column("", justify="right")
    for rung, ceiling in found["ceilings"].items():
        ladder.add_row(roofline.RUNGS[rung], f"{ceiling:,.0f}" if ceiling >= 100 else f"{ceiling:.1f}")
    console.print(ladder)


def total(found: dict) -> dict:
    """The sums over the layers."""
    layers = found["layers"]
    sums = {key: sum(layer[key] for layer in layers) for key in ("flops", "bytes", "floor_s")}
    measured = None if any(x["measured_s"] is None for x in layers) else sum(x["measured_s"] for x in layers)
    return {**sums, "bound": "", "measured_s": measured, "share": measured and sums["floor_s"] / measured}


def _row(name: str, layer: dict) -> list[str]:
    measured = layer["measured_s"]
    return [
        name,
        f"{layer['flops'] / 1e9:.2f}",
        f"{layer['bytes'] / 1e6:.1f}",
        f"{1e6 * layer['floor_s']:.1f}",
        layer["bound"],
        "-" if measured is None else f"{1e6 * measured:.1f}",
        "-" if measured is None else f"{layer['share']:.0%}",
    ]


def pyplot():
    """matplotlib.pyplot without a window; ImportError with the extra to install where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("matplotlib is not installed: pip install 'fused_resnet[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def draw(found: dict, path: str | Path) -> None:
    """A PNG: a bar a kernel, the floor in the colour of what bounds it, in front of what was measured."""
    plt = pyplot()
    layers = found["layers"]
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.19 * len(layers)), layout="constrained")
    places = range(len(layers))
    if layers[0]["measured_s"] is not None:
        axes.barh(places, [1e6 * x["measured_s"] for x in layers], color="#c9ced6", label="measured, unfused")
        for place, x in zip(places, layers, strict=True):
            axes.annotate(
                f" {x['share']:.0%}", (1e6 * max(x["measured_s"], x["floor_s"]), place), va="center", fontsize=7
            )
    for bound, colour in (("memory", "#3b6fb6"), ("compute", "#d9822b")):
        chosen = [i for i, x in enumerate(layers) if x["bound"] == bound]
        floors = [1e6 * layers[i]["floor_s"] for i in chosen]
        axes.barh(chosen, floors, height=0.5, color=colour, label=f"floor, bound by {bound}")
    axes.set_yticks(places, [short(x["layers"]) for x in layers], fontsize=7)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlabel("microseconds a batch")
    axes.legend(loc="best", fontsize=8)
    device = found["device"]
    axes.set_title(
        f"{found['model']}, batch {found['batch']}, {found['dtype']}, {device['name']} "
        f"({device['flop_per_s'] / 1e12:.3g} TFLOP/s, {device['bytes_per_s'] / 1e9:.3g} GB/s)\n"
        f"{roofline.RUNGS[found['rung']]}: at most {found['ceilings'][found['rung']]:,.4g} images/s",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_json(found: dict, path: str | Path) -> None:
    Path(path).write_text(json.dumps(found, indent=1) + "\n")
