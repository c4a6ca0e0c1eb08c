"""A trace of a module's forward that stands for all its calls, or none.

`torch.fx` writes down what a forward does with its input, once. Whatever else it does happens while it is traced and is
lost to the graph: draws from a generator, counts, lists of features, `with torch.no_grad()`. So a forward is followed
while it is traced, and given up before it can do such a thing: it may call modules and the functions of `torch.nn`, go
by attributes, and return; its code is read for that when it is entered. What attributes it names, it names.
"""

from __future__ import annotations

import builtins
import dis
import functools
import operator
import sys
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

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, FrozenBatchNorm2d)
_TORCH = f"{Path(torch.__file__).parent}/"
_MODULES = f"{_TORCH}nn/"
_CALLED = (_MODULES, f"{_TORCH}fx/", f"{_TORCH}_jit_internal.py", __file__)  # of torch, what a forward may call
_BUILTINS = {isinstance, len, iter, next, torch.relu, torch.relu_, torch.add, operator.add, operator.iadd}
_OPCODES = {
    *("STORE_ATTR", "STORE_GLOBAL", "STORE_NAME", "STORE_SUBSCR", "STORE_SLICE", "STORE_DEREF"),
    *("DELETE_ATTR", "DELETE_GLOBAL", "DELETE_NAME", "DELETE_SUBSCR", "DELETE_DEREF"),
    *("SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL", "SETUP_ASYNC_WITH", "BEFORE_ASYNC_WITH"),
    *("IMPORT_NAME", "IMPORT_STAR", "LOAD_BUILD_CLASS", "YIELD_VALUE", "GET_AWAITABLE"),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.memory_format, torch.device)


class Trace(NamedTuple):
    """called: the paths of the modules that were called. names: of all attributes that the code mentions."""

    graph: fx.Graph
    called: set[str]
    names: set[str]


class _Unclear(Exception):
    """The forward does more than a graph can say."""


def is_plain(value) -> bool:
    """Whether this is a constant that == compares."""
    if type(value) is tuple:
        return all(map(is_plain, value))
    return type(value) in PLAIN and value == value  # NaN would always be another


def trace(module: nn.Module, training: bool, leaves: set[str]) -> Trace | None:
    """What a module's forward does in this mode, but for the modules at these paths, which are not looked into; None
    where a trace cannot say it."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or _is_torchs(code):
        return None
    modules = list(module.modules())
    kept = [{name: m.__dict__[name] for name in ("training", *_HOOKS)} for m in modules]
    tracer, watch, before = _Tracer(leaves), _Watch(code), sys.getprofile()
    for m in modules:  # hooks would be called with what is traced
        m.__dict__ |= {name: OrderedDict() for name in _HOOKS} | {"training": training}
    try:
        with patch.multiple(_module, **{f"_global{name}": OrderedDict() for name in _HOOKS}), _Spy():
            sys.setprofile(watch)
            try:
                graph = tracer.trace(module)
            finally:
                sys.setprofile(before)
    except Exception:  # whatever the code of others does with a proxy
        return None
    finally:
        for m, was in zip(modules, kept, strict=True):
            m.__dict__ |= was
    return Trace(graph, tracer.called, watch.names)


class _Proxy(fx.Proxy):
    def __iadd__(self, other):  # fx takes it for an addition, whatever it is that changes
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
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
        kinds = (nn.Conv2d, *NORMS)
        return module_qualified_name in self.leaves or isinstance(m, kinds) or super().is_leaf_module(m, "")


class _Spy(TorchFunctionMode):
    """Lets no function of torch's run on what is not traced: a buffer that counts, a number that is drawn."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not any(isinstance(a, fx.Proxy) for a in tree_leaves((args, kwargs))):
            raise _Unclear
        return func(*args, **(kwargs or {}))


class _Watch:
    """A profile function. codes: those of the forwards and of what they call, but for torch's. names: the attributes
    that they mention."""

    def __init__(self, root: types.CodeType):
        self.root = root
        self.codes: set[types.CodeType] = set()
        self.names: set[str] = set()

    def __call__(self, frame: types.FrameType, event: str, arg) -> None:
        if event == "call":
            code, caller = frame.f_code, frame.f_back.f_code
            if _is_torchs(code):
                if caller in self.codes and not code.co_filename.startswith(_CALLED):
                    raise _Unclear
            elif code is self.root or caller in self.codes or caller.co_filename.startswith(_MODULES):
                self.codes.add(code)
                self.names |= _names(code)
                for name in _globals(code):
                    _check_global(frame.f_globals.get(name, getattr(builtins, name, None)))
                for name in code.co_freevars:
                    _check_captured(frame.f_locals.get(name))
        elif event == "c_call" and frame.f_code in self.codes and not any(arg is f for f in _BUILTINS):
            raise _Unclear


def _is_torchs(code: types.CodeType) -> bool:
    """Or this file's: what a trace itself calls."""
    return code.co_filename.startswith(_TORCH) or code.co_filename == __file__


def _check_global(value) -> None:
    """What may be called, but neither constants, which may change, nor objects, which may hold some."""
    if isinstance(value, types.ModuleType):
        known = value is operator or value.__name__.partition(".")[0] == "torch"
    else:
        known = isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type))
    if not known:
        raise _Unclear


def _check_captured(value) -> None:
    if not isinstance(value, fx.Proxy) and not is_plain(value):
        _check_global(value)


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    """The attributes that this code mentions. Raises _Unclear for instructions that a forward here may not have."""
    found = list(dis.get_instructions(code))
    if not _OPCODES.isdisjoint(i.opname for i in found):
        raise _Unclear
    return frozenset(i.argval for i in found if i.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"))


@functools.cache
def _globals(code: types.CodeType) -> frozenset[str]:
    return frozenset(i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
