"""The arithmetic of the compiled convolutions (csrc/conv/geometry.h) and their host side, on a CPU: what TMA is told,
how tiles and steps are walked, which shapes are refused and with what sentence."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fused_resnet.backends import cuda_conv, library

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def geometry(tmp_path_factory):
    if shutil.which("g++") is None or not (ROOT / "csrc").exists():
        pytest.skip("needs g++ and the sources")
    built = tmp_path_factory.mktemp("geometry") / "libgeometry.so"
    source = ROOT / "tests" / "cuda_emulation" / "implicit_gemm.cpp"
    flags = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")
    subprocess.run(["g++", *flags, "-I", ROOT / "csrc", source, "-o", built], check=True)
    loaded = ctypes.CDLL(str(built))
    loaded.tma_refuses_shape.restype = ctypes.c_char_p
    return loaded


def numbers(shape):
    return (ctypes.c_int * 17)(*shape)


def floats(t):
    """t: [A, B, C, D] as channels_last memory."""
    rows = None if t is None else t.permute(0, 2, 3, 1).contiguous()
    return rows, None if rows is None else ctypes.c_void_p(rows.data_ptr())


def check(geometry, n, c, h, w, k, kernel, stride, padding, dilation, segment, tile=(128, 64), cluster=(1, 1), split=0):
    """Against PyTorch's convolution, exactly: the values are small integers. split: a share of the steps."""
    shape = cuda_conv.shape_of((n, c, h, w), (k, c, *kernel), stride, padding, dilation, segment)
    generator = torch.Generator().manual_seed(0)

    def integers(*size):
        return torch.randint(-3, 4, size, generator=generator).float()

    x, weight, x2, weight2 = integers(n, c, h, w), integers(k, c, *kernel), None, None
    expected = F.conv2d(x.double(), weight.double(), None, stride, padding, dilation)
    if segment:
        c2, h2, w2, stride2 = segment
        x2, weight2 = integers(n, c2, h2, w2), integers(k, c2, 1, 1)
        expected = expected + F.conv2d(x2.double(), weight2.double(), None, stride2)
    kept, pointers = zip(*map(floats, (x, weight, x2, weight2)), strict=True)
    y = torch.full((n, *expected.shape[2:], k), float("nan"), dtype=torch.float64)
    steps = -(-c // 64) * kernel[0] * kernel[1] + (-(-segment[0] // 64) if segment else 0)
    got = geometry.implicit_gemm(
        numbers(shape), *tile, *cluster, int(split * steps), *pointers, ctypes.c_void_p(y.data_ptr())
    )
    assert got == steps
    assert cuda_conv.positions(shape) == y[..., 0].numel()
    assert torch.equal(y.permute(0, 3, 1, 2), expected)


ONE, TWO, ZERO = (1, 1), (2, 2), (0, 0)
CASES = {
    "3x3": (2, 64, 7, 9, 64, (3, 3), ONE, ONE, ONE, None),
    "3x3-many-images-a-tile": (9, 16, 3, 3, 24, (3, 3), ONE, ONE, ONE, None),
    "3x3-stride2-even": (3, 64, 8, 6, 40, (3, 3), TWO, ONE, ONE, None),
    "3x3-stride2-odd": (3, 72, 9, 7, 40, (3, 3), TWO, ONE, ONE, None),
    "3x3-dilated": (1, 72, 13, 11, 72, (3, 3), ONE, TWO, TWO, None),
    "3x3-two-tiles-wide": (1, 136, 14, 14, 136, (3, 3), ONE, ONE, ONE, None),
    "1x1": (5, 200, 7, 9, 72, (1, 1), ONE, ZERO, ONE, None),
    "1x1-stride2": (5, 64, 7, 9, 72, (1, 1), TWO, ZERO, ONE, None),
    "1x3": (2, 24, 5, 8, 16, (1, 3), ONE, (0, 1), ONE, None),
    "5x3-uneven": (2, 24, 15, 8, 16, (5, 3), (2, 1), (2, 0), (1, 2), None),
    "7x7-stride2": (1, 8, 23, 29, 16, (7, 7), TWO, (3, 3), ONE, None),
    "1x1-segment": (2, 64, 9, 7, 72, (1, 1), ONE, ZERO, ONE, (32, 9, 7, 1)),
    "1x1-segment-stride2-odd": (2, 64, 9, 7, 72, (1, 1), ONE, ZERO, ONE, (136, 17, 13, 2)),
    "3x3-segment-stride2": (2, 72, 6, 7, 72, (3, 3), ONE, ONE, ONE, (72, 11, 14, 2)),
    "one-position": (1, 512, 1, 1, 8, (1, 1), ONE, ZERO, ONE, None),
}


@pytest.mark.parametrize("split", [0, 0.4], ids=["whole", "split"])
@pytest.mark.parametrize(
    "tile, cluster",
    [((128, 64), (1, 1)), ((256, 128), (2, 1)), ((192, 128), (1, 2))],
    ids=["128x64", "256x128-weights-shared", "192x128-x-shared"],
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_implicit_gemm(geometry, case, tile, cluster, split):
    check(geometry, *case, tile=tile, cluster=cluster, split=split)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_implicit_gemm_at_random_shapes(geometry, data):
    def pair(low, high):
        return data.draw(st.tuples(*2 * [st.integers(low, high)]))

    (h, w), kernel, stride, padding, dilation = pair(1, 17), pair(1, 4), pair(1, 3), pair(0, 3), pair(1, 3)
    p, q = (
        (size + 2 * pad - d * (r - 1) - 1) // s + 1
        for size, r, s, pad, d in zip((h, w), kernel, stride, padding, dilation, strict=True)
    )
    assume(p > 0 and q > 0)
    segment, stride2 = None, data.draw(st.integers(1, 2))
    if data.draw(st.booleans()):
        segment = 8 * data.draw(st.integers(1, 10)), stride2 * (p - 1) + 1, stride2 * (q - 1) + 1, stride2
    n, c, k = (data.draw(st.integers(1, 5)), *(8 * data.draw(st.integers(1, 10)) for _ in range(2)))
    check(geometry, n, c, h, w, k, kernel, stride, padding, dilation, segment, split=data.draw(st.floats(0, 1)))


def convolution(**changes):
    given = dict(x_size=(2, 64, 14, 14), weight_size=(64, 64, 3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    return cuda_conv.shape_of(**given | changes)


needs_instances = pytest.mark.skipif(
    not cuda_conv.instances(), reason=f"no compiled convolutions: {library.build_facts().get('cuda_missing')}"
)


def of(arch):
    found = [i for i in cuda_conv.instances() if i.arch == arch]
    return found[0] if found else pytest.skip(f"built without convolutions for sm_{arch}")


@needs_instances
@pytest.mark.parametrize(
    "arch, shape, sentence",
    [
        (80, convolution(x_size=(2, 3, 9, 9), weight_size=(64, 3, 3, 3)), "a multiple of 8, got C = 3"),
        (80, convolution(weight_size=(30, 64, 3, 3)), "a multiple of 8, got K = 30"),
        (80, convolution(segment=(12, 14, 14, 1)), "a multiple of 8, got C2 = 12"),
        (80, convolution(segment=(16, 14, 13, 1)), "x2 must have 14x14 positions, got 14x13"),
        (80, convolution(weight_size=(64, 64, 7, 7), padding=(3, 3)), "cannot run a filter of more than 32 taps"),
        (80, convolution(x_size=(2**15, 64, 256, 257)), "at most 2147483135 output positions, got 2155872256"),
        (80, convolution(x_size=(1, 2**12, 2**10, 2**10)), "cannot run maps that fill 32 bits"),
        (80, convolution(x_size=(2, 64, 1, 1), padding=(0, 0)), "needs a non-empty output, got 0x0"),
        (80, convolution(x_size=(2, 2**16, 9, 9), weight_size=(2**14, 2**16, 3, 3)), "needs a weight of at most"),
        (90, convolution(stride=(9, 1)), "cannot run a stride above 8"),
        (90, convolution(dilation=(1, 128), padding=(1, 128)), "cannot run a filter that spans more than 256"),
        (90, convolution(padding=(129, 1)), "cannot run a padding beyond 128"),
        (90, convolution(x_size=(2, 3, 9, 9), weight_size=(64, 3, 3, 3)), "a multiple of 8, got C = 3"),
    ],
)  # fmt: skip
def test_what_is_refused(arch, shape, sentence):
    reason = cuda_conv.plan(of(arch).index, shape, 132)
    assert isinstance(reason, str) and sentence in reason


@needs_instances
def test_blocks_that_share_x_are_for_channels_that_fill_them():
    of(90)
    shared = False
    for instance in cuda_conv.instances():
        _, along_n = instance.cluster
        shared |= along_n > 1
        for tiles in (1, 2, 3, 4) if instance.general else ():
            k = tiles * instance.tile[1]
            found = cuda_conv.plan(instance.index, convolution(weight_size=(k, 64, 3, 3)), 132)
            assert isinstance(found, int) == (tiles % along_n == 0), (instance, found)
            assert isinstance(found, int) or "cannot run an odd number of tiles of output channels" in found
    assert shared == bool(library.build_facts()["cutlass"])


@needs_instances
@pytest.mark.parametrize("arch", [80, 90])
def test_what_every_resnet_asks_for_is_taken(arch):
    of(arch)
    for n in (1, 5, 128):
        for c, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
            shapes = [convolution(x_size=(n, c, size, size), weight_size=(c, c, 3, 3))]
            shapes += [convolution(x_size=(n, c, 2 * size, 2 * size), weight_size=(c, c, 3, 3), stride=(2, 2))]
            point = dict(padding=(0, 0), x_size=(n, c, size, size), weight_size=(4 * c, c, 1, 1))
            shapes += [convolution(**point), convolution(**point, segment=(2 * c, 2 * size, 2 * size, 2))]
            shapes += [
                convolution(padding=(2, 2), dilation=(2, 2), x_size=(n, c, size, size), weight_size=(c, c, 3, 3))
            ]
            for shape in shapes:
                for dtype in cuda_conv.DTYPES:
                    found = cuda_conv.candidates(shape, dtype, arch, 132)
                    assert found and all(i.dtype is dtype and i.arch == arch for i in found)
                    assert cuda_conv.declines(shape, dtype, arch, 132) is None


@needs_instances
def test_workspace_is_for_stream_k_alone():
    for instance in cuda_conv.instances():
        if instance.by_lines:
            assert cuda_conv.plan(instance.index, convolution(), 132) == 0
            continue
        size = cuda_conv.plan(instance.index, convolution(x_size=(1, 512, 7, 7), weight_size=(512, 512, 3, 3)), 132)
        assert (size > 0) == instance.splits and size < 2**26, instance


@needs_instances
def test_what_went_wrong_for_another_reason_is_not_remembered():
    from torch._subclasses import FakeTensorMode

    shape, instance = convolution(x_size=(3, 64, 15, 15)), cuda_conv.instances()[0]
    with FakeTensorMode(), pytest.raises(Exception, match="."):
        cuda_conv.plan(instance.index, shape, 132)
    assert isinstance(cuda_conv.plan(instance.index, shape, 132), int)


@needs_instances
def test_stream_k_is_not_charged_for_parts_of_tiles_where_it_does_not_divide_them():
    of(90)
    (stream_k,) = (i for i in cuda_conv.instances() if i.splits and i.dtype is torch.float16)
    pingpong = stream_k._replace(splits=False)  # the same tile in whole waves
    found = set()
    for n, c, k, kernel, size in (
        (8, 512, 2048, 1, 7),
        (1, 512, 512, 3, 7),
        (32, 256, 1024, 1, 14),
        (8, 256, 256, 3, 14),
    ):
        weight = (k, c, kernel, kernel)
        shape = convolution(x_size=(n, c, size, size), weight_size=weight, padding=(kernel // 2,) * 2)
        divides = cuda_conv.plan(stream_k.index, shape, 132) > 0
        cheaper = cuda_conv._cost(stream_k, shape, 132) < cuda_conv._cost(pingpong, shape, 132)
        assert cheaper <= divides
        found.add(divides)
    assert found == {True, False}


@needs_instances
def test_what_has_no_instance_says_so():
    assert cuda_conv.declines(convolution(), torch.float32, 90, 132) == "needs float16 or bfloat16, got torch.float32"
    assert cuda_conv.declines(convolution(), torch.float16, 75, 40) is not None
    assert cuda_conv.candidates(convolution(), torch.float16, 75, 40) == []


@needs_instances
def test_larger_problems_get_larger_tiles():
    def tile(n, c, size, arch):
        shape = convolution(x_size=(n, c, size, size), weight_size=(c, c, 3, 3))
        return cuda_conv.candidates(shape, torch.float16, arch, 132)[0].tile[:2]

    of(80)
    assert tile(128, 64, 56, 80) == (128, 64) and tile(1, 256, 14, 80) == (64, 64)
    assert tile(128, 128, 28, 80) in ((128, 128), (256, 128))
    of(90)
    assert tile(128, 64, 56, 90) == (56, 64) and tile(128, 128, 28, 90)[1] == 128  # by lines
    if library.build_facts()["cutlass"]:
        assert tile(128, 256, 14, 90) == tile(128, 512, 7, 90) == (192, 128)  # two tiles, one tile a multiprocessor


@needs_instances
def test_lines_are_for_maps_that_fill_them():
    """By what they cost: a short line takes as long as a whole one, a few lines as three each."""
    of(90)
    lines = [i for i in cuda_conv.candidates(convolution(), torch.float16, 90, 132) if i.by_lines]
    assert [i.name for i in lines] == ["sm90 lines 64 -> 64"]

    def cost(instance, n, size):
        return cuda_conv._cost(instance, convolution(x_size=(n, 64, size, size)), 132)

    tiles = next(i for i in cuda_conv.runs_on(90) if i.tile[:2] == (128, 64) and i.dtype is torch.float16)
    assert cost(lines[0], 128, 56) < 0.75 * cost(tiles, 128, 56)  # on an H100 58.5 us for 91.2
    for n, size in ((100, 8), (2, 56), (128, 28)):
        assert cost(lines[0], n, size) > cost(tiles, n, size)
    for n, size in ((100, 8), (2, 56)):
        found = cuda_conv.candidates(convolution(x_size=(n, 64, size, size)), torch.float16, 90, 132)
        assert found[0].name != lines[0].name


@needs_instances
@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((999, list(convolution()), 132), "instance must be below"),
        ((-1, list(convolution()), 132), "instance must be below"),
        ((0, [1, 2, 3], 132), "shape must be 17 numbers, got 3"),
        ((0, [0, *convolution()[1:]], 132), "shape must be from 1 to 2\\^30, got 0"),
        ((0, [2**31, *convolution()[1:]], 132), "got 2147483648"),
    ],
)
def test_bad_arguments_of_conv_plan(arguments, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        torch.ops.fused_resnet_cuda.conv_plan(*arguments)
