"""The command line of examples/train.py, and what others share of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_resnet import models


@dataclass(frozen=True)
class DataOptions:
    """One field an option of `add_data`, under its name."""

    dataset: str
    data: Path
    download: bool
    workers: int | None


@dataclass(frozen=True)
class Options(DataOptions):
    """One field an option, under its name; `parse` holds the defaults."""

    model: str
    blocks: str
    sync_bn: bool
    epochs: int
    batch_size: int
    accumulate: int
    lr: float
    momentum: float
    weight_decay: float
    warmup: float
    label_smoothing: float
    clip_grad: float | None
    amp: str
    capture: bool
    seed: int
    deterministic: bool
    device: str
    out: Path
    export: Path | None
    save_every: int
    resume: bool
    fresh: bool


# What a run may go on with although it began with something else: none of it changes a number.
FREE = {"data", "download", "workers", "out", "export", "save_every", "resume", "fresh"}


def _number(kind: Callable, wanted: str, accepts: Callable[[float], bool]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return convert


count = _number(int, "an integer of at least 1", lambda v: v >= 1)
count_or_none = _number(int, "an integer of at least 0", lambda v: v >= 0)
seed = _number(int, "an integer from 0 to 4294967295", lambda v: 0 <= v < 2**32)
positive = _number(float, "a number above 0", lambda v: 0 < v < float("inf"))
not_negative = _number(float, "a number of at least 0", lambda v: 0 <= v < float("inf"))
share = _number(float, "a number from 0 to below 1", lambda v: 0 <= v < 1)


def parse(arguments: Sequence[str] | None = None, description: str = "") -> Options:
    """Options from the command line. Exits with status 2 and a sentence that names the option if one cannot be."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser.add_argument_group("data"))
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("training"))
    _add_run(parser.add_argument_group("run"))
    options = Options(**vars(parser.parse_args(arguments)))
    check_data(parser, options)
    if options.blocks == "torchvision" and options.model.startswith(("plain", "preact")):
        parser.error(f"--blocks torchvision: torchvision has no blocks of --model {options.model}")
    return options


def add_data(group) -> None:
    text = "auto: CIFAR-10 if it lies in --data, else scikit-learn's 1,797 handwritten digits (default: auto)"
    group.add_argument("--dataset", choices=("auto", "cifar10", "digits"), default="auto", help=text)
    text = "folder with torchvision's cifar-10-batches-py (default: data)"
    group.add_argument("--data", metavar="DIR", type=Path, default=Path("data"), help=text)
    group.add_argument("--download", action="store_true", help="fetch CIFAR-10 into --data (170 MB) if it is not there")
    text = "processes that load images, for each that trains (default: 4 for CIFAR-10, none for the digits)"
    group.add_argument("--workers", metavar="N", type=count_or_none, help=text)


def check_data(parser: argparse.ArgumentParser, options) -> None:
    if options.download and options.dataset == "digits":
        parser.error("--download: is for CIFAR-10, and --dataset is digits, which come with scikit-learn")


def _add_model(group) -> None:
    text = "one of torchvision's ResNets or of fused_resnet.models' family, with a stem for small images; "
    choices = (*models.TORCHVISION, *models.FAMILY)
    text += f"{', '.join(choices)} (default: resnet18)"
    group.add_argument("--model", metavar="NAME", choices=choices, default="resnet18", help=text)
    text = "fused: swap_blocks(model); torchvision: the same model, of the same seed, untouched (default: fused)"
    group.add_argument("--blocks", choices=("fused", "torchvision"), default="fused", help=text)
    text = "batch statistics over all processes (needs GPUs)"
    group.add_argument("--sync-bn", action="store_true", help=text)


def _add_training(group) -> None:
    group.add_argument("--epochs", metavar="N", type=count, default=30, help="(default: 30)")
    text = "images in one optimizer step, over all processes and accumulated parts (default: 128)"
    group.add_argument("--batch-size", metavar="N", type=count, default=128, help=text)
    text = "parts that each process computes its share of a batch in, one after the other, to save memory (default: 1)"
    group.add_argument("--accumulate", metavar="N", type=count, default=1, help=text)
    text = "highest learning rate of SGD (default: 0.1)"
    group.add_argument("--lr", metavar="X", type=positive, default=0.1, help=text)
    text = "Nesterov's; 0 is plain SGD (default: 0.9)"
    group.add_argument("--momentum", metavar="X", type=share, default=0.9, help=text)
    text = "of weights; batch norms and biases have none (default: 5e-4)"
    group.add_argument("--weight-decay", metavar="X", type=not_negative, default=5e-4, help=text)
    text = "share of the steps in which the rate rises, before it falls along a cosine (default: 0.1)"
    group.add_argument("--warmup", metavar="X", type=share, default=0.1, help=text)
    group.add_argument("--label-smoothing", metavar="X", type=share, default=0.0, help="(default: 0)")
    text = "scale gradients down to this 2-norm (default: never)"
    group.add_argument("--clip-grad", metavar="X", type=positive, help=text)
    text = "mixed precision; on a CPU it runs, but is not faster (default: none)"
    group.add_argument("--amp", choices=("none", "bf16", "fp16"), default="none", help=text)
    text = "steps by CUDA graphs (fused_resnet.capture_training): a step no longer waits for the host (needs a GPU)"
    group.add_argument("--capture", action="store_true", help=text)


def _add_run(group) -> None:
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if any)")
    text = "of weights, order and augmentation (default: 0)"
    group.add_argument("--seed", metavar="N", type=seed, default=0, help=text)
    text = "on a GPU: only kernels that give the same bits every time, and slower ones for it; a CPU's always do"
    group.add_argument("--deterministic", action="store_true", help=text)
    text = "folder of last.pt, best.pt, metrics.jsonl and curve.png (default: runs/train)"
    group.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/train"), help=text)
    text = "write the state_dict that the run ends with, and beside it a .json of what made it"
    group.add_argument("--export", metavar="FILE.pt", type=Path, help=text)
    text = "save last.pt every N steps as well as after every epoch (default: only then)"
    group.add_argument("--save-every", metavar="N", type=count_or_none, default=0, help=text)
    start = group.add_mutually_exclusive_group()
    text = "go on with --out's last.pt, and fail if there is none (default: go on if there is one)"
    start.add_argument("--resume", action="store_true", help=text)
    start.add_argument("--fresh", action="store_true", help="start anew, and overwrite what is in --out")
