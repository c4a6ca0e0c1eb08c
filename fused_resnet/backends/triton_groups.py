"""Groups of a convolution as the Triton kernels of the training ops take them: some at a time, as one product."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import tiles
from .verify import tf32_allowed

try:
    from ..kernels import bn_act_conv as _conv
except ImportError:  # backends/triton.py says so
    pass


FEWEST = 16  # channels on either side of a product: what a tensor core's instruction takes at once


def declines_groups(x: Tensor, weight: Tensor, groups: int) -> str | None:
    """Why a grouped convolution of x cannot run, as the rest of a sentence; None where it can."""
    _, c, k = bundle_of(weight, groups)
    if groups > 1 and min(c, k) < FEWEST:
        return f"needs groups that fill {FEWEST} input and output channels, got bundles of {c} and {k}"
    if groups > 1 and x.dtype is torch.float32 and not tf32_allowed():
        # Zeros off the diagonal would cost several times the convolution.
        return f"needs 16 bits, or TF32 allowed, for {groups} groups"
    return None


def bundle_of(weight: Tensor, groups: int, **width) -> tiles.Bundle:
    """The groups that are one product, of a weight [K, C / groups, R, S]; one group has no others beside it."""
    return tiles.bundle(groups, weight.shape[1], weight.shape[0] // groups, **width)


def bundled(launch, weight: Tensor, groups: int) -> Tensor:
    """weight: [K, C / groups, R, S], channels_last, as the product of its bundles reads it."""
    k, c, r, s = weight.shape
    size = bundle_of(weight, groups).size
    if size == 1:
        return weight
    wide = torch.empty((k, size * c, r, s), dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)
    block = min(1024, tiles.power_of_2(r * s * size * c))
    launch(
        _conv._bundle_weight_kernel,
        (k, tiles.ceil_div(r * s * size * c, block)),
        weight,
        wide,
        K_GROUP=k // groups,
        C=c,
        TAPS=r * s,
        BUNDLE=size,
        BLOCK=block,
    )
    return wide


def bundle_constants(bundle: tiles.Bundle, groups: int) -> dict:
    """What the kernels are specialised on; without groups nothing is offset."""
    return {"BUNDLE_C": bundle.c if groups > 1 else 0, "BUNDLE_K": bundle.k if groups > 1 else 0}
