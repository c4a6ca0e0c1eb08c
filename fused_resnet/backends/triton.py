"""Host side of the Triton kernels: checks nothing (the ops did), guards the device, allocates, launches.

Kernels work on channels_last memory; a contiguous tensor is converted on the way in and out, except that a convolution
with few input channels (the stem) gathers from x as it lies.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
import os

import torch
from torch import Tensor

from ..kernels import tiles
from .aten import nearest_power_of_2
from .layout import conv_output_size, output_format
from .library import chip
from .straight import watched
from .verify import tf32_allowed

try:
    from ..kernels import bn_act as _bn
    from ..kernels import conv_bn_act as _conv
    from ..kernels import conv_bn_act_bwd as _conv_bwd

    _import_error = None
except ImportError as error:
    _import_error = str(error)

logger = logging.getLogger("fused_resnet")

NAME = "triton"
TRAINING = {"bn_act_conv": "triton_train", "pointwise_bn_act": "triton_train", "bn_act_conv_bwd": "triton_train_bwd"}
TRAINING |= {"pointwise_bn_act_bwd": "triton_pointwise", "bn_act_pool": "triton_pool", "bn_act_pool_bwd": "triton_pool"}
OPS = ("conv_bn_act", "conv_bn_act_bwd", "bn_stats", "bn_act", "bn_act_bwd", "bn_act_bwd_input", *TRAINING)
_AFTER_Y = ("conv_bn_act_bwd", "bn_act_bwd", "bn_act_bwd_input", "pointwise_bn_act_bwd")  # x is their third argument
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_ROWS = 2**31 - 2**10  # rows are counted in 32 bits, up to the end of the last tile


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET is read when a kernel is decorated)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def unavailable() -> str | None:
    """Why this machine cannot run Triton kernels; None where it can."""
    if _import_error is not None:
        return f"cannot import triton: {_import_error}"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "needs a CUDA device (or TRITON_INTERPRET=1)"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU, got ROCm"
    best = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if best < (8, 0):
        return f"needs compute capability 8.0 or newer, got {best[0]}.{best[1]}"
    return None


@functools.cache
def launches(device: torch.device) -> bool:
    """Whether a small kernel of ours compiles and is launched there: for that Triton wants a C compiler, too."""
    one = functools.partial(torch.ones, dtype=torch.float16, device=device)
    wide = one(16, 16).float()
    try:
        prepared_training("product_statistics")(one(16, 16, 1, 1), wide[0], wide, None, None, 1e-5)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as failure:  # Triton's errors derive from Exception itself
        logger.warning("triton: cannot launch: %s", next(iter(str(failure).splitlines()), type(failure).__name__))
        return False
    return True


def _training(op: str):
    """The module, built upon this one, that has an op of convolutions between batch norms."""
    return importlib.import_module(f".{TRAINING[op]}", __package__)


def _chip(x: Tensor) -> tuple[int, int]:
    return chip(x.device) if x.is_cuda else (80, 1)


def declines(op: str, *args) -> str | None:
    """Why this call cannot run here, as the rest of a sentence; None where it can."""
    if op not in OPS:
        return f"has no {op}"
    first = args[0]
    x = first if "_bwd" not in op else args[2] if op in _AFTER_Y else args[1]
    if x.dtype not in _DTYPES:
        return f"needs float16, bfloat16 or float32, got {x.dtype}"
    if not x.is_cuda and not (x.device.type == "cpu" and interpreting()):
        return f"needs a CUDA tensor, got {x.device.type}"
    if x.is_cuda and not interpreting() and _chip(x)[0] < 80:
        major, minor = divmod(_chip(x)[0], 10)
        return f"needs compute capability 8.0 or newer, got {major}.{minor}"
    if first.numel() == 0 or x.numel() == 0:
        return "needs a non-empty batch"
    if op in TRAINING:
        return _training(op).declines(op, *args)
    if op.startswith("conv"):
        weight = args[3] if op.endswith("_bwd") else args[1]
        if weight.numel() == 0:
            return "needs a non-empty weight"
        stride, padding, dilation = args[8:11]  # the same places in both ops
        n, _, p, q = conv_output_size(x, weight, stride, padding, dilation)
        if p <= 0 or q <= 0:
            return f"needs a non-empty output, got {p}x{q}"
        if n * p * q > _MAX_ROWS:
            return f"needs at most {_MAX_ROWS} output positions, got {n * p * q}"
    elif x.numel() // x.shape[1] > _MAX_ROWS:
        return f"needs at most {_MAX_ROWS} values a channel, got {x.numel() // x.shape[1]}"
    return None


def defers(op: str, *args) -> str | None:
    """Why an automatic choice passes over this call, though it can run here."""
    if op == "conv_bn_act" and args[0].dtype is torch.float32:
        return "float32 convolutions are cuDNN's until these kernels have been measured beside it"
    return None


def variant(op: str, *args) -> tuple | None:
    """What the kernel is specialised on beyond dtypes, channels and options: the tile, picked by the number of rows,
    and what x's strides allow."""
    if op in TRAINING:
        return _training(op).variant(op, *args)
    if op != "conv_bn_act":
        return None
    x = args[0]
    xn, _, xh, xw = _strides(x)
    rows = _row_stride((x.shape[0], *x.shape[2:]), (xn, xh, xw)) is not None
    return _tile(x, args[1], *args[8:12]), rows, math.gcd(xn, xh, xw, 16)


def _tile(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> tiles.ConvTile:
    n, k, p, q = conv_output_size(x, weight, stride, padding, dilation)
    _, c_group, r, s = weight.shape
    fma = x.dtype is torch.float32 and not tf32_allowed()
    return tiles.conv_tile(n * p * q, k, c_group, groups, r * s, x.element_size(), *_chip(x), fma)


def _channels_last(t: Tensor) -> Tensor:
    """t: [N, C, H, W] as dense channels_last memory, t itself where it is that already."""
    return t.contiguous(memory_format=torch.channels_last)


class _Output:
    """An output [N, C, H, W] in some format: a kernel fills `rows` (channels_last memory), `result()` is the tensor."""

    def __init__(self, shape, format: torch.memory_format, like: Tensor):
        self.tensor = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)
        self.rows = self.tensor
        if not self.tensor.is_contiguous(memory_format=torch.channels_last):
            self.rows = torch.empty_like(self.tensor, memory_format=torch.channels_last)

    def result(self) -> Tensor:
        return self.tensor if self.rows is self.tensor else self.tensor.copy_(self.rows)


_HERE = contextlib.nullcontext()


def _device_of(x: Tensor):
    """x's device as the current one; nothing is entered where it is that already."""
    return torch.cuda.device_of(x) if x.is_cuda and x.get_device() != torch.cuda.current_device() else _HERE


def _dispatch(kernel, grid: tuple[int, ...], *args, **constants):
    """Launch by Triton's own dispatch, which compiles or finds the kernel and looks at every argument. constants: the
    kernel's, and Triton's own options. Returns what was launched; the interpreter returns None."""
    if (watch := watched()) is not None:
        watch.refuse("a kernel is launched by Triton's dispatch")
    return kernel[grid](*args, **constants)


class _Prepared:
    """An op's function for calls of one kind (shapes, strides, alignments, dtypes, options).

    The first call launches by Triton's dispatch. Later ones make the same launches, in the same order, of arguments of
    which all that the dispatch looks at is the same: they hand theirs to the kernels that it found.
    """

    def __init__(self, function):
        self.function = function
        self.found: list | None = None

    def __call__(self, *args):
        if self.found is not None:
            found, watch = iter(self.found), watched()

            def launch(kernel, grid, *args, **constants):
                compiled, values = next(found)
                compiled(*args, *values)
                if watch is not None:
                    watch.launched(compiled, (*args, *values))

            return self.function(*args, launch=launch)

        dispatched = []

        def launch(kernel, grid, *args, **constants):
            compiled = _dispatch(kernel, grid, *args, **constants)
            if compiled is not None:
                values = tuple(constants[name] for name in kernel.arg_names if name in constants)
                dispatched.append((compiled[(*grid, 1, 1)[:3]], values))

        result = self.function(*args, launch=launch)
        self.found = dispatched or None
        return result


def prepare(op: str, *args):
    """The function for this call and for all of the same shapes, strides, alignments, dtypes and options."""
    if op in TRAINING:
        return _Prepared(getattr(_training(op), op))
    return _Prepared(_Convolution(*args) if op == "conv_bn_act" else globals()[op])


def gram_variant(x: Tensor, stride) -> int:
    """What 'gram' is specialised on beyond channels and layout."""
    return _training("pointwise_bn_act").gram_variant(x, stride)


def prepared_training(name: str) -> _Prepared:
    """A piece of an op of convolutions between batch norms: 'gram' or 'product_statistics', for calls of one kind."""
    return _Prepared(getattr(_training("pointwise_bn_act"), name))


def _output(wanted: bool, shape, format: torch.memory_format, like: Tensor) -> _Output | None:
    return _Output(shape, format, like) if wanted else None


def _rows(out: _Output | None) -> Tensor | None:
    return None if out is None else out.rows


def _result(out: _Output | None) -> Tensor | None:
    return None if out is None else out.result()


def _per_channel(v: Tensor | None) -> Tensor | None:
    """A per-channel vector with unit stride."""
    return None if v is None else v.contiguous()


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


class _Convolution:
    """conv_bn_act for calls of one kind: all that follows from shapes, layouts and options is worked out once."""

    def __init__(self, x, weight, bn_weight, bn_bias, running_mean, running_var, eps, residual, *options):
        stride, padding, dilation, groups, relu = options
        self.shape = conv_output_size(x, weight, stride, padding, dilation)
        self.format = output_format(x, weight)
        n, k, p, q = self.shape
        h, w = x.shape[2:]
        _, c_group, r, s = weight.shape
        m = n * p * q
        tile = _tile(x, weight, stride, padding, dilation, groups)
        span = tile.groups_per_tile

        # What a call has to bring into the form that the kernel reads.
        self.converts_x = not tile.flat and x.stride(1) != 1
        self.converts_weight = _channels_last(weight) is not weight
        self.converts_residual = residual is not None and _channels_last(residual) is not residual
        self.converts_vectors = any(
            v is not None and not v.is_contiguous() for v in (bn_weight, bn_bias, running_mean, running_var)
        )
        xn, xc, xh, xw = _strides(_channels_last(x) if self.converts_x else x)
        rows = r * s == 1 and not any(padding) and max(stride) == 1
        row_stride = _row_stride((n, h, w), (xn, xh, xw)) if rows else None

        column_tiles = tiles.ceil_div(groups, span) * tiles.ceil_div(span * (k // groups), tile.block_n)
        self.grid = (tiles.ceil_div(m, tile.block_m) * column_tiles,)
        numbers = (m, p, q, h, w, k, c_group, k // groups, groups, xn, xh, xw if row_stride is None else row_stride, xc)
        self.numbers = (*numbers, *stride, *padding, *dilation)
        self.constants = {
            "R": r,
            "S": s,
            "PADDED": any(padding),
            "ROWS": row_stride is not None,
            "FLAT_C": c_group if tile.flat else 0,
            "GROUPS_PER_TILE": span,
            "EVEN_C": span * c_group % tile.block_k == 0 and groups % span == 0,
            "EVEN_K": span * (k // groups) % tile.block_n == 0 and groups % span == 0,
            "ALIGN_X": math.gcd(c_group, xn, xh, xw, 16),
            "ALIGN_K": math.gcd(k // groups, 16),
            "RELU": relu,
            "INPUT_PRECISION": "tf32" if x.dtype != torch.float32 or tf32_allowed() else "ieee",
            "ROUND_TF32": x.dtype == torch.float32 and tf32_allowed() and not interpreting(),
            "UPCAST": interpreting() and x.dtype == torch.bfloat16,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": tile.group_m,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def __call__(
        self, x, weight, bn_weight, bn_bias, running_mean, running_var, eps, residual, *_, launch=_dispatch
    ) -> Tensor:
        with _device_of(x):
            out = _Output(self.shape, self.format, x)
            if self.converts_x:
                x = _channels_last(x)
            if self.converts_weight:
                weight = _channels_last(weight)
            if self.converts_residual:
                residual = _channels_last(residual)
            vectors = (bn_weight, bn_bias, running_mean, running_var)
            if self.converts_vectors:
                vectors = map(_per_channel, vectors)
            args = (x, weight, *vectors, residual, out.rows, eps, *self.numbers)
            launch(_conv._conv_bn_act_fwd_kernel, self.grid, *args, **self.constants)
            return out.result()


def conv_bn_act(*args) -> Tensor:
    """y: [N, K, P, Q] = act(bn(conv(x: [N, C, H, W], weight: [K, C/groups, R, S])) + residual: [N, K, P, Q])."""
    return _Convolution(*args)(*args)


def conv_bn_act_bwd(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    output_mask: list[bool],
    *,
    launch=_dispatch,
) -> tuple[Tensor | None, ...]:
    """(dx: [N, C, H, W], dweight: [K, C/groups, R, S], dbn_weight: [K], dbn_bias: [K], dresidual: [N, K, P, Q]) for
    grad, y: [N, K, P, Q]; None where output_mask is off. The two convolutions are PyTorch's, the rest is fused."""
    need_x, need_weight, need_bn_weight, need_bn_bias, need_residual = output_mask
    need_sum = need_bn_weight or need_bn_bias
    need_raw = need_weight or need_bn_weight
    format = output_format(x, weight)
    with _device_of(x):
        k = grad.shape[1]
        dresidual = _output(need_residual, grad.shape, format, grad)
        grad = _channels_last(grad)
        g = grad
        if relu:
            g = dresidual.rows if need_residual else torch.empty_like(grad) if need_x or need_raw else None
        elif need_residual:
            dresidual.rows.copy_(grad)
        dbn_bias = None
        if need_sum or (relu and g is not None):
            tile = tiles.row_tile(grad.numel() // k, k)
            partial = _floats(x, tile.splits, k) if need_sum else None
            launch(
                _conv_bwd._conv_bn_act_bwd_mask_kernel,
                (tiles.ceil_div(k, tile.block_c), tile.splits),
                grad,
                _channels_last(y) if relu else None,
                g if relu else None,
                partial,
                grad.numel() // k,
                k,
                tile.steps,
                BLOCK_R=tile.block_r,
                BLOCK_C=tile.block_c,
                ALIGN=tile.align,
            )
            if need_sum:
                dbn_bias, _, _ = _finish(launch, partial, None, None, eps)
        dx = dweight = dbn_weight = None
        if need_x or need_raw:
            gamma, mean, var = map(_per_channel, (bn_weight, running_mean, running_var))
            conv = (None, stride, padding, dilation, False, [0, 0], groups)
            backward = torch.ops.aten.convolution_backward
            x = _channels_last(x)
            if need_x:
                dx = backward(g, x, _folded(launch, weight, gamma, var, eps), *conv, [True, False, False])[0]
                dx = _in_format(dx, format)
            if need_raw:
                operands = g, x, _channels_last(weight)
                if need_bn_weight:
                    # A difference of two sums, one of them over `raw`, whose rounding to 16 bits would be most of the
                    # error. TF32 holds every 16-bit operand.
                    operands = tuple(t.float() for t in operands)
                elif var is not None and x.dtype is torch.float16:
                    # The plain convolution's gradient leaves float16's range where the scaled one is well inside:
                    # scale first, by the nearest power of two; the kernel below sees a BN of about unit deviation.
                    deviation = (var.float() + eps).sqrt()
                    power = nearest_power_of_2(deviation.reciprocal())
                    operands = (g * power.to(g.dtype).view(1, -1, 1, 1), *operands[1:])
                    var = (deviation * power).square() - eps
                raw = _channels_last(backward(*operands, *conv, [False, True, False])[1])
                bn = (gamma, mean, var)
                dweight, dbn_weight = _weight_grads(
                    launch, raw, weight, *bn, eps, dbn_bias, need_weight, need_bn_weight
                )
        return dx, dweight, dbn_weight, dbn_bias if need_bn_bias else None, _result(dresidual)


def _strides(x: Tensor) -> list[int]:
    """x's strides; where an image or a map has an extent of one the stride says nothing, and is one that is aligned."""
    return [16 if size == 1 and i != 1 else s for i, (size, s) in enumerate(zip(x.shape, x.stride(), strict=True))]


def _row_stride(sizes: tuple[int, int, int], strides: tuple[int, int, int]) -> int | None:
    """The one stride that walks all rows (n, h, w) of these sizes and strides in order; None if there is none."""
    dims = [d for d in zip(sizes, strides, strict=True) if d[0] > 1]
    if not dims:
        return strides[-1]
    rows, step = dims.pop()
    for size, outer_step in reversed(dims):
        if outer_step != rows * step:
            return None
        rows *= size
    return step


def _in_format(t: Tensor, format: torch.memory_format) -> Tensor:
    """t with exactly the strides of a new tensor of that format."""
    out = torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=format)
    return t if t.stride() == out.stride() else out.copy_(t)


def _folded(launch, weight: Tensor, bn_weight: Tensor | None, running_var: Tensor | None, eps: float) -> Tensor:
    """weight: [K, C/groups, R, S] times BN's scale of its output channel, channels_last."""
    weight = _channels_last(weight)
    if running_var is None:
        return weight
    folded = torch.empty_like(weight)
    k, size, block = weight.shape[0], weight[0].numel(), 1024
    launch(
        _conv_bwd._conv_bn_act_bwd_fold_kernel,
        (k, tiles.ceil_div(size, block)),
        weight,
        bn_weight,
        running_var,
        folded,
        eps,
        size,
        BLOCK=block,
    )
    return folded


def _weight_grads(
    launch,
    raw: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    sum_g: Tensor | None,
    need_weight: bool,
    need_bn_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight with weight's strides, dbn_weight: [K]) from raw: [K, C/groups, R, S], the plain convolution's."""
    dweight = torch.empty_like(weight) if need_weight else None
    dbn_weight = _floats(weight, weight.shape[0]) if need_bn_weight else None
    order = sorted((1, 2, 3), key=(weight if dweight is None else dweight).stride, reverse=True)

    def strides(t: Tensor | None) -> list[int]:
        return [0, 0, 0, 0] if t is None else [t.stride(0), *(t.stride(i) for i in order)]

    size = weight[0].numel()
    launch(
        _conv_bwd._conv_bn_act_bwd_weight_kernel,
        (weight.shape[0],),
        raw,
        weight if need_bn_weight else None,
        bn_weight,
        running_mean,
        running_var,
        sum_g,
        dweight,
        dbn_weight,
        eps,
        size,
        weight.shape[order[1]],
        weight.shape[order[2]],
        *strides(raw),
        *strides(weight),
        *strides(dweight),
        BLOCK=min(1024, tiles.power_of_2(size)),
    )
    return dweight, dbn_weight


def _finish(
    launch, partial_g: Tensor, partial_gx: Tensor | None, var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(sum g, sum g * (x - mean), dbn_weight), each [C] in float32, from partials [splits, C]."""
    splits, c = partial_g.shape
    block_s, block_c = tiles.finish_tile(splits, c)
    sum_g = _floats(partial_g, c)
    sum_gx, dbn_weight = (None, None) if partial_gx is None else (_floats(partial_g, c), _floats(partial_g, c))
    launch(
        _bn._bn_act_bwd_finish_kernel,
        (tiles.ceil_div(c, block_c),),
        partial_g,
        partial_gx,
        var,
        sum_g,
        sum_gx,
        dbn_weight,
        eps,
        c,
        splits,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
    )
    return sum_g, sum_gx, dbn_weight


def bn_stats(x: Tensor, *, launch=_dispatch) -> tuple[Tensor, Tensor]:
    """(mean: [C], biased variance: [C]) of x: [N, C, H, W], in float32."""
    with _device_of(x):
        x = _channels_last(x)
        c = x.shape[1]
        m = x.numel() // c
        tile = tiles.row_tile(m, c)
        partial_mean, partial_m2 = _floats(x, tile.splits, c), _floats(x, tile.splits, c)
        launch(
            _bn._bn_stats_partial_kernel,
            (tiles.ceil_div(c, tile.block_c), tile.splits),
            x,
            partial_mean,
            partial_m2,
            m,
            c,
            tile.steps,
            BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c,
            ALIGN=tile.align,
        )
        mean, var = _floats(x, c), _floats(x, c)
        block_s, block_c = tiles.finish_tile(tile.splits, c)
        launch(
            _bn._bn_stats_merge_kernel,
            (tiles.ceil_div(c, block_c),),
            x,
            partial_mean,
            partial_m2,
            mean,
            var,
            m,
            c,
            tile.splits,
            tile.steps * tile.block_r,
            BLOCK_S=block_s,
            BLOCK_C=block_c,
        )
        return mean, var


def bn_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    batch_stats: bool,
    *,
    launch=_dispatch,
) -> Tensor:
    """y: [N, C, H, W] = act((x - mean) / sqrt(var + eps) * bn_weight + bn_bias + residual); [C] what is per channel."""
    with _device_of(x):
        out = _Output(x.shape, output_format(x), x)
        x = _channels_last(x)
        c = x.shape[1]
        m = x.numel() // c
        tile = tiles.row_tile(m, c)
        launch(
            _bn._bn_act_fwd_kernel,
            (tiles.ceil_div(m, tile.block_r) * tiles.ceil_div(c, tile.block_c),),
            x,
            *map(_per_channel, (mean, var, bn_weight, bn_bias)),
            None if residual is None else _channels_last(residual),
            out.rows,
            eps,
            m,
            c,
            RELU=relu,
            BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c,
            ALIGN=tile.align,
        )
        return out.result()


def bn_act_bwd(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    eps: float,
    relu: bool,
    batch_stats: bool,
    output_mask: list[bool],
    bn_bias: Tensor | None = None,
    *,
    launch=_dispatch,
) -> tuple[Tensor | None, ...]:
    """(dx: [N, C, H, W], dbn_weight: [C], dbn_bias: [C], dresidual: [N, C, H, W]); None where output_mask is off.

    With batch_stats, mean and var are those of x and dx carries their derivative: two passes over the rows, else one.
    With relu but without y, the mask is that of the batch norm of x, for which bn_bias is: no pass reads y.
    """
    need_x, need_bn_weight, need_bn_bias, need_residual = output_mask
    with _device_of(x):
        format = output_format(x)
        dx = _output(need_x, x.shape, format, x)
        dresidual = _output(need_residual, x.shape, format, x)
        of_x = relu and y is None
        grad, x, y = _channels_last(grad), _channels_last(x), _channels_last(y) if relu and not of_x else None
        mean, var, bn_weight, bn_bias = map(_per_channel, (mean, var, bn_weight, bn_bias))
        c = x.shape[1]
        m = x.numel() // c
        need_gx = need_bn_weight or (need_x and batch_stats)
        need_g = need_gx or need_bn_bias
        tile = tiles.row_tile(m, c)
        partial_g = _floats(x, tile.splits, c) if need_g else None
        partial_gx = _floats(x, tile.splits, c) if need_gx else None
        blocks_c = tiles.ceil_div(c, tile.block_c)
        launch(
            _bn._bn_act_bwd_reduce_kernel,
            (blocks_c, tile.splits),
            grad,
            y,
            x if need_gx or of_x else None,
            mean,
            var,
            bn_weight,
            bn_bias,
            _rows(dresidual),
            None if batch_stats else _rows(dx),
            partial_g,
            partial_gx,
            eps,
            m,
            c,
            tile.steps,
            MASK_OF_X=of_x,
            BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c,
            ALIGN=tile.align,
        )
        sum_g = dbn_weight = None
        if need_g:
            sum_g, sum_gx, dbn_weight = _finish(launch, partial_g, partial_gx, var, eps)
        if need_x and batch_stats:
            masked = (grad, y) if dresidual is None else (dresidual.rows, None)
            of_x = of_x and dresidual is None
            _launch_bwd_input(launch, *masked, x, mean, var, bn_weight, sum_g, sum_gx, dx, eps, bn_bias, of_x)
        return (
            _result(dx),
            dbn_weight if need_bn_weight else None,
            sum_g if need_bn_bias else None,
            _result(dresidual),
        )


def bn_act_bwd_input(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    mean_g: Tensor,
    slope: Tensor,
    relu: bool,
    *,
    launch=_dispatch,
) -> Tensor:
    """dx: [N, C, H, W] = (grad * mask - mean_g - (x - mean) * slope) * scale; [C] what is per channel."""
    with _device_of(x):
        dx = _Output(x.shape, output_format(x), x)
        grad, x, y = _channels_last(grad), _channels_last(x), _channels_last(y) if relu else None
        mean, scale, mean_g, slope = (v.float().contiguous() for v in (mean, scale, mean_g, slope))
        _launch_bwd_input(launch, grad, y, x, mean, None, scale, mean_g, slope, dx, 0.0)
        return dx.result()


def _launch_bwd_input(
    launch, grad, y, x, mean, var, bn_weight, sum_g, sum_gx, dx: _Output, eps: float, bn_bias=None, mask_of_x=False
) -> None:
    """dx.rows from channels_last tensors; var None: scale, mean of g and slope stand for the three after it."""
    c = x.shape[1]
    m = x.numel() // c
    tile = tiles.row_tile(m, c)
    launch(
        _bn._bn_act_bwd_input_kernel,
        (tiles.ceil_div(m, tile.block_r) * tiles.ceil_div(c, tile.block_c),),
        grad,
        y,
        x,
        mean,
        var,
        bn_weight,
        bn_bias,
        sum_g,
        sum_gx,
        dx.rows,
        eps,
        m,
        c,
        MASK_OF_X=mask_of_x,
        BLOCK_R=tile.block_r,
        BLOCK_C=tile.block_c,
        ALIGN=tile.align,
    )
