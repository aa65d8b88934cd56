"""The folder of one run: what state it is in, who works on it, how it begins, ends, fails and is set aside.

`OUT/runs/<key>/` holds run.json (what was asked for), the results, and last done.json, which names every file with its
size and SHA-256. `OUT/runs/<key>.lock` belongs to the process that works on it.
"""

import errno
import fcntl
import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from residuum import __version__
from residuum.descriptions import canonical
from residuum.files import PARTIAL, checksum, write_json
from residuum.names import one_line

FORMAT = 1  # of descriptions and folders; another number is another key
CHECKPOINT, LOG, SETTINGS = "checkpoint", "log.txt", "settings.json"
_BESIDE = {"done.json", "failed.json", CHECKPOINT, LOG, SETTINGS}  # not results: done.json does not name them
_MARK = "residuum.json"  # says that a folder is one of runs
_KEY = re.compile(r"[0-9a-f]{16}")

Failure = Literal["raised", "not finite", "time limit", "killed", "place"]


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    Attributes:
        state: "complete"; "half": begun, and the next one goes on; "damaged": a file of a complete one is missing or
            differs; "failed"; "absent".
        reason: What is damaged, why it failed or why it could not go on.
    """

    state: Literal["complete", "half", "damaged", "failed", "absent"]
    reason: str = ""


def prepare(out: Path) -> Path:
    """The folder of all runs in `out`, made if it is not there.

    Returns:
        OUT/runs.

    Raises:
        FileExistsError: If the folder holds other files than those of runs.
        NotADirectoryError: If it is, or lies in, a file.
        OSError: If it cannot be written.
    """
    out = Path(out).absolute()
    for place in (out, *out.parents):
        if place.is_file():
            raise NotADirectoryError(f"{place} is a file, so there can be no runs in {out}; choose another folder")
    if not (out / _MARK).is_file():
        names = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
        others = [name for name in names if not name.startswith(PARTIAL)]
        if others:
            raise FileExistsError(f"{out} holds other files ({others[0]}), not runs; choose an empty or a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / _MARK).is_file():
            write_json(out / _MARK, {"kind": "runs", "format": FORMAT})
        (out / "runs").mkdir(exist_ok=True)
        if not os.access(out / "runs", os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except PermissionError as error:
        why = os.strerror(errno.EACCES)
        raise PermissionError(f"{out} cannot be written ({why}); choose another folder") from error
    return out / "runs"


def keys(out: Path) -> list[str]:
    """The keys of the runs that have a folder in `out`, in order.

    Raises:
        FileNotFoundError: If `out` is no folder of runs.
    """
    if not (Path(out) / "runs").is_dir():
        raise FileNotFoundError(f"{out} is no folder of runs: it has no folder 'runs' (residuum sweep writes one)")
    with os.scandir(Path(out) / "runs") as entries:
        return sorted(entry.name for entry in entries if _KEY.fullmatch(entry.name) and entry.is_dir())


def stand(folder: Path) -> Standing:
    """How a run stands; every file of a complete one is read and compared with its SHA-256."""
    if not folder.is_dir():
        return Standing("absent")
    if (folder / "done.json").exists():
        problem = _damage(folder)
        return Standing("damaged", problem) if problem else Standing("complete")
    if (folder / "run.json").exists() and not read_object(folder / "run.json"):
        return Standing("damaged", "run.json is not readable")
    failure = read_object(folder / "failed.json")
    reason = f"{failure['kind']}: {failure['message']}" if failure.keys() >= {"kind", "message"} else ""
    return Standing("half" if not reason or failure["kind"] == "place" else "failed", reason)


def read_object(path: Path) -> dict[str, Any]:
    """The content of a file that holds one JSON object; empty if it is missing or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def begin(folder: Path, key: str, description: dict[str, Any], settings: Any) -> bool:
    """Make the folder and write run.json; set a damaged one aside, and in a half one remove what was half written.

    Equal runs can be described differently: a file may lie at another place by now. Then run.json is written anew.

    Args:
        folder: OUT/runs/<key>.
        key: The key of the run.
        description: What determines it.
        settings: The same with every default, for those who read it.

    Returns:
        Whether there is anything to do; a complete folder is left as it is.

    Raises:
        ValueError: If the folder is of another run.
    """
    standing = stand(folder)
    if standing.state == "complete":
        return False
    aside = set_aside(folder) if standing.state == "damaged" else None
    folder.mkdir(exist_ok=True)
    there = read_object(folder / "run.json")
    strange = [path.name for path in folder.iterdir() if path.name not in _BESIDE and not path.name.startswith(PARTIAL)]
    if (there or strange) and (there.get("key"), there.get("format")) != (key, FORMAT):
        raise ValueError(f"{folder} is not of the run {key}: it holds {strange[0]}; move it away")
    for rest in folder.glob(f"{PARTIAL}*"):
        rest.unlink()
    (folder / "failed.json").unlink(missing_ok=True)
    if not there or canonical(there.get("description")) != canonical(description):
        content = {"format": FORMAT, "key": key, "description": description, "settings": settings}
        write_json(folder / "run.json", content | {"version": __version__})
    if aside:
        log(folder, f"{standing.reason}: what was there is set aside in {aside.name}")
    return True


def finish(folder: Path, seconds: float) -> None:
    """Write done.json, from which on the run is complete, and remove the checkpoint.

    Args:
        folder: OUT/runs/<key>.
        seconds: How long it took, since it was last begun.

    Raises:
        OSError: If it cannot be written.
    """
    named = sorted(path for path in folder.iterdir() if path.name not in _BESIDE and not path.name.startswith(PARTIAL))
    content = {
        "format": FORMAT,
        "files": {path.name: {"size": path.stat().st_size, "sha256": checksum(path)} for path in named},
        "seconds": round(seconds, 3),
        "finished": _now(),
        "versions": {"residuum": __version__, "python": platform.python_version()},
    }
    write_json(folder / "done.json", content | {"sha256": _sum(content)})
    (folder / CHECKPOINT).unlink(missing_ok=True)


def fail(folder: Path, kind: Failure, message: str) -> None:
    """Write failed.json, as well as the disk allows: a run that cannot say why it failed is half.

    Args:
        folder: OUT/runs/<key>.
        kind: "raised", "not finite", "time limit", "killed"; "place" for what is not the run's fault (a full disk,
            files that are not there): it stays half, and the next sweep goes on with it.
        message: Why.
    """
    with suppress(OSError):
        write_json(folder / "failed.json", {"kind": kind, "message": message, "when": _now()})
        log(folder, f"{kind}: {message}")


def failure_of(error: Exception) -> tuple[Failure, str]:
    """What an error says about a run, for `fail`."""
    text = f"{type(error).__name__}: {one_line(error)}"
    if isinstance(error, FloatingPointError):
        return "not finite", text
    return "place" if isinstance(error, OSError) else "raised", text


def set_aside(folder: Path) -> Path:
    """Rename a damaged folder to <key>.damaged-N, so that nothing is lost.

    Returns:
        Where it is now.
    """
    number = 1
    while (aside := folder.with_name(f"{folder.name}.damaged-{number}")).exists():
        number += 1
    return folder.rename(aside)


def log(folder: Path, line: str) -> None:
    """Add a line to log.txt."""
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(f"{_now()} {line}\n")


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock between processes of one machine or one shared disk; it is free as soon as its holder is gone.

    Args:
        path: OUT/runs/<key>, or a file; the lock is beside it, with ".lock" added.
        wait: Wait until it is free.

    Yields:
        Whether it is held; always true if it waits.
    """
    file = path.with_name(f"{path.name}.lock")
    handle = _lock(file, wait)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            file.unlink(missing_ok=True)
            os.close(handle)


def _lock(file: Path, wait: bool) -> int | None:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), file.stat()):
                    return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last holder has removed it while we waited: the name is another file's, or nobody's


def _damage(folder: Path) -> str:
    """What is wrong with a folder that has done.json; "" if nothing."""
    done = read_object(folder / "done.json")
    if done.pop("sha256", None) != _sum(done):
        return "done.json is not what was written"
    if done["format"] != FORMAT:
        return f"written in format {done['format']}; this code reads {FORMAT}"
    for name, about in done["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != about["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {about['size']}"
        if checksum(path) != about["sha256"]:
            return f"{name} is not what was written"
    return ""


def _sum(content: dict[str, Any]) -> str:
    return sha256(canonical(content).encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
