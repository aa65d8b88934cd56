"""Reading a labelled image set from an npz file, trusting nothing in it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from residuum.files import checksum
from residuum.names import missing, one_line

KEYS = ("train_images", "train_labels", "test_images", "test_labels", "classes")
EXTRAS = ("train_digits", "train_offsets", "test_digits", "test_offsets", "about")  # of Digitclutter; not read here


class Content(NamedTuple):
    """What an npz file holds: training split first."""

    images: list[Tensor]
    labels: list[Tensor]
    classes: tuple[str, ...]
    sha256: str


def read_npz(path: Path) -> Content:
    """The images [example, channel, row, column], labels and class names of an npz file.

    The file holds `train_images`, `test_images` (uint8 [N, rows, columns, channels]), `train_labels`, `test_labels`
    (int64 [N], or uint8 [N, classes] of 0 and 1 where several classes can be present) and `classes` (names). A file of
    Digitclutter holds more, which is left alone.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or too large, or a key, shape, type or value is not as above.
    """
    if not path.is_file():
        raise missing(path, ".npz", "an npz file")
    arrays = _arrays(path)
    classes = arrays["classes"]
    if classes.ndim != 1 or classes.dtype.kind != "U" or len(classes) < 1:
        raise ValueError(f"{path}: classes must be a list of names, got {_kind(classes)}")
    for split in ("train", "test"):
        _check_images(path, f"{split}_images", arrays[f"{split}_images"])
        _check_labels(path, f"{split}_labels", arrays[f"{split}_labels"], len(arrays[f"{split}_images"]), len(classes))
    train, test = arrays["train_images"], arrays["test_images"]
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(f"{path}: train_images are {train.shape[1:]}, test_images {test.shape[1:]}; they must agree")
    if arrays["train_labels"].ndim != arrays["test_labels"].ndim:
        raise ValueError(f"{path}: train_labels and test_labels must be of one kind, class numbers or 0/1 columns")
    images = [torch.from_numpy(part).permute(0, 3, 1, 2).contiguous() for part in (train, test)]
    labels = [torch.from_numpy(arrays[f"{split}_labels"]) for split in ("train", "test")]
    return Content(images, labels, tuple(map(str, classes)), checksum(path))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays under the wanted keys. Pickled objects are refused."""
    try:
        with path.open("rb") as handle:
            file = np.load(handle, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds one bare array, not named ones")
            if set(file.files) - set(EXTRAS) != set(KEYS):
                raise _KeysError(
                    f"{path}: keys must be {', '.join(KEYS)}; the file has {', '.join(sorted(file.files))}"
                )
            return {key: file[key] for key in KEYS}
    except (_KeysError, PermissionError):
        raise
    except MemoryError as error:
        raise ValueError(f"{path} is damaged, or too large for the memory here: {one_line(error)}") from error
    except Exception as error:  # of zipfile, zlib, numpy and the parsers that numpy gives a header to
        raise ValueError(
            f"{path} is damaged, cut short or not an npz file of plain arrays: {one_line(error)}"
        ) from error


class _KeysError(ValueError):
    """A whole file with other keys."""


def _check_images(path: Path, key: str, images: np.ndarray) -> None:
    """uint8 [N, rows, columns, channels], nothing empty."""
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise ValueError(f"{path}: {key} holds nan or infinity ({images.dtype}); images must be uint8, 0 to 255")
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: {key} must be uint8, 0 to 255, got {images.dtype}")
    if images.ndim != 4:
        raise ValueError(f"{path}: {key} must be [N, rows, columns, channels], got shape {images.shape}")
    if len(images) == 0:
        raise ValueError(f"{path}: {key} has no examples")
    if images.size == 0:
        raise ValueError(f"{path}: {key} has images without pixels, shape {images.shape}")


def _check_labels(path: Path, key: str, labels: np.ndarray, examples: int, classes: int) -> None:
    """int64 [N] below the number of classes, or uint8 [N, classes] of 0 and 1."""
    if labels.ndim not in (1, 2) or labels.dtype != (np.int64, np.uint8)[labels.ndim - 1]:
        raise ValueError(f"{path}: {key} must be int64 [N] or uint8 [N, classes], got {_kind(labels)}")
    if len(labels) != examples:
        raise ValueError(f"{path}: {key} has {len(labels)} labels for {examples} images")
    if labels.ndim == 2 and labels.shape[1] != classes:
        raise ValueError(f"{path}: {key} has {labels.shape[1]} columns for {classes} classes")
    highest = classes - 1 if labels.ndim == 1 else 1
    wrong = labels[(labels < 0) | (labels > highest)]
    if len(wrong):
        raise ValueError(f"{path}: {key} must lie in 0..{highest}, got {wrong[0]}")


def _kind(array: np.ndarray) -> str:
    """Type and shape in words."""
    return f"{array.dtype} of shape {array.shape}"
