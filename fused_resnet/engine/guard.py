"""Tensors between guard zones, and the verdict on a candidate that ran on them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .problem import Candidate, Case

# An input is surrounded by NaN (all bits set, in every float format): what is read out of bounds shows in the result.
# An output is surrounded by something else, so that not even copied NaN goes unseen.
AROUND_INPUT, AROUND_OUTPUT, UNWRITTEN = 0xFF, 0xA5, 0xFF
LEAST_ZONE, LARGEST_ZONE = 2**16, 2**20  # bytes; the longest row of a ResNet has 57 KiB in float32
ELEMENTWISE = 10  # times the limit of the norm: one wrong tile among thousands cannot hide in a norm
CHUNK = 2**22  # elements compared at once, in float64


class Guarded:
    """A tensor like another one, between two zones of canary bytes."""

    def __init__(self, like: Tensor, fill: int):
        extent = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        size = extent * like.element_size()
        zone = min(max(-(-size // LEAST_ZONE) * LEAST_ZONE, LEAST_ZONE), LARGEST_ZONE)
        self.fill = fill
        self.raw = torch.full((zone + size + zone,), fill, dtype=torch.uint8, device=like.device)
        self.before, self.body, self.after = self.raw.split([zone, size, zone])
        self.tensor = self.body.view(like.dtype).as_strided(like.shape, like.stride())

    def breach(self) -> str | None:
        """Where something was written beside the tensor."""
        if bool((self.after != self.fill).any()):
            return "after its end"
        if bool((self.before != self.fill).any()):
            return "before its start"
        return None


class Verifier:
    """Random inputs and what their outputs have to be; judges one candidate after the other."""

    def __init__(self, case: Case, device: torch.device, seed: int):
        self.case, self.device = case, device
        self.breached = False  # whether anything was written out of bounds: perhaps farther than the zones reach
        inputs = case.inputs(device, seed)
        self.expected = case.reference(inputs)
        self.inputs = {name: Guarded(t, AROUND_INPUT) for name, t in inputs.items()}
        for name, guarded in self.inputs.items():
            guarded.tensor.copy_(inputs[name])
        self.pristine = {name: guarded.body.clone() for name, guarded in self.inputs.items()}
        self.outputs = {name: Guarded(t, AROUND_OUTPUT) for name, t in case.outputs(device).items()}
        if not self.expected or not self.expected.keys() <= self.outputs.keys():
            raise ValueError(f"reference: expected some of {sorted(self.outputs)}, got {sorted(self.expected)}")

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {n: g.tensor for n, g in self.inputs.items()}, {n: g.tensor for n, g in self.outputs.items()}

    def objection(self, candidate: Candidate) -> str | None:
        """What is wrong with this candidate's outputs, or with what else it did; None if nothing is."""
        try:
            inputs, outputs = self.tensors()
            inputs = self.case.pack(candidate, inputs)
            if reason := self._run(candidate, inputs, outputs) or self._error():
                return reason
            first = {name: self.outputs[name].body.clone() for name in self.expected}
            if reason := self._run(candidate, inputs, outputs):
                return reason
            for name, body in first.items():
                if not torch.equal(body, self.outputs[name].body):
                    return f"two runs on the same inputs differ in output {name!r}"
            return None
        finally:
            self._restore()

    def _run(self, candidate: Candidate, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> str | None:
        for guarded in self.outputs.values():
            guarded.body.fill_(UNWRITTEN)
        self.case.run(candidate, inputs, outputs)
        synchronize(self.device)
        for kind, tensors in (("output", self.outputs), ("input", self.inputs)):
            for name, guarded in tensors.items():
                if where := guarded.breach():
                    self.breached = True
                    return f"wrote out of bounds of {kind} {name!r}, {where}"
        for name, guarded in self.inputs.items():
            if not torch.equal(guarded.body, self.pristine[name]):
                return f"changed its input {name!r}"
        return None

    def _error(self) -> str | None:
        for name, expected in self.expected.items():
            value = self.outputs[name].tensor
            if value.shape != expected.shape:
                return f"output {name!r} is {list(value.shape)}, the reference's {list(expected.shape)}"
            limit = self.case.tolerance[value.dtype]
            norm, element, strays = errors(value, expected)
            if strays:
                return f"output {name!r} is not finite, or was not written, in {strays} places where the reference is"
            if not norm <= limit:
                return f"output {name!r} is off by {norm:.1e} (2-norm; the limit is {limit:.0e})"
            if not element <= ELEMENTWISE * limit:
                return f"an element of output {name!r} is off by {element:.1e} (the limit is {ELEMENTWISE * limit:.0e})"
        return None

    def _restore(self) -> None:
        """As new for the next candidate."""
        for guarded in [*self.inputs.values(), *self.outputs.values()]:
            guarded.before.fill_(guarded.fill)
            guarded.after.fill_(guarded.fill)
        for name, body in self.pristine.items():
            self.inputs[name].body.copy_(body)


def errors(value: Tensor, expected: Tensor) -> tuple[float, float, int]:
    """(|v - e| / |e| in 2-norms, the largest |v - e| / (|e| + rms(e)), how many are finite in one of them only)."""
    if not expected.numel():
        return 0.0, 0.0, 0
    square = distance = largest = 0.0
    strays = 0
    rows = max(1, CHUNK * expected.shape[0] // expected.numel()) if expected.dim() else 1
    pairs = list(zip(value.split(rows), expected.split(rows), strict=True)) if expected.dim() else [(value, expected)]
    for _, e in pairs:
        square += e.double().nan_to_num(0, 0, 0).square().sum().item()
    rms = math.sqrt(square / expected.numel())
    for v, e in pairs:
        v, e = v.double(), e.double()
        strays += int((v.isfinite() != e.isfinite()).sum())
        v, e = v.nan_to_num(0, 0, 0), e.nan_to_num(0, 0, 0)
        difference = (v - e).abs()
        distance += difference.square().sum().item()
        scale = e.abs() + rms
        largest = max(largest, (difference / scale.where(scale > 0, 1.0)).max().item())
    return math.sqrt(distance) / (math.sqrt(square) or 1.0), largest, strays


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
