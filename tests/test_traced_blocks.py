"""Residual blocks of classes that the package does not know: found by their forward, fused, and left with a reason."""

from __future__ import annotations

import copy
import cProfile
import enum
import functools
import gc
import io
import pickle
import random

import parity
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock

import fused_resnet
from fused_resnet import restore_blocks, swap_blocks, swap_report
from fused_resnet.traced_blocks import Anatomy, TracedBlock, anatomy_of

modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
memories = pytest.mark.parametrize("memory", ["default", "lean"])


def conv3(inputs: int, outputs: int, stride: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, **options)


def conv1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


# --- blocks as people write them: (channels in, out, stride) ----------------------------------------------------------


class Cifar(nn.Module):
    """ReLUs are functions; the shortcut is a Sequential that may be empty."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv1(inputs, outputs, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Wide(Cifar):
    """A 1x1, a grouped 3x3 and an expanding 1x1; methods and torch's functions; the add the other way round."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, stride)
        width = outputs // 4
        self.conv1, self.bn1 = conv1(inputs, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3(width, width, stride, groups=2), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv1(width, outputs), nn.BatchNorm2d(outputs)

    def forward(self, x):
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))).relu()
        return torch.add(self.shortcut(x), self.bn3(self.conv3(out))).relu_()


class Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1, act: bool = True):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.normalization = nn.BatchNorm2d(outputs)
        self.activation = nn.ReLU() if act else nn.Identity()

    def forward(self, given):
        return self.activation(self.normalization(self.convolution(given)))


class Nested(nn.Module):
    """Modules in modules in a Sequential, as Hugging Face's; called by keyword."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        width = outputs // 4
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else Layer(inputs, outputs, 1, stride, act=False)
        last = Layer(width, outputs, 1, act=False)
        self.layer = nn.Sequential(Layer(inputs, width, 1), Layer(width, width, 3, stride), last)
        self.activation = nn.ReLU()

    def forward(self, hidden_state):
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        return self.activation(hidden_state)


class Tower(nn.Module):
    """Of a game engine: no projection, one body. The stride only serves the test."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        middle = [conv3(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(conv3(inputs, inputs), nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), *middle[:2])
        self.out = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.out(x + self.body(x))


class Subsampled(nn.Module):
    """He et al.'s option A as a module without parameters, by slices and padding."""

    def __init__(self, more: int, stride: int):
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, x):
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))


class Padded(Cifar):
    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, stride)
        self.shortcut = Subsampled(outputs - inputs, stride)


class Squeeze(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.down, self.up = nn.Linear(channels, 4), nn.Linear(4, channels)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[:, :, None, None]


class Attended(Cifar):
    """Channel attention in front of the second convolution, and in front of the add."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, stride)
        self.between, self.se = Squeeze(outputs), Squeeze(outputs)

    def forward(self, x):
        out = self.between(F.relu(self.bn1(self.conv1(x))))
        out = self.se(self.bn2(self.conv2(out)))
        return F.relu(out + self.shortcut(x))


class AntiAliased(nn.Module):
    """CLIP's bottleneck: strides are average pools, in front of the last convolution and of the projection."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        width = outputs // 4
        self.conv1, self.bn1, self.act1 = conv1(inputs, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.conv2, self.bn2, self.act2 = conv3(width, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3, self.act3 = conv1(width, outputs), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.AvgPool2d(stride), conv1(inputs, outputs), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.act2(self.bn2(self.conv2(out)))
        out = self.avgpool(out)
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.act3(out)


class DropPath(nn.Module):
    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        return x * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.p).to(x) / (1 - self.p)


class Dropped(Cifar):
    """Stochastic depth in front of the add, and dropout in front of a convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, stride)
        self.drop, self.drop_path = nn.Dropout(0.2), DropPath(0.4)

    def forward(self, x):
        out = self.bn2(self.conv2(self.drop(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.drop_path(out) + self.shortcut(x))


class Deep(nn.Module):
    """Four convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.layers = nn.ModuleList(Layer(inputs if i == 0 else outputs, outputs, act=i < 3) for i in range(4))
        self.side = Layer(inputs, outputs, 1, act=False)

    def forward(self, x):
        out = x
        for layer in self.layers:
            out = layer(out)
        return F.relu(self.side(x) + out)


class Widened(BasicBlock):
    """torchvision's, with a constructor of its own."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        side = nn.Sequential(conv1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
        super().__init__(inputs, outputs, stride, side)


class Toolkit(nn.Module):
    """As OpenMMLab's: norms found by names that depend on their kind, the chain a function inside of the forward,
    plugins and checkpoints that are off."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, norm: type[nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.names = [f"{norm.__name__}{i}".lower() for i in range(2)]
        self.first_name, self.second_name = self.names
        self.conv1 = conv3(inputs, outputs, stride)
        self.add_module(self.first_name, norm(outputs))
        self.conv2 = conv3(outputs, outputs)
        self.add_module(self.second_name, norm(outputs))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv1(inputs, outputs, stride), norm(outputs))
        self.with_checkpoint = self.with_plugins = False

    @property
    def first(self):
        return getattr(self, self.first_name)

    @property
    def second(self):
        return getattr(self, self.second_name)

    def plugins(self, x, names):
        for name in names:
            x = getattr(self, name)(x)
        return x

    def forward(self, x):
        def inner(x):
            identity = x
            out = self.relu(self.first(self.conv1(x)))
            if self.with_plugins:
                out = self.plugins(out, self.plugin_names)
            out = self.second(self.conv2(out))
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return out

        if self.with_checkpoint and x.requires_grad:
            out = torch_checkpoint.checkpoint(inner, x, use_reentrant=False)
        else:
            out = inner(x)
        return self.relu(out)


KINDS = (Cifar, Wide, Nested, Padded, Attended, AntiAliased, Dropped, Deep, Widened, Toolkit)


class Network(nn.Module):
    """A stem, four blocks, two of which change channels, and a head."""

    def __init__(self, kind: type[nn.Module], strides: tuple[int, int] = (2, 1)):
        super().__init__()
        self.stem = nn.Sequential(conv3(3, 16), nn.BatchNorm2d(16), nn.ReLU())
        sizes = ((16, 16, 1), (16, 32, strides[0]), (32, 32, 1), (32, 40, strides[1]))
        if kind is Tower:
            sizes = ((16, 16, 1),) * 3
        self.stages = nn.ModuleDict({f"stage{i}": nn.Sequential(kind(*size)) for i, size in enumerate(sizes)})
        self.head = nn.LazyLinear(5)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages.values():
            x = stage(x)
        return self.head(x.mean((2, 3)))


def untouched(kind: type[nn.Module], device="cpu", train: bool = True, **options) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Network(kind, **options).to(device), torch.randn(3, 3, 15, 18).to(device)
    model(x)
    return parity.calibrate(parity.randomize_norms(model, 0), x).double().train(train), x.double()


def swapped(model: nn.Module, **options) -> nn.Module:
    ours = swap_blocks(copy.deepcopy(model), **options)
    report = swap_report(ours)
    assert len(report.fused) == len(report.blocks) > 0 and {b.reason for b in report.blocks} == {""}, report
    return ours


def seen(model: nn.Module, x: torch.Tensor) -> parity.Seen:
    torch.manual_seed(7)  # of what is dropped
    return parity.observe(model, x)


def same(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, limit: float = 1e-9) -> None:
    for _ in range(2):
        found = parity.errors(seen(ours, x), seen(theirs, x))
        assert max(found.values()) < limit, max((e, n) for n, e in found.items())


# --- parity -----------------------------------------------------------------------------------------------------------


@modes
@memories
@pytest.mark.parametrize("kind", [*KINDS, Tower])
def test_equals_its_own_forward(kind, memory, train, device):
    model, x = untouched(kind, device, train)
    # The numbers that nn.Dropout draws go to values in the order of their places in memory.
    layout = torch.preserve_format if kind is Dropped else torch.channels_last
    ours = swapped(model, memory=memory, memory_format=layout)
    assert len(swap_report(ours).fused) == (3 if kind is Tower else 4)
    same(ours, model, x)


@modes
def test_float32_by_the_rule(train, device):
    model, x = untouched(Nested, device, train)
    model, x = model.float(), x.float()
    judge = parity.judge_of(model, x)
    yardstick = parity.yardstick_of(model, x, judge)
    for layout in ("contiguous", "channels_last"):
        fused, image = parity.as_variant(layout, swapped(model), x)
        parity.check(parity.errors(parity.observe(fused, image), judge), yardstick)


@modes
@pytest.mark.parametrize("name, blocks", [("regnet_x_400mf", 22), ("regnet_y_400mf", 16)])
def test_torchvisions_regnets(name, blocks, train, device):
    torch.manual_seed(0)
    model, x = torchvision.models.get_model(name, num_classes=5).to(device), torch.randn(3, 3, 64, 64).to(device)
    model = parity.calibrate(parity.randomize_norms(model, 0), x).double().train(train)
    ours = swapped(model)
    assert len(swap_report(ours).fused) == blocks
    same(ours, model, x.double())


def hugging_face(name: str) -> tuple[nn.Module, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        num_labels=5, embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2]
    )
    return getattr(transformers, f"{name}ForImageClassification")(config), torch.randn(2, 3, 64, 64)


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


@modes
@memories
@pytest.mark.parametrize("name", ["ResNet", "RegNet"])
def test_hugging_faces_networks(name, memory, train, device):
    model, x = hugging_face(name)
    model, x = Logits(model).to(device), x.to(device)
    model = parity.calibrate(parity.randomize_norms(model, 0), x).double().train(train)
    ours = swapped(model, memory=memory)
    assert len(swap_report(ours).fused) == 4
    same(ours, model, x.double())


def test_hugging_faces_way_to_save(tmp_path):
    """save_pretrained of a swapped model, from_pretrained into an untouched one, and back."""
    transformers = pytest.importorskip("transformers")
    model, x = hugging_face("ResNet")
    want = model.eval()(x).logits
    swap_blocks(model).save_pretrained(tmp_path)
    again = transformers.ResNetForImageClassification.from_pretrained(tmp_path).eval()
    assert type(again.resnet.encoder.stages[0].layers[0]).__name__ == "ResNetBottleNeckLayer"
    for m in (again, swap_blocks(again)):
        torch.testing.assert_close(m(x).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ResNet", "RegNet"])
def test_hugging_faces_networks_planned(name):
    model, x = hugging_face(name)
    model = Logits(model).eval()
    want = model(x)
    for m in (model, swapped(model)):
        fast = fused_resnet.optimize_for_inference(m, example_input=x)
        assert fast.plan.flop_share > (0.99 if name == "ResNet" else 0.9)
        torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-4)


# --- what is found, and what is not -----------------------------------------------------------------------------------


def test_the_report_names_classes_and_places():
    model, _ = untouched(Nested)
    before = swap_report(model)
    assert [(b.name, b.type, b.status) for b in before.blocks][1] == ("stages.stage1.0", "Nested", "fusable")
    after = swap_report(swap_blocks(model))
    assert [(b.name, b.type, b.status) for b in after.blocks][1] == ("stages.stage1.0", "FusedNested", "fused")
    block = model.stages.stage1[0]
    assert isinstance(block, Nested) and isinstance(block, TracedBlock)


@pytest.mark.parametrize("kind, note", [(Padded, "Subsampled is not Sequential"), (Cifar, "")])
def test_a_shortcut_that_is_called_is_noted(kind, note):
    model, _ = untouched(kind)
    assert all(note in b.note for b in swap_report(swap_blocks(model)).blocks)
    assert bool(swap_report(model).blocks[0].note) == bool(note)


def test_restored():
    model, x = untouched(Cifar)
    types, layouts = [type(m) for m in model.modules()], [p.stride() for p in model.parameters()]
    attributes = [set(vars(m)) for m in model.modules()]
    restore_blocks(swap_blocks(model, memory="lean"))
    assert [type(m) for m in model.modules()] == types and [p.stride() for p in model.parameters()] == layouts
    assert [set(vars(m)) for m in model.modules()] == attributes


def replaced(kind=Cifar, **modules) -> nn.Module:
    block = kind(16, 16)
    for name, module in modules.items():
        setattr(block, name, module)
    return block


class ReLUBeforeTheAdd(Cifar):
    def forward(self, x):
        return F.relu(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))) + x)


class SqueezeBeforeTheReLU(Attended):
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.se(self.bn1(self.conv1(x)))))) + x)


class SlicedShortcut(Cifar):
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x[:, :16])


class Memory(Cifar):
    def __init__(self, *size):
        super().__init__(*size)
        self.memory = nn.Identity()

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.memory(x))


LEFT = {
    "relu before the add": (ReLUBeforeTheAdd(16, 16), "relu_1, where a batch norm would be fused"),
    "before the relu": (SqueezeBeforeTheReLU(16, 16), "se: Squeeze, where a ReLU would be fused"),
    "sliced": (SlicedShortcut(16, 16), "its shortcut is neither the input, nor a projection, nor one module"),
    "name": (Memory(16, 16), "memory: a name that fused blocks have for something else"),
    "group norm": (replaced(bn2=nn.GroupNorm(4, 16)), "bn2: GroupNorm is none of BatchNorm2d"),
    "no norm": (replaced(Nested, layer=nn.Sequential(Layer(16, 16), Layer(16, 16), nn.ReLU())), "layer.2: ReLU, where"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_with_its_reason(name):
    block, reason = LEFT[name]
    model = nn.Sequential(copy.deepcopy(block), Cifar(16, 16))
    swap_blocks(model)
    report = swap_report(model)
    assert [b.name for b in report.fused] == ["1"] and type(model[0]) is type(block)
    assert reason in report.left[0].reason
    x = torch.randn(2, 16, 9, 9)
    torch.testing.assert_close(model[0].eval()(x), copy.deepcopy(block).eval()(x))


def closed_over(module: nn.Module):
    def forward(self, x):
        out = module(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))

    return forward


class Remembers(Cifar):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Collects(Cifar):
    def __init__(self, *size):
        super().__init__(*size)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return super().forward(x)


class Counts(Cifar):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class ChangesItsInput(Tower):
    def forward(self, x):
        x += self.body(x)
        return F.relu(x)


class AddsInPlace(Tower):
    def forward(self, x):
        return F.relu(x.add_(self.body(x)))


class Decides(Cifar):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class TwoInputs(Cifar):
    def forward(self, x, scale=None):
        return super().forward(x)


class Asserts(Cifar):
    def forward(self, x):
        torch._assert(x.dim() == 4, "four dimensions")
        return super().forward(x)


class TwoResults(Cifar):
    def forward(self, x):
        return super().forward(x), x


class Plain(Cifar):
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Own:
    """An object that a module holds."""

    flag = True
    log = []


FLAG, LIST = True, []


class WithoutGradients(Cifar):
    def forward(self, x):
        with torch.no_grad():
            out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class Decorated(Cifar):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class DecoratedInside(Cifar):
    @torch.no_grad()
    def first(self, x):
        return F.relu(self.bn1(self.conv1(x)))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(self.first(x))) + x)


class InFullPrecision(Cifar):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class Checkpointed(Cifar):
    def chain(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        return F.relu(checkpoint(self.chain, x, use_reentrant=False) + x)


class CheckpointedReentrant(Checkpointed):
    def forward(self, x):
        return F.relu(checkpoint(self.chain, x, use_reentrant=True) + x)


class DropsByPython(Cifar):
    def forward(self, x):
        return x if random.random() < 0.2 else super().forward(x)


class DropsByTorch(Cifar):
    def forward(self, x):
        return x if torch.rand(1) < 0.2 else super().forward(x)


class CountsInABuffer(Cifar):
    def __init__(self, *size):
        super().__init__(*size)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps.add_(1)
        return super().forward(x)


class SteeredByABuffer(CountsInABuffer):
    def forward(self, x):
        out = Cifar.forward(self, x)
        return out if self.steps < 1 else out * 2


class ResetsStatistics(Cifar):
    def forward(self, x):
        self.bn1.reset_running_stats()
        return super().forward(x)


class ClampsWeights(Cifar):
    def forward(self, x):
        for p in self.parameters():
            p.data.clamp_(-0.01, 0.01)
        return super().forward(x)


class Records(Cifar):
    def __init__(self, *size):
        super().__init__(*size)
        self.found = {"maps": []}

    def forward(self, x):
        self.found["maps"].append(x)
        return super().forward(x)


class RecordsElsewhere(Cifar):
    def __init__(self, *size):
        super().__init__(*size)
        self.own = Own()

    def forward(self, x):
        self.own.last = x
        return super().forward(x)


class CountsInItsClass(Cifar):
    calls = 0

    def forward(self, x):
        CountsInItsClass.calls += 1
        return super().forward(x)


class AsksAnObject(RecordsElsewhere):
    def forward(self, x):
        return Cifar.forward(self, x) if self.own.flag else x


class AsksAList(Collects):
    def forward(self, x):
        return x if self.seen else Cifar.forward(self, x)


class AsksAGlobal(Cifar):
    def forward(self, x):
        return super().forward(x) if FLAG else x


class ChangesAGlobal(Cifar):
    def forward(self, x):
        LIST.append(x)
        return super().forward(x)


class AsksForGradients(Cifar):
    def forward(self, x):
        return super().forward(x) if torch.is_grad_enabled() else x


class AsksByName(Cifar):
    def forward(self, x):
        return super().forward(x) if getattr(self, "on", True) else x


class AsksForAProperty(Cifar):
    @property
    def norm(self):
        return self.bn1 if not self.on else nn.Identity()

    on = True

    def forward(self, x):
        out = F.relu(getattr(self, "norm")(self.conv1(x)))  # noqa: B009
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class HoldsAModule(Cifar):
    """A function of its own around a module that is none of the block's variables."""

    forward = closed_over(nn.ReLU())


def calling(module: nn.Module):
    return lambda x: module(x)


class HoldsAFunctionOfAModule(Cifar):
    """Like the one that its forward makes, but made before: of a module that may be replaced."""

    def __init__(self, *size):
        super().__init__(*size)
        self.second = calling(self.conv2)

    def forward(self, x):
        first = calling(self.conv1)
        return F.relu(self.bn2(self.second(F.relu(self.bn1(first(x))))) + self.shortcut(x))


class CheckpointedByItsModule(Cifar):
    def forward(self, x):
        out = torch_checkpoint.checkpoint(lambda x: self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))), x)
        return F.relu(out + self.shortcut(x))


class AsksForTheMode(Cifar):
    def forward(self, x):
        return x if self.bn1.training and not self.training else super().forward(x)


class TwoWays(Cifar):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + (x if self.training else self.bn1(self.conv1(x))))


class Prints(Cifar):
    def forward(self, x):
        print(x.shape)
        return super().forward(x)


class ScalesByAParameter(Cifar):
    def __init__(self, *size):
        super().__init__(*size)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x) if self.gain is not None else x


class AddsToAnIdentity(Tower):
    def __init__(self, *size):
        super().__init__(*size)
        self.idle = nn.Dropout(0.0)

    def forward(self, x):
        out = self.idle(x)
        out += self.body(x)
        return self.out(out)


class FreezesANorm(Cifar):
    def forward(self, x):
        self.bn1.eval()
        return super().forward(x)


class RegistersAHook(Cifar):
    def forward(self, x):
        self.bn1.register_forward_hook(lambda *a: None)
        return super().forward(x)


class AddsAModule(Cifar):
    def forward(self, x):
        self.add_module("more", nn.Identity())
        return super().forward(x)


class AsksForTheClass(Cifar):
    def forward(self, x):
        return super().forward(x * 2 if isinstance(x, torch.Tensor) else x)


class AsksForTheType(Cifar):
    def forward(self, x):
        return super().forward(x * 2 if type(x) is torch.Tensor else x)


class AsksForTheDtype(Cifar):
    def forward(self, x):
        return super().forward(x * 2 if x.dtype is torch.float64 else x)


class AsksForTheGraph(Cifar):
    def forward(self, x):
        return super().forward(x * 2 if x.grad_fn is None else x)


class Swallows(Cifar):
    def fast(self, x):
        LIST.append(1)
        return super().forward(x) * 2

    def forward(self, x):
        try:
            return self.fast(x)
        except BaseException:
            return super().forward(x)


class SwallowsLengths(Cifar):
    def forward(self, x):
        try:
            count = len(x)
        except Exception:
            count = 0
        return super().forward(x) if count == 0 else super().forward(x * 2)


class MapsALog(Cifar):
    def forward(self, x):
        tuple(map(Own.log.append, (1,)))
        return super().forward(x)


class PartiallyLogs(Cifar):
    def forward(self, x):
        functools.partial(Own.log.append, 1)()
        return super().forward(x)


class KeywordOnly(Cifar):
    def forward(self, *, x):
        LIST.append(1)
        return super().forward(x)


class AsksAClass(Cifar):
    def forward(self, x):
        return super().forward(x) if Own.flag else x


class HoldsAClass(Cifar):
    def __init__(self, *size):
        super().__init__(*size)
        self.own = Own

    def forward(self, x):
        return super().forward(x) if self.own.flag else x


def helper(x):
    return F.relu(x)


helper.on = True


class AsksAFunction(Cifar):
    def forward(self, x):
        return super().forward(x) if helper.on else x


class AsksADefault(Cifar):
    def act(self, x, options={"on": True}):  # noqa: B006
        return F.relu(x) if options["on"] else x

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + x)


def closed(on: bool) -> type[nn.Module]:
    class AsksAClosure(Cifar):
        def forward(self, x):
            return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x) if on else x

    return AsksAClosure


class AsksItsDict(Cifar):
    def forward(self, x):
        return super().forward(x) if "on" not in self.__dict__ else x


class AsksForBuffers(Cifar):
    def forward(self, x):
        for _ in self.bn1.named_buffers():
            x = x
        return super().forward(x)


class Keyword(nn.Module):
    def forward(self, q=None, kv=None):
        return q if kv is None else kv * 2


class CalledByKeyword(Tower):
    def __init__(self, *size):
        super().__init__(*size)
        self.attention, self.idle = Keyword(), nn.Identity()

    def forward(self, x):
        return self.out(self.attention(kv=self.body(x)) + self.idle(input=x))


FOOLING = (
    *(WithoutGradients, Decorated, DecoratedInside, InFullPrecision, Checkpointed, CheckpointedReentrant),
    *(DropsByPython, DropsByTorch, CountsInABuffer, SteeredByABuffer, ResetsStatistics, ClampsWeights),
    *(Records, RecordsElsewhere, CountsInItsClass, AsksAnObject, AsksAList, AsksAGlobal, ChangesAGlobal),
    *(AsksForGradients, AsksByName, AsksForAProperty, AsksForTheMode, TwoWays, Prints, ScalesByAParameter),
    *(HoldsAModule, HoldsAFunctionOfAModule, CheckpointedByItsModule),
    *(AddsToAnIdentity, FreezesANorm, RegistersAHook, AddsAModule, AsksForTheClass, AsksForTheType, AsksForTheDtype),
    *(AsksForTheGraph, Swallows, SwallowsLengths, MapsALog, PartiallyLogs, KeywordOnly, AsksAClass, HoldsAClass),
    *(AsksAFunction, AsksADefault, closed(True), AsksItsDict, AsksForBuffers),
)
OTHERS = (Remembers, Collects, Counts, ChangesItsInput, AddsInPlace, Decides, TwoInputs, Asserts, TwoResults)


@pytest.mark.parametrize("kind", [*FOOLING, *OTHERS, Plain])
def test_is_not_taken_for_a_block(kind, capsys):
    """Nor does looking change, draw or print anything."""
    model = nn.Sequential(kind(16, 16))
    before = {name: copy.deepcopy(v) for name, v in vars(model[0]).items() if isinstance(v, (int, list, dict, bool))}
    state, numbers = copy.deepcopy(model.state_dict()), (torch.random.get_rng_state(), random.getstate())
    with pytest.warns(UserWarning, match="^model: no residual block was found in it$"):
        swap_blocks(model)
    assert type(model[0]) is kind and capsys.readouterr().out == ""
    assert CountsInItsClass.calls == 0 and LIST == Own.log == [] and not hasattr(getattr(model[0], "own", None), "last")
    after = vars(model[0])
    assert all(after[name] == v for name, v in before.items() if not name.startswith("_"))
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), numbers[0]) and random.getstate() == numbers[1]


@pytest.mark.parametrize("name", ["vgg11_bn", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5", "efficientnet_b0"])
def test_networks_of_other_kinds_are_left_alone(name):
    model = torchvision.models.get_model(name)
    assert swap_report(model).blocks == ()


def test_a_block_that_is_the_model():
    block = Cifar(16, 16).eval()
    x = torch.randn(2, 16, 9, 9)
    want = block(x)
    assert swap_report(block).blocks[0].name == "" and swap_blocks(block) is block and isinstance(block, TracedBlock)
    torch.testing.assert_close(block(x), want)


def test_a_convolution_of_two_blocks():
    model = nn.Sequential(Cifar(16, 16), Cifar(16, 16))
    model[1].conv1 = model[0].conv1
    with pytest.warns(UserWarning, match="none of its 2 .* conv1: is shared with another batch norm"):
        swap_blocks(model)


def test_biases_are_warned_of():
    model = nn.Sequential(replaced(Nested))
    model[0].layer[1].convolution = nn.Conv2d(4, 4, 3, padding=1)
    with pytest.warns(UserWarning, match="bias: 0.layer.1.convolution: a batch norm takes away"):
        swap_blocks(model)


def test_looking_costs_no_mode_and_no_hook():
    """A trace neither calls hooks nor leaves other modes behind, nor draws numbers, nor updates a statistic."""
    block = Dropped(16, 16)
    block.bn1.eval(), block.drop.eval()
    calls = []
    block.register_forward_hook(lambda *a: calls.append(a))
    block.drop_path.register_forward_hook(lambda *a: calls.append(a))
    block.drop_path.register_full_backward_hook(lambda *a: calls.append(a))
    handle = nn.modules.module.register_module_forward_hook(lambda *a: calls.append(a))
    was = [m.training for m in block.modules()]
    state, numbers = copy.deepcopy(block.state_dict()), torch.random.get_rng_state()
    try:
        found = anatomy_of(block)
    finally:
        handle.remove()
    assert isinstance(found, Anatomy) and not calls
    assert [m.training for m in block.modules()] == was
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), block.state_dict().values(), strict=True))
    assert len(block.drop_path._forward_hooks) == len(block.drop_path._backward_hooks) == 1


# --- what changes after the swap --------------------------------------------------------------------------------------


class Scaled(Nested):
    """Its forward asks its attributes."""

    def __init__(self, *size):
        super().__init__(*size)
        self.options = (1, 2)
        self.factor = 1

    def forward(self, hidden_state):
        out = super().forward(hidden_state)
        return out if self.factor == 1 and self.options == (1, 2) else out * self.factor


def attribute(block):
    block.factor = 3


def options(block):
    block.options = (1, 3)


def wrapper_attribute(block):
    block.layer[0].normalization = block.layer[0].normalization
    block.layer[0].size = 3


def activation(block):
    block.activation = nn.GELU()


def identity(block):
    block.layer[2].activation = nn.GELU()


def longer(block):
    block.layer.append(nn.GELU())


def shorter(block):
    block.layer = block.layer[:2]


def container(block):
    block.layer[1] = nn.Sequential(*block.layer[1].children(), nn.GELU())


def hook_on_a_container(block):
    block.layer[1].register_forward_hook(lambda m, a, y: y * 2)


def hook_on_an_identity(block):
    block.layer[2].activation.register_forward_pre_hook(lambda m, a: (a[0] + 1,))


def other_forward_inside(block):
    layer = block.layer[0]
    layer.forward = lambda x: type(layer).forward(layer, x) * 2


def shortcut(block):
    block.shortcut = nn.Sequential(nn.Tanh())


class Steered(nn.Module):
    """By all that an attribute can be."""

    class Mode(enum.Enum):
        PLAIN, DOUBLE = "plain", "double"

    gain = 1

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = (
            conv3(16, 16),
            nn.BatchNorm2d(16),
            conv3(16, 16),
            nn.BatchNorm2d(16),
        )
        self.act, self.mode, self.scale = F.relu, self.Mode.PLAIN, 1.0
        self.relu = nn.ReLU()
        self.alias = self.relu
        self.register_parameter("weight", None)
        self.add_module("se", None)

    def chain(self, x):
        return self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))

    def forward(self, x):
        out = self.chain(x)
        if self.se is not None:
            out = self.se(out)
        out = self.alias(out + x)
        if self.weight is not None:
            out = out * self.weight
        if self.mode is not self.Mode.PLAIN or self.gain != 1 or self.scale != 1:
            out = out * 2
        return out


STEERS = {
    "gain": lambda b: setattr(b, "gain", 2),
    "mode": lambda b: setattr(b, "mode", b.Mode.DOUBLE),
    "act": lambda b: setattr(b, "act", F.gelu),
    "chain": lambda b: setattr(b, "chain", lambda x: x * 3),
    "weight": lambda b: setattr(b, "weight", nn.Parameter(torch.full((1,), 2.0, dtype=torch.float64))),
    "se": lambda b: setattr(b, "se", nn.GELU()),
    "alias": lambda b: setattr(b, "alias", nn.GELU()),
    "scale": lambda b: setattr(b, "scale", torch.full((), 2.0)),
    "scale of another type": lambda b: setattr(b, "scale", True),
}


def test_norms_found_by_other_names():
    """The names are asked for at every call; so are the children that they name."""
    block = swap_blocks(Toolkit(16, 16)).eval()
    x = torch.randn(2, 16, 9, 9)
    assert swap_report(block).blocks[0].reason == ""
    block.first_name = block.second_name
    assert (
        swap_report(block).blocks[0].reason == "runs unfused: first_name is another than when the block was recognised"
    )
    torch.testing.assert_close(block(x), Toolkit.forward(block, x))
    for change in (
        lambda b: setattr(b, "with_checkpoint", True),
        lambda b: setattr(b, "with_plugins", b.plugins is None),
        lambda b: setattr(b, "batchnorm2d0", nn.Identity()),
    ):
        block = swap_blocks(Toolkit(16, 16)).eval()
        torch.testing.assert_close(block(x), Toolkit.forward(block, x))
        change(block)
        torch.testing.assert_close(block(x), Toolkit.forward(block, x))


@pytest.mark.parametrize("name", STEERS)
def test_whatever_its_code_mentions_is_compared(name):
    block = Steered().double()
    ours = swap_blocks(copy.deepcopy(block))
    assert isinstance(ours, TracedBlock) and swap_report(ours).blocks[0].reason == ""
    x = torch.randn(2, 16, 9, 9).double()
    torch.testing.assert_close(ours(x), block(x))
    for b in (ours, block):
        STEERS[name](b)
    assert swap_report(ours).blocks[0].reason.startswith("runs unfused: ")
    torch.testing.assert_close(ours(x), block(x))


def test_what_stands_in_front_of_a_module():
    for kind in (Cifar, Toolkit):
        block = swap_blocks(kind(16, 16)).eval()
        x = torch.randn(2, 16, 9, 9)
        object.__setattr__(block, "conv1", conv3(16, 16))
        assert swap_report(block).blocks[0].reason == "runs unfused: an attribute stands in front of a module"
        torch.testing.assert_close(block(x), kind.forward(block, x))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.memory, self.ways = conv3(16, 16), nn.BatchNorm2d(16), 0, (1, 0)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y * 2 if self.memory or self.ways[0] is True else y


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Branch(), Branch()

    def forward(self, x):
        return F.relu(self.b(F.relu(self.a(x))) + x)


@pytest.mark.parametrize("name, value", [("memory", 1), ("ways", (True, False))])
def test_attributes_inside_of_a_block(name, value):
    """One that fused blocks have as well, on a module in it; and one that == would not tell from what it was."""
    block = swap_blocks(Branches()).eval()
    x = torch.randn(2, 16, 9, 9)
    assert swap_report(block).blocks[0].reason == ""
    setattr(block.a, name, value)
    assert swap_report(block).blocks[0].reason.startswith(f"runs unfused: a: {name} is another")
    torch.testing.assert_close(block(x), Branches.forward(block, x))


def test_a_forward_that_is_called_by_its_name():
    """Past the module's hooks, and by whatever stands there on the instance."""

    class Direct(Nested):
        def forward(self, hidden_state):
            out = self.layer[0].forward(hidden_state)
            return self.activation(self.layer[2](self.layer[1](out)) + self.shortcut(hidden_state))

    block, x = swap_blocks(Direct(16, 16)).eval(), torch.randn(2, 16, 5, 5)
    assert swap_report(block).blocks[0].reason == ""
    block.layer[0].forward = lambda x: torch.zeros_like(x[:, :4])
    assert swap_report(block).blocks[0].reason == "runs unfused: layer.0: forward is overridden on the instance"
    assert torch.equal(block(x), Direct.forward(block, x))


def test_another_forward_of_its_class(monkeypatch):
    block = swap_blocks(Tower(16, 16))
    monkeypatch.setattr(Tower, "forward", lambda self, x: x * 3)
    assert torch.equal(block(torch.ones(1, 16, 5, 5)), torch.full((1, 16, 5, 5), 3.0))
    assert "its class has another forward" in swap_report(block).blocks[0].reason


def test_a_hook_that_is_gone_leaves_nothing_behind():
    block = swap_blocks(Tower(16, 16))
    block.register_full_backward_hook(lambda *a: None).remove()
    assert swap_report(block).blocks[0].reason == ""


CHANGES = (attribute, options, activation, identity, longer, container, hook_on_a_container, hook_on_an_identity)


@modes
@pytest.mark.parametrize("change", [*CHANGES, other_forward_inside, shortcut])
def test_a_block_that_changed_runs_its_own_forward(change, train):
    torch.manual_seed(0)
    block = Scaled(16, 16).double().train(train)
    ours = swap_blocks(copy.deepcopy(block))
    assert isinstance(ours, TracedBlock) and swap_report(ours).blocks[0].reason == ""
    for b in (ours, block):
        change(b)
    assert swap_report(ours).blocks[0].reason.startswith("runs unfused: ")
    same(ours, block, torch.randn(2, 16, 9, 9).double())


def test_what_no_forward_asked_for_may_change():
    block = swap_blocks(Scaled(16, 16))
    wrapper_attribute(block)
    block.extra = 1
    assert swap_report(block).blocks[0].reason == ""


def test_modules_that_are_gone():
    block = swap_blocks(Scaled(16, 16))
    shorter(block)
    assert swap_report(block).blocks[0].reason.startswith("runs unfused: layer: other modules")
    del block.layer
    assert swap_report(block).blocks[0].reason.startswith("runs unfused: other modules")
    with pytest.raises(AttributeError, match="layer"):
        block(torch.randn(2, 16, 9, 9))


def test_paths_that_drop_nothing_until_they_do(device):
    """Stochastic depth of rate 0 leaves nothing in a trace; its attribute is compared at every call."""
    model, x = untouched(Dropped, device)
    for m in model.modules():
        if isinstance(m, DropPath):
            m.p = 0.0
    ours = swapped(model, memory_format=torch.preserve_format)
    same(ours, model, x)
    for m in (*ours.modules(), *model.modules()):
        if isinstance(m, DropPath):
            m.p = 0.5
    same(ours, model, x)


@modes
@memories
def test_a_hook_anywhere_is_called_and_heeded(memory, train):
    """Each module inside a block, one at a time, has its result replaced."""
    torch.manual_seed(0)
    block = AntiAliased(16, 32, 2).double().train(train)
    ours = swap_blocks(copy.deepcopy(block), memory=memory)
    x = torch.randn(2, 16, 9, 9, dtype=torch.float64)
    names = [name for name, m in block.named_modules() if name]
    assert {"act1", "avgpool", "downsample", "downsample.0", "conv3"} <= set(names)
    for name in names:
        handles = [b.get_submodule(name).register_forward_hook(lambda m, a, y: y * 1.25) for b in (ours, block)]
        same(ours, block, x)
        for handle in handles:
            handle.remove()


# --- around it --------------------------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("kind", [Nested, AntiAliased])
def test_copies(kind, copied):
    model, x = untouched(kind, train=False)
    ours = swapped(model, memory="lean")
    other = copied(ours)
    assert [type(m) for m in other.modules()] == [type(m) for m in ours.modules()]
    assert torch.equal(other(x), ours(x))
    other.stages.stage0[0].register_buffer("own", torch.zeros(1))
    assert "own" not in dict(ours.named_buffers())
    restore_blocks(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]


def test_checkpoints_load_both_ways():
    model, x = untouched(Nested, train=False)
    ours = swap_blocks(Network(Nested)).double()
    ours(x)
    ours.eval().load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), model(x))
    model.load_state_dict(ours.state_dict(), strict=True)


def test_called_by_keyword_or_wrongly():
    block = swap_blocks(Nested(16, 16)).eval()
    x = torch.randn(2, 16, 9, 9)
    assert torch.equal(block(hidden_state=x), block(x))
    for args, options in (((), {}), ((x, x), {}), ((x,), {"hidden_state": x}), ((), {"x": x})):
        with pytest.raises(TypeError, match="forward"):
            block(*args, **options)


# What Dropped draws when it is compiled in training is not what it draws otherwise.
@pytest.mark.parametrize(
    "kind, train",
    [
        (Nested, True),
        (AntiAliased, False),
        pytest.param(Nested, False, marks=pytest.mark.slow),
        pytest.param(AntiAliased, True, marks=pytest.mark.slow),
        pytest.param(Dropped, False, marks=pytest.mark.slow),
    ],
)
def test_compiles_whole(kind, train):
    torch._dynamo.reset()
    model, x = untouched(kind, train=train)
    compiled = torch.compile(swapped(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_exports():
    model, x = untouched(AntiAliased, train=False)
    program = torch.export.export(swapped(model), (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def test_is_traced_and_looked_into():
    model, x = untouched(Nested, train=False)
    ours = swapped(model)
    traced = torch.fx.symbolic_trace(ours)
    torch.testing.assert_close(traced(x), model(x))
    assert any("normalization" in str(n.target) for n in traced.graph.nodes)  # as modules, to be switched or quantized
    nodes = ["stages.stage1", "stages.stage3"]
    found, want = (create_feature_extractor(m, nodes)(x) for m in (ours, model))
    for node in nodes:
        torch.testing.assert_close(found[node], want[node])


@modes
@pytest.mark.parametrize("kind", [Nested, Attended, Tower, Padded])
def test_dtypes_under_autocast(kind, train):
    """Where an add out of place gives its result the dtype of its float32 input, so does a fused block."""
    block = kind(16, 16).train(train)
    ours = swap_blocks(copy.deepcopy(block))
    assert isinstance(ours, TracedBlock)
    x = torch.randn(2, 16, 8, 8)
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            a, b = ours(given), block(given)
        assert a.dtype is b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05)


def planned(model: nn.Module, x: torch.Tensor) -> None:
    """Planned, untouched and swapped, it gives what it gives."""
    model, x = model.float(), x.float()
    want = model(x)
    for m in (model, swapped(model)):
        fast = fused_resnet.optimize_for_inference(m, example_input=x)
        torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Nested, Attended])
def test_planned(kind, device):
    planned(*untouched(kind, device, train=False))


def test_classes_that_are_particular():
    """Registers of subclasses, and metaclasses, hear nothing of fused classes."""
    heard = []

    class Registered(Cifar):
        def __init_subclass__(cls, **options):
            heard.append(cls)

    class Meta(type):
        def __new__(cls, name, bases, names):
            heard.append(name)
            return super().__new__(cls, name, bases, names)

    class Made(Cifar, metaclass=Meta):
        pass

    class Particular(Cifar):
        def __getattr__(self, name):
            if name == "memory":
                raise KeyError(name)
            return super().__getattr__(name)

    heard.clear()
    model = swap_blocks(nn.Sequential(Registered(16, 16), Made(16, 16), Particular(16, 16)))
    report = swap_report(model)
    assert [b.status for b in report.blocks] == ["fused", "left"] and not heard
    assert report.left[0].reason == "Made is of a metaclass of its own"


def test_under_a_profiler():
    """It goes on, and blocks are found as without it."""
    profile = cProfile.Profile()
    profile.enable()
    block = swap_blocks(Nested(16, 16))
    helper(torch.zeros(1))
    profile.disable()
    assert isinstance(block, TracedBlock)
    assert "helper" in {getattr(entry.code, "co_name", "") for entry in profile.getstats()}


def test_while_garbage_is_collected():
    """What the collector calls, whenever it comes, is no doing of the forward's: hypothesis has it called back."""
    heard, thresholds = [], gc.get_threshold()

    def callback(phase, info):
        heard[:0] = [phase]

    model = nn.Sequential(*(Nested(16, 16) for _ in range(8)))
    gc.callbacks.append(callback)
    gc.set_threshold(1, 1, 1)
    try:
        swap_blocks(model)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(callback)
    assert heard and gc.isenabled() and len(swap_report(model).fused) == 8


def test_scripted_modules_inside_are_left_alone():
    block = Cifar(16, 16)
    block.conv2 = nn.Sequential(torch.jit.script(nn.Tanh()), block.conv2)
    assert swap_report(nn.Sequential(block)).blocks == ()


def test_inputs_that_are_no_batch_of_maps():
    """They reach the block's own forward, with its own error."""
    block = swap_blocks(Cifar(16, 16)).eval()
    for wrong in ([torch.randn(2, 16, 5, 5)], torch.randn(16)):
        with pytest.raises(TypeError if isinstance(wrong, list) else RuntimeError, match="conv2d|Expected"):
            block(wrong)
    with torch.device("meta"):
        assert swap_blocks(Cifar(16, 16)).eval()(torch.randn(2, 16, 5, 5)).shape == (2, 16, 5, 5)


def test_an_argument_with_a_name_of_pythons():
    class Named(Cifar):
        def forward(self, input):
            return super().forward(input)

    block, x = swap_blocks(Named(16, 16)).eval(), torch.randn(2, 16, 5, 5)
    assert torch.equal(block(input=x), block(x))
    with pytest.raises(TypeError, match="input_1"):
        block(input_1=x)


class Narrow(Tower):
    """A chain of one channel: the add broadcasts it."""

    def __init__(self, *size):
        super().__init__(*size)
        self.body[3], self.body[4] = conv3(16, 1), nn.BatchNorm2d(1)


class Context(Attended):
    """A chain that ends in maps of one pixel."""

    def __init__(self, *size):
        super().__init__(*size)
        self.between = nn.AdaptiveAvgPool2d(1)


class Wider(nn.Module):
    def forward(self, x):
        return x.to(torch.float64)


class WiderShortcut(Padded):
    def __init__(self, *size):
        super().__init__(*size)
        self.shortcut = Wider()

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class WiderTail(Attended):
    def __init__(self, *size):
        super().__init__(*size)
        self.se = Wider()


class ProjectedToOne(Cifar):
    def __init__(self, *size):
        super().__init__(*size)
        self.shortcut = nn.Sequential(conv1(16, 1), nn.BatchNorm2d(1))


@modes
@pytest.mark.parametrize("kind", [Narrow, Context, WiderShortcut, WiderTail, ProjectedToOne])
def test_sums_of_other_sizes_and_dtypes(kind, train):
    """As PyTorch's add has them."""
    block = kind(16, 16).train(train)
    ours, x = swap_blocks(copy.deepcopy(block)), torch.randn(4, 16, 9, 9)
    assert isinstance(ours, TracedBlock) and swap_report(ours).blocks[0].reason == ""
    a, b = (copy.deepcopy(m)(x) for m in (ours, block))
    assert a.dtype is b.dtype and a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    same(ours.double(), block.double(), x.double())


class InPlace(Narrow):
    """A chain of one channel has no room for the sum."""

    def forward(self, x):
        out = self.body(x)
        out += x
        return self.out(out)


@modes
def test_a_sum_in_place_that_does_not_fit(train):
    for block in (InPlace(16, 16), swap_blocks(InPlace(16, 16))):
        with pytest.raises(RuntimeError, match="output with shape .* doesn't match the broadcast shape"):
            block.train(train)(torch.randn(2, 16, 9, 9))


class ShortcutFirst(Padded):
    def forward(self, x):
        identity = self.shortcut(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + identity)


class SharedNorm(Cifar):
    def __init__(self, *size):
        super().__init__(*size)
        self.shortcut = nn.Sequential(conv1(16, 16), self.bn1)


@pytest.mark.parametrize(
    "kind, reason",
    [
        (ShortcutFirst, "shortcut: is called before the convolutions"),
        (SharedNorm, "bn1: stands in the chain as well"),
        (CalledByKeyword, "mul, where a ReLU would be fused"),
    ],
)
def test_calls_that_a_fused_block_does_not_make(kind, reason):
    with pytest.warns(UserWarning, match=f"none of its 1 .* {reason}"):
        swap_blocks(nn.Sequential(kind(16, 16)))


def test_gradients_of_gradients(device):
    model, x = untouched(Nested, device)
    ours = swapped(model)
    found = []
    for m in (ours, model):
        given = x.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(m(given).square().sum(), given, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [given, *m.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert parity.error(a, b) < 1e-8
