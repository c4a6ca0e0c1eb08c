"""The cheapest way through steps: against every way there is."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_resnet.engine.path import Move, cheapest

COUNT = 5
# (begin, length, cost, state asked for, None for any, state left); costs are integers, so that sums are exact
PIECE = st.tuples(
    st.integers(0, COUNT - 1),
    st.integers(1, 3),
    st.integers(0, 9),
    st.sampled_from([None, frozenset(), frozenset("q")]),
    st.sampled_from([frozenset(), frozenset("q")]),
)


def moves_of(pieces):
    def moves(i, state):
        for n, (begin, length, cost, asks, leaves) in enumerate(pieces):
            if begin == i and i + length <= COUNT and asks in (None, state):
                yield Move(n, i + length, cost, leaves)

    return moves


def every_way(moves, i=0, state=frozenset(), cost=0, taken=()):
    if i == COUNT:
        yield cost, taken
        return
    for move in moves(i, state):
        yield from every_way(moves, move.end, move.state, cost + move.cost, (*taken, move.piece))


@settings(deadline=None, max_examples=200)
@given(st.lists(PIECE, max_size=14))
def test_no_way_is_cheaper(pieces):
    moves = moves_of(pieces)
    ways = dict((taken, cost) for cost, taken in every_way(moves))
    if not ways:
        with pytest.raises(ValueError, match="no way through the steps"):
            cheapest(COUNT, moves)
        return
    cost, taken = cheapest(COUNT, moves)
    assert cost == min(ways.values()) == ways[taken]


def test_what_is_dear_at_first_may_be_cheap_in_the_end():
    """A state that costs more to reach stays in the running for what it allows later."""
    table = {
        (0, ""): [Move("whole", 1, 1.0, ""), Move("quarter", 1, 2.0, "q")],
        (1, ""): [Move("projection of the whole", 2, 5.0, "")],
        (1, "q"): [Move("projection of the quarter", 2, 1.0, "")],
    }
    cost, taken = cheapest(2, lambda i, state: table[i, state], start="")
    assert (cost, taken) == (3.0, ("quarter", "projection of the quarter"))


def test_of_equal_ways_the_first_found_wins():
    def moves(i, state):
        yield Move(f"{i} alone", i + 1, 1.0, state)
        if i == 0:
            yield Move("both", 2, 2.0, state)

    assert cheapest(2, moves) == (2.0, ("both",))  # it reaches the end before the two that cost as much

    def twins(i, state):
        yield Move("first", i + 1, 1.0, state)
        yield Move("second", i + 1, 1.0, state)

    assert cheapest(2, twins) == (2.0, ("first", "first"))


def test_nothing_to_do_costs_nothing():
    assert cheapest(0, lambda i, state: []) == (0.0, ())


@pytest.mark.parametrize("end", [1, 0, 4], ids=["stays", "goes-back", "goes-too-far"])
def test_a_piece_that_does_not_lead_on_is_an_error(end):
    def moves(i, state):
        yield Move("piece", 1 if i == 0 else end, 0.0, state)

    with pytest.raises(ValueError, match=f"a piece at step 1 ends at {end}, of 3 steps"):
        cheapest(3, moves)


def test_what_costs_infinitely_much_is_a_way_still():
    assert cheapest(1, lambda i, state: [Move("only", 1, math.inf, state)]) == (math.inf, ("only",))
