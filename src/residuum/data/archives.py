"""The known image sets: where their official files are, their checksums, and how they are read.

Nothing is unpickled and nothing is unpacked to the disk: an IDX file is a header and bytes, and of the CIFAR archives
the binary version is read, whose files are rows of label bytes and pixel bytes.
"""

import gzip
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path

import numpy as np
import torch

from residuum.data.npz import Content
from residuum.names import one_line, unknown


@dataclass(frozen=True)
class File:
    """One official file.

    Attributes:
        url: Where it is fetched; its last part is the file's name.
        md5: Its published checksum.
        size: Its length in bytes.
    """

    url: str
    md5: str
    size: int

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """An image set that is published as a few official files.

    Attributes:
        name: Name of the data set.
        files: Its files.
        folders: Where below a data root they may lie, in the order they are looked for; the first is where they go.
        counts: Images of the training and the test split.
        shape: Channels, rows, columns.
        classes: Number of classes.
        read: Reads the files, given in their order.
    """

    name: str
    files: tuple[File, ...]
    folders: tuple[str, ...]
    counts: tuple[int, int]
    shape: tuple[int, int, int]
    classes: int
    read: Callable[["Source", Sequence[Path]], Content]


def source_named(name: str, sources: Sequence[Source]) -> Source:
    """The source of this name.

    Raises:
        ValueError: If there is none.
    """
    for source in sources:
        if source.name == name:
            return source
    raise unknown("archive", name, (source.name for source in sources))


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a gzipped IDX file as an array, if they have the shape that they must have.

    Args:
        path: The file.
        shape: The shape; the header must say the same.

    Raises:
        ValueError: If the file is damaged or holds something else.

    Source: the description of the format beside MNIST: two zero bytes, type (8: unsigned bytes), number of
    dimensions, each dimension in 4 bytes, big-endian; then the bytes.
    """
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    size = len(header) + prod(shape)
    with _damage_named(path), gzip.open(path) as file:
        content = file.read(size + 1)  # one byte more would be one too many
    if content[: len(header)] != header or len(content) != size:
        raise ValueError(f"{path} is not an IDX file of {' x '.join(map(str, shape))} bytes")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def _mnist(source: Source, paths: Sequence[Path]) -> Content:
    return _read_idx_pairs(source, paths, tuple("0123456789"))


def _fashion(source: Source, paths: Sequence[Path]) -> Content:
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    return _read_idx_pairs(source, paths, names)


def _read_idx_pairs(source: Source, paths: Sequence[Path], classes: Sequence[str]) -> Content:
    """Images and labels of the training split, then of the test split."""
    images = [read_idx(path, (n, *source.shape[1:])) for path, n in zip(paths[::2], source.counts, strict=True)]
    labels = [read_idx(path, (n,)) for path, n in zip(paths[1::2], source.counts, strict=True)]
    return _content(source, paths[0].parent, [part[:, None] for part in images], labels, classes)


_LONGEST_TEXT = 1 << 16  # bytes of a list of class names


def _cifar10(source: Source, paths: Sequence[Path]) -> Content:
    train = [f"data_batch_{i}.bin" for i in range(1, 6)]
    return _read_cifar(source, paths[0], "cifar-10-batches-bin", train, "test_batch.bin", "batches.meta.txt", 1)


def _cifar100(source: Source, paths: Sequence[Path]) -> Content:
    return _read_cifar(source, paths[0], "cifar-100-binary", ["train.bin"], "test.bin", "fine_label_names.txt", 2)


def _read_cifar(
    source: Source, path: Path, folder: str, train: list[str], test: str, names: str, label_bytes: int
) -> Content:
    """A binary CIFAR archive: rows of label bytes (of two, coarse and fine, the fine one counts) and pixel bytes."""
    row, parts = label_bytes + prod(source.shape), [*train, test]
    counts = [source.counts[0] // len(train)] * len(train) + [source.counts[1]]
    sizes = {f"{folder}/{part}": row * count for part, count in zip(parts, counts, strict=True)}
    members = _members(path, sizes, f"{folder}/{names}")
    images, labels = [], []
    for split in (parts[:-1], parts[-1:]):
        rows = [np.frombuffer(members.pop(f"{folder}/{part}"), np.uint8).reshape(-1, row) for part in split]
        images.append(np.concatenate([r[:, label_bytes:] for r in rows]).reshape(-1, *source.shape))
        labels.append(np.concatenate([r[:, label_bytes - 1] for r in rows]))
    lines = members[f"{folder}/{names}"].decode("ascii", errors="replace").split("\n")
    return _content(source, path, images, labels, [line.strip() for line in lines if line.strip()])


def _members(path: Path, sizes: dict[str, int], text: str) -> dict[str, bytes]:
    """The wanted files of a tar archive, each of the size it must have, and a short text; all others are passed over.

    Raises:
        ValueError: If the archive is damaged, or one of them is missing or something else.
    """
    found: dict[str, bytes] = {}
    with _damage_named(path), tarfile.open(path, "r:gz") as archive:
        for member in archive:
            if member.name not in sizes and member.name != text:
                continue
            if not member.isfile() or member.size != sizes.get(member.name, min(member.size, _LONGEST_TEXT)):
                raise ValueError(f"{path}: {member.name} is not a file of the right size, it has {member.size} bytes")
            found[member.name] = archive.extractfile(member).read()
    missing = {*sizes, text} - found.keys()
    if missing:
        raise ValueError(f"{path} does not hold {', '.join(sorted(missing))}")
    return found


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Every way in which a compressed file can be broken, as one error."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path} is damaged or cut short: {one_line(error)}") from error


def _content(
    source: Source, path: Path, images: list[np.ndarray], labels: list[np.ndarray], classes: Sequence[str]
) -> Content:
    """Arrays as tensors, with the checksum of pixels and labels, training split first."""
    if len(classes) != source.classes:
        raise ValueError(f"{path}: {len(classes)} names of classes, there must be {source.classes}")
    highest = max(int(part.max()) for part in labels)
    if highest >= source.classes:
        raise ValueError(f"{path}: labels must lie in 0..{source.classes - 1}, got {highest}")
    numbers, digest = [part.astype("<i8") for part in labels], sha256()
    for pixels, answers in zip(images, numbers, strict=True):
        digest.update(pixels.tobytes())
        digest.update(answers.tobytes())
    tensors = [torch.from_numpy(np.require(part, requirements="W")) for part in images]
    return Content(tensors, [torch.from_numpy(part).long() for part in numbers], tuple(classes), digest.hexdigest())


def _idx_files(url: str, sums_and_sizes: Sequence[tuple[str, int]]) -> tuple[File, ...]:
    """The four files of MNIST and of the sets made like it."""
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple(File(f"{url}/{name}-ubyte.gz", *more) for name, more in zip(names, sums_and_sizes, strict=True))


_MNIST_FILES = _idx_files(
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    [
        ("f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
        ("d53e105ee54ea40749a09fcbcd1e9432", 28_881),
        ("9fb629c4189551a2d022fa330f9573f3", 1_648_877),
        ("ec29112dd5afa0611ce80d1b7f02629c", 4_542),
    ],
)
_FASHION_FILES = _idx_files(
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",  # offers no https; the checksum is what counts
    [
        ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", 26_421_880),
        ("25c81989df183df01b3e8a0aad5dffbe", 29_515),
        ("bef4ecab320f06d8554ea6380940ec79", 4_422_102),
        ("bb300cfdad3c16e7a12a480ee83cd310", 5_148),
    ],
)
_TORONTO = "https://www.cs.toronto.edu/~kriz"
_CIFAR10_FILES = (File(f"{_TORONTO}/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 170_052_171),)
_CIFAR100_FILES = (File(f"{_TORONTO}/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", 168_513_733),)

# The places include those of torchvision's roots. MNIST and Fashion-MNIST name their files alike.
ARCHIVES = (
    Source("mnist", _MNIST_FILES, ("mnist", "MNIST/raw", "raw", "."), (60_000, 10_000), (1, 28, 28), 10, _mnist),
    Source(
        "fashion-mnist",
        _FASHION_FILES,
        ("fashion-mnist", "FashionMNIST/raw", "raw", "."),
        (60_000, 10_000),
        (1, 28, 28),
        10,
        _fashion,
    ),
    Source("cifar10", _CIFAR10_FILES, ("cifar10", "."), (50_000, 10_000), (3, 32, 32), 10, _cifar10),
    Source("cifar100", _CIFAR100_FILES, ("cifar100", "."), (50_000, 10_000), (3, 32, 32), 100, _cifar100),
)
