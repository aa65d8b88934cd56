"""The worker: carries out the runs whose folders it is told on its input, and says on its output how it goes.

`python -m residuum.worker` reads one path of a folder OUT/runs/<key> per line. It answers in lines of JSON: {} when a
run begins, how far it is, and how it ended. When its input closes, nobody waits any more: it writes a checkpoint and
ends.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from residuum.engines.workers import GRACE, STOPPED
from residuum.files import write_json
from residuum.jobs import Job, Settings
from residuum.memory import keep_freed_memory
from residuum.progress import Show
from residuum.runfolders import SETTINGS, fail, failure_of, locked, log, read_object, stand
from residuum.runs import Run, perform
from residuum.toys.digits import NoisyDigits
from residuum.toys.examples import Example

KINDS: dict[str, type[Job]] = {kind.kind: kind for kind in (Run, Example, NoisyDigits)}  # what a run.json can describe

Say = Callable[[dict[str, Any]], None]
_OFTEN = 0.2  # seconds between two lines about how far a run is


def main() -> int:
    """Carry out runs until the input closes.

    Returns:
        0; 130 if it was stopped in the middle of a run.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what others print is no answer
    keep_freed_memory()
    orders: queue.Queue[Path | None] = queue.Queue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()

    def say(said: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # nobody listens any more: `_listen` stops us, with a checkpoint
            print(json.dumps(said), file=answers)

    try:
        while (folder := orders.get()) is not None:
            say(carry_out(folder, say))
    except KeyboardInterrupt:
        return STOPPED
    return 0


def carry_out(folder: Path, say: Say) -> dict[str, str]:
    """Carry out one run, unless another process does, or has done so and it failed: a sweep tries a run once.

    Args:
        folder: OUT/runs/<key>, with run.json and settings.json.
        say: Is told that it begins, and how far it is.

    Returns:
        How it ended, as `engines.workers.Ended` has it.
    """
    with locked(folder, wait=False) as mine:
        if not mine:
            return {"state": "busy"}
        say({})
        try:
            standing = stand(folder)
            if standing.state == "failed":  # in another sweep, since this one has removed what said so
                kind, _, message = standing.reason.partition(": ")
                return {"state": "failed", "kind": kind, "message": message}
            perform(_job(folder), folder, _settings(folder), _bar(say))
            return {"state": "complete"}
        except (Exception, SystemExit) as error:
            kind, message = failure_of(error) if isinstance(error, Exception) else ("raised", f"SystemExit: {error}")
            with suppress(OSError):
                log(folder, traceback.format_exc())
            if not (folder / "failed.json").exists():  # `perform` has not come so far, or the disk is full
                fail(folder, kind, message)
            return {"state": "failed", "kind": kind, "message": message}


def write_settings(folder: Path, settings: Settings) -> None:
    """Write settings.json beside run.json: where and how a worker carries out the run.

    Raises:
        OSError: If it cannot be written.
    """
    root = settings.data_root
    write_json(folder / SETTINGS, asdict(settings) | {"data_root": root and str(root.absolute())})


def _settings(folder: Path) -> Settings:
    written = read_object(folder / SETTINGS)
    root = written.get("data_root")
    return Settings(**written | {"data_root": root and Path(root)})


def _job(folder: Path) -> Job:
    description = read_object(folder / "run.json")["description"]
    return KINDS[description["kind"]].from_description(description)


def _listen(orders: queue.Queue[Path | None]) -> None:
    """Take orders. When there can be no more, stop what is being done: with a checkpoint, or else at once."""
    for line in sys.stdin:
        orders.put(Path(line.rstrip("\n")))
    orders.put(None)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def _bar(say: Say) -> Callable[[str, int], Any]:
    """A progress bar (`progress.Bar`) that says how far it is."""

    @contextmanager
    def bar(title: str, total: int) -> Iterator[Show]:
        last = 0.0

        def show(done: int, text: str = "") -> None:
            nonlocal last
            if time.monotonic() - last >= _OFTEN:
                last = time.monotonic()
                say({"done": done, "total": total, "text": text or title})

        yield show

    return bar


if __name__ == "__main__":
    sys.exit(main())
