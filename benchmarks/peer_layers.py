"""A traced model as one layer a convolution, batch norm folded in, for systems that are called layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fused_resnet import folding
from fused_resnet.engine import roofline


@dataclass(frozen=True)
class Layer:
    """A kernel of rung 1: conv or linear with weight and bias (BN folded in, in float64), then add and ReLU; or a pool.

    source, residual: names of layers, or roofline.INPUT.
    """

    name: str
    kind: str
    source: str
    module: nn.Module
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: str | None = None
    relu: bool = False


@torch.no_grad()
def layers(model: nn.Module, size: int) -> list[Layer]:
    """The model as a list of layers in an order that can be run; the last one is the output."""
    graph = roofline.traced(model, (3, size, size))
    kernels = roofline.kernels(roofline.ops_of(graph), "1")
    # By the name of any op: the kernel it runs in, so that every operand is the name of a kernel's last op.
    last = {op.name: kernel.ops[-1].name for kernel in kernels for op in kernel.ops}
    found = []
    for kernel in kernels:
        first, *rest = kernel.ops
        inside = {op.name for op in kernel.ops}
        module = model.get_submodule(first.label)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        residual, relu = None, False
        for op in rest:
            if op.kind == "bn":
                bn = model.get_submodule(op.label)
                statistics = (t.double() for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var))
                weight, bias = folding.fold(weight.double(), *statistics, bn.eps)
            elif op.kind == "add":
                (residual,) = (last.get(i, i) for i in op.inputs if i not in inside)
            elif op.kind == "relu":
                relu = True
            else:
                raise NotImplementedError(f"{op.label}: {op.kind} in an epilogue")
        dtype = next(model.parameters()).dtype
        weight, bias = (None if t is None else t.detach().to(dtype) for t in (weight, bias))
        source = last.get(first.inputs[0], first.inputs[0])
        found.append(Layer(last[first.name], first.kind, source, module, weight, bias, residual, relu))
    return _in_order(found)


def _in_order(found: list[Layer]) -> list[Layer]:
    """A projection comes after the convolution whose epilogue adds it: put it in front."""
    done, order = {roofline.INPUT}, []
    while found:
        ready = next(x for x in found if {x.source, x.residual or x.source} <= done)
        found = [x for x in found if x is not ready]
        done.add(ready.name)
        order.append(ready)
    return order


def run_layers(plan: list[Layer], x: Tensor, conv: Callable[[Layer, Tensor, Tensor | None], Tensor]) -> Tensor:
    """The output of a list of layers on x; conv(layer, x, residual) runs a convolution with its epilogue."""
    made = {roofline.INPUT: x}
    for layer in plan:
        source = made[layer.source]
        if layer.kind == "conv":
            y = conv(layer, source, None if layer.residual is None else made[layer.residual])
        elif layer.kind == "linear":
            y = nn.functional.linear(source.flatten(1), layer.weight, layer.bias)
        else:
            y = layer.module(source)
        made[layer.name] = y
    return y


def geometry(layer: Layer) -> tuple:
    m = layer.module
    return list(m.stride), list(m.padding), list(m.dilation), m.groups
