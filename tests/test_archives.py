"""Official archives: read as they were written, found in every place, refused when damaged, fetched whole or not."""

import gzip
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archivefiles import COUNTS, Small, cifar_members, idx, serving, small, tar
from residuum.data import load, load_splits
from residuum.data.archives import ARCHIVES, Source
from residuum.data.catalogue import entries, fetch, listing
from residuum.data.fetching import damage, find
from residuum.data.fetching import fetch as fetch_source

NAMES = [source.name for source in ARCHIVES]
MNIST, CIFAR = small("mnist"), small("cifar10")


def read(archive: Small, root: Path, source: Source | None = None) -> None:
    """Load an archive and compare it with what was written."""
    splits = load_splits(archive.source.name, root, sources=[source or archive.source])
    for split, images, labels in zip(splits, archive.images, archive.labels, strict=True):
        assert np.array_equal(split.images.numpy(), images)
        assert np.array_equal(split.labels.numpy(), labels)
        assert split.labels.dtype == torch.int64
        assert len(split.classes) == archive.source.classes
        assert split.name == archive.source.name


def refusal(archive: Small, root: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
        load_splits(archive.source.name, root, sources=[archive.source])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder"), [(source.name, folder) for source in ARCHIVES for folder in source.folders]
)
def test_archives_are_read_from_every_place(name: str, folder: str, tmp_path: Path) -> None:
    archive = small(name)
    archive.write(tmp_path / folder)
    before = sorted(tmp_path.rglob("*"))
    read(archive, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before, "reading unpacks nothing"


def test_the_table_is_that_of_the_official_files() -> None:
    assert NAMES == ["mnist", "fashion-mnist", "cifar10", "cifar100"]
    sums = [file.md5 for source in ARCHIVES for file in source.files]
    assert len(set(sums)) == 10
    assert all(len(md5) == 32 and int(md5, 16) for md5 in sums)
    assert [sum(file.size for file in source.files) for source in ARCHIVES] == [
        11594722,
        30878645,
        170052171,
        168513733,
    ]


def test_training_images_of_an_archive_are_standardised(tmp_path: Path) -> None:
    CIFAR.write(tmp_path)
    train = load_splits("cifar10", tmp_path, sources=[CIFAR.source]).train
    x = train.preparation(train.images)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


# Damage -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(data=st.data())
def test_every_cut_and_every_changed_byte_is_found(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = data.draw(st.sampled_from(MNIST.source.files))
    content = MNIST.contents[file.name]
    place = data.draw(st.integers(0, len(content) - 1))
    path = tmp_path_factory.mktemp("copy") / file.name
    path.write_bytes(content[:place])
    assert f"was cut short: it has {place:,} of {file.size:,} bytes" == damage(path, file)
    path.write_bytes(content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :])
    assert "is not the official file" in damage(path, file)
    path.write_bytes(content)
    assert damage(path, file) == ""


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_refused_with_a_cure(name: str, tmp_path: Path) -> None:
    archive = small(name)
    file = archive.source.files[0]
    path = archive.write(tmp_path) / file.name
    path.write_bytes(archive.contents[file.name][:-1])
    message = refusal(archive, tmp_path)
    assert f"{path} was cut short" in message
    assert f"run 'residuum data fetch {name} --data-root {tmp_path}'" in message
    path.write_bytes(archive.contents[file.name] + b"x")
    assert f"{path} is not the official file: its MD5 is" in refusal(archive, tmp_path)


def test_missing_files_are_refused_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not hold mnist .*; fetch it with 'residuum data fetch mnist"):
        find(MNIST.source, tmp_path)
    MNIST.write(tmp_path)
    (tmp_path / MNIST.source.files[3].name).unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels.* is missing beside the other files of mnist; run"):
        find(MNIST.source, tmp_path)


def test_files_of_another_set_with_the_same_names_are_not_taken(tmp_path: Path) -> None:
    small("fashion-mnist").write(tmp_path)
    assert "is not the official file" in refusal(MNIST, tmp_path) or "was cut short" in refusal(MNIST, tmp_path)


IMAGES, LABELS = (MNIST.source.files[i].name for i in (0, 1))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, MNIST.contents[IMAGES][:-50], "damaged or cut short"),
        (IMAGES, b"not gzip", "damaged or cut short"),
        (IMAGES, gzip.compress(idx(MNIST.images[0][:19, 0])), "is not an IDX file of 20 x 28 x 28 bytes"),
        (IMAGES, gzip.compress(idx(MNIST.images[0][:, 0])[:-1]), "is not an IDX file of 20 x 28 x 28 bytes"),
        (IMAGES, gzip.compress(idx(MNIST.images[0][:, 0]) + b"x"), "is not an IDX file of 20 x 28 x 28 bytes"),
        (IMAGES, gzip.compress(b""), "is not an IDX file"),
        (LABELS, gzip.compress(idx(np.full(20, 10, np.uint8))), r"labels must lie in 0\.\.9, got 10"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_idx_files_with_other_contents_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    archive = MNIST.holding(name, content)
    archive.write(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_splits("mnist", tmp_path, sources=[archive.source])


def cifar_tar(*, links: dict[str, str] | None = None, **changes: bytes | None) -> bytes:
    """CIFAR-10's archive with some members exchanged or left out."""
    members = cifar_members("cifar10", CIFAR.images, CIFAR.labels, 10)
    for key, content in changes.items():
        name = next(n for n in members if key in n)
        members = {n: c for n, c in members.items() if n != name} | ({} if content is None else {name: content})
    return tar(members, links=links)


TEST = "cifar-10-batches-bin/test_batch.bin"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (cifar_tar()[:-50], "damaged or cut short"),
        (cifar_tar()[:3000], "damaged or cut short"),
        (b"not a tar", "damaged or cut short"),
        (gzip.compress(b"not a tar" * 100), "damaged or cut short"),
        (cifar_tar(data_batch_3=None), r"does not hold cifar-10-batches-bin/data_batch_3\.bin"),
        (cifar_tar(data_batch_3=bytes(3073 * 4 - 1)), r"data_batch_3\.bin is not a file of the right size"),
        (cifar_tar(test_batch=None, links={TEST: "/etc/passwd"}), r"test_batch\.bin is not a file of the right size"),
        (cifar_tar(meta=bytes(1 << 17)), r"batches\.meta\.txt is not a file of the right size"),
        (cifar_tar(meta=b"one\ntwo\n"), "2 names of classes, there must be 10"),
        (cifar_tar(test_batch=b"\x0a" * 3073 * 10), r"labels must lie in 0\.\.9, got 10"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the bytes hold the time of day
)
def test_cifar_archives_with_other_contents_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    archive = CIFAR.holding(CIFAR.source.files[0].name, content)
    archive.write(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_splits("cifar10", tmp_path, sources=[archive.source])


def test_a_name_that_climbs_out_of_the_archive_is_passed_over(tmp_path: Path) -> None:
    members = cifar_members("cifar10", CIFAR.images, CIFAR.labels, 10) | {"../evil": b"x", "/evil": b"x"}
    archive = CIFAR.holding(CIFAR.source.files[0].name, tar(members))
    archive.write(tmp_path / "root")
    read(archive, tmp_path / "root")
    assert not list(tmp_path.rglob("evil"))


# Fetching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_files_are_fetched_once_into_the_cache(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    archive = small(name)
    with serving(archive.contents) as server:
        source = archive.at(f"{server.url}/whole")
        read(archive, None, source)
        read(archive, None, source)
        assert server.asked == [f"/whole/{file.name}" for file in source.files]
    assert {path.name for path in (tmp_path / "residuum" / name).iterdir()} == set(archive.contents)


FAILURES = {
    "short": (
        ValueError,
        "was cut short: it has .*; try again later, or put the official files of mnist into",
    ),
    "wrong": (ValueError, "is not the official file: its MD5 is"),
    "longer": (ValueError, "is not the official file: its MD5 is"),
    "missing": (OSError, "cannot fetch http.*: 404 Client Error.*; try again, or put the official files"),
    "breaks": (OSError, "cannot fetch http.*IncompleteRead.*; try again"),
    "stalls": (OSError, "cannot fetch http.*timed out.*; try again"),
}


@pytest.mark.parametrize("manner", FAILURES)
def test_a_failed_download_leaves_nothing_and_can_be_repeated(manner: str, tmp_path: Path) -> None:
    error, message = FAILURES[manner]
    with serving(MNIST.contents) as server:
        source = MNIST.at(f"{server.url}/whole")
        broken = replace(source.files[2], url=source.files[2].url.replace("/whole/", f"/{manner}/"))
        files = (*source.files[:2], broken, source.files[3])
        with pytest.raises(error, match=message) as caught:
            fetch_source(replace(source, files=files), tmp_path, timeout=0.3)
        assert "\n" not in str(caught.value)
        complete = {file.name for file in source.files[:2]}
        assert {path.name for path in (tmp_path / "mnist").iterdir()} == complete
        server.asked.clear()
        fetch_source(source, tmp_path)
        assert server.asked == [f"/whole/{file.name}" for file in source.files[2:]], "what is there is kept"
    read(MNIST, tmp_path)


def test_no_server_at_all(tmp_path: Path) -> None:
    with serving({}) as server:
        pass
    with pytest.raises(OSError, match=r"cannot fetch .*; try again, or put the official files of mnist"):
        fetch_source(MNIST.at(server.url), tmp_path, timeout=0.3)


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    MNIST.write(tmp_path / "mnist")
    (tmp_path / "mnist" / LABELS).write_bytes(b"half")
    with serving(MNIST.contents) as server:
        assert fetch_source(MNIST.at(f"{server.url}/whole"), tmp_path) == tmp_path / "mnist"
        assert server.asked == [f"/whole/{LABELS}"]
    read(MNIST, tmp_path)


def test_fetching_leaves_files_of_other_sets_alone(tmp_path: Path) -> None:
    other = small("fashion-mnist")
    other.write(tmp_path)
    with serving(MNIST.contents) as server:
        fetch_source(MNIST.at(f"{server.url}/whole"), tmp_path)
    read(MNIST, tmp_path)
    read(other, tmp_path)


@pytest.mark.slow
def test_a_download_that_is_killed_leaves_nothing_that_is_taken_for_the_file(tmp_path: Path) -> None:
    with serving(MNIST.contents) as server:
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from archivefiles import small\n"
            "from residuum.data.fetching import fetch\n"
            "from pathlib import Path\n"
            "fetch(small('mnist').at(sys.argv[2]), Path(sys.argv[3]))"
        )
        here = str(Path(__file__).parent)
        child = subprocess.Popen([sys.executable, "-c", code, here, f"{server.url}/stalls", str(tmp_path)])
        try:
            assert server.half_sent.wait(60)
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        assert not (tmp_path / "mnist" / IMAGES).exists()
        fetch_source(MNIST.at(f"{server.url}/whole"), tmp_path)
    read(MNIST, tmp_path)


# Names ------------------------------------------------------------------------------------------------------------


def test_the_list_says_what_is_here(tmp_path: Path) -> None:
    sources = [small(name).source for name in NAMES]
    assert [entry.place for entry in entries(tmp_path, sources=sources)] == ["comes with scikit-learn", "", "", "", ""]
    MNIST.write(tmp_path / "MNIST" / "raw")
    digits, mnist, *_, cifar100 = entries(tmp_path, sources=sources)
    assert mnist.place == str(tmp_path / "MNIST" / "raw")
    assert (mnist.shape, mnist.train, mnist.test, mnist.classes) == ((28, 28, 1), *COUNTS, 10)
    assert (cifar100.shape, cifar100.classes, cifar100.place) == ((32, 32, 3), 100, "")
    train, test = load_splits("digits")
    assert (digits.train, digits.test, digits.shape) == (len(train), len(test), (8, 8, 1))
    text = listing(tmp_path, sources=sources)
    assert all(name in text for name in (*NAMES, "digits", "FILE.npz", "FILE.txt"))
    (tmp_path / "MNIST" / "raw" / IMAGES).write_bytes(b"half")
    assert entries(tmp_path, sources=sources)[1].place == ""


def test_fetching_by_name(tmp_path: Path) -> None:
    with serving(MNIST.contents) as server:
        assert fetch("mnist", tmp_path, sources=[MNIST.at(f"{server.url}/whole")]) == tmp_path / "mnist"
    with pytest.raises(ValueError, match="digits come with scikit-learn"):
        fetch("digits")
    with pytest.raises(ValueError, match="unknown archive 'minst'; did you mean 'mnist'"):
        fetch("minst")


def test_names_and_roots_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a data root \(.*\) is for mnist, .*, not for digits"):
        load("digits", split="test", root=tmp_path)
    with pytest.raises(ValueError, match=r"play\.txt is text, for language models; images are needed: digits, mnist"):
        load_splits("play.txt")
    with pytest.raises(ValueError, match="unknown data 'cifar'; did you mean 'cifar10' or 'cifar100'"):
        load_splits("cifar")
