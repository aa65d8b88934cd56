"""Ray: the runs of a sweep on the machines of a Ray cluster, which share the output folder."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from residuum.engines.orders import Orders
from residuum.engines.workers import BUSY, Each, Ended, Tell, Worker, carry
from residuum.names import one_line

RETRIES = 3  # of a run whose machine is lost


@dataclass(frozen=True)
class Ray:
    """Runs as tasks of a Ray cluster, each with one processor; a lost machine's runs go on elsewhere.

    It joins the cluster that RAY_ADDRESS names or that runs on this machine, and starts one here if there is none.

    Attributes:
        workers: Runs at a time; None: as many as the cluster has processors for.
        each: What each run may use.
    """

    workers: int | None = None
    each: Each = field(default_factory=Each)

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; it must be at least 1, or None")

    def check(self) -> None:
        """Refuse if Ray is not here.

        Raises:
            ValueError: If it is not installed.
        """
        if find_spec("ray") is None:
            raise ValueError("the engine ray needs Ray, which is not installed: pip install 'residuum[cluster]'")

    def run(self, folders: Sequence[Path], tell: Tell) -> None:
        """Carry out runs.

        Args:
            folders: Their folders, on a disk that all machines share.
            tell: Is told once how each of them ended.

        Raises:
            ValueError: If the cluster has too little for a single run.
        """
        import ray

        orders, running = Orders(folders, tell), dict[Any, Path]()
        with _cluster():
            self._check_room(ray.cluster_resources())
            task = ray.remote(_carry).options(**self._resources(), max_retries=RETRIES)
            while orders.left:
                most = orders.left if self.workers is None else self.workers
                for folder in orders.some(most - len(running)):
                    running[task.remote(str(folder), self.each)] = folder
                for done in ray.wait(list(running), timeout=BUSY)[0] if running else []:
                    folder = running.pop(done)
                    try:
                        orders.heard(folder, Ended(**ray.get(done)))
                    except ray.exceptions.RayError as error:
                        orders.heard(folder, Ended("failed", "killed", one_line(error)))

    def _resources(self) -> dict[str, float]:
        memory = {"memory": self.each.memory * 2**30} if self.each.memory else {}
        return {"num_cpus": 1.0, "num_gpus": self.each.gpu} | memory

    def _check_room(self, cluster: dict[str, float]) -> None:
        """Refuse a run for which Ray would wait for ever."""
        names = {"num_cpus": "CPU", "num_gpus": "GPU"}
        for name, need in self._resources().items():
            have = cluster.get(names.get(name, name), 0)
            if need > have:
                raise ValueError(f"a run needs {need:g} {names.get(name, name)}, the Ray cluster has {have:g}")


def _carry(folder: str, each: Each) -> dict[str, str]:
    """Carry out one run in this process of Ray's, which keeps its worker for the next one.

    A worker that sees only its share of the GPUs is not kept: the next share may be another.
    """
    return carry(folder, each, None if each.gpu else _kept(each))


@cache
def _kept(each: Each) -> Worker:
    return Worker(each)


@contextmanager
def _cluster() -> Iterator[None]:
    """The Ray cluster that this process has joined already, or joins for as long as the `with` block runs."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
