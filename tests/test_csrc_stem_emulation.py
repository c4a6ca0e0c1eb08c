"""The stem of csrc/conv, with its pool and without, kernels and launchers, executed on the CPU: tests/cuda_emulation
has their instructions by the letter of the manual. Against PyTorch in float64.

Shared memory and y hold NaN first; every input lies between NaNs.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.backends import cuda, stem_conv, straight, verify
from fused_resnet.backends import reference as backends_reference
from fused_resnet.engine import compiled_stem, reference, triton_stem
from fused_resnet.engine.guard import ELEMENTWISE, errors
from fused_resnet.engine.problem import TOLERANCE
from tests.emulation import HERE, ROOT, between_nans, emulated_machine, error, nan_filled

ops = torch.ops.fused_resnet_cuda
OPS = "emulated_ops.cpp"
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# A dtype is a matter of the products, a layout of how pixels come: neither asks for the other.
kinds = pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float16, "nchw"), (torch.bfloat16, "nhwc")], ids=["fp16-nchw", "bf16-nhwc"]
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """machine(multiprocessors, reversed) sets the emulated machine up."""
    return emulated_machine(tmp_path_factory, ROOT / "csrc" / "stem.cu", HERE / "emulated_stem.cpp")


@pytest.fixture
def pool(tmp_path_factory):
    """The emulated pool of a stem whose batch norm is not folded."""
    emulated_machine(tmp_path_factory, *(ROOT / "csrc" / f"{name}.cu" for name in ("bn_act", "pool")), HERE / OPS)


@pytest.fixture(autouse=True)
def seeded(machine):
    machine(4, False)
    torch.manual_seed(0)


def laid_out(x, layout):
    """x between NaNs."""
    if layout == "nhwc":
        return between_nans(x)
    shelf = torch.full((x.numel() + 64,), float("nan"), dtype=x.dtype)
    return shelf[32:-32].view(x.shape).copy_(x)


class Call:
    """A stem's tensors, x between NaNs, and what has to come out, in float64."""

    def __init__(self, n, h, w, k=64, dtype=torch.float16, layout="nchw"):
        self.x = laid_out(torch.randn(n, 3, h, w).to(dtype), layout)
        self.weight = (torch.randn(k, 3, 7, 7) / 147**0.5).to(dtype)
        self.bias = torch.randn(k)

    def expected(self):
        return reference.stem_pool(self.x.double(), self.weight.double(), self.bias.double())

    def arguments(self, rows=2, **changes):
        n, _, h, w = self.x.shape
        y = torch.full((n, self.weight.shape[0], *triton_stem.sizes(h, w)[2:]), float("nan"), dtype=self.x.dtype)
        given = dict(x=self.x, weight=compiled_stem.pack(self.weight), bias=self.bias, rows=rows, y=between_nans(y))
        return given | changes

    def run(self, rows=2):
        given = self.arguments(rows)
        ops.stem_out(*given.values())
        return given["y"]

    def check(self, rows):
        agrees(self.run(rows), self.expected())


def agrees(y, expected):
    assert error(y, expected) < torch.finfo(y.dtype).eps / 2  # a rounding to nearest of each value, no more
    norm, element, strays = errors(y, expected)
    assert norm <= (limit := TOLERANCE[y.dtype]) and element <= ELEMENTWISE * limit and not strays


SHAPES = {
    "even": (2, 38, 40),
    "odd-height": (1, 19, 64),
    "ragged": (2, 13, 38),
    "one-pixel-pair": (3, 1, 2),
    "two-tiles": (1, 9, 250),
    "rows-of-three": (1, 3, 6),
}


@pytest.mark.parametrize("rows", [1, 2, 4, 99])
@kinds
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_stem(machine, shape, dtype, layout, rows):
    machine(4, rows == 2)
    Call(*shape, dtype=dtype, layout=layout).check(rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_tiles_and_blocks_of_channels(layout):
    Call(1, 33, 130, k=128, layout=layout).check(4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_threads_and_copies_changes_no_bit(machine, layout):
    """No barrier and no wait is missing."""
    call, results = Call(2, 35, 38, layout=layout), []
    for backwards, rows in ((False, 5), (True, 5), (False, 1), (True, 9)):
        machine(4, backwards)
        results.append(call.run(rows))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sums_are_those_of_the_filter(dtype):
    """Whole numbers: not one product is missing, doubled or misplaced."""
    call = Call(1, 21, 26, dtype=dtype)
    call.x.copy_(torch.randint(-2, 3, call.x.shape))
    call.weight.copy_(torch.randint(-1, 2, call.weight.shape))
    call.bias.copy_(torch.randint(-4, 5, call.bias.shape))
    assert torch.equal(call.run(3).double(), call.expected())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", [(20, 22), (21, 22), (22, 24), (23, 24)])
def test_what_the_convolution_has_beyond_its_map_is_not_taken(size, rows):
    """A row or column further there are fewer taps in the image, and with negative weights larger sums."""
    call = Call(1, *size)
    call.x.fill_(1.0)
    call.weight.fill_(-1 / 256)
    call.bias.fill_(1.0)
    y, expected = call.run(rows), call.expected()
    assert expected.min() > 0 and error(y, expected) < 1e-3


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_comes_out_where_pytorch_has_it(layout, value):
    """In a filter's window and nowhere else: the kernel reads a column more, and its zero weight must not meet it."""
    for at in ((0, 0), (11, 7), (11, 8), (20, 25), (12, 24), (0, 25)):
        call = Call(1, 21, 26, layout=layout)
        call.weight.abs_()
        call.x.abs_()[0, 1, at[0], at[1]] = float(value)
        y, expected = call.run(3), call.expected()
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
        assert not y.isfinite().all() and y.isfinite().any()
        assert error(y.nan_to_num(0, 0), expected.nan_to_num(0, 0)) < 1e-3


def test_y_leaves_what_lies_around_it_alone():
    call = Call(1, 19, 38)
    given = call.arguments()
    n, k, p, q = given["y"].shape
    shelf = torch.full((given["y"].numel() + 4096,), 7.0, dtype=torch.float16)
    given["y"] = shelf[2048:-2048].view(n, p, q, k).permute(0, 3, 1, 2).fill_(float("nan"))
    ops.stem_out(*given.values())
    assert torch.equal(given["y"], call.run()) and (shelf[:2048] == 7).all() and (shelf[-2048:] == 7).all()


def test_a_packed_filter_is_a_filter():
    weight = torch.randn(128, 3, 7, 7)
    packed = compiled_stem.pack(weight).view(128, 7, 8, 4)
    assert not packed[:, :, 0].any() and not packed[..., 3].any()
    assert packed.double().sum().isclose(weight.double().sum())
    assert torch.equal(packed[64 + 32 + 8 * 3 + 2 * 1 + 1, 6, 7, :3], weight[64 + 32 + 8 * 1 + 2 * 3 + 1, :, 6, 6])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_x_may_begin_at_any_pair(layout):
    call = Call(1, 9, 12, layout=layout)
    expected = call.run()
    shelf = torch.empty(call.x.numel() + 2, dtype=torch.float16)
    call.x = shelf[2:].as_strided(call.x.shape, call.x.stride()).copy_(call.x)
    assert call.x.data_ptr() % 16 and torch.equal(call.run(), expected)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(x=torch.zeros(1, 4, 9, 12).half()), r"x must be \[N, 3, H, W\]"),
        (dict(x=torch.zeros(0, 3, 9, 12).half()), "x must not be empty"),
        (dict(x=torch.zeros(1, 3, 9, 12)), "x must be float16 or bfloat16, got Float"),
        (dict(x=torch.zeros(1, 3, 9, 24).half()[..., ::2]), "x must be dense and channels_last"),
        (dict(x=torch.zeros(1, 3, 9, 13).half()), "x must have an even width, got 13"),
        (dict(x=torch.zeros(325).half()[1:].view(1, 3, 9, 12)), "x must begin at a multiple of 4 bytes"),
        (dict(weight=torch.zeros(64, 3, 7, 7).half()), r"weight must be packed, \[K, 224\]"),
        (dict(weight=torch.zeros(64, 224).bfloat16()), "weight must have the dtype of x"),
        (dict(weight=torch.zeros(32, 224).half()), "K must be a multiple of 64, got 32"),
        (dict(bias=torch.zeros(64).half()), "bias must be float32"),
        (dict(bias=torch.zeros(32)), r"bias must be \[C\] = \[64\]"),
        (dict(rows=0), "rows must be at least 1, got 0"),
        (dict(y=torch.zeros(1, 64, 3, 4).half()), r"y must be \[1, 64, 3, 3\]"),
    ],
)
def test_the_launcher_refuses_with_a_sentence(changes, sentence):
    call = Call(1, 9, 12)
    if "y" in changes:
        changes = {"y": changes["y"].contiguous(memory_format=torch.channels_last)}
    with pytest.raises(RuntimeError, match=f"stem: {sentence}"):
        ops.stem_out(*call.arguments(**changes).values())


# --- the convolution alone --------------------------------------------------------------------------------------------


def convolution(call, rows=2):
    with nan_filled():
        return ops.stem_conv(call.x, compiled_stem.pack(call.weight), rows)


def expected_convolution(call):
    return F.conv2d(call.x.double(), call.weight.double(), None, 2, 3)


def check_convolution(call, rows):
    y, expected = convolution(call, rows), expected_convolution(call)
    assert y.shape == expected.shape and y.dtype is call.x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    agrees(y, expected)


# 124 columns are a whole tile of it; 248 of x.
CONVOLUTIONS = SHAPES | {
    "odd-rows-and-columns": (2, 34, 38),
    "whole-tile": (1, 7, 248),
    "one-column-further": (1, 6, 250),
    "two-columns-further": (1, 5, 252),
    "one-row": (2, 1, 40),
}


@pytest.mark.parametrize("rows", [1, 2, 4, 99])
@kinds
@pytest.mark.parametrize("shape", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(machine, shape, dtype, layout, rows):
    machine(4, rows == 2)
    check_convolution(Call(*shape, dtype=dtype, layout=layout), rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolution_of_several_tiles_and_blocks_of_channels(layout):
    check_convolution(Call(2, 33, 254, k=128, layout=layout), 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_threads_and_copies_changes_no_bit_of_the_convolution(machine, layout):
    call, results = Call(2, 35, 38, layout=layout), []
    for backwards, rows in ((False, 5), (True, 5), (False, 1), (True, 9)):
        machine(4, backwards)
        results.append(convolution(call, rows))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sums_of_the_convolution_are_those_of_the_filter(dtype):
    call = Call(1, 21, 26, k=128, dtype=dtype)
    call.x.copy_(torch.randint(-2, 3, call.x.shape))
    call.weight.copy_(torch.randint(-1, 2, call.weight.shape))
    assert torch.equal(convolution(call, 3).double(), expected_convolution(call))


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_comes_out_of_the_convolution_where_pytorch_has_it(layout, value):
    for at in ((0, 0), (11, 7), (11, 8), (20, 25), (12, 24), (0, 25)):
        call = Call(1, 21, 26, layout=layout)
        call.weight.abs_()
        call.x.abs_()[0, 1, at[0], at[1]] = float(value)
        y, expected = convolution(call, 3), expected_convolution(call)
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
        assert not y.isfinite().all() and y.isfinite().any()
        assert error(y.nan_to_num(0, 0), expected.nan_to_num(0, 0)) < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_x_of_the_convolution_may_begin_at_any_pair(layout):
    call = Call(1, 9, 12, layout=layout)
    expected = convolution(call)
    shelf = torch.empty(call.x.numel() + 2, dtype=torch.float16)
    call.x = shelf[2:].as_strided(call.x.shape, call.x.stride()).copy_(call.x)
    assert call.x.data_ptr() % 16 and torch.equal(convolution(call), expected)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(x=torch.zeros(1, 4, 9, 12).half()), r"x must be \[N, 3, H, W\]"),
        (dict(x=torch.zeros(1, 3, 9, 13).half()), "x must have an even width, got 13"),
        (dict(weight=torch.zeros(64, 224).bfloat16()), "weight must have the dtype of x"),
        (dict(weight=torch.zeros(96, 224).half()), "K must be a multiple of 64, got 96"),
        (dict(rows=0), "rows must be at least 1, got 0"),
    ],
)
def test_the_convolutions_launcher_refuses_with_a_sentence(changes, sentence):
    given = dict(x=torch.zeros(1, 3, 9, 12).half(), weight=torch.zeros(64, 224).half(), rows=2) | changes
    with pytest.raises(RuntimeError, match=f"stem_conv: {sentence}"):
        ops.stem_conv(*given.values())


@pytest.mark.parametrize("layout_of_weight", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_backends_function_is_the_reference(monkeypatch, layout, layout_of_weight):
    """Filters packed, rows chosen, and the memory layout that every backend gives."""
    monkeypatch.setattr(stem_conv, "chip", lambda device: (90, 4))
    call = Call(3, 35, 38, k=128, dtype=torch.bfloat16, layout=layout)
    weight = call.weight.contiguous(memory_format=LAYOUTS[layout_of_weight])
    y, expected = cuda.stem_conv(call.x, weight), backends_reference.stem_conv(call.x, weight)
    assert y.stride() == expected.stride() and error(y, expected) < 1e-3


@pytest.mark.parametrize("layout_of_weight", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["norm", "no-affine", "none"])
def test_the_backends_whole_stem_is_the_reference(monkeypatch, pool, norm, layout, layout_of_weight):
    """Batch norm folded, filters packed, rows chosen, and the memory layout that every backend gives."""
    monkeypatch.setattr(stem_conv, "chip", lambda device: (90, 4))
    dtype = torch.float16 if layout == "nchw" else torch.bfloat16
    call = Call(3, 35, 38, k=128, dtype=dtype, layout=layout)
    vectors = [torch.rand(128) + 0.5 for _ in range(4)]
    vectors[: {"norm": 0, "no-affine": 2, "none": 4}[norm]] = [None] * {"norm": 0, "no-affine": 2, "none": 4}[norm]
    args = call.x, call.weight.contiguous(memory_format=LAYOUTS[layout_of_weight]), *vectors, 1e-5
    y, expected = cuda.conv_bn_act_pool(*args), backends_reference.conv_bn_act_pool(*args)
    assert y.stride() == expected.stride() and error(y, expected) < torch.finfo(dtype).eps
    assert verify.difference(y, expected) < verify.TOLERANCE[dtype]
    others = (*(torch.rand_like(a) if isinstance(a, torch.Tensor) else a for a in args[2:]),)
    call = straight.Repeated("conv_bn_act_pool", cuda.conv_bn_act_pool, verify.TOLERANCE[dtype], (became := []).append)
    for _ in range(straight.WATCH_AT):
        call(*args)
    (written,) = became
    assert torch.equal(written(*args), y)
    assert torch.equal(written(*args[:2], *others), cuda.conv_bn_act_pool(*args[:2], *others))


@pytest.mark.parametrize("gamma, variance", [(1, 1), (0.1, 1e6), (-0.5, 1e8)])
def test_batch_norms_of_large_variance(monkeypatch, pool, gamma, variance):
    """Pictures of 0 to 255, say: a filter that is folded in float16 would lose its bits."""
    monkeypatch.setattr(stem_conv, "chip", lambda device: (90, 4))
    call = Call(2, 20, 22)
    x, deviation = (call.x.float().abs() * variance**0.5 / 3).clamp_max(3e4).half(), torch.tensor(variance).sqrt()
    vectors = [torch.full((64,), float(v)) for v in (gamma, 0.1, 0.2 * deviation, variance)]
    judge = (a.double() for a in (x, call.weight, *vectors))
    expected = backends_reference.conv_bn_act_pool(*judge, 1e-5)
    y = cuda.conv_bn_act_pool(x, call.weight, *vectors, 1e-5)
    assert verify.difference(y, expected) < verify.TOLERANCE[torch.float16] / 2


# --- its weight's gradient --------------------------------------------------------------------------------------------


def weight_call(n, h, w, k=64, dtype=torch.float16, layout="nchw"):
    """(gradient of the convolution's output, x)."""
    call = Call(n, h, w, k, dtype, layout)
    return between_nans(torch.randn(n, k, (h + 1) // 2, w // 2).to(dtype)), call.x


def weight_shares(grad, x, rows):
    with nan_filled():
        return ops.stem_conv_weight_shares(grad, x, rows)


def weight_gradient(grad, x, rows=2):
    return weight_shares(grad, x, rows).double().sum(0).view(-1, 7, 8, 4)[:, :, 1:, :3].permute(0, 3, 1, 2)


def expected_weight_gradient(grad, x):
    shape = (grad.shape[1], 3, 7, 7)
    return torch.nn.grad.conv2d_weight(x.double(), shape, grad.double(), stride=2, padding=3)


# 112 columns are a whole tile of it, 16 a step; 224 and 32 of x.
WEIGHTS = SHAPES | {
    "odd-rows-and-columns": (2, 34, 38),
    "whole-steps": (2, 12, 64),
    "whole-tile": (1, 7, 224),
    "one-column-further": (1, 6, 226),
    "one-row": (2, 1, 40),
}


@pytest.mark.parametrize("rows", [1, 2, 4, 99])
@kinds
@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS)
def test_weight_gradient(machine, shape, dtype, layout, rows):
    machine(4, rows == 2)
    grad, x = weight_call(*shape, dtype=dtype, layout=layout)
    assert error(weight_gradient(grad, x, rows), expected_weight_gradient(grad, x)) < 1e-6  # sums in float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_gradient_of_several_tiles_and_blocks_of_channels(layout):
    grad, x = weight_call(2, 33, 230, k=128, layout=layout)
    shares = weight_shares(grad, x, 4)
    assert shares.shape == (2 * 3 * 2, 128, 224)  # images, parts of 9 pairs of rows, tiles of 115 columns
    assert error(weight_gradient(grad, x, 4), expected_weight_gradient(grad, x)) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_threads_and_copies_changes_no_bit_of_the_weight_gradient(machine, layout):
    (grad, x), results = weight_call(2, 35, 38, layout=layout), []
    for backwards in (False, True):
        machine(4, backwards)
        results.append(weight_shares(grad, x, 5).view(-1, 64, 7, 8, 4)[..., 1:, :3])
    assert torch.equal(*results) and results[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sums_of_the_weight_gradient_are_exact(dtype):
    """Whole numbers: not one product is missing, doubled or misplaced."""
    grad, x = weight_call(2, 21, 26, k=128, dtype=dtype)
    for t in (grad, x):
        t.copy_(torch.randint(-2, 3, t.shape))
    assert torch.equal(weight_gradient(grad, x, 3), expected_weight_gradient(grad, x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_reaches_the_filters_values_that_met_it_and_no_others(layout):
    """At the edges a block reads positions of the map that are not there."""
    for at in ((0, 0), (11, 7), (11, 8), (20, 25), (12, 24), (0, 25), (20, 0), (19, 3)):
        grad, x = weight_call(1, 21, 26, layout=layout)
        x[0, 1, at[0], at[1]] = float("nan")
        found, expected = weight_gradient(grad, x, 3), expected_weight_gradient(grad, x)
        assert torch.equal(found.isnan(), expected.isnan()) and found.isfinite().any() and not found.isfinite().all()
        assert error(found.nan_to_num(0), expected.nan_to_num(0)) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_x_of_the_weight_gradient_may_begin_at_any_pair(layout):
    grad, x = weight_call(1, 9, 12, layout=layout)
    expected = weight_gradient(grad, x)
    shelf = torch.empty(x.numel() + 2, dtype=torch.float16)
    x = shelf[2:].as_strided(x.shape, x.stride()).copy_(x)
    assert x.data_ptr() % 16 and torch.equal(weight_gradient(grad, x), expected)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(grad=torch.zeros(64, 5, 6).half()), r"grad must be \[N, K, P, Q\], it has 3 dimensions"),
        (dict(grad=torch.zeros(1, 64, 5, 6)), "grad must have the dtype of x"),
        (dict(grad=torch.zeros(1, 64, 5, 5).half()), r"grad must be \[1, 64, 5, 6\]"),
        (dict(grad=torch.zeros(1, 96, 5, 6).half()), "K must be a multiple of 64, got 96"),
        (dict(x=torch.zeros(1, 3, 9, 13).half()), "x must have an even width, got 13"),
        (dict(x=torch.zeros(1, 3, 9, 12)), "x must be float16 or bfloat16, got Float"),
        (dict(rows=0), "rows must be at least 1, got 0"),
    ],
)
def test_the_weight_gradients_launcher_refuses_with_a_sentence(changes, sentence):
    given = dict(grad=torch.zeros(1, 64, 5, 6).half(), x=torch.zeros(1, 3, 9, 12).half(), rows=2) | changes
    if given["grad"].dim() == 4:
        given["grad"] = given["grad"].contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=f"stem_conv_weight_shares: {sentence}"):
        ops.stem_conv_weight_shares(*given.values())


@pytest.mark.parametrize("layout_of_weight", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_backends_weight_gradient_is_the_reference(monkeypatch, layout, layout_of_weight):
    monkeypatch.setattr(stem_conv, "chip", lambda device: (90, 4))
    grad, x = weight_call(3, 35, 38, k=128, dtype=torch.bfloat16, layout=layout)
    weight = torch.empty(128, 3, 7, 7, dtype=torch.bfloat16).contiguous(memory_format=LAYOUTS[layout_of_weight])
    found = cuda.stem_conv_weight_grad(grad, x, weight)
    expected = backends_reference.stem_conv_weight_grad(grad, x, weight)
    assert found.stride() == expected.stride() == weight.stride() and found.dtype is weight.dtype
    assert error(found, expected) < 2e-3
