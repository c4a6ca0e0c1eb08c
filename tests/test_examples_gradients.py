"""examples/gradient_highway.py: NumPy's numbers and autograd's, the networks' norms, the record and what it refuses."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

import fused_resnet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
highway = importlib.import_module("gradient_highway")
from training import processes, twins  # noqa: E402

RECORD = ROOT / "fused_resnet" / "explore" / "results" / "gradients.json"
SHORT = (
    "--dataset digits --device cpu --depths 8 --bottleneck 11 --bottleneck-batch 4 --steps 2 --batch-size 16".split()
)
ALONE = processes.Team(0, 1, torch.device("cpu"))
DIGITS = twins.load(highway.parse(SHORT), ALONE)

STACK = {"kind": str, "depth": int, "block": str, "activation": str, "shortcut": str, "step": int, "loss": float}
STACK |= {"layers": list, "weight_grad_norm": list, "block_grad_norm": list}


def check_record(record: dict) -> None:
    """The form that readers of the file count on."""
    assert record["command"].startswith("python examples/gradient_highway.py")
    assert type(record["batch"]) is int and len(record["image"]) == 3
    assert {"cpu", "torch", "date"} <= record["machine"].keys()
    for numbers in (record["numpy"], record["numpy"]["autograd"]):
        check_printed(numbers)
    assert record["numpy"]["lesson"] == {"plain": 0.000046, "residual": 1.000046, "ratio": 21817.5}
    for stack in record["stacks"]:
        assert {name: type(stack[name]) for name in STACK} == STACK
        convolutions = {"basic": 2, "bottleneck": 3}[stack["block"]]
        assert len(stack["layers"]) == len(stack["weight_grad_norm"]) == stack["depth"] - 1
        assert len(stack["block_grad_norm"]) == (stack["depth"] - 2) // convolutions
        assert stack["layers"][:2] == ["conv1", "layer1.0.conv1"]
        assert stack["layers"][-1].startswith("layer3.") and stack["layers"][-1].endswith(f".conv{convolutions}")
        assert all(0 < v < float("inf") for v in stack["weight_grad_norm"] + stack["block_grad_norm"])


def check_printed(numbers: dict) -> None:
    printed = f"{numbers['plain']:.6f} {numbers['residual']:.6f} {numbers['ratio']:.1f}"
    assert printed == "0.000468 2.828725 6046.3"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    with open(out / "stdout", "w") as f, contextlib.redirect_stdout(f):
        assert highway.main([*SHORT, "--out", str(out)]) == 0
    return out


# --- one block -----------------------------------------------------------------------------------------------------


def test_numpys_numbers_to_the_digit():
    check_printed(highway.norms(highway.by_numpy(highway.toy())))


def test_autograd_agrees_with_numpy():
    block = highway.toy()
    expected, found = highway.by_numpy(block), highway.by_autograd(block)
    assert highway.disagreement(expected, found) <= 1e-12
    wrong = {**found, "plain": found["plain"] * 1.01}
    assert highway.disagreement(expected, wrong) == pytest.approx(0.01)


def test_a_disagreement_is_said_and_is_the_exit_status(tmp_path, monkeypatch, capsys):
    right = highway.conv_bn_act
    monkeypatch.setattr(highway, "conv_bn_act", lambda x, w, **kwargs: right(x, w * (1 + 1e-9), **kwargs))
    monkeypatch.setattr(highway, "measured", lambda *_: iter(()))
    monkeypatch.setattr(highway, "draw", lambda *_: "")
    assert highway.main([*SHORT, "--out", str(tmp_path)]) == 1
    assert "NumPy and autograd DISAGREE: relative difference 2" in capsys.readouterr().out


# --- networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block, depth", [("basic", 14), ("bottleneck", 11)])
def test_the_norms_are_those_of_torchvisions_blocks(block, depth):
    network = twins.Twin("residual", depth, block).build(0, DIGITS)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, labels = highway.batch(DIGITS, 5, ALONE.device)
    found = highway.gradients(network, images, labels)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    untouched = fused_resnet.restore_blocks(network).double().train()
    x, inputs = untouched.relu(untouched.bn1(untouched.conv1(images.double()))), []
    for each in (*untouched.layer1, *untouched.layer2, *untouched.layer3):
        inputs.append(x)
        x = each(x)
    loss = cross_entropy(untouched.fc(x.mean((2, 3))), labels)
    weights = [m.weight for name, m in highway.convolutions(untouched).items()]
    expected = [g.norm().item() for g in torch.autograd.grad(loss, [*inputs, *weights])]
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["block_grad_norm"] + found["weight_grad_norm"] == pytest.approx(expected, rel=1e-5)


def test_a_plain_stack_is_one_network_before_and_after_its_batch_norms():
    """Without an add, post- and pre-activation are one row of layers, cut into blocks in two ways."""
    images, labels = highway.batch(DIGITS, 5, ALONE.device)
    built = (twins.Twin("plain", 8, activation=a).build(0, DIGITS) for a in ("post", "pre"))
    post, pre = (highway.gradients(network, images, labels) for network in built)
    assert post["loss"] == pre["loss"]
    assert post["weight_grad_norm"] == pytest.approx(pre["weight_grad_norm"], rel=1e-5)


def test_training_is_sgd(whole):
    recipe = twins.Recipe(1, 16, 0.1, 0.9, 5e-4, 0)
    network, other = (twins.Twin("plain", 8).build(0, DIGITS) for _ in range(2))
    loaders = highway.data.Loaders(DIGITS, recipe, ALONE)
    highway.train(network, recipe, loaders, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for (images, labels), _ in zip(loaders.training(0, 0), range(2), strict=False):
        optimizer.zero_grad()
        cross_entropy(other(images), labels).backward()
        optimizer.step()
    assert torch.allclose(network.conv1.weight, other.conv1.weight)
    (stack,) = [s for s in recorded(whole) if (s["kind"], s["activation"], s["step"]) == ("plain", "post", 2)]
    images, labels = highway.batch(DIGITS, 16, ALONE.device)
    assert highway.gradients(network, images, labels)["loss"] == pytest.approx(stack["loss"], rel=1e-4)


# --- what it leaves ------------------------------------------------------------------------------------------------


def recorded(folder: Path) -> list[dict]:
    return [s for s in json.loads((folder / "gradients.json").read_text())["stacks"] if s["block"] == "basic"]


def test_the_record_has_its_form(whole):
    record = json.loads((whole / "gradients.json").read_text())
    check_record(record)
    stacks = [(s["block"], s["activation"], s["kind"], s["step"]) for s in record["stacks"]]
    both = [(a, k) for a in ("post", "pre") for k in twins.KINDS]
    assert stacks == [("basic", *x, s) for x in both for s in (0, 2)] + [("bottleneck", *x, 0) for x in both]


def test_the_recorded_experiment_has_its_form():
    check_record(json.loads(RECORD.read_text()))


def test_it_prints_the_block_and_a_line_a_stack(whole):
    out = (whole / "stdout").read_text()
    assert "NumPy                   0.000468    2.828725      6046.3" in out
    assert "lesson                  0.000046    1.000046     21817.5" in out
    assert "NumPy and autograd agree" in out
    assert sum(line.startswith(twins.KINDS) for line in out.splitlines()) == 12


@pytest.mark.parametrize("name", ["gradients.png", "gradients-weights.png"])
def test_the_pictures_are_written(name, whole):
    pytest.importorskip("matplotlib")
    with Image.open(whole / name) as image:
        assert image.width > 800 and np.asarray(image.convert("L")).std() > 5


def test_without_matplotlib_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    sentence = "no norms.png: it needs matplotlib (pip install matplotlib)"
    assert highway.draw({"stacks": []}, tmp_path / "norms.png") == sentence


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--depths", "10"], "argument --depths: expected 6n + 2 (8, 14, 20, ...) for basic blocks, got '10'"),
        (["--bottleneck", "1000"], "argument --bottleneck: expected 9n + 2 (11, 20, 29, ...) for bottleneck blocks"),
        (["--activation", "both"], "argument --activation: invalid choice: 'both'"),
        (["--steps", "-1"], "argument --steps: expected an integer of at least 0, got '-1'"),
        (["--bottleneck-batch", "0"], "argument --bottleneck-batch: expected an integer of at least 1, got '0'"),
        (["--batch-size", "2000"], "--batch-size: there are 1437 training images, got 2000"),
        (["--out", __file__], "--out: cannot be made a folder: "),
        (["--lr", "1e30"], "--lr: the loss is "),
    ],
    ids=lambda v: " ".join(v).replace(str(ROOT), "") if isinstance(v, list) else "",
)
def test_what_cannot_be_is_refused_by_the_options_name(arguments, sentence, tmp_path, capsys):
    try:
        status = highway.main([*SHORT, "--data", str(tmp_path), "--out", str(tmp_path), *arguments])
    except SystemExit as parsing:
        status = parsing.code
    assert status == 2
    assert sentence in capsys.readouterr().err


def test_help_tells_of_every_option(capsys):
    with pytest.raises(SystemExit):
        highway.parse(["--help"])
    out = capsys.readouterr().out
    for name in highway.Options.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in out
