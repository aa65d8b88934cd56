"""Whatever stops a run or damages its folder: nothing finished is lost or repeated, and numbers are the same."""

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import residuum.files
from residuum import checkpoints, runfolders
from residuum.descriptions import key_of
from residuum.files import write_json
from residuum.jobs import Settings
from residuum.models import ResNetConfig
from residuum.progress import Bar, quiet
from residuum.runfolders import locked, stand
from residuum.runs import DataConfig, Finished, Run, execute, finished
from residuum.training import TrainConfig

TINY = Run(
    ResNetConfig(blocks=(1, 1), widths=(4, 4), channels=1),
    DataConfig("digits", train=60, test=20),
    TrainConfig(epochs=2, batch=20),
    probes=("state_norm",),
)


@dataclass(frozen=True)
class Note:
    """The smallest job: writes its number, or raises what a test asks for."""

    number: int = 0
    kind: ClassVar[str] = "note"
    done: ClassVar[list[int]] = []
    raises: ClassVar[Exception | None] = None

    def describe(self) -> dict[str, Any]:
        return {"kind": "note", "format": 1, "number": self.number}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "Note":
        return cls(description["number"])

    @property
    def key(self) -> str:
        return key_of(self.describe())

    def execute(self, folder: Path, settings: Settings, progress: Bar) -> None:
        if self.raises:
            raise self.raises
        self.done.append(self.number)
        write_json(folder / "values.json", {"number": self.number})


@pytest.fixture(autouse=True)
def _nothing_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Note, "done", [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The run as it is when nothing stops it."""
    return execute(TINY, tmp_path_factory.mktemp("whole") / "out")


def same(found: Finished, whole: Finished) -> None:
    """The same bits, but for times."""
    for name in ("weights.safetensors", "indices.json"):
        assert (found.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    for name in ("profile", "initial"):
        ours, theirs = found.profile(name), whole.profile(name)
        assert torch.equal(ours.examples, theirs.examples)
        assert ours.measures.keys() == theirs.measures.keys()
        for quantity, measure in ours.measures.items():
            assert torch.equal(measure.values, theirs.measures[quantity].values), (name, quantity)
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.history] for run in (found, whole)]
    assert rows[0] == rows[1]


def stopping(step: int, stop: Callable[[], None]) -> Bar:
    """A progress bar that stops the run when so many steps of training are done."""
    steps = 0

    @contextmanager
    def bar(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        def show(done: int, text: str) -> None:
            nonlocal steps
            steps += title == "training" and "loss" in text
            if steps == step:
                stop()

        yield show

    return bar


class Stopped(BaseException):
    """As a process that is killed: nothing can catch it."""


def kill() -> None:
    raise Stopped


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [1, 2, 4, 5])
@pytest.mark.parametrize("stop", [kill, ctrl_c])
def test_a_half_run_goes_on_and_ends_with_the_same_bits(
    step: int, stop: Callable[[], None], tmp_path: Path, whole: Finished
) -> None:
    """Six steps in two epochs: in the first step, inside either epoch."""
    with pytest.raises((Stopped, KeyboardInterrupt)):
        execute(TINY, tmp_path / "out", progress=stopping(step, stop))
    folder = tmp_path / "out" / "runs" / TINY.key
    assert stand(folder).state == "half"
    assert finished(TINY, tmp_path / "out") is None
    # Ctrl-C ends the step and writes it; a killed run has what it wrote after the last epoch.
    assert (folder / "checkpoint").exists() == (stop is ctrl_c or step > 3)
    same(execute(TINY, tmp_path / "out"), whole)
    assert not (folder / "checkpoint").exists()


def test_half_written_results_are_written_again(
    tmp_path: Path, whole: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it measures: the training is complete and not repeated."""
    from residuum import runs

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_findings", lambda *_: kill())
        with pytest.raises(Stopped):
            execute(TINY, tmp_path / "out")
    (tmp_path / "out" / "runs" / TINY.key / ".partial-00000000-indices.json").write_text("{")
    steps = []
    bar = stopping(1, lambda: steps.append(1))
    same(execute(TINY, tmp_path / "out", progress=bar), whole)
    assert not steps
    assert not list((tmp_path / "out").rglob(".partial-*"))


def test_the_checkpoint_goes_last(tmp_path: Path, whole: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before done.json is there: what was trained is not lost."""
    folder = tmp_path / "out" / "runs" / TINY.key
    with monkeypatch.context() as patch:
        patch.setattr(
            runfolders,
            "write_json",
            lambda path, value: kill() if path.name == "done.json" else write_json(path, value),
        )
        with pytest.raises(Stopped):
            execute(TINY, tmp_path / "out")
    assert (folder / "checkpoint").exists()
    same(execute(TINY, tmp_path / "out"), whole)


def test_a_checkpoint_that_would_end_otherwise_is_not_used(
    tmp_path: Path, whole: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made on another machine, which rounds otherwise; and one that is no checkpoint."""
    folder = tmp_path / "out" / "runs" / TINY.key
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_processor", lambda: "another")
        with pytest.raises(KeyboardInterrupt):
            execute(TINY, tmp_path / "out", progress=stopping(4, ctrl_c))
    same(execute(TINY, tmp_path / "out"), whole)
    assert "begins anew: " in (folder / "log.txt").read_text()
    assert "device: another there" in (folder / "log.txt").read_text()
    (folder / "done.json").unlink()
    (folder / "checkpoint").write_bytes(b"nothing of ours")
    same(execute(TINY, tmp_path / "out"), whole)


def full(at: int, replace_file: Callable) -> Callable:
    """`os.replace` on a disk that is full when a file is to appear for the nth time."""
    count = 0

    def replaced(*paths: Any) -> None:
        nonlocal count
        count += 1
        if count >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(*paths)

    return replaced


def stopped_by_a_full_disk(at: int, out: Path, whole: Finished, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the disk was full at the nth file; then there is room, and the run goes on."""
    with monkeypatch.context() as patch:
        patch.setattr(residuum.files.os, "replace", full(at, os.replace))
        with suppress(OSError):
            execute(TINY, out)
            return False
    assert stand(out / "runs" / TINY.key).state in ("absent", "half")
    same(execute(TINY, out), whole)
    return True


@pytest.mark.parametrize("at", [1, 2, 4, 9])
def test_a_full_disk_loses_nothing(at: int, tmp_path: Path, whole: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stopped_by_a_full_disk(at, tmp_path / "out", whole, monkeypatch)


@pytest.mark.slow
def test_a_full_disk_at_any_file_loses_nothing(
    tmp_path: Path, whole: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = next(n for n in range(40) if not stopped_by_a_full_disk(n + 1, tmp_path / str(n), whole, monkeypatch))
    assert files == 14, "the mark, run.json, 2 checkpoints, 9 results, done.json"


def damages(folder: Path) -> Iterator[tuple[str, Callable[[Path], None], str]]:
    """Every file of a complete run with every damage, and what is said of it."""

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    for path in sorted(folder.iterdir()):
        if path.name in ("log.txt", "done.json"):
            continue
        yield path.name, cut, rf"{path.name} has \d+ bytes instead of \d+"
        yield path.name, flip, f"{path.name} is not what was written"
        yield path.name, Path.unlink, f"{path.name} is missing"
    yield "done.json", flip, "done.json is not what was written"
    yield "done.json", lambda path: path.write_text("{}"), "done.json is not what was written"
    yield "done.json", lambda path: path.write_text("[]"), "done.json is not what was written"


def test_every_damage_is_found(whole: Finished) -> None:
    import re

    tried = 0
    for name, damage, said in damages(whole.folder):
        path = whole.folder / name
        content = path.read_bytes()
        damage(path)
        found = stand(whole.folder)
        path.write_bytes(content)
        assert found.state == "damaged", (name, damage)
        assert re.fullmatch(said, found.reason)
        tried += 1
    assert tried == 3 * 10 + 3
    assert stand(whole.folder).state == "complete"


def test_every_changed_byte_of_done_is_found_unless_it_says_the_same(tmp_path: Path) -> None:
    """Numbers in it are read by others, so they are protected, too."""
    folder = execute(Note(), tmp_path / "out").folder
    content = (folder / "done.json").read_bytes()
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 1
        (folder / "done.json").write_bytes(changed)
        if stand(folder).state == "complete":
            assert json.loads(changed) == json.loads(content)


def test_a_damaged_run_is_set_aside_and_done_again(tmp_path: Path, whole: Finished) -> None:
    out, name = tmp_path / "out", "weights.safetensors"
    for number in (1, 2):
        folder = execute(TINY, out).folder
        (folder / name).write_bytes(b"damaged")
        assert finished(TINY, out) is None
        same(execute(TINY, out), whole)
        aside = folder.with_name(f"{TINY.key}.damaged-{number}")
        assert (aside / name).read_bytes() == b"damaged"
        assert f"{name} has 7 bytes instead of" in (folder / "log.txt").read_text()
        assert f"set aside in {aside.name}" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (ValueError("no such\nthing"), "failed", "raised: ValueError: no such thing"),
        (FloatingPointError("diverged"), "failed", "not finite: FloatingPointError: diverged"),
        (OSError(errno.EIO, "no disk"), "half", r"place: OSError: [Errno 5] no disk"),
    ],
)
def test_a_run_that_raises_says_so_and_is_tried_again(
    error: Exception, state: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out" / "runs" / Note().key
    with monkeypatch.context() as patch:
        patch.setattr(Note, "raises", error)
        with pytest.raises(type(error)):
            execute(Note(), tmp_path / "out")
    assert (stand(folder).state, stand(folder).reason) == (state, said)
    assert said in (folder / "log.txt").read_text()
    assert execute(Note(), tmp_path / "out").values == {"number": 0}
    assert stand(folder) == runfolders.Standing("complete")


def test_divergence_is_a_failure(tmp_path: Path) -> None:
    wild = replace(TINY, training=TrainConfig(epochs=2, batch=20, lr=1e30), probes=())
    with pytest.raises(FloatingPointError):
        execute(wild, tmp_path / "out")
    found = stand(tmp_path / "out" / "runs" / wild.key)
    assert found.state == "failed"
    assert found.reason.startswith("not finite: FloatingPointError: the loss is")


def test_results_of_another_format_are_kept_and_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(Note(), tmp_path / "out")
    folder = tmp_path / "out" / "runs" / Note().key
    monkeypatch.setattr(runfolders, "FORMAT", 2)
    assert stand(folder).reason == "written in format 1; this code reads 2"
    assert finished(Note(), tmp_path / "out") is None
    execute(Note(), tmp_path / "out")
    assert Note.done == [0, 0]
    assert (folder.with_name(f"{folder.name}.damaged-1") / "values.json").is_file()


def test_results_of_another_version_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runfolders, "__version__", "0.0.9")
    execute(Note(), tmp_path / "out")
    monkeypatch.undo()
    assert finished(Note(), tmp_path / "out").values == {"number": 0}


def test_other_peoples_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"mine holds other files \(thesis.tex\), not runs; choose"):
        execute(Note(), tmp_path / "mine")
    with pytest.raises(NotADirectoryError, match=r"thesis.tex is a file, so there can be no runs in .*thesis.tex/out"):
        execute(Note(), tmp_path / "mine" / "thesis.tex" / "out")
    execute(Note(), tmp_path / "out")
    other = tmp_path / "out" / "runs" / Note(1).key
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(ValueError, match=rf"is not of the run {Note(1).key}: it holds thesis.tex; move it away"):
        execute(Note(1), tmp_path / "out")
    (tmp_path / "out" / "runs" / Note().key).rename(tmp_path / "out" / "runs" / Note(2).key)
    (tmp_path / "out" / "runs" / Note(2).key / "done.json").unlink()
    with pytest.raises(ValueError, match=rf"is not of the run {Note(2).key}"):
        execute(Note(2), tmp_path / "out")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(residuum.files.os, "replace", denied)
        with pytest.raises(PermissionError, match=r"out cannot be written \(Permission denied\); choose another"):
            execute(Note(), tmp_path / "out")
    execute(Note(), tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for a user without rights; the tests may run as root
    with pytest.raises(PermissionError, match="cannot be written"):
        execute(Note(1), tmp_path / "out")


def count(path: Path, times: int) -> None:
    """Add 1 to the number in a file, so often, under its lock."""
    for _ in range(times):
        with locked(path) as held:
            assert held
            path.write_text(str(int(path.read_text()) + 1))


def test_one_process_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("0")
    others = [multiprocessing.get_context("fork").Process(target=count, args=(path, 200)) for _ in range(3)]
    for other in others:
        other.start()
    count(path, 200)
    for other in others:
        other.join()
    assert path.read_text() == "800"
    assert [file.name for file in tmp_path.iterdir()] == ["count"]


def test_a_lock_that_is_held_is_not_waited_for(tmp_path: Path) -> None:
    with locked(tmp_path / "x"):
        with locked(tmp_path / "x", wait=False) as held:
            assert not held
        assert (tmp_path / "x.lock").exists(), "who did not get it does not remove it"
    with locked(tmp_path / "x", wait=False) as held:
        assert held


def test_a_complete_run_is_not_touched(tmp_path: Path) -> None:
    folder = execute(Note(), tmp_path / "out").folder
    (folder / "checkpoint").touch()  # killed between done.json and its removal
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    execute(Note(), tmp_path / "out", progress=quiet)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert after == {name: time for name, time in before.items() if name != "checkpoint"}
    assert Note.done == [0]
