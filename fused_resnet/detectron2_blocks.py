"""The residual blocks of detectron2's ResNets, fused. Importing this imports detectron2: `swap_blocks` does so where it
is in use.

There a convolution calls the batch norm behind it. Blocks with another norm (GroupNorm, LayerNorm), or with deformable
convolutions, run detectron2's own forward.
"""

from __future__ import annotations

from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import nn

from .blocks import NORMED, Joined, Named, Side, projection_unfusable


class _FusedDetectron2(Named):
    joined = True
    activations = ()

    @staticmethod
    def last(block: nn.Module):
        return nn.functional.relu

    @staticmethod
    def side(block: nn.Module) -> Side:
        own = block.shortcut
        if type(own) is not Conv2d or own.norm is None:
            return own
        pair = Joined((own, own.norm))
        return own if projection_unfusable(pair) else pair


class FusedDetectron2BasicBlock(_FusedDetectron2, BasicBlock):
    """detectron2's BasicBlock (two 3x3 convolutions; He et al., arXiv 1512.03385, figure 5 left), fused.

    The constructor's arguments are detectron2's. forward: x [N, in_channels, H, W] -> [N, out_channels, H/stride,
    W/stride], any float dtype. memory, an attribute: as FusedBasicBlock's.
    """

    parts = ("conv1", "conv1.norm", "conv2", "conv2.norm")


class FusedDetectron2BottleneckBlock(_FusedDetectron2, BottleneckBlock):
    """detectron2's BottleneckBlock (1x1, 3x3, 1x1, the stride in the first or the second), fused.

    The constructor's arguments are detectron2's. forward: x [N, in_channels, H, W] -> [N, out_channels, H/stride,
    W/stride], any float dtype. memory, an attribute: as FusedBottleneck's.
    """

    parts = ("conv1", "conv1.norm", "conv2", "conv2.norm", "conv3", "conv3.norm")


FUSED = {BasicBlock: FusedDetectron2BasicBlock, BottleneckBlock: FusedDetectron2BottleneckBlock}
NORMED.add(Conv2d)
