"""Curves over epochs: a loop over states by hand, the model left alone, histories that are JSON and survive a stop."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from residuum import watch
from residuum.data import ImageSet, Splits, load_splits
from residuum.models import ResNet, ResNetConfig
from residuum.training import TrainConfig, train

NETWORK = ResNetConfig(blocks=(2, 1), widths=(4, 8), channels=1)


@pytest.fixture(scope="module")
def digits() -> Splits:
    return Splits(*(part.take(90, seed=0) for part in load_splits("digits")))


@pytest.fixture
def unsure() -> ResNet:
    """A network with some borderline and some correct answers, in eval mode, float64."""
    model = ResNet(NETWORK, seed=3).double().eval()
    with torch.no_grad():
        model.dense.weight.mul_(0.3)
    return model


def by_hand(model: ResNet, data: ImageSet, width: float = 0.1) -> tuple[dict[str, object], dict[str, int]]:
    """The curves, with one loop per section, state and example."""
    stream = model.cut(data.preparation(data.images).double())
    labels = data.labels.tolist()

    def chances(output: Tensor) -> list[list[float]]:
        return output.detach().softmax(1).tolist()

    final = chances(stream.run().output)
    margins = [p[y] - max(q for k, q in enumerate(p) if k != y) for p, y in zip(final, labels, strict=True)]
    members = {
        "": list(range(len(labels))),
        "borderline_": [n for n, m in enumerate(margins) if abs(m) < width],
        "correct_": [n for n, m in enumerate(margins) if m > 0],
    }
    curves: dict[str, dict[str, list[float]]] = {}
    for s, states in enumerate(stream.run().states):
        for h in states:
            p = chances(stream.exit(h, s))
            values = {
                "accuracy": [float(p[n].index(max(p[n])) == y) for n, y in enumerate(labels)],
                "loss": [-math.log(p[n][y]) for n, y in enumerate(labels)],
                "entropy": [-sum(q * math.log(q) for q in p[n]) for n in range(len(labels))],
            }
            for group, chosen in members.items():
                for name, value in values.items():
                    of_section = curves.setdefault(group + name, {}).setdefault(stream.sections[s].name, [])
                    of_section.append(sum(value[n] for n in chosen) / len(chosen))
    return curves, {(group or "all_")[:-1]: len(chosen) for group, chosen in members.items()}


def test_curves_equal_a_loop_over_the_states(digits: Splits, unsure: ResNet) -> None:
    found = watch(digits.test, limit=60, seed=5)(unsure)
    curves, watched = by_hand(unsure, digits.test.take(60, seed=5))
    assert found["watched"] == watched
    assert 0 < watched["correct"] < watched["all"] == 60
    assert 0 < watched["borderline"] < 60
    assert found["curves"].keys() == curves.keys()
    for name, sections in curves.items():
        assert {s: len(v) for s, v in found["curves"][name].items()} == {"section 1": 3, "section 2": 2}
        for section, values in sections.items():
            assert found["curves"][name][section] == pytest.approx(values, rel=1e-6), name  # kept in float32
    assert found["curves"]["correct_accuracy"]["section 2"][-1] == 1


def test_the_model_is_left_as_it_was(digits: Splits) -> None:
    model = ResNet(NETWORK).train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    model.dense(torch.ones(1, 8)).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state, grad = torch.get_rng_state(), model.dense.weight.grad.clone()
    watch(digits.test)(model)
    assert [module.training for module in model.modules()] == modes
    assert not frozen.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(grad, model.dense.weight.grad)
    assert all(p.requires_grad for p in model.parameters())


def test_the_history_has_a_row_of_curves_per_epoch_and_training_is_the_same(digits: Splits) -> None:
    config, plain, watched = TrainConfig(epochs=2, batch=30), ResNet(NETWORK), ResNet(NETWORK)
    train(plain, digits, config)
    history = train(watched, digits, config, after_epoch=watch(digits.test, limit=None))
    assert json.loads(json.dumps(history, allow_nan=False)) == history
    for row in history:
        assert row["watched"]["all"] == len(digits.test)
        # The same numbers from the same network by two ways; float32 in batches of other sizes.
        assert row["curves"]["accuracy"]["section 2"][-1] == pytest.approx(row["test_accuracy"])
        assert row["curves"]["loss"]["section 2"][-1] == pytest.approx(row["test_loss"], rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


def test_a_stop_loses_no_curves(digits: Splits, tmp_path: Path) -> None:
    def run(checkpoint: Path | None, *, stop_at: int = 0) -> list[dict[str, object]]:
        steps = 0

        def after_backward(model: nn.Module, share: float) -> None:
            nonlocal steps
            steps += 1
            if steps == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

        config, watched = TrainConfig(epochs=3, batch=30), watch(digits.test, limit=40)
        model = ResNet(NETWORK)
        history = train(
            model, digits, config, after_backward=after_backward, after_epoch=watched, checkpoint=checkpoint
        )
        return [{name: value for name, value in row.items() if name != "seconds"} for row in history]

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "checkpoint", stop_at=5)  # in the second epoch of 3 steps
    history = run(tmp_path / "checkpoint")
    assert len(history) == 3
    assert history == run(None)


def test_what_json_cannot_say_is_none(digits: Splits, unsure: ResNet) -> None:
    with torch.no_grad():
        unsure.dense.bias[0] = 1e9  # certain of class 0: no borderline examples
    found = watch(digits.test)(unsure)
    assert found["watched"]["borderline"] == 0
    assert found["curves"]["borderline_accuracy"] == {"section 1": [None] * 3, "section 2": [None] * 2}
    with torch.no_grad():
        unsure.dense.bias[0] = torch.inf
    found = watch(digits.test)(unsure)
    json.dumps(found, allow_nan=False)
    assert found["curves"]["loss"]["section 2"] == [None, None]
    assert found["curves"]["accuracy"]["section 2"] == [0, 0]
    assert found["watched"] == {"all": 90, "borderline": 0, "correct": 0}


def test_several_labels_per_image(digits: Splits) -> None:
    columns = torch.zeros(len(digits.test), 10, dtype=torch.uint8)
    columns[torch.arange(len(columns)), digits.test.labels] = 1
    columns[:, 3] = 1
    found = watch(replace(digits.test, labels=columns))(ResNet(NETWORK).eval())
    assert 0 <= found["curves"]["accuracy"]["section 2"][-1] < 0.5
    assert found["watched"]["all"] == 90


def test_impossible_numbers_of_examples_are_refused(digits: Splits) -> None:
    with pytest.raises(ValueError, match="limit is 0; at least 1 example is needed"):
        watch(digits.test, limit=0)
