"""The family of residual networks in plain PyTorch, written from the papers' figures: nothing of the package in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, kind: str, cin: int, planes: int, stride: int, pre: bool, shortcut: str | None, first: bool):
        super().__init__()
        # kernel, stride, channels out of each convolution
        if kind == "basic":
            shapes, cout = [(3, stride, planes), (3, 1, planes)], planes
        else:
            shapes, cout = [(1, 1, planes), (3, stride, planes), (1, 1, 4 * planes)], 4 * planes
        c = cin
        for i, (kernel, s, k) in enumerate(shapes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(c, k, kernel, s, kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(c if pre else k))
            c = k
        self.count, self.pre, self.first = len(shapes), pre, first
        self.cout, self.stride, self.shortcut = cout, stride, shortcut
        self.changes = stride != 1 or cin != cout
        if shortcut == "projection_all" or (shortcut == "projection" and self.changes):
            conv = nn.Conv2d(cin, cout, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv) if pre else nn.Sequential(conv, nn.BatchNorm2d(cout))

    def _carried(self, x: Tensor, activated: Tensor) -> Tensor | float:
        """What the shortcut adds."""
        if self.shortcut is None:
            return 0.0
        source = activated if self.pre else x
        if hasattr(self, "downsample"):
            return self.downsample(source)
        if self.changes:
            small = source[:, :, :: self.stride, :: self.stride]
            wide = torch.zeros(len(x), self.cout, *small.shape[2:], dtype=x.dtype, device=x.device)
            wide[:, : small.shape[1]] = small
            return wide
        return activated if self.pre and self.first else x

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x)) if self.pre else x
        out = activated
        for i in range(1, self.count + 1):
            conv, bn = self.get_submodule(f"conv{i}"), self.get_submodule(f"bn{i}")
            if self.pre:
                out = conv(out if i == 1 else F.relu(bn(out)))
            else:
                out = bn(conv(out))
                out = out if i == self.count else F.relu(out)
        out = out + self._carried(x, activated)
        return out if self.pre else F.relu(out)


class Network(nn.Module):
    """The networks for small images, or with a large stem those for large ones; shortcut None is the plain one."""

    def __init__(self, kind: str, n: int, pre: bool, shortcut: str | None, large: bool = False):
        super().__init__()
        self.pre, self.large = pre, large
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False) if large else nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        c = 16
        for stage in range(3):
            blocks = []
            for i in range(n):
                stride = 2 if stage and i == 0 else 1
                blocks.append(Block(kind, c, 16 * 2**stage, stride, pre, shortcut, stage == i == 0))
                c = blocks[-1].cout
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.bn1 = nn.BatchNorm2d(c if pre else 16)
        self.fc = nn.Linear(c, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x if self.pre else F.relu(self.bn1(x))
        x = F.max_pool2d(x, 3, 2, 1) if self.large else x
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.relu(self.bn1(x)) if self.pre else x
        return self.fc(x.mean((2, 3)))
