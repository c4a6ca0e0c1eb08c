"""Arguments of the ops of training, for gpu-check: convolutions between batch norms of the batch's own statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet import measure
from fused_resnet.backends import reference

# name: (N, C, H, W, K, kernel, stride, padding, batch norm while loading); odd maps make ragged tiles
CONVOLUTIONS = {
    "3x3": (2, 64, 7, 9, 64, 3, 1, 1, True),
    "1x1": (3, 64, 7, 9, 96, 1, 1, 0, True),
    "3x3-stride2": (2, 32, 15, 13, 64, 3, 2, 1, True),
    "3x3-72-channels": (2, 72, 7, 9, 72, 3, 1, 1, True),
    "raw-1x1": (3, 96, 7, 9, 32, 1, 1, 0, False),
}
CONVOLUTIONS_OF_A_RESNET = {
    "layer1-3x3": (32, 64, 56, 56, 64, 3, 1, 1, True),
    "layer1-raw-1x1": (32, 256, 56, 56, 64, 1, 1, 0, False),
    "layer3-3x3-stride2": (32, 256, 28, 28, 256, 3, 2, 1, True),
}
# The same; what is not loaded through a batch norm is a projection, without residual and ReLU.
POINTWISE = {
    "expand": (2, 64, 7, 9, 256, 1, 1, 0, True),
    "expand-72-channels": (3, 72, 5, 7, 144, 1, 1, 0, True),
    "projection": (2, 64, 9, 7, 256, 1, 2, 0, False),
}
POINTWISE_OF_A_RESNET = {
    "layer1-expand": (32, 64, 56, 56, 256, 1, 1, 0, True),
    "layer4-expand": (32, 512, 7, 7, 2048, 1, 1, 0, True),
}


def specs(op: str, on_gpu: bool) -> dict[str, tuple]:
    if op.startswith("pointwise"):
        return POINTWISE | (POINTWISE_OF_A_RESNET if on_gpu else {})
    return CONVOLUTIONS | (CONVOLUTIONS_OF_A_RESNET if on_gpu else {})


def arguments(op: str, spec, device, dtype: torch.dtype, format: torch.memory_format) -> tuple:
    n, c, h, w, k, kernel, stride, padding, normalised = spec

    def maps(shape, seed: int) -> Tensor:
        return measure.random_input(shape, seed, device, dtype).contiguous(memory_format=format)

    def affine(channels: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(channels)
        weight, bias = (torch.rand(channels, generator=g).to(device) for _ in range(2))
        return weight + 0.5, bias - 0.5

    x = maps((n, c, h, w), 1)
    weight = (maps((k, c, kernel, kernel), 2).float() / (c * kernel * kernel) ** 0.5).to(dtype)
    weight = weight.contiguous(memory_format=format)
    loaded = (*(reference.bn_stats(x) if normalised else (None, None)), *(affine(c) if normalised else (None, None)))
    loaded = (*loaded, 1e-5, True)
    places = ([stride] * 2, [padding] * 2, [1, 1], 1)
    if op == "bn_act_conv":
        return x, weight, *loaded, *places, True
    shape = (n, k, *((size + 2 * padding - kernel) // stride + 1 for size in (h, w)))
    grad = maps(shape, 3)
    if op == "bn_act_conv_bwd":
        return grad, x, weight, *loaded, *places, [True, True, normalised, normalised]
    out_weight, out_bias = affine(k)
    residual = maps(shape, 4) if normalised else None
    forward = (x, weight, *loaded, out_weight, out_bias, 1e-5, residual, [stride] * 2, normalised)
    if op == "pointwise_bn_act":
        return forward
    y, y_mean, y_var, a_mean, a_cov = reference.pointwise_bn_act(*forward)
    mask = [True, True, normalised, normalised, True, True, normalised]
    statistics = (out_weight, y_mean, y_var, 1e-5, a_mean, a_cov)
    return grad, y if normalised else None, x, weight, *loaded, *statistics, [stride] * 2, normalised, mask
