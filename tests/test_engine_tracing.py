"""What models do in their forward beside calling layers: checks of sizes, norms of their own, results with names."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

import parity
import pytest
import torch
import torch.nn.functional as F
from engine_cases import Net, agree, conv, network_of, ops, randomized
from torch import nn

from fused_resnet import models, optimize_for_inference

X = (5, 3, 11, 13)


def planned(model, x=None, **options):
    """The ops of the plan, and the model's results judged: of two inputs, the second after another call."""
    x = torch.randn(X) if x is None else x
    fast = optimize_for_inference(model, x, tune="off", **options)
    agree(fast(x), model, x)
    agree(fast(x * 0.7 + 0.1), model, x * 0.7 + 0.1)
    return ops(network_of(model, x)), fast


# --- decisions by sizes -----------------------------------------------------------------------------------------------


def refuses_other_channels(m, x):
    if x.shape[1] != 3:
        raise ValueError("expected three channels")
    return m.b(m.a(x))


def chooses_by_height(m, x):
    y = m.a(x)
    return m.b(y) if y.size(2) > 12 or y.shape[-1] == 5 else y


def asks_for_dimensions(m, x):
    return m.b(m.a(x)) if x.dim() == 4 and x.ndim == 4 else x


def asks_far_inside(m, x):
    for _ in range(2):
        x = m.b(F.relu(m.b(m.a(x))))[:, :3]
        assert x.shape[1] == 3 and x.numel() % 3 == 0
    return x


DECISIONS = (refuses_other_channels, chooses_by_height, asks_for_dimensions, asks_far_inside)


@pytest.mark.parametrize("forward", DECISIONS, ids=lambda f: f.__name__)
def test_decided_by_sizes(forward):
    found, fast = planned(Net(forward, a=conv(), b=conv(16)))
    assert "conv" in found and fast.plan.flop_share == 1.0


def test_sizes_that_lead_another_way_are_refused():
    model = Net(chooses_by_height, a=conv(), b=conv(16))
    low, high, narrow = torch.randn(2, 3, 11, 13), torch.randn(2, 3, 16, 16), torch.randn(1, 3, 11, 5)
    fast = optimize_for_inference(model, low, tune="off")
    agree(fast(low), model, low)
    lower = torch.randn(3, 3, 9, 8)
    agree(fast(lower), model, lower)
    for x in (high, narrow):
        with pytest.raises(ValueError, match=r"^input: Net cannot take \[.*for these sizes it takes another way than"):
            fast(x)
        other = optimize_for_inference(model, x, tune="off")
        agree(other(x), model, x)
        assert [len(f.plan.steps) for f in (fast, other)] == [1, 2]
    agree(fast(low), model, low)


def test_nothing_is_decided_by_numbers():
    for forward in (
        lambda m, x: m.a(x) if x.sum() > 0 else x,
        lambda m, x: m.a(x) if (m.a(x).mean() > 0) == (x.shape[1] == 3) else x,
    ):
        with pytest.raises(ValueError, match="Net cannot be traced .*control flow"):
            optimize_for_inference(Net(forward, a=conv()), torch.randn(X), tune="off")


def test_the_model_keeps_what_it_refuses():
    model = Net(refuses_other_channels, a=nn.Conv2d(4, 16, 3), b=conv(16))
    with pytest.raises(ValueError, match="expected three channels"):
        optimize_for_inference(model, torch.randn(2, 4, 9, 9), tune="off")


# --- batch norms of other classes -------------------------------------------------------------------------------------


class Checked(nn.BatchNorm2d):
    """Derived, with the forward that it inherits: it looks at x.dim()."""


class Written(nn.BatchNorm2d):
    """A forward written out, and an activation inside."""

    def __init__(self, channels, **options):
        super().__init__(channels, **options)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        mean = self.running_mean if not self.training or self.track_running_stats else None
        var = self.running_var if not self.training or self.track_running_stats else None
        y = F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)
        return self.act(y)


class Keywords(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(
            x, eps=self.eps, running_var=self.running_var, running_mean=self.running_mean, bias=self.bias,
            weight=self.weight,
        )  # fmt: skip


class OnItsBatch(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean.clone(), self.running_var.clone(), self.weight, self.bias, True)


class Scaled(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight * 2, self.bias, False, 0.1, self.eps)


class Twice(nn.BatchNorm2d):
    """Two norms of one module's numbers, with an epsilon each."""

    def forward(self, x):
        same = (self.running_mean, self.running_var, self.weight, self.bias, False, 0.1)
        return F.batch_norm(x, *same, self.eps) + F.batch_norm(x, *same, 0.5)


def norm_net(kind, **options):
    model = Net(lambda m, x: m.b(F.relu(m.n(m.a(x)))), a=conv(), n=kind(16, **options), b=conv(16))
    return randomized(model)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.3}], ids=["plain", "no affine", "eps"])
@pytest.mark.parametrize("kind", [Checked, Written, Keywords])
def test_derived_norms_are_folded(kind, options):
    model = norm_net(kind, **options)
    keys = list(model.state_dict())
    found, fast = planned(model)
    assert found in (["conv", "conv"], ["conv", "traced", "conv"])  # Written: a second ReLU
    assert all(s.layers != ("n",) for s in fast.plan.steps)
    assert list(model.state_dict()) == keys and type(model.n) is kind
    other = copy.deepcopy(model)
    for t in (*other.parameters(), *other.buffers()):
        if t.is_floating_point():
            t.data.mul_(1.25)
    x = torch.randn(X)
    agree(fast.refresh(other)(x), other, x)


@pytest.mark.parametrize("kind", [OnItsBatch, Scaled, Twice])
def test_other_norms_run_as_they_were_traced(kind):
    found, _ = planned(norm_net(kind))
    assert found.count("conv") == 2 and "traced" in found


def test_a_norm_used_twice():
    model = randomized(Net(lambda m, x: m.n(m.b(F.relu(m.n(m.a(x))))), a=conv(), n=Written(16), b=conv(16)))
    found, fast = planned(model)
    assert fast.plan.flop_share == 1.0 and found.count("conv") == 2


def test_norms_without_running_statistics():
    found, _ = planned(norm_net(nn.BatchNorm2d, track_running_stats=False))
    assert "traced" in found


# --- batch norms behind no convolution --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_a_norm_and_its_relu_are_one_step(affine, dtype, device):
    """As in front of a pre-activation block: of a sum that the shortcut reads as well."""
    layers = {"a": conv(), "n": nn.BatchNorm2d(16, affine=affine), "b": conv(16), "c": conv(3, 16, 1)}
    model = Net(lambda m, x: (lambda s: m.b(F.relu(m.n(s))) + s)(m.a(x) + m.c(x) * 0.5), **layers).to(device)
    x = torch.randn(X).to(device)
    fast = optimize_for_inference(model, x, dtype=dtype, tune="off")
    (norm,) = [s for s in fast.plan.steps if s.op == "norm"]
    assert norm.layers == ("n", "relu") and norm.backend in ("bn_act", "pytorch")
    agree(fast(x), model, x, dtype=dtype)
    other = copy.deepcopy(model)
    for t in (*other.n.parameters(), *other.n.buffers()):
        if t.is_floating_point():
            t.data.mul_(1.5)
    agree(fast.refresh(other)(x), other, x, dtype=dtype)
    fast(x[:2])
    agree(fast(x), other, x, dtype=dtype)


def test_pre_activation_networks_have_nothing_left(device):
    torch.manual_seed(0)
    model = models.imagenet_resnet(18, activation="pre", num_classes=5)
    parity.calibrate(parity.randomize_norms(model, 0, branch=0.3), torch.randn(2, 3, 64, 64))
    model, x = model.eval().to(device), torch.randn(2, 3, 64, 64).to(device)
    fast = optimize_for_inference(model, x)
    agree(fast(x), model, x)
    assert not fast.plan.traced and sum(s.op == "norm" for s in fast.plan.steps) == 9


# --- what is returned -------------------------------------------------------------------------------------------------


@dataclass
class Output(OrderedDict):
    """As Hugging Face's: a dictionary of those fields that are not None, and attributes."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    states: tuple | None = None

    def __post_init__(self):
        for name in ("loss", "logits", "states"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


class Named(Net):
    def forward(self, x=None, labels=None, output_states=None, **kwargs):
        y = self.a(x)
        return Output(logits=self.b(y), states=(x, y) if output_states else (y,))


def test_results_with_names():
    model, x = Named(None, a=conv(), b=conv(16)), torch.randn(X)
    fast = optimize_for_inference(model, x, tune="off")
    got = fast(x)
    assert type(got) is Output and list(got) == ["logits", "states"] and got.loss is None
    want = model(x)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.states[0], want.states[0], rtol=1e-4, atol=1e-4)
    assert isinstance(got.states, tuple) and got["logits"] is got.logits


def test_ordered_results():
    model = Net(lambda m, x: OrderedDict(b=m.a(x), a=(x * 2, {"c": m.b(m.a(x))})), a=conv(), b=conv(16))
    _, fast = planned(model)
    got = fast(torch.randn(X))
    assert type(got) is OrderedDict and list(got) == ["b", "a"] and type(got["a"][1]) is dict


# --- what may be changed where it is ----------------------------------------------------------------------------------


def test_in_place_without_a_copy():
    """Only a tensor that the model made, that nobody else reads and that is no view is changed where it lies."""

    def forward(m, x):
        y = m.r(m.g(m.a(x)))  # alone
        y += m.g(m.b(y))  # y is read by b, too, before: not alone
        z = m.g(m.b(y))
        z += y
        z.mul_(2)  # alone, of a sum that is alone
        v = torch.sigmoid(z)
        w = torch.flatten(v, 1)
        w.add_(1)  # a view, for all that is known
        return w

    model = Net(forward, a=conv(), b=conv(16), g=nn.GroupNorm(4, 16), r=nn.ReLU(inplace=True))
    x = torch.randn(X)
    network = network_of(model, x)
    changed = {n.name for n in network.graph.nodes if n.name in ("r", "iadd", "iadd_1", "mul_", "add_")}
    assert network.spent == {"r", "iadd_1", "mul_"} and changed > network.spent
    before = x.clone()
    planned(model, x)
    assert torch.equal(x, before)


def test_the_input_and_parameters_are_not_changed():
    def forward(m, x):
        x.relu_()
        m.scale.add_(1)
        return m.a(x) * m.scale

    model = Net(forward, a=conv(), scale=nn.Parameter(torch.ones(1)))
    network = network_of(model, torch.randn(X))
    assert not network.spent
    x = torch.randn(X)
    before = x.clone()
    fast = optimize_for_inference(model, x, tune="off")
    first = fast(x)
    assert torch.equal(fast(x), first) and torch.equal(x, before)
