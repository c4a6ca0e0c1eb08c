"""Does depth hurt? Trains plain and residual twins of growing depth, and compares how well they fit.

    python examples/degradation.py                                  # 8, 20 and 56 layers, 30 epochs
    python examples/degradation.py --quick                          # 8 and 20 layers, two minutes on a CPU
    python examples/degradation.py --seeds 0 1 2 --bottleneck 47    # three times, and 47 layers of bottlenecks

He et al. (arXiv 1512.03385), figures 1 and 6, on CIFAR-10, or on scikit-learn's handwritten digits where that is not at
hand: twins begin with the same weights, see the same images in the same order, and differ in the shortcut alone: `+ x`,
and projections where maps shrink (none with --shortcut zero_pad). Degradation is a matter of the training images: a
deeper plain network that fits them worse than a shallower one does not overfit, it is harder to optimise. So what
counts is the loss on all training images, unaugmented, in eval mode, at the end.

Every network's state is saved in --out after each epoch: killed and called again, it goes on with the numbers that it
would have had without. The record is written whenever a network is done, the picture at the end.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from training import Refused, checkpoint, data, model, options, processes, report, twins

CURVES = ("train_loss", "train_accuracy", "test_accuracy")
FINAL = ("train_loss_eval", "train_accuracy_eval")
INTERRUPTED = 130


@dataclass(frozen=True)
class Options(twins.TwinOptions):
    """One field an option, under its name; `parse` holds the defaults."""

    depths: list[int]
    bottleneck: list[int]
    block: str
    activation: str
    epochs: int
    seeds: list[int]
    quick: bool
    images: int | None
    fresh: bool


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line. Exits with status 2 and a sentence that names the option if one cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_data(parser.add_argument_group("data"))

    group = parser.add_argument_group("networks, a plain and a residual one of each")
    text = (
        "weighted layers, 6n + 2 of basic blocks or 9n + 2 of bottlenecks (default: 8 20 56, of bottlenecks 11 20 56; "
        "with --quick, the first two)"
    )
    group.add_argument("--depths", metavar="N", nargs="+", help=text)
    text = "also bottlenecks of 9n + 2 layers, 47 say: their weights beside those of 20 layers of basic blocks"
    group.add_argument("--bottleneck", metavar="N", nargs="+", type=twins.depth("bottleneck"), default=[], help=text)
    group.add_argument("--block", choices=tuple(twins.LAYERS), default="basic", help="of --depths (default: basic)")
    text = "ReLU after the add (2015), or batch norm and ReLU before the convolutions (2016) (default: post)"
    group.add_argument("--activation", choices=("post", "pre"), default="post", help=text)
    twins.add_shortcut(group)

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", metavar="N", type=options.count, help="(default: 30; with --quick, 10)")
    twins.add_optimizer(group)
    text = "of weights, order and augmentation; every network is trained with each (default: 0)"
    group.add_argument("--seeds", metavar="N", nargs="+", type=options.seed, default=[0], help=text)
    text = "only the first N training and N test images (default: all; with --quick, 1500)"
    group.add_argument("--images", metavar="N", type=options.count, help=text)
    group.add_argument(
        "--quick",
        action="store_true",
        help="fewer layers, epochs and images, for a first look; in runs/degradation-quick",
    )

    group = parser.add_argument_group("run")
    twins.add_files(group, "degradation")
    group.set_defaults(out=None)
    group.add_argument("--fresh", action="store_true", help="start anew, and overwrite what is in --out")

    found = parser.parse_args(arguments)
    options.check_data(parser, found)
    least = "8" if found.block == "basic" else "11"
    found.depths = found.depths or ([least, "20"] if found.quick else [least, "20", "56"])
    found.out = found.out or Path("runs", "degradation-quick" if found.quick else "degradation")
    try:
        found.depths = [twins.depth(found.block)(text) for text in found.depths]
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --depths: {error}")
    found.epochs = found.epochs or (10 if found.quick else 30)
    found.images = found.images or (1500 if found.quick else None)
    found.record = found.record or found.out / "degradation.json"
    found.picture = found.picture or found.out / "degradation.png"
    return Options(**vars(found))


class Run:
    """One network, from its first epoch to its last, in a file of its own."""

    def __init__(self, twin: twins.Twin, seed: int, chosen: Options, found: data.Data, team: processes.Team):
        self.twin, self.found, self.team = twin, found, team
        size = twins.batch_size(chosen, found)
        self.recipe = twins.Recipe(chosen.epochs, size, chosen.lr, chosen.momentum, chosen.weight_decay, seed)
        self.path = chosen.out / f"{twin.name}-seed-{seed}.pt"
        self.setting = {
            "--dataset": found.name,
            "--images": len(found.train.labels),
            "--device": team.device.type,
            **{f"--{name.replace('_', '-')}": value for name, value in asdict(self.recipe).items()},
            **{f"--{name}": getattr(twin, name) for name in ("block", "activation", "shortcut")},
        }
        self.curve: dict[str, list[float]] = {name: [] for name in (*CURVES, *FINAL)}
        self.seconds, self.parameters = 0.0, 0
        self.state: dict | None = None
        if not chosen.fresh and self.path.exists():
            self._resume(checkpoint.load(self.path))

    @cached_property
    def loaders(self) -> data.Loaders:
        """Made when they are needed: they hold a copy of the images."""
        return data.Loaders(self.found, self.recipe, self.team)

    def _resume(self, saved: dict) -> None:
        checkpoint.require_same(self.path, saved["setting"], self.setting)
        self.curve, self.seconds, self.parameters = saved["curve"], saved["seconds"], saved["parameters"]
        self.state = None if self.done else saved

    @property
    def epochs(self) -> int:
        return len(self.curve["train_loss"])

    @property
    def done(self) -> bool:
        return self.epochs == self.recipe.epochs

    @property
    def steps_left(self) -> int:
        return (self.recipe.epochs - self.epochs) * (len(self.found.train.labels) // self.recipe.batch_size)

    def train(self, bar: Progress, task) -> None:
        """The epochs that are left."""
        network = self.twin.build(self.recipe.seed, self.found).to(self.team.device)
        optimizer = self.recipe.optimizer(network)
        self.parameters = parameters(network)
        if self.state is not None:
            network.load_state_dict(self.state["model"])
            optimizer.load_state_dict(self.state["optimizer"])
        while not self.done:
            start = time.perf_counter()
            self._epoch(network, optimizer, bar, task)
            if self.done:
                final = measure(network, self.loaders.fitted(), self.team.device)
                if not math.isfinite(final[0]):
                    raise Refused(
                        f"--lr: {self.twin.name} ends with a loss of {final[0]}; lower than {self.recipe.lr} may do"
                    )
                for name, value in zip(FINAL, final, strict=True):
                    self.curve[name].append(value)
            self.seconds += time.perf_counter() - start
            self._save(network, optimizer)
        self.state = None
        del self.loaders

    def _epoch(self, network: nn.Module, optimizer: torch.optim.SGD, bar: Progress, task) -> None:
        network.train()
        steps, done = self.loaders.steps * self.recipe.epochs, self.loaders.steps * self.epochs
        sums = torch.zeros(2, dtype=torch.float64)
        for step, batch in enumerate(self.loaders.training(self.epochs, 0), done):
            images, labels = to_device(batch, self.team.device)
            optimizer.param_groups[0]["lr"] = model.learning_rate(step, steps, self.recipe)
            optimizer.zero_grad()
            logits = network(images)
            loss = cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            if not math.isfinite(value := loss.item()):
                raise Refused(f"--lr: the loss of {self.twin.name} is {value}; lower than {self.recipe.lr} may do")
            sums += torch.tensor([value, (logits.argmax(1) == labels).double().mean().item()])
            text = f"{self.twin.name}, seed {self.recipe.seed}, epoch {self.epochs + 1}, loss {value:.4f}"
            bar.update(task, advance=1, description=text)
        _, test_accuracy = measure(network, self.loaders.testing(), self.team.device)
        loss, accuracy = (sums / self.loaders.steps).tolist()
        for name, value in zip(CURVES, (loss, accuracy, test_accuracy), strict=True):
            self.curve[name].append(value)

    def _save(self, network: nn.Module, optimizer: torch.optim.SGD) -> None:
        content = {"setting": self.setting, "curve": self.curve, "seconds": self.seconds}
        content |= {"parameters": self.parameters, "model": network.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.save(self.path, content)

    def record(self) -> dict:
        curve = {name: [report.digits(value) for value in values] for name, values in self.curve.items()}
        described = {"name": self.twin.name, **asdict(self.twin), "seed": self.recipe.seed}
        return {**described, "parameters": self.parameters, **curve, "seconds": round(self.seconds, 1)}


def to_device(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    images, labels = batch
    return images.to(device, memory_format=torch.channels_last), labels.to(device)


@torch.no_grad()
def measure(network: nn.Module, loader: DataLoader, device: torch.device) -> tuple[float, float]:
    """Mean loss and accuracy in eval mode."""
    network.eval()
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    for batch in loader:
        images, labels = to_device(batch, device)
        logits = network(images)
        right = (logits.argmax(1) == labels).sum()
        sums += torch.tensor([cross_entropy(logits, labels, reduction="sum").item(), right.item()])
        count += len(labels)
    return tuple((sums / count).tolist())


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# --- what came of it ------------------------------------------------------------------------------------------------


def networks(chosen: Options) -> list[twins.Twin]:
    """In the order of training: twin after twin, from the shallowest on."""
    sizes = [(chosen.block, depth) for depth in sorted(set(chosen.depths))]
    sizes += [("bottleneck", depth) for depth in sorted(set(chosen.bottleneck)) if ("bottleneck", depth) not in sizes]
    return [
        twins.Twin(kind, depth, block, chosen.activation, chosen.shortcut)
        for block, depth in sizes
        for kind in twins.KINDS
    ]


def table(records: list[dict]) -> str:
    """A line a network, means over the seeds."""
    columns = ("parameters", "training loss", "training error", "test accuracy", "seconds")
    lines = [f"{'network':<24}" + "".join(f"{name:>16}" for name in columns)]
    for name in dict.fromkeys(r["name"] for r in records):
        same = [r for r in records if r["name"] == name]
        parameters, loss, fit, accuracy, seconds = (
            sum(r[key][-1] if isinstance(r[key], list) else r[key] for r in same) / len(same)
            for key in ("parameters", *FINAL, "test_accuracy", "seconds")
        )
        lines.append(f"{name:<24}{parameters:>16,.0f}{loss:>16.5f}{1 - fit:>16.2%}{accuracy:>16.2%}{seconds:>16.0f}")
    return "\n".join(lines)


def findings(records: list[dict]) -> list[str]:
    """What the last training losses say of each step in depth, and of each pair of twins."""
    networks = {(r["block"], r["depth"], r["kind"]) for r in records}
    sizes = sorted({network[:2] for network in networks})
    deeper = [(a, b) for a, b in zip(sizes, sizes[1:], strict=False) if a[0] == b[0]]
    pairs = {
        **{
            f"{a[0]}, {kind}, {a[1]} -> {b[1]} layers": ((*a, kind), (*b, kind))
            for kind in twins.KINDS
            for a, b in deeper
        },
        **{f"{a[0]}, {a[1]} layers, residual -> plain": ((*a, "residual"), (*a, "plain")) for a in sizes},
    }
    return [f"{name}: {compared(records, *pair)}" for name, pair in pairs.items() if networks.issuperset(pair)]


def compared(records: list[dict], *pair: tuple) -> str:
    """Both measures of the training loss, means over the seeds that both networks were trained with."""
    runs = [{r["seed"]: r for r in records if (r["block"], r["depth"], r["kind"]) == network} for network in pair]
    seeds = runs[0].keys() & runs[1].keys()
    if not seeds:
        return "no seed was trained on both"
    parts = []
    for key, measure in (("train_loss_eval", "in eval mode"), ("train_loss", "over the last epoch")):
        before, after = ([of[s][key][-1] for s in sorted(seeds)] for of in runs)
        higher = sum(b > a for a, b in zip(before, after, strict=True))
        means = " -> ".join(f"{sum(values) / len(seeds):.4f}" for values in (before, after))
        parts.append(f"{means} {measure} (higher in {higher} of {len(seeds)} seed{'s' * (len(seeds) > 1)})")
    return "training loss " + ", ".join(parts)


def squeezed(records: list[dict], chosen: Options, found: data.Data) -> list[str]:
    """Parameters of the residual bottleneck networks beside those of 20 layers of basic blocks."""
    twin = twins.Twin("residual", 20, "basic", chosen.activation, chosen.shortcut)
    basic = parameters(twin.build(0, found))
    sizes = {r["depth"]: r["parameters"] for r in records if (r["kind"], r["block"]) == ("residual", "bottleneck")}
    return [f"bottleneck, {n} layers: {p:,} parameters; basic, 20 layers: {basic:,}" for n, p in sizes.items()]


def draw(record: dict, picture: Path) -> str:
    """Training loss and test accuracy over the epochs. Returns what became of the picture, in a sentence."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return f"no {picture.name}: it needs matplotlib (pip install matplotlib)"
    sizes = list(dict.fromkeys((r["block"], r["depth"]) for r in record["runs"]))
    colours = twins.coloured(sizes)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(r["name"] for r in record["runs"]):
        same = [r for r in record["runs"] if r["name"] == name]
        style = {"color": colours[same[0]["block"], same[0]["depth"]], "ls": twins.LINES[same[0]["kind"]]}
        for axes, key, scale in ((left, "train_loss", 1), (right, "test_accuracy", 100)):
            seeds = scale * torch.tensor([r[key] for r in same])
            epochs = range(1, seeds.shape[1] + 1)
            axes.plot(epochs, seeds.mean(0), lw=1.8, **style)
            if len(same) > 1:
                axes.fill_between(epochs, seeds.amin(0), seeds.amax(0), color=style["color"], alpha=0.12, lw=0)
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.set_ylabel("training loss, mean of the epoch")
    right.set_ylabel("test accuracy, %")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    shown = [
        Line2D([], [], color=colour, lw=3, label=f"{depth} layers{', bottlenecks' * (block == 'bottleneck')}")
        for (block, depth), colour in colours.items()
    ]
    shown += [Line2D([], [], color="0.3", lw=1.8, ls=ls, label=kind) for kind, ls in twins.LINES.items()]
    figure.legend(handles=shown, loc="outside lower center", ncols=len(shown), frameon=False)
    figure.suptitle(title(record))
    checkpoint.write_whole(picture, lambda f: figure.savefig(f, format="png", dpi=120))
    return f"{picture.name} shows training loss and test accuracy"


def title(record: dict) -> str:
    name = {"cifar10": "CIFAR-10", "digits": "handwritten digits"}[record["dataset"]]
    seeds = len({r["seed"] for r in record["runs"]})
    spread = f", mean and range of {seeds} seeds" if seeds > 1 else ""
    return f"Plain and residual twins on {name}, {record['epochs']} epochs{spread}"


def experiment(chosen: Options, team: processes.Team, command: str) -> None:
    """Raises Refused."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    found = first_images(twins.load(chosen, team), chosen.images)
    twins.make_folders(chosen)
    runs = [Run(twin, seed, chosen, found, team) for seed in chosen.seeds for twin in networks(chosen)]
    console.print(f"{found.name}: {len(found.train.labels)} training and {len(found.test.labels)} test images")
    done = sum(run.done for run in runs)
    if done or any(run.epochs for run in runs):
        console.print(f"goes on in {chosen.out}: {done} of {len(runs)} networks are done")
    record = {
        "command": command,
        "dataset": found.name,
        "image": list(found.train.images.shape[1:]),
        "train_images": len(found.train.labels),
        "test_images": len(found.test.labels),
        "epochs": chosen.epochs,
        "batch_size": twins.batch_size(chosen, found),
        **{name: getattr(chosen, name) for name in ("lr", "momentum", "weight_decay")},
        "machine": report.machine(),
    }
    with report.bar(console, console.is_terminal) as bar:
        task = bar.add_task("", total=sum(run.steps_left for run in runs))
        for run in runs:
            if not run.done:
                run.train(bar, task)
                console.print(told(run))
            record["runs"] = [r.record() for r in runs if r.done]
            report.write_record(chosen.record, record)
    console.print("\n" + table(record["runs"]) + "\n")
    for line in [*findings(record["runs"]), *squeezed(record["runs"], chosen, found)]:
        console.print(line)
    console.print(draw(record, chosen.picture))


def first_images(found: data.Data, count: int | None) -> data.Data:
    def first(part: data.Part) -> data.Part:
        return data.Part(part.images[:count], part.labels[:count])

    return replace(found, train=first(found.train), test=first(found.test))


def told(run: Run) -> str:
    last = {name: values[-1] for name, values in run.curve.items()}
    return (
        f"{run.twin.name}, seed {run.recipe.seed}: training loss {last['train_loss_eval']:.5f}, "
        f"test accuracy {last['test_accuracy']:.2%}, {run.seconds:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    try:
        with twins.alone(chosen.device) as team:
            experiment(chosen, team, report.command("degradation.py", arguments))
    except Refused as refused:
        print(f"degradation.py: error: {refused}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command, without --fresh, goes on after the last whole epoch", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
