"""swap_blocks, restore_blocks, swap_report: the residual blocks in a model become fused ones, in place.

Those of torchvision; timm's and detectron2's, where these have been imported, as they have been where a model has their
blocks; and those of any class whose forward, traced, is that of such a block (traced_blocks.py).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import sys
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from . import blocks, preact, stem, traced_blocks
from .blocks import NORMED, Fused, FusedBasicBlock, FusedBottleneck, Named, part, projection_unfusable, stateless
from .preact import NamedPreAct, PreAct
from .residual_network import ResidualNetwork
from .training import check_memory

FUSED = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck}
_FORWARDS = {"forward", "_forward_impl", "forward_features", "_collect"}
_FORMER = "_memory_format_before_swap"
_FORMATS = (torch.contiguous_format, torch.channels_last)


@dataclass(frozen=True)
class BlockReport:
    """One residual block: its name in the model ('' for the model itself), its class, and what became of it.

    status: 'fused', 'fusable' (swap_blocks would swap it) or 'left'. reason: why it is left, or why a fused block runs
    torchvision's forward at present; '' otherwise. note: what inside a fused block stays as it is.
    """

    name: str
    type: str
    status: str
    reason: str = ""
    note: str = ""


@dataclass(frozen=True)
class SwapReport:
    """What `swap_report` found; `str()` of it is a table for people."""

    blocks: tuple[BlockReport, ...]

    @property
    def fused(self) -> tuple[BlockReport, ...]:
        """The blocks that are fused ones."""
        return tuple(b for b in self.blocks if b.status == "fused")

    @property
    def left(self) -> tuple[BlockReport, ...]:
        """The blocks that stay what they were, each with its reason."""
        return tuple(b for b in self.blocks if b.status == "left")

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.blocks)} residual blocks fused"]
        width = max((len(b.name) for b in self.blocks), default=0)
        for b in self.blocks:
            lines.append(
                f"  {b.name:<{width}}  {b.type:<16}  {'; '.join(t for t in (b.status, b.reason, b.note) if t)}"
            )
        return "\n".join(lines)


def swap_blocks(
    model: nn.Module,
    *,
    memory_format: torch.memory_format = torch.channels_last,
    memory: str | None = None,
) -> nn.Module:
    """Turn every residual block inside `model` into its fused twin, in place; and the ResNets of torchvision and timm,
    the bodies of torchvision's detectors and segmentation models, timm's feature extractors, detectron2's BasicStem and
    the embeddings of Hugging Face's ResNets into ones whose stem is fused.

    model: any module tree (a ResNet, a detector or segmenter with a ResNet in it, a block). Blocks are torchvision's
    and timm's BasicBlock and Bottleneck, those of timm's RegNets and ResNetV2, detectron2's BasicBlock and
    BottleneckBlock, and those of any other class whose forward, traced by `torch.fx`, is relu(chain(x) + shortcut(x)),
    the chain being convolution, batch norm and ReLU in turns, or chain(x) + shortcut(x), pre-activation, the chain
    being batch norm, ReLU and convolution in turns: OpenMMLab's and Hugging Face's ResNets, RegNets, Wide ResNets, your
    own. A block stays an instance of its class; one whose forward does anything beside is left alone. Parameters,
    buffers, hooks of the blocks, training mode and state_dict keys stay what they are; checkpoints load both ways. A
    block that cannot be fused without changing what it computes is left alone; `swap_report(model)` tells which and
    why. torch.jit.script and vmap know no fused block.

    memory_format: layout given to the weights of all the model's convolutions if a block is swapped (as
    `model.to(memory_format=...)` would; the stem's decides what the first block reads). The default, channels_last, is
    the layout in which the fused kernels read and write, and activations and gradients follow it. Values and shapes
    stay, but `.view()` on such a tensor may need `.reshape()`; torch.preserve_format leaves every layout alone. Use it
    where an optimizer with fused=True holds state already, or loads some: it combines state and weight by their places
    in memory, whatever their layouts (as after `model.to(memory_format=...)`, too).

    memory: what the fused blocks of the model, pre-activation ones and those of earlier calls included, keep for the
    backward while they train. "default": raw results of convolutions, without those that can be done without; "lean": a
    block's input and output alone, the convolutions run again in the backward. None, the default, changes nothing.

    Returns the same model. Warns if there is no fused block in it then, and of convolutions whose bias a batch norm
    makes useless (it trains to nothing, and has a gradient of zero). Raises TypeError if model is not a module,
    ValueError for another memory_format or memory.
    """
    if memory_format not in (*_FORMATS, torch.preserve_format):
        raise ValueError(
            "memory_format: expected torch.channels_last, torch.contiguous_format or torch.preserve_format, "
            f"got {memory_format}"
        )
    if memory is not None:
        check_memory(memory)
    found = _found(_module(model))
    shared = _shared_convolutions(found)
    _warn_of_biases(found)
    swapped = False
    for network in model.modules():
        if isinstance(network, ResidualNetwork):
            network.fused = True
    for each in found:
        _, block, anatomy = each
        if isinstance(block, (Fused, PreAct)) or _why_left(each, shared) is not None:
            continue
        if isinstance(anatomy, type):
            block.__class__ = anatomy
        else:
            traced_blocks.swap(block, anatomy)
        swapped = True
    if swapped and memory_format is not torch.preserve_format:
        for conv in (m for m in model.modules() if type(m) in (nn.Conv2d, *NORMED)):
            former = _lay_out(conv, memory_format)
            if former is not None:
                conv.__dict__.setdefault(_FORMER, str(former))  # torch.save cannot write a memory format
    fused = [block for block in model.modules() if isinstance(block, (Fused, PreAct))]
    _fuse_stems(model)
    if memory is not None:
        for block in fused:
            block.memory = memory
    if not fused:
        warnings.warn(_nothing_to_fuse([_report(each, shared) for each in found]), stacklevel=2)
    return model


def _fuse_stems(model: nn.Module) -> None:
    networks = _networks()
    for network in model.modules():
        kind = networks.get(type(network))
        if kind is not None and not _FORWARDS & vars(network).keys() and _is_resnet(network, model, kind):
            network.__class__ = kind


def _is_resnet(network: nn.Module, model: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a network is a ResNet by its class (which is enough: its blocks may be of others), or, of a class that
    other networks have as well, one with fused blocks."""
    if issubclass(kind, stem.ModuleStem):
        network = model  # its blocks are beside it
    elif not hasattr(kind, "takes"):
        return True
    elif not kind.takes(network):
        return False
    return any(isinstance(m, (Fused, PreAct)) for m in network.modules())


def restore_blocks(model: nn.Module) -> nn.Module:
    """Undo `swap_blocks` in place: fused blocks inside `model` are their library's again, weights laid out as before.

    Blocks that no library has, plain and pre-activation ones of this package, stay; the stem of a network of
    `fused_resnet.models` is called module by module from now on, until blocks are swapped again.

    Returns the same model. Raises TypeError if model is not a module.
    """
    kinds, networks = ({fused: own for own, fused in swaps.items()} for swaps in (_kinds(), _networks()))
    for m in _module(model).modules():
        if isinstance(m, ResidualNetwork):
            m.fused = False
        elif type(m) in kinds:
            m.__class__ = kinds[type(m)]
            m.__dict__.pop("memory", None)
        elif type(m) in networks:
            m.__class__ = networks[type(m)]
        elif isinstance(m, stem.ModuleStem):
            stem.restore(m)
        elif isinstance(m, traced_blocks.TracedBlock):
            traced_blocks.restore(m)
        former = m.__dict__.pop(_FORMER, None)
        if former is not None:
            _lay_out(m, next(f for f in _FORMATS if str(f) == former))
    return model


def swap_report(model: nn.Module) -> SwapReport:
    """Every residual block inside `model`, as it is now: fused, fusable, or left and why. `str()` of it is a table."""
    found = _found(_module(model))
    shared = _shared_convolutions(found)
    return SwapReport(tuple(_report(each, shared) for each in found))


def _module(model) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model


_LIBRARIES = {
    "timm_blocks": ("timm.models.resnet", "Bottleneck"),
    "detectron2_blocks": ("detectron2.modeling.backbone.resnet", "BottleneckBlock"),
}


def _libraries() -> list[types.ModuleType]:
    """Our modules for the libraries in use, which define the class that is asked for."""
    found = []
    for ours, (theirs, kind) in _LIBRARIES.items():
        if hasattr(sys.modules.get(theirs), kind):
            with contextlib.suppress(ImportError):  # before timm 0.9 its modules had other places
                found.append(importlib.import_module(f".{ours}", __package__))
    return found


def _kinds() -> dict[type[nn.Module], type[Named] | type[NamedPreAct]]:
    """The fused class of each library's block."""
    return functools.reduce(operator.or_, (module.FUSED for module in _libraries()), FUSED)


def _networks() -> dict[type[nn.Module], type[nn.Module]]:
    """The class of each library's network whose stem is fused."""
    return functools.reduce(operator.or_, (getattr(module, "NETWORKS", {}) for module in _libraries()), stem.networks())


class _Found(NamedTuple):
    """A residual block: its name in the model, and its anatomy, fused or not yet; a str: why it has none."""

    name: str
    block: nn.Module
    anatomy: type[Named] | type[NamedPreAct] | traced_blocks.Anatomy | traced_blocks.PreAnatomy | str

    @property
    def pre(self) -> bool:
        """Whether it is a pre-activation block."""
        own = self.anatomy
        return issubclass(own, PreAct) if isinstance(own, type) else isinstance(own, traced_blocks.PreAnatomy)


def _found(model: nn.Module) -> list[_Found]:
    """The residual blocks of a model."""
    kinds = _kinds()
    traced = traced_blocks.discover(model, lambda m: isinstance(m, (Fused, PreAct)) or type(m) in kinds)
    found = []
    for name, m in model.named_modules():
        if isinstance(m, (Fused, PreAct)):
            found.append(_Found(name, m, m._anatomy))
        elif type(m) in kinds:
            found.append(_Found(name, m, kinds[type(m)]))
        elif m in traced:
            found.append(_Found(name, m, traced[m]))
        elif isinstance(m, tuple(kinds)):
            reason = "is not exactly BasicBlock or Bottleneck, and its forward is not traced to be one's"
            found.append(_Found(name, m, f"{type(m).__name__} {reason}"))
    return found


def _nothing_to_fuse(left: list[BlockReport]) -> str:
    if not left:
        return "model: no residual block was found in it"
    reasons = Counter(block.reason for block in left)
    return f"model: none of its {len(left)} residual blocks could be swapped; first reason: {next(iter(reasons))}"


def _report(found: _Found, shared: set[int]) -> BlockReport:
    name, block, anatomy = found
    type_name = type(block).__name__
    if isinstance(block, (Fused, PreAct)):  # FSDP makes subclasses of fused blocks
        own = preact if found.pre else blocks
        reason = own.unfusable(block)
        notes = [] if reason else [_called_note(found)]
        if block.memory == "lean" and not reason:
            kept = own.not_lean(block) if block.training else None
            notes.append(f"not lean: {kept}" if kept else "lean")
        note = "; ".join(n for n in notes if n)
        return BlockReport(name, type_name, "fused", reason and f"runs unfused: {reason}" or "", note)
    reason = _why_left(found, shared)
    if reason is None:
        return BlockReport(name, type_name, "fusable", note=_called_note(found))
    return BlockReport(name, type_name, "left", reason)


def _called_note(found: _Found) -> str:
    """What of a block's shortcut stays a module."""
    side = found.anatomy.side(found.block)
    if found.pre:
        called = preact.called(side)
        return f"shortcut: {called} is called as it is" if called else ""
    reason = None if stateless(side) else projection_unfusable(side)
    return f"downsample is called as it is: {reason}" if reason else ""


def _why_left(found: _Found, shared: set[int]) -> str | None:
    _, block, anatomy = found
    if isinstance(anatomy, str):
        return anatomy
    if "forward" in block.__dict__:
        return "forward is overridden on the instance"
    if found.pre:
        return preact.unfusable(block, anatomy)
    for name, conv in _convolutions(block, anatomy):
        if id(conv) in shared:
            return f"{name}: is shared with another batch norm"
    return blocks.unfusable(block, anatomy)


def _convolutions(block: nn.Module, anatomy) -> Iterator[tuple[str, nn.Module]]:
    """(name, convolution) of those in a post-activation block."""
    yield from ((name, part(block, name)) for name in anatomy.parts[::2])
    yield from ((name, m) for name, m in _on_the_side(block, anatomy) if isinstance(m, nn.Conv2d))


def _on_the_side(block: nn.Module, anatomy) -> list[tuple[str, nn.Module]]:
    """(name, module) of what is called one after another on a post-activation block's shortcut, as far as known."""
    side = anatomy.side(block)
    if isinstance(side, tuple):
        if isinstance(anatomy, traced_blocks.Anatomy):
            return list(zip(anatomy.shortcut, side, strict=True))
        names = {m: name for name, m in block.named_modules()}
        return [(names[m], m) for m in side]
    if not isinstance(side, nn.Sequential):
        return []
    path = anatomy.shortcut[0] if isinstance(anatomy, traced_blocks.Anatomy) else "downsample"
    return [(f"{path}.{name}", m) for name, m in side.named_children()]


def _shared_convolutions(found: list[_Found]) -> set[int]:
    """ids of the convolutions that stand in more than one place among the blocks."""
    post = [each for each in found if not (each.pre or isinstance(each.anatomy, str))]
    uses = Counter(id(conv) for _, block, anatomy in post for _, conv in _convolutions(block, anatomy))
    return {conv for conv, count in uses.items() if count > 1}


def _warn_of_biases(found: list[_Found]) -> None:
    pairs = [(each.name, triple) for each in found for triple in _normalised(each)]
    biased = [
        f"{name}.{conv_name}".lstrip(".")
        for name, (conv_name, conv, norm) in pairs
        if getattr(conv, "bias", None) is not None and isinstance(norm, nn.modules.batchnorm._BatchNorm)
    ]
    if biased:
        warnings.warn(
            f"bias: {', '.join(biased)}: a batch norm takes away the bias of the convolution before it; build it with "
            "bias=False",
            stacklevel=3,
        )


def _normalised(found: _Found) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, convolution, the norm of its result) of a residual block."""
    _, block, anatomy = found
    if isinstance(anatomy, str):
        return
    if found.pre:
        convolutions, norms, _ = anatomy.parts(block)
        for conv, norm, modules in zip(convolutions[:-1], norms[1:], anatomy.before(block), strict=True):
            if not modules:
                yield conv, part(block, conv), part(block, norm)
        return
    for conv, norm in zip(anatomy.parts[::2], anatomy.parts[1::2], strict=True):
        yield conv, part(block, conv), part(block, norm)
    side = _on_the_side(block, anatomy)
    if len(side) in (2, 3):
        *_, (name, conv), (_, norm) = side
        yield name, conv, norm


def _lay_out(conv: nn.Conv2d, memory_format: torch.memory_format) -> torch.memory_format | None:
    """Give the weight this layout, the Parameter staying the object it is. Returns the layout it had, if another."""
    weight = conv._parameters.get("weight")  # absent in a conv that is pruned: there it is computed by a hook
    if weight is None or weight.is_contiguous(memory_format=memory_format):
        return None
    for former in _FORMATS:
        if weight.is_contiguous(memory_format=former):
            weight.data = weight.data.contiguous(memory_format=memory_format)
            return former
    return None
