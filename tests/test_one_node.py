"""A training block as one node of autograd's graph (one_node.py): what its ops give one by one, to the bit."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
import torchvision
from test_traced_blocks import Nested
from test_traced_preact import Adopted
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from fused_resnet import (
    FusedPreActBasicBlock,
    FusedPreActBottleneck,
    backends,
    blocks,
    one_node,
    ops,
    swap_blocks,
    training,
)
from fused_resnet.backends import straight, verify
from fused_resnet.preact import PlainPreActBottleneck

CL = torch.channels_last
CALLS = one_node.WATCH_AT + 2


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """As on a GPU; each test finds nothing that was known before."""
    monkeypatch.setattr(backends, "WRITTEN_DOWN", {"cpu"})
    monkeypatch.setattr(backends, "_ready", {})
    monkeypatch.setattr(one_node, "_entries", weakref.WeakKeyDictionary())


def building(make) -> Callable[..., nn.Module]:
    """What makes the same block at every call, in a network of its own."""

    @functools.wraps(make)
    def build(dtype=torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(make()).to(dtype).train()

    return build


@building
def basic():
    return BasicBlock(8, 8)


@building
def bottleneck():
    return Bottleneck(32, 8)


@building
def projected():
    return Bottleneck(8, 8, 2, nn.Sequential(conv1x1(8, 32, 2), nn.BatchNorm2d(32)))


@building
def wide_projection():
    return BasicBlock(8, 16, 1, nn.Sequential(conv1x1(8, 16), nn.BatchNorm2d(16)))


@building
def plain():
    return blocks.PlainBottleneck(32, 8)


@building
def traced():
    return Nested(16, 16)


@building
def pre_activation():
    return FusedPreActBasicBlock(8, 8)


@building
def pre_projected():
    return FusedPreActBottleneck(8, 8, 2, nn.Sequential(conv1x1(8, 32, 2)))


@building
def pre_plain():
    return PlainPreActBottleneck(32, 8)


@building
def pre_traced():
    """What is activated is handed on."""
    return Adopted(8, 8)


memories = pytest.mark.parametrize("memory", ["default", "lean"])
MODELS = (
    basic,
    bottleneck,
    projected,
    wide_projection,
    plain,
    traced,
    pre_activation,
    pre_projected,
    pre_plain,
    pre_traced,
)


def pair(build, dtype=torch.float32, memory: str = "default") -> tuple[nn.Module, nn.Module]:
    """The same blocks twice, the second as ops one by one."""
    ours = swap_blocks(build(dtype), memory=memory)
    return ours, copy.deepcopy(ours)


def image(model: nn.Module, seed: int, dtype=torch.float32, n: int = 2) -> torch.Tensor:
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, 7, 6, generator=generator).to(dtype).contiguous(memory_format=CL)


class Switch:
    """Blocks as ops one by one, inside."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def __call__(self, function, *args):
        with self.monkeypatch.context() as patch:
            patch.setattr(one_node, "run", lambda *args: None)
            return function(*args)


@pytest.fixture
def one_by_one(monkeypatch):
    return Switch(monkeypatch)


def step(model: nn.Module, x: torch.Tensor, loss=lambda y: y.float().square().sum()) -> list:
    x = x.detach().requires_grad_()
    for p in model.parameters():
        p.grad = None
    y = model(x)
    loss(y).backward()
    found = [y.detach(), x.grad, *(p.grad for p in model.parameters())]
    return found + [b.clone() for b in model.buffers()]


def same(found: list, expected: list) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype is b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def is_node(model: nn.Module, x: torch.Tensor, gradient: bool = True) -> bool:
    y = model(x.detach().requires_grad_(gradient))
    return type(y.grad_fn).__name__ == "_NodeBackward"


def programs(model: nn.Module) -> list:
    return [p for m in model.modules() if m in one_node._entries for p in one_node._entries[m].values()]


def learn(model: nn.Module, x: torch.Tensor, calls: int = CALLS) -> nn.Module:
    """The model, called until its blocks are nodes."""
    for _ in range(calls):
        step(model, x)
    assert is_node(model, x)
    return model


# --- the same, to the bit ---------------------------------------------------------------------------------------------


@memories
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", MODELS)
def test_every_call_equals_the_ops_one_by_one(build, dtype, memory, one_by_one):
    ours, theirs = pair(build, dtype, memory)
    for seed in range(CALLS + 2):
        x = image(ours, seed, dtype)
        same(step(ours, x), one_by_one(step, theirs, x))
    (program,) = programs(ours)
    assert program.tries == 1 and is_node(ours, x)
    assert [type(f).__name__ for f in program.derivative.written.values()] == [
        "function"
    ]  # as it is without Python's ops
    if memory == "default":
        assert not any(isinstance(v, torch.Tensor) for s in program.derivative.rules.steps for v in s.facts.values())


def test_a_whole_network(one_by_one):
    torch.manual_seed(0)
    ours = swap_blocks(torchvision.models.resnet50(num_classes=4)).train()
    theirs, x = copy.deepcopy(ours), torch.randn(2, 3, 40, 40)
    optimizers = [torch.optim.SGD(m.parameters(), 1e-4, momentum=0.9) for m in (ours, theirs)]
    for _ in range(CALLS + 2):
        found = step(ours, x, torch.mean), one_by_one(step, theirs, x, torch.mean)
        assert found[0][0].isfinite().all()
        same(*found)
        for optimizer in optimizers:
            optimizer.step()
    assert len(programs(ours)) == 16 and all(p.forward for p in programs(ours))


@memories
@pytest.mark.parametrize("build", [basic, bottleneck, projected, pre_activation, pre_projected])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_under_autocast(build, given, memory, one_by_one):
    ours, theirs = pair(build, memory=memory)

    def run(model, x, inside):
        with torch.autocast("cpu", torch.bfloat16):
            if inside:
                return step(model, x)
            y = model(x.clone().requires_grad_())
        for p in model.parameters():
            p.grad = None
        y.float().square().sum().backward()
        return [y.detach(), *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]

    for seed in range(CALLS + 4):
        x = image(ours, seed, given)
        same(run(ours, x, seed % 2), one_by_one(run, theirs, x, seed % 2))
    widens = build is pre_activation and given is torch.float32  # the sum is one of two dtypes
    with torch.autocast("cpu", torch.bfloat16):
        assert is_node(ours, x) != widens
    if given is torch.float32:
        theirs.load_state_dict(ours.state_dict())
        same(step(ours, x), one_by_one(step, theirs, x))  # another kind
        assert not is_node(ours, x)


@memories
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_input_that_is_handed_on(dtype, memory, monkeypatch, one_by_one):
    """As on a GPU in 16 bits: the shortcut's gradient is added by the product of the first convolution's."""

    def product(x, weight, conv):
        return ops.needs_gradient(x) and training.expands(conv, 0) and x.dtype is weight.dtype

    monkeypatch.setattr(training, "_product", product)
    for build in (bottleneck, projected):
        ours, theirs = pair(build, dtype, memory)
        for seed in range(CALLS + 2):
            x = image(ours, seed, dtype)
            same(step(ours, x), one_by_one(step, theirs, x))
        assert is_node(ours, x) and all(p.forward for p in programs(ours))


def test_some_parameters_frozen_and_no_gradient_of_the_input(one_by_one):
    ours, theirs = pair(projected)
    for frozen in ([], ["0.conv1.weight"], ["0.bn2.weight", "0.downsample.0.weight"], ["0.bn3.bias"]):
        for model in (ours, theirs):
            for name, p in model.named_parameters():
                p.requires_grad_(name not in frozen)
        for seed in range(CALLS):
            x = image(ours, seed)
            same(step(ours, x), one_by_one(step, theirs, x))
        for model in (ours, theirs):
            model.zero_grad()
        for _ in range(CALLS):  # of x no gradient
            ours(x).square().sum().backward()
            one_by_one(theirs, x).square().sum().backward()
        # Where nobody wants what x is needed for, it is not kept.
        assert is_node(ours, x, False) == ("0.conv1.weight" not in frozen) and is_node(ours, x)
        same([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
        theirs.load_state_dict(ours.state_dict())


def test_gradients_of_a_few_and_twice():
    ours, theirs = pair(bottleneck)
    x = image(ours, 0)
    learn(ours, x)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for model in (ours, theirs):
        given = x.clone().requires_grad_()
        y = model(given)
        loss = y.square().sum()
        few = torch.autograd.grad(loss, [model[0].bn2.weight, given], retain_graph=True)
        results.append([*few, *torch.autograd.grad(loss, [given, *model.parameters()])])
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    same(*results)


@pytest.mark.parametrize("kind", ["expanded", "contiguous", "transposed"])
def test_gradients_that_lie_otherwise(kind, one_by_one):
    ours, theirs = pair(bottleneck)
    learn(ours, image(ours, 0))
    theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(3)
    grad = {
        "expanded": torch.randn(2, 32, 1, 1).expand(2, 32, 7, 6),
        "contiguous": torch.randn(2, 32, 7, 6),
        "transposed": torch.randn(2, 6, 7, 32).permute(0, 3, 2, 1),
    }[kind]

    def run(model, x):
        y = model(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], grad)]

    for _ in range(3):
        x = image(ours, 1)
        same(run(ours, x.clone().requires_grad_()), one_by_one(run, theirs, x.clone().requires_grad_()))


# --- gradients of gradients -------------------------------------------------------------------------------------------


def penalty(model, x, loss=lambda y: y.square().sum()):
    x = x.detach().requires_grad_()
    y = model(x)
    (grad,) = torch.autograd.grad(loss(y), x, create_graph=True)
    return [grad.detach(), *torch.autograd.grad(grad.square().sum() + y.sum(), [x, *model.parameters()])]


@memories
@pytest.mark.parametrize("build", [basic, bottleneck, projected, pre_activation, pre_traced])
def test_gradients_of_gradients(build, memory, one_by_one, monkeypatch):
    """In float64, which is no dtype of a node's otherwise: second derivatives of batch norms are a matter of digits."""
    monkeypatch.setitem(verify.TOLERANCE, torch.float64, 1e-12)
    ours, theirs = pair(build, torch.float64, memory)
    x = image(ours, 0, torch.float64)
    learn(ours, x)
    theirs.load_state_dict(ours.state_dict())
    for a, b in zip(penalty(ours, x), one_by_one(penalty, theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(a, b)  # updated once


def test_gradients_to_be_differentiated_under_autocast(one_by_one):
    ours, theirs = pair(bottleneck)
    x = image(ours, 0)

    def run(model):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(given)
        wanted = [given, *model.parameters()]
        return [g.detach() for g in torch.autograd.grad(y.float().square().sum(), wanted, create_graph=True)]

    for _ in range(CALLS):
        with torch.autocast("cpu", torch.bfloat16):
            y = ours(x.clone().requires_grad_())
        y.float().sum().backward()
    assert type(y.grad_fn).__name__ == "_NodeBackward"
    theirs.load_state_dict(ours.state_dict())
    for a, b in zip(run(ours), one_by_one(run, theirs), strict=True):
        assert torch.equal(a, b)


def test_hooks_of_tensors_are_called_once():
    model = swap_blocks(bottleneck())
    x = image(model, 0)
    learn(model, x)
    calls = []
    handle = model[0].conv1.weight.register_hook(lambda g: calls.append(1) or g * 2)
    given = x.clone().requires_grad_()
    given.register_hook(lambda g: calls.append(2) or g)
    model(given).square().sum().backward(create_graph=True)
    assert sorted(calls) == [1, 2]
    handle.remove()


def test_parameters_that_are_lent(one_by_one):
    """Steps of gradient descent inside of a graph, as meta-learning takes them."""
    ours, theirs = pair(bottleneck)
    x = image(ours, 0)
    learn(ours, x)
    theirs.load_state_dict(ours.state_dict())

    def run(model):
        lent = dict(model.named_parameters())
        for _ in range(CALLS):
            loss = torch.func.functional_call(model, lent, (x,)).square().mean()
            grads = torch.autograd.grad(loss, list(lent.values()), create_graph=True)
            lent = {name: p - 0.01 * g for (name, p), g in zip(lent.items(), grads, strict=True)}
        loss = torch.func.functional_call(model, lent, (x,)).square().mean()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    for a, b in zip(run(ours), one_by_one(run, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_settings_are_those_of_the_forward(one_by_one):
    """And no parameter of a module is touched, though many threads want second derivatives."""
    ours, theirs = pair(bottleneck)
    x = image(ours, 0)
    learn(ours, x)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for model, run in ((ours, lambda f, *args: f(*args)), (theirs, one_by_one)):
        given = x.clone().requires_grad_()
        y = run(model, given)
        model[0].bn2.eps, model[0].conv2.padding = 0.5, (0, 0)
        model[0].bn3.bias = None
        (grad,) = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        found.append(grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    model = swap_blocks(bottleneck())
    learn(model, x)
    parameters = list(model.parameters())

    def many():
        for _ in range(20):
            given = x.clone().requires_grad_()
            torch.autograd.grad(model(given).square().sum(), given, create_graph=True)

    threads = [threading.Thread(target=many) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_a_parameter_that_changes_before_its_gradient_is_differentiated():
    model = swap_blocks(bottleneck())
    x = image(model, 0)
    learn(model, x)
    y = model(x.clone().requires_grad_())
    with torch.no_grad():
        model[0].bn3.bias.add_(1)  # which no op keeps
    with pytest.raises(RuntimeError, match="modified in place between this block's forward and a gradient"):
        y.sum().backward(create_graph=True)
    y = model(x.clone().requires_grad_())
    with torch.no_grad():
        model[0].conv2.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@memories
def test_gradients_that_are_batched_or_watched(memory, one_by_one):
    ours, theirs = pair(bottleneck, memory=memory)
    x = image(ours, 0)
    learn(ours, x)
    theirs.load_state_dict(ours.state_dict())
    grads = torch.randn(3, 2, 32, 7, 6)

    def run(model):
        given = x.clone().requires_grad_()
        y = model(given)
        with Sees() as sees:
            torch.autograd.grad(y, given, grads[0], retain_graph=True)
        return torch.autograd.grad(y, given, grads, is_grads_batched=True)[0], sees.names

    if memory == "lean":  # its checkpoint knows nothing of vmap
        sees = run(ours)[1]
    else:
        (a, sees), (b, names) = run(ours), one_by_one(run, theirs)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert sees == names
    assert "fused_resnet.pointwise_bn_act_bwd" in sees
    y = ours(x.clone().requires_grad_())
    y.backward(torch._neg_view(grads[0]))  # which only the dispatcher turns around


class Sees(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "fused_resnet" in str(func):
            self.names.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def test_versions_are_those_that_changes_in_place_make():
    model = swap_blocks(basic())
    x = image(model, 0)
    for _ in range(CALLS):
        before = [b._version for b in model.buffers()]
        model(x.clone().requires_grad_())
        assert all(b._version > was for b, was in zip(model.buffers(), before, strict=True))


@memories
def test_parameters_frozen_or_moved_before_the_backward(memory, one_by_one):
    """Which gradients there are was decided in the forward; those of later calls do not suffer."""
    ours, theirs = pair(bottleneck, memory=memory)
    learn(ours, image(ours, 0))
    theirs.load_state_dict(ours.state_dict())

    def run(model, x, change):
        x = x.detach().requires_grad_()
        model.zero_grad()
        y = model(x)
        weight = model[0].conv2.weight
        if change == "frozen":
            weight.requires_grad_(False)
        if change == "moved":
            weight.data = weight.data.contiguous()
        y.square().sum().backward()
        weight.requires_grad_()
        if change == "moved":
            weight.data = weight.data.contiguous(memory_format=CL)
        return [y.detach(), x.grad, *(None if p is weight else p.grad for p in model.parameters())]

    for change in ("frozen", "moved"):
        for seed in range(3 * CALLS):
            x = image(ours, seed)
            same(run(ours, x, change), one_by_one(run, theirs, x, change))
    for seed in range(3):
        x = image(ours, seed)
        same(step(ours, x), one_by_one(step, theirs, x))
        assert ours[0].conv2.weight.grad is not None
    y = ours(x.clone().requires_grad_())
    ours[0].conv2.weight.requires_grad_(False)
    y.square().sum().backward(create_graph=True)


def test_a_sum_that_does_not_fit_never_fits():
    block = FusedPreActBasicBlock(1, 8).train()
    for _ in range(2 * CALLS):
        with pytest.raises(RuntimeError, match="residual: expected the output's shape"):
            block(torch.randn(2, 1, 7, 6).requires_grad_())


def test_where_a_backward_cannot_be_written_down_the_block_runs_op_by_op(monkeypatch):
    model = swap_blocks(bottleneck())
    x = image(model, 0)
    for seed in range(one_node.WATCH_AT - 1):
        step(model, image(model, seed))
    monkeypatch.setattr(one_node._Derivative, "_write_down", lambda *args: None)  # for want of memory, say
    for _ in range(one_node.WATCH_AT * (one_node.TRIES + 2)):
        step(model, x)
    (program,) = programs(model)
    assert program.forward and program.derivative.given_up and not is_node(model, x)


def test_an_input_that_nobody_needs_may_change():
    model = swap_blocks(bottleneck())
    model[0].conv1.weight.requires_grad_(False)
    for seed in range(CALLS):
        x = image(model, seed)
        y = model(x)
        x.zero_()
        y.sum().backward()


def test_other_kinds_of_gradients_are_written_down_in_time():
    model = swap_blocks(bottleneck())
    x = image(model, 0)
    learn(model, x)
    for _ in range(2 * one_node.WATCH_AT):
        model(x.clone().requires_grad_()).backward(torch.randn(2, 32, 7, 6))
    (program,) = programs(model)
    assert [type(f).__name__ for f in program.derivative.written.values()] == ["function", "function"]


# --- what changes between calls ---------------------------------------------------------------------------------------


def eps(block):
    block.bn2.eps = 0.5


def momentum(block):
    block.bn1.momentum = 0.9


def cumulative(block):
    block.bn1.momentum = None


def frozen_norm(block):
    block.bn2.eval()


def stride(block):
    block.conv2.stride, block.conv2.padding, block.conv2.dilation = (1, 1), (2, 2), (2, 2)


def other_weight(block):
    block.conv1.weight = nn.Parameter(block.conv1.weight.detach() * 2)


def other_data(block):
    block.conv1.weight.data = block.conv1.weight.data * 2


def contiguous_weight(block):
    block.conv2.weight.data = block.conv2.weight.data.contiguous()


def buffers(block):
    block.bn1.running_mean = torch.ones_like(block.bn1.running_mean)


def untracked(block):
    block.bn3.track_running_stats = False


def no_buffers(block):
    block.bn3.running_mean = block.bn3.running_var = block.bn3.num_batches_tracked = None


def hook(block):
    block.bn2.register_forward_hook(lambda m, a, y: y * 2)


def lean(block):
    block.memory = "lean"


def bias(block):
    block.conv1.bias = nn.Parameter(torch.ones(8))


def lists(block):
    block.conv2.padding = [1, 1]


def borrowed(block):
    weight = block.conv2.weight.detach().requires_grad_()
    del block.conv2.weight
    block.conv2.weight = weight  # no parameter


def no_bias(block):
    block.bn2.bias = None


def bias_alone(block):
    block.bn2.bias, block.bn2.weight = block.bn2.weight, None


CHANGES = (
    lists,
    borrowed,
    no_bias,
    bias_alone,
    eps,
    momentum,
    cumulative,
    frozen_norm,
    stride,
    other_weight,
    other_data,
    contiguous_weight,
    buffers,
    untracked,
)


@pytest.mark.parametrize("change", [*CHANGES, no_buffers, hook, lean, bias], ids=lambda f: f.__name__)
def test_what_changes_between_calls(change, one_by_one):
    ours, theirs = pair(bottleneck)
    learn(ours, image(ours, 0))
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        change(model[0])
    for seed in range(CALLS + 1):
        x = image(ours, seed)
        same(step(ours, x), one_by_one(step, theirs, x))


def test_modes_that_ops_go_by(one_by_one):
    ours, theirs = pair(bottleneck)
    x = image(ours, 0)
    learn(ours, x)
    with backends.backend("reference"):
        assert not is_node(ours, x)
    torch.use_deterministic_algorithms(True)
    try:
        assert not is_node(ours, x)
        learn(ours, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert is_node(ours, x) and len(programs(ours)) == 3  # one of "reference", too, was begun


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_wants_to_see_the_ops_does(one_by_one):
    ours, theirs = pair(bottleneck)
    x = image(ours, 0)
    learn(ours, x)
    with torch.no_grad():
        assert ours(x).grad_fn is None
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t, lambda t: t):
        assert not is_node(ours, x) and packed
    assert not is_node(ours, x[:, :, 1:])  # another kind
    theirs.load_state_dict(ours.state_dict())
    for reentrant in (False, True):
        given = [x.clone().requires_grad_() for _ in range(2)]
        checkpoint(ours, given[0], use_reentrant=reentrant).square().sum().backward()

        def run(given, reentrant):
            checkpoint(theirs, given, use_reentrant=reentrant).square().sum().backward()

        one_by_one(run, given[1], reentrant)
        assert torch.equal(given[0].grad, given[1].grad)
    with torch.profiler.profile():
        assert not is_node(ours, x)
    assert is_node(ours, x)


def test_compiled_and_exported_as_before():
    model = swap_blocks(bottleneck())
    x = image(model, 0)
    learn(model, x)
    torch._dynamo.reset()
    other = copy.deepcopy(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), other(x))
    torch._dynamo.reset()


def test_a_block_that_is_called_twice(one_by_one):
    ours, theirs = pair(basic)
    loss = lambda y: y.square().sum()  # noqa: E731
    for seed in range(CALLS):
        x = image(ours, seed)
        same(
            step(nn.Sequential(ours[0], ours[0]), x, loss),
            one_by_one(step, nn.Sequential(theirs[0], theirs[0]), x, loss),
        )
    assert is_node(ours, x)


def test_a_lean_block_keeps_its_input_and_statistics():
    model = swap_blocks(bottleneck(), memory="lean")
    x = image(model, 0)
    learn(model, x)
    y = model(x.clone().requires_grad_())
    kept = [t for t in y.grad_fn.saved_tensors if not isinstance(t, nn.Parameter)]
    assert sorted(t.dim() for t in kept) == [1] * 6 + [4]
    y = model(x.clone().requires_grad_())
    with torch.no_grad():
        model[0].bn3.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = model(x.clone().requires_grad_())
    given = model[0].conv1.weight
    model[0].conv1.weight = nn.Parameter(torch.zeros_like(given))
    y.sum().backward()  # of what there was
    assert given.grad is not None and model[0].conv1.weight.grad is None


# --- what is not written down, and what is left behind ----------------------------------------------------------------


def test_what_is_differentiated_beside_the_tape_is_an_error(monkeypatch):
    model = swap_blocks(basic())
    real = training.convolve
    monkeypatch.setattr(training, "convolve", lambda x, *args: real(x * 2, *args))
    with pytest.raises(AssertionError, match="aten.mul.Tensor has a derivative, and is not on the tape"):
        learn(model, image(model, 0))
    assert ops.handler() is None and straight.watched() is None and not straight._one_at_a_time.locked()


def test_a_forward_that_reads_values_runs_op_by_op(caplog):
    """A cumulative average is one of a count that is read."""
    model = swap_blocks(basic())
    model[0].bn1.momentum = None
    with caplog.at_level("INFO", "fused_resnet"):
        for seed in range(one_node.WATCH_AT * (one_node.TRIES + 2)):
            step(model, image(model, seed))
    (program,) = programs(model)
    assert program.forward is None and program.tries == one_node.TRIES
    told = [r.message for r in caplog.records if "block runs op by op" in r.message]
    assert len(told) == one_node.TRIES and "other results each time" in told[0]


def test_a_function_that_does_something_else_does_not_serve(monkeypatch, caplog, one_by_one):
    """One buffer is not updated by what was written down."""
    ours, theirs = pair(basic)
    real = straight._Watch._written

    def forgets(self, func, args, kwargs, result):
        if "_foreach_add_" not in str(func):
            real(self, func, args, kwargs, result)

    monkeypatch.setattr(straight._Watch, "_written", forgets)
    with caplog.at_level("INFO", "fused_resnet"):
        for seed in range(CALLS):
            x = image(ours, seed)
            same(step(ours, x), one_by_one(step, theirs, x))
    assert programs(ours)[0].forward is None
    assert f"a block runs op by op: {straight.DIFFERENT}" in [r.message for r in caplog.records]


def test_a_failure_leaves_nothing_behind(monkeypatch):
    model = swap_blocks(basic())
    x = image(model, 0)
    for _ in range(one_node.WATCH_AT - 1):
        step(model, x)
    real = ops._kernels["bn_act"]

    def fails(*args):
        raise torch.OutOfMemoryError("no room")

    for _ in range(2):
        monkeypatch.setitem(ops._kernels, "bn_act", fails)
        monkeypatch.setattr(backends, "_key", lambda *args: None)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            step(model, x)
        monkeypatch.undo()
        assert ops.handler() is None and straight.watched() is None and not straight._one_at_a_time.locked()
    assert ops._kernels["bn_act"] is real


def test_nothing_is_kept_alive():
    model = swap_blocks(projected())
    x = image(model, 0)
    learn(model, x)
    dead = weakref.ref(model[0])
    given = x.clone().requires_grad_()
    y = model(given)
    seen = weakref.ref(given)
    y.sum().backward()
    del y, given
    model[0].pooled = model(x.clone().requires_grad_()).mean((2, 3))  # a graph that the block itself holds
    model[0].pooled.sum().backward()
    del model
    gc.collect()
    assert dead() is None and seen() is None and len(one_node._entries) == 0


def test_the_oldest_kinds_are_forgotten(monkeypatch):
    monkeypatch.setattr(one_node, "MOST_KINDS", 3)
    model = swap_blocks(basic())
    for n in range(2, 8):
        model(image(model, 0, n=n))
    assert len(programs(model)) == 3
    learn(model, image(model, 0, n=7))


def test_replicas_of_data_parallel(one_by_one):
    """Whose parameters are attributes."""
    model = swap_blocks(bottleneck())
    (replica,) = torch.nn.parallel.replicate(model, [0], detach=True) if torch.cuda.is_available() else (model,)
    block = replica[0]._replicate_for_data_parallel()
    for name, m in list(block.named_children()):
        m = m._replicate_for_data_parallel()
        for key, p in getattr(model[0], name)._parameters.items():
            setattr(m, key, None if p is None else p.detach().requires_grad_())
        block._modules[name] = m
    for seed in range(CALLS):
        x = image(model, seed)
        block(x).sum().backward()
        assert block.conv2.weight.grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@memories
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype, memory, monkeypatch):
    """Whatever backend serves: a network's steps when its blocks are nodes are those before, but for what PyTorch's
    own kernels vary."""
    monkeypatch.setattr(backends, "WRITTEN_DOWN", {"cuda"})
    model = swap_blocks(torchvision.models.resnet50().cuda().to(dtype), memory=memory)
    x = torch.randn(4, 3, 64, 64, device="cuda", dtype=dtype).contiguous(memory_format=CL)
    grads = []
    for _ in range(CALLS + 2):
        model.zero_grad()
        model(x).float().square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    known = programs(model)
    assert len(known) == 16 and all(p.forward for p in known)
    assert {type(f).__name__ for p in known for f in p.derivative.written.values()} == {"function"}
    for first, last in zip(grads[0], grads[-1], strict=True):
        norm = first.double().norm()
        assert (first.double() - last.double()).norm() <= 5e-2 * norm + 1e-6
