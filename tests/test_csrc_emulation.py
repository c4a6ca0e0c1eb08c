"""The CUDA launchers and kernels of csrc/, executed on the CPU: compiled with g++ against tests/cuda_emulation, which
runs the threads of a block in lockstep, and registered for CPU tensors. backends/cuda.py then runs as it does on a GPU.

Everything that torch allocates is filled with NaN first; every input lies between NaNs.
"""

from __future__ import annotations

import pytest
import torch

from fused_resnet.backends import cuda, pooled, reference
from fused_resnet.backends.layout import output_format
from tests.emulation import HERE, ROOT, amid, between_nans, emulated_machine, error, nan_filled

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# Vector and scalar paths, lanes from 1 to 32, one and many channel tiles, fewer and more rows than threads.
SHAPES = [
    pytest.param((5, 3, 7, 9), False, id="3-channels"),
    pytest.param((1, 7, 1, 1), False, id="one-row"),
    pytest.param((5, 65, 7, 9), False, id="65-channels"),
    pytest.param((2, 64, 14, 14), False, id="64-channels"),
    pytest.param((2, 64, 14, 14), True, id="64-channels-misaligned"),
    pytest.param((1, 512, 7, 7), False, id="512-channels"),
    pytest.param((4, 8, 33, 17), False, id="one-vector"),
    pytest.param((2, 24, 5, 5), False, id="24-channels"),
    pytest.param((3, 1, 5, 7), False, id="one-channel"),
]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """machine(multiprocessors, reversed) sets the emulated machine up."""
    sources = (ROOT / "csrc" / "bn_act.cu", ROOT / "csrc" / "pool.cu", HERE / "emulated_ops.cpp")
    return emulated_machine(tmp_path_factory, *sources)


@pytest.fixture(autouse=True)
def fresh(machine):
    machine(4, False)
    torch.manual_seed(0)
    with nan_filled():
        yield


def bound(dtype):
    """A rounding to nearest of each element, and some for the order of sums."""
    return 1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps


def case(shape, dtype, misaligned=False, mean=0.0):
    channels = shape[1]
    x, residual, grad = (between_nans(torch.randn(shape).add(m).to(dtype), misaligned) for m in (mean, 0.0, 0.0))
    weight, bias = torch.randn(channels), torch.randn(channels)
    return x, residual, grad, weight, bias


def exact_stats(x):
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    return mean, var


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape, misaligned", SHAPES)
def test_bn_stats(shape, dtype, misaligned):
    x = case(shape, dtype, misaligned, mean=0.5)[0]
    mean, var = cuda.bn_stats(x)
    expected_mean, expected_var = exact_stats(x)
    assert mean.dtype == var.dtype == torch.float32
    assert error(mean, expected_mean) < 1e-6 and error(var, expected_var) < 2e-6


@pytest.mark.parametrize("mean", [1e3, 1e5])
@pytest.mark.parametrize("channels", [8, 7])
def test_bn_stats_with_a_mean_far_above_the_deviation(mean, channels):
    x = between_nans(torch.randn(4, channels, 33, 17) + mean)
    got_mean, got_var = cuda.bn_stats(x)
    expected_mean, expected_var = exact_stats(x)
    assert error(got_mean, expected_mean) < 1e-6
    # float32 itself holds these x to mean * 2**-24 only; a sum of squares would be off by 100 % and more
    assert error(got_var, expected_var) < 1e-3
    wrong = (x.square().sum((0, 2, 3)) / x[:, 0].numel()) - got_mean.square()
    assert mean < 1e4 or error(wrong, expected_var) > 0.1


def test_bn_stats_with_one_outlier_first():
    x = torch.randn(4, 8, 33, 17)
    x[0, :, 0, 0] = 1e4
    got_mean, got_var = cuda.bn_stats(between_nans(x))
    expected_mean, expected_var = exact_stats(x)
    assert error(got_mean, expected_mean) < 1e-6 and error(got_var, expected_var) < 1e-6


def test_bn_stats_of_a_constant_is_exact():
    mean, var = cuda.bn_stats(between_nans(torch.full((4, 8, 33, 17), 3.3)))
    assert (var == 0).all() and error(mean, torch.full((8,), 3.3)) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape, misaligned", SHAPES)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("add, affine", [(False, True), (True, False), (True, True)], ids=["bn", "add", "bn-add"])
def test_bn_act(shape, dtype, misaligned, relu, add, affine):
    x, residual, _, weight, bias = case(shape, dtype, misaligned, mean=2.0)
    mean, var = (s.float() for s in exact_stats(x))
    args = (mean, var, weight if affine else None, bias if affine else None, EPS, residual if add else None, relu, True)
    y = cuda.bn_act(x, *args)
    expected = reference.bn_act(x.double(), *(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    assert y.dtype == dtype and error(y, expected) < bound(dtype)
    assert y.stride() == torch.empty(shape, memory_format=output_format(x)).stride()


# Which gradients are asked for decides what is launched, in every dtype alike: all of it by default in one.
MASKS = [
    pytest.param(d, m, id=f"{NAMES[d]}-{m}", marks=[] if d is torch.float16 or all(m) else pytest.mark.slow)
    for d in DTYPES
    for m in [(1, 1, 1, 1), (1, 1, 1, 0), (1, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
]


@pytest.mark.parametrize("shape, misaligned", SHAPES)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("batch_stats", [False, True], ids=["frozen", "batch"])
@pytest.mark.parametrize("dtype, mask", MASKS)
def test_bn_act_bwd(shape, dtype, misaligned, relu, batch_stats, mask):
    x, residual, grad, weight, bias = case(shape, dtype, misaligned, mean=2.0)
    if batch_stats and x[:, 0].numel() == 1:
        pytest.skip("one value per channel")
    mean, var = (s.float() for s in exact_stats(x))
    y = between_nans(reference.bn_act(x, mean, var, weight, bias, EPS, residual, relu, batch_stats), misaligned)
    mask = [bool(m) for m in mask]
    got = cuda.bn_act_bwd(grad, y, x, mean, var, weight, EPS, relu, batch_stats, mask)
    wide = (t.double() for t in (grad, y, x, mean, var, weight))
    expected = reference.bn_act_bwd(*wide, EPS, relu, batch_stats, mask)
    for needed, g, e, tolerance in zip(mask, got, expected, [bound(dtype), 2e-6, 2e-6, 0.0], strict=True):
        assert (g is None) == (not needed)
        if needed:
            assert error(g, e) <= tolerance
    if mask[3]:
        assert got[3].data_ptr() != grad.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape, misaligned", SHAPES)
@pytest.mark.parametrize("affine", [False, True], ids=["bn", "affine"])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, True)], ids=["all", "sums"])
def test_bn_relu_bwd(shape, dtype, misaligned, affine, needs):
    """The mask that comes from x is that of the output, to the bit of every sum."""
    x, _, grad, weight, bias = case(shape, dtype, misaligned, mean=2.0)
    if x[:, 0].numel() == 1:
        pytest.skip("one value per channel")
    mean, var = (s.float() for s in exact_stats(x))
    weight, bias = (weight, bias) if affine else (None, None)
    got = cuda._bn_relu_bwd(grad, x, mean, var, weight, bias, EPS, needs)
    y = cuda.bn_act(x, mean, var, weight, bias, EPS, None, True, True)
    by_output = cuda.bn_act_bwd(grad, y, x, mean, var, weight, EPS, True, True, [*needs, False])
    wide = (t if t is None else t.double() for t in (grad, y, x, mean, var, weight))
    expected = reference.bn_act_bwd(*wide, EPS, True, True, [*needs, False])
    for needed, g, o, e, tolerance in zip(needs, got, by_output, expected, [bound(dtype), 2e-6, 2e-6], strict=False):
        assert (g is None) == (not needed)
        if needed:
            assert torch.equal(g, o) and error(g, e) <= tolerance and g.stride() == o.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape, misaligned", SHAPES)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_bn_act_bwd_input(shape, dtype, misaligned, relu):
    x, y, grad, scale, slope = case(shape, dtype, misaligned, mean=2.0)
    mean, mean_g = torch.randn(shape[1]) + 2, torch.randn(shape[1])
    args = grad, y if relu else None, x, mean, scale, mean_g, slope
    dx = cuda.bn_act_bwd_input(*args, relu)
    expected = reference.bn_act_bwd_input(*(t if t is None else t.double() for t in args), relu)
    assert dx.dtype == dtype and error(dx, expected) < bound(dtype)
    assert dx.stride() == torch.empty(shape, memory_format=output_format(x)).stride()


@pytest.mark.parametrize("which", range(4), ids=["mean", "var", "weight", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_a_parameter_may_lie_anywhere(dtype, which):
    """A view into a flat buffer, say: four bytes behind a multiple of 16, the only one of all pointers."""
    x, residual, grad, weight, bias = case((2, 16, 9, 5), dtype)
    vectors = [*(s.float() for s in exact_stats(x)), weight, bias]
    vectors[which] = torch.full((22,), float("nan"))[5:21].copy_(vectors[which])
    assert vectors[which].data_ptr() % 16 == 4
    y = cuda.bn_act(x, *vectors, EPS, residual, True, True)
    expected = reference.bn_act(x.double(), *(v.double() for v in vectors), EPS, residual.double(), True, True)
    assert error(y, expected) < bound(dtype)
    mask = [True] * 4
    got = cuda.bn_act_bwd(grad, y, x, *vectors[:3], EPS, True, True, mask)
    expected = reference.bn_act_bwd(*(t.double() for t in (grad, y, x, *vectors[:3])), EPS, True, True, mask)
    for g, e, tolerance in zip(got, expected, [bound(dtype), 2e-6, 2e-6, 0.0], strict=True):
        assert error(g, e) <= tolerance


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bn", [False, True], ids=["plain", "bn"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_conv_bn_act_bwd(groups, bn, relu):
    x = torch.randn(2, 6, 7, 9).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(10, 6 // groups, 3, 3)
    gamma, mean, var = (torch.randn(10), torch.randn(10), torch.rand(10) + 0.5) if bn else (None, None, None)
    conv = ([2, 2], [1, 1], [1, 1], groups)
    y = reference.conv_bn_act(x, weight, gamma, None, mean, var, EPS, None, *conv, relu)
    mask = [True, True, bn, bn, True]
    args = (torch.randn_like(y), y if relu else None, x, weight, gamma, mean, var)
    got = cuda.conv_bn_act_bwd(*args, EPS, *conv, relu, mask)
    expected = reference.conv_bn_act_bwd(*(t if t is None else t.double() for t in args), EPS, *conv, relu, mask)
    for g, e in zip(got, expected, strict=True):
        assert (g is None and e is None) or error(g, e) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_nan_and_infinity(dtype):
    x, residual, grad, weight, bias = case((2, 8, 3, 3), dtype)
    mean, var = torch.zeros(8), torch.ones(8)
    x[0, 0, 0, 0], x[0, 1, 0, 0], x[0, 2, 0, 0] = float("nan"), float("inf"), -float("inf")
    args = (mean, var, torch.ones(8), None, EPS, None, True, False)
    y = cuda.bn_act(x, *args)
    assert torch.equal(y.isnan(), reference.bn_act(x, *args).isnan()) and y[0, 0, 0, 0].isnan()
    assert y[0, 1, 0, 0] == float("inf") and y[0, 2, 0, 0] == 0
    g = cuda.bn_act_bwd(grad, y, x, mean, var, None, EPS, True, False, [False, False, False, True])[3]
    assert torch.equal(g, torch.ops.aten.threshold_backward(grad, y, 0)), "a NaN lets its gradient through"
    grad[1, 3, 1, 1] = float("nan")
    y[1, 3, 1, 1] = -1.0
    g, total = torch.ops.fused_resnet_cuda.relu_bwd_sum(grad, y)
    assert g[1, 3, 1, 1] == 0 and not total.isnan().any()
    stats = cuda.bn_stats(x)[1]
    assert stats[:3].isnan().all() and not stats[3:].isnan().any()


@pytest.mark.parametrize("shape, misaligned", SHAPES)
def test_the_order_of_threads_changes_no_bit(machine, shape, misaligned):
    """No barrier is missing, nothing races, and the sums have one order."""
    x, residual, grad, weight, bias = case(shape, torch.float16, misaligned)
    results = []
    for backwards in (False, True):
        machine(4, backwards)
        mean, var = cuda.bn_stats(x)
        y = cuda.bn_act(x, mean, var, weight, bias, EPS, residual, True, True)
        results.append([mean, var, y, *cuda.bn_act_bwd(grad, y, x, mean, var, weight, EPS, True, True, [True] * 4)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 132])
def test_any_number_of_multiprocessors(machine, multiprocessors):
    machine(multiprocessors, False)
    for shape in ((3, 40, 9, 11), (1, 264, 3, 5), (2, 5, 31, 7)):
        x, residual, grad, weight, bias = case(shape, torch.float16)
        mean, var = cuda.bn_stats(x)
        assert error(mean, exact_stats(x)[0]) < 2e-6 and error(var, exact_stats(x)[1]) < 2e-6
        y = cuda.bn_act(x, mean, var, weight, bias, EPS, residual, True, True)
        assert error(y, reference.bn_act(x, mean, var, weight, bias, EPS, residual, True, True)) < 1e-3
        got = cuda.bn_act_bwd(grad, y, x, mean, var, weight, EPS, True, True, [True] * 4)
        expected = reference.bn_act_bwd(grad, y, x, mean, var, weight, EPS, True, True, [True] * 4)
        assert all(error(g, e) < 1e-3 for g, e in zip(got, expected, strict=True))


def test_layouts_and_parameter_dtypes():
    for x in (torch.randn(2, 6, 5, 3), torch.randn(4, 12, 5, 3)[::2, ::2], torch.randn(2, 6, 1, 1)):
        residual = torch.ones(()).expand_as(x)
        stats = [s.double() for s in reference.bn_stats(x)]
        args = (*stats, torch.randn(6).bfloat16(), torch.randn(12)[::2], EPS, residual, True, True)
        y, expected = cuda.bn_act(x, *args), reference.bn_act(x, *args)
        assert error(y, expected) < 1e-6 and y.stride() == torch.empty(x.shape, memory_format=output_format(x)).stride()


@pytest.mark.parametrize(
    "change, sentence",
    [
        pytest.param(lambda a: a | {"x": a["x"][0]}, r"x must be \[N, C, H, W\], it has 3 dimensions", id="3-D"),
        pytest.param(lambda a: a | {"x": a["x"].contiguous()}, "x must be dense and channels_last", id="layout"),
        pytest.param(lambda a: a | {"x": a["x"][:0]}, "x must not be empty", id="empty"),
        pytest.param(
            lambda a: a | {"x": a["x"].double()}, "needs float32, float16 or bfloat16, got Double", id="dtype"
        ),
        pytest.param(lambda a: a | {"mean": a["mean"][:3]}, r"mean must be \[C\] = \[4\]", id="channels"),
        pytest.param(lambda a: a | {"var": a["var"].half()}, "var must be float32", id="parameter-dtype"),
        pytest.param(lambda a: a | {"weight": torch.ones(8)[::2]}, "weight must be contiguous", id="strided-parameter"),
        pytest.param(lambda a: a | {"residual": a["x"][:1]}, "residual must have the shape of x", id="residual-shape"),
        pytest.param(
            lambda a: a | {"residual": a["x"].half()}, "residual must have the dtype of x", id="residual-dtype"
        ),
    ],
)
def test_launchers_refuse_with_a_sentence(change, sentence):
    x = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    args = {"x": x, "mean": torch.zeros(4), "var": torch.ones(4), "weight": None, "bias": None, "eps": EPS}
    args |= {"residual": None, "relu": True}
    with pytest.raises(RuntimeError, match=f"bn_act: {sentence}"):
        torch.ops.fused_resnet_cuda.bn_act(**change(args))


# Batch norm, ReLU and max-pool in one

# Odd and even maps, of one value and of one line, more windows than a walk has, a walk that ends with the map.
POOL_SHAPES = [
    pytest.param((5, 3, 7, 9), False, id="3-channels"),
    pytest.param((2, 64, 18, 15), False, id="64-channels"),
    pytest.param((2, 64, 15, 14), True, id="64-channels-misaligned"),
    pytest.param((1, 264, 5, 6), False, id="264-channels"),
    pytest.param((2, 8, 33, 4), False, id="17-windows-high"),
    pytest.param((1, 24, 32, 2), False, id="16-windows-high"),
    pytest.param((3, 8, 1, 6), False, id="one-line"),
    pytest.param((3, 16, 6, 1), False, id="one-column"),
    pytest.param((4, 8, 1, 1), False, id="one-value"),
]


def pool_case(shape, dtype, misaligned=False):
    x, _, _, weight, bias = case(shape, dtype, misaligned, mean=0.2)
    mean, var = (s.float() for s in exact_stats(x))
    return x, mean, var, weight, bias


def assert_same_pool(got, x, *bn):
    """y and winner to the bit: those that PyTorch's pool finds in batch norm's result as this dtype holds it."""
    a = cuda.bn_act(x, *bn, EPS, None, True, True)
    y, at = torch.nn.functional.max_pool2d(a, 3, 2, 1, return_indices=True)
    p, q = torch.arange(y.shape[2])[:, None] * 2 - 1, torch.arange(y.shape[3])[None, :] * 2 - 1
    place = 3 * (at // x.shape[3] - p) + at % x.shape[3] - q
    place[y <= 0] = pooled.LOST
    assert torch.equal(got[0].nan_to_num(-9.0), y.nan_to_num(-9.0)) and torch.equal(got[1], place.to(torch.uint8))
    assert got[0].dtype == x.dtype and got[0].stride() == got[1].stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape, misaligned", POOL_SHAPES)
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_bn_act_pool(machine, shape, dtype, misaligned, affine):
    x, mean, var, *affine_of = pool_case(shape, dtype, misaligned)
    bn = (mean, var, *(affine_of if affine else (None, None)))
    results = []
    for backwards in (False, True):
        machine(4, backwards)
        results.append(cuda.bn_act_pool(x, *bn, EPS))
        assert_same_pool(results[-1], x, *bn)
    y, expected = results[0][0], reference.bn_act_pool(x.double(), *(t if t is None else t.double() for t in bn), EPS)
    assert error(y, expected[0]) < bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_bn_act_pool_prefers_what_pytorch_prefers(dtype):
    """The first of equal values, the last NaN, infinity before all numbers, nothing where nothing is above zero."""
    plain = torch.zeros(8), torch.full((8,), 1 - EPS), None, None
    ties = torch.randint(-2, 3, (3, 8, 17, 8)).to(dtype)
    assert_same_pool(cuda.bn_act_pool(between_nans(ties), *plain, EPS), ties, *plain)
    rare = torch.randn(4, 8, 9, 10)
    for value, share in ((float("nan"), 0.1), (float("inf"), 0.1), (-float("inf"), 0.5)):
        rare[torch.rand(rare.shape) < share] = value
    rare = between_nans(rare.to(dtype))
    got = cuda.bn_act_pool(rare, *plain, EPS)
    assert_same_pool(got, rare, *plain)
    assert got[0].isnan().any() and (got[1] == pooled.LOST).any() and got[0].isinf().any()


POOL_MASKS = [(dtype, (1, 1, 1)) for dtype in DTYPES] + [(torch.float16, m) for m in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]


@pytest.mark.parametrize("dtype, mask", POOL_MASKS, ids=lambda v: NAMES.get(v, v))
@pytest.mark.parametrize("shape, misaligned", POOL_SHAPES)
def test_bn_act_pool_bwd(machine, shape, dtype, misaligned, mask):
    x, mean, var, weight, bias = pool_case(shape, dtype, misaligned)
    y, winner = cuda.bn_act_pool(x, mean, var, weight, bias, EPS)
    grad = between_nans(torch.randn(y.shape).to(dtype), misaligned)
    winner = among_winners(winner, misaligned)
    mask, results = [bool(m) for m in mask], []
    for backwards in (False, True):
        machine(4, backwards)
        results.append(cuda.bn_act_pool_bwd(grad, x, winner, mean, var, weight, EPS, mask))
    wide = (grad.double(), x.double(), winner, mean.double(), var.double(), weight.double())
    expected = reference.bn_act_pool_bwd(*wide, EPS, mask)
    for needed, got, again, e, tolerance in zip(mask, *results, expected, [bound(dtype), 2e-6, 2e-6], strict=True):
        assert (got is None) == (not needed)
        if needed:
            assert torch.equal(got, again) and error(got, e) <= tolerance


def among_winners(winner, misaligned):
    """winner among bytes that would be winners of other windows."""
    return amid(torch.arange(winner.numel() + 80).remainder(9).to(torch.uint8), winner, misaligned)


@pytest.mark.parametrize("multiprocessors", [1, 7, 132])
def test_bn_act_pool_on_any_number_of_multiprocessors(machine, multiprocessors):
    machine(multiprocessors, False)
    for shape in ((3, 40, 37, 11), (1, 264, 3, 5), (2, 5, 31, 7)):
        x, *bn = pool_case(shape, torch.float16)
        y, winner = cuda.bn_act_pool(x, *bn, EPS)
        assert_same_pool((y, winner), x, *bn)
        args = torch.randn(y.shape).half(), x, winner, *bn[:3]
        got = cuda.bn_act_pool_bwd(*args, EPS, [True] * 3)
        expected = reference.bn_act_pool_bwd(*args, EPS, [True] * 3)
        assert all(error(g, e) < 1e-3 for g, e in zip(got, expected, strict=True))


def test_bn_act_pool_bwd_lets_nan_through():
    """As PyTorch's batch norm: x that is not finite spoils its channel's gradient, and no other's."""
    x, mean, var, weight, bias = pool_case((2, 8, 5, 5), torch.float32)
    y, winner = cuda.bn_act_pool(x, mean, var, weight, bias, EPS)
    grad = torch.randn(y.shape).contiguous(memory_format=torch.channels_last)
    x[1, 3, 4, 4] = float("inf")
    args = grad, x, winner, mean, var, weight, EPS, [True] * 3
    for got, expected in zip(cuda.bn_act_pool_bwd(*args), reference.bn_act_pool_bwd(*args), strict=True):
        assert torch.equal(got.isnan(), expected.isnan())


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"winner": lambda t: t.int()}, "winner must be Byte"),
        ({"winner": lambda t: t[:1]}, r"winner must be \[2, 4, 2, 3\]"),
        ({"grad": lambda t: t[:, :, :1]}, r"grad must be \[2, 4, 2, 3\]"),
        ({"grad": lambda t: t.half()}, "grad must be Float"),
        ({"x": lambda t: t[:0]}, "x must not be empty"),
        ({"mean": lambda t: t[:3]}, r"mean must be \[C\] = \[4\]"),
    ],
)
def test_bn_act_pool_bwd_refuses_with_a_sentence(change, sentence):
    x = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    y, winner = torch.ops.fused_resnet_cuda.bn_act_pool(x, torch.zeros(4), torch.ones(4), None, None, EPS)
    args = {"grad": y, "x": x, "winner": winner, "mean": torch.zeros(4), "var": torch.ones(4)}
    args |= {"weight": None, "eps": EPS, "need_x": True}
    args |= {name: f(args[name]) for name, f in change.items()}
    args = {n: t.contiguous(memory_format=torch.channels_last) if n == "grad" else t for n, t in args.items()}
    with pytest.raises(RuntimeError, match=f"bn_act_pool_bwd: {sentence}"):
        torch.ops.fused_resnet_cuda.bn_act_pool_bwd(**args)


# The average over whole maps


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape", [(1, 2048, 7, 7), (3, 66, 1, 1), (2, 24, 33, 5), (5, 2, 2, 4)])
def test_avg_pool(machine, shape, dtype, backwards):
    machine(4, backwards)
    x = between_nans((torch.randn(shape) + 0.5).to(dtype))
    y = torch.empty(*shape[:2], 1, 1, dtype=dtype)
    torch.ops.fused_resnet_cuda.avg_pool_out(x, y)
    assert error(y, x.double().mean((2, 3), keepdim=True)) < bound(dtype)


def test_avg_pool_lets_nan_and_infinity_through():
    x = torch.zeros(1, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    x[0, 1, 2, 2], x[0, 2, 0, 0], x[0, 3, 1, 1], x[0, 3, 2, 1] = *[float("nan"), float("inf")], *[-float("inf")] * 2
    y = torch.empty(1, 8, 1, 1)
    torch.ops.fused_resnet_cuda.avg_pool_out(x, y)
    assert torch.equal(y.nan_to_num(7.0), x.mean((2, 3), keepdim=True).nan_to_num(7.0)) and y[0, 1].isnan().all()


@pytest.mark.parametrize(
    "x, y, sentence",
    [
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 1, 1), "x must have an even number of channels, got 3"),
        (torch.zeros(1, 4, 2, 2), torch.zeros(2, 4, 1, 1), r"y must be \[1, 4, 1, 1\]"),
        (torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 1, 1).half(), "y must have the dtype of x"),
        (torch.zeros(1, 4, 2, 2).double(), torch.zeros(1, 4, 1, 1).double(), "needs float32, float16 or bfloat16"),
        (torch.zeros(17)[1:].view(1, 4, 2, 2), torch.zeros(1, 4, 1, 1), "x must begin at a multiple of 8 bytes"),
    ],
)
def test_avg_pool_refuses_with_a_sentence(x, y, sentence):
    if x.is_contiguous() and x.storage_offset() == 0:
        x = x.contiguous(memory_format=torch.channels_last)
    else:
        x = x.as_strided(x.shape, (16, 1, 8, 4), 1)
    with pytest.raises(RuntimeError, match=f"avg_pool: {sentence}"):
        torch.ops.fused_resnet_cuda.avg_pool_out(x, y)
