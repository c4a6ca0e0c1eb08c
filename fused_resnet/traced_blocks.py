"""Residual blocks of classes that nobody named: recognised by what their forward does, traced, and fused in place.

A block counts as one if its forward is relu(chain(x) + shortcut(x)), its chain convolution, batch norm and ReLU taking
turns, the last ReLU behind the add; other modules may stand in front of a convolution or of the add (pools, attention,
dropout). What modules are called, how they are nested, and whether a ReLU is a module or a function, does not matter.
Hugging Face's ResNets, torchvision's RegNets, the residual towers of game engines and the CIFAR ResNets of so many
repositories are made of such blocks.

The trace speaks for the block as it was when it was swapped. What the forward may have looked at, plain attributes,
classes and children of the modules inside, is compared at every call; a block that has changed runs its own forward.
"""

from __future__ import annotations

import copyreg
import functools
import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as _module
from torchvision.ops import FrozenBatchNorm2d

from .blocks import Fused, Side, part, tampered

_MOST_CONVOLUTIONS = 8  # in a block: more is a stage
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, FrozenBatchNorm2d)
_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_IN_PLACE = {operator.iadd, "add_"}
_ADDS = {operator.add, torch.add, "add", *_IN_PLACE}
_PLAIN = (bool, int, float, str, type(None))
_GONE = object()


class _Seen(NamedTuple):
    """A module that the forward went through, and what of it may have decided the way."""

    path: str  # '' for the block
    kind: type[nn.Module]
    children: tuple[str, ...]
    plain: tuple[tuple[str, object], ...]

    @classmethod
    def of(cls, block: nn.Module, path: str) -> _Seen:
        module = part(block, path) if path else block
        plain = ((name, v) for name, v in vars(module).items() if name not in _MODES and _is_plain(v))
        return cls(path, type(module), tuple(module._modules), tuple(plain))

    def changed(self, block: nn.Module) -> str | None:
        module = part(block, self.path) if self.path else block
        where = f"{self.path}: " if self.path else ""
        if self.path and type(module) is not self.kind or tuple(module._modules) != self.children:
            return f"{where}other modules than when the block was recognised"
        for name, value in self.plain:
            if getattr(module, name, _GONE) != value:
                return f"{where}{name} is another than when the block was recognised"
        reason = tampered(module) if self.path else None
        return reason and f"{where}{reason}"


def _is_plain(value) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return type(value) in _PLAIN and value == value  # NaN would always be another


class Anatomy(NamedTuple):
    """Of a block, what the class Named is of others: where its parts are. Paths, to be copied and pickled with it.

    argument: what its forward calls x. others: modules in front of the second convolution, of the next, and at last of
    the add. relu: the last one, '' if it is a function. shortcut: (): x itself; a path: a module to be called; more:
    pools, a convolution and a batch norm. in_place: whether the sum takes the chain's place, and its dtype. seen: what
    else the forward went through.
    """

    argument: str
    parts: tuple[str, ...]
    activations: tuple[str, ...]
    others: tuple[tuple[str, ...], ...]
    relu: str
    shortcut: tuple[str, ...]
    in_place: bool
    seen: tuple[_Seen, ...]

    @property
    def residual(self) -> bool:
        return True

    def obstacle(self, block: nn.Module) -> str | None:
        return next(filter(None, (seen.changed(block) for seen in self.seen)), None)

    def between(self, block: nn.Module) -> list[list[nn.Module]]:
        return [[part(block, path) for path in paths] for paths in self.others[:-1]]

    def tail(self, block: nn.Module) -> list[nn.Module]:
        return [part(block, path) for path in self.others[-1]]

    def last(self, block: nn.Module) -> Callable[[Tensor], Tensor]:
        return part(block, self.relu) if self.relu else F.relu

    def side(self, block: nn.Module) -> Side:
        modules = tuple(part(block, path) for path in self.shortcut)
        return modules if len(modules) > 1 else modules[0] if modules else None


class TracedBlock(Fused):
    """A block of any class, fused; `fused_class` derives one of it. memory, an attribute: as FusedBasicBlock's."""

    _original: type[nn.Module]
    _anatomy: Anatomy

    def forward(self, *args, **kwargs) -> Tensor:
        if args and not kwargs or list(kwargs) == [self._anatomy.argument]:
            x, *more = *args, *kwargs.values()
            if not more and not (isinstance(x, Tensor) and self._promotes(x)):
                return super().forward(x)
        return super(Fused, self).forward(*args, **kwargs)  # which says what is wrong

    def _promotes(self, x: Tensor) -> bool:
        """Whether the add would give its result the dtype of x, and not that which autocast gives a convolution's."""
        own = self._anatomy
        if own.in_place or len(own.shortcut) > 1 or not torch.is_autocast_enabled(x.device.type):
            return False
        return x.dtype is not torch.get_autocast_dtype(x.device.type)

    def __reduce_ex__(self, protocol):
        build, args, *rest = super().__reduce_ex__(protocol)
        own = build in (copyreg.__newobj__, copyreg._reconstructor) and "_original" in vars(type(self))
        return (_blank, (type(self)._original,), *rest) if own else (build, args, *rest)


@functools.cache
def fused_class(original: type[nn.Module]) -> type[TracedBlock]:
    """The subclass of a block's class whose forward is fused. Raises TypeError where the class cannot have one."""
    names = {"__module__": original.__module__, "__doc__": original.__doc__, "_original": original}
    return type(original)(f"Fused{original.__name__}", (TracedBlock, original), names)


def _blank(original: type[nn.Module]) -> TracedBlock:
    """A block before it gets its state, for copies and pickles."""
    return object.__new__(fused_class(original))


def swap(block: nn.Module, anatomy: Anatomy) -> None:
    block.__class__ = fused_class(type(block))
    block.__dict__["_anatomy"] = anatomy


def restore(block: nn.Module) -> None:
    if "_original" in vars(type(block)):  # FSDP makes subclasses
        block.__class__ = type(block)._original
        for name in ("_anatomy", "memory"):
            block.__dict__.pop(name, None)


def discover(model: nn.Module, known: Callable[[nn.Module], bool]) -> dict[nn.Module, Anatomy | str]:
    """The residual blocks inside a model that are of no known class: their anatomy, or why they are left.

    known: says of a module whether it is one of those; nothing around a block is looked at.
    """
    found: dict[nn.Module, Anatomy | str] = {}
    holds: dict[nn.Module, bool] = {}

    def visit(module: nn.Module) -> bool:
        """Whether this is a residual block, or has one inside."""
        if module not in holds:
            holds[module] = False  # of one that holds itself
            inside = any([visit(child) for child in module.children()])
            if not inside and not known(module) and (anatomy := anatomy_of(module)) is not None:
                found[module] = anatomy
            holds[module] = inside or known(module) or module in found
        return holds[module]

    visit(model)
    return found


def anatomy_of(block: nn.Module) -> Anatomy | str | None:
    """A block's anatomy; a str, why a residual block cannot be fused; None: this is no residual block."""
    if type(block).__module__.partition(".")[0] == "torch" or "forward" in block.__dict__:
        return None
    modules = list(block.modules())
    convolutions = sum(isinstance(m, nn.Conv2d) for m in modules)
    if not 2 <= convolutions <= _MOST_CONVOLUTIONS or sum(isinstance(m, _NORMS) for m in modules) < 2:
        return None
    # Into all that is called; or else not into what has no batch norm inside: attention, stochastic depth, a shortcut.
    opaque = {name for name, m in block.named_modules() if name and not any(isinstance(n, _NORMS) for n in m.modules())}
    reasons = []
    for leaves in (set(), opaque):
        training, evaluating = (_read(block, mode, leaves) for mode in (True, False))
        if isinstance(training, Anatomy) and training == evaluating:
            return _refused(block) or training
        same = training == evaluating or not isinstance(training, Anatomy) or not isinstance(evaluating, Anatomy)
        reasons += [f for f in (training, evaluating) if isinstance(f, str)] if same else [_ANOTHER_WAY]
    return reasons[0] if reasons else None


_ANOTHER_WAY = "its forward goes another way in training"


def _refused(block: nn.Module) -> str | None:
    """Why a block of this class cannot become a fused one."""
    used = sorted(name for name in _RESERVED if hasattr(block, name))
    if used:
        return f"{used[0]}: a name that fused blocks have for something else"
    try:
        fused_class(type(block))
    except TypeError as error:
        return f"{type(block).__name__} cannot be derived from: {error}"
    return None


_RESERVED = {n for c in (Fused, TracedBlock) for n in (*vars(c), *c.__annotations__) if n[:2] != "__"} - {"forward"}


# --- what a forward does ----------------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    def __iadd__(self, other):  # fx takes it for an addition, whatever it is that changes
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """leaves: paths of modules that are not looked into. called: those of all modules that were called."""

    def __init__(self, leaves: set[str]):
        super().__init__()
        self.leaves = leaves
        self.called: set[str] = set()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, *args):
        self.called.add(self.path_of_module(m))
        return super().call_module(m, *args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kinds = (nn.Conv2d, *_NORMS)
        return module_qualified_name in self.leaves or isinstance(m, kinds) or super().is_leaf_module(m, "")


class _Trace(NamedTuple):
    graph: fx.Graph
    called: set[str]


def _trace(block: nn.Module, training: bool, leaves: set[str]) -> _Trace | None:
    """What a block's forward does in this mode; None where it cannot be traced or changes attributes."""
    tracer = _Tracer(leaves)
    modules = list(block.modules())
    kept = [{name: m.__dict__[name] for name in _MODES} for m in modules]
    for m in modules:
        m.__dict__ |= {name: OrderedDict() for name in _HOOKS} | {"training": training}
    before = [_attributes(m) for m in modules]
    try:
        with patch.multiple(_module, **{f"_global{name}": OrderedDict() for name in _HOOKS}):
            found = _Trace(tracer.trace(block), tracer.called)
    except Exception:  # whatever the code of others does with a proxy
        found = None
    finally:
        changed = [_put_back(m, was) for m, was in zip(modules, before, strict=True)]
        for m, was in zip(modules, kept, strict=True):
            m.__dict__ |= was
    return None if any(changed) else found


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MODES = ("training", *_HOOKS)  # hooks would be called with what is traced


def _attributes(m: nn.Module) -> dict[str, tuple[object, object]]:
    """What a forward might change: the attributes and, of containers, what is in them."""
    return {k: (v, v.copy() if type(v) in (dict, list, set) else None) for k, v in vars(m).items()}


def _put_back(m: nn.Module, before: dict[str, tuple[object, object]]) -> bool:
    """Undo what changed since `_attributes`; whether anything had."""
    changed = vars(m).keys() != before.keys()
    for name in vars(m).keys() - before.keys():
        del m.__dict__[name]
    for name, (value, contents) in before.items():
        if m.__dict__.get(name, _GONE) is not value:
            m.__dict__[name], changed = value, True
        if contents is not None and not _same(value, contents):
            changed = True
            value.clear()
            value.extend(contents) if type(value) is list else value.update(contents)
    return changed


def _same(a, b) -> bool:
    """Whether two containers of one type hold the same objects."""
    if len(a) != len(b):
        return False
    if type(a) is set:
        return {*map(id, a)} == {*map(id, b)}
    pairs = zip(a, b, strict=True) if type(a) is list else ((v, b.get(k, _GONE)) for k, v in a.items())
    return all(x is y for x, y in pairs)


class _Reader:
    """A graph, read from its end; `used` are the nodes that were understood."""

    def __init__(self, block: nn.Module):
        self.block = block
        self.used: set[fx.Node] = set()

    def module(self, node: fx.Node) -> nn.Module | None:
        return part(self.block, node.target) if node.op == "call_module" else None

    def take(self, node: fx.Node) -> fx.Node:
        self.used.add(node)
        return node

    def source(self, value) -> fx.Node | None:
        """The node behind this one and any Identity; None for what is no node."""
        while isinstance(value, fx.Node) and type(self.module(value)) is nn.Identity:
            (value,) = self.take(value).args
        return value if isinstance(value, fx.Node) else None

    def before(self, node: fx.Node) -> fx.Node | None:
        """The one node that this one reads."""
        inputs = node.all_input_nodes
        return self.source(inputs[0]) if len(inputs) == 1 else None

    def is_relu(self, node: fx.Node) -> bool:
        return type(self.module(node)) is nn.ReLU or (node.op != "call_module" and node.target in _RELUS)

    def chain(self, node: fx.Node | None) -> list[fx.Node] | None:
        """The nodes from x to this one, each with one input that nothing else reads; None if it is no chain."""
        nodes = []
        while node is not None and node.op != "placeholder":
            given = len(node.args) + len(node.kwargs) if node.op == "call_module" else 1
            if given != 1 or len(node.all_input_nodes) != 1 or len(node.users) != 1 or node.op not in _CALLS:
                return None
            nodes.append(node)
            node = self.before(node)
        return None if node is None else nodes[::-1]

    def kind(self, node: fx.Node) -> str:
        module = self.module(node)
        if isinstance(module, nn.Conv2d):
            return "convolution"
        if isinstance(module, _NORMS):
            return "batch norm"
        return "ReLU" if self.is_relu(node) else "other"

    def said(self, node: fx.Node) -> str:
        module = self.module(node)
        return f"{node.target}: {type(module).__name__}" if module is not None else node.name


_CALLS = ("call_module", "call_function", "call_method")
_TURNS = ("convolution", "batch norm", "ReLU")


def _read(block: nn.Module, training: bool, leaves: set[str]) -> Anatomy | str | None:
    """What the forward does in this mode, as `anatomy_of` has it."""
    trace = _trace(block, training, leaves)
    if trace is None:
        return None
    graph, called = trace
    read = _Reader(block)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    last = read.source(graph.output_node().args[0])
    if len(inputs) != 1 or last is None or not read.is_relu(last):
        return None
    total = read.before(read.take(last))
    if total is None or total.op not in _CALLS or total.target not in _ADDS or total.kwargs or len(total.args) != 2:
        return None
    if total.target in _IN_PLACE and total.args[0].op == "placeholder":
        return None  # what it is given changes
    read.take(total)
    chain, side = _branches(read, total)
    if chain is None:
        return None
    turns: list[fx.Node] = []
    between: list[list[str]] = []
    tail: list[fx.Node] = []
    for node in chain:
        kind, expected = read.kind(node), _TURNS[len(turns) % 3]
        module = kind == "other" and node.op == "call_module"
        if kind == expected and not tail:
            turns.append(node)
            if kind == "ReLU":
                between.append([])
        elif module and expected == "convolution" and turns:
            between[-1].append(node.target)
        elif module and expected == "ReLU":
            tail.append(node)  # if nothing follows
        else:
            return f"{read.said(tail[0] if tail else node)}, where a {expected} would be fused"
        read.take(node)
    if len(turns) % 3 != 2:
        return f"{read.said(turns[-1])}, where a batch norm would be fused"
    shortcut = _shortcut(read, side)
    if shortcut is None:
        return "its shortcut is neither the input, nor a projection, nor one module"
    if {n for n in graph.nodes if n.op in _CALLS} != read.used:
        return None  # it does something else as well
    paths = [n.target if n.op == "call_module" else "" for n in (*turns, last)]
    parts, activations = tuple(p for i, p in enumerate(paths) if i % 3 != 2), tuple(filter(None, paths[2::3]))
    others = tuple(map(tuple, (*between, [node.target for node in tail])))
    around = {".".join(path.split(".")[:i]) for path in called for i in range(path.count(".") + 1)}
    rest = (around | called) - {*parts, *activations, *shortcut, *itertools.chain(*others)}
    seen = tuple(_Seen.of(block, path) for path in sorted(rest))
    in_place = total.target in _IN_PLACE and read.source(total.args[0]) is not side
    return Anatomy(inputs[0].name, parts, activations, others, paths[-1], shortcut, in_place, seen)


def _branches(read: _Reader, total: fx.Node) -> tuple[list[fx.Node] | None, fx.Node | None]:
    """(the chain of convolutions that is added, what it is added to)."""
    ends = [read.source(arg) for arg in total.args]
    chains = [read.chain(end) for end in ends]
    counts = [sum(read.kind(node) == "convolution" for node in chain or ()) for chain in chains]
    longer = int(counts[1] > counts[0])
    norms = sum(read.kind(node) == "batch norm" for node in chains[longer] or ())
    if counts[longer] < 2 or norms < 2 or None in ends:
        return None, None
    return chains[longer], ends[1 - longer]


def _shortcut(read: _Reader, end: fx.Node) -> tuple[str, ...] | None:
    """Anatomy.shortcut for what ends with this node."""
    if end.op == "placeholder":
        return ()
    chain = read.chain(end) or []
    kinds = [read.kind(node) for node in chain]
    pooled = kinds[:1] == ["other"] and type(read.module(chain[0])) is nn.AvgPool2d
    one = len(chain) == 1 and chain[0].op == "call_module"
    if not one and kinds[pooled:] != ["convolution", "batch norm"]:
        return None
    return tuple(read.take(node).target for node in chain)
