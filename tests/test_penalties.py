"""Penalties along the path of states: estimates without bias, the trapezoidal rule, gradients of the exact terms."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles_penalties as oracles
import residuum.penalties as penalties
from residuum import Limit, Theta, reversible
from residuum.data import Splits, load_splits
from residuum.layers.pairs import Additive
from residuum.layers.sharing import NAIVE
from residuum.layers.steps import Explicit, RungeKutta
from residuum.layers.tableaus import RK4, STOERMER_VERLET
from residuum.models import ResNet, ResNetConfig
from residuum.penalties import Penalty, hutchinson, penalised, penalty_of, terms, trapezoidal, variation
from residuum.solve import Anderson, BiCGStab
from residuum.training import TrainConfig, evaluate, label_loss, train

SMALL = ResNetConfig((2, 1), (4, 8), 1, norm="group")
ALL = Penalty(divergence=0.3, jacobian=2.0, magnitude=0.7, variation=0.2, power=1.5)


def branch(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, width)).double()


class Plain(nn.Module):
    """A user's block, with another name for its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = branch()

    def forward(self, h: Tensor) -> Tensor:
        return h + self.inside(h)


def states_of(blocks: list[nn.Module], h: Tensor) -> list[Tensor]:
    states = [h]
    for block in blocks:
        states.append(block(states[-1]))
    return states


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 5), count=st.integers(1, 3))
def test_hutchinson_has_no_bias(seed: int, width: int, count: int) -> None:
    """The mean over all vectors of signs is the trace, and the squared norm; to rounding."""
    torch.manual_seed(seed)
    f, h = branch(width), torch.randn(count, width, dtype=torch.float64)
    found = hutchinson(f, h, oracles.all_signs(h))
    assert torch.equal(found.value, f(h))
    assert torch.allclose(found.trace, oracles.trace(f, h), atol=1e-12)
    assert torch.allclose(found.square, oracles.frobenius(f, h), atol=1e-12)


@pytest.mark.parametrize("draws", ["signs", "gaussian"])
def test_the_variances_are_those_that_are_stated(draws: str) -> None:
    """Of 20,000 draws the error of a variance is 3 % or less (kurtosis up to 15), its tolerance four times that."""
    A = torch.randn(4, 4, dtype=torch.float64)
    h = torch.zeros(20_000, 4, dtype=torch.float64)
    found = hutchinson(lambda h: h @ A.T, h, penalties._draw(h, 1, draws))
    for estimates, S, true in (
        (found.trace, (A + A.T) / 2, A.trace()),
        (found.square, A @ A.T, A.square().sum()),
    ):
        counted = S if draws == "gaussian" else S - S.diag().diag()
        variance = 2 * counted.square().sum()
        assert abs(estimates.mean() - true) < 5 * (variance / len(h)).sqrt()
        assert estimates.var() == pytest.approx(variance.item(), rel=0.12)


def test_signs_are_exact_for_a_diagonal_map() -> None:
    scale, h = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    found = hutchinson(lambda h: scale * h.square(), h, penalties._draw(h, 1, "signs"))
    assert torch.allclose(found.trace, (2 * scale * h).sum(1))
    assert torch.allclose(found.square, (2 * scale * h).square().sum(1))


def test_weights_of_the_trapezoidal_rule() -> None:
    assert trapezoidal([0.5] * 4) == [0.125, 0.25, 0.25, 0.25, 0.125]
    assert trapezoidal([1.0, 3.0]) == [0.125, 0.5, 0.375]
    assert trapezoidal([-2.0]) == [0.5, 0.5]


TIGHT = {"solver": Anderson(1e-13), "adjoint": BiCGStab(1e-13)}


def stack(kind: str) -> tuple[list[nn.Module], list, list[float]]:
    """Blocks, their right-hand sides, their step sizes."""
    if kind == "plain":
        blocks = [Plain() for _ in range(3)]
        return blocks, [b.inside for b in blocks], [1.0] * 3
    if kind == "shared":
        block = Explicit(0.5)(branch())
        return [block] * 3, [block.branch] * 3, [0.5] * 3
    if kind == "theta":
        blocks = [Theta(0.5, dt, **TIGHT)(branch()) for dt in (0.2, 0.4, 0.3)]
        return blocks, [b.branch for b in blocks], [0.2, 0.4, 0.3]
    blocks = [RungeKutta(RK4, dt)(branch()) for dt in (0.5, 0.25)]
    return blocks, [b.branches[0] for b in blocks], [0.5, 0.25]


@pytest.mark.parametrize("kind", ["plain", "shared", "theta", "runge-kutta"])
def test_terms_and_their_gradients_are_those_of_the_exact_twin(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all vectors of signs for probes; also through the states, and in the state that comes in."""
    monkeypatch.setattr(penalties, "_draw", lambda h, count, draws: oracles.all_signs(h))
    blocks, sides, dts = stack(kind)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weights = [x, *nn.ModuleList(blocks).parameters()]
    states = states_of(blocks, x)
    found = terms(ALL, blocks, states)
    exact = oracles.path(sides, dts, states, ALL.power)
    exact["divergence"] = torch.sigmoid(exact["divergence"])
    exact["variation"] = oracles.variation(blocks)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert torch.allclose(found[name], getattr(ALL, name) * value, rtol=1e-10), name
    true = torch.autograd.grad(sum(getattr(ALL, n) * v for n, v in exact.items()), weights, retain_graph=True)
    ours = torch.autograd.grad(sum(found.values()), weights)
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-11) for a, b in zip(ours, true, strict=True))
    assert all(g.abs().max() > 1e-6 for g in true[:2])  # they do depend on it


def test_terms_without_weight_are_not_there_and_cost_nothing() -> None:
    blocks, _, _ = stack("plain")
    states = states_of(blocks, torch.randn(2, 3, dtype=torch.float64))
    calls: list[int] = []
    for block in blocks:
        block.inside.register_forward_hook(lambda *_: calls.append(1))
    assert terms(Penalty(), blocks, states) == {}
    assert terms(Penalty(variation=1.0), blocks, states).keys() == {"variation"}
    assert not calls
    loose = terms(Penalty(divergence=1.0, squashed=False, probes=2), blocks, states)
    assert len(calls) == 4  # three blocks at three states, the last at the last once more
    assert loose.keys() == {"divergence"}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), depth=st.integers(1, 4))
def test_variation_is_zero_for_equal_blocks_only(seed: int, depth: int) -> None:
    torch.manual_seed(seed)
    blocks = [copy.deepcopy(block) for block in [branch()] * depth]
    assert variation(blocks) == variation([blocks[0]] * depth) == 0
    other = [branch() for _ in range(depth)]
    assert (variation(other) > 0) == (depth > 1)
    if depth > 1:
        assert torch.allclose(variation(other), oracles.variation(other))


def test_a_divergence_free_flow_is_at_one_half() -> None:
    """v^T J v is 0 for every v where J is antisymmetric."""
    K = torch.randn(3, 3, dtype=torch.float64)
    turn = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        turn.weight.copy_(K - K.T)
    block = Theta(0.5, 0.3)(turn)
    states = states_of([block], torch.randn(5, 3, dtype=torch.float64))
    found = terms(Penalty(divergence=0.2, draws="gaussian"), [block], states)
    assert found["divergence"].item() == pytest.approx(0.1)
    shrinking = Explicit()(turn)
    with torch.no_grad():
        turn.weight.copy_(-2 * torch.eye(3))
    found = terms(Penalty(divergence=1.0), [shrinking], states)
    assert found["divergence"].item() == pytest.approx(1 / (1 + math.exp(2)))


def loss_and_gradients(model: nn.Module, loss: Callable, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(7)
    value = loss(model, x, y)
    return value.detach(), gradients_of(value, model)


def gradients_of(value: Tensor, model: nn.Module) -> list[Tensor]:
    """By `backward`: torch 2.13 crashes on group norm in channels-last memory whose input needs no gradient."""
    model.zero_grad()
    value.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("step", [None, Theta(0.5, 0.3, solver=Anderson(1e-12), adjoint=BiCGStab(1e-12))])
def test_the_loss_of_a_network_is_that_of_its_stream(step: Theta | None) -> None:
    """States from `cut` and `run`; in eval mode there is no penalty; hooks are gone afterwards."""
    model = ResNet(replace(SMALL, step=step)).double().train()
    x, y = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.arange(4)
    value, gradients = loss_and_gradients(model, penalised(ALL, label_loss), x, y)
    torch.manual_seed(7)
    trace = model.cut(x).run()
    expected = label_loss(model, x, y)
    for section, states in zip(model.sections, trace.states, strict=True):
        expected = expected + sum(terms(ALL, list(section), states).values())
    assert torch.allclose(value, expected, rtol=1e-9)
    true = gradients_of(expected, model)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(gradients, true, strict=True))
    assert not any(block._forward_hooks for block in model.modules())
    assert torch.equal(penalised(ALL, label_loss)(model.eval(), x, y), label_loss(model, x, y))


def test_shared_and_limited_blocks_take_one_step_of_their_limits() -> None:
    config = ResNetConfig((4,), (4,), 1, norm="none", sharing=replace(NAIVE, free=1), limit=Limit(0.8, 8))
    model = ResNet(config).train()
    moved: list[int] = []
    model.sections[0][1].conv1.parametrizations.weight[0].register_forward_hook(lambda *_: moved.append(1))
    value = penalised(ALL, label_loss)(model, torch.randn(4, 1, 8, 8), torch.arange(4))
    value.backward()
    assert len(moved) == 1
    assert value.isfinite()


def test_any_list_of_blocks_also_a_reversible_one() -> None:
    blocks = [Theta(0.5, 0.2, **TIGHT)(branch()) for _ in range(3)]
    plain = nn.Sequential(*blocks)
    stack_ = nn.Sequential(reversible(copy.deepcopy(blocks)))
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    squares = lambda model, x, y: (model(x) - y).square().mean()  # noqa: E731
    one = loss_and_gradients(plain, penalised(ALL, squares, sections=lambda m: [list(m)]), x, y)
    two = loss_and_gradients(stack_, penalised(ALL, squares, sections=lambda m: [m[0].blocks]), x, y)
    assert torch.allclose(one[0], two[0])
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-11) for a, b in zip(one[1], two[1], strict=True))


def test_under_autocast_they_are_computed_in_float32() -> None:
    model = ResNet(SMALL).train()
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    seen: list[torch.dtype] = []
    model.sections[0][0].conv1.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        penalised(ALL, label_loss)(model, x, y).backward()
    assert seen[0] == torch.bfloat16
    assert set(seen[1:]) == {torch.float32}


def test_training_with_penalties_makes_them_smaller() -> None:
    """And is the same by the configuration and by the loss."""
    data = Splits(*(part.take(48, seed=0) for part in load_splits("digits")))
    config = TrainConfig(epochs=2, batch=12, lr=0.05)
    strong = Penalty(jacobian=30.0, magnitude=1.0, variation=0.05)
    networks, histories = [ResNet(SMALL) for _ in range(3)], []
    histories.append(train(networks[0], data, config))
    histories.append(train(networks[1], data, replace(config, penalty=strong)))
    histories.append(train(networks[2], data, config, loss=penalised(strong, label_loss)))
    found = []
    for network in networks:
        torch.manual_seed(0)
        states = network.cut(torch.randn(8, 1, 8, 8)).run().states
        found.append(sum(terms(strong, list(network.sections[0]), states[0]).values()).item())
    assert found[1] == found[2] < 0.8 * found[0]
    assert histories[1][-1]["train_loss"] == histories[2][-1]["train_loss"]
    assert histories[1][-1]["test_loss"] == evaluate(networks[1], data.test)["loss"]
    assert replace(config, penalty=strong).describe()["penalty"]["jacobian"] == 30.0


def test_penalties_are_read_from_the_command_line() -> None:
    assert penalty_of(()) is None
    assert penalty_of(("divergence:0.1", "variation:2")) == Penalty(divergence=0.1, variation=2.0)


class InPlace(nn.Module):
    """A block that adds to its state where the state lies: what it adds looks like 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, h: Tensor) -> Tensor:
        h += self.layer(torch.relu(h))
        return h


class Masked(nn.Module):
    """A block with a mask beside its state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        return h + self.layer(h) * (1 if mask is None else mask)


def of_loss(block: nn.Module, loss: Callable, settings: Penalty = ALL) -> Callable[[Tensor], Tensor]:
    """The penalised loss of a single block at a state."""
    around = nn.ModuleList([block])
    whole = penalised(settings, lambda model, x, y: loss(model[0], x).sum(), sections=lambda model: [list(model)])
    return lambda h: whole(around, 1 * h, h)


def test_variation_looks_at_no_states() -> None:
    """So blocks may get whatever they like."""
    settings, h = Penalty(variation=1.0), torch.randn(2, 3, dtype=torch.float64)
    for call in (lambda b, x: b(x, x), lambda b, x: b(x, mask=x), lambda b, x: b(h=x), lambda b, x: b(x).mul_(0)):
        of_loss(Masked(), call, settings)(h).backward()


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda h: Penalty(divergence=-0.1), r"divergence is -0.1; it must be 0 or more"),
        (lambda h: Penalty(power=float("nan")), "power is nan"),
        (lambda h: Penalty(probes=0), "probes is 0; at least 1"),
        (lambda h: Penalty(draws="gauss"), "did you mean 'gaussian'"),
        (lambda h: penalty_of(["divergense:1"]), "did you mean 'divergence'"),
        (lambda h: penalty_of(["jacobian"]), "'jacobian': write every name once, with its weight"),
        (lambda h: penalty_of(["jacobian:1", "jacobian:2"]), "write every name once"),
        (lambda h: terms(ALL, [Plain()], [h]), "1 blocks need 2 states, given 1"),
        (lambda h: terms(ALL, [], [h]), "not none"),
        (lambda h: terms(ALL, [Additive()(branch(1), branch(1))], [h, h]), "PairBlock|Verlet acts on two states"),
        (
            lambda h: terms(ALL, [RungeKutta(STOERMER_VERLET)(branch(1), branch(1))], [h, h]),
            "RungeKutta acts on two states",
        ),
        (lambda h: terms(ALL, [Explicit()(normed())], [h, h]), "a penalty cannot run branch.1, BatchNorm1d"),
        (lambda h: variation([nn.Linear(2, 2), nn.Linear(2, 3)]), "couple blocks of one shape"),
        (lambda h: penalised(ALL, label_loss)(nn.Linear(3, 3), h, h), "which are the blocks of Linear"),
        (
            lambda h: penalised(ALL, lambda m, x, y: m(m(x)).sum(), sections=lambda m: [[m]])(Plain(), h, h),
            "1 blocks were expected to run one after another, once each; 2 calls came",
        ),
        (
            lambda h: terms(Penalty(magnitude=1.0), [InPlace()], [h, h]),
            "InPlace changes the state that it gets in place",
        ),
        (
            lambda h: terms(Penalty(magnitude=1.0), [Explicit()(InPlace())], [h, h]),
            "InPlace changes the state that it gets in place",
        ),
        (of_loss(InPlace(), lambda b, x: b(x)), "a state before or after InPlace was changed in place"),
        (of_loss(Masked(), lambda b, x: b(x).mul_(0.5)), "a state before or after Masked was changed in place"),
        (of_loss(Masked(), lambda b, x: b(x, x)), "Masked is called with 2 arguments; .* must be all that it gets"),
        (of_loss(Masked(), lambda b, x: b(x, mask=x)), "Masked is called with 1 arguments, mask; "),
        (of_loss(Masked(), lambda b, x: b(h=x)), "Masked is called with 0 arguments, h; .* not by name"),
    ],
)
def test_what_is_wrong_is_refused(make: partial, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(torch.randn(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("step", [None, Theta(0.5, 0.1, solver=Anderson(0.05))])
def test_networks_in_bfloat16_are_penalised_in_float32(step: Theta | None) -> None:
    data = Splits(*(part.take(24, seed=0) for part in load_splits("digits")))
    model = ResNet(ResNetConfig((2,), (4,), 1, norm="group", step=step)).bfloat16()
    settings = Penalty(divergence=0.1, jacobian=0.1, magnitude=0.1)
    (row,) = train(model, data, TrainConfig(epochs=1, batch=12, penalty=settings))
    assert math.isfinite(row["train_loss"])
    blocks, h = list(model.sections[0]), torch.randn(3, 4, 8, 8).bfloat16()
    wide = terms(Penalty(magnitude=1.0), [block.float() for block in copy.deepcopy(blocks)], [h.float()] * 3)
    narrow = terms(Penalty(magnitude=1.0), blocks, [h] * 3)
    assert narrow["magnitude"].dtype == torch.float32
    assert torch.allclose(wide["magnitude"], narrow["magnitude"])
