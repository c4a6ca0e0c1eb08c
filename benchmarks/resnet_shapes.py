"""The convolutions of torchvision's ResNets."""

from __future__ import annotations

from collections import Counter

import torch
import torchvision


def resnet_shapes(models=("resnet50", "resnet18")) -> list[tuple[tuple, int]]:
    """((C, K, kernel, stride, padding, maps), how often it occurs) of every different convolution at 224x224."""
    found: Counter = Counter()

    def note(conv, inputs, output):
        key = (conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.padding[0])
        found[(*key, inputs[0].shape[2])] += 1

    for name in models:
        with torch.device("meta"):
            model, x = torchvision.models.get_model(name).eval(), torch.empty(1, 3, 224, 224)
        for m in model.modules():
            if isinstance(m, torch.nn.Conv2d):
                m.register_forward_hook(note)
        model(x)
    return found.most_common()
