"""Device, backend and seed of every test.

FUSED_RESNET_TEST_DEVICE=cpu|cuda keeps to one device; else a test that asks for `device` runs on each one there is.
"""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(int(os.environ.get("FUSED_RESNET_TEST_THREADS", "1")))


def devices() -> list[str]:
    if only := os.environ.get("FUSED_RESNET_TEST_DEVICE"):
        return [only]
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_generate_tests(metafunc):
    """`device`: the devices of this machine; `backend`: with its device, every backend that can run on it."""
    if "backend" in metafunc.fixturenames:
        from fused_resnet.backends import BACKENDS, ORDER

        pairs = [
            pytest.param(name, device, id=f"{name}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
            for device in devices()
            for name in [*(b.NAME for b in ORDER[device]), "reference"]
            if BACKENDS[name].unavailable() is None
        ]
        metafunc.parametrize("backend, device", pairs)
    elif "device" in metafunc.fixturenames:
        marks = {"cuda": [pytest.mark.gpu]}
        metafunc.parametrize("device", [pytest.param(d, marks=marks.get(d, [])) for d in devices()])


@pytest.fixture(autouse=True, scope="session")
def nothing_tuned_before(tmp_path_factory):
    """What was tuned on this machine has no say in tests, nor they in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_RESNET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Tests put other backends and reasons in place of the real ones: what an earlier test made ready is forgotten."""
    from fused_resnet import backends

    backends._ready.clear()
    backends._winners.clear()


@pytest.fixture(autouse=True)
def exact_float32():
    """float32 is float32: no TF32, and cuDNN deterministic, so that an error has one cause."""
    cudnn, tf32 = torch.backends.cudnn, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = tf32
