"""`python -m fused_resnet zoo`: every network of models.py with its depth, parameters, FLOP and sizes, counted."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from . import models

SIZES = {"imagenet": 224, "cifar": 32}


@dataclass(frozen=True)
class Entry:
    """name: in fused_resnet.models. stages: blocks in each. depth: convolutions on the main path, and the classifier.

    parameters: numbers that are trained. flop: of one image, a multiply-add being two, of convolutions and classifier
    (the papers count multiply-adds and call them FLOP: half of it). size: [C, H, W] of the image. maps: [C, H, W] after
    the stem and after each stage.
    """

    name: str
    block: str
    stages: tuple[int, ...]
    depth: int
    parameters: int
    flop: int
    size: tuple[int, int, int]
    maps: tuple[tuple[int, int, int], ...]
    classes: int


@functools.cache
def entry(name: str) -> Entry:
    """Counted on the network itself, one image going through it without a value being computed.

    Raises ValueError for a name that is not in fused_resnet.models.
    """
    if name not in (*models.TORCHVISION, *models.FAMILY):
        raise ValueError(f"name: expected one of fused_resnet.models, got {name!r}")
    with torch.device("meta"):
        model = getattr(models, name)().eval()
    pixels = SIZES["cifar" if name.startswith("cifar") else "imagenet"]
    stages = [m for n, m in model.named_children() if n.startswith("layer")]
    flop, maps = 0, []

    def count(module: nn.Module, inputs, y: torch.Tensor) -> None:
        nonlocal flop
        flop += 2 * math.prod(y.shape[1:]) * module.weight[0].numel()

    def keep(module: nn.Module, inputs, y: torch.Tensor) -> None:
        maps.append(tuple(y.shape[1:]))

    named = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for _, m in named:
        m.register_forward_hook(count)
    for m in (model.maxpool, *stages):
        m.register_forward_hook(keep)
    size = (model.conv1.in_channels, pixels, pixels)
    with torch.inference_mode():
        model(torch.empty(1, *size, device="meta"))
    return Entry(
        name,
        "bottleneck" if hasattr(stages[0][0], "conv3") else "basic",
        tuple(map(len, stages)),
        sum(".downsample." not in n for n, _ in named),
        sum(p.numel() for p in model.parameters()),
        flop,
        size,
        tuple(maps),
        model.fc.out_features,
    )


def add_command(commands) -> None:
    z = commands.add_parser("zoo", help="the networks there are: stages, depth, parameters, FLOP, sizes")
    z.add_argument("--json", action="store_true", help="print JSON")
    z.set_defaults(run=show)


def show(arguments, console: Console) -> int:
    entries = [entry(name) for name in (*models.TORCHVISION, *models.FAMILY)]
    if arguments.json:
        print(json.dumps([asdict(e) for e in entries], indent=1))
        return 0
    table = Table(box=box.SIMPLE)
    for heading in ("network", "block", "stages", "depth", "parameters", "GFLOP", "image", "maps after the stages"):
        right = heading in ("depth", "parameters", "GFLOP", "image")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for e in entries:
        maps = " ".join(f"{c}x{h}" for c, h, _ in e.maps[1:])
        stages = "-".join(map(str, e.stages))
        row = (e.name, e.block, stages, str(e.depth), f"{e.parameters:,}", f"{e.flop / 1e9:.3g}", f"{e.size[1]}", maps)
        table.add_row(*row, end_section=e.name == models.TORCHVISION[-1])
    console.print(table)
    console.print(
        "FLOP: of one image, a multiply-add being two (He et al. count it once). maps: channels x height.\n"
        "1000 classes from images of 224 pixels, 10 from images of 32."
    )
    return 0
