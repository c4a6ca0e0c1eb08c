"""A model as a graph that says what each tensor is: traced, stripped of what does nothing at inference, functional.

The steps of a plan are matched on this graph (steps.py), never on names of attributes: what a model calls its parts,
and how it nests them, does not matter.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FrozenBatchNorm2d

from ..convert import restore_blocks
from ..frozen import eps_of, is_frozen


class TracedNorm(nn.BatchNorm2d):
    """A batch norm by running statistics that the model computes by F.batch_norm, of as many dimensions as it likes."""

    def __init__(self, tensors: dict[str, Tensor | None], eps: float, said: float | None):
        """said: the eps of the module whose tensors these are, for `refresh` to compare."""
        super().__init__(tensors["running_mean"].numel(), eps, affine=False)
        self.eval()
        self.said = said
        self.num_batches_tracked = None
        self._parameters |= {name: tensors[name] for name in ("weight", "bias")}
        self._buffers |= {name: tensors[name] for name in ("running_mean", "running_var")}

    def _check_input_dim(self, x: Tensor) -> None: ...


class TracedConvolution(nn.Conv2d):
    """A convolution that the model computes by F.conv2d, with tensors that it holds as they are."""

    def __init__(self, weight: Tensor, bias: Tensor | None, **options):
        outputs, inputs, *kernel = weight.shape
        inputs *= options.get("groups", 1)
        super().__init__(inputs, outputs, tuple(kernel), bias=False, device="meta", **options)
        self._parameters |= {"weight": weight, "bias": bias}


TRACED = (TracedNorm, TracedConvolution)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
IN_PLACE_OPERATORS = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
}
SIZES = {"size", "dim", "ndimension", "numel", "nelement", "element_size"}  # methods that yield no tensor
# Return a tensor of their own, whatever they are given; of all else it is assumed that the result may share memory.
FRESH_MODULES = (
    *TRACED,
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    FrozenBatchNorm2d,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Linear,
    nn.GroupNorm,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.SiLU,
    nn.GELU,
)
FRESH_FUNCTIONS = {
    *(F.batch_norm, F.group_norm, F.layer_norm, F.instance_norm, F.hardtanh, F.hardswish, F.hardsigmoid, F.leaky_relu),
    *(F.relu, F.conv2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.linear, F.interpolate, F.silu, F.gelu),
    *(torch.relu, torch.cat, torch.add, torch.sub, torch.mul, torch.div, torch.sigmoid, torch.tanh, torch.mean),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg, operator.matmul),
}
# Of what changes a tensor in place, methods and functions that change its numbers, and never its shape or strides.
CHANGE_NUMBERS = {
    *("add_", "sub_", "mul_", "div_", "pow_", "neg_", "exp_", "sqrt_", "clamp_", "clamp_min_", "clamp_max_", "relu_"),
    *("sigmoid_", "tanh_", "hardtanh_", "leaky_relu_", "elu_", "silu_", "copy_", "fill_", "zero_", "addcmul_"),
}
FRESH_METHODS = {"add", "sub", "mul", "div", "pow", "neg", "relu", "sigmoid", "tanh", "mean", "sum", "clone"}
OTHER_WAY = "for these sizes it takes another way than for the example; plan for them with an example of their own"
CHEAP_FUNCTIONS = {F.relu, torch.relu, F.max_pool2d, torch.cat, torch.add, operator.add, operator.mul}
_MODULE = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}


class _Proxy(fx.Proxy):
    """fx takes `y += z` for `y = y + z`, after which another name of y would have its old value."""

    requires_grad = False  # nothing does at inference

    def __setattr__(self, name: str, value) -> None:
        if name not in ("node", "tracer"):
            raise fx.proxy.TraceError(f"{name} of a tensor is set, which a graph does not show")
        super().__setattr__(name, value)


def _in_place_method(function):
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_function.__name__}__", _in_place_method(_function))


class _Tracer(fx.Tracer):
    """inputs: an example, for what the model decides by sizes; without one it may decide nothing by them.

    returned: what the model returns, with proxies in it.
    """

    def __init__(self, inputs: tuple | None = None):
        super().__init__()
        self.inputs = inputs
        self.returned: object = None
        self.depth = 0  # of create_arg, which calls itself
        self.values: dict[fx.Node, object] = {}
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """The model is called as the example would be, all else having its default; fx would give it something for
        each name, past what decorators do with them."""
        names = _names_of(root_fn, len(self.inputs or ()))
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def create_arg(self, a):
        # Of a dictionary of a class of its own fx keeps the contents. The last that it asks for is what is returned.
        if self.depth == 0:
            self.returned = a
        self.depth += 1
        try:
            return super().create_arg(a)
        finally:
            self.depth -= 1

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What `if` sees: of sizes, what they are in the example, which the graph asserts from then on."""
        if self.inputs is None or not is_size(obj.node):
            return super().to_bool(obj)
        decision = bool(self._value(obj.node))
        holds = obj if decision else self.create_proxy("call_function", operator.not_, (obj,), {})
        self.create_proxy("call_function", torch._assert, (holds, OTHER_WAY), {})
        return decision

    @torch.no_grad()
    def _value(self, node: fx.Node):
        """What a node yields for the example, tensors without data."""
        needed, stack = set(), [node]
        while stack:
            n = stack.pop()
            if n not in needed and n not in self.values:
                needed.add(n)
                stack += n.all_input_nodes
        with self.fake, patch.multiple(nn.Module, **_MODULE):  # the tracer has put its own in their place
            for n in self.graph.nodes:
                if n in needed:
                    args, kwargs = fx.node.map_arg((n.args, n.kwargs), self.values.__getitem__)
                    self.values[n] = self._yielded(n, args, kwargs)
        return self.values[node]

    def _yielded(self, node: fx.Node, args: tuple, kwargs: dict):
        if node.op == "placeholder":
            i = [n for n in self.graph.nodes if n.op == "placeholder"].index(node)
            if i >= len(self.inputs):
                raise TypeError(f"{node.target} is not given, and it decides something by it")
            value = self.inputs[i]
            return self.fake.from_tensor(value).to(dtype_of(self.root)) if isinstance(value, Tensor) else value
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        found = operator.attrgetter(node.target)(self.root)
        return found(*args, **kwargs) if node.op == "call_module" else found

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        # A module with hooks is called, so that its hooks run.
        return isinstance(m, FrozenBatchNorm2d) or has_hooks(m) or super().is_leaf_module(m, qualified_name)


@dataclass
class Graph:
    """module: the traced copy; fake: what each node yields (tensors without data in it); flops: 2 x MAC of a node."""

    module: fx.GraphModule
    fake: dict[fx.Node, object] = field(default_factory=dict)
    flops: dict[fx.Node, int] = field(default_factory=dict)
    meta: fx.GraphModule | None = None  # the module without its numbers
    opaque: str = ""  # why nothing may be matched; '' if it may
    dress: Callable[[object], object] | None = None  # makes of Python's dictionaries those that the model returns

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        return dtype_of(self.module)

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        value = self.fake.get(node)
        return tuple(value.shape) if isinstance(value, Tensor) else None

    def submodule(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(node.target) if node.op == "call_module" else None


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of its parameters, and of the inputs that it is given."""
    tensors = (*model.parameters(), *model.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


def has_hooks(m: nn.Module) -> bool:
    """Whether calling m does more than its class's forward."""
    hooks = (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, getattr(m, "_backward_pre_hooks", None))
    return any(hooks) or "forward" in m.__dict__


def capture(model: nn.Module, inputs: tuple | None = None) -> Graph:
    """Trace a frozen copy of `model` (which stays as it is), in evaluation mode, fused blocks as their library's.

    inputs: an example of what it will be called with; arguments beyond have their defaults, and what the model decides
    by sizes is decided for these. Raises ValueError if it cannot be traced, with the tracer's words.
    """
    if model._forward_hooks or model._forward_pre_hooks or "forward" in model.__dict__:
        raise ValueError(
            f"model: {type(model).__name__} has forward hooks, or a forward of its own, which tracing would pass over; "
            "remove them, or give it inside another module"
        )
    frozen = restore_blocks(copy.deepcopy(model))
    for m in frozen.modules():
        if is_frozen(m) and not isinstance(m, FrozenBatchNorm2d):
            m.eps, m.__class__ = eps_of(m), FrozenBatchNorm2d
    frozen.eval()  # not all return themselves
    frozen.requires_grad_(False)
    tracer = _Tracer(inputs)
    try:
        traced = fx.GraphModule(frozen, tracer.trace(frozen), type(model).__name__)
    except Exception as error:
        raise ValueError(
            f"model: {type(model).__name__} cannot be traced ({words_of(error)}); "
            "give the part of it that is a fixed sequence of layers, as a detector's `model.backbone`"
        ) from error
    for node in list(traced.graph.nodes):
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        if type(module) in (nn.Identity, *DROPOUTS) and not has_hooks(module):
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)
    graph = Graph(traced, dress=dress_of(tracer.returned))
    changed = _changed(graph)
    _recognise_norms(traced, frozen, changed)
    _recognise_convolutions(traced, changed)
    graph.opaque = _make_functional(graph)
    if not graph.opaque:  # before, what changes a tensor in place and is read by nobody would be taken for dead
        traced.graph.eliminate_dead_code()
    traced.recompile()
    return graph


def dress_of(returned) -> Callable[[object], object] | None:
    """A function that turns dictionaries into OrderedDicts, or dataclasses that are one (as Hugging Face's results),
    where `returned` has those; None if it has none. It calls no code of theirs: what that did is in `returned`."""
    if isinstance(returned, OrderedDict):
        kind, inner = type(returned), {key: dress_of(value) for key, value in returned.items()}
        attributes = _attributes(returned)
        if attributes is None or not (kind is OrderedDict or is_dataclass(kind)):
            return None

        def record(found: dict):
            values = {key: inner[key](value) if inner[key] else value for key, value in found.items()}
            result = kind.__new__(kind)
            for key, value in values.items():
                OrderedDict.__setitem__(result, key, value)
            for name, (is_item, what) in attributes.items():
                object.__setattr__(result, name, values[what] if is_item else what)
            return result

        return record
    if isinstance(returned, dict):
        parts = {key: dress_of(value) for key, value in returned.items()}
        if any(parts.values()):
            return lambda found: {key: parts[key](value) if parts[key] else value for key, value in found.items()}
    if isinstance(returned, (tuple, list)):
        places = [dress_of(value) for value in returned]
        if any(places):
            kind = type(returned)
            build = kind._make if hasattr(kind, "_make") else tuple if isinstance(returned, tuple) else list
            return lambda found: build(d(v) if d else v for d, v in zip(places, found, strict=True))
    return None


def _attributes(record: OrderedDict) -> dict[str, tuple[bool, object]] | None:
    """Each attribute as (True, the key of the item that it is) or (False, its value); None if one is neither."""
    found: dict[str, tuple[bool, object]] = {}
    for name, value in vars(record).items():
        key = next((key for key, item in record.items() if item is value), None)
        if key is None and _has_proxy(value):
            return None
        found[name] = (False, value) if key is None else (True, key)
    return found


def _has_proxy(value) -> bool:
    if isinstance(value, dict):
        return any(map(_has_proxy, value.values()))
    if isinstance(value, (tuple, list, set)):
        return any(map(_has_proxy, value))
    return isinstance(value, fx.Proxy)


def _changed(graph: Graph) -> set[str]:
    """The tensors of the model that its forward may change in place. Raises ValueError where it does so, and a module
    that is called has the tensor: it would not see the change."""
    first_of: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and first_of.setdefault(node.target, node) is not node:
            node.replace_all_uses_with(first_of[node.target])  # of a buffer fx makes one at every mention
            graph.module.graph.erase_node(node)
    perhaps: set[str] = set()
    certainly: set[str] = set()
    for node in graph.nodes:
        if is_in_place(graph, node) and node.args and isinstance(node.args[0], fx.Node):
            chain = [node.args[0], *_viewed(graph, node.args[0])]
            perhaps.update(n.target for n in chain if n.op == "get_attr")
            first = node.args[0]
            while isinstance(first, fx.Node) and (first.op == "call_method" or first.target is getattr):
                first = first.args[0]  # a view, or `data`
            if isinstance(first, fx.Node) and first.op == "get_attr":
                certainly.add(first.target)
    for node in graph.nodes if certainly else ():
        mine = [target for target in certainly if node.op == "call_module" and target.startswith(f"{node.target}.")]
        if mine:
            raise ValueError(
                f"model: it changes {mine[0]} in place and calls {node.target}, which has it; change it before, and "
                "plan for the model as it is then"
            )
    return perhaps


def _recognise_norms(traced: fx.GraphModule, model: nn.Module, changed: set[str]) -> None:
    """What a class of somebody's own computes by F.batch_norm becomes a module, as steps.py knows them.

    traced: changed. Beside the tensors of such a norm, which it holds where the model does, it holds the module.
    changed: tensors that are not what the model holds by the time of the call.
    """
    made: dict[tuple, str] = {}
    for node in traced.graph.find_nodes(op="call_function", target=F.batch_norm):
        given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        given.apply_defaults()
        x, training, eps = (given.arguments[name] for name in ("input", "training", "eps"))
        names = {name: given.arguments[name] for name in ("running_mean", "running_var", "weight", "bias")}
        path = str(getattr(names["running_mean"], "target", "")).rpartition(".")[0]
        mine = all(t is None or (t.op, t.target) == ("get_attr", f"{path}.{name}") for name, t in names.items())
        if training is not False or not path or not mine or names["running_var"] is None:
            continue
        if not _is_gone_through(traced, path) or not changed.isdisjoint(t.target for t in names.values() if t):
            continue
        key = path, eps, names["weight"] is None, names["bias"] is None
        if key not in made:
            held = traced.get_submodule(path)
            tensors = {name: None if t is None else getattr(held, name) for name, t in names.items()}
            said = getattr(model.get_submodule(path), "eps", None)
            made[key] = _add(traced, path, "traced_norm", TracedNorm(tensors, eps, said))
        _replace(node, made[key], x)


_OF_CONV2D = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def _recognise_convolutions(traced: fx.GraphModule, changed: set[str]) -> None:
    """What a class of somebody's own computes by F.conv2d, of tensors that it holds and has not changed, becomes a
    module."""
    made: dict[tuple, str] = {}
    for node in traced.graph.find_nodes(op="call_function", target=F.conv2d):
        given = dict(zip(_OF_CONV2D, node.args, strict=False)) | node.kwargs
        x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        given_tensors = [t for t in (weight, bias) if t is not None]
        held = all(isinstance(t, fx.Node) and t.op == "get_attr" and t.target not in changed for t in given_tensors)
        plain = all(isinstance(n, int) for value in given.values() for n in _as_tuple(value))
        path = weight.target.rpartition(".")[0] if held else ""
        if not held or not plain or not _is_gone_through(traced, path):
            continue
        tensors = [None if t is None else operator.attrgetter(t.target)(traced) for t in (weight, bias)]
        key = weight.target, bias and bias.target, *sorted((k, _as_tuple(v)) for k, v in given.items())
        if key not in made:
            options = {k: v if k == "groups" else (_as_tuple(v) * 2)[:2] for k, v in given.items()}
            made[key] = _add(traced, path, "traced_convolution", TracedConvolution(*tensors, **options))
        _replace(node, made[key], x)


def _is_gone_through(traced: fx.GraphModule, path: str) -> bool:
    """Whether the tracer has gone through all calls of the module at this path, which it then holds for its tensors."""
    return not path or type(traced.get_submodule(path)) is nn.Module


def _add(traced: fx.GraphModule, path: str, name: str, module: nn.Module) -> str:
    """Let the module at this path hold another, by a name that it has not; that one's path."""
    holder = traced.get_submodule(path)
    free = next(f"{name}{i}" for i in itertools.count() if not hasattr(holder, f"{name}{i}"))
    holder.add_module(free, module)
    return f"{path}.{free}".lstrip(".")


def _replace(node: fx.Node, path: str, x: fx.Node) -> None:
    """Call the module at this path for what node does to x."""
    with node.graph.inserting_before(node):
        node.replace_all_uses_with(node.graph.call_module(path, (x,)))
    node.graph.erase_node(node)


def _as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _names_of(forward: Callable, given: int) -> list[str]:
    """What a model's forward calls the tensors that it is given by position; those that it cannot do without are among
    them."""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(forward).parameters.values())
    positional = [p for p in parameters if p.kind in named][1:]
    needed = sum(p.default is inspect.Parameter.empty for p in positional)
    names = [p.name for p in positional[: max(given, needed)]]
    more = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL), None)
    return names if more is None else names + [f"{more}_{i}" for i in range(given - len(names))]


def words_of(error: Exception) -> str:
    """Kind and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def is_in_place(graph: Graph, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(graph.submodule(node), "inplace", False))
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op != "call_function" or is_size(node):
        return False
    name = getattr(node.target, "__name__", "")  # torch.relu_ and its like
    named = name.endswith("_") and not name.endswith("__") and node.target not in (operator.and_, operator.or_)
    return node.target in IN_PLACE_OPERATORS or named or node.kwargs.get("inplace") is True or "out" in node.kwargs


def changes_numbers(graph: Graph, node: fx.Node) -> bool:
    """Whether a node that works in place leaves shape and strides alone, as far as is known."""
    if node.op == "call_method":
        return node.target in CHANGE_NUMBERS
    if node.op == "call_module":
        return type(graph.submodule(node)) in FRESH_MODULES
    known = node.target in IN_PLACE_OPERATORS or getattr(node.target, "__name__", "") in CHANGE_NUMBERS
    return "out" not in node.kwargs and (known or node.target in FRESH_FUNCTIONS)


def is_size(node: fx.Node) -> bool:
    """Whether node is a size of a tensor, or reckoned from sizes alone."""
    if node.op == "call_method":
        return node.target in SIZES
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return bool(node.all_input_nodes) and all(is_size(n) for n in node.all_input_nodes)


def may_alias(graph: Graph, node: fx.Node) -> bool:
    """Whether what node yields may share memory with its arguments."""
    if node.op == "call_module":
        m = graph.submodule(node)
        return type(m) not in FRESH_MODULES or has_hooks(m) or is_in_place(graph, node)
    if is_size(node):
        return False
    fresh = FRESH_FUNCTIONS if node.op == "call_function" else FRESH_METHODS if node.op == "call_method" else ()
    return node.target not in fresh or is_in_place(graph, node)


def _make_functional(graph: Graph) -> str:
    """Whoever reads a tensor after it was changed in place reads the change's result. Returns why not, or ''."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not is_in_place(graph, node):
            continue
        changed = node.args[0] if node.args and "out" not in node.kwargs else None
        if not isinstance(changed, fx.Node):
            return f"{node.name} changes in place what the graph does not show"
        earlier = [user for user in changed.users if order[user] < order[node]]
        views = [user.name for user in earlier if may_alias(graph, user)]
        chain = _viewed(graph, changed)
        others = [(n, user) for n in chain for user in n.users if user is not changed and user not in chain]
        views += [n.name for n, user in others if order[user] > order[changed] or may_alias(graph, user)]
        if views:
            return f"{node.name} changes in place a tensor that shares memory with {', '.join(views)}"
        for user in [user for user in changed.users if order[user] > order[node]]:
            user.replace_input_with(changed, node)
    return ""


def _viewed(graph: Graph, node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory node may share because it is a view of them."""
    found, open_nodes = [], [node]
    while open_nodes:
        node = open_nodes.pop()
        if node.op not in ("placeholder", "get_attr") and may_alias(graph, node) and not is_in_place(graph, node):
            found += node.all_input_nodes
            open_nodes += node.all_input_nodes
    return found


def propagate(graph: Graph, inputs: tuple) -> None:
    """Fill in graph.fake and graph.flops for these inputs, computing nothing: tensors of the meta device."""
    graph.fake, graph.flops = {}, {}
    if graph.meta is None:
        memo = {id(t): _meta(t) for t in (*graph.module.parameters(), *graph.module.buffers())}
        graph.meta = copy.deepcopy(graph.module, memo)

    class Interpreter(fx.Interpreter):
        def run_node(self, node):
            graph.flops[node], counter = 0, None
            if _norm_fits(graph, node):  # PyTorch's own way takes a millisecond
                value = torch.empty_like(self.env[node.args[0]])
            elif _cheap(graph, node):
                value = super().run_node(node)
            else:
                with FlopCounterMode(display=False) as counter:
                    value = super().run_node(node)
                graph.flops[node] = counter.get_total_flops()
            graph.fake[node] = value
            return value

    interpreter = Interpreter(graph.meta, graph=graph.module.graph)
    with torch.no_grad():
        interpreter.run(*tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, inputs))


def _meta(t: Tensor) -> Tensor:
    meta = t.detach().to("meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(t, nn.Parameter) else meta


def _norm_fits(graph: Graph, node: fx.Node) -> bool:
    """Whether node is a batch norm, by running statistics, of a tensor that it can take."""
    m = graph.submodule(node)
    if type(m) not in (nn.BatchNorm2d, TracedNorm) or m.running_mean is None or has_hooks(m) or len(node.args) != 1:
        return False
    x = graph.fake.get(node.args[0])
    if not isinstance(x, Tensor):
        return False
    same = x.dtype == m.running_mean.dtype and (m.weight is None or x.dtype == m.weight.dtype)
    return x.dim() == 4 and x.shape[1] == m.num_features and same


def _cheap(graph: Graph, node: fx.Node) -> bool:
    """Whether a node multiplies no matrices, so that nothing need be counted."""
    if node.op == "call_module":
        return type(graph.submodule(node)) in (nn.BatchNorm2d, TracedNorm, FrozenBatchNorm2d, nn.ReLU, nn.MaxPool2d)
    return node.op in ("placeholder", "get_attr", "output") or node.target in CHEAP_FUNCTIONS
