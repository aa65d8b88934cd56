"""Digitclutter: images of several digits that hide parts of each other, the data set of P0 with several labels."""

import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int16, Int64, UInt8

import residuum
from residuum.data.images import ImageSet, Splits
from residuum.data.sprites import (
    BACKGROUND,
    FONT_SIZE,
    IMAGE,
    LARGEST,
    OUTLINE,
    PAGE,
    SMALLEST,
    Grey,
    Page,
    Sprite,
    Template,
    font_name,
    handwritten,
    overflowed,
    printed,
    template,
)
from residuum.files import write_atomically
from residuum.names import unknown
from residuum.progress import Bar, quiet

DEBRIS = {"none": 0, "light": 10, "medium": 30, "heavy": 50}  # fragments in an image
GREYS = ("float", "overflow")
X_RANGE, Y_RANGE = (-148, 148), (-58, 136)  # 0 +- 0.29 and 0.076 +- 0.19 of 512, whole pixels
TOGETHER = 250  # images that are drawn with one random generator: another number would make other data sets
_HANDS = 10  # handwritten images of each digit of which debris is cut


@dataclass(frozen=True)
class ClutterConfig:
    """What is in the images.

    Attributes:
        digits: How many digits each image has, all different; the papers have 2 to 5.
        debris: "none", "light", "medium" or "heavy": 0, 10, 30 or 50 fragments of digits over the image.
        grey: "float", or "overflow" for the values of the reference generator, whose sum of three channels overflows
            8 bits: only to compare with data sets made by it. Its debris is not concerned.
        seed: Seed of digits, places and debris.
    """

    digits: int = 3
    debris: str = "none"
    grey: str = "float"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 10:
            raise ValueError(f"digits is {self.digits}; an image has between 1 and 10 different digits")
        if self.debris not in DEBRIS:
            raise unknown("debris", self.debris, DEBRIS)
        if self.grey not in GREYS:
            raise unknown("grey", self.grey, GREYS)
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more")


class Draws(NamedTuple):
    """What chance decides about some images.

    Attributes:
        digits: The digits in the order in which they are laid: the last one hides, and is whole.
        offsets: Their places, right and down from the middle, in pixels of a page of 512x512.
        hands: Which image of the digit, in [0, 1), where there are several.
        debris: Of each fragment, in [0, 1): template, side, row and column in the template, and in the image.
    """

    digits: UInt8[np.ndarray, "image digit"]
    offsets: Int16[np.ndarray, "image digit 2"]
    hands: Float[np.ndarray, "image digit"]
    debris: Float[np.ndarray, "image fragment 6"]


class Clutter(NamedTuple):
    """One split of Digitclutter.

    Attributes:
        images: Grey images of 32x32 pixels.
        labels: 1 for the digits that are there, else 0.
        digits: See `Draws`.
        offsets: See `Draws`.
    """

    images: UInt8[np.ndarray, "image row column 1"]
    labels: UInt8[np.ndarray, "image 10"]
    digits: UInt8[np.ndarray, "image digit"]
    offsets: Int16[np.ndarray, "image digit 2"]


class _Job(NamedTuple):
    """All that some images are made of. `hands` and `templates` are None for print."""

    draws: Draws
    overflow: bool
    hands: list[list[Grey]] | None
    templates: tuple[Template, ...] | None


def draw(config: ClutterConfig, *, split: str, chunk: int) -> Draws:
    """What chance decides about images `250 chunk` to `250 chunk + 249` of a split.

    Digits, places and debris have generators of their own: images with other debris show the same digits.
    """
    place = (config.seed, Splits._fields.index(split), chunk)
    of_digits, of_debris = (np.random.Generator(np.random.PCG64((*place, part))) for part in (0, 1))
    count, shape = DEBRIS[config.debris], (TOGETHER, config.digits)
    every = np.tile(np.arange(10, dtype=np.uint8), (TOGETHER, 1))
    low, high = zip(X_RANGE, Y_RANGE, strict=True)
    return Draws(
        of_digits.permuted(every, axis=1)[:, : config.digits],
        of_digits.integers(low, high, (*shape, 2), np.int16, endpoint=True),
        of_digits.random(shape),
        of_debris.random((TOGETHER, count, 6)),
    )


def digitclutter(
    config: ClutterConfig,
    count: int,
    *,
    split: str = "train",
    handwriting: ImageSet | None = None,
    workers: int = 1,
    show: Callable[[int], None] | None = None,
) -> Clutter:
    """Images of several digits that hide parts of each other, with 0/1 labels.

    On a grey page (119) of 512x512 pixels, different digits are laid at random places, each a white outline of 10
    pixels around a black face of 384 pixels' font size, so that later ones hide earlier ones; the page is averaged down
    to 32x32. Then fragments of digits (squares of 6 to 9 pixels without their background) are put over the image.

    Image i depends on the settings and i only: more images begin with the fewer ones. Splits are disjoint draws.
    For the same bits numpy, Pillow and the font must be the same; the file that `write_digitclutter` makes names them.

    Args:
        config: What is in the images.
        count: Number of images.
        split: "train" or "test".
        handwriting: Grey images of ten classes, white on black, such as MNIST's, to take digits from; None is print.
        workers: Processes that make images; several are started afresh, so a script needs its `__main__` guard.
        show: Called with the number of images that are done.

    Raises:
        ValueError: If `count` or `workers` is below 1, the split is unknown, or the handwriting is not as above.
        OSError: If the font cannot be read.

    Source: Spoerer, McClure and Kriegeskorte 2017, "Recurrent Convolutional Neural Networks: A Better Model of
    Biological Object Recognition", and its generator; P0 (Lippl et al. 2024) uses it. Font, vertical place of the line
    and the draws are ours: docs/data.md.
    """
    if count < 1 or workers < 1:
        raise ValueError(f"number of images ({count}) and workers ({workers}) must be at least 1")
    if split not in Splits._fields:
        raise unknown("split", split, Splits._fields)
    by_digit = None if handwriting is None else _by_digit(handwriting)
    parts: list[Clutter] = []
    with _processes(min(workers, -(-count // TOGETHER))) as each:
        for part in each(_paint, _jobs(config, count, split, by_digit)):
            parts.append(part)
            if show:
                show(sum(len(part.images) for part in parts))
    return Clutter(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def write_digitclutter(
    path: Path,
    config: ClutterConfig,
    *,
    train: int = 100_000,
    test: int = 10_000,
    handwriting: Splits | None = None,
    workers: int = 1,
    replace: bool = False,
    bar: Bar = quiet,
) -> None:
    """Write both splits to a file that `load_splits` reads.

    Beside images, 0/1 labels and classes it holds "train_digits", "train_offsets" (the same for test; see `Clutter`)
    and "about": settings, font and versions as JSON.

    Args:
        path: The file, FILE.npz.
        config: What is in the images.
        train: Number of training images.
        test: Number of test images.
        handwriting: Digits of the training split are taken from its training split, others from its test split.
        workers: Processes that make images.
        replace: Replace an existing file once the new one is complete.
        bar: Shows how far it is.

    Raises:
        FileExistsError: If the file exists and may not be replaced.
        ValueError: If the name does not end in .npz, a number is below 1, or the handwriting does not fit.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: the images are written to an npz file; choose a name that ends in .npz")
    if path.is_dir() or (path.exists() and not replace):
        raise FileExistsError(f"{path} exists; choose another file, or replace it with --force")
    if train < 1 or test < 1:
        raise ValueError(f"training images ({train}) and test images ({test}) must be at least 1 each")
    path.parent.mkdir(parents=True, exist_ok=True)

    def content(temporary: Path) -> None:
        arrays: dict[str, np.ndarray] = {"classes": np.array(tuple("0123456789"))}
        with bar("digitclutter", train + test) as show:
            for split, count, before in (("train", train, 0), ("test", test, train)):
                made = digitclutter(
                    config,
                    count,
                    split=split,
                    handwriting=getattr(handwriting, split) if handwriting else None,
                    workers=workers,
                    show=lambda done, before=before: show(before + done, ""),
                )
                arrays |= {f"{split}_{name}": array for name, array in made._asdict().items()}
        arrays["about"] = np.array(json.dumps(_about(config, handwriting)))
        np.savez_compressed(temporary, **arrays)

    write_atomically(path, content)


def fragments(
    draws: Float[np.ndarray, "image fragment 6"], templates: tuple[Template, ...]
) -> Int64[np.ndarray, "image fragment 6"]:
    """Of each fragment: template, side, row and column in the template, row and column in the image."""
    which = (draws[..., 0] * len(templates)).astype(np.int64)
    side = SMALLEST + (draws[..., 1] * (LARGEST - SMALLEST + 1)).astype(np.int64)
    rows, columns = np.array([template.grey.shape for template in templates])[which].transpose(2, 0, 1)
    whole = np.full_like(rows, IMAGE)
    room = np.stack([rows, columns, whole, whole], axis=-1) - side[..., None] + 1
    return np.concatenate([np.stack([which, side], axis=-1), (draws[..., 2:] * room).astype(np.int64)], axis=-1)


def _jobs(
    config: ClutterConfig, count: int, split: str, by_digit: list[UInt8[np.ndarray, "_ row column"]] | None
) -> Iterator[_Job]:
    """The images in parts."""
    templates = None
    if by_digit and DEBRIS[config.debris]:
        templates = tuple(template(handwritten(image)) for images in by_digit for image in images[:_HANDS])
    for chunk in range(-(-count // TOGETHER)):
        draws = draw(config, split=split, chunk=chunk)
        draws = Draws(*(array[: count - chunk * TOGETHER] for array in draws))
        hands = by_digit and [
            [by_digit[digit][int(hand * len(by_digit[digit]))] for digit, hand in zip(*row, strict=True)]
            for row in zip(draws.digits, draws.hands, strict=True)
        ]
        yield _Job(draws, config.grey == "overflow", hands, templates)


def _by_digit(handwriting: ImageSet) -> list[UInt8[np.ndarray, "_ row column"]]:
    """The images of each class."""
    images, labels, name = handwriting.images, handwriting.labels, f"{handwriting.name}, {handwriting.split} split"
    if len(handwriting.classes) != 10 or labels.ndim != 1 or images.shape[1] != 1:
        raise ValueError(
            f"{name}: handwriting needs grey images of 10 classes with one label each, such as mnist; these have "
            f"{images.shape[1]} channels and {len(handwriting.classes)} classes"
        )
    white = handwriting.preparation.white
    bright = (images[:, 0].float() * (255 / white)).round().byte().numpy()
    by_digit = [bright[labels.numpy() == digit] for digit in range(10)]
    missing = [str(digit) for digit, found in enumerate(by_digit) if not len(found)]
    if missing:
        raise ValueError(f"{name}: there is no image of class {', '.join(missing)}; every digit is needed")
    return by_digit


def _paint(job: _Job) -> Clutter:
    """The images, with their labels."""
    templates = job.templates or _printed_templates()
    debris = fragments(job.draws.debris, templates)
    page, images = Page(), np.empty((len(job.draws.digits), IMAGE, IMAGE), np.uint8)
    for i, image in enumerate(images):
        page.clear()
        for sprite, (x, y) in zip(_sprites(job, i), job.draws.offsets[i].tolist(), strict=True):
            page.lay(sprite, x=x, y=y)
        image[:] = overflowed(page.average()) if job.overflow else page.average()
        _strew(image, debris[i], templates)
    labels = np.zeros((len(images), 10), np.uint8)
    np.put_along_axis(labels, job.draws.digits.astype(np.int64), 1, axis=1)
    return Clutter(images[..., None], labels, job.draws.digits, job.draws.offsets)


def _sprites(job: _Job, i: int) -> list[Sprite]:
    """The digits of one image."""
    if job.hands is None:
        return [printed()[digit] for digit in job.draws.digits[i]]
    return [handwritten(hand) for hand in job.hands[i]]


def _strew(
    image: Grey,
    debris: Int64[np.ndarray, "fragment 6"],
    templates: tuple[Template, ...],
) -> None:
    """Put fragments of digits over an image, one after the other."""
    for which, side, top, left, row, column in debris.tolist():
        grey, mask = templates[which]
        cut = slice(top, top + side), slice(left, left + side)
        np.copyto(image[row : row + side, column : column + side], grey[cut], where=mask[cut])


@cache
def _printed_templates() -> tuple[Template, ...]:
    return tuple(template(sprite) for sprite in printed())


@contextmanager
def _processes(workers: int) -> Iterator[Callable]:
    """A `map` that works in several processes, in order."""
    if workers == 1:
        yield map
        return
    ignore_ctrl_c = (signal.SIGINT, signal.SIG_IGN)
    with multiprocessing.get_context("spawn").Pool(workers, signal.signal, ignore_ctrl_c) as pool:
        yield pool.imap


def _about(config: ClutterConfig, handwriting: Splits | None) -> dict[str, object]:
    """What a file was made with."""
    import PIL

    return {
        "name": "digitclutter",
        **asdict(config),
        "fragments": DEBRIS[config.debris],
        "background": BACKGROUND,
        "page": PAGE,
        "font": font_name() if handwriting is None else None,
        "font_size": FONT_SIZE,
        "outline": OUTLINE,
        "handwriting": handwriting and handwriting.train.sha256,
        "versions": {"residuum": residuum.__version__, "numpy": np.__version__, "pillow": PIL.__version__},
    }
