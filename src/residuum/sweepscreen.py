"""What `residuum sweep` does and shows: the runs of a function, an engine for them, how each of them goes."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from residuum import sweeps
from residuum.engines.pool import Pool
from residuum.engines.ray import Ray
from residuum.engines.slurm import Slurm
from residuum.engines.workers import Doing, Each, Ended, Tell
from residuum.flags import Carried, Sweep
from residuum.jobs import Job, Settings
from residuum.loading import returned
from residuum.progress import console
from residuum.sweeps import Engine, Outcome, checked

notices = console(stderr=True)


def sweep(flags: Sweep, command: str) -> None:
    """Carry out the runs that a function returns, and say what they came to.

    Args:
        flags: The command's options.
        command: The command as it was typed.

    Raises:
        ValueError: If a run is not complete in the end; the message says how many, and where it stands why.
        KeyboardInterrupt: If it was stopped; the message says how to go on.
    """
    _say(carried_out(checked(returned(flags.runs)), flags.out, flags.carried, command), flags)


@contextmanager
def board(names: Mapping[Path, str], before: int) -> Iterator[Tell]:
    """A bar for all runs, and one for each that is being carried out; a line for each that failed.

    Args:
        names: The runs by their folders.
        before: Runs that were complete before.

    Yields:
        A function that is told what is new.
    """
    total, lines = len(names) + before, dict[Path, TaskID]()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[text]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=notices) as progress:
        whole = progress.add_task("runs", total=total, completed=before, text=f"{before} of {total}")
        ended = before

        def tell(folder: Path, news: Doing | Ended) -> None:
            nonlocal ended
            name = names[folder]
            if isinstance(news, Doing):
                if folder not in lines:
                    lines[folder] = progress.add_task(name[:60], text="")
                progress.update(lines[folder], completed=news.done, total=news.total, text=news.text)
                return
            if folder in lines:
                progress.remove_task(lines.pop(folder))
            ended += 1
            progress.update(whole, completed=ended, text=f"{ended} of {total}")
            if news.state != "complete":
                notices.print(f"{name} ({folder.name}) failed, {news.kind}: {news.message}")
            elif not notices.is_terminal:
                notices.print(f"{name} ({folder.name}) complete, {ended} of {total}")

        yield tell


def carried_out(jobs: Sequence[Job], out: Path, how: Carried, command: str) -> Outcome:
    """The sweep of these jobs, with its bars.

    Args:
        jobs: What to do.
        out: Folder of runs.
        how: The command's options.
        command: The command as it was typed.

    Raises:
        KeyboardInterrupt: If it was stopped; the message says how to go on.
    """
    settings = Settings(data_root=how.data_root, device="cuda" if how.gpu else "cpu")
    try:
        return sweeps.sweep(jobs, out, _engine(how, out), settings=settings, retry_failed=how.retry_failed, watch=board)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(str(stop) or f"the same command goes on: {command}") from None


def unfinished(outcome: Outcome, why: str = "") -> str:
    """How many runs are not complete, and what can be done about it; "" if all are.

    Args:
        outcome: What the sweep came to.
        why: Said in brackets, if given.
    """
    total = sum(outcome.counts.values())
    rest = total - outcome.counts.get("complete", 0)
    if not rest:
        return ""
    again = "; --retry-failed tries those that failed again" if "failed" in outcome.counts else ""
    return f"{rest} of {total} runs are not complete{why and f' ({why})'}{again}"


def _engine(how: Carried, out: Path) -> Engine:
    """The engine that was asked for."""
    each = Each(minutes=how.time_limit, memory=how.memory, gpu=how.gpu)
    if how.engine == "ray":
        return Ray(how.workers, each)
    if how.engine == "slurm":
        return Slurm(out.absolute() / "slurm", Slurm.workers if how.workers is None else how.workers, each)
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Pool(here if how.workers is None else how.workers, each)


def _say(outcome: Outcome, flags: Sweep) -> None:
    """What the sweep came to."""
    said = ", ".join(f"{count} {state}" for state, count in sorted(outcome.counts.items()))
    print(f"{said} ({outcome.before} before); residuum runs {flags.out} lists them")
    if problem := unfinished(outcome):
        raise ValueError(problem)
