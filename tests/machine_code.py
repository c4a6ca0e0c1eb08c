"""The compiled library's machine code, as cuobjdump tells it."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fused_resnet.backends import cuda

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(cuda.__file__).parent.parent / "libfused_resnet_ops.so"
FACTS = cuda.build_facts()

needs_library = pytest.mark.skipif(cuda.load() is not None, reason=str(cuda.load()))
needs_kernels = pytest.mark.skipif(not FACTS.get("cuda"), reason=f"no CUDA kernels: {FACTS.get('cuda_missing')}")


def tool(name):
    """A binary tool on PATH or in Triton's wheel; skips the test without."""
    found = shutil.which(name)
    if found is None:
        triton = pytest.importorskip("triton")
        found = shutil.which(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name))
    return found or pytest.skip(f"{name} is not installed")


def run(*command, **kwargs):
    return subprocess.run(command, capture_output=True, text=True, check=True, **kwargs).stdout


@functools.cache
def whole_code(arch):
    """{demangled kernel: its SASS} in the library for an architecture."""
    text = run(tool("cuobjdump"), "-sass", "-arch", arch, str(LIBRARY))
    functions = re.split(r"Function : (\S+)", text)[1:]
    names = run(tool("c++filt"), input="\n".join(functions[::2])).split("\n")
    return dict(zip(names, functions[1::2], strict=False))


_CONVOLUTION = re.compile(
    r"(conv_(sm80|split|lines)|chain_(sm90|lines|stream)|stem|stem_weight)_kernel|conv::Sm90<|4conv4Sm90I"
)


def is_convolution(name):
    return _CONVOLUTION.search(name) is not None


@functools.cache
def resources(arch):
    """{mangled kernel: (registers, stack, shared, local)}"""
    usage = run(tool("cuobjdump"), "-res-usage", "-arch", arch, str(LIBRARY))
    rows = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    return {name: tuple(map(int, numbers)) for name, *numbers in rows}


def sass_archs():
    return [arch for arch in FACTS.get("archs", []) if arch.startswith("sm_")]
