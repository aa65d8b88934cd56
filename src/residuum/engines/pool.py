"""The pool: workers on this machine, as many as are asked for and as its memory has room for."""

import math
import os
import select
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from residuum.engines.orders import Orders
from residuum.engines.workers import Each, Tell, Worker
from residuum.memory import available

TICK = 0.2  # seconds between two looks at time limits and memory


@dataclass(frozen=True)
class Pool:
    """Processes on this machine with one thread each.

    A run does not start while others run and there is not enough memory free for it, if it takes what the largest run
    so far took and those that run grow to that, too.

    Attributes:
        workers: Runs at a time.
        each: What each run may use.
    """

    workers: int = 2
    each: Each = field(default_factory=Each)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; it must be at least 1")

    def check(self) -> None:
        """Refuse what this machine cannot do.

        Raises:
            ValueError: If it has fewer GPUs than the workers need.
        """
        self._cards()

    def run(self, folders: Sequence[Path], tell: Tell) -> None:
        """Carry out runs.

        Args:
            folders: Their folders.
            tell: Is told how each of them goes, and once how it ended.

        Raises:
            OSError: If workers cannot start.
        """
        orders = Orders(folders, tell)
        workers = [Worker(self.each, variables=card) for card in self._cards()[: len(folders)]]
        try:
            while orders.left:
                for worker in workers:
                    if worker.folder is None and self._has_room(worker, workers):
                        for folder in orders.some(1):
                            worker.order(folder)
                running = [worker for worker in workers if worker.folder]
                select.select(running, [], [], TICK)
                for worker in running:
                    folder, news = worker.folder, worker.poll()
                    if news is not None:
                        orders.heard(folder, news)
        finally:
            for worker in workers:
                worker.ask_to_stop()
            for worker in workers:
                worker.stop()

    def _has_room(self, worker: Worker, workers: Sequence[Worker]) -> bool:
        """Whether there is memory for one more run."""
        free, running = available(), [other for other in workers if other.folder]
        if free is None or not running:
            return True
        need = max(int(self.each.memory * 2**30), *(other.peak for other in workers))
        promised = sum(max(0, need - other.resident()) for other in running)
        return free - promised + worker.resident() >= need

    def _cards(self) -> list[dict[str, str]]:
        """The variables that show each worker its GPU."""
        if not self.each.gpu:
            return [{}] * self.workers
        import torch

        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        size = max(1, int(self.each.gpu))  # cards of a run
        together = max(1, int(1 / self.each.gpu + 1e-9))  # runs on a card
        needed = math.ceil(self.workers / together) * size
        if needed > seen:
            raise ValueError(
                f"{self.workers} workers with {self.each.gpu:g} GPUs each need {needed}; "
                f"torch sees {seen} here; use fewer workers, or a smaller share"
            )
        names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(seen)))).split(",")
        firsts = [number // together * size for number in range(self.workers)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + size])} for first in firsts]
