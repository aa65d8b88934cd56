"""How we time: one thread, processor time, pairs in turn, the median of their ratios.

Processor time of one thread is robust against other people's load on the machine; wall time of several threads is not.
Each side runs in a process of its own, so that neither lives with the other's allocator settings or caches.
"""

import gc
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from residuum.memory import keep_freed_memory

Work = Callable[[], object]


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        make: A module-level function that builds the work to be timed.
        keep: Keep freed memory in the process, as our command line does.
    """

    make: Callable[[], Work]
    keep: bool = True


def _serve(side: Side, pipe: Connection) -> None:
    if side.keep:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.disable()
    with torch.no_grad():
        work = side.make()
        while pipe.recv():
            gc.collect()
            start = time.process_time()
            work()
            pipe.send(time.process_time() - start)


def ratio(ours: Side, theirs: Side, *, pairs: int = 9) -> tuple[float, float]:
    """Median over interleaved pairs of the time of `ours` over that of `theirs`, and the median seconds of `theirs`."""
    (found,), base = ratios((ours,), theirs, pairs=pairs)
    return found, base


def ratios(sides: Sequence[Side], theirs: Side, *, pairs: int = 9) -> tuple[list[float], float]:
    """As `ratio` for several sides in turn with the same `theirs`, once per round.

    The order within a round alternates; two warm-up rounds are not counted; garbage is collected outside the timing.
    """
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for side in (*sides, theirs):
        here, there = context.Pipe()
        workers.append(context.Process(target=_serve, args=(side, there), daemon=True))
        workers[-1].start()
        pipes.append(here)
    times: list[list[float]] = [[] for _ in pipes]
    for turn in range(pairs + 2):
        for which in range(len(pipes))[:: 1 if turn % 2 else -1]:
            pipes[which].send(True)
            times[which].append(pipes[which].recv())
    for pipe, worker in zip(pipes, workers, strict=True):
        pipe.send(False)
        worker.join()
    *found, base = (seconds[2:] for seconds in times)
    medians = [statistics.median(a / b for a, b in zip(mine, base, strict=True)) for mine in found]
    return medians, statistics.median(base)


def heading(pairs: int) -> str:
    """The first lines of a table."""
    where = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    return f"{where}, 1 thread, {pairs} pairs\n| ours / theirs | ratio | limit | theirs, s |\n| --- | --- | --- | --- |"


def row(name: str, found: float, base: float, limit: float | None) -> str:
    """One line of a table, marked where the limit is passed."""
    verdict = "" if limit is None or found <= limit else " **over**"
    return f"| {name} | {found:.2f}{verdict} | {limit or ''} | {base:.2f} |"
