"""Runs a network on a CPU: the compiled program between the steps that are traced, over one arena."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..backends.cpu import return_free_memory
from . import cpu_program as cp
from . import cpu_tune
from .cache import Cache, environment, folder
from .eager import Eager, named, output_of
from .plan import Group, alone
from .steps import Network, Step

AGAIN = 0.5  # seconds: a program that takes less is timed a second time


class Cpu:
    """Programs, and the weights and memory that they share. One call at a time: the caller has the lock."""

    converts_inputs = False
    shares_weights = False  # programs fold and pack for themselves

    def __init__(self, module: nn.Module, workers: int | None = None, isa: int = -1):
        self.target = cp.isa(isa)
        self.workers = workers or torch.get_num_threads()
        self.weights = cp.Weights(module, self.target)
        self.eager = Eager(module, torch.float32)
        self.arena = self.scratch = torch.empty(0, dtype=torch.float32, device="cpu")
        self.cache: Cache | None = None
        self.live: WeakSet[cp.Program] = WeakSet()

    def plan(self, network: Network, inputs: tuple, tune: str, objection: Callable[[object], str | None]):
        """(function of inputs, the plan's groups, what was dropped), or (None, [], why not)."""
        chosen, wrong = {}, []
        if tune != "off":
            chosen = self._tuned(network, inputs, tune, objection, wrong)
        program = self.program(network, inputs, chosen)
        times: dict[str, float] = {}
        why = objection(self.run(program, inputs, times))
        if why and (
            plain := cpu_tune.without_winograd(program)
        ):  # it magnifies rounding errors, some networks do as well
            program = self.program(network, inputs, chosen | plain)
            if not objection(self.run(program, inputs, times := {})):
                wrong.append(f"Winograd's filtering is not used: {why}")
                why = None
        if why:
            return None, [], f"the compiled program is not used: {why}"
        if sum(times.values()) < AGAIN:  # the first time was with cold caches
            self.run(program, inputs, times := {})
        self.live.add(program)
        self._trim()
        return_free_memory()
        return (lambda given: self.run(program, given)), self._groups(program, times), "; ".join(wrong)

    def _tuned(self, network: Network, inputs: tuple, mode: str, objection, wrong: list[str]) -> dict[str, cp.Choice]:
        """Choices measured before, or now: every kind is compared with PyTorch's result before it is timed."""
        small, sample = cpu_tune.smaller(network, inputs)
        base = self.program(small, sample, {})
        if self.cache is None:
            self.cache = Cache(folder(), environment(torch.device("cpu")))
        known = cpu_tune.recall(base, self.cache)
        if mode == "cached" or len(known) == len(cpu_tune.tunable(base)):
            return known

        def run(program: cp.Program, times: dict | None) -> None:
            result = self.run(program, sample, times)
            if times is None and (why := objection(result)):
                raise cpu_tune.Wrong(why)

        chosen = cpu_tune.tune(base, run, lambda choices: self.program(small, sample, choices), wrong)
        cpu_tune.remember(base, chosen, self.cache)
        return {output: choice for output, (_, choice) in chosen.items()}

    def _groups(self, program: cp.Program, times: dict[str, float]) -> list[Group]:
        """What the plan says of each step. times: seconds by a step's output."""
        groups = []
        for step in program.network.steps:
            if step.op == "traced":
                groups.append(alone(step, "traced"))
            elif why := cp.unsupported(step, self.target):
                groups.append(alone(step, "bn_act" if step.op == "norm" else "pytorch", why=why))
            else:
                batch, size = program.batch_of(step.output), program.size[step.output]
                config = str(program.choice(step)) if step.op in ("conv", "linear") else ""
                parts = [config, f"{size} of {batch} images" if size < batch else ""]
                config = ", ".join(p for p in parts if p)
                groups.append(alone(step, f"cpu {self.target.name}", config, times.get(step.output)))
        return groups

    def program(self, network: Network, inputs: tuple, choices: dict[str, cp.Choice]) -> cp.Program:
        network = for_stems(network, self.target)
        strides = {name: t.stride() for name, t in self._given(network, inputs).items() if isinstance(t, Tensor)}
        return cp.Program(network, self.weights, self.target, self.workers, strides, choices)

    def _given(self, network: Network, inputs: tuple) -> dict[str, object]:
        """The inputs by name, in a layout that their readers read."""
        given = named(network, inputs)
        for name, value in given.items():
            if isinstance(value, Tensor) and value.dim() == 4:
                only_stems = all(s.op == "stem" for s in network.steps if name in s.reads and s.op != "traced")
                dense = value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last)
                if not (only_stems and dense):
                    given[name] = value.contiguous(memory_format=torch.channels_last)
            elif isinstance(value, Tensor):
                given[name] = value.contiguous()
        return given

    def _memory(self, program: cp.Program) -> None:
        """Bring the program into this memory, which grows if need be. A program that was written for it fits."""
        if program.memory == self._where():
            return
        for name, floats in (("arena", program.floats), ("scratch", program.scratch_floats())):
            if getattr(self, name).numel() < floats:
                for other in self.live:  # they would keep the old memory
                    other.forget()
                setattr(self, name, aligned(floats))
        program.write(self.arena, self.scratch)
        program.memory = self._where()

    def _where(self) -> tuple[int, int]:
        return self.arena.data_ptr(), self.scratch.data_ptr()

    def run(self, program: cp.Program, inputs: tuple, times: dict[str, float] | None = None):
        """What the model returns. times: gets the seconds of each step by its output."""
        self._memory(program)
        network = program.network
        values = self._given(network, inputs) | program.views | network.constants
        given = set(values)
        for name in program.fresh:
            shape = program.shapes[name]
            layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
            values[name] = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=layout)
            given.add(name)
        for piece in program.segments:
            if isinstance(piece, Step):
                values[piece.output] = self.eager.fused(piece, network, values)
                continue
            buffers = [b if isinstance(b, Tensor) else _dense(values[b], b in given) for b in piece.buffers]
            seconds = torch.zeros(len(piece.owners), dtype=torch.float64, device="cpu") if times is not None else None
            torch.ops.fused_resnet_cpu.run_program(piece.program, buffers, seconds)
            if times is not None:
                for owner, took in zip(piece.owners, seconds.tolist(), strict=True):
                    times[owner] = times.get(owner, 0.0) + took
        return output_of(network, values, forbidden=self.arena)

    def refresh(self) -> None:
        self.weights.refresh()
        self.eager.refresh()

    def _trim(self) -> None:
        """Forget weights in layouts that no program uses."""
        self.weights.keep({key for program in self.live for key in program.used})


def aligned(floats: int) -> Tensor:
    """Floats from a page's start on: each worker's part, and each value, begins at a cache line."""
    page = 4096
    block = torch.empty(floats * 4 + page, dtype=torch.uint8, device="cpu")
    skip = -block.data_ptr() % page
    return block[skip : skip + floats * 4].view(torch.float32)


def supported(dtype: torch.dtype) -> str | None:
    """Why the compiled CPU kernels cannot run a network in this dtype; None if they can."""
    if dtype is not torch.float32:
        return f"the compiled kernels for CPUs are float32, this is {str(dtype).removeprefix('torch.')}"
    from ..backends import cuda

    return cuda.load()


def for_stems(network: Network, target: cp.Isa) -> Network:
    """Stems that the kernel does not cover become a convolution and a max-pool."""
    steps: list[Step] = []
    for step in network.steps:
        if step.op != "stem" or (cp.fits_stem(step, target) and not cp.unsupported(step, target)):
            steps.append(step)
            continue
        before = step.layers[-2]
        steps.append(replace(step, op="conv", layers=step.layers[:-1], output=before, pool=None))
        steps.append(Step("max_pool", step.layers[-1:], before, step.output, pool=step.pool))
    return replace(network, steps=steps)


def _dense(value: Tensor, as_it_is: bool) -> Tensor:
    """What a traced step made, as the program reads it."""
    if as_it_is:
        return value
    layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
    return value.to(torch.float32).contiguous(memory_format=layout)
