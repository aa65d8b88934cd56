"""What the studies share: networks by their seeds, and numbers along the blocks of one."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from residuum.claims import Results
from residuum.profiles import Profile
from residuum.runs import Run

Seeds = dict[int, Run]
Name = TypeVar("Name")


def done(results: Results, runs: Mapping[int, Run]) -> dict[int, Run]:
    """Those that are complete."""
    return {seed: run for seed, run in runs.items() if run.key in results}


def complete(results: Results, tables: Mapping[Name, Mapping[int, Run]]) -> dict[Name, dict[int, Run]]:
    """What is complete of each table, without tables of which nothing is."""
    return {name: there for name, runs in tables.items() if (there := done(results, runs))}


def complete_by_data(
    results: Results, tables: Mapping[str, Mapping[Name, Mapping[int, Run]]]
) -> dict[str, dict[Name, dict[int, Run]]]:
    """The same for the tables of each data set, without data sets of which nothing is complete."""
    return {data: there for data, table in tables.items() if (there := complete(results, table))}


def last(results: Results, runs: Mapping[int, Run], name: str) -> dict[int, Any]:
    """A value of the last epoch, by seed (or depth) of the runs."""
    return {seed: results[run.key].history[-1][name] for seed, run in runs.items()}


def runs_in(*tables: Mapping[int, Run]) -> tuple[Run, ...]:
    """The runs of several tables, each once."""
    return tuple({run.key: run for table in tables for run in table.values()}.values())


def along(profile: Profile, quantity: str, section: int | None = None) -> list[float]:
    """Means of a quantity over images at its points, of one section or of all."""
    points = profile.measures[quantity].points
    means = profile.mean(quantity).tolist()
    return [mean for point, mean in zip(points, means, strict=True) if section in (None, point.section)]


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 of one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
