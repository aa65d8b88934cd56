"""What data sets there are, which of them are on this machine, and fetching: behind `residuum data list | fetch`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from residuum.data import fetching
from residuum.data.archives import ARCHIVES, Source, source_named


class Facts(NamedTuple):
    """What is known of a data set before it is read.

    Attributes:
        counts: Images of the training and the test split.
        shape: Channels, rows, columns.
        classes: Number of classes.
    """

    counts: tuple[int, int]
    shape: tuple[int, int, int]
    classes: int


FACTS = {"digits": Facts((1297, 500), (1, 8, 8), 10)}
FACTS |= {source.name: Facts(source.counts, source.shape, source.classes) for source in ARCHIVES}


@dataclass(frozen=True)
class Entry:
    """One data set.

    Attributes:
        name: Its name.
        shape: Rows, columns, channels of its images.
        train: Training images.
        test: Test images.
        classes: Number of classes.
        size: Bytes to fetch.
        place: Where it is, in words or as a folder; "" if it must be fetched.
    """

    name: str
    shape: tuple[int, int, int]
    train: int
    test: int
    classes: int
    size: int
    place: str


def entries(root: Path | None = None, *, sources: Sequence[Source] = ARCHIVES) -> list[Entry]:
    """The data sets that have a name. Files count as being there if their sizes are right; loading checks the sums.

    Args:
        root: Data root; None is the cache.
        sources: The archives.
    """
    (train, test), (channels, rows, columns), classes = FACTS["digits"]
    digits = Entry("digits", (rows, columns, channels), train, test, classes, 0, "comes with scikit-learn")
    return [digits, *(_entry(source, root or fetching.cache()) for source in sources)]


def listing(root: Path | None = None, *, sources: Sequence[Source] = ARCHIVES) -> str:
    """The data sets that have a name as a table for the screen, with the kinds of files that are data, too."""
    lines = ["name           images (train + test)  shape    classes  fetched"]
    for entry in entries(root, sources=sources):
        images, shape = f"{entry.train:,} + {entry.test:,}", "x".join(map(str, entry.shape))
        where = entry.place or f"no ({entry.size / 1e6:.0f} MB)"
        lines.append(f"{entry.name:<13}  {images:<21}  {shape:<7}  {entry.classes:>7}  {where}")
    return "\n".join([*lines, "path/FILE.npz  your own images", "path/FILE.txt  your own text, for language models"])


def fetch(name: str, root: Path | None = None, *, sources: Sequence[Source] = ARCHIVES) -> Path:
    """Make sure that a data set is on this machine.

    Args:
        name: Its name.
        root: Data root to put it in; None is the cache.
        sources: The archives.

    Returns:
        The folder that holds its files.

    Raises:
        ValueError: If the name is unknown, the set is not one that is fetched, or the server sends other files.
        OSError: If the server cannot be reached or stops, or the folder cannot be written.
    """
    if name == "digits":
        raise ValueError("digits come with scikit-learn; there is nothing to fetch")
    return fetching.fetch(source_named(name, sources), root)


def _entry(source: Source, root: Path) -> Entry:
    folder = fetching.place(source, root)
    sizes = [(folder / file.name, file.size) for file in source.files] if folder else []
    here = bool(sizes) and all(path.is_file() and path.stat().st_size == size for path, size in sizes)
    channels, rows, columns = source.shape
    total = sum(file.size for file in source.files)
    return Entry(
        source.name, (rows, columns, channels), *source.counts, source.classes, total, str(folder) if here else ""
    )
