"""The layers of a graph as the steps that kernels compute: convolution with all that follows it, stem, pools, head."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d

from ..folding import scale_shift
from .graph import Graph, TracedConvolution, TracedNorm, changes_numbers, has_hooks, is_in_place, is_size, may_alias

RELU_FUNCTIONS = {F.relu, torch.relu, F.relu_, torch.relu_}
ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}


@dataclass(frozen=True)
class Convolution:
    """A convolution with the BN after it: where their tensors are in the model, and how it walks its input."""

    weight: str  # path of the module that has the weight
    bn: str | None
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def is_pointwise(self) -> bool:
        return self.kernel == (1, 1) and self.padding == (0, 0) and self.groups == 1

    def size(self, h: int, w: int) -> tuple[int, int]:
        """Height and width of the output for an input of h x w."""
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip((h, w), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )

    def reads(self, p: int, q: int) -> tuple[int, int]:
        """Rows and columns of the input, padding included, that p x q of the output read."""
        return tuple(
            (n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in zip((p, q), self.stride, self.kernel, self.dilation, strict=True)
        )

    def fold(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """float64 weight [K, C/groups, R, S] and bias [K] of the convolution followed by its BN."""
        conv = module.get_submodule(self.weight)
        weight = conv.weight.detach().to(torch.float64, copy=True)
        if weight.dim() == 2:  # a linear layer
            weight = weight[:, :, None, None]
        bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.detach().double()
        if self.bn is None:
            return weight, bias
        bn = module.get_submodule(self.bn)
        scale, shift = scale_shift(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        return weight.mul_(scale.detach().view(-1, 1, 1, 1)), bias * scale.detach() + shift.detach()


@dataclass(frozen=True)
class Pool:
    kernel: int
    stride: int
    padding: int

    def size(self, h: int, w: int) -> tuple[int, int]:
        return tuple((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in (h, w))


@dataclass(frozen=True)
class Step:
    """One thing to compute: y = act(conv(x) + residual), or its like; `op` names it.

    op: 'conv', 'stem' (a convolution, ReLU and max-pool), 'norm' (a batch norm behind no convolution, and its ReLU),
    'max_pool', 'avg_pool' (over the whole map), 'linear', or 'traced' (a node that matched nothing). layers: the
    graph's nodes it covers, in order. x, residual, output: names of values, each the name of the graph's node that has
    the same value. segment: a pointwise convolution of another value, the projection shortcut, that is added as a
    second part of the reduction. bn: where a norm's tensors are in the model.
    """

    op: str
    layers: tuple[str, ...]
    x: str
    output: str
    conv: Convolution | None = None
    relu: bool = False
    residual: str | None = None
    segment: tuple[str, Convolution] | None = None
    pool: Pool | None = None
    bn: str | None = None
    node: fx.Node | None = field(default=None, compare=False)
    why: str = ""  # traced: why it matched nothing

    @property
    def convolutions(self) -> tuple[Convolution, ...]:
        """The convolution, and the projection that is part of its reduction: what its folded weights depend on."""
        return tuple(c for c in (self.conv, self.segment and self.segment[1]) if c is not None)

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the values it needs."""
        if self.op == "traced":
            return tuple(n.name for n in self.node.all_input_nodes)  # constants among them
        more = (self.residual, self.segment and self.segment[0])
        return (self.x, *(name for name in more if name is not None))


@dataclass
class Network:
    """steps in an order they can run in; alias: value that is another one, seen in another shape, by name; constants:
    sizes and what was reckoned from them, the same at every call of this shape."""

    graph: Graph
    steps: list[Step]
    alias: dict[str, str]
    constants: dict[str, object] = field(default_factory=dict)

    def source(self, name: str) -> str:
        while name in self.alias:
            name = self.alias[name]
        return name

    @functools.cached_property
    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @functools.cached_property
    def returned(self) -> fx.Node:
        """The node that says what the model returns."""
        return next(n for n in self.graph.nodes if n.op == "output")

    @functools.cached_property
    def outputs(self) -> set[str]:
        """Names of the values that the model returns."""
        return {self.source(n.name) for n in self.returned.all_input_nodes}

    @functools.cached_property
    def spent(self) -> set[str]:
        """Names of the nodes that change a tensor in place which is the model's own and which nobody else reads."""

        def alone(node) -> bool:
            """Whether nobody but its one user reads this tensor, nor its memory."""
            if not isinstance(node, fx.Node) or node.name in self.alias or len(node.users) != 1:
                return False
            if node.op in ("placeholder", "get_attr"):
                return False
            return not may_alias(self.graph, node) or (is_in_place(self.graph, node) and alone(node.args[0]))

        nodes = [n for n in self.graph.nodes if is_in_place(self.graph, n) and changes_numbers(self.graph, n)]
        return {n.name for n in nodes if n.args and alone(n.args[0])}

    def releases(self, groups: Sequence[Sequence[Step]]) -> list[list[str]]:
        """For groups of steps in the order they run: the values that nothing reads after each."""
        seen = self.outputs | set(self.constants)
        over: list[list[str]] = []
        for group in reversed(groups):
            names = dict.fromkeys(self.source(n) for step in group for n in (*step.reads, step.output))
            over.append([name for name in names if name not in seen])
            seen.update(names)
        return over[::-1]


class _Matcher:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.taken: dict[fx.Node, Step] = {}  # the node whose value a step yields -> the step
        self.covered: set[str] = set()
        self.alias: dict[str, str] = {}
        self.constants = {
            n.name: graph.fake[n] for n in graph.nodes if is_size(n) and n in graph.fake and _is_plain(graph.fake[n])
        }

    # What a node is.

    def module(self, node: fx.Node, *types) -> nn.Module | None:
        m = self.graph.submodule(node)
        return m if type(m) in types and not has_hooks(m) else None

    def convolution(self, node: fx.Node) -> nn.Conv2d | None:
        m = self.module(node, nn.Conv2d, TracedConvolution)
        if m is None or m.padding_mode != "zeros" or isinstance(m.padding, str) or len(node.args) != 1:
            return None
        shape = self.graph.shape(node)
        return m if shape is not None and len(shape) == 4 and 0 not in shape else None

    def norm(self, node: fx.Node) -> bool:
        m = self.module(node, nn.BatchNorm2d, TracedNorm, FrozenBatchNorm2d, nn.SyncBatchNorm)
        return m is not None and m.running_mean is not None and m.running_var is not None

    def relu(self, node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in RELU_FUNCTIONS and len(node.args) == 1
        if node.op == "call_method":
            return node.target in ("relu", "relu_") and len(node.args) == 1
        return self.module(node, nn.ReLU) is not None

    def add(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        plain = node.op == "call_function" and node.target in ADD_FUNCTIONS
        if not (plain or (node.op == "call_method" and node.target in ("add", "add_"))) or node.kwargs:
            return None
        if len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args) or node.args[0] is node.args[1]:
            return None
        shapes = {self.graph.shape(a) for a in node.args} | {self.graph.shape(node)}
        return tuple(node.args) if len(shapes) == 1 and len(shapes.pop() or ()) == 4 else None

    def max_pool(self, node: fx.Node) -> Pool | None:
        if node.op == "call_function" and node.target in (F.max_pool2d, torch.max_pool2d):
            names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
            given = dict(zip(names, node.args, strict=False)) | node.kwargs
        else:
            m = self.module(node, nn.MaxPool2d)
            if m is None:
                return None
            given = {k: getattr(m, k) for k in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")}
            given["return_indices"] = m.return_indices
        if _pair(given.get("dilation", 1)) != (1, 1) or given.get("ceil_mode") or given.get("return_indices"):
            return None
        kernel = _pair(given["kernel_size"])
        pairs = (kernel, _pair(given.get("stride") or kernel), _pair(given.get("padding", 0)))
        return Pool(*(a for a, _ in pairs)) if all(p is not None and p[0] == p[1] for p in pairs) else None

    def avg_pool(self, node: fx.Node) -> bool:
        """Whether node is the average over the whole map."""
        if node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
            return _pair(node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")) == (1, 1)
        m = self.module(node, nn.AdaptiveAvgPool2d)
        return m is not None and _pair(m.output_size) == (1, 1)

    def flatten(self, node: fx.Node) -> bool:
        """Whether node is [N, C, 1, 1] -> [N, C]."""
        flat = (node.op == "call_function" and node.target is torch.flatten) or (
            node.op == "call_method" and node.target == "flatten"
        )
        shape = self.graph.shape(node)
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        before = self.graph.shape(source) if source is not None else None
        if not flat and self.module(node, nn.Flatten) is None:
            return False
        return before is not None and len(before) == 4 and before[2:] == (1, 1) and shape == before[:2]

    # What becomes of it.

    def only_user(self, node: fx.Node) -> fx.Node | None:
        users = self.users(node)
        return users[0] if len(users) == 1 else None

    def reads_alone(self, node: fx.Node) -> bool:
        """Whether nothing else reads the input of the step that yields node."""
        first = next(n for n in self.graph.nodes if n.name == self.taken[node].layers[0])
        return len(self.users(first.args[0])) == 1

    def users(self, node: fx.Node) -> list[fx.Node]:
        """Who reads its numbers; not who asks for its size."""
        return [user for user in node.users if user.name not in self.constants]

    def grow(self, node: fx.Node) -> None:
        """A convolution with its BN, the ReLU and the pool after it, or up to the add it leads to."""
        conv, at = self.convolution(node), node
        layers = [node]
        user = self.only_user(at)
        bn = None
        if user is not None and self.norm(user):
            bn, at = user.target, user
            layers.append(user)
        spec = Convolution(
            node.target, bn, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
            conv.dilation, conv.groups,
        )  # fmt: skip
        step = Step("conv", tuple(n.name for n in layers), node.args[0].name, at.name, spec)
        user = self.only_user(at)
        if user is not None and self.relu(user):
            step, at = self.extend(step, user, relu=True), user
            user = self.only_user(at)
            pool = self.max_pool(user) if user is not None else None
            if pool is not None:
                step, at = replace(self.extend(step, user, pool=pool), op="stem"), user
        self.taken[at] = step

    def extend(self, step: Step, node: fx.Node, **more) -> Step:
        return replace(step, layers=(*step.layers, node.name), output=node.name, **more)

    def join(self, node: fx.Node, operands: tuple[fx.Node, fx.Node]) -> None:
        """The shortcut's add, into the convolution that comes last before it; a projection becomes its segment."""
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        ready = [
            a
            for a in operands
            if a in self.taken and self.taken[a].op == "conv" and not self.taken[a].relu and len(self.users(a)) == 1
            and self.taken[a].residual is None and self.taken[a].segment is None
        ]  # fmt: skip
        if not ready:
            return
        # A projection is the pointwise one of two; else the later one is the main branch.
        main = max(ready, key=lambda a: order[a])
        if len(ready) == 2:
            projections = [a for a in ready if self.taken[a].conv.is_pointwise]
            if len(projections) == 1:
                main = next(a for a in ready if a is not projections[0])
            elif len(projections) == 2:
                # A bottleneck's: the main branch reads what its 3x3 made for it alone, the other the block's input.
                main = max(ready, key=lambda a: (self.reads_alone(a), self.taken[a].conv.stride == (1, 1), order[a]))
        other = next(a for a in operands if a is not main)
        step = self.taken.pop(main)
        if other in ready and self.taken[other].conv.is_pointwise and step.conv.groups == 1:
            projection = self.taken.pop(other)
            layers = (*projection.layers, *step.layers)
            step = replace(step, layers=layers, segment=(projection.x, projection.conv))
        else:
            step = replace(step, residual=other.name)
        self.finish(self.extend(step, node), node)

    def finish(self, step: Step, node: fx.Node) -> Step:
        """Take a step that yields node, and the ReLU after it."""
        user = self.only_user(node)
        if user is not None and self.relu(user):
            step, node = self.extend(step, user, relu=True), user
        self.taken[node] = step
        return step

    def normalise(self, node: fx.Node) -> None:
        """A batch norm that no convolution could take in, a pre-activation block's first, and the ReLU after it."""
        step = Step("norm", (node.name,), node.all_input_nodes[0].name, node.name, bn=node.target)
        self.covered.update(self.finish(step, node).layers)

    def match(self) -> list[Step]:
        for node in self.graph.nodes:
            if self.convolution(node) is not None:
                self.grow(node)
        for node in self.graph.nodes:
            if (operands := self.add(node)) is not None:
                self.join(node, operands)
        self.covered = {n for step in self.taken.values() for n in step.layers}
        for node in self.graph.nodes:
            if self.norm(node) and node.name not in self.covered and len(self.graph.shape(node) or ()) == 4:
                self.normalise(node)
        return [step for node in self.graph.nodes if (step := self.step_of(node)) is not None]

    def step_of(self, node: fx.Node) -> Step | None:
        if node in self.taken:
            return self.taken[node]
        if node.name in self.covered or node.name in self.constants or node.op in ("placeholder", "output"):
            return None
        x = node.all_input_nodes[0].name if node.all_input_nodes else ""
        shape = self.graph.shape(node)
        if (pool := self.max_pool(node)) is not None and shape is not None and len(shape) == 4:
            return Step("max_pool", (node.name,), x, node.name, pool=pool)
        if self.avg_pool(node) and shape is not None and len(shape) == 4:
            return Step("avg_pool", (node.name,), x, node.name)
        if self.flatten(node):
            self.alias[node.name] = x
            return None
        m = self.module(node, nn.Linear)
        if m is not None and shape is not None and len(shape) == 2:
            spec = Convolution(node.target, None, m.in_features, m.out_features, (1, 1))
            return Step("linear", (node.name,), x, node.name, spec)
        return traced(node, "nothing here computes it")


def fold(step: Step, module) -> tuple[list[Tensor], Tensor]:
    """([weight, projection's weight], bias) of a step in float64; the biases of both branches are one."""
    weight, bias = step.conv.fold(module)
    if step.segment is None:
        return [weight], bias
    other, more = step.segment[1].fold(module)
    return [weight, other], bias + more


def weights_of(step: Step) -> int:
    """Numbers of weights a step reads."""
    return sum(c.out_channels * c.in_channels // c.groups * c.kernel[0] * c.kernel[1] for c in step.convolutions)


def traced(node: fx.Node, why: str) -> Step:
    """The step that runs a node as it was traced."""
    return Step("traced", (node.name,), "", node.name, node=node, why=why)


def _is_plain(value) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str, slice))


def _pair(value) -> tuple[int, int] | None:
    if isinstance(value, int):
        return (value, value)
    return tuple(value) if isinstance(value, (tuple, list)) and len(value) == 2 else None


def match(graph: Graph) -> Network:
    """The steps of a graph whose values have shapes (graph.propagate)."""
    if graph.opaque:
        nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        return Network(graph, [traced(n, graph.opaque) for n in nodes], {})
    matcher = _Matcher(graph)
    steps = matcher.match()
    return Network(graph, steps, matcher.alias, matcher.constants)
