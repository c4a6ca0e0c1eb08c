"""A call written down: what an op's host code did, as one straight line of Python.

Between the kernels of a training step stands the host code that picks tiles, counts rows and asks tensors for their
strides, with the same answers for all calls of one kind (shapes, strides, alignments, dtypes, options). A GPU that is
fast waits for it. So once a kind of call has come often enough, one call of it is watched: every operator of PyTorch's
that it calls, every launch, and which tensor goes where. What was seen becomes a function that allocates, launches and
calls in the same order and does nothing else. Before it serves, its results are compared with those of the call that
was watched, memory being filled with NaN before it is written to.

What a backend's function must not do, then, and nothing here could see: go by an address or a storage's offset, or by
values that it reads otherwise than through PyTorch's operators (`numpy()`, `untyped_storage()`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import types
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .verify import capturing, difference, one_line, unobserved

logger = logging.getLogger("fused_resnet")

WATCH_AT = 6  # calls of one kind: to write one down takes as long as a dozen calls
DIFFERENT = "written down, it gave something else"
TRIES = 3  # so many calls apart: an infinity that came by, or one tensor as two arguments, may not come again
_aten = torch.ops.aten
_ALLOCATES = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
# PyTorch's own bindings, where they do the same at less cost than the operator's handle.
_BOUND = {
    _aten.mm.default: torch.mm,
    _aten.addmm.default: torch.addmm,
    _aten.addmm_.default: Tensor.addmm_,
    _aten.mul_.Tensor: Tensor.mul_,
    _aten.convolution.default: torch.convolution,
    _aten.copy_.default: Tensor.copy_,
    _aten.clone.default: torch.clone,
    _aten._foreach_copy_.default: torch._foreach_copy_,
}
_UNPREDICTABLE = (torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
# By an offset in a storage, which is no part of an argument's kind. (Views from a first element on are not called.)
_BY_PLACE = {_aten.as_strided.default, _aten.as_strided_.default, *map(_aten.set_.__getattr__, _aten.set_.overloads())}
_PLAIN = (int, float, bool, str, type(None))
_watching = threading.local()
_one_at_a_time = threading.Lock()  # what PyTorch notes of modes is the whole process'


def watched() -> _Watch | None:
    """Who watches the call that runs now in this thread: launches have to be told (`launched`)."""
    return getattr(_watching, "watch", None)


@contextlib.contextmanager
def alone():
    """A lock that nobody waits for: whether it is ours. Then nobody else watches a call, inside."""
    mine = watched() is None and _one_at_a_time.acquire(blocking=False)
    try:
        yield mine
    finally:
        if mine:
            _one_at_a_time.release()


class _Refused(Exception):
    """Why a call cannot be written down."""


def _why(failure: Exception) -> str:
    return str(failure) if isinstance(failure, _Refused) else one_line(failure)


class _View:
    """A view of a tensor that has a name, which is made when something wants it."""

    def __init__(self, base: str, t: Tensor):
        self.base, self.shape, self.stride = base, tuple(t.shape), t.stride()


class _Watch(TorchDispatchMode):
    """Writes down the operators and launches of a call with these arguments."""

    def __init__(self, args: tuple):
        super().__init__()
        self.refusal: str | None = None
        self.silent = False  # while a function runs that is written down as one call
        self.heard: Callable | None = None  # hears of each operator before it runs
        self.device = args[0].device
        self.names: dict[int, str | _View] = {}  # by id, as long as a tensor lives
        self.living: list[weakref.ref] = []
        self.lines: list[tuple[str, list[str]]] = []  # a statement and the names in it
        self.bound: dict[str, object] = {}
        self.made: set[str] = set()
        for i, a in enumerate(args):
            if isinstance(a, Tensor):
                if id(a) in self.names:
                    self.refuse("one tensor is two arguments, which the next call may not repeat")
                self._call(a, f"a{i}")

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __enter__(self):
        self.outer, _watching.watch = watched(), self
        return super().__enter__()

    def __exit__(self, *exception):
        _watching.watch = self.outer
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.heard is not None:
            self.heard(func, args)
        result = func(*args, **kwargs)
        if not self.silent:
            self._try(self._called, func, args, kwargs, result)
        return result

    def whole(self, function: Callable, args: tuple) -> object:
        """function(*args), as one call whatever is inside: it gives new tensors, and changes nothing."""
        self.silent = True
        try:
            result = function(*args)
        finally:
            self.silent = False
        self._try(self._written, function, args, {}, result)
        return result

    def launched(self, runner: Callable, args: tuple) -> None:
        """runner(*args) was called, which reads and writes memory and returns nothing."""
        if not self.silent:
            self._try(self._launched, runner, args)

    def _try(self, step, *args) -> None:
        if self.refusal is None:
            try:
                step(*args)
            except Exception as failure:  # no reason for the call that is watched to fail
                self.refuse(_why(failure))

    def refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason

    # --- what happened, as statements ---

    def _called(self, func, args, kwargs, result) -> None:
        if any(tag in func.tags for tag in _UNPREDICTABLE) and not _by_numbers(func, args):
            raise _Refused(f"{func} gives other results each time, or others for other values")
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if not tensors:
            return  # a question about dtypes, say
        if isinstance(result, Tensor) and id(result) in self.names and not func._schema.is_mutable:
            return  # an argument that needed no change: of dtype, say
        if func in _ALLOCATES:
            self._allocated(result)
            return
        if self._is_view(func, args, result):
            base = self.names.get(id(args[0]))
            self._call(result, _View(base.base if isinstance(base, _View) else base, result))
            return
        if func in _BY_PLACE:
            raise _Refused(f"{func} goes by what a later call may have elsewhere")
        if self._leaves_the_device(tensors, result):
            raise _Refused(f"{func} takes values to another device, where they may be read")
        self._written(_BOUND.get(func, func), args, kwargs, result)

    def _written(self, func: Callable, args, kwargs, result) -> None:
        uses: list[str] = []
        call = ", ".join(
            [self._value(a, uses) for a in args] + [f"{k}={self._value(v, uses)}" for k, v in kwargs.items()]
        )
        results, spread = (result, True) if isinstance(result, (tuple, list)) else ((result,), False)
        targets = [self._target(func, r) for r in results]
        statement = f"{self._bind(func)}({call})"
        if any(t != "_" for t in targets):
            statement = f"{', '.join(targets)}{',' if spread and len(targets) == 1 else ''} = {statement}"
        self.lines.append((statement, [*uses, *(t for t in targets if t != "_")]))

    def _allocated(self, t: Tensor) -> None:
        if t.is_pinned():
            raise _Refused("pinned memory")
        name = self._named(t)
        layout = f"{tuple(t.shape)}, {t.stride()}, dtype={self._bind(t.dtype)}, device={self._bind(t.device)}"
        self.lines.append((f"{name} = {_ALLOCATE}({layout})", [name]))

    def _leaves_the_device(self, tensors: list[Tensor], result) -> bool:
        """A number that is made elsewhere, as a tensor without dimensions, may come; nothing may go."""
        away = [t for t in tensors if t.device != self.device]
        if not away:
            return False
        comes = len(away) < len(tensors) and all(t.device == self.device for t in tree_leaves(result) if t is not None)
        return any(t.dim() > 0 for t in away) or not (comes or len(away) == len(tensors))

    def _is_view(self, func, args, result) -> bool:
        """Whether this is a view of a tensor from its own first element on. (Some operators give a view or a copy.)"""
        if not func.is_view or not isinstance(result, Tensor):
            return False
        base = args[0]
        return (
            id(base) in self.names
            and torch._C._is_alias_of(result, base)
            and result.dtype is base.dtype
            and result.storage_offset() == base.storage_offset()
            and result.is_neg() == base.is_neg()
        )

    def _launched(self, runner, args) -> None:
        uses: list[str] = []
        call = ", ".join(self._value(a, uses) for a in args)
        self.lines.append((f"{self._bind(runner)}({call})", uses))

    def _target(self, func, t) -> str:
        if t is None or (isinstance(t, Tensor) and id(t) in self.names):  # changed in place, say
            return "_"
        if not isinstance(t, Tensor):
            raise _Refused(f"{func} gives a {type(t).__name__}")
        return self._named(t)

    def _named(self, t: Tensor) -> str:
        name = f"v{len(self.made)}"
        self.made.add(name)
        self._call(t, name)
        return name

    def _call(self, t: Tensor, name: str | _View) -> None:
        # Not kept alive: a call's largest tensors would add up.
        key = id(t)
        self.names[key] = name
        self.living.append(weakref.ref(t, lambda _: self.names.pop(key, None)))

    def _value(self, a, uses: list[str]) -> str:
        """An argument as source; the names in it are added to uses."""
        if isinstance(a, Tensor):
            name = self.names.get(id(a))
            if name is None:
                raise _Refused("a tensor comes from nowhere")
            if isinstance(name, _View):
                name = self._materialised(a, name)
            uses.append(name)
            return name
        if isinstance(a, (list, tuple)):
            inner = ", ".join(self._value(v, uses) for v in a)
            return f"[{inner}]" if isinstance(a, list) else f"({inner}{',' if len(a) == 1 else ''})"
        if type(a) in _PLAIN and not (type(a) is float and not math.isfinite(a)):
            return repr(a)
        return self._bind(a)

    def _materialised(self, t: Tensor, view: _View) -> str:
        name = self._named(t)
        statement = f"{name} = {self._bind(torch.as_strided)}({view.base}, {view.shape}, {view.stride})"
        self.lines.append((statement, [view.base, name]))
        return name

    def _bind(self, value) -> str:
        """The name of a constant in the function to be generated."""
        for name, known in self.bound.items():
            if known is value or (type(known) is type(value) and isinstance(value, torch.device) and known == value):
                return name
        name = f"c{len(self.bound)}"
        self.bound[name] = value
        return name

    # --- the function ---

    def written(self, args: tuple, result, serve: Callable | None = None) -> Callable | str:
        """`function`, or why there is none."""
        try:
            return self.function(args, result, serve)
        except Exception as failure:  # there is a result
            return _why(failure)

    def function(self, args: tuple, result, serve: Callable | None) -> Callable:
        """A function of arguments like args that does what was seen, result having come out. serve: what does the same
        where another device is the current one; None where the caller sees to that. Raises _Refused."""
        if self.refusal is not None:
            raise _Refused(self.refusal)
        uses: list[str] = []
        returned = self._value(result, uses)
        parameters = ", ".join(f"a{i}" for i in range(len(args)))
        body = []
        if args[0].is_cuda and serve is not None:
            here, instead = self._bind(torch._C._cuda_getDevice), self._bind(serve)
            body.append(f"if {here}() != {args[0].get_device()}: return {instead}({parameters})")
        last = {name: i for i, (_, names) in enumerate(self.lines) for name in names}
        kept = set(uses)
        for i, (statement, names) in enumerate(self.lines):
            body.append(statement)
            over = [n for n in dict.fromkeys(names) if last[n] == i and n in self.made and n not in kept]
            if over:
                body.append(f"del {', '.join(over)}")
        source = "\n    ".join([f"def straight({parameters}):", *body, f"return {returned}"])
        scope = {**self.bound, _ALLOCATE: torch.empty_strided}
        exec(compile(source, "<fused_resnet: a call written down>", "exec"), scope)
        return scope["straight"]


def _by_numbers(func, args) -> bool:
    """Whether this takes elements at places that are given by numbers: as many, whatever the numbers are."""
    if func is not _aten.index.Tensor:
        return False
    return all(t is None or t.dtype in (torch.int32, torch.int64) for t in args[1])


class Repeated:
    """serve, which has served a first call of a kind, for later ones; `became` gets what one of them is written down
    as."""

    def __init__(self, op: str, serve: Callable, limit: float, became: Callable[[Callable], None]):
        self.op, self.serve, self.limit, self.became = op, serve, limit, became
        self.calls = 1
        self.tries = 0

    def __call__(self, *args):
        self.calls += 1
        if self.tries == TRIES or self.calls < WATCH_AT * (self.tries + 1) or capturing(args[0].device):
            return self.serve(*args)
        with alone() as mine:
            if not mine:
                return self.serve(*args)
            self.tries += 1
            result, function = write_down(self.serve, args, self.limit)
        if isinstance(function, str):
            level = logging.WARNING if function is DIFFERENT and self.tries == TRIES else logging.INFO
            logger.log(level, "%s: the host code runs at every call: %s", self.op, function)
        else:
            self.became(function)
        return result


def write_down(serve: Callable, args: tuple, limit: float) -> tuple:
    """(serve(*args), a function that does the same for calls of this kind, or why there is none). limit: what
    `difference` may be of results that are not the same to the bit."""
    result, function = watch(serve, args)
    if isinstance(function, str):
        return result, function
    return result, checked(function, args, lambda found: found, result, limit)


def checked(function: Callable, args: tuple, changed: Callable, expected, limit: float) -> Callable | str:
    """function, if changed(function(*args)) is what is expected; else why it may not serve. changed: makes of its
    results what is compared."""
    check = types.FunctionType(function.__code__, {**function.__globals__, _ALLOCATE: _poisoned})
    try:
        with unobserved(args[0].device):
            pairs = zip(_flat(changed(check(*args))), _flat(expected), strict=True)
            if all(_agrees(v, e, limit) for v, e in pairs):
                return function
    except torch.AcceleratorError:  # nothing can go on after it
        raise
    except Exception as failure:  # there is too little memory for a second result, say; there is a first one
        return one_line(failure)
    return DIFFERENT


def watch(serve: Callable, args: tuple) -> tuple:
    """(serve(*args), a function that does the same or why there is none)."""
    seen = _Watch(args)
    with seen:
        result = serve(*args)
    return result, seen.written(args, result, serve)


_ALLOCATE = "empty_strided"  # its name in the functions that are generated


def _poisoned(*shape, **kind) -> Tensor:
    """torch.empty_strided, with memory that nobody can have meant."""
    t = torch.empty_strided(*shape, **kind)
    return t.fill_(math.nan if t.is_floating_point() else 85)


def _flat(result) -> tuple:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _agrees(v: Tensor | None, e: Tensor | None, limit: float) -> bool:
    if v is None or e is None:
        return v is e
    if (v.shape, v.stride(), v.dtype, v.device) != (e.shape, e.stride(), e.dtype, e.device):
        return False
    if torch.equal(_bits(v), _bits(e)):
        return True
    return v.is_floating_point() and difference(v, e) <= limit


def _bits(t: Tensor) -> Tensor:
    """A floating tensor as integers, which are equal where NaNs are the same."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.view(whole[t.element_size()]) if t.is_floating_point() else t
