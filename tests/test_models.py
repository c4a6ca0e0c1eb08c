"""All ten models against torchvision's, by the rule of parity.py; NaN and inf; SGD; signatures and weights."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import statistics

import parity
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

import fused_resnet
from fused_resnet import FusedBasicBlock, FusedBottleneck, measure, models, swap_blocks

NAMES = models.TORCHVISION
SIZE = (2, 3, 40, 40)
LARGE = ("resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")


def untouched(name: str, seed: int, train: bool, device, firm: bool | None = None, size=SIZE):
    """(model, input): torchvision's, every BN tensor away from its initial value; firm by default in eval mode."""
    torch.manual_seed(seed)
    model = getattr(torchvision.models, name)(num_classes=10).to(device)
    x = torch.randn(size).to(device)
    parity.calibrate(parity.randomize_norms(model, seed, branch=0.2, firm=not train if firm is None else firm), x)
    return model.train(train), x


def fused(name: str, model: nn.Module, layout: str) -> nn.Module:
    """Built by models.py for contiguous, swapped for channels_last: both ways in are on trial."""
    if layout == "channels_last":
        return swap_blocks(copy.deepcopy(model)).to(memory_format=torch.channels_last)
    ours = getattr(models, name)(num_classes=10)
    ours.load_state_dict(model.state_dict(), strict=True)
    p = next(model.parameters())
    return ours.to(p.device, p.dtype).train(model.training)


@functools.lru_cache(maxsize=1)  # the judges of the largest model are gigabytes
def trials(name: str, train: bool, device, seeds: tuple[int, ...] = parity.SEEDS, size=SIZE):
    """([(model, input, judge) of each seed], yardstick over all of them)."""
    cases, yardsticks = [], []
    for seed in seeds:
        model, x = untouched(name, seed, train, device, size=size)
        judge = parity.judge_of(model, x)
        cases.append((model, x, judge))
        yardsticks.append(parity.yardstick_of(model, x, judge))
    return cases, parity.worst(yardsticks)


layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
modes = pytest.mark.parametrize("mode", ["train", "eval"])


def names(*default: str):
    """All ten, these by default: the others have the same blocks, only more or larger, and go with the slow tests."""
    marks = {n: [] if n in default else pytest.mark.slow for n in NAMES}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in marks.items()])


FEW = ("resnet18", "resnet50", "resnext50_32x4d")
few_names = names(*FEW)
# Odd maps at every stage; more images, and a last map of 2 x 2.
sizes = pytest.mark.parametrize(
    "size",
    [SIZE, *(pytest.param(size, marks=pytest.mark.slow) for size in ((1, 3, 97, 161), (5, 3, 33, 47)))],
    ids=lambda size: f"{size[0]}x{size[2]}x{size[3]}",
)


@layouts
@modes
@sizes
@names(*FEW[:2])
def test_equals_torchvision(name, size, mode, layout, device):
    """float32: output, gradient of the input and of every parameter, running statistics, num_batches_tracked.

    In eval mode the networks are firm (parity.py), hardly a ReLU flips, and the worst of three seeds counts. In
    training mode ReLUs cut through the data: one that flips for us and for none of torchvision's variants is an
    accident of its seed, so the median seed counts; what is wrong but no flip is wrong in every seed. The largest
    models have one seed, and get the others where that one is not within the rule.
    """

    def found(seeds: tuple[int, ...]) -> list[str]:
        cases, yardstick = trials(name, mode == "train", device, seeds, size)
        ours = []
        for model, x, judge in cases:
            model, image = parity.as_variant(layout, fused(name, model, layout), x)
            ours.append(parity.errors(parity.observe(model, image), judge))
        pick = max if mode == "eval" else statistics.median
        return parity.violations({key: pick(e[key] for e in ours) for key in ours[0]}, yardstick)

    wrong = found(parity.SEEDS[:1] if name in LARGE else parity.SEEDS)
    if wrong and name in LARGE and mode == "train":
        wrong = found(parity.SEEDS)
    assert not wrong, "; ".join(wrong[:8])


@modes
@sizes
@few_names
def test_equals_torchvision_in_float64(name, size, mode, device):
    """The same where ReLUs cut through the data, to nine digits: in float64 a flip is next to impossible."""
    model, x = untouched(name, 0, mode == "train", device, firm=False, size=size)
    ours = fused(name, model.double(), "contiguous")
    assert len(fused_resnet.swap_report(ours).fused) == len(fused_resnet.swap_report(ours).blocks) > 0
    found = parity.errors(parity.observe(ours, x.double()), parity.observe(model, x.double()))
    assert max(found.values()) < 1e-9, max((e, n) for n, e in found.items())


@modes
@names(*FEW[:1])
def test_ordinary_outputs(name, mode, device):
    """float32, ReLUs cutting through the data, larger images: outputs and statistics by the rule, for three seeds."""
    yardsticks, ours = [], []
    for seed in parity.SEEDS:
        model, x = untouched(name, seed, mode == "train", device, firm=False, size=(3, 3, 64, 64))
        judge = parity.judge_of(model, x)
        yardsticks.append(parity.yardstick_of(model, x, judge))
        for layout in ("contiguous", "channels_last"):
            seen = parity.observe(*parity.as_variant(layout, fused(name, model, layout), x))
            ours.append(parity.errors(seen, judge))
    continuous = {k: e for k, e in parity.worst(ours).items() if not k.startswith("grad")}
    parity.check(continuous, parity.worst(yardsticks))


def test_the_rule_catches_one_percent(device):
    """Each gradient of ResNet-18 in turn is made 1 % wrong: the rule must object every time, and to nothing else."""
    ((model, x, judge), *_), yardstick = trials("resnet18", False, device)
    seen = parity.observe(fused("resnet18", model, "contiguous"), x)
    assert not parity.violations(parity.errors(seen, judge), yardstick)
    for name in seen:
        if not name.startswith("buffer"):
            planted = parity.errors(seen | {name: seen[name] * 1.01}, judge)
            assert [v.split(":")[0] for v in parity.violations(planted, yardstick)] == [name]


@pytest.mark.parametrize(
    "op, result", [("conv_bn_act_bwd", i) for i in range(5)] + [("bn_act_bwd", i) for i in range(4)]
)
def test_the_rule_catches_a_wrong_kernel(op, result, device, monkeypatch):
    """A backend whose one gradient is 1 % off, deep below the model, does not pass."""
    train = op == "bn_act_bwd"
    ((model, x, judge), *_), yardstick = trials("resnet18", train, device)
    ours = fused("resnet18", model, "contiguous")
    with fused_resnet.backend("reference"):
        parity.check(parity.errors(parity.observe(ours, x), judge), yardstick)
        ours = fused("resnet18", model, "contiguous")
        right = getattr(fused_resnet.backends.reference, op)

        def wrong(*args):
            return tuple(g if i != result or g is None else g * 1.01 for i, g in enumerate(right(*args)))

        monkeypatch.setattr(fused_resnet.backends.reference, op, wrong)
        assert parity.violations(parity.errors(parity.observe(ours, x), judge), yardstick)


# --- training ---------------------------------------------------------------------------------------------------------


def sgd(model: nn.Module, x: torch.Tensor, steps: int = 5) -> parity.Seen:
    """The parameters and buffers after some steps, as one vector each: that is what wanders."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    target = torch.arange(len(x), device=x.device) % 10
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.roll(step, -1)), target).backward()
        optimizer.step()
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    buffers = torch.cat([b.flatten() for b in model.buffers() if b.is_floating_point()])
    tracked = torch.stack([b for b in model.buffers() if not b.is_floating_point()])
    return {"parameter all": parameters, "buffer all": buffers, "buffer num_batches_tracked": tracked}


@pytest.mark.slow
@names(*FEW[:2])
def test_five_sgd_steps(name, device):
    """float32, the median of three seeds in each layout: where a ReLU flips, trajectories part, torchvision's own
    variants by up to several percent, and a flip is an accident of its seed. The sharp half is the test below."""
    yardsticks, found = [], {"contiguous": [], "channels_last": []}
    for seed in parity.SEEDS:
        model, x = untouched(name, seed, True, device)
        judge = parity.judge_of(model, x, sgd)
        yardsticks.append(parity.yardstick_of(model, x, judge, sgd))
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        moved = parity.error(judge["parameter all"], start)
        for layout, errors in found.items():
            ours, image = parity.as_variant(layout, fused(name, model, layout), x)
            errors.append(parity.errors(sgd(ours, image), judge))
            assert errors[-1]["parameter all"] < moved
    for errors in found.values():
        parity.check({key: statistics.median(e[key] for e in errors) for key in errors[0]}, parity.worst(yardsticks))


@names(*FEW[:1])
def test_five_sgd_steps_in_float64(name, device):
    """Nothing flips, and so nothing drifts: the sharp half of the test above."""
    model, x = untouched(name, 0, True, device)
    judge = parity.judge_of(model, x, sgd)
    for layout in ("contiguous", "channels_last"):
        ours, image = parity.as_variant(layout, fused(name, copy.deepcopy(model).double(), layout), x.double())
        found = parity.errors(sgd(ours, image), judge)
        assert max(found.values()) < 1e-9, found


# --- what is not a number ---------------------------------------------------------------------------------------------


def kinds(t: torch.Tensor) -> torch.Tensor:
    return t.isnan().int() + 2 * t.isposinf().int() + 4 * t.isneginf().int()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "name, value",
    [("resnet18", math.nan), ("resnet18", math.inf), ("resnet18", -math.inf), ("resnet50", math.nan)]
    + [pytest.param("resnet50", value, marks=pytest.mark.slow) for value in (math.inf, -math.inf)],
)
def test_nan_and_inf_travel(name, mode, value, layout, device):
    model, x = untouched(name, 0, mode == "train", device)
    x[0, 1, 5, 7] = value
    ours, image = parity.as_variant(layout, fused(name, model, layout), x)
    theirs = parity.observe(*parity.as_variant(layout, model, x))
    seen = parity.observe(ours, image)
    for key in theirs:
        assert torch.equal(kinds(seen[key]), kinds(theirs[key])), key


# --- signatures and weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_torchvisions(name):
    theirs = inspect.signature(getattr(torchvision.models, name), eval_str=True)
    ours = inspect.signature(getattr(models, name), eval_str=True)
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("name", NAMES)
def test_structure_is_torchvisions(name):
    with torch.device("meta"):
        ours, theirs = getattr(models, name)(), getattr(torchvision.models, name)()
    assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in theirs.state_dict().items()
    ]
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    blocks = [
        m
        for m in ours.modules()
        if isinstance(m, torchvision.models.resnet.BasicBlock | torchvision.models.resnet.Bottleneck)
    ]
    assert blocks and {type(b) for b in blocks} <= {FusedBasicBlock, FusedBottleneck}


def test_all_ten():
    assert len(NAMES) == 10
    assert set(NAMES) == {n for n in torchvision.models.resnet.__all__ if n[0].islower()}


@pytest.fixture
def offline_weights(monkeypatch):
    """Weights without a network: what get_state_dict would have downloaded, and how it was asked."""
    asked = []

    def get_state_dict(self, *args, **kwargs):
        asked.append((self, kwargs))
        torch.manual_seed(5)
        return torchvision.models.resnet18().state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    return asked


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", torchvision.models.ResNet18_Weights.DEFAULT], ids=str)
def test_weights_are_loaded(weights, offline_weights):
    torch.manual_seed(5)
    expected = torchvision.models.resnet18().state_dict()
    model = models.resnet18(weights=weights, progress=False)
    assert offline_weights == [
        (torchvision.models.ResNet18_Weights.IMAGENET1K_V1, {"progress": False, "check_hash": True})
    ]
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(weights="DEFAULT", num_classes=7),
        dict(weights="NO_SUCH"),
        dict(weights=torchvision.models.ResNet50_Weights.DEFAULT),
        dict(no_such=1),
        dict(replace_stride_with_dilation=[True]),
        dict(replace_stride_with_dilation=[False, True, True]),
        dict(groups=2),
    ],
    ids=lambda k: "-".join(f"{n}={getattr(v, 'name', v)}" for n, v in k.items()),
)
def test_refuses_what_torchvision_refuses(kwargs, offline_weights):
    with pytest.raises(Exception) as theirs:
        torchvision.models.resnet18(**kwargs)
    with pytest.raises(theirs.type):
        models.resnet18(**kwargs)


@pytest.mark.parametrize(
    "name, kwargs", [("resnext50_32x4d", dict(groups=1)), ("wide_resnet50_2", dict(width_per_group=64))]
)
def test_refuses_another_network_under_its_name(name, kwargs):
    with pytest.raises(ValueError):
        getattr(torchvision.models, name)(**kwargs)
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        getattr(models, name)(**kwargs)


def test_positional_weights_and_pretrained_as_torchvision(offline_weights):
    """torchvision's deprecated spellings: `resnet18(True)` and `pretrained=True`, with a warning."""
    for args, kwargs in (((True,), {}), ((), {"pretrained": True}), ((), {"pretrained": False})):
        with pytest.warns(UserWarning):
            theirs = torchvision.models.resnet18(*args, **kwargs).state_dict()
        with pytest.warns(UserWarning):
            ours = models.resnet18(*args, **kwargs).state_dict()
        if True in args or kwargs.get("pretrained"):
            assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_init_residual_has_effect(name):
    torch.manual_seed(0)
    ours = getattr(models, name)(zero_init_residual=True)
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(zero_init_residual=True)
    last = "bn2" if name == "resnet18" else "bn3"
    zeroed = [k for k in ours.state_dict() if k.endswith(f"{last}.weight")]
    assert zeroed and all(not ours.state_dict()[k].any() for k in zeroed)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("layout", [pytest.param("contiguous", marks=pytest.mark.slow), "channels_last"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.slow), "resnet50"])
def test_zero_init_residual_trains(name, mode, layout, device):
    """A gamma of zero still has a gradient, and passes none on."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(zero_init_residual=True, num_classes=10).to(device)
    x = torch.randn(SIZE).to(device)
    parity.calibrate(model, x).train(mode == "train")
    judge = parity.judge_of(model, x)
    yardstick = parity.yardstick_of(model, x, judge)
    ours, image = parity.as_variant(layout, fused(name, model, layout), x)
    seen = parity.observe(ours, image)
    assert seen[f"grad layer1.0.{'bn2' if name == 'resnet18' else 'bn3'}.weight"].abs().max() > 0
    parity.check(parity.errors(seen, judge), yardstick)


@pytest.mark.parametrize("name", FEW)
def test_builders_leave_every_layout_alone(name):
    def strides(model):
        return {n: t.stride() for n, t in model.state_dict().items()}

    assert strides(getattr(models, name)()) == strides(getattr(torchvision.models, name)())


# --- the rule itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, factor", [("output", 2), ("buffer a", 2), ("grad a", 3), ("parameter all", 3)])
@pytest.mark.parametrize("dtype, floor", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-3)])
def test_the_rule_is_the_one_that_is_written(kind, factor, dtype, floor):
    """Twice torchvision's own error for outputs and statistics, three times for gradients, plus a floor."""
    own = 1e-3
    limit = factor * own + floor
    assert not parity.violations({kind: 0.999 * limit}, {kind: own}, dtype)
    assert parity.violations({kind: 1.001 * limit}, {kind: own}, dtype)
    assert parity.violations({kind: math.nan}, {kind: own}, dtype)
    shipped = kind.replace("grad", "gradient")
    if kind != "parameter all":
        assert measure.verdict({shipped: 0.999 * limit}, {shipped: own}, dtype)["ok"]
        assert not measure.verdict({shipped: 1.001 * limit}, {shipped: own}, dtype)["ok"]
        assert not measure.verdict({shipped: math.nan}, {shipped: own}, dtype)["ok"]
