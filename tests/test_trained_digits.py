"""benchmarks/digits.py: every way to run a trained network gives the same predictions."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
digits = importlib.import_module("benchmarks.digits")
from training import data, options, processes  # noqa: E402


def test_the_file_is_small_and_says_what_made_it():
    assert digits.WEIGHTS.stat().st_size < 2_000_000
    assert digits.MADE["command"].startswith("python examples/train.py --dataset digits")
    assert {"torch", "cpu", "date"} <= digits.MADE["machine"].keys()
    assert type(digits.MADE["seed"]) is int


def test_the_images_are_those_it_was_tested_with():
    pytest.importorskip("sklearn")
    found = data.load(options.parse(["--dataset", "digits"]), processes.Team(0, 1, torch.device("cpu")))
    test = data.Normalised(found.test, found)
    images, labels = digits.images()
    torch.testing.assert_close((found.test.images - test.mean) / test.std, images)
    assert torch.equal(found.test.labels, labels)


def test_it_has_the_accuracy_that_is_recorded():
    assert digits.accuracy(digits.exact()) == digits.MADE["test_accuracy"] > 0.98


@pytest.mark.parametrize("dtype", digits.DTYPES)
@pytest.mark.parametrize("run", digits.RUNS)
def test_every_run_predicts_the_same(run, dtype, device):
    images = digits.images()[0].to(device, getattr(torch, dtype))
    network = digits.RUNS[run](digits.build(), images[:90])
    with torch.no_grad():
        logits = torch.cat([network(part) for part in images.split(90)])
    assert logits.dtype == images.dtype
    assert not digits.differing(logits), "\n".join(digits.differing(logits))
    told = digits.tellable(images.dtype)
    right = [(x.argmax(1).cpu() == digits.images()[1])[told].sum() for x in (logits, digits.exact())]
    assert right[0] == right[1]


def test_a_wrong_weight_would_be_seen():
    """What the agreement is worth: with one stage's shortcut lost, predictions do differ."""
    network = digits.build()
    nn.init.zeros_(network.layer2[0].downsample[1].weight)
    with torch.no_grad():
        assert digits.differing(network(digits.images()[0]).bfloat16())
