"""Schedules: what each function gives, their laws, and what they refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residuum.schedules import (
    drop,
    full,
    last_section,
    path_of,
    prefix,
    repeat,
    replace,
    shuffle,
    swap,
    tree_size,
    unroll,
)

lengths = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@st.composite
def places(draw: st.DrawFn) -> tuple[tuple[tuple[int, ...], ...], int, int]:
    """A full schedule, a section of it, a position in that."""
    schedule = tuple(tuple(range(n)) for n in draw(lengths))
    section = draw(st.integers(0, len(schedule) - 1))
    return schedule, section, draw(st.integers(0, len(schedule[section]) - 1))


def test_what_they_give() -> None:
    s = full((4, 2))
    assert s == ((0, 1, 2, 3), (0, 1))
    assert drop(s, 0, 1) == ((0, 2, 3), (0, 1))
    assert drop(s, 0, 0, count=3) == ((3,), (0, 1))
    assert repeat(s, 0, 1, times=3) == ((0, 1, 1, 1, 2, 3), (0, 1))
    assert swap(s, 0, 0, 3) == ((3, 1, 2, 0), (0, 1))
    assert replace(s, 0, 2, 0) == ((0, 1, 0, 3), (0, 1))
    assert shuffle(s, 1, (1, 0)) == ((0, 1, 2, 3), (1, 0))
    assert prefix(s, 0, 2) == ((0, 1), ())
    assert prefix(s, 1, 1) == ((0, 1, 2, 3), (0,))
    assert unroll(s, 0, 2) == ((0, 1, 2, 3, 3, 3), (0, 1))
    assert path_of(((1,), (0, 0))) == ((0, -1), (0, 1), (1, -1), (1, 0), (1, 0))
    assert (last_section((4, 2)), last_section((4, 0)), last_section((0,))) == (1, 0, 0)


@given(places())
def test_drop_shortens_by_one_and_keeps_the_order(place) -> None:
    schedule, section, position = place
    row = drop(schedule, section, position)[section]
    assert len(row) == len(schedule[section]) - 1
    assert list(row) == sorted(row)
    assert repeat(schedule, section, position, times=0) == drop(schedule, section, position)


@given(places(), st.randoms(use_true_random=False))
def test_shuffle_by_a_permutation_and_its_inverse_is_the_identity(place, random) -> None:
    schedule, section, _ = place
    order = list(range(len(schedule[section])))
    random.shuffle(order)
    inverse = [order.index(i) for i in range(len(order))]
    assert shuffle(shuffle(schedule, section, order), section, inverse) == schedule


@given(places(), places())
def test_swap_is_its_own_inverse_and_replace_by_itself_changes_nothing(place, other) -> None:
    schedule, section, position = place
    partner = other[2] % len(schedule[section])
    assert swap(swap(schedule, section, position, partner), section, position, partner) == schedule
    assert replace(schedule, section, position, position) == schedule
    assert repeat(schedule, section, position, times=1) == schedule


@given(places(), st.integers(0, 5), st.integers(0, 5))
def test_they_compose(place, a: int, b: int) -> None:
    schedule, section, _ = place
    assert unroll(unroll(schedule, section, a), section, b) == unroll(schedule, section, a + b)
    others = [s for s in range(len(schedule)) if s != section]
    for other in others:
        one = drop(unroll(schedule, section, a), other, 0)
        assert one == unroll(drop(schedule, other, 0), section, a)


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=4).map(tuple)), max_size=8))
def test_tree_size_is_the_number_of_distinct_nonempty_prefixes(schedules) -> None:
    prefixes = {row[:k] for (row,) in schedules for k in range(1, len(row) + 1)}
    assert tree_size(schedules) == len(prefixes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: drop(s, 0, 4), r"position 4 is not in section 0, which has entries 0..3"),
        (lambda s: drop(s, 0, 2, count=3), "3 entries from position 2, but section 0 has 4"),
        (lambda s: drop(s, 2, 0), r"section 2 is not in the schedule, which has sections 0..1"),
        (lambda s: repeat(s, 0, 0, times=-1), "times is -1"),
        (lambda s: shuffle(s, 1, (0, 0)), r"\(0, 0\) is not a permutation of 0..1"),
        (lambda s: prefix(s, 1, 3), r"length 3, but section 1 has 2 entries \(0..2 allowed\)"),
        (lambda s: unroll(((),), 0, 1), "needs a section with an entry"),
        (lambda s: swap(s, 0, 0, 9), "position 9"),
    ],
)
def test_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(full((4, 2)))
