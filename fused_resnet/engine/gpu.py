"""Runs a network on a GPU: its cheapest pieces over one arena, or PyTorch's own kernels if those are faster end to end;
either captured in a CUDA graph."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..backends import cuda_conv
from ..backends.triton import unavailable as triton_unavailable
from ..backends.verify import tf32_allowed
from . import compiled_conv, compiled_pool, path, triton_chain, triton_conv
from .arena import Life, assign
from .captured import Captured, Ordered, Turns, race
from .cases import (
    CUDNN,
    OWN,
    GroupedArgs,
    LinearArgs,
    PoolArgs,
    StemArgs,
    chip,
    conv_pack,
    conv_workspace,
    launch_conv,
    launch_stem,
    pytorch_conv,
    settle,
    stem_pack,
)
from .chain_cases import ChainArgs, launch_chain
from .eager import Eager, EagerExecutor, named, output_of
from .graph import may_alias
from .pieces import Piece, Pieces
from .plan import Group
from .problem import Candidate, Problem, describe
from .steps import Network, fold
from .tune import Results, expected, tune

logger = logging.getLogger("fused_resnet")

ALIGN = 256  # bytes
DEAR_COPY = 2**22  # bytes: a few microseconds of an H100


class Gpu:
    """Plans for one device and dtype, and the weights they share. One call at a time: the caller has the lock."""

    converts_inputs = True  # what comes is read as it is
    shares_weights = True  # graphs read the memory of the eager executor's folded weights

    def __init__(self, eager: EagerExecutor, device: torch.device):
        self.eager, self.dtype, self.device = eager, eager.dtype, device
        self.weights = Packed(eager.eager)
        self.turns = Turns(device)

    def plan(self, network: Network, inputs: tuple, mode: str, objection: Callable[[object], str | None]):
        """(function of inputs, the plan's groups, notes), or (None, [], why not)."""
        inputs = tuple(dense(x) for x in inputs)
        notes: list[str] = []
        groups = self.eager.groups(network)
        if why := self._unsupported():
            notes.append(f"no kernels of ours: {why}")
            mode = "off"
        ours: dict[str, tuple[Program, Ordered]] = {}
        for name, build in self._programs(network, inputs, mode, notes):
            # One at a time, but where they race: then those behind the first are on trial, in memory of their own.
            if ours and mode != "full":
                break
            pool, told = (None, []) if ours else (self.turns.pool, notes)
            try:
                found = self._graph(build, inputs, told, pool)
                why = None if found is None else objection(found[1](inputs))
            except Exception as error:  # whatever a kernel does wrong, there is a network without it
                logger.warning("%s failed", _CALLED[name], exc_info=True)
                found, why = None, describe(error)
            if why:
                notes.append(f"{_CALLED[name]} is not used: {why}")
            elif found is not None:
                ours[name] = found
            found = None
        if ours and mode != "full":
            ((program, run),) = ours.values()
            return run, program.groups(), _joined(notes)
        if not ours:
            cudnn = self._pytorch(network, inputs, notes, self.turns.pool)
            if why := objection(cudnn(inputs)):
                notes.append(f"{_CALLED['cudnn']} are not used: {why}")
                return None, [], _joined(notes)
            return cudnn, groups, _joined(notes)
        winner = self._winner(ours, network, inputs, objection, notes)
        if winner == "cudnn":
            notes.append("PyTorch's kernels serve")
            ours = None
            run = self._pytorch(network, inputs, notes, self.turns.pool)
        else:
            program, run = ours[winner]
            groups, ours = program.groups(), None
        torch.cuda.empty_cache()  # the trials' memory
        return run, groups, _joined(notes)

    def _winner(self, ours: dict, network: Network, inputs: tuple, objection: Callable, notes: list[str]) -> str:
        """Which network serves: the fastest end to end of those that are graphs, PyTorch's kernels among them."""
        runs = {name: run for name, (_, run) in ours.items()}
        try:
            cudnn = self._pytorch(network, inputs, [], None)
            if why := objection(cudnn(inputs)):
                notes.append(f"{_CALLED['cudnn']} are not used: {why}")
            else:
                runs["cudnn"] = cudnn
            graphs = {name: run for name, run in runs.items() if isinstance(run, Captured)}
            return self._fastest(graphs, inputs, notes) or next(iter(ours))
        except Exception as error:  # no memory for trials, say
            logger.warning("networks could not be raced", exc_info=True)
            notes.append(f"networks were not compared end to end: {describe(error)}")
            return next(iter(ours))

    def _programs(
        self, network: Network, inputs: tuple, mode: str, notes: list[str]
    ) -> list[tuple[str, Callable[[], Program]]]:
        """(name, what makes the program) of the ways through the network that are worth a graph, the best first."""
        try:
            pieces, results = self.pieces(network, inputs, mode, notes)
            ways = [("planned", cheapest(network, pieces, results), results)]
            chosen = [results[piece.key] for piece in ways[0][1] if piece.args is not None]
            if count := sum(result.source == "forecast" for result in chosen):
                notes.append(f"{count} of {len(chosen)} choices by forecast: what was fastest in others like them")
            if (others := _without_splits(results)) is not None:
                ways.append(("plain", cheapest(network, pieces, others), others))
                chosen = [[(p.key, p.args and kept[p.key].chosen.id) for p in way] for _, way, kept in ways]
                if chosen[0] == chosen[1]:  # what changed is on neither way
                    ways.pop()
        except Exception as error:
            logger.warning("planning failed", exc_info=True)
            notes.append(f"{_CALLED['planned']} is not used: {describe(error)}")
            return []
        common = (self.weights, self.eager.eager, self.device)
        return [(name, functools.partial(Program, network, way, kept, *common)) for name, way, kept in ways]

    def _graph(
        self, build: Callable[[], Program], inputs: tuple, notes: list[str], pool
    ) -> tuple[Program, Ordered] | None:
        """A program, and it as a graph; None if nothing in it is ours."""
        program = build()
        if not program.is_ours:
            return None
        parts = (program.begin, program.rest) if program.begins_alone(inputs) else None
        return program, self._captured(program.run, inputs, notes, pool, lambda x: build().run(x), parts)

    def _unsupported(self) -> str | None:
        """Why there is nothing to choose between."""
        if (why := triton_unavailable()) and not cuda_conv.runs_on(chip(self.device)[0]):
            return f"Triton {why}, and no convolution was compiled for this GPU"
        if self.dtype not in triton_conv.DTYPES:
            return f"they need {', '.join(map(str, triton_conv.DTYPES))}, got {self.dtype}"
        arch = chip(self.device)[0]
        return f"needs compute capability 8.0 or newer, got {arch / 10}" if arch < 80 else None

    def _fastest(self, runs: dict[str, Captured], inputs: tuple, notes: list[str]) -> str | None:
        """Which network is the fastest one, end to end."""
        if len(runs) < 2:
            return next(iter(runs), None)
        inputs = tuple(x.clone() for x in inputs)
        times = race({name: functools.partial(run.again, inputs) for name, run in runs.items()})
        notes.append("end to end " + ", ".join(f"{_CALLED[name]} {1e3 * times[name]:.3f} ms" for name in runs))
        return min(runs, key=times.get)

    def pieces(self, network: Network, inputs: tuple, mode: str, notes: list[str]) -> tuple[Pieces, Results]:
        """The pieces that can be run, and the results of their problems. mode 'cached': of those that are on the way
        which is expected to be the cheapest."""
        tf32 = self.device.type == "cuda" and tf32_allowed()
        given = {k: v for k, v in named(network, inputs).items() if isinstance(v, Tensor)}
        all_pieces = Pieces(network, self.dtype, self.device, tf32, given)
        problems: dict[str, Problem] = {}
        for piece in all_pieces.all():
            if piece.args is not None:
                problems.setdefault(piece.key, piece.args.problem())

        def tuned(some: dict[str, Problem]) -> Results:
            return _tuned(some, mode, self.device, notes)

        if mode == "cached":
            costs = expected(problems.values(), device=self.device)
            return all_pieces, on_the_way(network, all_pieces, problems, costs, tuned)
        results = tuned(problems)
        all_pieces.keep(results)
        return all_pieces, results

    def ordered(self, run: Callable) -> Ordered:
        """A function on the device, in turn with all the others: for what is not planned."""
        return Ordered(run, self.turns)

    def _pytorch(self, network: Network, inputs: tuple, notes: list[str], pool) -> Ordered:
        return self._captured(lambda given: self.eager.run(network, given), inputs, notes, pool)

    def _captured(
        self,
        run: Callable,
        inputs: tuple,
        notes: list[str],
        pool,
        apart: Callable | None = None,
        parts: tuple[Callable, Callable] | None = None,
    ) -> Ordered:
        """run as a CUDA graph, if it can be one. parts: the same as what reads the inputs, and what may be captured."""
        first, rest = parts or (None, run)
        try:
            return Captured(rest, inputs, self.turns, apart, pool, first)
        except Exception as error:
            notes.append(f"runs without a CUDA graph: {describe(error)}")
            return Ordered(run, self.turns, apart)

    def wait(self) -> None:
        """What follows on the current stream comes after all calls so far; and before those to come: `refresh`."""
        self.turns.begin()

    def refresh(self) -> None:
        """New weights into the memory that graphs read: after the replays asked for before, before those to come."""
        stream = self.turns.begin()
        try:
            self.weights.refresh()
            self.weights.settle(self.device)
        finally:
            self.turns.end(stream)


_CALLED = {
    "planned": "the planned network",
    "plain": "the network without kernels for small batches",
    "cudnn": "PyTorch's kernels in a graph",
}


def on_the_way(
    network: Network,
    pieces: Pieces,
    problems: dict[str, Problem],
    costs: dict[str, float],
    tuned: Callable[[dict[str, Problem]], Results],
) -> Results:
    """Results of what is expected to be the cheapest way through, by tuned; anew where one of them turns out otherwise.
    Pieces that nothing solves are gone then; those that were not asked for stay, without a result."""
    results, left = Results(), dict(problems)
    while wanted := {p.key for p in cheapest(network, pieces, results, costs)} & left.keys():
        results |= tuned({key: left.pop(key) for key in sorted(wanted)})
        pieces.keep(results.keys() | left.keys())
    return results


def cheapest(network: Network, pieces: Pieces, results: Results, costs: dict[str, float] | None = None) -> list[Piece]:
    """The pieces of the least time by what was measured or is expected. costs: what is expected, in seconds by key, of
    those without a result; without costs there is no way by them."""

    def cost(piece: Piece) -> float:
        if piece.args is None:
            return 0.0  # the same on every way
        if (result := results.get(piece.key)) is not None:
            seconds = result.seconds[0] if result.seconds else result.expected
        elif costs is not None:
            seconds = costs.get(piece.key)
        else:
            return math.inf
        # Of what nothing is known, nothing is chosen before the steps one by one.
        return float(len(piece.steps) > 1) if seconds is None else seconds

    return list(path.cheapest(len(network.steps), pieces.moves(cost))[1])


def _without_splits(results: Results) -> Results | None:
    """The results with what is fastest beside the kernels for small batches; None where those were not chosen. Timed
    one after the other of a kind they overlap one another, and gain what beside other kernels they may not."""
    changed = {}
    for key, result in results.items():
        if not compiled_conv.splits(result.chosen):
            continue
        timed = [t for t in result.trials if t.seconds and not compiled_conv.splits(t.candidate)]
        if timed:
            changed[key] = replace(result, chosen=min(timed, key=lambda t: t.seconds[0]).candidate)
    return Results({**results, **changed}) if changed else None


def _joined(notes: list[str]) -> str | None:
    return "; ".join(dict.fromkeys(notes)) or None


def _tuned(problems: dict[str, Problem], mode: str, device: torch.device, notes: list[str]) -> Results:
    """The results by key; of a problem that nothing solves, none."""
    try:
        return tune(problems.values(), mode, device=device)
    except RuntimeError as error:
        logger.warning("%s; its steps run by PyTorch's operators", error)
    results = Results()
    for problem in problems.values():
        try:
            results |= tune([problem], mode, device=device)  # what it measured before it failed is in the cache
        except RuntimeError as error:
            notes.append(str(error).splitlines()[0])
    return results


def dense(x: Tensor) -> Tensor:
    """A copy without gaps: channels_last if x is, else contiguous."""
    nhwc = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.channels_last if nhwc else torch.contiguous_format).copy_(x)


def _map(t: Tensor) -> Tensor:
    """[N, C] as a map of one position."""
    return t if t.dim() == 4 else t[..., None, None]


class Packed:
    """The folded weights as the kernels want them; what they want as it is is not kept twice. Plans share them."""

    def __init__(self, eager: Eager):
        self.eager = eager
        self._kept: dict[tuple, tuple] = {}
        self._written = False  # since they were settled

    def get(self, step, pack: Callable[[Tensor], Tensor], form: str) -> tuple[list[Tensor], Tensor]:
        """([weight, projection's weight], bias float32) of a step; form: names what pack does."""
        key = (*step.convolutions, form)
        if key not in self._kept:
            weights = [pack(w) for w in self.eager.folded(step)[0]]
            self._kept[key] = step, pack, weights, fold(step, self.eager.module)[1].float()
            self._written = True
        return self._kept[key][2:]

    def refresh(self) -> None:
        """After the folded weights were refreshed."""
        for step, pack, weights, bias in self._kept.values():
            for old, folded in zip(weights, self.eager.folded(step)[0], strict=True):
                if old.data_ptr() != folded.data_ptr():
                    old.copy_(pack(folded))
            bias.copy_(fold(step, self.eager.module)[1])
        self._written = True

    def settle(self, device: torch.device) -> None:
        """Kernels may read them early from now on."""
        if self._written:
            settle(device)
        self._written = False


class Program:
    """Pieces with their places in memory: `run` launches one after the other, and allocates only what PyTorch's own
    operators return."""

    def __init__(
        self,
        network: Network,
        pieces: list[Piece],
        results: Results,
        weights: Packed,
        eager: Eager,
        device: torch.device,
    ):
        self.network, self.pieces, self.results, self.eager, self.device = network, pieces, results, eager, device
        self.weights, self.dtype = weights, eager.dtype
        self.is_ours = any(self.chosen(p).backend in OWN for p in pieces)
        self.releases = network.releases([p.steps for p in pieces])
        self.shapes = {n.name: s for n in network.graph.nodes if (s := network.graph.shape(n)) is not None}
        self.quartered = {p.y for p in pieces if p.quarter}
        self.values, self.arena = self._places()
        self.workspace: Tensor | None = None
        self.launches = [self._launch(p) for p in pieces]
        weights.settle(device)
        sizes = [size for _, size in self.launches]
        if max(sizes, default=0):
            self.workspace = torch.empty(max(sizes), dtype=torch.uint8, device=device)

    def chosen(self, piece: Piece) -> Candidate:
        return self.results[piece.key].chosen if piece.args is not None else CUDNN

    def written(self, piece: Piece) -> list[str]:
        """Values that the piece writes into memory of ours."""
        if piece.args is None or self.chosen(piece).backend not in OWN:
            return []
        return [name for name in (piece.y, piece.z) if name is not None]

    def shape(self, name: str) -> tuple[int, int, int, int]:
        n, c, h, w = (*self.shapes[name], 1, 1)[:4]  # a classifier's result is a map of one position
        return (n, c, (h + 1) // 2, (w + 1) // 2) if name in self.quartered else (n, c, h, w)

    def _places(self) -> tuple[dict[str, Tensor], Tensor]:
        source, outputs = self.network.source, self.network.outputs
        last: dict[str, int] = {}
        for i, piece in enumerate(self.pieces):
            for step in piece.steps:
                for name in step.reads:
                    last[source(name)] = i
        for i, piece in reversed(list(enumerate(self.pieces))):  # what reads a view reads what it is a view of
            step = piece.steps[-1]
            if step.op == "traced" and may_alias(self.network.graph, step.node):
                end = len(self.pieces) if step.output in outputs else last.get(step.output, i)
                for name in step.reads:
                    last[source(name)] = max(last[source(name)], end)
        names, lives = [], []
        for i, piece in enumerate(self.pieces):
            for name in self.written(piece):
                if name not in outputs:
                    size = math.prod(self.shape(name)) * self.dtype.itemsize
                    names.append(name)
                    lives.append(Life(-(-size // ALIGN) * ALIGN, i, max(i, last.get(name, i))))
        offsets, total = assign(lives, ALIGN)
        arena = torch.empty(total, dtype=torch.uint8, device=self.device)
        values = {}
        for name, offset in zip(names, offsets, strict=True):
            n, c, h, w = self.shape(name)
            flat = arena[offset : offset + n * c * h * w * self.dtype.itemsize].view(self.dtype)
            values[name] = self._seen(name, flat.view(n, h, w, c).permute(0, 3, 1, 2))
        for piece in self.pieces:
            for name in self.written(piece):
                if name in outputs:
                    y = torch.empty(
                        self.shape(name), dtype=self.dtype, device=self.device, memory_format=torch.channels_last
                    )
                    values[name] = self._seen(name, y)
        return values, arena

    def _seen(self, name: str, y: Tensor) -> Tensor:
        """y in as many dimensions as the network's value has."""
        return y if len(self.shapes[name]) == 4 else y.flatten(1)

    def begins_alone(self, inputs: tuple) -> bool:
        """Whether the first piece is a compiled kernel that reads the inputs as they come, no other reads them, and a
        copy of them would cost more than a launch that the next one does not overlap."""
        first, *others = self.pieces
        if not isinstance(first.args, StemArgs) or self.chosen(first).backend != "cuda":
            return False
        if sum(x.nbytes for x in inputs) < DEAR_COPY:
            return False
        source, given = self.network.source, {n.name for n in self.network.placeholders}
        read = {source(name) for piece in others for step in piece.steps for name in step.reads}
        return not given & (read | {source(name) for name in self.network.outputs})

    def run(self, inputs: tuple):
        """What the model returns, partly in memory that the next run writes again."""
        return self._run(named(self.network, inputs), 0)

    def begin(self, inputs: tuple) -> None:
        """The first piece, of a program that begins alone."""
        self.launches[0][0](named(self.network, inputs) | self.values)

    def rest(self, inputs: tuple):
        """What `run` returns, after `begin`."""
        return self._run({}, 1)

    def _run(self, given: dict, start: int):
        values = given | self.network.constants | self.values
        for (launch, _), over in zip(self.launches[start:], self.releases[start:], strict=True):
            launch(values)
            for name in over:
                values.pop(name, None)
        return output_of(self.network, values, forbidden=self.arena)

    def groups(self) -> list[Group]:
        """What the plan says of each piece."""
        found = []
        for piece in self.pieces:
            result = self.results[piece.key] if piece.args is not None else None
            seconds = result.seconds[0] if result is not None and result.seconds else None
            alone = piece.steps[0]
            own = {"traced": "traced", "norm": "bn_act"}.get(alone.op)
            backend = own or (self.chosen(piece).backend if result else "pytorch")
            why = alone.why
            if piece.args is None and alone.op in ("conv", "stem"):
                why = "no kernel here is right for it"
            config = self.chosen(piece).label if result is not None and backend in OWN else ""
            found.append(Group(piece.steps, piece.rung, backend, config, seconds, why))
        return found

    # Launches: (function of the values by name, bytes of workspace).

    def _launch(self, piece: Piece) -> tuple[Callable[[dict], None], int]:
        if piece.args is None:
            return self._alone(piece), 0
        candidate = self.chosen(piece)
        if candidate.backend not in OWN:
            return self._pytorch(piece), 0
        if isinstance(piece.args, StemArgs):
            return self._stem(piece, candidate), 0
        if isinstance(piece.args, PoolArgs):
            return self._pool(piece), 0
        if isinstance(piece.args, ChainArgs):
            return self._chain(piece, candidate)
        return self._conv(piece, candidate)

    def _value(self, values: dict, name: str) -> Tensor:
        """As a kernel reads it: dense channels_last, in the network's dtype."""
        value = values[self.network.source(name)].to(self.dtype)
        # Not by `to`, which takes a slice of a channels_last tensor, gaps and all, to be channels_last.
        return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value.contiguous()

    def _aligned(self, values: dict, name: str) -> Tensor:
        """The same at a multiple of 16 bytes: an input of the caller's may begin anywhere."""
        value = self._value(values, name)
        return value.clone() if value.data_ptr() % 16 else value

    def _alone(self, piece: Piece) -> Callable[[dict], None]:
        (step,) = piece.steps

        def run(values: dict) -> None:
            seen = values
            if step.op != "traced":
                seen = {self.network.source(name): self._value(values, name) for name in step.reads}
            values[step.output] = self.eager.fused(step, self.network, seen)

        return run

    def _pytorch(self, piece: Piece) -> Callable[[dict], None]:
        if isinstance(piece.args, (StemArgs, LinearArgs)):
            return self._alone(piece)
        steps = piece.steps
        fused = self.chosen(piece).config.get("fused", False)

        def run(values: dict) -> None:
            for step in steps:
                if step.op != "conv":
                    values[step.output] = self.eager.run(step, self.network, values)
                    continue
                conv = step.conv
                weights, bias = self.eager.folded(step)
                segment = None
                if step.segment is not None:
                    name, other = step.segment
                    stride = 1 if self.network.source(name) in self.quartered else other.stride[0]
                    segment = (self._value(values, name), weights[1], stride)
                residual = None if step.residual is None else self._value(values, step.residual)
                options = dict(
                    stride=conv.stride, padding=conv.padding, dilation=conv.dilation, relu=step.relu, groups=conv.groups
                )
                x = self._value(values, step.x)
                values[step.output] = pytorch_conv(x, weights[0], bias, residual, segment, **options, fused=fused)
            if piece.quarter:
                values[piece.y] = values[piece.y][:, :, ::2, ::2]

        return run

    def _stem(self, piece: Piece, candidate: Candidate) -> Callable[[dict], None]:
        (step,) = piece.steps
        (weight,), bias = self.weights.get(step, *stem_pack(candidate, piece.args))
        source, y = self.network.source(step.x), self.values[step.output]
        format = torch.channels_last if piece.args.channels_last else torch.contiguous_format

        def run(values: dict) -> None:
            x = values[source].contiguous(memory_format=format)
            # An input of the caller's may begin anywhere.
            x = x.clone() if candidate.backend == "cuda" and x.data_ptr() % 4 else x
            launch_stem(candidate, x, weight, bias, y)

        return run

    def _pool(self, piece: Piece) -> Callable[[dict], None]:
        (step,) = piece.steps
        return lambda values: compiled_pool.launch(self._aligned(values, step.x), self.values[step.output])

    def _conv(self, piece: Piece, candidate: Candidate) -> tuple[Callable[[dict], None], int]:
        (step,) = piece.steps
        weights, bias = self.weights.get(step, *conv_pack(candidate, piece.args))
        options = dict(
            stride=piece.args.stride, padding=piece.args.padding, dilation=piece.args.dilation, relu=step.relu
        )
        if isinstance(piece.args, GroupedArgs):
            options["groups"] = piece.args.groups
        stride2 = piece.args.segment and piece.args.segment[3]
        size = conv_workspace(candidate, piece.args.shape, self.dtype, chip(self.device)[1])
        value = self._aligned if candidate.backend == "cuda" else self._value

        def run(values: dict) -> None:
            segment = (value(values, step.segment[0]), weights[1], stride2) if step.segment else None
            residual = None if step.residual is None else value(values, step.residual)
            space = self.workspace[:size] if size else None
            x, y = _map(value(values, step.x)), _map(self.values[step.output])
            launch_conv(candidate, x, weights[0], bias, residual, segment, y, space, **options)

        return run, size

    def _chain(self, piece: Piece, candidate: Candidate) -> tuple[Callable[[dict], None], int]:
        first, second, *rest = piece.steps
        pack = triton_chain.pack
        (weight1,), bias1 = self.weights.get(first, pack, "chain")
        (weight2, *projection), bias2 = self.weights.get(second, pack, "chain")
        options = dict(stride=piece.args.stride, relu=second.relu, quarter=piece.quarter, pool=piece.args.pool)
        if piece.z is not None:
            (weight3,), bias3 = self.weights.get(rest[0], pack, "chain")
            options["next"] = (weight3, bias3)
        y, z = self.values[piece.y], None if piece.z is None else self.values[piece.z]
        meta = torch.empty(piece.args.n, piece.args.c, piece.args.h, piece.args.w, device="meta")
        sized = dict(stride=piece.args.stride, pool=piece.args.pool)
        size = 0
        if candidate.backend == "triton":
            size = triton_chain.workspace(candidate.config, meta, weight1, bias1, weight2, bias2, **sized)

        value = self._aligned if candidate.backend == "cuda" else self._value

        def run(values: dict) -> None:
            x = value(values, first.x)
            residual = None if second.residual is None else value(values, second.residual)
            segment = None
            if second.segment is not None:
                segment = (value(values, second.segment[0]), projection[0], piece.args.segment[3])
            space = self.workspace[:size] if size else None
            tensors = dict(residual=residual, segment=segment, y=y, z=z, workspace=space)
            launch_chain(candidate, x, weight1, bias1, weight2, bias2, **options, **tensors)

        return run, size
