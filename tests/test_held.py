"""Limited branches in training: each look at a weight moves it, so within a step, and back again, it is held still."""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from residuum import reversible
from residuum.layers.held import Weights, held, part_copies_
from residuum.layers.lipschitz import limit_
from residuum.layers.pairs import Additive, Momentum, Verlet
from residuum.layers.steps import RungeKutta, Theta
from residuum.layers.tableaus import GAUSS4, RK4
from residuum.solve import Anderson, BiCGStab

TIGHT = {"solver": Anderson(1e-13), "adjoint": BiCGStab(1e-13)}


def limited(width: int = 4) -> nn.Module:
    """Two layers whose limits are active and have not converged."""
    branch = nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, width)).double()
    for layer in (branch[0], branch[2]):
        limit_(layer, 0.7)
        with torch.no_grad():
            layer.parametrizations.weight.original.normal_()
    return branch


KINDS: dict[str, Callable[[], nn.Module]] = {
    "Theta two-point": lambda: Theta(0.5, dt=0.4, **TIGHT)(limited()),
    "Theta midpoint": lambda: Theta(0.5, dt=0.4, form="midpoint", **TIGHT)(limited()),
    "Gauss": lambda: RungeKutta(GAUSS4, dt=0.4, **TIGHT)(limited()),
    "Additive": lambda: Additive()(limited(2), limited(2)),
    "Stoermer-Verlet": lambda: Verlet(0.5, form="stoermer")(limited(2), limited(2)),
    "Momentum": lambda: Momentum(0.9)(limited(2)),
}


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reversible_stack_of_limited_branches_trains_as_an_ordinary_one(kind: str, cached: bool) -> None:
    """Also within `parametrize.cached()`, which ends before the backward begins, as in `train`."""
    torch.manual_seed(1)
    plain = nn.Sequential(*[KINDS[kind]() for _ in range(3)]).double().train()
    stack = reversible(copy.deepcopy(list(plain))).train()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # the second backward knows from the first what inverses give
        before = [b.clone() for b in stack.buffers()]
        with parametrize.cached() if cached else nullcontext():
            output = stack(x)
        found = torch.autograd.grad(output.square().sum(), [x, *stack.parameters()])
        with parametrize.cached():
            true = gradients(plain, x)
        assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-11) for a, b in zip(found, true, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(stack.buffers(), plain.buffers(), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(stack.buffers(), before, strict=True))  # the limits have moved


@pytest.mark.parametrize("kind", KINDS)
def test_an_inverse_with_other_weights_is_refused(kind: str) -> None:
    torch.manual_seed(2)
    block, h = KINDS[kind]().double().train(), torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"weight changes each time it is used in training mode.*use eval\(\)"):
            block.inverse(block(h))
        with parametrize.cached():
            assert (block.inverse(block(h)) - h).abs().max() < 1e-9
        block.eval()
        assert (block.inverse(block(h)) - h).abs().max() < 1e-9


def test_weights_that_keep_no_state_are_inverted_in_training() -> None:
    layer = parametrizations.weight_norm(nn.Linear(2, 2)).double()
    block, h = Additive()(layer, nn.Tanh()).train(), torch.randn(3, 4, dtype=torch.float64)
    assert (block.inverse(block(h)) - h).abs().max() < 1e-12


def test_a_step_of_several_evaluations_is_one_function() -> None:
    """Its limits move once per step."""
    for block in (RungeKutta(RK4, dt=0.3)(limited()), KINDS["Stoermer-Verlet"]()):
        other = copy.deepcopy(block).train()
        block.train()(torch.randn(3, 4, dtype=torch.float64))
        with parametrize.cached():
            other(torch.randn(3, 4, dtype=torch.float64))
        assert all(torch.equal(a, b) for a, b in zip(block.buffers(), other.buffers(), strict=True))


def test_values_that_were_held_are_used_again_and_leave_no_trace() -> None:
    branch = limited().train()
    held = Weights(branch)
    first = held.values[id(branch[0]), "weight"]
    assert not torch.equal(branch[0].weight, first)
    with held.used():
        assert branch[0].weight is first
    with parametrize.cached():
        own = branch[0].weight
        with held.used():
            assert branch[0].weight is first
        assert branch[0].weight is own
    assert not torch.equal(branch[0].weight, first)


def test_copies_have_their_own_weights_while_they_are_held() -> None:
    """torch caches what a copy computes under the identity of its original; measured in torch 2.13."""
    first = limited().train()
    copies = nn.ModuleList([first, copy.deepcopy(first)])
    with torch.no_grad():
        for p in copies[1].parameters():
            p.neg_()
    with parametrize.cached():
        assert copies[0][0].weight is copies[1][0].weight  # torch's mistake; once it is gone, so can be `part_copies_`
    part_copies_(copies)
    with parametrize.cached():
        assert torch.equal(copies[0][0].weight.sign(), -copies[1][0].weight.sign())
    again = copy.deepcopy(copies)
    with held(again):
        found = [branch[0].weight for branch in (*copies, *again)]
    assert len(set(map(id, found))) == 4
    assert [type(branch[0]).__bases__ for branch in again] == [(nn.Linear,)] * 2
    assert all(name in again.state_dict() for name in copies.state_dict())
