"""The Triton kernels, compiled for GPUs that are not here: no spill, shared memory that fits, tensor cores that work.

Runs tests/aot.py and tests/launches.py, under both Tritons; aot_runs.py has how.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")
import aot_runs  # noqa: E402
from aot_runs import ROOT, SHARED_KIB, TENSOR_CORE  # noqa: E402

pytestmark = pytest.mark.aot

CONV = "_conv_bn_act_fwd_kernel"
# Under the older Triton one chip is quick: the H100, where that is what has run.
every_chip = pytest.mark.parametrize(
    ("version", "arch"),
    [
        pytest.param(version, arch, marks=pytest.mark.slow if version == "3.6" and arch != 90 else [])
        for version in ("installed", "3.6")
        for arch in SHARED_KIB
    ],
)


def command(version: str, arch: int | None = None) -> tuple[str, ...]:
    return (version, "aot.py", "--arch", str(arch)) if arch else (version, "launches.py")


@pytest.fixture
def lines(request) -> list[dict]:
    """What the script says of every kernel."""
    return aot_runs.lines(request)


@every_chip
def test_every_kernel_compiles_and_fits(lines, version, arch):
    spilled = {i["instance"]: i["kernel"] for i in lines if i["spill_load"] or i["spill_store"]}
    assert not spilled
    too_large = {i["instance"]: i["shared"] for i in lines if i["shared"] > SHARED_KIB[arch] << 10}
    assert not too_large
    package = ROOT / "fused_resnet"
    hosts = [(package / "backends" / f"{host}.py").read_text() for host in ("triton", "triton_pool")]
    families = [family for host in hosts for family in re.findall(r"kernels import (\w+) as", host)]
    sources = [(package / "kernels" / f"{family}.py").read_text() for family in families]
    kernels = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
    assert kernels == {i["kernel"] for i in lines}, "tests/aot.py has to compile every kernel of the backend"


@every_chip
def test_every_dot_runs_on_the_tensor_cores(lines, version, arch):
    """Of that chip: a dot that fell back to an older instruction or to FMAs would be right and several times slower."""
    lines = [i for i in lines if i["kernel"] == CONV]
    expected = TENSOR_CORE[arch]
    for line in lines:
        present = {name for name in ("hmma", "wgmma", "tcgen05") if line[name]}
        assert present == (set() if line["instance"].endswith("_ieee") else {expected}), line["instance"]
    for shape in ("3x3", "1x1", "stem", "resnext"):
        for precision in ("fp16", "bf16", "tf32"):
            assert any(i["instance"].startswith(shape) and i["instance"].endswith(precision) for i in lines)


@every_chip
def test_whole_channel_blocks_are_copied_asynchronously(lines, version, arch):
    """And 16 bytes at a time at the end: what makes a channels_last convolution stream."""
    for line in lines:
        if re.match("[135]x[135]_.*_b[0-9]+_", line["instance"]):
            assert line["async_copy"] > 0, line["instance"]
            assert line["store"] == line["store_16_bytes"] > 0, line["instance"]


@every_chip
def test_rows_move_16_bytes_at_a_time(lines, version, arch):
    """Also where 8 divides the channels and 16 does not, which Triton does not find out by itself."""
    rows = ("_bn_stats_partial", "_bn_act_fwd", "_bn_act_bwd_reduce", "_bn_act_bwd_input", "_conv_bn_act_bwd_mask")
    seen = set()
    for line in lines:
        name = line["kernel"].removesuffix("_kernel")
        if name in rows and re.match("(bn|bwd_3x3)_(256|72)_", line["instance"]):
            assert line["load_16_bytes"] > 0, (line["instance"], name)
            assert name not in ("_bn_act_fwd", "_bn_act_bwd_input") or line["store"] == line["store_16_bytes"] > 0
            seen.add((name, "72" in line["instance"]))
    assert seen == {(name, narrow) for name in rows for narrow in (False, True)}


@every_chip
def test_tf32_operands_are_rounded(lines, version, arch):
    """The tensor core would cut them off, which makes all products of activations behind a ReLU too small."""
    for line in lines:
        if line["kernel"] == CONV:
            assert (line["rounded_to_tf32"] > 0) == line["instance"].endswith("_tf32"), line["instance"]


@pytest.mark.parametrize("version", ["installed", "3.6"])
def test_a_prepared_launch_is_the_one_that_triton_would_make(lines, version):
    """Argument by argument, for a second set of tensors; what skips Triton's dispatch must not skip anything else."""
    ops = {"conv_bn_act", "conv_bn_act_bwd", "bn_stats", "bn_act", "bn_act_bwd", "bn_act_bwd_input"}
    ops |= {"bn_act_conv", "bn_act_conv_bwd", "pointwise_bn_act", "pointwise_bn_act_bwd"}
    ops |= {"bn_act_pool", "bn_act_pool_bwd"}
    assert {line["op"] for line in lines} == ops
    for line in lines:
        assert line["launches"] > 0 and line["skips_the_dispatch"], line["case"]
        assert line["same"], (line["case"], line["differences"])
