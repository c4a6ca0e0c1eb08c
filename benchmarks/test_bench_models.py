"""Model by model: fused against untouched torchvision, forward (eval) and forward + backward (train)."""

import pytest

from fused_resnet import measure


@pytest.fixture(scope="module")
def models():
    return {}


def test_model(compare, models, request, name, dtype, mode, batch, variant):
    if name not in models:
        models[name] = measure.build_model(name)
    size = request.config.getoption("--size")
    compare(name, measure.copy.deepcopy(models[name]), (batch, 3, size, size), variant, mode, dtype)
