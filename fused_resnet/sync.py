"""nn.SyncBatchNorm over several processes: the fused kernels, around one collective forward and one backward.

Every process reduces its own maps (`bn_stats`; backward `bn_act_bwd`, in the pass that applies the ReLU's mask), the
group exchanges one vector, and every process finishes its own maps (`bn_act`, `bn_act_bwd_input`). Works wherever
torch.distributed does: NCCL, and gloo on a CPU, which PyTorch's own SyncBatchNorm refuses. Counts stay on the device.

The collectives are the same on all processes of a group: one for each forward, and one for each backward in which x
needs a gradient. An empty batch takes part in both. As with PyTorch's, a process that leaves one out (because its loss
does not depend on the output, say, or because an argument raised there) keeps the others waiting.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from .backends.reference import accumulator, inverse_and_scale
from .ops import follow

_ops = torch.ops.fused_resnet


def needs_collective(bn: nn.Module) -> bool:
    """Whether this BN's statistics are those of several processes' batches."""
    return (
        isinstance(bn, nn.SyncBatchNorm)
        and bn.training
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(bn.process_group) > 1
    )


def batch_norm_act(x: Tensor, bn: nn.SyncBatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
    """functional.batch_norm_act with the statistics of the batches of all processes in bn.process_group.

    x, residual: [N, C, H, W] of one dtype; N may differ from process to process, and be 0. Gradients reach x, residual
    and BN's weight and bias; as PyTorch's, the latter two are this process' own sums, which DDP averages.

    Raises ValueError if the group has one value a channel. That takes a look at the count, so on a GPU, where looking
    would wait for it, the variance is zero instead.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):  # a compiler's or torch.fx's stand-in
        y = bn(x)
        y = y if residual is None else y + residual
        return y.relu() if relu else y
    if residual is not None and torch.is_autocast_enabled(x.device.type):
        residual = residual.to(x.dtype)
    mean, var, count = _statistics(x.detach(), bn)
    return _SyncBatchNormAct.apply(x, bn.weight, bn.bias, residual, mean, var, count, bn.eps, relu, bn.process_group)


@torch.no_grad()
def _statistics(x: Tensor, bn: nn.SyncBatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """(mean: [C], biased variance: [C], number of values: []) over the group; follows them with the running ones."""
    mean, var = _of_this_process(x)
    c = mean.shape[0]
    here = torch.cat((mean, var, mean.new_full((1,), x.shape[0] * x.shape[2] * x.shape[3])))
    everywhere = here.new_empty(dist.get_world_size(bn.process_group), 2 * c + 1)
    # Into the rows of one tensor: gloo lacks the call that NCCL has for that.
    dist.all_gather(list(everywhere.unbind()), here, bn.process_group)

    # Chan, Golub, LeVeque (1979) for all at once. In float64, since means may be large beside their differences.
    means, variances, counts = everywhere.double().split((c, c, 1), 1)
    count = counts.sum()
    share = counts / count.clamp(min=1)
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)

    known = count.item() if x.device.type == "cpu" else None
    if known == 1:
        raise ValueError(
            "x: expected more than 1 value per channel when training, got input size "
            f"{list(x.shape)}, and nothing in the other processes"
        )
    if bn.track_running_stats and bn.running_mean is not None:
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
        if known != 0:
            batch = mean.to(here.dtype), (var * (count / (count - 1))).to(here.dtype)
            follow(bn.running_mean, bn.running_var, bn.num_batches_tracked, *batch, bn.momentum)
    return mean.to(here.dtype), var.to(here.dtype), count


def _of_this_process(x: Tensor) -> tuple[Tensor, Tensor]:
    """bn_stats, which refuses a single value a channel: here the other processes may have more."""
    if x.dim() != 4 or x.shape[0] * x.shape[2] * x.shape[3] != 1:
        return _ops.bn_stats.default(x)
    mean = x.flatten().to(accumulator(x.dtype))
    return mean, mean - mean  # zero, or NaN where the value is not finite


class _SyncBatchNormAct(Function):
    """bn_act with the group's statistics, whose derivative goes through the group as well."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, mean, var, count, eps, relu, group):
        y = _ops.bn_act.default(x, mean, var, weight, bias, eps, residual, relu, False)
        ctx.save_for_backward(x, y if relu else None, weight, mean, var, count)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.options = eps, relu, group
        return y

    @staticmethod
    def backward(ctx, grad):
        gradients = _Backward.apply(grad, *ctx.saved_tensors, *ctx.options, ctx.bias_dtype, ctx.needs_input_grad[:4])
        return *gradients, *[None] * 6


class _Backward(Function):
    """The gradients of x, weight, bias and residual, with a sentence where their own derivative would be."""

    @staticmethod
    def forward(ctx, grad, x, y, weight, mean, var, count, eps, relu, group, bias_dtype, needs):
        need_x, need_weight, need_bias, need_residual = needs
        # With the statistics as constants: the sums over this process' maps and the masked gradient, in one pass.
        mask = [False, need_x or need_weight, need_x or need_bias, need_residual and relu]
        _, sum_gx, sum_g, masked = _ops.bn_act_bwd.default(grad, y, x, mean, var, weight, eps, relu, False, mask)
        g, under = (masked, None) if mask[3] else (grad, y)
        dx = None
        if need_x:
            both = torch.cat((sum_g, sum_gx))
            dist.all_reduce(both, group=group)
            # The count may be zero, where no process has a gradient.
            mean_g, mean_gx = (both / count.clamp(min=1)).chunk(2)
            inv, scale = inverse_and_scale(both.dtype, weight, var, eps)
            dx = _ops.bn_act_bwd_input.default(g, under, x, mean, scale, mean_g, mean_gx * inv, under is not None)
        return (
            dx,
            sum_gx.to(weight.dtype) if need_weight else None,
            sum_g.to(bias_dtype) if need_bias else None,
            g if need_residual else None,
        )

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "SyncBatchNorm over several processes can be differentiated once; for a second derivative use BatchNorm2d"
        )
