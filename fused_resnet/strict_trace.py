"""A trace of a module's forward that stands for all its calls, or none.

`torch.fx` writes down what a forward does with its input, once. Whatever else it does happens while it is traced and is
lost to the graph: draws from a generator, counts, lists of features, `with torch.no_grad()`. So a forward is followed
while it is traced, and given up before it can do such a thing: it may call modules, ReLUs and additions, go by
attributes, and return. Its code is read for that when it is entered, and is not run if it has anything else in it.
"""

from __future__ import annotations

import builtins
import dis
import functools
import gc
import inspect
import itertools
import operator
import sys
import threading
import types
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import fx, nn
from torch.nn.modules import module as _module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from .frozen import is_frozen

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, FrozenBatchNorm2d)
_TORCH = f"{Path(torch.__file__).parent}/"
_MODULES = f"{_TORCH}nn/"
# Of torch, what a forward may call.
_CALLED = tuple(f"{_TORCH}{name}" for name in ("nn/functional.py", "fx/", "_jit_internal.py")) + (__file__,)
_METHODS = {
    *("forward", "__call__", "_wrapped_call_impl", "_call_impl", "__getattr__"),
    *("__iter__", "__len__", "__getitem__", "__contains__", "values", "items", "keys", "_get_abs_string_index"),
}
_BUILTINS = {len, torch.relu, torch.relu_, torch.add, operator.add, operator.iadd}
_TYPES = {super, range, zip, enumerate, list, tuple, reversed}
_OF_TORCH = {"nn", "functional", "relu", "relu_", "add", "dropout"}
_OF_PROXIES = {"relu", "relu_", "add", "add_"}
_HIDDEN = {"_modules", "_parameters", "_buffers"}  # what is compared later has to be asked for by its name
_OPCODES = {
    *("STORE_ATTR", "STORE_GLOBAL", "STORE_NAME", "STORE_SUBSCR", "STORE_SLICE", "STORE_DEREF"),
    *("DELETE_ATTR", "DELETE_GLOBAL", "DELETE_NAME", "DELETE_SUBSCR", "DELETE_DEREF"),
    *("SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL", "SETUP_ASYNC_WITH", "BEFORE_ASYNC_WITH"),
    *("SETUP_FINALLY", "PUSH_EXC_INFO", "CHECK_EXC_MATCH", "MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE"),
    *("IMPORT_NAME", "IMPORT_STAR", "LOAD_BUILD_CLASS", "YIELD_VALUE", "GET_AWAITABLE"),
}
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_STARRED = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.memory_format, torch.device)


class Trace(NamedTuple):
    """called: the paths of the modules that were called. names: of all attributes that the code mentions. absent: of
    those that it asked for, and some module had not. moody: the modules that look at their own mode; the trace speaks
    for calls in which all of them have the same."""

    graph: fx.Graph
    called: set[str]
    names: set[str]
    absent: set[str]
    moody: set[nn.Module]


class _Unclear(BaseException):
    """The forward does more than a graph can say. Not an Exception: those, a forward may catch."""


def is_plain(value) -> bool:
    """Whether this is a constant that == compares."""
    if type(value) is tuple:
        return all(map(is_plain, value))
    return type(value) in PLAIN and value == value  # NaN would always be another


def has_plain_defaults(function: types.FunctionType) -> bool:
    return is_plain(function.__defaults__ or ()) and all(map(is_plain, (function.__kwdefaults__ or {}).values()))


def holds_modules(function: types.FunctionType) -> bool:
    """Whether a function has modules among its free variables, which stay when a block's are replaced or copied."""
    full = (cell for cell in function.__closure__ or () if cell != types.CellType())
    return any(isinstance(cell.cell_contents, nn.Module) for cell in full)


def is_norm(m: nn.Module) -> bool:
    """Whether m is a normalisation, to be called behind a convolution."""
    return isinstance(m, _NORMS) or is_frozen(m)


def is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def trace(module: nn.Module, leaves: set[str]) -> Trace | None:
    """What a module's forward does, in either mode, but for the modules at these paths, which are not looked into;
    None where a trace cannot say it."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or _is_torchs(code) or code.co_kwonlyargcount or code.co_flags & _STARRED:
        return None  # of keywords and stars fx makes another function, which nobody would know again
    found = _trace(module, leaves, code)
    if found is None or not found.moody:
        return found
    modules = list(module.modules())
    modes = [m.training for m in modules]
    both = []
    try:
        for mode in (True, False):
            for m in modules:
                object.__setattr__(m, "training", mode)  # nobody's own __setattr__ hears of it
            both.append(_trace(module, leaves, code))
    finally:
        for m, mode in zip(modules, modes, strict=True):
            object.__setattr__(m, "training", mode)
    if None in both or _written(both[0].graph) != _written(both[1].graph):
        return None
    return Trace(both[0].graph, *(set().union(*sets) for sets in zip(*(t[1:] for t in (found, *both)), strict=True)))


def _written(graph: fx.Graph) -> list[tuple]:
    return [(n.op, n.target, str(n.args), str(n.kwargs)) for n in graph.nodes]


def _trace(module: nn.Module, leaves: set[str], code: types.CodeType) -> Trace | None:
    modules = list(module.modules())
    kept = [{name: m.__dict__[name] for name in _HOOKS} for m in modules]
    tracer, watch, spy = _Tracer(leaves), _Watch(code, modules), _Spy()
    found: list[fx.Graph] = []

    def run() -> None:
        sys.setprofile(watch)
        try:
            with spy:
                found.append(tracer.trace(module))
        except (Exception, _Unclear):  # whatever the code of others does with a proxy
            pass
        finally:
            sys.setprofile(None)

    collects = gc.isenabled()
    gc.disable()  # what it calls, finalizers and callbacks, would be taken for the forward's doing
    for m in modules:  # hooks would be called with what is traced
        m.__dict__ |= {name: OrderedDict() for name in _HOOKS}
    try:
        with patch.multiple(_module, **{f"_global{name}": OrderedDict() for name in _HOOKS}):
            thread = threading.Thread(target=run)  # which has no profiler of its own, nor a grad mode or autocast
            thread.start()
            thread.join()
    finally:
        for m, was in zip(modules, kept, strict=True):
            m.__dict__ |= was
        if collects:
            gc.enable()
    clear = found and not watch.unclear and not spy.unclear and not tracer.asked and code in watch.codes
    return Trace(found[0], tracer.called, watch.names, watch.absent, watch.moody) if clear else None


class _Proxy(fx.Proxy):
    def __iadd__(self, other):  # fx takes it for an addition, whatever it is that changes
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __getattr__(self, name: str):
        if name not in _OF_PROXIES:  # what it says of its dtype, say, no graph would show
            self.tracer.asked = True
            raise _Unclear
        return super().__getattr__(name)


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[str]):
        super().__init__()
        self.leaves = leaves
        self.asked = False
        self.called: set[str] = set()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, *args):
        self.called.add(self.path_of_module(m))
        return super().call_module(m, *args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, nn.Conv2d) or is_norm(m)
        return known or module_qualified_name in self.leaves or super().is_leaf_module(m, "")


class _Spy(TorchFunctionMode):
    """Lets no function of torch's run on what is not traced: a buffer that counts, a number that is drawn."""

    unclear = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not any(isinstance(a, fx.Proxy) for a in tree_leaves((args, kwargs))):
            self.unclear = True
            raise _Unclear
        return func(*args, **(kwargs or {}))


class _Watch:
    """A profile function. codes: those of the forwards and of what they call, but for torch's. names, absent, moody: as
    Trace's."""

    unclear = False
    by_name = None  # getattr or hasattr, if it was called just now

    def __init__(self, root: types.CodeType, modules: list[nn.Module]):
        self.root = root
        self.kinds = {kind for m in modules for kind in type(m).__mro__}
        self.codes: set[types.CodeType] = set()
        self.names: set[str] = set()
        self.absent: set[str] = set()
        self.moody: set[nn.Module] = set()

    def __call__(self, frame: types.FrameType, event: str, arg) -> None:
        by_name, self.by_name = self.by_name, None
        try:
            if by_name is not None:
                self._named(by_name, frame if event == "call" else None)
            if event == "call":
                self._enter(frame)
            elif event == "c_call" and frame.f_code in self.codes:
                self.by_name = arg if arg is getattr or arg is hasattr else None
                if self.by_name is None and not any(arg is f for f in _BUILTINS):
                    raise _Unclear
        except BaseException:
            self.unclear = True
            raise

    def _enter(self, frame: types.FrameType) -> None:
        code, caller = frame.f_code, frame.f_back.f_code
        if _is_torchs(code):
            method = code.co_filename.startswith(f"{_MODULES}modules/")
            known = code.co_name in _METHODS if method else code.co_filename.startswith(_CALLED)
            if caller in self.codes and not known:
                raise _Unclear
        elif code is self.root or caller in self.codes or caller.co_filename.startswith(_MODULES):
            self.codes.add(code)
            names, asked, modes = _mentioned(code)
            self.names |= names
            if modes:
                own = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
                if not isinstance(own, nn.Module) or is_torchs(type(own)):
                    raise _Unclear
                self.moody.add(own)
            for name, attribute in asked:
                self._check(frame.f_globals.get(name, getattr(builtins, name, None)), attribute)
            # Made by a forward, it has that one's variables. (Functions that come from elsewhere hold no modules.)
            inner = any(code in outer.co_consts for outer in self.codes)
            for name in code.co_freevars:
                value = frame.f_locals.get(name)
                if not isinstance(value, fx.Proxy) and not (inner and isinstance(value, nn.Module)):
                    self._check(value, None)

    def _named(self, by_name, frame: types.FrameType | None) -> None:
        """After getattr or hasattr: a module has to be asked, by fx's function in place of nn.Module.__getattr__, for a
        child; or, by hasattr, for what it has not."""
        mod, name = (frame and frame.f_locals.get(local) for local in ("mod", "attr"))
        if frame is None or not _is_torchs(frame.f_code) or not isinstance(mod, nn.Module):
            raise _Unclear
        if name not in mod._modules:
            if by_name is not hasattr or name in mod._parameters or name in mod._buffers:
                raise _Unclear
            self.absent.add(name)
            self.names.add(name)

    def _check(self, value, attribute: str | None) -> None:
        """What may be called, but neither constants, which may change, nor what holds some: objects, other classes."""
        if isinstance(value, types.ModuleType):
            known = value.__name__.partition(".")[0] == "torch" and (
                attribute in _OF_TORCH or _is_uncalled(getattr(value, attribute or "", None))
            )
        elif isinstance(value, type):
            known = value in self.kinds or (value in _TYPES and attribute is None)  # attributes of kinds are compared
        elif isinstance(value, types.FunctionType):
            known = attribute is None and has_plain_defaults(value) and not holds_modules(value)
        else:
            known = isinstance(value, types.BuiltinFunctionType)
        if not known:
            raise _Unclear


def _is_uncalled(value) -> bool:
    """Whether this is a function of torch's that would end the trace if a forward called it: it may be mentioned."""
    return isinstance(value, types.FunctionType) and (
        _is_torchs(value.__code__) and not value.__code__.co_filename.startswith(_CALLED)
    )


def _is_torchs(code: types.CodeType) -> bool:
    """Or this file's: what a trace itself calls."""
    return code.co_filename.startswith(_TORCH) or code.co_filename == __file__


@functools.cache
def _mentioned(code: types.CodeType) -> tuple[frozenset[str], frozenset[tuple[str, str | None]], bool]:
    """The attributes that this code mentions; its global names, each with the attribute of it that is asked for, if
    one is; whether it looks at the mode of its first argument, `self`. Raises _Unclear for instructions that a forward
    here may not have."""
    found = list(dis.get_instructions(code))
    names = frozenset(i.argval for i in found if i.opname in _ATTRIBUTES)
    modes = [before for before, i in itertools.pairwise(found) if i.opname in _ATTRIBUTES and i.argval == "training"]
    if modes:
        own = code.co_varnames[0] if code.co_argcount else None
        read = all("LOAD_FAST" in i.opname and _variables(i)[-1] == own for i in modes)
        stored = (i for i in found if i.opname.startswith(("STORE_FAST", "DELETE_FAST")))
        if not read or any(own in _variables(i)[: 1 if "LOAD" in i.opname else None] for i in stored):
            raise _Unclear
    handles = bool(getattr(code, "co_exceptiontable", b""))  # exceptions: those of a trace as well
    hidden = not _HIDDEN.isdisjoint(names) or any(name.startswith("__") for name in names)
    if handles or hidden or not _OPCODES.isdisjoint(i.opname for i in found):
        raise _Unclear
    asked = [i.argval if i.opname in ("LOAD_ATTR", "LOAD_METHOD") else None for i in found[1:]] + [None]
    globals_ = frozenset(
        (i.argval, attribute)
        for i, attribute in zip(found, asked, strict=True)
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    )
    return names, globals_, bool(modes)


def _variables(instruction: dis.Instruction) -> tuple:
    """The local variables of an instruction, which some Pythons have one for two of."""
    value = instruction.argval
    return value if isinstance(value, tuple) else (value,)
