"""The rule by which this package calls itself equal to torchvision.

Every tensor v (an output, a gradient, a running statistic) has an error e(v) = |v - v64| / |v64| in the 2-norm, v64
being the same model in float64. The yardstick is the largest e over torchvision's own variants of the computation:
contiguous, channels_last, and oneDNN (on a GPU: cuDNN) off, for three seeds. Ours may be at most 2 times that for
outputs and 3 times for gradients, plus a floor. A ratio against a single variant would fail torchvision itself: a ReLU
that flips at a rounding error moves whole gradients.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet
from torchvision.ops import FrozenBatchNorm2d

SEEDS = (0, 1, 2)
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}
FACTOR = {"output": 2.0, "buffer": 2.0, "grad": 3.0, "parameter": 3.0}
VARIANTS = ("contiguous", "channels_last", "library_off")
Seen = dict[str, Tensor]


def error(v: Tensor, judge: Tensor) -> float:
    """|v - judge| / |judge|; infinite if v is not finite where the judge is, or the reverse, or the shapes differ."""
    if v.shape != judge.shape:
        return float("inf")
    v, judge = v.detach().double().cpu(), judge.detach().double().cpu()
    distance, norm = (v - judge).norm().item(), judge.norm().item()
    if not math.isfinite(distance):
        if not torch.equal(v.isfinite(), judge.isfinite()):
            return float("inf")
        v, judge = v.nan_to_num(0, 0, 0), judge.nan_to_num(0, 0, 0)
        distance, norm = (v - judge).norm().item(), judge.norm().item()
    return distance / norm if norm else (0.0 if distance == 0 else float("inf"))


def errors(seen: Seen, judge: Seen) -> dict[str, float]:
    assert seen.keys() == judge.keys(), f"only on one side: {sorted(seen.keys() ^ judge.keys())}"
    return {name: error(seen[name], judge[name]) for name in judge}


def worst(many: Iterable[dict[str, float]]) -> dict[str, float]:
    result: dict[str, float] = {}
    for one in many:
        for name, e in one.items():
            result[name] = max(e, result.get(name, 0.0))
    return result


def violations(ours: dict[str, float], yardstick: dict[str, float], dtype: torch.dtype = torch.float32) -> list[str]:
    """The tensors that break the rule, each as a sentence."""
    found = []
    for name, e in ours.items():
        limit = FACTOR[name.split()[0]] * yardstick[name] + FLOOR[dtype]
        if not e <= limit:
            found.append(f"{name}: off by {e:.2e}, torchvision's own variants by {yardstick[name]:.2e}")
    return found


def check(ours: dict[str, float], yardstick: dict[str, float], dtype: torch.dtype = torch.float32) -> None:
    found = violations(ours, yardstick, dtype)
    assert not found, f"{len(found)} of {len(ours)} tensors: " + "; ".join(found[:8])


# --- what is looked at ------------------------------------------------------------------------------------------------


def observe(model: nn.Module, x: Tensor, cotangent: Tensor | None = None) -> Seen:
    """One forward and backward: the output, the gradient of the input and of every parameter, every buffer afterwards.

    cotangent: what the output is multiplied with before the sum that is differentiated; None for a fixed random one.
    """
    model.zero_grad(set_to_none=True)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    if cotangent is None:
        cotangent = cotangent_of(tuple(y.shape))
    (y * cotangent.to(y)).sum().backward()
    seen = {"output": y.detach(), "grad input": x.grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"{name} has no gradient"
            seen[f"grad {name}"] = p.grad.clone()
    seen |= {f"buffer {name}": b.clone() for name, b in model.named_buffers()}
    return seen


@functools.cache
def cotangent_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1234), dtype=torch.float64)


def as_variant(variant: str, model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy of the model and the input in the layout of the variant."""
    format = torch.channels_last if variant == "channels_last" else torch.contiguous_format
    return copy.deepcopy(model).to(memory_format=format), x.contiguous(memory_format=format)


def library(variant: str):
    """The context in which a variant runs: 'library_off' is PyTorch without oneDNN and cuDNN."""

    class Off:
        def __enter__(self):
            self.flags = (
                torch.backends.mkldnn.flags(enabled=False),
                torch.backends.cudnn.flags(enabled=False),
            )
            for f in self.flags:
                f.__enter__()

        def __exit__(self, *exc):
            for f in reversed(self.flags):
                f.__exit__(*exc)

    class On:
        def __enter__(self): ...

        def __exit__(self, *exc): ...

    return Off() if variant == "library_off" else On()


def judge_of(model: nn.Module, x: Tensor, look: Callable = observe) -> Seen:
    return look(copy.deepcopy(model).double(), x.double())


def yardstick_of(
    model: nn.Module, x: Tensor, judge: Seen | None = None, look: Callable = observe, variants=VARIANTS
) -> dict[str, float]:
    """The largest error of torchvision's variants, for the model and input of one seed."""
    judge = judge_of(model, x, look) if judge is None else judge
    found = []
    for variant in variants:
        with library(variant):
            found.append(errors(look(*as_variant(variant, model, x)), judge))
    return worst(found)


# --- models and blocks worth comparing --------------------------------------------------------------------------------


class Short(ResNet):
    """A ResNet without its later stages: their blocks are those of the second once more, and most of the arithmetic.

    layers: blocks of each stage, none where it says nothing.
    """

    def __init__(self, block: type, layers: Iterable[int], num_classes: int = 10, **options):
        layers = [*layers, 0, 0, 0, 0][:4]
        super().__init__(block, layers, num_classes, **options)
        self.fc = nn.Linear(self.inplanes, num_classes)

    def _make_layer(self, block, planes, blocks, *more, **options):
        return super()._make_layer(block, planes, blocks, *more, **options) if blocks else nn.Sequential()


def randomize_norms(model: nn.Module, seed: int, branch: float = 1.0, firm: bool = False) -> nn.Module:
    """Every BN away from its initial state, so that no term of the formula is multiplied by 0 or 1.

    branch: factor on the last BN of every block. Below 1 the residual branches are corrections, as in a trained
    network, and rounding errors do not grow from block to block. firm: biases so large that inside a block a channel is
    either on or off, and on where blocks are joined: among millions of pre-activations hardly one is near zero.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(t, low, high):
        return torch.empty(t.shape).uniform_(low, high, generator=g)

    ranges = (("weight", 0.5, 1.2), ("bias", -0.3, 0.3), ("running_mean", -0.3, 0.3), ("running_var", 0.5, 2.0))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm | FrozenBatchNorm2d)]
    for m in norms:
        for name, low, high in ranges:
            t = getattr(m, name)
            if t is not None:
                t.data.copy_(uniform(t, low, high))
    blocks = [m for m in model.modules() if hasattr(m, "downsample") and hasattr(m, "bn2")]  # torchvision's and timm's
    joining = [m.bn3 if hasattr(m, "bn3") else m.bn2 for m in blocks]
    for m in joining:
        if m.weight is not None:
            m.weight.data.mul_(branch)
    if firm:
        joining += [m.downsample[-1] for m in blocks if m.downsample is not None]
        for m in norms:
            far = uniform(m.bias, 5.0, 6.0)
            if not any(m is j for j in joining):
                far *= torch.where(uniform(m.bias, 0, 1) < 0.75, 1.0, -1.0)
            m.bias.data.copy_(far)
    return model


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Running statistics near those of the data, as a trained model has: with others, a deep eval-mode net explodes."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    training, momenta = model.training, [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    model.train()(x)
    model.train(training)
    g = torch.Generator().manual_seed(seed)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
        m.num_batches_tracked.zero_()
        shift, factor = torch.empty(2, m.num_features).uniform_(-0.1, 0.1, generator=g).to(x.device)
        m.running_mean.add_(shift * m.running_var.sqrt())
        m.running_var.mul_(1 + factor)
    return model
