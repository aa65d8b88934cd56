"""Traps of torch that a solve can fall into: each must be computed rightly or refused, never passed over. Review found
them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from residuum import reversible
from residuum.graphs import applied
from residuum.layers.pairs import Leapfrog, Midpoint, Momentum, Verlet
from residuum.layers.steps import Explicit, RungeKutta, Theta
from residuum.layers.tableaus import GAUSS2, RK4
from residuum.linear import norms
from residuum.penalties import hutchinson
from residuum.solve import (
    GMRES,
    Anderson,
    BiCGStab,
    Dense,
    GradientDescent,
    Neumann,
    NewtonKrylov,
    Picard,
    fixed_point,
)
from residuum.solving import Solves
from residuum.spectra import largest_singular_value, operator_norm, spectral_radius, value_and_jacobian
from residuum.stability import spectrum_of
from residuum.toys.networks import DirectTheta, Turning

MODES = [torch.no_grad, torch.inference_mode]


def chain(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


# In inference mode enable_grad does nothing, and what has no graph passes for what has no derivative.


def test_inference_mode_has_the_jacobians_of_no_grad() -> None:
    branch, h, conv = chain(), torch.randn(2, 4), nn.Conv2d(2, 2, 3, padding=1)
    weight = 3 * torch.randn(4, 4)
    block = Theta(0.5, 0.3, start="linearised", solver=NewtonKrylov())(branch)

    def all_of_them() -> list[Tensor]:
        torch.manual_seed(1)
        jacobian = value_and_jacobian(branch, h)[1]
        found = fixed_point(lambda x: x @ weight + 1.0, torch.zeros(2, 4), NewtonKrylov())
        down = fixed_point(lambda x: 0.5 * torch.tanh(branch(x)), torch.zeros(2, 4), GradientDescent(1e-5))
        return [
            largest_singular_value(jacobian)[0].value,
            spectral_radius(jacobian).value,
            operator_norm(conv, (5, 5)).value,
            *hutchinson(branch, h, torch.ones(1, 2, 4)),
            found.value,
            found.steps,
            down.steps,
            block.solve(h).value,
            block.solve(h).steps,
        ]

    with torch.no_grad():
        expected = all_of_them()
    with torch.inference_mode():
        for ours, theirs in zip(all_of_them(), expected, strict=True):
            torch.testing.assert_close(ours.clone(), theirs)
    assert all(value.abs().sum() > 0 for value in expected)


# Norms beyond the range of the precision.


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e19, 1e30])
def test_norms_hold_where_squares_do_not(size: float) -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(norms(x * size), torch.tensor([5.0, 0.0], dtype=torch.float64) * size, rtol=1e-6, atol=0)


def test_what_diverges_to_huge_states_is_not_solved() -> None:
    found = fixed_point(lambda x: 1.5 * x + 1, torch.full((2, 3), 100.0), Picard(), throw=False)
    assert not found.converged.any()
    assert (found.residual > 0.1).all()


def test_long_states_of_half_precision_are_solved() -> None:
    start = torch.full((1, 65536), 300.0, dtype=torch.float16)  # longer than float16 can say
    found = fixed_point(lambda x: 0.5 * x + 200, start, Picard(1e-2))
    assert found.steps.item() > 0
    assert (found.value - 400).abs().max() < 10


@pytest.mark.parametrize(
    "solver", [Neumann(), BiCGStab(), GMRES(), Dense(), Anderson()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_linear_solves_are_relative_at_every_size(solver: Any, size: float) -> None:
    v, record = solver.invert(lambda v: 0.5 * v, torch.full((1, 3), size))
    assert record.converged.all()
    torch.testing.assert_close(v / size, torch.full((1, 3), 2.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1e-24, 1e20])
def test_gradients_of_every_size(size: float) -> None:
    block, h = Theta(0.5, 0.3)(chain()), torch.randn(2, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(block(h).sum(), h)
    (given,) = torch.autograd.grad((block(h) * size).sum(), h)
    torch.testing.assert_close(given / size, expected, rtol=1e-4, atol=1e-6)


# Branches that begin with an operation in place.


def in_place(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(width, width))


@pytest.mark.parametrize(
    "block",
    [
        lambda: Explicit()(in_place()),
        lambda: Theta(0.0, 0.3)(in_place()),
        lambda: Theta(0.5, 0.3)(in_place()),
        lambda: Theta(1.0, 0.3)(in_place()),
        lambda: Theta(0.5, 0.3, form="midpoint", solver=Picard())(in_place()),
        lambda: RungeKutta(RK4, 0.3)(in_place()),
        lambda: Verlet(0.5)(in_place(2), nn.Linear(2, 2)),
        lambda: Leapfrog()(in_place(2)),
        lambda: Midpoint()(in_place(2)),
        lambda: Momentum()(in_place(2)),
    ],
)
def test_a_branch_that_changes_its_state_is_refused(block: Callable[[], nn.Module]) -> None:
    before = nn.Linear(4, 4)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError), match=r"in-?place|in place"):
            block()(before(torch.randn(2, 4)))


def test_a_map_that_changes_its_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="in place"), torch.no_grad():
        fixed_point(lambda x: x.mul_(0.5).add_(1.0), torch.zeros(1, 2), Picard())


def test_in_inference_mode_the_branch_gets_a_copy() -> None:
    branch, plain = in_place(), nn.Sequential(nn.ReLU(), nn.Linear(4, 4))
    plain[1] = branch[1]
    with torch.inference_mode():
        h = torch.randn(2, 4)
        kept = h.clone()
        torch.testing.assert_close(applied(branch, h), plain(kept))
        torch.testing.assert_close(h, kept)


# What an inverse cannot undo, also where weights are held still.


@pytest.mark.parametrize("part", [lambda: nn.Dropout(0.5), nn.RReLU, lambda: nn.BatchNorm1d(3)])
def test_cached_weights_hold_neither_dropout_nor_statistics_still(part: Callable[[], nn.Module]) -> None:
    block = Verlet(0.5)(nn.Sequential(nn.Linear(3, 3), part()), nn.Linear(3, 3))
    with parametrize.cached(), pytest.raises(ValueError, match="in training mode"):
        block.inverse(block(torch.randn(4, 6)))


# A solver takes a step more or less when a rebuilt state is off by its tolerance.


def test_reversible_stacks_of_implicit_blocks_train() -> None:
    stack = reversible([RungeKutta(GAUSS2, 0.3)(chain(6)) for _ in range(4)])
    optimiser = torch.optim.SGD(stack.parameters(), 0.1)
    for _ in range(12):  # one of the first three used to be refused
        optimiser.zero_grad()
        stack(torch.randn(8, 6)).square().mean().backward()
        optimiser.step()


def test_hooks_for_saved_tensors_see_no_graph_that_is_dropped() -> None:
    h = torch.randn(3, 4)
    counts = []
    for tol in (1e-2, 1e-6):  # of which the second takes more steps
        block = RungeKutta(GAUSS2, 0.3, solver=Picard(tol))(chain().requires_grad_())
        seen: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t) or t, lambda t: t):
            block(h)
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0


def test_a_frozen_reversible_stack_carries_no_gradient() -> None:
    stack = reversible([Theta(0.5, 0.3)(chain()) for _ in range(2)]).requires_grad_(False)
    assert not stack(torch.randn(2, 4)).requires_grad
    assert stack(torch.randn(2, 4, requires_grad=True)).requires_grad


def test_a_reversible_stack_solves_the_adjoint_as_plain_blocks_do() -> None:
    block, h = Theta(0.5, 0.3, solver=Picard())(chain()), torch.randn(2, 4, requires_grad=True)
    taken = []
    for model in (block, reversible([block])):
        solves = Solves(model)
        with solves.forward():
            out = model(h)
        with solves.backward():
            out.sum().backward()
        (efforts,) = solves.take().values()
        taken.append((efforts["backward"]["evaluations"], efforts["backward"]["steps"]))
    assert taken[0] == taken[1]  # by the Neumann series, which takes other numbers of products than BiCGStab


# Precision.


def test_autocast_leaves_float64_and_computes_weights_in_float32() -> None:
    wide = chain().double()
    weight = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh())
    with torch.autocast("cpu", torch.bfloat16):
        assert Theta(0.5, 0.2)(wide)(torch.randn(2, 4).double()).dtype == torch.float64
        assert RungeKutta(GAUSS2, 0.2)(wide)(torch.randn(2, 4).double()).dtype == torch.float64
        assert RungeKutta(GAUSS2, 0.2)(weight)(torch.randn(2, 4)).dtype == torch.float32


# Derivatives.


def test_a_linearised_start_works_under_transforms() -> None:
    block, h = Theta(0.5, 0.3, start="linearised")(chain()), torch.randn(2, 4)
    leaf = h.clone().requires_grad_()
    (expected,) = torch.autograd.grad(block(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda h: block(h).square().sum())(h), expected)


def test_the_direct_solver_refuses_second_derivatives() -> None:
    block, h = DirectTheta(Theta(0.5, 0.9), Turning([np.random.default_rng(0)], 3, "tanh")), torch.randn(4, 3).double()
    h.requires_grad_()
    (g,) = torch.autograd.grad(block.solve(h, throw=False).value.square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    assert len(block.solve(torch.zeros(0, 3).double(), throw=False).value) == 0


def test_a_module_that_is_only_an_attributes_name_is_no_part() -> None:
    class Holder:
        norm = nn.Linear(3, 3)

    holder = Holder()
    found = fixed_point(lambda x: 0.1 * holder.norm(x), torch.zeros(2, 3), Picard())
    assert found.converged.all()


norm = nn.BatchNorm1d(3)  # which the map of the test above does not use


def test_amplifications_out_of_reach_are_told_as_they_were_given() -> None:
    with pytest.raises(ValueError, match=r"low -20.0 and high -12.0 .* reach of 10"):
        spectrum_of(Theta(0.0, 1.0), -20.0, -15.0, -12.0)
