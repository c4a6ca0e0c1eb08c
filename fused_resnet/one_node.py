"""A training block as one node of autograd's graph, its forward and its backward written down as one function each.

Each op of a block is a node of the graph by itself, made at every call, in Python; and a GPU that is fast waits for it.
So when a block has come several times in the same way (shapes, layouts, dtypes, modes, the same parameters), its
forward is run below autograd, on a tape: each op's own rule says what it keeps, and later what its derivative is. What
the tape saw is written down (backends/straight.py), as calls of the ops' own functions that have been written down
before, and compared. From then on the block is one function in the forward and one in the backward.

Whoever wants gradients of gradients gets those of the block's ops, one by one: its forward runs again for them. So x
and the statistics of its batch norms are kept, by all means.
"""

from __future__ import annotations

import contextlib
import logging
import types
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _AutoDispatchBelowAutograd, _ExcludeDispatchKeyGuard, _is_any_autocast_enabled
from torch._C._autograd import _top_saved_tensors_default_hooks

from . import backends, ops
from .backends import straight
from .backends.verify import TOLERANCE, TOLERANCE_TF32, capturing, tf32_allowed

logger = logging.getLogger("fused_resnet")

WATCH_AT = straight.WATCH_AT + 3  # calls of one kind: by then the ops' own have been written down
TRIES = 3
MOST_KINDS = 64  # of calls of a block, and of a backward, remembered
_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "groups", "in_channels", "out_channels")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_NAMES = frozenset(("weight", "bias", *_BUFFERS))
_TENSORS = (nn.Parameter, Tensor)
_entries: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


def run(
    block: nn.Module, function: Callable, statistics: Callable, x: Tensor, modules: list[nn.Module], lean: bool = False
) -> Tensor | None:
    """function(x, statistics(), modules), as one node; None where it has to be run as it is.

    modules: the convolutions, without biases, and the batch norms that it reads. It reads nothing else that changes,
    and of what stands in for them later their parameters and settings. statistics: a class like training.Statistics.
    lean: whether x and the statistics are all that is kept, and the backward computes the rest again.
    """
    if not _may_serve(x):
        return None
    found = _kind(x, modules)
    if found is None:
        return None
    kind, parameters, buffers = found
    kinds = _entries.get(block)
    if kinds is None:
        kinds = _entries[block] = {}
    try:
        program = kinds.get((lean, function, kind))
    except TypeError:  # a stride that is a list, say
        return None
    if program is None:
        program = _Program(x, function, statistics, modules, lean)
        _remember(kinds, (lean, function, kind), program)
    if program.forward is not None:
        return None if program.derivative.given_up else _Node.apply(program, modules, buffers, x, *parameters)
    if not program.wants_to_watch(x):
        return None
    with straight.alone() as alone:
        return _Node.apply(program, modules, buffers, x, *parameters) if alone else None


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
        and (not x.is_cuda or torch._C._cuda_getDevice() == x.get_device())  # launches go to the current one
    )


def _remember(known: dict, key, value) -> None:
    """known[key] = value; of too many, the oldest is forgotten."""
    if len(known) >= MOST_KINDS and key not in known:
        known.pop(next(iter(known)), None)
    known[key] = value


def _kind(x: Tensor, modules: list[nn.Module]) -> tuple[tuple, list[Tensor], list[Tensor]] | None:
    """(what tells one kind of call from another, the parameters, the buffers that change); None where there is more to
    it."""
    key = [x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16, x.requires_grad, autocast_dtype(x), *_modes()]
    parameters, buffers = [], []
    first = modules[0]._parameters.get("weight")
    if not (x.requires_grad or (first is not None and first.requires_grad)):
        return None  # x would be kept for nothing
    try:
        for m in modules:
            own = m._parameters
            if "weight" not in own or "bias" not in own or not _NAMES.isdisjoint(m.__dict__):
                return None  # what it computes with is no parameter of its own
            if isinstance(m, nn.Conv2d):
                if own["bias"] is not None:
                    return None
                key += [getattr(m, name) for name in _SETTINGS]
            else:
                key += (m.training, m.momentum, m.eps, m.track_running_stats)
                for name in _BUFFERS:
                    b = m._buffers.get(name)
                    if b is None:
                        key.append(None)
                    else:
                        key += (b.data_ptr() % 16, b.shape, b.stride(), b.dtype)
                        buffers.append(b)
            for p in (own["weight"], own["bias"]):
                if p is None:
                    key.append(None)
                elif type(p) in _TENSORS:
                    key += (p.data_ptr() % 16, p.shape, p.stride(), p.dtype, p.requires_grad)
                    parameters.append(p)
                else:
                    return None
    except RuntimeError:  # there are no strides
        return None
    return tuple(key), parameters, buffers


# Asked once: torch.compile of PyTorch 2.11 cannot follow the question.
_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")
_HAVE_AUTOCAST = frozenset(device for device in _DEVICES if torch.amp.is_autocast_available(device))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast lowers to on x's device, where it is on."""
    device = x.device.type
    on = device in _HAVE_AUTOCAST and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def _modes() -> tuple:
    """What ops' choices depend on beside their arguments (backends._key)."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return backends.forced(), torch._C._get_cudnn_enabled(), tf32_allowed(), deterministic


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

    def __init__(self, watch: straight._Watch | None, autocast: torch.dtype | None, inputs, required: list[bool]):
        super().__init__(watch)
        self.autocast = autocast
        self.tensors: list[Tensor] = []  # all that has a place, alive, so that no other is taken for it
        self.places: dict[int, int] = {}
        self.slots: dict[int, int] = {}
        self.count = 0
        self.inside = False
        self.steps: list[_Step] = []
        self.inputs = [self._slot(t) if wanted else None for t, wanted in zip(inputs, required, strict=True)]
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
        if any(isinstance(a, Tensor) and a.requires_grad and id(a) not in self.places for a in args):
            raise AssertionError(f"{name}: a tensor has a derivative, and is no input of the block")
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

    def __init__(self, x: Tensor, function: Callable, statistics: Callable, modules: list[nn.Module], lean: bool):
        self.function, self.statistics, self.lean = function, statistics, lean
        self.autocast = autocast_dtype(x)
        dtype = self.autocast or x.dtype
        self.limit = TOLERANCE_TF32 if dtype is torch.float32 and tf32_allowed() else TOLERANCE[dtype]
        self.settings = [_settings(m) for m in modules]
        self.calls = self.tries = 0
        self.forward: Callable | None = None
        self.derivative: _Derivative | None = None

    def wants_to_watch(self, x: Tensor) -> bool:
        self.calls += 1
        wants = self.tries < TRIES and self.calls >= WATCH_AT * (self.tries + 1)
        return wants and not capturing(x.device)

    def again(self, x: Tensor, parameters, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The forward, with statistics that have been computed."""
        known = self.statistics()
        known.kept, known.complete = kept, True
        given = iter(parameters)
        modules = [
            types.SimpleNamespace(**values, **{name: next(given) if there else None for name, there in names.items()})
            for values, names in self.settings
        ]
        return self.function(x, known, modules)

    def watch(self, modules, tensors: tuple[Tensor, ...], buffers: list[Tensor]):
        """(result, what the backward needs, _Derivative); the forward is written down, if it can be."""
        self.tries += 1
        args = (*tensors, *buffers)
        given = [b.clone() for b in buffers]
        watch = straight._Watch(args)
        tape = _Tape(watch, self.autocast, tensors, [t.requires_grad for t in tensors])
        known = self.statistics()
        with watch, tape.taking():
            y = self.function(tensors[0], known, modules)
        norms = [m for m in modules if not isinstance(m, nn.Conv2d) and m.training and m.track_running_stats]
        changed = [b for m in norms for b in m._buffers.values() if b is not None]
        torch.autograd.graph.increment_version(changed)  # which a mode that watches keeps PyTorch from
        steps = [] if self.lean else tape.steps
        needed = {p for step in steps for p in step.saved if p is not None}
        needed |= {tape.place(t) for t in (tensors[0], *(t for pair in known.kept for t in pair))}
        index = {p: i for i, p in enumerate(sorted(needed))}
        kept = [tape.tensors[p] for p in index]
        steps = [s._replace(saved=tuple(None if p is None else index[p] for p in s.saved)) for s in steps]
        again = [tuple(index[tape.place(t)] for t in pair) for pair in known.kept]
        rules = None if self.lean else _Rules(steps, tape.inputs, tape.slots.get(id(y)))
        required = [slot is not None for slot in tape.inputs]
        derivative = _Derivative(self, rules, required, index[tape.place(tensors[0])], again)
        del tape, known  # what is not kept
        self._write_down(watch, args, given, y, kept, derivative)
        return y, kept, derivative

    def _write_down(self, watch, args, given: list[Tensor], y, kept, derivative) -> None:
        mine = [y, *(t for t in kept if all(t is not a for a in (*args, y)))]
        count = len(args) - len(given)
        function = watch.written(args, tuple(mine))
        if callable(function):  # the buffers of the check are what they were before
            expected = (*mine, *args[count:])
            function = straight.checked(
                function, (*args[:count], *given), lambda found: (*found, *given), expected, self.limit
            )
        if isinstance(function, str):
            logger.info("a block runs op by op: %s", function)
            return
        places = {id(t): i for i, t in enumerate((*args, *mine))}
        derivative.keep = [places[id(t)] for t in kept]
        self.derivative = derivative
        self.forward = function  # last: another thread may be looking


def _settings(m: nn.Module) -> tuple[dict, dict]:
    """(what a module is set to, which of its parameters are there)."""
    names = _SETTINGS if isinstance(m, nn.Conv2d) else ("eps",)
    return {name: getattr(m, name) for name in names}, {n: m._parameters[n] is not None for n in ("weight", "bias")}


class _Rules(NamedTuple):
    """A forward's steps; the gradients' slots of its inputs and of its output."""

    steps: list[_Step]
    inputs: list[int | None]
    output: int | None

    def apply(self, grad: Tensor, saved, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs, by the steps' formulas, from the last to the first."""
        leads = {slot for slot, wanted in zip(self.inputs, needs, strict=True) if wanted and slot is not None}
        masks = []
        for step in self.steps:
            masks.append(tuple(slot in leads for slot in step.inputs))
            if any(masks[-1]):
                leads.update(slot for slot in step.outputs if slot is not None)
        gradients = {self.output: grad}
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

    rules: None where they are to be found again, with what they need, by a forward. required: which inputs had a
    gradient. x, statistics: where these are among the tensors that are kept. given_up: whether a kind of call is none
    that can be written down.
    """

    given_up = False

    keep: list[int]  # where these are among a forward's arguments and results

    def __init__(self, program, rules: _Rules | None, required: list[bool], x: int, statistics: list[tuple[int, int]]):
        self.program, self.rules, self.required, self.x, self.statistics = program, rules, required, x, statistics
        self.written: dict[tuple, Callable | _Tries] = {}  # by kind of call

    def __call__(self, grad: Tensor, kept, parameters, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Of parameters that lie where they lay in the forward."""
        kind = (grad.shape, grad.stride(), grad.dtype, grad.data_ptr() % 16, needs, *_modes())
        known = self.written.get(kind)
        args = (grad, *kept, *parameters)
        if known is None:
            known = _Tries()
            _remember(self.written, kind, known)
        if type(known) is not _Tries:
            return known(*args)
        if known.another() and not capturing(grad.device):
            with straight.alone() as alone:
                if alone:
                    known.tries += 1
                    watch = straight._Watch(args)
                    with watch:
                        result = self.run(grad, kept, parameters, needs, watch)
                    self._write_down(watch, args, result, kind)
                    self.given_up = self.given_up or (self.written[kind] is known and known.tries > TRIES)
                    return result
        return self.run(grad, kept, parameters, needs)

    def run(self, grad, kept, parameters, needs, watch=None) -> tuple[Tensor | None, ...]:
        """The same, as the host code has it."""
        rules, saved = self.rules, kept
        if rules is None:
            tape = _Tape(watch, self.program.autocast, (kept[self.x], *parameters), self.required)
            with tape.taking():
                y = self.program.again(kept[self.x], parameters, self.known(kept))
            rules, saved = _Rules(tape.steps, tape.inputs, tape.slots.get(id(y))), tape.tensors
        with ops.handed_to(_Below(watch)):
            return rules.apply(grad, saved, needs)

    def known(self, kept) -> list[tuple[Tensor, Tensor]]:
        return [(kept[mean], kept[var]) for mean, var in self.statistics]

    def _write_down(self, watch, args, result, kind: tuple) -> None:
        function = watch.written(args, result)
        if callable(function):
            function = straight.checked(function, args, lambda found: found, result, self.program.limit)
        if isinstance(function, str):
            logger.info("a block's backward runs op by op: %s", function)
        else:
            self.written[kind] = function


class _Tries:
    """Of a kind of backward: the first call is watched; where that did not do, a later one."""

    calls = tries = 0

    def another(self) -> bool:
        self.calls += 1
        return self.tries <= TRIES and self.calls > WATCH_AT * self.tries


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, program: _Program, modules, buffers: list[Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        tensors = (x, *parameters)
        with _below():
            if program.forward is None:
                y, kept, ctx.derivative = program.watch(modules, tensors, buffers)
            else:
                results = program.forward(*tensors, *buffers)
                everything, ctx.derivative = (*tensors, *buffers, *results), program.derivative
                y, kept = results[0], [everything[i] for i in ctx.derivative.keep]
        # No module is kept: what is reached from it may keep the graph.
        ctx.program, ctx.count = program, len(kept)
        ctx.parameters = [(p, p._version, p.data_ptr()) for p in parameters]
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
            return None, None, None, *_again(ctx, grad, kept, needs, True)
        if not ops.plain((grad,), [0], []):  # something has to see the ops
            rules = ctx.derivative.rules
            found = _again(ctx, grad, kept, needs, False) if rules is None else rules.apply(grad, kept, needs)
            return None, None, None, *found
        stay = all(p.data_ptr() == place for p, _, place in ctx.parameters)  # no `.data` was given another
        with _below():
            derivative = ctx.derivative if stay else ctx.derivative.run
            return None, None, None, *derivative(grad, kept, parameters, needs)


def _again(ctx, grad: Tensor, kept, needs: tuple[bool, ...], create_graph: bool) -> list[Tensor | None]:
    """The gradients, by the block's ops, each a node by itself, the forward being run again."""
    if any(p._version != version for p, version, _ in ctx.parameters):
        raise RuntimeError(
            "a parameter was modified in place between this block's forward and a gradient that is to be "
            "differentiated in turn, for which the forward is computed again"
        )
    derivative, program = ctx.derivative, ctx.program
    x, dtype = kept[derivative.x], program.autocast
    with torch.enable_grad(), torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        # Views, since hooks of the tensors themselves would be called here, and again behind this node.
        pairs = zip((x, *(p for p, *_ in ctx.parameters)), needs, strict=True)
        inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() if need else t for t, need in pairs]
        y = program.again(inputs[0], inputs[1:], derivative.known(kept))
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]


@contextlib.contextmanager
def _below():
    """Below autograd, and below autocast, whose casts are on the tape."""
    with _AutoDispatchBelowAutograd():
        if _is_any_autocast_enabled():
            with _ExcludeDispatchKeyGuard(ops.AUTOCAST):
                yield
        else:
            yield
