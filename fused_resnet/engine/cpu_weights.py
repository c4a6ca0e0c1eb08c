"""Folded weights as the CPU's kernels read them (csrc/cpu/engine): panels of columns, for Winograd transformed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

POINTS = {
    2: (0.0, 1.0, -1.0),
    4: (0.0, 0.75, -0.75, 1.5, -1.5),
}  # as in csrc/cpu/engine/winograd.h; infinity is the last


def panels(matrix: Tensor, columns: int) -> Tensor:
    """[K, k] -> [ceil(K / columns), k, columns], zero-padded, float32."""
    k_out, k = matrix.shape
    full, rest = divmod(k_out, columns)
    out = torch.empty(full + bool(rest), k, columns, dtype=torch.float32, device="cpu")
    out[:full] = matrix[: full * columns].view(full, columns, k).transpose(1, 2)
    if rest:
        out[full].zero_()
        out[full, :, :rest] = matrix[full * columns :].T
    return out


def padded(bias: Tensor, columns: int) -> Tensor:
    """[K] -> [K rounded up to a multiple of columns], zero-padded, float32."""
    out = bias.new_zeros(-(-bias.numel() // columns) * columns, dtype=torch.float32)
    out[: bias.numel()] = bias
    return out


def matrix(weight: Tensor, channels_last: bool = True) -> Tensor:
    """[K, C, R, S] -> [K, R * S * C], or [K, C * R * S]."""
    return (weight.permute(0, 2, 3, 1) if channels_last else weight).reshape(weight.shape[0], -1)


def grouped(weight: Tensor, unit: int, width: int) -> Tensor:
    """[K, C / groups, R, S] -> [ceil(K / unit) * ceil(unit / width), R, C / groups, S, width]: `unit` outputs next to
    each other fill whole vectors, zero-padded, float32."""
    units, vectors = -(-len(weight) // unit), -(-unit // width)
    padded = weight.new_zeros(units, vectors * width, *weight.shape[1:], dtype=torch.float32)
    for i, part in enumerate(weight.split(unit)):
        padded[i, : len(part)] = part
    return padded.view(-1, width, *weight.shape[1:]).permute(0, 3, 2, 4, 1).contiguous()


def filter_transform(m: int) -> Tensor:
    """G, [m + 2, 3] float64: F(m x m, 3 x 3) over POINTS[m] (Lavin and Gray, arXiv 1509.09308)."""
    points = POINTS[m]
    rows = []
    for i, p in enumerate(points):
        scale = math.prod(p - q for j, q in enumerate(points) if j != i)
        rows.append([1 / scale, p / scale, p * p / scale])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64, device="cpu")


def winograd(weight: Tensor, m: int, columns: int) -> Tensor:
    """[K, C, 3, 3] -> [(m + 2)^2, ceil(K / columns), C, columns]: G g G' of each filter, in float64, cast once."""
    g = filter_transform(m)
    both = torch.kron(g, g)  # [(m + 2)^2, 9]: G g G' of a filter as one product
    k, c = weight.shape[:2]
    count = -(-k // columns)
    out = torch.zeros(both.shape[0], count, c, columns, dtype=torch.float32, device="cpu")
    for i, some in enumerate(
        weight.split(columns)
    ):  # a panel at a time: in float64 all of it would be 72 times a filter
        transformed = both @ some.double().reshape(-1, 9).T
        out[:, i, :, : len(some)] = transformed.view(-1, len(some), c).transpose(1, 2)
    return out
