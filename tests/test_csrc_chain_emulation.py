"""The chained bottleneck of csrc/conv for sm_90, kernel and launcher, executed on the CPU: tests/cuda_emulation has its
barriers, the tensor memory accelerator and wgmma by the letter of the manual. Against PyTorch in float64.

Shared memory and the outputs hold NaN first; every input lies between NaNs.
"""

from __future__ import annotations

import pytest
import torch

from fused_resnet.engine import reference
from tests.emulation import HERE, ROOT, between_nans, emulated_machine, error

NEXT_64, NEXT_128, SEGMENT, BFLOAT = range(4)  # conv_instances.h
BY_LINES = 4  # the same kinds again, whose tiles are lines
STREAM, BFLOAT_STREAM = 8, 9  # of 128 channels
ops = torch.ops.fused_resnet_cuda


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """machine(multiprocessors, reversed) sets the emulated machine up."""
    return emulated_machine(tmp_path_factory, ROOT / "csrc" / "chain.cu", HERE / "emulated_chains.cpp")


@pytest.fixture(autouse=True)
def seeded(machine):
    machine(2, False)
    torch.manual_seed(0)


class Call:
    """A chain's tensors, between NaNs, and what has to come out, in float64."""

    def __init__(self, instance, n, h, w, *, residual=False, segment=None, relu=True, quarter=False):
        c, kind = 128 if instance >= STREAM else 64, instance % BY_LINES
        dtype = torch.bfloat16 if instance in (BFLOAT, BY_LINES + BFLOAT, BFLOAT_STREAM) else torch.float16
        following = 128 if instance >= STREAM or kind == NEXT_128 else 64

        def map(*size):
            return between_nans(torch.randn(size).to(dtype))

        def filter(*size):
            return between_nans((torch.randn(size) / (size[1] * size[2] * size[3]) ** 0.5).to(dtype))

        self.x, self.weight1, self.weight2 = map(n, c, h, w), filter(c, c, 3, 3), filter(4 * c, c, 1, 1)
        self.bias1, self.bias2, self.bias3 = torch.randn(c), torch.randn(4 * c), torch.randn(following)
        self.weight3, self.residual = filter(following, 4 * c, 1, 1), map(n, 4 * c, h, w) if residual else None
        self.x2 = self.projection = None
        self.instance, self.stride2, self.relu, self.quarter = instance, 1, relu, quarter
        if segment:
            h2, w2, self.stride2 = segment
            self.x2, self.projection = map(n, 64, h2, w2), filter(256, 64, 1, 1)

    def expected(self):
        def wide(*tensors):
            return [None if t is None else t.double() for t in tensors]

        x, weight1, bias1, weight2, bias2 = wide(self.x, self.weight1, self.bias1, self.weight2, self.bias2)
        residual, x2, projection = wide(self.residual, self.x2, self.projection)
        return reference.chain(
            x, weight1, bias1, weight2, bias2, residual=residual, relu=self.relu, quarter=self.quarter,
            segment=None if x2 is None else (x2, projection, self.stride2), next=wide(self.weight3, self.bias3),
        )  # fmt: skip

    def arguments(self, **changes):
        given = dict(
            instance=self.instance, x=self.x, weight1=self.weight1, bias1=self.bias1, weight2=self.weight2,
            bias2=self.bias2, residual=self.residual, x2=self.x2, projection=self.projection, stride2=self.stride2,
            weight3=self.weight3, bias3=self.bias3, relu=self.relu, quarter=self.quarter,
        )  # fmt: skip
        y, z = (torch.full(t.shape, float("nan"), dtype=self.x.dtype) for t in self.expected())
        return given | dict(y=between_nans(y), z=between_nans(z)) | changes

    def run(self):
        given = self.arguments()
        ops.chain_out(*given.values())
        return given["y"], given["z"]

    def check(self):
        for got, wanted in zip(self.run(), self.expected(), strict=True):
            # Each value is rounded once, and what it is made of was rounded once (h), z's twice (h and y).
            assert error(got, wanted) < torch.finfo(got.dtype).eps


CASES = {
    "less-than-a-tile": (NEXT_64, 1, 5, 3, dict(residual=True)),
    "images-in-a-tile": (NEXT_64, 5, 7, 9, dict(residual=True)),
    "no-shortcut": (NEXT_64, 3, 13, 11, dict(relu=False)),
    "bf16": (BFLOAT, 2, 8, 8, dict(residual=True)),
    "stage-end": (NEXT_128, 3, 13, 11, dict(residual=True, quarter=True)),
    "stage-end-even": (NEXT_128, 2, 14, 12, dict(residual=True, quarter=True)),
    "wide-next": (NEXT_128, 1, 9, 15, dict(residual=True, relu=False)),
    "segment": (SEGMENT, 2, 13, 11, dict(segment=(13, 11, 1))),
    "segment-stride2": (SEGMENT, 2, 13, 11, dict(segment=(25, 22, 2), relu=False)),
}


# Lines of more than 56 outputs are cut; some have a column or a line without a second beside it.
LINES = {
    "cut": (NEXT_64, 1, 3, 57, dict(residual=True)),
    "cut-in-three": (NEXT_64, 1, 4, 115, dict(relu=False)),
    "widest": (NEXT_64, 2, 5, 56, dict(residual=True)),
    "cut-stage-end": (NEXT_128, 1, 5, 61, dict(residual=True, quarter=True)),
    "cut-segment": (SEGMENT, 1, 2, 58, dict(segment=(2, 58, 1))),
    "a-line": (NEXT_64, 3, 1, 9, dict(residual=True)),
    "a-column": (NEXT_128, 2, 9, 1, dict(residual=True, quarter=True)),
    "a-pixel": (BFLOAT, 5, 1, 1, dict(residual=True)),
}
machines = pytest.mark.parametrize(
    "multiprocessors, backwards",
    [
        pytest.param(1, False, id="1-late"),
        pytest.param(3, True, id="3-early-backwards"),
        pytest.param(1, True, id="1-early-backwards", marks=pytest.mark.slow),
        pytest.param(3, False, id="3-late", marks=pytest.mark.slow),
    ],
)


@machines
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_chain(machine, case, multiprocessors, backwards):
    machine(multiprocessors, backwards)
    instance, n, h, w, options = case
    Call(instance, n, h, w, **options).check()


@machines
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in CASES.items()]
    + [pytest.param(case, id=name) for name, case in LINES.items()],
)
def test_chain_by_lines(machine, case, multiprocessors, backwards):
    machine(multiprocessors, backwards)
    instance, n, h, w, options = case
    Call(BY_LINES + instance, n, h, w, **options).check()


# Two lines a group, four a step; none wider than 28.
STREAMS = {
    "less-than-a-tile": (STREAM, 1, 3, 5, dict(residual=True)),
    "whole-steps": (STREAM, 2, 8, 28, dict(residual=True)),
    "a-line-too-many": (STREAM, 2, 9, 7, dict(relu=False)),
    "three-lines-too-many": (BFLOAT_STREAM, 1, 7, 11, dict(residual=True)),
    "cut": (STREAM, 1, 6, 29, dict(residual=True)),
    "a-pixel": (BFLOAT_STREAM, 5, 1, 1, dict(residual=True)),
}


@machines
@pytest.mark.parametrize("case", STREAMS.values(), ids=STREAMS)
def test_chain_of_128(machine, case, multiprocessors, backwards):
    machine(multiprocessors, backwards)
    instance, n, h, w, options = case
    Call(instance, n, h, w, **options).check()


@pytest.mark.parametrize(
    "instance, options",
    [
        pytest.param(NEXT_128, dict(residual=True), marks=pytest.mark.slow),
        (BY_LINES + NEXT_128, dict(residual=True)),
        pytest.param(SEGMENT, dict(segment=(13, 11, 1)), marks=pytest.mark.slow),
        pytest.param(BY_LINES + SEGMENT, dict(segment=(13, 11, 1)), marks=pytest.mark.slow),
        (STREAM, dict(residual=True)),
    ],
)
def test_the_order_of_threads_and_loads_changes_no_bit(machine, instance, options):
    """No barrier and no wait is missing: what is asynchronous happens at the last moment, then at once, then loads at
    once and products late."""
    call, results = Call(instance, 2, 13, 11, **options), []
    for order in ((False,), (True,), (True, True)):
        machine(1, *order)
        results.append(call.run())
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


@pytest.mark.parametrize(
    "instance",
    [*(pytest.param(i, marks=pytest.mark.slow) for i in (NEXT_64, BY_LINES + NEXT_128)), BY_LINES + NEXT_64, STREAM],
)
def test_y_may_be_the_residuals_own_memory(instance):
    call = Call(instance, 3, 7, 9, residual=True)
    y, z = call.run()
    given = call.arguments()
    given["y"] = given["residual"]
    ops.chain_out(*given.values())
    assert torch.equal(given["y"], y) and torch.equal(given["z"], z)


@pytest.mark.parametrize(
    "backwards", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["late", "early-backwards"]
)
@pytest.mark.parametrize(
    "instance",
    [
        *(pytest.param(i, marks=pytest.mark.slow) for i in (NEXT_128, SEGMENT, BY_LINES + SEGMENT, STREAM)),
        BY_LINES + NEXT_128,
    ],
)
def test_weights_may_come_before_the_kernel_before_has_ended(machine, instance, backwards):
    """And nothing else: the emulation fails if x is read."""
    machine(2, backwards)
    of_shortcut = dict(segment=(7, 9, 1)) if instance % BY_LINES == SEGMENT else dict(residual=True)
    call = Call(instance, 3, 7, 9, **of_shortcut)
    given = call.arguments()
    ops.chain_out(*given.values(), constant_weights=True)
    assert torch.equal(given["y"], call.run()[0]) and torch.equal(given["z"], call.run()[1])


@pytest.mark.parametrize("instance", [NEXT_128, BY_LINES + NEXT_128, STREAM])
def test_outputs_leave_what_lies_around_them_alone(instance):
    call = Call(instance, 1, 7, 9, residual=True, quarter=instance != STREAM)
    given = call.arguments()
    shelves = {}
    for name in ("y", "z"):
        n, k, p, q = given[name].shape
        shelves[name] = torch.full((given[name].numel() + 2048,), 7.0, dtype=torch.float16)
        given[name] = shelves[name][1024:-1024].view(n, p, q, k).permute(0, 3, 1, 2).fill_(float("nan"))
    ops.chain_out(*given.values())
    for name, expected in zip(("y", "z"), call.run(), strict=True):
        assert torch.equal(given[name], expected)
        assert (shelves[name][:1024] == 7).all() and (shelves[name][-1024:] == 7).all()


@pytest.mark.parametrize("instance", [NEXT_64, BY_LINES + NEXT_64, STREAM])
def test_nan_goes_through(instance):
    call = Call(instance, 1, 7, 9, residual=True)
    call.residual[0, 5, 3, 3] = float("nan")
    y, z = call.run()
    assert y.isnan().sum() == 1 and y[0, 5, 3, 3].isnan()
    assert z[0, :, 3, 3].isnan().all() and z.isnan().sum() == z.shape[1]


@pytest.mark.parametrize(
    "instance, changes, sentence",
    [
        (NEXT_64, dict(instance=99), "instance must be below 10, got 99"),
        (NEXT_64, dict(instance=BFLOAT), "kBfloatChain64 needs x in BFloat16, got Half"),
        (NEXT_64, dict(x=torch.zeros(1, 32, 5, 3).half()), r"x must be \[N, 64, H, W\]"),
        (NEXT_64, dict(weight1=torch.zeros(64, 64, 1, 1).half()), r"weight1 must be \[64, 64, 3, 3\]"),
        (NEXT_64, dict(weight3=torch.zeros(128, 256, 1, 1).half()), r"weight3 must be \[64, 256, 1, 1\]"),
        (NEXT_64, dict(weight3=None), "kHalfChain64 needs weight3, bias3 and z"),
        (NEXT_64, dict(bias1=torch.zeros(65)[1:]), "bias1 must begin at a multiple of 16 bytes"),
        (NEXT_64, dict(bias2=torch.zeros(256).half()), "bias2 must be float32"),
        (NEXT_64, dict(residual=torch.zeros(1, 256, 4, 3).half()), "residual must be"),
        (NEXT_64, dict(x2=torch.zeros(1, 64, 5, 3).half()), "kHalfChain64 takes no x2 or projection"),
        (NEXT_64, dict(quarter=True), r"y must be \[1, 256, 3, 2\]"),
        (STREAM, dict(x=torch.zeros(1, 64, 5, 3).half()), r"x must be \[N, 128, H, W\]"),
        (STREAM, dict(quarter=True), "kHalfStream stores all of y"),
        (SEGMENT, dict(x2=None), "kHalfChainSegment needs x2 and projection"),
        (SEGMENT, dict(stride2=2), "x2 must have 5x3 positions, got 3x2"),
    ],
)
def test_the_launcher_refuses_with_a_sentence(instance, changes, sentence):
    call = Call(instance, 1, 5, 3, segment=(5, 3, 1) if instance == SEGMENT else None)
    changes = {
        k: v.contiguous(memory_format=torch.channels_last) if isinstance(v, torch.Tensor) and v.dim() == 4 else v
        for k, v in changes.items()
    }
    with pytest.raises(RuntimeError, match=f"chain: {sentence}"):
        ops.chain_out(*call.arguments(**changes).values())
