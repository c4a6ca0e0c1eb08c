"""A network that has learnt something, tests/data/digits_resnet.pt, and every way to run it.

The .json beside it tells what made it. Which digit a float64 run of torchvision's blocks sees in each of the 360 test
images is what every other run must see, but where the dtype cannot tell the two best apart: where their logits, in
float64, are less than one rounding of the larger one from each other, eps(dtype) * |logit|.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fused_resnet

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
WEIGHTS = DATA / "digits_resnet.pt"
MADE = json.loads(WEIGHTS.with_suffix(".json").read_text())
DTYPES = ("float32", "float16", "bfloat16")


def build() -> nn.Module:
    described = dict(MADE["model"])
    network = getattr(fused_resnet.models, described.pop("name"))(**described)
    network.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return network.eval()


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """(images [360, 1, 16, 16], normalised as in training; labels [360]): the test part of scikit-learn's digits."""
    found = np.load(DATA / "digits_test.npz")
    mean, std = (torch.tensor(MADE[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (torch.from_numpy(found["images"]) - mean) / std, torch.from_numpy(found["labels"]).long()


@functools.cache
def exact() -> Tensor:
    """Logits [360, 10] of torchvision's blocks in float64."""
    with torch.no_grad():
        return fused_resnet.restore_blocks(build()).double()(images()[0].double())


def torchvisions(network: nn.Module, x: Tensor) -> nn.Module:
    return fused_resnet.restore_blocks(copy.deepcopy(network)).to(x.device, x.dtype)


def fused(network: nn.Module, x: Tensor) -> nn.Module:
    return network.to(x.device, x.dtype)


def optimized(network: nn.Module, x: Tensor) -> nn.Module:
    return fused_resnet.optimize_for_inference(network.to(x.device), x, dtype=x.dtype, tune="off")


RUNS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "torchvision": torchvisions,
    "fused": fused,
    "optimized": optimized,
}


def tellable(dtype: torch.dtype) -> Tensor:
    """[360] bool: the two best logits are at least one rounding of the best one apart."""
    first, second = exact().topk(2).values.unbind(1)
    return first - second >= torch.finfo(dtype).eps * first.abs()


def accuracy(logits: Tensor) -> float:
    return (logits.argmax(1).cpu() == images()[1]).double().mean().item()


def differing(logits: Tensor) -> list[str]:
    """The predictions that are not those of float64 where this dtype can tell, each as a sentence."""
    logits = logits.cpu()
    other = (logits.argmax(1) != exact().argmax(1)) & tellable(logits.dtype)
    found = other.nonzero().flatten().tolist()
    return [
        f"image {i}: {exact()[i].topk(2).values.tolist()} became {logits[i].topk(2).values.tolist()}" for i in found
    ]
