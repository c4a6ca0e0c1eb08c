"""What the hardware allows: a network's ops, the kernels that a rung of fusion makes of them, and each kernel's floor.

A kernel's floor is max(FLOP / rate, bytes / bandwidth); a network's is the sum over its kernels, and the ceiling is
batch / floor. Conventions: FLOP = 2 x MAC, of convolutions and linear layers alone. A kernel reads each tensor that it
needs once and writes what others need once, with no reuse across kernels in L2; a 1x1 convolution of stride 2 reads a
quarter of its input. Weights are read once a batch; batch norm's vectors and biases are not counted. Halo that a whole
block in one kernel would compute twice is not counted either: it is a bound.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torchvision.ops.misc import FrozenBatchNorm2d

# Each rung has what the one before it has, except where its words say otherwise.
RUNGS = {
    "ops": "every op its own kernel",
    "pointwise": "conv, then one pointwise kernel (torch.compile)",
    "1": "rung 1: per convolution",
    "2": "+ rung 2: stem with its max-pool",
    "3": "+ rung 3: projection by K-concatenation",
    "4": "+ rung 4: 3x3 -> 1x1 -> add -> ReLU",
    "5": "rung 5: rotated bottleneck",
    "5+": "rung 5, stage ends stored by a quarter, average pool in the last epilogue",
    "block": "rung 3, whole block in one kernel",
    "compute": "compute only",
}
ROTATED_CHANNELS = 256  # of the 3x3: with more, the chained accumulators do not fit into the registers
INPUT = "input"

_MODULES = {
    nn.Conv2d: "conv",
    nn.Linear: "linear",
    nn.BatchNorm2d: "bn",
    FrozenBatchNorm2d: "bn",
    nn.ReLU: "relu",
    nn.MaxPool2d: "max_pool",
    nn.AdaptiveAvgPool2d: "avg_pool",
    nn.Identity: "view",
    nn.Dropout: "view",
    nn.Flatten: "view",
}
_FUNCTIONS = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    torch.relu: "relu",
    nn.functional.relu: "relu",
    torch.flatten: "view",
}
_METHODS = {"add": "add", "add_": "add", "relu": "relu", "relu_": "relu", "flatten": "view", "view": "view"}
POINTWISE = ("bn", "relu", "add")


@dataclass(frozen=True)
class Op:
    """One op of the traced network; every count is for one image.

    inputs: names of the ops that made its operands; reads: how many elements it needs of each; shape: of its output,
    without the batch; kernel, stride, groups: of a convolution.
    """

    name: str
    label: str
    kind: str
    inputs: tuple[str, ...]
    reads: tuple[int, ...]
    shape: tuple[int, ...]
    weights: int = 0
    flops: int = 0
    kernel: int = 0
    stride: int = 1
    groups: int = 1

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Kernel:
    """Ops that run as one kernel; counts of elements and FLOP for one image, of weights for a batch."""

    ops: tuple[Op, ...]
    flops: int
    weights: int
    read: int
    written: int

    @property
    def layers(self) -> list[str]:
        """The layers that give the kernel its name: what has weights, or else all."""
        named = [op.label for op in self.ops if op.kind in ("conv", "linear")]
        return named or [op.label for op in self.ops]

    def bytes(self, batch: int, itemsize: int) -> int:
        return itemsize * (batch * (self.read + self.written) + self.weights)

    def floor_s(self, batch: int, itemsize: int, rate: float, bandwidth: float) -> float:
        """Seconds for a batch; rate in FLOP/s, bandwidth in bytes/s."""
        return max(batch * self.flops / rate, self.bytes(batch, itemsize) / bandwidth)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, tuple(_MODULES)) or super().is_leaf_module(module, name)


def traced(model: nn.Module, size: tuple[int, int, int]) -> fx.GraphModule:
    """The graph of a copy of the model in eval mode on the meta device, shapes for one image of [C, H, W] noted."""
    model = copy.deepcopy(model).to("meta")
    model.eval()
    graph = fx.GraphModule(model, _Tracer().trace(model))
    ShapeProp(graph).propagate(torch.empty(1, *size, device="meta"))
    return graph


def kind_of(node: fx.Node, graph: fx.GraphModule) -> str:
    """What a node is: 'conv', 'linear', 'bn', 'relu', 'add', 'max_pool', 'avg_pool', 'view', 'other' or 'input'."""
    if node.op == "call_module":
        module = graph.get_submodule(node.target)
        return next((kind for known, kind in _MODULES.items() if isinstance(module, known)), "other")
    known = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op)
    return INPUT if known is None else known.get(node.target, "other")


def network(model: nn.Module, size: tuple[int, int, int] = (3, 224, 224)) -> list[Op]:
    """The ops that launch something, in the order of the graph. size: [C, H, W] of the images."""
    return ops_of(traced(model, size))


def ops_of(graph: fx.GraphModule) -> list[Op]:
    """As `network`, of a graph from `traced`; an op's name is its node's."""
    made_by: dict[fx.Node, str] = {}
    ops = []
    for node in graph.graph.nodes:
        kind = kind_of(node, graph)
        if node.op in ("placeholder", "get_attr"):
            made_by[node] = INPUT if node.op == "placeholder" else node.name
        elif kind == "view":
            made_by[node] = made_by[node.all_input_nodes[0]]
        elif node.op != "output":
            made_by[node] = node.name
            ops.append(_op(node, kind, graph, [made_by[n] for n in node.all_input_nodes]))
    return ops


def _op(node: fx.Node, kind: str, graph: fx.GraphModule, inputs: list[str]) -> Op:
    # The first dimension is the batch of one; a node without a tensor of its own (a size, a tuple) moves nothing.
    sizes = [tuple(n.meta["tensor_meta"].shape) if "tensor_meta" in n.meta else () for n in node.all_input_nodes]
    meta = node.meta.get("tensor_meta")
    shape = tuple(meta.shape[1:]) if hasattr(meta, "shape") else (0,)
    reads = [math.prod(s[1:]) if s else 0 for s in sizes]
    more = {}
    if kind in ("conv", "linear"):
        weight = graph.get_submodule(node.target).weight
        more = {"weights": weight.numel(), "flops": 2 * math.prod(shape) * weight[0].numel()}
    if kind == "conv":
        conv = graph.get_submodule(node.target)
        # Of a convolution with gaps between its windows, only what lies in a window is read.
        c, h, w = sizes[0][1:]
        reads[0] = c * min(h, shape[1] * conv.kernel_size[0]) * min(w, shape[2] * conv.kernel_size[1])
        more |= {"kernel": max(conv.kernel_size), "stride": max(conv.stride), "groups": conv.groups}
    label = str(node.target) if node.op == "call_module" else node.name
    return Op(node.name, label, kind, tuple(inputs), tuple(reads), shape, **more)


class _Groups:
    """Which ops run in one kernel: at first each one alone."""

    def __init__(self, ops: Sequence[Op]):
        self.ops = {op.name: op for op in ops}
        self.group = {op.name: [op.name] for op in ops}
        self.users: dict[str, list[str]] = {op.name: [] for op in ops}
        self.depth: dict[str, int] = {}
        for op in ops:
            made = [i for i in op.inputs if i in self.ops]
            self.depth[op.name] = 1 + max((self.depth[i] for i in made), default=0)
            for i in made:
                self.users[i].append(op.name)

    def merge(self, a: str, b: str) -> None:
        if self.group[a] is not self.group[b]:
            self.group[a].extend(self.group[b])
            for name in list(self.group[b]):
                self.group[name] = self.group[a]

    def sole(self, op: Op) -> list[Op]:
        """The producers of an op's operands that nothing but this op reads."""
        return [self.ops[i] for i in op.inputs if i in self.ops and self.users[i] == [op.name]]

    def kinds(self, op: Op) -> list[str]:
        return [self.ops[name].kind for name in self.group[op.name]]

    def convs(self, op: Op) -> list[Op]:
        return [self.ops[name] for name in self.group[op.name] if self.ops[name].kind == "conv"]


def _join_pointwise(g: _Groups) -> None:
    for op in g.ops.values():
        for p in g.sole(op) if op.kind in POINTWISE else ():
            if p.kind in POINTWISE:
                g.merge(p.name, op.name)


def _per_conv(g: _Groups) -> None:
    """A pointwise op goes into the epilogue of what made its operand; of two, of the deeper one: the main branch."""
    for op in g.ops.values():
        if op.kind in POINTWISE:
            candidates = [p for p in g.sole(op) if p.kind in ("conv", "linear", *POINTWISE)]
            if candidates:
                g.merge(max(candidates, key=lambda p: g.depth[p.name]).name, op.name)


def _pool(kind: str):
    def join(g: _Groups) -> None:
        for op in g.ops.values():
            for p in g.sole(op) if op.kind == kind else ():
                if g.convs(p):
                    g.merge(p.name, op.name)

    return join


def _projection(g: _Groups) -> None:
    for op in g.ops.values():
        for p in g.sole(op) if op.kind == "add" else ():
            branch = g.convs(p)
            if len(branch) == 1 and set(g.kinds(p)) <= {"conv", "bn"} and branch[0].groups == 1 and g.convs(op):
                g.merge(op.name, p.name)


def _chain(g: _Groups) -> None:
    for op in g.ops.values():
        if _reduces(op) and "add" in g.kinds(op):
            for p in g.sole(op):
                before = g.convs(p)
                if len(before) == 1 and before[0].kernel > 1 and before[0].groups == 1 and "max_pool" not in g.kinds(p):
                    g.merge(p.name, op.name)


def _rotate(g: _Groups) -> None:
    for op in g.ops.values():
        if _reduces(op) and "add" not in g.kinds(op) and op.inputs[0] in g.ops and len(g.convs(op)) == 1:
            p = g.ops[op.inputs[0]]
            middle = [c for c in g.convs(p) if c.kernel > 1]
            chained = len(g.convs(p)) > 1 and "add" in g.kinds(p)
            if chained and len(middle) == 1 and middle[0].shape[0] <= ROTATED_CHANNELS:
                g.merge(p.name, op.name)


def _reduces(op: Op) -> bool:
    """Whether a tile of the op's operand is all that a tile of its output needs."""
    return op.kind == "conv" and op.kernel == 1 and op.stride == 1 and op.groups == 1


def _block(g: _Groups) -> None:
    for op in reversed(list(g.ops.values())):
        if "add" in g.kinds(op):
            for p in g.sole(op):
                if g.convs(p) and not {"add", "max_pool"} & set(g.kinds(p)):
                    g.merge(op.name, p.name)


_TO_3 = (_per_conv, _pool("max_pool"), _projection)
_PASSES = {
    "ops": (),
    "pointwise": (_join_pointwise,),
    "1": _TO_3[:1],
    "2": _TO_3[:2],
    "3": _TO_3,
    "4": (*_TO_3, _chain),
    "5": (*_TO_3, _chain, _rotate),
    "5+": (*_TO_3, _chain, _rotate, _pool("avg_pool")),
    "block": (*_TO_3, _block),
    "compute": (),
}


def kernels(ops: Sequence[Op], rung: str) -> list[Kernel]:
    """What runs as one kernel at a rung of fusion (a key of RUNGS), in the order of each kernel's first op."""
    if rung not in RUNGS:
        raise ValueError(f"rung: expected one of {', '.join(RUNGS)}, got {rung!r}")
    g = _Groups(ops)
    for step in _PASSES[rung]:
        step(g)
    order = {op.name: i for i, op in enumerate(ops)}
    groups = {id(names): sorted(names, key=order.__getitem__) for names in g.group.values()}
    return [
        _kernel(g, names, moves=rung != "compute", in_part=rung == "5+")
        for names in sorted(groups.values(), key=lambda names: order[names[0]])
    ]


def _kernel(g: _Groups, names: list[str], *, moves: bool, in_part: bool) -> Kernel:
    """moves: count what is read and written; in_part: store no more of a tensor than its readers ask for."""
    ops, inside = [g.ops[name] for name in names], set(names)
    read: dict[str, int] = {}
    written = 0
    for op in ops:
        for source, elements in zip(op.inputs, op.reads, strict=True):
            if source not in inside:
                read[source] = max(elements, read.get(source, 0))
        outside = [user for user in g.users[op.name] if user not in inside]
        if outside or not g.users[op.name]:
            asked = [n for u in outside for s, n in zip(g.ops[u].inputs, g.ops[u].reads, strict=True) if s == op.name]
            written += max(asked) if in_part and asked else op.elements
    return Kernel(
        tuple(ops),
        flops=sum(op.flops for op in ops),
        weights=sum(op.weights for op in ops) if moves else 0,
        read=sum(read.values()) if moves else 0,
        written=written if moves else 0,
    )


def floor_s(ops: Sequence[Op], rung: str, batch: int, itemsize: int, rate: float, bandwidth: float) -> float:
    """Seconds that a batch takes at least at a rung."""
    return sum(k.floor_s(batch, itemsize, rate, bandwidth) for k in kernels(ops, rung))
