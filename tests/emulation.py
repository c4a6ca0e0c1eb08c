"""The launchers and kernels of csrc/ on the CPU: compiled with g++ against tests/cuda_emulation, registered for CPU
tensors."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fused_resnet.backends import cuda

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "cuda_emulation"


def emulated_machine(tmp_path_factory, *sources: Path):
    """A function (multiprocessors, reversed, late_products=False) that sets up the machine on which these sources run
    from now on. reversed: threads and blocks last to first, loads and products at once; late_products: loads alone."""
    if cuda.load() is not None:
        pytest.skip(cuda.load())
    if shutil.which("g++") is None or not (ROOT / "csrc").exists():
        pytest.skip("needs g++ and the sources")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # what one process has compiled serves the others
        folder = folder.parent
    library = folder / f"libemulated_{'_'.join(source.stem for source in sources)}.so"
    with (folder / f"{library.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(sources, library)
    torch.ops.load_library(library)
    emulate = ctypes.CDLL(str(library)).emulate
    emulate.argtypes = [ctypes.c_int, ctypes.c_bool, ctypes.c_bool]
    return lambda multiprocessors, reversed, late_products=False: emulate(multiprocessors, reversed, late_products)


def _compile(sources: tuple[Path, ...], library: Path) -> None:
    torch_dir = Path(torch.__file__).parent
    renamed = ("create_device_guard", "get_current_cuda_stream")
    flags = [
        *("-std=c++17", "-O2", "-fPIC", "-w", "-fvisibility=hidden", "-DFUSED_RESNET_EMULATED"),
        *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"),
        *(f"-Daoti_torch_{name}=emulated_{name}" for name in renamed),
        *("-I", HERE / "include", "-I", HERE, "-I", ROOT / "csrc", "-isystem", torch_dir / "include"),
    ]
    whole = library.with_suffix(".part")
    link = ("-shared", "-L", torch_dir / "lib", "-Wl,--no-as-needed", "-ltorch", "-o", whole)
    subprocess.run(["g++", *flags, "-include", "emulated_ptx.h", "-x", "c++", *sources, *link], check=True)
    whole.replace(library)


@contextlib.contextmanager
def nan_filled():
    """What torch.empty gives is NaN meanwhile."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def between_nans(t, misaligned=False):
    """t, channels_last, in the middle of a buffer of NaNs."""
    return amid(torch.full((t.numel() + 80,), float("nan"), dtype=t.dtype), t, misaligned)


def amid(shelf, t, misaligned=False):
    """t, channels_last, in the middle of a buffer of 80 elements more."""
    n, c, h, w = t.shape
    start = 33 if misaligned else 32
    return shelf[start : start + t.numel()].view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


def error(got, expected):
    expected = expected.double()
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-12)).item()
