"""Find things in a photo by a detector whose backbone is planned: `python examples/detect.py photo.jpg found.png`.

The detector stays torchvision's: `optimize_for_inference` takes its backbone, ResNet and feature pyramid, and gives it
a forward. The untouched detector and that one both look at the photo; what they find is compared box by box and drawn,
and both are timed in turns. On a GPU the backbone works in float16 unless asked otherwise, the rest in float32.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from pathlib import Path

import torch
import torchvision
from label_folder import DTYPES, TUNE, fetched, named_weights
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.ops import box_iou
from torchvision.transforms.functional import to_pil_image, to_tensor
from torchvision.utils import draw_bounding_boxes

import fused_resnet
from fused_resnet.cli import positive, upright
from fused_resnet.measure import time_once

MODELS = [name for name in torchvision.models.list_models(torchvision.models.detection) if "resnet50" in name]


def main(argv: list[str] | None = None) -> int:
    """0; or 1 if one detector finds what the other does not."""
    options = parser().parse_args(argv)
    image = photo(options.photo).to(options.device)
    untouched, labels = detector(options)
    planned, plan = with_planned_backbone(untouched, image, dtype=getattr(torch, options.dtype), tune=options.tune)
    print(plan)

    with torch.inference_mode():
        found, again = (model([image])[0] for model in (untouched, planned))
        seconds = in_turns({"untouched": untouched, "planned backbone": planned}, image, options.runs)
    pairs, alone = matched(found, again, options.score)
    Console().print(table_of(pairs, labels))
    for name, values in seconds.items():
        print(f"{name}: {1e3 * statistics.median(values):.1f} ms ({options.runs} runs in turns, median)")
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(f"{statistics.median(ratios):.2f} times as fast, heads and post-processing included")
    to_pil_image(drawn(image, again, labels, options.score)).save(options.out)
    print(f"{sum(again['scores'] >= options.score)} boxes of a score from {options.score:g} on: {options.out}")
    if alone:
        print(f"{alone} boxes were found by one of the detectors only")
    return int(alone > 0)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("photo", type=Path)
    p.add_argument("out", type=Path, help="a picture with the boxes, its format by its name")
    p.add_argument("--model", default="fasterrcnn_resnet50_fpn_v2", choices=MODELS)
    p.add_argument("--weights", default="DEFAULT", help="torchvision's name of them, or none for random ones")
    p.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="float16" if torch.cuda.is_available() else "float32", choices=DTYPES)
    p.add_argument("--tune", default="full", choices=("full", "cached", "off"), help=TUNE)
    p.add_argument("--score", type=float, default=0.5, help="what is drawn and compared")
    p.add_argument("--runs", type=positive, default=7)
    return p


def photo(path: Path) -> Tensor:
    """[3, H, W] between 0 and 1."""
    try:
        with Image.open(path) as image:
            return to_tensor(upright(image).convert("RGB"))
    except OSError as error:
        raise SystemExit(f"photo: {path} cannot be read ({error})") from None


def detector(options: argparse.Namespace) -> tuple[nn.Module, list[str]]:
    """(a detector in evaluation mode, the name of each class)."""
    weights, _ = named_weights(options.model, options.weights)
    model = fetched(options.model, weights=weights, weights_backbone=None)
    labels = torchvision.models.get_model_weights(options.model).DEFAULT.meta["categories"]
    return model.to(options.device).eval(), labels


def with_planned_backbone(model: nn.Module, image: Tensor, **options) -> tuple[nn.Module, str]:
    """(a copy of the detector whose backbone is planned for this image's size, the plan's first line). options: of
    optimize_for_inference."""
    planned = copy.deepcopy(model)
    batch, _ = planned.transform([image])
    fast = fused_resnet.optimize_for_inference(planned.backbone, batch.tensors, **options)
    planned.backbone.forward = lambda x: tree_map(lambda t: t.to(x.dtype), fast(x))
    return planned, str(fast.plan).splitlines()[0]


def in_turns(models: dict[str, nn.Module], image: Tensor, runs: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(runs):
        for name, model in models.items():
            seconds[name].append(time_once(functools.partial(model, [image]), image.device, 1))
    return seconds


def matched(found: dict[str, Tensor], again: dict[str, Tensor], score: float) -> tuple[list[tuple], int]:
    """([(label, score, score, overlap) of boxes that both found], how many were found once, far from the limit).

    Boxes fit that have one label and overlap by nine tenths. One of a score within 0.02 of the limit may be missing.
    """
    pairs, taken = [], set()
    overlaps = box_iou(found["boxes"], again["boxes"])
    overlaps = overlaps * (found["labels"][:, None] == again["labels"])
    for i, best in enumerate(overlaps.tolist()):
        free = [j for j in range(len(best)) if j not in taken]
        j = max(free, key=best.__getitem__, default=None)
        if j is not None and best[j] >= 0.9:
            taken.add(j)
            pairs.append((i, j, best[j]))
    first, second = found["scores"].tolist(), again["scores"].tolist()
    clear = score + 0.02
    alone = sum(s >= clear for i, s in enumerate(first) if i not in {i for i, _, _ in pairs})
    alone += sum(s >= clear for j, s in enumerate(second) if j not in taken)
    rows = [(found["labels"][i].item(), first[i], second[j], overlap) for i, j, overlap in pairs]
    return [row for row in rows if max(row[1:3]) >= score], alone


def table_of(pairs: list[tuple], labels: list[str]) -> Table:
    table = Table(*("label", "untouched", "planned", "overlap"), title="scores of what both found")
    for label, first, second, overlap in pairs:
        table.add_row(labels[label], f"{first:.4f}", f"{second:.4f}", f"{overlap:.4f}")
    return table


def drawn(image: Tensor, found: dict[str, Tensor], labels: list[str], score: float) -> Tensor:
    keep = found["scores"] >= score
    if not keep.any():
        return image.cpu()
    pairs = zip(found["labels"][keep].tolist(), found["scores"][keep].tolist(), strict=True)
    names = [f"{labels[label]} {value:.2f}" for label, value in pairs]
    return draw_bounding_boxes(image.cpu(), found["boxes"][keep].cpu(), names, width=3)


if __name__ == "__main__":
    raise SystemExit(main())
