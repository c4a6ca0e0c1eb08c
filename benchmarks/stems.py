"""What the fused stem of a swapped network is worth on a CPU: the stem, and the network around it, with and without.

    python benchmarks/stems.py [--rounds 41] [--json benchmarks/results/stems-cpu.json]

float32, channels_last, images of 224x224. Rounds take turns; a ratio is that of a round's two times. Without: the
network's own forward calls convolution, batch norm, ReLU and max-pool as modules, its blocks being the same fused ones.
Stems of single images, which a network calls as modules, are fused here, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torchvision.models.resnet import ResNet

import fused_resnet
from fused_resnet import doctor, measure, stem

CASES = (("resnet18", 8, "eval"), ("resnet18", 8, "train"), ("resnet50", 1, "eval"), ("resnet50", 8, "eval"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--size", type=int, default=224, help="of the images")
    parser.add_argument("--json", type=Path, help="where to put the result")
    arguments = parser.parse_args(argv)
    with patch.object(stem, "_PIXELS", 0):
        stems = {
            f"{name}/{mode}/{batch}": measured(name, batch, mode, arguments.rounds, arguments.size)
            for name, batch, mode in CASES
        }
    result = {
        "environment": doctor.environment(),
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "size": arguments.size,
        "stems": stems,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0


def measured(name: str, batch: int, mode: str, rounds: int, size: int) -> dict:
    training = mode == "train"
    fused = fused_resnet.swap_blocks(measure.build_model(name)).train(training)
    x = measure.random_input((batch, 3, size, size), 0, torch.device("cpu"), torch.float32)

    def by_modules(x):
        return fused.maxpool(fused.relu(fused.bn1(fused.conv1(x))))

    ways = {
        "stem": (lambda x: stem.pooled_stem(fused, x), by_modules),
        "network": (fused, lambda x: ResNet._forward_impl(fused, x)),
    }

    def seconds(way) -> float:
        start = time.perf_counter()
        with torch.inference_mode(not training):
            y = way(x)
        if training:
            y.sum().backward()
        end = time.perf_counter()
        fused.zero_grad()
        return end - start

    found = {}
    for part, (ours, modules) in ways.items():
        for way in (ours, modules, ours, modules):
            seconds(way)
        pairs = []
        for i in range(rounds):
            first, second = (ours, modules)[:: 1 if i % 2 else -1]
            pair = {first: seconds(first), second: seconds(second)}
            pairs.append((pair[ours], pair[modules]))
        found[part] = {
            "fused_ms": round(1e3 * statistics.median(a for a, _ in pairs), 2),
            "modules_ms": round(1e3 * statistics.median(b for _, b in pairs), 2),
            "speedup_20_50_80": [round(q, 3) for q in measure.quantiles([b / a for a, b in pairs])],
        }
    return found


if __name__ == "__main__":
    raise SystemExit(main())
