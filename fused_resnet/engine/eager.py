"""Steps by PyTorch's own operators, on folded weights: the twin of every kernel, and what runs where there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from ..backends import forced
from .graph import has_hooks, is_in_place
from .plan import Group, alone
from .steps import Network, Step, fold

NORM = ("running_mean", "running_var", "weight", "bias")


class Eager:
    """Folded weights of a model's steps in one dtype, and the steps over them.

    float32 products follow PyTorch's own flags (TF32, oneDNN).
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.module, self.dtype = module, dtype
        self.weights: dict[tuple, tuple[Step, list[Tensor], Tensor]] = {}
        self.norms: dict[str, list[Tensor | None]] = {}  # running mean and variance, weight and bias, in full precision
        self.cast: dict[str, nn.Module | Tensor] = {}  # what traced nodes use, in this dtype

    def folded(self, step: Step) -> tuple[list[Tensor], Tensor]:
        key = step.convolutions
        if key not in self.weights:
            with torch.inference_mode(False), torch.no_grad():  # refresh() writes into it
                weights, bias = fold(step, self.module)
                cast = [w.to(self.dtype).contiguous(memory_format=torch.channels_last) for w in weights]
                self.weights[key] = step, cast, bias.to(self.dtype)
        return self.weights[key][1:]

    def refresh(self) -> None:
        """Fold again, into the same memory."""
        for step, weights, bias in self.weights.values():
            fresh, fresh_bias = fold(step, self.module)
            for old, new in zip([*weights, bias], [*fresh, fresh_bias], strict=True):
                old.copy_(new)
        for path, tensors in self.norms.items():
            for name, old in zip(NORM, tensors, strict=True):
                if old is not None:
                    old.copy_(self._found(f"{path}.{name}"))
        for path, old in self.cast.items():
            new = self._found(path)
            if isinstance(old, nn.Module):
                pairs = zip((*old.parameters(), *old.buffers()), (*new.parameters(), *new.buffers()), strict=True)
            else:
                pairs = [(old, new)] if isinstance(old, Tensor) else []
            for mine, theirs in pairs:
                mine.copy_(theirs)

    def norm(self, step: Step) -> tuple[list[Tensor | None], float]:
        """A norm's running mean and variance, weight and bias, in memory that stays; and its epsilon."""
        if step.bn not in self.norms:
            dtype = torch.promote_types(self.dtype, torch.float32)
            found = [self._found(f"{step.bn}.{name}") for name in NORM]
            with torch.inference_mode(False), torch.no_grad():
                self.norms[step.bn] = [None if t is None else t.detach().to(dtype, copy=True) for t in found]
        return self.norms[step.bn], self._found(step.bn).eps

    def fused(self, step: Step, network: Network, values: dict[str, object]):
        """As `run`; a norm and its ReLU in one pass, by the op of the package. A forced backend has no say in plans."""
        if step.op != "norm" or forced() is not None:
            return self.run(step, network, values)
        (mean, var, weight, bias), eps = self.norm(step)
        x = values[network.source(step.x)]
        return torch.ops.fused_resnet.bn_act.default(x, mean, var, weight, bias, eps, None, step.relu, False)

    def attribute(self, path: str):
        """What a traced node finds under this path of the model, in this dtype: a copy, in memory that stays."""
        if path not in self.cast:
            found = self._found(path)
            with torch.inference_mode(False), torch.no_grad():
                if isinstance(found, nn.Module):
                    found = copy.deepcopy(found).to(self.dtype)
                elif isinstance(found, Tensor):
                    found = found.detach().to(self.dtype if found.is_floating_point() else found.dtype, copy=True)
            self.cast[path] = found
        return self.cast[path]

    def _found(self, path: str):
        found = self.module
        for part in path.split("."):
            found = getattr(found, part)
        return found

    def run(self, step: Step, network: Network, values: dict[str, object]):
        """The value of a step; values: by name."""
        if step.op == "traced":
            return run_traced(network, step.node, values, self.attribute)
        x = values[network.source(step.x)]
        if step.op == "avg_pool":
            return x.mean((2, 3), keepdim=True)
        if step.op == "norm":
            (mean, var, weight, bias), eps = self.norm(step)
            y = F.batch_norm(x, mean, var, weight, bias, eps=eps)
            return y.relu_() if step.relu else y
        if step.op == "max_pool":
            return F.max_pool2d(x, step.pool.kernel, step.pool.stride, step.pool.padding)
        weights, bias = self.folded(step)
        if step.op == "linear":
            return F.linear(x.flatten(1), weights[0].flatten(1), bias)
        conv = step.conv
        y = F.conv2d(x, weights[0], bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        if step.segment is not None:
            name, other = step.segment
            y += F.conv2d(values[network.source(name)], weights[1], None, other.stride, other.padding)
        if step.residual is not None:
            y += values[network.source(step.residual)]
        if step.relu:
            y = y.relu_()
        return y if step.pool is None else F.max_pool2d(y, step.pool.kernel, step.pool.stride, step.pool.padding)


class EagerExecutor:
    """A whole network by PyTorch's own operators on folded weights."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.eager, self.dtype = Eager(module, dtype), dtype

    def run(self, network: Network, inputs: tuple[Tensor, ...]):
        """What the model returns."""
        values: dict[str, object] = {
            name: x.to(self.dtype, memory_format=torch.channels_last if x.dim() == 4 else torch.preserve_format)
            if isinstance(x, Tensor)
            else x
            for name, x in named(network, inputs).items()
        }
        values |= network.constants
        for step, over in zip(network.steps, network.releases([[s] for s in network.steps]), strict=True):
            values[step.output] = self.eager.run(step, network, values)
            for name in over:
                values.pop(name, None)
        return output_of(network, values)

    def groups(self, network: Network) -> list[Group]:
        """What the plan says of each step."""
        return [alone(step, "traced" if step.op == "traced" else "pytorch") for step in network.steps]

    def forget(self) -> None:
        """Let the folded weights go; they are made again when they are needed."""
        self.eager.weights.clear()

    def refresh(self) -> None:
        self.eager.refresh()


def named(network: Network, inputs: tuple) -> dict[str, object]:
    """The inputs by name."""
    return {n.name: x for n, x in zip(network.placeholders, inputs, strict=True)}


def run_traced(network: Network, node: fx.Node, values: dict[str, object], attribute: Callable[[str], object]):
    """What a node yields, run as it was traced. attribute: finds what the model has under a path."""

    def value_of(n: fx.Node):
        value = values[network.source(n.name)]
        # A flattened value is kept in the shape it had before.
        return value.reshape(value.shape[0], -1) if n.name in network.alias else value

    found = None if node.op in ("call_function", "call_method") else attribute(node.target)
    if isinstance(found, nn.Module) and has_hooks(found):
        # A hook may keep what it sees.
        values = {name: v.clone() if isinstance(v, Tensor) else v for name, v in _read(network, node, values).items()}
    args, kwargs = fx.node.map_arg(node.args, value_of), fx.node.map_arg(node.kwargs, value_of)
    if is_in_place(network.graph, node) and not network.graph.opaque and node.name not in network.spent:
        # A fused step may read the operand later than the layers it covers would have.
        args = (args[0].clone(), *args[1:])
    if node.op == "call_function":
        return node.target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return found(*args, **kwargs) if node.op == "call_module" else found


def _read(network: Network, node: fx.Node, values: dict[str, object]) -> dict[str, object]:
    return {name: values[name] for name in map(network.source, (n.name for n in node.all_input_nodes))}


def output_of(network: Network, values: dict[str, object], forbidden: Tensor | None = None):
    """What the model returns, with the values put in; a copy of what shares memory with `forbidden`."""

    def own(value):
        inside = forbidden is not None and isinstance(value, Tensor)
        if inside and value.untyped_storage().data_ptr() == forbidden.untyped_storage().data_ptr():
            return value.clone()
        return value

    def put_in(part):
        """fx has containers of its own, which cannot be changed: the caller gets Python's."""
        if isinstance(part, fx.Node):
            value = tree_map(own, values[network.source(part.name)])
            return value.reshape(value.shape[0], -1) if part.name in network.alias else value
        if isinstance(part, tuple):
            parts = [put_in(p) for p in part]
            return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
        if isinstance(part, list):
            return [put_in(p) for p in part]
        return {key: put_in(p) for key, p in part.items()} if isinstance(part, dict) else part

    return put_in(network.returned.args[0])
