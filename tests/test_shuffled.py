"""Networks trained on shuffled labels: the labels, what is written about them, and the comparison with the others."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from residuum import load_model, profiles
from residuum.cli import main
from residuum.convergence import convergence_indices
from residuum.data import Splits, load_splits, shuffled_labels
from residuum.models import ResNet, ResNetConfig
from residuum.training import TrainConfig, train

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(torch.tensor)
COLUMNS = st.lists(st.tuples(*[st.integers(0, 1)] * 3), min_size=1, max_size=60).map(
    lambda rows: torch.tensor(rows, dtype=torch.uint8)
)
SMALL = ("--data", "digits", "--blocks", "2", "1", "--widths", "4", "8", "--epochs", "1", "--limit", "60")
PROBES = ("--probes", "perturbation", "readouts", "drops_last", "replacements")


@given(labels=LABELS | COLUMNS, seed=st.integers(0, 99))
def test_the_labels_are_the_same_in_another_order(labels: Tensor, seed: int) -> None:
    found = shuffled_labels(labels, seed=seed)
    assert sorted(found.tolist()) == sorted(labels.tolist())
    assert found.dtype == labels.dtype
    assert torch.equal(found, shuffled_labels(labels, seed=seed))


def test_labels_say_nothing_about_the_images_any_more() -> None:
    labels = torch.arange(10_000) % 10
    draws = [shuffled_labels(labels, seed=seed) for seed in range(3)]
    assert not torch.equal(draws[0], draws[1])
    for found in draws:
        kept = (found == labels).sum().item()
        assert abs(kept - 1000) < 5 * 30, "a tenth by chance, with a standard deviation of 30"
        assert labels.tolist() == (torch.arange(10_000) % 10).tolist(), "the given labels are not touched"


def test_of_a_data_set() -> None:
    data = load_splits("digits").train
    found = data.shuffled(seed=4)
    assert found.images is data.images
    assert torch.equal(found.labels, shuffled_labels(data.labels, seed=4))
    assert data.labelling == "true"
    assert found.labelling == "shuffled, seed 4"
    assert found.take(10, seed=0).labelling == "shuffled, seed 4"


def test_a_checkpoint_with_other_labels_is_refused(tmp_path: Path) -> None:
    data = Splits(*(part.take(60, seed=0) for part in load_splits("digits")))
    network, config = ResNetConfig(blocks=(1,), widths=(4,), channels=1), TrainConfig(epochs=1, batch=30)
    train(ResNet(network), data, config, checkpoint=tmp_path / "checkpoint")
    shuffled = data._replace(train=data.train.shuffled(seed=0))
    with pytest.raises(ValueError, match="labels: true there, shuffled, seed 0 here"):
        train(ResNet(network), shuffled, config, checkpoint=tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks trained with the same options, one of them on shuffled labels, and others that are not comparable.

    Their settings are small: what they learn is no matter here.
    """
    folder = tmp_path_factory.mktemp("shuffled")
    assert main(["train", "--out", str(folder / "true"), *SMALL, "--watch", "20"]) == 0
    assert main(["train", "--out", str(folder / "shuffled"), *SMALL, "--shuffle-labels"]) == 0
    assert main(["train", "--out", str(folder / "longer"), *SMALL, "--shuffle-labels", "--epochs", "2"]) == 0
    assert main(["train", "--out", str(folder / "deeper"), *SMALL, "--shuffle-labels", "--blocks", "2", "2"]) == 0
    return folder


def read(folder: Path, name: str) -> dict[str, object]:
    return json.loads((folder / name).read_text())


def test_what_is_written_says_so(runs: Path) -> None:
    true, shuffled = (read(runs / name, "provenance.json") for name in ("true", "shuffled"))
    assert true["training"]["labels"] == "true"
    assert true["weights"] == "trained by residuum"
    assert shuffled["training"]["labels"] == "shuffled, seed 0"
    assert shuffled["weights"] == "trained by residuum on labels that were shuffled, seed 0"
    assert load_model(str(runs / "shuffled")).weights == shuffled["weights"]
    weights = [(runs / name / "weights.safetensors").read_bytes() for name in ("true", "shuffled")]
    assert weights[0] != weights[1]


def test_train_watches(runs: Path) -> None:
    (row,) = read(runs / "true", "history.json")
    assert row["watched"]["all"] == 20
    assert {name: len(values) for name, values in row["curves"]["accuracy"].items()} == {"section 1": 3, "section 2": 2}
    assert "curves" not in read(runs / "shuffled", "history.json")[0]


def test_probe_measures_it_beside_the_others(runs: Path, tmp_path: Path) -> None:
    command = ["probe", str(runs / "true"), "--data", "digits", "--limit", "30", *PROBES]
    assert main([*command, "--out", str(tmp_path / "three"), "--shuffled", str(runs / "shuffled")]) == 0
    alone = ["probe", str(runs / "shuffled"), *command[2:]]
    assert main([*alone, "--out", str(tmp_path / "alone"), "--no-initial"]) == 0
    numbers, expected = read(tmp_path / "three", "indices.json"), read(tmp_path / "alone", "indices.json")
    assert numbers["shuffled"] == expected["measured"] != numbers["measured"]
    assert numbers["shuffled_convergence"] == expected["convergence"]
    assert numbers["shuffled_convergence_by_agreement"] == expected["convergence_by_agreement"]
    assert expected["shuffled"] is None
    assert expected["shuffled_convergence"] is None
    assert expected["initial_convergence_by_agreement"] is None
    tables = [pd.read_parquet(tmp_path / name) for name in ("three/shuffled.parquet", "alone/profile.parquet")]
    pd.testing.assert_frame_equal(*tables)
    for name, file in (("", "profile"), ("initial_", "initial"), ("shuffled_", "shuffled")):
        profile = profiles.load(tmp_path / "three" / f"{file}.safetensors")
        found = numbers[f"{name}convergence_by_agreement"]
        assert found == json.loads(json.dumps(convergence_indices(profile, by="agreement")))
        assert found["convergence"]["network"] is not None
        assert found["intact_error"] == 0
    (note,) = read(tmp_path / "three", "provenance.json")["notes"]
    losses = {run: read(runs / run, "history.json")[-1]["train_loss"] for run in ("true", "shuffled")}
    assert note == (
        f"training loss at the end: {losses['shuffled']:.3f} with shuffled labels, {losses['true']:.3f} with true ones"
    )


def test_other_settings_of_the_training_are_noted(runs: Path, tmp_path: Path) -> None:
    command = ["probe", str(runs / "true"), "--data", "digits", "--limit", "10", "--out", str(tmp_path / "o")]
    assert main([*command, "--probes", "perturbation", "--shuffled", str(runs / "longer")]) == 0
    (note,) = read(tmp_path / "o", "provenance.json")["notes"]
    assert note.endswith("with true ones; the former was trained otherwise: epochs 2 there, 1 here")
    numbers = read(tmp_path / "o", "indices.json")
    assert numbers["shuffled_convergence_by_agreement"] == {}, "no interventions were measured"


@pytest.mark.parametrize(
    ("model", "shuffled", "message"),
    [
        ("true", "true", "true was not trained on shuffled labels; give a folder of `residuum train --shuffle-labels`"),
        ("true", "deeper", "true and deeper are of different networks (ResNetConfig(blocks=(2, 1), "),
        ("true --weights random", "shuffled", "true was not trained by residuum, so no network trained on shuffled"),
        ("true", "missing", "missing is no folder; give one that residuum train wrote"),
    ],
)
def test_what_is_not_comparable_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, model: str, shuffled: str, message: str
) -> None:
    name, *options = model.split()
    command = ["probe", str(runs / name), *options, "--data", "digits", "--limit", "10", "--out", str(tmp_path / "o")]
    assert main([*command, "--shuffled", str(runs / shuffled)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_other_data_are_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = tmp_path / "other"
    other.mkdir()
    content = read(runs / "shuffled", "config.json")
    content["training"]["data_sha256"] = "ab" * 32
    (other / "config.json").write_text(json.dumps(content))
    (other / "weights.safetensors").write_bytes((runs / "shuffled" / "weights.safetensors").read_bytes())
    command = ["probe", str(runs / "true"), "--data", "digits", "--out", str(tmp_path / "o"), "--shuffled", str(other)]
    assert main(command) == 2
    assert "are of different data (digits " in capsys.readouterr().err
