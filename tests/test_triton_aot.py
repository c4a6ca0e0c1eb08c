"""The Triton kernels, compiled for GPUs that are not here: no spill, shared memory that fits, tensor cores that work.

Runs tests/aot.py and tests/launches.py in processes of their own, under the installed Triton and, if it is there, the
one in FUSED_RESNET_TRITON36 (.cache/triton-3.6 by default), made by `pip install --no-deps --target DIR triton==3.6.0`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.aot

ROOT = Path(__file__).resolve().parents[1]
TRITON_36 = Path(os.environ.get("FUSED_RESNET_TRITON36", ROOT / ".cache" / "triton-3.6"))
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}
TENSOR_CORE = {80: "hmma", 89: "hmma", 90: "wgmma", 100: "tcgen05"}
CONV = "_conv_bn_act_fwd_kernel"
# Of the engine's kernels, many, each in many configurations: one chip under one Triton, all others with the slow tests.
CHIPS = [
    pytest.param(v, a, marks=[] if (v, a) == ("installed", 90) else pytest.mark.slow, id=f"{v}-{a}")
    for v in ("installed", "3.6")
    for a in SHARED_KIB
]


@functools.cache
def compiled(version: str, arch: int) -> list[dict]:
    """What tests/aot.py says of every kernel on sm_<arch>."""
    return runs()[version, arch].result()


@functools.cache
def runs() -> dict[tuple[str, int], Future]:
    """One for every Triton and chip, as many at once as MAX_JOBS says: ptxas keeps one core busy."""
    pool = ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count()))
    versions = ["installed", *(["3.6"] if (TRITON_36 / "triton").is_dir() else [])]
    return {(v, a): pool.submit(told, v, "aot.py", "--arch", str(a)) for v in versions for a in SHARED_KIB}


def told(version: str, script: str, *options: str) -> list[dict]:
    """The lines that a script in tests/ prints under this Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if version == "3.6":
        environment["PYTHONPATH"] = str(TRITON_36)
    command = [sys.executable, str(ROOT / "tests" / script), *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    if version == "3.6":
        assert all(line["triton"].startswith("3.6.") for line in lines)
    return lines


@pytest.fixture(params=["installed", "3.6"])
def version(request) -> str:
    if request.param == "3.6" and not (TRITON_36 / "triton").is_dir():
        pytest.skip(f"no Triton 3.6 in {TRITON_36}")
    return request.param


def compiling(request, script: str, futures: dict[tuple[str, int], Future], version: str, arch: int) -> list[dict]:
    """What a script says of its kernels on sm_<arch>; what other tests of the module want is begun as well."""
    if not futures:
        pool = ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count()))
        here = [item for item in request.session.items if item.module is request.module]
        wanted = dict.fromkeys((i.callspec.params["version"], i.callspec.params["arch"]) for i in here)
        for v, a in wanted:
            if v == "installed" or (TRITON_36 / "triton").is_dir():
                futures[v, a] = pool.submit(told, v, script, "--arch", str(a))
    return futures[version, arch].result()


@pytest.mark.parametrize("arch", SHARED_KIB)
def test_every_kernel_compiles_and_fits(version, arch):
    lines = compiled(version, arch)
    spilled = {i["instance"]: i["kernel"] for i in lines if i["spill_load"] or i["spill_store"]}
    assert not spilled
    too_large = {i["instance"]: i["shared"] for i in lines if i["shared"] > SHARED_KIB[arch] << 10}
    assert not too_large
    package = ROOT / "fused_resnet"
    families = re.findall(r"kernels import (\w+) as", (package / "backends" / "triton.py").read_text())
    sources = [(package / "kernels" / f"{family}.py").read_text() for family in families]
    kernels = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
    assert kernels == {i["kernel"] for i in lines}, "tests/aot.py has to compile every kernel of the backend"


@pytest.mark.parametrize("arch", SHARED_KIB)
def test_every_dot_runs_on_the_tensor_cores(version, arch):
    """Of that chip: a dot that fell back to an older instruction or to FMAs would be right and several times slower."""
    lines = [i for i in compiled(version, arch) if i["kernel"] == CONV]
    expected = TENSOR_CORE[arch]
    for line in lines:
        present = {name for name in ("hmma", "wgmma", "tcgen05") if line[name]}
        assert present == (set() if line["instance"].endswith("_ieee") else {expected}), line["instance"]
    for shape in ("3x3", "1x1", "stem", "resnext"):
        for precision in ("fp16", "bf16", "tf32"):
            assert any(i["instance"].startswith(shape) and i["instance"].endswith(precision) for i in lines)


@pytest.mark.parametrize("arch", SHARED_KIB)
def test_whole_channel_blocks_are_copied_asynchronously(version, arch):
    """And 16 bytes at a time at the end: what makes a channels_last convolution stream."""
    for line in compiled(version, arch):
        if re.match("[135]x[135]_.*_b[0-9]+_", line["instance"]):
            assert line["async_copy"] > 0, line["instance"]
            assert line["store"] == line["store_16_bytes"] > 0, line["instance"]


@pytest.mark.parametrize("arch", SHARED_KIB)
def test_rows_move_16_bytes_at_a_time(version, arch):
    """Also where 8 divides the channels and 16 does not, which Triton does not find out by itself."""
    rows = ("_bn_stats_partial", "_bn_act_fwd", "_bn_act_bwd_reduce", "_bn_act_bwd_input", "_conv_bn_act_bwd_mask")
    seen = set()
    for line in compiled(version, arch):
        name = line["kernel"].removesuffix("_kernel")
        if name in rows and re.match("(bn|bwd_3x3)_(256|72)_", line["instance"]):
            assert line["load_16_bytes"] > 0, (line["instance"], name)
            assert name not in ("_bn_act_fwd", "_bn_act_bwd_input") or line["store"] == line["store_16_bytes"] > 0
            seen.add((name, "72" in line["instance"]))
    assert seen == {(name, narrow) for name in rows for narrow in (False, True)}


@pytest.mark.parametrize("arch", SHARED_KIB)
def test_tf32_operands_are_rounded(version, arch):
    """The tensor core would cut them off, which makes all products of activations behind a ReLU too small."""
    for line in compiled(version, arch):
        if line["kernel"] == CONV:
            assert (line["rounded_to_tf32"] > 0) == line["instance"].endswith("_tf32"), line["instance"]


def test_a_prepared_launch_is_the_one_that_triton_would_make(version):
    """Argument by argument, for a second set of tensors; what skips Triton's dispatch must not skip anything else."""
    lines = told(version, "launches.py")
    ops = {"conv_bn_act", "conv_bn_act_bwd", "bn_stats", "bn_act", "bn_act_bwd", "bn_act_bwd_input"}
    assert {line["op"] for line in lines} == ops
    for line in lines:
        assert line["launches"] > 0 and line["skips_the_dispatch"], line["case"]
        assert line["same"], (line["case"], line["differences"])
