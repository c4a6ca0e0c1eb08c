"""What models do in their forward beside calling layers: checks of sizes, norms of their own, results with names."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import parity
import pytest
import torch
import torch.nn.functional as F
from engine_cases import Net, agree, conv, network_of, ops, randomized
from torch import nn

from fused_resnet import backend, measure, models, optimize_for_inference

X = (5, 3, 11, 13)


def planned(model, x=None, **options):
    """The ops of the plan, and the model's results judged: of two inputs, the second after another call."""
    x = torch.randn(X) if x is None else x
    fast = optimize_for_inference(model, x, tune="off", **options)
    agree(fast(x), model, x)
    agree(fast(x * 0.7 + 0.1), model, x * 0.7 + 0.1)
    return ops(network_of(model, x)), fast


def refreshes(fast, model):
    """The plan takes the numbers of another model that is built alike."""
    other = copy.deepcopy(model)
    for t in (*other.parameters(), *other.buffers()):
        if t.is_floating_point():
            t.data.mul_(1.25)
    x = torch.randn(X)
    agree(fast.refresh(other)(x), other, x)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_the_example_is_of_another_dtype(dtype):
    """It is converted, as inputs are."""
    model = Net(lambda m, x: m.n(m.a(x)) if x.element_size() == 4 else x, a=conv(), n=Checked(16))
    x = torch.randn(X).to(dtype)
    fast = optimize_for_inference(model, x, tune="off")
    agree(fast(x), model, x.float())


def test_inputs_without_names():
    class Many(Net):
        def forward(self, *xs, scale=2):
            return self.a(xs[0]) * scale if len(xs) == 1 else self.a(xs[0]) + self.b(xs[1]) * len(xs)

    model = Many(None, a=conv(), b=conv())
    x, z = torch.randn(X), torch.randn(X)
    planned(model, x)
    fast = optimize_for_inference(model, (x, z), tune="off")
    agree(fast(x, z), model, x, z)
    with pytest.raises(TypeError, match="^input: Many takes 2 tensors, got 1"):
        fast(x)


def keywords_of_its_own(function):
    """As Hugging Face decorates a forward: it takes and adds arguments that the forward's signature has, or has not."""

    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        first = kwargs.pop("first", True)
        kwargs["features"] = kwargs.get("features", True)
        found = function(self, *args, **kwargs)
        return found[-1] if first else found

    return wrapper


def test_a_decorated_forward():
    class Decorated(Net):
        @keywords_of_its_own
        def forward(self, x, features: bool | None = None, first: bool | None = None, **kwargs):
            y = self.a(x)
            return (y, self.b(F.relu(y))) if features and not kwargs else y

    found, fast = planned(Decorated(None, a=conv(), b=conv(16)))
    assert found == ["conv", "conv"] and fast.plan.flop_share == 1.0


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
    refreshes(fast, model)


@pytest.mark.parametrize("kind", [OnItsBatch, Scaled, Twice])
def test_other_norms_run_as_they_were_traced(kind):
    found, _ = planned(norm_net(kind))
    assert found.count("conv") == 2 and "traced" in found


def test_a_norm_used_twice():
    model = randomized(Net(lambda m, x: m.n(m.b(F.relu(m.n(m.a(x))))), a=conv(), n=Written(16), b=conv(16)))
    found, fast = planned(model)
    assert fast.plan.flop_share == 1.0 and found.count("conv") == 2


class Modulated(nn.BatchNorm2d):
    """Weight and bias are applied in its own way."""

    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, None, None, False, 0.1, self.eps)
        return y * (1 + self.weight.view(1, -1, 1, 1)) + self.bias.view(1, -1, 1, 1)


class WithAndWithout(nn.BatchNorm2d):
    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias) + F.batch_norm(x, mean, var, None, None)


class BiasAlone(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, None, self.bias, False, 0.1, self.eps)


@pytest.mark.parametrize("kind", [Modulated, WithAndWithout, BiasAlone])
def test_a_norm_is_what_its_call_says(kind):
    """Of the module's tensors those that are given, whatever else is done with the others."""
    model = norm_net(kind)
    found, fast = planned(model)
    assert not any("batch_norm" in layer for s in fast.plan.traced for layer in s.layers)
    other = copy.deepcopy(model)
    for t in (other.n.weight, other.n.bias, other.n.running_mean):
        t.data.mul_(1.25)
    x = torch.randn(X)
    agree(fast.refresh(other)(x), other, x)


def beside_its_own_call(m, x):
    n = m.n
    return n(m.a(x)) + F.batch_norm(m.b(x), n.running_mean, n.running_var, n.weight, n.bias)


def beside_its_own_call_without_weights(m, x):
    return m.n(m.a(x)) + F.batch_norm(m.b(x), m.n.running_mean, m.n.running_var)


@pytest.mark.parametrize(
    "forward", [beside_its_own_call, beside_its_own_call_without_weights], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, Written, "hooked", "hooked and written"])
def test_a_norm_that_is_called_as_well(kind, forward):
    norm = Written(16, eps=0.3) if kind in (Written, "hooked and written") else nn.BatchNorm2d(16, eps=0.3)
    model = randomized(Net(forward, a=conv(), b=conv(), n=norm))
    if isinstance(kind, str):
        model.n.register_forward_hook(lambda m, args, y: y * 2)
    planned(model)


def test_a_norm_inside_of_what_is_called_whole():
    block = nn.Sequential(OrderedDict(c=conv(16), bn=Written(16)))
    model = randomized(Net(lambda m, x: m.blk.bn(m.a(x)) + m.blk(m.b(x)), a=conv(), b=conv(), blk=block))
    model.blk.register_forward_hook(lambda *a: None)
    planned(model)


@pytest.mark.parametrize("shape", [(5, 16), (5, 16, 7)], ids=str)
def test_norms_of_other_dimensions(shape):
    class AnyDim(nn.BatchNorm2d):
        def _check_input_dim(self, x): ...

    planned(Net(lambda m, x: m.n(x * 2), n=AnyDim(16)), torch.randn(shape))


def test_norms_without_running_statistics():
    found, _ = planned(norm_net(nn.BatchNorm2d, track_running_stats=False))
    assert "traced" in found


# --- convolutions of other classes ------------------------------------------------------------------------------------


class Own(nn.Conv2d):
    """A forward written out, which looks at sizes and calls what stands behind the convolution."""

    def __init__(self, *args, norm=None, **options):
        super().__init__(*args, **options)
        self.norm = norm

    def forward(self, x):
        if x.numel() == 0 or (x.requires_grad and self.training):
            raise ValueError("not this")
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return y if self.norm is None else self.norm(y)


class Kernels(nn.Module):
    """No convolution's class: its tensors are a parameter and a buffer of other names."""

    def __init__(self, inputs=3):
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(16, inputs, 3, 3) / 4)
        self.register_buffer("shift", torch.randn(16))

    def forward(self, x):
        return F.conv2d(x, self.kernels, stride=2, bias=self.shift, padding=(1, 0))


class TwoStrides(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, 2) + F.conv2d(x[:, :, 1:-1, 1:-1], self.weight, None, 2, (1, 1))


class Standardised(nn.Conv2d):
    """The weight is computed at every call."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, padding=1)


class Same(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, 1, "same")


OWN = {
    "with a norm": (lambda: Own(3, 16, 3, 2, 1, bias=False, norm=nn.BatchNorm2d(16)), ["conv", "conv"]),
    "grouped": (lambda: Own(3, 18, 3, dilation=2, groups=3, norm=nn.BatchNorm2d(18)), ["conv", "conv"]),
    "of other names": (Kernels, ["conv", "conv"]),
    "twice": (lambda: TwoStrides(3, 16, 3), ["conv", "traced", "conv", "conv"]),
    "of a computed weight": (lambda: Standardised(3, 16, 3), ["traced"] * 3 + ["conv"]),
    "padded by a word": (lambda: Same(3, 16, 3), ["traced", "conv"]),
}


@pytest.mark.parametrize("name", OWN)
def test_convolutions_written_out(name):
    build, ops_of_it = OWN[name]
    torch.manual_seed(0)
    own = build()
    model = randomized(Net(lambda m, x: m.b(F.relu(m.n(x))), n=own, b=conv(own(torch.randn(X)).shape[1])))
    keys = list(model.state_dict())
    found, fast = planned(model)
    assert [op for op in found if op in ("conv", "traced")][-len(ops_of_it) :] == ops_of_it, found
    refreshes(fast, model)
    assert list(model.state_dict()) == keys


def test_a_convolution_beside_its_own_call():
    """Called as a module as well, it is a module's; its tensors, given to F.conv2d, are read where it holds them."""
    model = Net(lambda m, x: m.a(x) + F.conv2d(x, m.a.weight, m.a.bias, padding=1), a=conv())
    found, fast = planned(randomized(model))
    assert "conv" in found
    model = Net(lambda m, x: m.a(x) + F.conv2d(x, m.k), a=conv(3))
    model.k = nn.Parameter(torch.randn(16, 3, 3, 3))
    model.a.padding = (0, 0)
    found, fast = planned(randomized(model))
    assert fast.plan.flop_share == 1.0 and "traced" not in found


class Masked(nn.Conv2d):
    """As autoregressive models': the weight is changed at every call."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.4).to(self.weight.dtype))

    def forward(self, x):
        self.weight.mul_(self.mask)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class MaskedByCopy(Masked):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("masked", torch.zeros_like(self.weight))

    def forward(self, x):
        self.masked.copy_(self.weight * self.mask)
        return F.conv2d(x, self.masked, self.bias, self.stride, self.padding)


class MaskedData(Masked):
    def forward(self, x):
        self.weight.data.mul_(self.mask)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class MaskedNorm(nn.BatchNorm2d):
    def forward(self, x):
        self.weight.clamp_(max=0.5)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


@pytest.mark.parametrize("kind", [Masked, MaskedByCopy, MaskedData, MaskedNorm])
def test_tensors_changed_in_place_before_they_are_read(kind):
    torch.manual_seed(0)
    first = kind(3) if kind is MaskedNorm else kind(3, 16, 3, padding=1)
    model = randomized(Net(lambda m, x: m.b(F.relu(m.n(x))), n=first, b=conv(3 if kind is MaskedNorm else 16)))
    if kind is MaskedNorm:
        model.n.weight.data += 1
    model.requires_grad_(False)  # PyTorch changes no leaf in place that wants a gradient
    before, x = copy.deepcopy(model.state_dict()), torch.randn(X)
    fast = optimize_for_inference(model, x, tune="off")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    agree(fast(x), model, x)
    agree(fast(x), model, x)


def changes_what_a_module_has(m, x):
    m.a.weight.mul_(0.5)
    return m.a(x)


def sets_data(m, x):
    m.a.weight.data = m.a.weight.data * 0.5
    return m.a(x)


def multiplies_data(m, x):
    m.a.weight.data *= 0.5
    return m.a(x)


@pytest.mark.parametrize(
    "forward, message",
    [
        (changes_what_a_module_has, "^model: it changes a.weight in place and calls a, which has it; change it before"),
        (sets_data, "^model: Net cannot be traced .TraceError: data of a tensor is set, which a graph does not show"),
        (multiplies_data, "^model: Net cannot be traced .TraceError: data of a tensor is set"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_changes_that_a_graph_does_not_show_are_refused(forward, message):
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(Net(forward, a=conv()), torch.randn(X), tune="off")


def test_names_that_the_model_has_itself():
    """What stands for a convolution or a norm that was written out takes no name of the model's."""
    own = Own(3, 16, 3, padding=1, norm=Written(16))
    own.norm.add_module("traced_norm0", nn.Conv2d(16, 16, 1))
    model = Net(
        lambda m, x: m.traced_convolution0(F.conv2d(m.n.norm.traced_norm0(m.n(x)), m.k)) + m.n.traced_convolution0,
        n=own, traced_convolution0=conv(4), k=nn.Parameter(torch.randn(4, 16, 1, 1)),
    )  # fmt: skip
    own.traced_convolution0 = nn.Parameter(torch.randn(1))
    planned(randomized(model))


@pytest.mark.parametrize(
    "options", [dict(stride=(2,), padding=(1,)), dict(stride=[2], padding=[1], dilation=[1])], ids=str
)
def test_strides_of_one_number(options):
    model = Net(
        lambda m, x: m.b(F.relu(F.conv2d(x, m.k, **options))), k=nn.Parameter(torch.randn(16, 3, 3, 3)), b=conv(16)
    )
    found, _ = planned(randomized(model))
    assert found == ["conv", "conv"]


def test_refresh_compares_the_eps_of_norms_written_out():
    model = norm_net(Written, eps=0.25)
    _, fast = planned(model)
    model.n.eps = 0.5
    with pytest.raises(ValueError, match="^model: does not fit the plan: n.eps is 0.5, expected 0.25"):
        fast.refresh(model)


def test_a_decision_by_an_input_that_is_not_given():
    class Two(Net):
        def forward(self, x, y):
            return self.a(x) if y.shape[0] > 1 else x

    with pytest.raises(ValueError, match="^model: Two cannot be traced .TypeError: y is not given, and it decides"):
        optimize_for_inference(Two(None, a=conv()), torch.randn(X), tune="off")


def test_nothing_requires_a_gradient():
    def forward(m, x):
        return m.a(x) * 2 if x.requires_grad else m.b(F.relu(m.a(x)))

    found, _ = planned(Net(forward, a=conv(), b=conv(16)))
    assert found == ["conv", "conv"]


def test_models_whose_train_returns_nothing():
    """As OpenMMLab's backbones, and many a detector."""

    class Silent(Net):
        def train(self, mode=True):
            super().train(mode)

    model = Silent(lambda m, x: m.b(F.relu(m.n(m.a(x)))), a=conv(), n=nn.BatchNorm2d(16), b=conv(16))
    model.train(True)
    fast = optimize_for_inference(model, torch.randn(X), tune="off")
    assert model.training and fast.plan.flop_share == 1.0
    measure.parity(model, model, [torch.randn(X)], train=True)


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
    """As Hugging Face's: a dictionary of those fields that are not None, and attributes. PyTorch's pytrees do not know
    it, which theirs registers."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    states: tuple | None = None
    scale: float = 1.0
    made = 0

    def __post_init__(self):
        Output.made += 1
        if self.logits is not None:
            self.logits = self.logits * self.scale
        for name in ("loss", "logits", "states"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


class Named(Net):
    def forward(self, x=None, labels=None, output_states=None, **kwargs):
        y = self.a(x)
        return Output(logits=self.b(y), states=(x, y) if output_states else (y,), scale=3.0)


def test_results_with_names(device):
    model, x = Named(None, a=conv(), b=conv(16)).to(device), torch.randn(X).to(device)
    fast = optimize_for_inference(model, x, tune="off")
    made = Output.made
    got = fast(x)
    assert type(got) is Output and list(got) == ["logits", "states"] and got.loss is None and got.scale == 3.0
    assert isinstance(got.states, tuple) and got["logits"] is got.logits and Output.made == made
    want = model(x)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.states[0], want.states[0], rtol=1e-4, atol=1e-4)
    kept = got.logits.clone(), got.states[0].clone()
    again = fast(x * 2)
    assert again.logits is not got.logits
    assert torch.equal(got.logits, kept[0]) and torch.equal(got.states[0], kept[1])


def test_results_with_names_are_judged():
    model, x = Named(None, a=conv(), b=conv(16)), torch.randn(X)
    fast = optimize_for_inference(model, x, tune="off")
    judge = fast._judge(network_of(model, x), (x,))
    plain = {"logits": model(x).logits, "states": model(x).states}
    assert judge(plain) is None and "finite" in judge(plain | {"logits": plain["logits"] * float("nan")})


@dataclass
class Unlike(OrderedDict):
    """An attribute that is none of its items."""

    out: torch.Tensor | None = None

    def __post_init__(self):
        self["result"] = self.out * 2


def test_results_that_cannot_be_made_again_are_dictionaries():
    model = Net(lambda m, x: Unlike(m.a(x)), a=conv())
    x = torch.randn(X)
    got = optimize_for_inference(model, x, tune="off")(x)
    assert type(got) is dict and list(got) == ["result"]
    torch.testing.assert_close(got["result"], model(x)["result"], rtol=1e-4, atol=1e-4)


def test_classes_are_those_of_their_place():
    """The same keys in a dictionary and in a record; a record in a record, in a named tuple and in a list."""

    class Pair(NamedTuple):
        first: object
        second: object

    def forward(m, x):
        y = m.a(x)
        inner = OrderedDict(out=y)
        return {"out": inner}, OrderedDict(out={"out": m.b(y)}), Pair([inner, y], x * 1), (y, 3)

    model = Net(forward, a=conv(), b=conv(16))
    _, fast = planned(model)
    a, b, pair, plain = fast(torch.randn(X))
    assert type(a) is dict and type(a["out"]) is OrderedDict
    assert type(b) is OrderedDict and type(b["out"]) is dict
    assert type(pair) is Pair and type(pair.first) is list and type(pair.first[0]) is OrderedDict
    assert type(plain) is tuple and plain[1] == 3


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


TURNS = {
    "transpose_": lambda y: y.transpose_(2, 3),
    "swapaxes_": lambda y: y.swapaxes_(2, 3),
    "unsqueeze_": lambda y: y.unsqueeze_(0).squeeze_(0),
    "as_strided_": lambda y: y.as_strided_(y.shape, y.stride()),
    "t_": lambda y: y.flatten(1).t_().t_(),
}


@pytest.mark.parametrize("how", TURNS)
def test_what_changes_shapes_in_place_works_on_a_copy(how):
    def forward(m, x):
        y = m.a(x)
        z = TURNS[how](y)
        return m.b(z if how == "t_" and z.dim() == 4 else y)

    model = Net(forward, a=conv(), b=nn.Conv2d(16, 8, (3, 1)))
    x = torch.randn(5, 3, 8, 8)
    fast = optimize_for_inference(model, x, tune="off")
    for _ in range(4):
        agree(fast(x), model, x)


def test_first_called_in_inference_mode_and_refreshed():
    model = Net(lambda m, x: m.b(F.relu(m.n(m.a(x) + x[:, :1])) * m.scale), a=conv(), n=nn.BatchNorm2d(16), b=conv(16),
                scale=nn.Parameter(torch.ones(1)))  # fmt: skip
    x = torch.randn(X)
    for fast in (
        optimize_for_inference(copy.deepcopy(model).double(), x.double(), tune="off"),
        optimize_for_inference(model, torch.randn(2, 3, 8, 8), tune="off", new_shapes="eager"),
    ):
        with torch.inference_mode():
            fast(x.double() if fast._dtype is torch.float64 else x)
        other = randomized(copy.deepcopy(model), seed=3)
        other.scale.data.fill_(2)
        agree(fast.refresh(other)(x).float(), other, x)


def test_refresh_refuses_another_epsilon():
    model = Net(lambda m, x: m.n(m.a(x)), a=conv(), n=nn.BatchNorm2d(16))
    fast = optimize_for_inference(model, torch.randn(X), tune="off")
    other = copy.deepcopy(model)
    other.n.eps = 0.1
    with pytest.raises(ValueError, match="^model: does not fit the plan: n.eps is 0.1, expected 1e-05"):
        fast.refresh(other)


@pytest.mark.parametrize("name", ["triton", "cuda", "cudnn", "reference"])
def test_a_forced_backend_is_none_of_a_plans_business(name):
    model = Net(lambda m, x: m.b(F.relu(m.n(m.a(x) + x[:, :1]))), a=conv(), n=nn.BatchNorm2d(16), b=conv(16))
    x = torch.randn(X)
    with backend(name):
        fast = optimize_for_inference(model, x, tune="off")
        assert any(s.op == "norm" for s in fast.plan.steps)
        agree(fast(x), model, x)
    agree(fast(x), model, x)


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
