"""The public functions: convolution, batch norm, shortcut add and ReLU as single ops.

x: [N, C, H, W]; float16, bfloat16, float32 or float64; on any device; contiguous or channels_last (the output is
channels_last if x or weight is). Differentiable any number of times. Statistics and sums are kept in float32 (float64
for float64). Under autocast x, weight and residual are cast, as for a convolution; BN's vectors are not.
"""

from __future__ import annotations

import operator

from torch import Tensor, nn

from . import sync
from .frozen import eps_of
from .ops import direct

_conv_bn_act, _bn_stats, _bn_act = direct("conv_bn_act"), direct("bn_stats"), direct("bn_act")
_update_running_stats = direct("update_running_stats_")


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    relu: bool = True,
) -> Tensor:
    """Convolution, batch norm with given statistics, shortcut add and ReLU in one op.

    y = relu((conv(x, weight) - running_mean) * bn_weight / sqrt(running_var + eps) + bn_bias + residual)

    x: [N, C, H, W]. weight: [K, C/groups, R, S], the dtype of x. bn_weight, bn_bias: [K], or None for 1 and 0.
    running_mean, running_var: [K], any floating dtype; all four None is a plain convolution. residual: [N, K, P, Q],
    the dtype of x, or None. Returns y: [N, K, P, Q] in the dtype of x.

    Gradients reach x, weight, bn_weight, bn_bias and residual; running statistics are constants (BN in eval mode, or
    frozen: Ioffe & Szegedy, arXiv 1502.03167, section 3.1). BN is folded inside the op from the tensors as they are at
    the call, so nothing goes stale.

    Raises ValueError for an x of three dimensions, TypeError for what is no tensor or no integer, and RuntimeError for
    any other mismatch, naming the argument.
    """
    conv = (_pair(stride, "stride"), _pair(padding, "padding"), _pair(dilation, "dilation"), groups, relu)
    return _conv_bn_act(x, weight, bn_weight, bn_bias, running_mean, running_var, eps, residual, *conv)


def batch_norm_act(x: Tensor, bn: nn.Module, residual: Tensor | None = None, *, relu: bool = True) -> Tensor:
    """Batch norm by the module's state, shortcut add and ReLU: relu(bn(x) + residual).

    x, residual: [N, C, H, W] of one dtype. bn: nn.BatchNorm2d, nn.SyncBatchNorm (sync.py: over several processes, on a
    CPU as well, and differentiable once) or a FrozenBatchNorm2d (torchvision's, or one like it). Uses the batch's
    statistics, and updates the running ones, exactly when `bn` itself would. Returns [N, C, H, W] in the dtype of x.

    Raises ValueError for an x that is not 4-D or, with batch statistics, has one value a channel.
    """
    if not uses_batch_statistics(bn):
        return _bn_act(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps_of(bn), residual, relu, False)
    if sync.needs_collective(bn):
        return sync.batch_norm_act(x, bn, residual, relu)
    mean, var = _bn_stats(x)
    update_running_stats(bn, x, mean, var)
    return _bn_act(x, mean, var, bn.weight, bn.bias, bn.eps, residual, relu, True)


def update_running_stats(bn: nn.Module, x: Tensor, mean: Tensor, var: Tensor) -> None:
    """What `bn` does to its buffers in training, for a batch x: [N, C, H, W] with these statistics (var: biased)."""
    if bn.training and bn.track_running_stats and bn.running_mean is not None:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        _update_running_stats(bn.running_mean, bn.running_var, bn.num_batches_tracked, mean, var, count, bn.momentum)


def uses_batch_statistics(bn: nn.Module) -> bool:
    """Whether this BN normalises with the batch's statistics: decided by the BN, never by the block around it."""
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
        return False  # frozen by its class
    return bn.training or bn.running_mean is None


def on_own_batch(bn: nn.Module) -> bool:
    """Whether this BN normalises with the statistics of this process' batch alone."""
    return uses_batch_statistics(bn) and not sync.needs_collective(bn)


def _pair(v, name: str) -> list[int]:
    if isinstance(v, int):
        return [v, v]
    if isinstance(v, (tuple, list)):
        return list(v)
    try:
        return [operator.index(v)] * 2  # NumPy's integers, say
    except TypeError:
        raise TypeError(f"{name}: expected an integer or two, got {v!r}") from None
