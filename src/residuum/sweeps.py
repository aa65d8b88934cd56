"""Sweeps: many runs, carried out once each by an engine, whatever happens in between."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from residuum import runfolders, worker
from residuum.descriptions import described
from residuum.engines.workers import Doing, Ended, Tell
from residuum.jobs import Job, Settings
from residuum.names import unknown


@runtime_checkable
class Engine(Protocol):
    """What carries out runs: `engines.pool.Pool`, `engines.ray.Ray`, `engines.slurm.Slurm`."""

    def check(self) -> None:
        """Refuse what cannot work here, before anything starts."""

    def run(self, folders: Sequence[Path], tell: Tell) -> None:
        """Carry out the runs of these folders."""


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to.

    Attributes:
        counts: Runs by state: "complete", "failed", "half" (not the run's fault: the next sweep goes on with it).
        reasons: Of the runs that are not complete, by key.
        before: Runs that were complete before.
    """

    counts: dict[str, int]
    reasons: dict[str, str]
    before: int


Watch = Callable[[Mapping[Path, str], int], AbstractContextManager[Tell]]  # names of the runs; how many are complete


@contextmanager
def unwatched(names: Mapping[Path, str], before: int) -> Iterator[Tell]:
    """Nothing is shown."""
    yield lambda folder, news: None


def grid(base: Job, changes: Mapping[str, Iterable[Any]]) -> list[Job]:
    """A run for every combination of some settings; the last one changes first.

    `grid(run, {"training.coupling": [None, Coupling(0.9)], "seed": range(5)})` gives ten runs.

    Args:
        base: The run that all others are made of.
        changes: Values of settings, by their names; a dot leads into a setting.

    Returns:
        The runs.

    Raises:
        ValueError: If there is no such setting, it has no values, or a combination is refused by the run.
    """
    lists = {name: list(values) for name, values in changes.items()}
    for name, values in lists.items():
        if not values:
            raise ValueError(f"{name} has no values, so there are no runs")
    return [_changed(base, dict(zip(lists, values, strict=True)), "") for values in itertools.product(*lists.values())]


def _changed(base: Any, changes: Mapping[str, Any], where: str) -> Any:
    """A dataclass with settings changed within it, all of one level at once."""
    if not is_dataclass(base):
        raise ValueError(f"{where[:-1]} is {base!r} and has no settings; give it as a whole")
    new, inner = dict[str, Any](), dict[str, dict[str, Any]]()
    known = [field.name for field in fields(base)]
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        if first not in known:
            raise unknown("setting", where + first, [where + other for other in known])
        if rest:
            inner.setdefault(first, {})[rest] = value
        else:
            new[first] = value
    if both := sorted(new.keys() & inner.keys()):
        raise ValueError(f"{where}{both[0]} is given as a whole and in part; choose one")
    for first, parts in inner.items():
        new[first] = _changed(getattr(base, first), parts, f"{where}{first}.")
    return replace(base, **new)


def sweep(
    jobs: Iterable[Job],
    out: Path,
    engine: Engine,
    *,
    settings: Settings | None = None,
    retry_failed: bool = False,
    watch: Watch = unwatched,
) -> Outcome:
    """Carry out runs, each once: what is complete in the folder is not repeated, what is half done goes on.

    A run that fails leaves the others alone; failed.json in its folder says why, and it is tried again only if asked
    for. Stopped in whatever way, the same call goes on; two at a time on one folder share the work.

    Args:
        jobs: The runs.
        out: Folder of runs; each has its own in OUT/runs/<key>.
        engine: Where they are carried out.
        settings: How; never part of the result's name.
        retry_failed: Try runs that failed before again.
        watch: Shows how it goes.

    Returns:
        What it came to.

    Raises:
        ValueError: If there are no runs, two are equal, something is not a run, or the engine cannot work here.
        FileExistsError: If the folder holds other files.
        OSError: If it cannot be written, or workers cannot start.
    """
    jobs = checked(jobs)
    engine.check()
    runs = runfolders.prepare(out)
    standings = {job.key: runfolders.stand(runs / job.key) for job in jobs}
    states = {key: standing.state for key, standing in standings.items()}
    reasons = {key: found.reason for key, found in standings.items() if found.state == "failed" and not retry_failed}
    todo = [job for job in jobs if states[job.key] != "complete" and (retry_failed or states[job.key] != "failed")]
    for job in todo:
        _begin(job, runs / job.key, settings or Settings())
    names = {runs / key: name for key, name in labels(todo).items()}
    before = Counter(states.values())["complete"]

    with watch(names, before) as show:

        def tell(folder: Path, news: Doing | Ended) -> None:
            if isinstance(news, Ended):
                states[folder.name] = "half" if news.kind == "place" else news.state
                if news.state != "complete":
                    reasons[folder.name] = f"{news.kind}: {news.message}"
            show(folder, news)

        if todo:
            engine.run(list(names), tell)
    return Outcome(dict(Counter(states.values())), reasons, before)


def checked(jobs: Any) -> list[Job]:
    """Runs of which a sweep can be made.

    Raises:
        ValueError: If there are none, two are equal, or something is not a run.
    """
    if not isinstance(jobs, Iterable):
        raise ValueError(f"{_short(jobs)} is not a list of runs; return runs, e.g. grid(...)")
    jobs = list(jobs)
    if not jobs:
        raise ValueError("there are no runs")
    first: dict[str, int] = {}
    for number, job in enumerate(jobs):
        if not isinstance(job, tuple(worker.KINDS.values())):
            raise ValueError(f"number {number} of the runs is {_short(job)}; a run is one of {', '.join(worker.KINDS)}")
        if job.key in first:
            raise ValueError(f"the runs {first[job.key]} and {number} are equal (counted from 0): {_short(job)}")
        first[job.key] = number
        again = worker.KINDS[job.kind].from_description(json.loads(json.dumps(job.describe())))
        if again.key != job.key:
            raise ValueError(f"number {number} of the runs does not survive being written: {_short(job)}")
    return jobs


def labels(jobs: Sequence[Job]) -> dict[str, str]:
    """What tells each run from the others, by key: the settings that are not the same in all."""
    flat = {job.key: dict(_flat(described(job), "")) for job in jobs}
    names = dict.fromkeys(name for values in flat.values() for name in values)
    varying = [name for name in names if len({json.dumps(values.get(name)) for values in flat.values()}) > 1]
    return {
        key: " ".join(f"{name.rpartition('.')[2]}={values[name]}" for name in varying if name in values) or key
        for key, values in flat.items()
    }


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The single settings in a description, by dotted name; a list is one setting."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else key)
    else:
        yield name, ",".join(map(str, value)) if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _begin(job: Job, folder: Path, settings: Settings) -> None:
    """Write into a run's folder what a worker reads; if another process carries the run out, it has done so."""
    with runfolders.locked(folder, wait=False) as mine:
        if mine and runfolders.begin(folder, job.key, job.describe(), described(job)):
            worker.write_settings(folder, settings)
