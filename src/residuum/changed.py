"""Networks changed by interventions: their answers, read from a table into the form that charts and titles need."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

from residuum.readings import Table, Value

Kind = Literal["accuracy", "agreement"]
Values = dict[tuple[int, int, int], Value]  # (section, number, 1) -> value


def kind(table: Table) -> Kind:
    """What tells whether an answer is good: being right, or where there are no labels, being the network's own."""
    return "accuracy" if "intact_accuracy" in table else "agreement"


def intact(table: Table, quantity: str) -> Value:
    """The value of the network itself: its loss, its accuracy, or its agreement with itself."""
    found = table.get(f"intact_{quantity}")
    return next(iter(found.values())) if found else Value(1.0, 0.0, 0)


def by_count(table: Table, intervention: str) -> Values:
    """Good answers by how many blocks are left out or moved, 0 is the network itself; of pairs by their distance.

    The error of a mean over pairs is at most the mean of their errors, which is what it gets.
    """
    name = f"{intervention}_{kind(table)}"
    several: dict[tuple[int, int, int], list[Value]] = defaultdict(list)
    for (section, index, length), value in table.get(name, {}).items():
        count = length - index if intervention == "swap" else length
        several[section, count, 1].append(value)
        several[section, 0, 1] = [intact(table, kind(table))]
    return {key: mean(values) for key, values in sorted(several.items())}


def mean(values: Sequence[Value]) -> Value:
    """Mean of means over the same examples, with the largest error that it can have."""
    n = len(values)
    return Value(sum(v.mean for v in values) / n, sum(v.stderr for v in values) / n, min(v.count for v in values))


def scales(table: Table, quantity: str) -> tuple[str, ...]:
    """The factors on extra steps that were measured, 1 (the block as it is) first."""
    found = [
        name.removeprefix("unroll_").removesuffix(f"_{quantity}")
        for name in table
        if name.startswith("unroll_") and name.endswith(f"_{quantity}")
    ]
    return tuple(sorted(found, key=lambda scale: -float(scale)))


def unrolled(table: Table, quantity: str, scale: str, section: int, length: int) -> dict[int, Value]:
    """A quantity by the number of extra steps of a section's last block; 0 is the network itself."""
    steps = {
        index - length: value
        for (s, index, _), value in table.get(f"unroll_{scale}_{quantity}", {}).items()
        if s == section
    }
    return {0: intact(table, quantity)} | dict(sorted(steps.items())) if steps else {}


def pairs(table: Table, section: int) -> Iterator[tuple[int, int, Value]]:
    """(place, block that runs there, good answers) of the replacements in a section."""
    for (s, place, other), value in table.get(f"replace_{kind(table)}", {}).items():
        if s == section:
            yield place, other, value
