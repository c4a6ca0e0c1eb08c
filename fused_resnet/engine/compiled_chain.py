"""The chained bottleneck by the compiled kernels for Hopper (csrc/conv/chain*_sm90_kernel.cuh): the functions of
triton_chain. Two keep all weights in shared memory, which has room for those of 64 middle channels: the tiles of one
are 64 positions, those of the other lines of an image. The third, of 128, streams them past lines."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import cuda_conv

_MOST_ROWS = 2**31 - 513
_LEAST_ROWS = {64: 256, 128: 112}  # a multiprocessor's: two tiles a warp group where weights stay, else one


def declines(
    arch: int,
    sms: int,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    residual: Tensor | None = None,
    segment: tuple[Tensor, Tensor, int] | None = None,
    stride: int = 1,
    relu: bool = True,
    next: tuple[Tensor, Tensor] | None = None,
    quarter: bool = False,
    pool: bool = False,
) -> str | None:
    """Why this chain cannot run on sm_<arch>, as the rest of a sentence; None where it can."""
    if arch != 90:
        return f"needs sm_90, got sm_{arch}"
    if not cuda_conv.chains():
        return "was not compiled"
    if x.dtype not in cuda_conv.DTYPES:
        return f"needs float16 or bfloat16, got {x.dtype}"
    middle = weight1.shape[0]
    if middle not in (64, 128) or tuple(weight1.shape) != (middle, middle, 3, 3):
        return f"needs a 3x3 of 64 or of 128 channels on either side, got a weight {list(weight1.shape)}"
    if tuple(weight2.shape) != (4 * middle, middle, 1, 1):
        return f"needs {middle} -> {middle} -> {4 * middle} channels, got a weight {list(weight2.shape)}"
    if stride != 1 or pool:
        return f"has neither a stride nor a pool, got stride {stride}, pool {pool}"
    if quarter and middle != 64:
        return "stores all of y for 128 channels in the middle, got quarter True"
    if residual is not None and segment is not None:
        return "takes a residual or a projection segment, got both"
    if segment is not None and (segment[0].shape[1] != 64 or segment[2] > 8):
        return f"needs a projection of 64 channels by a stride of at most 8, got {segment[0].shape[1]} by {segment[2]}"
    following = 0 if next is None else next[0].shape[0]
    if not cuda_conv.chains_of(x.dtype, middle, following, segment is not None):
        of = [c for c in cuda_conv.chains() if c.middle == middle]
        kinds = ", ".join(sorted({str(c.following) + " beside a projection" * c.segment for c in of}))
        got = f"{following}{' beside a projection' if segment else ''}"
        return f"has next convolutions of {kinds} channels for {middle} in the middle, got {got}"
    rows = x.numel() // middle
    if rows > _MOST_ROWS:
        return f"needs at most {_MOST_ROWS} positions, got {rows}"
    if rows < _LEAST_ROWS[middle] * sms:
        return f"needs at least {_LEAST_ROWS[middle] * sms} positions to be worth it, got {rows}"
    return None


def configs(arch: int, sms: int, *args, **options) -> list[dict]:
    """The ways to run it; none where it declines."""
    if declines(arch, sms, *args, **options) is not None:
        return []
    following = 0 if options.get("next") is None else options["next"][0].shape[0]
    found = cuda_conv.chains_of(args[0].dtype, args[1].shape[0], following, options.get("segment") is not None)
    return [{"instance": c.name} for c in found]


def launch(
    config: dict,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    residual: Tensor | None = None,
    segment: tuple[Tensor, Tensor, int] | None = None,
    stride: int = 1,
    relu: bool = True,
    next: tuple[Tensor, Tensor] | None = None,
    quarter: bool = False,
    pool: bool = False,
    y: Tensor,
    z: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:
    """As triton_chain.launch. Weights and biases are not what the kernel before writes: see `cases.settle`."""
    weight3, bias3 = next or (None, None)
    x2, projection, stride2 = segment or (None, None, 1)
    found = cuda_conv.chains_of(
        x.dtype, weight1.shape[0], 0 if weight3 is None else weight3.shape[0], segment is not None
    )
    instances = [c for c in found if c.name == config["instance"]]
    if not instances:
        raise RuntimeError(f"this build has no chain {config['instance']!r} for {x.dtype}")
    torch.ops.fused_resnet_cuda.chain_out(
        instances[0].index, x, weight1, bias1, weight2, bias2, residual, x2, projection, stride2, weight3, bias3, relu,
        quarter, y, z, True,
    )  # fmt: skip
