"""How fast a device multiplies and copies, known or measured, and how long a kernel's ops take on it, unfused."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from .. import measure
from .roofline import Kernel, Op, kind_of

PRODUCT = {"cpu": 2048, "cuda": 8192}  # rows and columns
COPY_BYTES = 2**28
SLICE_S = 0.05


@dataclass(frozen=True)
class Device:
    """rate: FLOP/s of a matrix product in `dtype`; bandwidth: bytes/s of a copy, reads and writes both counted."""

    name: str
    rate: float
    bandwidth: float
    source: str

    def best(self, other: Device) -> Device:
        """The faster of two measurements of one device."""
        return replace(self, rate=max(self.rate, other.rate), bandwidth=max(self.bandwidth, other.bandwidth))


_DATASHEET = "NVIDIA's data sheet (dense products, peak bandwidth), not measured here: no kernel reaches these"
# 16-bit operands, float32 accumulation.
KNOWN = {
    "h100": Device(
        "NVIDIA H100 SXM", 800e12, 3.0e12, "measured on one: an 8192^3 bfloat16 product, a device-to-device copy"
    ),
    "h100-datasheet": Device("NVIDIA H100 SXM", 989e12, 3.35e12, _DATASHEET),
    "h200-datasheet": Device("NVIDIA H200 SXM", 989e12, 4.8e12, _DATASHEET),
    "a100-datasheet": Device("NVIDIA A100 SXM 80 GB", 312e12, 2.039e12, _DATASHEET),
    "a100-40gb-datasheet": Device("NVIDIA A100 SXM 40 GB", 312e12, 1.555e12, _DATASHEET),
    "l4-datasheet": Device("NVIDIA L4", 121e12, 0.3e12, _DATASHEET),
}


def measured(device: torch.device, dtype: torch.dtype, rounds: int = 7) -> Device:
    """The device at hand: the best of some rounds of a large matrix product and of a large copy."""
    n = PRODUCT[device.type]
    a, b = (torch.randn(n, n).to(device, dtype) for _ in range(2))
    c = torch.empty_like(a)
    product = _best(lambda: torch.matmul(a, b, out=c), device, rounds)
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), device, rounds)
    if device.type == "cuda":
        name, how = torch.cuda.get_device_name(device), "by events"
    else:
        name, how = "CPU", f"on {torch.get_num_threads()} threads"
    what = (
        f"measured now, {how}: a {n}^3 product in {str(dtype).removeprefix('torch.')}, a copy of {COPY_BYTES >> 20} MiB"
    )
    return Device(name, 2 * n**3 / product, 2 * COPY_BYTES / copy, what)


def _best(step: Callable[[], object], device: torch.device, rounds: int) -> float:
    step()
    calls = max(1, round(SLICE_S / measure.time_once(step, device, 1)))
    return min(measure.time_once(step, device, calls) for _ in range(rounds))


def unfused(graph: fx.GraphModule, kernel: Kernel, batch: int, device: torch.device, dtype: torch.dtype):
    """A call that runs a kernel's ops with PyTorch's own, batch norm folded into the convolution that feeds it; the
    values are random. graph: from roofline.traced; its node names are the ops'."""
    nodes = {node.name: node for node in graph.graph.nodes}
    inside = {op.name for op in kernel.ops}
    values: dict[str, Tensor] = {}
    steps = []
    for op in kernel.ops:
        node = nodes[op.name]
        sources = [_through_views(n, graph) for n in node.all_input_nodes]
        for source, operand in zip(sources, node.all_input_nodes, strict=True):
            if source.name not in inside:
                values.setdefault(source.name, _random(operand, batch, device, dtype))
        if op.kind == "bn" and inside & {source.name for source in sources if kind_of(source, graph) == "conv"}:
            call = _nothing
        else:
            bias = any(kind_of(user, graph) == "bn" and user.name in inside for user in node.users)
            call = _call(op, graph, node, device, dtype, bias)
        steps.append((op.name, call, [source.name for source in sources]))

    def run():
        made = dict(values)
        for name, call, sources in steps:
            made[name] = call(*(made[s] for s in sources))
        return made[name]

    return run


def _nothing(x: Tensor) -> Tensor:
    return x


def _through_views(node: fx.Node, graph: fx.GraphModule) -> fx.Node:
    while kind_of(node, graph) == "view":
        node = node.all_input_nodes[0]
    return node


def _random(node: fx.Node, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    x = torch.rand(batch, *node.meta["tensor_meta"].shape[1:]).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _call(op: Op, graph: fx.GraphModule, node: fx.Node, device: torch.device, dtype: torch.dtype, bias: bool):
    if op.kind in ("relu", "add"):
        return {"relu": torch.relu_, "add": Tensor.add_}[op.kind]
    if node.op != "call_module":
        raise ValueError(f"{op.label}: cannot be timed alone: {node.op} of {node.target}")
    module = copy.deepcopy(graph.get_submodule(node.target)).to_empty(device=device)
    if bias and module.bias is None:
        module.bias = nn.Parameter(torch.empty(module.out_channels, device=device))
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.fill_(0.01) if tensor.is_floating_point() else tensor.data.zero_()
    module = module.to(dtype).eval()
    return module.to(memory_format=torch.channels_last) if op.kind == "conv" else module


@measure.fastest_library()
@torch.no_grad()
def time_unfused(run: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Median seconds of a call: by the clock on a CPU; on a GPU by events around a CUDA graph of some calls, so that
    the launches do not count. Operands that fit into a cache may be found there."""
    run()
    calls = max(1, round(SLICE_S / measure.time_once(run, device, 1)))
    if device.type != "cuda":
        return statistics.median(measure.time_once(run, device, calls) for _ in range(rounds))
    calls = min(calls, 50)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return statistics.median(measure.time_once(graph.replay, device, 1) for _ in range(rounds)) / calls
