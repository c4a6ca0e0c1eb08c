"""Steps as a program for the CPU's kernels (csrc/cpu/engine/program.cpp reads what is written here).

Activations are NHWC in one arena. Large batches go through the early layers a few images at a time: that halves the
arena, and costs no time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import cpu_weights
from .arena import Life, assign
from .steps import Network, Step, fold, weights_of

VERSION = 2
CONV, WINOGRAD, STEM, MAX_POOL, AVG_POOL, GROUPED = range(6)
SLICE = 256  # of the reduction: csrc/cpu/engine/gemm.h's kKc
ALIGN = 16  # floats: a cache line
CACHE = 1 << 18  # floats of activations that may be in use at once before a batch is split (1 MiB)
POOL = (3, 2, 1)  # the max-pool that the stem kernel has
END = "the end"  # stands for the reader of what the model returns


@dataclass(frozen=True)
class Isa:
    """An instruction set the kernels were compiled for."""

    number: int
    width: int  # floats in a vector
    columns: int  # of a packed panel

    @property
    def name(self) -> str:
        return ("baseline", "AVX2", "AVX-512")[self.number]


@functools.cache
def isa(number: int = -1) -> Isa | None:
    """The best instruction set of this processor, or the one asked for; None where the compiled kernels are absent."""
    from ..backends import cuda  # it loads the library

    if cuda.load() is not None:
        return None
    found, has, width, columns = torch.ops.fused_resnet_cpu.program_isa(number).tolist()
    return Isa(found, width, columns) if has else None


@dataclass(frozen=True)
class Choice:
    """How a step is computed. kernel: 'gemm' (rows x columns of a task), 'winograd' (m x m, tiles at a time) or, where
    there are groups, 'grouped' (rows of the map x units of a task)."""

    kernel: str
    rows: int = 96
    columns: int = 256
    m: int = 0
    tiles: int = 0
    shared: bool = False

    def __str__(self) -> str:
        if self.kernel != "winograd":
            return f"{self.kernel} {self.rows}x{self.columns}"
        together = "together" if self.shared else "each"
        return f"F({self.m}x{self.m},3x3) {self.tiles} tiles {together}"


def unit(step: Step, target: Isa) -> tuple[int, int]:
    """Channels of x and of y that go together in a grouped convolution: a group's, or, of groups that are parts of a
    vector, a vector's (csrc/cpu/engine/grouped.h: spreads)."""
    conv = step.conv
    c, k = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    if c == k and c < target.width and target.width % c == 0:
        return target.width, target.width
    return c, k


def unsupported(step: Step, target: Isa) -> str | None:
    """Why the CPU's kernels do not compute this step; None if they do."""
    if step.op == "norm":
        return "batch norm and ReLU in one pass"
    conv = step.conv
    if conv is not None and conv.groups > 1:
        # Most of a vector would be padding; and one tap of one channel is hardly worth what gathering it costs.
        if conv.in_channels == conv.groups or 2 * unit(step, target)[1] < target.width:
            return f"{conv.groups} groups of few channels: through oneDNN"
    return None


def fits_stem(step: Step, target: Isa) -> bool:
    """Whether convolution and max-pool may be one kernel."""
    conv, pool = step.conv, step.pool
    return (
        (pool.kernel, pool.stride, pool.padding) == POOL
        and conv.groups == 1
        and conv.out_channels % target.width == 0
        and conv.in_channels * conv.kernel[0] * conv.kernel[1] <= SLICE
        and conv.stride[0] == conv.stride[1]
        and conv.padding[0] == conv.padding[1]
        and conv.dilation == (1, 1)
    )


def fits_winograd(step: Step, target: Isa) -> bool:
    conv = step.conv
    return (
        step.op == "conv"
        and conv.kernel == (3, 3)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and step.segment is None
        and conv.in_channels % target.width == 0
        and conv.out_channels % target.width == 0
    )


class Weights:
    """Folded weights of a model, packed as they are asked for, and kept: steps of all shapes share them."""

    def __init__(self, module: nn.Module, target: Isa):
        self.module, self.target = module, target
        self._packed: dict[tuple, tuple[Step, Tensor]] = {}
        # Of the step asked for last, whose bias comes next: float64 of a whole model would be twice its size.
        self._folded: tuple[tuple, list[Tensor], Tensor] | None = None

    def get(self, step: Step, layout: str) -> Tensor:
        """layout: 'bias', 'nhwc', 'nchw' (the order inside), 'winograd2', 'winograd4' or 'grouped', 'grouped bias'."""
        key = (*step.convolutions, layout)
        if key not in self._packed:
            self._packed[key] = step, self._pack(step, layout)
        return self._packed[key][1]

    def _pack(self, step: Step, layout: str) -> Tensor:
        if self._folded is None or self._folded[0] != step.convolutions:
            self._folded = None  # before the next one is made
            self._folded = step.convolutions, *fold(step, self.module)
        _, parts, bias = self._folded
        columns = self.target.columns
        if layout.startswith("grouped"):
            k, width = unit(step, self.target)[1], self.target.width
            if layout == "grouped":
                return cpu_weights.grouped(parts[0], k, width)
            return cpu_weights.grouped(bias[:, None, None, None], k, width).flatten()
        if layout == "bias":
            return cpu_weights.padded(bias, columns)
        if layout.startswith("winograd"):
            return cpu_weights.winograd(parts[0], int(layout[-1]), columns)
        matrices = [cpu_weights.matrix(w, layout == "nhwc") for w in parts]
        return cpu_weights.panels(matrices[0] if len(parts) == 1 else torch.cat(matrices, dim=1), columns)

    def keep(self, used: set[tuple]) -> None:
        """Forget what was only needed for packing, and what no program uses."""
        self._folded = None
        self._packed = {key: kept for key, kept in self._packed.items() if key in used}

    def refresh(self) -> None:
        """Fold and pack again, into the same memory."""
        self._folded = None
        for key, (step, packed) in self._packed.items():
            packed.copy_(self._pack(step, key[-1]))
        self._folded = None


@dataclass
class Segment:
    """Planned steps without a traced one between them: one call of the compiled program."""

    steps: list[Step]
    program: Tensor | None = None
    buffers: list[Tensor | str] = field(default_factory=list)  # a tensor, or the name of a value given at run time
    owners: list[str] = field(default_factory=list)  # the output of each step of the program


class Writer:
    """Writes the program of one segment."""

    def __init__(self, program: Program, segment: Segment):
        self.program, self.segment = program, segment
        self.index: dict[object, int] = {}
        self.words: list[int] = []

    def buffer(self, key, tensor: Tensor | str) -> int:
        if key not in self.index:
            self.index[key] = len(self.segment.buffers)
            self.segment.buffers.append(tensor)
        return self.index[key]

    def value(self, name: str, skip_images: int = 0) -> list[int]:
        """The operand of a value, from its image `skip_images` on."""
        name = self.program.network.source(name)
        place = self.program.place.get(name)
        each = self.program.numel(name) // self.program.batch_of(name)
        if place is None:
            return [self.buffer(name, name), skip_images * each]
        inside = 0 if name in self.program.split_values else skip_images
        return [0, place + inside * each]

    def weight(self, step: Step, layout: str) -> list[int]:
        key = (*step.convolutions, layout)
        self.program.used.add(key)
        return [self.buffer(key, self.program.weights.get(step, layout)), 0]


class Program:
    """A network at one shape of its inputs, ready to run."""

    def __init__(
        self,
        network: Network,
        weights: Weights,
        target: Isa,
        workers: int,
        input_strides: dict[str, tuple[int, ...]],
        choices: dict[str, Choice],
        cache: int = CACHE,
    ):
        self.network, self.weights, self.target, self.workers = network, weights, target, workers
        self.input_strides = input_strides
        self.shapes = {n.name: s for n in network.graph.nodes if (s := network.graph.shape(n)) is not None}
        self.used: set[tuple] = set()  # keys of the weights
        self.choices = choices
        self.place: dict[str, int] = {}
        self.split_values: set[str] = set()
        self.cache = cache
        self.memory: tuple[int, int] | None = None  # where arena and scratch lay when the program was written
        self.views: dict[str, Tensor] = {}  # of values in the arena that PyTorch's operators read
        self.segments = self._cut()
        self.fresh = [
            s.output for p in self.segments if isinstance(p, Segment) for s in p.steps if s.output in network.outputs
        ]
        self._allocate()

    # What is known of a value.

    def numel(self, name: str) -> int:
        shape = self.shapes[name]
        total = 1
        for n in shape:
            total *= n
        return total

    def batch_of(self, name: str) -> int:
        return self.shapes[name][0]

    def nhwc(self, name: str) -> tuple[int, int, int, int]:
        """(N, H, W, C) of a value; a matrix is a map of one."""
        shape = self.shapes[self.network.source(name)]
        if len(shape) == 2:
            return shape[0], 1, 1, shape[1]
        n, c, h, w = shape
        return n, h, w, c

    # From steps to segments, groups and places.

    def _cut(self) -> list[Segment | Step]:
        pieces: list[Segment | Step] = []
        for step in self.network.steps:
            if step.op == "traced" or unsupported(step, self.target):
                pieces.append(step)
            elif pieces and isinstance(pieces[-1], Segment):
                pieces[-1].steps.append(step)
            else:
                pieces.append(Segment([step]))
        return pieces

    def groups(self, segment: Segment) -> list[tuple[list[Step], int]]:
        """The segment's steps in runs that go through the batch together, each with its images at a time."""
        runs: list[tuple[list[Step], int]] = []
        for step in segment.steps:
            size = self._images(step)
            if runs and runs[-1][1] == size:
                runs[-1][0].append(step)
            else:
                runs.append(([step], size))
        return runs

    def _images(self, step: Step) -> int:
        """Images at a time: as many as keep input and output in the cache, and no fewer in later layers."""
        batch = self.batch_of(step.output)
        floats = max(self.numel(step.output), self.numel(self.network.source(step.x))) // batch
        # Weights are read anew for each part of the batch.
        if step.op in ("avg_pool", "linear") or weights_of(step) > floats:
            return batch
        each = min(batch, max(1, self.cache // floats))
        while batch % each:
            each -= 1
        return each

    def _allocate(self) -> None:
        """Moments are counted in steps; a value that crosses runs keeps its place for the whole runs it touches."""
        network = self.network
        moment: dict[str, int] = {}  # of the step that makes a value
        run_of: dict[str, tuple[int, int]] = {}  # first and last moment of the run a step is in
        size: dict[str, int] = {}  # images at a time
        clock = 0
        for piece in self.segments:
            for steps, images in [([piece], 0)] if isinstance(piece, Step) else self.groups(piece):
                bounds = (clock, clock + len(steps) - 1)
                for step in steps:
                    moment[step.output], run_of[step.output], size[step.output] = clock, bounds, images
                    clock += 1
        readers: dict[str, list[str]] = {}
        for step in network.steps:
            for name in step.reads:
                readers.setdefault(network.source(name), []).append(step.output)
        made = {s.output: s for p in self.segments if isinstance(p, Segment) for s in p.steps}
        moment[END], run_of[END], size[END] = clock, (clock, clock), 0
        self._extend_through_views(readers)
        names, lives = [], []
        for name in made:
            if name in network.outputs:
                continue
            users = readers.get(name, [])
            bounds = run_of[name]
            crosses = any(run_of[u] != bounds for u in users)
            whole_batch = size[name] == self.batch_of(name)
            first = moment[name] if whole_batch or not crosses else bounds[0]
            last = max([moment[name], *(moment[u] if run_of[u] == bounds or self._whole(u, size) else run_of[u][1]
                                        for u in users)])  # fmt: skip
            floats = self.numel(name)
            if not crosses and not whole_batch:
                floats = floats // self.batch_of(name) * size[name]
                self.split_values.add(name)
            names.append(name)
            lives.append(Life(-(-floats // ALIGN) * ALIGN, first, last))
        offsets, self.floats = assign(lives, ALIGN)
        self.place = dict(zip(names, offsets, strict=True))
        self.size = size

    def _whole(self, user: str, size: dict[str, int]) -> bool:
        """Whether a step reads all images at once, so that its input is free as soon as it is done."""
        return size[user] in (0, self.batch_of(user)) if user in self.shapes else True

    def _extend_through_views(self, readers: dict[str, list[str]]) -> None:
        """What reads the result of a traced step may read the memory of that step's inputs."""
        from .graph import may_alias

        for name in self.network.outputs:
            readers.setdefault(name, []).append(END)
        for step in reversed(self.network.steps):
            if step.op == "traced" and may_alias(self.network.graph, step.node):
                for name in step.reads:
                    readers.setdefault(self.network.source(name), []).extend(readers.get(step.output, []))

    # Choosing and writing.

    def choice(self, step: Step) -> Choice:
        return self.choices.get(step.output) or default_choice(self, step)

    def write(self, arena: Tensor, scratch: Tensor) -> None:
        """Write the programs for this memory, in which the weights are packed that are not yet."""
        self.used.clear()
        for segment in self.segments:
            if isinstance(segment, Step):
                continue
            segment.buffers, segment.owners = [arena, scratch], []
            writer = Writer(self, segment)
            writer.index = {"arena": 0, "scratch": 1}
            for steps, images in self.groups(segment):
                batch = self.batch_of(steps[0].output)
                for first in range(0, batch, images):
                    for step in steps:
                        words = self._words(writer, step, first, images)
                        segment.owners.append(step.output)
                        writer.words += words
            head = [VERSION, self.target.number, self.workers, scratch.numel(), 1, 0]
            segment.program = torch.tensor(head + writer.words, dtype=torch.int64, device="cpu")
        alone = [step for step in self.segments if isinstance(step, Step)]
        read = {self.network.source(name) for step in alone for name in step.reads}
        self.views = {name: self._view(arena, name) for name in read if name in self.place}

    def forget(self) -> None:
        """Let go of the memory it was written for."""
        self.memory, self.views = None, {}
        for segment in self.segments:
            if isinstance(segment, Segment):
                segment.program, segment.buffers = None, []

    def _view(self, arena: Tensor, name: str) -> Tensor:
        shape = self.shapes[name]
        flat = arena[self.place[name] : self.place[name] + self.numel(name)]
        if len(shape) == 2:
            return flat.view(shape)
        n, c, h, w = shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)

    def scratch_floats(self) -> int:
        """Floats of scratch that the step which needs most of it needs."""
        need = 0
        for segment in self.segments:
            for step in segment.steps if isinstance(segment, Segment) else ():
                need = max(need, self._scratch(step))
        return need

    def _scratch(self, step: Step) -> int:
        """Each worker its own part; the transformed tiles that all share lie there as well."""
        each = 0
        if step.op == "stem":
            conv = step.conv
            q = conv.size(*self.nhwc(step.x)[1:3])[1]
            width = (q - 1) * conv.stride[1] + conv.kernel[1]
            each = width * conv.kernel[0] * conv.in_channels + 3 * q * conv.out_channels
        elif step.conv is not None:
            choice = self.choice(step)
            if choice.shared:
                return winograd_room(step, choice)
            if choice.kernel == "gemm":
                each = choice.rows * SLICE
            elif choice.kernel == "grouped":
                each = grouped_room(self, step, choice)
            else:
                each = winograd_room(step, choice)
        return (each + ALIGN) * self.workers

    def _words(self, writer: Writer, step: Step, first: int, images: int) -> list[int]:
        _, h, w, c = self.nhwc(step.x)
        _, p, q, k = self.nhwc(step.output)
        x, y = writer.value(step.x, first), writer.value(step.output, first)
        if step.op == "avg_pool":
            return [AVG_POOL, *x, *y, images, h * w, c]
        if step.op == "max_pool":
            return [MAX_POOL, *x, *y, images, h, w, c, p, q, step.pool.kernel, step.pool.stride, step.pool.padding]
        residual = [-1, 0] if step.residual is None else writer.value(step.residual, first)
        choice = self.choice(step)
        if choice.kernel == "grouped":
            conv, weights = step.conv, (*writer.weight(step, "grouped"), *writer.weight(step, "grouped bias"))
            walk = [*conv.kernel, *conv.stride, *conv.padding, *conv.dilation]
            sizes = [images, h, w, c, p, q, k, conv.groups, *walk, int(step.relu), choice.rows, choice.columns]
            return [GROUPED, *x, *weights, *residual, *y, *sizes]
        bias = writer.weight(step, "bias")
        if step.op == "stem":
            strides, channels_last = self._strides(step.x)
            weight = writer.weight(step, "nhwc" if channels_last else "nchw")
            r, s = step.conv.kernel
            sizes = [images, c, h, w, r, s, step.conv.stride[0], step.conv.padding[0], *step.conv.size(h, w), k]
            band = max(1, min(p, -(-p * images // (2 * self.workers))))  # each computes a row that its neighbour has
            return [STEM, *x, *weight, *bias, *y, *strides, *sizes, p, q, band, int(channels_last)]
        if choice.kernel == "winograd":
            weight = writer.weight(step, f"winograd{choice.m}")
            sizes = [images, h, w, c, p, q, k, *step.conv.padding, int(step.relu)]
            buffer = [1, 0] if choice.shared else [-1, 0]
            how = [choice.m, choice.tiles, choice.columns, int(choice.shared), *buffer]
            return [WINOGRAD, *x, *weight, *bias, *residual, *y, *sizes, *how]
        weight = writer.weight(step, "nhwc")
        parts = [(step.x, step.conv), *([step.segment] if step.segment else [])]
        words = [CONV, *weight, *bias, *residual, *y, images, p, q, k, int(step.relu), choice.rows, choice.columns]
        words.append(len(parts))
        for name, conv in parts:
            _, h, w, c = self.nhwc(name)
            words += [*writer.value(name, first), h, w, c, *conv.kernel, *conv.stride, *conv.padding, *conv.dilation]
        return words

    def _strides(self, name: str) -> tuple[tuple[int, ...], bool]:
        """(strides of N, C, H, W in floats, whether channels are next to each other)."""
        strides = self.input_strides.get(self.network.source(name))
        if strides is None:
            _, h, w, c = self.nhwc(name)
            strides = (h * w * c, 1, w * c, c)
        return strides, strides[1] == 1


def winograd_room(step: Step, choice: Choice) -> int:
    """Floats of the transformed tiles and their products (steps.h: Winograd::room)."""
    points = (choice.m + 2) ** 2
    return points * (choice.tiles * (step.conv.in_channels + step.conv.out_channels) + 2 * ALIGN)


def grouped_room(program: Program, step: Step, choice: Choice) -> int:
    """Floats of the part of x that a task reads, padded (grouped.h: grouped_scratch)."""
    _, p, q, _ = program.nhwc(step.output)
    (height, width), conv = step.conv.reads(min(choice.rows, p), q), step.conv
    each, vector = unit(step, program.target)[0], program.target.width
    return height * width * min(choice.columns, -(-conv.in_channels // each)) * -(-each // vector) * vector


def tiles_of(program: Program, step: Step, m: int, images: int) -> int:
    _, p, q, _ = program.nhwc(step.output)
    return images * -(-p // m) * -(-q // m)


def default_choice(program: Program, step: Step) -> Choice:
    """The choice without measurement: Winograd where its weights are few beside its work."""
    if step.conv.groups > 1:
        return grouped_choice(program, step)
    images = program.size[step.output]
    if fits_winograd(step, program.target):
        tiles = tiles_of(program, step, 4, images)
        # Its weights are four times as large: worth reading only if enough tiles use them.
        if tiles >= 32:
            return winograd_choice(program, step, 4, images)
    return default_gemm(program, step)


def default_gemm(program: Program, step: Step) -> Choice:
    _, p, q, k = program.nhwc(step.output)
    return gemm_choice(program, k, program.size[step.output] * p * q)


def gemm_choice(program: Program, channels: int, rows: int, block: int = 96) -> Choice:
    """Equal blocks of about `block` rows; as many columns as leave each worker several tasks."""
    unit = program.target.columns
    row_blocks = max(1, round(rows / block))
    all_columns = -(-channels // unit) * unit
    columns = min(all_columns, 512 // unit * unit)
    while columns > max(unit, 32) and row_blocks * -(-channels // columns) < 4 * program.workers:
        columns = max(unit, columns // 2 // unit * unit)
    return Choice("gemm", -(-rows // row_blocks), columns)


def grouped_choice(program: Program, step: Step, floats: int = 1 << 16, channels: int = 128) -> Choice:
    """At least `channels` of x's at a time, and as many rows as make no more than `floats` of it, but several tasks;
    fewer channels where that would be few rows, which read others' rows again."""
    _, p, _, _ = program.nhwc(step.output)
    each, images = unit(step, program.target)[0], program.size[step.output]
    units = max(1, channels // each)
    while True:

        def crowded(rows: int, units: int = units) -> bool:
            few = images * -(-p // rows) * -(-step.conv.in_channels // (units * each)) < 4 * program.workers
            return few or grouped_room(program, step, Choice("grouped", rows, units)) > floats

        fit, above = 1, p + 1  # the most rows that are not too many
        while above - fit > 1:
            middle = (fit + above) // 2
            fit, above = (fit, middle) if crowded(middle) else (middle, above)
        if fit >= min(p, 4) or units == 1:
            return Choice("grouped", -(-p // -(-p // fit)), units)
        units = (units + 1) // 2


def winograd_choice(program: Program, step: Step, m: int, images: int, shared: bool | None = None) -> Choice:
    """shared: all workers on the same tiles, which reads each weight once; None: where the weights are many."""
    tiles = tiles_of(program, step, m, images)
    columns = program.target.columns
    width = step.conv.in_channels + step.conv.out_channels
    together = min(tiles, max(24, (1 << 21) // ((m + 2) ** 2 * width)))  # 8 MiB of transformed tiles
    each = min(-(-tiles // program.workers), 48)
    if shared is None:
        shared = step.conv.in_channels * step.conv.out_channels > 128 * 128 or -(-tiles // each) < 2 * program.workers
    nc = max(columns, 64 // columns * columns)
    return Choice("winograd", columns=nc, m=m, tiles=together if shared else each, shared=shared)
