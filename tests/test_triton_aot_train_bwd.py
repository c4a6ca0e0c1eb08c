"""The kernels of bn_act_conv_bwd at the layers of ResNet-50, compiled for GPUs that are not here.

Runs tests/aot_train_bwd.py; aot_runs.py has how.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
import aot_runs  # noqa: E402
from aot_runs import SHARED_KIB, TENSOR_CORE  # noqa: E402

pytestmark = pytest.mark.aot

FEW = "^(3x3_128_stride2_fp16|1x1_64_256_tf32)$"
RUNS = aot_runs.runs(90, 80)
INPUT, WEIGHT, FINISH = (f"_bn_act_conv_bwd_{part}_kernel" for part in ("input", "weight", "weight_finish"))


def command(version: str, arch: int, few: bool) -> tuple[str, ...]:
    return version, "aot_train_bwd.py", "--arch", str(arch), *(["--only", FEW] if few else [])


@pytest.fixture
def lines(request) -> list[dict]:
    """What the script says of every kernel."""
    return aot_runs.lines(request)


@pytest.mark.parametrize(("version", "arch", "few"), RUNS)
def test_kernels_compile_and_fit(lines, version, arch, few):
    assert {line["kernel"] for line in lines} == {INPUT, WEIGHT, FINISH}
    for line in lines:
        name, kernel = line["instance"], line["kernel"]
        assert line["spill_load"] == line["spill_store"] == 0, (name, kernel)
        assert line["shared"] <= SHARED_KIB[arch] << 10, (name, kernel)
        if kernel == FINISH:
            continue
        # Of that chip: a dot that fell back to an older instruction or to FMAs would be right and far slower.
        present = {kind for kind in ("hmma", "wgmma", "tcgen05") if line[kind]}
        assert present == (set() if name.endswith("_ieee") else {TENSOR_CORE[arch]}), (name, kernel)
        assert (line["rounded_to_tf32"] > 0) == name.endswith("_tf32"), (name, kernel)
        assert line["async_copy"] > 0, (name, kernel)
        if "_odd_" not in name:
            # The input gradient stores its sums as well, of which a tile has few.
            assert line["store_16_bytes"] > 0, (name, kernel)
            assert kernel == INPUT or line["store"] == line["store_16_bytes"], (name, kernel)
            assert kernel == WEIGHT or "_plain_" in name or line["load_16_bytes"] > 0, (name, kernel)
