"""Fixed points: solvers converge where they must and report where they cannot; two derivatives are right."""

import dataclasses
import gc
import inspect
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import oracles_solve as oracles
from residuum.solve import (
    GMRES,
    Anderson,
    BiCGStab,
    ConvergenceError,
    Dense,
    GradientDescent,
    LinearSolver,
    Neumann,
    NewtonKrylov,
    Picard,
    Solution,
    Solver,
    _check_solvers,
    fixed_point,
)

TIGHT = 1e-12
SOLVERS = {
    "picard": Picard(TIGHT, 3000),
    "anderson": Anderson(TIGHT, 200),
    "anderson, memory 1": Anderson(TIGHT, 1000, memory=1),
    "newton": NewtonKrylov(TIGHT),
    "newton, bicgstab": NewtonKrylov(TIGHT, linear=BiCGStab(1e-3)),
    "newton, dense": NewtonKrylov(TIGHT, linear=Dense()),
    "gradient descent": GradientDescent(TIGHT, 3000),
}
LINEAR = {
    "neumann": Neumann(TIGHT, 3000),
    "anderson": Anderson(TIGHT, 300),
    "bicgstab": BiCGStab(TIGHT),
    "gmres": GMRES(TIGHT),
    "gmres, restarted": GMRES(TIGHT, 500, restart=3),
    "dense": Dense(TIGHT),
}


def contractions(examples: int, n: int, radius: float, seed: int) -> Tensor:
    """One matrix per example, of norm `radius`."""
    A = torch.randn(examples, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return radius * A / torch.linalg.matrix_norm(A, 2)[:, None, None]


def times(A: Tensor, v: Tensor) -> Tensor:
    return (A * v[:, None]).sum(2)


def field(W: Tensor, c: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda y: torch.tanh(y @ W) + c


def problem(examples: int = 3, n: int = 4, radius: float = 0.7) -> tuple[Tensor, Tensor]:
    """Weights of norm `radius` and inputs, asking for gradients."""
    W = contractions(1, n, radius, 0)[0]
    return W.requires_grad_(), torch.randn(examples, n, dtype=torch.float64).requires_grad_()


# Solvers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.floats(0, 0.95), st.integers(0, 2**16))
def test_every_solver_solves_contractions(solver: Solver, examples: int, n: int, radius: float, seed: int) -> None:
    """|x - x*| <= |f(x) - x| / (1 - radius): what a residual within tolerance means for a contraction."""
    if isinstance(solver, GradientDescent):  # a step can shrink the residual by as little as 1 - (1 - radius)^2 / 2
        radius = min(radius, 0.85)  # 2500 steps
    A, b = contractions(examples, n, radius, seed), torch.randn(examples, n, dtype=torch.float64)
    found = fixed_point(lambda x: times(A, x) + b, torch.zeros_like(b), solver)
    true = oracles.linear(A, b)
    assert found.converged.all()
    bound = TIGHT * (1 + found.value.norm(dim=1)) / (1 - radius)
    assert ((found.value - true).norm(dim=1) <= bound + 1e-14 * true.norm(dim=1)).all()
    assert (found.residual <= TIGHT).all()
    assert (found.steps <= solver.max_steps).all()


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_nonlinear_fixed_points_are_those_of_dense_newton(solver: Solver) -> None:
    W, c = problem(radius=0.9)
    f = field(W.detach(), c.detach())
    found = fixed_point(lambda y: torch.tanh(y @ W) + c, torch.zeros_like(c), solver).value
    # f acts on each example alone, which the oracle needs
    one = [
        oracles.newton(lambda y, i=i: torch.tanh(y @ W.detach()) + c.detach()[i : i + 1], c.detach()[i : i + 1])
        for i in range(3)
    ]
    torch.testing.assert_close(found.detach(), torch.cat(one), rtol=0, atol=1e-10)
    assert f(found).shape == found.shape


@pytest.mark.parametrize("solver", LINEAR.values(), ids=LINEAR)
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.floats(0, 0.95), st.integers(0, 2**16), st.integers(-40, 40))
def test_every_linear_solver_is_the_dense_solve(
    solver: LinearSolver, examples: int, n: int, radius: float, seed: int, exponent: int
) -> None:
    """At any scale of b: gradients are often tiny, and a solve that thinks them zero is wrong."""
    A, b = contractions(examples, n, radius, seed), 10.0**exponent * torch.randn(examples, n, dtype=torch.float64)
    b[0] *= examples > 1  # a row without gradient
    v, record = solver.invert(partial(times, A), b)
    true = oracles.linear(A, b)
    assert record.converged.all()
    assert ((v - true).norm(dim=1) <= 3 * TIGHT / (1 - radius) * (b.norm(dim=1) + true.norm(dim=1))).all()
    residual = (b + times(A, v) - v).norm(dim=1)
    assert (residual <= 1.1 * TIGHT * (b.norm(dim=1) + v.norm(dim=1))).all()


@pytest.mark.parametrize(
    "solver", [BiCGStab(TIGHT), GMRES(TIGHT), Anderson(TIGHT, 300)], ids=lambda s: type(s).__name__
)
def test_krylov_methods_do_not_need_contractions(solver: LinearSolver) -> None:
    A = 3 * contractions(4, 6, 1.0, 3) - 4 * torch.eye(6, dtype=torch.float64)
    b = torch.randn(4, 6, dtype=torch.float64)
    v, record = solver.invert(partial(times, A), b)
    assert record.converged.all()
    torch.testing.assert_close(v, oracles.linear(A, b), rtol=1e-9, atol=1e-10)


def test_newton_solves_what_does_not_contract() -> None:
    f = lambda y: -4 * y - torch.tanh(3 * y) + 1  # noqa: E731
    found = fixed_point(f, torch.full((2, 3), 5.0, dtype=torch.float64), NewtonKrylov(TIGHT))
    torch.testing.assert_close(found.value, f(found.value), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["picard", "anderson", "newton"])
def test_what_has_no_fixed_point_is_reported(name: str) -> None:
    """x = x + 1 + x^2 has none."""
    solver = dataclasses.replace(SOLVERS[name], max_steps=20)
    f = lambda x: x + 1 + x * x  # noqa: E731
    x0 = torch.zeros(2, 3, dtype=torch.float64)
    found = fixed_point(f, x0, solver, throw=False)
    assert not found.converged.any()
    with pytest.raises(
        ConvergenceError, match=r"2 of 2 examples did not converge.*steps.*tolerance 1.0e-12.*smaller step"
    ):
        fixed_point(f, x0, solver)


def test_picard_reports_expansion_and_the_value_has_the_residual_that_it_says() -> None:
    found = fixed_point(lambda x: -2 * x + 1, torch.ones(2, 3, dtype=torch.float64), Picard(1e-6, 7), throw=False)
    assert not found.converged.any()
    assert found.steps.tolist() == [7, 7]
    x = found.value
    torch.testing.assert_close(found.residual, (-3 * x + 1).norm(dim=1) / (1 + x.norm(dim=1)))


@pytest.mark.parametrize("solver", LINEAR.values(), ids=LINEAR)
def test_singular_systems_are_reported(solver: LinearSolver) -> None:
    """v = b + v has no solution unless b = 0."""
    b = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    v, record = dataclasses.replace(solver, max_steps=20).invert(lambda v: v, b)
    assert record.converged.tolist() == [False, True]
    assert v[1].tolist() == [0, 0]


@pytest.mark.parametrize("solver", [GMRES(1e-9), BiCGStab(1e-9)], ids=lambda s: type(s).__name__)
def test_a_residual_of_0_ends_a_solve_whose_tolerance_the_precision_cannot_resolve(solver: LinearSolver) -> None:
    """float32 does not tell 1e-9 from 0, so a row is not said to be solved; but there is nothing left to correct."""
    asked = 0

    def nothing(v: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        assert asked <= 4, "it goes on for ever"
        return 0 * v

    v, record = solver.invert(nothing, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    assert v.tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert record.evaluations == asked == 2
    assert record.converged.tolist() == [False, True]
    assert record.steps.tolist() == [1, 0]


def test_newton_ends_where_its_inner_tolerance_is_below_the_precision() -> None:
    """The inner GMRES has the tolerance 1e-3, bfloat16 resolves 8e-3; it went on for ever."""
    generator = torch.Generator().manual_seed(0)
    W = (0.3 * torch.randn(4, 4, generator=generator)).bfloat16()
    b = torch.randn(3, 4, generator=generator).bfloat16()
    found = fixed_point(lambda x: torch.tanh(x @ W + b), b, NewtonKrylov(0.05))
    assert found.converged.all()
    assert found.evaluations < 40


@pytest.mark.parametrize("solver", LINEAR.values(), ids=LINEAR)
def test_systems_that_turn_are_all_solved(solver: LinearSolver) -> None:
    """Two-sided Krylov methods can stall on skew matrices of few entries: without restarts 1 in 100 of these did."""
    K = torch.randn(500, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = 0.9 * (K - K.mT) / torch.linalg.matrix_norm(K - K.mT, 2)[:, None, None]
    b = torch.randn(500, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v, record = solver.invert(partial(times, A), b)
    assert record.converged.all()
    assert torch.allclose(v, oracles.linear(A, b), atol=1e-8)


def test_evaluations_are_counted_and_few() -> None:
    """Trapezoidal block on -W^T tanh(W y): the Krylov floor is 6 evaluations and 7 products at 1e-6."""
    W = torch.linalg.qr(torch.randn(64, 64))[0].requires_grad_()
    x = torch.randn(128, 64)
    calls = []

    def f(y: Tensor) -> Tensor:
        calls.append(1)
        return x - torch.tanh(y @ W.T) @ W / 2

    found = fixed_point(f, x, Anderson())
    assert found.evaluations == len(calls) <= 6 + 3
    found.value.sum().backward()
    (record,) = found.adjoint
    assert record.evaluations <= 7 + 3
    assert record.converged.all()


def test_plain_steps_where_f_contracts_well() -> None:
    A, b = contractions(3, 8, 0.1, 0), torch.randn(3, 8, dtype=torch.float64)
    plain, mixed = (fixed_point(lambda x: times(A, x) + b, b, s) for s in (Picard(TIGHT), Anderson(TIGHT)))
    assert torch.equal(plain.value, mixed.value)


# Each example on its own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_an_answer_and_its_gradient_do_not_depend_on_the_neighbours(name: str, dtype: torch.dtype) -> None:
    """Bitwise, for easy, slow, diverging and non-finite neighbours."""
    solver = dataclasses.replace(SOLVERS[name], tol=1e-6, max_steps=40)
    A = contractions(6, 5, 0.6, 1).to(dtype)
    b = torch.randn(6, 5, dtype=dtype)

    def solve(A: Tensor, b: Tensor) -> tuple[Solution, Tensor]:
        b = b.clone().requires_grad_()
        found = fixed_point(lambda x: torch.sin(times(A, x)) + b, torch.zeros_like(b), solver, throw=False)
        return found, torch.autograd.grad(found.value.sum(), b)[0]

    alone, gradient = solve(A, b)
    for neighbours in (torch.zeros_like(A), 0.1 * A, 1.6 * A, 40 * A, A * torch.nan):
        changed, c = neighbours.clone(), 3 * b
        changed[2], c[2] = A[2], b[2]
        found, changed_gradient = solve(changed, c)
        assert torch.equal(found.value[2], alone.value[2])
        assert found.steps[2] == alone.steps[2]
        assert found.residual[2] == alone.residual[2]
        assert torch.equal(changed_gradient[2], gradient[2])


def test_mixing_that_begins_late_does_not_depend_on_the_neighbours() -> None:
    """Of the row looked at the slow directions show late; it then has no differences from before, whoever had them."""
    A = contractions(4, 40, 0.9, 1)
    A[0] = torch.block_diag(A[0, :20, :20] / 20, A[0, 20:, 20:] * 1.2)
    b = torch.randn(4, 40, dtype=torch.float64)
    b[0, 20:] *= 1e-2
    for steps in range(5, 12):
        found = []
        for N, c in ((A[:1].repeat(4, 1, 1), b[:1].repeat(4, 1)), (A, b)):
            solver = Anderson(TIGHT, steps)
            found.append(fixed_point(lambda x, N=N, c=c: times(N, x) + c, torch.zeros_like(b), solver, throw=False))
        assert torch.equal(found[0].value[0], found[1].value[0])


@pytest.mark.parametrize("linear", LINEAR.values(), ids=LINEAR)
def test_linear_answers_do_not_depend_on_the_neighbours(linear: LinearSolver) -> None:
    A, b = contractions(6, 5, 0.6, 1), torch.randn(6, 5, dtype=torch.float64)
    alone, _ = linear.invert(partial(times, A), b)
    for neighbours in (torch.zeros_like(A), 0.1 * A, 1.6 * A, A * torch.nan):
        changed, c = neighbours.clone(), 1e3 * b
        changed[2], c[2] = A[2], b[2]
        found, record = dataclasses.replace(linear, max_steps=linear.max_steps).invert(partial(times, changed), c)
        assert torch.equal(found[2], alone[2])
        assert record.converged[2]


def test_one_example_of_nan_leaves_the_others_right() -> None:
    W, c = problem()
    spoilt = c.detach().clone()
    spoilt[1] = torch.nan
    found = fixed_point(field(W.detach(), spoilt), torch.zeros_like(c), Anderson(TIGHT), throw=False)
    assert found.converged.tolist() == [True, False, True]
    right = fixed_point(field(W.detach(), c.detach()), torch.zeros_like(c), Anderson(TIGHT)).value
    assert torch.equal(found.value[[0, 2]], right[[0, 2]])
    with pytest.raises(ConvergenceError, match="1 of 3 examples"):
        fixed_point(field(W, spoilt), torch.zeros_like(c), Anderson(TIGHT))


def test_an_empty_batch_has_an_empty_solution() -> None:
    W, c = problem()
    for solver in (Picard(), Anderson(), NewtonKrylov()):
        found = fixed_point(field(W, c[:0]), torch.zeros_like(c[:0]), solver)
        assert found.value.shape == (0, 4)
        assert found.converged.shape == (0,)
        found.value.sum().backward()


# Derivatives ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "adjoint"), [("picard", None), ("newton", None), ("anderson", None), *(("anderson", a) for a in LINEAR)]
)
def test_gradcheck_and_gradgradcheck(name: str, adjoint: str | None) -> None:
    W, c = problem(2, 2, radius=0.5)

    def solve(W: Tensor, c: Tensor) -> Tensor:
        return fixed_point(field(W, c), torch.zeros_like(c), SOLVERS[name], adjoint=LINEAR.get(adjoint)).value

    assert gradcheck(solve, (W, c))
    assert gradgradcheck(solve, (W, c))


def test_gradients_are_those_of_the_unrolled_iteration() -> None:
    """First and second derivatives, in parameters, inputs, and what lies before them."""
    W, c = problem()
    found = []
    for solve in (lambda f, x: fixed_point(f, x, Anderson(TIGHT)).value, oracles.unrolled):
        y = solve(field(W.sin(), (2 * c).tanh()), torch.zeros_like(c))
        first = torch.autograd.grad(y.square().sum(), (W, c), create_graph=True)
        both = y.sum() + sum(g.square().sum() for g in first)  # uses value and gradients in one pass
        found.append((*first, *torch.autograd.grad(both, (W, c))))
    for ours, unrolled in zip(*found, strict=True):
        torch.testing.assert_close(ours, unrolled, rtol=1e-9, atol=1e-10)


def test_gradients_survive_the_solution() -> None:
    """Second derivatives hold what they need even when value and solution are gone, and leave no cycle behind."""
    W, c = problem()
    g = torch.autograd.grad(
        fixed_point(field(W, c), torch.zeros_like(c), Anderson(TIGHT)).value.sum(), W, create_graph=True
    )
    gc.collect()
    second = torch.autograd.grad(g[0].square().sum(), W)[0]
    y = oracles.unrolled(field(W, c), torch.zeros_like(c))
    g = torch.autograd.grad(y.sum(), W, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(g[0].square().sum(), W)[0], rtol=1e-9, atol=1e-10)


def test_modules_in_closures_get_their_gradients_and_keep_their_buffers() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.Tanh()).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    net.eval()
    before = {name: b.clone() for name, b in net.named_buffers()}
    grads = []
    for solve in (lambda f, x: fixed_point(f, x, Anderson(TIGHT)).value, oracles.unrolled):
        y = solve(lambda h: x + 0.2 * net(h), x)
        grads.append(torch.autograd.grad(y.square().sum(), tuple(net.parameters())))
    for ours, unrolled in zip(*grads, strict=True):
        torch.testing.assert_close(ours, unrolled, rtol=1e-8, atol=1e-9)
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())


def test_nothing_to_differentiate_leaves_no_graph() -> None:
    W, c = (t.detach() for t in problem())
    assert not fixed_point(field(W, c), torch.zeros_like(c), Anderson()).value.requires_grad
    with torch.no_grad():
        W, c = problem()
        assert not fixed_point(field(W, c), torch.zeros_like(c), Anderson()).value.requires_grad


def test_a_constant_map_and_one_without_gradient() -> None:
    _, c = problem()
    found = fixed_point(lambda _: c * 2, torch.zeros_like(c), Anderson())
    found.value.sum().backward()
    assert torch.equal(c.grad, torch.full_like(c, 2))


def test_a_map_that_gives_a_leaf_itself_has_its_derivatives() -> None:
    c = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    for f in (lambda x: c, lambda x: 1 * c):
        y = fixed_point(f, torch.zeros(2, 3, dtype=torch.float64), Picard()).value
        (first,) = torch.autograd.grad(y.pow(3).sum(), c, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), c)
        assert torch.equal(first, torch.full_like(c, 3))
        assert torch.equal(second, torch.full_like(c, 6))
    assert not fixed_point(lambda x: x, torch.zeros(2, 3), Picard()).value.requires_grad


def test_an_adjoint_that_fails_raises_from_backward_or_is_recorded() -> None:
    W, c = problem(radius=0.9)
    short = BiCGStab(TIGHT, max_steps=1)
    found = fixed_point(field(W, c), torch.zeros_like(c), Anderson(TIGHT), adjoint=short)
    with pytest.raises(ConvergenceError, match=r"the adjoint of fixed_point: . of 3 examples.*BiCGStab"):
        found.value.sum().backward()
    found = fixed_point(field(W, c), torch.zeros_like(c), Anderson(TIGHT), adjoint=short, throw=False)
    found.value.sum().backward()
    assert not found.adjoint[0].converged.all()


def test_memory_does_not_grow_with_the_steps() -> None:
    """Live tensors that autograd has saved: two applications of f, however many steps."""

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # a node must not hold its own output

    alive = []
    for steps in (3, 60):
        saved: list[weakref.ref[Saved]] = []

        def pack(tensor: Tensor, saved: list[weakref.ref[Saved]] = saved) -> Saved:
            held = Saved(tensor)
            saved.append(weakref.ref(held))
            return held

        W, c = problem(radius=0.99)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            found = fixed_point(field(W, c), torch.zeros_like(c), Picard(TIGHT, steps), throw=False)
        alive.append(sum(ref() is not None for ref in saved))
        assert found.evaluations == steps + 3  # under hooks no evaluation of the solver itself is recorded
        del found
        assert sum(ref() is not None for ref in saved) == 0  # no cycle keeps the graph
    assert alive[0] == alive[1] > 0


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch.func.jvp's own
def test_transforms() -> None:
    W, c = problem(radius=0.6)
    W, c = W.detach(), c.detach()
    T = torch.randn_like(W)
    ours = lambda W: fixed_point(field(W, c), torch.zeros_like(c), Anderson(TIGHT)).value.square().sum()  # noqa: E731
    slow = lambda W: oracles.unrolled(field(W, c), torch.zeros_like(c)).square().sum()  # noqa: E731
    grad, vjp, jvp = torch.func.grad, torch.func.vjp, torch.func.jvp
    for transform in (
        lambda loss: grad(loss)(W),
        lambda loss: vjp(loss, W)[1](torch.ones((), dtype=W.dtype))[0],
        lambda loss: jvp(loss, (W,), (T,))[1],
        lambda loss: grad(lambda W: (grad(loss)(W) * T).sum())(W),
        lambda loss: jvp(grad(loss), (W,), (T,))[1],
        lambda loss: grad(lambda W: jvp(loss, (W,), (T,))[1])(W),
    ):
        torch.testing.assert_close(transform(ours), transform(slow), rtol=1e-9, atol=1e-10)
    for refused in (torch.vmap(ours), torch.vmap(grad(ours))):
        with pytest.raises(NotImplementedError, match=r"fixed_point does not work under torch\.vmap.*batch there"):
            refused(torch.stack((W, W)))
    with pytest.raises(NotImplementedError, match="no jvp inside a jvp"):
        jvp(lambda W: jvp(ours, (W,), (T,))[1], (W,), (T,))


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch.func.jvp's own
@pytest.mark.parametrize("start", [0.7, 0.0])  # at 0 the second derivatives are 0 and the third are not
def test_third_derivatives_are_refused(start: float) -> None:
    def value(p: Tensor) -> Tensor:
        return fixed_point(lambda x: 0.8 * torch.tanh(x) + p, torch.zeros_like(p), Anderson(TIGHT)).value.sum()

    p = torch.full((1, 1), start, dtype=torch.float64, requires_grad=True)
    found = value(p)
    for order in (1, 2):
        (found,) = torch.autograd.grad(found.sum(), p, create_graph=True)
        assert found.isfinite().all(), order
    with pytest.raises(NotImplementedError, match=r"third derivatives.*unrolled"):
        torch.autograd.grad(found.sum(), p)
    grad, jvp = torch.func.grad, torch.func.jvp
    second = lambda p: grad(lambda p: grad(value)(p).sum())(p).sum()  # noqa: E731
    along = lambda p: jvp(grad(value), (p,), (torch.ones_like(p),))[1].sum()  # noqa: E731
    for third in (
        lambda p: grad(second)(p),
        lambda p: grad(along)(p),
        lambda p: jvp(second, (p,), (torch.ones_like(p),)),
        lambda p: grad(lambda p: grad(along)(p).sum())(p),
    ):
        with pytest.raises(NotImplementedError, match="third derivatives"):
            third(p.detach())


def test_a_third_derivative_of_one_example_is_refused_beside_another_large_one() -> None:
    p = torch.tensor([[0.3], [0.7]], dtype=torch.float64, requires_grad=True)
    y = fixed_point(lambda x: 0.8 * torch.tanh(x) + p, torch.zeros_like(p), Anderson(TIGHT)).value
    (slope,) = torch.autograd.grad(y.sum(), p, create_graph=True)
    (found,) = torch.autograd.grad((1e12 * y[0] + slope[1]).sum(), p, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.autograd.grad(found[1].sum(), p)


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch.func.jvp's own
def test_forward_mode_over_a_backward_that_records_nothing() -> None:
    """A product with the Hessian as the tangent of an ordinary gradient."""
    W, c = problem()
    T = torch.randn_like(W)
    found = []
    for solve in (lambda f, x: fixed_point(f, x, Anderson(TIGHT)).value, oracles.unrolled):

        def loss(W: Tensor, solve: Callable = solve) -> Tensor:
            return solve(field(W, c), torch.zeros_like(c)).square().sum()

        with forward_ad.dual_level():
            dual = forward_ad.make_dual(W, T)
            (gradient,) = torch.autograd.grad(loss(dual), dual)
            plain = forward_ad.unpack_dual(gradient)
        with torch.no_grad():
            pulled = lambda W, loss=loss: torch.func.vjp(loss, W)[1](torch.ones((), dtype=W.dtype))[0]  # noqa: E731
            functional = torch.func.jvp(pulled, (W.detach(),), (T,))
        found.append((plain.primal, plain.tangent, *functional))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_what_needs_no_third_derivatives_is_not_refused() -> None:
    """Three passes of which two differentiate by the solution; a loss of values and gradients together."""
    W, c = problem()
    u, t = torch.ones_like(c, requires_grad=True), torch.ones_like(W, requires_grad=True)
    found = []
    for solve in (lambda f, x: fixed_point(f, x, Anderson(TIGHT)).value, oracles.unrolled):
        y = solve(field(W, c), torch.zeros_like(c))
        (pulled,) = torch.autograd.grad(y, W, u, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, u, torch.ones_like(pulled), create_graph=True)  # J v by two pulls
        by_weight = torch.autograd.grad(pushed.square().sum(), W, retain_graph=True)
        (slope,) = torch.autograd.grad(y.square().sum(), W, create_graph=True)
        loss = y.square().sum() + slope.square().sum()
        by_all = torch.autograd.grad(loss, (W, c), create_graph=True)
        (product,) = torch.autograd.grad((slope * t).sum(), W, create_graph=True)  # of the Hessian with t
        by_vector = torch.autograd.grad(product.sum(), t)
        found.append((y, pushed, *by_weight, *by_all, *by_vector))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_autocast_solves_in_float32() -> None:
    net = nn.Linear(6, 6)
    net.weight.data /= 4
    x = torch.randn(3, 6)
    plain = fixed_point(lambda y: torch.tanh(net(y)) + x, x, Anderson())
    with torch.autocast("cpu", torch.bfloat16):
        found = fixed_point(lambda y: torch.tanh(net(y)) + x, x.bfloat16(), Anderson())
        assert found.value.dtype == torch.float32
        g = torch.autograd.grad(found.value.sum(), net.weight)[0]
        assert found.adjoint[0].converged.all()
    torch.testing.assert_close(found.value, plain.value, rtol=0, atol=1e-5)
    torch.testing.assert_close(g, torch.autograd.grad(plain.value.sum(), net.weight)[0], rtol=0.02, atol=0.02)


# Errors ---------------------------------------------------------------------------------------------------------------


def test_bad_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        Anderson(tolerance=1e-3)
    with pytest.raises(ValueError, match=r"Anderson: tol is 0.0; it is relative"):
        Anderson(tol=0.0)
    with pytest.raises(ValueError, match=r"Picard: max_steps is 0; a whole number of at least 1"):
        Picard(max_steps=0)
    with pytest.raises(ValueError, match=r"GMRES: restart is 0"):
        GMRES(restart=0)


@pytest.mark.parametrize(
    ("f", "x0", "error", "text"),
    [
        (lambda x: x[:, :2], torch.zeros(2, 3), ValueError, r"must keep shape and precision; it made .* \(2, 2\)"),
        (lambda x: x.double(), torch.zeros(2, 3), ValueError, "torch.float64"),
        (lambda x: (x,), torch.zeros(2, 3), TypeError, "must give a tensor; it gave tuple"),
        (torch.tanh, torch.zeros(2, 3, dtype=torch.long), TypeError, "floating point; it is torch.int64"),
        (torch.tanh, torch.zeros(()), ValueError, "x0 has no dimensions"),
        (nn.BatchNorm1d(3), torch.zeros(2, 3), ValueError, "f is a BatchNorm1d with.*group norm"),
        (nn.Sequential(nn.BatchNorm1d(3)).forward, torch.zeros(2, 3), ValueError, "0 is a BatchNorm1d"),
        (partial(nn.BatchNorm1d(3)), torch.zeros(2, 3), ValueError, "BatchNorm1d with statistics of the batch"),
        (torch.tanh, torch.zeros(2, 3).bfloat16(), ValueError, r"tol=1.0e-06 is below what torch.bfloat16.*3.9e-02"),
    ],
)
def test_bad_maps_and_starts_are_refused(f: Callable, x0: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        inspect.unwrap(fixed_point)(f, x0, Anderson())  # without the tests' own check of the annotations


NORM = nn.BatchNorm1d(3)


def test_batch_norm_that_f_uses_is_found_and_not_updated() -> None:
    norm, several = nn.BatchNorm1d(3), {"first": nn.BatchNorm1d(3)}
    each = nn.BatchNorm1d(3, track_running_stats=False).eval()  # has no statistics but the batch's
    later = nn.BatchNorm1d(3)
    later.track_running_stats = False  # in training mode it normalises by the batch, in eval mode as before
    maps: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: norm(x) / 2,
        partial(lambda x: norm(x) / 2),
        lambda x: several["first"](x) / 2,
        lambda x: NORM(x) / 2,
        lambda x: each(x) / 2,
        lambda x: later(x) / 2,
    )
    for f in maps:
        with pytest.raises(ValueError, match="BatchNorm1d with statistics of the batch"):
            fixed_point(f, torch.zeros(2, 3), Anderson())
    assert int(norm.num_batches_tracked) == int(NORM.num_batches_tracked) == 0
    fixed_point(later.eval(), torch.zeros(2, 3), Anderson())
    fixed_point(nn.InstanceNorm1d(3), torch.zeros(2, 3, 4), Anderson())  # of each example by itself
    counting = nn.InstanceNorm1d(3, track_running_stats=True).eval()
    fixed_point(counting, torch.zeros(2, 3, 4), Anderson())
    counting.track_running_stats = False  # it normalises by the example and updates what it has, in eval mode, too
    with pytest.raises(ValueError, match="InstanceNorm1d with statistics of the batch, which every evaluation"):
        fixed_point(counting, torch.zeros(2, 3, 4), Anderson())


def test_solvers_of_the_other_kind_are_refused_at_the_call() -> None:
    check = inspect.unwrap(_check_solvers)  # without the tests' own check of the annotations
    with pytest.raises(TypeError, match="GMRES solves no nonlinear equation; give Picard, Anderson"):
        check(GMRES(), Neumann(), torch.float32)
    with pytest.raises(TypeError, match="Picard is no adjoint, which is linear; give Neumann, Anderson"):
        check(Anderson(), Picard(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dense_adjoints_work_in_half_precision(dtype: torch.dtype) -> None:
    p = torch.full((2, 3), 0.5, dtype=dtype, requires_grad=True)
    found = fixed_point(lambda x: x / 4 + p, torch.zeros(2, 3, dtype=dtype), Anderson(0.05), adjoint=Dense(0.05))
    found.value.sum().backward()
    assert p.grad.dtype == dtype
    torch.testing.assert_close(p.grad.float(), torch.full((2, 3), 4 / 3), rtol=0.02, atol=0)


def test_a_tolerance_below_machine_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Anderson: tol=1.0e-08 is below what torch.float32 can resolve.*6.0e-07"):
        fixed_point(torch.tanh, torch.zeros(2, 3), Anderson(1e-8))
    with pytest.raises(ValueError, match=r"Neumann: tol=1.0e-08"):
        fixed_point(torch.tanh, torch.zeros(2, 3), Anderson(), adjoint=Neumann(1e-8))


def test_solvers_for_few_entries_or_of_the_paper_refuse_what_they_cannot() -> None:
    with pytest.raises(ValueError, match="Dense: states have 65 entries, more than max_steps=64; GMRES suits them"):
        Dense().invert(lambda v: v / 2, torch.ones(1, 65))
    with pytest.raises(ValueError, match=r"GradientDescent: rate is 0\.0; it must be above 0"):
        GradientDescent(rate=0.0)
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)  # f(x) = x / 2: the gradient of |x - f(x)|^2 is x / 2
    y, record = GradientDescent(max_steps=1, rate=0.1).solve(lambda v: v / 2, x)
    assert torch.allclose(y, 0.95 * x)
    assert record.steps.tolist() == [1]
    assert not record.converged.any()
