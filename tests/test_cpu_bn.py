"""Batch norm on a CPU, compiled: every instruction set of this machine against float64, at odd shapes.

Every input lies between NaNs, every output that torch allocates starts as NaN: what is read beyond an end or left
unwritten shows.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.backends import aten, cpu, library, reference
from fused_resnet.engine import cpu_program
from tests.emulation import between_nans, error, nan_filled

pytestmark = pytest.mark.skipif(library.load() is not None, reason=f"no compiled kernels: {library.load()}")
ISAS = [i for i in range(3) if library.load() is None and cpu_program.isa(i) is not None]
EPS = 1e-5
ops = torch.ops.fused_resnet_cpu

# Fewer and more channels than a vector, vectors and a rest; one task and several; several blocks of rows.
SHAPES = {
    "3-channels": (5, 3, 7, 9),
    "5-channels": (1, 5, 7, 9),
    "33-channels": (5, 33, 7, 9),
    "64-channels": (1, 64, 7, 9),
    "70-channels": (5, 70, 7, 9),
    "one-row": (1, 70, 1, 1),
    "one-channel": (3, 1, 5, 7),
    "many-rows": (5, 33, 41, 37),
    "many-channels": (5, 1030, 3, 5),
}
MASKS = [(True, True, True), (True, True, False), (True, False, False), (False, True, False), (False, False, True)]
isas = pytest.mark.parametrize("isa", ISAS, ids=lambda i: f"isa{i}")
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
relus = pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])


@pytest.fixture(autouse=True)
def fresh():
    threads = torch.get_num_threads()
    with nan_filled():
        yield
    torch.set_num_threads(threads)


class Case:
    """Arguments of all three ops: statistics as they come in training, no pre-activation close to zero."""

    def __init__(self, shape, affine=True, residual=True, relu=True, mean=1.0):
        self.x = between_nans(torch.randn(shape) * 2 + mean)
        self.grad = between_nans(torch.randn(shape))
        self.residual = between_nans(torch.randn(shape)) if residual else None
        channels = shape[1]
        self.weight = torch.rand(channels) + 0.5 if affine else None
        self.bias = torch.randn(channels) if affine else None
        self.mean, self.var = (t.float() for t in exact_stats(self.x))
        self.relu = relu
        z = reference.bn_act(*wide(self.x, *self.vectors), EPS, *wide(self.residual), False, True)
        self.grad[z.abs() < 1e-3] = 0

    @property
    def vectors(self):
        return self.mean, self.var, self.weight, self.bias

    @property
    def forward(self):
        return self.x, *self.vectors, EPS, self.residual, self.relu

    def backward(self, y, batch_stats):
        return self.grad, y, self.x, *self.vectors, EPS, self.relu, batch_stats


def wide(*tensors):
    return [t if t is None else t.double() for t in tensors]


def exact_stats(x):
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    return mean, var


def close(got, expected, bound=1e-6):
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert error(got, expected) < bound or (got.double() - expected).abs().max() < 1e-12


# --- statistics ---


def close_stats(got, x):
    """Each channel by itself; an error of the mean is measured against the deviation where that is larger."""
    mean, var = exact_stats(x)
    assert ((got[0].double() - mean).abs() <= 1e-6 * torch.maximum(mean.abs(), var.sqrt())).all()
    assert ((got[1].double() - var).abs() <= 1e-6 * var).all()


@isas
@shapes
def test_bn_stats(shape, isa):
    x = between_nans(torch.randn(shape) * 2 + 1)
    close_stats(ops.bn_stats(x, isa), x)


@isas
@pytest.mark.parametrize("channels", [3, 64])
@pytest.mark.parametrize("mean", [1e4, -1e4])
def test_a_mean_far_above_the_deviation(mean, channels, isa):
    x = between_nans(torch.randn(5, channels, 33, 17) + mean)
    close_stats(ops.bn_stats(x, isa), x)
    squares = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    assert error(squares, exact_stats(x)[1]) > 0.1  # the inputs do ask for more than that


@isas
@pytest.mark.parametrize("row", [0, 1000, -1], ids=["first", "middle", "last"])
def test_an_outlier_cancels_no_digits(row, isa):
    x = torch.randn(5, 5, 33, 17)
    flat = x.permute(0, 2, 3, 1).reshape(-1, 5)
    flat[row] = 1e4
    x = between_nans(flat.view(5, 33, 17, 5).permute(0, 3, 1, 2))
    close_stats(ops.bn_stats(x, isa), x)


@isas
def test_images_of_their_own_brightness(isa):
    x = torch.randn(5, 33, 33, 17) + torch.tensor([0.0, 1e3, -1e3, 1e4, 50.0]).view(5, 1, 1, 1)
    x = between_nans(x)
    close_stats(ops.bn_stats(x, isa), x)


@isas
@pytest.mark.parametrize("value", [3.3, 1e30, 0.0])
def test_no_variance(value, isa):
    shape = (5, 70, 13, 9)
    x = between_nans(torch.full(shape, value))
    mean, var = ops.bn_stats(x, isa)
    assert (var == 0).all() and (mean == torch.tensor(value)).all()
    weight, bias = torch.randn(70), torch.randn(70)
    y = ops.bn_act(x, mean, var, weight, bias, EPS, None, False, isa)
    assert torch.equal(y, bias.view(1, -1, 1, 1).expand(shape))


# --- forward ---


@isas
@shapes
@relus
@pytest.mark.parametrize("affine, residual", [(True, True), (True, False), (False, True)], ids=["all", "bn", "add"])
def test_bn_act(affine, residual, relu, shape, isa):
    case = Case(shape, affine, residual, relu)
    y = ops.bn_act(*case.forward, isa)
    x, *vectors, eps, residual, relu = case.forward
    close(y, reference.bn_act(*wide(x, *vectors), eps, *wide(residual), relu, True))
    assert y.stride() == torch.empty(shape, memory_format=torch.channels_last).stride()


@isas
@pytest.mark.parametrize("into", ["another", "x", "residual"])
def test_bn_act_out(into, isa):
    case = Case((5, 70, 17, 19))
    expected = ops.bn_act(*case.forward, isa)
    out = {"another": between_nans(torch.zeros_like(case.x)), "x": case.x, "residual": case.residual}[into]
    ops.bn_act_out(*case.forward, out, isa)
    assert torch.equal(out, expected)


def test_weight_and_bias_are_optional_each():
    case = Case((5, 5, 7, 9), relu=False, residual=False)
    for weight, bias in ((case.weight, None), (None, case.bias)):
        y = ops.bn_act(case.x, case.mean, case.var, weight, bias, EPS, None, False)
        close(y, reference.bn_act(*wide(case.x, case.mean, case.var, weight, bias), EPS, None, False, True))


# --- backward ---


def expected_bwd(case, y, batch_stats, need):
    grad, _, x, mean, var, weight, _, eps, relu, _ = case.backward(y, batch_stats)
    mask = (need[0], need[1], need[1], need[2])
    return reference.bn_act_bwd(*wide(grad, y, x, mean, var, weight), eps, relu, batch_stats, mask)


def close_bwd(got, expected):
    for g, e in zip(got, expected, strict=True):
        if e is None:
            assert g.numel() == 0
        else:
            close(g, e, 2e-6)


@isas
@shapes
@relus
@pytest.mark.parametrize("batch_stats", [False, True], ids=["frozen", "batch"])
def test_bn_act_bwd(batch_stats, relu, shape, isa):
    case = Case(shape, relu=relu)
    y = ops.bn_act(*case.forward, isa)
    for need in MASKS:
        got = ops.bn_act_bwd(*case.backward(y if relu else None, batch_stats), *need, isa)
        close_bwd(got, expected_bwd(case, y, batch_stats, need))
        for t in (got[0], got[3]):
            assert t.numel() == 0 or t.stride() == torch.empty(shape, memory_format=torch.channels_last).stride()


@isas
@pytest.mark.parametrize("batch_stats", [False, True], ids=["frozen", "batch"])
def test_without_weight(batch_stats, isa):
    case = Case((5, 70, 7, 9), affine=False)
    y = ops.bn_act(*case.forward, isa)
    got = ops.bn_act_bwd(*case.backward(y, batch_stats), *MASKS[0], isa)
    close_bwd(got, expected_bwd(case, y, batch_stats, MASKS[0]))


@isas
@shapes
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("batch_stats", [False, True], ids=["frozen", "batch"])
def test_the_mask_of_an_output_that_was_not_kept(batch_stats, affine, shape, isa):
    """It is the forward's to the bit, though pre-activations are as close to zero as float32 has them."""
    case = Case(shape, affine, residual=False)
    case.grad.normal_()
    if affine:  # zero within a rounding, for a row's worth of pixels in every channel
        rows = case.x.permute(0, 2, 3, 1).reshape(-1, shape[1])
        scale = case.weight * torch.rsqrt(case.var + EPS)
        rows[::3] = case.mean - case.bias / scale
        case.x.copy_(rows.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2))
    case.x[0, 0, 0, 0] = float("nan")
    y = ops.bn_act(*case.forward, isa)
    for need in MASKS:
        kept = ops.bn_act_bwd(*case.backward(y, batch_stats), *need, isa)
        anew = ops.bn_act_bwd(*case.backward(None, batch_stats), *need, isa)
        for a, b in zip(kept, anew, strict=True):
            assert torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))


PLACES = [
    (dx, g, mask)
    for dx in ("another", "grad", "x", "y")
    for g in (None, "another", "grad", "y")
    for mask in ("linear", "kept", "anew")
    if (dx == "another" or dx != g) and (mask == "kept" or "y" not in (dx, g))
]


@isas
@pytest.mark.parametrize("batch_stats", [False, True], ids=["frozen", "batch"])
@pytest.mark.parametrize("dx, g, mask", PLACES)
def test_bn_act_bwd_out(dx, g, mask, batch_stats, isa):
    case = Case((5, 70, 17, 19), residual=False, relu=mask != "linear")
    y = ops.bn_act(*case.forward, isa) if mask == "kept" else None
    need = (True, True, g is not None)
    expected = ops.bn_act_bwd(*case.backward(y, batch_stats), *need, isa)
    places = {None: None, "grad": case.grad, "x": case.x, "y": y}
    out_dx, out_g = (places[p] if p in places else between_nans(torch.zeros_like(case.x)) for p in (dx, g))
    dweight, dbias = ops.bn_act_bwd_out(*case.backward(y, batch_stats), True, out_dx, out_g, isa)
    for got, e in zip((out_dx, dweight, dbias), expected, strict=False):
        assert torch.equal(got, e)
    assert out_g is None or torch.equal(out_g, expected[3])


def test_a_one_percent_error_is_seen():
    case = Case((5, 33, 7, 9))
    y = ops.bn_act(*case.forward)
    got = list(ops.bn_act_bwd(*case.backward(y, True), *MASKS[0]))
    expected = expected_bwd(case, y, True, MASKS[0])
    for i in range(4):
        with pytest.raises(AssertionError):
            close_bwd([g * 1.01 if j == i else g for j, g in enumerate(got)], expected)


# --- what is not finite; determinism ---


@isas
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("channels", [3, 70])
def test_what_is_not_finite(channels, value, isa):
    case = Case((5, channels, 7, 9))
    clean, frozen = case.x.clone(), (case.mean.clone(), case.var.clone())
    case.x[1, 1, 2, 3] = value
    case.residual[2, 2, 2, 2] = value
    y = ops.bn_act(*case.forward, isa)
    expected = reference.bn_act(case.x, *case.vectors, EPS, case.residual, True, True)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    _, _, _, g = ops.bn_act_bwd(*case.backward(y, True), False, False, True, isa)
    assert torch.equal(g, case.grad.masked_fill(y <= 0, 0))  # a NaN lets its gradient through
    mean, var = ops.bn_stats(case.x, isa)
    others = [c for c in range(channels) if c != 1]
    assert var[1].isnan() and torch.equal(mean[1].nan_to_num(7e7), torch.tensor(value).nan_to_num(7e7))
    for got, exact in zip((mean, var), exact_stats(clean), strict=True):
        close(got[others], exact[others])
    case.mean, case.var = mean, var  # one bad number is its whole channel's, in PyTorch as well
    y = ops.bn_act(*case.forward, isa)
    norm = F.batch_norm(case.x, None, None, case.weight, case.bias, True, 0.0, EPS)
    assert torch.equal(y.isnan(), F.relu(norm + case.residual).isnan())
    case.mean, case.var = frozen
    case.x.copy_(clean)
    y = ops.bn_act(*case.forward, isa)
    case.grad[3, 1, 3, 3], y[3, 1, 3, 3], y[3, 2, 3, 3] = value, 1.0, 0.0
    case.grad[3, 2, 3, 3] = value  # masked: gone, not NaN
    dx, dweight, dbias, g = ops.bn_act_bwd(*case.backward(y, False), *MASKS[0], isa)
    finite = torch.ones(channels, dtype=torch.bool)
    finite[1] = False
    assert torch.equal(dweight.isfinite(), finite) and torch.equal(dbias.isfinite(), finite)
    assert g[3, 2, 3, 3] == 0 and torch.equal(dx.isfinite(), g.isfinite()) and (~g.isfinite()).sum() == 1


@isas
@shapes
def test_the_bits_do_not_depend_on_threads(shape, isa):
    case = Case(shape)
    y = ops.bn_act(*case.forward, isa)

    def everything():
        return [
            *ops.bn_stats(case.x, isa),
            ops.bn_act(*case.forward, isa),
            *ops.bn_act_bwd(*case.backward(y, True), *MASKS[0], isa),
            *ops.bn_act_bwd(*case.backward(y, False), *MASKS[0], isa),
            *ops.bn_act_bwd(*case.backward(None, True), *MASKS[1], isa),
        ]

    expected = everything()
    for threads in (1, 2, 3, 2, 2):
        torch.set_num_threads(threads)
        for a, b in zip(everything(), expected, strict=True):
            assert torch.equal(a, b)


# --- refusals ---


def map_of(*shape, **options):
    return torch.zeros(shape, **options).contiguous(memory_format=torch.channels_last)


BAD_MAPS = {
    "dtype": (map_of(2, 6, 7, 9, dtype=torch.float64), "must be a float32 tensor on the CPU"),
    "device": (torch.empty(2, 6, 7, 9, device="meta"), "."),
    "dimensions": (torch.zeros(2, 6, 7), r"must be \[N, C, H, W\], it has 3 dimensions"),
    "layout": (torch.zeros(2, 6, 7, 9), "must be dense and channels_last"),
    "gaps": (map_of(2, 8, 7, 9)[:, :6], "must be dense and channels_last"),
    "empty": (map_of(0, 6, 7, 9), "must not be empty"),
    "shape": (map_of(2, 6, 7, 8), "must have the shape of x"),
}
BAD_VECTORS = {
    "dtype": (torch.zeros(6, dtype=torch.float64), "must be a float32 tensor on the CPU"),
    "size": (torch.zeros(5), r"must be \[C\] = \[6\]"),
    "dimensions": (torch.zeros(6, 1), r"must be \[C\] = \[6\]"),
    "strides": (torch.zeros(12)[::2], "must be contiguous"),
}


def calls(replaced: str, by):
    """Every op that has such an argument, with it replaced."""
    given = dict(
        x=map_of(2, 6, 7, 9), mean=torch.zeros(6), var=torch.ones(6), weight=torch.ones(6), bias=torch.ones(6),
        residual=map_of(2, 6, 7, 9), out=map_of(2, 6, 7, 9), grad=map_of(2, 6, 7, 9), y=map_of(2, 6, 7, 9),
        dx=map_of(2, 6, 7, 9), g=map_of(2, 6, 7, 9), eps=EPS, relu=True, batch_stats=True, need_x=True, need_sums=True,
        need_g=True,
    )  # fmt: skip
    for name in ("bn_stats", "bn_act", "bn_act_out", "bn_act_bwd", "bn_act_bwd_out"):
        op = getattr(ops, name).default
        arguments = [a.name for a in op._schema.arguments if a.name != "isa"]
        if replaced in arguments:
            yield op, [by if a == replaced else given[a] for a in arguments]


@pytest.mark.parametrize("name", ["x", "residual", "out", "grad", "y", "dx", "g"])
@pytest.mark.parametrize("bad", BAD_MAPS.values(), ids=BAD_MAPS)
def test_bad_maps_are_refused_by_name(bad, name):
    if bad is BAD_MAPS["shape"] and name == "x":
        pytest.skip("x has the shape of x")
    called = list(calls(name, bad[0]))
    assert called
    for op, arguments in called:
        with pytest.raises((RuntimeError, NotImplementedError), match=bad[1] if bad[1] == "." else f"{name} {bad[1]}"):
            op(*arguments)


@pytest.mark.parametrize("name", ["mean", "var", "weight", "bias"])
@pytest.mark.parametrize("bad", BAD_VECTORS.values(), ids=BAD_VECTORS)
def test_bad_vectors_are_refused_by_name(bad, name):
    for op, arguments in calls(name, bad[0]):
        with pytest.raises(RuntimeError, match=f"bn_act\\w*: {name} {bad[1]}"):
            op(*arguments)


def test_an_instruction_set_that_is_not_there():
    for op, arguments in calls("x", map_of(2, 6, 7, 9)):
        with pytest.raises(RuntimeError, match="this processor lacks instruction set 17"):
            op(*arguments, 17)


def test_outputs_that_lie_across_their_inputs():
    flat = torch.zeros(3 * 6 * 63)

    def at(image):
        return flat.narrow(0, int(image * 6 * 63), 2 * 6 * 63).view(2, 7, 9, 6).permute(0, 3, 1, 2)

    v = [torch.ones(6)] * 4
    apart = map_of(2, 6, 7, 9)
    with pytest.raises(RuntimeError, match="bn_act: out must not overlap x, unless it is the same"):
        ops.bn_act_out(at(0), *v, EPS, None, True, at(0.5))
    with pytest.raises(RuntimeError, match="bn_act: out must not overlap residual, unless it is the same"):
        ops.bn_act_out(apart, *v, EPS, at(0), True, at(1))
    given = dict(grad=apart, y=map_of(2, 6, 7, 9), x=map_of(2, 6, 7, 9))
    for output, name in itertools.product(("dx", "g"), given):
        maps = {**given, name: at(0)}
        outputs = (at(0.5), None) if output == "dx" else (None, at(0.5))
        with pytest.raises(RuntimeError, match=f"bn_act_bwd: {output} must not overlap {name}"):
            ops.bn_act_bwd_out(*maps.values(), *v, EPS, True, True, True, *outputs)
    for dx, g, sentence in ((at(0), at(0), "dx must not overlap g"), (None, given["x"], "g must not overlap x")):
        with pytest.raises(RuntimeError, match=sentence):
            ops.bn_act_bwd_out(*given.values(), *v, EPS, True, True, True, dx, g)


# --- the backend ---


class Spy:
    def __init__(self, monkeypatch):
        self.seen = []
        for name in ("bn_stats", "bn_act", "bn_act_bwd"):
            monkeypatch.setattr(aten, name, self.noting(name, getattr(aten, name)))

    def noting(self, name, real):
        def call(*args):
            self.seen.append(name)
            return real(*args)

        return call


def backend_case(shape=(5, 33, 7, 9), **options):
    case = Case(shape, **options)
    return case, (case.x, *case.vectors, EPS, case.residual, case.relu, True)


def run_backend(case, forward, mask=(True, True, True, True)):
    y = cpu.bn_act(*forward)
    stats = cpu.bn_stats(case.x)
    grads = cpu.bn_act_bwd(case.grad, y, case.x, case.mean, case.var, case.weight, EPS, case.relu, True, mask)
    return y, *stats, *grads


def judge_backend(case, result, mask=(True, True, True, True)):
    y, mean, var, *grads = result
    close(y, reference.bn_act(*wide(case.x, *case.vectors), EPS, *wide(case.residual), case.relu, True))
    for got, expected in zip((mean, var), exact_stats(case.x), strict=True):
        close(got, expected)
    args = wide(case.grad, y, case.x, case.mean, case.var, case.weight)
    expected = reference.bn_act_bwd(*args, EPS, case.relu, True, mask)
    for got, e in zip(grads, expected, strict=True):
        assert (got is None) == (e is None)
        if e is not None:
            close(got, e, 2e-6)


@relus
def test_the_backend_uses_them(relu, monkeypatch):
    spy = Spy(monkeypatch)
    case, forward = backend_case(relu=relu)
    for mask in itertools.product([False, True], repeat=4):
        judge_backend(case, run_backend(case, forward, mask), mask)
    assert not spy.seen


def test_the_backend_converts_layouts_and_vectors(monkeypatch):
    spy = Spy(monkeypatch)
    case, _ = backend_case()
    case.grad, case.residual = (t.contiguous() for t in (case.grad, case.residual))
    case.mean, case.var, case.weight, case.bias = (t.double() for t in case.vectors)
    case.weight = case.weight.repeat_interleave(2)[::2]
    case.bias = case.bias.bfloat16()
    result = run_backend(case, (case.x, *case.vectors, EPS, case.residual, True, True))
    judge_backend(case, result)
    assert not spy.seen
    expanded = torch.ones(()).expand(case.x.shape)
    dx = cpu.bn_act_bwd(expanded, result[0], case.x, case.mean, case.var, case.weight, EPS, True, True, [True] * 4)[0]
    case.grad = expanded.contiguous(memory_format=torch.channels_last)
    close(dx, expected_bwd(case, result[0], True, (True, True, True))[0], 2e-6)


@pytest.mark.parametrize(
    "change",
    [lambda t: t.contiguous(), lambda t: t.double(), lambda t: t.to(memory_format=torch.channels_last)[:, :, :1, :1]],
    ids=["contiguous", "float64", "1x1-maps"],
)
def test_the_backend_leaves_the_rest_to_pytorch(change, monkeypatch):
    spy = Spy(monkeypatch)
    case, _ = backend_case()
    with torch.no_grad():
        case.x, case.grad, case.residual = (change(t).contiguous() for t in (case.x, case.grad, case.residual))
        case.mean, case.var = exact_stats(case.x)
    run_backend(case, (case.x, *case.vectors, EPS, case.residual, True, True))
    assert spy.seen == ["bn_act", "bn_stats", "bn_act_bwd"]


def test_the_backend_without_the_library(monkeypatch):
    spy = Spy(monkeypatch)
    monkeypatch.setattr(cpu, "load", lambda: "was not built")
    case, forward = backend_case()
    judge_backend(case, run_backend(case, forward))
    assert spy.seen == ["bn_act", "bn_stats", "bn_act_bwd"]
