"""Runs a network on a GPU: its cheapest pieces over one arena, or PyTorch's own kernels if those are faster end to end;
either captured in a CUDA graph."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import path, triton_chain, triton_conv, triton_stem
from .arena import Life, assign
from .cases import CUDNN, ChainArgs, StemArgs, pytorch_conv
from .cpu import outputs_of
from .cpu_program import fold
from .eager import Eager, EagerExecutor, named, output_of
from .graph import may_alias
from .pieces import Piece, Pieces
from .plan import Group
from .problem import Candidate
from .steps import Network
from .tune import Results, tune

ALIGN = 256  # bytes
ROUNDS = 20  # of the two networks, end to end


class Gpu:
    """Plans for one device and dtype, and the weights they share. One call at a time: the caller has the lock."""

    converts_inputs = True  # what comes is read as it is

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device, capture: bool = True):
        self.module, self.dtype, self.device, self.capture = module, dtype, device, capture
        self.eager = EagerExecutor(module, dtype)
        self.weights = Packed(module, dtype)
        # Graphs share memory, so that one replay follows another, whatever streams they are asked for on.
        self.pool = torch.cuda.graph_pool_handle() if capture else None
        self.done = torch.cuda.Event() if capture else None

    def plan(self, network: Network, inputs: tuple, mode: str, objection: Callable[[object], str | None]):
        """(function of inputs, the plan's groups, None), or (None, [], why not)."""
        notes: list[str] = []
        cudnn = self._captured(lambda given: self.eager.run(network, given), inputs, notes)
        groups = self.eager.groups(network)
        if why := objection(cudnn(inputs)):
            return None, [], f"PyTorch's kernels in a graph are not used: {why}"
        try:
            pieces, results = self.pieces(network, inputs, mode)
            program = Program(network, pieces, results, self.weights, self.eager.eager, inputs, self.device)
            ours = self._captured(program.run, inputs, notes)
        except RuntimeError as error:
            notes.append(f"the planned network is not used: {str(error).splitlines()[0]}")
            return cudnn, groups, "; ".join(notes)
        if why := objection(ours(inputs)):
            notes.append(f"the planned network is not used: {why}")
            return cudnn, groups, "; ".join(notes)
        if mode == "full":
            times = race({"planned": ours, "cudnn": cudnn}, inputs, self.device)
            notes.append(
                f"end to end {1e3 * times['planned']:.3f} ms, all by PyTorch's kernels {1e3 * times['cudnn']:.3f} ms"
            )
            if times["cudnn"] < times["planned"]:
                notes.append("the latter are faster, and serve")
                return cudnn, groups, "; ".join(notes)
        return ours, program.groups(), "; ".join(notes)

    def pieces(self, network: Network, inputs: tuple, mode: str) -> tuple[list[Piece], Results]:
        """The cheapest pieces by what was measured (before or now), and the results of all problems."""
        tf32 = self.device.type == "cuda" and torch.backends.cudnn.allow_tf32
        given = {k: v for k, v in named(network, inputs).items() if isinstance(v, Tensor)}
        all_pieces = Pieces(network, outputs_of(network), self.dtype, self.device, tf32, given)
        problems = {}
        for i in range(len(network.steps)):
            for piece in all_pieces.at(i):
                if piece.args is not None:
                    problems.setdefault(piece.key, piece.args.problem())
        results = tune(problems.values(), mode, device=self.device)

        def cost(piece: Piece) -> float:
            if piece.args is None:
                return 0.0  # the same on every way
            seconds = results[piece.key].seconds
            # What was not measured is not chosen before the steps one by one.
            return seconds[0] if seconds else float(len(piece.steps) > 1)

        return list(path.cheapest(len(network.steps), all_pieces.moves(cost))[1]), results

    def _captured(self, run: Callable, inputs: tuple, notes: list[str]) -> Callable:
        if not self.capture:
            return lambda given: fresh(run(given))
        try:
            return Captured(run, inputs, self.device, self.pool, self.done)
        except RuntimeError as error:
            notes.append(f"runs without a CUDA graph: {str(error).splitlines()[0]}")
            return lambda given: fresh(run(given))

    def refresh(self) -> None:
        """New weights into the memory that graphs read: after the replays asked for before, before those to come."""
        if self.done is not None:
            torch.cuda.current_stream(self.device).wait_event(self.done)
        self.eager.refresh()
        self.weights.refresh()
        if self.done is not None:
            self.done.record(torch.cuda.current_stream(self.device))


class Packed:
    """Folded weights, cast once and packed for the kernels; plans share them."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.module, self.dtype = module, dtype
        self._kept: dict[tuple, tuple] = {}

    def get(self, step, pack: Callable[[Tensor], Tensor], form: str) -> tuple[list[Tensor], Tensor]:
        """([weight, projection's weight], bias float32) of a step; form: names what pack does."""
        key = (step.conv, step.segment and step.segment[1], form)
        if key not in self._kept:
            self._kept[key] = (step, pack, *self._pack(step, pack))
        return self._kept[key][2:]

    def _pack(self, step, pack) -> tuple[list[Tensor], Tensor]:
        weights, bias = fold(step, self.module)
        return [pack(w.to(self.dtype)) for w in weights], bias.float()

    def refresh(self) -> None:
        for step, pack, weights, bias in self._kept.values():
            new, new_bias = self._pack(step, pack)
            for old, fresh_one in zip([*weights, bias], [*new, new_bias], strict=True):
                old.copy_(fresh_one)


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
        inputs: tuple,
        device: torch.device,
    ):
        self.network, self.pieces, self.results, self.eager, self.device = network, pieces, results, eager, device
        self.weights, self.dtype = weights, eager.dtype
        self.outputs = outputs_of(network)
        self.shapes = {n.name: s for n in network.graph.nodes if (s := network.graph.shape(n)) is not None}
        self.quartered = {p.y for p in pieces if p.quarter}
        self.values, self.arena = self._places()
        self.workspace: Tensor | None = None
        self.launches = [self._launch(p) for p in pieces]
        sizes = [size for _, size in self.launches]
        if max(sizes, default=0):
            self.workspace = torch.empty(max(sizes), dtype=torch.uint8, device=device)

    def chosen(self, piece: Piece) -> Candidate:
        return self.results[piece.key].chosen if piece.args is not None else CUDNN

    def written(self, piece: Piece) -> list[str]:
        """Values that the piece writes into memory of ours."""
        if piece.args is None or self.chosen(piece).backend != "triton":
            return []
        return [name for name in (piece.y, piece.z) if name is not None]

    def shape(self, name: str) -> tuple[int, int, int, int]:
        n, c, h, w = self.shapes[name]
        return (n, c, (h + 1) // 2, (w + 1) // 2) if name in self.quartered else (n, c, h, w)

    def _places(self) -> tuple[dict[str, Tensor], Tensor]:
        source = self.network.source
        last: dict[str, int] = {}
        for i, piece in enumerate(self.pieces):
            for step in piece.steps:
                for name in step.reads:
                    last[source(name)] = i
        for i, piece in reversed(list(enumerate(self.pieces))):  # what reads a view reads what it is a view of
            step = piece.steps[-1]
            if step.op == "traced" and may_alias(self.network.graph, step.node):
                end = len(self.pieces) if step.output in self.outputs else last.get(step.output, i)
                for name in step.reads:
                    last[source(name)] = max(last[source(name)], end)
        names, lives = [], []
        for i, piece in enumerate(self.pieces):
            for name in self.written(piece):
                if name not in self.outputs:
                    size = math.prod(self.shape(name)) * self.dtype.itemsize
                    names.append(name)
                    lives.append(Life(-(-size // ALIGN) * ALIGN, i, max(i, last.get(name, i))))
        offsets, total = assign(lives, ALIGN)
        arena = torch.empty(total, dtype=torch.uint8, device=self.device)
        values = {}
        for name, offset in zip(names, offsets, strict=True):
            n, c, h, w = self.shape(name)
            flat = arena[offset : offset + n * c * h * w * self.dtype.itemsize].view(self.dtype)
            values[name] = flat.view(n, h, w, c).permute(0, 3, 1, 2)
        for piece in self.pieces:
            for name in self.written(piece):
                if name in self.outputs:
                    values[name] = torch.empty(
                        self.shape(name), dtype=self.dtype, device=self.device, memory_format=torch.channels_last
                    )
        return values, arena

    def run(self, inputs: tuple):
        """What the model returns, partly in memory that the next run writes again."""
        values = named(self.network, inputs) | self.network.constants | self.values
        for launch, _ in self.launches:
            launch(values)
        return output_of(self.network, values, forbidden=self.arena)

    def groups(self) -> list[Group]:
        """What the plan says of each piece."""
        found = []
        for piece in self.pieces:
            result = self.results[piece.key] if piece.args is not None else None
            seconds = result.seconds[0] if result is not None and result.seconds else None
            alone = piece.steps[0]
            backend = "traced" if alone.op == "traced" else self.chosen(piece).backend if result else "pytorch"
            why = alone.why
            if piece.args is None and alone.conv is not None and alone.conv.groups > 1:
                why = f"{alone.conv.groups} groups: no kernel here has them"
            config = self.chosen(piece).label if result is not None and backend == "triton" else ""
            found.append(Group(piece.steps, piece.rung, backend, config, seconds, why))
        return found

    # Launches: (function of the values by name, bytes of workspace).

    def _launch(self, piece: Piece) -> tuple[Callable[[dict], None], int]:
        if piece.args is None:
            return self._alone(piece), 0
        candidate = self.chosen(piece)
        if candidate.backend != "triton":
            return self._pytorch(piece), 0
        if isinstance(piece.args, StemArgs):
            return self._stem(piece, candidate.config), 0
        if isinstance(piece.args, ChainArgs):
            return self._chain(piece, candidate.config)
        return self._conv(piece, candidate.config)

    def _value(self, values: dict, name: str) -> Tensor:
        """As a kernel reads it: dense channels_last, in the network's dtype."""
        value = values[self.network.source(name)]
        return value.to(self.dtype, memory_format=torch.channels_last if value.dim() == 4 else torch.preserve_format)

    def _alone(self, piece: Piece) -> Callable[[dict], None]:
        (step,) = piece.steps

        def run(values: dict) -> None:
            seen = values
            if step.op != "traced":
                seen = {self.network.source(name): self._value(values, name) for name in step.reads}
            values[step.output] = self.eager.run(step, self.network, seen)

        return run

    def _pytorch(self, piece: Piece) -> Callable[[dict], None]:
        if isinstance(piece.args, StemArgs):
            return self._alone(piece)
        steps = piece.steps
        quarter = 2 if piece.quarter else 1

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
                values[step.output] = pytorch_conv(x, weights[0], bias, residual, segment, **options)
            if quarter == 2:
                values[piece.y] = values[piece.y][:, :, ::2, ::2]

        return run

    def _stem(self, piece: Piece, config: dict) -> Callable[[dict], None]:
        (step,) = piece.steps
        layout = "channels_last" if piece.args.channels_last else "nchw"
        tf32 = piece.args.tf32
        pack = lambda w: triton_stem.pack(w, layout, tf32=tf32)  # noqa: E731
        (weight,), bias = self.weights.get(step, pack, f"stem {layout} {tf32}")
        x, y = self.network.source(step.x), self.values[step.output]
        return lambda values: triton_stem.launch(config, values[x], weight, bias, y)

    def _conv(self, piece: Piece, config: dict) -> tuple[Callable[[dict], None], int]:
        (step,) = piece.steps
        tf32 = piece.args.tf32
        pack = lambda w: triton_conv.pack(w, tf32=tf32)  # noqa: E731
        weights, bias = self.weights.get(step, pack, f"conv {tf32}")
        options = dict(
            stride=piece.args.stride, padding=piece.args.padding, dilation=piece.args.dilation, relu=step.relu
        )
        stride2 = piece.args.segment and piece.args.segment[3]
        size = 4 * triton_conv.workspace(config, piece.args.shape)

        def run(values: dict) -> None:
            segment = (self._value(values, step.segment[0]), weights[1], stride2) if step.segment else None
            residual = None if step.residual is None else self._value(values, step.residual)
            space = self.workspace[:size].view(torch.float32) if size else None
            x, y = self._value(values, step.x), self.values[step.output]
            triton_conv.launch(config, x, weights[0], bias, residual, segment, y, space, **options)

        return run, size

    def _chain(self, piece: Piece, config: dict) -> tuple[Callable[[dict], None], int]:
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
        size = triton_chain.workspace(config, meta, weight1, bias1, weight2, bias2, **sized)

        def run(values: dict) -> None:
            x = self._value(values, first.x)
            residual = None if second.residual is None else self._value(values, second.residual)
            segment = None
            if second.segment is not None:
                segment = (self._value(values, second.segment[0]), projection[0], piece.args.segment[3])
            space = self.workspace[:size] if size else None
            tensors = dict(residual=residual, segment=segment, y=y, z=z, workspace=space)
            triton_chain.launch(config, x, weight1, bias1, weight2, bias2, **options, **tensors)

        return run, size


def fresh(result):
    """Copies of the tensors in a result, so that the next run leaves them alone."""
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, result)


class Captured:
    """A function of tensors as a CUDA graph. Calls are ordered on the device by the event `done`, whatever stream they
    come from: the static inputs, the arena and the static result are one call's at a time."""

    def __init__(self, run: Callable, inputs: tuple, device: torch.device, pool, done):
        self.run, self.device, self.done = run, device, done
        self.static = tuple(torch.empty_like(x).copy_(x) for x in inputs)
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        side.wait_event(done)
        with _cudnn_chooses():
            with torch.cuda.stream(side):
                for _ in range(2):  # compiles, and lets cuDNN measure
                    run(self.static)
            side.synchronize()
            with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self.result = run(self.static)
        torch.cuda.current_stream(device).wait_stream(side)
        self.done.record(torch.cuda.current_stream(device))

    def __call__(self, inputs: tuple):
        stream = torch.cuda.current_stream(self.device)
        capturing = torch.cuda.is_current_stream_capturing()
        if not capturing:  # an event of another capture cannot be waited for
            stream.wait_event(self.done)
        for static, x in zip(self.static, inputs, strict=True):
            static.copy_(x, non_blocking=True)
            if not capturing:
                x.record_stream(stream)
        if capturing:  # a graph within a graph: its kernels, one by one
            return fresh(self.run(self.static))
        self.graph.replay()
        result = fresh(self.result)
        self.done.record(stream)
        return result


def _cudnn_chooses():
    """cuDNN measures its algorithms once a shape; all else stays as the user has it."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=cudnn.enabled, benchmark=True, deterministic=cudnn.deterministic, allow_tf32=cudnn.allow_tf32
    )


def race(runs: dict[str, Callable], inputs: tuple, device: torch.device, rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of a call of each, the runs taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for _ in range(rounds):
        for name, run in runs.items():
            run(inputs)  # the other's data have left the cache
            events[0].record()
            for _ in range(5):
                run(inputs)
            events[1].record()
            events[1].synchronize()
            times[name].append(events[0].elapsed_time(events[1]) / 5e3)
    return {name: statistics.median(t) for name, t in times.items()}
