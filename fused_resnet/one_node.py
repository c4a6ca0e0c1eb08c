"""A training block as one node of autograd's graph, its forward and its backward written down as one function each.

Each op of a block is a node of the graph by itself, made at every call, in Python; and a GPU that is fast waits for it.
So when a block has come several times in the same way (shapes, layouts, dtypes, modes, the same parameters), its
forward is run below autograd, on a tape: each op's own rule says what it keeps, and later what its derivative is. What
the tape saw is written down (backends/straight.py), as calls of the ops' own functions that have been written down
before, and compared. From then on the block is one function in the forward and one in the backward.

Whoever wants gradients of gradients gets those of the block's ops, one by one: its forward runs again for them.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _AutoDispatchBelowAutograd, _ExcludeDispatchKeyGuard, _is_any_autocast_enabled
from torch._C._autograd import _top_saved_tensors_default_hooks

from . import backends, ops
from .backends import straight
from .backends.verify import TOLERANCE, capturing, tf32_allowed

logger = logging.getLogger("fused_resnet")

WATCH_AT = straight.WATCH_AT + 3  # calls of one kind: by then the ops' own have been written down
TRIES = 3
MOST_KINDS = 8  # of calls of a block, remembered
_entries: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()
_TENSORS = (nn.Parameter, Tensor)


def run(
    block: nn.Module, function: Callable, statistics: Callable, x: Tensor, modules: list[nn.Module], lean: bool = False
) -> Tensor | None:
    """function(x, statistics()), as one node; None where it has to be run as it is.

    modules: the convolutions and batch norms that it reads, and nothing else that changes; it is called again for
    gradients of gradients. statistics: a class like training.Statistics. lean: whether x and the statistics are all
    that is kept, and the backward computes the rest again.
    """
    if not _may_serve(x):
        return None
    found = _kind(x, modules)
    if found is None:
        return None
    kind, parameters, buffers = found
    kind = lean, *kind
    kinds = _entries.get(block)
    if kinds is None:
        kinds = _entries[block] = {}
    program = kinds.get(kind)
    if program is None:
        if len(kinds) >= MOST_KINDS:
            kinds.clear()
        program = kinds[kind] = _Program(x, lean)
    args = program, _Source(function, statistics, modules, autocast_dtype(x)), buffers, x, *parameters
    if program.forward is not None:
        return _Node.apply(*args)
    if not program.wants_to_watch(x):
        return None
    with straight.alone() as alone:
        return _Node.apply(*args) if alone else None


def _may_serve(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.device.type in backends.WRITTEN_DOWN
        and x.dtype in TOLERANCE
        and torch.is_grad_enabled()
        and ops.handler() is None
        and ops.plain((x,), [0], [])
        and _top_saved_tensors_default_hooks(True) is None
    )


def _kind(x: Tensor, modules: list[nn.Module]) -> tuple[tuple, list[Tensor], list[Tensor]] | None:
    """(all that what is written down depends on, the parameters, the buffers that change); None where there is more to
    it. A parameter that lies where it lay, with the strides that it had, is taken for aligned as it was."""
    key = [x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16, x.requires_grad, autocast_dtype(x), *_modes()]
    parameters, buffers = [], []
    try:
        for m in modules:
            own = m._parameters
            if isinstance(m, nn.Conv2d):
                if own["bias"] is not None:
                    return None
                key += (m.stride, m.padding, m.dilation, m.groups)
            else:
                key += (m.training, m.momentum, m.eps, m.track_running_stats)
                for b in m._buffers.values():
                    if b is not None:
                        key += (b.data_ptr(), b.shape, b.stride(), b.dtype)
                        buffers.append(b)
            for p in own.values():
                if p is not None:
                    if type(p) not in _TENSORS:
                        return None
                    key += (p.data_ptr(), p.shape, p.stride(), p.dtype, p.requires_grad)
                    parameters.append(p)
    except RuntimeError:  # there are no strides
        return None
    return tuple(key), parameters, buffers


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _modes() -> tuple:
    """What ops' choices depend on beside their arguments (backends._key)."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return backends.forced(), torch._C._get_cudnn_enabled(), tf32_allowed(), deterministic


class _Source(NamedTuple):
    """What a call is made of, and made of again."""

    function: Callable
    statistics: Callable
    modules: list[nn.Module]
    autocast: torch.dtype | None

    def known(self, kept: list[tuple[Tensor, Tensor]]):
        """Statistics that have been computed."""
        known = self.statistics()
        known.kept, known.complete = kept, True
        return known


class _Step(NamedTuple):
    """An op on the tape. facts: what its rule noted. saved: places of the tensors that it keeps; inputs, outputs: the
    gradients' slots; None: no gradient."""

    formula: Callable
    facts: dict
    saved: tuple[int | None, ...]
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]


class _Context:
    """What autograd hands to a rule."""

    saved: tuple = ()
    constant: tuple = ()

    def __init__(self, needs_input_grad: tuple[bool, ...]):
        self.needs_input_grad = needs_input_grad

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.constant = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass


class _Below:
    """Takes the calls of ops in a backward: they run, and the watch writes them down where there is one."""

    def __init__(self, watch: straight._Watch | None):
        self.watch = watch

    def call(self, name: str, args: list):
        if self.watch is not None and name != "update_running_stats_":
            ready = backends._ready.get(backends._key(name, args))
            if ready is None or (type(ready) is straight.Repeated and ready.tries < straight.TRIES):
                self.watch.refuse(f"{name} has not been written down yet")
            else:
                return self.watch.whole(ready, tuple(args))
        return ops._kernels[name](*args)

    def apply(self, function, args):
        raise RuntimeError("a node of its own, inside of another")

    def needs_gradient(self, t: Tensor) -> bool:
        return False

    def lowered(self, t: Tensor) -> Tensor:
        return t


class _Tape(_Below):
    """Takes the calls of a forward, and notes how to differentiate them."""

    def __init__(self, watch: straight._Watch | None, autocast: torch.dtype | None, inputs: tuple[Tensor, ...]):
        super().__init__(watch)
        self.autocast = autocast
        self.tensors: list[Tensor] = []  # all that has a place, alive, so that no other is taken for it
        self.places: dict[int, int] = {}
        self.slots: dict[int, int] = {}
        self.count = 0
        self.inside = False
        self.steps: list[_Step] = []
        self.inputs = [self._slot(t) if t.requires_grad else None for t in inputs]
        for t in inputs:
            self.place(t)

    @contextlib.contextmanager
    def taking(self):
        """Inside, the calls of ops are this tape's."""
        if self.watch is not None:
            self.watch.heard = self.saw
        try:
            with ops.handed_to(self):
                yield
        finally:
            if self.watch is not None:
                self.watch.heard = None

    def place(self, t: Tensor) -> int:
        if id(t) not in self.places:
            self.places[id(t)] = len(self.tensors)
            self.tensors.append(t)
        return self.places[id(t)]

    def _slot(self, t: Tensor) -> int:
        self.slots[id(t)] = self.count
        self.count += 1
        return self.count - 1

    def saw(self, func, args) -> None:
        """PyTorch's func was called, outside of all that is noted."""
        if not self.inside and any(isinstance(a, Tensor) and self.needs_gradient(a) for a in args):
            raise AssertionError(f"{func} has a derivative, and is not on the tape")

    def call(self, name: str, args: list):
        with self._noted():
            return self._call(name, args)

    @contextlib.contextmanager
    def _noted(self):
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    def _call(self, name: str, args: list):
        if self.autocast is not None:
            args = [self._lowered(a, b) for a, b in zip(args, ops.cast(name, self.autocast, args), strict=True)]
        result = super().call(name, args)
        if name in ops.formulas:
            setup, formula = ops.formulas[name]
            context = _Context(self._needed(args))
            setup(context, args, result)
            self._note(formula, context, args, result)
        return result

    def apply(self, function, args):
        context = _Context(self._needed(args))
        with self._noted(), ops.handed_to(_Below(self.watch)):
            result = function.forward(context, *args)
        self._note(function.backward, context, args, result)
        return result

    def needs_gradient(self, t: Tensor) -> bool:
        return id(t) in self.slots

    def lowered(self, t: Tensor) -> Tensor:
        with self._noted():
            return t if self.autocast is None else self._lowered(t, ops.lowered(t, self.autocast))

    def _lowered(self, before, after):
        if after is not before and self.needs_gradient(before) and not self.needs_gradient(after):
            context = _Context((True,))
            context.dtype = before.dtype
            self._note(lambda ctx, grad: (grad.to(ctx.dtype),), context, (before,), after)
        return after

    def _needed(self, args) -> tuple[bool, ...]:
        return tuple(isinstance(a, Tensor) and self.needs_gradient(a) for a in args)

    def _note(self, formula, context: _Context, args, result) -> None:
        inputs = tuple(self.slots.get(id(a)) if isinstance(a, Tensor) else None for a in args)
        facts = dict(vars(context))
        saved, constant = facts.pop("saved", ()), {id(t) for t in facts.pop("constant", ())}
        results = result if isinstance(result, (tuple, list)) else (result,)
        for r in results:
            self.place(r)
        if all(slot is None for slot in inputs):
            return
        # One that is handed on is another to autograd from here on.
        outputs = tuple(None if id(r) in constant else self._slot(r) for r in results)
        places = tuple(None if t is None else self.place(t) for t in saved)
        self.steps.append(_Step(formula, facts, places, inputs, outputs))


class _Program:
    """What is known of one kind of call."""

    def __init__(self, x: Tensor, lean: bool):
        self.limit, self.lean = TOLERANCE[x.dtype], lean
        self.calls = self.tries = 0
        self.forward: Callable | None = None
        self.derivative: _Derivative | None = None

    def wants_to_watch(self, x: Tensor) -> bool:
        self.calls += 1
        wants = self.tries < TRIES and self.calls >= WATCH_AT * (self.tries + 1)
        return wants and not capturing(x.device)

    def watch(self, source: _Source, tensors: tuple[Tensor, ...], buffers: list[Tensor]):
        """(result, what the backward needs, _Derivative); the forward is written down, if it can be."""
        self.tries += 1
        args = (*tensors, *buffers)
        given = [b.clone() for b in buffers]
        watch = straight._Watch(args)
        tape = _Tape(watch, source.autocast, tensors)
        known = source.statistics()
        with watch, tape.taking():
            y = source.function(tensors[0], known)
        steps = [] if self.lean else tape.steps
        needed = {p for step in steps for p in step.saved if p is not None}
        # x and the statistics, with which it all can be computed again.
        needed |= {tape.place(t) for t in (tensors[0], *(t for pair in known.kept for t in pair))}
        kept = [tape.tensors[p] for p in sorted(needed)]
        index = {p: i for i, p in enumerate(sorted(needed))}
        steps = [s._replace(saved=tuple(None if p is None else index[p] for p in s.saved)) for s in steps]
        again = [tuple(index[tape.place(t)] for t in pair) for pair in known.kept]
        rules = _Rules(steps, tape.inputs, tape.slots.get(id(y)))
        derivative = _Derivative(None if self.lean else rules, index[tape.place(tensors[0])], again, self.limit)
        self._write_down(watch, args, len(tensors), given, y, kept, derivative)
        return y, kept, derivative

    def _write_down(self, watch, args, count, given, y, kept, derivative) -> None:
        mine = [y, *(t for t in kept if all(t is not a for a in (*args, y)))]
        everything = (*args, *mine)
        try:
            function = watch.function(args, tuple(mine), None)
        except Exception as failure:
            function = straight._why(failure)
        if callable(function):  # the buffers of the check are what they were before
            tensors, buffers = args[:count], args[count:]
            expected = (*mine, *buffers)
            function = straight.checked(
                function, (*tensors, *given), lambda found: (*found, *given), expected, self.limit
            )
        if isinstance(function, str):
            logger.info("a block runs op by op: %s", function)
            return
        derivative.keep = [next(i for i, t in enumerate(everything) if t is k) for k in kept]
        self.derivative = derivative
        self.forward = function  # last: another thread may be looking


class _Rules(NamedTuple):
    """A forward's steps; the gradients' slots of its inputs and of its output."""

    steps: list[_Step]
    inputs: list[int | None]
    output: int | None

    def apply(self, grad: Tensor, saved, needs: tuple[bool, ...], watch) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs, by the steps' formulas, from the last to the first."""
        leads = {slot for slot, wanted in zip(self.inputs, needs, strict=True) if wanted and slot is not None}
        masks = []
        for step in self.steps:
            masks.append(tuple(slot in leads for slot in step.inputs))
            if any(masks[-1]):
                leads.update(slot for slot in step.outputs if slot is not None)
        gradients = {self.output: grad}
        with ops.handed_to(_Below(watch)):
            for step, mask in zip(reversed(self.steps), reversed(masks), strict=True):
                given = [None if slot is None else gradients.pop(slot, None) for slot in step.outputs]
                if not any(mask) or all(g is None for g in given):
                    continue
                context = _Context(mask)
                context.__dict__.update(step.facts, needs_input_grad=mask)
                context.saved_tensors = tuple(None if i is None else saved[i] for i in step.saved)
                for slot, wanted, found in zip(step.inputs, mask, step.formula(context, *given), strict=True):
                    if wanted and found is not None:
                        gradients[slot] = found if slot not in gradients else gradients[slot] + found
        pairs = zip(self.inputs, needs, strict=True)
        return tuple(gradients.get(slot) if wanted and slot is not None else None for slot, wanted in pairs)


class _Derivative:
    """The derivative of a forward that was on a tape.

    rules: None where they are to be found again, with what they need, by a forward. x, statistics: where these are
    among the tensors that are kept.
    """

    keep: list[int]  # where these are among a forward's arguments and results

    def __init__(self, rules: _Rules | None, x: int, statistics: list[tuple[int, int]], limit: float):
        self.rules, self.x, self.statistics, self.limit = rules, x, statistics, limit
        self.written: dict[tuple, Callable | int] = {}  # by kind of call; a number: of the times that it was tried

    def __call__(self, source: _Source, grad: Tensor, saved, parameters, needs) -> tuple[Tensor | None, ...]:
        kind = (grad.shape, grad.stride(), grad.dtype, grad.data_ptr() % 16, needs, *_modes())
        known = self.written.get(kind, 0)
        args = (grad, *saved) if self.rules is not None else (grad, *saved, *parameters)
        if not isinstance(known, int):
            return known(*args)
        if known < TRIES and not capturing(grad.device) and ops.plain((grad,), [0], []):
            with straight.alone() as alone:
                if alone:
                    watch = straight._Watch(args)
                    with watch:
                        result = self._run(source, grad, saved, parameters, needs, watch)
                    self._write_down(watch, args, result, kind, known + 1)
                    return result
        return self._run(source, grad, saved, parameters, needs, None)

    def _run(self, source: _Source, grad, saved, parameters, needs, watch) -> tuple[Tensor | None, ...]:
        if self.rules is not None:
            return self.rules.apply(grad, saved, needs, watch)
        x, known = saved[self.x], source.known(self.known(saved))
        tape = _Tape(watch, source.autocast, (x, *parameters))
        with _in_place_of_parameters(source.modules, parameters), tape.taking():
            y = source.function(x, known)
        return _Rules(tape.steps, tape.inputs, tape.slots.get(id(y))).apply(grad, tape.tensors, needs, watch)

    def known(self, saved) -> list[tuple[Tensor, Tensor]]:
        return [(saved[mean], saved[var]) for mean, var in self.statistics]

    def _write_down(self, watch, args, result, kind: tuple, tries: int) -> None:
        try:
            function = watch.function(args, result, None)
        except Exception as failure:
            function = straight._why(failure)
        if callable(function):
            function = straight.checked(function, args, lambda found: found, result, self.limit)
        if isinstance(function, str):
            logger.info("a block's backward runs op by op: %s", function)
            function = tries
        if len(self.written) >= MOST_KINDS:
            self.written.clear()
        self.written[kind] = function


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, program: _Program, source: _Source, buffers: list[Tensor], x: Tensor, *parameters: Tensor):
        ctx.set_materialize_grads(False)
        tensors = (x, *parameters)
        with _below():
            if program.forward is None:
                y, kept, ctx.derivative = program.watch(source, tensors, buffers)
            else:
                results = program.forward(*tensors, *buffers)
                everything, ctx.derivative = (*tensors, *buffers, *results), program.derivative
                y, kept = results[0], [everything[i] for i in ctx.derivative.keep]
        ctx.source, ctx.parameters, ctx.count = source, [(p, p._version) for p in parameters], len(kept)
        ctx.save_for_backward(*kept, *(parameters if program.lean else ()))
        return y

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[3:]
        if grad is None:
            return (None,) * (3 + len(needs))
        saved = ctx.saved_tensors
        kept, parameters = saved[: ctx.count], saved[ctx.count :]
        if torch.is_grad_enabled():
            return None, None, None, *_again(ctx, grad, kept, needs)
        with _below():
            return None, None, None, *ctx.derivative(ctx.source, grad, kept, parameters, needs)


def _again(ctx, grad: Tensor, saved: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """The gradients, to be differentiated in turn: the block's ops run again, each a node by itself."""
    source = ctx.source
    if any(p._version != version for p, version in ctx.parameters):
        raise RuntimeError(
            "a parameter was modified in place between this block's forward and a gradient that is to be "
            "differentiated in turn, for which the forward is computed again"
        )
    x, known = saved[ctx.derivative.x], source.known(ctx.derivative.known(saved))
    with torch.enable_grad(), torch.autocast(x.device.type, source.autocast, enabled=source.autocast is not None):
        # Views, since hooks of the tensors themselves would be called here, and again behind this node.
        inputs = [t.view_as(t) if t.requires_grad else t for t in (x, *(p for p, _ in ctx.parameters))]
        with _in_place_of_parameters(source.modules, inputs[1:]):
            y = source.function(inputs[0], known)
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


@contextlib.contextmanager
def _in_place_of_parameters(modules: list[nn.Module], tensors: list[Tensor]):
    """Inside, these are what the modules have: those that they had in the forward may have been lent to them."""
    places = [(m, name) for m in modules for name, p in m._parameters.items() if p is not None]
    before = [m._parameters[name] for m, name in places]
    try:
        for (m, name), t in zip(places, tensors, strict=True):
            m._parameters[name] = t
        yield
    finally:
        for (m, name), p in zip(places, before, strict=True):
            m._parameters[name] = p


@contextlib.contextmanager
def _below():
    """Below autograd, and below autocast, whose casts are on the tape."""
    with _AutoDispatchBelowAutograd():
        if _is_any_autocast_enabled():
            with _ExcludeDispatchKeyGuard(ops.AUTOCAST):
                yield
        else:
            yield
