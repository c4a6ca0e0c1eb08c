"""No kernel is trusted before it has agreed with the reference on the machine it runs on.

The first call of every signature (op, dtypes, layouts, channels, kernel size, options: all that a kernel is specialised
on, so everything but the batch and the size of the maps) runs the backend and the reference on the call's own inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

# Relative error in the 2-norm. A convolution in float32 may use TF32 where PyTorch's flags allow it.
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5}
TOLERANCE_TF32 = 5e-3
WEIGHT_AT = {"conv_bn_act": 1, "conv_bn_act_bwd": 3}

_verdicts: dict[tuple, str | None] = {}


def verified(candidate, op: str, args: tuple) -> tuple[object, str | None]:
    """(result, None) from a backend that is trusted with this signature or earns it now, else (None, the reason)."""
    key = _signature(candidate, op, args)
    if key in _verdicts:
        reason = _verdicts[key]
        return (getattr(candidate, op)(*args), None) if reason is None else (None, reason)
    if torch.cuda.is_current_stream_capturing():
        return None, "not verified yet, and a CUDA graph is being captured (call once before the capture)"
    try:
        result = getattr(candidate, op)(*args)
        expected = getattr(reference, op)(*args)
        error = relative_error(result, expected)
    except RuntimeError as failure:
        error, reason = None, f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
    if error is not None:
        if error != error:  # not finite by the reference itself: nothing is learned, and the reference's answer serves
            return expected, None
        limit = tolerance(op, args)
        reason = None if error <= limit else f"differs from the reference by {error:.1e} (limit {limit:.0e})"
    _verdicts[key] = reason
    return (result, None) if reason is None else (None, reason)


def relative_error(result, expected) -> float:
    """The largest |v - e| / |e| over an op's outputs; nan if the expected values are not all finite, inf for a stray NaN."""
    pairs = list(zip(result, expected, strict=True)) if isinstance(expected, tuple) else [(result, expected)]
    worst = 0.0
    for v, e in pairs:
        if e is None:
            continue
        v, e = v.double(), e.double()
        if not torch.isfinite(e).all():
            return float("nan")
        distance, norm = (v - e).norm().item(), e.norm().item()
        error = distance / norm if norm else distance
        worst = max(worst, error if error == error else float("inf"))
    return worst


def tolerance(op: str, args: tuple) -> float:
    """What the largest relative error may be: by the input's dtype, and by TF32 where a convolution may use it."""
    dtype = args[0].dtype
    if dtype is torch.float32 and op in WEIGHT_AT and tf32_allowed():
        return TOLERANCE_TF32
    return TOLERANCE[dtype]


def tf32_allowed() -> bool:
    """Whether PyTorch's flags let a float32 convolution on a GPU use TF32."""
    precision = getattr(torch.backends.cudnn, "conv", None)
    if precision is not None and hasattr(precision, "fp32_precision"):
        return precision.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def _signature(candidate, op: str, args: tuple) -> tuple:
    def of(i: int, a):
        if not isinstance(a, Tensor):
            return tuple(a) if isinstance(a, list) else a
        shape = tuple(a.shape) if a.dim() != 4 or i == WEIGHT_AT.get(op) else a.shape[1]
        return a.dtype, a.device.index, shape, a.is_contiguous(), a.is_contiguous(memory_format=torch.channels_last)

    return candidate.NAME, op, *(of(i, a) for i, a in enumerate(args))
