"""conv_bias_act and stem_pool, every config offered at the shapes of ResNet-18 and -50, compiled for GPUs not here.

Runs tests/aot_conv.py under each Triton, as tests/test_triton_aot.py does its own script.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from test_triton_aot import CHIPS, SHARED_KIB, TENSOR_CORE, compiling, version  # noqa: E402, F401

pytestmark = pytest.mark.aot


_futures: dict = {}


@pytest.fixture
def lines(request, version, arch) -> list[dict]:  # noqa: F811
    """What tests/aot_conv.py says of every kernel."""
    return compiling(request, "aot_conv.py", _futures, version, arch)


@pytest.mark.parametrize(("version", "arch"), CHIPS, indirect=["version"])
def test_every_config_compiles_and_fits(lines, version, arch):  # noqa: F811
    assert not [(i["instance"], i["kernel"], i["config"]) for i in lines if i["spill_load"] or i["spill_store"]]
    assert not [(i["instance"], i["config"], i["shared"]) for i in lines if i["shared"] > SHARED_KIB[arch] << 10]
    kernels = {"_conv_bias_act_kernel", "_conv_bias_act_finish_kernel", "_stem_pool_kernel"}
    assert {i["kernel"] for i in lines} == kernels | ({"_conv_bias_act_tma_kernel"} if arch >= 90 else set())


@pytest.mark.parametrize(("version", "arch"), CHIPS, indirect=["version"])
def test_every_dot_runs_on_the_tensor_cores(lines, version, arch):  # noqa: F811
    """Of that chip, and rounded where it is TF32."""
    for line in lines:
        if line["kernel"] == "_conv_bias_act_finish_kernel":
            continue
        name = line["instance"]
        present = {kind for kind in ("hmma", "wgmma", "tcgen05") if line[kind]}
        assert present == (set() if name.endswith("_ieee") else {TENSOR_CORE[arch]}), name
        assert (line["rounded_to_tf32"] > 0) == name.endswith("_tf32"), name


@pytest.mark.parametrize(("version", "arch"), CHIPS, indirect=["version"])
def test_operands_stream(lines, version, arch):  # noqa: F811
    """By asynchronous copies or the tensor memory accelerator; results leave 16 bytes at a time, or by it."""
    for line in lines:
        if line["kernel"] == "_conv_bias_act_tma_kernel":
            assert line["tma_load"] > 0 and line["tma_store"] > 0 and line["store"] == 0, line["instance"]
        elif "_odd_" not in line["instance"]:
            assert line["store"] == line["store_16_bytes"] > 0, line["instance"]
            if line["kernel"] == "_conv_bias_act_kernel":
                assert line["async_copy"] > 0, line["instance"]
