"""Networks whose blocks are steps: they train, are cut, and come back from a file as they were."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from residuum.data import Preparation
from residuum.descriptions import described, rebuilt
from residuum.layers.anystep import STEPS as KINDS
from residuum.layers.anystep import branches_of, solves
from residuum.layers.lipschitz import Limit
from residuum.layers.pairs import Additive, Leapfrog, Midpoint, Momentum, Verlet
from residuum.layers.sharing import NAIVE
from residuum.layers.steps import Explicit, RungeKutta, Theta
from residuum.layers.tableaus import GAUSS4, RK4, STOERMER_VERLET
from residuum.linear import Dense
from residuum.loading import load_model, save_run
from residuum.models import ResNet, ResNetConfig, count_parameters
from residuum.solvers import Anderson, GradientDescent, NewtonKrylov, Picard

SMALL = ResNetConfig(blocks=(2, 1), widths=(4, 8), channels=1, classes=3, norm="group")
STEPS = [
    Explicit(0.5),
    Theta(0.5, 0.1),
    Theta(1.0, 0.1, form="midpoint", start="linearised", solver=Picard(1e-5, 60)),
    RungeKutta(RK4, 0.5),
    RungeKutta(GAUSS4, 0.1, NewtonKrylov()),
    RungeKutta(STOERMER_VERLET, 0.5),
    Verlet(0.5, "stoermer"),
    Additive(),
    Leapfrog(0.5),
    Midpoint(0.5),
    Momentum(0.8),
]


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 1, 8, 8)


@pytest.mark.parametrize(
    "step", [*STEPS, Theta(0.5, 0.1, solver=GradientDescent(), adjoint=Dense())], ids=lambda step: type(step).__name__
)
def test_a_network_of_any_step_comes_back_from_its_folder(step, tmp_path: Path) -> None:
    network, x = ResNet(replace(SMALL, step=step)).eval(), images()
    save_run(tmp_path, network, preparation=Preparation(255, (0.0,), (1.0,)), classes=("a", "b", "c"), training={})
    again = load_model(str(tmp_path)).model.eval()
    assert again.config == network.config
    with torch.no_grad():
        assert torch.equal(again(x), network(x))
    assert rebuilt(json.loads(json.dumps(described(step))), KINDS) == step


@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_a_network_of_any_step_learns(step) -> None:
    network, x, y = ResNet(replace(SMALL, step=step)), images(12), torch.arange(12) % 3
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(network(x), y)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert losses[-1] < losses[0]


def test_the_explicit_step_is_the_plain_network() -> None:
    plain, stepped, x = ResNet(SMALL).eval(), ResNet(replace(SMALL, step=Explicit())).eval(), images()
    stepped.load_state_dict(
        {
            name.replace(".norm", ".branch.block.norm").replace(".conv", ".branch.block.conv")
            if name.startswith("sections")
            else name: value
            for name, value in plain.state_dict().items()
        }
    )
    with torch.no_grad():
        assert torch.equal(plain(x), stepped(x))
        assert torch.equal(
            ResNet(replace(SMALL, step=Theta(0.0))).eval()(x), ResNet(replace(SMALL, step=Explicit()))(x)
        )


def test_blocks_of_a_step_are_blocks_of_the_stream() -> None:
    """The update of a block is what it changes, and dropping it is the identity."""
    network, x = ResNet(replace(SMALL, step=Theta(0.5, 0.1))).eval(), images()
    with torch.no_grad():
        stream = network.cut(x)
        steps = list(stream.walk())
        assert [step.index for step in steps] == [0, 1, 0]
        assert not any(step.own_branch for step in steps)
        assert all(torch.equal(step.update, step.after - step.before) for step in steps)


def test_blocks_of_a_step_share_their_weights() -> None:
    shared = replace(SMALL, blocks=(4, 4), step=Theta(0.5, 0.1), sharing=replace(NAIVE, free=1))
    network = ResNet(shared)
    assert count_parameters(network) < count_parameters(ResNet(replace(shared, sharing=None)))
    assert network.sections[0][1] is network.sections[0][3]
    assert network(images()).shape == (4, 3)


def test_limited_branches_can_be_solved_and_inverted() -> None:
    """Lip(f) <= 0.8: the equation and that of the inverse are contractions, whatever the weights."""
    limited = replace(SMALL, norm="none", limit=Limit(0.8, 8), step=Theta(0.5, solver=Anderson(1e-13)))
    network = ResNet(limited).double()
    h = 10 * torch.randn(3, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for block in network.sections[0].eval():
            found = block.solve(h)
            assert found.converged.all()
            assert (block.inverse(found.value) - h).abs().max() < 1e-9


def test_a_limit_moves_once_per_step_while_it_is_trained() -> None:
    """In training mode each look at a limited weight improves its estimate; within a solve it is one weight."""
    limited = replace(SMALL, norm="none", limit=Limit(0.8, 8), step=Theta(0.5, solver=Anderson(1e-12)))
    network = ResNet(limited).double()
    block, h = network.sections[0][0], torch.randn(3, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for p in block.parameters():
            p += 0.3 * torch.randn_like(p)
    other = copy.deepcopy(block)
    assert block.solve(h).converged.all()
    for conv in (other.branch.block.conv1, other.branch.block.conv2):
        _ = conv.weight
    assert all(torch.equal(a, b) for a, b in zip(block.buffers(), other.buffers(), strict=True))
    block(h).square().sum().backward()
    assert all(p.grad.any() for p in block.parameters())


def test_kinds_know_what_they_take() -> None:
    assert [branches_of(step) for step in STEPS] == [(1, 1)] * 5 + [(2, 2)] * 3 + [(1, 2)] * 3
    assert [solves(step) for step in STEPS] == [False, True, True, False, True] + [False] * 6
    assert not solves(Theta(0.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(SMALL, norm="batch", step=Theta()), "use norm 'group' or 'none'"),
        (lambda: replace(SMALL, norm="batch", step=RungeKutta(GAUSS4)), "use norm 'group' or 'none'"),
        (lambda: replace(SMALL, widths=(3, 8), step=Verlet()), r"halves of the channels, but widths are \(3, 8\)"),
        (lambda: rebuilt({"kind": "Thetta"}, KINDS), "did you mean 'Theta'"),
        (lambda: rebuilt({"theta": 0.5}, KINDS), "unknown kind of settings 'None'"),
        (lambda: rebuilt({"kind": "Theta", "tol": 1.0}, KINDS), "Theta has no 'tol'"),
        (
            lambda: rebuilt(described(RungeKutta(GAUSS4)) | {"tableau": described(GAUSS4) | {"order": 5}}, KINDS),
            "order 5",
        ),
    ],
)
def test_what_is_wrong_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_batch_norm_is_allowed_where_nothing_is_solved() -> None:
    network = ResNet(replace(SMALL, norm="batch", step=Verlet(0.5)))
    assert network(images()).isfinite().all()
    assert replace(SMALL, step=Theta(solver=Anderson(tol=1e-5))).step.solver.tol == 1e-5
