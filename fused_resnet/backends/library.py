"""The compiled library: loading it, and what it was built from."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY = _PACKAGE / "libfused_resnet_ops.so"
FACTS = _PACKAGE / "_build_facts.json"


@functools.cache
def build_facts() -> dict:
    """What was built: versions, compilers, archs, kernels, why what is missing is missing. Empty if nothing was."""
    return json.loads(FACTS.read_text()) if FACTS.exists() else {}


@functools.cache
def kernels_digest() -> str | None:
    """Changes with what was compiled for GPUs, and by what; None where nothing was."""
    facts = {key: build_facts().get(key) for key in ("nvcc", "cutlass", "archs", "kernels", "conv", "chain")}
    if not build_facts().get("cuda"):
        return None
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


@functools.cache
def load() -> str | None:
    """Load the compiled ops; the reason if that fails, else None."""
    if hasattr(torch.ops.fused_resnet_cpu, "fingerprint"):
        return None  # loaded from elsewhere: a second copy could not register the same ops
    if not LIBRARY.exists():
        return build_facts().get("missing") or f"{LIBRARY.name} was not built; `pip install` builds it"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    return None


def covers(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a device: SASS within its major version, PTX on what is newer."""
    for arch in archs:
        kind, _, number = arch.partition("_")
        major, minor = divmod(int(number.rstrip("af")), 10)
        if number[-1].isalpha():
            fits = capability == (major, minor)
        elif kind == "sm":
            fits = capability[0] == major and capability[1] >= minor
        else:
            fits = capability >= (major, minor)
        if fits:
            return True
    return False


@functools.cache
def _chip(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def chip(device: torch.device) -> tuple[int, int]:
    """(compute capability times ten, multiprocessors) of a GPU."""
    return _chip(torch.cuda.current_device() if device.index is None else device.index)
