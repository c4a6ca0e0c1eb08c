"""Records of the shape that `explore` shows, with made-up numbers that nobody could take for measured ones."""

from __future__ import annotations

MACHINE = {"cpu": "Made-up <CPU> & co", "threads": 2, "torch": "0.0", "gpus": []}
DEPTHS, SEEDS, EPOCHS = (8, 20, 56), (0, 1, 2), 5


def run(kind: str, depth: int, seed: int) -> dict:
    """The deeper, the worse (plain) or the better (residual)."""
    level = depth / 10 if kind == "plain" else 1 / depth
    train_loss = [round((2 + 0.1 * seed) * level / (e + 1), 6) for e in range(EPOCHS)]
    return {
        "name": f"{kind}-{depth}",
        "kind": kind,
        "depth": depth,
        "block": "basic",
        "activation": "post",
        "shortcut": "projection",
        "seed": seed,
        "parameters": 1000 * depth + (kind == "residual"),
        "train_loss": train_loss,
        "train_loss_eval": [round(0.77 * train_loss[-1], 6)],
        "train_accuracy": [0.5] * EPOCHS,
        "test_accuracy": [round(0.5 + 0.08 * e + 0.01 * seed - 0.001 * depth, 4) for e in range(EPOCHS)],
        "seconds": float(depth),
    }


def degradation() -> dict:
    return {
        "command": "python made_up.py --depths 8 20 56",
        "dataset": "made-up </script><!--<script> digits",
        "image": [1, 16, 16],
        "train_images": 1437,
        "test_images": 360,
        "epochs": EPOCHS,
        "batch_size": 64,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "machine": MACHINE,
        "runs": [run(kind, depth, seed) for seed in SEEDS for depth in DEPTHS for kind in ("plain", "residual")],
    }


def stack(kind: str, depth: int, activation: str, step: int, block: str = "basic") -> dict:
    """Plain: a factor of 1.5 a layer lost on the way back; residual: next to nothing, and a projection more."""
    layers = ["conv1", *(f"layer{1 + 3 * i // (depth - 2)}.{i // 2}.conv{1 + i % 2}" for i in range(depth - 2))]
    if kind == "residual":
        layers.insert(1 + len(layers) // 2, "layer2.0.downsample.0")
    shrink = {"plain": 1.5, "residual": 1.02}[kind]
    scale = (2 if activation == "pre" else 1) * (1 + step / 100)
    return {
        "kind": kind,
        "depth": depth,
        "block": block,
        "activation": activation,
        "shortcut": "projection",
        "step": step,
        "loss": 2.5 - step / 100,
        "layers": layers,
        "weight_grad_norm": [scale * shrink ** (i - len(layers)) for i in range(len(layers))],
        "block_grad_norm": [scale * shrink ** (2 * i - depth) for i in range(depth // 2 - 1)],
    }


def gradients() -> dict:
    lesson = {"plain": 0.000046, "residual": 1.000046, "ratio": 21817.5}
    stacks = [
        stack(kind, depth, activation, step)
        for depth in (8, 20)
        for activation in ("post", "pre")
        for step in (0, 50)
        for kind in ("plain", "residual")
        if (kind, depth, activation) != ("plain", 20, "pre")  # as if it had not been recorded
    ]
    stacks += [stack(kind, 29, "pre", 0, "bottleneck") for kind in ("plain", "residual")]
    stacks[0]["weight_grad_norm"][1:4] = [0, "inf", "nan"]
    return {
        "command": "python made_up.py gradients",
        "machine": MACHINE,
        "dataset": "made-up digits",
        "batch": 64,
        "image": [1, 16, 16],
        "numpy": {
            "plain": 0.0000461,
            "residual": 1.0000461,
            "ratio": 21817.512,
            "relative_difference": 2.5e-16,
            "lesson": lesson,
            "autograd": {"plain": 0.0000462, "residual": 1.0000459, "ratio": 21817.498},
        },
        "stacks": stacks,
    }
