"""What the add does to the gradient: its norm at every layer of plain and residual stacks, and in ten lines of NumPy.

    python examples/gradient_highway.py                             # basic blocks, and 1001 layers of bottlenecks
    python examples/gradient_highway.py --depths 8 20 --bottleneck  # small stacks alone, in seconds

A block of y = F(x) hands down dL/dy dF/dx, a block of y = F(x) + x hands down dL/dy (1 + dF/dx). First on two 8x8
matrices, by NumPy and by the autograd of fused_resnet.functional.conv_bn_act, which must agree (exit status 1 if they
do not). Then on the networks: the norm of the gradient of every convolution's weight and of every block's input, at
initialisation and after --steps of SGD, on one batch of training images, with the batch's statistics, in float64: the
gradient of a thousand layers may leave float32's range.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import Refused, checkpoint, data, options, processes, report, twins

from fused_resnet.functional import conv_bn_act

LESSON = {"plain": 0.000046, "residual": 1.000046, "ratio": 21817.5}
TOLERANCE = 1e-12  # relative, of float64 sums of eight products in another order


@dataclass(frozen=True)
class Options(twins.TwinOptions):
    """One field an option, under its name; `parse` holds the defaults."""

    depths: list[int]
    bottleneck: list[int]
    activation: list[str]
    steps: int
    bottleneck_batch: int
    seed: int


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line. Exits with status 2 and a sentence that names the option if one cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_data(parser.add_argument_group("data"))

    group = parser.add_argument_group("stacks, a plain and a residual one of each")
    text = "layers, 6n + 2, of basic blocks (default: 8 20 56 110)"
    default = [8, 20, 56, 110]
    group.add_argument("--depths", metavar="N", nargs="+", type=twins.depth("basic"), default=default, help=text)
    text = "layers, 9n + 2, of bottlenecks, at initialisation alone; without a number, none (default: 1001)"
    kind = twins.depth("bottleneck")
    group.add_argument("--bottleneck", metavar="N", nargs="*", type=kind, default=[1001], help=text)
    text = "ReLU after the add (2015), batch norm and ReLU before the convolutions (2016) (default: both)"
    choices = ("post", "pre")
    group.add_argument("--activation", nargs="+", choices=choices, default=list(choices), help=text)
    twins.add_shortcut(group)

    group = parser.add_argument_group("training")
    text = "of SGD, before the second measurement; 0 leaves it out (default: 50)"
    group.add_argument("--steps", metavar="N", type=options.count_or_none, default=50, help=text)
    twins.add_optimizer(group)
    text = "images that bottlenecks are measured on (default: 8)"
    group.add_argument("--bottleneck-batch", metavar="N", type=options.count, default=8, help=text)
    text = "of weights, order and augmentation (default: 0)"
    group.add_argument("--seed", metavar="N", type=options.seed, default=0, help=text)
    twins.add_files(parser.add_argument_group("run"), "gradients")

    found = parser.parse_args(arguments)
    options.check_data(parser, found)
    found.record = found.record or found.out / "gradients.json"
    found.picture = found.picture or found.out / "gradients.png"
    return Options(**vars(found))


# --- one block, by hand ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """F(x) = W2 ReLU(W1 x). w1, w2: [8, 8], of deviation 0.01. x: [8]. The gradient that comes from above is 1."""

    w1: np.ndarray
    w2: np.ndarray
    x: np.ndarray


def toy() -> Toy:
    rng = np.random.default_rng(0)
    w1, w2 = (rng.normal(0, 0.01, size=(8, 8)) for _ in range(2))
    return Toy(w1, w2, rng.normal(0, 1.0, size=8))


def by_numpy(block: Toy) -> dict[str, np.ndarray]:
    """dL/dx of y = F(x) and of y = F(x) + x."""
    mask = (block.w1 @ block.x > 0).astype(float)
    jacobian = block.w2 @ np.diag(mask) @ block.w1
    above = np.ones(8)
    return {"plain": jacobian.T @ above, "residual": (np.eye(8) + jacobian).T @ above}


def by_autograd(block: Toy) -> dict[str, np.ndarray]:
    """The same of two 1x1 convolutions without batch norm, the add inside the second one's op."""
    w1, w2 = (torch.from_numpy(w).view(8, 8, 1, 1) for w in (block.w1, block.w2))
    gradients = {}
    for kind in twins.KINDS:
        x = torch.from_numpy(block.x).view(1, 8, 1, 1).requires_grad_()
        y = conv_bn_act(conv_bn_act(x, w1), w2, residual=x if kind == "residual" else None, relu=False)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        gradients[kind] = gradient.flatten().numpy()
    return gradients


def norms(gradients: dict[str, np.ndarray]) -> dict[str, float]:
    plain, residual = (float(np.linalg.norm(gradients[kind])) for kind in twins.KINDS)
    return {"plain": plain, "residual": residual, "ratio": residual / plain}


def disagreement(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> float:
    """The larger of both kinds' |found - expected| / |expected|."""
    return max(float(np.linalg.norm(found[k] - expected[k]) / np.linalg.norm(expected[k])) for k in twins.KINDS)


# --- whole networks -------------------------------------------------------------------------------------------------


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    """Those of the main path by name, the stem first."""
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n}


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    return chain(network.layer1, network.layer2, network.layer3)


def gradients(network: nn.Module, images: Tensor, labels: Tensor) -> dict:
    """The loss, and the norms of its gradient by every main-path weight and every block's input, in float64."""
    network = copy.deepcopy(network).double().train()
    inputs: list[Tensor] = []

    def keep(block: nn.Module, arguments: tuple[Tensor]) -> None:
        arguments[0].retain_grad()
        inputs.append(arguments[0])

    for block in blocks(network):
        block.register_forward_pre_hook(keep)
    loss = cross_entropy(network(images.double()), labels)
    loss.backward()
    layers = convolutions(network)
    if not all(p.grad.isfinite().all() for p in network.parameters()):
        raise Refused("--lr: a gradient leaves float64's range; a lower one may do")
    return {
        "loss": report.digits(loss.item()),
        "layers": list(layers),
        "weight_grad_norm": [norm(conv.weight) for conv in layers.values()],
        "block_grad_norm": [norm(x) for x in inputs],
    }


def norm(of: Tensor) -> float:
    return report.digits(of.grad.norm().item())


def train(network: nn.Module, recipe: twins.Recipe, loaders: data.Loaders, steps: int) -> None:
    """`steps` of SGD at the full learning rate. Raises Refused if the loss leaves float32's range."""
    optimizer, device = recipe.optimizer(network), loaders.team.device
    batches = chain.from_iterable(loaders.training(epoch, 0) for epoch in count())
    network.train()
    for step, (images, labels) in enumerate(islice(batches, steps), 1):
        optimizer.zero_grad()
        loss = cross_entropy(network(images.to(device, memory_format=torch.channels_last)), labels.to(device))
        if not loss.isfinite():
            raise Refused(f"--lr: the loss is {loss.item()} in step {step}; lower than {recipe.lr} may do")
        loss.backward()
        optimizer.step()


def measured(chosen: Options, found: data.Data, team: processes.Team) -> Iterator[dict]:
    """Of every stack, a record at initialisation and, of basic blocks, one after the steps."""
    size = twins.batch_size(chosen, found)
    recipe = twins.Recipe(1, size, chosen.lr, chosen.momentum, chosen.weight_decay, chosen.seed)
    loaders = data.Loaders(found, recipe, team)
    stacks = [("basic", depth) for depth in chosen.depths] + [("bottleneck", depth) for depth in chosen.bottleneck]
    for block, depth in stacks:
        images, labels = batch(found, size if block == "basic" else chosen.bottleneck_batch, team.device)
        for activation in chosen.activation:
            for kind in twins.KINDS:
                twin = twins.Twin(kind, depth, block, activation, chosen.shortcut)
                network = twin.build(chosen.seed, found).to(team.device)
                described = {**asdict(twin), "batch": len(labels)}
                yield {**described, "step": 0, **gradients(network, images, labels)}
                if block == "basic" and chosen.steps:
                    train(network, recipe, loaders, chosen.steps)
                    yield {**described, "step": chosen.steps, **gradients(network, images, labels)}


def batch(found: data.Data, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first training images, unaugmented."""
    part = data.Normalised(found.train, found)
    images, labels = zip(*(part[i] for i in range(min(size, len(part)))), strict=True)
    return torch.stack(images).to(device, memory_format=torch.channels_last), torch.stack(labels).to(device)


# --- what came of it ------------------------------------------------------------------------------------------------


def line(stack: dict) -> str:
    """First against last: how much of the gradient at the last block arrives at the first one."""
    at, weights = stack["block_grad_norm"], stack["weight_grad_norm"]
    arrived = at[0] / at[-1] if at[-1] else math.inf
    return (
        f"{stack['kind']:<10}{stack['depth']:>5}  {stack['block']:<11}{stack['activation']:<6}{stack['step']:>4}"
        f"{stack['loss']:>9.3f}{at[0]:>12.3g}{at[-1]:>12.3g}{arrived:>12.3g}{weights[0]:>12.3g}"
    )


HEAD = (
    f"{'stack':<10}{'depth':>5}  {'block':<11}{'act.':<6}{'step':>4}{'loss':>9}"
    f"{'first block':>12}{'last block':>12}{'first/last':>12}{'stem weight':>12}"
)


def draw(record: dict, picture: Path) -> str:
    """A picture of the blocks' inputs and one of the weights. Returns what became of them, in a sentence."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return f"no {picture.name}: it needs matplotlib (pip install matplotlib)"
    weights = picture.with_stem(f"{picture.stem}-weights")
    _draw(record["stacks"], "block_grad_norm", "‖∂L/∂x‖ of a block's input x", picture)
    _draw(record["stacks"], "weight_grad_norm", "‖∂L/∂W‖ of a convolution's weight W", weights)
    return f"{picture.name} shows the blocks' inputs, {weights.name} the weights"


def _draw(stacks: list[dict], key: str, label: str, picture: Path) -> None:
    """A row an activation; a column a kind of block and a number of steps, of one scale."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    activations = list(dict.fromkeys(s["activation"] for s in stacks))
    columns = sorted({(s["block"], s["step"]) for s in stacks})
    colours = twins.coloured(sorted({(s["block"], s["depth"]) for s in stacks}))
    figure = Figure(figsize=(1.5 + 3.6 * len(columns), 0.9 + 2.9 * len(activations)), layout="constrained")
    grid = figure.subplots(len(activations), len(columns), sharex=True, sharey="col", squeeze=False)
    for s in stacks:
        axes = grid[activations.index(s["activation"])][columns.index((s["block"], s["step"]))]
        style = {"color": colours[s["block"], s["depth"]], "ls": twins.LINES[s["kind"]]}
        every = 9 if len(s[key]) > 500 else 1  # layers of one kind, or a thousand would hide the dashes
        axes.plot(np.linspace(0, 1, len(s[key]))[::every], s[key][::every], lw=1.7, **style)
    for (block, step), axes in zip(columns, grid[0], strict=True):
        axes.set_title(f"{block} blocks, {f'after {step} steps' if step else 'at initialisation'}", fontsize=10)
    for axes in grid.flat:
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xticks([0, 0.5, 1], ["input", "middle", "output"])
    for activation, axes in zip(activations, grid[:, 0], strict=True):
        axes.set_ylabel(f"{activation}-activation")
    figure.suptitle(f"{label}, from the network's input to its output", fontsize=11)
    shown = [Line2D([], [], color=c, lw=3, label=f"{depth} layers") for (_, depth), c in colours.items()]
    shown += [Line2D([], [], color="0.3", lw=1.7, ls=ls, label=kind) for kind, ls in twins.LINES.items()]
    figure.legend(handles=shown, loc="outside lower center", ncols=len(shown), frameon=False)
    checkpoint.write_whole(picture, lambda f: figure.savefig(f, format="png", dpi=110))


def experiment(chosen: Options, team: processes.Team, command: str) -> bool:
    """Whether NumPy and autograd agree. Raises Refused."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    block = toy()
    expected, found = by_numpy(block), by_autograd(block)
    error = disagreement(expected, found)
    rows = {"NumPy": norms(expected), "autograd": norms(found), "lesson": LESSON}
    console.print(f"{'dL/dx of one block':<20}{'plain':>12}{'residual':>12}{'ratio':>12}")
    for name, row in rows.items():
        console.print(f"{name:<20}{row['plain']:>12.6f}{row['residual']:>12.6f}{row['ratio']:>12.1f}")
    agree = error <= TOLERANCE
    console.print(f"NumPy and autograd {'agree' if agree else 'DISAGREE'}: relative difference {error:.1e}\n")

    images = twins.load(chosen, team)
    twins.make_folders(chosen)
    stacks = []
    console.print(HEAD)
    with report.bar(console, console.is_terminal) as bar:
        total = len(twins.KINDS) * len(chosen.activation)
        total *= len(chosen.depths) * (2 if chosen.steps else 1) + len(chosen.bottleneck)
        for stack in bar.track(measured(chosen, images, team), total=total):
            stacks.append(stack)
            console.print(line(stack))
    record = {
        "command": command,
        "machine": report.machine(),
        "dataset": images.name,
        "image": list(images.train.images.shape[1:]),
        "batch": twins.batch_size(chosen, images),
        "numpy": {**rows["NumPy"], "lesson": LESSON, "autograd": rows["autograd"], "relative_difference": error},
        "stacks": stacks,
    }
    report.write_record(chosen.record, record)
    console.print(draw(record, chosen.picture))
    return agree


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    try:
        with twins.alone(chosen.device) as team:
            return 0 if experiment(chosen, team, report.command("gradient_highway.py", arguments)) else 1
    except Refused as refused:
        print(f"gradient_highway.py: error: {refused}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
