"""examples/detect.py: a detector with a planned backbone finds the same; what it compares; what bad input is told."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
detect = importlib.import_module("detect")
get_model = torchvision.models.get_model


@pytest.fixture
def photo(tmp_path) -> Path:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(coarse).resize((200, 150), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def small(monkeypatch):
    def build(name, **options):
        torch.manual_seed(1)
        return get_model(name, min_size=96, max_size=128, **options)

    monkeypatch.setattr(torchvision.models, "get_model", build)


@pytest.mark.parametrize(
    "model", ["fasterrcnn_resnet50_fpn", pytest.param("fasterrcnn_resnet50_fpn_v2", marks=pytest.mark.slow)]
)
def test_finds_the_same(model, photo, small, tmp_path, capsys):
    out = tmp_path / "found.png"
    status = detect.main(
        [str(photo), str(out), "--model", model, "--weights", "none", "--score", "0.01", "--runs", "2"]
    )
    said = capsys.readouterr().out
    assert status == 0, said
    assert re.search(r"^BackboneWithFPN, float32 .* 100.0 % of .* planned", said, re.M)
    assert re.search(r"planned backbone: \d+\.\d ms \(2 runs in turns", said) and "times as fast" in said
    boxes = int(re.search(r"^(\d+) boxes of a score from 0.01 on", said, re.M)[1])
    assert boxes > 0 and len(re.findall(r"^│ .* │ (1.00|0.9\d)\d\d +│$", said, re.M)) >= boxes
    with Image.open(photo) as before, Image.open(out) as after:
        assert before.size == after.size and np.asarray(before).tobytes() != np.asarray(after).tobytes()


def test_a_backbone_that_is_off_is_told(photo, small, tmp_path, capsys, monkeypatch):
    planned = detect.with_planned_backbone

    def off(model, image, **options):
        other, plan = planned(model, image, **options)
        other.backbone.forward = lambda x, right=other.backbone.forward: {k: v.flip(-1) for k, v in right(x).items()}
        return other, plan

    monkeypatch.setattr(detect, "with_planned_backbone", off)
    options = ["--model", "fasterrcnn_resnet50_fpn", "--weights", "none", "--score", "0.01", "--runs", "1"]
    assert detect.main([str(photo), str(tmp_path / "found.png"), *options]) == 1
    assert "were found by one of the detectors only" in capsys.readouterr().out


def seen(boxes, labels, scores):
    return {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels), "scores": torch.tensor(scores)}


@pytest.mark.parametrize(
    "again, rows, alone",
    [
        (seen([[0, 0, 10, 10], [20, 20, 40, 40]], [1, 2], [0.9, 0.6]), 2, 0),
        (seen([[20, 20, 40, 40], [0, 0, 10, 10]], [2, 1], [0.9, 0.6]), 2, 0),
        (seen([[0, 0, 10, 10], [20, 20, 40, 40]], [1, 3], [0.9, 0.6]), 1, 2),
        (seen([[0, 0, 10, 10], [20, 20, 40, 47]], [1, 2], [0.9, 0.6]), 1, 2),
        (seen([[0, 0, 10, 10]], [1], [0.9]), 1, 1),
        (seen([[0, 0, 10, 10]] * 2 + [[20, 20, 40, 40]], [1, 1, 2], [0.9, 0.7, 0.6]), 2, 1),
        (seen([[0, 0, 10, 10]] * 2 + [[20, 20, 40, 40]], [1, 1, 2], [0.9, 0.51, 0.6]), 2, 0),
    ],
    ids=["same", "other order", "label", "place", "missing", "twice", "twice at the limit"],
)
def test_what_fits(again, rows, alone):
    found = seen([[0, 0, 10, 10], [20, 20, 40, 40]], [1, 2], [0.9, 0.6])
    pairs, single = detect.matched(found, again, 0.5)
    assert (len(pairs), single) == (rows, alone)


def test_nothing_is_found():
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    assert detect.matched(nothing, nothing, 0.5) == ([], 0)
    image = torch.rand(3, 20, 30)
    assert torch.equal(detect.drawn(image, nothing, [], 0.5), image)


def test_bad_input_is_named(photo, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="^photo: .*broken.png cannot be read"):
        detect.main([str(broken), str(tmp_path / "out.png")])
    with pytest.raises(SystemExit, match="^--weights: retinanet_resnet50_fpn_v2 has COCO_V1, DEFAULT or none"):
        detect.main([str(photo), str(tmp_path / "out.png"), "--weights", "V9", "--model", "retinanet_resnet50_fpn_v2"])


def test_weights_that_cannot_be_fetched(photo, tmp_path, monkeypatch):
    def fails(name, **options):
        raise OSError("no route")

    monkeypatch.setattr(torchvision.models, "get_model", fails)
    with pytest.raises(SystemExit, match="^--weights: they could not be fetched .no route.; `--weights none`"):
        detect.main([str(photo), str(tmp_path / "out.png")])


def test_the_copy_alone_has_another_forward(photo, small):
    options = detect.parser().parse_args([str(photo), "out.png", "--weights", "none"])
    model, _ = detect.detector(options)
    planned, _ = detect.with_planned_backbone(model, detect.photo(photo), dtype=torch.float32)
    assert isinstance(planned, nn.Module) and "forward" in vars(planned.backbone)
    assert "forward" not in vars(model.backbone)
