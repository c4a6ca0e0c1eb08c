"""Model by model: fused against untouched torchvision, forward (eval) and forward + backward (train)."""

import pytest

from fused_resnet import measure


@pytest.fixture(scope="module")
def models():
    return {}


def test_model(compare, models, request, name, dtype, mode, batch, variant):
    if (name, mode) not in models:
        models[name, mode] = measure.build_model(name, firm=mode == "train")
    size = request.config.getoption("--size")
    compare(name, measure.copy.deepcopy(models[name, mode]), (batch, 3, size, size), variant, mode, dtype)
