"""Train a ResNet on CIFAR-10, or on scikit-learn's handwritten digits, with fused blocks or torchvision's.

    python examples/train.py --model cifar_resnet8 --epochs 15         # the digits, in about a minute on two CPU cores
    python examples/train.py --download                                # CIFAR-10, on a GPU
    torchrun --nproc-per-node 2 examples/train.py                      # on two GPUs, or CPUs

It saves its state after every epoch (--save-every: more often), and after the step in which SIGTERM or Ctrl-C came; it
then exits with status 143. Called again, it goes on where it was: after any interruption, a killed process included,
with the numbers that it would have had without (on a GPU: with --deterministic). Everything is in --out: last.pt, from
which it goes on; best.pt, the state_dict that did best on the test images; metrics.jsonl, a line a step and a line an
epoch; curve.png.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from training import Refused, checkpoint, data, model, options, processes, report

import fused_resnet

STOPPED = 128 + signal.SIGTERM
FUSED = (
    fused_resnet.FusedBasicBlock,
    fused_resnet.FusedBottleneck,
    fused_resnet.FusedPreActBasicBlock,
    fused_resnet.FusedPreActBottleneck,
)
DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Position:
    """Where a run is: after `epochs` whole epochs and `steps` of the next, whose losses add up to `loss`."""

    epochs: int = 0
    steps: int = 0
    loss: float = 0.0
    best: float = 0.0


class Stop:
    """Notes SIGTERM and SIGINT instead of dying of them."""

    asked = False

    def __enter__(self) -> Stop:
        self.former = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: object) -> None:
        # Again and again, if need be: torchrun passes on a signal that the terminal has sent to every process.
        self.asked = True

    def __exit__(self, *failure) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)


class Training:
    """The model and all that changes while it is trained."""

    def __init__(self, chosen: options.Options, team: processes.Team, loaders: data.Loaders, found: data.Data):
        self.options, self.team, self.loaders = chosen, team, loaders
        self.setting = checkpoint.setting(chosen, found.name, team)
        self.bare = model.build(chosen, found.channels, found.classes).to(team.device)
        self.optimizer = model.optimizer(self.bare, chosen)
        self.scaler = torch.amp.GradScaler(team.device.type, enabled=chosen.amp == "fp16")
        self.at = Position()
        self.model: nn.Module = self._captured(found) if chosen.capture else self.bare
        if team.world > 1:
            gpus = [team.device] if team.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.model, device_ids=gpus, gradient_as_bucket_view=True)

    def _captured(self, found: data.Data) -> nn.Module:
        shape = self.loaders.batch, *found.train.images.shape[1:]
        x, _ = self.to_device(torch.zeros(shape), torch.zeros(0))
        try:
            with self.autocast():
                return fused_resnet.capture_training(self.bare.train(), x)
        except ValueError as error:
            raise Refused(f"--capture: {error}") from error

    @property
    def steps_done(self) -> int:
        return self.at.epochs * self.loaders.steps + self.at.steps

    @property
    def steps(self) -> int:
        return self.options.epochs * self.loaders.steps

    def resume(self) -> bool:
        """Go on from last.pt, if that is wanted and there is one."""
        path = self.options.out / "last.pt"
        if self.options.fresh or not path.exists():
            if self.options.resume:
                raise Refused(f"--resume: there is no {path}")
            return False
        saved = checkpoint.load(path)
        checkpoint.require_same(path, saved["setting"], self.setting)
        self.bare.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.at = Position(**saved["position"])
        checkpoint.set_random_state(saved["random"][self.team.rank], self.team.device)
        return True

    def save(self) -> None:
        """Write last.pt. To be called by all processes."""
        random = self.team.gather(checkpoint.random_state(self.team.device))
        content = {
            "setting": self.setting,
            "position": asdict(self.at),
            "model": self.bare.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random,
        }
        if self.team.first:
            checkpoint.save(self.options.out / "last.pt", content)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.team.device.type, DTYPES[self.options.amp], enabled=self.options.amp != "none")

    def to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.team.device, non_blocking=True, memory_format=torch.channels_last)
        return images, labels.to(self.team.device, non_blocking=True)


def step(run: Training, batches: Iterator, stop: Stop) -> tuple[float, bool]:
    """One step of the optimizer. Returns the loss of the whole batch, and whether any process was asked to stop."""
    chosen, optimizer, scaler = run.options, run.optimizer, run.scaler
    optimizer.zero_grad()
    note = torch.zeros(2, device=run.team.device)
    for part in range(chosen.accumulate):
        images, labels = run.to_device(*next(batches))
        last = part == chosen.accumulate - 1
        # DistributedDataParallel exchanges gradients in the backward pass of the last part alone.
        with nullcontext() if last or run.team.world == 1 else run.model.no_sync():
            with run.autocast():
                loss = cross_entropy(run.model(images), labels, label_smoothing=chosen.label_smoothing)
                loss = loss / chosen.accumulate
            scaler.scale(loss).backward()
        note[0] += loss.detach()
    if chosen.clip_grad is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(run.bare.parameters(), chosen.clip_grad)
    scaler.step(optimizer)
    scaler.update()
    note[1] = stop.asked
    loss, asked = run.team.sum_(note).tolist()
    return loss / run.team.world, asked > 0


def train_epoch(run: Training, told: report.Report, stop: Stop) -> bool:
    """The rest of an epoch. Returns False if the run is to end here; its state is saved then."""
    at, chosen = run.at, run.options
    run.model.train()
    batches = iter(run.loaders.training(at.epochs, at.steps))
    while at.steps < run.loaders.steps:
        start = time.perf_counter()
        lr = model.learning_rate(run.steps_done, run.steps, chosen)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        loss, stopped = step(run, batches, stop)
        if not math.isfinite(loss):
            raise Refused(f"--lr: the loss is {loss} in step {run.steps_done + 1}; lower than {chosen.lr} may do")
        at.steps += 1
        at.loss += loss
        told.step(at.epochs + 1, run.steps_done, loss, lr, chosen.batch_size / (time.perf_counter() - start))
        if stopped or (chosen.save_every and run.steps_done % chosen.save_every == 0):
            run.save()
        if stopped:
            return False
    return True


@torch.no_grad()
def evaluate(run: Training) -> tuple[float, float]:
    """Mean loss and accuracy on all test images."""
    # Between two steps each process has running statistics of its own; rank 0's are those that are saved.
    run.team.copy_from_first_(run.bare.buffers())
    run.bare.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=run.team.device)
    for batch in run.loaders.testing():
        images, labels = run.to_device(*batch)
        with run.autocast():
            logits = run.bare(images)
        loss = cross_entropy(logits.float(), labels, reduction="sum")
        right = (logits.argmax(1) == labels).sum()
        sums += torch.stack([loss.double(), right.double(), torch.full_like(right, len(labels)).double()])
    loss, right, count = run.team.sum_(sums).tolist()
    return loss / count, right / count


def end_epoch(run: Training, told: report.Report) -> None:
    at = run.at
    test_loss, accuracy = evaluate(run)
    better, at.best = accuracy > at.best, max(accuracy, at.best)
    told.epoch(at.epochs + 1, run.steps_done, at.loss / run.loaders.steps, test_loss, accuracy, better)
    at.epochs, at.steps, at.loss = at.epochs + 1, 0, 0.0
    if better and run.team.first:
        checkpoint.save(run.options.out / "best.pt", run.bare.state_dict())
    run.save()


def train(chosen: options.Options, team: processes.Team, command: str = "") -> tuple[nn.Module, bool]:
    """The trained model, and whether all epochs were done. command: what --export says it was. Raises Refused."""
    if chosen.sync_bn and team.device.type != "cuda":
        raise Refused("--sync-bn: PyTorch's SyncBatchNorm needs GPUs, and --device is cpu")
    torch.backends.cudnn.benchmark = not chosen.deterministic
    if chosen.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    processes.seed(chosen.seed, team.rank)
    found = data.load(chosen, team)
    run = Training(chosen, team, data.Loaders(found, chosen, team), found)
    try:
        chosen.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--out: cannot be made a folder: {error}") from error
    resumed = run.resume()

    told = report.Report(chosen.out, team.first, run.steps)
    told.say(introduction(run, found))
    if resumed:
        told.say(f"goes on after epoch {run.at.epochs} and {run.at.steps} steps of {chosen.out / 'last.pt'}")
    told.open(run.at.epochs, run.steps_done)
    finished = True
    with Stop() as stop, told:
        while finished and run.at.epochs < chosen.epochs:
            finished = train_epoch(run, told, stop)
            if finished:
                end_epoch(run, told)
    if not finished:
        told.say(f"stopped after step {run.steps_done} of {run.steps}; the same command goes on from there")
    elif team.first:
        told.say(f"best accuracy {run.at.best:.2%}; everything is in {chosen.out}")
        told.say(report.draw(told.path, chosen.out / "curve.png"))
        if chosen.export:
            export(run, found, command)
    return run.bare, finished


def export(run: Training, found: data.Data, command: str) -> None:
    """The state_dict, and in JSON how it came about and what its images were normalised by."""
    chosen, last = run.options, report.read(run.options.out / "metrics.jsonl")[-1]
    made = {
        "command": command,
        "dataset": found.name,
        "model": {"name": chosen.model, "in_channels": found.channels, "num_classes": found.classes},
        "mean": run.loaders.test.mean.flatten().tolist(),
        "std": run.loaders.test.std.flatten().tolist(),
        "seed": chosen.seed,
        **{name: last[name] for name in ("train_loss", "test_loss")},
        "test_accuracy": last["accuracy"],
        "machine": report.machine(),
    }
    try:
        checkpoint.save(chosen.export, run.bare.state_dict())
        report.write_record(chosen.export.with_suffix(".json"), made)
    except OSError as error:
        raise Refused(f"--export: cannot be written: {error}") from error


def introduction(run: Training, found: data.Data) -> str:
    chosen, team = run.options, run.team
    fallen_back = chosen.dataset == "auto" and found.name == "digits"
    why = f" (no intact CIFAR-10 in {chosen.data}; --download fetches it)" if fallen_back else ""
    blocks = sum(isinstance(m, FUSED) for m in run.bare.modules())
    return (
        f"{found.name}{why}: {len(found.train.labels)} training and "
        f"{len(found.test.labels)} test images of {list(found.train.images.shape[1:])}\n"
        f"{chosen.model}, {f'{blocks} fused blocks' if blocks else 'untouched'}; {team.device.type}, "
        f"{team.world} process{'es' * (team.world > 1)}, {run.loaders.steps} steps an epoch"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options.parse(arguments, __doc__)
    try:
        with processes.team(chosen.device) as team:
            _, finished = train(chosen, team, report.command("train.py", arguments))
    except Refused as refused:
        print(f"train.py: error: {refused}", file=sys.stderr)
        return 2
    return 0 if finished else STOPPED


if __name__ == "__main__":
    raise SystemExit(main())
