"""A training that was stopped, in whatever way, ends with the bits with which it would have ended."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from forked import program
from residuum.checkpoints import CheckpointError, Progress, resume_, save
from residuum.data import Splits
from residuum.layers.coupling import Coupling
from residuum.penalties import Loss, Penalty, penalised
from residuum.rates import Steps
from residuum.training import TrainConfig, label_loss, train
from trainer import Coupled, Small, data

TRAINER = Path(__file__).with_name("trainer.py")


def torchrun(*arguments: object) -> int:
    """Run the trainer in two processes under torchrun."""
    paths = os.pathsep.join([str(TRAINER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(TRAINER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run([*command, *map(str, arguments)], env=environment, timeout=240, check=False).returncode


def result(path: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights and history that the trainer wrote."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["history"])  # noqa: SIM118


def same(a: Path, b: Path) -> None:
    (weights, history), (others, rows) = result(a), result(b)
    assert history == rows
    assert weights.keys() == others.keys()
    for name in weights:
        assert torch.equal(weights[name], others[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((), id="sgd"),
        pytest.param(("optimiser=adam", "clip=0.5", "accumulate=3"), id="adam", marks=pytest.mark.slow),
    ],
)
def test_killed_again_and_again_it_ends_the_same(tmp_path: Path, settings: tuple[str, ...]) -> None:
    """kill -9 in the first step, inside an epoch, and in the first step of the last one."""
    assert program(tmp_path / "whole", "-", "NORM", 0, *settings) == [0]
    for kill_at in (1, 5, 9):  # counted from each start: the run is killed before step 1, 5, 13 of 21
        killed = program(tmp_path / "parts", tmp_path / "checkpoint", "NORM", kill_at, *settings)
        assert killed == [-signal.SIGKILL]
        assert not (tmp_path / "parts").exists()
    assert program(tmp_path / "parts", tmp_path / "checkpoint", "NORM", 0, *settings) == [0]
    same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_checkpoint_after_every_epoch_is_enough(tmp_path: Path) -> None:
    assert program(tmp_path / "whole", "-", "NORM", 0) == [0]
    assert program(tmp_path / "parts", tmp_path / "checkpoint", "NORM", 11, "every=1000") == [-signal.SIGKILL]
    assert program(tmp_path / "parts", tmp_path / "checkpoint", "NORM", 0, "every=1000") == [0]
    same(tmp_path / "whole", tmp_path / "parts")


def run(checkpoint: Path | None, *, stop_at: int = 0, config: TrainConfig | None = None) -> tuple[nn.Module, list]:
    """Train in this process; at one step ask it to stop, as Ctrl-C does."""
    steps = 0

    def after_backward(model: nn.Module, share: float) -> None:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    model = Small(norm=True)
    config = config or TrainConfig(epochs=2, batch=30, lr=0.05)
    history = train(model, data(), config, after_backward=after_backward, checkpoint=checkpoint)
    return model, [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def test_ctrl_c_ends_the_step_writes_and_goes_on_later(tmp_path: Path) -> None:
    whole, history = run(None)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for stop_at in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "checkpoint", stop_at=stop_at)
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    model, rows = run(tmp_path / "checkpoint")
    assert rows == history
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_stop_while_the_last_epoch_is_looked_at_is_not_lost(tmp_path: Path) -> None:
    looks = []

    def look(model: nn.Module) -> dict[str, int]:
        looks.append(len(looks))
        if len(looks) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"look": len(looks)}

    def trained() -> list[dict[str, float]]:
        config = TrainConfig(epochs=2, batch=50)
        return train(Small(norm=True), data(), config, after_epoch=look, checkpoint=tmp_path / "checkpoint")

    with pytest.raises(KeyboardInterrupt):
        trained()
    assert [row["look"] for row in trained()] == [1, 2]
    assert len(looks) == 2, "the training was complete and in the checkpoint"


def test_a_stop_at_the_end_of_an_epoch_leaves_its_learning_rate_in_the_history(tmp_path: Path) -> None:
    """Epochs of one step; the optimiser that goes on still has the rate of the first."""
    config = TrainConfig(epochs=2, batch=100, lr=0.05, rate=Steps(((0.5, 0.1),)))
    history = run(None, config=config)[1]
    assert [row["lr"] for row in history] == [0.05, 0.05 * 0.1]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "checkpoint", stop_at=2, config=config)
    assert run(tmp_path / "checkpoint", config=config)[1] == history


def test_a_complete_training_is_not_repeated(tmp_path: Path) -> None:
    model, history = run(tmp_path / "checkpoint")
    again, rows = run(tmp_path / "checkpoint", stop_at=1)
    assert rows == history
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"would not end with the same bits \(lr: 0.05 there, 0.1 here\)"):
        run(tmp_path / "checkpoint", config=TrainConfig(epochs=2, batch=30, lr=0.1))
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match=r"threads: 1 there, 2 here"):
            run(tmp_path / "checkpoint")
    finally:
        torch.set_num_threads(1)


def test_a_checkpoint_of_another_network_or_version_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"belongs to another network.*delete it to start anew"):
        train(Small(norm=False), data(), TrainConfig(epochs=2, batch=30, lr=0.05), checkpoint=tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"belongs to another network.*nothing.*delete it to start anew"):
        train(with_buffer(), data(), TrainConfig(epochs=2, batch=30, lr=0.05), checkpoint=tmp_path / "checkpoint")
    content = (tmp_path / "checkpoint").read_bytes()
    (tmp_path / "checkpoint").write_bytes(content.replace(b"residuum checkpoint 2", b"residuum checkpoint 1"))
    with pytest.raises(ValueError, match=r"has the format 'residuum checkpoint 1', expected 'residuum checkpoint 2'"):
        run(tmp_path / "checkpoint")


def with_buffer() -> nn.Module:
    """The same parameters and one more buffer."""
    model = Small(norm=True)
    model.register_buffer("nothing", torch.zeros(1))
    return model


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (("stem",), ("inner",), r"inner.weight .* in group 0 there, stem.weight \(6, 1, 3, 3\) in group 0 here"),
        ((), ("stem", "norm", "dense"), r"stem.weight .* in group 0 there, inner.weight .* in group 0 here"),
        (("dense",), (), r"stem.bias \(6,\) in group 1 there, dense.weight \(10, 6\) in group 0 here"),
    ],
)
def test_a_checkpoint_with_other_layers_frozen_is_refused(
    tmp_path: Path, there: tuple[str, ...], here: tuple[str, ...], message: str
) -> None:
    """The optimiser knows its state by position: it would give the momentum of one layer to another, or crash."""

    def frozen(names: tuple[str, ...]) -> None:
        model = Small(norm=True)
        for name in names:
            getattr(model, name).requires_grad_(False)
        train(model, data(), TrainConfig(epochs=1, batch=50), checkpoint=tmp_path / "checkpoint")

    frozen(there)
    before = (tmp_path / "checkpoint").read_bytes()
    with pytest.raises(CheckpointError, match=rf"other parameters are trained \({message}\); .*delete it"):
        frozen(here)
    assert (tmp_path / "checkpoint").read_bytes() == before
    frozen(there)


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    run(tmp_path / "checkpoint")
    content = (tmp_path / "checkpoint").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"nothing of ours"):
        (tmp_path / "checkpoint").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is no file of residuum, or is incomplete.*delete it to start anew"):
            run(tmp_path / "checkpoint")


def test_no_flipped_bit_passes_for_what_was_written(tmp_path: Path) -> None:
    """Of every byte, in numbers, names, history and settings; a flip that changes nothing that is read is none."""

    def model() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        made = nn.Linear(3, 2)
        return made, torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9)

    def everything() -> str:
        network, again = model()
        read = resume_(tmp_path / "checkpoint", network, again, {"lr": 0.1})
        momenta = [state["momentum_buffer"] for state in again.state.values()]
        return repr((read, [value.tolist() for value in (*network.parameters(), *momenta)]))

    made, optimiser = model()
    made(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    save(tmp_path / "checkpoint", made, optimiser, Progress(1, 2, 3.5, ({"epoch": 1, "loss": math.nan},)), {"lr": 0.1})
    written, content = everything(), (tmp_path / "checkpoint").read_bytes()
    found = []
    for number in range(len(content)):
        flipped = bytearray(content)
        flipped[number] ^= 1 << number % 7
        (tmp_path / "checkpoint").write_bytes(flipped)
        try:
            found.append(everything())
        except CheckpointError as error:
            found.append(str(error))
    refused = ["delete it to start anew" in said for said in found]
    assert sum(refused) > 0.95 * len(content)
    assert all(said == written for said, no in zip(found, refused, strict=True) if not no)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writing fails, the older checkpoint stays, and the training goes on from it."""
    import residuum.files

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "checkpoint", stop_at=2)
    kept = (tmp_path / "checkpoint").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(residuum.files, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint").read_bytes() == kept
    assert run(tmp_path / "checkpoint")[1] == run(None)[1]


def test_divergence_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    """The loss turns to nan in the second epoch; the file still holds finite weights of the first."""
    calls = 0

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        value = torch.nn.functional.cross_entropy(model(x), y)
        return value * torch.nan if calls == 6 + len(evaluations) else value

    evaluations = [0]  # one evaluation batch after the first epoch
    config = TrainConfig(epochs=2, batch=30, lr=0.05)
    with pytest.raises(FloatingPointError, match=r"epoch 2, step 2 of 4: training has diverged"):
        train(Small(norm=True), data(), config, loss=loss, checkpoint=tmp_path / "checkpoint")
    with safe_open(tmp_path / "checkpoint", "pt") as file:
        assert json.loads(file.metadata()["content"])["progress"]["epoch"] == 1
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    "settings", [pytest.param((), id="plain"), pytest.param(("couple=0.7",), id="coupled", marks=pytest.mark.slow)]
)
def test_two_processes_without_batch_norm_equal_one(tmp_path: Path, settings: tuple[str, ...]) -> None:
    common = ("none", 0, "dropout=0", "dtype=float64", *settings)
    assert program(tmp_path / "one", "-", *common) == [0]
    assert program(tmp_path / "two", "-", *common, processes=2) == [0, 0]
    (one, history), (two, rows) = result(tmp_path / "one"), result(tmp_path / "two")
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-9, atol=1e-12), name
    for row, other in zip(history, rows, strict=True):
        assert row == pytest.approx(other, rel=1e-9)


@pytest.mark.slow
def test_two_processes_with_batch_norm_equal_one_that_normalises_the_parts(tmp_path: Path) -> None:
    settings = ("dropout=0", "dtype=float64", "augment=none")
    assert program(tmp_path / "two", "-", "NORM", 0, *settings, processes=2) == [0, 0]
    two, history = result(tmp_path / "two")
    model = Small(norm=True, dropout=0).double()
    rows = by_parts(model, data())
    for name, value in model.state_dict().items():
        assert torch.allclose(two[name].double(), value.double(), rtol=1e-8, atol=1e-11), name
    assert [row["train_loss"] for row in history] == pytest.approx(rows, rel=1e-9)


def by_parts(model: nn.Module, splits: Splits) -> list[float]:
    """The slow obvious twin: each batch in two parts, each normalised by itself; statistics are those of part 0."""
    from residuum.data import TrainingImages
    from residuum.training import _seed, make_optimiser

    config = TrainConfig(epochs=3, batch=16, lr=0.05)
    optimiser = make_optimiser(model, config)
    images = TrainingImages(splits.train, dtype=torch.float64)
    losses = []
    for epoch in range(config.epochs):
        model.train()
        total = 0.0
        order = torch.Generator().manual_seed(_seed(config.seed, epoch, 0))
        for step, (x, y) in enumerate(images.batches(batch=16, generator=order)):
            for group in optimiser.param_groups:
                group["lr"] = config.lr * config.rate((epoch + step / 7) / 3)
            optimiser.zero_grad()
            statistics = None
            for part, labels in zip(x.tensor_split(2), y.tensor_split(2), strict=True):
                value = torch.nn.functional.cross_entropy(model(part), labels, reduction="sum") / len(x)
                value.backward()
                total += value.item() * len(x)
                statistics = statistics or {name: buffer.clone() for name, buffer in model.named_buffers()}
            model.load_state_dict({**model.state_dict(), **statistics})
            optimiser.step()
        losses.append(total / len(images))
    return losses


@pytest.mark.slow
def test_two_processes_can_be_killed_too(tmp_path: Path) -> None:
    assert program(tmp_path / "whole", "-", "NORM", 0, processes=2) == [0, 0]
    assert torchrun(tmp_path / "parts", tmp_path / "checkpoint", "NORM", 10) != 0
    assert (tmp_path / "checkpoint").exists()
    assert torchrun(tmp_path / "parts", tmp_path / "checkpoint", "NORM", 0) == 0
    same(tmp_path / "whole", tmp_path / "parts")


def test_strengths_per_section_go_on_too(tmp_path: Path) -> None:
    """A tuple is a list in the file."""
    config = TrainConfig(epochs=1, batch=50, coupling=Coupling((0.5,)))
    histories = [train(Coupled(), data(), config, checkpoint=tmp_path / "checkpoint") for _ in range(2)]
    assert histories[0] == histories[1]


def another(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A loss with a function of its own."""
    return label_loss(model, x, y)


def test_other_images_labels_or_losses_are_refused(tmp_path: Path) -> None:
    checkpoint, config, given = tmp_path / "checkpoint", TrainConfig(epochs=1, batch=30), data()
    train(Small(norm=True), given, config, checkpoint=checkpoint)
    others = [
        ("train", given.train.images.flip(3), given.train.labels),
        ("train", given.train.images, given.train.labels.flip(0)),
        ("test", given.test.images.flip(3), given.test.labels),
    ]
    for split, images, labels in others:
        other = given._replace(**{split: replace(getattr(given, split), images=images, labels=labels)})
        with pytest.raises(ValueError, match=f"{split} images: .* there, .* here.*delete it to start anew"):
            train(Small(norm=True), other, config, checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"loss: residuum\.answers\.label_loss there, test_resume\.another here"):
        train(Small(norm=True), given, config, loss=another, checkpoint=checkpoint)


def test_a_checkpoint_of_another_penalty_or_inner_loss_is_refused(tmp_path: Path) -> None:
    def trained(penalty: Penalty, inner: Loss) -> None:
        loss = penalised(penalty, inner, sections=lambda model: [model.sections[0]])
        train(Coupled(), data(), TrainConfig(epochs=1, batch=50), loss=loss, checkpoint=tmp_path / "checkpoint")

    trained(Penalty(variation=0.1), label_loss)
    trained(Penalty(variation=0.1), label_loss)
    with pytest.raises(CheckpointError, match=r"variation=0.1, .*label_loss.* there, .*variation=0.2, .* here.*delete"):
        trained(Penalty(variation=0.2), label_loss)
    with pytest.raises(CheckpointError, match=r"residuum.answers.label_loss, .* there, .*test_resume.another, .* here"):
        trained(Penalty(variation=0.1), another)
