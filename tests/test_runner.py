"""optimize_for_inference and the module it returns: fresh results, threads, refresh, refusals, the ten models."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import pickle
import threading

import engine_cases
import parity
import pytest
import torch
import torch.nn.functional as F
import torchvision
from engine_cases import Net, agree, conv, resnet
from torch import nn
from torchvision.models.resnet import Bottleneck

from fused_resnet import models, optimize_for_inference, swap_blocks
from fused_resnet.backends import cuda
from fused_resnet.engine import cpu_weights, runner

compiled = pytest.mark.skipif(cuda.load() is not None, reason=f"no compiled kernels: {cuda.load()}")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SHAPES = [(1, 3, 33, 33), (2, 3, 40, 33), (5, 3, 33, 47), (3, 3, 64, 35)]


def small():
    """Stem, blocks with Winograd's maps, a traced node, the head."""
    return Net(
        lambda m, x: m.fc(torch.flatten(m.avg(m.blocks(m.pool(F.relu(m.n(m.stem(x)))) * 1.5)), 1)),
        stem=conv(3, 16, 7, stride=2), n=nn.BatchNorm2d(16), pool=nn.MaxPool2d(3, 2, 1), avg=nn.AdaptiveAvgPool2d(1),
        fc=nn.Linear(16, 5), blocks=nn.Sequential(conv(16), nn.ReLU(), conv(16), nn.ReLU()),
    )  # fmt: skip


@functools.cache
def shared_fast():
    return optimize_for_inference(small(), torch.randn(SHAPES[0]), tune="off")


def rss() -> int:
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


# --- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_results_are_fresh(dtype):
    fast = optimize_for_inference(small(), torch.randn(SHAPES[1]), dtype=dtype, tune="off")
    y1 = fast(torch.randn(SHAPES[1]))
    kept = y1.clone()
    for shape in (SHAPES[1], SHAPES[2], SHAPES[1]):
        y2 = fast(torch.randn(shape))
        assert y2.untyped_storage().data_ptr() != y1.untyped_storage().data_ptr() and y2.dtype is dtype
    assert torch.equal(y1, kept)
    y1.zero_()  # and what the caller does to it is the caller's
    x = torch.randn(SHAPES[1])
    before = x.clone()
    assert torch.equal(fast(x), fast(x)) and torch.equal(x, before)


def test_threads():
    """8 threads, mixed shapes, two of them never seen before: every result is its serial twin, bit for bit."""
    model = small()
    fast, twin = (optimize_for_inference(model, torch.randn(SHAPES[0]), tune="off") for _ in range(2))
    inputs = [torch.randn(SHAPES[i % 4], generator=torch.Generator().manual_seed(i)) for i in range(64)]
    want = [twin(x) for x in inputs]
    got: list = [None] * 64
    start = threading.Barrier(8)

    def work(first):
        start.wait()
        for i in range(first, 64, 8):
            got[i] = fast(inputs[(i * 5) % 64])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(got[i], want[(i * 5) % 64]) for i in range(64))


@pytest.mark.parametrize("new_shapes", ["plan", "eager"])
def test_no_growth_of_memory(new_shapes):
    """1,000 calls of mixed shapes, more of them than plans are kept."""
    fast = optimize_for_inference(small(), torch.randn(1, 3, 33, 33), tune="off", new_shapes=new_shapes)
    shapes = [(1 + i % 3, 3, 33 + 2 * i, 49) for i in range(runner.SHAPES + 3)]
    inputs = [torch.randn(s) for s in shapes]

    def calls(count):
        for i in range(count):
            fast(inputs[i * 7 % len(inputs)] if i % 10 == 0 else inputs[i % 4])
        gc.collect()
        return rss()

    calls(250)
    before = calls(250)
    grown = calls(500) - before
    assert grown < 8 << 20, f"{grown / 2**20:.1f} MiB"
    assert len(fast.plans) <= runner.SHAPES


def test_the_least_recently_used_plan_goes(monkeypatch):
    monkeypatch.setattr(runner, "SHAPES", 3)
    fast = optimize_for_inference(small(), torch.randn(1, 3, 33, 33), tune="off")
    first = fast.plan
    for n in (2, 3, 1, 4):
        fast(torch.randn(n, 3, 33, 33))
    assert [p.shapes[0][0] for p in fast.plans] == [3, 1, 4]
    fast(torch.randn(3, 3, 33, 33))
    assert [p.shapes[0][0] for p in fast.plans] == [1, 4, 3] and fast.plan is first


@compiled
def test_new_shapes():
    x, other = torch.randn(SHAPES[0]), torch.randn(SHAPES[2])
    model = small()
    fast = optimize_for_inference(model, x, tune="off", new_shapes="eager")
    agree(fast(other), model, other)
    backends = [{s.backend.split()[0] for s in p.steps} for p in fast.plans]
    assert backends == [{"cpu", "traced"}, {"pytorch", "traced"}]
    fast = optimize_for_inference(model, x, tune="off")
    agree(fast(other), model, other)
    assert {s.backend.split()[0] for s in fast.plans[1].steps} == {"cpu", "traced"}


class Backbone(nn.Sequential):
    out_channels = 8


class Detector(nn.Module):
    """Asks its backbone for more than maps."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, images):
        return self.backbone(torch.stack(images))[:, : self.backbone.out_channels].flatten(1).sum(1)


def test_in_the_place_of_a_backbones_forward():
    """What README says of detectors."""
    torch.manual_seed(0)
    model, images = Detector().eval(), [torch.randn(3, 20, 24) for _ in range(2)]
    keys = list(model.state_dict())
    with torch.no_grad():
        want = model(images)
        fast = optimize_for_inference(model.backbone, torch.stack(images), tune="off")
        model.backbone.forward = fast.forward
        torch.testing.assert_close(model(images), want)
        assert fast.plan.flop_share == 1.0 and list(model.state_dict()) == keys
        fast.refresh(model.backbone)
        torch.testing.assert_close(model.eval()(images), want)
    del model.backbone.forward
    model.train()(images).sum().backward()


# --- what it takes --------------------------------------------------------------------------------------------------

INPUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "flipped": lambda x: x.flip(0, 3),
    "expanded": lambda x: x[:1, :, :, :1].expand(x.shape),
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bfloat16, channels_last": lambda x: x.bfloat16().contiguous(memory_format=torch.channels_last),
    "a parameter": lambda x: nn.Parameter(x, requires_grad=False),
    "unaligned": lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("how", INPUTS)
def test_inputs(how):
    x = INPUTS[how](torch.randn(3, 3, 37, 41))
    before = x.clone()
    y = shared_fast()(x)
    assert y.dtype is torch.float32 and torch.equal(x, before)
    agree(y, small(), x.float())


def test_every_layout_again_and_again():
    """The plan of one strided input serves all of its kind."""
    model = small()
    fast = optimize_for_inference(model, INPUTS["sliced"](torch.randn(3, 3, 37, 41)), tune="off")
    for how in INPUTS:
        for _ in range(2):
            x = INPUTS[how](torch.randn(3, 3, 37, 41))
            agree(fast(x), model, x.float())


@pytest.mark.parametrize(
    "context", ["inference_mode", "no_grad", "grad", "autocast", "inference tensors", "float64 default"]
)
def test_contexts(context):
    model, x = small(), torch.randn(SHAPES[2])
    with torch.inference_mode(context == "inference tensors"):
        x = x.clone()
    default = torch.float64 if context == "float64 default" else torch.float32
    torch.set_default_dtype(default)
    try:
        with torch.inference_mode(context == "inference_mode"), torch.set_grad_enabled(context == "grad"):
            with torch.autocast("cpu", torch.bfloat16, enabled=context == "autocast"):
                fast = optimize_for_inference(model, x, tune="off")
                y = fast(x)
                z = fast(x[:2] + 1)  # planned in this context as well
                fast.refresh(model)
                again = fast(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.dtype is torch.float32 and not y.requires_grad and torch.equal(y, again) and not fast.plan.notes
    agree(y, model, x.clone())
    agree(z, model, x[:2] + 1)


def test_a_tensor_of_its_own_kind():
    from torchvision.tv_tensors import Image

    x = torch.randn(SHAPES[0])
    assert torch.equal(torch.as_tensor(shared_fast()(Image(x))), shared_fast()(x))


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_other_thread_counts_later(threads):
    x = torch.randn(SHAPES[2])
    want, before = shared_fast()(x), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(shared_fast()(x), want)
    finally:
        torch.set_num_threads(before)


# --- refresh --------------------------------------------------------------------------------------------------------


def other_weights(model, seed=3):
    other = engine_cases.randomized(copy.deepcopy(model), seed)
    if hasattr(other, "scale"):
        other.scale.fill_(1.25)
    return other


class Everything(Net):
    """Weights in every layout: stems of both input layouts, GEMM, Winograd, a projection, traced modules, a buffer."""

    def __init__(self):
        super().__init__(
            None, stem=conv(3, 16, 7, stride=2), n=nn.BatchNorm2d(16), a=conv(16), b=conv(16), g=conv(16, 16, groups=2),
            c=conv(16, 32, 3, stride=2), s=conv(16, 32, 1, stride=2), gn=nn.GroupNorm(4, 32), fc=nn.Linear(32, 5),
        )  # fmt: skip
        self.register_buffer("scale", torch.tensor(0.75))
        self.plain = torch.tensor(0.5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.n(self.stem(x * torch.tensor(1.1)))), 3, 2, 1)
        x = F.relu(self.b(F.relu(self.a(x))) + x) * self.scale + self.plain
        x = self.gn(F.relu(self.c(self.g(x)) + self.s(x)))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_refresh(dtype):
    model = Everything()
    inputs = [torch.randn(2, 3, 65, 79), torch.randn(1, 3, 33, 33).contiguous(memory_format=torch.channels_last)]
    fast = optimize_for_inference(model, inputs[0], dtype=dtype, tune="off")
    old = [fast(x) for x in inputs]
    other = other_weights(model)
    assert fast.refresh(other) is fast
    for x, before in zip(inputs, old, strict=True):
        assert not torch.equal(fast(x), before)
        agree(fast(x), other, x, dtype=dtype)
    again = optimize_for_inference(other, inputs[0], dtype=dtype, tune="off")
    assert all(torch.equal(fast(x), again(x)) for x in inputs)
    fast.refresh(model)
    assert all(torch.equal(fast(x), before) for x, before in zip(inputs, old, strict=True))


@compiled
def test_refresh_reaches_every_layout():
    model = Everything()
    fast = optimize_for_inference(model, torch.randn(2, 3, 65, 79))
    fast(torch.randn(1, 3, 33, 33).contiguous(memory_format=torch.channels_last))
    weights = fast._fast.weights
    other = other_weights(model)
    for key, (step, _) in list(weights._packed.items()):
        for layout in ("winograd2", "winograd4", "nhwc", "bias"):
            if not layout.startswith("winograd") or step.conv.kernel == (3, 3):
                weights.get(step, layout)
        assert key in weights._packed
    kept = {key: packed for key, (_, packed) in weights._packed.items()}
    assert {key[-1] for key in kept} >= {"winograd2", "winograd4", "nhwc", "bias"}
    fast.refresh(other)
    for key, (step, packed) in weights._packed.items():
        assert packed is kept[key] and torch.equal(packed, weights._pack(step, key[-1]))


def test_refresh_takes_a_swapped_model_and_other_dtypes():
    model, other = resnet(seed=1), resnet(seed=2)
    x = torch.randn(2, 3, 40, 33)
    fast = optimize_for_inference(model, x, tune="off")
    want = optimize_for_inference(other, x, tune="off")(x)
    assert torch.equal(fast.refresh(swap_blocks(copy.deepcopy(other)).train())(x), want)
    fast.refresh(model).refresh(copy.deepcopy(other).double())
    assert torch.equal(fast(x), want)


def test_refresh_refuses_and_changes_nothing():
    model = small()
    fast = optimize_for_inference(model, torch.randn(SHAPES[0]), tune="off")
    x = torch.randn(SHAPES[0])
    want = fast(x)
    wrong = copy.deepcopy(model)
    wrong.stem.weight.data.zero_()
    wrong.fc = nn.Linear(16, 6)
    with pytest.raises(
        ValueError, match=r"model: does not fit the plan: fc.weight has shape \[6, 16\], expected \[5, 16\]"
    ):
        fast.refresh(wrong)
    del wrong.fc
    with pytest.raises(ValueError, match="model: does not fit the plan: fc.weight is missing"):
        fast.refresh(wrong)
    with pytest.raises(ValueError, match="model: does not fit"):
        fast.refresh(fast)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got OrderedDict"):
        fast.refresh(model.state_dict())
    assert torch.equal(fast(x), want)


# --- the original -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True], ids=["plain", "swapped"])
def test_the_original_is_untouched(swapped):
    model = resnet(Bottleneck).to(memory_format=torch.channels_last).train()
    if swapped:
        swap_blocks(model)
    calls = []
    model.layer1.register_forward_hook(lambda m, args, out: calls.append(1))
    for p in model.layer2.parameters():
        p.requires_grad_(False)
    kinds = [type(m) for m in model.modules()]
    ids = {k: id(v) for k, v in model.state_dict(keep_vars=True).items()}
    before = {k: (v.clone(), v.stride(), v.requires_grad) for k, v in model.state_dict(keep_vars=True).items()}
    rng = torch.get_rng_state()
    x = torch.randn(2, 3, 40, 33)
    torch.set_rng_state(rng)
    fast = optimize_for_inference(model, x)
    y = fast(x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [type(m) for m in model.modules()] == kinds and all(m.training for m in model.modules())
    assert len(model.layer1._forward_hooks) == 1
    for k, v in model.state_dict(keep_vars=True).items():
        assert id(v) == ids[k] and torch.equal(v, before[k][0]) and v.grad is None
        assert v.stride() == before[k][1] and v.requires_grad == before[k][2]
    model.load_state_dict(resnet(Bottleneck, seed=5).state_dict())
    assert torch.equal(fast(x), y)
    fast.refresh(model)
    assert not torch.equal(fast(x), y)
    agree(fast(x), model, x)


def test_swapped_and_plain_models_agree():
    model, x = resnet(Bottleneck), torch.randn(2, 3, 40, 33)
    plain = optimize_for_inference(model, x, tune="off")
    swapped = optimize_for_inference(swap_blocks(copy.deepcopy(model)), x, tune="off")
    assert torch.equal(plain(x), swapped(x))
    assert [s.layers for s in plain.plan.steps] == [s.layers for s in swapped.plan.steps]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_it_refuses():
    fast, x = shared_fast(), torch.randn(SHAPES[0])
    want = fast(x)
    with pytest.raises(RuntimeError, match="cannot be trained; train the original"):
        fast.train()
    assert fast.eval() is fast and fast.train(False) is fast and not fast.training
    with pytest.raises(RuntimeError, match="input: requires a gradient"):
        fast(x.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(fast(x.clone().requires_grad_()), want)
    for move in (lambda: fast.to("cpu"), lambda: fast.half(), lambda: fast.to(torch.float64), fast.cuda):
        with pytest.raises(RuntimeError, match="stays on its device and in its dtype"):
            move()
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="not copied or saved; save the original"):
            copied(fast)
    assert torch.equal(fast(x), want) and not list(fast.parameters()) and not fast.state_dict()


def test_bad_inputs_are_named():
    fast = shared_fast()
    for bad, kind, words in (
        ((), TypeError, "input: Net takes 1 tensors, got 0"),
        ((torch.ones(SHAPES[0]),) * 2, TypeError, "input: Net takes 1 tensors, got 2"),
        (([1.0],), TypeError, "input: expected a tensor, got list"),
        (
            (torch.ones(SHAPES[0], dtype=torch.int64),),
            TypeError,
            "input: expected a floating-point tensor, got torch.int64",
        ),
        ((torch.ones(SHAPES[0], device="meta"),), ValueError, "input: expected a tensor on cpu, got meta"),
        ((torch.ones(3, 33, 33),), ValueError, r"input: expected 4 dimensions, got shape \[3, 33, 33\]"),
        ((torch.ones(1, 4, 33, 33),), ValueError, r"input: expected 3 channels, got shape \[1, 4, 33, 33\]"),
        ((torch.ones(0, 3, 33, 33),), ValueError, r"input: is empty, shape \[0, 3, 33, 33\]"),
        ((torch.ones(SHAPES[0]).to_sparse(),), TypeError, "input: expected a dense tensor, got torch.sparse_coo"),
    ):
        with pytest.raises(kind, match=words):
            fast(*bad)
    needs = optimize_for_inference(Net(lambda m, x: m.a(x), a=conv(padding=0)), torch.randn(1, 3, 5, 5), tune="off")
    with pytest.raises(ValueError, match=r"input: Net cannot take \[1, 3, 2, 2\]: "):
        needs(torch.randn(1, 3, 2, 2))
    needs(torch.randn(1, 3, 5, 5))


def test_a_model_that_asserts():
    class Strict(Net):
        def forward(self, x):
            torch._assert(x.shape[2] == 8, "")
            return self.a(x)

    fast = optimize_for_inference(Strict(None, a=conv()), torch.randn(1, 3, 8, 8), tune="off")
    with pytest.raises(ValueError, match=r"input: Strict cannot take \[1, 3, 9, 8\]: AssertionError"):
        fast(torch.randn(1, 3, 9, 8))


def test_bad_arguments_are_named():
    model, x = small(), torch.randn(SHAPES[0])
    for given, kind, words in (
        (dict(model=lambda x: x), TypeError, "model: expected a torch.nn.Module, got function"),
        (dict(model=shared_fast()), TypeError, "model: is optimized already"),
        (dict(model=nn.ReLU()), ValueError, "model: ReLU has no floating-point parameters"),
        (dict(example_input="x"), TypeError, "example_input: expected tensors, got str at place 0"),
        (dict(example_input={"x": x}), TypeError, "example_input: expected tensors, got dict"),
        (dict(example_input=(x, None)), TypeError, "example_input: expected tensors, got NoneType at place 1"),
        (dict(example_input=()), TypeError, "example_input: Net takes 1 tensors, got 0"),
        (dict(example_input=x[0]), ValueError, r"example_input: .*\[3, 33, 33\]"),
        (dict(example_input=x[:0]), ValueError, "example_input: is empty"),
        (dict(example_input=x.long()), TypeError, "example_input: expected a floating-point tensor"),
        (dict(example_input=torch.randn(1, 2, 33, 33)), ValueError, r"example_input: Net cannot take \[1, 2, 33, 33\]"),
        (dict(tune="fast"), ValueError, "tune: expected one of 'full', 'cached', 'off', got 'fast'"),
        (dict(new_shapes=None), ValueError, "new_shapes: expected one of 'plan', 'eager', got None"),
        (dict(dtype="float16"), ValueError, "dtype: expected one of torch.float32, .*got float16"),
        (dict(dtype=torch.int8), ValueError, "dtype: expected one of"),
    ):
        with pytest.raises(kind, match=words):
            optimize_for_inference(**({"model": model, "example_input": x} | given))
    two = small()
    two.fc = nn.Linear(16, 5, device="meta")
    with pytest.raises(ValueError, match="model: all of it must be on one device; fc.weight is on meta, others on cpu"):
        optimize_for_inference(two, x)


# --- trust ------------------------------------------------------------------------------------------------------------


def cancelling() -> nn.Module:
    """A network whose result is the small difference of large maps: rounding errors are a hundredth of it."""
    torch.manual_seed(0)
    model = Net(lambda m, x: m.b(F.relu(m.a(x))) - m.c(F.relu(m.a(x))), a=conv(), b=conv(16), c=conv(16)).eval()
    with torch.no_grad():
        for mine, other in zip(model.c.parameters(), model.b.parameters(), strict=True):
            mine.copy_(other * (1 + 1e-5 * torch.randn_like(other)))
    return model


@compiled
@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_float64_decides_where_rounding_errors_are_large(wrong, monkeypatch):
    """A result as near to float64's as PyTorch's own is no worse; one that is farther off is wrong."""
    model, x = cancelling(), torch.randn(1, 3, 9, 11)  # too few tiles for Winograd
    judge = copy.deepcopy(model).double()(x.double())
    theirs = parity.error(model(x), judge)
    assert theirs > 10 * runner.TOLERANCE[torch.float32]
    if wrong:
        real = cpu_weights.panels
        monkeypatch.setattr(cpu_weights, "panels", lambda *args: real(*args) * (1 + 10 * theirs))
    fast = optimize_for_inference(model, x, tune="off")
    assert any("differs from PyTorch's by" in note for note in fast.plan.notes) == wrong
    assert any(s.backend.startswith("cpu") for s in fast.plan.steps) != wrong
    assert parity.error(fast(x), judge) <= 4 * theirs


@compiled
@pytest.mark.parametrize("tune", ["off", "full"])
@pytest.mark.parametrize("layout", ["panels", "winograd"])
def test_a_wrong_kernel_is_refused(layout, tune, monkeypatch, caplog):
    real = getattr(cpu_weights, layout)
    monkeypatch.setattr(cpu_weights, layout, lambda *args: real(*args) * 1.01)
    model, x = resnet(), torch.randn(2, 3, 64, 80)
    with caplog.at_level(logging.WARNING, "fused_resnet"):
        fast = optimize_for_inference(model, x, tune=tune)
    assert any("differs from PyTorch's by" in note for note in fast.plan.notes), fast.plan.notes
    assert "note: " in str(fast.plan) and "differs from PyTorch's" in caplog.text
    if layout == "panels":
        assert {s.backend for s in fast.plan.steps} == {"pytorch"}
    else:  # dropped by the tuner, which chooses among the others; or by the plan
        assert tune == "full" or fast.plan.notes[0].startswith("Winograd's filtering is not used: result 0 differs")
        assert all(s.backend.startswith("cpu") and "F(" not in s.config for s in fast.plan.steps)
    agree(fast(x), model, x)


@compiled
def test_tune():
    model, x = resnet(), torch.randn(5, 3, 40, 56)
    for tune in ("off", "cached", "full"):
        fast = optimize_for_inference(model, x, tune=tune)
        assert not fast.plan.notes and all(s.measured_s for s in fast.plan.steps)
        agree(fast(x), model, x)
        text = str(fast.plan)
        assert "100.0 %" in text and all(s.layers[0] in text for s in fast.plan.steps)
        assert all(s.bytes > 0 and s.floor_s((1e10, 1e10)) > 0 for s in fast.plan.steps)


def test_plans_say_what_runs():
    x = torch.randn(SHAPES[0])
    fast = optimize_for_inference(small(), x, dtype=torch.bfloat16, tune="off")
    assert any("float32, this is bfloat16" in note for note in fast.plan.notes)
    assert fast.plan.dtype is torch.bfloat16 and len(fast.plan.traced) == 1
    assert "Net, bfloat16, cpu" in repr(fast)
    assert optimize_for_inference(small().double(), x.double()).plan.dtype is torch.float64


# --- the ten models ---------------------------------------------------------------------------------------------------

QUICK = [("resnet18", (1, 3, 97, 161)), ("resnet50", (2, 3, 33, 33))]
ALL = [(name, (n, 3, *size)) for name in models.TORCHVISION for n in (1, 2, 7) for size in ((97, 161), (33, 33))]
ALL += [(name, (32, 3, 33, 33)) for name in models.TORCHVISION]
SLOW = [*(cell for cell in ALL if cell not in QUICK), ("resnext50_32x4d", (2, 3, 33, 33))]


def torchvision_model(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = parity.randomize_norms(getattr(torchvision.models, name)(num_classes=10), seed, branch=0.2)
    return parity.calibrate(model, torch.randn(2, 3, 40, 40), seed).eval()


def cells(cells, *marks):
    return [pytest.param(*cell, id=f"{cell[0]}-{'x'.join(map(str, cell[1]))}", marks=marks) for cell in cells]


@pytest.mark.parametrize("name, shape", cells(QUICK) + cells(SLOW, pytest.mark.slow))
def test_the_ten_models(name, shape):
    """In every dtype against the same judge. The yardstick of float32 is of three seeds."""
    yardsticks: dict[str, list] = {key: [] for key in DTYPES}
    for seed in parity.SEEDS[::-1]:
        model, x = torchvision_model(name, seed), torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        judged = engine_cases.judge(model, (x,))
        for key in DTYPES if seed == 0 else ("f32",):
            yardsticks[key].append(engine_cases.yardstick(model, (x,), DTYPES[key], judged))
    for key, dtype in DTYPES.items():
        fast = optimize_for_inference(model, x, dtype=dtype, tune="off")
        assert fast.plan.flop_share == 1.0 and not (key == "f32" and fast.plan.notes and cuda.load() is None)
        y = fast(x)
        parity.check(parity.errors(engine_cases.seen(y), judged), parity.worst(yardsticks[key]), dtype)
        assert torch.equal(fast(x), y)
