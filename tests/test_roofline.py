"""The roofline: the floors of known networks, the kernels of each rung, and the command."""

import pytest
import torchvision

from fused_resnet.engine import roofline

RATE, BANDWIDTH, BATCH, FP16 = 800e12, 3.0e12, 128, 2
# images/s on an H100: fp16, batch 128, 224x224. Basic blocks have no 3x3 -> 1x1 to chain.
CEILINGS = {
    "resnet18": (73295, 107200, 167383, 206765, None, None, 219556, 220498),
    "resnet34": (43731, 62331, 93361, 104458, None, None, 108946, 109177),
    "resnet50": (17785, 29370, 47352, 54639, 64452, 78741, 87413, 97819),
    "resnet101": (11449, 18590, 29378, 32028, 39248, 45495, 48261, 51273),
    "resnet152": (8025, 12986, 20481, 21735, 27137, 31487, 33332, 34741),
}
RUNGS = ("ops", "pointwise", "1", "3", "4", "5", "block", "compute")
# ResNet-50, microseconds an image: stem and pool, layer1 to layer4.
STAGES = {
    "compute": (0.30, 1.67, 2.57, 3.66, 2.02),
    "ops": (3.45, 20.67, 15.72, 12.14, 4.16),
    "1": (1.30, 6.75, 5.82, 5.05, 2.11),
    "4": (0.30, 4.82, 4.29, 4.01, 2.02),
    "block": (0.30, 2.81, 2.57, 3.66, 2.02),
}


@pytest.fixture(scope="module")
def networks():
    return {name: roofline.network(torchvision.models.get_model(name)) for name in CEILINGS}


@pytest.mark.parametrize("rung, column", [(rung, i) for i, rung in enumerate(RUNGS)], ids=RUNGS)
@pytest.mark.parametrize("name", CEILINGS)
def test_ceilings_on_an_h100(networks, name, rung, column):
    expected = CEILINGS[name][column] or CEILINGS[name][RUNGS.index("3")]
    seconds = roofline.floor_s(networks[name], rung, BATCH, FP16, RATE, BANDWIDTH)
    assert round(BATCH / seconds) == expected


@pytest.mark.parametrize("rung", STAGES)
def test_microseconds_by_stage(networks, rung):
    stages = dict.fromkeys(("stem", "layer1", "layer2", "layer3", "layer4", "head"), 0.0)
    stage = "stem"
    for kernel in roofline.kernels(networks["resnet50"], rung):
        first = kernel.ops[0]
        if first.name.startswith("layer"):
            stage = first.name.split("_")[0]
        elif first.kind in ("avg_pool", "linear"):
            stage = "head"
        stages[stage] += 1e6 * kernel.floor_s(BATCH, FP16, RATE, BANDWIDTH) / BATCH
    del stages["head"]
    assert tuple(round(v, 2) for v in stages.values()) == STAGES[rung]
