"""Training: it learns, repeats itself exactly, calls its functions, and stops when it diverges."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from datafiles import write_npz
from residuum.checkpoints import Progress
from residuum.data import Splits, load_splits
from residuum.models import ResNet, ResNetConfig
from residuum.processes import Group
from residuum.rates import Cosine, Steps, rate
from residuum.training import TrainConfig, Training, correct, evaluate, found_classes, label_loss, make_optimiser, train
from trainer import Small

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
    assert found_classes(output, several).tolist() == [1, 0.5]
    assert found_classes(output, torch.zeros_like(several)).tolist() == [0, 0]


def refused(model: nn.Module, digits: Splits) -> None:
    with pytest.raises(ValueError, match="need 11 classes, the network has 10 outputs"):
        train(model, digits._replace(train=replace(digits.train, labels=digits.train.labels + 1)), TrainConfig())


@pytest.mark.parametrize("look", [lambda model, digits: evaluate(model, digits.test), refused])
def test_every_module_is_put_back_into_its_mode(look: Callable[[nn.Module, Splits], object], digits: Splits) -> None:
    """A batch norm that is frozen in a network in training mode stays frozen."""
    model = ResNet(NETWORK).train()
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    modes = [module.training for module in model.modules()]
    look(model, digits)
    assert [module.training for module in model.modules()] == modes


def test_with_several_labels_evaluation_says_the_share_of_classes_found(digits: Splits) -> None:
    labels = torch.zeros(len(digits.test), 10, dtype=torch.uint8)
    labels[torch.arange(len(labels)), digits.test.labels] = 1
    labels[torch.arange(len(labels)), (digits.test.labels + 3) % 10] = 1
    model, data = ResNet(NETWORK).eval(), replace(digits.test, labels=labels)
    two = model(data.preparation(data.images)).topk(2, dim=1).indices
    found = evaluate(model, data)
    assert found["digits"] == pytest.approx(labels.gather(1, two).float().mean().item())
    assert found["accuracy"] == pytest.approx((labels.gather(1, two).sum(1) == 2).float().mean().item())
    assert "digits" not in evaluate(model, digits.test)


def test_parts_of_a_step_add_up_to_the_step(digits: Splits) -> None:
    """Without batch norm, accumulation changes nothing beyond rounding, unequal parts included."""
    models = [Small(norm=False, dropout=0).double() for _ in range(2)]
    for model, parts in zip(models, (1, 3), strict=True):
        train(model, digits, TrainConfig(epochs=2, batch=20, lr=0.05, accumulate=parts))
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


class Apart(Group):
    """One of several processes, which knows nothing of the others."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def gradients_wait(self, wrapped: nn.Module, wait: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def sum(self, value: float) -> float:
        return value


def test_processes_with_unequal_shares_have_as_many_parts(digits: Splits) -> None:
    """Else SyncBatchNorm would wait for ever: 17 images are 9 and 8, of which 4 parts were 3 and 4."""
    few = digits._replace(train=digits.train.take(34, seed=0))
    counts = []
    for rank in range(2):
        model, sizes = Small(norm=True), []
        model.norm.register_forward_hook(lambda _, given, __, sizes=sizes: sizes.append(len(given[0])))
        config = TrainConfig(batch=17, accumulate=4)
        list(Training(model, few, config, label_loss, Apart(rank, 2), None, None).steps(Progress()))
        counts.append(sizes[1:])  # without the look at the number of classes
    assert counts == [[3, 3, 3] * 2, [3, 3, 2] * 2]


def test_gradients_are_changed_before_they_are_clipped(digits: Splits) -> None:
    lengths = []
    model = Small(norm=False)

    def enlarge(model: nn.Module, share: float) -> None:
        for p in model.parameters():
            p.grad.mul_(100)

    def measured_step(optimiser: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        lengths.append(float(sum(p.grad.square().sum() for p in model.parameters()).sqrt()))

    handle = register_optimizer_step_pre_hook(measured_step)
    try:
        train(model, digits, TrainConfig(epochs=1, batch=48, lr=0.01, clip=0.5), after_backward=enlarge)
    finally:
        handle.remove()
    assert lengths == pytest.approx([0.5, 0.5], rel=1e-4)


@pytest.mark.parametrize("options", [{"optimiser": "adam", "lr": 0.01}, {"precision": "bfloat16"}, {"rate": Cosine()}])
def test_other_settings_learn_too(options: dict) -> None:
    data = Splits(*(part.take(600, seed=0) for part in load_splits("digits")))
    model = ResNet(ResNetConfig(blocks=(1, 1), widths=(8, 16), channels=1))
    history = train(model, data, TrainConfig(**{"epochs": 5, "batch": 32} | options))
    assert history[-1]["test_accuracy"] > 0.8
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_images_move_at_random_but_reproducibly(digits: Splits) -> None:
    runs = []
    for _ in range(2):
        model = ResNet(NETWORK)
        runs.append(train(model, digits, TrainConfig(epochs=2, augment="crop_flip"))[-1]["train_loss"])
    plain = train(ResNet(NETWORK), digits, TrainConfig(epochs=2))[-1]["train_loss"]
    assert runs[0] == runs[1] != plain


def test_rates_of_the_papers() -> None:
    """P1, training settings: epochs and learning rates, as meant and as printed (all start at 0.1)."""
    meant, printed = rate("p1-resnet110"), rate("p1-resnet110-as-printed")
    for epoch, value in ((0, 0.1), (79, 0.1), (80, 0.01), (120, 0.001), (200, 1e-4), (240, 1e-5), (299, 1e-5)):
        assert 0.1 * meant(epoch / 300) == pytest.approx(value)
    assert [0.1 * printed(epoch / 300) for epoch in (200, 240)] == pytest.approx([1e-5, 1.1e-5])
    assert [0.1 * rate("p1-single")(epoch / 200) for epoch in (39, 40, 60, 80)] == pytest.approx(
        [0.1, 0.02, 0.004, 0.0008]
    )
    assert [0.1 * rate("p1-wide")(epoch / 100) for epoch in (59, 60)] == pytest.approx([0.1, 0.02])
    assert [Cosine()(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5, 0])
    with pytest.raises(ValueError, match=r"unknown rate 'cosin'; did you mean 'cosine'"):
        rate("cosin")
    with pytest.raises(ValueError, match="ascending"):
        Steps(((0.5, 0.1), (0.2, 0.1)))


def test_a_training_belongs_to_one_group_of_processes(digits: Splits) -> None:
    assert Group().any(True)
    assert Group().sum(2.0) == 2.0
    model = nn.Linear(1, 1)
    assert Group().wrap(model) is model


def test_model_in_training_mode_ends_in_eval_mode_and_random_state_is_kept(digits: Splits) -> None:
    model = ResNet(NETWORK).train()
    before = torch.get_rng_state()
    train(model, digits, TrainConfig(epochs=1))
    assert not any(module.training for module in model.modules())
    assert torch.equal(before, torch.get_rng_state())


def test_what_would_fail_later_is_refused_first(digits: Splits) -> None:
    """Batch norm that would see one image, labels outside the head, an empty split."""
    from dataclasses import replace

    with pytest.raises(ValueError, match=r"last step of an epoch has 1 images, of which batch norm would see 1"):
        train(ResNet(NETWORK), digits, TrainConfig(epochs=1, batch=95))
    train(Small(norm=False), digits, TrainConfig(epochs=1, batch=95))
    with pytest.raises(ValueError, match=r"^a step of an epoch has 10 images, of which batch norm would see 1 at a "):
        train(ResNet(NETWORK), digits, TrainConfig(epochs=1, batch=10, accumulate=4))  # parts of 3, 3, 3 and 1
    train(ResNet(NETWORK), digits, TrainConfig(epochs=1, batch=48, accumulate=3))
    with pytest.raises(ValueError, match=r"batch norm would see 1 at a time; give more images$"):
        train(ResNet(NETWORK), digits._replace(train=digits.train.take(1, seed=0)), TrainConfig(epochs=1))
    few = ResNet(ResNetConfig(blocks=(1,), widths=(4,), channels=1, classes=7))
    with pytest.raises(ValueError, match="labels of digits need 10 classes, the network has 7 outputs"):
        train(few, digits, TrainConfig(epochs=1))
    empty = replace(digits.test, images=digits.test.images[:0], labels=digits.test.labels[:0])
    with pytest.raises(ValueError, match="the test split of digits has no images"):
        train(ResNet(NETWORK), Splits(digits.train, empty), TrainConfig(epochs=1))


def test_looking_at_the_test_images_less_often_changes_nothing_else(digits: Splits) -> None:
    histories = []
    for every in (1, 2):
        model = ResNet(NETWORK)
        histories.append(train(model, digits, TrainConfig(epochs=3, batch=32, test_every=every)))
    often, seldom = ([{k: v for k, v in row.items() if k != "seconds"} for row in rows] for rows in histories)
    assert ["test_accuracy" in row for row in seldom] == [False, True, True]
    assert seldom[1:] == often[1:]
    assert seldom[0] == {k: v for k, v in often[0].items() if not k.startswith("test_")}


def test_no_test_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"test_every \(0\) must be at least 1"):
        TrainConfig(test_every=0)


def test_a_loss_that_raises_leaves_the_network_as_it_was(digits: Splits) -> None:
    def broken(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        raise ZeroDivisionError

    model = ResNet(NETWORK).train()
    with pytest.raises(ZeroDivisionError):
        evaluate(model, digits.test, loss=broken)
    assert model.training
    assert not model._forward_hooks


def test_scales_of_norms_do_not_decay_whatever_their_shape() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.LayerNorm((3, 8, 8)), nn.Linear(4, 4))
    decayed, rest = make_optimiser(model, TrainConfig()).param_groups
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight), id(model[2].weight)]
    assert [id(p) for p in rest["params"]] == [id(p) for p in (model[0].bias, *model[1].parameters(), model[2].bias)]
    assert rest["weight_decay"] == 0
