"""What solvers take while a network is trained: numbers, resumption, and failures that say where."""

import json
import math
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from residuum.layers.steps import Explicit, RungeKutta, Theta
from residuum.layers.tableaus import RK4
from residuum.models import ResNet, ResNetConfig
from residuum.solve import BiCGStab, ConvergenceError, Solution, fixed_point
from residuum.solvers import Anderson, Picard
from residuum.solving import Effort, Solves, added, contraction, effort_of, summary
from residuum.training import TrainConfig, train
from trainer import data

THETA = Theta(0.5, 0.25)
SMALL = ResNetConfig(blocks=(2,), widths=(4,), channels=1, norm="group", step=THETA)
CONFIG = TrainConfig(epochs=1, batch=25, lr=0.05)
FIVE = {"solves": 5, "examples": 100, "failures": 0}


def network(**changes: object) -> ResNet:
    return ResNet(replace(SMALL, **changes)).double()


def test_what_is_noted_is_what_the_solutions_say() -> None:
    """The twin: the same blocks, solved by hand one after the other, and their backward passes."""
    model, x = network(), torch.randn(6, 1, 8, 8, dtype=torch.float64)
    solves = Solves(model)
    with solves.forward():
        y = model(x)
    with solves.backward():
        y.square().sum().backward()
    found = solves.take()
    assert solves.take() == {}
    h, by_hand = model.enter(x), {}
    for i, block in enumerate(model.sections[0]):
        by_hand[f"sections.0.{i}"] = block.solve(h)
        h = by_hand[f"sections.0.{i}"].value
    model.readout(h).square().sum().backward()
    for name, solution in by_hand.items():
        (record,) = solution.adjoint
        for direction, solved in (("forward", solution), ("backward", record)):
            effort = found[name][direction]
            assert effort == asdict(effort_of(solved))
            assert effort["evaluations"] == solved.evaluations
            assert effort["steps"] == solved.steps.sum()
            assert effort["residual"] == solved.residual.max()
            assert 0 < effort["residual"] <= 1e-6
            assert effort["moved"] == 6
            assert 0 < effort["contraction"] / 6 < 0.5
    assert not any("solve" in vars(block) or "inverse" in vars(block) for block in model.sections[0])


class Own(nn.Module):
    """A block of a user, whose `solve` is an attribute of the object and not a method of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(4, 4)
        self.solve = partial(fixed_point, solver=Picard(1e-5))

    def forward(self, h: Tensor) -> Tensor:
        return self.solve(lambda y: h + 0.1 * torch.tanh(self.branch(y)), h).value


def test_a_block_whose_solve_is_its_own_attribute_keeps_it() -> None:
    block = Own()
    solve, solves = block.solve, Solves(nn.Sequential(block))
    for _ in range(2):
        with solves.forward():
            y = block(torch.ones(2, 4))
        with solves.backward():
            y.sum().backward()
        assert solves.take()["0"]["forward"]["examples"] == 2
        assert vars(block)["solve"] is solve


def test_contraction_is_that_of_a_linear_map() -> None:
    """x <- 0.3 x + b from close to the fixed point, where 1 + |x| hardly moves: each step leaves 0.3 of it."""
    b = torch.full((4, 1), 700.0, dtype=torch.float64)
    start = torch.tensor([[1000.0], [1000.1], [1001.0], [1003.0]], dtype=torch.float64)
    found = fixed_point(lambda x: 0.3 * x + b, start, Picard(1e-9))
    factor = contraction(found)
    assert factor[0].isnan()
    assert factor[1:].numpy() == pytest.approx(0.3, rel=1e-3)
    assert effort_of(found).moved == 3
    unknown = replace(found, start=None)
    assert contraction(unknown).isnan().all()
    assert summary({"b": {"forward": asdict(effort_of(unknown))}})["b"]["forward"]["contraction"] is None


efforts = st.builds(
    Effort,
    *(st.integers(1, 9), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)),
    residual=st.floats(0, 1),
    contraction=st.integers(0, 9).map(float),
    moved=st.integers(0, 9),
    failures=st.integers(0, 9),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(("forward", "backward")), efforts), min_size=1))
def test_adding_up_does_not_depend_on_the_grouping(parts: list[tuple[str, str, Effort]]) -> None:
    single = [{block: {direction: asdict(effort)}} for block, direction, effort in parts]
    left, right, half = {}, {}, len(single) // 2
    for part in single[:half]:
        left = added(left, part)
    for part in single[half:]:
        right = added(right, part)
    both = added(left, right)
    assert json.loads(json.dumps(both)) == both
    for block, direction in {(block, direction) for block, direction, _ in parts}:
        mine = [effort for b, d, effort in parts if (b, d) == (block, direction)]
        assert both[block][direction]["steps"] == sum(effort.steps for effort in mine)
        assert both[block][direction]["residual"] == max(effort.residual for effort in mine)
        said = summary(both)[block][direction]
        assert said["evaluations"] == sum(e.evaluations for e in mine) / sum(e.solves for e in mine)


@pytest.mark.parametrize(("accumulate", "batches"), [(1, 4), (3, 12)])
@pytest.mark.parametrize("reversible", [False, True])
def test_a_history_counts_every_training_image_once_in_each_pass(
    accumulate: int, batches: int, reversible: bool
) -> None:
    config = replace(CONFIG, accumulate=accumulate)
    for row in train(network(reversible=reversible), data(), config):
        assert row["solves"].keys() == {"sections.0.0", "sections.0.1"}
        for passes in row["solves"].values():
            assert passes.keys() == {"forward", "backward"}
            for found in passes.values():
                assert {key: found[key] for key in FIVE} == FIVE | {"solves": batches}
                assert found["residual"] <= 1e-6
                assert 2 < found["evaluations"] < 30


@pytest.mark.parametrize("step", [None, Explicit(0.5), Theta(0.0), RungeKutta(RK4, 0.5)])
def test_where_nothing_is_solved_a_history_says_nothing(step: object) -> None:
    assert "solves" not in train(network(step=step), data(), CONFIG)[0]


def test_a_training_that_was_stopped_inside_an_epoch_has_the_same_history(tmp_path: Path) -> None:
    path, config, steps = tmp_path / "checkpoint", replace(CONFIG, epochs=2), []

    def stop(model: nn.Module, share: float) -> None:
        steps.append(share)
        if len(steps) == 6:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(network(), data(), config, after_backward=stop, checkpoint=path)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["content"])["progress"]["step"] == 2
    rows, whole = train(network(), data(), config, checkpoint=path), train(network(), data(), config)
    assert [row["solves"] for row in rows] == [row["solves"] for row in whole]
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in whole]


class Lenient(nn.Module):
    """A user's block that goes on with what was not solved."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def solve(self, h: Tensor) -> Solution:
        return fixed_point(lambda y: h + 0.5 * self.weight * y, h, Picard(1e-6, 2), throw=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.solve(h).value


def test_what_a_users_block_leaves_unsolved_is_counted() -> None:
    model = nn.Sequential(Lenient())
    solves = Solves(model)
    with solves.forward():
        y = model(torch.ones(3, 2, dtype=torch.float64))
    with solves.backward():
        y.sum().backward()
    found = summary(solves.take())["0"]
    assert found["forward"]["failures"] == found["backward"]["failures"] == 3
    assert found["forward"]["residual"] > 1e-6
    assert math.isclose(found["forward"]["steps"], 2)


def test_a_residual_that_is_not_finite_is_none() -> None:
    lost = fixed_point(lambda x: x * torch.nan, torch.ones(2, 1), Picard(), throw=False)
    found = summary({"b": {"forward": asdict(effort_of(lost))}})["b"]["forward"]
    assert found["residual"] is None
    assert found["failures"] == 2
    json.dumps(found, allow_nan=False)


def blow_up(at: int, block: Callable[[ResNet], nn.Module]) -> Callable[[nn.Module, float], None]:
    """After that many steps a block's weights are so large that its equation is not solved."""
    steps = []

    def after_backward(model: ResNet, share: float) -> None:
        steps.append(share)
        if len(steps) == at:
            with torch.no_grad():
                for conv in (block(model).branch.block.conv1, block(model).branch.block.conv2):
                    conv.weight *= 100

    return after_backward


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize(
    ("at", "said"),
    [
        (6, r"^epoch 2, step 3 of 4, block sections\.0\.1: fixed_point: \d+ of 25 examples did not converge"),
        (4, r"^on the test images after epoch 1, block sections\.0\.1: fixed_point: \d+ of 100 examples"),
    ],
)
def test_an_equation_that_is_not_solved_stops_the_training_and_says_where(
    at: int, said: str, reversible: bool, tmp_path: Path
) -> None:
    path, ruin = tmp_path / "checkpoint", blow_up(at, lambda model: model.sections[0][1])
    with pytest.raises(ConvergenceError, match=said):
        train(
            network(reversible=reversible),
            data(),
            replace(CONFIG, epochs=2),
            after_backward=ruin,
            checkpoint=path,
            checkpoint_seconds=0.0,
        )
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["content"])["progress"]
    assert (progress["epoch"], progress["step"]) == divmod(at, 4) if at > 4 else (0, 4)


@pytest.mark.parametrize("reversible", [False, True])
def test_an_adjoint_that_is_not_solved_says_where(reversible: bool) -> None:
    step = replace(THETA, adjoint=BiCGStab(1e-6, 1))
    with pytest.raises(ConvergenceError, match=r"^epoch 1, step 1 of 4, block sections\.0\.1: .*adjoint"):
        train(network(step=step, reversible=reversible), data(), CONFIG)


def test_a_block_that_cannot_be_inverted_says_where() -> None:
    """Theta = 0.01 is nearly explicit; its inverse is nearly backward Euler and needs more than three steps."""
    step = Theta(0.01, 0.25, solver=Anderson(1e-6, max_steps=3))
    train(network(step=step), data(), CONFIG)
    with pytest.raises(ConvergenceError, match=r"^epoch 1, step 1 of 4, block sections\.0\.1: fixed_point: "):
        train(network(step=step, reversible=True), data(), CONFIG)


def test_another_step_does_not_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    """The weights of theta 0.5 and 1 have the same names and shapes."""
    path = tmp_path / "checkpoint"
    train(network(), data(), CONFIG, checkpoint=path)
    with pytest.raises(ValueError, match=r"network: .*theta=0\.5.* there, .*theta=1\.0.* here"):
        train(network(step=replace(THETA, theta=1.0)), data(), CONFIG, checkpoint=path)
