"""Plain and residual twins: networks of the CIFAR family that differ in the shortcut alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from fused_resnet import models

from . import Refused, data, options, processes

KINDS = ("plain", "residual")
LINES = {"plain": "--", "residual": "-"}
COLOURS = ("#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#4d4d4d")  # Okabe and Ito's
LAYERS = {"basic": 6, "bottleneck": 9}  # that one more block in each of the three stages adds


@dataclass(frozen=True)
class Twin:
    """kind: plain or residual. depth: 6n + 2 (block: basic) or 9n + 2 (bottleneck). The rest: as cifar_resnet's."""

    kind: str
    depth: int
    block: str = "basic"
    activation: str = "post"
    shortcut: str = "projection"

    @property
    def name(self) -> str:
        return f"{self.kind}-{'bottleneck-' * (self.block == 'bottleneck')}{self.depth}"

    def build(self, seed: int, found: data.Data) -> nn.Module:
        """On the CPU, in channels_last. Twins of one seed have the same weights in every layer that both have."""
        described = asdict(self)
        residual = described.pop("kind") == "residual"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = models.cifar_resnet(
                **described, residual=residual, num_classes=found.classes, in_channels=found.channels
            )
        return network.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD without Nesterov, weight decay of every parameter, half a cosine down to 0."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    seed: int
    accumulate: ClassVar[int] = 1
    warmup: ClassVar[float] = 0.0
    workers: ClassVar[None] = None

    def optimizer(self, network: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(network.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


def coloured(sizes: Sequence[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """A colour for each block and depth of a picture."""
    return dict(zip(sizes, cycle(COLOURS), strict=False))


# --- what the command lines of both examples share ------------------------------------------------------------------


@dataclass(frozen=True)
class TwinOptions(options.DataOptions):
    """One field an option, under its name, of those that `add_...` below and `options.add_data` add."""

    shortcut: str
    batch_size: int | None
    lr: float
    momentum: float
    weight_decay: float
    device: str
    out: Path
    record: Path
    picture: Path


def depth(block: str) -> Callable[[str], int]:
    """An option's type: the depth of a network of such blocks."""
    step = LAYERS[block]

    def convert(text: str) -> int:
        layers = options.count(text)
        if layers <= 2 or (layers - 2) % step:
            some = ", ".join(str(step * n + 2) for n in (1, 2, 3))
            raise argparse.ArgumentTypeError(f"expected {step}n + 2 ({some}, ...) for {block} blocks, got {text!r}")
        return layers

    return convert


def add_optimizer(group) -> None:
    text = "images in one step (default: 128 for CIFAR-10, 64 for the digits)"
    group.add_argument("--batch-size", metavar="N", type=options.count, help=text)
    group.add_argument("--lr", metavar="X", type=options.positive, default=0.1, help="of SGD (default: 0.1)")
    group.add_argument("--momentum", metavar="X", type=options.share, default=0.9, help="(default: 0.9)")
    text = "of every parameter (default: 5e-4)"
    group.add_argument("--weight-decay", metavar="X", type=options.not_negative, default=5e-4, help=text)


def add_shortcut(group) -> None:
    text = (
        "where maps shrink, a 1x1 convolution (option B) or zeros (A); C: convolutions everywhere (default: projection)"
    )
    group.add_argument(
        "--shortcut", choices=("projection", "zero_pad", "projection_all"), default="projection", help=text
    )


def add_files(group, name: str) -> None:
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if any)")
    text = f"folder of everything that is written (default: runs/{name})"
    group.add_argument("--out", metavar="DIR", type=Path, default=Path("runs", name), help=text)
    text = f"the numbers (default: {name}.json in --out)"
    group.add_argument("--record", metavar="FILE", type=Path, help=text)
    text = f"the curves, for which matplotlib is needed (default: {name}.png in --out)"
    group.add_argument("--picture", metavar="FILE", type=Path, help=text)


@contextmanager
def alone(device: str):
    """The one process of an example that knows of no others."""
    with processes.team(device) as team:
        if team.world > 1:
            raise Refused(f"--nproc-per-node: must be 1, got {team.world}; only train.py trains in several processes")
        yield team


def load(chosen, team: processes.Team) -> data.Data:
    found = data.load(chosen, team)
    return found if chosen.workers is None else replace(found, workers=chosen.workers)


def batch_size(chosen, found: data.Data) -> int:
    return chosen.batch_size or {"cifar10": 128, "digits": 64}[found.name]


def make_folders(chosen) -> None:
    files = {"--out": chosen.out, "--record": chosen.record.parent, "--picture": chosen.picture.parent}
    for option, folder in files.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"{option}: cannot be made a folder: {error}") from error
