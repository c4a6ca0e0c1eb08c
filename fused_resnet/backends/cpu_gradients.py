"""Gradients of a convolution on a CPU, in channels_last, as matrix products.

oneDNN's weight gradients of channels_last convolutions are slower than its forward, and so are both gradients of 1x1
ones; the BLAS behind torch.mm does not care which operand is transposed. A 1x1 convolution is a product of rows; for
the weight gradient of a larger one a's windows are written out, a few images at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import aten
from .layout import is_channels_last, with_strides_of
from .reference import rows_of

WINDOW_ELEMENTS = 2**20  # of the windows written out at once: what the product then reads lies in a cache
LEAST_CHANNELS = 128  # of a, for windows: with fewer, writing them costs more than the product gains


def conv_gradients(grad, a, weight, stride, padding, dilation, groups, output_mask):
    """(da, dweight) of y = conv(a, weight) for grad: [N, K, P, Q]; None where output_mask is off."""
    need_a, need_weight = output_mask
    laid_out = is_channels_last(a) and is_channels_last(grad)
    if groups != 1 or not laid_out or a.dtype not in (torch.float32, torch.float64):
        return aten.conv_gradients(grad, a, weight, stride, padding, dilation, groups, output_mask)
    pointwise = weight.shape[2:] == (1, 1) and not any(padding)
    da = dweight = None
    if need_weight:
        if pointwise:
            product = torch.mm(rows_of(grad, (1, 1)).t(), rows_of(a, stride)).view(weight.shape)
        elif a.shape[1] >= LEAST_CHANNELS:
            product = _by_windows(grad, a, weight, stride, padding, dilation)
        else:
            _, product = aten.conv_gradients(grad, a, weight, stride, padding, dilation, groups, [False, True])
        dweight = with_strides_of(weight, product)
    if need_a:
        if pointwise:
            da = spread(torch.mm(rows_of(grad, (1, 1)), weight.flatten(1)), a.shape, stride)
        else:
            da, _ = aten.conv_gradients(grad, a, weight, stride, padding, dilation, groups, [True, False])
    return da, dweight


def _by_windows(grad, a, weight, stride, padding, dilation) -> Tensor:
    """dweight: [K, C, R, S], channels_last."""
    n, c, h, w = a.shape
    k, _, r, s = weight.shape
    p, q = grad.shape[2:]
    rows = a.permute(0, 2, 3, 1)
    if any(padding):
        rows = a.new_zeros(n, h + 2 * padding[0], w + 2 * padding[1], c)
        rows[:, padding[0] : padding[0] + h, padding[1] : padding[1] + w] = a.permute(0, 2, 3, 1)
    image, line, column, channel = rows.stride()
    steps = (image, line * stride[0], column * stride[1], line * dilation[0], column * dilation[1], channel)
    at_once = max(1, WINDOW_ELEMENTS // (p * q * r * s * c))
    product = None
    for some, g in zip(rows.split(at_once), grad.permute(0, 2, 3, 1).split(at_once), strict=True):
        windows = some.as_strided((len(some), p, q, r, s, c), steps, some.storage_offset()).reshape(-1, r * s * c)
        g = g.reshape(-1, k).t()
        product = torch.mm(g, windows) if product is None else product.addmm_(g, windows)
    return product.view(k, r, s, c).permute(0, 3, 1, 2)


def spread(rows: Tensor, shape, stride) -> Tensor:
    """Rows [M, C] of every stride-th position as channels_last maps [N, C, H, W], zero in between."""
    n, c, h, w = shape
    maps = rows.reshape(n, -(-h // stride[0]), -(-w // stride[1]), c).permute(0, 3, 1, 2)
    if max(stride) == 1:
        return maps
    filled = rows.new_zeros(n, h, w, c).permute(0, 3, 1, 2)
    filled[:, :, :: stride[0], :: stride[1]] = maps
    return filled
