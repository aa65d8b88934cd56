"""Labelled images: the data sets, their batches, and the preparation that turns pixels into a network's input."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from residuum.data import fetching
from residuum.data.archives import ARCHIVES, Source, source_named
from residuum.data.npz import Content, read_npz
from residuum.data.subsets import balanced_subset, random_subset, shuffled_labels
from residuum.names import unknown

NAMES = ("digits", *(source.name for source in ARCHIVES))
Labels = Int64[Tensor, " example"] | UInt8[Tensor, "example class"]


@dataclass(frozen=True)
class Preparation:
    """How pixels become a network's input: scale, size, channels, then `(pixel / white - mean) / std` per channel.

    Attributes:
        white: Pixel value of full brightness.
        mean: Subtracted from each channel, in units of full brightness.
        std: Divides each channel, in the same units.
        size: Rows and columns that the network reads; None keeps the images' own.
    """

    white: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} need one number per channel, and std above 0")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size is {self.size}; rows and columns must be at least 1")

    def __call__(self, images: UInt8[Tensor, "example channel row column"]) -> Float[Tensor, "example _ _ _"]:
        """Images as the network reads them, float32; one channel is repeated where the network reads several.

        Raises:
            ValueError: If the channels do not fit.
        """
        channels = len(self.mean)
        if images.shape[1] not in (1, channels):
            raise ValueError(f"the model reads {channels} channels, the images have {images.shape[1]}")
        x = images.float() / self.white
        if self.size is not None and x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(row, device=x.device).view(-1, 1, 1) for row in (self.mean, self.std))
        return (x.expand(-1, channels, -1, -1) - mean) / std


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set of labelled images.

    Attributes:
        name: Name of the data set, or its file.
        split: "train" or "test".
        images: Pixels.
        labels: Class numbers, or one column of 0 and 1 per class where several classes can be present.
        classes: Names of the classes.
        preparation: Standardisation of each channel with the statistics of all training images.
        sha256: Checksum of the data set (of the file, or of the decoded pixels and labels).
        labelling: "true", or what was done to the labels: "shuffled, seed 0".
    """

    name: str
    split: str
    images: UInt8[Tensor, "example channel row column"]
    labels: Labels
    classes: tuple[str, ...]
    preparation: Preparation
    sha256: str
    labelling: str = "true"

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """A checksum of these very examples and of their preparation; `sha256` is that of the whole data set."""
        found = sha256(repr((tuple(self.images.shape), self.labels.dtype, self.preparation)).encode())
        for part in (self.images, self.labels):
            found.update(part.cpu().contiguous().numpy())
        return found.hexdigest()[:16]

    def take(self, count: int | None, *, seed: int) -> "ImageSet":
        """At most `count` examples drawn without replacement, in their old order; None is all of them.

        Raises:
            ValueError: If `count` is below 1.
        """
        return self if count is None else self._chosen(random_subset(len(self), count, seed=seed))

    def balanced(self, count: int | None, *, seed: int) -> "ImageSet":
        """Exactly `count` examples, equally many of every class, in their old order; None is all. See `subsets`.

        Raises:
            ValueError: If `count` is below 1 or above the number of examples.
        """
        return self if count is None else self._chosen(balanced_subset(self.labels, count, seed=seed))

    def shuffled(self, *, seed: int) -> "ImageSet":
        """The same images with their labels permuted among them. See `subsets.shuffled_labels`."""
        return replace(self, labels=shuffled_labels(self.labels, seed=seed), labelling=f"shuffled, seed {seed}")

    def _chosen(self, positions: Tensor) -> "ImageSet":
        return replace(self, images=self.images[positions], labels=self.labels[positions])


class Splits(NamedTuple):
    """Both splits of a data set."""

    train: ImageSet
    test: ImageSet


def load(
    name: str, *, split: Literal["train", "test"], limit: int | None = None, seed: int = 0, root: Path | None = None
) -> ImageSet:
    """One split of a data set.

    Args:
        name: See `load_splits`.
        split: Which split.
        limit: At most so many examples, drawn with `seed`; None is all.
        seed: Seed of the draw.
        root: See `load_splits`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the name or split is unknown, or the file does not hold what it must; the message says what.
        OSError: If files must be fetched and cannot be.
    """
    if split not in Splits._fields:
        raise unknown("split", split, Splits._fields)
    return getattr(load_splits(name, root), split).take(limit, seed=seed)


def load_splits(name: str, root: Path | None = None, *, sources: Sequence[Source] = ARCHIVES) -> Splits:
    """Both splits of a data set.

    Args:
        name: "digits" (scikit-learn's 1,797 images of 8x8 pixels from 0 to 16; 500 of them, 50 of each digit, are the
            test split, always the same), "mnist", "fashion-mnist", "cifar10", "cifar100" (official splits; of the
            latter the 100 fine classes), or a file "path/FILE.npz".
        root: A folder that holds the official files of the sets from "mnist" on; they are only read. None is the cache,
            into which they are fetched if they are not there.
        sources: Where the official files are.

    Raises:
        FileNotFoundError: If the file, or an official file below `root`, does not exist.
        ValueError: If the name is unknown, `root` is given for other data, or a file does not hold what it must.
        OSError: If files must be fetched and cannot be.
    """
    if name in (source.name for source in sources):
        source = source_named(name, sources)
        return _splits(name, _official(source, root), white=255)
    if root is not None and (name == "digits" or name.endswith(".npz")):
        raise ValueError(f"a data root ({root}) is for {', '.join(source.name for source in sources)}, not for {name}")
    if name == "digits":
        return _digits()
    if name.endswith(".npz"):
        return _splits(Path(name).name, read_npz(Path(name)), white=255)
    if name.endswith(".txt"):
        raise ValueError(f"{name} is text, for language models; images are needed: {', '.join(NAMES)}, path/FILE.npz")
    raise unknown("data", name, (*NAMES, "path/FILE.npz"))


def batches(
    data: ImageSet, *, batch: int, preparation: Preparation | None = None, device: str = "cpu", dtype: torch.dtype
) -> Iterator[tuple[Float[Tensor, "example channel row column"], Labels]]:
    """The examples in order, prepared for a network, with their labels.

    Args:
        data: The examples.
        batch: Examples in each batch; the last may have fewer.
        preparation: The network's own; None is the data set's.
        device: Where the batches go.
        dtype: Number format of the images.

    Raises:
        ValueError: If `batch` is below 1 or the channels do not fit.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    prepare = preparation or data.preparation
    for images, labels in zip(data.images.split(batch), data.labels.split(batch), strict=True):
        yield prepare(images.to(device)).to(dtype), labels.to(device)


def _official(source: Source, root: Path | None) -> Content:
    """An archive from a data root, or from the cache."""
    if root is not None:
        return source.read(source, fetching.find(source, Path(root)))
    folder = fetching.fetch(source)
    return source.read(source, [folder / file.name for file in source.files])


def _digits() -> Splits:
    """scikit-learn's handwritten digits, with the last 50 images of each digit in a fixed shuffle as test split."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(source.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test = torch.cat([order[labels[order] == digit][-50:] for digit in range(10)]).sort().values
    train = torch.ones(len(labels)).index_fill(0, test, 0).nonzero()[:, 0]
    checksum = sha256(images.numpy().tobytes() + labels.numpy().astype("<i8").tobytes()).hexdigest()
    parts = (train, test)
    content = Content([images[p] for p in parts], [labels[p] for p in parts], tuple("0123456789"), checksum)
    return _splits("digits", content, white=16)


def _splits(name: str, content: Content, *, white: int) -> Splits:
    """Both splits with the standardisation of the first; a channel that never changes is only centred."""
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in content.images[0].unbind(1)]).double()
    shares, values = counts / counts.sum(1, keepdim=True), torch.arange(256).double()
    mean = shares @ values
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    std = torch.where(std > 0, std, white)
    preparation = Preparation(white, tuple((mean / white).tolist()), tuple((std / white).tolist()))
    return Splits(
        *(
            ImageSet(name, split, x, y, content.classes, preparation, content.sha256)
            for split, x, y in zip(Splits._fields, content.images, content.labels, strict=True)
        )
    )
