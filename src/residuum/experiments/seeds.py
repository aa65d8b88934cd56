"""What the studies share: networks by their seeds, and numbers along the blocks of one."""

from collections.abc import Mapping, Sequence

import numpy as np

from residuum.claims import Results
from residuum.profiles import Profile
from residuum.runs import Run

Seeds = dict[int, Run]


def done(results: Results, runs: Mapping[int, Run]) -> dict[int, Run]:
    """Those that are complete."""
    return {seed: run for seed, run in runs.items() if run.key in results}


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
