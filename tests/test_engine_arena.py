"""The arena: values that live at the same time never share memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fused_resnet.engine.arena import Life, assign

sizes = st.integers(0, 300)
lives = st.lists(st.tuples(sizes, st.integers(0, 12), st.integers(0, 6)).map(lambda t: Life(t[0], t[1], t[1] + t[2])))
alignments = st.sampled_from([1, 2, 16, 17])


@given(lives, alignments)
def test_lives_that_overlap_do_not_share_memory(lives, alignment):
    offsets, total = assign(lives, alignment)
    assert len(offsets) == len(lives)
    assert all(at >= 0 and at % alignment == 0 for at in offsets)
    assert total == max((at + life.size for at, life in zip(offsets, lives, strict=True)), default=0)
    for i, a in enumerate(lives):
        for j, b in enumerate(lives[:i]):
            if a.first <= b.last and b.first <= a.last and a.size and b.size:
                assert offsets[i] + a.size <= offsets[j] or offsets[j] + b.size <= offsets[i], (a, b)


@given(lives, alignments)
def test_it_is_deterministic_and_within_bounds(lives, alignment):
    """No smaller than what lives at once, no larger than one place for each."""
    offsets, total = assign(lives, alignment)
    assert assign(lives, alignment) == (offsets, total)
    at_once = [sum(a.size for a in lives if a.first <= moment <= a.last) for moment in range(20)]
    rounded = sum(-(-a.size // alignment) * alignment for a in lives)
    assert max(at_once) <= total <= rounded


def test_memory_is_reused():
    chain = [Life(100, i, i + 1) for i in range(50)]
    assert assign(chain)[1] == 200
    assert assign([Life(100, 0, 0), Life(100, 0, 0)], 64) == ([0, 128], 228)
    assert assign([]) == ([], 0)


def test_a_gap_is_used():
    offsets, total = assign([Life(100, 0, 9), Life(50, 0, 1), Life(60, 2, 3), Life(10, 2, 9)])
    assert total == 170 and offsets[2] == 100
