"""Label every picture under a folder, as fast as the network is: `python examples/label_folder.py photos labels.jsonl`.

Pictures are read and resized by threads while a planned network (`optimize_for_inference`) works on the batch before.
All batches have one size, the last filled up, so that there is one plan and, on a GPU, one graph. A line of JSON per
picture: its path under the folder, and its likeliest labels with their probabilities, or the reason why it could not be
read. What the output file has already is not done again: after Ctrl-C or a crash the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
import torchvision
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import fused_resnet
from fused_resnet.cli import positive, upright

DTYPES = ("float16", "bfloat16", "float32")
TUNE = "full: each step is measured, minutes on a GPU that is new to it; cached: what is known of steps like it; off"
KINDS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    done = finished(options.out)
    names = sorted(str(p.relative_to(options.folder)) for p in options.folder.rglob("*") if p.suffix.lower() in KINDS)
    todo = [name for name in names if name not in done]
    print(f"{len(names)} pictures under {options.folder}, {len(names) - len(todo)} of them in {options.out} already")
    if not todo:
        return 0

    model, transform, labels = classifier(options)
    example = transform(Image.new("RGB", (320, 240))).expand(options.batch, -1, -1, -1).contiguous()
    dtype = getattr(torch, options.dtype)
    fast = fused_resnet.optimize_for_inference(model, example.to(options.device), dtype=dtype, tune=options.tune)
    print(str(fast.plan).splitlines()[0])

    columns = (TextColumn("{task.fields[speed]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start, count = time.perf_counter(), 0
    with open(options.out, "a") as out, Progress(*columns, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=len(todo), speed="")
        for lines in labelled(fast, todo, transform, labels, options):
            out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            out.flush()
            count += len(lines)
            bar.update(task, completed=count, speed=f"{count / (time.perf_counter() - start):.0f} pictures/s")
    seconds = time.perf_counter() - start
    print(f"{count} pictures in {seconds:.1f} s, {count / seconds:.0f} a second, reading and resizing included")
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=folder, help="where the pictures are, at any depth")
    p.add_argument("out", type=Path, help="file of JSON lines, appended to")
    p.add_argument("--model", default="resnet50", choices=fused_resnet.models.TORCHVISION)
    p.add_argument("--weights", default="DEFAULT", help="torchvision's name of them, or none for random ones")
    p.add_argument("--batch", type=positive, default=64 if torch.cuda.is_available() else 8)
    p.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="float16" if torch.cuda.is_available() else "float32", choices=DTYPES)
    p.add_argument("--tune", default="full", choices=("full", "cached", "off"), help=TUNE)
    p.add_argument("--threads", type=positive, default=8, help="that read and resize pictures")
    p.add_argument("--top", type=positive, default=5, help="labels of each picture")
    return p


def folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


def finished(path: Path) -> set[str]:
    """Names that the output has. A last line that a crash cut short is taken away, and its picture done again."""
    if not path.exists():
        return set()
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return {json.loads(line)["file"] for line in whole.splitlines()}


def named_weights(model: str, name: str):
    """(torchvision's weights, or None for random ones; the name of each class)."""
    enum = torchvision.models.get_model_weights(model)
    if name.lower() == "none":
        return None, [f"class {i}" for i in range(1000)]
    if name not in enum.__members__:
        raise SystemExit(f"--weights: {model} has {', '.join(enum.__members__)} or none, not {name}")
    return enum[name], enum[name].meta["categories"]


def fetched(model: str, **options) -> nn.Module:
    """torchvision's model of this name."""
    try:
        return torchvision.models.get_model(model, **options)
    except OSError as error:  # no network, or a full disk
        raise SystemExit(f"--weights: they could not be fetched ({error}); `--weights none` tries without") from None


def classifier(options: argparse.Namespace):
    """(the network on its device, what makes a picture its input, the name of each class)."""
    weights, labels = named_weights(options.model, options.weights)
    model = fetched(options.model, weights=weights)
    transform = (weights or torchvision.models.get_model_weights(options.model).DEFAULT).transforms()
    return model.to(options.device), transform, labels


def labelled(fast, names: list[str], transform, labels: list[str], options) -> Iterator[list[dict]]:
    """Lines of each batch. While the network works on one, its threads read the next."""
    with ThreadPoolExecutor(options.threads) as pool:
        pending: deque[tuple[list[str], list[dict], Tensor | None]] = deque()
        for group, pictures in grouped(pool, names, transform, options):
            read = [(name, picture) for name, picture in zip(group, pictures, strict=True) if torch.is_tensor(picture)]
            failed = [{"file": n, "error": p} for n, p in zip(group, pictures, strict=True) if isinstance(p, str)]
            scores = None
            if read:
                tensors = [picture for _, picture in read]
                tensors += tensors[:1] * (options.batch - len(tensors))  # one size, one plan
                x = torch.stack(tensors)
                x = (x.pin_memory() if options.device.type == "cuda" else x).to(options.device, non_blocking=True)
                scores = fast(x)[: len(read)].float().softmax(1).topk(min(options.top, len(labels)))
            pending.append(([name for name, _ in read], failed, scores))
            if len(pending) > 1:  # asked for one batch late, so that a GPU has work while the answer comes
                yield lines_of(*pending.popleft(), labels)
        while pending:
            yield lines_of(*pending.popleft(), labels)


def lines_of(names: list[str], failed: list[dict], scores, labels: list[str]) -> list[dict]:
    found = []
    for name, values, classes in zip(names, *(t.tolist() for t in scores), strict=True) if names else ():
        best = [{"label": labels[c], "probability": round(v, 6)} for v, c in zip(values, classes, strict=True)]
        found.append({"file": name, "labels": best})
    return found + failed


def grouped(pool: ThreadPoolExecutor, names: list[str], transform, options) -> Iterator[tuple[list[str], list]]:
    """(names, what became of them) batch by batch; at most two batches are being read ahead."""
    waiting: deque[tuple[list[str], list[Future]]] = deque()
    rest = iter(names)
    while True:
        while len(waiting) < 3 and (group := list(islice(rest, options.batch))):
            waiting.append((group, [pool.submit(picture, options.folder / name, transform) for name in group]))
        if not waiting:
            return
        group, futures = waiting.popleft()
        yield group, [future.result() for future in futures]


def picture(file, transform) -> Tensor | str:
    """A picture as the network wants it; or why it cannot be read. file: its path, or a file that is open."""
    try:
        with Image.open(file) as image:
            return transform(upright(image))
    except Exception as error:  # whatever a broken file makes a decoder raise: the others go on
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    raise SystemExit(main())
