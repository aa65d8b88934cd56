"""Data sets: what the digits are, npz files there and back, standardisation, draws, preparation for a network."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from datafiles import write_npz
from residuum.data import Preparation, batches, load, load_splits
from residuum.data.npz import read_npz


def test_digits_are_the_same_balanced_split_every_time() -> None:
    train, test = load_splits("digits")
    assert train.images.shape == (1297, 1, 8, 8)
    assert test.images.shape == (500, 1, 8, 8)
    assert test.labels.bincount().tolist() == [50] * 10
    assert train.images.max() == 16 == train.preparation.white
    rows = {tuple(image.flatten().tolist()) for image in train.images}
    assert not any(tuple(image.flatten().tolist()) in rows for image in test.images)
    again = load("digits", split="test")
    assert torch.equal(again.images, test.images)
    assert again.sha256 == train.sha256


def test_training_images_are_standardised_per_channel(tmp_path: Path) -> None:
    data = load(str(write_npz(tmp_path / "x.npz")), split="train")
    x = data.preparation(data.images)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def test_a_channel_that_never_changes_is_only_centred(tmp_path: Path) -> None:
    images = np.full((12, 5, 4, 3), 7, np.uint8)
    data = load(str(write_npz(tmp_path / "x.npz", train_images=images)), split="train")
    assert data.preparation.std == (1, 1, 1)
    assert data.preparation(data.images).abs().max() < 1e-6


def test_npz_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "x.npz")
    test = load(str(path), split="test")
    with np.load(path) as file:
        assert np.array_equal(test.images.permute(0, 2, 3, 1).numpy(), file["test_images"])
        assert np.array_equal(test.labels.numpy(), file["test_labels"])
    assert test.classes == ("cat", "dog", "owl")
    assert test.name == "x.npz"
    assert len(test.sha256) == 64


def test_an_npz_file_that_claims_to_be_encrypted_is_damaged(tmp_path: Path) -> None:
    content = bytearray(write_npz(tmp_path / "x.npz").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] ^= 1  # of the first array in the list at the end of the file
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.npz is damaged, cut short or not an npz file.*encrypted"):
        read_npz(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (f"({2**60}, 2, 2, 1)", "is damaged, or too large for the memory here: Unable to allocate 4.00 EiB"),
        (f"({2**64}, 2, 2, 1)", "is damaged, cut short or not an npz file"),
        ("(4, 2, 2, 1|", "is damaged, cut short or not an npz file"),
    ],
)
def test_headers_of_arrays_are_not_trusted(shape: str, message: str, tmp_path: Path) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    path = write_npz(tmp_path / "x.npz", train_images=None)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("train_images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ValueError, match=message):
        read_npz(path)


def test_npz_with_several_classes_per_image(tmp_path: Path) -> None:
    labels = np.eye(3, dtype=np.uint8)[np.arange(12) % 3]
    path = write_npz(tmp_path / "x.npz", train_labels=labels, test_labels=labels[:6])
    assert load(str(path), split="train").labels.shape == (12, 3)


def test_limit_draws_with_the_seed_and_smaller_draws_lie_in_larger_ones() -> None:
    few, many, other = (load("digits", split="test", limit=n, seed=s).images for n, s in ((20, 3), (100, 3), (20, 4)))
    kept = {tuple(image.flatten().tolist()) for image in many}
    assert len(few) == 20
    assert all(tuple(image.flatten().tolist()) in kept for image in few)
    assert not torch.equal(few, other)
    assert len(load("digits", split="test", limit=9999)) == 500


def test_batches_cover_the_data_in_order() -> None:
    data = load("digits", split="test", limit=50)
    given = list(batches(data, batch=20, dtype=torch.float64))
    assert [len(y) for _, y in given] == [20, 20, 10]
    assert torch.equal(torch.cat([y for _, y in given]), data.labels)
    assert given[0][0].dtype == torch.float64
    assert torch.allclose(torch.cat([x for x, _ in given]), data.preparation(data.images).double())


def test_preparation_resizes_repeats_and_normalises() -> None:
    images = torch.full((2, 1, 8, 8), 16, dtype=torch.uint8)
    x = Preparation(16, (0.0, 0.5, 1.0), (1.0, 0.5, 1.0), (12, 10))(images)
    assert x.shape == (2, 3, 12, 10)
    assert torch.allclose(x.mean((0, 2, 3)), torch.tensor([1.0, 1.0, 0.0]), atol=1e-5)


def test_preparation_refuses_other_channels_and_useless_constants() -> None:
    with pytest.raises(ValueError, match="reads 1 channels, the images have 3"):
        Preparation(255, (0.0,), (1.0,))(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="std above 0"):
        Preparation(255, (0.0,), (0.0,))
    with pytest.raises(ValueError, match="size is"):
        Preparation(255, (0.0,), (1.0,), (0, 4))
