"""A kind of run that does what it is told, for tests of engines; as a program, a worker that knows it.

Every execution adds a line to OUT/executions.txt, so that a test can count them.
"""

import os
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from residuum import worker
from residuum.descriptions import key_of
from residuum.engines.workers import Each
from residuum.files import write_json
from residuum.jobs import Settings
from residuum.progress import Bar
from residuum.runfolders import FORMAT

HERE = Path(__file__).resolve()


@dataclass(frozen=True)
class Fake:
    """A run that takes `seconds` in ten steps and goes on where it stopped.

    Attributes:
        seed: Tells runs apart.
        act: What it does half way: "nothing", "raise", "nan", "hang", "deaf" (hangs and ignores signals), "exit",
            "wait" (for a file OUT/go), "kill" (itself, every time), "kill once", "full" (the disk, once), "full for
            all" (of its process, once).
        seconds: How long it takes.
        megabytes: Memory that it takes.
    """

    seed: int = 0
    act: str = "nothing"
    seconds: float = 0.0
    megabytes: int = 0

    kind: ClassVar[str] = "fake"

    def describe(self) -> dict[str, Any]:
        return asdict(self) | {"kind": self.kind, "format": FORMAT}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "Fake":
        return cls(**{name: value for name, value in description.items() if name not in ("kind", "format")})

    @cached_property
    def key(self) -> str:
        return key_of(self.describe())

    def execute(self, folder: Path, settings: Settings, progress: Bar) -> None:
        with (folder.parents[1] / "executions.txt").open("a") as file:
            file.write(f"{self.key} {os.getpid()} {os.environ['OMP_NUM_THREADS']} {settings.data_root}\n")
        steps, taken = folder / "checkpoint", bytearray(self.megabytes * 2**20)
        first = len(steps.read_text()) if steps.exists() else 0
        with progress("working", 10) as show:
            for step in range(first, 10):
                if step == 5:
                    self._act(folder)
                time.sleep(self.seconds / 10)
                steps.write_text("x" * (step + 1))
                show(step + 1, f"step {step + 1}")
        write_json(folder / "values.json", {"seed": self.seed, "resumed": first, "taken": len(taken)})

    def _act(self, folder: Path) -> None:
        once = folder / "once"
        match self.act:
            case "raise":
                raise RuntimeError("this run cannot work")
            case "nan":
                raise FloatingPointError("the loss is nan")
            case "full" if not once.exists():
                once.touch()
                raise OSError(28, "No space left on device")
            case "full for all" if not once.exists():  # the kernel refuses whatever this process writes from now on
                once.touch()
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            case "wait":
                while not (folder.parents[1] / "go").exists():
                    time.sleep(0.05)
            case "hang":
                time.sleep(600)
            case "deaf":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(600)
            case "exit":
                sys.exit("the library gave up")
            case "kill" | "kill once" if not (self.act == "kill once" and once.exists()):
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)


EACH = Each(program=(str(HERE),))


def executions(out: Path) -> list[str]:
    """The keys of the executions so far, in their order."""
    path = out / "executions.txt"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    worker.KINDS[Fake.kind] = Fake
    sys.exit(worker.main())
