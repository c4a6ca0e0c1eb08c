"""Residual blocks of classes that nobody named: recognised by what their forward does, traced, and fused in place.

A block counts as one if its forward is relu(chain(x) + shortcut(x)), its chain convolution, batch norm and ReLU taking
turns, the last ReLU behind the add; other modules may stand in front of a convolution or of the add (pools, attention,
dropout). Or, pre-activation, chain(x) + shortcut(x), the chain batch norm, ReLU and convolution in turns, the shortcut
of x or of relu(bn(x)), the chain's first; dropout may stand in front of a batch norm as well. What modules are called,
how they are nested, and whether a ReLU is a module or a function, does not matter. Hugging Face's ResNets,
torchvision's RegNets, the residual towers of game engines, Wide ResNets, hourglasses, and the CIFAR ResNets of so many
repositories are made of such blocks.

The trace is strict (strict_trace.py): a forward that does anything else is no block's. It speaks for the block as it
was when it was swapped. The attributes that the forward's code mentions, and the children and hooks of the modules that
it goes through, are compared at every call; a block that has changed runs its own forward. Not compared are functions
of classes, but for the block's forward itself.
"""

from __future__ import annotations

import abc
import enum
import functools
import itertools
import math
import operator
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .blocks import Derived, Fused, Side, convolution_unfusable, part, tampered
from .frozen import is_frozen
from .one_node import autocast_dtype
from .preact import PreAct, Shortcut
from .strict_trace import Trace, has_plain_defaults, holds_modules, is_norm, is_plain, is_torchs, trace

_MOST_CONVOLUTIONS = 8  # in a block: more is a stage
_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_IN_PLACE = {operator.iadd, "add_"}
_ADDS = {operator.add, torch.add, "add", *_IN_PLACE}


class _Seen(NamedTuple):
    """A module inside a block, and what of it may have decided the forward's way."""

    path: str  # '' for the block
    called: bool
    children: tuple[tuple[str, type], ...] | None  # None: they may be any
    given: tuple[tuple[str, object], ...]
    mode: bool = False  # it has to have that of the block

    def changed(self, block: nn.Module) -> str | None:
        module = part(block, self.path) if self.path else block
        where = f"{self.path}: " if self.path else ""
        if module is None or (
            self.children is not None
            and tuple([(name, type(child)) for name, child in module._modules.items()]) != self.children
        ):
            return f"{where}other modules than when the block was recognised"
        if any(name in module.__dict__ for name in module._modules):
            return f"{where}an attribute stands in front of a module"
        for name, value in self.given:
            now = _attribute(module, name)
            if now is not value and not (is_plain(now) and _same(now, value)):
                return f"{where}{name} is another than when the block was recognised"
        if self.mode and module.training is not block.training:
            return f"{where}is in another mode than the block, which looks at it"
        if self.path and self.children is not None and "forward" in module.__dict__:
            return f"{where}forward is overridden on the instance"
        reason = tampered(module) if self.called else None
        return reason and f"{where}{reason}"


def _same(a, b) -> bool:
    """Whether constants are equal, and of equal types: (1,) is not (True,)."""
    if type(a) is tuple is type(b):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


class _From(enum.Enum):
    """Where an attribute comes from that is nobody's own, or no constant."""

    NOWHERE = "nowhere"
    TORCH = "a class of torch"
    CLASS = "a function or property of its class"
    TENSOR = "a parameter or buffer"
    OBJECT = "something that can change inside"


def _attribute(module: nn.Module, name: str):
    """What a module gives by this name, nothing being called; of a child its class."""
    if name in module._modules:
        return type(module._modules[name])
    for own in (module.__dict__, module._parameters, module._buffers):
        if name in own:
            value = own[name]
            return value if _is_fixed(value) else _From.TENSOR if isinstance(value, Tensor) else _From.OBJECT
    for kind in type(module).__mro__:
        if name in kind.__dict__:
            value = kind.__dict__[name]
            if is_torchs(kind):
                return _From.TORCH
            function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
            called = isinstance(function, types.FunctionType) and has_plain_defaults(function)
            called = (
                called
                or (isinstance(value, property) and isinstance(value.fget, types.FunctionType))
                or (isinstance(value, type) and issubclass(value, enum.Enum))
            )
            return _From.CLASS if called else value if _is_fixed(value) else _From.OBJECT
    return _From.NOWHERE


def _is_fixed(value) -> bool:
    """Whether nothing inside this can change, so that it can be compared with itself later."""
    if isinstance(value, types.FunctionType):
        return has_plain_defaults(value) and not holds_modules(value)
    return is_plain(value) or isinstance(value, (enum.Enum, types.BuiltinFunctionType))


class Anatomy(NamedTuple):
    """Of a block, what the class Named is of others: where its parts are. Paths, to be copied and pickled with it.

    argument: what its forward calls x. others: modules in front of the second convolution, of the next, and at last of
    the add. relu: the last one, '' if it is a function. shortcut: (): x itself; a path: a module to be called; more:
    pools, a convolution and a batch norm. in_place: whether the sum takes the chain's place, and its dtype. apart:
    whether the add may broadcast. seen: what the forward went through or asked.
    """

    argument: str
    parts: tuple[str, ...]
    activations: tuple[str, ...]
    others: tuple[tuple[str, ...], ...]
    relu: str
    shortcut: tuple[str, ...]
    in_place: bool
    apart: bool
    seen: tuple[_Seen, ...]

    @property
    def residual(self) -> bool:
        return True

    @property
    def joined(self) -> bool:
        return False

    def obstacle(self, block: nn.Module) -> str | None:
        return _changed(block, self.seen)

    def between(self, block: nn.Module) -> list[list[nn.Module]]:
        return _at(block, self.others[:-1])

    def tail(self, block: nn.Module) -> list[nn.Module]:
        return [part(block, path) for path in self.others[-1]]

    def last(self, block: nn.Module) -> Callable[[Tensor], Tensor]:
        return part(block, self.relu) if self.relu else F.relu

    def side(self, block: nn.Module) -> Side:
        modules = tuple(part(block, path) for path in self.shortcut)
        return modules if len(modules) > 1 else modules[0] if modules else None

    def lowers(self, block: nn.Module, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether under autocast to this dtype the fused result of x has the dtype that the block's own has.

        The add would give its result x's dtype, if that is wider; and a frozen batch norm that of its vectors.
        """
        known = self.in_place or len(self.shortcut) > 1 or x.dtype is dtype
        norms = (part(block, path) for path in (*self.parts[1::2], *self.shortcut[-1:]))
        return known and not any(map(is_frozen, norms))


class PreAnatomy(NamedTuple):
    """Of a pre-activation block, what the class NamedPreAct is of others. argument, in_place and seen are as Anatomy's.

    convolutions, norms, relus: the parts, in turns from the first batch norm on; a ReLU that is a function is ''.
    inner, others: modules in front of the second batch norm, of the next, and so on; of the first convolution, of the
    next, and at last of the add. shortcut: (): nothing stands on it; else the modules that are called. projection:
    whether it is one convolution alone. activated, late: as Shortcut's.
    """

    argument: str
    convolutions: tuple[str, ...]
    norms: tuple[str, ...]
    relus: tuple[str, ...]
    inner: tuple[tuple[str, ...], ...]
    others: tuple[tuple[str, ...], ...]
    shortcut: tuple[str, ...]
    projection: bool
    activated: bool
    late: bool
    in_place: bool
    seen: tuple[_Seen, ...]

    @property
    def apart(self) -> bool:
        return True

    def obstacle(self, block: nn.Module) -> str | None:
        reason = _changed(block, self.seen)
        if reason is None and self.projection and (reason := convolution_unfusable(part(block, self.shortcut[0]))):
            reason = f"{self.shortcut[0]}: {reason}"
        return reason

    def parts(self, block: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
        return self.convolutions, self.norms, [path for path in self.relus if path]

    def before(self, block: nn.Module) -> list[list[nn.Module]]:
        return _at(block, self.inner)

    def between(self, block: nn.Module) -> list[list[nn.Module]]:
        return _at(block, self.others[:-1])

    def tail(self, block: nn.Module) -> list[nn.Module]:
        return [part(block, path) for path in self.others[-1]]

    def side(self, block: nn.Module) -> Shortcut:
        modules = tuple(part(block, path) for path in self.shortcut)
        return Shortcut(modules, modules[0] if self.projection else None, self.activated, self.late)

    def lowers(self, block: nn.Module, x: Tensor, dtype: torch.dtype) -> bool:
        """As Anatomy's. relu(bn(x)) is of x's dtype where the block computes it, and of this one where it is fused."""
        seen = self.others[0] or (self.activated and not self.projection)
        return (x.dtype is dtype or not seen) and not any(is_frozen(part(block, path)) for path in self.norms)


def _at(block: nn.Module, places: tuple[tuple[str, ...], ...]) -> list[list[nn.Module]]:
    return [[part(block, path) for path in paths] for paths in places]


def _changed(block: nn.Module, seen: tuple[_Seen, ...]) -> str | None:
    """Why what was seen of this block when it was recognised does not speak for it any more."""
    if isinstance(block, TracedBlock) and type(block)._traced is not type(block)._original.forward:
        return "its class has another forward than when it was recognised"
    return next(filter(None, (module.changed(block) for module in seen)), None)


class TracedBlock(Derived):
    """A block of any class, fused; `fused_class` derives one of it. memory, an attribute: as FusedBasicBlock's."""

    _traced: types.FunctionType  # the forward that was recognised
    _anatomy: Anatomy | PreAnatomy

    def __init_subclass__(cls, **options):
        """Not that of the class behind: this one is in no register of theirs."""

    def forward(self, *args, **kwargs) -> Tensor:
        if args and not kwargs or list(kwargs) == [self._anatomy.argument]:
            x, *more = *args, *kwargs.values()
            if not more and (isinstance(x, fx.Proxy) or self._fits(x)):
                return super().forward(x)
        return self._original.forward(self, *args, **kwargs)  # which says what is wrong

    def _fits(self, x) -> bool:
        """Whether x is a batch of maps, and the result has the dtype that the fused ops give it."""
        if not isinstance(x, Tensor) or x.dim() != 4:
            return False
        lowered = autocast_dtype(x)
        return lowered is None or self._anatomy.lowers(self, x, lowered)


class _Traced(TracedBlock, Fused):
    """relu(chain(x) + shortcut(x))."""


class _TracedPreAct(TracedBlock, PreAct):
    """chain(x) + shortcut(x)."""


@functools.cache
def fused_class(original: type[nn.Module], pre: bool = False) -> type[TracedBlock]:
    """The subclass of a block's class whose forward is fused. pre: whether that is a pre-activation block's."""
    names = {"__module__": original.__module__, "__doc__": original.__doc__}
    names |= {"_original": original, "_again": (_blank, (original, pre)), "_traced": original.forward}
    return type(original)(f"Fused{original.__name__}", (_TracedPreAct if pre else _Traced, original), names)


def _blank(original: type[nn.Module], pre: bool = False) -> TracedBlock:
    """A block before it gets its state, for copies and pickles."""
    return object.__new__(fused_class(original, pre))


def swap(block: nn.Module, anatomy: Anatomy | PreAnatomy) -> None:
    block.__class__ = fused_class(type(block), isinstance(anatomy, PreAnatomy))
    block.__dict__["_anatomy"] = anatomy


def restore(block: nn.Module) -> None:
    if "_original" in vars(type(block)):  # FSDP makes subclasses
        block.__class__ = type(block)._original
        for name in ("_anatomy", "memory"):
            block.__dict__.pop(name, None)


def discover(model: nn.Module, known: Callable[[nn.Module], bool]) -> dict[nn.Module, Anatomy | PreAnatomy | str]:
    """The residual blocks inside a model that are of no known class: their anatomy, or why they are left.

    known: says of a module whether it is one of those; nothing around a block is looked at.
    """
    found: dict[nn.Module, Anatomy | PreAnatomy | str] = {}
    holds: dict[nn.Module, bool] = {}

    def visit(module: nn.Module) -> bool:
        """Whether this is a residual block, or has one inside."""
        if module not in holds:
            holds[module] = False  # of one that holds itself
            inside = any([visit(child) for child in module.children()])
            if not inside and not known(module) and (anatomy := _safely(module)) is not None:
                found[module] = anatomy
            holds[module] = inside or known(module) or module in found
        return holds[module]

    visit(model)
    return found


def _safely(module: nn.Module) -> Anatomy | PreAnatomy | str | None:
    try:
        return anatomy_of(module)
    except Exception:  # of classes that do with attributes what they like: no blocks, then
        return None


def anatomy_of(block: nn.Module) -> Anatomy | PreAnatomy | str | None:
    """A block's anatomy; a str, why a residual block cannot be fused; None: this is no residual block."""
    if is_torchs(type(block)) or "forward" in block.__dict__:
        return None
    modules = list(block.modules())
    convolutions = sum(isinstance(m, nn.Conv2d) for m in modules)
    if not 2 <= convolutions <= _MOST_CONVOLUTIONS or sum(map(is_norm, modules)) < 2:
        return None
    if not any(isinstance(m, nn.ReLU) or "relu" in _mentioned(type(m)) for m in modules):
        return None
    # Into all that is called; or else not into what has no batch norm inside: attention, stochastic depth, a shortcut.
    opaque = {
        name
        for name, m in block.named_modules()
        if name and type(m) is not nn.Sequential and not any(map(is_norm, m.modules()))
    }
    reason = None
    for leaves in (set(), opaque):
        found = _read(block, leaves)
        if isinstance(found, (Anatomy, PreAnatomy)):
            return _refused(block) or found
        reason = found or reason
    return reason


@functools.cache
def _mentioned(kind: type[nn.Module]) -> frozenset[str]:
    """The names in the code of a class."""
    own = (c for c in kind.__mro__ if not is_torchs(c))
    functions = (f for c in own for f in vars(c).values() if isinstance(f, types.FunctionType))
    return frozenset(itertools.chain(*(f.__code__.co_names for f in functions)))


def _refused(block: nn.Module) -> str | None:
    """Why a block of this class cannot become a fused one."""
    if type(type(block)) not in (type, abc.ABCMeta):
        return f"{type(block).__name__} is of a metaclass of its own"
    if hasattr(block, "fuse_model"):
        return "is made to be quantized, by code that asks for its class"
    used = sorted(name for name in _RESERVED if hasattr(block, name))
    return f"{used[0]}: a name that fused blocks have for something else" if used else None


_CLASSES = (Fused, PreAct, Derived, TracedBlock)
_RESERVED = {n for c in _CLASSES for n in (*vars(c), *c.__annotations__) if n[:2] != "__"} - {"forward"}


# --- what a forward does ----------------------------------------------------------------------------------------------


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
        while isinstance(value, fx.Node) and type(self.module(value)) is nn.Identity and self.by_position(value):
            (value,) = self.take(value).args
        return value if isinstance(value, fx.Node) else None

    @staticmethod
    def by_position(node: fx.Node) -> bool:
        """Whether a module is called with one argument, as a fused block calls it."""
        return node.op != "call_module" or (len(node.args) == 1 and not node.kwargs)

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
            alone = len(node.all_input_nodes) == len(node.users) == 1
            if not alone or node.op not in _CALLS or not self.by_position(node):
                return None
            nodes.append(node)
            node = self.before(node)
        return None if node is None else nodes[::-1]

    def line(self, node: fx.Node | None) -> list[fx.Node] | None:
        """The nodes from x to this one, each with one input, whatever else reads them; None where that is no line."""
        nodes = []
        while node is not None and node.op != "placeholder":
            if len(node.all_input_nodes) != 1 or node.op not in _CALLS or not self.by_position(node):
                return None
            nodes.append(node)
            node = self.before(node)
        return None if node is None else nodes[::-1]

    def unused(self, graph: fx.Graph) -> bool:
        """Whether there is a call in this graph that was not understood."""
        return not self.used.issuperset(n for n in graph.nodes if n.op in _CALLS)

    @staticmethod
    def argument(graph: fx.Graph) -> str:
        """What the forward calls its one input."""
        return next(n.target for n in graph.nodes if n.op == "placeholder")

    def kind(self, node: fx.Node) -> str:
        module = self.module(node)
        if isinstance(module, nn.Conv2d):
            return "convolution"
        if module is not None and is_norm(module):
            return "batch norm"
        return "ReLU" if self.is_relu(node) else "other"

    def said(self, node: fx.Node) -> str:
        module = self.module(node)
        return f"{node.target}: {type(module).__name__}" if module is not None else node.name


_CALLS = ("call_module", "call_function", "call_method")
_TURNS = ("convolution", "batch norm", "ReLU")
_PRE_TURNS = ("batch norm", "ReLU", "convolution")
_DROPOUTS = (nn.Dropout, nn.Dropout2d)


def _read(block: nn.Module, leaves: set[str]) -> Anatomy | PreAnatomy | str | None:
    """What the forward does, as `anatomy_of` has it."""
    found = trace(block, leaves)
    if found is None or not _RESERVED.isdisjoint(found.absent):
        return None  # a fused block would have what this one has not
    read = _Reader(block)
    inputs = [n for n in found.graph.nodes if n.op == "placeholder"]
    last = read.source(found.graph.output_node().args[0])
    if len(inputs) != 1 or last is None:
        return None
    if read.is_relu(last) and read.by_position(last):
        total = read.before(read.take(last))
        return _read_post(read, found, total, last) if _is_add(total) else None
    return _read_pre(read, found, last) if _is_add(last) else None


def _is_add(node: fx.Node | None) -> bool:
    return node is not None and (node.op in _CALLS and node.target in _ADDS and not node.kwargs and len(node.args) == 2)


def _read_post(read: _Reader, found: Trace, total: fx.Node, last: fx.Node) -> Anatomy | str | None:
    """What ends with this add and this ReLU."""
    graph, block = found.graph, read.block
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
    in_place = total.target in _IN_PLACE and read.source(total.args[0]) is not side
    if total.target in _IN_PLACE and not in_place and len(shortcut) < 2:
        return None  # what the block, or a module in it, is given changes
    if read.unused(graph):
        return None  # it does something else as well
    order = {node: i for i, node in enumerate(graph.nodes)}
    if len(shortcut) == 1 and order[side] < order[chain[-1]]:
        return f"{shortcut[0]}: is called before the convolutions"
    paths = [n.target if n.op == "call_module" else "" for n in (*turns, last)]
    parts, activations = tuple(p for i, p in enumerate(paths) if i % 3 != 2), tuple(filter(None, paths[2::3]))
    if len(shortcut) > 1 and part(block, shortcut[-1]) in [part(block, path) for path in parts]:
        return f"{shortcut[-1]}: stands in the chain as well"
    others = tuple(map(tuple, (*between, [node.target for node in tail])))
    opaque = {*itertools.chain(*others), *(shortcut if len(shortcut) == 1 else ())}
    seen = _look(block, found, opaque, {*parts, *activations, *shortcut})
    if seen is None:
        return None
    convolutions = [part(block, path) for path in parts[::2]]
    called = len(shortcut) == 1 or any(others[:-1])
    apart = called or _may_broadcast(convolutions, part(block, shortcut[-2]) if shortcut else None)
    return Anatomy(read.argument(graph), parts, activations, others, paths[-1], shortcut, in_place, apart, seen)


def _read_pre(read: _Reader, found: Trace, total: fx.Node) -> PreAnatomy | str | None:
    """What ends with this add."""
    graph, block = found.graph, read.block
    read.take(total)
    lines = [read.line(read.source(arg)) for arg in total.args]
    if None in lines:
        return None
    counts = [sum(read.kind(node) == "convolution" for node in line) for line in lines]
    longer = int(counts[1] > counts[0])
    chain, side = lines[longer], lines[1 - longer]
    if counts[longer] < 2 or [read.kind(node) for node in chain[:2]] != ["batch norm", "ReLU"]:
        return None
    activated = side[:2] == chain[:2]
    side = side[2:] if activated else side
    ours = {*chain, *side}
    if not set(chain).isdisjoint(side) or any(len(node.users) > 1 + (activated and node is chain[1]) for node in ours):
        return None  # something else reads what is inside
    turns: list[fx.Node] = []
    gaps: list[list[fx.Node]] = []  # in front of each batch norm, each convolution, and the add
    waiting: list[fx.Node] = []
    for node in chain:
        kind, expected = read.kind(node), _PRE_TURNS[len(turns) % 3]
        if kind == expected:
            turns.append(node)
            if kind != "ReLU":
                gaps.append(waiting)
                waiting = []
        elif kind == "other" and node.op == "call_module" and expected != "ReLU":
            waiting.append(node)
        else:
            return f"{read.said(node)}, where a {expected} would be fused"
        read.take(node)
    if len(turns) % 3:
        return f"{read.said(turns[-1])}, where a convolution would be fused"
    gaps.append(waiting)
    for node in itertools.chain(*gaps[2:-1:2]):
        if type(read.module(node)) not in _DROPOUTS:
            return f"{read.said(node)}, where a batch norm would be fused"
    if any(node.op != "call_module" for node in side):
        return "its shortcut is neither the input, nor a projection, nor modules alone"
    for node in side:
        read.take(node)
    if activated and gaps[1]:
        return f"{read.said(gaps[1][0])}, between the shortcut's beginning and the first convolution"
    projection = [type(read.module(node)) for node in side] == [nn.Conv2d] and (
        convolution_unfusable(read.module(side[0])) is None
    )
    order = {node: i for i, node in enumerate(graph.nodes)}
    late = bool(side) and not projection and order[side[0]] > order[chain[-1]]
    begins = chain[2 if activated else 0]
    if not (late or projection or all(order[node] < order[begins] for node in side)):
        return f"{side[0].target}: is called between the first batch norm and the last convolution"
    in_place = total.target in _IN_PLACE
    if in_place and read.source(total.args[0]) is not chain[-1]:
        return None  # what the block, or a module in it, is given changes
    if read.unused(graph):
        return None  # it does something else as well
    paths = [n.target if n.op == "call_module" else "" for n in turns]
    shortcut = tuple(node.target for node in side)
    inner, others = (tuple(tuple(n.target for n in gap) for gap in some) for some in (gaps[2::2], gaps[1::2]))
    inner, others = inner[:-1], (*others, inner[-1])
    norms, relus, convolutions = paths[::3], paths[1::3], paths[2::3]
    opaque = {*itertools.chain(*inner, *others), *(() if projection else shortcut)}
    seen = _look(block, found, opaque, {*paths, *shortcut})
    if seen is None:
        return None
    chained = {part(block, path) for path in (*norms, *convolutions)}
    if not projection and not chained.isdisjoint(m for path in shortcut for m in part(block, path).modules()):
        return f"{shortcut[-1]}: stands in the chain as well"
    return PreAnatomy(
        read.argument(graph), tuple(convolutions), tuple(norms), tuple(relus), inner, others, shortcut, projection,
        activated, late, in_place, seen,
    )  # fmt: skip


def _look(block: nn.Module, found: Trace, opaque: set[str], asked: set[str]) -> tuple[_Seen, ...] | None:
    """What of a block's modules its forward may have gone by; None where that can change unseen. opaque: modules that
    it calls, whatever is inside. asked: those whose hooks and classes are looked at elsewhere."""
    seen = []
    for path, m in block.named_modules(remove_duplicate=False):
        if isinstance(m, torch.jit.ScriptModule):
            return None  # its attributes are not there to be compared
        inside = any(path.startswith(f"{other}.") for other in opaque) or path in opaque
        given = []
        torchs = is_torchs(type(m))  # whose tensors are for its own forward
        ours = () if path else _RESERVED  # of a block's own names _refused has asked
        known = () if inside else m._modules  # which are compared, all of them
        for name in sorted(found.names - {*known, *ours, "forward", "training"}):
            value = _attribute(m, name)
            if value is _From.OBJECT or (value is _From.TENSOR and not torchs and not inside):
                return None
            if value is not _From.TORCH and (value is not _From.NOWHERE or name in found.absent):
                given.append((name, value))
        called = path in found.called and path not in asked and not inside
        mode = m in found.moody and m is not block
        if called or given or mode or (m._modules and not inside):
            children = None if inside else tuple((name, type(child)) for name, child in m._modules.items())
            seen.append(_Seen(path, called, children, tuple(given), mode))
    return tuple(seen)


def _may_broadcast(convolutions: list[nn.Conv2d], projection: nn.Conv2d | None) -> bool:
    """Whether maps of other sizes may meet at the add: what a fused one refuses."""

    def keeps(conv: nn.Conv2d) -> bool:
        """But for its stride, the size of a map."""
        places = zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
        return not isinstance(conv.padding, str) and all(2 * p == d * (k - 1) for p, d, k in places)

    def strides(convolutions: list[nn.Conv2d]) -> list[int]:
        return [math.prod(steps) for steps in zip(*(conv.stride for conv in convolutions), strict=True)]

    side = [] if projection is None else [projection]
    channels = side[0].out_channels if side else convolutions[0].in_channels
    if not all(map(keeps, convolutions + side)) or channels != convolutions[-1].out_channels:
        return True
    return strides(convolutions) != (strides(side) if side else [1, 1])


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
