"""Schedules: which blocks run, in which order, how often. Pure functions on tuples of integers.

A schedule holds one tuple of block numbers per section. Every function takes a schedule and returns a new one, so they
compose: `repeat(drop(full((4, 4)), 0, 1), 1, 3)`. `section` counts sections from 0; `position` counts the entries of
that section's tuple from 0 (in a full schedule position and block number agree).
"""

from collections.abc import Iterable, Sequence
from itertools import chain

Schedule = tuple[tuple[int, ...], ...]


def full(lengths: Sequence[int]) -> Schedule:
    """Every block once, in order.

    Args:
        lengths: Number of blocks of each section.

    Returns:
        `((0, .., n_1 - 1), (0, .., n_2 - 1), ...)`.
    """
    return tuple(tuple(range(n)) for n in lengths)


def drop(schedule: Schedule, section: int, position: int, *, count: int = 1) -> Schedule:
    """Leave out `count` entries from `position` on; the rest keeps its order.

    Dropping the first k blocks is `drop(s, i, 0, count=k)`, the last k of n is `drop(s, i, n - k, count=k)`, k > 0.

    Source: P1 (Jastrzebski et al. 2018), section 4.2 and figure 3: one block dropped, no retraining.

    Raises:
        ValueError: If an entry to drop is not in the section.
    """
    row = _row(schedule, section, position)
    if not 0 <= count <= len(row) - position:
        raise ValueError(
            f"drop: {count} entries from position {position}, but section {section} has {len(row)} entries"
        )
    return _with(schedule, section, row[:position] + row[position + count :])


def repeat(schedule: Schedule, section: int, position: int, *, times: int = 2) -> Schedule:
    """Run the entry at `position` `times` times in a row (1 changes nothing, 0 drops it).

    Raises:
        ValueError: If the position is not in the section or `times` is negative.
    """
    row = _row(schedule, section, position)
    if times < 0:
        raise ValueError(f"repeat: times is {times}; it must be 0 or more")
    return _with(schedule, section, row[:position] + (row[position],) * times + row[position + 1 :])


def swap(schedule: Schedule, section: int, first: int, second: int) -> Schedule:
    """Exchange the entries at two positions of one section.

    Raises:
        ValueError: If a position is not in the section.
    """
    row = list(_row(schedule, section, first))
    _row(schedule, section, second)
    row[first], row[second] = row[second], row[first]
    return _with(schedule, section, tuple(row))


def replace(schedule: Schedule, section: int, position: int, block: int) -> Schedule:
    """Run block number `block` at `position`, in place of what stands there.

    Raises:
        ValueError: If the position is not in the section. Whether the block exists, the stream says when it runs.
    """
    row = _row(schedule, section, position)
    return _with(schedule, section, (*row[:position], block, *row[position + 1 :]))


def shuffle(schedule: Schedule, section: int, order: Sequence[int]) -> Schedule:
    """Reorder one section: its new entry k is its old entry `order[k]`.

    Shuffling by a permutation and then by its inverse changes nothing.

    Raises:
        ValueError: If `order` is not a permutation of the section's positions.
    """
    row = _section(schedule, section)
    if sorted(order) != list(range(len(row))):
        raise ValueError(f"shuffle: order {tuple(order)} is not a permutation of 0..{len(row) - 1} (section {section})")
    return _with(schedule, section, tuple(row[k] for k in order))


def prefix(schedule: Schedule, section: int, length: int) -> Schedule:
    """Stop early: the first `length` entries of `section`, and no block of any later section.

    Entries (down-sampling) of later sections and the readout still run: this is the early exit of P1's intermediate
    accuracy (P1, figure 5), extended to all sections.

    Raises:
        ValueError: If the section has fewer entries than `length`.
    """
    row = _section(schedule, section)
    if not 0 <= length <= len(row):
        raise ValueError(
            f"prefix: length {length}, but section {section} has {len(row)} entries (0..{len(row)} allowed)"
        )
    return schedule[:section] + (row[:length],) + ((),) * (len(schedule) - section - 1)


def unroll(schedule: Schedule, section: int, times: int) -> Schedule:
    """Apply the last entry of a section `times` more times.

    Source: P1 (Jastrzebski et al. 2018), section 4.4 and figure 7: 20 extra steps of the last block.

    Raises:
        ValueError: If the section is empty or `times` is negative.
    """
    row = _section(schedule, section)
    if not row or times < 0:
        raise ValueError(
            f"unroll: needs a section with an entry and times >= 0; section {section} is {row}, times {times}"
        )
    return _with(schedule, section, row + (row[-1],) * times)


def last_section(lengths: Sequence[int]) -> int:
    """The last section that has blocks; 0 where none has.

    Args:
        lengths: Number of blocks of each section.
    """
    return max((s for s, length in enumerate(lengths) if length), default=0)


def tree_size(schedules: Iterable[Schedule]) -> int:
    """Number of block evaluations that a set of schedules needs if every distinct prefix is evaluated once.

    That is the number of nodes of their prefix tree, entries of sections not counted. Dropping each of N blocks of one
    section, together with the full schedule, gives N (N + 1) / 2.
    """
    return len({path[:k] for path in map(path_of, schedules) for k in range(1, len(path) + 1) if path[k - 1][1] >= 0})


def path_of(schedule: Schedule) -> tuple[tuple[int, int], ...]:
    """A schedule as one flat path of (section, block) pairs; block -1 stands for the section's entry."""
    return tuple(chain.from_iterable(((s, -1), *((s, b) for b in row)) for s, row in enumerate(schedule)))


def _section(schedule: Schedule, section: int) -> tuple[int, ...]:
    if not 0 <= section < len(schedule):
        raise ValueError(f"section {section} is not in the schedule, which has sections 0..{len(schedule) - 1}")
    return schedule[section]


def _row(schedule: Schedule, section: int, position: int) -> tuple[int, ...]:
    row = _section(schedule, section)
    if not 0 <= position < len(row):
        raise ValueError(f"position {position} is not in section {section}, which has entries 0..{len(row) - 1}")
    return row


def _with(schedule: Schedule, section: int, row: tuple[int, ...]) -> Schedule:
    return (*schedule[:section], row, *schedule[section + 1 :])
