"""Places in one block of memory for values of known size and life, so that nothing is allocated at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Life(NamedTuple):
    """A value: its size, and the first and the last moment at which it must keep its place (both included)."""

    size: int
    first: int
    last: int


def assign(lives: Sequence[Life], alignment: int = 1) -> tuple[list[int], int]:
    """(offset of each value, size of the block): values whose lives overlap get places that do not.

    Largest first, each at the lowest place that is free during its life. Offsets are multiples of `alignment`.
    """
    offsets = [0] * len(lives)
    placed: list[int] = []
    total = 0
    for i in sorted(range(len(lives)), key=lambda i: (-lives[i].size, lives[i].first)):
        life, at = lives[i], 0
        busy = sorted(
            (offsets[j], offsets[j] + lives[j].size)
            for j in placed
            if lives[j].first <= life.last and life.first <= lives[j].last
        )
        for begin, end in busy:
            if at + life.size <= begin:
                break
            at = max(at, -(-end // alignment) * alignment)
        offsets[i] = at
        placed.append(i)
        total = max(total, at + life.size)
    return offsets, total
