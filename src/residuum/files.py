"""Files and folders that are complete or absent: written under a temporary name beside, then renamed."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# What the commands write. A folder with anything else in it is somebody's work and is never replaced.
NETWORK = frozenset({"config.json", "weights.safetensors", "history.json", "provenance.json"})
RESULT = frozenset(
    {
        "history.json",
        "profile.parquet",
        "initial.parquet",
        "shuffled.parquet",
        "groups.parquet",
        "profile.safetensors",
        "initial.safetensors",
        "shuffled.safetensors",
        "indices.json",
        "provenance.json",
        "report.html",
    }
)
FIGURES = frozenset({"phase_plane.png", "phase_plane.pdf", "regions.png", "regions.pdf"})
PARTIAL = ".partial-"


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that a reader sees the old file or the complete new one, whenever the writing stops.

    Args:
        path: The file.
        write: Writes the content to the path it is given, a temporary name in the same folder with the same ending.

    Raises:
        OSError: If the folder cannot be written or the disk is full; the old file is untouched and nothing is left.
    """
    path = Path(path).resolve()
    temporary = _beside(path)
    try:
        with _naming(path):
            temporary.touch()
            mode = temporary.stat().st_mode  # safetensors would leave a file that only its owner can read
            write(temporary)
            temporary.chmod(mode)
            _flush(temporary)
            os.replace(temporary, path)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically; nan and infinity are refused, since JSON has no such numbers.

    Raises:
        ValueError: If the value holds nan or infinity.
        OSError: If the file cannot be written.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_tensors(path: Path | str, *, format: str) -> tuple[dict[str, Tensor], Any]:
    """Tensors and JSON content of a safetensors file of ours, whose header says "format" and "content".

    Raises:
        ValueError: If it is a folder or no safetensors file, is cut short or damaged, or has another format.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, no file of residuum")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is no file of residuum, or is incomplete: {error}") from error
    if metadata.get("format") != format:
        raise ValueError(f"{path} has the format {metadata.get('format')!r}, expected {format!r}")
    try:
        return tensors, json.loads(metadata["content"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: what it says of its tensors cannot be read") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], content: Any, *, format: str) -> None:
    """Write a file that `read_tensors` reads, atomically.

    Raises:
        OSError: If the file cannot be written.
    """
    metadata = {"format": format, "content": json.dumps(content)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The state of a network, on the processor; a tensor that stands at several places once, by its first name."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True).items()
    return {
        name: value.detach().cpu().contiguous() for name, value in state if first.setdefault(id(value), name) == name
    }


def restore_(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a network the state that `stored` gave, or any in which a tied tensor stands under one of its names.

    Raises:
        RuntimeError: If the tensors are those of another network.
    """
    state = model.state_dict(keep_vars=True)
    found = {id(value): tensors[name] for name, value in state.items() if name in tensors}
    model.load_state_dict({name: found[id(value)] for name, value in state.items() if id(value) in found} | tensors)


@contextmanager
def new_folder(
    path: Path,
    *,
    writes: frozenset[str] = frozenset(),
    replace: bool = False,
    reads: Sequence[Path | str | None] = (),
) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the `with` block ends well, and is removed when it does not.

    It is made at once, so a place that cannot be written is refused before the work. With `replace`, the old folder
    stays as it is until the new one is complete.

    Args:
        path: The folder to make.
        writes: Names of the files that a folder to be replaced may hold.
        replace: Replace such a folder. One that holds other files is never replaced.
        reads: What the new content is made from, which is never replaced.

    Yields:
        The folder to write into.

    Raises:
        FileExistsError: If `path` exists and may not be replaced.
        OSError: If it cannot be made.
    """
    path = Path(path).resolve()
    if any(given and Path(given).resolve() == path for given in reads):
        raise FileExistsError(f"{path} is what the command reads; choose another output folder")
    if path == Path.cwd():
        raise FileExistsError(f"{path} is the folder that the command is called in; choose another output folder")
    _check_free(path, writes, replace)
    for parent in path.parents:
        if parent.is_file():
            raise NotADirectoryError(f"{parent} is a file, so {path} cannot be made; choose another output folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    with _naming(path):
        temporary.mkdir()
    try:
        yield temporary
        _flush(temporary)
        _check_free(path, writes, replace)
        _take_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What the system says about a temporary name, said about the path that was asked for."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename and PARTIAL not in str(error.filename)):
            raise
        raise type(error)(f"cannot write {path}: {error.strerror}") from error


def _check_free(path: Path, writes: frozenset[str], replace: bool) -> None:
    """Refuse a path that exists, unless it may be replaced."""
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"{path} is a file; choose another output folder")
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(PARTIAL))
    strangers = [name for name in names if name not in writes]
    if strangers:
        raise FileExistsError(f"{path} exists and holds other files ({strangers[0]}); choose another output folder")
    if names and not replace:
        raise FileExistsError(f"{path} exists; choose another output folder, or replace it with --force")


def _take_place(new: Path, path: Path) -> None:
    """Put `new` where `path` is; if that fails the old folder is back in its place."""
    old = _beside(path)
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _flush(path.parent)


def _beside(path: Path) -> Path:
    """A fresh temporary name in the same folder, with the same ending."""
    return path.with_name(f"{PARTIAL}{secrets.token_hex(4)}-{path.name}")


def _flush(path: Path) -> None:
    """Make sure that a file's content or a folder's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
