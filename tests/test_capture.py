"""capture_training. What a GPU does with graphs is told by a function that runs again, into the same attributes; the
tests marked gpu capture real ones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fused_resnet
from fused_resnet import capture, measure
from fused_resnet.capture import CapturedTraining


class Rerun(CapturedTraining):
    """Graphs on a CPU: functions that run again. What was computed before is overwritten, as in a graph's memory."""

    def _recorder(self):
        def record(graphs, function):
            def replay():
                attribute = "results" if function == graphs.forward else "flat"
                before = getattr(graphs, attribute)
                for old in before if isinstance(before, list) else [before]:
                    old.detach().fill_(0)
                with torch.enable_grad():
                    setattr(graphs, attribute, function())

            return replay, function()

        return record


class Two(nn.Module):
    """Two results, one of which has no gradient, and a parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.unused = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Parameter(torch.ones(2))

    def forward(self, x):
        y = self.bn(self.conv(x))
        return {"y": y, "largest": y.detach().amax((2, 3))}


@pytest.fixture
def device(request):
    return torch.device("cuda" if "gpu" in request.keywords else "cpu")


def captured(model, x, *more):
    return (fused_resnet.capture_training if x.is_cuda else Rerun)(model, x, *more)


def network(device):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5)
    return fused_resnet.swap_blocks(model).to(device).train()


ON_BOTH = pytest.mark.parametrize("where", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])


def steps(call, model, device, count=3, accumulate=1):
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    for i in range(count):
        optimizer.zero_grad()
        for j in range(accumulate):
            torch.manual_seed(10 * i + j)
            x, target = torch.randn(4, 3, 40, 40), torch.randint(5, (4,))
            loss = nn.functional.cross_entropy(call(x.to(device)), target.to(device))
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses, {**dict(model.named_parameters()), **dict(model.named_buffers())}


@ON_BOTH
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_those_of_the_model(device, where, accumulate):
    model, untouched = network(device), network(device)
    step = captured(model, torch.zeros(4, 3, 40, 40, device=device))
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        expected, after = steps(untouched, untouched, device, accumulate=accumulate)
        losses, kept = steps(step, model, device, accumulate=accumulate)
    assert step._calls == 2 * 3 * accumulate, "a call went to the model itself"
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, wanted in after.items():
        torch.testing.assert_close(kept[name], wanted, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_the_model_stays_as_it_was(device):
    model = network(device)
    before = copy.deepcopy(model.state_dict())
    step = captured(model, torch.randn(4, 3, 40, 40))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in vars(model)
    assert "ResNet" in repr(step) and "40" in repr(step)


def test_results_are_the_callers(device):
    model = network(device)
    step = captured(model, torch.zeros(4, 3, 40, 40))
    x = torch.randn(4, 3, 40, 40)
    y = step(x)
    kept = y.clone()
    y.sum().backward()
    gradient = model.fc.weight.grad
    before = gradient.clone()
    model.zero_grad(set_to_none=True)
    step(-x).sum().backward()
    assert torch.equal(y, kept)
    assert torch.equal(gradient, before)
    assert not torch.equal(model.fc.weight.grad, before)


@ON_BOTH
def test_pytrees_inputs_gradient_and_unused_parameters(device, where):
    model = Two().to(device)
    x = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
    expected = model(x)
    (of_x,) = torch.autograd.grad((expected["y"] ** 2).sum(), x)
    model.bn.reset_running_stats()
    step = captured(model, x)
    result = step(x)
    assert result.keys() == expected.keys() and not result["largest"].requires_grad
    torch.testing.assert_close(result["largest"], expected["largest"])
    (result["y"] ** 2).sum().backward()
    torch.testing.assert_close(x.grad, of_x, rtol=1e-4, atol=1e-4)
    assert model.unused.grad is None


SHAPES = [(4, 3, 40, 40), (2, 3, 40, 40), (4, 3, 33, 48)]


@ON_BOTH
def test_batches_of_several_shapes(device, where):
    """Each is a graph's, in any order; what a call returned and the gradients it gave do not change with the next."""
    model, untouched = network(device), network(device)
    step = captured(model, *(torch.zeros(shape, device=device) for shape in [*SHAPES, SHAPES[0]]))
    assert len(step._graphs) == 3 and repr(step).count("torch.float32") == 3
    kept = []
    for i, shape in enumerate([*SHAPES, *reversed(SHAPES), SHAPES[1]]):
        torch.manual_seed(i)
        x = torch.randn(shape).to(device)
        for call, net in ((untouched, untouched), (step, model)):
            net.zero_grad(set_to_none=True)
            y = call(x)
            (y**2).sum().backward()
            kept.append((y, [p.grad for p in net.parameters()], y.clone(), [p.grad.clone() for p in net.parameters()]))
        assert step._calls == 2 * (i + 1), "a call went to the model itself"
    for y, grads, before, grads_before in kept:
        assert torch.equal(y, before) and all(map(torch.equal, grads, grads_before))
    for (wanted, of, *_), (y, grads, *_) in zip(kept[::2], kept[1::2], strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-3, atol=1e-3)
        for g, expected in zip(grads, of, strict=True):
            assert (g - expected).norm() <= 1e-3 * expected.norm() + 1e-3
    for name, buffer in untouched.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, rtol=1e-3, atol=1e-4)


@ON_BOTH
def test_a_result_is_differentiated_before_a_call_of_another_shape(device, where):
    """They share memory: what the first one's backward needs is gone."""
    xs = [torch.zeros(shape, device=device) for shape in SHAPES[:2]]
    step = captured(network(device), *xs)
    first = step(xs[0]).sum()
    step(xs[1]).sum().backward()
    with pytest.raises(RuntimeError, match="called again"):
        first.backward()


def test_gradients_of_several_shapes_accumulate():
    model, untouched = Two(), Two()
    untouched.load_state_dict(model.state_dict())
    xs = [torch.randn(4, 3, 8, 8), torch.randn(2, 3, 9, 8), torch.randn(3, 3, 8, 8, requires_grad=True)]
    step, of_x = captured(model, *xs), []
    for call in (step, untouched):
        for x in (*xs, *reversed(xs)):
            (call(x)["y"] ** 2).sum().backward()
        of_x.append(xs[2].grad)
        xs[2].grad = None
    assert step._calls == 2 * 2 * len(xs)
    torch.testing.assert_close(*of_x, rtol=1e-4, atol=1e-4)
    for p, wanted in zip(model.parameters(), untouched.parameters(), strict=True):
        assert (p.grad is None) == (wanted.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted.grad, rtol=1e-4, atol=1e-4)


def test_gradients_of_all_shapes_lie_in_one_place():
    step = captured(Two(), *(torch.zeros(2, 3, size, 8) for size in (8, 16, 12)))
    assert [g.x.shape[2] for g in step._graphs] == [16, 12, 8], "the largest first"
    assert len({g.flat.data_ptr() for g in step._graphs}) == 1
    step(torch.zeros(2, 3, 12, 8))
    assert step._calls == 1
    step(torch.zeros(2, 3, 13, 8))
    assert step._calls == 1, "of no shape there is a graph for"


def others(model, x):
    """(what is changed, how): calls that no graph was captured for."""
    yield "shape", lambda: x[:2]
    yield "dtype", lambda: x.double()
    yield "layout", lambda: x.contiguous(memory_format=torch.channels_last)
    yield "requires_grad", lambda: x.clone().requires_grad_()
    yield "mode", lambda: (model.bn.eval(), x)[1]
    yield "frozen", lambda: (model.bn.train(), model.conv.weight.requires_grad_(False), x)[2]


def test_any_other_call_is_the_models():
    model = Two()
    x = torch.randn(4, 3, 8, 8)
    step = captured(model, x)
    for what, change in others(model, x):
        given = change()
        calls, model = step._calls, model.double() if what == "dtype" else model
        assert step(given)["y"].dtype is given.dtype, what
        assert step._calls == calls, what
        model.float()
    with torch.no_grad():
        assert not step(x)["y"].requires_grad
    assert step._calls == 0


def test_another_autocast_is_the_models():
    model = Two()
    x = torch.randn(4, 3, 8, 8)
    step = captured(model, x)
    step(x)
    assert step._calls == 1
    torch.set_autocast_enabled("cuda", True)
    try:
        step(x)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert step._calls == 1


def test_a_number_that_changed_is_the_models():
    model = Two()
    step = captured(model, x := torch.randn(4, 3, 8, 8))
    model.bn.momentum = 0.5
    step(x)
    assert step._calls == 0
    model.bn.momentum = 0.1
    step(x)
    assert step._calls == 1


@pytest.mark.parametrize(
    ("name", "value", "change"),
    [
        ("drop_prob", 0.1, lambda m: setattr(m, "drop_prob", 0.2)),
        ("p", [1, 2], lambda m: m.p.append(3)),
        ("p", torch.ones(2), lambda m: setattr(m, "p", torch.ones(2))),
    ],
    ids=["drop_path", "list", "tensor"],
)
def test_other_numbers_are_seen_too(name, value, change):
    model = Two()
    setattr(model, name, value)
    step = captured(model, x := torch.randn(4, 3, 8, 8))
    step(x)
    assert step._calls == 1
    change(model)
    step(x)
    assert step._calls == 1


def test_a_parameter_that_changed_before_the_backward():
    """A graph would mix the activations of the old one with the new one."""
    model = Two()
    step = captured(model, x := torch.randn(4, 3, 8, 8))
    y = step(x)["y"].sum()
    with torch.no_grad():
        model.conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified between"):
        y.backward()


class Detached(Two):
    def forward(self, x):
        return super().forward(x)["y"] * self.unused.detach()[0]


def test_a_parameter_whose_value_alone_is_read_changed_before_the_backward():
    model = Detached()
    y = captured(model, x := torch.randn(4, 3, 8, 8))(x).sum()
    with torch.no_grad():
        model.unused.mul_(2)
    with pytest.raises(RuntimeError, match="a parameter was modified between a captured model's call"):
        y.backward()


def test_a_result_is_differentiated_before_the_next_call():
    step = captured(Two(), x := torch.randn(4, 3, 8, 8))
    first = step(x)["y"].sum()
    step(x)
    with pytest.raises(RuntimeError, match="called again"):
        first.backward()
    y = step(x)["y"].sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="its backward has run"):
        y.backward()


def moved(model):
    model.conv.weight.data = model.conv.weight.data.clone()


def replaced(model):
    model.conv.weight = nn.Parameter(model.conv.weight.detach())


def assigned(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [moved, replaced, assigned])
def test_a_parameter_that_moved(change):
    model = Two()
    step = captured(model, x := torch.randn(4, 3, 8, 8))
    change(model)
    with pytest.raises(RuntimeError, match="capture the model again"):
        step(x)


class Cumulative(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x)


@pytest.mark.parametrize(
    ("model", "x", "error", "message"),
    [
        (3, torch.zeros(1), TypeError, "model: expected a torch.nn.Module, got int"),
        (nn.ReLU(), torch.zeros(1), ValueError, "x: expected a CUDA tensor, got cpu"),
        (nn.ReLU(), 3, ValueError, "x: expected a CUDA tensor, got int"),
    ],
)
def test_what_is_refused(model, x, error, message):
    with pytest.raises(error, match=message):
        fused_resnet.capture_training(model, x)


def test_what_is_refused_of_more(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(ValueError, match=r"more\[1\]: expected a CUDA tensor, got int"):
        fused_resnet.capture_training(nn.ReLU(), torch.zeros(1), torch.zeros(2), 3)
    with pytest.raises(ValueError, match=r"more\[0\]: expected a torch.Tensor itself, got Parameter"):
        fused_resnet.capture_training(nn.ReLU(), torch.zeros(1), nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match=r"more\[0\]: expected a tensor on cpu, as x is, got meta"):
        fused_resnet.capture_training(nn.ReLU(), torch.zeros(1), torch.zeros(2, device="meta"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Conv2d(3, 3, 1).eval(), "model.train"),
        (Cumulative(nn.SyncBatchNorm(3)), "norm is a SyncBatchNorm"),
        (nn.DataParallel(nn.Conv2d(3, 3, 1)), "DataParallel works over several.*capture what it wraps"),
        (nn.Sequential(Rerun(nn.Conv2d(3, 3, 1), torch.zeros(2, 3, 4, 4))), "is captured, or has a captured part"),
        (Cumulative(nn.BatchNorm2d(3, momentum=None)), "norm has momentum None"),
        (nn.Flatten(), "requires a gradient"),
    ],
)
def test_what_cannot_be_captured(model, message):
    with pytest.raises(ValueError, match=message):
        Rerun(model, torch.zeros(2, 3, 4, 4))


def test_it_is_a_module_around_the_model():
    model = Two()
    step = captured(model, x := torch.randn(4, 3, 8, 8))
    assert isinstance(step, nn.Module) and step.model is model
    assert [*step.parameters()] == [*model.parameters()]
    assert [f"model.{name}" for name in model.state_dict()] == [*step.state_dict()]
    seen = []
    step.register_forward_hook(lambda *args: seen.append(args[0]))
    step(x)
    assert seen == [step] and step._calls == 1
    step.eval()
    assert not model.bn.training
    step(x)
    assert step._calls == 1, "evaluation is the model's"
    step.train()(x)
    assert step._calls == 2


def test_what_is_never_used_has_no_part_in_the_graph():
    model = Two()
    y = captured(model, x := torch.randn(4, 3, 8, 8))(x)["y"]
    found = torch.autograd.grad(y.sum(), [*model.parameters()], allow_unused=True)
    assert [name for (name, _), g in zip(model.named_parameters(), found, strict=True) if g is None] == ["unused"]


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickle.dumps])
def test_it_is_not_copied(copied):
    step = captured(Two(), torch.randn(4, 3, 8, 8))
    with pytest.raises(TypeError, match="take its .model"):
        copied(step)
    step.double()
    with pytest.raises(RuntimeError, match="capture the model again"):
        step.model.float(), step(torch.randn(4, 3, 8, 8))


def test_a_captured_variant_is_built_for_training_on_a_gpu(monkeypatch):
    assert "fused_captured" in measure.variants_of(torch.device("cuda"), train=True, compiled=False)
    assert "fused_captured" not in measure.variants_of(torch.device("cuda"), train=False, compiled=False)
    assert "fused_captured" not in measure.variants_of(torch.device("cpu"), train=True, compiled=True)
    made = []
    monkeypatch.setattr(capture, "capture_training", lambda model, x: made.append(Rerun(model, x)) or made[0])
    step = measure.build_variant("fused_captured", network(torch.device("cpu")), torch.randn(2, 3, 40, 40), train=True)
    step()
    assert made[0]._calls == 2 and all(p.grad is not None for p in made[0].parameters())


# --- over processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


def over_processes(rank: int, wrap, accumulate: int, options: dict) -> tuple:
    """Losses, parameters and buffers after some steps of a wrapped network, and how many calls were a graph's."""
    model = network(torch.device("cpu"))
    if options.get("find_unused_parameters"):
        model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    inner = wrap(model)
    ddp = DistributedDataParallel(inner, **options)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    for i in range(3):
        optimizer.zero_grad()
        for j in range(accumulate):
            torch.manual_seed(100 * rank + 10 * i + j)
            x, target = torch.randn(4, 3, 40, 40), torch.randint(5, (4,))
            ddp.require_backward_grad_sync = j == accumulate - 1  # what no_sync() sets
            loss = nn.functional.cross_entropy(ddp(x), target)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return losses, state, getattr(inner, "_calls", 0)


def as_captured(model: nn.Module) -> nn.Module:
    return Rerun(model, torch.zeros(4, 3, 40, 40))


def untouched(model: nn.Module) -> nn.Module:
    return model


@pytest.mark.parametrize(
    ("accumulate", "options"),
    [
        pytest.param(1, {}, id="plain"),
        pytest.param(2, {}, id="accumulated"),
        pytest.param(1, {"gradient_as_bucket_view": True, "bucket_cap_mb": 1}, id="views", marks=pytest.mark.slow),
        pytest.param(1, {"find_unused_parameters": True}, id="unused"),
        pytest.param(1, {"static_graph": True}, id="static", marks=pytest.mark.slow),
    ],
)
def test_data_parallel_training_of_a_captured_model(two, accumulate, options):
    found = two.run(over_processes, as_captured, accumulate, options)
    expected = two.run(over_processes, untouched, accumulate, options)
    for (losses, state, calls), (wanted_losses, wanted, _) in zip(found, expected, strict=True):
        assert calls == 2 * 3 * accumulate, "a call went to the model itself"
        assert losses == pytest.approx(wanted_losses, rel=1e-4)
        for name, value in wanted.items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    first, second = (
        {k: v for k, v in state.items() if "running" not in k and "tracked" not in k} for _, state, _ in found
    )
    assert all(torch.equal(v, second[k]) for k, v in first.items()), "processes drifted apart"
    assert found[0][0] != found[1][0]
