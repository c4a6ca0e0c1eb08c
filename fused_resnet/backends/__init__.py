"""The backends, their order, and the choice among them.

A backend is a module with NAME and a function for each op it has, and
    unavailable()       why it cannot run here
    declines(op, *args) why it cannot run this call
and, if it likes,
    defers(op, *args)   why an automatic choice should go on to the next backend
    variant(op, *args)  what its kernels are specialised on beyond dtypes, layouts, channels and options
    prepare(op, *args)  a function for this call and for all like it
    LAST_RESORT         the ops that it serves only where no backend before it does

An automatic choice takes the first that has no such reason; on a GPU a kernel is compared with the reference, once a
signature (verify.py), before it is trusted, and of an op in MEASURED the fastest that agreed serves (choice.py). A
forced choice (`fused_resnet.backend(name)`, FUSED_RESNET_BACKEND) runs that backend or raises its reason.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable

import torch

from . import composed, cpu, cuda, cudnn, pooled, reference, stem_conv, triton
from .choice import fastest
from .straight import Repeated
from .verify import TOLERANCE, capturing, objection, prepare, signature, tf32_allowed, tolerance

logger = logging.getLogger("fused_resnet")

BACKENDS = {b.NAME: b for b in (cuda, triton, cudnn, cpu, reference)}
ORDER = {"cuda": (cuda, triton, cudnn), "cpu": (cpu,)}
MEASURED = {*composed.OPS, *pooled.OPS, *stem_conv.OPS}  # the backends fuse different things into these
TRUSTED = {cpu}  # PyTorch's own kernels, probed once; all others are compared with the reference first
ENVIRONMENT = "FUSED_RESNET_BACKEND"
HOST_CODE = "FUSED_RESNET_HOST_CODE"  # "run": at every call, nothing is written down
WRITTEN_DOWN = set() if os.environ.get(HOST_CODE) == "run" else {"cuda"}  # types of devices that wait for the host
MOST_READY = 4096  # kinds of calls remembered: more than a network has, fewer than an endless stream of sizes brings

_forced: list[str] = [os.environ[ENVIRONMENT]] if os.environ.get(ENVIRONMENT) else []
_told: set[str] = set()
_ready: dict[tuple, Callable] = {}
_winners: dict[tuple, object] = {}


@contextlib.contextmanager
def backend(name: str):
    """Force a backend inside a `with` block, for the whole process (autograd's threads included).

    name: 'cuda', 'triton', 'cudnn', 'cpu' or 'reference'. An op that it cannot run raises RuntimeError with the reason.
    The environment variable FUSED_RESNET_BACKEND does the same for a whole run.
    """
    _named(name, "backend(name)")
    _forced.append(name)
    try:
        yield
    finally:  # the last of this name: another thread's may stand above it
        del _forced[len(_forced) - 1 - _forced[::-1].index(name)]


def _named(name: str, source: str):
    if name not in BACKENDS:
        raise ValueError(_no_such(name, source))
    return BACKENDS[name]


def _no_such(name: str, source: str) -> str:
    return f"{source}: there is no backend {name!r}; there are {', '.join(BACKENDS)}"


def forced() -> str | None:
    """The name of the backend that is forced now, or None."""
    return _forced[-1] if _forced else None


def unknown() -> str | None:
    """Why what is forced is no backend; None if it is one, or nothing is forced."""
    if not _forced or _forced[-1] in BACKENDS:
        return None
    return _no_such(_forced[-1], ENVIRONMENT)


def refuses_device(name: str, device: torch.device) -> str | None:
    """Why this backend runs nothing on this device; None if it may."""
    candidate = BACKENDS[name]
    return refuses(candidate, "bn_stats", (torch.ones(1, 1, 2, 2, device=device),))


def refuses(candidate, op: str, args: tuple) -> str | None:
    """Why this backend does not run this call, as '<name>: <reason>'; None if it does."""
    reason = candidate.unavailable() or candidate.declines(op, *args)
    return reason and f"{candidate.NAME}: {reason}"


def defers(candidate, op: str, args: tuple) -> str | None:
    """Why an automatic choice leaves this call to the next backend, though this one could run it."""
    defers = getattr(candidate, "defers", None)
    reason = defers and defers(op, *args)
    return reason and f"{candidate.NAME}: {reason}"


def run(op: str, *args, check=None, finish=None):
    """Run an op on the backend that is forced, or else on the first that can.

    check(*args) raises for arguments that no backend could use. finish(args, result) makes of a backend's result what
    the op returns. Neither check nor the choice is made again for a call like one that went through before: such a call
    costs a look-up, and what its backend prepared; on a GPU, in time, what straight.py makes of that.
    """
    key = _key(op, args)
    ready = _ready.get(key)
    if ready is not None:
        return ready(*args)
    if check is not None:
        check(*args)
    serve, lasting = _choose(op, args)
    if finish is not None:
        serve = _finished(serve, finish)
    result = serve(*args)
    if lasting and key is not None:
        if len(_ready) >= MOST_READY:
            _ready.clear()
        if args[0].device.type in WRITTEN_DOWN and args[0].dtype in TOLERANCE:
            serve = Repeated(op, serve, tolerance(op, args), functools.partial(_ready.__setitem__, key))
        _ready[key] = serve
    return result


def _finished(serve, finish):
    return lambda *args: finish(args, serve(*args))


def _choose(op: str, args: tuple):
    """(function that serves this call, whether it serves all later ones like it)."""
    if _forced:
        chosen = _named(_forced[-1], ENVIRONMENT)
        if reason := refuses(chosen, op, args):
            raise RuntimeError(f"fused_resnet::{op}: {reason} (this backend is forced)")
        return prepare(chosen, op, args), True
    lasting, agreed = True, []
    for candidate in ORDER.get(args[0].device.type, ()):
        if reason := refuses(candidate, op, args) or defers(candidate, op, args):
            _tell_once(logging.INFO, f"{op}: {reason}")
            continue
        if agreed and op in getattr(candidate, "LAST_RESORT", ()):
            continue
        reason, settled = (None, True) if candidate in TRUSTED else objection(candidate, op, args)
        lasting = lasting and settled
        if reason is None and op in MEASURED and candidate not in TRUSTED:
            agreed.append(candidate)
            continue
        if reason is None or (candidate is cudnn and not settled and not agreed):
            # PyTorch's own kernels serve for now, where there is no room or no moment to compare them: the reference
            # would need several times the memory.
            return prepare(candidate, op, args), lasting
        _tell_once(logging.WARNING, f"{op}: {candidate.NAME}: {reason}; the next backend serves")
    if agreed:
        chosen, settled = _fastest(agreed, op, args)
        return prepare(chosen, op, args), lasting and settled
    return prepare(reference, op, args), lasting


def _fastest(agreed: list, op: str, args: tuple):
    """(the fastest of these backends, whether that is settled): asked once a kind of call, maps of about one size being
    one kind, so that images of changing sizes are not timed one by one."""
    rows = args[0].shape[0] * math.prod(args[0].shape[2:])
    deterministic = torch.are_deterministic_algorithms_enabled()
    key = (op, deterministic, rows.bit_length(), *(signature(c, op, args) for c in agreed))
    if key not in _winners:
        chosen, times, settled = fastest(agreed, op, args, capturing(args[0].device))
        if times:
            told = ", ".join(f"{name} {t:.0f} us" for name, t in times.items())
            logger.info("%s of %s: %s", op, list(args[0].shape), told)
        if not settled:
            return chosen, False
        _winners[key] = chosen
    return _winners[key], True


def _key(op: str, args: tuple) -> tuple | None:
    """All that the checks, the choice and what is prepared depend on; None for tensors that have no strides."""
    x = args[0]
    key = [op, _forced[-1] if _forced else None, torch._C._get_cudnn_enabled()]
    if x.dtype is torch.float32:
        key.append(tf32_allowed())
    if op in MEASURED:
        key.append(torch.are_deterministic_algorithms_enabled())
    try:
        for a in args:
            if isinstance(a, torch.Tensor):
                key += (a.shape, a.stride(), a.dtype, a.device, a.data_ptr() % 16)
            else:
                key.append(tuple(a) if type(a) is list else a)
    except RuntimeError:
        return None
    return tuple(key)


def repeated(x, *args):
    """conv_bn_act on a CPU, its weights folded before, if this very call went through before; else None."""
    return cpu.repeated(x, *args) if x.is_cpu and (not _forced or _forced[-1] == cpu.NAME) else None


def _tell_once(level: int, message: str) -> None:
    if message not in _told:
        _told.add(message)
        logger.log(level, "%s", message)
