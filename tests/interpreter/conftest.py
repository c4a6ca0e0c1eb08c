"""The Triton kernels in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreter`.

Triton reads TRITON_INTERPRET when a kernel is decorated, so these tests need a process of their own; without it this
folder collects nothing.
"""

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def nan_filled(monkeypatch):
    """Outputs and workspaces start as NaN: an element that no kernel writes cannot pass."""
    import torch

    from fused_resnet.backends import triton

    class Torch:
        """torch, with allocations that hold NaN."""

        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def empty(*args, **kwargs):
            return torch.empty(*args, **kwargs).fill_(float("nan"))

        @staticmethod
        def empty_like(*args, **kwargs):
            return torch.empty_like(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(triton, "torch", Torch())


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.interpreter)
