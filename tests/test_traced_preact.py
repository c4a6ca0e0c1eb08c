"""Pre-activation blocks of classes that the package does not know: found by their forward, fused, and left alone."""

from __future__ import annotations

import copy
import operator
import pickle
import warnings

import parity
import pytest
import torch
import torch.nn.functional as F
from test_traced_blocks import (
    DropPath,
    Squeeze,
    Subsampled,
    conv1,
    conv3,
    memories,
    modes,
    pickled,
    planned,
    seen,
    swapped,
)
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from fused_resnet import restore_blocks, swap_blocks, swap_report
from fused_resnet.traced_blocks import TracedBlock, anatomy_of

pytestmark = pytest.mark.filterwarnings("ignore:bias")

# --- blocks as people write them: (channels in, out, stride) ----------------------------------------------------------


class Plain(nn.Module):
    """ReLUs are functions; a block without a projection has no attribute for one."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3(outputs, outputs)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv1(inputs, outputs, stride))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class Bottleneck(Plain):
    """With a grouped convolution in the middle."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, stride)
        width = outputs // 4
        self.conv1, self.bn2 = conv1(inputs, width), nn.BatchNorm2d(width)
        self.conv2, self.bn3 = conv3(width, width, stride, groups=2), nn.BatchNorm2d(width)
        self.conv3 = conv1(width, outputs)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        side = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return self.conv3(F.relu(self.bn3(out))) + side


class Wide(nn.Module):
    """Of a Wide ResNet: what changes channels hands on what is activated; dropout asks for the mode."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, rate: float = 0.0):
        super().__init__()
        self.bn1, self.relu1, self.conv1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv3(inputs, outputs, stride)
        self.bn2, self.relu2, self.conv2 = nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), conv3(outputs, outputs)
        self.rate = rate
        self.same = inputs == outputs and stride == 1
        self.side = None if self.same else conv1(inputs, outputs, stride)

    def forward(self, x):
        if not self.same:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.same else x)))
        if self.rate > 0:
            out = F.dropout(out, p=self.rate, training=self.training)
        out = self.conv2(out)
        return torch.add(x if self.same else self.side(x), out)


class Biased(nn.Module):
    """Another: biases everywhere, dropout in front of the second batch norm, a projection of x itself."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, rate: float = 0.3):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.dropout = nn.Dropout(rate)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, stride, 1)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride))

    def forward(self, x):
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        out = self.conv2(F.relu(self.bn2(out)))
        out += self.shortcut(x)
        return out


class Hourglass(nn.Module):
    """Three convolutions with biases; dropout in front of the last."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        width = outputs // 2
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, width, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, stride, 1)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), nn.Conv2d(width, outputs, 1)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout2d(0.2)
        self.downsample = None if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        residual = x
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.drop(self.relu(self.bn3(out))))
        if self.downsample is not None:
            residual = self.downsample(x)
        return residual + out


class Unit(nn.Module):
    """A batch norm, a ReLU and a convolution, which may tell what it convolves."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1, tells: bool = False):
        super().__init__()
        self.tells = tells
        self.bn, self.activ = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)

    def forward(self, x):
        x = self.activ(self.bn(x))
        if self.tells:
            inner = x
        x = self.conv(x)
        return (x, inner) if self.tells else x


class Body(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.conv2 = Unit(inputs, outputs, stride=stride, tells=True), Unit(outputs, outputs)

    def forward(self, x):
        x, inner = self.conv1(x)
        return self.conv2(x), inner


class Nested(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.resizes = inputs != outputs or stride != 1
        self.body = Body(inputs, outputs, stride)
        if self.resizes:
            self.identity_conv = conv1(inputs, outputs, stride)

    def forward(self, x):
        identity = x
        x, inner = self.body(x)
        if self.resizes:
            identity = self.identity_conv(inner)
        return x + identity


class Adopting(Plain):
    """What is activated is added, padded by a module that is called last."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, stride)
        self.shortcut = Subsampled(outputs - inputs, stride)

    def forward(self, x):
        x = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(x))))
        return out + self.shortcut(x)


class Adopted(Adopting):
    """Nothing stands on the shortcut."""

    def forward(self, x):
        x = F.relu(self.bn1(x))
        return x + self.conv2(F.relu(self.bn2(self.conv1(x))))


class Dropped(Plain):
    """Attention and stochastic depth in front of the add; the shortcut, pooled, is computed first."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, stride)
        self._modules.pop("shortcut", None)
        self.se, self.drop_path = Squeeze(outputs), DropPath(0.4)
        self.side = nn.Sequential(
            nn.AvgPool2d(stride), nn.Dropout(0.3), conv1(inputs, outputs), nn.BatchNorm2d(outputs)
        )

    def forward(self, x):
        side = self.side(x)
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return self.drop_path(self.se(out)) + side


KINDS = (Plain, Bottleneck, Wide, Biased, Hourglass, Nested, Adopting, Adopted, Dropped)


class Network(nn.Module):
    """A stem, four blocks, two of which change channels, and a head. (A batch norm behind them would take the
    gradients of their biases away.)"""

    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        self.stem = conv3(3, 16)
        sizes = ((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 40, 1))
        self.blocks = nn.Sequential(*(kind(*size) for size in (sizes[::2] if kind is Adopted else sizes)))
        if kind is Adopted:
            self.blocks = nn.Sequential(kind(16, 16), kind(16, 16))
        self.head = nn.LazyLinear(5)

    def forward(self, x):
        return self.head(F.relu(self.blocks(self.stem(x))).mean((2, 3)))


def untouched(kind: type[nn.Module], device="cpu", train: bool = True) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Network(kind).to(device), torch.randn(3, 3, 14, 18).to(device)
    model(x)
    return parity.calibrate(parity.randomize_norms(model, 0), x).double().train(train), x.double()


def block(kind: type[nn.Module], *size, train: bool = True, **options) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return parity.randomize_norms(kind(*size, **options).double(), 0).train(train), torch.randn(
        2, size[0], 10, 12
    ).double()


def fused(model: nn.Module, **options) -> nn.Module:
    ours = swap_blocks(nn.Sequential(copy.deepcopy(model)), memory_format=torch.preserve_format, **options)[0]
    assert isinstance(ours, TracedBlock), swap_report(ours)
    return ours


def same(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, limit: float = 1e-9) -> None:
    """But for gradients of biases that a batch norm takes away, which are zero or their rounding."""
    for _ in range(2):
        mine, want = seen(ours, x), seen(theirs, x)
        for name in [name for name, t in want.items() if name.endswith("bias") and t.abs().max() < 1e-10]:
            assert mine.pop(name).abs().max() < 1e-10
            want.pop(name)
        found = parity.errors(mine, want)
        assert max(found.values()) < limit, max((e, n) for n, e in found.items())


# --- parity -----------------------------------------------------------------------------------------------------------


@modes
@memories
@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_own_forward(kind, memory, train, device):
    model, x = untouched(kind, device, train)
    # The numbers that are drawn go to values in the order of their places in memory.
    drops = any(isinstance(m, (nn.Dropout, nn.Dropout2d)) for m in model.modules())
    ours = swapped(model, memory=memory, memory_format=torch.preserve_format if drops else torch.channels_last)
    assert len(swap_report(ours).fused) == len(model.blocks)
    same(ours, model, x)
    assert {b.reason for b in swap_report(ours).blocks} == {""}


@modes
@pytest.mark.parametrize("kind", [Bottleneck, Hourglass])
def test_float32_by_the_rule(kind, train, device):
    model, x = untouched(kind, device, train)
    for m in model.modules():
        if isinstance(m, nn.Dropout2d):
            m.p = 0.0
    model, x = model.float(), x.float()
    judge = parity.judge_of(model, x)
    yardstick = parity.yardstick_of(model, x, judge)
    for layout in ("contiguous", "channels_last"):
        ours, image = parity.as_variant(layout, swapped(model), x)
        found = parity.errors(parity.observe(ours, image), judge)
        vanish = [name for name, t in judge.items() if name.endswith("bias") and t.abs().max() < 1e-10]
        parity.check({name: e for name, e in found.items() if name not in vanish}, yardstick)


@modes
@memories
@pytest.mark.parametrize("kind", [Plain, Biased, Hourglass, Dropped])
def test_a_hook_anywhere_is_called_and_heeded(kind, memory, train):
    """Each module inside a block, one at a time, has its result replaced."""
    model, x = block(kind, 16, 32, 2, train=train)
    ours = fused(model, memory=memory)
    names = [name for name, _ in model.named_modules() if name]
    assert {"bn1", "conv2"} < set(names)
    for name in names:
        handles = [b.get_submodule(name).register_forward_hook(lambda m, a, y: y * 1.25) for b in (ours, model)]
        same(ours, model, x)
        for handle in handles:
            handle.remove()
    same(ours, model, x)


@pytest.mark.parametrize("kind", [Plain, Biased, Dropped])
def test_some_norms_frozen(kind):
    for name in ("bn1", "bn2"):
        model, x = block(kind, 16, 32, 2)
        ours = fused(model)
        for b in (ours, model):
            b.get_submodule(name).eval()
        same(ours, model, x)


@modes
@pytest.mark.parametrize("kind", [Plain, Wide, Biased, Nested, Adopting, Adopted, Dropped])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_dtypes_under_autocast(kind, given, train):
    """The sum has the dtype that the block's own has, and so has what modules inside are given."""
    for outputs in (16,) if kind is Adopted else (16, 32):
        model, x = block(kind, 16, outputs, train=train)
        model, x = model.float(), x.to(given)
        ours, heard = fused(model), []
        with torch.autocast("cpu", torch.bfloat16):
            for b in (ours, model):
                side = b._modules.get("shortcut", b._modules.get("side"))
                if side is not None and len(side._modules) != 1 and type(side) is not nn.Conv2d:
                    for m in (side, *side.children()):
                        b.heard = []
                        m.register_forward_pre_hook(lambda m, a, heard=b.heard: heard.append(a[0].dtype))
                torch.manual_seed(3)
                heard.append((b(x), getattr(b, "heard", None)))
        (a, mine), (b, theirs) = heard
        assert a.dtype is b.dtype and mine == theirs
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05)


def test_gradients_of_gradients(device):
    model, x = untouched(Hourglass, device)
    for m in model.modules():
        if isinstance(m, nn.Dropout2d):
            m.p = 0.0
    found = []
    for m in (swapped(model), model):
        given = x.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(m(given).square().sum(), given, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [given, *m.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        if b is None or b.abs().max() < 1e-10:
            assert a is None or a.abs().max() < 1e-10
        else:
            assert parity.error(a, b) < 1e-8


# --- what is lean, what is called, what is left -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, note",
    [
        (Plain, "lean"),
        (Nested, "lean"),
        (Adopted, "lean"),
        (Biased, "not lean: Dropout in front of a batch norm"),
        (Hourglass, "not lean: Dropout2d in front of a convolution"),
        (Dropped, "shortcut: AvgPool2d is called as it is; not lean: Squeeze, DropPath in front of the add"),
        (Adopting, "shortcut: Subsampled is called as it is; not lean: shortcut: Subsampled is called as it is"),
    ],
)
def test_what_is_not_lean_is_noted(kind, note):
    model, _ = block(kind, 16, 16)
    report = swap_report(nn.Sequential(fused(model, memory="lean")))
    assert [b.note for b in report.blocks] == [note]


class TwoReaders(Plain):
    """Both of what is in the middle."""

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + out


class ReadsTheNorm(Plain):
    def forward(self, x):
        out = self.bn1(x)
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(out))))) + out


class AddsToItsInput(Plain):
    def forward(self, x):
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        x += out
        return x


class AddsThree(Plain):
    def forward(self, x):
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))) + x + x


class Scaled(Plain):
    def forward(self, x):
        return torch.add(self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))), x, alpha=0.5)


class Inverted(Plain):
    """Convolution, batch norm and ReLU, and a sum without a ReLU."""

    def forward(self, x):
        return x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class HasWhatFusedBlocksHave(Plain):
    def forward(self, x):
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return x if hasattr(self, "memory") else out + x


class ByAGetter(Plain):
    """Which calls no function that could be looked at."""

    mode = property(operator.attrgetter("training"))

    def forward(self, x):
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return out + x if self.mode else x


class AsksForTheMode(Plain):
    def forward(self, x):
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return out + x if self.training else x


@pytest.mark.parametrize(
    "kind",
    [TwoReaders, ReadsTheNorm, AddsToItsInput, AddsThree, Scaled, Inverted, AsksForTheMode, HasWhatFusedBlocksHave]
    + [ByAGetter],
)
def test_is_not_taken_for_a_block(kind):
    assert anatomy_of(kind(16, 16)) is None


class NormAtTheEnd(Plain):
    def __init__(self, *size):
        super().__init__(*size)
        self.bn3 = nn.BatchNorm2d(16)

    def forward(self, x):
        return x + self.bn3(self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))))


class Attended(Plain):
    def __init__(self, *size):
        super().__init__(*size)
        self.se = Squeeze(16)

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.se(self.conv1(F.relu(self.bn1(x)))))))


class SlicedShortcut(Plain):
    def forward(self, x):
        return x[:, :16] + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class Among(Adopting):
    def forward(self, x):
        x = F.relu(self.bn1(x))
        out = self.conv1(x)
        side = self.shortcut(x)
        return self.conv2(F.relu(self.bn2(out))) + side


class SharedNorm(Plain):
    """The norm of the shortcut is one of the chain's: it would run in another order."""

    def __init__(self, *size):
        super().__init__(*size)
        self.side = nn.Sequential(conv1(16, 16), self.bn2)

    def forward(self, x):
        side = self.side(x)
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))) + side


class Grouped(Plain):
    def __init__(self, *size):
        super().__init__(*size)
        self.bn2 = nn.GroupNorm(4, 16)


@pytest.mark.parametrize(
    "kind, reason",
    [
        (NormAtTheEnd, "bn3: BatchNorm2d, where a convolution would be fused"),
        (Attended, "se: Squeeze, where a batch norm would be fused"),
        (SlicedShortcut, "its shortcut is neither the input, nor a projection, nor modules alone"),
        (Among, "shortcut: is called between the first batch norm and the last convolution"),
        (SharedNorm, "bn2: stands in the chain as well"),
        (Grouped, "bn2: GroupNorm is none of BatchNorm2d"),
    ],
)
def test_left_with_its_reason(kind, reason):
    model = nn.Sequential(kind(16, 16), Plain(16, 16))
    assert [b.name for b in swap_report(swap_blocks(model)).fused] == ["1"] and type(model[0]) is kind
    assert swap_report(model).left[0].reason.startswith(reason)


def test_dropout_by_a_function_is_left_where_it_drops():
    """Whether it does decides the trace; later it is compared."""
    assert anatomy_of(Wide(16, 16, rate=0.5)) is None
    model, x = block(Wide, 16, 16)
    ours = fused(model)
    assert swap_report(ours).blocks[0].reason == ""
    for b in (ours, model):
        b.rate = 0.5
    same(ours, model, x)
    assert swap_report(ours).blocks[0].reason == "runs unfused: rate is another than when the block was recognised"


class Draws(nn.Conv2d):
    """A projection that has to be called, in its turn."""

    def forward(self, x):
        return super().forward(x) + torch.randn(1, dtype=x.dtype)


class DrawsLate(Plain):
    def __init__(self, *size):
        super().__init__(*size)
        self.drop, self.proj = nn.Dropout(0.5), Draws(16, 16, 1, bias=False)

    def forward(self, x):
        out = self.conv2(self.drop(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))))
        return out + self.proj(x)


@modes
def test_what_stands_on_a_shortcut_is_called_in_its_turn(train):
    model, x = block(DrawsLate, 16, 16, train=train)
    ours = fused(model)
    assert swap_report(ours).blocks[0].note == "shortcut: Draws is called as it is"
    same(ours, model, x)
    model.proj = ours.proj = conv1(16, 16).double()
    same(ours, model, x)
    model, x = block(Biased, 16, 32, train=train)
    ours = fused(model)
    for b in (ours, model):
        b.shortcut[0].register_forward_hook(lambda m, a, y: y + torch.randn(1, dtype=y.dtype))
    same(ours, model, x)
    assert swap_report(ours).blocks[0].reason == "runs unfused: shortcut.0: has hooks"


class Asked(nn.Module):
    """What is asked for an attribute, and for its mode, and called as it is."""

    def active(self):
        return self.training

    def forward(self, x):
        return x * 2


class Asks(Plain):
    def __init__(self, *size):
        super().__init__(*size)
        self.se = Asked()

    def forward(self, x):
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return x + self.se(out) if not hasattr(self.se, "extra") and self.se.active() is self.training else x


@modes
def test_what_a_module_that_is_called_was_asked_for(train):
    model, x = block(Asks, 16, 16, train=train)
    for change in (lambda m: m.se.train(not m.training), lambda m: setattr(m.se, "extra", nn.Linear(1, 1))):
        ours, theirs = fused(model), copy.deepcopy(model)
        assert swap_report(ours).blocks[0].reason == ""
        same(ours, theirs, x)
        for b in (ours, theirs):
            change(b)
        assert swap_report(ours).blocks[0].reason.startswith("runs unfused: se: ")
        assert torch.equal(ours(x), theirs(x))


class EitherWay(Plain):
    """Two containers of one convolution, each called in one mode."""

    def __init__(self, *size):
        super().__init__(*size)
        self.one, self.two = nn.Sequential(self.conv1), nn.Sequential(self.conv1)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        out = self.one(out) if self.training else self.two(out)
        return x + self.conv2(F.relu(self.bn2(out)))


@modes
@pytest.mark.parametrize("name", ["one", "two"])
def test_hooks_on_what_is_called_in_one_mode(name, train):
    model, x = block(EitherWay, 16, 16, train=train)
    ours = fused(model)
    for b in (ours, model):
        b.get_submodule(name).register_forward_hook(lambda m, a, y: y * 3)
    same(ours, model, x)


class Halves(nn.Module):
    """Of the body of Moody, which asks for its own mode."""

    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(16), conv3(16, 16)

    def forward(self, x):
        out = F.relu(self.bn(x))
        return self.conv(out if self.training else out)


class Moody(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Halves(), Halves()

    def forward(self, x):
        return x + self.two(self.one(x)) if self.training else x + self.two(self.one(x))


def test_modules_that_look_at_their_modes_have_the_blocks():
    """A trace was made for either mode, and for none that is mixed. A batch norm has its own."""
    model, x = Moody().double(), torch.randn(2, 16, 9, 9).double()
    ours = fused(model)
    for b in (ours, model):
        b.two.eval()
    assert [m.training for m in ours.modules()] == [m.training for m in model.modules()]
    assert "two: is in another mode than the block, which looks at it" in swap_report(ours).blocks[0].reason
    for b in (ours, model):
        b.train().two.bn.eval()
    assert swap_report(ours).blocks[0].reason == ""
    same(ours, model, x)


class AsksByAComputedName(Plain):
    def forward(self, x):
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return x if hasattr(self, self.name) else out + x

    name = "other"


class AsksItsClass(AsksByAComputedName):
    other = 1


def test_an_attribute_that_comes_later():
    """hasattr said that there was none."""
    for name, value in (("shortcut", nn.Sequential(nn.Tanh())), ("shortcut", torch.tanh)):
        model, x = block(Plain, 16, 16)
        ours = fused(model)
        assert swap_report(ours).blocks[0].reason == ""
        for b in (ours, model):
            setattr(b, name, value)
        assert swap_report(ours).blocks[0].reason.startswith("runs unfused: ")
        same(ours, model, x)
    model, x = block(Plain, 16, 32)
    ours = fused(model)
    del ours.shortcut
    assert "other modules than when" in swap_report(ours).blocks[0].reason
    assert anatomy_of(AsksItsClass(16, 16)) is None  # nothing is called that could be heard
    ours, x = fused(AsksByAComputedName(16, 16)), torch.randn(2, 16, 5, 5)
    ours.other = None
    assert torch.equal(ours.eval()(x), AsksByAComputedName.forward(ours, x))


class NarrowInPlace(Plain):
    """A chain of one channel, which has no room for the sum."""

    def __init__(self, *size):
        super().__init__(*size)
        self.conv2 = conv3(16, 1)


class Narrow(NarrowInPlace):
    """The add broadcasts it."""

    def forward(self, x):
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))) + x


class Pooled(Plain):
    """A chain that ends in maps of one pixel."""

    def __init__(self, *size):
        super().__init__(*size)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return x + self.pool(self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))))


class NarrowShortcut(Plain):
    def __init__(self, *size):
        super().__init__(*size)
        self.shortcut = nn.Sequential(conv1(16, 1))


class Pixel(Plain):
    """A projection to one pixel."""

    def __init__(self, *size):
        super().__init__(*size)
        self.shortcut = nn.Sequential(nn.Conv2d(16, 16, 9, 9, bias=False))


class WiderShortcut(Plain):
    def __init__(self, *size):
        super().__init__(*size)
        self.shortcut = Wider()


class Wider(nn.Module):
    def forward(self, x):
        return x.to(torch.float64)


@modes
@pytest.mark.parametrize("kind", [Narrow, NarrowShortcut, Pixel, WiderShortcut, Pooled])
def test_sums_of_other_sizes_and_dtypes(kind, train):
    """As PyTorch's add has them."""
    for m in (NarrowInPlace(16, 16).train(train), fused(NarrowInPlace(16, 16)).train(train)):
        with pytest.raises(RuntimeError, match="output with shape"):
            m(torch.randn(4, 16, 9, 9))
    model = kind(16, 16).train(train)
    ours, x = fused(model), torch.randn(4, 16, 9, 9)
    a, b = (copy.deepcopy(m)(x) for m in (ours, model))
    assert a.dtype is b.dtype and a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    same(ours.double(), model.double(), x.double())


def test_a_convolution_that_is_narrower_later():
    ours = fused(Narrow(16, 16)).eval()
    ours.conv2 = conv3(16, 16)
    assert swap_report(ours).blocks[0].reason == "" and ours(torch.randn(2, 16, 5, 5)).shape == (2, 16, 5, 5)
    ours.conv2 = conv3(16, 1)
    assert ours(torch.randn(2, 16, 5, 5)).shape == (2, 16, 5, 5)


def test_biases_behind_which_a_norm_stands_are_warned_of():
    """Behind dropout a bias is one, and has a gradient."""
    for kind, names in ((Hourglass, "0.conv1, 0.conv2"), (Biased, None)):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            swap_blocks(nn.Sequential(kind(16, 16)))
        assert [str(w.message).split(": a batch norm")[0] for w in heard] == ([f"bias: {names}"] if names else [])


# --- around it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies(copied):
    model, x = untouched(Nested, train=False)
    ours = swapped(model, memory="lean")
    other = copied(ours)
    assert [type(m) for m in other.modules()] == [type(m) for m in ours.modules()]
    assert torch.equal(other(x), ours(x))
    restore_blocks(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert [set(vars(m)) for m in other.modules()] == [set(vars(m)) for m in model.modules()]


def test_called_by_keyword_or_wrongly():
    model, x = block(Plain, 16, 16, train=False)
    ours = fused(model)
    assert torch.equal(ours(x=x), ours(x))
    for args, options in (((), {}), ((x, x), {}), ((x,), {"x": x}), ((), {"y": x})):
        with pytest.raises(TypeError, match="forward"):
            ours(*args, **options)


@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiles_whole(train):
    torch._dynamo.reset()
    model, x = untouched(Wide, train=train)
    compiled = torch.compile(swapped(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_exported_traced_and_looked_into():
    model, x = untouched(Bottleneck, train=False)
    ours = swapped(model)
    torch.testing.assert_close(torch.export.export(ours, (x,)).module()(x), model(x))
    traced = torch.fx.symbolic_trace(ours)
    torch.testing.assert_close(traced(x), model(x))
    assert any("bn2" in str(n.target) for n in traced.graph.nodes)  # as modules, to be switched or quantized
    nodes = ["blocks.1", "blocks.3"]
    found, want = (create_feature_extractor(m, nodes)(x) for m in (ours, model))
    for node in nodes:
        torch.testing.assert_close(found[node], want[node])


@pytest.mark.parametrize("kind", [Plain, Hourglass])
def test_planned(kind, device):
    planned(*untouched(kind, device, train=False))


def test_checkpoints_of_a_pickled_block_and_its_anatomy():
    model, _ = block(Plain, 16, 32)
    ours = fused(model)
    assert pickle.loads(pickle.dumps(ours._anatomy)) == ours._anatomy
    assert ours.state_dict().keys() == model.state_dict().keys()
