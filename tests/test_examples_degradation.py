"""examples/degradation.py: what it measures and records, that interruptions change no number, and what it refuses."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
degradation = importlib.import_module("degradation")
from training import checkpoint, data, processes, twins  # noqa: E402

RECORD = ROOT / "fused_resnet" / "explore" / "results" / "degradation.json"
SHORT = "--dataset digits --device cpu --depths 8 --images 160 --epochs 2 --batch-size 80".split()
ALONE = processes.Team(0, 1, torch.device("cpu"))
DIGITS = data.load(degradation.parse(SHORT), ALONE)

TOP = {"command": str, "dataset": str, "image": list, "train_images": int, "test_images": int, "epochs": int}
TOP |= {"batch_size": int, "lr": float, "momentum": float, "weight_decay": float, "machine": dict, "runs": list}
RUN = {"name": str, "kind": str, "depth": int, "block": str, "activation": str, "shortcut": str, "seed": int}
RUN |= {"parameters": int, "train_loss": list, "train_loss_eval": list, "train_accuracy": list}
RUN |= {"test_accuracy": list, "seconds": float}


def check_record(record: dict) -> None:
    """The form that readers of the file count on."""
    assert {name: type(record[name]) for name in TOP} == TOP
    assert record["command"].startswith("python examples/degradation.py")
    assert {"cpu", "torch", "date"} <= record["machine"].keys()
    for run in record["runs"]:
        assert {name: type(run[name]) for name in RUN} == RUN
        assert run["kind"] in ("plain", "residual") and run["name"].startswith(run["kind"])
        for name in ("train_loss", "train_accuracy", "test_accuracy"):
            assert len(run[name]) == record["epochs"]
        assert all(value > 0 for name in ("train_loss", "train_loss_eval") for value in run[name])
        assert all(0 <= value <= 1 for name in ("train_accuracy", "test_accuracy") for value in run[name])


def curves(folder: Path) -> list[dict]:
    runs = json.loads((folder / "degradation.json").read_text())["runs"]
    return [{name: value for name, value in run.items() if name != "seconds"} for run in runs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """SHORT from beginning to end."""
    out = tmp_path_factory.mktemp("whole")
    with open(out / "stdout", "w") as f, contextlib.redirect_stdout(f):
        assert degradation.main([*SHORT, "--out", str(out)]) == 0
    return out


# --- what it does --------------------------------------------------------------------------------------------------


def test_the_record_has_its_form(whole):
    record = json.loads((whole / "degradation.json").read_text())
    check_record(record)
    assert (record["dataset"], record["image"], record["train_images"]) == ("digits", [1, 16, 16], 160)
    assert [(r["name"], r["depth"], r["seed"]) for r in record["runs"]] == [("plain-8", 8, 0), ("residual-8", 8, 0)]
    plain, residual = (r["parameters"] for r in record["runs"])
    assert residual - plain == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64  # the projections and their batch norms


def test_the_recorded_experiment_has_its_form():
    check_record(json.loads(RECORD.read_text()))


@pytest.mark.parametrize("kind", twins.KINDS)
def test_the_numbers_are_those_of_the_saved_network(kind, whole):
    network = twins.Twin(kind, 8).build(7, DIGITS)
    network.load_state_dict(checkpoint.load(whole / f"{kind}-8-seed-0.pt")["model"])
    network.eval()
    (run,) = [r for r in curves(whole) if r["kind"] == kind]
    first = {"train": DIGITS.train, "test": DIGITS.test}
    shortened = data.Part(DIGITS.train.images[:160], DIGITS.train.labels[:160])
    statistics = data.Data("digits", shortened, DIGITS.test, margin=0, flip=False, workers=0)
    with torch.no_grad():
        logits, labels = {}, {}
        for name, part in first.items():
            seen = data.Normalised(part, statistics)
            images, labels[name] = (torch.stack(p) for p in zip(*(seen[i] for i in range(160)), strict=True))
            logits[name] = network(images)
    loss = cross_entropy(logits["train"], labels["train"]).item()
    assert run["train_loss_eval"] == [pytest.approx(loss, rel=1e-5)]
    accuracy = (logits["test"].argmax(1) == labels["test"]).double().mean().item()
    assert run["test_accuracy"][-1] == pytest.approx(accuracy)


@pytest.mark.slow
def test_a_longer_training_fits_better(tmp_path):
    arguments = [*SHORT, "--batch-size", "20", "--epochs", "8", "--out", str(tmp_path)]
    assert degradation.main(arguments) == 0
    for run in curves(tmp_path):
        assert run["train_loss"][-1] < 0.5 * run["train_loss"][0]
        assert run["test_accuracy"][-1] > 0.5


def test_the_picture_is_written(whole):
    pytest.importorskip("matplotlib")
    with Image.open(whole / "degradation.png") as image:
        assert image.width > 800 and np.asarray(image.convert("L")).std() > 5
    assert "degradation.png shows training loss and test accuracy" in (whole / "stdout").read_text()


def test_without_matplotlib_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    sentence = "no curves.png: it needs matplotlib (pip install matplotlib)"
    assert degradation.draw({"runs": []}, tmp_path / "curves.png") == sentence


def test_the_table_and_the_findings_are_of_the_numbers(whole):
    out = (whole / "stdout").read_text()
    plain, residual = curves(whole)
    for run in (plain, residual):
        (line,) = [line for line in out.splitlines() if line.startswith(f"{run['name']} ")]
        assert f"{run['parameters']:,}" in line and f"{run['train_loss_eval'][-1]:.5f}" in line
        assert f"{run['test_accuracy'][-1]:.2%}" in line
    a, b = (run["train_loss_eval"][-1] for run in (residual, plain))
    told = f"{a:.4f} -> {b:.4f} in eval mode (higher in {int(b > a)} of 1 seed)"
    assert f"basic, 8 layers, residual -> plain: training loss {told}" in out


def test_findings_compare_seed_by_seed():
    def run(kind, depth, seed, loss):
        described = {"block": "basic", "kind": kind, "depth": depth, "seed": seed}
        return {**described, "train_loss_eval": [9, loss], "train_loss": [loss, 2 * loss]}

    losses = {("plain", 8): (0.1, 0.2), ("plain", 20): (0.3, 0.1), ("residual", 20): (0.2, 0.05)}
    records = [run(*key, s, loss) for key, pair in losses.items() for s, loss in enumerate(pair)]
    both = "{} in eval mode (higher in {} of 2 seeds), {} over the last epoch (higher in {} of 2 seeds)".format
    assert degradation.findings(records) == [
        f"basic, plain, 8 -> 20 layers: training loss {both('0.1500 -> 0.2000', 1, '0.3000 -> 0.4000', 1)}",
        f"basic, 20 layers, residual -> plain: training loss {both('0.1250 -> 0.2000', 2, '0.2500 -> 0.4000', 2)}",
    ]
    assert degradation.findings([records[0], records[3]]) == [
        "basic, plain, 8 -> 20 layers: no seed was trained on both"
    ]


def test_bottlenecks_are_put_beside_basic_blocks():
    run = {"kind": "residual", "block": "bottleneck", "depth": 47, "parameters": 1234567}
    for shortcut in ("projection", "zero_pad"):
        twin = twins.Twin("residual", 20, shortcut=shortcut)
        basic = sum(p.numel() for p in twin.build(0, DIGITS).parameters())
        expected = f"bottleneck, 47 layers: 1,234,567 parameters; basic, 20 layers: {basic:,}"
        chosen = degradation.parse([*SHORT, "--shortcut", shortcut])
        assert degradation.squeezed([run, {**run, "kind": "plain"}], chosen, DIGITS) == [expected]


def test_a_quick_run_is_kept_apart():
    """`--quick` first and everything later is how people try it: other options, so another folder."""
    quick, whole = degradation.parse(["--quick"]), degradation.parse([])
    assert quick.out != whole.out and quick.record.parent == quick.out
    assert degradation.parse(["--block", "bottleneck"]).depths == [11, 20, 56]


@pytest.mark.parametrize("block, depth", [("basic", 14), ("bottleneck", 20)])
@pytest.mark.parametrize("activation", ["post", "pre"])
@pytest.mark.parametrize("shortcut", ["projection", "zero_pad", "projection_all"])
def test_twins_begin_with_the_same_weights(block, depth, activation, shortcut):
    plain, residual = (twins.Twin(kind, depth, block, activation, shortcut).build(3, DIGITS) for kind in twins.KINDS)
    both = residual.state_dict()
    main = plain.state_dict()
    assert main.keys() == {name for name in both if "downsample" not in name}
    assert all(torch.equal(value, both[name]) for name, value in main.items())
    assert sum(isinstance(m, nn.Conv2d) for m in plain.modules()) == depth - 1
    other = twins.Twin("plain", depth, block, activation, shortcut).build(4, DIGITS)
    assert not torch.equal(other.conv1.weight, plain.conv1.weight)


# --- interruptions -------------------------------------------------------------------------------------------------


def stop_at_loss(monkeypatch, number: int) -> None:
    """Ctrl-C in place of the `number`th loss that is computed: three an epoch, two of steps and one of test images."""
    calls = iter(range(1, number + 1))

    def interrupted(*args, **kwargs):
        if next(calls) == number:
            raise KeyboardInterrupt
        return cross_entropy(*args, **kwargs)

    monkeypatch.setattr(degradation, "cross_entropy", interrupted)


@pytest.mark.parametrize("number", [2, 6], ids=["in the first epoch", "in the last one"])
def test_stopped_and_resumed_gives_the_same_curves(number, whole, tmp_path, monkeypatch, capsys):
    command = [*SHORT, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        stop_at_loss(patch, number)
        assert degradation.main(command) == degradation.INTERRUPTED
    assert "the same command, without --fresh, goes on after the last whole epoch" in capsys.readouterr().err
    assert (tmp_path / "plain-8-seed-0.pt").exists() == (number > 3)
    assert degradation.main(command) == 0
    assert curves(tmp_path) == curves(whole)


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
import degradation
save = degradation.checkpoint.save
def killed(path, content):
    save(path, content)
    os.kill(os.getpid(), signal.SIGKILL)
degradation.checkpoint.save = killed
degradation.main(sys.argv[3:])
"""


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_curves(whole, tmp_path):
    command = [*SHORT, "--out", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    answer = subprocess.run([sys.executable, "-c", KILLED, str(ROOT / "examples"), str(ROOT), *command], env=env)
    assert answer.returncode == -signal.SIGKILL
    assert len(checkpoint.load(tmp_path / "plain-8-seed-0.pt")["curve"]["train_loss"]) == 1
    assert degradation.main(command) == 0
    assert curves(tmp_path) == curves(whole)


def test_what_is_done_is_not_done_again(whole, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(whole, tmp_path / "out")
    monkeypatch.delattr(degradation.Run, "train")
    assert degradation.main([*SHORT, "--out", str(out)]) == 0
    assert "2 of 2 networks are done" in capsys.readouterr().out
    assert curves(out) == curves(whole)


def test_changed_options_are_refused_by_name(whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "out")
    assert degradation.main([*SHORT, "--lr", "0.2", "--activation", "pre", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "plain-8-seed-0.pt: belongs to another run: --lr was 0.1, is 0.2; --activation was post, is pre" in error


def test_fresh_starts_anew(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    assert degradation.main([*SHORT, "--epochs", "1", "--fresh", "--out", str(out)]) == 0
    assert [len(run["train_loss"]) for run in curves(out)] == [1, 1]


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--depths", "9"], "argument --depths: expected 6n + 2 (8, 14, 20, ...) for basic blocks, got '9'"),
        (["--depths", "2"], "argument --depths: expected 6n + 2 (8, 14, 20, ...) for basic blocks, got '2'"),
        (["--depths", "8", "--block", "bottleneck"], "argument --depths: expected 9n + 2 (11, 20, 29, ...) for bottle"),
        (["--bottleneck", "50"], "argument --bottleneck: expected 9n + 2 (11, 20, 29, ...) for bottleneck blocks"),
        (["--shortcut", "identity"], "argument --shortcut: invalid choice: 'identity'"),
        (["--epochs", "0"], "argument --epochs: expected an integer of at least 1, got '0'"),
        (["--seeds", "x"], "argument --seeds: expected an integer from 0 to 4294967295, got 'x'"),
        (["--momentum", "1"], "argument --momentum: expected a number from 0 to below 1, got '1'"),
        (["--download"], "--download: is for CIFAR-10"),
        (["--batch-size", "200"], "--batch-size: there are 160 training images, got 200"),
        (["--dataset", "cifar10"], "--download fetches CIFAR-10"),
        (["--out", __file__], "--out: cannot be made a folder: "),
        (["--record", f"{__file__}/x/y"], "--record: cannot be made a folder: "),
        (["--lr", "1e30"], "--lr: the loss of plain-8 is "),
    ],
    ids=lambda v: " ".join(v).replace(str(ROOT), "") if isinstance(v, list) else "",
)
def test_what_cannot_be_is_refused_by_the_options_name(arguments, sentence, tmp_path, capsys):
    try:
        status = degradation.main([*SHORT, "--data", str(tmp_path), "--out", str(tmp_path), *arguments])
    except SystemExit as parsing:
        status = parsing.code
    assert status == 2
    assert sentence in capsys.readouterr().err


def test_several_processes_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "team", lambda device: contextlib.nullcontext(processes.Team(0, 2, ALONE.device)))
    assert degradation.main([*SHORT, "--out", str(tmp_path)]) == 2
    assert "--nproc-per-node: must be 1, got 2" in capsys.readouterr().err


def test_defaults():
    chosen = degradation.parse([])
    assert (chosen.depths, chosen.epochs, chosen.images, chosen.seeds) == ([8, 20, 56], 30, None, [0])
    assert (chosen.lr, chosen.momentum, chosen.weight_decay) == (0.1, 0.9, 5e-4)
    assert twins.batch_size(chosen, DIGITS) == 64
    quick = degradation.parse(["--quick", "--epochs", "3"])
    assert (quick.depths, quick.epochs, quick.images) == ([8, 20], 3, 1500)


def test_help_tells_of_every_option(capsys):
    with pytest.raises(SystemExit):
        degradation.parse(["--help"])
    out = capsys.readouterr().out
    for name in degradation.Options.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in out
