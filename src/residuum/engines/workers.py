"""A worker as the engines see it: a process that is told folders, one after the other, and says how it goes."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic

GRACE = 15.0  # seconds from asking a worker to stop until it is killed: a checkpoint can be written
STARTING = 120.0  # seconds that imports may take before the time limit of a run begins
STOPPED = 130  # exit code of a worker that was asked to stop
BUSY = 0.5  # seconds until a run that another sweep is carrying out is looked at again


@dataclass(frozen=True)
class Each:
    """What each run may use, and the program that carries it out.

    Attributes:
        minutes: Time limit of a run; None: there is none.
        memory: GB that a run is known to need.
        gpu: Share of a GPU that a run gets; 0.25 lets four runs share a card.
        program: The worker, as arguments of Python.
    """

    minutes: float | None = None
    memory: float = 0.0
    gpu: float = 0.0
    program: tuple[str, ...] = ("-m", "residuum.worker")

    def __post_init__(self) -> None:
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise ValueError(f"the time limit is {self.minutes} minutes; it must be above 0")
        if not 0 <= self.memory < float("inf"):
            raise ValueError(f"the memory of a run is {self.memory} GB; it must be 0 (not known) or more")
        if not (0 <= self.gpu <= 1 or (self.gpu > 1 and float(self.gpu).is_integer())):
            raise ValueError(f"the share of a GPU is {self.gpu}; it must be in [0, 1] or a whole number")


@dataclass(frozen=True)
class Doing:
    """How far a run is: examples done, of how many, and what is going on."""

    done: int
    total: int
    text: str = ""


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        state: "complete"; "failed"; "busy": another process is carrying it out.
        kind: Of a failure: "raised", "not finite", "time limit", "killed", "place" (not the run's fault).
        message: Of a failure.
    """

    state: str
    kind: str = ""
    message: str = ""


Tell = Callable[[Path, Doing | Ended], None]  # the run's folder; what is new


class Worker:
    """A process that carries out runs. It is started when it is first needed, and again when it has died.

    It stops when its input closes, so it does not outlive this process, however that ends.

    Args:
        each: What a run may use, and the program.
        variables: Environment variables that it gets beside ours.
    """

    def __init__(self, each: Each, *, variables: Mapping[str, str] | None = None) -> None:
        self.each, self.variables = each, dict(variables or {})
        self.folder: Path | None = None  # what it is doing
        self.peak = 0  # bytes, over all its runs
        self._process: subprocess.Popen[bytes] | None = None
        self._unread, self._began, self._deadline = b"", False, float("inf")

    def order(self, folder: Path) -> None:
        """Have a run carried out; `poll` says how it goes."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        self.folder, self._began = folder, False
        self._deadline = monotonic() + STARTING + self._seconds()
        with suppress(BrokenPipeError):  # it has died this moment, which `poll` finds out
            self._process.stdin.write(f"{folder}\n".encode())

    def fileno(self) -> int:
        """The end of the pipe that it answers through, for `select`."""
        return self._process.stdout.fileno()

    def poll(self, timeout: float = 0.0) -> Doing | Ended | None:
        """What is new, after waiting for it for some seconds.

        Returns:
            How far the run is; how it ended; None if there is nothing new.

        Raises:
            OSError: If workers cannot start here.
        """
        news = None
        if select.select([self], [], [], timeout)[0]:
            read = os.read(self.fileno(), 1 << 16)
            *lines, self._unread = (self._unread + read).split(b"\n")
            for line in lines:
                news = self._understood(json.loads(line)) or news
            if not read and not isinstance(news, Ended):
                news = self._died()
        self.peak = max(self.peak, self._memory("VmHWM"))
        if not isinstance(news, Ended) and monotonic() > self._deadline:
            self.stop()
            news = Ended("failed", "time limit", f"it took longer than {self.each.minutes:g} minutes")
        if isinstance(news, Ended):
            self.folder = None
        return news

    def resident(self) -> int:
        """Bytes of memory that it holds now; 0 where the system does not tell."""
        return self._memory("VmRSS")

    def ask_to_stop(self) -> None:
        """Have it write a checkpoint and end."""
        if self._process and self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """Ask it to stop, wait until it has, and kill it if it does not."""
        if self._process is None:
            return
        self.ask_to_stop()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            pipe.close()
        self._process = None

    def _start(self) -> None:
        self.stop()
        self._unread, self._errors = b"", tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, *self.each.program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            env={**os.environ, **threads, **self.variables},
            start_new_session=True,  # Ctrl-C is for us, who then ask it to stop
        )

    def _seconds(self) -> float:
        return float("inf") if self.each.minutes is None else 60 * self.each.minutes

    def _understood(self, said: dict[str, object]) -> Doing | Ended | None:
        """One line of its answers: that a run began (its time counts from now), how far it is, how it ended."""
        if "state" in said:
            return Ended(**said)
        if "done" in said:
            return Doing(**said)
        self._began, self._deadline = True, monotonic() + self._seconds()
        return None

    def _died(self) -> Ended:
        """The end of a run whose worker has ended without an answer."""
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._errors.seek(0)
        last = (self._errors.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        if code > 0 and code != STOPPED and not self._began:
            raise OSError(f"workers cannot start: python {' '.join(self.each.program)} ended with {how}: {last}")
        return Ended(
            "failed", "killed", f"its worker was ended by {how}" if code < 0 else f"its worker ended with {how}"
        )

    def _memory(self, line: str) -> int:
        """A line of /proc/PID/status in bytes; 0 where there is none."""
        try:
            with open(f"/proc/{self._process.pid}/status", encoding="utf-8") as file:
                return next(1024 * int(row.split()[1]) for row in file if row.startswith(line))
        except (OSError, StopIteration, AttributeError):
            return 0


def carry(folder: str, each: Each, worker: Worker | None = None) -> dict[str, str]:
    """Carry out one run on this machine, for the engines of clusters.

    Args:
        folder: The run's folder.
        each: What the run may use.
        worker: Who carries it out and stays for the next one; None: a worker that stops after this one.

    Returns:
        How it ended, as `Ended` has it.
    """
    used = worker or Worker(each)
    try:
        used.order(Path(folder))
        while not isinstance(news := used.poll(1.0), Ended):
            pass
        return asdict(news)
    finally:
        if worker is None or used.folder:  # used.folder: we were stopped in the middle of it
            used.stop()
