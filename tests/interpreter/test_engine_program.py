"""Whole networks of the engine's Triton kernels over one arena, in the interpreter: against the model in float64."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fused_resnet import measure
from fused_resnet.engine import gpu, path
from fused_resnet.engine.cases import CUDNN
from fused_resnet.engine.eager import Eager, named
from fused_resnet.engine.graph import capture, propagate
from fused_resnet.engine.pieces import Pieces
from fused_resnet.engine.steps import match
from fused_resnet.engine.tune import Results

CPU = torch.device("cpu")
ZONE, AROUND, UNWRITTEN = 4096, 0xA5, 0xFF  # all bits set is NaN in every float format
# Of the untouched model's own variants, the largest error, twice, and this: the project's rule.
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3}


class Memory:
    """torch, whose new tensors hold NaN; the arena and the workspace lie between zones that nobody may write to."""

    def __init__(self):
        self.raw = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *shape, dtype=torch.float32, device=CPU, **options):
        if dtype is not torch.uint8:
            t = torch.empty(*shape, dtype=dtype, device=device, **options)
            return t if t.is_meta else t.fill_(float("nan"))
        raw = torch.full((shape[0] + 2 * ZONE,), UNWRITTEN, dtype=torch.uint8)
        raw[:ZONE], raw[ZONE + shape[0] :] = AROUND, AROUND
        self.raw.append(raw)
        return raw[ZONE : ZONE + shape[0]]

    def check(self):
        assert self.raw
        for raw in self.raw:
            assert (raw[:ZONE] == AROUND).all() and (raw[-ZONE:] == AROUND).all(), "written beside the memory"

    def spoil(self):
        for raw in self.raw:
            raw[ZONE:-ZONE] = UNWRITTEN


def small(block, counts, seed=0, **options):
    torch.manual_seed(seed)
    model = ResNet(block, counts, num_classes=16, **options).eval()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.2)
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2)
    return model


def tiny(seed=0):
    """A stem, a bottleneck with a projection and one without, the average pool and a linear layer."""
    model = small(Bottleneck, [2, 0, 0, 0], seed, width_per_group=16)
    for name in ("layer2", "layer3", "layer4"):
        setattr(model, name, torch.nn.Identity())
    model.fc = torch.nn.Linear(256, 8)
    return model


def build(model, x, dtype, dear, memory, monkeypatch):
    """(program, pieces): all by Triton where it can; dear: how many steps in one kernel cost more than one by one."""
    monkeypatch.setattr(gpu, "torch", memory)
    graph = capture(model)
    propagate(graph, (x.float(),))
    network = match(graph)
    pieces = Pieces(network, dtype, CPU, False, named(network, (gpu.dense(x),)))
    results = Results()
    for piece in pieces.all():
        if piece.args is not None and piece.key not in results:
            candidates = piece.args.problem().build().candidates()
            triton = [c for c in candidates if c.backend == "triton"]
            results[piece.key] = SimpleNamespace(chosen=(triton or candidates)[-1], seconds=None)

    def cost(piece):
        return float(len(piece.steps) ** 2) if dear else 1.0

    chosen = list(path.cheapest(len(network.steps), pieces.moves(cost))[1])
    eager = Eager(graph.module, dtype)
    return gpu.Program(network, chosen, results, gpu.Packed(eager), eager, CPU), chosen


@torch.no_grad()
def compare(model, x, dtype, dear, monkeypatch):
    """Run twice over memory that holds NaN; returns the pieces."""
    memory = Memory()
    program, pieces = build(model, x, dtype, dear, memory, monkeypatch)
    first = [t.clone() for t in tree_leaves(program.run((x,)))]
    memory.check()
    memory.spoil()
    again = tree_leaves(program.run((x,)))
    memory.check()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "two runs differ"
    like = lambda dtype: copy.deepcopy(model).eval().to(dtype)  # noqa: E731  (an extractor's copy trains)
    wide = tree_leaves(like(torch.float64)(x.double()))
    own = [
        tree_leaves(like(dtype)(x.to(dtype))),
        tree_leaves(like(dtype)(x.to(dtype, memory_format=torch.channels_last))),
    ]
    assert len(wide) == len(first)
    for i, (y, want) in enumerate(zip(first, wide, strict=True)):
        assert y.shape == want.shape and y.dtype is dtype and y.isfinite().all()
        yardstick = max(measure.error(variant[i], want) for variant in own)
        error = measure.error(y, want)
        assert error <= 2 * yardstick + FLOOR[dtype], f"result {i}: {error:.1e}, torchvision {yardstick:.1e}"
    return pieces


def shape_of(pieces):
    return [(p.rung, len(p.steps)) for p in pieces]


def test_a_kernel_a_block_and_quarters_at_the_ends_of_stages(monkeypatch):
    """Chains wherever they can be; odd maps."""
    model, x = small(Bottleneck, [2, 2, 1, 1], width_per_group=16), torch.randn(1, 3, 17, 37)
    pieces = compare(model, x, torch.float16, False, monkeypatch)
    assert shape_of(pieces) == [(2, 1), (1, 1), *[(5, 3)] * 4, (4, 2), (1, 1), (4, 3), (0, 1)]
    assert sum(p.quarter for p in pieces) == sum(p.quartered for p in pieces) == 2


@pytest.mark.parametrize("block", [Bottleneck, BasicBlock], ids=["bottleneck", "basic"])
def test_a_kernel_a_convolution(block, monkeypatch):
    options = {"width_per_group": 16} if block is Bottleneck else {}
    model, x = small(block, [1, 1, 1, 0], **options), torch.randn(1, 3, 17, 21)
    model.layer4, model.fc = torch.nn.Identity(), torch.nn.Linear(256 * block.expansion, 8)
    pieces = compare(model, x, torch.float16, True, monkeypatch)
    assert [p.rung for p in pieces].count(3) == (3 if block is Bottleneck else 2)
    assert {len(p.steps) for p in pieces} == {1}


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (torch.randn(2, 3, 18, 23).contiguous(memory_format=torch.channels_last), torch.float16),
        pytest.param(torch.randn(1, 3, 18, 23, dtype=torch.float64), torch.float32, marks=pytest.mark.slow),
        (torch.randn(1, 6, 36, 23)[:, ::2, ::2], torch.float16),
    ],
    ids=["channels_last-fp16", "float64-fp32", "sliced-fp16"],
)
def test_inputs_of_all_kinds(x, dtype, monkeypatch):
    rungs = [p.rung for p in compare(tiny(), x, dtype, False, monkeypatch)]
    assert rungs == ([2, 1, 5, 4, 0] if dtype is torch.float16 else [2, 1, 1, 3, 1, 1, 1, 0, 0])


def test_stages_that_are_results_are_whole_and_stay(monkeypatch):
    model = small(Bottleneck, [2, 1, 0, 0], width_per_group=16)
    model.layer3 = model.layer4 = torch.nn.Identity()
    model = create_feature_extractor(model, {"layer1": "a", "layer2": "b", "layer2.0.bn1": "c"}).eval()
    pieces = compare(model, torch.randn(1, 3, 17, 21), torch.float16, False, monkeypatch)
    assert any(p.rung == 5 for p in pieces) and not any(p.quarter for p in pieces)


def test_groups_are_a_kernel_like_others(monkeypatch):
    """Between 1x1 convolutions of one group; its sum with the input is taken in."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(16, 64, 1), torch.nn.Conv2d(64, 64, 3, padding=1, groups=16, bias=False)
            self.bn, self.c = torch.nn.BatchNorm2d(64), torch.nn.Conv2d(64, 16, 1)

        def forward(self, x):
            a = self.a(x).relu()
            return self.c((self.bn(self.b(a)) + a).relu())

    pieces = compare(Block().eval(), torch.randn(2, 16, 5, 7), torch.float16, True, monkeypatch)
    assert [p.rung for p in pieces] == [1, 1, 1] and (pieces[1].args.groups, pieces[1].args.residual) == (16, True)


class Views(torch.nn.Module):
    """Traced nodes around convolutions: views of what kernels wrote, in-place changes, slices with gaps."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(16, 16, 1) for _ in range(3))

    def forward(self, x):
        a = self.a(x).relu()
        view = a[:, :, ::2, ::2]  # channels_last strides, and not dense
        b = self.b(view).relu()
        c = self.c(a)
        c = c.mul_(2)
        return b, view, c, self.b(c[:, :, 1:, :]), x[:, :8]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_views_of_the_arena_are_neither_lost_nor_taken_to_be_dense(layout, monkeypatch):
    torch.manual_seed(1)
    compare(Views().eval(), torch.randn(2, 16, 5, 7).contiguous(memory_format=layout), torch.float32, True, monkeypatch)


def test_refresh_writes_into_the_memory_that_kernels_read(monkeypatch):
    model, other = tiny(0), tiny(1)
    x = torch.randn(1, 3, 17, 21)
    program, _ = build(model, x, torch.float16, False, Memory(), monkeypatch)
    places = [t.data_ptr() for *_, weights, bias in program.weights._kept.values() for t in (*weights, bias)]
    with torch.no_grad():
        before = program.run((x,)).clone()
        mine = dict(program.eager.module.named_parameters()) | dict(program.eager.module.named_buffers())
        for name, value in (*other.named_parameters(), *other.named_buffers()):
            mine[name].copy_(value)
        program.eager.refresh()
        program.weights.refresh()
        after = program.run((x,)).clone()
        want = other.double()(x.double())
    assert places == [t.data_ptr() for *_, weights, bias in program.weights._kept.values() for t in (*weights, bias)]
    assert measure.error(after, want) < 1e-2 < measure.error(before, want)


def test_weights_are_held_once(monkeypatch):
    """What the kernels take as PyTorch does is the same memory."""
    program, _ = build(tiny(), torch.randn(1, 3, 17, 21), torch.float16, False, Memory(), monkeypatch)
    folded = {w.data_ptr() for _, weights, _ in program.eager.weights.values() for w in weights}
    packed = {w.data_ptr() for _, _, weights, _ in program.weights._kept.values() for w in weights}
    assert len(packed - folded) == 1  # the stem's


def test_a_value_lies_where_no_other_that_is_needed_does(monkeypatch):
    """The arena is smaller than its values together, and what lives at one time is apart."""
    model = small(Bottleneck, [2, 2, 1, 1], width_per_group=16)
    program, pieces = build(model, torch.randn(1, 3, 33, 40), torch.float16, False, Memory(), monkeypatch)
    values = [t for t in program.values.values() if _within(t, program.arena)]
    assert program.arena.numel() < sum(t.numel() * t.element_size() for t in values)
    source, alive = program.network.source, {}
    for piece in reversed(pieces):
        now = set(program.written(piece))
        for step in piece.steps:
            now |= {source(n) for n in step.reads if source(n) in program.values}
        alive = {n for n in alive if n not in program.written(piece)} | now
        spans = sorted(_span(program.values[n]) for n in alive)
        assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
        alive -= set(program.written(piece))


def _span(t):
    return t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()


def _within(t, arena):
    return t.untyped_storage().data_ptr() == arena.untyped_storage().data_ptr()


@torch.no_grad()
def test_kernels_and_pytorch_take_turns(monkeypatch):
    """Steps that PyTorch's operators compute read and write beside the kernels' arena; a quarter among them."""
    model, x = small(Bottleneck, [1, 1, 0, 0], width_per_group=16), torch.randn(1, 3, 19, 37)
    model.layer3 = model.layer4 = torch.nn.Identity()
    model.fc = torch.nn.Linear(512, 8)
    program, pieces = build(model, x, torch.float16, False, Memory(), monkeypatch)
    assert any(p.quarter for p in pieces) and any(p.quartered for p in pieces)
    want = copy.deepcopy(model).double()(x.double())
    for odd in (0, 1):
        results = Results(program.results)
        for i, piece in enumerate(pieces):
            if piece.args is not None and i % 2 == odd:
                results[piece.key] = SimpleNamespace(chosen=CUDNN, seconds=None)
        mixed = gpu.Program(program.network, pieces, results, program.weights, program.eager, CPU)
        assert measure.error(mixed.run((x,)), want) < 1e-2
