"""The CPU's compiled kernels: every choice on every instruction set, float64 being the judge; bad programs raise.

What Winograd does with numbers that are not finite: a tile of outputs whose inputs have one may be non-finite as a
whole. It is never finite where PyTorch's result is not.
"""

from __future__ import annotations

import ast
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import engine_cases
import parity
import pytest
import torch
import torch.nn.functional as F
from engine_cases import Net, conv, network_of, randomized, resnet, seen
from torch import nn

from fused_resnet.backends import cuda
from fused_resnet.engine import cpu, cpu_tune, cpu_weights
from fused_resnet.engine import cpu_program as cp
from fused_resnet.engine.steps import fold

pytestmark = pytest.mark.skipif(cuda.load() is not None, reason=f"no compiled kernels: {cuda.load()}")
ROOT = Path(__file__).parents[1]
ISAS = [i for i in range(3) if cuda.load() is None and cp.isa(i) is not None]
isas = pytest.mark.parametrize("isa", ISAS, ids=lambda i: f"isa{i}")
EDGE, GUARD = 12345.678, 64


class Guarded:
    """Memory that starts as NaN, between zones that must stay as they are."""

    def __init__(self):
        self.blocks: list[tuple[torch.Tensor, int]] = []

    def flat(self, floats: int) -> torch.Tensor:
        block = torch.full((floats + 2 * GUARD,), EDGE)
        block[GUARD : GUARD + floats] = float("nan")
        self.blocks.append((block, floats))
        return block[GUARD : GUARD + floats]

    def check(self) -> None:
        for block, floats in self.blocks:
            assert (block[:GUARD] == EDGE).all(), "written before the start"
            assert (block[GUARD + floats :] == EDGE).all(), "written beyond the end"


@pytest.fixture
def guarded(monkeypatch):
    memory = Guarded()
    monkeypatch.setattr(cpu, "aligned", memory.flat)
    real = torch.empty

    def empty(*shape, memory_format=torch.contiguous_format, **more):
        if not (len(shape) == 1 and isinstance(shape[0], tuple) and more.get("dtype") is torch.float32):
            return real(*shape, memory_format=memory_format, **more)
        flat = memory.flat(torch.Size(shape[0]).numel())
        if memory_format is not torch.channels_last:
            return flat.view(shape[0])
        n, c, h, w = shape[0]
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)

    monkeypatch.setattr(torch, "empty", empty)
    yield memory
    memory.check()


def program_of(model, inputs, isa, choice=None, workers=1, cache=cp.CACHE):
    """(executor, program); choice: for every convolution that it fits, the others by GEMM."""
    network = network_of(model, *inputs)
    runner = cpu.Cpu(network.graph.module, workers, isa)
    network = cpu.for_stems(network, runner.target)
    strides = {name: t.stride() for name, t in runner._given(network, inputs).items()}
    choices = {}
    for step in network.steps if choice is not None else ():
        if step.op in ("conv", "linear") and step.conv.groups == 1:
            fits = choice.kernel == "gemm" or cp.fits_winograd(step, runner.target)
            choices[step.output] = choice if fits else cp.Choice("gemm", 7, runner.target.columns)
    return runner, cp.Program(network, runner.weights, runner.target, workers, strides, choices, cache)


def compiled(model, *inputs, **how):
    runner, program = program_of(model, inputs, **how)
    return runner.run(program, inputs)


def judged(model, inputs, *hows):
    """Every way to run it holds the rule."""
    rule = engine_cases.rule(model, *inputs)
    for how in hows:
        rule(compiled(model, *inputs, **how))


def gemm(isa, rows=7, panels=1):
    return cp.Choice("gemm", rows, panels * cp.isa(isa).columns)


def winograd(isa, m, tiles, shared, panels=1):
    return cp.Choice("winograd", columns=panels * cp.isa(isa).columns, m=m, tiles=tiles, shared=shared)


CONVS = {
    "3x3": (conv(5, 19), (2, 5, 9, 7)),
    "1x1": (conv(17, 33, 1), (3, 17, 5, 3)),
    "1x1 stride 2": (conv(8, 16, 1, stride=2), (2, 8, 7, 9)),
    "3x3 stride 2": (conv(16, 24, stride=2), (1, 16, 9, 8)),
    "dilated": (conv(6, 10, padding=3, dilation=3), (2, 6, 9, 7)),
    "uneven": (nn.Conv2d(3, 5, (3, 1), (1, 2), (2, 0), (2, 1)), (2, 3, 8, 9)),
    "7x7": (conv(3, 20, 7, stride=2), (2, 3, 13, 11)),
    "one channel": (conv(1, 1, 3, bias=True), (1, 1, 5, 7)),
    "a deep one": (conv(70, 40, 3), (1, 70, 4, 3)),  # 630 rows of a panel: three slices
    "a very deep one": (conv(515, 9, 1), (1, 515, 3, 3)),
    "1x1 map": (conv(16, 16, 3), (5, 16, 1, 1)),
    "much padding": (conv(4, 8, 3, padding=5, stride=3), (2, 4, 2, 1)),
}
HOW = {
    "plain": lambda m, x: m.a(x),
    "relu": lambda m, x: F.relu(m.n(m.a(x))),
    "residual": lambda m, x: F.relu(m.n(m.a(x)) + m.e(x)),
}


@isas
@pytest.mark.parametrize("shape", CONVS)
def test_gemm(shape, isa, guarded):
    layer, size = CONVS[shape]
    x = torch.randn(size)
    hows = [
        dict(isa=isa, choice=gemm(isa, rows, panels), workers=workers)
        for rows, panels, workers in ((1, 1, 1), (5, 2, 2), (500, 3, 1))
    ]
    for body in (HOW["plain"], HOW["relu"]):
        judged(Net(body, a=layer, n=nn.BatchNorm2d(layer.out_channels)), (x,), *hows)


@isas
@pytest.mark.parametrize("k", [16, 19, 40])
def test_residual_and_segment(k, isa, guarded):
    """The shortcut as it is, and as a second part of the reduction, with and without a stride."""
    for stride in (1, 2):
        model = Net(
            lambda m, x: m.c(F.relu(F.relu(m.n(m.a(x)) + m.s(x)) + m.b(F.relu(m.n(m.a(x)))))),
            a=conv(12, k, stride=stride), n=nn.BatchNorm2d(k), s=conv(12, k, 1, stride=stride, bias=True),
            b=conv(k, k, 1), c=conv(k, 9, 1),
        )  # fmt: skip
        hows = [dict(isa=isa, choice=gemm(isa, rows, 2), workers=2) for rows in (1, 13, 96)]
        judged(model, (torch.randn(3, 12, 9, 7),), *hows)


@isas
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("size", [(9, 7), (8, 8), (1, 1), (3, 13)], ids=str)
def test_winograd(size, m, shared, isa, guarded):
    """Maps that are no multiple of the tile, channels that are no multiple of a panel, any number of tiles at once."""
    width = cp.isa(isa).width
    x = torch.randn(3, width * 3, *size)
    for padding in (0, 1, 2) if min(size) > 2 else (1, 2):
        a, b = conv(3 * width, 5 * width, padding=padding), conv(5 * width, 5 * width)
        model = Net(
            lambda m, x: (lambda y: F.relu(m.b(y) + y))(F.relu(m.n(m.a(x)))), a=a, b=b, n=nn.BatchNorm2d(5 * width)
        )
        rule = engine_cases.rule(model, x)
        for tiles, panels, workers in ((1, 1, 2), (3, 2, 1), (1000, 3, 3)):
            choice = winograd(isa, m, tiles, shared, panels)
            runner, program = program_of(model, (x,), isa=isa, choice=choice, workers=workers)
            assert all(program.choice(s).kernel == "winograd" for s in program.network.steps)
            rule(runner.run(program, (x,)))


GROUPED = {  # groups, channels of x and of y in a group, how it walks, map
    "4 channels": (8, 4, 4, dict(padding=1), (9, 23)),
    "2 channels": (16, 2, 2, dict(padding=1), (7, 8)),
    "8 channels, stride 2": (4, 8, 8, dict(padding=1, stride=2), (11, 14)),
    "16 channels": (2, 16, 16, dict(padding=1), (6, 31)),
    "24 channels": (2, 24, 24, dict(padding=1), (7, 7)),
    "of no vector": (3, 6, 6, dict(padding=1), (5, 9)),
    "more out than in": (2, 4, 12, dict(padding=1), (5, 9)),
    "fewer out than in": (3, 12, 5, dict(padding=1), (5, 9)),
    "1x1": (4, 8, 4, dict(kernel_size=1), (5, 7)),
    "1x1, stride 3": (2, 4, 4, dict(kernel_size=1, stride=3), (8, 7)),
    "dilated": (4, 4, 4, dict(padding=2, dilation=2), (9, 13)),
    "uneven": (4, 4, 8, dict(kernel_size=(5, 2), stride=(1, 2), padding=(0, 3), dilation=(1, 2)), (9, 8)),
    "much padding": (2, 8, 8, dict(padding=5, stride=2), (3, 2)),
    "a 1x1 map": (2, 8, 8, dict(padding=1), (1, 1)),
    "5x5": (6, 4, 4, dict(kernel_size=5, padding=2), (6, 13)),
    "2 channels, the last vector not whole": (11, 2, 2, dict(padding=1), (5, 12)),
}


@isas
@pytest.mark.parametrize("shape", GROUPED)
def test_grouped(shape, isa, guarded):
    """Each output reads its own group, whatever a task is; vectors that are part of a group, and whole groups."""
    groups, c, k, walk, size = GROUPED[shape]
    layer, add = (
        nn.Conv2d(groups * c, groups * k, groups=groups, bias=bias, **{"kernel_size": 3} | walk)
        for bias in (shape == "uneven", False)
    )
    x = torch.randn(3, groups * c, *size)
    for body in HOW.values():
        model = Net(body, a=layer, n=nn.BatchNorm2d(groups * k), e=add)
        rule = engine_cases.rule(model, x)
        for rows, units, workers in ((1, 1, 1), (2, 3, 2), (100, 100, 3)):
            runner, program = program_of(model, (x,), isa=isa, workers=workers)
            for step in program.network.steps:
                program.choices[step.output] = cp.Choice("grouped", rows, units)
            assert all(s.conv.groups == groups for s in program.network.steps)
            rule(runner.run(program, (x,)))


@isas
def test_how_much_of_a_grouped_convolution_is_a_task(isa):
    """Whole units, rows that leave each worker several tasks and fit the scratch, and not a row at a time where there
    are many workers or a line is long; groups that would leave most of a vector empty are PyTorch's."""
    width = cp.isa(isa).width
    layer = conv(64, 64, groups=16)
    for size, workers in (((56, 56), 1), ((56, 56), 16), ((7, 7), 2), ((20000, 1), 1), ((3, 4000), 2)):
        _, program = program_of(
            Net(lambda m, x: m.a(x), a=layer), (torch.randn(1, 64, *size),), isa=isa, workers=workers
        )
        (step,) = program.network.steps
        choice = cp.grouped_choice(program, step)
        tasks = -(-size[0] // choice.rows) * -(-64 // (choice.columns * cp.unit(step, program.target)[0]))
        assert choice.kernel == "grouped" and 1 <= choice.rows <= size[0] and choice.columns >= 1
        assert tasks >= min(4 * workers, size[0]), (size, workers, choice)
        assert cp.grouped_room(program, step, choice) <= 1 << 16 or choice.rows == 1
        assert choice.rows >= min(size[0], 4) or choice.columns == 1 or size[1] > 1000
    for c, k, fits in ((1, 1, False), (1, width, False), (2, 1, False), (2, 2, True), (3, width // 2, True)):
        model = Net(lambda m, x: m.a(x), a=nn.Conv2d(8 * c, 8 * k, 3, groups=8))
        network = network_of(model, torch.randn(1, 8 * c, 5, 5))
        why = cp.unsupported(network.steps[0], cp.isa(isa))
        assert why is None if fits else why == "8 groups of few channels: through oneDNN"


@isas
def test_a_remembered_choice_of_another_kind_is_ignored(isa):
    model = Net(lambda m, x: m.b(m.a(x)), a=conv(8, 8, groups=2), b=conv(8, 8))
    _, program = program_of(model, (torch.randn(1, 8, 5, 5),), isa=isa)
    grouped, dense = program.network.steps
    kept = {"kernel": "grouped", "rows": 2, "columns": 3, "m": 0, "tiles": 0, "shared": False}
    plain = kept | {"kernel": "gemm", "columns": cp.isa(isa).columns}
    assert cpu_tune._choice(kept, program, grouped) == cp.Choice("grouped", 2, 3)
    assert cpu_tune._choice(plain, program, dense) == cp.Choice("gemm", 2, cp.isa(isa).columns)
    assert cpu_tune._choice(plain, program, grouped) is None and cpu_tune._choice(kept, program, dense) is None
    for odd in ({"shared": True}, {"m": 4}, {"tiles": 7}, {"rows": 0}, {"columns": "3"}):
        assert cpu_tune._choice(kept | odd, program, grouped) is None
        assert cpu_tune._choice(plain | odd, program, dense) is None


@isas
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_groups_do_not_touch_each_other(value, isa):
    """What is not finite in one group stays there."""
    for groups, c in ((4, 4), (2, 8), (2, 24), (3, 5)):
        model, x = (
            Net(lambda m, x: F.relu(m.a(x)), a=conv(groups * c, groups * c, groups=groups)),
            torch.randn(1, groups * c, 7, 9),
        )
        x[0, c + 1, 3, 4] = value
        got, want = compiled(model, x, isa=isa), model(x)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        assert (
            got[0, :c].isfinite().all() and got[0, 2 * c :].isfinite().all() and not got[0, c : 2 * c].isfinite().all()
        )


@isas
def test_a_deep_winograd(isa, guarded):
    """More channels than one slice of the reduction."""
    model = Net(lambda m, x: m.a(x), a=conv(320, 16))
    judged(model, (torch.randn(1, 320, 6, 5),), *(dict(isa=isa, choice=winograd(isa, m, 4, False)) for m in (2, 4)))


STEMS = {
    "resnet": (conv(3, 16, 7, stride=2), (2, 3, 29, 33)),
    "grey": (conv(1, 8, 7, stride=2), (2, 1, 20, 17)),
    "3x3": (conv(4, 24, 3), (3, 4, 9, 7)),
    "uneven kernel": (nn.Conv2d(3, 16, (5, 3), 2, 1), (1, 3, 13, 11)),
    "padding beyond the kernel": (conv(3, 16, 3, stride=8, padding=4), (2, 3, 1, 1)),
    "one column, padding beyond the kernel": (conv(3, 16, 3, stride=8, padding=4), (2, 3, 20, 1)),
    "padding beyond the map": (conv(3, 16, 5, stride=3, padding=7), (2, 3, 2, 3)),
    "one pixel": (conv(3, 16, 7, stride=2), (1, 3, 1, 1)),
}


@isas
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("shape", STEMS)
def test_stem(shape, layout, isa, guarded):
    layer, (n, c, h, w) = STEMS[shape]
    x = {
        "contiguous": lambda: torch.randn(n, c, h, w),
        "channels_last": lambda: torch.randn(n, h, w, c).permute(0, 3, 1, 2),
        "sliced": lambda: torch.randn(n, c + 2, h, 2 * w)[:, 1:-1, :, ::2],
        "expanded": lambda: torch.randn(1, c, h, 1).expand(n, c, h, w),
    }[layout]()
    k = layer.out_channels
    model = Net(lambda m, x: F.max_pool2d(F.relu(m.n(m.a(x))), 3, 2, 1), a=layer, n=nn.BatchNorm2d(k))
    rule = engine_cases.rule(model, x)
    for workers in (1, 3):
        runner, program = program_of(model, (x,), isa=isa, workers=workers)
        fits = k % cp.isa(isa).width == 0
        assert [s.op for s in program.network.steps] == (["stem"] if fits else ["conv", "max_pool"])
        rule(runner.run(program, (x,)))


def head(isa, scratch=1 << 16, workers=1):
    return [cp.VERSION, isa, workers, scratch, 0, 0]


def raw(words, *buffers, times=None, scratch=1 << 16):
    torch.ops.fused_resnet_cpu.run_program(
        torch.tensor(words, dtype=torch.int64), [torch.empty(scratch), *buffers], times
    )


@isas
@pytest.mark.parametrize("band", [1, 2, 3, 100])
def test_stem_reads_any_strides(band, isa):
    """As the kernel itself takes them: rows apart, columns apart, images that are the same one."""
    layer = randomized(conv(3, 16, 7, stride=2, bias=True))
    columns = cp.isa(isa).columns
    from fused_resnet.engine import cpu_weights

    weight = {last: cpu_weights.panels(cpu_weights.matrix(layer.weight.data, last), columns) for last in (True, False)}
    bias = cpu_weights.padded(layer.bias.data, columns)
    for x in (
        torch.randn(2, 3, 20, 44)[:, :, ::2, ::2],
        torch.randn(2, 10, 22, 6).permute(0, 3, 1, 2)[:, ::2],
        torch.randn(2, 10, 44, 3).permute(0, 3, 1, 2)[:, :, :, ::2],
        torch.randn(3, 10, 22).expand(2, 3, 10, 22),
        torch.randn(2, 22, 10, 3).permute(0, 3, 2, 1),
    ):
        want = F.max_pool2d(F.relu(layer(x)), 3, 2, 1)
        (_, _, h, w), (_, k, p, q) = x.shape, want.shape
        for last in (True, False):
            y = torch.full((2, p, q, k), float("nan"))
            words = [
                cp.STEM,
                1,
                0,
                2,
                0,
                3,
                0,
                4,
                0,
                *x.stride(),
                2,
                3,
                h,
                w,
                7,
                7,
                2,
                3,
                5,
                11,
                k,
                p,
                q,
                band,
                int(last),
            ]
            raw(head(isa) + words, x, weight[last], bias, y)
            torch.testing.assert_close(y.permute(0, 3, 1, 2), want, rtol=1e-5, atol=1e-5)


@isas
@pytest.mark.parametrize("c", [3, 8, 21])
@pytest.mark.parametrize("pool", [(3, 2, 1), (2, 2, 0), (5, 3, 2), (2, 1, 1)], ids=str)
def test_pools(pool, c, isa, guarded):
    model = Net(lambda m, x: F.adaptive_avg_pool2d(F.max_pool2d(x, *pool), 1))
    x = torch.randn(3, c, 9, 7)
    judged(model, (x,), dict(isa=isa, workers=2))
    only = Net(lambda m, x: F.max_pool2d(x, *pool))
    x[0, 0, 4, 3], x[1, -1, 0, 0], x[2, :, 5:, 5:] = float("nan"), float("inf"), -float("inf")
    assert torch.equal(compiled(only, x, isa=isa).nan_to_num(7e7), only(x).nan_to_num(7e7))


@isas
@pytest.mark.parametrize("choice", ["gemm", "F(2x2)", "F(4x4)", "F(4x4) shared"])
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_not_finite(value, relu, choice, isa):
    choice = {
        "gemm": gemm(isa), "F(2x2)": winograd(isa, 2, 3, False), "F(4x4)": winograd(isa, 4, 3, False),
        "F(4x4) shared": winograd(isa, 4, 100, True),
    }[choice]  # fmt: skip
    model = Net(lambda m, x: F.relu(m.a(x)) if relu else m.a(x), a=conv(16, 16, bias=True))
    for h, w in ((0, 0), (3, 4), (4, 3), (10, 8), (6, 7)):
        x = torch.randn(2, 16, 11, 9)
        x[1, 5, h, w] = value
        got, want = compiled(model, x, isa=isa, choice=choice), model(x)
        assert not (got.isfinite() & ~want.isfinite()).any(), "finite where PyTorch is not"
        if choice.kernel == "gemm":
            assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
            continue
        m = choice.m
        for i in range(0, 11, m):
            for j in range(0, 9, m):
                touched = i - 1 <= h < i + m + 1 and j - 1 <= w < j + m + 1
                tile = got[1, :, i : i + m, j : j + m]
                assert touched or tile.isfinite().all(), f"the tile at {i}, {j} does not read {h}, {w}"
        assert got[0].isfinite().all()
        finite = got.isfinite()
        torch.testing.assert_close(got[finite], want[finite], rtol=1e-4, atol=1e-4)


@isas
def test_a_stem_keeps_nan(isa):
    model = Net(lambda m, x: F.max_pool2d(F.relu(m.a(x)), 3, 2, 1), a=conv(3, 16, 7, stride=2))
    x = torch.randn(2, 3, 21, 23)
    x[0, 1, 10, 11], x[1, 0, 0, 0] = float("nan"), float("inf")
    got, want = compiled(model, x, isa=isa), model(x)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


# --- whole programs ---------------------------------------------------------------------------------------------------


def body():
    """Residual blocks with and without projection, a traced node among them, two results."""

    def forward(m, x):
        x = F.max_pool2d(F.relu(m.n(m.stem(x))), 3, 2, 1)
        y = F.relu(m.b(F.relu(m.a(x))) + x)
        z = F.relu(m.d(F.relu(m.c(y))) + m.s(y))
        t = m.g(z * 0.5) + m.b2(z)
        return m.fc(torch.flatten(F.adaptive_avg_pool2d(F.relu(t), 1), 1)), z

    return Net(
        forward, stem=conv(3, 16, 7, stride=2), n=nn.BatchNorm2d(16), a=conv(16), b=conv(16), c=conv(16, 32, stride=2),
        d=conv(32, 32), s=conv(16, 32, 1, stride=2), g=conv(32, 32, groups=2), b2=conv(32, 32, 1), fc=nn.Linear(32, 5),
    )  # fmt: skip


@isas
@pytest.mark.parametrize("cache", [1, 1 << 12, 1 << 14, 1 << 30], ids=lambda c: f"cache{c}")
@pytest.mark.parametrize("batch", [1, 6, 7])
def test_batches_in_parts(batch, cache, isa, guarded):
    model, x = body(), torch.randn(batch, 3, 37, 41)
    choices = (None, gemm(isa, 11), winograd(isa, 4, 5, True))
    judged(model, (x,), *(dict(isa=isa, choice=choice, cache=cache, workers=2) for choice in choices))


@isas
def test_what_later_parts_of_a_batch_read_stays(isa, guarded):
    """Early layers one image at a time, later ones two: what lies between is whole, from its first part to its last."""

    def forward(m, x):
        y = F.relu(m.b(F.relu(m.d(F.relu(m.a(x))))))
        return m.d(F.relu(m.c(F.relu(m.e(F.relu(m.d(F.relu(m.c(F.relu(m.c(y)))))))))))

    model = Net(forward, a=conv(3, 8), b=conv(8, 8, stride=2), c=conv(8, 8), d=conv(8, 8), e=conv(8, 8, 1))
    x = torch.randn(6, 3, 40, 40)
    runner, program = program_of(model, (x,), isa=isa, choice=gemm(isa, 50), cache=7000)
    assert sorted(set(program.size.values()) - {0}) == [1, 2]
    engine_cases.agree(runner.run(program, (x,)), model, x)


@isas
def test_bands_of_a_stem_by_several_threads(isa, guarded):
    """A thread may begin with a band in the middle: no row of another one's lies in its scratch."""
    model = Net(lambda m, x: F.max_pool2d(F.relu(m.a(x)), 3, 2, 1), a=conv(3, 16, 7, stride=2))
    x, threads = torch.randn(1, 3, 257, 129), torch.get_num_threads()
    want = model(x)
    try:
        torch.set_num_threads(3)
        for _ in range(5):
            torch.testing.assert_close(compiled(model, x, isa=isa, workers=3), want, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


@isas
@pytest.mark.parametrize("choice", ["gemm", "private", "shared", "default"])
def test_threads_do_not_change_a_bit(choice, isa):
    how = {
        "gemm": gemm(isa, 5),
        "private": winograd(isa, 4, 3, False),
        "shared": winograd(isa, 4, 9, True),
        "default": None,
    }
    model, x = body(), torch.randn(5, 3, 37, 41)
    threads = torch.get_num_threads()
    try:
        results = []
        for workers in (1, 2, 3):
            for running in (1, workers):
                torch.set_num_threads(running)
                runner, program = program_of(model, (x,), isa=isa, choice=how[choice], workers=workers, cache=1 << 14)
                torch.set_num_threads(3 - running % 3)
                results += [runner.run(program, (x,)) for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_programs_share_memory_that_grows():
    """A program is rewritten when the arena moved, and does not keep the old one."""
    model = resnet()
    small, large = torch.randn(1, 3, 33, 33), torch.randn(3, 3, 65, 65)
    runner, program = program_of(model, (small,), isa=ISAS[-1])
    runner.live.add(program)
    first = runner.run(program, (small,))
    arena = runner.arena
    network = network_of(model, large)
    strides = {network.graph.nodes[0].name: large.stride()}
    bigger = cp.Program(network, runner.weights, runner.target, 1, strides, {})
    runner.run(bigger, (large,))
    assert runner.arena.numel() > arena.numel()
    assert all(s.program is None and not s.buffers for s in program.segments)
    assert torch.equal(runner.run(program, (small,)), first)


def test_of_what_was_folded_only_the_last_step_is_kept_and_never_after_refresh():
    model = randomized(resnet())
    runner, program = program_of(model, (torch.randn(2, 3, 33, 33),), isa=ISAS[-1])
    first, *_, last = (s for s in program.network.steps if s.op == "conv")
    before = runner.weights.get(first, "nhwc").clone()
    runner.weights.get(last, "nhwc")
    assert runner.weights._folded[0] == last.convolutions
    for p in runner.weights.module.parameters():
        p.mul_(2)
    runner.weights.refresh()
    assert runner.weights._folded is None
    fresh = cp.Weights(runner.weights.module, runner.target)
    for step in (first, last):
        assert torch.equal(runner.weights.get(step, "nhwc"), fresh.get(step, "nhwc"))
    assert not torch.equal(runner.weights.get(first, "nhwc"), before)


@pytest.mark.parametrize(("rows", "columns"), [(5, 16), (16, 16), (37, 16), (64, 32)])
def test_panels(rows, columns):
    matrix = torch.randn(rows, 7, dtype=torch.float64)
    packed = cpu_weights.panels(matrix, columns)
    want = F.pad(matrix.float(), (0, 0, 0, -rows % columns)).view(-1, columns, 7).transpose(1, 2)
    assert packed.is_contiguous() and torch.equal(packed, want)


def test_folding_leaves_a_float64_model_as_it_is():
    model = randomized(resnet()).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for step in network_of(model, torch.randn(2, 3, 33, 33).double()).steps:
        if step.conv is not None:
            fold(step, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_default_dtype_does_not_matter():
    model, x = body(), torch.randn(2, 3, 33, 35)
    want = compiled(model, x, isa=ISAS[-1])
    torch.set_default_dtype(torch.float64)
    try:
        got = compiled(model, x, isa=ISAS[-1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_times_have_an_entry_for_every_step():
    model, x = body(), torch.randn(4, 3, 37, 41)
    runner, program = program_of(model, (x,), isa=ISAS[-1], cache=1 << 12)
    times = {}
    runner.run(program, (x,), times)
    inside = {s.output for p in program.segments if isinstance(p, cp.Segment) for s in p.steps}
    assert times.keys() == inside and all(t > 0 for t in times.values())


@pytest.mark.parametrize("budget", [0.0, 0.2])
def test_the_tuner_without_time_keeps_what_is_right(budget):
    model, x = resnet(), torch.randn(2, 3, 64, 80)
    runner, program = program_of(model, (x,), isa=ISAS[-1])

    def build(choices):
        _, built = program_of(model, (x,), isa=ISAS[-1])
        built.choices = choices
        return built

    def run(candidate, times):
        if any(c.kernel == "winograd" for c in candidate.choices.values()):
            raise cpu_tune.Wrong("planted")
        runner.run(candidate, (x,), times)

    wrong = []
    chosen = cpu_tune.tune(program, run, build, wrong, budget)
    assert wrong and chosen and {choice.kernel for _, choice in chosen.values()} == {"gemm"}


# --- bad programs -----------------------------------------------------------------------------------------------------


def every_op(isa):
    """(words after the head, buffers): one step of each kind, over small buffers."""
    w = cp.isa(isa)
    c = w.columns
    weight, bias, y = torch.randn(36 * c * c + 64), torch.randn(c), torch.full((2048,), float("nan"))
    conv_words = [cp.CONV, 2, 0, 3, 0, 1, 0, 4, 0, 2, 3, 3, c, 1, 4, c, 1, 1, 0, 3, 3, c, 3, 3, 1, 1, 1, 1, 1, 1]
    wino = [cp.WINOGRAD, 1, 0, 2, 0, 3, 0, -1, 0, 4, 0, 2, 3, 3, c, 3, 3, c, 1, 1, 0, 2, 2, c, 1, 0, 0]
    stem = [cp.STEM, 1, 0, 2, 0, 3, 0, 4, 0, 108, 1, 12, 3, 2, 3, 7, 5, 3, 3, 1, 1, 7, 5, c, 4, 3, 2, 1]
    grouped = [cp.GROUPED, 1, 0, 2, 0, 3, 0, 1, 0, 4, 0, 2, 3, 3, c, 3, 3, c, c // 4]
    grouped += [3, 3, 1, 1, 1, 1, 1, 1, 1, 2, 2]
    pools = [cp.MAX_POOL, 1, 0, 4, 0, 2, 5, 5, 3, 3, 3, 3, 2, 1, cp.AVG_POOL, 1, 0, 4, 0, 2, 9, 5]
    return [conv_words, wino, stem, pools, grouped], [torch.randn(2048), weight, bias, y]


@isas
def test_bad_programs_raise(isa):
    steps, buffers = every_op(isa)
    c = cp.isa(isa).columns
    good = head(isa) + [word for step in steps for word in step]
    raw(good, *buffers)

    def refused(words, *given, match="run_program", **more):
        with pytest.raises(RuntimeError, match=match):
            raw(words, *(given or buffers), **more)

    for step in steps:
        for cut in range(1, len(step) if step[0] != cp.MAX_POOL else 14):
            refused(head(isa) + step[:cut], match="ends within a step|does not fit|must be")
    refused([], match="ends within")
    refused([cp.VERSION + 1, *good[1:]], match="programs of version")
    refused([cp.VERSION, 7, *good[2:]], match="lacks instruction set 7")
    refused([cp.VERSION, -1, *good[2:]], match="lacks instruction set -1")
    refused(head(isa, workers=0) + steps[0], match="must be positive")
    refused(head(isa, scratch=1 << 17) + steps[0], match="does not fit")
    refused(head(isa, scratch=8) + steps[0], match="floats of scratch")
    refused([*head(isa), 17], match="no step 17")
    refused([*head(isa), -1], match="no step -1")
    for at in (1, 3, 5, 7):
        for buffer in (-1, -2, 5, 1 << 40):
            if not (at == 5 and buffer == -1):
                refused([*head(isa), *steps[0][:at], buffer, *steps[0][at + 1 :]], match="no buffer")
        for offset in (-1, 10**6, (1 << 63) - 1, -(1 << 63)):
            refused([*head(isa), *steps[0][: at + 1], offset, *steps[0][at + 2 :]], match="does not fit|no buffer")
    for buffer in (torch.zeros(2048, dtype=torch.float64), torch.zeros(4096, dtype=torch.bfloat16)):
        refused(good, buffer, *buffers[1:], match="float32 tensors on the CPU")
    with pytest.raises(RuntimeError, match="int64"):
        torch.ops.fused_resnet_cpu.run_program(torch.tensor(good).int(), [torch.empty(1 << 16), *buffers], None)
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.fused_resnet_cpu.run_program(
            torch.tensor(good).repeat_interleave(2)[::2], [torch.empty(1 << 16), *buffers], None
        )
    refused(good, times=torch.zeros(1, dtype=torch.float64), match="room for 1")
    refused(good, times=torch.zeros(9), match="float64")
    # Sizes whose products overflow to something that fits.
    for words in ([1 << 32] * 2, [1 << 30] * 2, [1 << 62, 4]):
        step = list(steps[3][:14])
        step[5:7] = words
        refused(head(isa) + step, match="too large|must be positive|does not fit")
    for groups in (3, c + 1, 1 << 30):
        refused([*head(isa), *steps[4][:18], groups, *steps[4][19:]], match="groups do not divide")
    refused([*head(isa, scratch=64), *steps[4]], match="floats of scratch")
    stem = list(steps[2])
    stem[-4:-2] = [9, 9]
    refused(head(isa) + stem, match="reads beyond the convolution's map|does not fit")


FUZZ = """
import random, sys, torch
sys.path.insert(0, "tests")
import test_engine_cpu as t
from fused_resnet.engine import cpu_program as cp
isa, rounds = int(sys.argv[1]), int(sys.argv[2])
rng, raised = random.Random(0), 0
odd = [-(1 << 63), (1 << 63) - 1, 1 << 62, 1 << 40, 1 << 32, (1 << 31) - 1, 1 << 30, 65537, 2049, 17, *range(-2, 10)]
around = t.Guarded()
scratch = around.flat(1 << 16)  # once: to fill it takes longer than all else
for i in range(rounds):
    steps, buffers = t.every_op(isa)
    memory = t.Guarded()
    inside = []
    for b in buffers:
        flat = memory.flat(b.numel()); flat.copy_(b); inside.append(flat)
    words = t.head(isa, workers=rng.choice([1, 3])) + list(rng.choice(steps))
    for _ in range(rng.choice([1, 1, 2, 3])):
        words[rng.randrange(3 if rng.random() < .1 else 6, len(words))] = rng.choice(odd)
    try:
        torch.ops.fused_resnet_cpu.run_program(torch.tensor(words), [scratch, *inside], None)
    except RuntimeError as error:
        assert "run_program" in str(error), error
        raised += 1
    memory.check(), around.check()
print("raised", raised)
"""


@isas
def test_no_program_crashes(isa):
    """Words at random: whatever is run stays inside its buffers."""
    child = subprocess.run(
        [sys.executable, "-c", FUZZ, str(isa), "1200"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, (child.returncode, child.stderr[-1000:])
    assert 300 < int(child.stdout.split()[-1]) < 1200


def test_program_isa():
    best = cp.isa()
    assert best is not None and best.number == ISAS[-1] and best.columns % best.width == 0
    assert cp.isa(0) is not None and cp.isa(17) is None
    if platform.machine() == "x86_64" and "avx2" in Path("/proc/cpuinfo").read_text():
        assert best.number >= 1 and best.width >= 8


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_no_instruction_set_leaks(tmp_path):
    """A weak symbol is kept once for all instruction sets: it may be the widest one's, and run where there is none."""
    objects = sorted((ROOT / "build" / "ninja").glob("cpu.engine.isa_*.o"))
    if not objects:
        compiler = shutil.which("c++")
        if compiler is None:
            pytest.skip("no compiler, and nothing was built here")
        texts = {}
        for node in ast.parse((ROOT / "setup.py").read_text()).body:
            if isinstance(node, ast.Assign) and node.targets[0].id in ("CXX_FLAGS", "ISA_FLAGS"):
                texts[node.targets[0].id] = ast.literal_eval(node.value)
        for stem, flags in texts["ISA_FLAGS"].items():
            objects.append(tmp_path / f"{stem}.o")
            source = ROOT / "csrc" / "cpu" / "engine" / f"{stem}.cpp"
            options = f"{texts['CXX_FLAGS']} -ffp-contract=fast -Wno-psabi {flags}".split()
            subprocess.run([compiler, *options, "-c", str(source), "-o", str(objects[-1])], check=True)
    for path in objects:
        listed = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout
        kinds = {line.split()[-1]: line.split()[-2] for line in listed.splitlines() if line.strip()}
        assert any("kernels_" in name for name in kinds), path
        weak = [name for name, kind in kinds.items() if kind in "WVuv"]
        assert not weak, f"{path.name} exports {weak}"


def test_the_yardstick_sees_an_error_of_one_percent():
    model, x = body(), torch.randn(2, 3, 33, 35)
    runner, program = program_of(model, (x,), isa=ISAS[-1])
    runner.run(program, (x,))
    key = next(key for key in runner.weights._packed if key[-1] == "bias")
    runner.weights._packed[key][1].mul_(1.01)
    with pytest.raises(AssertionError, match="off by"):
        engine_cases.agree(runner.run(program, (x,)), model, x)
    assert parity.FLOOR[torch.float32] == 1e-6 and seen(x)["output 0"] is not x
