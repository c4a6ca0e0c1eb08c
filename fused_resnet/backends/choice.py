"""Of several backends that can run a call, the one that runs it fastest here: asked once a kind of call, on a GPU.

The backends fuse different things into the convolutions of training: one kernel that normalises while it loads, or
PyTorch's convolution and passes around it. Which is faster depends on the shape and the chip, so they are timed on the
call itself, interleaved, by CUDA events. Under torch.use_deterministic_algorithms(True) nothing is timed and the first
serves: two runs of a program then take the same kernels.
"""

from __future__ import annotations

import statistics

import torch

from .verify import prepare, unobserved

ROUNDS = 5
CALLS = 3  # a round: long enough for an event's resolution


def fastest(candidates: list, op: str, args: tuple, capturing: bool = False) -> tuple:
    """(the backend to serve this call and those like it, its time in microseconds a call by name, whether that is
    settled). candidates: backends that agreed with the reference, in the order of preference."""
    if len(candidates) == 1 or torch.are_deterministic_algorithms_enabled():
        return candidates[0], {}, True
    if capturing:
        return candidates[0], {}, False
    calls = {c: prepare(c, op, args) for c in candidates}
    try:
        with unobserved(args[0].device):
            times: dict = {c: [] for c in candidates}
            for call in calls.values():  # compiles, picks cuDNN's algorithm, fills PyTorch's cache of memory
                microseconds(call, args)
            for _ in range(ROUNDS):
                for c, call in calls.items():
                    times[c].append(microseconds(call, args))
    except torch.OutOfMemoryError:  # settled all the same: the next step has no more room
        return candidates[0], {}, True
    medians = {c.NAME: statistics.median(t) for c, t in times.items()}
    return min(candidates, key=lambda c: medians[c.NAME]), medians, True


def microseconds(call, args: tuple) -> float:
    """GPU time of one of CALLS calls in a row."""
    with torch.cuda.device(args[0].device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(CALLS):
            call(*args)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / CALLS
