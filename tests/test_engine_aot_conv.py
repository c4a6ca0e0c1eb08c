"""conv_bias_act, grouped as well, and stem_pool: every config offered for ResNets and their kin, compiled for GPUs.

Runs tests/aot_conv.py; aot_runs.py has how.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
import aot_runs  # noqa: E402
from aot_runs import SHARED_KIB, TENSOR_CORE  # noqa: E402

pytestmark = pytest.mark.aot
RUNS = aot_runs.runs(90)


def command(version: str, arch: int, few: bool) -> tuple[str, ...]:
    return version, "aot_conv.py", "--arch", str(arch), *(["--few"] if few else [])


@pytest.fixture
def lines(request) -> list[dict]:
    """What the script says of every kernel."""
    return aot_runs.lines(request)


@pytest.mark.parametrize(("version", "arch", "few"), RUNS)
def test_every_config_compiles_and_fits(lines, version, arch, few):
    assert not [(i["instance"], i["kernel"], i["config"]) for i in lines if i["spill_load"] or i["spill_store"]]
    assert not [(i["instance"], i["config"], i["shared"]) for i in lines if i["shared"] > SHARED_KIB[arch] << 10]
    names = (
        "_conv_bias_act_kernel",
        "_conv_bias_act_finish_kernel",
        "_conv_bias_act_grouped_kernel",
        "_stem_pool_kernel",
    )
    kernels = set(names)
    assert {i["kernel"] for i in lines} == kernels | ({"_conv_bias_act_tma_kernel"} if arch >= 90 else set())


@pytest.mark.parametrize(("version", "arch", "few"), RUNS)
def test_every_dot_runs_on_the_tensor_cores(lines, version, arch, few):
    """Of that chip, and rounded where it is TF32."""
    for line in lines:
        if line["kernel"] == "_conv_bias_act_finish_kernel":
            continue
        name = line["instance"]
        present = {kind for kind in ("hmma", "wgmma", "tcgen05") if line[kind]}
        assert present == (set() if name.endswith("_ieee") else {TENSOR_CORE[arch]}), name
        assert (line["rounded_to_tf32"] > 0) == name.endswith("_tf32"), name


@pytest.mark.parametrize(("version", "arch", "few"), RUNS)
def test_operands_stream(lines, version, arch, few):
    """By asynchronous copies or the tensor memory accelerator; results leave 16 bytes at a time, or by it."""
    for line in lines:
        if line["kernel"] == "_conv_bias_act_tma_kernel":
            assert line["tma_load"] > 0 and line["tma_store"] > 0 and line["store"] == 0, line["instance"]
        elif "_odd_" not in line["instance"]:
            assert line["store"] == line["store_16_bytes"] > 0, line["instance"]
            if line["kernel"] == "_conv_bias_act_kernel":
                assert line["async_copy"] > 0, line["instance"]
            if line["kernel"] == "_conv_bias_act_grouped_kernel":  # of one stage: by loads that the first cache serves
                assert (line["async_copy"] > 0) == (line["stages"] > 1), line["instance"]
