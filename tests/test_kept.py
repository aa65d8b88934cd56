"""Kept runs: they give the verdicts and figures of the runs themselves, are small, and say when they are damaged."""

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from datafiles import write_npz
from residuum import experiments, reproducescreen
from residuum.claims import NOT_RUN, at_most, judge
from residuum.cli import main
from residuum.effects import mean_over
from residuum.experiments.p0 import UNTRAINED
from residuum.experiments.p0_runs import FREE, SETS, of_cell
from residuum.experiments.p0_verdicts import AWAY
from residuum.experiments.p3_runs import PAPER
from residuum.files import stored
from residuum.kept import keep, rounded, unpack
from residuum.reproduce import check_alike, choose, files_read, keep_runs, kept_runs, stand_ins
from residuum.runs import Finished, Run, execute
from worlds import as_the_paper, make

ROOT = Path(__file__).parents[1]
P2 = experiments.study("p2", "tiny")


def npz(path: Path) -> Path:
    """20 + 20 grey images of 10 classes."""
    images, labels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8), np.arange(20) % 10
    arrays = {f"{part}_{name}": a for part in ("train", "test") for name, a in (("images", images), ("labels", labels))}
    return write_npz(path, **arrays, classes=np.array([str(i) for i in range(10)]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that is finished, by its files: its numbers are those of a law."""
    run = choose("tiny", ["p2-1"]).jobs[0]
    return make([run], tmp_path_factory.mktemp("made"), as_the_paper)[run.key]


def test_a_kept_run_holds_what_is_read_of_it(made: Finished, tmp_path: Path) -> None:
    path = tmp_path / "kept" / "p2" / "run.zip"
    quantities = dict.fromkeys(("profile", "initial", "train"), ("scaled_perturbation", "nothing"))
    keep(made, path, quantities)
    found = unpack(path, tmp_path / "there", quantities)
    assert found.job == made.job
    assert found.job.key == made.job.key
    assert (found.history, found.indices) == (made.history, made.indices)
    assert found.provenance == {"versions": made.provenance["versions"]}
    for name in ("profile", "initial"):
        before, after = made.profile(name), found.profile(name)
        assert list(after.measures) == ["scaled_perturbation"]
        torch.testing.assert_close(
            after.measures["scaled_perturbation"].values,
            before.measures["scaled_perturbation"].values,
            rtol=2**-12,
            atol=0,
        )
        assert (after.sections, after.lengths) == (before.sections, before.lengths)
    with pytest.raises(ValueError, match=r"has no train.safetensors"):
        found.profile("train")


def test_a_real_run_on_a_file_is_kept_without_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    asked = choose("tiny", ["p2-1"]).jobs[0]
    asked = replace(asked, data=replace(asked.data, train=20, test=20))
    (run,) = stand_ins([asked], {"digits": npz(tmp_path / "mine" / "images.npz")}).values()
    assert isinstance(run, Run)
    finished = execute(run, tmp_path / "out")
    keep(finished, tmp_path / "run.zip", P2.quantities)
    found = unpack(tmp_path / "run.zip", tmp_path / "there", P2.quantities)
    assert found.job.key == run.key
    text = b"".join(path.read_bytes() for path in (tmp_path / "there").iterdir())
    assert str(tmp_path).encode() not in text
    assert b"images.npz" in text
    assert not list((tmp_path / "there").glob("*weights*"))
    assert found.provenance["data_sha256"] == run.data.sha256


def test_values_are_rounded_to_the_nearest() -> None:
    values = torch.tensor([[0.0, 1.0, -4095.0, torch.inf, torch.nan, torch.pi, -1e-30, 3.4028235e38]])
    found = rounded(values)
    torch.testing.assert_close(found, values, rtol=2**-12, atol=0, equal_nan=True)
    torch.testing.assert_close(found[0, :4], values[0, :4], rtol=0, atol=0)  # such numbers have at most 12 digits
    assert (found[:, :-1].view(torch.int32) % 4096 == 0).all()
    torch.testing.assert_close(rounded(found), found, rtol=0, atol=0, equal_nan=True)
    undefined = torch.tensor([[0x7FFFFFFF, -1, 0x7F800001]], dtype=torch.int32).view(torch.float32)
    assert rounded(undefined).isnan().all()


def test_examples_are_kept_by_their_values(tmp_path: Path) -> None:
    example = replace(PAPER["sine"], depth=1, epochs=1, batch=50)
    finished = execute(example, tmp_path / "out")
    keep(finished, tmp_path / "run.zip", {})
    found = unpack(tmp_path / "run.zip", tmp_path / "there", {})
    assert found.job == example
    assert found.values == finished.values
    before, after = (stored(example.trained(run.folder)) for run in (finished, found))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))


def no_zip(path: Path) -> None:
    path.write_text("results")


def stranger(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../outside.txt", "gone")


def rewritten(path: Path, change: Callable[[dict], None]) -> None:
    """The same with another run.json."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    about = json.loads(files["run.json"])
    change(about)
    files["run.json"] = json.dumps(about).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def twice(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("history.json", "[]")


def less(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        about = archive.read("run.json")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("run.json", about)


def no_object(path: Path) -> None:
    rewritten(path, lambda about: about.update(description=None))


def odd_seed(path: Path) -> None:
    rewritten(path, lambda about: about["description"].update(seed="x"))


def odd_training(path: Path) -> None:
    rewritten(path, lambda about: about["description"].update(training=5))


def other_seed(path: Path) -> None:
    rewritten(path, lambda about: about["description"].update(seed=77))


def other_kind(path: Path) -> None:
    rewritten(path, lambda about: about["description"].update(kind="spell"))


def strange_field(path: Path) -> None:
    rewritten(path, lambda about: about["description"]["model"].update(colour="red"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "not a zip file"),
        (flip, ""),
        (no_zip, "not a zip file"),
        (stranger, r"holds '\.\./outside\.txt'"),
        (other_seed, "but describes"),
        (other_kind, "spell"),
        (twice, "each file once"),
        (less, "it holds"),
        (no_object, ""),
        (odd_seed, ""),
        (odd_training, ""),
        (strange_field, "has no 'colour'"),
    ],
)
def test_damaged_files_are_refused(
    damage: Callable[[Path], None], message: str, made: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kept" / "p2" / f"{made.job.key}.zip"
    keep(made, path, P2.quantities)
    damage(path)
    with pytest.raises(ValueError, match=rf"{made.job.key}\.zip is no kept run, or is damaged: .*{message}"):
        unpack(path, tmp_path / "there", P2.quantities)
    assert not (tmp_path / "there").exists()
    arguments = ["p2-1", "--check", "--scale", "tiny", "--out", str(tmp_path / "o"), "--kept", str(tmp_path / "kept")]
    assert main(["reproduce", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.rglob("claims.json"))
    assert not (tmp_path / "outside.txt").exists()


def test_a_file_under_the_name_of_another_run_is_refused(made: Finished, tmp_path: Path) -> None:
    other = choose("tiny", ["p2-1"]).jobs[1]
    keep(made, tmp_path / "p2" / f"{other.key}.zip", P2.quantities)
    with pytest.raises(ValueError, match=f"is the run {made.job.key}, not {other.key}; move it away"):
        kept_runs([P2], stand_ins(P2.jobs, {}), tmp_path, tmp_path / "there")


def test_what_was_kept_for_another_study_is_refused(made: Finished, tmp_path: Path) -> None:
    path = tmp_path / "p2" / f"{made.job.key}.zip"
    keep(made, path, P2.quantities | {"train": ("loss",)})
    with pytest.raises(ValueError, match="was kept for another version of its study: remove it"):
        kept_runs([P2], stand_ins(P2.jobs, {}), tmp_path, tmp_path / "there")


def test_runs_on_a_file_are_found_without_the_file(tmp_path: Path) -> None:
    choice = choose("small", ["p2-cifar10-error-depth"])
    file = npz(tmp_path / "c.npz")
    jobs = stand_ins(choice.jobs, {"cifar10": file})
    runs = make(list(jobs.values()), tmp_path / "made", as_the_paper)
    results = {key: runs[job.key] for key, job in jobs.items()}
    assert keep_runs(choice.studies, results, tmp_path / "kept") == len(jobs)
    assert keep_runs(choice.studies, results, tmp_path / "kept") == 0  # each once
    said = files_read(choice.jobs, results)
    assert said == [f"cifar10 is read from c.npz, SHA-256 {next(iter(jobs.values())).data.sha256}."]
    (study,) = (study for study in choice.studies if study.paper == "p2")
    here = stand_ins(study.jobs, {"cifar10": write_npz(tmp_path / "d.npz")})
    with pytest.raises(
        ValueError, match=r"read c\.npz, SHA-256 .*; cifar10 is given as d\.npz, SHA-256 .*: give that file"
    ):
        kept_runs([study], here, tmp_path / "kept", tmp_path / "other")
    file.unlink()
    found = kept_runs([study], stand_ins(study.jobs, {}), tmp_path / "kept", tmp_path / "there")
    assert {key: run.job.key for key, run in found.items()} == {key: job.key for key, job in jobs.items()}
    assert files_read(choice.jobs, found) == said
    (claim,) = choice.parts
    assert judge(claim, found) == judge(claim, results)
    assert judge(claim, found).verdict != NOT_RUN


def test_runs_on_official_data_and_on_a_file_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choice, kept = choose("small", ["p2-cifar10-error-depth"]), tmp_path / "kept"
    given = stand_ins(choice.jobs, {"cifar10": npz(tmp_path / "c.npz")})
    half = choice.jobs[: len(choice.jobs) // 2]
    official = make(half, tmp_path / "official", as_the_paper)
    keep_runs(choice.studies, official, kept)
    here = stand_ins([job for study in choice.studies for job in study.jobs], {}) | given
    with pytest.raises(
        ValueError, match=r"\.zip read the official cifar10; cifar10 is given as c\.npz, .*: give no file"
    ):
        kept_runs(choice.studies, here, kept, tmp_path / "there")
    made = make([given[job.key] for job in half], tmp_path / "file", as_the_paper)
    found = {job.key: made[given[job.key].key] for job in half}
    both = found | make(choice.jobs[len(half) :], tmp_path / "others", as_the_paper)
    (said,) = files_read(choice.jobs, both)
    assert said.endswith(f"{given[half[0].key].data.sha256}, in {len(half)} of {len(choice.jobs)} runs.")
    shutil.rmtree(kept)
    keep_runs(choice.studies, found, kept)
    arguments = ["reproduce", choice.parts[0].id, "--scale", "small", "--out", str(tmp_path / "o"), "--kept", str(kept)]
    monkeypatch.setattr(reproducescreen, "carried_out", lambda *_: pytest.fail("it began"))
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "kept runs of p2 read c.npz, SHA-256 " in message
    assert "in the place of cifar10, another would read the official cifar10: give --files cifar10=FILE.npz" in message
    other = choose("small", ["p1-3"])  # whose runs are compared with none of p2
    check_alike(other, here, {}, found)
    for option in ("--list", "--check"):
        assert main([*arguments, option]) == 0


def test_kept_runs_are_not_run_again(made: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choice = choose("tiny", ["p2-1"])
    keep_runs(choice.studies, make(choice.jobs, tmp_path / "made", as_the_paper), tmp_path / "kept")
    out = tmp_path / "out"
    arguments = ["reproduce", "p2-1", "--scale", "tiny", "--out", str(out), "--kept", str(tmp_path / "kept")]
    assert main([*arguments, "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["together", "4", "4", "0.0"]
    assert main(arguments) == 0
    assert "(4 runs, 0 of them new)" in capsys.readouterr().out
    assert list((out / "runs").iterdir()) == []
    assert (out / "tiny" / "p2" / "p2-1.png").is_file()


def test_what_is_complete_is_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    (first, *_) = choose("tiny", ["p2-1"]).jobs
    execute(first, out)
    arguments = ["reproduce", "p2-1", "--check", "--scale", "tiny", "--out", str(out), "--kept", str(kept)]
    assert main(arguments) == 0
    assert "(1 runs, 1 of them new)" in capsys.readouterr().out
    assert [path.name for path in kept.rglob("*.zip")] == [f"{first.key}.zip"]
    (tmp_path / "file").touch()
    for option in ("--check", "--list"):
        assert main(["reproduce", "p2-1", option, *arguments[3:-1], str(tmp_path / "file")]) == 2
        assert "is a file; --kept takes a folder" in capsys.readouterr().err


def test_published_verdicts_are_those_of_the_kept_runs(tmp_path: Path) -> None:
    kept = ROOT / "docs" / "results" / "runs"
    content = json.loads((ROOT / "docs" / "results" / "claims.json").read_text(encoding="utf-8"))
    published = {claim["id"]: claim for claim in content["claims"]}
    choice = choose(content["scale"], [])
    jobs = stand_ins([job for study in choice.studies for job in study.jobs], {})
    results = kept_runs(choice.studies, jobs, kept, tmp_path / "there")
    names = {path.stem for path in kept.rglob("*.zip")}
    assert names == results.keys(), "every kept run is one that a study asks for"
    checked = 0
    for study in choice.studies:
        for claim in study.claims:
            found = judge(claim, results)
            if found.verdict != NOT_RUN:
                said = published[claim.id]
                assert found.verdict == said["verdict"], claim.id
                if claim.jobs:  # what is computed here and now ends in digits of this processor
                    assert found.obtained == said["obtained"], claim.id
                    checked += 1
    assert checked or not names


def test_what_claims_say_of_untrained_networks_is_what_was_kept() -> None:
    kept, found = ROOT / "docs" / "results" / "runs" / "p0", []
    for data in SETS:
        runs = [zipfile.ZipFile(kept / f"{run.key}.zip") for run in of_cell("small", data, FREE).values()]
        indices = [json.loads(run.read("indices.json"))["initial_convergence_by_agreement"] for run in runs]
        recurrence = mean_over([index["recurrence"]["network"]["value"] for index in indices])
        found.append((recurrence.value, at_most(recurrence, 1 - AWAY).verdict))
    least, most = min(found)[0], max(found)[0]
    passed = sum(verdict == "pass" for _, verdict in found)
    assert (f"{least:.2f} to {most:.2f}", passed, len(found)) == ("0.82 to 0.95", 2, 8)
    assert "0.82 to 0.95" in UNTRAINED
    assert "two of eight data sets pass" in UNTRAINED
