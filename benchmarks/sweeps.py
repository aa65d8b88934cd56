"""What a sweep costs beside its runs: seconds per run that does nothing, and 16 small trainings on two workers.

Wall time, because a sweep waits for processes: the numbers are worth nothing while other work takes the processors, so
the load is printed. Each is the median of several turns.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from residuum import DataConfig, ResNetConfig, Run, TrainConfig, grid, sweep, worker
from residuum.descriptions import key_of
from residuum.engines.pool import Pool
from residuum.engines.ray import Ray
from residuum.engines.workers import Each
from residuum.files import write_json
from residuum.jobs import Settings
from residuum.progress import Bar
from residuum.runfolders import FORMAT
from residuum.sweeps import Engine

EACH = Each(program=(str(Path(__file__).resolve()), "--worker"))
MANY = 40


@dataclass(frozen=True)
class Nothing:
    """A run that writes one number."""

    seed: int = 0
    kind: ClassVar[str] = "nothing"

    def describe(self) -> dict[str, Any]:
        return asdict(self) | {"kind": self.kind, "format": FORMAT}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "Nothing":
        return cls(description["seed"])

    @cached_property
    def key(self) -> str:
        return key_of(self.describe())

    def execute(self, folder: Path, settings: Settings, progress: Bar) -> None:
        write_json(folder / "values.json", {"seed": self.seed})


def seconds(jobs: list[Any], engine: Engine) -> float:
    """Wall time of a sweep into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        outcome = sweep(jobs, Path(folder) / "out", engine)
        taken = time.perf_counter() - start
    if outcome.counts != {"complete": len(jobs)}:
        raise RuntimeError(f"not all runs are complete: {outcome}")
    return taken


def overhead(engine: Engine) -> float:
    """Seconds per run beyond starting: a sweep of many runs that do nothing, less one of a single run."""
    many, one = ([Nothing(seed) for seed in range(count)] for count in (MANY + 1, 1))
    return (seconds(many, engine) - seconds(one, engine)) / MANY


def speedup() -> float:
    """Time of 16 small trainings on two workers over that on one."""
    base = Run(
        ResNetConfig((2, 2, 2), (8, 16, 32), channels=1), DataConfig("digits"), TrainConfig(epochs=4), ("perturbation",)
    )
    jobs = grid(base, {"seed": range(16)})
    return seconds(jobs, Pool(2)) / seconds(jobs, Pool(1))


def report(name: str, measure: Callable[[], float], turns: int, limit: float) -> None:
    """One line of the table."""
    found = statistics.median(measure() for _ in range(turns))
    print(
        f"| {name} | {found:.3f}{'' if found <= limit else ' **over**'} | {limit:g} | {os.getloadavg()[0]:.1f} |",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns
    print("| sweeps, wall time | found | limit | load of the machine |\n| --- | --- | --- | --- |")
    report("pool, s per run that does nothing", lambda: overhead(Pool(1, EACH)), turns, 1)
    if find_spec("ray"):
        report("Ray, s per run that does nothing", lambda: overhead(Ray(1, EACH)), turns, 2)
    report("16 trainings, two workers / one", speedup, turns, 0.6)


worker.KINDS[Nothing.kind] = Nothing
if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        sys.exit(worker.main())
    main()
