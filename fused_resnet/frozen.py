"""Batch norms that are frozen by their class: torchvision's FrozenBatchNorm2d, and those that others wrote.

detectron2, DETR and its many descendants, and Hugging Face's ports of them have each a class of this name: four buffers
and y = (x - running_mean) * weight / sqrt(running_var + eps) + bias. A class is believed once it has computed that.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

_NAME = "FrozenBatchNorm2d"
_BUFFERS = {"weight", "bias", "running_mean", "running_var"}
_EPS = 1e-5  # of those that do not say
_CLASSES: dict[type[nn.Module], bool] = {}


def is_frozen(m: nn.Module) -> bool:
    """Whether m is a frozen batch norm, torchvision's or one like it."""
    kind = type(m)
    if kind not in _CLASSES:
        if isinstance(m, FrozenBatchNorm2d):
            _CLASSES[kind] = True
        elif not kind.__name__.endswith(_NAME) or not isinstance(m, nn.Module):
            return False
        else:
            _CLASSES[kind] = _computes_it(m)
    return _CLASSES[kind]


def eps_of(bn: nn.Module) -> float:
    """What a batch norm adds to the variance."""
    return getattr(bn, "eps", _EPS)


@torch.no_grad()
def _computes_it(m: nn.Module) -> bool:
    """Whether a copy of m does to numbers what a frozen batch norm does, in either mode, its eps (if it says one) read
    at the call."""
    if {name for name, t in m._buffers.items() if t is not None} - {"num_batches_tracked"} != _BUFFERS:
        return False
    if m._modules or any(p is not None for p in m._parameters.values()):
        return False
    try:
        probe = copy.deepcopy(m).to("cpu", torch.float64)
        channels = probe.weight.numel()
        steps = torch.arange(1, channels + 1, dtype=torch.float64) / channels
        for i, name in enumerate(sorted(_BUFFERS)):
            # Variances near the eps that nobody says.
            probe._buffers[name] = steps * 1e-4 if name == "running_var" else steps.roll(i) + i
        if "eps" in vars(probe):
            probe.eps = 0.25
        x = torch.linspace(-3, 3, 2 * channels * 6, dtype=torch.float64).view(2, channels, 2, 3)
        scale = probe.weight / (probe.running_var + eps_of(probe)).sqrt()
        expected = (x - probe.running_mean[:, None, None]) * scale[:, None, None] + probe.bias[:, None, None]
        for training, differentiable in itertools.product((True, False), repeat=2):
            probe.train(training)
            with torch.set_grad_enabled(differentiable):
                y = probe(x.clone().requires_grad_(differentiable))
            if not torch.allclose(y.detach(), expected, rtol=1e-9, atol=1e-9):
                return False
    except Exception:  # whatever the code of others does with such an x
        return False
    return True
