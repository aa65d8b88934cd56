"""Digitclutter: what is laid where, what hides what, the same for a seed, and a file that trains a network."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles_digitclutter as oracles
from residuum.cli import main
from residuum.data import ClutterConfig, Splits, digitclutter, load_splits, write_digitclutter
from residuum.data.digitclutter import DEBRIS, X_RANGE, Y_RANGE, draw, fragments
from residuum.data.sprites import (
    IMAGE,
    LARGEST,
    PAGE,
    Page,
    Sprite,
    Template,
    _widened,
    coverage,
    handwritten,
    overflowed,
    printed,
    template,
)

SMALL = ("--n", "30", "--test", "20")


@pytest.fixture(scope="module")
def hands() -> Splits:
    """scikit-learn's digits, 8x8 pixels."""
    return load_splits("digits")


# Images --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("digits", "debris"), [(1, "none"), (2, "none"), (5, "none"), (4, "heavy"), (3, "light")])
def test_images_are_those_of_the_slow_twin(digits: int, debris: str) -> None:
    """Averages are rounded (0.5); on a page, at most 40 of a cell's 256 pixels are at an edge, wrong by 1 per digit."""
    config = ClutterConfig(digits, debris, seed=3)
    found, draws = digitclutter(config, 4), draw(config, split="train", chunk=0)
    for i, image in enumerate(found.images[..., 0]):
        twin = oracles.clutter(draws.digits[i].tolist(), draws.offsets[i].tolist())
        assert np.abs(image - oracles.strew(twin, draws, i)).max() <= 0.5 + 40 / 256 * digits


def test_templates_are_those_of_the_slow_twin() -> None:
    for digit, sprite in enumerate(printed()):
        grey, mask = oracles.template(digit)
        found = template(sprite)
        assert np.array_equal(found.mask, mask)
        assert np.abs(found.grey - grey).max() <= 0.5 + 40 / 256


def test_a_printed_digit_is_a_black_face_with_a_white_outline_of_10_pixels() -> None:
    for digit in range(10):
        outline, face = coverage(digit)
        rows = [np.flatnonzero(part.any(1)) for part in (outline, face)]
        columns = [np.flatnonzero(part.any(0)) for part in (outline, face)]
        for wide, narrow in (rows, columns):
            assert abs(narrow[0] - wide[0] - 10) <= 1
            assert abs(wide[-1] - narrow[-1] - 10) <= 1
        assert 280 <= np.ptp(rows[1]) + 1 <= 292, "DejaVu's digits are 0.73 of 384 pixels high"
        assert set(np.unique(face)) >= {0, 255}


def test_every_digit_fits_between_the_upper_and_lower_border_at_every_place() -> None:
    for sprite in printed():
        assert sprite.place[0] + Y_RANGE[0] >= -PAGE // 2
        assert sprite.place[0] + sprite.keep.shape[0] + Y_RANGE[1] <= PAGE // 2


def test_later_digits_hide_earlier_ones() -> None:
    below, above = printed()[8], printed()[1]
    page = Page()
    images = []
    for sprites in ((above,), (below, above), (above, below)):
        page.clear()
        for sprite in sprites:
            page.lay(sprite, x=0, y=0)
        images.append(page.average())
    alone, above_last, below_last = images
    covered = hidden_by(above)
    assert covered.sum() > 20
    assert np.array_equal(above_last[covered], alone[covered])
    assert (above_last != alone).any(), "the rest of the lower digit is seen"
    assert (below_last[covered] != alone[covered]).any()


def hidden_by(sprite: Sprite) -> np.ndarray:
    """Pixels of the image of which nothing is seen behind a digit."""
    page, shades = Page(), []
    for grey in (0, 255):
        page.clear(grey)
        page.lay(sprite, x=0, y=0)
        shades.append(page.average())
    return shades[0] == shades[1]


def test_the_background_is_119_and_the_last_digit_is_white_and_black() -> None:
    image = digitclutter(ClutterConfig(1, seed=1), 1).images
    assert (image == 119).mean() > 0.5
    assert image.min() == 0
    assert image.max() > 200


def test_grey_that_overflows_has_the_reference_values_and_debris_is_spared() -> None:
    """Source: the reference generator's mean over three uint8 channels, measured: 119 -> 33, 255 -> 84, ..."""
    given_, wanted = np.array([[119, 255, 200, 86, 85]], np.uint8), [[33, 84, 29, 0, 85]]
    assert overflowed(given_).tolist() == wanted
    every = np.arange(256, dtype=np.uint8)[None]
    assert np.array_equal(overflowed(every), np.stack([every] * 3).mean(0, dtype=np.uint8))
    plain, strange = (digitclutter(ClutterConfig(2, grey=grey), 3).images for grey in ("float", "overflow"))
    assert np.array_equal(overflowed(plain[..., 0]), strange[..., 0])
    plain, strange = (digitclutter(ClutterConfig(2, "heavy", grey), 3).images for grey in ("float", "overflow"))
    same = plain == strange
    assert (plain[same] > 85).any(), "overflow would have changed these"


# Chance --------------------------------------------------------------------------------------------------------------


def test_images_of_a_seed_are_the_same_and_more_of_them_begin_with_fewer() -> None:
    config = ClutterConfig(3, "light", seed=5)
    many, few = digitclutter(config, 260), digitclutter(config, 20)
    for large, small in zip(many, few, strict=True):
        assert np.array_equal(large[:20], small)
    assert not np.array_equal(many.offsets[250:], many.offsets[:10]), "the next part has draws of its own"
    for other in (digitclutter(replace(config, seed=6), 20), digitclutter(config, 20, split="test")):
        assert not np.array_equal(other.offsets, few.offsets)
        assert not np.array_equal(other.digits, few.digits)


def test_other_debris_shows_the_same_digits() -> None:
    plain, strewn = (draw(ClutterConfig(4, debris, seed=2), split="test", chunk=3) for debris in ("none", "heavy"))
    assert np.array_equal(plain.digits, strewn.digits)
    assert np.array_equal(plain.offsets, strewn.offsets)


def test_labels_say_which_digits_are_there() -> None:
    found = digitclutter(ClutterConfig(4), 300)
    assert found.labels.shape == (300, 10)
    for row, digits in zip(found.labels, found.digits, strict=True):
        assert len(set(digits.tolist())) == 4
        assert np.flatnonzero(row).tolist() == sorted(digits.tolist())
        assert row.max() == 1


def test_places_and_digits_are_uniform_over_their_ranges() -> None:
    """Means within 5 standard errors of 30,000 draws; the ranges are those of the paper's generator in pixels."""
    assert (-int(0.29 * 512), int(0.29 * 512)) == X_RANGE
    assert (int((0.076 - 0.19) * 512), int((0.076 + 0.19) * 512)) == Y_RANGE
    parts = [draw(ClutterConfig(3), split="train", chunk=chunk) for chunk in range(40)]
    offsets = np.concatenate([part.offsets for part in parts]).reshape(-1, 2)
    for places, (low, high) in zip(offsets.T, (X_RANGE, Y_RANGE), strict=True):
        assert set(np.unique(places)) == set(range(low, high + 1))
        deviation = np.sqrt(((high - low + 1) ** 2 - 1) / 12 / len(places))
        assert abs(places.mean() - (low + high) / 2) < 5 * deviation
    for position in range(3):
        counts = np.bincount(np.concatenate([part.digits[:, position] for part in parts]), minlength=10)
        assert np.abs(counts - 1000).max() < 5 * np.sqrt(10_000 * 0.1 * 0.9)


@pytest.mark.parametrize(("debris", "count"), [("none", 0), ("light", 10), ("medium", 30), ("heavy", 50)])
def test_debris_has_its_number_of_fragments_and_changes_nothing_else(debris: str, count: int) -> None:
    config = ClutterConfig(2, debris)
    draws = draw(config, split="train", chunk=0)
    assert draws.debris.shape == (250, count, 6)
    assert DEBRIS[debris] == count
    plain, strewn = digitclutter(ClutterConfig(2), 3).images[..., 0], digitclutter(config, 3).images[..., 0]
    touched = np.zeros(plain.shape, bool)
    places = fragments(draws.debris, tuple(template(sprite) for sprite in printed()))
    for i in range(3):
        for _, side, _, _, row, column in places[i]:
            touched[i, row : row + side, column : column + side] = True
    assert np.array_equal(plain[~touched], strewn[~touched])
    assert (plain != strewn).any() == (count > 0)


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=6, max_size=6))
def test_every_fragment_lies_in_its_template_and_in_the_image(u: list[float]) -> None:
    shapes = [(19, 16), (9, 9), (9, 32)]
    templates = tuple(Template(np.zeros(s, np.uint8), np.zeros(s, bool)) for s in shapes)
    which, side, top, left, row, column = fragments(np.array([[u]]), templates)[0, 0].tolist()
    assert 6 <= side <= 9
    assert 0 <= top <= shapes[which][0] - side
    assert 0 <= left <= shapes[which][1] - side
    assert 0 <= min(row, column) <= max(row, column) <= IMAGE - side


@pytest.mark.slow
def test_several_processes_make_the_same_images(hands: Splits) -> None:
    for handwriting in (None, hands.train):
        config = ClutterConfig(2, "light")
        alone, together = (digitclutter(config, 510, handwriting=handwriting, workers=n) for n in (1, 2))
        for a, b in zip(alone, together, strict=True):
            assert np.array_equal(a, b)


# Handwriting ---------------------------------------------------------------------------------------------------------


def test_handwriting_is_black_with_a_white_outline_at_the_place_of_print() -> None:
    image = np.zeros((28, 28), np.uint8)
    image[4:24, 10:18] = 255  # a bar in the middle, 20 pixels high as MNIST's digits
    sprite = handwritten(image)
    opaque = sprite.keep == 0
    black = opaque & (sprite.ink == 0)
    for mask, height, width in ((opaque, 300, 132), (black, 280, 112)):
        rows, columns = np.nonzero(mask)
        assert abs(np.ptp(rows) + 1 - height) <= 2
        assert abs(np.ptp(columns) + 1 - width) <= 2
    rows, columns = np.nonzero(black)
    middle = [sprite.place[axis] + (part.min() + part.max()) / 2 for axis, part in enumerate((rows, columns))]
    place = printed()[1].place[0] + printed()[1].keep.shape[0] / 2
    assert np.abs(np.array(middle) - (place, 0)).max() <= 2


def test_the_outline_of_handwriting_is_the_brightest_of_21_by_21_pixels(hands: Splits) -> None:
    image = hands.train.images[0, 0].numpy() * 15
    padded = np.pad(image, 10)
    slow = [[padded[r : r + 21, c : c + 21].max() for c in range(8)] for r in range(8)]
    assert np.array_equal(_widened(image, 10), slow)
    narrow = [[np.pad(image, 1)[r : r + 3, c : c + 3].max() for c in range(8)] for r in range(8)]
    assert np.array_equal(_widened(image, 1), narrow)


def test_the_place_of_handwriting_in_its_image_is_kept() -> None:
    image = np.zeros((28, 28), np.uint8)
    image[10:20, 9:19] = 200
    middle, moved = handwritten(image), handwritten(np.roll(image, (-3, 5), (0, 1)))
    assert np.array_equal(moved.keep, middle.keep)
    assert (moved.place[0] - middle.place[0], moved.place[1] - middle.place[1]) == (-3 * 14, 5 * 14)


def test_narrow_handwriting_gives_templates_that_debris_fits_in() -> None:
    image = np.zeros((28, 28), np.uint8)
    image[4:24, 13:15] = 255
    assert template(handwritten(image)).grey.shape[1] == LARGEST
    nothing = template(handwritten(np.zeros((28, 28), np.uint8)))
    assert nothing.grey.shape == (LARGEST, LARGEST)
    assert not nothing.mask.any()


def test_every_split_takes_the_handwriting_it_is_given(hands: Splits) -> None:
    config = ClutterConfig(2, "light")
    a, b = (digitclutter(config, 3, handwriting=part) for part in hands)
    assert np.array_equal(a.digits, b.digits)
    assert not np.array_equal(a.images, b.images)
    few = hands.train.balanced(10, seed=0)  # one image of each digit: then it is that one
    image = digitclutter(ClutterConfig(1), 1, handwriting=few)
    hand = few.images[few.labels == int(image.digits[0, 0]), 0][0].numpy()
    page = Page()
    page.clear()
    x, y = image.offsets[0, 0].tolist()
    page.lay(handwritten((hand * (255 / 16)).round().astype(np.uint8)), x=x, y=y)
    assert np.array_equal(image.images[0, :, :, 0], page.average())


def test_handwriting_that_does_not_fit_is_refused(hands: Splits) -> None:
    def refused(message: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=message):
            digitclutter(ClutterConfig(), 1, handwriting=replace(hands.train, **changes))

    refused(r"digits, train split: .* these have 3 channels", images=hands.train.images.expand(-1, 3, -1, -1))
    refused("of 10 classes .* and 3 classes", classes=("a", "b", "c"))
    refused("there is no image of class 9", labels=hands.train.labels.clamp(max=8))
    refused("one label each", labels=torch.zeros(len(hands.train), 10, dtype=torch.uint8))


# Files and commands --------------------------------------------------------------------------------------------------


def test_the_file_loads_and_says_how_it_was_made(tmp_path: Path) -> None:
    config, path = ClutterConfig(4, "medium", seed=7), tmp_path / "new" / "x.npz"
    write_digitclutter(path, config, train=12, test=5)
    data, made = load_splits(str(path)), digitclutter(config, 12)
    assert np.array_equal(data.train.images[:, 0].numpy(), made.images[..., 0])
    assert np.array_equal(data.train.labels.numpy(), made.labels)
    assert data.test.labels.shape == (5, 10)
    assert data.test.classes == tuple("0123456789")
    with np.load(path) as file:
        about = json.loads(str(file["about"]))
        assert np.array_equal(file["train_digits"], made.digits)
        assert np.array_equal(file["test_offsets"], digitclutter(config, 5, split="test").offsets)
    assert about["font"] == "DejaVu Sans Bold, Version 2.35"
    assert (about["digits"], about["debris"], about["fragments"], about["seed"]) == (4, "medium", 30, 7)
    assert about["versions"].keys() == {"residuum", "numpy", "pillow"}
    before = path.read_bytes()
    write_digitclutter(path, config, train=12, test=5, replace=True)
    assert path.read_bytes() == before


def test_the_command_makes_data_on_which_a_network_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hands: Splits
) -> None:
    path, run = tmp_path / "x.npz", tmp_path / "run"
    make = ("data", "digitclutter", "--digits", "2", "--out", str(path), *SMALL)
    assert main(make) == 0
    assert str(path) in capsys.readouterr().out
    network = ("--blocks", "1", "1", "--widths", "4", "8", "--epochs", "1", "--batch", "10")
    assert main(["train", "--data", str(path), "--out", str(run), *network]) == 0
    assert "of the classes" in capsys.readouterr().out
    row = json.loads((run / "history.json").read_text())[-1]
    assert 0 <= row["test_accuracy"] <= row["test_digits"] <= 1
    assert main([*make, "--force", "--handwriting", "digits", "--debris", "light", "--grey", "overflow"]) == 0
    with np.load(path) as file:
        about = json.loads(str(file["about"]))
    assert about["handwriting"] == hands.train.sha256
    assert about["font"] is None


def test_bad_input_is_refused_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: object) -> str:
        assert main([str(a) for a in ("data", "digitclutter", *arguments)]) == 2
        return capsys.readouterr().err

    out = tmp_path / "x.npz"
    assert "digits is 11; an image has between 1 and 10" in refused("--out", out, "--digits", 11)
    assert "digits is 0" in refused("--out", out, "--digits", 0)
    assert "training images (0) and test images (10000) must be at least 1" in refused("--out", out, "--n", 0)
    assert "workers (0) must be at least 1" in refused("--out", out, *SMALL, "--workers", 0)
    assert "seed is -1" in refused("--out", out, "--seed", -1)
    assert "choose a name that ends in .npz" in refused("--out", tmp_path / "x.mat")
    assert "a data root" in refused("--out", out, "--data-root", tmp_path)
    assert "unknown data 'mist'; did you mean 'mnist'" in refused("--out", out, "--handwriting", "mist")
    assert list(tmp_path.iterdir()) == []
    out.write_bytes(b"mine")
    assert "x.npz exists; choose another file, or replace it with --force" in refused("--out", out)
    assert "File exists" in refused("--out", out / "below.npz", *SMALL) or out.is_file()
    assert out.read_bytes() == b"mine"
    with pytest.raises(SystemExit):
        main(["data", "digitclutter", "--out", str(out), "--debris", "some"])
    assert "heavy" in capsys.readouterr().err


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown debris 'hevy'; did you mean 'heavy'"):
        ClutterConfig(debris="hevy")
    with pytest.raises(ValueError, match="unknown grey 'int'; known: float, overflow"):
        ClutterConfig(grey="int")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        digitclutter(ClutterConfig(), 1, split="dev")
    with pytest.raises(ValueError, match=r"number of images \(0\)"):
        digitclutter(ClutterConfig(), 0)


def test_a_missing_font_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(OSError, match=r"DejaVuSans-Bold.ttf, which comes with matplotlib, cannot be read"):
        coverage(1)
