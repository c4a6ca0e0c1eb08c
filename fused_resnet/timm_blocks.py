"""The residual blocks of timm's ResNets, fused. Importing this imports timm: `swap_blocks` does so where it is in use.

Beside what torchvision's blocks have, these may have an average pool in front of the projection (arXiv 1812.01187),
channel attention behind the last batch norm (arXiv 1709.01507, 1910.03151), stochastic depth (arXiv 1603.09382),
anti-aliasing (arXiv 1904.11486) and DropBlock (arXiv 1810.12890). All but the last stay modules in a fused block; as
long as DropBlock does anything, a block runs timm's own forward.
"""

from __future__ import annotations

from timm.layers import DropBlock2d, DropPath
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .blocks import Named, tampered
from .stem import pooled_stem


class _FusedTimm(Named):
    @staticmethod
    def obstacle(block: nn.Module) -> str | None:
        module = block._modules.get("drop_block")
        if module is None:
            return None
        # What drops at random does nothing in eval mode, where a block that is swapped can be fused.
        later = type(module) in _RANDOM and not isinstance(block, Named)
        if not (_idle(module) or later):
            return f"drop_block: {type(module).__name__} stands between a batch norm and its ReLU"
        reason = tampered(module)
        return reason and f"drop_block: {reason}"

    @staticmethod
    def between(block: nn.Module) -> list[list[nn.Module]]:
        return [[] for _ in block.parts[4::2]] + [_at_work(block, "aa")]

    @staticmethod
    def tail(block: nn.Module) -> list[nn.Module]:
        return _at_work(block, "se", "drop_path")


class FusedTimmBasicBlock(_FusedTimm, BasicBlock):
    """timm's BasicBlock (two 3x3 convolutions; He et al., arXiv 1512.03385, figure 5 left), fused.

    The constructor's arguments are timm's. forward: x [N, inplanes, H, W] -> [N, planes, H/stride, W/stride], any float
    dtype. memory, an attribute: as FusedBasicBlock's.
    """

    parts = ("conv1", "bn1", "conv2", "bn2")
    activations = ("act1", "act2")


class FusedTimmBottleneck(_FusedTimm, Bottleneck):
    """timm's Bottleneck (1x1, 3x3 with the stride, 1x1), fused.

    The constructor's arguments are timm's. forward: x [N, inplanes, H, W] -> [N, 4 * planes, H/stride, W/stride], any
    float dtype. memory, an attribute: as FusedBottleneck's.
    """

    parts = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")
    activations = ("act1", "act2", "act3")


class FusedTimmResNet(ResNet):
    """timm's ResNet with its stem fused while it trains; `swap_blocks` makes one of it, in place."""

    def forward_features(self, x: Tensor) -> Tensor:
        stem = None if self.grad_checkpointing else pooled_stem(self, x, "act1")
        if stem is None:
            return super().forward_features(x)
        return self.layer4(self.layer3(self.layer2(self.layer1(stem))))


_RANDOM = (DropBlock2d, DropPath)
FUSED = {BasicBlock: FusedTimmBasicBlock, Bottleneck: FusedTimmBottleneck}
NETWORKS = {ResNet: FusedTimmResNet}


def _at_work(block: nn.Module, *names: str) -> list[nn.Module]:
    """Those of these modules that a block has to call."""
    modules = map(block._modules.get, names)
    return [m for m in modules if m is not None and (not _idle(m) or tampered(m))]


def _idle(module: nn.Module) -> bool:
    """Whether this module hands on what it is given, in the mode that it is in."""
    if type(module) in _RANDOM:
        return not module.training or not module.drop_prob
    return type(module) is nn.Identity
