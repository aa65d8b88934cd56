"""Training: it learns, repeats itself exactly, calls its functions, and stops when it diverges."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from datafiles import write_npz
from residuum.data import Splits, load_splits
from residuum.models import ResNet, ResNetConfig
from residuum.training import TrainConfig, correct, evaluate, label_loss, train

NETWORK = ResNetConfig(blocks=(1, 1), widths=(4, 8), channels=1)


@pytest.fixture(scope="module")
def digits() -> Splits:
    return Splits(*(part.take(96, seed=0) for part in load_splits("digits")))


def test_a_small_network_learns_the_digits() -> None:
    data = Splits(*(part.take(600, seed=0) for part in load_splits("digits")))
    model = ResNet(ResNetConfig(blocks=(1, 1), widths=(8, 16), channels=1))
    history = train(model, data, TrainConfig(epochs=6, batch=32))
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["test_accuracy"] > 0.85
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 3
    assert not model.training


def test_the_same_seed_gives_the_same_weights_and_history(digits: Splits) -> None:
    def run(seed: int) -> tuple[list[dict[str, float]], Tensor]:
        model = ResNet(NETWORK)
        history = train(model, digits, TrainConfig(epochs=2, batch=20, seed=seed))
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in history]
        return rows, torch.cat([p.flatten() for p in model.parameters()])

    (first, weights), (second, again), (_, other) = run(1), run(1), run(2)
    assert first == second
    assert torch.equal(weights, again)
    assert not torch.equal(weights, other)


def test_training_leaves_the_global_random_state_alone(digits: Splits) -> None:
    before = torch.get_rng_state()
    train(ResNet(NETWORK), digits, TrainConfig(epochs=1))
    assert torch.equal(before, torch.get_rng_state())


def test_learning_rate_falls_at_the_milestones(digits: Splits) -> None:
    history = train(ResNet(NETWORK), digits, TrainConfig(epochs=4, lr=0.05, batch=96))
    assert [row["lr"] for row in history] == pytest.approx([0.05, 0.05, 0.005, 0.0005])


def test_weight_decay_acts_on_weights_only(digits: Splits) -> None:
    """With a loss that does not depend on the parameters only the decay moves them."""
    model = ResNet(NETWORK)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def constant(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return 0 * sum(p.sum() for p in model.parameters())

    train(model, digits, TrainConfig(epochs=1, batch=96, lr=0.1, weight_decay=0.01), loss=constant)
    for name, p in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.01 if p.ndim > 1 else 1)
        assert torch.allclose(p, expected), name


def test_its_functions_are_called(digits: Splits) -> None:
    shares, shown = [], []
    history = train(
        ResNet(NETWORK),
        digits,
        TrainConfig(epochs=2, batch=40),
        after_backward=lambda model, share: shares.append((share, model.stem.weight.grad is not None)),
        after_epoch=lambda model: {"stem": float(model.stem.weight.detach().norm()), "eval": float(not model.training)},
        progress=lambda done, text: shown.append((done, text)),
    )
    assert [share for share, _ in shares] == pytest.approx([0, 1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6])
    assert all(has_gradient for _, has_gradient in shares)
    assert all(row["stem"] > 0 and row["eval"] == 1 for row in history)
    assert [done for done, _ in shown] == [40, 80, 96, 96, 136, 176, 192, 192]
    assert shown[-1][1].startswith("epoch 2/2, test accuracy")


def test_several_classes_per_image(tmp_path: Path) -> None:
    labels = torch.randint(0, 2, (12, 3), dtype=torch.uint8).numpy()
    data = load_splits(str(write_npz(tmp_path / "x.npz", train_labels=labels, test_labels=labels[:6])))
    model = ResNet(ResNetConfig(blocks=(1,), widths=(4,), classes=3))
    history = train(model, data, TrainConfig(epochs=1, batch=4))
    assert history[0]["train_loss"] == pytest.approx(0.7, abs=1.0)


def test_an_exploding_learning_rate_stops_with_advice(digits: Splits) -> None:
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) in epoch \d+.*smaller learning rate than 1e\+30"):
        train(ResNet(NETWORK), digits, TrainConfig(epochs=5, lr=1e30))


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"clip": 0.0},
        {"accumulate": 0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_evaluate_is_the_mean_over_all_images_and_puts_the_mode_back(digits: Splits) -> None:
    model = ResNet(NETWORK).eval()
    x = digits.test.preparation(digits.test.images)
    found = evaluate(model, digits.test)
    assert found["loss"] == pytest.approx(label_loss(model, x, digits.test.labels).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx(correct(model(x), digits.test.labels).float().mean().item())
    evaluate(model.train(), digits.test)
    assert model.training


def test_correct_is_the_largest_output_or_the_m_largest() -> None:
    output = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    assert correct(output, torch.tensor([0, 2])).tolist() == [True, False]
    several = torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.uint8)
    assert correct(output, several).tolist() == [True, False]
