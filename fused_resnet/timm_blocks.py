"""The residual blocks of timm's ResNets, RegNets and ResNetV2, fused. Importing this imports timm: `swap_blocks` does
so where it is in use.

Beside what torchvision's blocks have, these may have an average pool in front of the projection (arXiv 1812.01187),
channel attention behind the last batch norm (arXiv 1709.01507, 1910.03151), stochastic depth (arXiv 1603.09382),
anti-aliasing (arXiv 1904.11486) and DropBlock (arXiv 1810.12890). All but the last stay modules in a fused block; as
long as DropBlock does anything, a block runs timm's own forward.
"""

from __future__ import annotations

import torch
from timm.layers import BatchNormAct2d, ConvNormAct, DropBlock2d, DropPath
from timm.models import regnet, resnetv2
from timm.models._features import FeatureDictNet, FeatureListNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, fx, nn

from .blocks import ACTIVATED, POOLS, Named, Side, convolution_unfusable, part, projection_unfusable, tampered
from .frozen import is_frozen
from .one_node import autocast_dtype
from .preact import NamedPreAct, Shortcut, numbered
from .stem import Stem, begins, collected, pooled_stem


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


class FusedTimmRegNetBottleneck(Named, regnet.Bottleneck):
    """timm's block of RegNets (1x1, 3x3 of groups, 1x1; Radosavovic et al., arXiv 2003.13678), fused.

    The constructor's arguments are timm's. forward: x [N, in_chs, H, W] -> [N, out_chs, H/stride, W/stride], any float
    dtype. Squeeze-and-excitation, in front of the last convolution, stays a module. memory, an attribute: as
    FusedBottleneck's.
    """

    parts = ("conv1.conv", "conv1.bn", "conv2.conv", "conv2.bn", "conv3.conv", "conv3.bn")
    activations = ("conv1.bn.act", "conv2.bn.act", "act3")
    in_place = False

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, fx.Proxy) and (lowered := autocast_dtype(x)) is not None:
            if self._widens(x, lowered):
                return self._unfused(x)
        return super().forward(x)

    def _widens(self, x: Tensor, lowered: torch.dtype) -> bool:
        """Whether timm's sum is of a wider dtype: that of a shortcut, or of a frozen batch norm's vectors."""
        side = self.side(self)
        norms = [part(self, name) for name in self.parts[1::2]]
        if isinstance(side, tuple):
            norms.append(side[-1])
        return (side is None and x.dtype is not lowered) or any(map(is_frozen, norms))

    @staticmethod
    def obstacle(block: nn.Module) -> str | None:
        for name in ("conv1", "conv2", "conv3"):
            if (reason := _layer_unfusable(block._modules.get(name))) is not None:
                return f"{name}: {reason}"
        own = block.downsample
        if own is None:
            return "downsample: there is no shortcut"
        side = FusedTimmRegNetBottleneck.side(block)
        reason = f"{type(own).__name__} is called as it is" if side is own else side and projection_unfusable(side)
        return reason and f"downsample: {reason}"

    @staticmethod
    def between(block: nn.Module) -> list[list[nn.Module]]:
        return [[], _at_work(block, "se")]

    @staticmethod
    def tail(block: nn.Module) -> list[nn.Module]:
        return _at_work(block, "drop_path")

    @staticmethod
    def side(block: nn.Module) -> Side:
        own = block.downsample
        if _layer_unfusable(own) is None:
            return own.conv, own.bn
        pooled = type(own) is nn.Sequential and len(own) == 2 and tampered(own) is None
        if pooled and type(own[0]) in POOLS and _layer_unfusable(own[1]) is None:
            return own[0], own[1].conv, own[1].bn
        return None if type(own) is nn.Identity and tampered(own) is None else own


class _FusedTimmPreAct(NamedPreAct):
    @staticmethod
    def parts(block: nn.Module) -> tuple[list[str], list[str], list[str]]:
        convolutions, norms = numbered(block, "conv", "norm")
        return convolutions, norms, [f"{name}.act" for name in norms]

    @staticmethod
    def side(block: nn.Module) -> Shortcut:
        own = block.downsample
        if own is None:
            return Shortcut()
        plain = type(own) is resnetv2.DownsampleConv and _idle(own.norm) and not (tampered(own) or tampered(own.norm))
        projection = own.conv if plain and convolution_unfusable(own.conv) is None else None
        return Shortcut((own,), projection, activated=True)

    @staticmethod
    def tail(block: nn.Module) -> list[nn.Module]:
        return _at_work(block, "drop_path")


# Absent from versions before 1.0.
_PreActBasic = getattr(resnetv2, "PreActBasic", resnetv2.PreActBottleneck)


class FusedTimmPreActBasic(_FusedTimmPreAct, _PreActBasic):
    """timm's PreActBasic (BN, ReLU, 3x3, twice; He et al., arXiv 1603.05027), fused where its norms are BatchNormAct2d.

    The constructor's arguments are timm's. forward: x [N, in_chs, H, W] -> [N, out_chs, H/stride, W/stride], any float
    dtype. memory, an attribute: as FusedBasicBlock's.
    """


class FusedTimmPreActBottleneck(_FusedTimmPreAct, resnetv2.PreActBottleneck):
    """timm's PreActBottleneck (BN, ReLU and 1x1, 3x3 with the stride, 1x1), fused where its norms are BatchNormAct2d.

    The constructor's arguments are timm's. forward: x [N, in_chs, H, W] -> [N, out_chs, H/stride, W/stride], any float
    dtype. memory, an attribute: as FusedBottleneck's.
    """


class FusedTimmResNet(ResNet):
    """timm's ResNet with its stem fused; `swap_blocks` makes one of it, in place."""

    def forward_features(self, x: Tensor) -> Tensor:
        stem = None if self.grad_checkpointing else pooled_stem(self, x, _stem(self))
        if stem is None:
            return super().forward_features(x)
        return self.layer4(self.layer3(self.layer2(self.layer1(stem))))


class _FusedFeatures:
    """What timm makes of a ResNet for `features_only=True`, its stem fused; `swap_blocks` makes one of it, in place."""

    def _collect(self, x: Tensor) -> dict[str, Tensor]:
        found = None if getattr(self, "grad_checkpointing", False) else collected(self, x, _stem(self))
        if found is None:
            return super()._collect(x)
        return {  # as timm has it of a layer that gives several
            name: (torch.cat(y, 1) if self.concat else y[0]) if isinstance(y, (tuple, list)) else y
            for name, y in found.items()
        }

    @staticmethod
    def takes(network: nn.Module) -> bool:
        return begins(network, _STEM) and type(network._modules.get("layer1")) is nn.Sequential


class FusedFeatureDictNet(_FusedFeatures, FeatureDictNet):
    __doc__ = _FusedFeatures.__doc__


class FusedFeatureListNet(_FusedFeatures, FeatureListNet):
    __doc__ = _FusedFeatures.__doc__


def _stem(network: nn.Module) -> Stem:
    return _DEEP_STEM if type(network._modules.get("conv1")) is nn.Sequential else _STEM


_STEM = Stem(relu="act1")
_DEEP_STEM = Stem(
    "conv1.6",
    "bn1",
    "act1",
    before=(("conv1.0", "conv1.1", "conv1.2"), ("conv1.3", "conv1.4", "conv1.5")),
    around=(("conv1", nn.Sequential, tuple("0123456")),),
)
_RANDOM = (DropBlock2d, DropPath)
FUSED = {
    BasicBlock: FusedTimmBasicBlock,
    Bottleneck: FusedTimmBottleneck,
    regnet.Bottleneck: FusedTimmRegNetBottleneck,
    _PreActBasic: FusedTimmPreActBasic,
    resnetv2.PreActBottleneck: FusedTimmPreActBottleneck,
}
NETWORKS = {ResNet: FusedTimmResNet, FeatureListNet: FusedFeatureListNet, FeatureDictNet: FusedFeatureDictNet}
ACTIVATED.add(BatchNormAct2d)


def _at_work(block: nn.Module, *names: str) -> list[nn.Module]:
    """Those of these modules that a block has to call."""
    modules = map(block._modules.get, names)
    return [m for m in modules if m is not None and (not _idle(m) or tampered(m))]


def _layer_unfusable(layer: nn.Module | None) -> str | None:
    """Why this is not a convolution and a batch norm, one behind the other."""
    if type(layer) is not ConvNormAct:
        return f"{type(layer).__name__} is not ConvNormAct"
    if (aa := layer._modules.get("aa")) is not None:
        return f"aa: {type(aa).__name__} stands behind the batch norm"
    return tampered(layer)


def _idle(module: nn.Module) -> bool:
    """Whether this module hands on what it is given, in the mode that it is in."""
    if type(module) in _RANDOM:
        return not module.training or not module.drop_prob
    return type(module) is nn.Identity
