"""tests/data/digits_resnet.pt, a network that has learnt something: every way to run it gives the same predictions.

The .json beside it tells what made it. Which digit a float64 run of torchvision's blocks sees in each of the 360 test
images is what every other run must see, but where the dtype cannot tell the two best apart: where their logits, in
float64, are less than one rounding of the larger one from each other, eps(dtype) * |logit|.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fused_resnet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from training import data, options, processes  # noqa: E402

WEIGHTS = ROOT / "tests" / "data" / "digits_resnet.pt"
MADE = json.loads(WEIGHTS.with_suffix(".json").read_text())
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def build() -> nn.Module:
    described = dict(MADE["model"])
    network = getattr(fused_resnet.models, described.pop("name"))(**described)
    network.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return network.eval()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """images [360, 1, 16, 16], normalised as in training; labels [360]."""
    pytest.importorskip("sklearn")
    found = data.load(options.parse(["--dataset", "digits"]), processes.Team(0, 1, torch.device("cpu")))
    mean, std = (torch.tensor(MADE[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (found.test.images - mean) / std, found.test.labels


@pytest.fixture(scope="module")
def exact(digits) -> Tensor:
    """Logits [360, 10] of torchvision's blocks in float64."""
    with torch.no_grad():
        return fused_resnet.restore_blocks(build()).double()(digits[0].double())


def torchvisions(network: nn.Module, images: Tensor) -> nn.Module:
    return fused_resnet.restore_blocks(copy.deepcopy(network)).to(images.dtype)


def fused(network: nn.Module, images: Tensor) -> nn.Module:
    return network.to(images.dtype)


def optimized(network: nn.Module, images: Tensor) -> nn.Module:
    return fused_resnet.optimize_for_inference(network, images[:8], dtype=images.dtype, tune="off")


def tellable(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """[N] bool: the two best logits are at least one rounding of the best one apart."""
    first, second = exact.topk(2).values.unbind(1)
    return first - second >= torch.finfo(dtype).eps * first.abs()


def test_the_file_is_small_and_says_what_made_it():
    assert WEIGHTS.stat().st_size < 2_000_000
    assert MADE["command"].startswith("python examples/train.py --dataset digits")
    assert {"torch", "cpu", "date"} <= MADE["machine"].keys()
    assert type(MADE["seed"]) is int


def test_it_has_the_accuracy_that_is_recorded(exact, digits):
    assert (exact.argmax(1) == digits[1]).double().mean().item() == MADE["test_accuracy"]
    assert MADE["test_accuracy"] > 0.98


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("run", [torchvisions, fused, optimized])
def test_every_run_predicts_the_same(run, dtype, exact, digits, device):
    images = digits[0].to(device, dtype)
    network = run(build().to(device), images)
    with torch.no_grad():
        logits = torch.cat([network(part) for part in images.split(90)]).cpu()
    assert logits.dtype == dtype
    other = (logits.argmax(1) != exact.argmax(1)).nonzero().flatten().tolist()
    told = [f"image {i}: {exact[i].topk(2).values.tolist()} became {logits[i].topk(2).values.tolist()}" for i in other]
    close = ~tellable(exact, dtype)
    assert not [i for i in other if not close[i]], "\n".join(told)
    accuracy = [(x.argmax(1) == digits[1])[~close].sum().item() for x in (logits, exact)]
    assert accuracy[0] == accuracy[1]


def test_a_wrong_weight_would_be_seen(exact, digits):
    """What the agreement is worth: with one stage's shortcut lost, predictions do differ."""
    network = build()
    nn.init.zeros_(network.layer2[0].downsample[1].weight)
    with torch.no_grad():
        found = network(digits[0])
    assert (found.argmax(1) != exact.argmax(1))[tellable(exact, torch.bfloat16)].any()
