"""Slurm: the runs of a sweep as jobs of a Slurm cluster, through submitit."""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from residuum.engines.orders import Orders
from residuum.engines.workers import Each, Ended, Tell, carry
from residuum.names import one_line

ARRAY = 1000  # jobs in one array; Slurm's own limit is 1,001 unless the cluster has another
MARGIN = 5  # minutes that a job has beyond the time limit of its run, for imports and the last checkpoint
LOOK = 1.0  # seconds between two looks at the jobs


@dataclass(frozen=True)
class Slurm:
    """Runs as jobs of arrays, one processor each; partition and account come from SBATCH_PARTITION, SBATCH_ACCOUNT.

    Attributes:
        logs: Folder for Slurm's own files, on the shared disk.
        workers: Jobs at a time.
        each: What each run may use; a time limit must be given.
        cluster: "slurm"; "local" has the same jobs as processes of this machine, all at once.
    """

    logs: Path
    workers: int = 100
    each: Each = field(default_factory=Each)
    cluster: str = "slurm"

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; it must be at least 1")

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: If submitit or Slurm is not here, there is no time limit, or a run is to have part of a GPU.
        """
        if find_spec("submitit") is None:
            raise ValueError("the engine slurm needs submitit, which is not installed: pip install 'residuum[cluster]'")
        if self.cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
            raise ValueError("the engine slurm needs sbatch and srun, which are not on this machine; use a login node")
        if self.each.minutes is None:
            raise ValueError("Slurm must know how long a run may take; give a time limit in minutes")
        if not float(self.each.gpu).is_integer():
            raise ValueError(
                f"Slurm gives whole GPUs, not {self.each.gpu:g}; use 1, or the pool on one of its machines"
            )

    def run(self, folders: Sequence[Path], tell: Tell) -> None:
        """Carry out runs.

        Args:
            folders: Their folders, on a disk that all machines share.
            tell: Is told once how each of them ended.

        Raises:
            KeyboardInterrupt: If it was stopped; the jobs go on.
        """
        orders, executor, jobs = Orders(folders, tell), self._executor(), dict[Any, Path]()
        try:
            while orders.left:
                while some := orders.some(ARRAY):
                    submitted = executor.map_array(Carrier(self.each), list(map(str, some)))
                    jobs |= dict(zip(submitted, some, strict=True))
                time.sleep(LOOK)
                for job in [job for job in jobs if job.done()]:
                    orders.heard(jobs.pop(job), _ended(job))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the jobs go on in Slurm (scancel ends them); the same command waits") from None

    def _executor(self) -> Any:
        import submitit

        executor = submitit.AutoExecutor(self.logs, cluster=self.cluster)
        memory = {"mem_gb": self.each.memory} if self.each.memory else {}
        gpus = {"gpus_per_node": int(self.each.gpu)} if self.each.gpu else {}
        executor.update_parameters(
            name="residuum",
            timeout_min=math.ceil(self.each.minutes) + MARGIN,
            cpus_per_task=1,
            slurm_array_parallelism=self.workers,
            **memory,
            **gpus,
        )
        return executor


@dataclass(frozen=True)
class Carrier:
    """What a job does. One that Slurm takes its machine from is queued again, and goes on from its run's checkpoint.

    Attributes:
        each: What the run may use.
    """

    each: Each

    def __call__(self, folder: str) -> dict[str, str]:
        """Carry out one run here; how it ended, as `Ended` has it."""
        while (ended := carry(folder, self.each))["state"] == "busy":
            time.sleep(LOOK)
        return ended

    def checkpoint(self, folder: str) -> Any:
        """What submitit queues again: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, folder)


def _ended(job: Any) -> Ended:
    """How the run of a job ended; a job without a result was killed."""
    try:
        return Ended(**job.result())
    except Exception as error:  # whatever submitit makes of a job that was lost
        return Ended("failed", "killed", one_line(error))
