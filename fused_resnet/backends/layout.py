"""Memory layout: one rule for the output of every op, the same in every backend and in the fakes.

An output is channels_last if one of the tensors that decide is *unambiguously* channels_last, else contiguous. A tensor
of one channel, or of 1x1 maps, is contiguous and channels_last at once and decides nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(t: Tensor) -> bool:
    """True for a 4-D tensor that is channels_last and not contiguous as well."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def output_format(*tensors: Tensor) -> torch.memory_format:
    """The memory format of an output that these tensors decide."""
    return torch.channels_last if any(is_channels_last(t) for t in tensors) else torch.contiguous_format


def conv_output_size(x: Tensor, weight: Tensor, stride, padding, dilation) -> list[int]:
    """[N, K, P, Q] of a 2-D convolution of x: [N, C, H, W] with weight: [K, C/groups, R, S]."""
    return [x.shape[0], weight.shape[0], *conv_map_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)]


def conv_map_size(size, kernel, stride, padding, dilation) -> list[int]:
    """[P, Q] for maps of size (H, W); all of them pairs."""
    return [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]


def as_channels(v: Tensor) -> Tensor:
    """A per-channel vector [C] as [1, C, 1, 1], to broadcast over x: [N, C, H, W]."""
    return v.view(1, -1, 1, 1)


def as_rows(t: Tensor | None) -> Tensor | None:
    """t dense and channels_last, as the compiled kernels read it: a matrix [N*H*W, C]."""
    return t if t is None else t.contiguous(memory_format=torch.channels_last)


def as_float32_vectors(*tensors: Tensor | None) -> list[Tensor | None]:
    """Per-channel vectors as the compiled kernels read them."""
    return [t if t is None else t.contiguous() for t in in_dtypes(tensors, [torch.float32] * len(tensors))]


def in_dtypes(tensors, dtypes, together: bool = True) -> list[Tensor | None]:
    """Each in its dtype. together: those that have to be converted take one kernel, of which autograd knows nothing."""
    found = list(tensors)
    other = [i for i, (t, dtype) in enumerate(zip(tensors, dtypes, strict=True)) if t is not None and t.dtype != dtype]
    if len(other) < 2 or not together:
        for i in other:
            found[i] = tensors[i].to(dtypes[i])
    else:
        for i in other:
            found[i] = torch.empty_like(tensors[i], dtype=dtypes[i], requires_grad=False)
        torch._foreach_copy_([found[i] for i in other], [tensors[i] for i in other])
    return found


def with_strides_of(like: Tensor, t: Tensor) -> Tensor:
    """t in another's dtype and strides: the gradient of a weight lies in memory as the weight (DDP's contract)."""
    kept = torch.empty_like(like, requires_grad=False)
    return t if t.dtype is kept.dtype and t.stride() == kept.stride() else kept.copy_(t)
