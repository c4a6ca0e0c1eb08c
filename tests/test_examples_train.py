"""examples/train.py: what it learns, that an interruption changes no number, and what it refuses."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from ranks import Ranks
from test_capture import Rerun
from torch import nn

import fused_resnet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
train = importlib.import_module("train")
from training import Refused, checkpoint, data, model, options, processes, report  # noqa: E402

SCRIPT = str(ROOT / "examples" / "train.py")
SHORT = ["--dataset", "digits", "--model", "cifar_resnet8", "--device", "cpu", "--epochs", "2", "--batch-size", "256"]
CHECKOUT = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # for a script in a folder below it
STEPS = 10  # of SHORT: 1,437 images are 5 batches of 256
ALONE = processes.Team(0, 1, torch.device("cpu"))

# The script, but after `step` rank 0 sends itself a signal; at its end every rank leaves its state_dict.
DRIVER = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
import torch, train
from training import options, processes, report

number, step, out, arguments = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6:]
told = report.Report.step

def spy(self, epoch, done, *rest):
    told(self, epoch, done, *rest)
    if done == step and self.path is not None:
        os.kill(os.getpid(), number)

report.Report.step = spy
with processes.team("cpu") as team:
    network, finished = train.train(options.parse(["--out", out, *arguments]), team)
torch.save(network.state_dict(), f"{out}/rank{team.rank}.pt")
sys.exit(0 if finished else train.STOPPED)
"""
NO_STEP = "0"


def start(*command: object, **environment: str) -> subprocess.CompletedProcess:
    threads = str(torch.get_num_threads())
    env = {**os.environ, "PYTHONPATH": CHECKOUT, "OMP_NUM_THREADS": threads, **environment}
    return subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True, timeout=500)


def driver(number: int, step: int | str, out: Path, *arguments: str) -> list[object]:
    return [ROOT / "examples", ROOT, int(number), step, out, *SHORT, *arguments]


def torchrun(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    script = folder / "driver.py"
    script.write_text(DRIVER)
    return start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *arguments)


def numbers(folder: Path) -> list[dict]:
    """What metrics.jsonl says, but for the speed."""
    return [{k: v for k, v in r.items() if k != "images_per_s"} for r in report.read(folder / "metrics.jsonl")]


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in numbers(folder) if "loss" in r]


def assert_same(a: object, b: object) -> None:
    """To the bit, whatever dicts and lists it is in."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(folder: Path, uninterrupted: Path) -> None:
    assert numbers(folder) == numbers(uninterrupted)
    assert_same(checkpoint.load(folder / "last.pt"), checkpoint.load(uninterrupted / "last.pt"))
    assert_same(*(torch.load(f / "best.pt", weights_only=True) for f in (folder, uninterrupted)))


def stop_after(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    told = report.Report.step

    def spy(self, epoch, done, *rest):
        told(self, epoch, done, *rest)
        if done == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(report.Report, "step", spy)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """SHORT from beginning to end."""
    out = tmp_path_factory.mktemp("uninterrupted")
    with open(out / "stdout", "w") as f, contextlib.redirect_stdout(f):
        assert train.main([*SHORT, "--out", str(out)]) == 0
    return out


# --- what it does --------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_line_a_step_and_a_line_an_epoch(uninterrupted):
    records = report.read(uninterrupted / "metrics.jsonl")
    steps, epochs = [r for r in records if "loss" in r], [r for r in records if "accuracy" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert [r["epoch"] for r in steps] == [1] * 5 + [2] * 5
    assert [(r["epoch"], r["step"]) for r in epochs] == [(1, 5), (2, 10)]
    assert all(r["images_per_s"] > 0 for r in steps)
    assert epochs[0]["train_loss"] == sum(r["loss"] for r in steps[:5]) / 5
    out = (uninterrupted / "stdout").read_text().splitlines()
    assert out[0] == "digits: 1437 training and 360 test images of [1, 16, 16]"
    assert out[1] == "cifar_resnet8, 3 fused blocks; cpu, 1 process, 5 steps an epoch"
    assert [line.split(":")[0] for line in out[2:4]] == ["epoch 1", "epoch 2"]
    assert re.fullmatch(r"best accuracy \d+\.\d\d%; everything is in .*", out[4])
    assert len(out) == 6  # the picture's


def test_the_best_model_has_the_accuracy_that_was_told(uninterrupted):
    chosen = options.parse([*SHORT, "--blocks", "torchvision"])
    found = data.load(chosen, ALONE)
    network = model.build(chosen, found.channels, found.classes)
    network.load_state_dict(torch.load(uninterrupted / "best.pt", weights_only=True))
    best = max((r for r in numbers(uninterrupted) if "accuracy" in r), key=lambda r: r["accuracy"])
    assert accuracy(network, found) == best["accuracy"]


def accuracy(network: nn.Module, found: data.Data) -> float:
    test = data.Normalised(found.test, found)
    images, labels = (torch.stack(parts) for parts in zip(*(test[i] for i in range(len(test))), strict=True))
    with torch.no_grad():
        return (network.eval()(images).argmax(1) == labels).double().mean().item()


@pytest.mark.slow
def test_the_smallest_model_learns_the_digits(tmp_path):
    assert train.main(["--model", "cifar_resnet8", "--epochs", "15", "--batch-size", "64", "--out", str(tmp_path)]) == 0
    best = max(r["accuracy"] for r in numbers(tmp_path) if "accuracy" in r)
    assert best >= 0.97  # a linear model of the pixels has 96 to 97 % of such a split


def test_fused_blocks_train_as_torchvisions(uninterrupted, tmp_path, monkeypatch):
    stop_after(monkeypatch, 4)
    assert train.main([*SHORT, "--blocks", "torchvision", "--out", str(tmp_path)]) == train.STOPPED
    fused, untouched = losses(uninterrupted)[:5], losses(tmp_path)
    assert fused[0] == pytest.approx(untouched[0], rel=1e-6)
    assert fused == pytest.approx(untouched, rel=1e-3)


def test_two_processes_train_one_model(tmp_path, capsys):
    out = tmp_path / "out"
    answer = torchrun(tmp_path, *driver(signal.SIGTERM, NO_STEP, out, "--epochs", "1"))
    assert answer.returncode == 0, answer.stderr
    assert "cpu, 2 processes, 5 steps an epoch" in answer.stdout
    assert answer.stdout.count("epoch 1:") == 1
    first, second = (torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(first, second)
    last = checkpoint.load(out / "last.pt")
    assert len(last["random"]) == 2

    # Every test image counted once, by the model that was saved.
    chosen = options.parse(SHORT)
    found = data.load(chosen, ALONE)
    network = model.build(chosen, found.channels, found.classes)
    network.load_state_dict(last["model"])
    assert accuracy(network, found) == numbers(out)[-1]["accuracy"]

    assert train.main([*SHORT, "--epochs", "1", "--out", str(out)]) == 2
    assert "number of processes was 2, is 1" in capsys.readouterr().err


def test_accumulation_makes_as_many_steps(uninterrupted, tmp_path):
    assert train.main([*SHORT, "--epochs", "1", "--accumulate", "2", "--clip-grad", "1", "--out", str(tmp_path)]) == 0
    assert [r["step"] for r in numbers(tmp_path) if "loss" in r] == [1, 2, 3, 4, 5]
    # Batch norm sees halves, so the numbers are others, but of the same images and weights.
    assert losses(tmp_path)[0] == pytest.approx(losses(uninterrupted)[0], rel=0.05)


@pytest.mark.parametrize("amp", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_mixed_precision_follows_float32(amp, uninterrupted, tmp_path, monkeypatch):
    stop_after(monkeypatch, 1)
    assert train.main([*SHORT, "--amp", amp, "--out", str(tmp_path)]) == train.STOPPED
    expected, found = losses(uninterrupted)[0], losses(tmp_path)[0]
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)
    assert bool(checkpoint.load(tmp_path / "last.pt")["scaler"]) == (amp == "fp16")


def test_steps_of_a_captured_model(uninterrupted, tmp_path, monkeypatch):
    """By graphs that run again, as there is no GPU."""
    made = []

    def capture(network, x):
        assert x.shape == (256, 1, 16, 16) and network.training
        made.append(Rerun(network, x))
        return made[0]

    monkeypatch.setattr(fused_resnet, "capture_training", capture)
    assert train.main([*SHORT, "--capture", "--out", str(tmp_path)]) == 0
    assert made[0]._calls == 2 * STEPS, "forward and backward of every step"
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted), rel=1e-3)


def one_of_two(rank: int, out: str, *more: str) -> int:
    """A run by one of two processes; how many calls were a graph's."""
    made = []
    fused_resnet.capture_training = lambda network, x: made.append(Rerun(network, x)) or made[0]
    chosen = options.parse([*SHORT, *more, "--accumulate", "2", "--out", out])
    train.train(chosen, processes.Team(rank, 2, torch.device("cpu")))
    return made[0]._calls if made else 0


@pytest.mark.slow
def test_steps_of_a_captured_model_in_two_processes(tmp_path):
    with Ranks(2) as ranks:
        assert ranks.run(one_of_two, str(tmp_path / "captured"), "--capture") == [2 * 2 * STEPS] * 2
        assert ranks.run(one_of_two, str(tmp_path / "not")) == [0, 0]
    assert losses(tmp_path / "captured") == pytest.approx(losses(tmp_path / "not"), rel=1e-3)


def test_a_run_from_before_there_was_a_capture_goes_on(tmp_path):
    now = {"--lr": 0.1, "--capture": False}
    checkpoint.require_same(tmp_path, {"--lr": 0.1}, now)
    with pytest.raises(Refused, match="--capture was False, is True"):
        checkpoint.require_same(tmp_path, {"--lr": 0.1}, now | {"--capture": True})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("captured", [[], ["--capture"]], ids=["", "captured"])
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_gpu_trains_and_goes_on(amp, captured, uninterrupted, tmp_path, monkeypatch):
    common = [*SHORT, "--device", "cuda", "--amp", amp, *captured, "--deterministic", "--workers", "1", "--out"]
    try:
        assert train.main([*common, str(tmp_path / "whole")]) == 0
        with monkeypatch.context() as patch:
            stop_after(patch, 6)
            assert train.main([*common, str(tmp_path / "broken")]) == train.STOPPED
        assert train.main([*common, str(tmp_path / "broken")]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(tmp_path / "whole")[0] == pytest.approx(losses(uninterrupted)[0], rel=0.02)
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


# --- interruptions -------------------------------------------------------------------------------------------------


def in_this_process(out: Path) -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert train.main([*SHORT, "--out", str(out)]) == 0


def in_its_own(out: Path) -> None:
    answer = start(SCRIPT, *SHORT, "--out", out, "--save-every", "2", "--workers", "2")
    assert answer.returncode == 0, answer.stderr
    assert f"goes on after epoch 1 and 1 steps of {out / 'last.pt'}" in answer.stdout


@pytest.mark.parametrize("resume", [in_this_process, pytest.param(in_its_own, marks=pytest.mark.slow)])
def test_killed_and_resumed_gives_the_same_numbers(resume, uninterrupted, tmp_path):
    out = tmp_path / "out"
    answer = start("-c", DRIVER, *driver(signal.SIGKILL, 8, out, "--save-every", "3"))
    assert answer.returncode == -signal.SIGKILL, answer.stderr
    assert len(losses(out)) == 8
    position = checkpoint.load(out / "last.pt")["position"]
    assert (position["epochs"], position["steps"]) == (1, 1)
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "lo')  # as a kill in the middle of a write leaves it

    resume(out)
    assert_same_run(out, uninterrupted)


@pytest.mark.parametrize("step", [2, 4, *(pytest.param(step, marks=pytest.mark.slow) for step in (5, 9))])
def test_stopped_and_resumed_gives_the_same_numbers(step, uninterrupted, tmp_path, monkeypatch, capsys):
    """Noted in the step after: in the middle of an epoch, before its evaluation, in the next one, at the very end."""
    command = [*SHORT, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        stop_after(patch, step, signal.SIGINT if step == 2 else signal.SIGTERM)
        assert train.main(command) == train.STOPPED
    assert f"stopped after step {step + 1} of {STEPS}; the same command goes on from there" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    in_this_process(tmp_path)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_everything_that_has_state_goes_on(tmp_path, monkeypatch):
    """fp16's scaler, clipped gradients, accumulation, and a code that draws from every generator."""
    told = report.Report.step

    def draws(self, epoch, done, loss, *rest):
        told(self, epoch, done, loss + random.random() + np.random.rand() + torch.rand(()).item(), *rest)

    monkeypatch.setattr(report.Report, "step", draws)
    many = ["--amp", "fp16", "--accumulate", "2", "--clip-grad", "0.5", "--label-smoothing", "0.1", "--save-every", "1"]
    whole, broken = ([*SHORT, "--epochs", "1", *many, "--out", str(tmp_path / name)] for name in ("whole", "broken"))
    assert train.main(whole) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train.main(broken) == train.STOPPED
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert train.main(broken) == 0
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.slow
def test_workers_outlive_a_signal_to_the_whole_group(uninterrupted, tmp_path):
    script = DRIVER.replace("os.kill(os.getpid(), number)", "os.killpg(0, number)")
    command = [sys.executable, "-c", script, *map(str, driver(signal.SIGTERM, 6, tmp_path, "--workers", "2"))]
    env = {**os.environ, "PYTHONPATH": CHECKOUT, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    answer = subprocess.run(command, env=env, capture_output=True, text=True, start_new_session=True, timeout=500)
    assert answer.returncode == train.STOPPED, answer.stderr
    assert answer.stderr == ""
    assert train.main([*SHORT, "--out", str(tmp_path)]) == 0
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_two_processes_stopped_and_resumed(tmp_path):
    for name, step in (("whole", NO_STEP), ("broken", 6)):
        answer = torchrun(tmp_path, *driver(signal.SIGTERM, step, tmp_path / name))
        assert (answer.returncode == 0) == (name == "whole"), answer.stderr
    assert "stopped after step 7 of 10" in answer.stdout  # rank 1, which got no signal, as well
    answer = torchrun(tmp_path, *driver(signal.SIGTERM, NO_STEP, tmp_path / "broken"))
    assert answer.returncode == 0, answer.stderr
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_a_finished_run_does_nothing_more(uninterrupted, tmp_path, capsys):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    assert train.main([*SHORT, "--out", str(out)]) == 0
    assert "best accuracy" in capsys.readouterr().out
    assert_same_run(out, uninterrupted)


def test_the_end_is_exported(uninterrupted, tmp_path):
    out, path = shutil.copytree(uninterrupted, tmp_path / "out"), tmp_path / "weights.pt"
    arguments = [*SHORT, "--out", str(out), "--export", str(path)]
    assert train.main(arguments) == 0
    assert_same(torch.load(path, weights_only=True), checkpoint.load(out / "last.pt")["model"])
    made = json.loads(path.with_suffix(".json").read_text())
    assert made["command"] == f"python examples/train.py {' '.join(arguments)}"
    assert made["model"] == {"name": "cifar_resnet8", "in_channels": 1, "num_classes": 10}
    assert made["test_accuracy"] == numbers(out)[-1]["accuracy"]
    train_images = data.load(options.parse(SHORT), ALONE).train.images.float()
    assert made["mean"] == [pytest.approx(train_images.mean().item(), rel=1e-6)]
    assert made["std"] == [pytest.approx(train_images.std().item(), rel=1e-6)]


def test_fresh_starts_anew(uninterrupted, tmp_path, monkeypatch):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    stop_after(monkeypatch, 1)
    assert train.main([*SHORT, "--lr", "0.01", "--fresh", "--out", str(out)]) == train.STOPPED
    assert len(numbers(out)) == 2 and losses(out)[0] == losses(uninterrupted)[0]


def test_changed_options_are_refused_by_name(uninterrupted, tmp_path, capsys):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    assert train.main([*SHORT, "--lr", "0.2", "--blocks", "torchvision", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{out / 'last.pt'}: belongs to another run: " in error
    assert "--lr was 0.1, is 0.2" in error and "--blocks was fused, is torchvision" in error
    assert "--epochs" not in error
    assert numbers(out) == numbers(uninterrupted)


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def one_bit_off(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def another_file(content: bytes) -> bytes:
    f = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, f)
    return f.getvalue()


@pytest.mark.parametrize("damage", [truncated, one_bit_off, another_file, lambda c: b"", lambda c: b"no checkpoint"])
def test_a_damaged_checkpoint_is_reported_with_its_path(damage, uninterrupted, tmp_path, capsys):
    path = tmp_path / "last.pt"
    path.write_bytes(damage((uninterrupted / "last.pt").read_bytes()))
    assert train.main([*SHORT, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"error: {path}: is " in error and "--fresh starts anew" in error


def test_a_write_that_fails_leaves_the_former_file(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"setting": 1})

    def fails(f):
        f.write(b"half of it")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        checkpoint.write_whole(path, fails)
    assert checkpoint.load(path) == {"setting": 1}


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--epochs", "0"], "argument --epochs: expected an integer of at least 1, got '0'"),
        (["--lr", "-1"], "argument --lr: expected a number above 0, got '-1'"),
        (["--lr", "nan"], "argument --lr: expected a number above 0, got 'nan'"),
        (["--warmup", "1"], "argument --warmup: expected a number from 0 to below 1, got '1'"),
        (["--seed", "x"], "argument --seed: expected an integer from 0 to 4294967295, got 'x'"),
        (["--model", "vgg"], "argument --model: invalid choice"),
        (["--download"], "--download: is for CIFAR-10"),
        (["--model", "plain18", "--blocks", "torchvision"], "--blocks torchvision: torchvision has no blocks of --mod"),
        (["--epochs", "1", "--export", f"{__file__}/x"], "--export: cannot be written: "),
        (["--fresh", "--resume"], "argument --resume: not allowed with argument --fresh"),
        (["--resume"], "--resume: there is no "),
        (["--batch-size", "9", "--accumulate", "2"], "--batch-size: must be a multiple of 2 (--accumulate 2 x 1 proc"),
        (["--batch-size", "2000"], "--batch-size: there are 1437 training images, got 2000"),
        (["--sync-bn"], "--sync-bn: PyTorch's SyncBatchNorm needs GPUs"),
        (["--capture"], "--capture: x: expected a CUDA tensor, got cpu"),
        (["--dataset", "cifar10"], "--download fetches CIFAR-10"),
        (["--out", __file__], "--out: cannot be made a folder: "),
        (["--lr", "1e30"], "--lr: the loss is "),
    ],
    ids=lambda v: " ".join(v).replace(__file__, "file") if isinstance(v, list) else "",
)
def test_what_cannot_be_is_refused_by_the_options_name(arguments, sentence, tmp_path, capsys):
    try:
        status = train.main([*SHORT, "--data", str(tmp_path), "--out", str(tmp_path), *arguments])
    except SystemExit as parsing:
        status = parsing.code
    assert status == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path, capsys):
    assert train.main([*SHORT, "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "--device cuda: PyTorch finds no GPU" in capsys.readouterr().err


def test_help_tells_of_every_option(capsys):
    with pytest.raises(SystemExit):
        options.parse(["--help"], train.__doc__)
    out = capsys.readouterr().out
    for name in options.Options.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in out


# --- data ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Path:
    """60 made-up images in CIFAR-10's own files."""
    folder, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name: str) -> list[str]:
        images = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        return [name, write(name, {"data": images, "labels": list(range(10))})]

    meta = {**torchvision.datasets.CIFAR10.meta, "md5": write("batches.meta", {"label_names": list("0123456789")})}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [batch("test_batch")])
    return tmp_path


def test_cifar10_is_taken_where_it_is(cifar, tmp_path, capsys):
    arguments = [
        "--model",
        "cifar_resnet8",
        "--data",
        str(cifar),
        "--epochs",
        "1",
        "--batch-size",
        "25",
        "--workers",
        "1",
    ]
    assert train.main([*arguments, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    assert "cifar10: 50 training and 10 test images of [3, 32, 32]" in capsys.readouterr().out


def test_damaged_cifar10_is_not_taken(cifar, capsys):
    (cifar / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"")
    with pytest.raises(Refused, match=f"--data {cifar}: .*corrupted"):
        data.load(options.parse(["--dataset", "cifar10", "--data", str(cifar)]), ALONE)
    assert data.load(options.parse(["--data", str(cifar)]), ALONE).name == "digits"


def test_augmentation_moves_and_mirrors(cifar):
    found = data.load(options.parse(["--data", str(cifar)]), ALONE)
    train_set = data.Augmented(found, seed=3)
    mean, std = train_set.mean, train_set.std
    black = torch.nn.functional.pad(found.train.images, [4] * 4)
    seen = set()
    for epoch in range(20):
        train_set.epoch = epoch
        image, label = train_set[7]
        assert label == found.train.labels[7]
        windows = ((t, left, f) for t in range(9) for left in range(9) for f in (False, True))
        (where,) = [w for w in windows if torch.equal(image, window(black[7], *w, mean, std))]
        seen.add(where)
    assert len(seen) > 10 and {f for *_, f in seen} == {False, True}


def window(image: torch.Tensor, top: int, left: int, flip: bool, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    cut = (image[:, top : top + 32, left : left + 32] - mean) / std
    return cut.flip(-1) if flip else cut


def test_an_epoch_entered_in_the_middle_has_the_same_batches():
    chosen = options.parse([*SHORT, "--workers", "0"])
    found = data.load(chosen, ALONE)
    whole = list(data.Loaders(found, chosen, ALONE).training(3, 0))
    rest = list(data.Loaders(found, chosen, ALONE).training(3, 2))
    assert (len(whole), len(rest)) == (5, 3)
    assert_same(rest, whole[2:])


def test_processes_share_the_images():
    chosen = options.parse([*SHORT, "--batch-size", "6"])
    found = data.load(chosen, ALONE)
    teams = [processes.Team(rank, 3, ALONE.device) for rank in range(3)]
    loaders = [data.Loaders(found, chosen, team) for team in teams]
    trained = [i for loader in loaders for i in loader.training(1, 0).sampler]
    assert len(trained) == len(set(trained)) == 6 * loaders[0].steps
    assert sorted(i for loader in loaders for i in loader.testing().sampler) == list(range(360))


# --- model, schedule, report ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_fused_and_torchvisions_models_begin_alike(name):
    build = [options.parse(["--model", name, "--blocks", blocks]) for blocks in ("fused", "torchvision")]
    fused, untouched = (model.build(chosen, 3, 10) for chosen in build)
    assert_same(fused.state_dict(), untouched.state_dict())
    report_ = fused_resnet.swap_report(fused)
    assert report_.fused == report_.blocks and not fused_resnet.swap_report(untouched).fused
    maps = []
    fused.fc.register_forward_pre_hook(lambda m, x: maps.append(x[0].shape))
    last = fused.layer3 if name == "cifar_resnet8" else fused.layer4
    last.register_forward_hook(lambda m, x, y: maps.append(y.shape[2:]))
    assert fused.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert maps[0] == ((8, 8) if name == "cifar_resnet8" else (4, 4))


@pytest.mark.parametrize("name, blocks", [("cifar_bottleneck47", 15), ("preact_resnet18", 8), ("plain18", 8)])
def test_the_family_is_built_for_small_images(name, blocks):
    network = model.build(options.parse(["--model", name]), 1, 10)
    assert sum(isinstance(m, train.FUSED) for m in network.modules()) == blocks
    assert network.conv1.kernel_size == (3, 3) and isinstance(network.maxpool, nn.Identity)
    assert network.eval()(torch.randn(2, 1, 16, 16)).shape == (2, 10)


def test_sync_bn_reaches_every_norm_and_blocks_stay_fused():
    network = model.build(options.parse(["--model", "resnet18", "--sync-bn"]), 1, 10)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 20 and all(type(m) is nn.SyncBatchNorm for m in norms)
    assert len(fused_resnet.swap_report(network).fused) == 8


def test_only_weights_decay():
    network = model.build(options.parse(["--model", "resnet18"]), 3, 10)
    decayed, free = model.optimizer(network, options.parse(["--weight-decay", "0.01"])).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    assert len(decayed["params"]) == 21 and len(free["params"]) == 41  # 20 convolutions, fc; 20 norms, fc's bias
    assert {id(p) for p in network.parameters()} == {id(p) for g in (decayed, free) for p in g["params"]}


def test_the_rate_rises_along_a_line_and_falls_along_a_cosine():
    chosen = options.parse(["--lr", "0.4", "--warmup", "0.2"])
    rates = [model.learning_rate(step, 20, chosen) for step in range(20)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert rates[12] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert model.learning_rate(0, 20, options.parse(["--lr", "0.4", "--warmup", "0"])) == 0.4


def test_the_bar_is_for_terminals(tmp_path, capsys, monkeypatch):
    for terminal in ("0", "1"):
        monkeypatch.setenv("TTY_COMPATIBLE", terminal)
        with report.Report(tmp_path, first=True, steps=10) as told:
            told.step(1, 3, 2.5, 0.1, 1234.0)
            told.progress.refresh()
        shown = capsys.readouterr().out
        assert ("loss 2.5000  lr 0.1000  1,234 images/s" in shown) == (terminal == "1")
        assert ("3/10" in shown) == (terminal == "1")
    with report.Report(tmp_path, first=False, steps=10) as told:
        told.say("anything")
        told.step(1, 3, 2.5, 0.1, 1234.0)
    assert capsys.readouterr().out == ""


def test_the_picture_is_written(uninterrupted, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curve.png"
    assert report.draw(uninterrupted / "metrics.jsonl", picture) == "curve.png shows loss and accuracy"
    with Image.open(picture) as image:
        assert image.width > 500 and np.asarray(image.convert("L")).std() > 5


def test_without_matplotlib_there_is_a_sentence(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    sentence = "no curve.png: it needs matplotlib (pip install matplotlib)"
    assert report.draw(uninterrupted / "metrics.jsonl", tmp_path / "curve.png") == sentence
