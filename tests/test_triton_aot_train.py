"""The kernels that train without storing a normalised tensor, compiled for GPUs not here.

Runs tests/aot_train.py; aot_runs.py has how.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")
import aot_runs  # noqa: E402
from aot_runs import ROOT, SHARED_KIB, TENSOR_CORE  # noqa: E402

pytestmark = pytest.mark.aot
RUNS = aot_runs.runs(80, 90)
DOTS = {"_bn_act_conv_fwd_kernel", "_gram_partial_kernel", "_pointwise_bwd_input_kernel"}


def command(version: str, arch: int, few: bool) -> tuple[str, ...]:
    return version, "aot_train.py", "--arch", str(arch), *(["--few"] if few else [])


@pytest.fixture
def lines(request) -> list[dict]:
    """What the script says of every kernel."""
    return aot_runs.lines(request)


@pytest.mark.parametrize(("version", "arch", "few"), RUNS)
def test_every_kernel_compiles_and_fits(lines, version, arch, few):
    assert not [(i["instance"], i["kernel"]) for i in lines if i["spill_load"] or i["spill_store"]]
    assert not [(i["instance"], i["shared"]) for i in lines if i["shared"] > SHARED_KIB[arch] << 10]
    sources = [
        (ROOT / "fused_resnet" / "kernels" / f"{name}.py").read_text() for name in ("bn_act_conv", "gram", "pointwise")
    ]
    kernels = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
    assert kernels | {"_bn_stats_merge_kernel"} == {i["kernel"] for i in lines}


@pytest.mark.parametrize(("version", "arch", "few"), RUNS)
def test_every_dot_runs_on_the_tensor_cores(lines, version, arch, few):
    """Of that chip, and rounded where it is TF32."""
    for line in lines:
        if line["kernel"] in DOTS:
            name = line["instance"]
            present = {kind for kind in ("hmma", "wgmma", "tcgen05") if line[kind]}
            # Of one channel a tile has 16 rows; the newer instructions take 64.
            kind = "hmma" if name.startswith("gram_1_") else TENSOR_CORE[arch]
            assert present == (set() if name.endswith("_ieee") else {kind}), name
            assert (line["rounded_to_tf32"] > 0) == name.endswith("_tf32"), name


@pytest.mark.parametrize(("version", "arch", "few"), RUNS)
def test_operands_stream(lines, version, arch, few):
    """Asynchronously, normalised or not; a convolution's result leaves 16 bytes at a time."""
    for line in lines:
        if line["kernel"] in DOTS and not re.search("_odd_|stem", line["instance"]):
            assert line["async_copy"] > 0, line["instance"]
            assert line["store_16_bytes"] > 0, line["instance"]
