"""The systems that benchmarks/peers.py compares: how each is built at its best for one model, batch and dtype.

A builder takes a Cell and returns a call that runs the model on the cell's input once. Threads: PyTorch's,
intra_op_num_threads of ONNX Runtime, INFERENCE_NUM_THREADS of OpenVINO; JAX has no such setting, so that every
system's process is also confined to as many cores as it has threads. Inputs are what a user holds: contiguous, or
channels_last where the system is told so.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import measure, swap_blocks
from fused_resnet.engine import roofline

from .peer_layers import Layer, geometry, layers, run_layers

Step = Callable[[], object]


class Dispatched:
    """A call that returns before its result is there; `wait` returns when the last one's is."""

    def __init__(self, call: Step, wait: Callable[[object], object]):
        self._call, self._wait, self._last = call, wait, None

    def __call__(self) -> object:
        self._last = self._call()
        return self._last

    def wait(self) -> None:
        self._wait(self._last)


@dataclass(frozen=True)
class Cell:
    """One model, batch size and dtype; folder: where files that systems share lie."""

    model: str
    batch: int
    dtype: str
    size: int
    device: str
    threads: int
    folder: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}/b{self.batch}/{self.dtype}"

    def untouched(self) -> nn.Module:
        return measure.build_model(self.model).to(self.device, getattr(torch, self.dtype))

    def input(self) -> Tensor:
        shape = (self.batch, 3, self.size, self.size)
        return measure.random_input(shape, 0, torch.device(self.device), getattr(torch, self.dtype))


@dataclass(frozen=True)
class System:
    """title: as tables say it; needs: modules to be installed; slow: only if asked for; compiles: with memory of
    its own that is not the model's; devices, dtypes: that it runs on here; export: what happens before `build`, timed
    apart."""

    title: str
    build: Callable[[Cell, nn.Module, Tensor], Step]
    needs: tuple[str, ...] = ()
    slow: bool = False
    compiles: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    export: Callable[[Cell, nn.Module, Tensor], None] | None = None

    def declines(self, device: str, dtype: str) -> str | None:
        """Why it cannot run, or None."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} here, not on {device}"
        if dtype not in self.dtypes:
            return f"runs in {' and '.join(self.dtypes)} here, not in {dtype}"
        if self.build is ours and not hasattr(fused_resnet, "optimize_for_inference"):
            return "this fused_resnet has no optimize_for_inference"
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)}" if missing else None


def _nhwc(module: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    return module.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)


def _calling(module: Callable, x: Tensor) -> Step:
    def step():
        with torch.no_grad():
            return module(x)

    return step


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def eager(cell: Cell, model: nn.Module, x: Tensor) -> Step:
    return _calling(copy.deepcopy(model), x)


def channels_last(cell: Cell, model: nn.Module, x: Tensor) -> Step:
    return _calling(*_nhwc(copy.deepcopy(model), x))


def _compiled(**options):
    def build(cell: Cell, model: nn.Module, x: Tensor) -> Step:
        model, x = _nhwc(copy.deepcopy(model), x)
        return _calling(torch.compile(model, dynamic=False, **options), x)

    return build


def compile_freezing(cell: Cell, model: nn.Module, x: Tensor) -> Step:
    import torch._inductor.config as config

    config.freezing = True  # this process compiles nothing else
    return _compiled()(cell, model, x)


def swapped(cell: Cell, model: nn.Module, x: Tensor) -> Step:
    return _calling(*_nhwc(swap_blocks(copy.deepcopy(model)), x))


def ours(cell: Cell, model: nn.Module, x: Tensor) -> Step:
    with tempfile.TemporaryDirectory() as empty:  # nothing tuned before; the process is this one's own
        os.environ["FUSED_RESNET_CACHE"] = empty
        return _calling(fused_resnet.optimize_for_inference(model, example_input=x), x)


def timm_model(cell: Cell, model: nn.Module, x: Tensor) -> Step:
    import timm

    other = timm.create_model(cell.model, pretrained=False)
    other.load_state_dict(model.state_dict())
    return _calling(*_nhwc(other.to(x.device, x.dtype).eval(), x))


# --- one call a convolution: cuDNN's fused ops, and JAX ---------------------------------------------------------------


def cudnn_graph(cell: Cell, model: nn.Module, x: Tensor) -> Step:
    """cuDNN's convolution + bias (+ add) + ReLU as PyTorch binds it, one CUDA graph; the input is copied in and the
    output out, as a user of the graph would have to."""
    model, x = _nhwc(copy.deepcopy(model), x)
    plan = [_channels_last_weight(layer) for layer in layers(model, cell.size)]

    def conv(layer: Layer, v: Tensor, residual: Tensor | None) -> Tensor:
        if not layer.relu:
            return torch.conv2d(v, layer.weight, layer.bias, *geometry(layer))
        if residual is None:
            return torch.cudnn_convolution_relu(v, layer.weight, layer.bias, *geometry(layer))
        return torch.cudnn_convolution_add_relu(v, layer.weight, residual, 1.0, layer.bias, *geometry(layer))

    static = x.clone(memory_format=torch.preserve_format)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):  # cuDNN's benchmark mode chooses before the capture
            run_layers(plan, static, conv)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = run_layers(plan, static, conv)

    def step():
        static.copy_(x)
        graph.replay()
        return output.clone()

    return step


def _channels_last_weight(layer: Layer) -> Layer:
    if layer.kind != "conv":
        return layer
    return Layer(**{**vars(layer), "weight": layer.weight.contiguous(memory_format=torch.channels_last)})


def jax_xla(cell: Cell, model: nn.Module, x: Tensor) -> Step:
    """XLA's program of the same layers, NHWC; timed until the result is there."""
    import jax
    import jax.numpy as jnp

    plan = layers(model, cell.size)
    where = jax.devices("gpu" if cell.device == "cuda" else "cpu")[0]
    dtype = getattr(jnp, cell.dtype)

    def held(t: Tensor):
        return jax.device_put(jnp.asarray(t.float().cpu().numpy(), dtype=dtype), where)

    weights = {}
    for layer in plan:
        if layer.weight is not None:
            order = (2, 3, 1, 0) if layer.kind == "conv" else (1, 0)
            weights[layer.name] = (held(layer.weight.permute(order)), 0 if layer.bias is None else held(layer.bias))

    def window(layer: Layer, v):
        def pair(value):
            return (value, value) if isinstance(value, int) else tuple(value)

        m = layer.module
        pads = [(0, 0), *((p, p) for p in pair(m.padding)), (0, 0)]
        return jax.lax.reduce_window(
            v, -jnp.inf, jax.lax.max, (1, *pair(m.kernel_size), 1), (1, *pair(m.stride), 1), pads
        )

    def forward(weights, v):
        made = {roofline.INPUT: v}
        for layer in plan:
            y = made[layer.source]
            if layer.kind == "conv":
                stride, padding, dilation, groups = geometry(layer)
                w, b = weights[layer.name]
                y = b + jax.lax.conv_general_dilated(
                    y,
                    w,
                    stride,
                    [(p, p) for p in padding],
                    rhs_dilation=dilation,
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                    feature_group_count=groups,
                )
                y = y if layer.residual is None else y + made[layer.residual]
                y = jnp.maximum(y, 0) if layer.relu else y
            elif layer.kind == "linear":
                w, b = weights[layer.name]
                y = y @ w + b
            elif layer.kind == "max_pool":
                y = window(layer, y)
            elif layer.kind == "avg_pool":
                y = y.mean((1, 2))
            else:
                raise NotImplementedError(f"{layer.name}: {layer.kind}")
            made[layer.name] = y
        return y

    program, given = jax.jit(forward), held(x.permute(0, 2, 3, 1))
    return Dispatched(lambda: program(weights, given), lambda y: y.block_until_ready())


# --- ONNX -------------------------------------------------------------------------------------------------------------


def _onnx_file(cell: Cell) -> Path:
    return Path(cell.folder) / f"{cell.name.replace('/', '-')}.onnx"


def export_onnx(cell: Cell, model: nn.Module, x: Tensor) -> None:
    """Once a cell, batch norm and all: the systems fold it themselves."""
    if not _onnx_file(cell).exists():
        torch.onnx.export(model, (x,), _onnx_file(cell), dynamo=True, input_names=["x"], verbose=False)


def onnxruntime(cell: Cell, model: nn.Module, x: Tensor) -> Step:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cell.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its own default, and its best: nobody else runs while its threads spin.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    session = onnxruntime.InferenceSession(str(_onnx_file(cell)), options, providers=["CPUExecutionProvider"])
    given = {"x": x.numpy()}
    return lambda: session.run(None, given)[0]


def openvino(cell: Cell, model: nn.Module, x: Tensor) -> Step:
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": cell.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(_onnx_file(cell), "CPU", options).create_infer_request()
    given = [x.numpy()]
    return lambda: request.infer(given, share_inputs=True, share_outputs=True)[0]


_ONNX = {"devices": ("cpu",), "dtypes": ("float32",), "export": export_onnx}
BASELINE, OURS = "eager", "fused_resnet"
SYSTEMS = {
    "eager": System("torchvision, eager", eager),
    "channels_last": System("torchvision, channels_last", channels_last),
    "timm": System("timm, channels_last", timm_model, needs=("timm",)),
    "compile": System("torch.compile", _compiled(), compiles=True),
    "compile_max_autotune": System(
        "torch.compile, max-autotune", _compiled(mode="max-autotune"), slow=True, compiles=True
    ),
    "compile_freezing": System("torch.compile, freezing", compile_freezing, slow=True, compiles=True),
    "cudnn_graph": System("cuDNN fused ops, CUDA graph", cudnn_graph, devices=("cuda",)),
    "jax": System("JAX / XLA", jax_xla, needs=("jax",)),
    "onnxruntime": System("ONNX Runtime", onnxruntime, needs=("onnxruntime", "onnx", "onnxscript"), **_ONNX),
    "openvino": System("OpenVINO", openvino, needs=("openvino", "onnx", "onnxscript"), **_ONNX),
    "swap_blocks": System("fused_resnet, swap_blocks", swapped),
    "fused_resnet": System("fused_resnet, optimize_for_inference", ours),
}
