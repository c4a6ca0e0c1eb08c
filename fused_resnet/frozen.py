"""Batch norms that are frozen by their class: torchvision's FrozenBatchNorm2d, and those that others wrote.

detectron2, DETR and its many descendants, and Hugging Face's ports of them have each a class of this name: four buffers
and y = (x - running_mean) * weight / sqrt(running_var + eps) + bias. Such a class is believed once its forward, tried
on other buffers, has computed that; and of its instances those that have nothing by which it could do anything else.
"""

from __future__ import annotations

import itertools
import types

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

_NAME = "FrozenBatchNorm2d"
_BUFFERS = ("bias", "running_mean", "running_var", "weight")
_EPS = 1e-5  # of those that do not say
_ATTRIBUTES = {*vars(nn.Module()), "eps", "num_features"}
_READ: dict[type[nn.Module], tuple[str, ...]] = {}  # attributes that the code of a class reads, beside those
_CLASSES: dict[tuple[type[nn.Module], bool], bool] = {}  # the class, and whether instances say an eps


def is_frozen(m: nn.Module) -> bool:
    """Whether m is a frozen batch norm, torchvision's or one like it."""
    kind = type(m)
    if kind is FrozenBatchNorm2d:
        return True
    if not kind.__name__.endswith(_NAME) or not isinstance(m, nn.Module):
        return False
    key = kind, hasattr(m, "eps")
    if key not in _CLASSES and torch.compiler.is_compiling():
        return False  # which could not follow: until somebody has asked, it runs as it is
    if not _is_made_like_one(m):
        return False
    if key not in _CLASSES:
        _CLASSES[key] = _computes_it(m)
    return _CLASSES[key]


def eps_of(bn: nn.Module) -> float:
    """What a batch norm adds to the variance."""
    return getattr(bn, "eps", _EPS)


def _said(kind: type[nn.Module]) -> frozenset[str]:
    """All names and words in the code of a class: attributes that are not among them are others' notes."""
    own = (c for c in kind.__mro__ if c.__module__.partition(".")[0] != "torch")
    codes = [f.__code__ for c in own for f in vars(c).values() if isinstance(f, types.FunctionType)]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    words = (w for code in codes for w in (*code.co_names, *code.co_consts) if isinstance(w, str))
    return frozenset({"forward", *words})


def _has_nothing_more(m: nn.Module) -> bool:
    """Whether m has no attributes beside a frozen batch norm's, or none that its code reads."""
    kind = type(m)
    if kind not in _READ:
        _READ[kind] = tuple(_said(kind) - _ATTRIBUTES)
    return not any(name in m.__dict__ for name in _READ[kind])  # what a compiler can follow, that of PyTorch 2.11 too


def _is_made_like_one(m: nn.Module) -> bool:
    buffers = m._buffers
    return (
        _has_nothing_more(m)
        and not hasattr(type(m), "eps")
        and all(isinstance(buffers.get(name), Tensor) for name in _BUFFERS)
        and len(buffers) - ("num_batches_tracked" in buffers) == len(_BUFFERS)
        and not m._modules
        and not m._parameters
    )


def _computes_it(m: nn.Module) -> bool:
    """Whether the forward of m's class does to numbers what a frozen batch norm does, in either mode, its eps (if
    instances say one) read at the call. m itself is left alone, its hooks as well."""
    kind, channels = type(m), m._buffers["weight"].numel()
    probe = kind.__new__(kind)
    nn.Module.__init__(probe)
    vars(probe).update({name: vars(m)[name] for name in ("eps", "num_features") if name in vars(m)})
    if "eps" in vars(probe):
        probe.eps = 0.25
    options = {"dtype": torch.float64, "device": "cpu"}
    steps = torch.arange(1, channels + 1, **options) / channels
    for i, name in enumerate(_BUFFERS):
        # Variances near the eps that nobody says.
        probe.register_buffer(name, steps * 1e-4 if name == "running_var" else steps.roll(i) + i)
    probe.register_buffer("num_batches_tracked", None)
    x = torch.linspace(-3, 3, 12 * channels, **options).view(2, channels, 2, 3)
    scale = probe.weight / (probe.running_var + eps_of(probe)).sqrt()
    expected = (x - probe.running_mean[:, None, None]) * scale[:, None, None] + probe.bias[:, None, None]
    try:
        for training, differentiable in itertools.product((True, False), repeat=2):
            nn.Module.train(probe, training)
            with torch.set_grad_enabled(differentiable):
                y = kind.forward(probe, x.clone().requires_grad_(differentiable))  # past what may stand around a call
            if not torch.allclose(y.detach(), expected, rtol=1e-9, atol=1e-9):
                return False
    except Exception:  # whatever the code of others does with such an x
        return False
    return True
