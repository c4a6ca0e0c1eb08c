"""Block by block, on the shapes that ResNet-18 and ResNet-50 give them: with and without projection, with stride 2."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from fused_resnet import measure

# block, input channels, planes, stride, map size as a fraction of the image's
BLOCKS = {
    "basic": (BasicBlock, 64, 64, 1, 4),
    "basic-projection-stride2": (BasicBlock, 64, 128, 2, 4),
    "bottleneck": (Bottleneck, 256, 64, 1, 4),
    "bottleneck-projection": (Bottleneck, 64, 64, 1, 4),
    "bottleneck-projection-stride2": (Bottleneck, 256, 128, 2, 4),
    "bottleneck-deep": (Bottleneck, 1024, 256, 1, 16),
}


def build(block: str, firm: bool) -> nn.Module:
    """The block with calibrated BNs, always the same numbers."""
    kind, channels, planes, stride, _ = BLOCKS[block]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        projection = None
        if stride != 1 or channels != planes * kind.expansion:
            projection = nn.Sequential(
                conv1x1(channels, planes * kind.expansion, stride), nn.BatchNorm2d(planes * kind.expansion)
            )
        module = kind(channels, planes, stride, projection)
        return measure.calibrate(module, torch.randn(4, channels, 14, 14), firm=firm).eval()


@pytest.mark.parametrize("block", BLOCKS)
def test_block(compare, request, block, dtype, mode, batch, variant):
    _, channels, _, _, fraction = BLOCKS[block]
    size = max(2, request.config.getoption("--size") // fraction)
    compare(block, build(block, mode == "train"), (batch, channels, size, size), variant, mode, dtype)
