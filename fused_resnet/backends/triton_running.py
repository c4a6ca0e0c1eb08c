"""Host side of the Triton kernel that updates a batch norm's running statistics: one launch, where PyTorch takes from
four to a dozen, 53 times a step of ResNet-50."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..kernels import tiles
from . import refuses_device
from . import triton as _base
from .straight import watched
from .verify import TOLERANCE, capturing, difference, unobserved

try:
    from ..kernels.running_stats import _running_stats_kernel
except ImportError:  # backends/triton.py says so
    pass

_BLOCK = 512
_ready: dict[tuple, _base._Prepared] = {}
_agreed: dict[tuple, bool] = {}
_serving: set[tuple] = set()  # the kinds that the kernel takes, and does right


def follow(
    running_mean: Tensor, running_var: Tensor, tracked: Tensor | None, mean: Tensor, var: Tensor, *scalars
) -> bool:
    """Update running_mean, running_var: [C] and tracked by a batch's mean and biased var; scalars: its count of values
    and the momentum. Whether it was done: False leaves them as they are."""
    tensors = running_mean, running_var, tracked, mean, var
    if not mean.is_cuda or torch.compiler.is_compiling():
        return False
    key = _key(tensors)
    if key not in _serving:
        if not _serves(tensors) or not _agrees(tensors):
            return False
        _serving.add(key)
    _run(tensors, *scalars, key=key)
    changed = tensors[:2] if tracked is None else tensors[:3]
    torch.autograd.graph.increment_version(changed)  # as any change in place does
    if (watch := watched()) is not None:
        watch.launched(torch.autograd.graph.increment_version, (changed,))
    return True


def _key(tensors: tuple) -> tuple:
    """All that tells one kind of update from another; scalars are told to every launch."""
    mean = tensors[3]
    facts = ((t.dtype, t.device, t.stride(), t.data_ptr() % 16) for t in tensors if t is not None)
    return mean.shape, tensors[2] is None, *facts


def _serves(tensors: tuple) -> bool:
    running_mean, running_var, tracked, mean, var = tensors
    if mean.dtype is not torch.float32:
        return False
    if any(t is not None and (not t.is_contiguous() or t.device != mean.device) for t in tensors):
        return False
    if running_mean.dtype not in _base._DTYPES or running_var.dtype not in _base._DTYPES:
        return False
    return (tracked is None or tracked.dtype is torch.int64) and _refused(mean.device) is None


@functools.cache
def _refused(device: torch.device) -> str | None:
    return refuses_device(_base.NAME, device)


def _run(tensors: tuple, count: int, momentum: float, *, key: tuple | None = None) -> None:
    key = key or _key(tensors)
    if key not in _ready:
        _ready[key] = _base._Prepared(_launch)
    with _base._device_of(tensors[3]):
        momentum = float(momentum)  # Triton makes a constant of the integer 1
        _ready[key](*tensors, count / (count - 1), 1 - momentum, momentum)


def _launch(*args, launch=_base._dispatch) -> None:
    c = args[3].shape[0]
    launch(_running_stats_kernel, (tiles.ceil_div(c, _BLOCK),), *args, c, BLOCK=_BLOCK)


def _agrees(tensors: tuple) -> bool:
    """Whether the kernel does what PyTorch does, asked once for these dtypes."""
    device = tensors[3].device
    key = (device, *(None if t is None else t.dtype for t in tensors))
    if key not in _agreed:
        if capturing(device):
            return False
        with unobserved(device):
            _agreed[key] = _same(tensors)
    return _agreed[key]


def _same(tensors: tuple) -> bool:
    generator = torch.Generator(tensors[3].device).manual_seed(0)  # not the user's
    *running, mean, var = (torch.empty_like(tensors[i]).uniform_(generator=generator) for i in (0, 1, 3, 4))
    tracked = None if tensors[2] is None else torch.full_like(tensors[2], 7)
    count, momentum = 9, 0.3
    batch = mean.double(), var.double() * (count / (count - 1))
    expected = [(r.double() * (1 - momentum) + b * momentum).to(r.dtype) for r, b in zip(running, batch, strict=True)]
    try:
        _run((*running, tracked, mean, var), count, momentum)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception:  # it does not compile or launch: Triton's errors derive from Exception itself
        return False
    right = all(difference(r, e) <= TOLERANCE[r.dtype] for r, e in zip(running, expected, strict=True))
    return right and (tracked is None or tracked.item() == 8)
