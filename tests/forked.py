"""The trainer in processes of their own that have everything imported when they begin: forks of one server."""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import pytest

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["sklearn.datasets", "trainer"])  # seconds, once


def program(*arguments: object, processes: int = 1, seconds: float = 240.0) -> list[int | None]:
    """Run the trainer in one process, or in several that train together as torchrun has them do.

    Returns:
        The exit code of each: minus the signal that ended it, None if it did not end in time.
    """
    with pytest.MonkeyPatch.context() as patch:  # what the server has when it starts, so have its forks
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
        started = [
            _SERVER.Process(target=_begin, args=({**address, "RANK": str(rank)}, *map(str, arguments)))
            for rank in range(processes)
        ]
        for process in started:
            process.start()
    end = time.monotonic() + seconds
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes


def _begin(environment: dict[str, str], *arguments: str) -> None:
    import trainer

    os.environ.update(environment)
    trainer.main(*arguments)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
