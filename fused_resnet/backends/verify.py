"""No kernel is trusted before it has agreed with the reference on the machine it runs on.

Before the first call of every signature (op, dtypes, layouts, alignment, channels, kernel size, options, and the
variant that a backend picks by the batch and the size of the maps) the backend and the reference run on random tensors
that lie in memory as the call's own do. The verdict is a matter of the signature alone: a constant image or a diverged
batch, where rounding or NaN would drown the comparison, says nothing about a kernel.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from . import pooled, reference, stem_conv
from .layout import conv_output_size

# Of |v - e| / (|e| + rms(e)), elementwise, so that one wrong tile among thousands cannot hide in a norm. Rounding is
# below one eps; four leave room for folded weights and 4608-term sums, and a lost tile is far above.
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}
TOLERANCE_TF32 = 1e-2
WEIGHT_AT = {
    "conv_bn_act": 1,
    "conv_bn_act_bwd": 3,
    "bn_act_conv": 1,
    "bn_act_conv_bwd": 2,
    "pointwise_bn_act": 1,
    "pointwise_bn_act_bwd": 3,
    "stem_conv": 1,
    "stem_conv_weight_grad": 2,
    "conv_bn_act_pool": 1,
}
MAX_SAMPLE = 2**25  # elements of the largest tensor compared: a training may have left little memory beside it
CHUNK = 2**22  # elements compared at once, in float64

_verdicts: dict[tuple, str | None] = {}


def prepare(candidate, op: str, args: tuple):
    """The backend's function for this call and for all of the same shapes, strides, alignments, dtypes and options."""
    if hasattr(candidate, "prepare"):
        return candidate.prepare(op, *args)
    return lambda *args: getattr(candidate, op)(*args)


def objection(candidate, op: str, args: tuple) -> tuple[str | None, bool]:
    """(why this backend may not serve this call, or None; whether that is settled or has to be asked again)."""
    key = signature(candidate, op, args)
    if key not in _verdicts:
        if capturing(args[0].device):
            return "not verified yet, and a CUDA graph is being captured (call once before the capture)", False
        for limit in (MAX_SAMPLE, MAX_SAMPLE // 16):
            try:
                with unobserved(args[0].device):
                    _verdicts[key] = _judge(candidate, op, args, limit)
                break
            except torch.OutOfMemoryError:
                continue
        else:
            return "not verified: there is too little memory beside this call", False
    return _verdicts[key], True


def capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def unobserved(device: torch.device):
    """Comparing waits for the GPU, once a signature: not what the user's sync debug mode is looking for."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _judge(candidate, op: str, args: tuple, limit: int = MAX_SAMPLE) -> str | None:
    """Why the backend's result is not the reference's; None if it is. Asked twice: what the first call prepared serves
    all later ones."""
    sample = _sample(op, args, limit)
    variant = getattr(candidate, "variant", lambda *args: None)
    if variant(op, *sample) != variant(op, *args):  # fewer rows took another tile: only the whole batch will do
        sample = _sample(op, args, math.inf)
    expected = getattr(reference, op)(*sample)
    call, limit_of = None, tolerance(op, args)
    for _ in range(2):
        try:
            call = call or prepare(candidate, op, sample)
            result = call(*sample)
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # no verdict on the kernel; nothing to fall back on
            raise
        except Exception as failure:  # does not compile or launch: Triton's errors derive from Exception itself
            return one_line(failure)
        if reason := _disagreement(comparable(op, sample, result), comparable(op, sample, expected), limit_of):
            return reason
    return None


def one_line(failure: Exception) -> str:
    """The class of an exception and its first line."""
    return f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"


def comparable(op: str, args: tuple, result):
    """A result as it can be compared: of the largest values that rounding makes equal, any may be a window's winner, so
    in its place stands the value there."""
    if op != "bn_act_pool":
        return result
    y, winner = result
    if winner.dtype is not torch.uint8:
        return result
    return y, pooled.winning(reference.bn_act(*args, None, True, True), winner)


def _disagreement(result, expected, limit: float) -> str | None:
    for i, (v, e) in enumerate(zip(_tuple(result), _tuple(expected), strict=True)):
        if e is None:
            continue
        if v is None or _facts(v) != _facts(e):
            return f"output {i} is {_describe(v)}, the reference's {_describe(e)}"
        error = difference(v, e)
        if error > limit:
            return f"output {i} differs from the reference by {error:.1e} (limit {limit:.0e})"
    return None


def _sample(op: str, args: tuple, limit: float = MAX_SAMPLE) -> tuple:
    """The call's arguments with random values: same strides and alignment, no tensor above `limit` elements."""
    first = args[0]
    generator = torch.Generator(first.device).manual_seed(0)
    per_image = max(a[0].numel() for i, a in enumerate(args) if _has_batch(op, i, a))
    if op in ("conv_bn_act", "bn_act_conv"):
        per_image = max(per_image, math.prod(conv_output_size(first, args[1], *args[8:11])[1:]))
    elif op == "pointwise_bn_act":
        per_image = max(per_image, math.prod(conv_output_size(first, args[1], args[12], [0, 0], [1, 1])[1:]))
    elif op in ("stem_conv", "conv_bn_act_pool"):
        per_image = max(per_image, math.prod(conv_output_size(first, args[1], *stem_conv.PLACES[:3])[1:]))
    batch = max(1, int(min(first.shape[0], limit // max(1, per_image))))
    mean = 1 if op == "bn_stats" else 0  # a mean of zero is all rounding

    def random(i: int, a):
        if not isinstance(a, Tensor):
            return a
        is_weight = i == WEIGHT_AT.get(op)
        shape = (batch, *a.shape[1:]) if _has_batch(op, i, a) else a.shape
        shift = a.data_ptr() % 16 // a.element_size()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, a.stride(), strict=True))
        flat = torch.empty(shift + extent, dtype=a.dtype, device=a.device)
        if not a.is_floating_point():
            flat.random_(0, pooled.LOST + 1, generator=generator)
        elif a.dim() == 1:
            flat.uniform_(0.5, 1.5, generator=generator)
        else:
            flat.normal_(mean, a[0].numel() ** -0.5 if is_weight else 1, generator=generator)
        return flat.as_strided(shape, a.stride(), shift)

    sample = tuple(random(i, a) for i, a in enumerate(args))
    return _with_its_statistics(sample) if op == "pointwise_bn_act_bwd" else sample


def _with_its_statistics(args: tuple) -> tuple:
    """pointwise_bn_act_bwd's arguments with the statistics of x and weight as they are: backends rely on some of them
    where the reference computes them anew."""
    grad, y, x, weight, *loaded, out_weight, _, _, out_eps, _, _, stride, out_relu, mask = args
    _, y_mean, y_var, a_mean, a_cov = reference.pointwise_bn_act(
        x, weight, *loaded, out_weight, None, out_eps, None, stride, out_relu
    )
    return grad, y, x, weight, *loaded, out_weight, y_mean, y_var, out_eps, a_mean, a_cov, stride, out_relu, mask


def _has_batch(op: str, i: int, a) -> bool:
    return isinstance(a, Tensor) and a.dim() == 4 and i != WEIGHT_AT.get(op)


def difference(v: Tensor, e: Tensor) -> float:
    """The largest |v - e| / (|e| + rms(e)); |v| where all that is expected is zero, inf for a NaN in v."""
    if not e.numel():
        return 0.0
    rms = torch.linalg.vector_norm(e, dtype=torch.float64) / math.sqrt(e.numel())
    rows = max(1, CHUNK * e.shape[0] // e.numel())
    worst = 0.0
    for a, b in zip(v.split(rows), e.split(rows), strict=True):
        a, b = a.double(), b.double()
        scale = b.abs() + rms
        error = (a - b).abs() / scale.where(scale > 0, 1.0)
        worst = max(worst, error.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item())
    return worst


def _tuple(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def _facts(t: Tensor) -> tuple:
    """What callers and compiled code rely on. The stride of a dimension of one says nothing."""
    return t.shape, t.dtype, t.device, [step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1]


def _describe(t: Tensor | None) -> str:
    return "None" if t is None else f"{list(t.shape)} {t.dtype} on {t.device}, strides {t.stride()}"


def tolerance(op: str, args: tuple) -> float:
    """What the difference may be: by the input's dtype, and by TF32 where a convolution may use it."""
    return TOLERANCE_TF32 if _uses_tf32(op, args) else TOLERANCE[args[0].dtype]


def _uses_tf32(op: str, args: tuple) -> bool:
    return args[0].dtype is torch.float32 and op in WEIGHT_AT and tf32_allowed()


def tf32_allowed() -> bool:
    """Whether PyTorch's flags let a float32 convolution on a GPU use TF32."""
    precision = getattr(torch.backends.cudnn, "conv", None)
    if precision is not None and hasattr(precision, "fp32_precision"):
        return precision.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def product_tf32_allowed() -> bool:
    """The same of a matrix product, which PyTorch computes in full float32 unless asked."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def signature(candidate, op: str, args: tuple) -> tuple:
    variant = getattr(candidate, "variant", None)
    key = [candidate.NAME, op, _uses_tf32(op, args), variant and variant(op, *args)]
    weight_at = WEIGHT_AT.get(op)
    for i, a in enumerate(args):
        if not isinstance(a, Tensor):
            key.append(tuple(a) if isinstance(a, list) else a)
        elif a.dim() < 4:
            key.append((a.dtype, *a.shape, a.data_ptr() % 16))
        else:
            shape = a.shape if i == weight_at else a.shape[1]
            layout = a.is_contiguous(), a.is_contiguous(memory_format=torch.channels_last), a.data_ptr() % 16
            key.append((a.dtype, a.device.index, shape, *layout))
    return tuple(key)
