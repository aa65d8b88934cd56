"""Official files on this machine: found below a data root or fetched into the cache, and checked either way."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest, md5
from pathlib import Path

from residuum.data.archives import File, Source
from residuum.files import write_atomically
from residuum.names import one_line

_CHUNK = 1 << 16  # bytes written at a time


def cache() -> Path:
    """The folder that fetched files go to: the system's place for caches."""
    import pooch

    return Path(pooch.os_cache("residuum"))


def place(source: Source, root: Path) -> Path | None:
    """The folder below a data root that holds most files of a data set; None if none holds any."""
    counts = {root / f: sum((root / f / file.name).is_file() for file in source.files) for f in source.folders}
    folder = max(counts, key=counts.__getitem__)
    return folder if counts[folder] else None


def find(source: Source, root: Path) -> list[Path]:
    """The official files of a data set below a data root, in their order, checked.

    Args:
        source: The data set.
        root: A folder that holds the files, there or in one of the source's folders.

    Raises:
        FileNotFoundError: If they are not there.
        ValueError: If one of them is cut short or not the official file.
    """
    folder = place(source, root)
    if folder is None:
        raise FileNotFoundError(
            f"{root} does not hold {source.name} ({source.files[0].name}); fetch it with "
            f"'residuum data fetch {source.name} --data-root {root}', or name a folder that holds the official files"
        )
    for file in source.files:
        path = folder / file.name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing beside the other files of {source.name}; {_cure(source, root)}")
        reason = damage(path, file)
        if reason:
            raise ValueError(f"{path} {reason}; {_cure(source, root)}")
    return [folder / file.name for file in source.files]


def fetch(source: Source, root: Path | None = None, *, timeout: float = 30.0) -> Path:
    """Make sure that the official files of a data set are below a data root; those that are there are not fetched.

    A file gets its name when it is complete and its checksum is right; an interrupted download leaves nothing that
    could be taken for it. Files that are there but damaged are replaced in the cache, elsewhere they stay and the right
    ones are put beside, into the folder that is looked at first.

    Args:
        source: The data set.
        root: Where to look and where to put; None is the cache.
        timeout: Seconds that a server may be silent.

    Returns:
        The folder that holds the files.

    Raises:
        ValueError: If what the server sends is not the official file.
        OSError: If the server cannot be reached or stops, or the folder cannot be written.
    """
    root = cache() if root is None else root
    found = place(source, root)
    if found and all(_whole(found / file.name, file) for file in source.files):
        return found
    folder = root / source.folders[0]  # never another one: files of the same names may be of another data set
    if there := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise NotADirectoryError(f"{there} is a file, so {source.name} cannot be put there; choose another data root")
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.files:
        if not _whole(folder / file.name, file):
            _download(source, file, folder / file.name, timeout)
    return folder


def damage(path: Path, file: File) -> str:
    """What is wrong with the copy of an official file, in words; "" if nothing is."""
    size = path.stat().st_size
    if size < file.size:
        return f"was cut short: it has {size:,} of {file.size:,} bytes"
    with path.open("rb") as handle:
        found = file_digest(handle, lambda: md5(usedforsecurity=False)).hexdigest()
    return "" if found == file.md5 else f"is not the official file: its MD5 is {found}, not {file.md5}"


def _whole(path: Path, file: File) -> bool:
    return path.is_file() and not damage(path, file)


def _cure(source: Source, root: Path) -> str:
    return f"run 'residuum data fetch {source.name} --data-root {root}'"


def _download(source: Source, file: File, path: Path, timeout: float) -> None:
    """Fetch one file; it appears under its name complete or not at all."""
    import requests
    from pooch import HTTPDownloader

    by_hand = f"put the official files of {source.name} into a folder and name it with --data-root"

    def write(temporary: Path) -> None:
        # A server that thinks it must unpack or pack on the way would change the bytes: "identity" asks it not to.
        with _bar(f"{source.name}: {file.name}") as bar:
            download = HTTPDownloader(
                progressbar=bar, chunk_size=_CHUNK, timeout=timeout, headers={"Accept-Encoding": "identity"}
            )
            download(file.url, str(temporary), None)
        reason = damage(temporary, file)
        if reason:
            raise ValueError(f"what {file.url} sends {reason}; try again later, or {by_hand}")

    try:
        write_atomically(path, write)
    except requests.RequestException as error:
        raise OSError(f"cannot fetch {file.url}: {one_line(error)}; try again, or {by_hand}") from error


@contextmanager
def _bar(title: str) -> Iterator["_Bar"]:
    """A bar with bytes, speed and time left, on the error stream."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        yield _Bar(progress, progress.add_task(title, total=None))


class _Bar:
    """rich's progress with the names that pooch calls. Bytes beyond the end are pooch's rounding to whole chunks."""

    def __init__(self, progress: object, task: int) -> None:
        self._progress, self._task, self.total, self._done = progress, task, 0, 0

    def update(self, count: int) -> None:
        self._done += count
        self._progress.update(self._task, total=self.total or None, completed=min(self._done, self.total or self._done))

    def reset(self) -> None:
        self._done = 0

    def close(self) -> None:
        self._progress.stop_task(self._task)
