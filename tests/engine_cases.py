"""Small networks for the tests of the engine, and how a result is judged: by the rule of parity.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import parity
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fused_resnet.engine.graph import capture, propagate
from fused_resnet.engine.steps import Network, match


class Net(nn.Module):
    """Modules by name, and a forward that is given."""

    def __init__(self, forward: Callable, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = forward
        randomized(self)

    def forward(self, x):
        return self.function(self, x)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Firm weights, BN away from its initial state, evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if type(m) in (nn.Conv2d, nn.Linear) and "weight" in m._parameters:
                m.weight.copy_(torch.randn(m.weight.shape, generator=g) / math.sqrt(m.weight[0].numel()))
                if m.bias is not None:
                    m.bias.copy_(torch.randn(m.bias.shape, generator=g) / 2)
    return parity.randomize_norms(model, seed).eval()


def conv(c=3, k=16, size=3, **more) -> nn.Conv2d:
    return nn.Conv2d(c, k, size, **({"padding": size // 2, "bias": False} | more))


def resnet(block: type = BasicBlock, layers=(1, 1, 1, 1), seed: int = 0, **more) -> ResNet:
    """A whole ResNet of few layers, calibrated: its activations neither die nor explode."""
    torch.manual_seed(seed)
    more = {"num_classes": 7} | ({"width_per_group": 8} if block is Bottleneck else {}) | more
    model = ResNet(block, list(layers), **more)
    parity.calibrate(parity.randomize_norms(model, seed, branch=0.5), torch.randn(2, 3, 40, 40), seed)
    return model.eval()


def network_of(model: nn.Module, *inputs: Tensor) -> Network:
    graph = capture(model, inputs)
    propagate(graph, inputs)
    return match(graph)


def ops(network: Network) -> list[str]:
    return [step.op for step in network.steps]


def seen(result) -> dict[str, Tensor]:
    return {f"output {i}": t.detach().clone() for i, t in enumerate(tree_leaves(result)) if isinstance(t, Tensor)}


def in_dtype(dtype: torch.dtype, inputs: tuple) -> tuple:
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) else t, inputs)


@torch.no_grad()
def judge(model: nn.Module, inputs: tuple) -> dict[str, Tensor]:
    return seen(copy.deepcopy(model).eval().double()(*(x.double() for x in inputs)))


@torch.no_grad()
def yardstick(model: nn.Module, inputs: tuple, dtype=torch.float32, judged: dict | None = None) -> dict[str, float]:
    """The largest error of torchvision's own variants in a dtype; model and inputs are float32."""
    judged = judge(model, inputs) if judged is None else judged
    found = []
    for variant in parity.VARIANTS:
        plain = copy.deepcopy(model).eval().to(dtype)  # a copy of a feature extractor trains
        if variant == "channels_last":
            plain = plain.to(memory_format=torch.channels_last)
        with parity.library(variant):
            found.append(parity.errors(seen(plain(*(x.to(dtype) for x in inputs))), judged))
    return parity.worst(found)


def rule(model: nn.Module, *inputs: Tensor, dtype=torch.float32) -> Callable[[object], None]:
    """Checks a result of `model` for `inputs` by the rule; what is right and how near is worked out once."""
    judged = judge(model, inputs)
    allowed = yardstick(model, inputs, dtype, judged)
    return lambda result: parity.check(parity.errors(seen(result), judged), allowed, dtype)


def agree(result, model: nn.Module, *inputs: Tensor, dtype=torch.float32) -> None:
    """A result of `model` for `inputs` holds the rule."""
    rule(model, *inputs, dtype=dtype)(result)
