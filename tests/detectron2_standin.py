"""What of detectron2 its residual blocks are made of, for where it is not installed (no package index has it).

Written anew after its interface: a convolution that calls its norm, blocks of such convolutions, and a batch norm that
is frozen. `imported()` gives detectron2 itself where there is one.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class Conv2d(nn.Conv2d):
    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x):
        if not torch.jit.is_scripting():
            with warnings.catch_warnings(record=True):
                if x.numel() == 0 and self.training:
                    raise AssertionError("an empty batch")
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0 - eps)):
            self.register_buffer(name, torch.full((num_features,), value))
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x):
        if not x.requires_grad:
            tensors = self.running_mean, self.running_var, self.weight, self.bias
            return F.batch_norm(x, *tensors, training=False, eps=self.eps)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1).to(x.dtype) + shift.view(1, -1, 1, 1).to(x.dtype)


_NORMS = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm, "FrozenBN": FrozenBatchNorm2d}


def _norm(norm, channels):
    return (_NORMS[norm] if isinstance(norm, str) else norm)(channels)


class _Block(nn.Module):
    def __init__(self, sizes, in_channels, stride, norm, dilation=1):
        """sizes: (channels in, channels out, kernel size, stride, groups) of each convolution."""
        super().__init__()
        self.in_channels, self.out_channels, self.stride = in_channels, sizes[-1][1], stride
        self.shortcut = None
        if in_channels != self.out_channels:
            norms = _norm(norm, self.out_channels)
            self.shortcut = Conv2d(in_channels, self.out_channels, 1, stride=stride, bias=False, norm=norms)
        for i, (inputs, outputs, kernel, step, split) in enumerate(sizes, 1):
            spread = dilation if kernel == 3 else 1
            options = {"stride": step, "padding": spread * (kernel // 2), "dilation": spread, "groups": split}
            conv = Conv2d(inputs, outputs, kernel, bias=False, norm=_norm(norm, outputs), **options)
            self.add_module(f"conv{i}", conv)

    def freeze(self):
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(module.num_features, module.eps)
                frozen.load_state_dict(module.state_dict(), strict=False)
                self.get_submodule(name.rpartition(".")[0]).norm = frozen
        self.requires_grad_(False)
        return self


class BasicBlock(_Block):
    def __init__(self, in_channels, out_channels, *, stride=1, norm="BN"):
        sizes = (in_channels, out_channels, 3, stride, 1), (out_channels, out_channels, 3, 1, 1)
        super().__init__(sizes, in_channels, stride, norm)

    def forward(self, x):
        out = self.conv2(F.relu_(self.conv1(x)))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class BottleneckBlock(_Block):
    def __init__(
        self, in_channels, out_channels, *, bottleneck_channels, stride=1, num_groups=1, norm="BN",
        stride_in_1x1=False, dilation=1,
    ):  # fmt: skip
        width, first = bottleneck_channels, stride if stride_in_1x1 else 1
        second = 1 if stride_in_1x1 else stride
        sizes = (in_channels, width, 1, first, 1), (width, width, 3, second, num_groups), (width, out_channels, 1, 1, 1)
        super().__init__(sizes, in_channels, stride, norm, dilation=dilation)

    def forward(self, x):
        out = self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class BasicStem(nn.Module):
    def __init__(self, in_channels=3, out_channels=64, norm="BN"):
        super().__init__()
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, 4
        options = {"stride": 2, "padding": 3, "bias": False, "norm": _norm(norm, out_channels)}
        self.conv1 = Conv2d(in_channels, out_channels, 7, **options)

    def forward(self, x):
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


def imported() -> types.ModuleType:
    """The module detectron2.modeling.backbone.resnet; one with the classes above where there is no detectron2."""
    name = "detectron2.modeling.backbone.resnet"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        sys.modules[".".join(parts[:i])] = types.ModuleType(".".join(parts[:i]))
    layers = sys.modules["detectron2.layers"] = types.ModuleType("detectron2.layers")
    layers.Conv2d, layers.FrozenBatchNorm2d = Conv2d, FrozenBatchNorm2d
    resnet = sys.modules[name]
    for kind in (Conv2d, BasicStem, BasicBlock, BottleneckBlock):
        setattr(resnet, kind.__name__, kind)
    return resnet
