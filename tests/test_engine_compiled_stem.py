"""The compiled stem as a candidate of the engine, its launches replaced: there is no GPU here."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from fused_resnet.backends import library
from fused_resnet.engine import cache, cases, compiled_stem, gpu, reference
from fused_resnet.engine.eager import EagerExecutor
from fused_resnet.engine.graph import capture, propagate
from fused_resnet.engine.guard import Verifier
from fused_resnet.engine.pieces import Pieces
from fused_resnet.engine.problem import Candidate, candidates_digest
from fused_resnet.engine.steps import match
from fused_resnet.engine.tune import Result, Results

ARGS = cases.StemArgs(
    n=128, h=224, w=224, k=64, channels_last=False, input_dtype="float16", device="cpu", dtype="float16", tf32=False
)
SHAPE = (128, 3, 224, 224)
compiled = library.load() is None and bool(library.build_facts().get("cuda"))
needs_kernel = pytest.mark.skipif(not compiled, reason=f"{library.build_facts().get('cuda_missing')}")


def rows(shape=SHAPE, dtype=torch.float16, arch=90, sms=132, k=64, **more):
    return [c["rows"] for c in compiled_stem.configs(shape, dtype, arch, sms, k, **more)]


@needs_kernel
@pytest.mark.parametrize("kernel", ["compiled_stem.launch({'rows': 1}, x, x, x, x)", "compiled_pool.launch(x, x)"])
def test_a_process_that_is_handed_a_candidate_has_its_kernel(kernel):
    """As the tuner's child is: it never asks which candidates there are."""
    code = f"import torch\nfrom fused_resnet.engine import compiled_pool, compiled_stem\nx = torch.ones(1)\n{kernel}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "with arguments from the 'CPU' backend" in found.stderr, found.stderr


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 120])
def test_it_is_there_from_sm_80_on(arch, dtype):
    assert compiled_stem.declines(SHAPE, dtype, arch) is None and len(rows(dtype=dtype, arch=arch)) == 3


@needs_kernel
@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(arch=75), "needs compute capability 8.0 or newer, got 7.5"),
        (dict(dtype=torch.float32), "needs float16 or bfloat16, got torch.float32"),
        (dict(input_dtype=torch.float32), "needs x in torch.float16, got torch.float32"),
        (dict(shape=(1, 4, 224, 224)), "needs 3 input channels, got 4"),
        (dict(shape=(0, 3, 224, 224)), "needs a non-empty input"),
        (dict(k=96), "needs a multiple of 64 output channels, got 96"),
        (dict(shape=(1, 3, 224, 225)), "needs an even width, got 225"),
        (dict(shape=(1, 3, 2**15, 2**15)), r"needs images of less than 2\^31 elements"),
    ],
    ids=["old", "float32", "float32-input", "4-channels", "empty", "96-filters", "odd-width", "large"],
)
def test_it_declines_with_a_sentence(changes, sentence):
    given = dict(shape=SHAPE, dtype=torch.float16, arch=90, k=64) | changes
    assert re.match(sentence, compiled_stem.declines(**given))
    assert rows(**changes) == []


def test_it_declines_where_it_was_not_compiled(monkeypatch):
    monkeypatch.setattr(compiled_stem.library, "load", lambda: "libfused_resnet_ops.so was not built")
    assert compiled_stem.declines(SHAPE, torch.float16, 90) == "was not compiled"
    monkeypatch.setattr(compiled_stem.library, "load", lambda: None)
    monkeypatch.setattr(compiled_stem.library, "build_facts", lambda: {"archs": ["sm_90a"]})
    if compiled:
        assert compiled_stem.declines(SHAPE, torch.float16, 80) == "was not compiled for sm_80"


@needs_kernel
@pytest.mark.parametrize(
    "shape, expected",
    [
        (SHAPE, [28, 14, 7]),  # 256, 512 and 1024 blocks for the 264 that an H100 holds
        ((1, 3, 224, 224), [1, 2, 4]),
        ((32, 3, 224, 224), [7, 4, 2]),
        ((2, 3, 19, 38), [1, 2, 4]),
        ((1, 3, 1, 2), [1]),
    ],
)
def test_the_blocks_fill_the_chip(shape, expected):
    assert rows(shape) == expected


@needs_kernel
def test_it_stands_behind_the_others_and_on_a_gpu_only():
    case = cases.StemCase(ARGS)
    assert not any(c.backend == "cuda" for c in case.candidates())
    case.device, case.arch, case.sms = torch.device("cuda", 0), 90, 132
    found = case.candidates()
    backends = [c.backend for c in found]
    assert found[0] is cases.CUDNN and backends == sorted(backends, key=["cudnn", "triton", "cuda"].index)
    assert backends.count("cuda") == 3 and len({c.id for c in found}) == len(found)
    assert not any(case.compiles(c) for c in found if c.backend == "cuda")


def unpacked(weight):
    """compiled_stem.pack undone."""
    lines = weight.reshape(-1, 2, 4, 4, 2, 224).transpose(2, 3).reshape(-1, 7, 8, 4)
    assert not lines[:, :, 0].any() and not lines[..., 3].any()
    return lines[:, :, 1:, :3].permute(0, 3, 1, 2)


def launch(config, x, weight, bias, out):
    assert out.is_contiguous(memory_format=torch.channels_last) and x.dtype is weight.dtype
    out.copy_(reference.stem_pool(x, unpacked(weight), bias))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("right", [True, False])
def test_the_verifier_judges_it_like_all_others(right, channels_last, monkeypatch):
    def run(config, x, weight, bias, out):
        assert config == {"rows": 4}
        launch(config, x, weight, bias, out)
        if not right:
            out.mul_(1.01)

    monkeypatch.setattr(compiled_stem, "launch", run)
    case = cases.StemCase(replace(ARGS, n=2, h=19, w=38, channels_last=channels_last))
    objection = Verifier(case, torch.device("cpu"), 0).objection(Candidate("cuda", "x", {"rows": 4}))
    assert (objection is None) == right


@pytest.mark.parametrize("offset", [0, 1])
def test_a_program_launches_it(offset, monkeypatch):
    """Weights packed once and refreshed, y in its place; x at a multiple of four bytes wherever the caller's lies."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)).eval().half()
    x = torch.randn(2 * 3 * 19 * 38 + offset).half()[offset:].view(2, 3, 19, 38)
    launched = []

    def run(config, x, weight, bias, out):
        assert x.data_ptr() % 4 == 0
        launched.append((config, weight.data_ptr()))
        launch(config, x, weight, bias, out)

    monkeypatch.setattr(compiled_stem, "launch", run)
    graph = capture(model)
    propagate(graph, (x,))
    network = match(graph)
    executor = EagerExecutor(model, torch.float16)
    pieces = [*Pieces(network, torch.float16, x.device, False, gpu.named(network, (x,))).all()]
    chosen = Candidate("cuda", "sm80 stem 2 rows", {"rows": 2})
    results = Results({p.key: Result(p.key, chosen, "measured", True) for p in pieces})
    program = gpu.Program(network, pieces, results, gpu.Packed(executor.eager), executor.eager, x.device)
    assert program.is_ours and [(g.backend, g.config) for g in program.groups()] == [("cuda", "sm80 stem 2 rows")]
    for _ in range(2):
        y, expected = program.run((x,)), model.float()(x.float())
        model.half()
        assert ((y.float() - expected).norm() / expected.norm()).item() < 2e-3
    assert [config for config, _ in launched] == [{"rows": 2}] * 2 and len(set(launched[i][1] for i in range(2))) == 1


@needs_kernel
def test_the_packages_tables_are_of_the_candidates_before_it(monkeypatch):
    """Their stems were chosen among others: what was chosen may serve, and a full tuning measures again."""
    monkeypatch.setattr(cases, "triton_unavailable", lambda: None)
    tables = [cache.read(path, pytest.fail)[1] for path in sorted(cache.TABLES.glob("nvidia-h100*.json"))]
    stems = {key: entry for entries in tables for key, entry in entries.items() if key.startswith("stem ")}
    assert stems
    for n, layout in ((1, False), (128, True)):
        case = cases.StemCase(replace(ARGS, n=n, channels_last=layout))
        case.device, case.arch, case.sms = torch.device("cuda", 0), 90, 132
        key = replace(ARGS, n=n, channels_last=layout, device="cuda").problem().id
        entry, found = stems[key], case.candidates()
        assert Candidate(**entry["chosen"]).id in {c.id for c in found}
        if not any(t["candidate"]["backend"] == "cuda" for t in entry["trials"]):
            assert entry["candidates"] != candidates_digest(found)
