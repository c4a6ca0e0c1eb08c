"""The cheapest way through the steps of a network: which steps are computed together, by what each way costs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, TypeVar

Piece = TypeVar("Piece")


class Move(NamedTuple):
    """One piece of a way: it computes the steps from here up to `end`, costs so many seconds, and leaves `state`."""

    piece: object
    end: int
    cost: float
    state: Hashable


def cheapest(count: int, moves: Callable[[int, Hashable], Iterable[Move]], start: Hashable = frozenset()):
    """(cost, pieces) of the cheapest way through `count` steps, by dynamic programming from the front.

    moves(i, state): what can come at step i; the state says what is in memory, and in which form. Of equal ways the
    one found first wins. Raises ValueError where no way leads to the end.
    """
    best: list[dict[Hashable, tuple[float, tuple]]] = [{} for _ in range(count + 1)]
    best[0][start] = (0.0, ())
    for i in range(count):
        for state, (cost, pieces) in best[i].items():
            for move in moves(i, state):
                if not i < move.end <= count:
                    raise ValueError(f"a piece at step {i} ends at {move.end}, of {count} steps")
                total = cost + move.cost
                known = best[move.end].get(move.state)
                if known is None or total < known[0]:
                    best[move.end][move.state] = (total, (*pieces, move.piece))
    if not best[count]:
        raise ValueError("no way through the steps")
    return min(best[count].values(), key=lambda way: way[0])
