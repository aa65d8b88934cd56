"""The table of all runs is what the folders say, whatever the index says; and what `residuum runs` makes of it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from residuum import runfolders, runindex
from residuum.cli import main
from residuum.descriptions import described
from residuum.layers.coupling import Coupling
from residuum.models import ResNetConfig
from residuum.runindex import INDEX, row_of, table, where
from residuum.runs import DataConfig, Run, execute
from residuum.runscreen import _varying
from residuum.training import TrainConfig

BASE = Run(
    ResNetConfig(blocks=(1, 2), widths=(4, 4), channels=1, alike=1.0),
    DataConfig("digits", train=40, test=20),
    TrainConfig(epochs=1, batch=20),
    probes=("perturbation",),
)
COUPLED = replace(BASE, training=replace(BASE.training, coupling=Coupling(0.5)))
DEEPER = replace(BASE, model=replace(BASE.model, blocks=(2, 1)), seed=1)
WILD = replace(BASE, training=TrainConfig(epochs=1, batch=20, lr=1e30))
HALF = replace(BASE, seed=7)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three complete runs, a failed one and a half one."""
    out = tmp_path_factory.mktemp("study") / "out"
    for run in (BASE, COUPLED, DEEPER, WILD):
        with suppress(FloatingPointError):
            execute(run, out)
    folder = out / "runs" / HALF.key
    runfolders.begin(folder, HALF.key, HALF.describe(), described(HALF))
    return out


@pytest.fixture
def out(study: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(study, tmp_path / "out"))


def test_a_row_says_what_the_files_say(study: Path) -> None:
    frame = table(study)
    assert sorted(frame["key"]) == sorted(run.key for run in (BASE, COUPLED, DEEPER, WILD, HALF))
    row, folder = row_of(frame, DEEPER.key), study / "runs" / DEEPER.key
    assert (row["state"], row["kind"], row["seed"], row["model.blocks"]) == ("complete", "network", 1, "[2, 1]")
    assert (row["training.rate"], row["training.rate.at"]) == ("Steps", "[[0.5, 0.1], [0.75, 0.01]]")
    history = json.loads((folder / "history.json").read_text())
    assert row["history.test_accuracy"] == history[-1]["test_accuracy"]
    distance = json.loads((folder / "indices.json").read_text())["measured"]["scaled_distance"]
    assert row["indices.measured.scaled_distance.network"] == distance["network"]
    assert [row[f"indices.measured.scaled_distance.sections.{s}"] for s in (0, 1)] == distance["sections"]
    assert row["seconds"] == json.loads((folder / "done.json").read_text())["seconds"]
    assert row_of(frame, COUPLED.key)["training.coupling.strength"] == 0.5
    assert pd.isna(row["training.coupling.strength"])
    wild = row_of(frame, WILD.key)
    assert wild["state"] == "failed"
    assert wild["error"].startswith("not finite: FloatingPointError: the loss is")
    assert row_of(frame, HALF.key)["state"] == "half"
    assert not any("unnamed" in name.lower() or name.startswith("_") for name in frame.columns)


def change(what: str, out: Path) -> None:
    """One thing that happens to a folder of runs between two looks at it."""
    base = out / "runs" / BASE.key
    if what == "more":
        execute(replace(COUPLED, training=replace(COUPLED.training, coupling=Coupling((0.5, 1.0)))), out)
    elif what == "gone":
        shutil.rmtree(base)
    elif what == "damaged":
        (base / "weights.safetensors").write_bytes(b"x")
    elif what == "complete":
        execute(HALF, out)
    elif what == "index gone":
        (out / INDEX).unlink()
    elif what == "index damaged":
        (out / INDEX).write_bytes((out / INDEX).read_bytes()[:-7])
    elif what == "index foreign":
        pd.DataFrame({"a": [1]}).to_parquet(out / INDEX)
    elif what == "set aside":
        base.rename(base.with_name(f"{BASE.key}.damaged-1"))
    elif what == "log":
        runfolders.log(base, "read")


@pytest.mark.parametrize(
    "what",
    [
        "nothing",
        "more",
        "gone",
        "damaged",
        "complete",
        "index gone",
        "index damaged",
        "index foreign",
        "set aside",
        "log",
    ],
)
def test_the_index_says_what_the_folders_say(what: str, out: Path) -> None:
    table(out)
    change(what, out)
    found = table(out)
    pd.testing.assert_frame_equal(found, table(out), check_like=False)
    pd.testing.assert_frame_equal(found, table(out, rebuild=True), check_like=True)
    states = {"damaged": "damaged", "complete": "complete"}
    if what in states:
        assert row_of(found, (BASE if what == "damaged" else HALF).key)["state"] == states[what]


def test_only_what_has_changed_is_read(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = runindex._row
    monkeypatch.setattr(runindex, "_row", lambda folder: read.append(folder.name) or original(folder))
    table(out, rebuild=True)
    assert len(read) == 5
    del read[:]
    table(out)
    runfolders.log(out / "runs" / BASE.key, "a line")
    table(out)
    assert not read
    execute(HALF, out)
    table(out)
    assert read == [HALF.key]
    monkeypatch.setattr(runindex, "_VERSION", 99)
    table(out)
    assert len(read) == 6, "rows of another version of the index"


def test_damage_that_keeps_size_and_time_is_found_by_a_rebuild(out: Path) -> None:
    table(out)
    path = out / "runs" / BASE.key / "weights.safetensors"
    content, times = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert row_of(table(out), BASE.key)["state"] == "complete"
    row = row_of(table(out, rebuild=True), BASE.key)
    assert (row["state"], row["error"]) == ("damaged", "weights.safetensors is not what was written")


def test_a_file_that_goes_while_one_looks_is_passed_over(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep writes its checkpoints under temporary names."""
    folder = out / "runs" / HALF.key
    before, real = table(out), os.scandir

    @contextmanager
    def listed_too_late(path: Path) -> Iterator[list[os.DirEntry[str]]]:
        if path == folder:
            (folder / ".partial-x").touch()
        with real(path) as entries:
            found = list(entries)
        (folder / ".partial-x").unlink(missing_ok=True)
        yield found

    monkeypatch.setattr(os, "scandir", listed_too_late)
    pd.testing.assert_frame_equal(table(out), before)


def test_runs_that_nobody_may_write_are_still_read(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError("denied")

    (out / INDEX).unlink(missing_ok=True)
    monkeypatch.setattr(runindex, "write_atomically", denied)
    assert len(table(out)) == 5
    assert not (out / INDEX).exists()


@pytest.mark.parametrize(
    ("condition", "runs"),
    [
        ("state=complete", {BASE, COUPLED, DEEPER}),
        ("state==complete", {BASE, COUPLED, DEEPER}),
        ("strength == 0.5", {COUPLED}),
        (" state != complete", {WILD, HALF}),
        ("seed=0", {BASE, COUPLED, WILD}),
        ("seed>=1", {DEEPER, HALF}),
        ("seed<1", {BASE, COUPLED, WILD}),
        ("lr>1", {WILD}),
        ("blocks=[2,1]", {DEEPER}),
        ("model.blocks!=[2, 1]", {BASE, COUPLED, WILD, HALF}),
        ("strength=none", {BASE, DEEPER, WILD, HALF}),
        ("strength<=0.5", {COUPLED}),
        ("coupling=Coupling", {COUPLED}),
        ("bias=false", {BASE, COUPLED, DEEPER, WILD, HALF}),
        ("bias=true", set()),
        ("test_accuracy<=1", {BASE, COUPLED, DEEPER}),
        ("error!=none", {WILD}),
    ],
)
def test_conditions(condition: str, runs: set[Run], study: Path) -> None:
    assert set(where(table(study), condition)["key"]) == {run.key for run in runs}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--where", "sed=1"], "unknown column 'sed'; did you mean 'seed'"),
        (["--where", "seed"], "where 'seed': give COLUMN=VALUE"),
        (["--where", "state=<complete"], "where 'state=<complete': give COLUMN=VALUE, or with != < <= > >="),
        (["--where", "seed===1"], "where 'seed===1': give COLUMN=VALUE"),
        (["--where", "state>complete"], "are no numbers; use = or !="),
        (["--where", "sections.0=1"], "column 'sections.0' can be indices."),
        (["--where", "stem>none"], "none is neither small nor large"),
        (["--compare", "zz", "a"], "0 of 5 runs have a key that begins with 'zz'"),
        (["--compare", "", "a"], "5 of 5 runs have a key that begins with ''"),
        (["--csv", "x", "--parquet", "./x"], "--csv and --parquet are both x; give two files"),
        (["--csv", "OLD"], "exists; choose another file, or replace it with --force"),
    ],
)
def test_what_is_wrong_is_refused(
    arguments: list[str], message: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").touch()
    given = [str(tmp_path / "old") if argument == "OLD" else argument for argument in arguments]
    assert main(["runs", str(out), *given]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 2
    assert "is no folder of runs: it has no folder 'runs'" in capsys.readouterr().err


def test_the_screen_shows_what_differs(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["runs", str(study)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("5 runs: 3 complete, 1 ")
    assert "blocks" in lines[1]
    assert "coupling" in lines[1]
    assert "seed" in lines[1]
    assert "widths" not in lines[1], "equal in all"
    assert max(map(len, lines[:7])) <= 100
    assert f"{WILD.key[:8]} failed: not finite: FloatingPointError: the loss is" in lines[-1]
    assert main(["runs", str(study), "--where", "state=complete", "blocks=[2,1]"]) == 0
    assert capsys.readouterr().out.startswith("1 of 5 runs: 1 complete\n")
    assert main(["runs", str(study), "--where", "seed=99"]) == 0
    assert capsys.readouterr().out == "0 of 5 runs\n"
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["runs", str(study)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:7])) <= 40
    assert any(line.startswith("no room for ") and "history.test_loss" in line for line in lines)


def test_each_difference_is_shown_once() -> None:
    """Coupled or not is said by the strengths; what all coupled runs have in common is not said."""
    columns = {
        "training.coupling": ["Coupling", "Coupling", None],
        "training.coupling.strength": [0.5, 1.0, None],
        "training.coupling.couple": ["weights", "weights", None],
        "training.epochs": [1, 1, 1],
        "data.train": [None, 5, 5],
        "history.test_loss": [1.0, 2.0, 3.0],
    }
    assert _varying(pd.DataFrame(columns)) == ["training.coupling.strength", "data.train"]


def test_two_runs_side_by_side(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(study), "--compare", BASE.key[:6], DEEPER.key]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model.blocks", "[1,", "2]", "[2,", "1]"] in rows
    assert ["seed", "0", "1", "+1"] in rows
    accuracy = [table(study).set_index("key").loc[run.key, "history.test_accuracy"] for run in (BASE, DEEPER)]
    assert any(row[:1] == ["history.test_accuracy"] for row in rows) == (accuracy[0] != accuracy[1])
    assert not any("sections" in word for row in rows for word in row)
    assert any(row[:4] == ["the", "same", "in", "both:"] for row in rows)


def test_exports_hold_every_column(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / name) for name in ("runs.csv", "runs.parquet")]
    assert main(["runs", str(study), "--where", "state=complete", "--csv", files[0], "--parquet", files[1]]) == 0
    assert "3 runs, " in capsys.readouterr().out
    frame = where(table(study), "state=complete").reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_parquet(files[1]).reset_index(drop=True), frame)
    text = pd.read_csv(files[0], dtype={"key": str})
    assert list(text.columns) == list(frame.columns)
    assert text["history.test_loss"].tolist() == frame["history.test_loss"].tolist()
