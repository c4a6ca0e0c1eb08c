"""What reaches the driver when an op is launched: Triton's own dispatch, and all of it real but the GPU.

    python tests/launches.py

Triton compiles for sm_90 and hands each launch to a driver that only writes it down. Prints one JSON object a case:
whether the launches of a prepared call (backends/triton.py), and of one that was written down (backends/straight.py),
are, argument by argument, those that Triton's dispatch would have made, and the microseconds that each takes on this
CPU, the launch itself left out.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import torch
import triton
from aot import CL, backend
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import gpu_training  # noqa: E402
from fused_resnet.backends import straight  # noqa: E402


class Driver:
    """As much of Triton's driver as a launch asks for."""

    def __init__(self):
        self.launches: list[tuple] = []
        self.utils = self
        self.handles = itertools.count(1)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name, kernel, shared, device):
        return next(self.handles), next(self.handles), 128, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module): ...

    def launcher_cls(self, source, metadata):
        def launch(*args):  # grid, stream, function, packed metadata, launch metadata, hooks, the kernel's arguments
            self.launches.append(args)

        return launch


def case(n=2, c=64, h=7, w=9, k=64, kernel=3, stride=1, groups=1, dtype=torch.float16, **more) -> tuple:
    """Arguments of conv_bn_act; more: layout of x and residual, spread and dtype of the vectors, residual, bn, relu."""
    layout = more.get("layout", CL)
    padding = kernel // 2
    p, q = ((size + 2 * padding - kernel) // stride + 1 for size in (h, w))
    x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(k, c // groups, kernel, kernel).to(dtype).contiguous(memory_format=more.get("weight", CL))
    residual = torch.randn(n, k, p, q).to(dtype).contiguous(memory_format=layout)
    spread = more.get("spread", 1)
    vectors = [torch.rand(spread * k).to(more.get("vectors", torch.float32))[::spread] for _ in range(4)]
    return (
        x,
        weight,
        *(vectors if more.get("bn", True) else [None] * 4),
        1e-5,
        residual if more.get("residual", True) else None,
        *([stride] * 2, [padding] * 2, [1, 1], groups, more.get("relu", True)),
    )


def backward(mask=(True,) * 5, **options) -> tuple:
    """Arguments of conv_bn_act_bwd."""
    x, weight, bn_weight, _, mean, var, eps, grad, *conv = case(**options)
    return grad, torch.randn_like(grad).relu(), x, weight, bn_weight, mean, var, eps, *conv, list(mask)


def norm(op: str, n=3, c=48, size=5, dtype=torch.float16, layout=CL, batch_stats=True, mask=(True,) * 4) -> tuple:
    """Arguments of a batch norm op."""
    x, other, y = (torch.randn(n, c, size, size).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    mean, var, weight, bias = (torch.rand(c) for _ in range(4))
    return {
        "bn_stats": (x,),
        "bn_act": (x, mean, var, weight, bias, 1e-5, other, True, batch_stats),
        "bn_act_bwd": (other, y.relu(), x, mean, var, weight, 1e-5, True, batch_stats, list(mask)),
        "bn_act_bwd_input": (other, y.relu(), x, mean, var, weight, bias, True),
    }[op]


def training(op: str, spec: str, dtype=torch.float16, layout=CL) -> tuple:
    """Arguments of an op between batch norms of the batch's own statistics, at one of gpu-check's shapes."""
    return gpu_training.arguments(op, gpu_training.specs(op, False)[spec], torch.device("cpu"), dtype, layout)


CASES = {
    "3x3": ("conv_bn_act", case, {}),
    "1x1": ("conv_bn_act", case, {"kernel": 1, "k": 96}),
    "1x1-stride2": ("conv_bn_act", case, {"kernel": 1, "k": 96, "stride": 2, "residual": False}),
    "stem": (
        "conv_bn_act",
        case,
        {"c": 3, "kernel": 7, "stride": 2, "residual": False, "layout": torch.contiguous_format},
    ),
    "groups": ("conv_bn_act", case, {"groups": 16}),
    "contiguous": ("conv_bn_act", case, {"layout": torch.contiguous_format, "weight": torch.contiguous_format}),
    "vectors-apart-in-half": ("conv_bn_act", case, {"spread": 2, "vectors": torch.float16}),
    "plain": ("conv_bn_act", case, {"bn": False, "residual": False, "relu": False}),
    "float32": ("conv_bn_act", case, {"dtype": torch.float32}),
    "1x1-maps": ("conv_bn_act", case, {"h": 1, "w": 1, "layout": torch.contiguous_format}),
    "ones": ("conv_bn_act", case, {"n": 1, "c": 1, "h": 1, "w": 1, "k": 1, "kernel": 1}),
    "backward": ("conv_bn_act_bwd", backward, {"dtype": torch.float32}),
    "backward-half": ("conv_bn_act_bwd", backward, {}),
    "backward-half-weight-alone": ("conv_bn_act_bwd", backward, {"mask": (True, True, False, True, True)}),
    "backward-1x1": ("conv_bn_act_bwd", backward, {"kernel": 1, "dtype": torch.float32}),
    "backward-contiguous": (
        "conv_bn_act_bwd",
        backward,
        {"layout": torch.contiguous_format, "weight": torch.contiguous_format, "dtype": torch.float32},
    ),
    "backward-of-a-part": (
        "conv_bn_act_bwd",
        backward,
        {"mask": (True, False, False, True, False), "dtype": torch.float32},
    ),
    "stats": ("bn_stats", norm, {}),
    "norm": ("bn_act", norm, {}),
    "norm-contiguous": ("bn_act", norm, {"layout": torch.contiguous_format}),
    "norm-backward": ("bn_act_bwd", norm, {}),
    "norm-backward-frozen": ("bn_act_bwd", norm, {"batch_stats": False, "mask": (True, True, False, False)}),
    "norm-backward-of-several": ("bn_act_bwd_input", norm, {}),
    "train-3x3": ("bn_act_conv", training, {"spec": "3x3"}),
    "train-raw": ("bn_act_conv", training, {"spec": "raw-1x1", "layout": torch.contiguous_format}),
    "train-backward": ("bn_act_conv_bwd", training, {"spec": "3x3-stride2"}),
    "train-grouped": ("bn_act_conv", training, {"spec": "3x3-grouped"}),
    "train-grouped-backward": ("bn_act_conv_bwd", training, {"spec": "3x3-grouped-stride2"}),
    "train-expand": ("pointwise_bn_act", training, {"spec": "expand"}),
    "train-expand-backward": ("pointwise_bn_act_bwd", training, {"spec": "expand"}),
    "train-pool": ("bn_act_pool", training, {"spec": "pool"}),
    "train-pool-backward": ("bn_act_pool_bwd", training, {"spec": "pool"}),
}


def seen(launch: tuple, inputs: list[torch.Tensor]) -> list:
    """The launch as data that can be compared: tensors by what they are, inputs by which they are."""
    at = {t.data_ptr(): i for i, t in enumerate(inputs)}
    found = []
    for a in launch:
        if isinstance(a, torch.Tensor):
            a = [str(a.dtype), list(a.shape), list(a.stride()), a.data_ptr() % 16, at.get(a.data_ptr())]
        plain = isinstance(a, (int, float, str, list, tuple))  # the rest is what profilers hook into
        found.append([type(a).__name__, a if plain else None])
    return found


def microseconds(call, calls: int = 20, rounds: int = 20) -> float:
    """The fastest of some rounds: what another process takes away is no part of it."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return round(1e6 * best, 2)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    fake = Driver()
    driver.set_active(fake)
    host = backend()
    host._chip = lambda x: (90, 132)
    for name, (op, build, options) in CASES.items():
        args, others = (build(**options) if build in (case, backward) else build(op, **options) for _ in range(2))
        inputs = [a for a in others if isinstance(a, torch.Tensor)]
        module = host._training(op) if op in host.TRAINING else host
        function, prepared = getattr(module, op), host.prepare(op, *args)
        prepared(*args)
        fake.launches.clear()
        function(*others)
        dispatched = [seen(launch, inputs) for launch in fake.launches]
        fake.launches.clear()
        prepared(*others)
        direct = [seen(launch, inputs) for launch in fake.launches]
        fake.launches.clear()
        _, written = straight.watch(prepared, args)
        assert callable(written), f"{name}: {written}"
        fake.launches.clear()
        written(*others)
        straightened = [seen(launch, inputs) for launch in fake.launches]
        pairs = itertools.zip_longest(itertools.chain(*dispatched), itertools.chain(*direct))
        line = {
            "case": name,
            "op": op,
            "triton": triton.__version__,
            "launches": len(dispatched),
            "skips_the_dispatch": len(prepared.found or ()) == len(dispatched),
            "same": dispatched == direct == straightened,
            "differences": [[i, a, b] for i, (a, b) in enumerate(pairs) if a != b],
            "dispatched_us": microseconds(lambda: function(*args)),  # noqa: B023  called at once
            "prepared_us": microseconds(lambda: prepared(*args)),  # noqa: B023
            "written_us": microseconds(lambda: written(*args)),  # noqa: B023
        }
        fake.launches.clear()
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
