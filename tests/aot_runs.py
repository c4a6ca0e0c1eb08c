"""The scripts tests/aot*.py in processes of their own, under the installed Triton and, if it is there, the one in
FUSED_RESNET_TRITON36 (.cache/triton-3.6 by default), made by `pip install --no-deps --target DIR triton==3.6.0`.

A module says which script its tests want: command(**parameters of a test) gives (Triton, script, *options).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRITON_36 = Path(os.environ.get("FUSED_RESNET_TRITON36", ROOT / ".cache" / "triton-3.6"))
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}
TENSOR_CORE = {80: "hmma", 89: "hmma", 90: "wgmma", 100: "tcgen05"}


def runs(*few: int) -> list:
    """(version, arch, few) for parametrize: a few kernels for these chips under the installed Triton; all of them for
    every chip under every Triton go with the slow tests."""
    return [pytest.param("installed", arch, True, id=f"few-{arch}") for arch in few] + [
        pytest.param(version, arch, False, marks=pytest.mark.slow, id=f"{version}-{arch}")
        for version in ("installed", "3.6")
        for arch in SHARED_KIB
    ]


def missing(version: str) -> bool:
    return version == "3.6" and not (TRITON_36 / "triton").is_dir()


def told(version: str, script: str, *options: str) -> list[dict]:
    """The lines that a script in tests/ prints under this Triton."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if version == "3.6":
        environment["PYTHONPATH"] = str(TRITON_36)
    command = [sys.executable, str(ROOT / "tests" / script), *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    if version == "3.6":
        assert all(line["triton"].startswith("3.6.") for line in lines)
    return lines


@functools.cache
def pool() -> ThreadPoolExecutor:
    """As many runs at once as MAX_JOBS says: ptxas keeps one core busy."""
    return ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count()))


@functools.cache
def begun(version: str, script: str, *options: str) -> Future:
    return pool().submit(told, version, script, *options)


def lines(request) -> list[dict]:
    """What a test's script says; whatever other tests of this session want is begun as well, so that no core waits."""

    def wanted(item):
        return item.module.command(**item.callspec.params)

    if missing(wanted(request.node)[0]):
        pytest.skip(f"no Triton 3.6 in {TRITON_36}")
    for item in request.session.items:
        if hasattr(item.module, "command") and not missing(wanted(item)[0]):
            begun(*wanted(item))
    return begun(*wanted(request.node)).result()
