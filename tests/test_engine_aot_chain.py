"""The chained bottleneck, compiled for GPUs that are not here in every configuration that is offered for ResNet-50.

Runs tests/aot_chain.py; aot_runs.py has how.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

import aot_runs  # noqa: E402
from aot_runs import ROOT, SHARED_KIB, TENSOR_CORE  # noqa: E402

pytestmark = pytest.mark.aot

CHAIN = "_chain_fwd_kernel"
TENSOR_MEMORY_COLUMNS = 512
LAYERS = {
    *(f"layer{i}.{form}" for i in (1, 2, 3) for form in ("first_rung5", "middle_rung5", "last_rung5")),
    *(f"layer{i}.{form}" for i in (1, 2, 3, 4) for form in ("first_rung4", "middle_rung4")),
    "layer4.last_pool",
}
RUNS = aot_runs.runs(90)


def command(version: str, arch: int, few: bool) -> tuple[str, ...]:
    return version, "aot_chain.py", "--arch", str(arch), *(["--few"] if few else [])


@pytest.fixture
def lines(request) -> list[dict]:
    """What the script says of every kernel."""
    return aot_runs.lines(request)


@pytest.mark.parametrize(("version", "arch", "few"), RUNS)
def test_every_configuration_compiles_and_fits(lines, version, arch, few):
    spilled = [(i["instance"], i["config"]) for i in lines if i["spill_load"] or i["spill_store"]]
    assert not spilled
    too_large = [(i["instance"], i["config"], i["shared"]) for i in lines if i["shared"] > SHARED_KIB[arch] << 10]
    assert not too_large
    assert all(i["tensor_memory"] <= TENSOR_MEMORY_COLUMNS for i in lines)
    source = (ROOT / "fused_resnet" / "kernels" / "chain.py").read_text()
    assert {i["kernel"] for i in lines} == set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE))


@pytest.mark.parametrize(("version", "arch", "few"), RUNS)
def test_every_layer_has_a_configuration(lines, version, arch, few):
    """Also where the shared memory is small: only rung 5 of layer4 is declined, everywhere."""
    assert {i["instance"] for i in lines} >= LAYERS


@pytest.mark.parametrize(("version", "arch", "few"), RUNS)
def test_every_dot_runs_on_the_tensor_cores_and_every_copy_streams(lines, version, arch, few):
    for line in lines:
        if line["kernel"] != CHAIN:
            continue
        present = {name for name in ("hmma", "wgmma", "tcgen05") if line[name]}
        assert present == {TENSOR_CORE[arch]}, line["instance"]
        assert line["async_copy"] > 0, line["instance"]
        if "pool" not in line["instance"]:
            assert line["store"] == line["store_16_bytes"] > 0, line["instance"]
