"""Train a swapped ResNet-18 and an untouched one side by side: the same losses, from the same batches.

    python examples/swap_and_train.py [--steps 10] [--device cpu]

The data are made up (each image carries the colour of its class), so that nothing needs to be downloaded.
"""

import argparse
import copy

import torch
import torchvision

import fused_resnet


def batch(step: int, classes: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, tinted by class: images [8, 3, 64, 64] and labels [8]."""
    g = torch.Generator().manual_seed(step)
    labels = torch.randint(classes, (8,), generator=g)
    tints = torch.randn(classes, 3, 1, 1, generator=torch.Generator().manual_seed(classes))
    images = torch.randn(8, 3, 64, 64, generator=g) + 2 * tints[labels]
    return images.to(device), labels.to(device)


def train(model: torch.nn.Module, steps: int, device) -> list[float]:
    """The loss of every step."""
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(steps):
        images, labels = batch(step, 10, device)
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    untouched = torchvision.models.resnet18(num_classes=10)
    fused = fused_resnet.swap_blocks(copy.deepcopy(untouched))
    expected = train(untouched, arguments.steps, arguments.device)
    losses = train(fused, arguments.steps, arguments.device)
    for step, (a, b) in enumerate(zip(expected, losses, strict=True)):
        print(f"step {step}: loss {a:.6f} untouched, {b:.6f} fused")

    # A checkpoint of one loads into the other: blocks are swapped, names and parameters are not.
    untouched.load_state_dict(fused.state_dict())


if __name__ == "__main__":
    main()
