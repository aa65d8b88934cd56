"""Steps do what their formulas say: linear laws, orders, gradients by differences, inverses, refusals."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from residuum.layers.branches import Antisymmetric, Convolution, Dense, Gradient, hamiltonian, hamiltonian_inspired
from residuum.layers.pairs import Additive, Leapfrog, Midpoint, Momentum, Verlet, energy_drift
from residuum.layers.steps import Explicit, RungeKutta, Theta, _start
from residuum.layers.tableaus import (
    BACKWARD_EULER,
    DIRK2,
    DIRK3,
    EULER,
    GAUSS2,
    GAUSS4,
    GAUSS6,
    HEUN,
    LOBATTO4,
    LOBATTO_PAIR4,
    RADAU3,
    RADAU5,
    RK4,
    STOERMER_VERLET,
    SYMPLECTIC_EULER,
    TRAPEZOID,
    PartitionedTableau,
    Tableau,
    collocation,
    tableau,
)
from residuum.linear import GMRES, BiCGStab, LinearSolver, Neumann
from residuum.solve import ConvergenceError
from residuum.solvers import Anderson, Picard
from residuum.stability import amplification, amplification_of, scheme_matrix

few = settings(max_examples=25, deadline=None)
EXACT = Anderson(tol=1e-14, max_steps=200)
PLAIN = [EULER, BACKWARD_EULER, HEUN, RK4, GAUSS2, GAUSS4, GAUSS6, RADAU3, RADAU5, TRAPEZOID, LOBATTO4, DIRK2, DIRK3]
PAIRS = [SYMPLECTIC_EULER, STOERMER_VERLET, LOBATTO_PAIR4]


class Linear(nn.Module):
    """h -> h A, for states of any number of rows."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix)

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight


def complex_factor(value: complex) -> Linear:
    """lambda as a matrix on (real, imaginary)."""
    return Linear(torch.tensor([[value.real, value.imag], [-value.imag, value.real]], dtype=torch.float64))


def applied(block: nn.Module) -> complex:
    """What a block of complex numbers makes of 1."""
    with torch.no_grad():
        return complex(*block(torch.tensor([[1.0, 0.0]], dtype=torch.float64))[0].tolist())


thetas = st.floats(0, 1)
small = st.complex_numbers(max_magnitude=0.9)  # theta |z| < 1: the equation is a contraction


@few
@given(
    z=small, dt=st.floats(0.05, 2) | st.floats(-2, -0.05), theta=thetas, form=st.sampled_from(["two_point", "midpoint"])
)
def test_theta_has_its_stability_function(z: complex, dt: float, theta: float, form: str) -> None:
    block = Theta(theta, dt, form=form, solver=EXACT)(complex_factor(z / dt))
    wanted = amplification(np.array([z]), theta=theta)[0]
    # the error of y is at most residual / (1 - theta |z|) with residual 1e-14 (1 + |y|)
    assert abs(applied(block) - wanted) < 1e-12 * (1 + abs(wanted))


@pytest.mark.parametrize("method", PLAIN, ids=lambda t: t.name)
def test_runge_kutta_has_its_stability_function(method: Tableau) -> None:
    for z in (0.3 + 0.2j, -0.5 + 0.1j, 0.4j):
        block = RungeKutta(method, 0.5, EXACT)(complex_factor(z / 0.5))
        assert abs(applied(block) - amplification_of(method, np.array([z]))[0]) < 1e-12


class Forced(nn.Module):
    """(y, t) -> (.., 1): y' = -2 (y - cos t) with the time as a channel of the state."""

    def forward(self, h: Tensor) -> Tensor:
        y, t = h.unbind(1)
        return torch.stack([-2 * (y - torch.cos(t)) + 0.3 * (y**2 - _forced(t) ** 2), torch.ones_like(t)], 1)


def _forced(t: Tensor) -> Tensor:
    """The solution of y' = -2 (y - cos t) with y(0) = 4/5: a particular solution, without a transient."""
    return (4 * torch.cos(t) + 2 * torch.sin(t)) / 5


def error_at_one(block_of_dt, start: Tensor, exact: Tensor, steps: int) -> float:
    """Error at time 1 after so many steps."""
    block = block_of_dt(1 / steps)
    h = start
    with torch.no_grad():
        for _ in range(steps):
            h = block(h)
    return (h - exact).abs().max().item()


def observed_order(block_of_dt, start: Tensor, exact: Tensor, steps: int) -> float:
    errors = [error_at_one(block_of_dt, start, exact, n) for n in (steps, 2 * steps)]
    return math.log2(errors[0] / errors[1])


START = torch.tensor([[0.8, 0.0]], dtype=torch.float64)
END = torch.stack([_forced(torch.ones(1, dtype=torch.float64)), torch.ones(1, dtype=torch.float64)], 1)


@pytest.mark.parametrize("form", ["two_point", "midpoint"])
@pytest.mark.parametrize(("theta", "order"), [(0.0, 1), (0.25, 1), (0.5, 2), (0.75, 1), (1.0, 1)])
def test_theta_has_its_order(theta: float, order: int, form: str) -> None:
    """On a nonlinear, non-autonomous equation with a known solution."""
    found = observed_order(lambda dt: Theta(theta, dt, form=form, solver=EXACT)(Forced()), START, END, 32)
    assert abs(found - order) < 0.1


@pytest.mark.parametrize("method", PLAIN, ids=lambda t: t.name)
def test_runge_kutta_has_its_order(method: Tableau) -> None:
    steps = 4 if method.order >= 5 else 16
    found = observed_order(lambda dt: RungeKutta(method, dt, EXACT)(Forced()), START, END, steps)
    assert abs(found - method.order) < 0.25


class Times(nn.Module):
    """z -> factor * sin z."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, z: Tensor) -> Tensor:
        return self.factor * torch.sin(z)


@pytest.mark.parametrize("method", PAIRS, ids=lambda t: t.name)
def test_partitioned_methods_have_their_order(method: PartitionedTableau) -> None:
    """On y' = sin z, z' = -sin y, against many steps of a method of order 4."""
    start = torch.tensor([[0.7, 0.2]], dtype=torch.float64)

    def block(dt: float) -> nn.Module:
        return RungeKutta(method, dt, EXACT)(Times(1.0), Times(-1.0))

    fine = RungeKutta(GAUSS6, 1 / 40, EXACT)(_Both())
    exact = start
    with torch.no_grad():
        for _ in range(40):
            exact = fine(exact)
    assert abs(observed_order(block, start, exact, 8) - method.order) < 0.25


class _Both(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([torch.sin(h[:, 1:]), -torch.sin(h[:, :1])], 1)


@pytest.mark.parametrize("form", ["symplectic", "stoermer"])
def test_verlet_is_the_partitioned_method(form: str) -> None:
    f, g = Dense(3).double(), Dense(3).double()
    h = torch.randn(4, 6, dtype=torch.float64)
    method = SYMPLECTIC_EULER if form == "symplectic" else STOERMER_VERLET
    assert torch.allclose(Verlet(0.3, form)(f, g)(h), RungeKutta(method, 0.3)(f, g)(h), rtol=0, atol=1e-14)


def test_leapfrog_and_midpoint_have_order_two() -> None:
    """On h'' = -h and h' = -h, with an exact second state at the start."""

    def last(block_of_dt, of_time, steps: int) -> float:
        times = torch.tensor([[0.0, 1 / steps]], dtype=torch.float64)
        h, block = of_time(times), block_of_dt(1 / steps)
        with torch.no_grad():
            for _ in range(steps):
                h = block(h)
        return abs(h[0, 0].item() - of_time(torch.ones(1, dtype=torch.float64)).item())

    minus = Linear(-torch.eye(1, dtype=torch.float64))
    for step, of_time in ((Leapfrog, torch.cos), (Midpoint, lambda t: torch.exp(-t))):
        ratio = last(lambda dt, s=step: s(dt)(minus), of_time, 32) / last(lambda dt, s=step: s(dt)(minus), of_time, 64)
        assert abs(math.log2(ratio) - 2) < 0.1


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("forward euler", Theta(0.0, 0.5)),
        ("trapezoidal", Theta(0.5, 0.5, solver=EXACT)),
        ("backward euler", Theta(1.0, 0.5, solver=EXACT)),
    ],
)
def test_blocks_have_the_matrices_of_the_schemes(name: str, step: Theta) -> None:
    turn = Linear(torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64))  # rows: (y, z) -> (z, -y)
    with torch.no_grad():
        matrix = step(turn)(torch.eye(2, dtype=torch.float64)).mT.numpy()
    assert np.allclose(matrix, scheme_matrix(name, 0.5), rtol=0, atol=1e-12)


def test_verlet_block_has_the_matrix_of_verlet() -> None:
    plus, minus = (Linear(torch.tensor([[s]], dtype=torch.float64)) for s in (1.0, -1.0))
    with torch.no_grad():
        matrix = Verlet(0.5)(plus, minus)(torch.eye(2, dtype=torch.float64)).mT.numpy()
    assert np.allclose(matrix, scheme_matrix("verlet", 0.5), rtol=0, atol=1e-15)


def test_theta_zero_is_the_explicit_block_bit_for_bit() -> None:
    branch, h = Dense(5), torch.randn(7, 5)
    for dt in (1.0, 0.3):
        assert torch.equal(Theta(0.0, dt)(branch)(h), Explicit(dt)(branch)(h))
        assert torch.equal(Theta(0.0, dt, form="midpoint")(branch)(h), Explicit(dt)(branch)(h))
        assert torch.equal(RungeKutta(EULER, dt)(branch)(h), Explicit(dt)(branch)(h))
    assert torch.equal(Explicit()(branch)(h), h + branch(h))


def test_at_theta_one_both_forms_are_one() -> None:
    branch, h = Dense(5).double(), torch.randn(7, 5, dtype=torch.float64)
    one, other = (Theta(1.0, 0.4, form=form, solver=EXACT)(branch)(h) for form in ("two_point", "midpoint"))
    assert torch.equal(one, other)


GRADIENT_CASES = [(theta, form) for theta in (0.0, 0.25, 0.5, 0.75, 1.0) for form in ("two_point", "midpoint")]


@pytest.mark.parametrize(("theta", "form"), GRADIENT_CASES)
def test_gradients_by_differences(theta: float, form: str) -> None:
    """For x, K and b; central differences of width 1e-5 are right to about 1e-10 here."""
    branch = Antisymmetric(4).double()
    nn.init.normal_(branch.bias, std=0.3)
    block = Theta(theta, 0.6, form=form, solver=EXACT)(branch)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    u = torch.randn(3, 4, dtype=torch.float64)
    _agree_with_differences(lambda: (block(x) * u).sum(), [x, branch.weight, branch.bias])


@pytest.mark.parametrize("adjoint", [Neumann(1e-13), GMRES(1e-13), BiCGStab(1e-13), Anderson(1e-13)], ids=repr)
@pytest.mark.parametrize("form", ["two_point", "midpoint"])
def test_all_adjoints_are_the_dense_formula(form: str, adjoint: LinearSolver) -> None:
    """(I - theta J(y))^T z = u, dL/dx = (I + (1 - theta) J(x))^T z; one J at (1 - theta) x + theta y for midpoint."""
    theta, branch = 0.6, Dense(5).double()
    x, u = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, dtype=torch.float64)
    y = Theta(theta, 0.7, form=form, solver=EXACT, adjoint=adjoint)(branch)(x)
    (found,) = torch.autograd.grad((y * u).sum(), x)
    for row, state, after, wanted in zip(found, x.detach(), y.detach(), u, strict=True):
        middle = torch.lerp(state, after, theta)
        at_y, at_x = (after, state) if form == "two_point" else (middle, middle)
        j_y, j_x = (0.7 * torch.func.jacrev(branch)(point).detach() for point in (at_y, at_x))
        z = torch.linalg.solve((torch.eye(5) - theta * j_y).mT, wanted)
        assert (row - (torch.eye(5) + (1 - theta) * j_x).mT @ z).abs().max() < 1e-10


@pytest.mark.parametrize("form", ["two_point", "midpoint"])
def test_second_derivatives(form: str) -> None:
    branch, x = Dense(2).double(), torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    block = Theta(0.6, 0.7, form=form, solver=EXACT, adjoint=GMRES(1e-13))(branch)
    assert torch.autograd.gradgradcheck(lambda h, *_: block(h), (x, *branch.parameters()))


def test_solves_run_in_float32_under_autocast() -> None:
    h = torch.randn(3, 4)
    for block in (Theta(0.5)(Dense(4)), RungeKutta(GAUSS4, 0.5)(Dense(4))):
        plain = block(h)
        with torch.autocast("cpu", torch.bfloat16):
            assert block(h).dtype == torch.float32
            assert torch.equal(block(h), plain)
            assert block(h.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("method", [GAUSS4, DIRK2, RK4, STOERMER_VERLET, LOBATTO_PAIR4], ids=lambda t: t.name)
def test_gradients_of_runge_kutta_by_differences(method: Tableau | PartitionedTableau) -> None:
    branches = [Dense(4).double()] if isinstance(method, Tableau) else [Dense(2).double(), Dense(2).double()]
    block = RungeKutta(method, 0.6, EXACT)(*branches)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    u = torch.randn(3, 4, dtype=torch.float64)
    _agree_with_differences(lambda: (block(x) * u).sum(), [x, *block.parameters()])


def _agree_with_differences(loss, inputs: list[Tensor], width: float = 1e-5) -> None:
    found = torch.autograd.grad(loss(), inputs)
    for value, gradient in zip(inputs, found, strict=True):
        flat, differences = value.detach().view(-1), torch.empty(value.numel(), dtype=torch.float64)
        for i in range(value.numel()):
            kept, ends = flat[i].item(), []
            for sign in (1, -1):
                flat[i] = kept + sign * width
                with torch.no_grad():
                    ends.append(loss().item())
            flat[i] = kept
            differences[i] = (ends[0] - ends[1]) / (2 * width)
        assert (gradient.reshape(-1) - differences).norm() < 1e-7 * differences.norm()


def test_the_truncated_gradient_is_the_published_artefact() -> None:
    """Parameters of theta f(y) get none: at theta = 1 nothing, the states' gradient is whole."""
    branch = Dense(4).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def gradients(theta: float, param_grad: str) -> list[Tensor]:
        block = Theta(theta, 0.6, solver=EXACT, param_grad=param_grad)(branch)
        return torch.autograd.grad(block(x).square().sum(), [x, *branch.parameters()], allow_unused=True)

    for theta in (0.0, 0.5, 1.0):
        exact, truncated = gradients(theta, "exact"), gradients(theta, "truncated")
        assert torch.allclose(exact[0], truncated[0], rtol=0, atol=1e-10)
        if theta == 0:
            assert all(torch.equal(a, b) for a, b in zip(exact, truncated, strict=True))
        if theta == 0.5:
            lost = (exact[1] - truncated[1]).norm() / exact[1].norm()
            assert 0.2 < lost < 0.8  # spec: 0.45 in a random example
        if theta == 1:
            assert all(g is None or not g.any() for g in truncated[1:])
            assert all(g.any() for g in exact[1:])


@few
@given(theta=thetas, form=st.sampled_from(["two_point", "midpoint"]), seed=st.integers(0, 999))
def test_theta_is_inverted(theta: float, form: str, seed: int) -> None:
    torch.manual_seed(seed)
    branch = Dense(4).double()
    with torch.no_grad():
        branch.weight *= 0.6 / torch.linalg.matrix_norm(branch.weight, 2)  # Lip(f) < 1: both equations contract
    h = torch.randn(3, 4, dtype=torch.float64)
    block = Theta(theta, 1.0, form=form, solver=EXACT)(branch)
    with torch.no_grad():
        # |dh/dy| <= 1.6 / 0.4 and residuals 1e-14 (1 + |y|) are amplified by 1 / 0.4, twice
        assert (block.inverse(block(h)) - h).abs().max() < 1e-12


@pytest.mark.parametrize("method", [RK4, GAUSS4, RADAU5, DIRK3, TRAPEZOID, *PAIRS], ids=lambda t: t.name)
def test_runge_kutta_is_inverted_by_its_adjoint(method: Tableau | PartitionedTableau) -> None:
    branches = [Dense(4).double()] if isinstance(method, Tableau) else [Dense(2).double(), Dense(2).double()]
    h = torch.randn(3, 4, dtype=torch.float64)
    block = RungeKutta(method, 0.3, EXACT)(*branches)
    with torch.no_grad():
        assert (block.inverse(block(h)) - h).abs().max() < 1e-12


@pytest.mark.parametrize(
    "step", [Verlet(0.3), Verlet(0.3, "stoermer"), Additive(), Leapfrog(0.3), Midpoint(0.3), Momentum(0.8)]
)
@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 5, 4)])
def test_pairs_have_exact_inverses(
    step: Verlet | Additive | Leapfrog | Midpoint | Momentum, shape: tuple[int, ...]
) -> None:
    make = (lambda: Dense(3).double()) if len(shape) == 2 else (lambda: Convolution(3).double())
    block = step(make(), make()) if isinstance(step, Verlet | Additive) else step(make())
    h = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        after = block(h)
        assert (block.inverse(after) - h).abs().max() < 1e-13
        assert (after - h).abs().max() > 1e-2


def test_the_inverse_is_refused_where_it_would_be_another_or_count_twice() -> None:
    block = Verlet(0.5)(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), nn.Linear(3, 3))
    h = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"Dropout in training mode draws other numbers.*reversible\(\)"):
        block.inverse(block(h))
    norm = Verlet(0.5)(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"BatchNorm1d in training mode would update its statistics a second time"):
        norm.inverse(norm(h))
    for each in (block.eval(), norm.eval()):
        assert torch.allclose(each.inverse(each(h)), h, atol=1e-6)


def test_additive_is_the_coupling_of_revnets() -> None:
    f, g, h = Dense(2), Dense(2), torch.randn(3, 4)
    y, z = h.chunk(2, 1)
    y = y + f(z)
    assert torch.equal(Additive()(f, g)(h), torch.cat([y, z + g(y)], 1))


def test_momentum_is_its_formula() -> None:
    f, h = Dense(2).double(), torch.randn(3, 4, dtype=torch.float64)
    x, v = h.chunk(2, 1)
    v = 0.7 * v + 0.3 * f(x)
    assert torch.allclose(Momentum(0.7)(f)(h), torch.cat([x + v, v], 1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("form", ["two_point", "midpoint"])
def test_starts_have_their_order_and_one_answer(form: str) -> None:
    """Euler's guess is right to O(dt^2), the linearised one to O(dt^3); all lead to the same answer."""
    branch, x = Dense(4).double(), torch.randn(3, 4, dtype=torch.float64)
    errors = {"state": [], "euler": [], "linearised": []}
    for dt in (0.02, 0.01):
        with torch.no_grad():
            y = Theta(0.5, dt, form=form, solver=EXACT)(branch)(x)
        for start in errors:
            step = Theta(0.5, dt, form=form, solver=EXACT, start=start)
            errors[start].append((_start(step, branch, x, None)[0] - y).norm().item())
            assert torch.allclose(step(branch)(x), y, rtol=0, atol=1e-13)
    orders = {start: math.log2(a / b) for start, (a, b) in errors.items()}
    assert orders == {
        "state": pytest.approx(1, abs=0.1),
        "euler": pytest.approx(2, abs=0.1),
        "linearised": pytest.approx(3, abs=0.1),
    }


@pytest.mark.parametrize("form", ["two_point", "midpoint"])
def test_states_of_one_number_have_all_starts(form: str) -> None:
    class Half(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h / 2

    for start in ("state", "euler", "linearised"):
        y = Theta(0.5, form=form, solver=EXACT, start=start)(Half())(torch.ones(5, dtype=torch.float64))
        torch.testing.assert_close(y, torch.full((5,), 1.25 / 0.75, dtype=torch.float64))


def test_the_linearised_start_ends_in_half_precision() -> None:
    """Its solve has the tolerance 1e-6, float16 resolves 1e-3; it went on for ever."""
    torch.manual_seed(0)
    found = Theta(start="linearised", solver=Anderson(0.01))(nn.Linear(3, 3).half()).solve(torch.randn(4, 3).half())
    assert found.converged.all()
    assert found.evaluations < 200


def test_fixed_point_contracts_by_theta_times_the_jacobian() -> None:
    """The error of Picard's iterates shrinks by theta |J| per step: exactly so where J is a multiple of a rotation."""
    rotation = 0.6 * torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    x, theta = torch.randn(2, 4, dtype=torch.float64), 0.5
    branch = Linear(rotation)
    with torch.no_grad():
        y = Theta(theta, solver=EXACT)(branch)(x)
        first, second = (
            Theta(theta, solver=Picard(tol=1e-14, max_steps=n), start="state")(branch).solve(x, throw=False).value - y
            for n in (5, 6)
        )
    assert (second.norm() / first.norm()).item() == pytest.approx(0.3, rel=1e-6)


def turning() -> tuple[Antisymmetric, Tensor]:
    """A linear branch with the eigenvalues +-0.3 i, and a state."""
    branch = Antisymmetric(2, "identity").double().requires_grad_(False)
    branch.weight.copy_(torch.tensor([[0.0, 0.3], [0.0, 0.0]], dtype=torch.float64))
    return branch, torch.tensor([[1.0, 2.0]], dtype=torch.float64)


def change_of_norm(steps: int, tol: float) -> float:
    """Of a state that is turned by so many steps with theta = 1/2, by what its solves allow for."""
    branch, first = turning()
    block, h = Theta(0.5, solver=Anderson(tol=tol))(branch), first
    for _ in range(steps):
        h = block(h)
    # one solve is wrong by at most its residual / (1 - theta a)
    return abs(h.norm() - first.norm()).item() / (steps * tol * (1 + first.norm().item()) / (1 - 0.15))


def test_antisymmetric_linear_blocks_turn() -> None:
    """theta = 1/2 keeps |y|, theta = 0 grows by sqrt(1 + a^2) per eigenpair and step, theta = 1 shrinks."""
    assert change_of_norm(200, 1e-12) <= 1
    branch, first = turning()
    grown, shrunk = first, first
    for _ in range(20):
        grown, shrunk = Theta(0.0)(branch)(grown), Theta(1.0, solver=EXACT)(branch)(shrunk)
    assert grown.norm().item() == pytest.approx(first.norm().item() * (1 + 0.3**2) ** 10, rel=1e-10)
    assert shrunk.norm().item() == pytest.approx(first.norm().item() * (1 + 0.3**2) ** -10, rel=1e-10)


@pytest.mark.slow
def test_ten_thousand_turns_keep_the_norm() -> None:
    """In a process of its own, in which types are not checked at every call: that takes six times as long."""
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); from test_steps import *; print(change_of_norm(10_000, 1e-12))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_branches_of_a_hamiltonian_are_its_gradients(activation: str) -> None:
    f, g = hamiltonian(3, 5, activation)
    f, g = f.double(), g.double()
    nn.init.normal_(f.bias)
    nn.init.normal_(g.bias)
    assert f.weight is g.weight
    y, z = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    dy, dz = torch.autograd.grad((f.energy(z) + g.energy(y)).sum(), [y, z])
    assert torch.allclose(f(z), dz, rtol=0, atol=1e-13)
    assert torch.allclose(g(y), -dy, rtol=0, atol=1e-13)


def test_verlet_keeps_the_energy_of_a_hamiltonian_pair() -> None:
    """It swings by O(dt) or O(dt^2) and does not grow; the explicit step's energy grows."""
    f, g = (branch.double() for branch in hamiltonian(3, 6))
    h = torch.randn(2, 6, dtype=torch.float64)

    def energy(state: Tensor) -> Tensor:
        y, z = state.chunk(2, 1)
        return f.energy(z) + g.energy(y)

    def worst(dt: float, form: str) -> tuple[float, float]:
        drift = energy_drift(Verlet(dt, form)(f, g), h, energy, steps=round(40 / dt)).abs()
        return drift.max().item(), drift[:, : round(10 / dt)].max().item()

    for form, order in (("symplectic", 1), ("stoermer", 2)):
        coarse, fine = worst(0.2, form), worst(0.1, form)
        assert coarse[0] < 1.5 * coarse[1], "no drift: the last three quarters swing no more than the first"
        assert math.log2(coarse[0] / fine[0]) == pytest.approx(order, abs=0.25)
    explicit = energy_drift(
        RungeKutta(PartitionedTableau("explicit", EULER, EULER, 1), 0.2)(f, g), h, energy, steps=200
    )
    assert (explicit[:, -1] > 5 * worst(0.2, "symplectic")[0]).all()


def test_the_inspired_pair_is_not_hamiltonian() -> None:
    """s(K z + b) is no gradient: its Jacobian is not symmetric; that of the Hamiltonian pair is."""
    z = torch.randn(3, dtype=torch.float64)

    def asymmetry(f: nn.Module) -> float:
        jacobian = torch.func.jacrev(f)(z)
        return (jacobian - jacobian.mT).norm().item()

    f, g = (branch.double() for branch in hamiltonian_inspired(3))
    assert asymmetry(f) > 1e-2
    assert asymmetry(hamiltonian(3, 4)[0].double()) < 1e-14
    assert torch.allclose(g(z), -torch.tanh(z @ f.weight.mT + f.bias), rtol=0, atol=1e-15)
    assert len({id(p) for branch in (f, g) for p in branch.parameters()}) == 2


@pytest.mark.parametrize(("depth", "width", "inputs", "parameters"), [(10, 5, 1, 316), (25, 6, 2, 1075)])
def test_networks_of_the_paper_have_their_counts(depth: int, width: int, inputs: int, parameters: int) -> None:
    step = Theta(0.5, 0.1)
    blocks = [step(Antisymmetric(width)) for _ in range(depth)]
    network = nn.Sequential(nn.Linear(inputs, width), *blocks, nn.Linear(width, 1))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.randn(4, inputs)).shape == (4, 1)


def test_solve_tells_how_it_went() -> None:
    found = Theta(0.5)(Dense(4)).solve(torch.randn(3, 4))
    assert found.converged.all()
    assert found.steps.shape == found.residual.shape == (3,)
    assert found.evaluations >= 1
    explicit = RungeKutta(RK4)(Dense(4)).solve(torch.randn(3, 4))
    assert explicit.evaluations == 4
    assert explicit.steps.tolist() == [0, 0, 0]
    assert explicit.converged.all()


def test_a_block_that_cannot_be_solved_says_so() -> None:
    expands = Linear(3 * torch.eye(2).roll(1, 0))
    block = Theta(1.0, solver=Picard(max_steps=20))(expands)
    with pytest.raises(ConvergenceError):
        block(torch.ones(2, 2))
    assert not block.solve(torch.ones(2, 2), throw=False).converged.any()


def test_empty_batches_pass() -> None:
    h = torch.randn(0, 4)
    for block in (
        Theta()(Dense(4)),
        RungeKutta(GAUSS4)(Dense(4)),
        RungeKutta(RK4)(Dense(4)),
        Verlet()(Dense(2), Dense(2)),
    ):
        assert block(h).shape == (0, 4)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, h: Tensor) -> Tensor:
        return 0.1 * torch.tanh(self.norm(h))


@pytest.mark.parametrize("step", [Theta(0.5), Theta(0.5, form="midpoint"), RungeKutta(GAUSS2)])
def test_batch_norm_and_dropout_are_refused_inside_a_solve(step: Theta | RungeKutta) -> None:
    h = torch.randn(5, 4)
    for norm in (nn.BatchNorm1d(4), nn.Dropout(0.5)):
        block = step(Normed(norm))
        with pytest.raises(ValueError, match="a solve cannot run norm"):
            block(h)
        assert block.eval()(h).shape == h.shape
    with pytest.raises(ValueError, match="statistics of the batch"):
        step(Normed(nn.BatchNorm1d(4, track_running_stats=False))).eval()(h)
    assert Theta(0.0)(Normed(nn.BatchNorm1d(4)))(h).shape == h.shape  # nothing is solved
    assert step(Normed(nn.GroupNorm(2, 4)))(h).shape == h.shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Theta(1.5), r"theta is 1.5; it must lie in \[0, 1\]"),
        (lambda: Theta(dt=math.nan), "dt is nan"),
        (lambda: Explicit(0.0), "dt is 0.0"),
        (lambda: Theta(form="mid"), "unknown form 'mid'"),
        (lambda: Theta(start="zero"), "unknown start 'zero'"),
        (lambda: Theta(param_grad="none"), "unknown param_grad"),
        (lambda: Theta(form="midpoint", param_grad="truncated"), "needs form 'two_point'"),
        (
            lambda: Theta(param_grad="truncated")(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))(
                torch.ones(1, 2)
            ),
            "needs a branch of plain weights",
        ),
        (lambda: Verlet(form="leap"), "unknown form 'leap'"),
        (lambda: Momentum(0.0), "gamma is 0.0"),
        (lambda: Dense(3, "gelu"), "unknown activation 'gelu'"),
        (lambda: RungeKutta(GAUSS4)(Dense(2), Dense(2)), "takes 1 branches, not 2"),
        (lambda: RungeKutta(STOERMER_VERLET)(Dense(2)), "takes 2 branches, not 1"),
        (lambda: Verlet()(Dense(2), Dense(2))(torch.randn(3, 5)), "no two equal halves"),
        (lambda: energy_drift(Explicit()(Dense(2)), torch.randn(3, 2), lambda h: h.norm(dim=1), steps=0), "steps is 0"),
        (lambda: tableau("gl4", GAUSS4.a, [0.4, 0.6], 4), "gl4 claims order 4, but a condition of order 2"),
        (lambda: replace(GAUSS4, c=(0.2, 0.8)), "its node is 0.2"),
        (lambda: replace(GAUSS4, b=(1.0,)), "a must be square"),
        (lambda: collocation("gauss", [0.25, 0.75], 4), "claims order 4, but a condition of order 3"),
        (lambda: replace(RK4, order=9), "orders from 1 to 8"),
        (lambda: PartitionedTableau("odd", EULER, HEUN, 1), "1 and 2 stages"),
        (lambda: PartitionedTableau("odd", EULER, EULER, 2), "claims order 2, but a condition of order 2"),
        # each alone has order 3, but their nodes differ, and each evaluates at the nodes of the other
        (lambda: PartitionedTableau("odd", GAUSS4, RADAU3, 3), "claims order 3, but a condition of order 2"),
    ],
)
def test_what_is_wrong_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_typo_of_a_known_package_is_found() -> None:
    """torchdiffeq's gl4 has 1/4 - sqrt(3)/6 where 1/4 + sqrt(3)/6 belongs: order 1 is what is left."""
    a = [[1 / 4, 1 / 4 - math.sqrt(3) / 6], [1 / 4 - math.sqrt(3) / 6, 1 / 4]]
    with pytest.raises(ValueError, match="a condition of order 2 does not hold"):
        tableau("gl4", a, [0.5, 0.5], 4)
    assert tableau("gl4", a, [0.5, 0.5], 1).order == 1


def test_gradient_branch_takes_any_number_of_rows() -> None:
    assert Gradient(3, 7)(torch.randn(5, 3)).shape == (5, 3)
