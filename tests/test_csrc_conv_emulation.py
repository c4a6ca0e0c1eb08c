"""The convolution of csrc/conv for sm_80 and those of few positions and by lines for sm_90, kernels and launchers,
executed on the CPU: tests/cuda_emulation has their instructions (cp.async, ldmatrix, mma.sync; barriers, the tensor
memory accelerator, wgmma, clusters of blocks) by the letter of the manual. Against PyTorch's convolution in float64.

Shared memory and everything that torch allocates is filled with NaN first; every input lies between NaNs.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.backends import reference
from tests.emulation import HERE, ROOT, between_nans, emulated_machine, error, nan_filled

HALF, BFLOAT, HALF_128x64, HALF_128x128, HALF_256x128, *SPLIT, LINES, BFLOAT_LINES = range(13)  # conv_instances.h
SPLITS = dict(zip(SPLIT, (1, 2, 4, 8, 1, 4), strict=True))  # blocks that share a reduction
HALF_8 = SPLIT[3]
ONE, TWO, ZERO = (1, 1), (2, 2), (0, 0)
ops = torch.ops.fused_resnet_cuda


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """machine(multiprocessors, reversed) sets the emulated machine up."""
    return emulated_machine(tmp_path_factory, ROOT / "csrc" / "conv_bn_act.cu", HERE / "emulated_convolutions.cpp")


@pytest.fixture(autouse=True)
def fresh(machine):
    machine(4, False)
    torch.manual_seed(0)
    with nan_filled():
        yield


def dtype_of(instance):
    return torch.bfloat16 if instance in (BFLOAT, *SPLIT[4:], BFLOAT_LINES) else torch.float16


class Call:
    """A convolution's tensors, between NaNs, and what has to come out, in float64."""

    def __init__(
        self, instance, n, c, h, w, k, kernel, stride, padding, dilation, segment, *, residual, scale, relu, bias=True
    ):
        dtype = dtype_of(instance)

        def filter(*size):
            return between_nans((torch.randn(size) / (size[1] * size[2] * size[3]) ** 0.5).to(dtype))

        self.instance, self.conv, self.relu, self.stride2 = instance, (stride, padding, dilation), relu, 1
        self.x, self.weight = between_nans(torch.randn(n, c, h, w).to(dtype)), filter(k, c, *kernel)
        self.bias = torch.randn(k) if bias else None
        self.scale = torch.rand(k) + 0.5 if scale else None
        self.residual = self.x2 = self.weight2 = None
        y = F.conv2d(self.x.double(), self.weight.double(), None, *self.conv)
        if segment:
            c2, h2, w2, self.stride2 = segment
            self.x2, self.weight2 = between_nans(torch.randn(n, c2, h2, w2).to(dtype)), filter(k, c2, 1, 1)
            y = y + F.conv2d(self.x2.double(), self.weight2.double(), None, self.stride2)
        if scale:
            y = y * self.scale.double().view(-1, 1, 1)
        if bias:
            y = y + self.bias.double().view(-1, 1, 1)
        if residual:
            self.residual = between_nans(torch.randn(y.shape).to(dtype))
            y = y + self.residual.double()
        self.expected = y.relu() if relu else y

    @property
    def arguments(self):
        tensors = (self.x, self.weight, self.bias, self.scale, self.residual, self.x2, self.weight2)
        return (self.instance, *tensors, self.stride2, *map(list, self.conv), self.relu)

    def run(self):
        y = ops.conv_bias_act(*self.arguments)
        assert y.dtype is self.x.dtype and not y.isnan().any()
        assert y.stride() == torch.empty(y.shape, memory_format=torch.channels_last).stride()
        return y

    def check(self):
        y = self.run()
        assert error(y, self.expected) < torch.finfo(y.dtype).eps / 2  # a rounding to nearest of each value, no more
        return y


SHAPES = {
    "3x3": (1, 8, 7, 9, 8, (3, 3), ONE, ONE, ONE, None),
    "3x3-stride2": (5, 24, 9, 7, 40, (3, 3), TWO, ONE, ONE, None),
    "3x3-images-in-a-tile": (9, 40, 3, 3, 72, (3, 3), ONE, ONE, ONE, None),
    "3x3-dilated": (2, 40, 7, 9, 72, (3, 3), ONE, TWO, TWO, None),
    "1x1": (2, 40, 7, 9, 72, (1, 1), ONE, ZERO, ONE, None),
    "1x1-stride2": (2, 40, 7, 9, 72, (1, 1), TWO, ZERO, ONE, None),
    "1x1-one-step": (1, 8, 3, 3, 8, (1, 1), ONE, ZERO, ONE, None),
    "5x3-uneven": (2, 16, 14, 13, 24, (5, 3), (1, 2), (2, 0), (2, 1), None),
    "1x1-segment": (2, 40, 9, 11, 72, (1, 1), ONE, ZERO, ONE, (24, 9, 11, 1)),
    "1x1-segment-stride2": (2, 40, 9, 11, 72, (1, 1), ONE, ZERO, ONE, (72, 17, 21, 2)),
    "3x3-segment-stride2": (1, 40, 5, 6, 72, (3, 3), ONE, ONE, ONE, (24, 10, 12, 2)),
}
EPILOGUES = {
    "bias-relu": dict(residual=False, scale=False, relu=True),
    "bias": dict(residual=False, scale=False, relu=False),
    "scale-residual-relu": dict(residual=True, scale=True, relu=True),
    "residual": dict(residual=True, scale=False, relu=False, bias=False),
}


def cases():
    """Every combination; by default all for one shape, and for the others every epilogue one way, one every way."""
    for shape, epilogue, instance, backwards in itertools.product(SHAPES, EPILOGUES, (HALF, BFLOAT), (False, True)):
        plain = instance == HALF and not backwards
        default = plain or shape == "3x3" or epilogue == "scale-residual-relu"
        name = (
            f"{shape}-{'fp16' if instance == HALF else 'bf16'}-{epilogue}-{'early-backwards' if backwards else 'late'}"
        )
        yield pytest.param(shape, instance, epilogue, backwards, id=name, marks=[] if default else pytest.mark.slow)


@pytest.mark.parametrize("shape, instance, epilogue, backwards", [*cases()])
def test_conv_bias_act(machine, shape, instance, epilogue, backwards):
    machine(4, backwards)
    Call(instance, *SHAPES[shape], **EPILOGUES[epilogue]).check()


@pytest.mark.parametrize("backwards", [False, True], ids=["late", "early-backwards"])
@pytest.mark.parametrize("instance", [HALF_128x64, HALF_128x128, HALF_256x128], ids=["128x64", "128x128", "256x128"])
def test_larger_tiles(machine, instance, backwards):
    """More than a tile along M and N, neither of them whole."""
    machine(4, backwards)
    shape = (2, 24, 12, 14, 136, (3, 3), ONE, ONE, ONE, (40, 24, 28, 2))
    Call(instance, *shape, residual=False, scale=True, relu=True).check()
    shape = (3, 72, 11, 9, 72, (1, 1), ONE, ZERO, ONE, None)
    Call(instance, *shape, residual=True, scale=False, relu=True).check()


SPLIT_SHAPES = {
    **SHAPES,
    "3x3-eighteen-steps": (1, 72, 9, 8, 136, (3, 3), ONE, ONE, ONE, None),
    "1x1-nine-steps": (1, 520, 7, 7, 64, (1, 1), ONE, ZERO, ONE, None),
    "1x1-segment-eight-steps": (2, 264, 7, 7, 72, (1, 1), ONE, ZERO, ONE, (136, 13, 13, 2)),
}


def steps(shape):
    _, c, _, _, _, (r, s), *_, segment = shape
    return r * s * -(-c // 64) + (-(-segment[0] // 64) if segment else 0)


def split_cases():
    for (name, shape), (instance, parts), backwards in itertools.product(
        SPLIT_SHAPES.items(), SPLITS.items(), (False, True)
    ):
        if steps(shape) >= parts:
            how = f"{'fp16' if dtype_of(instance) is torch.float16 else 'bf16'}-by-{parts}"
            order = "early-backwards" if backwards else "late"
            yield pytest.param(instance, shape, backwards, id=f"{name}-{how}-{order}")


@pytest.mark.parametrize("instance, shape, backwards", [*split_cases()])
def test_blocks_of_a_cluster_share_a_reduction(machine, instance, shape, backwards):
    machine(4, backwards)
    epilogue = EPILOGUES["residual" if shape[-1] is None and not backwards else "bias-relu"]
    Call(instance, *shape, **epilogue).check()


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("instance", SPLIT)
def test_epilogues_of_what_was_shared(instance, epilogue):
    Call(instance, *SPLIT_SHAPES["1x1-nine-steps"], **EPILOGUES[epilogue]).check()


@pytest.mark.parametrize("shape", ["3x3-eighteen-steps", "1x1-segment-eight-steps"])
@pytest.mark.parametrize("instance", SPLIT)
def test_weights_may_come_early(instance, shape):
    """What is read before the kernel before has ended is weights alone; the emulation fails if x is."""
    call = Call(instance, *SPLIT_SHAPES[shape], residual=True, scale=True, relu=True)
    out = torch.full_like(call.run(), float("nan"))
    ops.conv_bias_act_out(*call.arguments, None, out, constant_weights=True)
    assert torch.equal(out, call.run())


def test_a_reduction_too_short_to_be_shared_is_refused():
    call = Call(HALF_8, *SHAPES["1x1"], residual=False, scale=False, relu=True)
    with pytest.raises(RuntimeError, match="kHalf8 cannot run a reduction of fewer steps than blocks that share it"):
        call.run()


# By lines of at most 56 outputs, walked down a strip by each of two groups.
LINES_MAPS = {
    "a-few": (2, 7, 9),
    "widest": (1, 3, 56),
    "cut": (1, 4, 57),
    "cut-in-three": (2, 3, 115),
    "a-line": (3, 1, 9),
    "a-column": (2, 11, 1),
    "a-pixel": (5, 1, 1),
}


@pytest.mark.parametrize("multiprocessors, backwards", [(1, False), (3, True)], ids=["1-late", "3-early-backwards"])
@pytest.mark.parametrize("size", LINES_MAPS)
def test_lines(machine, size, multiprocessors, backwards):
    machine(multiprocessors, backwards)
    n, h, w = LINES_MAPS[size]
    for instance, epilogue in ((LINES, "scale-residual-relu"), (BFLOAT_LINES, "bias")):
        Call(instance, n, 64, h, w, 64, (3, 3), ONE, ONE, ONE, None, **EPILOGUES[epilogue]).check()


def test_lines_of_another_convolution_are_refused():
    for k, kernel, padding, reason in ((72, (3, 3), ONE, "channels that are not"), (64, (1, 1), ZERO, "a filter that")):
        call = Call(LINES, 1, 64, 5, 6, k, kernel, ONE, padding, ONE, None, residual=False, scale=False, relu=True)
        with pytest.raises(RuntimeError, match=f"kHalfLines cannot run {reason}"):
            call.run()


def test_weights_of_lines_may_come_early(machine):
    call = Call(LINES, 2, 64, 7, 9, 64, (3, 3), ONE, ONE, ONE, None, residual=True, scale=True, relu=True)
    for backwards in (False, True):
        machine(2, backwards)
        out = torch.full_like(call.run(), float("nan"))
        ops.conv_bias_act_out(*call.arguments, None, out, constant_weights=True)
        assert torch.equal(out, call.run())


@pytest.mark.parametrize("instance", [HALF, HALF_128x128, *SPLIT, LINES])
def test_the_order_of_threads_and_copies_changes_no_bit(machine, instance):
    """No barrier and no wait is missing: copies happen at the last moment, then at once, threads in both orders; then
    products late and copies at once."""
    channels, segment = (64, None) if instance == LINES else (72, (40, 9, 11, 1))
    shape = (2, channels, 9, 11, channels, (3, 3), ONE, ONE, ONE, segment)
    call = Call(instance, *shape, residual=False, scale=True, relu=True)
    results = []
    for order in ((False,), (True,), (True, True)):
        machine(4, *order)
        results.append(call.run())
    assert torch.equal(*results[:2]) and torch.equal(*results[1:])


@pytest.mark.parametrize("instance, c, k", [(HALF, 16, 24), (LINES, 64, 64)])
def test_out_leaves_what_lies_around_it_alone(instance, c, k):
    call = Call(instance, 2, c, 5, 7, k, (3, 3), ONE, ONE, ONE, None, residual=True, scale=False, relu=True)
    shelf = torch.full((call.expected.numel() + 64,), 7.0, dtype=torch.float16)
    n, k, p, q = call.expected.shape
    out = shelf[32:-32].view(n, p, q, k).permute(0, 3, 1, 2).fill_(float("nan"))
    ops.conv_bias_act_out(*call.arguments, None, out)
    assert torch.equal(out, call.run()) and (shelf[:32] == 7).all() and (shelf[-32:] == 7).all()


@pytest.mark.parametrize("instance, c, k", [(HALF, 16, 24), (LINES, 64, 64)])
def test_the_residual_may_be_overwritten_by_the_output(instance, c, k):
    call = Call(instance, 2, c, 5, 7, k, (3, 3), ONE, ONE, ONE, None, residual=True, scale=False, relu=True)
    expected = call.run()
    ops.conv_bias_act_out(*call.arguments, None, call.residual)
    assert torch.equal(call.residual, expected)


@pytest.mark.parametrize("instance", [HALF, BFLOAT], ids=["fp16", "bf16"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bn", [False, True], ids=["plain", "bn"])
@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
def test_conv_bn_act(instance, bn, affine, add):
    n, c, k = 3, 24, 136
    call = Call(instance, n, c, 6, 5, k, (3, 3), ONE, ONE, ONE, None, residual=add, scale=False, relu=True, bias=False)
    mean, var = (torch.randn(k), torch.rand(k) + 0.1) if bn else (None, None)
    # Four bytes behind a multiple of 16, and that may be: they are read one by one.
    gamma, beta = (torch.randn(k + 1)[1:] for _ in range(2)) if bn and affine else (None, None)
    conv = tuple(map(list, call.conv))
    y = ops.conv_bn_act(instance, call.x, call.weight, gamma, beta, mean, var, 1e-3, call.residual, *conv, True)
    wide = (t if t is None else t.double() for t in (call.x, call.weight, gamma, beta, mean, var))
    residual = None if call.residual is None else call.residual.double()
    expected = reference.conv_bn_act(*wide, 1e-3, residual, *conv, 1, True)
    assert error(y, expected) < torch.finfo(y.dtype).eps / 2


def test_nan_and_infinity_by_lines():
    shape = (1, 64, 4, 4, 64, (3, 3), ONE, ONE, ONE, None)
    call = Call(LINES, *shape, residual=True, scale=False, relu=True, bias=False)
    call.weight.zero_()[range(64), range(64), 1, 1] = 1.0
    call.residual.zero_()
    call.x[0, 0, 0, 0], call.residual[0, 1, 3, 3] = float("nan"), float("nan")
    call.residual[0, 2, 3, 0], call.residual[0, 3, 3, 1] = float("inf"), -float("inf")
    y = ops.conv_bias_act(*call.arguments)
    expected = F.conv2d(call.x.float(), call.weight.float(), padding=1).add(call.residual).relu()
    assert torch.equal(y.isnan(), expected.isnan()) and y.isnan().sum() == 64 * 4 + 1 and y.isinf().sum() == 1
    assert torch.equal(y.nan_to_num(9.0), expected.half().nan_to_num(9.0))


@pytest.mark.parametrize("instance", [HALF, SPLIT[0]])
def test_nan_and_infinity(instance):
    shape = (1, 8, 4, 4, 8, (1, 1), ONE, ZERO, ONE, None)
    call = Call(instance, *shape, residual=True, scale=False, relu=True, bias=False)
    call.weight.copy_(torch.eye(8).view(8, 8, 1, 1))
    call.residual.zero_()
    call.x[0, 0, 0, 0], call.x[0, 0, 1, 0], call.x[0, 0, 2, 0] = float("nan"), float("inf"), -float("inf")
    call.residual[0, 1, 3, 3] = float("nan")
    y = ops.conv_bias_act(*call.arguments)
    expected = F.conv2d(call.x.float(), call.weight.float()).add(call.residual).relu()
    assert torch.equal(y.isnan(), expected.isnan()) and y.isnan().sum() == 8 + 7 + 7 + 1
    assert torch.equal(y.nan_to_num(9.0), expected.half().nan_to_num(9.0))


def replaced(name, change):
    names = ["instance", "x", "weight", "bias", "scale", "residual", "x2", "weight2", "stride2", "stride", "padding"]
    return [*names, "dilation", "relu"].index(name), change


@pytest.mark.parametrize(
    "name, change, sentence",
    [
        ("instance", lambda _: 99, "instance must be below 13, got 99"),
        ("instance", lambda _: BFLOAT, "kBfloat64x64 needs x in BFloat16, got Half"),
        ("x", lambda t: t.contiguous(), "x must be dense and channels_last"),
        ("x", lambda t: t[:0], "x must not be empty"),
        ("x", lambda t: t.new_zeros(t.numel() + 1)[1:].as_strided(t.shape, t.stride()), "x must begin at a multiple"),
        ("weight", lambda t: t.contiguous(), "weight must be dense and channels_last"),
        ("weight", lambda t: t.bfloat16(), "weight must have the dtype of x"),
        ("weight", lambda t: t[0], r"weight must be \[K, C, R, S\], it has 3 dimensions"),
        ("weight", lambda t: t[:, :8].contiguous(memory_format=torch.channels_last), "weight must be of 16 channels"),
        ("bias", lambda t: t.half(), "bias must be float32"),
        ("bias", lambda t: t[:8], r"bias must be \[C\] = \[24\]"),
        ("bias", lambda t: torch.zeros(25)[1:], "bias must begin at a multiple of 16 bytes"),
        ("residual", lambda t: t[:1], r"residual must be \[2, 24, 5, 7\]"),
        ("weight2", lambda t: None, "x2 and weight2 go together"),
        ("weight2", lambda t: t[:16], r"weight2 must be \[24, C2, 1, 1\]"),
        ("x2", lambda t: t[:1], "x2 must have the images of x, 2, got 1"),
        ("stride2", lambda _: 2, "x2 must have 5x7 positions, got 3x4"),
        ("stride2", lambda _: 0, "stride2 must be from 1"),
        ("stride", lambda _: [1], "stride must be two numbers, got 1"),
        ("stride", lambda _: [0, 1], "stride must be from 1"),
        ("padding", lambda _: [-1, 1], "padding must be from 0"),
        ("dilation", lambda _: [9, 9], "needs a non-empty output, got 0x0"),
    ],
)
def test_launchers_refuse_with_a_sentence(name, change, sentence):
    segment = (8, 5, 7, 1)
    call = Call(HALF, 2, 16, 5, 7, 24, (3, 3), ONE, ONE, ONE, segment, residual=True, scale=False, relu=True)
    arguments, (at, change) = list(call.arguments), replaced(name, change)
    arguments[at] = change(arguments[at])
    with pytest.raises(RuntimeError, match=f"conv_bias_act: .*{sentence}"):
        ops.conv_bias_act(*arguments)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(var=None), "mean and var go together"),
        (dict(mean=None, var=None), "bn_weight and bn_bias need mean and var"),
        (dict(mean=torch.zeros(8)), r"mean must be \[C\] = \[24\]"),
    ],
)
def test_conv_bn_act_refuses_with_a_sentence(change, sentence):
    call = Call(HALF, 2, 16, 5, 7, 24, (3, 3), ONE, ONE, ONE, None, residual=False, scale=False, relu=True)
    bn = dict(bn_weight=torch.ones(24), bn_bias=torch.ones(24), mean=torch.zeros(24), var=torch.ones(24)) | change
    with pytest.raises(RuntimeError, match=f"conv_bn_act: {sentence}"):
        ops.conv_bn_act(HALF, call.x, call.weight, *bn.values(), 1e-5, None, *map(list, call.conv), True)
