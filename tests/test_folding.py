"""Folding coupled networks: equal blocks cost nothing, unequal ones cost what evaluation says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from datafiles import write_npz
from residuum.cli import main
from residuum.data import Splits, load_splits
from residuum.folding import fold_coupled
from residuum.layers.coupling import Coupling
from residuum.layers.pairs import Verlet
from residuum.layers.sharing import Loop, fold
from residuum.loading import load_model
from residuum.models import ResNet, ResNetConfig
from residuum.results import write_run
from residuum.training import TrainConfig, evaluate, train

DATA = Splits(*(part.take(96, seed=0) for part in load_splits("digits")))


@pytest.mark.parametrize("couple", ["weights", "all"])
@pytest.mark.parametrize("transition", ["separate", "projection"])
def test_a_fully_coupled_network_folds_for_nothing(tmp_path: Path, couple: str, transition: str) -> None:
    config = ResNetConfig(blocks=(3, 4), widths=(4, 8), channels=1, alike=1.0, transition=transition)
    model = ResNet(config)
    settings = TrainConfig(epochs=1, batch=24, coupling=Coupling(1.0, couple))
    history = train(model, DATA, settings)
    found = fold_coupled(model, DATA, couple=couple)
    assert found.accuracy[0] == found.accuracy[1]
    assert found.loss[0] == pytest.approx(found.loss[1], rel=1e-6)
    assert found.sharing == pytest.approx((1, 1))
    assert found.parameters[1] < 0.6 * found.parameters[0]
    loops = fold(found.model)
    assert [[type(part) for part in section] for section in loops.sections] == [[Loop], [Loop]]
    assert loops.sections[0][0].times == 3
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(found.model(x), model(x))
        assert torch.equal(loops(x), model(x))
    write_run(tmp_path, found.model, DATA, settings, history)
    again = load_model(str(tmp_path)).model
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert sum(p.numel() for p in again.parameters()) == found.parameters[1]


def test_unequal_blocks_cost_what_evaluation_says() -> None:
    model = ResNet(ResNetConfig(blocks=(3, 1), widths=(4, 8), channels=1))
    train(model, DATA, TrainConfig(epochs=2, batch=24))
    found = fold_coupled(model, DATA)
    assert found.sharing[0] < 0.6
    assert found.sharing[1] is None
    assert found.loss[1] != pytest.approx(found.loss[0], rel=1e-3)
    assert found.accuracy[1] == evaluate(found.model, DATA.test)["accuracy"]


def test_what_cannot_be_folded_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs model\.eval\(\)"):
        fold_coupled(ResNet(ResNetConfig(channels=1)).train(), DATA)
    with pytest.raises(ValueError, match="at least 2 blocks"):
        fold_coupled(ResNet(ResNetConfig(blocks=(1, 1), widths=(4, 4), channels=1)).eval(), DATA)
    for norm in ("batch", "none"):
        with pytest.raises(ValueError, match="unknown couple 'alll'; did you mean 'all'"):
            fold_coupled(
                ResNet(ResNetConfig(blocks=(2,), widths=(4,), channels=1, norm=norm)).eval(), DATA, couple="alll"
            )


def test_the_command_writes_a_network_that_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shared = ["--limit", "60", "--device", "cpu"]
    made = ["train", "--out", str(tmp_path / "a"), "--blocks", "3", "2", "--widths", "4", "8", "--epochs", "1", *shared]
    assert main([*made, "--couple", "1", "--couple-norms"]) == 0
    assert main(["fold", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--norms", *shared]) == 0
    said = capsys.readouterr().out
    assert "1.0000, 1.0000" in said
    assert "parameters: 3," in said
    model = load_model(str(tmp_path / "b")).model
    assert len({id(block) for block in model.sections[0]}) == 1
    assert json.loads((tmp_path / "b" / "config.json").read_text())["training"]["folded"]["images"] == 60
    assert main(["fold", str(tmp_path / "b"), "--out", str(tmp_path / "c"), *shared]) == 2
    assert "weights of their own" in capsys.readouterr().err


def test_a_network_is_folded_as_it_reads_pixels_on_the_data_of_its_training(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dim images under the digits' names: with the preparation of the digits the network would guess."""
    monkeypatch.chdir(tmp_path)
    arrays = {f"{part.split}_images": (40 + part.images.permute(0, 2, 3, 1) * 5 // 3).numpy() for part in DATA}
    arrays |= {f"{part.split}_labels": part.labels.numpy() for part in DATA}
    dim, names = write_npz(tmp_path / "dim.npz", **arrays, classes=np.array(list("0123456789"))), [*"ab"]
    made = ["--blocks", "2", "--widths", "4", "--epochs", "1", "--batch", "24", "--device", "cpu", "--couple", "1"]
    assert main(["train", "--out", "a", "--data", str(dim), *made]) == 0
    for data in ([], ["--data", "digits"]):
        assert main(["fold", "a", "--out", "b", "--force", "--device", "cpu", *data]) == 0
        said = capsys.readouterr()
        assert f"test images of {'digits' if data else 'dim.npz'}" in said.out
        assert ("trained on other data than digits: dim.npz" in said.err) == bool(data)
        content = [json.loads((tmp_path / name / "config.json").read_text()) for name in names]
        assert all(content[0]["preparation"][part] == content[1]["preparation"][part] for part in ("mean", "std"))
        history = content[1]["training"]["history"][-1]
        assert (content[1]["training"]["folded"]["loss"][0] == pytest.approx(history["test_loss"])) != bool(data)
    dim.rename(tmp_path / "elsewhere.npz")
    assert main(["fold", "a", "--out", "c", "--device", "cpu"]) == 2
    assert "a was trained on dim.npz, which is not here; say where with --data" in capsys.readouterr().err
    write_npz(tmp_path / "pets.npz")
    assert main(["fold", "a", "--out", "c", "--device", "cpu", "--data", "pets.npz"]) == 2
    assert "the classes of pets.npz (cat, dog, owl) are not those of a (0, 1" in capsys.readouterr().err


def test_without_norms_blocks_fold_and_group_norms_fold_with_them() -> None:
    for norm, couple in (("none", "weights"), ("none", "all"), ("group", "all")):
        model = ResNet(ResNetConfig(blocks=(2,), widths=(4,), channels=1, norm=norm, alike=1.0)).eval()
        found = fold_coupled(model, DATA, couple=couple)
        x = torch.randn(3, 1, 8, 8)
        with torch.no_grad():
            assert torch.equal(found.model(x), model(x))
        assert ResNet(found.model.config).state_dict().keys() == found.model.state_dict().keys()
        assert found.parameters[1] < found.parameters[0]
    with pytest.raises(ValueError, match=r"this network has group norm: give couple='all' \(--norms\)"):
        fold_coupled(model, DATA)


def test_a_folded_reversible_network_trains_its_blocks() -> None:
    model = ResNet(ResNetConfig((3, 1), (4, 8), 1, norm="group", step=Verlet(0.5), reversible=True)).eval()
    found = fold_coupled(model, DATA, couple="all").model.train()
    for loops in (found, fold(found)):
        loops.zero_grad()
        loops(torch.randn(2, 1, 8, 8)).sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in loops.sections.parameters())
        x = torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            stored = loops(x)
        torch.testing.assert_close(loops(x), stored)
