"""What is installed, which backend would run which op, and why not the others: data for `doctor` and for benchmarks."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import fused_resnet

from . import backends
from .backends import composed, cuda, cuda_conv, pooled, stem_conv

VARIABLES = {
    "FUSED_RESNET_BACKEND": "forces a backend: cuda, triton, cudnn, cpu or reference",
    "FUSED_RESNET_HOST_CODE": "run: host code runs at every call, none is written down",
    "FUSED_RESNET_CUDA": "read when the package is built: auto, 0 (no CUDA kernels) or 1 (fail without them)",
    "FUSED_RESNET_CUDA_ARCHS": "read when the package is built: the GPU architectures, by default 80;90a",
    "FUSED_RESNET_CUTLASS": "read when the package is built: where CUTLASS's include/ is, if not in nvidia-cutlass",
    "TRITON_INTERPRET": "1 runs Triton's kernels in its interpreter, on a CPU",
    "CUDA_VISIBLE_DEVICES": "which GPUs PyTorch sees",
    "OMP_NUM_THREADS": "threads of PyTorch's CPU kernels",
}
OPS = (
    "conv_bn_act",
    "conv_bn_act_bwd",
    "bn_stats",
    "bn_act",
    "bn_act_bwd",
    "bn_act_bwd_input",
    *composed.OPS,
    *pooled.OPS,
    *stem_conv.OPS,
)


def environment() -> dict:
    """What a speed figure depends on and the machine can tell, as JSON-able data that names no host and no path."""
    found = {
        "fused_resnet": fused_resnet.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": str(torch.__version__),
        "torchvision": _version("torchvision"),
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": _dotted(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None,
        "nvcc": _nvcc(),
        "driver": _driver(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpus": [],
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found["gpus"].append(
                {
                    "name": p.name,
                    "capability": f"{p.major}.{p.minor}",
                    "memory_gib": round(p.total_memory / 2**30, 1),
                    "multiprocessors": p.multi_processor_count,
                }
            )
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _dotted(cudnn: int) -> str:
    return f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"


def _says(pattern: str, *command: str) -> str | None:
    """What a program prints that matches, or None: not installed, failed, or silent."""
    if shutil.which(command[0]) is None:
        return None
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(pattern, answer.stdout, re.MULTILINE)
    return found.group(1).strip() if found else None


def _nvcc() -> str | None:
    return _says(r"V([\d.]+)", "nvcc", "--version")


def _driver() -> str | None:
    return _says(r"^([\d.]+)$", "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    name = found.group(1) if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def unavailable() -> dict[str, str | None]:
    """By backend: why it cannot run on this machine, or None."""
    return {name: b.unavailable() for name, b in backends.BACKENDS.items()}


def sample_arguments(op: str, device, dtype: torch.dtype) -> tuple:
    """Arguments of a small call of an op, channels_last: a ResNet's first 3x3 convolution, on smaller maps."""

    def maps(size: int = 8):
        return torch.rand(2, 64, size, size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

    def vector():
        return torch.rand(64, device=device) + 0.5

    weight = torch.rand(64, 64, 3, 3, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    conv = ([1, 1], [1, 1], [1, 1], 1, True)
    bn = (vector(), vector(), vector(), vector())
    loaded, places = (*bn, 1e-5, True), conv[:-1]
    pointwise = torch.rand(64, 64, 1, 1, device=device).to(dtype)
    winners = torch.zeros(2, 64, 4, 4, dtype=torch.uint8, device=device).contiguous(memory_format=torch.channels_last)
    covariance = torch.eye(64, device=device)
    images, filters = (torch.rand(n, 3, size, size, device=device).to(dtype) for n, size in ((2, 8), (64, 7)))
    return {
        "conv_bn_act": (maps(), weight, *bn, 1e-5, maps(), *conv),
        "conv_bn_act_bwd": (maps(), maps(), maps(), weight, *bn[:3], 1e-5, *conv, [True] * 5),
        "bn_stats": (maps(),),
        "bn_act": (maps(), vector(), vector(), vector(), vector(), 1e-5, maps(), True, True),
        "bn_act_bwd": (maps(), maps(), maps(), vector(), vector(), vector(), 1e-5, True, True, [True] * 4),
        "bn_act_bwd_input": (maps(), maps(), maps(), vector(), vector(), vector(), vector(), True),
        "bn_act_conv": (maps(), weight, *loaded, *places, True),
        "bn_act_conv_bwd": (maps(), maps(), weight, *loaded, *places, [True] * 4),
        "pointwise_bn_act": (maps(), pointwise, *loaded, *bn[:2], 1e-5, maps(), [1, 1], True),
        "pointwise_bn_act_bwd": (
            *(maps(), maps(), maps(), pointwise, *loaded, vector(), vector(), vector(), 1e-5),
            *(vector(), covariance, [1, 1], True, [True] * 7),
        ),
        "bn_act_pool": (maps(), *bn, 1e-5),
        "bn_act_pool_bwd": (maps()[:, :, ::2, ::2], maps(), winners, *bn[:3], 1e-5, [True] * 3),
        "stem_conv": (images, filters),
        "stem_conv_weight_grad": (maps(4), images, filters),
        "conv_bn_act_pool": (images, filters, *bn, 1e-5),
    }[op]


def choices(device: str, dtype: torch.dtype) -> dict[str, dict]:
    """By op: the backend that would run it on this device and dtype now, and the reasons of those asked before it."""
    found = {}
    for op in OPS:
        args = sample_arguments(op, device, dtype)
        forced = backends.forced()
        order = (backends.BACKENDS[forced],) if forced else (*backends.ORDER[device], backends.reference)
        declined = []
        for candidate in order:
            reason = backends.refuses(candidate, op, args) or (None if forced else backends.defers(candidate, op, args))
            if reason is None:
                break
            declined.append(reason)
        found[op] = {"backend": None if reason else candidate.NAME, "declined": declined}
    return found


def report() -> dict:
    """All that `doctor` prints."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "environment": environment(),
        "backends": unavailable(),
        "forced": backends.forced(),
        "choices": {
            f"{device} {str(dtype).removeprefix('torch.')}": choices(device, dtype)
            for device in devices
            for dtype in (torch.float32, torch.float16)
        },
        "optimize_for_inference": programs(devices),
        "build": build_facts(),
    }


def programs(devices: list[str]) -> dict[str, str]:
    """By device and dtype: what computes the networks of optimize_for_inference."""
    from .engine import cache, cases, cpu, cpu_program  # they ask this module for the machine

    why = cpu.supported(torch.float32)
    isa = None if why else cpu_program.isa()
    own = f"PyTorch's operators: {why}" if why else f"compiled kernels, {isa.name}"
    found = {"cpu float32": own, "cpu, other dtypes": "PyTorch's operators"}
    if "cuda" in devices:
        lacks = cases.triton_unavailable()
        ours = ["Triton's kernels"] * (not lacks) + ["compiled ones"] * bool(cuda_conv.instances())
        found["cuda"] = f"{', '.join(ours)} or PyTorch's, by measurement" if ours else f"PyTorch's kernels: {lacks}"
    for device in devices:
        found[f"{device}, tuned"] = str(cache.Cache(cache.folder(), cache.environment(torch.device(device))))
    return found


def build_facts() -> dict:
    """What was compiled, and why what is missing is missing."""
    return dict(cuda.build_facts())
