"""Folding coupled networks: equal blocks cost nothing, unequal ones cost what evaluation says."""

import json
from pathlib import Path

import pytest
import torch

from residuum.cli import main
from residuum.data import Splits, load_splits
from residuum.folding import fold_coupled
from residuum.layers.coupling import Coupling
from residuum.layers.sharing import Loop
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
    assert [[type(part) for part in section] for section in found.loops.sections] == [[Loop], [Loop]]
    assert found.loops.sections[0][0].times == 3
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(found.model(x), model(x))
        assert torch.equal(found.loops(x), model(x))
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
