"""The examples of P3: their data are the paper's, members share nothing, and what failed is named."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from residuum.experiments import p3_extended, p3_figures, p3_panels, p3_runs
from residuum.experiments.p3_runs import PAPER, by_levels, equal_time, with_truncation
from residuum.jobs import Settings
from residuum.layers.branches import Antisymmetric
from residuum.layers.steps import Theta
from residuum.progress import Bar, Show, quiet
from residuum.solve import Dense, NewtonKrylov
from residuum.toys import examples, measures
from residuum.toys.examples import Example
from residuum.toys.networks import Chain, DirectTheta, Passage, Stiff, Turning, refine_
from residuum.toys.problems import PREY, arms, lotka_volterra, sine, spirals, stiff, two_arms, wave
from residuum.toys.truncation import truncation

SINE = replace(PAPER["sine"], depth=3, epochs=2, seeds=(0, 1, 2))
SPIRALS = replace(PAPER["spirals"], depth=3, time=1.5, epochs=1, batch=100, seeds=(0, 1), draws=2)


def test_the_spirals_are_the_papers() -> None:
    """Spec 4.8, check 12."""
    problem = spirals((0, 1))
    for pairs, ones in zip(problem, (257, 256), strict=True):
        assert pairs.x.shape == (2, 513, 2)
        assert pairs.y.sum((1, 2)).tolist() == [ones, ones]
    x, y = problem.validation
    radius = x[0].norm(dim=1)
    assert radius[0] == 0  # row 0
    assert radius[-1] == pytest.approx(0.2 + 511 / 512)  # row 1024, the last but one of class 1
    assert y[0, :, 0].diff().count_nonzero() == 1  # class 0, then class 1
    turn = torch.atan2(x[0, 1:257, 1], x[0, 1:257, 0])
    assert torch.allclose(torch.cos(turn), torch.cos(torch.arange(2, 514, 2).double() * torch.pi / 128))


def test_the_regression_is_the_papers() -> None:
    train, validation = sine((0, 1, 0))
    assert train.x.shape == (3, 100, 1)
    assert validation.x.shape == (3, 200, 1)
    assert torch.equal(train.x[0], train.x[2])
    assert not torch.equal(train.x[0], train.x[1])
    x = train.x[1]
    assert torch.allclose(train.y[1], torch.sin(2 * torch.pi * x) * torch.exp(-x.square() / 2))
    assert validation.x[0].diff(dim=0).std() < 1e-15


@pytest.mark.parametrize(("name", "count"), [("sine", 316), ("spirals", 1075)])
def test_parameters_are_the_papers(name: str, count: int) -> None:
    """Spec 4.8, check 12."""
    network = replace(PAPER[name], seeds=(0, 1)).network()
    assert sum(p.numel() for p in network.parameters()) == 2 * count


@pytest.mark.parametrize("dt", [0.5, 2.5, 200.0])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_direct_solver_finds_the_solution_for_every_step(activation: str, dt: float) -> None:
    """There is one: J is similar to a skew-symmetric matrix. Full Newton steps miss it from 2.5 on."""
    step = Theta(0.5, dt, solver=NewtonKrylov(1e-6, linear=Dense()), adjoint=Dense(1e-6))
    branch, draw = Turning([np.random.default_rng(m) for m in range(2)], 6, activation), np.random.default_rng(2)
    with torch.no_grad():
        branch.weight.mul_(3)
        branch.bias.copy_(torch.tensor(draw.normal(size=branch.bias.shape)))
    h = torch.tensor(3 * draw.normal(size=(200, 6)))
    found = DirectTheta(step, branch).solve(h, throw=False)
    assert found.converged.all()
    y = found.value
    missing = h + dt / 2 * (branch(h) + branch(y)) - y
    assert (missing.norm(dim=1) <= 1e-5 * (1 + y.norm(dim=1))).all()
    if dt < 1:
        assert int(found.steps.max()) < 6  # full steps
    half = DirectTheta(step, branch).solve(torch.cat([h[:50], h[100:150]]), throw=False).value
    assert torch.equal(half[50:], found.value[100:150])  # whatever the other rows of a member are


def test_the_stiff_solution_solves_the_equation() -> None:
    train, validation = stiff((0,), steps=2000, time=2.0)
    y = torch.cat([train.x[0, :, None, :1], train.y[0]], 1)[..., 0]
    t = torch.linspace(0, 2, 2001, dtype=torch.float64)
    slope = (y[:, 2:] - y[:, :-2]) / (t[2] - t[0])
    assert torch.allclose(slope, -20 * (y - torch.cos(t))[:, 1:-1], atol=5e-3)  # 20^3 |y| dt^2 / 6 = 4e-3
    assert not set(train.x[0, :, 0].tolist()) & set(validation.x[0, :, 0].tolist())


def test_orbits_keep_what_prey_and_predators_conserve() -> None:
    a, b, c, d = PREY
    for x, y in lotka_volterra((0,), steps=50, time=10.0):
        h = torch.cat([x[0, :, None], y[0]], 1)
        kept = d * h[..., 0] - c * h[..., 0].log() + b * h[..., 1] - a * h[..., 1].log()
        assert torch.allclose(kept, kept[:, :1].expand_as(kept), atol=1e-8, rtol=0)
        assert float((h - h[:, :1]).abs().max()) > 0.5


def plain(network: Chain, member: int, step: object) -> nn.Sequential:
    """One member as a network of the library's layers."""
    parts: list[nn.Module] = []
    for layer in (network.lift, *network.blocks, network.readout):
        source = getattr(layer, "branch", layer)
        rows, columns = source.weight.shape[1:]
        weight, bias = source.weight[member].detach(), source.bias[member, 0].detach()
        if layer is source:
            made = nn.Linear(rows, columns).double()
            weight = weight.mT
        else:
            made = Antisymmetric(rows, source.activation).double()
        made.weight.data, made.bias.data = weight.clone(), bias.clone()
        parts.append(made if layer is source else step(made))
    return nn.Sequential(*parts)


@pytest.mark.parametrize("gradient", ["exact", "truncated"])
@pytest.mark.parametrize("theta", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("example", [SINE, SPIRALS], ids=["sine", "spirals"])
def test_a_member_is_the_network_of_the_librarys_layers(example: Example, theta: float, gradient: str) -> None:
    example = replace(example, theta=theta, param_grad=gradient, tol=1e-13)
    network, x = example.network(), example.data().train.x
    for p in network.parameters():  # biases off zero
        p.data += 0.1 * torch.randn_like(p)
    count = len(example.members)
    output = network(x.flatten(0, 1)).output
    assert len(output) == count * x.shape[1]
    output.view(count, -1)[1].square().sum().backward()
    step = replace(example.step, solver=NewtonKrylov(1e-13), adjoint=Dense(1e-13))
    other = plain(network, 1, step)
    expected = other(x[1])
    assert torch.allclose(output.view(count, -1, 1)[1], expected, atol=1e-12)
    expected.square().sum().backward()
    assert torch.allclose(network.lift.weight.grad[1].mT, other[0].weight.grad, atol=1e-10)
    for block, twin in zip(network.blocks, other[1:-1], strict=True):
        grad = twin.branch.weight.grad
        expected = torch.zeros_like(twin.branch.weight) if grad is None else grad
        assert torch.allclose(block.branch.weight.grad[1], expected, atol=1e-10)
        assert not block.branch.weight.grad[0].any()


def test_at_theta_one_the_truncated_gradient_leaves_the_blocks_as_they_were(tmp_path: Path) -> None:
    """Spec 4.8, check 7."""
    moved = {}
    for example in with_truncation(SPIRALS, (1.0,)):
        folder = tmp_path / example.param_grad
        folder.mkdir()
        example.execute(folder, Settings(), quiet)
        pairs = zip(example.network().parameters(), example.trained(folder).parameters(), strict=True)
        moved[example.param_grad] = [not torch.equal(p, q) for p, q in pairs]
    assert moved["exact"] == [True] * len(moved["exact"])
    assert moved["truncated"] == [True, True, *[False] * 2 * SPIRALS.depth, True, True]


def executed(example: Example, folder: Path) -> dict:
    folder.mkdir(exist_ok=True)
    example.execute(folder, Settings(), quiet)
    return json.loads((folder / "values.json").read_text())


def weights_of(example: Example, folder: Path, member: int) -> Tensor:
    return torch.cat([p[member].flatten() for p in example.trained(folder).parameters()])


@pytest.mark.parametrize("theta", [0.0, 0.5])
def test_members_share_nothing_and_one_that_fails_is_named(tmp_path: Path, theta: float) -> None:
    example = replace(SINE, theta=theta)
    alone = replace(example, seeds=(1,))
    wild = replace(example, rates=(1e4, 0.01))
    found = {e: executed(e, tmp_path / e.key) for e in (example, alone, wild)}
    expected = weights_of(alone, tmp_path / alone.key, 0)
    assert torch.allclose(weights_of(example, tmp_path / example.key, 1), expected, rtol=0, atol=1e-12)
    assert torch.allclose(weights_of(wild, tmp_path / wild.key, 4), expected, rtol=0, atol=1e-12)
    assert found[example]["failed"] == [None] * 3
    assert found[wild]["failed"][3:] == [None] * 3
    assert all(why.startswith("not ") and "in epoch 1, step " in why for why in found[wild]["failed"][:3])
    last = found[wild]["history"][-1]
    assert last["validation_loss"][:3] == [None] * 3
    assert last["validation_loss"][3:] == pytest.approx(found[example]["history"][-1]["validation_loss"], abs=1e-12)


def stopping(after: int) -> tuple[list[int], Bar]:
    """A progress bar that stops a training once, after so many epochs; and the epochs that it has seen so far."""
    seen: list[int] = []

    @contextmanager
    def bar(title: str, total: int) -> Iterator[Show]:
        def show(done: int, _: str = "") -> None:
            seen.append(done)
            if len(seen) == after:
                raise KeyboardInterrupt

        assert title.endswith(", theta 0.5")
        assert total > 1
        yield show

    return seen, bar


def test_a_stopped_example_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "_SECONDS", 0.0)
    example = replace(SINE, epochs=4, batch=50, rates=(0.01, 1e4), optimiser="adam")
    whole = executed(example, tmp_path / "whole")

    seen, bar = stopping(2)
    (tmp_path / "stopped").mkdir()
    with pytest.raises(KeyboardInterrupt):
        example.execute(tmp_path / "stopped", Settings(), bar)
    assert [file.name for file in (tmp_path / "stopped").iterdir()] == ["checkpoint"]
    example.execute(tmp_path / "stopped", Settings(), bar)
    assert seen == [1, 2, 3, 4]
    again = json.loads((tmp_path / "stopped" / "values.json").read_text())
    assert whole["seconds"] > 0
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}
    for member in range(6):
        both = (weights_of(example, tmp_path / name, member) for name in ("whole", "stopped"))
        assert torch.equal(*both)


LEVELS = replace(SPIRALS, depth=5, time=2.5, levels=3, epochs=4)


def test_levels_are_networks_of_half_the_step() -> None:
    """As in the paper's code: L blocks become 2 (L - 1) + 1, dt is halved."""
    assert [(stage.depth, stage.step.dt, stage.levels) for stage in LEVELS.stages] == [
        (2, 2.0, 1),
        (3, 1.0, 1),
        (5, 0.5, 1),
    ]
    assert [stage.depth for stage in by_levels(PAPER["spirals"]).stages] == [7, 13, 25]
    assert SPIRALS.stages == (SPIRALS,)


def test_a_refined_network_has_the_blocks_of_the_coarse_one_and_their_means() -> None:
    _, middle, last = (stage.network() for stage in LEVELS.stages)
    for p in middle.parameters():
        p.data += torch.randn_like(p)
    refine_(last, middle)
    weights = [block.branch.weight for block in middle.blocks]
    expected = [weights[0], (weights[0] + weights[1]) / 2, weights[1], (weights[1] + weights[2]) / 2, weights[2]]
    for block, weight in zip(last.blocks, expected, strict=True):
        assert torch.equal(block.branch.weight, weight)
    assert torch.equal(last.lift.weight, middle.lift.weight)
    assert torch.equal(last.readout.bias, middle.readout.bias)
    with pytest.raises(ValueError, match="refine: 3 blocks become 5, not 3"):
        refine_(middle, middle)


def test_training_by_levels_is_that_of_each_level_in_turn(tmp_path: Path) -> None:
    """By hand: a training of the coarse network, then one of the fine one that begins with its weights."""
    example = replace(LEVELS, depth=3, time=1.5, levels=2, epochs=2, rates=(0.01,), seeds=(3,))
    values = executed(example, tmp_path / "levels")
    coarse, fine = example.stages
    problem, networks = example.data(), (coarse.network(), fine.network())
    for epoch, network in enumerate(networks):
        if epoch:
            refine_(network, networks[0])
        optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
        for x, y in examples._batches(example, problem.train, epoch):
            optimiser.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(network(x).output, y).backward()
            optimiser.step()
    for p, expected in zip(example.trained(tmp_path / "levels").parameters(), network.parameters(), strict=True):
        assert torch.allclose(p, expected, rtol=0, atol=1e-12)
    assert values["parameters"] == sum(p.numel() for p in networks[1].parameters())


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_training_by_levels_can_be_stopped_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Also where a level has just ended: 4 epochs are 2, 1 and 1 of the three levels."""
    monkeypatch.setattr(examples, "_SECONDS", 0.0)
    whole = executed(LEVELS, tmp_path / "whole")
    seen, bar = stopping(stop)
    (tmp_path / "stopped").mkdir()
    with pytest.raises(KeyboardInterrupt):
        LEVELS.execute(tmp_path / "stopped", Settings(), bar)
    LEVELS.execute(tmp_path / "stopped", Settings(), bar)
    assert seen == [1, 2, 3, 4]  # none of them twice
    again = json.loads((tmp_path / "stopped" / "values.json").read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}
    for p, q in zip(*(LEVELS.trained(tmp_path / name).parameters() for name in ("whole", "stopped")), strict=True):
        assert torch.equal(p, q)


def test_a_checkpoint_of_other_levels_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "_SECONDS", 0.0)
    other, (_, bar) = replace(LEVELS, epochs=8), stopping(6)
    with pytest.raises(KeyboardInterrupt):
        other.execute(tmp_path, Settings(), bar)
    assert executed(LEVELS, tmp_path)["failed"] == [None, None]
    assert "begins anew" in (tmp_path / "log.txt").read_text()


def test_rates_fall_evenly(tmp_path: Path) -> None:
    """One step of gradient descent per epoch, by hand, at rates of 0.1 and 0.1 sqrt(0.1)."""
    example = replace(SINE, theta=0.0, batch=0, epochs=2, rates=(0.1,), seeds=(0,), decay=0.1)
    executed(example, tmp_path / "falling")
    network, (x, y) = example.network(), example.data().train
    for rate in (0.1, 0.1 * 0.1**0.5):
        loss = (network(x[0]).output - y[0]).square().mean()
        for p, slope in zip(network.parameters(), torch.autograd.grad(loss, list(network.parameters())), strict=True):
            p.data -= rate * slope
    for p, found in zip(network.parameters(), example.trained(tmp_path / "falling").parameters(), strict=True):
        assert torch.allclose(p, found, rtol=0, atol=1e-12)


def test_the_wave_is_the_papers() -> None:
    train, validation = wave((0, 1))
    assert train.x.shape == (2, 20, 1)
    assert validation.x.shape == (2, 40, 1)
    assert (train.x.min(), train.x.max()) == (-5, 5)
    assert torch.equal(train.y, torch.sin(train.x))
    network = replace(PAPER["wave"], seeds=(0, 1)).network()
    passage = network(train.x.flatten(0, 1))
    assert torch.equal(passage.states[0], torch.cat([train.x, torch.zeros_like(train.x)], 2).flatten(0, 1))
    assert torch.equal(passage.output[:, 0], passage.states[-1][:, 1])
    assert len(passage.states) == 6
    assert sum(p.numel() for p in network.parameters()) == 2 * (2 * 10 + 10 + 3 * (10 * 10 + 10) + 10 * 2)
    for layer in network.blocks[0].branch:
        assert torch.allclose(layer.weight.norm(dim=(1, 2)), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("theta", [0.0, 0.5])
def test_penalties_of_the_wave_are_those_of_exact_jacobians(theta: float) -> None:
    """Both, and their gradient in the weights, states held, by autograd's whole Jacobians; trapezoidal weights.

    The divergence at point t of n counts ((t + 1) / n)^2 (spec 4.9; the power is that of the paper's code).
    """
    example = replace(PAPER["wave"], theta=theta, depth=3, time=3.0, width=4, seeds=(0, 1), divergence=0.7, tol=1e-12)
    network, x = example.network(), torch.randn(10, 1, dtype=torch.float64)
    passage = network(x)
    found = examples._along_the_path(example, network, passage)
    f, held = network.blocks[0].branch, [h.detach() for h in passage.states]
    expected = []
    for member in range(2):
        total = torch.zeros((), dtype=torch.float64)
        for row in range(5 * member, 5 * member + 5):
            for t, (share, states) in enumerate(zip((1 / 6, 1 / 3, 1 / 3, 1 / 6), held, strict=True)):
                late = ((t + 1) / 4) ** 2

                def slope(h: Tensor, states: Tensor = states, row: int = row) -> Tensor:
                    return f(torch.cat([states[:row], h[None], states[row + 1 :]]))[row]

                j = torch.autograd.functional.jacobian(slope, states[row], create_graph=True)
                total = total + share * (0.7 * late * torch.trace(j) / 2 + 0.1 * j.square().sum() / 4) / 5
        expected.append(total)
    assert torch.allclose(found, torch.stack(expected), atol=1e-12)
    weight = f[0].weight
    grads = [torch.autograd.grad(value.sum(), weight, retain_graph=True)[0] for value in (found, torch.stack(expected))]
    assert torch.allclose(*grads, atol=1e-9)
    assert float(grads[0].abs().max()) > 1e-6


def test_a_penalised_divergence_falls(tmp_path: Path) -> None:
    mean = {}
    for divergence in (0.0, 1.0):
        example = replace(PAPER["wave"], depth=1, epochs=20, time=1.0, rates=(0.01,), divergence=divergence)
        executed(example, tmp_path / str(divergence))
        network, problem = example.trained(tmp_path / str(divergence)), example.data()
        passage = network(problem.train.x[0])
        alone = replace(example, divergence=1.0, jacobian=0.0)
        mean[divergence] = examples._along_the_path(alone, network, passage).item()
    assert mean[1.0] < mean[0.0] - 0.05


def test_the_arms_are_one_apart() -> None:
    for pairs in arms((0,)):
        x, y = pairs.x[0], pairs.y[0, :, 0]
        assert y.tolist() == [0.0] * 200 + [1.0] * 200
        assert torch.equal(x[:200], -x[200:])
    one, other = (torch.tensor(part) for part in np.split(two_arms(97)[0], 2))
    # On a ray from the middle are points 0, 32, 64, 96 of one arm, 2 apart, and 16, 48, 80 of the other half way.
    assert torch.allclose(one[::32].norm(dim=1), torch.tensor([6.5, 4.5, 2.5, 0.5]).double())
    assert torch.allclose(other[16::32].norm(dim=1), torch.tensor([5.5, 3.5, 1.5]).double())
    assert torch.allclose(torch.cosine_similarity(one[::32][:3], other[16::32]), torch.ones(3).double())
    train, validation = arms((0,))
    assert train.x.shape == validation.x.shape == (1, 400, 2)
    assert float(train.x.norm(dim=-1).max()) == 6.5
    assert float(validation.x.norm(dim=-1).min()) == pytest.approx(0.5)


@pytest.mark.parametrize("bound", [1.0, 2.0])
def test_a_bounded_branch_stretches_no_more_than_its_bound(bound: float) -> None:
    network = replace(PAPER["arms"], bound=bound, seeds=(0, 1), depth=2, time=2.0).network()
    for p in network.parameters():
        p.data += torch.randn_like(p)
    h, v = (torch.randn(100, 3, dtype=torch.float64) for _ in range(2))
    for block in network.blocks:
        stretched = (block.branch(h + 1e-3 * v) - block.branch(h)).norm(dim=1) / (1e-3 * v).norm(dim=1)
        assert stretched.max().item() <= bound
        norms = torch.stack([torch.linalg.matrix_norm(layer.weight, 2) for layer in block.branch.branch])
        assert torch.allclose(norms, torch.ones(4, 2, dtype=torch.float64))


def test_arms_are_moved_along_the_radius(tmp_path: Path) -> None:
    """By a network that knows the answer: the nearest arm. Beyond half way it is wrong where there is another arm."""
    on, of = (torch.cat([split[part][0] for split in arms((0,))]) for part in (0, 1))

    class Nearest(nn.Module):
        def forward(self, x: Tensor) -> Passage:
            return Passage(of[torch.cdist(x, on).argmin(1)] - 0.5, [], [])

    right = [measures.shifted_accuracy(Nearest(), 1, by)[0] for by in (0.0, 0.33, 0.7)]
    assert right[0] == 1.0
    assert right[1] > 0.97
    assert right[2] < 0.2  # outside the last turn there is no other arm
    example = replace(PAPER["arms"], bound=1.0, depth=1, time=1.0, epochs=1, seeds=(0, 1))
    moved = executed(example, tmp_path / "arms")["measured"]["shifted"]
    assert list(moved) == ["0.0", "0.1", "0.2", "0.33", "0.4", "0.5"]
    network, (x, y) = example.trained(tmp_path / "arms"), map(torch.tensor, two_arms(500))
    output = network(x.repeat(2, 1)).output.view(2, -1)
    assert moved["0.0"] == ((output > 0) == (y[:, 0] > 0.5)).double().mean(1).tolist()


def test_a_free_branch_of_the_arms_is_scaled() -> None:
    network = replace(PAPER["arms"], seeds=(0,), depth=1, time=1.0).network()
    h, branch = torch.randn(5, 3, dtype=torch.float64), network.blocks[0].branch
    assert torch.equal(branch(h), 15 * branch.branch(h))
    assert sum(p.numel() for p in network.parameters()) == 3 * 10 + 10 + 2 * (10 * 10 + 10) + 10 * 3 + 3


def test_descriptions_come_back_and_keys_tell_settings_apart() -> None:
    changed = {
        "problem": "spirals", "theta": 0.25, "depth": 4, "time": 2.0, "width": 3, "activation": "tanh", "epochs": 7,
        "batch": 9, "optimiser": "adam", "rates": (0.5, 0.1), "seeds": (3,), "variation": 0.1,
        "param_grad": "truncated", "form": "midpoint", "solver": "picard", "tol": 1e-5, "every": 2,
        "limits": (-3.0, -1.0), "decay": 0.1, "bound": 2.0, "divergence": 0.5, "jacobian": 0.2, "levels": 2, "draws": 3,
    }  # fmt: skip
    assert changed.keys() == {field.name for field in fields(Example)}
    base = replace(PAPER["sine"], solver="anderson")
    others = {"bound": "arms", "divergence": "wave", "jacobian": "wave"}
    keys = {replace(base, problem=problem).key for problem in others.values()} | {base.key}
    for name, value in changed.items():
        of = replace(base, problem=others.get(name, "sine"), depth=9 if name == "levels" else base.depth)
        keys.add(of.key)
        example = replace(of, **{name: value})
        assert Example.from_description(json.loads(json.dumps(example.describe()))) == example
        keys.add(example.key)
    assert len(keys) == 4 + len(changed)
    assert Example("sine").key == "b648b16f440e68ca"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"problem": "sin"}, "unknown problem 'sin'; did you mean 'sine'"),
        ({"optimiser": "lbfgs"}, "unknown optimiser 'lbfgs'"),
        ({"solver": "newtn"}, "unknown solver 'newtn'; did you mean 'newton'"),
        ({"theta": 2.0}, "theta is 2.0"),
        ({"depth": 0}, "'depth': 0"),
        ({"draws": 0}, "'draws': 0"),
        ({"every": 3}, "every a divisor of depth"),
        ({"rates": ()}, "rates \\(\\)"),
        ({"variation": -1.0}, "variation is -1.0"),
        ({"form": "midpoint"}, "solver 'direct' is for sine and spirals in the two-point form; take 'anderson'"),
        ({"problem": "stiff"}, "solver 'direct' is for sine and spirals"),
        ({"problem": "stiff", "solver": "anderson", "variation": 0.1}, "for sine and spirals only"),
        ({"bound": 1.0}, "bound is 1.0; it is 0 or more, and for arms only"),
        ({"problem": "arms", "solver": "anderson", "bound": -1.0}, "bound is -1.0; it is 0 or more"),
        ({"divergence": 1.0}, "divergence is 1.0; it is 0 or more, and for wave only"),
        ({"problem": "wave", "solver": "anderson", "jacobian": float("nan")}, "jacobian is nan"),
        ({"levels": 0}, "levels is 0; it is 1 or more, and for sine and spirals only"),
        ({"problem": "wave", "solver": "anderson", "levels": 2}, "levels is 2; it is 1 or more, and for sine and"),
        ({"levels": 2}, "depth 10 must be 1 more than a multiple of 2"),
        ({"decay": 0.0}, "decay is 0.0; it must be above 0, and at most 1"),
        ({"problem": "spirals", "depth": 9, "levels": 2, "every": 3}, "'depth': 5, .* every a divisor of depth"),
        ({"levels": 4, "depth": 9, "epochs": 3}, "levels is 4: 3 epochs must be as many at least"),
    ],
)
def test_bad_settings_are_refused(changes: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(PAPER["sine"], **changes)


@pytest.mark.parametrize(
    ("described", "match"),
    [
        ({"kind": "network", "format": 1, "problem": "sine"}, "this code reads 'example' of format 1"),
        ({"kind": "example", "format": 2, "problem": "sine"}, "this code reads 'example' of format 1"),
        ({"kind": "example", "format": 1, "problem": "sine", "rate": 1}, "Example has no 'rate'"),
    ],
)
def test_other_descriptions_are_refused(described: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Example.from_description(described)


def test_the_stiff_right_hand_side_keeps_its_limits() -> None:
    branch = Stiff([np.random.default_rng(seed) for seed in range(4)], 6, (-25.0, -15.0))
    for p in branch.parameters():
        p.data *= 5
    h = (3 * torch.randn(80, 2, dtype=torch.float64)).requires_grad_()
    slope = branch(h)
    assert torch.equal(slope[:, 1], torch.ones(80).double())
    of_y = torch.autograd.grad(slope[:, 0].sum(), h)[0][:, 0]
    assert -25 <= of_y.min() < -20.01
    assert -19.99 < of_y.max() <= -15


def test_jacobians_are_those_of_autograd() -> None:
    network = replace(SPIRALS, theta=0.5, tol=1e-13).network().requires_grad_(False)
    x = torch.randn(6, 2, dtype=torch.float64)
    whole, inner = measures.jacobians(network, x)
    for row in range(6):

        def last(entry: Tensor, row: int = row) -> Tensor:
            return network(torch.cat([x[:row], entry[None], x[row + 1 :]])).states[-1][row]

        expected = torch.linalg.svdvals(torch.autograd.functional.jacobian(last, x[row]))
        assert torch.allclose(whole[row], expected, atol=1e-9)
    lift = network.lift.weight[0]
    assert (whole[:3, 0] <= inner[:3, 0] * torch.linalg.matrix_norm(lift, 2) + 1e-9).all()


def test_unsolved_equations_are_failures() -> None:
    example = replace(SPIRALS, depth=1, time=0.5, solver="gradient descent", tol=1e-10)
    network, x = example.network(), example.data().train.x[:, :10].flatten(0, 1)
    assert network(x).solved(2).tolist() == [True, True]
    network = replace(example, solver="picard", time=50.0).network()
    for p in network.parameters():
        p.data *= 10
    with torch.no_grad():
        assert network(x).solved(2).tolist() == [False, False]


def test_the_papers_solver_finds_the_same() -> None:
    x = SPIRALS.data().train.x[:, :10].flatten(0, 1)
    outputs = [
        replace(SPIRALS, solver=solver, tol=1e-12).network()(x).output for solver in ("direct", "gradient descent")
    ]
    assert torch.allclose(*outputs, atol=1e-10)


def test_the_truncated_gradient_gets_worse_with_theta() -> None:
    """Spec 4.4: the error grows to 1 at theta = 1, where nothing is left."""
    thetas = (0.25, 0.5, 0.75, 1.0)
    found = [truncation(replace(SPIRALS, theta=theta)) for theta in thetas]
    errors = [median(row["error"]) for row in found]
    assert errors == sorted(errors)
    assert found[-1] == {"error": [1.0, 1.0], "cosine": [0.0, 0.0]}
    assert found[0]["error"][0] == pytest.approx(0.25, abs=0.1)  # a quarter of the blocks' terms is left out
    with pytest.raises(ValueError, match="truncation is for 'sine' and 'spirals', not for 'stiff'"):
        truncation(PAPER["stiff"])


def test_minutes_grow_with_the_work() -> None:
    for example in PAPER.values():
        assert p3_runs._COUNTS[example.problem] == replace(example, seeds=(0,)).data().train.x.shape[1]
        explicit, implicit = (p3_runs.minutes(replace(example, theta=theta)) for theta in (0.0, 0.5))
        assert 0 < explicit < implicit or example.problem == "arms"  # which has explicit networks only
        assert p3_runs.minutes(replace(example, epochs=2 * example.epochs)) == pytest.approx(
            2 * p3_runs.minutes(example)
        )


def test_grids() -> None:
    grid = equal_time(PAPER["sine"], (5, 10), (0.01, 0.1), 0.5)
    assert [(e.theta, e.depth, e.step.dt, len(e.members)) for e in grid] == [(0.5, 5, 0.2, 2), (0.5, 10, 0.1, 2)]


def test_orbits_are_trained_on_where_they_are_seen(tmp_path: Path) -> None:
    stiff_example = replace(PAPER["stiff"], epochs=4, depth=4, every=2, rates=(0.01,), width=4)
    values = executed(stiff_example, tmp_path / "stiff")
    first, last = values["history"][0], values["history"][-1]
    assert last["train_loss"][0] < first["train_loss"][0]
    network, problem = stiff_example.trained(tmp_path / "stiff"), stiff_example.data()
    gap = network(problem.train.x[0]).output - problem.train.y[0]
    assert last["train_loss"][0] == pytest.approx(float(gap[:, [1, 3]].square().mean()))
    gap = network(problem.validation.x[0]).output - problem.validation.y[0]
    assert last["validation_loss"][0] == pytest.approx(float(gap.square().mean()))


def test_figures_show_what_was_found(tmp_path: Path) -> None:
    prey = replace(PAPER["lotka_volterra"], epochs=1, depth=4, time=1.0, width=3)
    kinds = {
        "sine": [replace(SINE, rates=(0.01, 1e4), theta=theta) for theta in (0.0, 0.5)],
        "spirals": with_truncation(SPIRALS, (1.0,)),
        "stiff": [replace(PAPER["stiff"], epochs=1, depth=4, width=3)],
        "prey": [prey],
        "wave": [
            replace(PAPER["wave"], epochs=1, depth=1, time=1.0, theta=theta, divergence=divergence)
            for theta in (0.0, 1.0)
            for divergence in (0.0, 1.0)
        ],
        "arms": [replace(PAPER["arms"], epochs=1, depth=1, time=1.0, bound=bound) for bound in (0.0, 1.0)],
    }
    folders = {}
    for kind, some in kinds.items():
        folders[kind] = {example: tmp_path / example.key for example in some}
        for example, folder in folders[kind].items():
            executed(example, folder)
    drawn = [
        p3_figures.convergence(folders["sine"]),
        p3_figures.convergence(folders["spirals"]),
        p3_figures.fits(folders["sine"]),
        p3_figures.regions(folders["spirals"]),
        p3_figures.robustness(folders["spirals"]),
        p3_extended.stiffness(folders["stiff"]),
        p3_extended.phase_plane_of_prey(folders["prey"]),
        p3_extended.penalties(folders["wave"]),
        p3_extended.shifts(folders["arms"]),
        p3_figures.solvers(*next(iter(folders["spirals"].items())), block=1, steps=3),
    ]
    for number, figure in enumerate(drawn):
        figure.savefig(tmp_path / f"{number}.png", dpi=50)
        for axes in figure.axes:
            assert axes.get_xlabel() or axes.get_xticklabels()
            assert axes.get_ylabel()
    loss = executed(kinds["sine"][0], tmp_path / "again")["history"][-1]["validation_loss"][:3]
    assert f"{sorted(loss)[1]:.2g} at theta = 0, epoch 2" in drawn[0].get_suptitle()
    example, folder = next(iter(folders["sine"].items()))
    x = torch.linspace(-1, 1, 5).double()[:, None]
    expected = example.trained(folder)(x.repeat(6, 1)).output.view(6, 5, 1)[2]
    assert torch.allclose(p3_panels.one(example, folder, 2)(x).output, expected)
