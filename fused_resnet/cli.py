"""The command line: `python -m fused_resnet classify | bench | roofline | zoo | explore | doctor`.

Exit status: 0 fine; 1 the fused model disagrees with the untouched one; 2 an argument is wrong; 3 the weights could not
be had; 4 something else went wrong, with its traceback.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import socket
import sys
import traceback
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.table import Table
from torch import nn

from . import __version__, backends, doctor, measure, models, zoo
from .convert import swap_blocks, swap_report
from .engine import optimize_for_inference

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DISAGREES, WRONG_ARGUMENT, NO_WEIGHTS, FAILED = 1, 2, 3, 4
NETWORK_TIMEOUT_S = 20
COMMANDS = "classify | bench | roofline | zoo | explore | doctor"
VERSIONS = ("fused_resnet", "python", "system", "torch", "torchvision", "triton", "cuda", "cudnn", "nvcc", "driver")
TITLES = {
    "eager": "torchvision, eager",
    "channels_last": "torchvision, channels_last",
    "compile": "torch.compile, channels_last",
    "fused": "fused_resnet",
    "fused_channels_last": "fused_resnet, NHWC input",
    "fused_captured": "fused_resnet, NHWC, captured",
    "optimized": "optimize_for_inference",
}
PARITIES = {"parity": "", "parity_optimized": " of optimize_for_inference"}  # keys of a case


class CliError(Exception):
    """A message for the user and the exit status."""

    def __init__(self, message: str, status: int = WRONG_ARGUMENT):
        super().__init__(message)
        self.status = status


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = parser().parse_args(argv)
    # Where nobody's terminal gives a width, tables are as wide as they need.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    try:
        if getattr(arguments, "threads", None):
            torch.set_num_threads(arguments.threads)
        if reason := backends.unknown():
            raise CliError(reason)
        return arguments.run(arguments, console)
    except CliError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"fused-resnet: error: {error}")
        return error.status
    except Exception:  # 1 would say that the models disagree
        traceback.print_exc()
        return FAILED


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fused-resnet",
        description="Fused residual blocks for PyTorch's ResNets.",
        epilog="Exit status: 0 fine; 1 the fused model disagrees with the untouched one; 2 an argument is wrong; "
        "3 the weights could not be had; 4 something else went wrong.",
    )
    top.add_argument("--version", action="version", version=f"fused_resnet {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar=COMMANDS)

    c = commands.add_parser("classify", help="classify a photo with the untouched and the fused model, side by side")
    c.add_argument("image", metavar="IMAGE", help="an image file")
    c.add_argument("--model", default="resnet50", choices=models.TORCHVISION, metavar="MODEL", help="default: resnet50")
    w = c.add_mutually_exclusive_group()
    w.add_argument(
        "--weights",
        metavar="NAME|FILE",
        help="torchvision's weights by name (default: DEFAULT; downloaded once) or a checkpoint file",
    )
    w.add_argument("--random", action="store_true", help="random weights, for a machine without network: no meaning")
    c.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default: cuda if there is one")
    c.add_argument("--threads", type=positive, help="CPU threads")
    c.set_defaults(run=classify)

    b = commands.add_parser("bench", help="parity and speed of a model beside the untouched one")
    b.add_argument("model", metavar="MODEL", choices=models.TORCHVISION, help=", ".join(models.TORCHVISION))
    b.add_argument("--batch", type=positive, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    b.add_argument("--size", type=at_least(32), default=224, help="height and width of the images; default: 224")
    b.add_argument("--train", action="store_true", help="training mode, forward and backward; parity of gradients")
    b.add_argument("--compile", action="store_true", help="torch.compile as well; takes a minute to be ready on a CPU")
    text = "optimize_for_inference as well; seconds a batch size on a CPU, a minute or more on a GPU that is new to it"
    b.add_argument("--optimized", action="store_true", help=text)
    b.add_argument("--dtype", default="float32", choices=DTYPES)
    b.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default: cuda if there is one")
    b.add_argument("--threads", type=positive, help="CPU threads")
    b.add_argument("--seconds", type=_seconds, default=20.0, help="time spent on the timing of each batch; default: 20")
    b.add_argument("--seeds", type=positive, default=3, help="inputs that parity is checked with; default: 3")
    b.add_argument("--json", metavar="FILE", help="write everything, and what it was measured on")
    b.set_defaults(run=bench)

    from . import explore, roofline_cli  # they build on this module

    roofline_cli.add_command(commands)
    zoo.add_command(commands)
    explore.add_command(commands)

    d = commands.add_parser("doctor", help="what is installed, which backend runs, and why not the others")
    d.add_argument("--json", action="store_true", help="print JSON")
    d.set_defaults(run=show_doctor)
    return top


def at_least(least: int):
    def integer(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
        return int(text)

    return integer


positive = at_least(1)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text!r}")
    return value


def _device(name: str) -> torch.device:
    """The device that --device names, on which the backend that is forced, if any, can run."""
    device = named_device(name)
    forced = backends.forced()
    if forced and (reason := backends.refuses_device(forced, device)):
        raise CliError(f"{backends.ENVIRONMENT}: {reason}")
    return device


def named_device(name: str, known=()) -> torch.device:
    """known: names that the caller knows besides, for the message."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CliError(f"--device: expected {', '.join(['cpu', 'cuda', *known])} or cuda:<n>, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise CliError(f"--device: expected cpu, cuda or cuda:<n>, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CliError(f"--device: {name} was asked for, but PyTorch sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CliError(f"--device: {name} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return device


# --- classify ---------------------------------------------------------------------------------------------------------


def classify(arguments: argparse.Namespace, console: Console) -> int:
    """Top five of an image from both models; status 1 if their logits differ by more than rounding explains."""
    device = _device(arguments.device)
    image = _open(arguments.image)
    untouched, weights, categories = _classifier(arguments, console)
    x = weights.transforms()(image).unsqueeze(0).to(device)
    untouched = untouched.eval().to(device)
    fused = swap_blocks(copy.deepcopy(untouched))
    with torch.no_grad():
        a, b = untouched(x)[0].float().cpu(), fused(x)[0].float().cpu()
    verdict = measure.parity(untouched, fused, [x])

    table = Table(title=f"{Path(arguments.image).name}: {arguments.model} on {device}")
    for heading in ("", "untouched", "", "fused", ""):
        table.add_column(heading, justify="right" if not heading else "left")
    for rank, (i, j) in enumerate(zip(a.topk(min(5, len(a)))[1], b.topk(min(5, len(b)))[1], strict=True), 1):
        one = (categories(i.item()), f"{a.softmax(0)[i]:.2%}")
        table.add_row(str(rank), *one, categories(j.item()), f"{b.softmax(0)[j]:.2%}")
    console.print(table)
    if arguments.random:
        console.print("The weights are random: the predictions are meaningless, only their agreement counts.")
    nearest = verdict["nearest"]["output"]
    console.print(
        f"largest absolute difference of the {len(a)} logits: {(a - b).abs().max():.2e} "
        f"(relative error {nearest['error']:.1e}, allowed {nearest['limit']:.1e})"
    )
    console.print(f"blocks: {str(swap_report(fused)).splitlines()[0]}")
    if not verdict["ok"]:
        console.print("[bold red]The models disagree by more than rounding explains.[/]")
        return DISAGREES
    return 0


def upright(image: Image.Image) -> Image.Image:
    """In RGB, and as the camera was held."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = image.point(lambda v: v / 257, "L")  # conversion would cut off all above 255
    return image.convert("RGB")


def _open(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return upright(image)
    except UnidentifiedImageError:
        raise CliError(f"IMAGE: {path} is not an image that Pillow can read") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise CliError(f"IMAGE: cannot read {path!r}: {getattr(error, 'strerror', None) or error}") from None


def _classifier(arguments: argparse.Namespace, console: Console):
    """(untouched model, weights entry with its transforms, function from class index to name)."""
    enum = torchvision.models.get_model_weights(arguments.model)
    asked = arguments.weights or "DEFAULT"
    named = enum.__members__.get(asked)
    entry = named or enum.DEFAULT
    classes = entry.meta["categories"]
    if arguments.random:
        return measure.build_model(arguments.model), entry, classes.__getitem__
    state = _checkpoint(asked, enum) if named is None else _download(named, console)
    head = state.get("fc.weight")
    count = len(classes) if head is None else head.shape[0] if head.dim() == 2 else 0
    if count < 1:
        raise CliError(f"--weights: {asked} has an fc.weight of shape {list(head.shape)}, not [classes, features]")
    model = torchvision.models.get_model(arguments.model, weights=None, num_classes=count)
    _load(model, state, arguments)
    return model, entry, classes.__getitem__ if count == len(classes) else "class {}".format


def _download(entry, console: Console) -> dict:
    """torchvision's weights, from the cache or the network; a stalled connection ends after NETWORK_TIMEOUT_S."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_S)
    try:
        return entry.get_state_dict(progress=console.is_terminal, check_hash=True)
    except (OSError, RuntimeError) as error:  # URLError and time-outs are OSErrors; RuntimeError: the hash does not fit
        reason = getattr(error, "reason", None) or error
        raise CliError(
            f"--weights {entry.name}: the download failed ({reason}); give a checkpoint with --weights FILE, or use "
            "--random",
            NO_WEIGHTS,
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def _checkpoint(path: str, enum) -> dict:
    if not Path(path).is_file():
        names = ", ".join(["DEFAULT", *(w.name for w in enum)])
        raise CliError(f"--weights: {path} is neither a file nor one of {names}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in as many ways as there are files
        words = next(iter(str(error).splitlines()), type(error).__name__)
        raise CliError(f"--weights: {path} is not a checkpoint of tensors: {words}") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(state[k], torch.Tensor) for k in state):
        raise CliError(f"--weights: {path} holds no state_dict")
    return {key.removeprefix("module."): value for key, value in state.items()}  # DistributedDataParallel's prefix


def _load(model: nn.Module, state: dict, arguments: argparse.Namespace) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = " ".join(str(error).splitlines()[1:2]).strip()[:200]
        raise CliError(f"--weights: {arguments.weights} does not fit --model {arguments.model}: {detail}") from None


# --- bench ------------------------------------------------------------------------------------------------------------


def bench(arguments: argparse.Namespace, console: Console) -> int:
    """Parity, then speed, for each batch; status 1 if parity fails."""
    device, dtype = _device(arguments.device), DTYPES[arguments.dtype]
    if arguments.json is not None:
        writable("--json", arguments.json)
    if arguments.train and arguments.size <= 32 and min(arguments.batch) == 1:
        raise CliError("--size: with --train and a batch of 1, the last maps need more than one value: at least 33")
    if arguments.train and arguments.optimized:
        raise CliError("--optimized: optimize_for_inference is for inference, and --train asks for training")
    with console.status(f"building {arguments.model}") as status:

        def tell(what: str) -> None:
            if "optimize" in what:  # which has a bar of its own
                status.stop()
            else:
                status.start()
                status.update(what)

        result = run_bench(
            arguments.model,
            batches=arguments.batch,
            size=arguments.size,
            train=arguments.train,
            compiled=arguments.compile,
            optimized=arguments.optimized,
            dtype=dtype,
            device=device,
            seconds=arguments.seconds,
            seeds=arguments.seeds,
            progress=tell,
        )
    for case in result["cases"]:
        show_case(case, console)
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written: {arguments.json}")
    verdicts = [case[key]["ok"] for case in result["cases"] for key in PARITIES if key in case]
    return 0 if all(verdicts) else DISAGREES


def writable(option: str, path: str) -> None:
    """Raise before anything is measured if the result could not be written."""
    existed = os.path.exists(path)
    try:
        with open(path, "a"):
            pass
    except OSError as error:
        raise CliError(f"{option}: cannot write {path!r}: {error.strerror}") from None
    if not existed:
        os.remove(path)


def run_bench(
    model: str,
    *,
    batches,
    size,
    train,
    compiled,
    dtype,
    device,
    seconds,
    optimized=False,
    seeds=3,
    progress=lambda what: None,
) -> dict:
    """What `bench` measures, as JSON-able data: one entry in 'cases' a batch size."""
    untouched = measure.build_model(model, firm=train).to(device=device, dtype=dtype)
    # float64 is slow: parity is checked on two images, which in training is also the least that makes a batch.
    inputs = [measure.random_input((2, 3, size, size), seed, device, dtype) for seed in range(seeds)]
    parities = {
        "parity": measure.parity(
            untouched, swap_blocks(copy.deepcopy(untouched)), inputs, train=train, progress=progress
        )
    }
    if optimized:
        progress("optimize_for_inference")
        fast = optimize_for_inference(untouched, inputs[0])
        parities["parity_optimized"] = measure.parity(untouched, fast, inputs, progress=progress)
    cases = []
    for batch in batches:
        variants = measure.variants_of(device, train=train, compiled=compiled, optimized=optimized)
        x = measure.random_input((batch, 3, size, size), 0, device, dtype)
        with measure.fastest_library():
            timed = measure.Variants(untouched, x, variants, train=train, progress=progress).measure(seconds, progress)
        for t in timed["variants"].values():
            t["images_per_s"] = 1e3 * batch / t["p50_ms"]
        cases.append(
            {
                "model": model,
                "mode": "train" if train else "eval",
                "batch": batch,
                "size": size,
                "dtype": str(dtype).removeprefix("torch."),
                "device": device.type,
                **parities,
                **timed,
            }
        )
    return {"schema": 1, "environment": doctor.environment(), "cases": cases}


def show_case(case: dict, console: Console) -> None:
    """The parity and the table of speed of one case."""
    what = "forward and backward" if case["mode"] == "train" else "forward"
    console.print(
        f"\n[bold]{case['model']}[/], {case['mode']} mode, batch {case['batch']}, {case['size']}x{case['size']}, "
        f"{case['dtype']}, {case['device']}: {what}"
    )
    for key, whose in PARITIES.items():
        for kind, p in case.get(key, {}).get("nearest", {}).items():
            console.print(
                f"  parity{whose}, {kind}: {p['tensors']} tensors; nearest to its limit {p['tensor']}: "
                f"off by {p['error']:.1e}, torchvision itself by {p['torchvision']:.1e}, allowed {p['limit']:.1e}"
            )
        for violation in case.get(key, {}).get("violations", [])[:8]:
            console.print(f"  [bold red]parity{whose} fails[/]: {violation}")
    table = Table()
    for heading in ("", "p20 ms", "p50 ms", "p80 ms", "images/s", "speed / eager", "peak memory", "ready after"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, t in case["variants"].items():
        peak = "-" if t["peak_mib"] is None else f"{t['peak_mib']:.0f} MiB"
        row = [f"{t[p]:.2f}" for p in ("p20_ms", "p50_ms", "p80_ms")]
        table.add_row(
            TITLES[name], *row, f"{t['images_per_s']:.1f}", f"{t['ratio']:.2f}", peak, f"{t['ready_s']:.1f} s"
        )
    console.print(table)
    console.print(f"  noise of a ratio: {case['noise']:.1%}; do not rank what is closer")


# --- doctor -----------------------------------------------------------------------------------------------------------


def show_doctor(arguments: argparse.Namespace, console: Console) -> int:
    """Print what doctor.report() found."""
    found = doctor.report()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    environment = found["environment"]
    table = _plain_table("versions")
    for name in VERSIONS:
        table.add_row(name, environment[name] or "-")
    table.add_row("cpu", f"{environment['cpu']}, {environment['threads']} threads in use")
    for i, gpu in enumerate(environment["gpus"]):
        table.add_row(f"gpu {i}", f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB")
    if not environment["gpus"]:
        table.add_row("gpu", "none that PyTorch sees")
    console.print(table)

    table = _plain_table("backends")
    for name, reason in found["backends"].items():
        table.add_row(name, "available" if reason is None else f"not here: {reason}")
    if found["forced"]:
        table.add_row("forced", found["forced"])
    console.print(table)

    table = Table(title="which backend runs which op", title_justify="left")
    table.add_column("op")
    for device in found["choices"]:
        table.add_column(device)
    for op in doctor.OPS:
        table.add_row(op, *(ops[op]["backend"] or "none" for ops in found["choices"].values()))
    console.print(table)
    reasons = {r for ops in found["choices"].values() for c in ops.values() for r in c["declined"]}
    for reason in sorted(reasons):
        console.print(f"  {reason}", markup=False)

    table = _plain_table("optimize_for_inference")
    for name, what in found["optimize_for_inference"].items():
        table.add_row(name, what)
    console.print(table)

    table = _plain_table("build")
    convolutions, chains = found["build"].pop("conv", []), found["build"].pop("chain", [])
    for name, value in found["build"].items():
        table.add_row(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    if not found["build"]:
        table.add_row("nothing compiled", "pip install builds the compiled part")
    console.print(table)
    if convolutions:
        console.print(_convolutions_table(convolutions + [c | {"arch": 90} for c in chains]))

    table = _plain_table("environment variables")
    for name, meaning in doctor.VARIABLES.items():
        table.add_row(name, f"{environment['variables'].get(name, '(unset)')}: {meaning}")
    console.print(table)
    return 0


def _convolutions_table(instances: list[dict]) -> Table:
    table = Table(title="compiled convolutions and chains", title_justify="left")
    for column in ("tile", "dtype", "runs on", "stages", "threads", "shared KiB", "registers"):
        table.add_column(column)
    for i in instances:
        runs_on = "9.0" if i["arch"] == 90 else "8.0 and newer"
        registers = ", ".join(f"{count} on {arch}" for arch, count in i["registers"].items())
        stages = i["stages"] if isinstance(i["stages"], int) else "+".join(map(str, i["stages"]))
        sizes = (str(stages), str(i["threads"]), f"{i['shared_bytes'] / 1024:.0f}")
        table.add_row(i["name"], i["dtype"], runs_on, *sizes, registers)
    return table


def _plain_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    return table
