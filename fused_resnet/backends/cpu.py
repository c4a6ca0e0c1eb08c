"""oneDNN's fused convolutions: weight, BN and shortcut in one call, on folded and prepacked weights. Batch norm of
float32 channels_last tensors by the kernels of csrc/cpu.

One folded copy of a weight is kept, weakly by its storage, once the same weight has come twice. Before every use
the raw bytes of the weight and of its BN are fingerprinted (128 bits) and compared with what the copy was made of: code
that writes through `.data` bumps no version counter, so nothing less would do. Where the compiled fingerprint is absent
nothing is kept and every call folds anew.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..folding import fold
from . import aten, composed, cuda, pooled
from .aten import bn_act_bwd_input, stem_conv, stem_conv_weight_grad  # noqa: F401  (three of the backend's functions)
from .cpu_gradients import conv_gradients  # noqa: F401
from .layout import as_float32_vectors, as_rows, is_channels_last, output_format
from .library import load

NAME = "cpu"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_mkldnn = torch.ops.mkldnn


def unavailable() -> str | None:
    return None


def declines(op: str, x, *args) -> str | None:
    if x.device.type != "cpu":
        return f"needs CPU tensors, got {x.device}"
    if x.dtype not in DTYPES:
        return f"needs {', '.join(str(d) for d in DTYPES)}, got {x.dtype}"
    if x.numel() == 0:
        return "needs a non-empty batch"
    return None


@functools.cache
def onednn_lacks(dtype: torch.dtype) -> str | None:
    """Why oneDNN's fused convolution does not serve this dtype here, by running it; None if it does."""
    if dtype is torch.float64:
        return "oneDNN has no float64"
    try:
        x = torch.linspace(-1, 1, 4 * 25).to(dtype).view(1, 4, 5, 5).contiguous(memory_format=torch.channels_last)
        weight = torch.linspace(1, -1, 4 * 36).to(dtype).view(4, 4, 3, 3).contiguous(memory_format=torch.channels_last)
        bias = torch.linspace(-1, 1, 4).to(dtype)
        conv = ([1, 1], [1, 1], [1, 1], 1)
        packed = _pack(weight, *conv, list(x.shape))
        got = _pointwise(x, packed, bias, x, *conv)
        expected = torch.conv2d(x.double(), weight.double(), bias.double(), padding=1) + x.double()
        error = ((got.double() - expected).norm() / expected.norm()).item()
        return None if error < 8 * torch.finfo(dtype).eps else f"oneDNN's fused convolution is off by {error:.1e}"
    except (AttributeError, RuntimeError) as error:
        return f"oneDNN's fused convolution: {str(error).splitlines()[0]}"


def _pack(weight, stride, padding, dilation, groups, input_shape):
    return _mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, input_shape)


def _pointwise(x, packed, bias, residual, stride, padding, dilation, groups):
    """Convolution and add. oneDNN could apply the ReLU as well, but its ReLU turns NaN into 0."""
    conv = (padding, stride, dilation, groups)
    # With groups PyTorch fuses no add, and lacks what it falls back on in 16 bits; torch 2.11 fails on 1x1 maps and on
    # single channels, which are contiguous as well.
    if residual is None or groups > 1 or residual.is_contiguous():
        y = _mkldnn._convolution_pointwise.default(x, packed, bias, *conv, "none", [], "")
        return y if residual is None else y.add_(residual)
    return _mkldnn._convolution_pointwise.binary(x, residual, packed, bias, *conv, "add", 1.0, None, [], "")


class _Folded(NamedTuple):
    proof: Tensor  # fingerprints of the weight and the BN tensors that the copy was made of
    config: tuple  # what else it depends on
    shapes: tuple  # of x and residual
    packed: Tensor | None  # None until the same weight comes a second time: in training none ever does
    bias: Tensor | None


# By storage, as a weak reference to the tensor itself would keep torch.utils.swap_tensors from it; then by where in the
# storage the weight lies, as flat buffers hold many.
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _kept_for(weight: Tensor) -> _Folded | None:
    try:
        return _kept.get(weight.untyped_storage(), {}).get((weight.storage_offset(), weight.shape))
    except (NotImplementedError, RuntimeError):  # a tensor without storage, for the validation to refuse
        return None


def _keep(weight: Tensor, entry: _Folded | None) -> None:
    storage, place = weight.untyped_storage(), (weight.storage_offset(), weight.shape)
    if entry is not None:
        _kept.setdefault(storage, {})[place] = entry
    elif storage in _kept:
        _kept[storage].pop(place, None)


def repeated(
    x, weight, bn_weight, bn_bias, running_mean, running_var, eps, residual, stride, padding, dilation, groups, relu
) -> Tensor | None:
    """The result, if this is a call that went through before: same weight and BN to the bit, same shapes and options.

    None for any other. Answers before the arguments are validated: a repetition is valid because its first time was.
    """
    entry = _kept_for(weight)
    if (
        entry is None
        or entry.packed is None
        or entry.shapes != (x.shape, None if residual is None else residual.shape)
        or entry.config != (eps, stride, padding, dilation, groups)
        or x.dtype is not weight.dtype
        or not x.is_contiguous(memory_format=torch.channels_last)
        or (residual is not None and not _fits(residual, x))
        or bn_weight is None
        or bn_bias is None
        or running_mean is None
        or running_var is None
        or not torch._C._get_mkldnn_enabled()
        or not cuda.unchanged([weight, bn_weight, bn_bias, running_mean, running_var], entry.proof)
    ):
        return None
    y = _pointwise(x, entry.packed, entry.bias, residual, stride, padding, dilation, groups)
    return y.relu_() if relu else y


def _fits(residual: Tensor, x: Tensor) -> bool:
    return residual.is_cpu and residual.dtype is x.dtype and residual.is_contiguous(memory_format=torch.channels_last)


@functools.cache
def _malloc_trim():
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc's


def return_free_memory() -> None:
    """malloc would keep the folded weights that went between the packed ones that stay: nearly a second copy."""
    if trim := _malloc_trim():
        trim(0)


def _folded(x, weight, bn, eps, residual, stride, padding, dilation, groups) -> tuple[Tensor, Tensor | None]:
    """Packed weight and bias of conv then BN (bn_weight, bn_bias, running_mean, running_var, each maybe None)."""
    sources = [weight, *(t for t in bn if t is not None)]
    config = (eps, stride, padding, dilation, groups, *(i for i, t in enumerate(bn) if t is None))
    entry = _kept_for(weight)
    seen = entry is not None and entry.config == config and cuda.unchanged(sources, entry.proof)
    shapes = (x.shape, None if residual is None else residual.shape)
    if seen and entry.packed is not None:
        _keep(weight, entry._replace(shapes=shapes))
        return entry.packed, entry.bias
    _keep(weight, None)  # the old copy goes before a new one is made
    proof = entry.proof if seen else cuda.fingerprint(sources)
    entry = None
    folded, bias = fold(weight, *bn, eps)
    folded = folded.contiguous(memory_format=torch.channels_last)
    packed = _pack(folded, stride, padding, dilation, groups, list(x.shape))
    if seen:
        del folded
        return_free_memory()
    if proof is not None:
        _keep(weight, _Folded(proof, config, shapes, packed if seen else None, bias))
    return packed, bias


def conv_bn_act(*args):
    x, weight, *bn, eps, residual, stride, padding, dilation, groups, relu = args
    format = output_format(x, weight)
    if format is torch.contiguous_format or not torch.backends.mkldnn.enabled or onednn_lacks(x.dtype):
        # The fused calls return channels_last. Two conversions, or folding at every call, cost more than BN's own pass.
        return aten.conv_then_bn_act(*args)
    x = x.contiguous(memory_format=format)
    if residual is not None:
        residual = residual.contiguous(memory_format=format)
    packed, bias = _folded(x, weight, bn, eps, residual, stride, padding, dilation, groups)
    y = _pointwise(x, packed, bias, residual, stride, padding, dilation, groups)
    return (y.relu_() if relu else y).contiguous(memory_format=format)


def _compiled_bn(*tensors: Tensor | None) -> bool:
    """Whether csrc/cpu has batch norm for these tensors, x being the first: they are float32, and its result would be
    channels_last."""
    return (
        all(t is None or t.dtype is torch.float32 for t in tensors) and is_channels_last(tensors[0]) and load() is None
    )


def bn_stats(x):
    if not _compiled_bn(x):
        return aten.bn_stats(x)
    return torch.ops.fused_resnet_cpu.bn_stats.default(x)


def bn_act(x, mean, var, bn_weight, bn_bias, eps, residual, relu, batch_stats):
    if not _compiled_bn(x):
        return aten.bn_act(x, mean, var, bn_weight, bn_bias, eps, residual, relu, batch_stats)
    vectors = as_float32_vectors(mean, var, bn_weight, bn_bias)
    return torch.ops.fused_resnet_cpu.bn_act.default(x, *vectors, eps, as_rows(residual), relu)


def bn_act_bwd(grad, y, x, mean, var, bn_weight, eps, relu, batch_stats, output_mask):
    y = y if relu else None
    if not _compiled_bn(x, grad, y):
        return aten.bn_act_bwd(grad, y, x, mean, var, bn_weight, eps, relu, batch_stats, output_mask)
    need_x, need_weight, need_bias, need_residual = output_mask
    vectors = as_float32_vectors(mean, var, bn_weight)
    need = (need_x, need_weight or need_bias, need_residual)
    dx, dweight, dbias, g = torch.ops.fused_resnet_cpu.bn_act_bwd.default(
        as_rows(grad), as_rows(y), x, *vectors, None, eps, relu, batch_stats, *need
    )
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        g if need_residual else None,
    )


# With leave to write over the first argument: no memory that the system would have to clear first.


def bn_act_(x, mean, var, bn_weight, bn_bias, eps, residual, relu, batch_stats):
    if not _compiled_bn(x):
        return bn_act(x, mean, var, bn_weight, bn_bias, eps, residual, relu, batch_stats)
    vectors = as_float32_vectors(mean, var, bn_weight, bn_bias)
    torch.ops.fused_resnet_cpu.bn_act_out.default(x, *vectors, eps, as_rows(residual), relu, x)
    return x


def bn_act_bwd_(grad, y, x, mean, var, bn_weight, eps, relu, batch_stats, output_mask):
    if not _compiled_bn(x, grad, y) or output_mask[3]:
        return bn_act_bwd(grad, y, x, mean, var, bn_weight, eps, relu, batch_stats, output_mask)
    need_x, need_weight, need_bias, _ = output_mask
    grad = as_rows(grad)
    dweight, dbias = torch.ops.fused_resnet_cpu.bn_act_bwd_out.default(
        grad,
        as_rows(y) if relu else None,
        x,
        *as_float32_vectors(mean, var, bn_weight),
        None,
        eps,
        relu,
        batch_stats,
        need_weight or need_bias,
        grad if need_x else None,
        None,
    )
    return grad if need_x else None, dweight if need_weight else None, dbias if need_bias else None, None


def relu_bwd_sum(grad, y):
    """The gradient that the ReLU lets through, and its sum per channel."""
    if not _compiled_bn(grad, y):
        return aten.relu_bwd_sum(grad, y)
    # A batch norm's backward of which only the mask and one sum are wanted; grad stands in for its input.
    ones = grad.new_ones(grad.shape[1])
    bn = (ones, ones, None, None, 0.0)
    _, _, sum_g, g = torch.ops.fused_resnet_cpu.bn_act_bwd.default(
        grad, as_rows(y), grad, *bn, True, False, False, True, True
    )
    return g, sum_g


def conv_bn_act_bwd(grad, y, x, weight, *rest):
    """The mask and the sum of the masked gradient in one pass, the convolution's gradients as in training."""
    *_, relu, _ = rest
    format = output_format(x, weight)
    g, sum_g = relu_bwd_sum(grad.contiguous(memory_format=format), y) if relu else (grad, None)
    g = g.contiguous(memory_format=format)
    return aten.conv_bn_act_bwd_masked(g, sum_g, x, weight, *rest, gradients=conv_gradients)


bn_act_conv, bn_act_conv_bwd, pointwise_bn_act, pointwise_bn_act_bwd = composed.composed_of(sys.modules[__name__])
bn_act_pool, bn_act_pool_bwd = pooled.pooled_of(sys.modules[__name__])
conv_bn_act_pool = functools.partial(pooled.conv_bn_act_pool, conv_bn_act)
