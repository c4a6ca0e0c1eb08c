"""Batch norms that others froze, as detectron2, DETR and Hugging Face do: found by what they compute, and fused."""

from __future__ import annotations

import copy

import detectron2_standin
import parity
import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d as Torchvisions

from fused_resnet import frozen, optimize_for_inference, swap_blocks, swap_report
from fused_resnet.frozen import eps_of, is_frozen
from fused_resnet.functional import batch_norm_act


class Buffers(nn.Module):
    """Four, as all of them have."""

    def __init__(self, n):
        super().__init__()
        for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((n,), start))


def column(t):
    return t.reshape(1, -1, 1, 1)


class Detrs(Buffers):
    """eps is a number in its code; older checkpoints have one tensor more."""

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x):
        w, b = column(self.weight), column(self.bias)
        rv, rm = column(self.running_var), column(self.running_mean)
        scale = w * (rv + 1e-5).rsqrt()
        return x * scale + (b - rm * scale)


Detrs.__name__ = "DetrFrozenBatchNorm2d"
detectron2s = type("FrozenBatchNorm2d", (detectron2_standin.FrozenBatchNorm2d,), {})
KINDS = (Detrs, detectron2s, Torchvisions)


def wrong(forward, name="FrozenBatchNorm2d", **attributes):
    return type(name, (Buffers,), {"forward": forward, **attributes})


def affine(m, x, eps=1e-5):
    return (x - column(m.running_mean)) * column(m.weight) / (column(m.running_var) + eps).sqrt() + column(m.bias)


def double_in_training(m, x):
    return affine(m, x) * (2 if m.training else 1)


def double_with_gradients(m, x):
    return affine(m, x) * (2 if x.requires_grad else 1)


def eps_of_its_own(m, x):
    return affine(m, x, 1e-3)


def eps_outside(m, x):
    return (x - column(m.running_mean)) * column(m.weight) / (column(m.running_var).sqrt() + 1e-5) + column(m.bias)


def without_statistics(m, x):
    return x * column(m.weight) + column(m.bias)


def raises(m, x):
    raise ValueError("no")


WRONG = (double_in_training, double_with_gradients, eps_of_its_own, eps_outside, without_statistics, raises)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_found_by_what_they_compute(kind):
    norm = kind(8)
    state = copy.deepcopy(norm.state_dict())
    assert is_frozen(norm) and eps_of(norm) == 1e-5
    assert all(torch.equal(a, b) for a, b in zip(state.values(), norm.state_dict().values(), strict=True))


@pytest.mark.parametrize("forward", WRONG, ids=lambda f: f.__name__)
def test_others_are_none(forward):
    assert not is_frozen(wrong(forward)(8))


class Half(Torchvisions):
    def forward(self, x):
        return super().forward(x) * 0.5


class HalfFrozenBatchNorm2d(Half):
    pass


@pytest.mark.parametrize("kind", [Half, HalfFrozenBatchNorm2d])
def test_a_subclass_of_torchvisions_that_does_more(kind):
    assert not is_frozen(kind(8))
    model = nn.Sequential(BasicBlock(8, 8, norm_layer=kind), BasicBlock(8, 8))
    assert [b.reason for b in swap_report(swap_blocks(model)).left] == [
        f"bn1: {kind.__name__} is none of BatchNorm2d, FrozenBatchNorm2d, SyncBatchNorm"
    ]


def test_a_subclass_that_changes_nothing():
    kind = type("MyFrozenBatchNorm2d", (Torchvisions,), {})
    assert is_frozen(kind(8)) and eps_of(kind(8, eps=0.5)) == 0.5


def steered(m, x):
    return affine(m, x, getattr(m, "epsilon", 1e-5))


def with_its_class(m, x):
    return affine(m, x, m.eps)


def test_what_an_instance_may_go_by():
    """An eps by another name, or any attribute; one of the class."""
    kind = wrong(steered)
    assert is_frozen(kind(8))
    noted = kind(8)
    noted._is_initialized = True  # by a library, for itself
    assert is_frozen(noted)
    other = kind(8)
    other.epsilon = 0.5
    assert not is_frozen(other) and is_frozen(kind(8))
    assert not is_frozen(wrong(with_its_class, eps=1e-5)(8))
    assert not is_frozen(wrong(with_its_class, eps=property(lambda m: 1e-5))(8))
    missing = kind(8)
    missing.weight = None
    assert not is_frozen(missing)
    missing = kind(8)
    missing.forward = lambda x: x
    assert not is_frozen(missing)


def on_meta(norm):
    return is_frozen(norm.to("meta"))


def under_meta(norm):
    with torch.device("meta"):
        return is_frozen(norm)


def hooked(norm):
    norm.register_forward_hook(lambda m, args, y: y * 2)
    return is_frozen(norm)


def while_traced(norm):
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.found = norm, None

        def forward(self, x):
            self.found = is_frozen(self.norm)
            return x

    asks = Asks()
    torch.fx.symbolic_trace(asks)
    return asks.found


def without_gradients(norm):
    with torch.inference_mode():
        return is_frozen(norm)


@pytest.mark.parametrize(
    "asked", [on_meta, under_meta, hooked, while_traced, without_gradients], ids=lambda f: f.__name__
)
def test_whoever_asks_first(asked):
    kind = wrong(affine)
    assert asked(kind(8)) and is_frozen(kind(8))


@pytest.mark.parametrize("noted", [False, True])
def test_first_asked_by_a_compiler(noted):
    """Which cannot follow: the block is run as it is, and as soon as somebody has asked, fused."""
    kind = wrong(affine)
    block, x = BasicBlock(8, 8, norm_layer=kind).eval(), torch.randn(2, 8, 9, 9)
    block.bn1._is_initialized = noted
    ours = swap_blocks(copy.deepcopy(block))
    frozen._CLASSES.clear()
    frozen._READ.clear()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-4)
    assert swap_report(ours).blocks[0].reason == ""
    torch.testing.assert_close(ours(x), block(x), rtol=1e-4, atol=1e-4)


class GainFrozenBatchNorm2d(Buffers):
    """One whose code reads an attribute that instances may have."""

    def forward(self, x):
        y, gain = affine(self, x), getattr(self, "gain", None)
        return y if gain is None else gain * y


@pytest.mark.parametrize("compiled", [False, True])
def test_an_attribute_that_its_code_reads_and_that_came_later(compiled):
    block, x = BasicBlock(8, 8, norm_layer=GainFrozenBatchNorm2d).eval(), torch.randn(2, 8, 9, 9)
    ours = swap_blocks(copy.deepcopy(block))
    assert is_frozen(ours.bn1) and swap_report(ours).blocks[0].reason == ""
    ours(x)
    ours.bn1.gain = block.bn1.gain = 3.0
    call = torch.compile(ours, backend="eager", fullgraph=True) if compiled else ours
    torch.testing.assert_close(call(x), block(x), rtol=1e-4, atol=1e-4)


def test_only_what_has_the_name_and_the_buffers_is_tried():
    assert not is_frozen(wrong(affine, "Affine")(8))
    kind = wrong(affine)
    norm = kind(8)
    norm.register_parameter("gain", nn.Parameter(torch.ones(1)))
    assert not is_frozen(norm)
    more = type("FrozenBatchNorm2d", (Buffers,), {"forward": affine})(8)
    more.act = nn.ReLU()
    assert not is_frozen(more)


def test_an_eps_that_is_said_has_to_be_used():
    kind = wrong(affine)
    norm = kind(8)
    norm.eps = 1e-5
    assert not is_frozen(norm)


def network(kind, device="cpu"):
    torch.manual_seed(0)
    model, x = resnet18(norm_layer=kind, num_classes=5).to(device), torch.randn(2, 3, 40, 40).to(device)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, kind):
                for tensor in (m.weight, m.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (m.bias, m.running_mean):
                    tensor.normal_().mul_(0.1)
    return model.double(), x.double()


@pytest.mark.parametrize("kind", KINDS[:2], ids=lambda k: k.__name__)
def test_networks_with_them_are_fused(kind, device):
    model, x = network(kind, device)
    ours = swap_blocks(copy.deepcopy(model))
    assert len(swap_report(ours).fused) == 8 and {b.note for b in swap_report(ours).blocks} == {""}
    for train in (True, False):
        found = parity.errors(parity.observe(ours.train(train), x), parity.observe(model.train(train), x))
        assert max(found.values()) < 1e-9


@pytest.mark.parametrize("kind", KINDS[:2], ids=lambda k: k.__name__)
def test_networks_with_them_are_planned(kind, device):
    model, x = network(kind, device)
    types = [type(m) for m in model.modules()]
    fast = optimize_for_inference(model.float(), x.float(), tune="off")
    assert fast.plan.flop_share == 1.0 and not fast.plan.traced and [type(m) for m in model.modules()] == types
    with torch.no_grad():
        for _ in range(2):
            judge = copy.deepcopy(model).eval().double()(x)
            assert parity.errors({"y": fast(x.float())}, {"y": judge})["y"] < 1e-5
            model.layer2[0].bn1.running_var.mul_(1.5)
            fast.refresh(model)


def test_the_public_function_takes_them():
    model, _ = network(Detrs)
    norm, x = model.bn1, torch.randn(2, 64, 3, 3).double()
    torch.testing.assert_close(batch_norm_act(x, norm), norm(x).relu())
