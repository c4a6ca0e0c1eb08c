"""The ways in which consecutive steps can be one kernel on a GPU: what each covers, reads, writes, and its problem."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..backends.verify import product_tf32_allowed
from .cases import ConvArgs, GroupedArgs, LinearArgs, PoolArgs, StemArgs
from .chain_cases import ChainArgs
from .path import Move
from .steps import Network, Step

STEM = ((7, 7), (2, 2), (3, 3), (1, 1), 1)  # the convolution that the stem's kernel has
POOL = (3, 2, 1)


@dataclass(frozen=True)
class Piece:
    """Steps that one kernel computes. args: of its problem, None where PyTorch's operators run them. y, z: names of the
    values it writes; quarter: only even rows and columns of y; quartered: what it projects was stored so.
    """

    steps: tuple[Step, ...]
    rung: int
    args: ConvArgs | StemArgs | ChainArgs | PoolArgs | None = None
    y: str = ""
    z: str | None = None
    quarter: bool = False
    quartered: bool = False

    @cached_property
    def key(self) -> str | None:
        return self.args.problem().key if self.args is not None else None


class Pieces:
    """All pieces of a network at its shapes."""

    def __init__(self, network: Network, dtype: torch.dtype, device: torch.device, tf32: bool, inputs):
        self.network, self.inputs = network, inputs  # inputs: tensors by name
        # The kind of device, not which one: what was measured on one serves its twins.
        self.common = dict(device=device.type, dtype=_name(dtype))
        self.tf32 = tf32 and dtype is torch.float32
        self.shapes = {n.name: s for n in network.graph.nodes if (s := network.graph.shape(n)) is not None}
        self.readers: dict[str, list[Step]] = {}
        for step in network.steps:
            for name in step.reads:
                self.readers.setdefault(network.source(name), []).append(step)
        self.after = {a.output: b for a, b in zip(network.steps, network.steps[1:], strict=False)}
        self.pieces = [self._begin(i) for i in range(len(network.steps))]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[self.network.source(name)]

    def at(self, i: int) -> list[Piece]:
        """The pieces that begin with step i; the first computes it alone."""
        return self.pieces[i]

    def all(self) -> Iterator[Piece]:
        for pieces in self.pieces:
            yield from pieces

    def keep(self, solved: Container[str]) -> None:
        """Only the pieces whose problem is solved; where a step has none alone, PyTorch's operators compute it."""
        for i, (alone, *_) in enumerate(self.pieces):
            kept = [p for p in self.pieces[i] if p.args is None or p.key in solved]
            if alone not in kept:
                kept.insert(0, replace(alone, args=None))
            self.pieces[i] = kept

    def _begin(self, i: int) -> list[Piece]:
        steps = self.network.steps
        step = steps[i]
        found = self._single(step)
        if i + 1 < len(steps) and self._chains(step, steps[i + 1]):
            following = steps[i + 2] if i + 2 < len(steps) else None
            found += self._chained(step, steps[i + 1], following)
        return found

    def moves(self, cost):
        """For path.cheapest: cost(piece) in seconds. The state is which values are stored as quarters."""

        def moves(i: int, state: frozenset):
            for piece in self.pieces[i]:
                segments = {self.network.source(s.segment[0]) for s in piece.steps if s.segment}
                if piece.quartered != bool(segments & state):
                    continue
                after = state | {piece.y} if piece.quarter else state
                yield Move(piece, i + len(piece.steps), cost(piece), frozenset(after))

        return moves

    # One step.

    def _single(self, step: Step) -> list[Piece]:
        if step.op == "stem" and (args := self._stem(step)) is not None:
            return [Piece((step,), 2, args, step.output)]
        if step.op == "conv" and step.conv.groups > 1 and step.segment is None:
            return [Piece((step,), 1, self._conv(step), step.output)]
        if step.op == "conv" and step.conv.groups == 1:
            rung = 3 if step.segment else 1
            found = [Piece((step,), rung, self._conv(step), step.output)]
            if self._may_be_quartered(step):
                found.append(Piece((step,), rung, self._conv(step, True), step.output, quartered=True))
            return found
        if step.op == "avg_pool" and len(shape := self.shape(step.x)) == 4:
            return [Piece((step,), 0, PoolArgs(*shape, **self.common), step.output)]
        if step.op == "linear" and (args := self._linear(step)) is not None:
            return [Piece((step,), 0, args, step.output)]
        return [Piece((step,), 0, None, step.output)]

    def _stem(self, step: Step) -> StemArgs | None:
        conv, pool = step.conv, step.pool
        x = self.inputs.get(self.network.source(step.x))
        if (conv.kernel, conv.stride, conv.padding, conv.dilation, conv.groups) != STEM or conv.in_channels != 3:
            return None
        if (pool.kernel, pool.stride, pool.padding) != POOL or x is None or not _dense(x):
            return None
        n, _, h, w = self.shape(step.x)
        return StemArgs(
            n, h, w, conv.out_channels, not x.is_contiguous(), _name(x.dtype), **self.common, tf32=self.tf32
        )

    def _conv(self, step: Step, quartered: bool = False) -> ConvArgs:
        conv = step.conv
        n, c, h, w = self.shape(step.x)
        kind, more = (GroupedArgs, {"groups": conv.groups}) if conv.groups > 1 else (ConvArgs, {})
        return kind(
            n, c, h, w, conv.out_channels, conv.kernel, conv.stride, conv.padding, conv.dilation, step.relu,
            step.residual is not None, self._segment(step, quartered), **self.common, tf32=self.tf32, **more,
        )  # fmt: skip

    def _linear(self, step: Step) -> LinearArgs | None:
        n, *size = self.shape(step.x)
        if size not in ([step.conv.in_channels], [step.conv.in_channels, 1, 1]):
            return None
        one = (1, 1)
        return LinearArgs(
            n, step.conv.in_channels, 1, 1, step.conv.out_channels, one, one, (0, 0), one, False, False, None,
            **self.common, tf32=self.tf32 and product_tf32_allowed(),
        )  # fmt: skip

    def _segment(self, step: Step, quartered: bool) -> tuple[int, int, int, int] | None:
        if step.segment is None:
            return None
        name, conv = step.segment
        _, c, h, w = self.shape(name)
        return (c, (h + 1) // 2, (w + 1) // 2, 1) if quartered else (c, h, w, conv.stride[0])

    def _may_be_quartered(self, step: Step) -> bool:
        """Whether what it projects may be stored as a quarter, by the piece that computes it and the next reduce."""
        if step.segment is None:
            return False
        value = self.network.source(step.segment[0])
        following = self.after.get(value)
        return following is not None and self._reduces(following, value) and self._only_quarters(value, following)

    def _only_quarters(self, value: str, besides: Step) -> bool:
        """Whether all that read it, besides one, project its even rows and columns."""
        readers = [r for r in self.readers.get(value, []) if r is not besides]
        return value not in self.network.outputs and all(
            r.segment is not None
            and self.network.source(r.segment[0]) == value
            and r.segment[1].stride == (2, 2)
            and r.op == "conv"
            and value not in (self.network.source(r.x), self.network.source(r.residual or ""))
            for r in readers
        )

    # Several.

    def _chains(self, first: Step, second: Step) -> bool:
        a, b = first.conv, second.conv
        return (
            first.op == second.op == "conv"
            and (a.kernel, a.padding, a.dilation, a.groups) == ((3, 3), (1, 1), (1, 1), 1)
            and a.stride in ((1, 1), (2, 2))
            and first.relu
            and first.residual is None
            and first.segment is None
            and b.is_pointwise
            and b.stride == (1, 1)
            and self._only_reader(first.output, second, as_x=True)
            and (second.segment is None or second.segment[1].stride in ((1, 1), (2, 2)))
        )

    def _only_reader(self, value: str, reader: Step, as_x: bool) -> bool:
        source = self.network.source
        others = [reader.residual, reader.segment and reader.segment[0]]
        return (
            value not in self.network.outputs
            and self.readers.get(value) == [reader]
            and source(reader.x) == value
            and all(o is None or source(o) != value for o in others)
        )

    def _chained(self, first: Step, second: Step, third: Step | None) -> list[Piece]:
        y = second.output
        found = []
        for quartered in (False, True) if self._may_be_quartered(second) else (False,):
            pair = (first, second)
            found.append(Piece(pair, 4, self._chain(*pair, quartered), y, quartered=quartered))
            if third is None:
                continue
            if third.op == "avg_pool" and self._only_reader(y, third, as_x=True) and second.relu:
                args = self._chain(*pair, quartered, pool=True)
                found.append(Piece((*pair, third), 4, args, third.output, quartered=quartered))
            if self._reduces(third, y):
                quarter = self._only_quarters(y, third) and len(self.readers[y]) > 1
                args = self._chain(*pair, quartered, third.conv.out_channels, quarter)
                found.append(Piece((*pair, third), 5, args, y, third.output, quarter, quartered))
        return [p for p in found if p.args.configs() or p.args.compiled()]

    def _reduces(self, step: Step, y: str) -> bool:
        """Whether step is the next block's 1x1 reduce of y."""
        return (
            step.op == "conv"
            and step.conv.is_pointwise
            and step.conv.stride == (1, 1)
            and step.relu
            and step.residual is None
            and step.segment is None
            and self.network.source(step.x) == y
        )

    def _chain(
        self, first, second, quartered, following: int = 0, quarter: bool = False, pool: bool = False
    ) -> ChainArgs:
        n, c, h, w = self.shape(first.x)
        return ChainArgs(
            n, c, h, w, first.conv.out_channels, second.conv.out_channels, following, first.conv.stride[0], second.relu,
            second.residual is not None, self._segment(second, quartered), quarter, pool, **self.common,
        )  # fmt: skip


def _dense(x) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
