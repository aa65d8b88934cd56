"""Steps: how a branch f, the right-hand side of `h' = f(h)`, becomes a block, explicitly or by solving an equation.

A step is a frozen value, `step(branch)` the block. Blocks know nothing of the time; a branch that depends on it takes
it as a channel of the state whose slope is 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from residuum.graphs import applied
from residuum.layers.held import check_still, draws, held
from residuum.layers.pairs import State, check_dt, halves
from residuum.layers.tableaus import PartitionedTableau, Tableau
from residuum.linear import GMRES, LinearSolver
from residuum.names import unknown
from residuum.solve import Solution, fixed_point, of_the_batch, precision
from residuum.solvers import Anderson, Solver, constant, linearise

_FORMS, _STARTS, _GRADIENTS = ("two_point", "midpoint"), ("state", "euler", "linearised"), ("exact", "truncated")


@dataclass(frozen=True)
class Explicit:
    """`h + dt f(h)`: forward Euler, the ordinary residual block.

    Attributes:
        dt: Step size.
    """

    dt: float = 1.0

    def __post_init__(self) -> None:
        check_dt(self.dt)

    def __call__(self, branch: nn.Module) -> "ExplicitBlock":
        """The block with this branch."""
        return ExplicitBlock(self, branch)


class ExplicitBlock(nn.Module):
    """A block of an `Explicit` step.

    Args:
        step: The step.
        branch: f, any module that keeps the shape of the state.
    """

    def __init__(self, step: Explicit, branch: nn.Module) -> None:
        super().__init__()
        self.step, self.branch = step, branch

    def forward(self, h: State) -> State:
        """The next state."""
        return torch.add(h, applied(self.branch, h), alpha=self.step.dt)


@dataclass(frozen=True)
class Theta:
    """The implicit block: `y = h + dt ((1 - theta) f(h) + theta f(y))`, or `y = h + dt f((1 - theta) h + theta y)`.

    Both have the stability function `(1 + (1 - theta) z) / (1 - theta z)`, z = dt lambda. The solution is unique where
    theta dt Lip(f) < 1. Order 2 at theta = 1/2, else 1.

    Attributes:
        theta: In [0, 1]. 0: the explicit block, bit for bit. 1/2: trapezoidal or midpoint rule. 1: backward Euler.
        dt: Step size.
        form: "two_point" or "midpoint": the first or the second formula.
        solver: How the equation is solved.
        start: Where the solver begins: "state" h, "euler" h + dt f(h) (second order near to y), or "linearised", which
            solves the equation with f linearised at h (third order, at the price of a linear solve).
        param_grad: "exact"; "truncated" keeps the parameters of theta f(y) from the gradient, as published code did:
            at theta = 1 they get none. It is known for the two-point form only.
        adjoint: How the linear equation of the backward pass is solved; None: as suits the solver.

    Source: P3 (Reshniak & Webster), eq. 7; the midpoint form is that of its authors' later code.
    """

    theta: float = 0.5
    dt: float = 1.0
    form: str = "two_point"
    solver: Solver = field(default_factory=Anderson)
    start: str = "euler"
    param_grad: str = "exact"
    adjoint: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_dt(self.dt)
        if not 0 <= self.theta <= 1:
            raise ValueError(f"theta is {self.theta}; it must lie in [0, 1]")
        for name, allowed in (("form", _FORMS), ("start", _STARTS), ("param_grad", _GRADIENTS)):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if self.param_grad == "truncated" and self.form != "two_point":
            raise ValueError("param_grad 'truncated' needs form 'two_point', where f(h) and f(y) are two terms")

    @property
    def inverse(self) -> "Theta":
        """The step that undoes this one: 1 - theta and -dt."""
        return replace(self, theta=1 - self.theta, dt=-self.dt, param_grad="exact")

    def __call__(self, branch: nn.Module) -> "ThetaBlock":
        """The block with this branch."""
        return ThetaBlock(self, branch)


class ThetaBlock(nn.Module):
    """A block of a `Theta` step. Gradients are those of the equation, not of the solver's iterations.

    Args:
        step: The step.
        branch: f, any module that keeps the shape of the state and treats examples one by one.
    """

    def __init__(self, step: Theta, branch: nn.Module) -> None:
        super().__init__()
        self.step, self.branch = step, branch

    def forward(self, h: State) -> State:
        """The next state.

        Raises:
            ConvergenceError: If the equation was not solved to the tolerance for some example.
        """
        return self.solve(h).value

    def solve(self, h: State, *, throw: bool = True) -> Solution:
        """The next state, and per example how it was found.

        Args:
            h: The state.
            throw: False: examples that were not solved are told by `converged`.

        Raises:
            ConvergenceError: With throw, if some example was not solved.
            ValueError: If the branch is not one function of each example: batch norm or dropout in training mode.
        """
        return _theta_step(self.step, self.branch, h, throw)

    def inverse(self, h: State) -> State:
        """The state before the one that is given: the same equation, with 1 - theta and -dt.

        Its error is that of the solver times |dh / dy|, which is large where the block contracts.

        Raises:
            ConvergenceError: If the equation was not solved; it can be where (1 - theta) dt Lip(f) < 1.
            ValueError: If the branch would not be what it was in the forward: in training mode dropout, norms with
                running statistics and limited weights.
        """
        check_still(self.branch)
        return _theta_step(self.step.inverse, self.branch, h, throw=True).value


def _theta_step(step: Theta, branch: nn.Module, h: Tensor, throw: bool) -> Solution:
    theta, dt = step.theta, step.dt
    if theta == 0:
        return _solved(torch.add(h, applied(branch, h), alpha=dt))
    check_pure(branch)
    if step.param_grad == "truncated" and any(map(parametrize.is_parametrized, branch.modules())):
        raise ValueError("param_grad 'truncated' needs a branch of plain weights; this one has parametrized ones")
    wide = h.to(precision(h))
    with torch.autocast(h.device.type, enabled=False), held(branch):
        return _solved_theta(step, branch, wide, throw)


def _solved_theta(step: Theta, branch: nn.Module, h: Tensor, throw: bool) -> Solution:
    theta, dt = step.theta, step.dt
    inner = _without_gradients(branch) if step.param_grad == "truncated" else branch
    slope = applied(branch, h) if theta < 1 and step.form == "two_point" else None
    known = h if slope is None else torch.add(h, slope, alpha=(1 - theta) * dt)

    def two_point(y: Tensor) -> Tensor:
        return torch.add(known, inner(y), alpha=theta * dt)

    def midpoint(y: Tensor) -> Tensor:
        return torch.add(h, branch(torch.lerp(h, y, theta)), alpha=dt)

    start, evaluations = _start(step, branch, h, slope)
    equation = two_point if step.form == "two_point" else midpoint
    solution = fixed_point(equation, start, step.solver, adjoint=step.adjoint, throw=throw)
    return replace(solution, evaluations=solution.evaluations + evaluations + (slope is not None))


def _start(step: Theta, branch: nn.Module, h: Tensor, slope: Tensor | None) -> tuple[Tensor, int]:
    """Where the solver begins, and evaluations of f or its Jacobian for it; nothing is differentiated through it."""
    if step.start == "state":
        return h, 0
    with constant():
        if step.start == "linearised":
            with sdpa_kernel(SDPBackend.MATH):  # the only form of attention that can be differentiated twice
                at_h = linearise(branch, h)

                def product(v: Tensor) -> Tensor:
                    return step.theta * step.dt * rows(at_h.push(v.view_as(h)))

                move, record = GMRES().invert(product, step.dt * rows(at_h.value.detach()))
            return h + move.view_as(h), 1 + record.evaluations
        known = slope is not None
        return torch.add(h, slope if known else applied(branch, h), alpha=step.dt), 0 if known else 1


def rows(h: Tensor) -> Float[Tensor, "example n"]:
    """States as rows; also those of one number each."""
    return h.unsqueeze(-1).flatten(1)


def _without_gradients(branch: nn.Module) -> Callable[[Tensor], Tensor]:
    """The branch as a function of the state alone: its parameters are constants."""
    constants = {name: p.detach() for name, p in branch.named_parameters()}
    return lambda y: functional_call(branch, constants, (y,))


@dataclass(frozen=True)
class RungeKutta:
    """A step of any Runge-Kutta method, explicit or implicit, plain or partitioned.

    Slopes are found one after the other where the tableau allows it; else all together by one solve for `k_i = f(h + dt
    sum_j a_ij k_j)`, so that no evaluation is left over when they are known.

    Attributes:
        tableau: The method, one of `residuum.layers.tableaus` or your own. A partitioned one acts on two halves of the
            channels (dimension 1), y and z, and its block takes two branches: y' = f(z), z' = g(y).
        dt: Step size.
        solver: How slopes are solved for, if they have to be.
        adjoint: How the linear equation of the backward pass is solved; None: as suits the solver.
    """

    tableau: Tableau | PartitionedTableau
    dt: float = 1.0
    solver: Solver = field(default_factory=Anderson)
    adjoint: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_dt(self.dt)

    @property
    def inverse(self) -> "RungeKutta":
        """The step that undoes this one: the adjoint method with -dt."""
        return replace(self, tableau=self.tableau.adjoint, dt=-self.dt)

    def __call__(self, *branches: nn.Module) -> "RungeKuttaBlock":
        """The block with this branch, or these two.

        Raises:
            ValueError: If the number of branches is not that of the tableau's parts.
        """
        return RungeKuttaBlock(self, *branches)


class RungeKuttaBlock(nn.Module):
    """A block of a `RungeKutta` step.

    Args:
        step: The step.
        *branches: f; or f and g for a partitioned method.
    """

    def __init__(self, step: RungeKutta, *branches: nn.Module) -> None:
        super().__init__()
        parts = 2 if isinstance(step.tableau, PartitionedTableau) else 1
        if len(branches) != parts:
            raise ValueError(f"tableau {step.tableau.name} takes {parts} branches, not {len(branches)}")
        self.step, self.branches = step, nn.ModuleList(branches)

    def forward(self, h: State) -> State:
        """The next state.

        Raises:
            ConvergenceError: If the slopes were not found to the tolerance for some example.
        """
        return self.solve(h).value

    def solve(self, h: State, *, throw: bool = True) -> Solution:
        """The next state, and per example how it was found; the residual is that of the slopes.

        Args:
            h: The state.
            throw: False: examples that were not solved are told by `converged`.

        Raises:
            ConvergenceError: With throw, if some example was not solved.
            ValueError: If a branch in a solve is not one function of each example, or channels cannot be halved.
        """
        return _runge_kutta_step(self.step, self.branches, h, throw)

    def inverse(self, h: State) -> State:
        """The state before the one that is given, by the adjoint method with -dt.

        Raises:
            ConvergenceError: If its slopes were not found to the tolerance.
            ValueError: As `ThetaBlock.inverse`.
        """
        check_still(self.branches)
        return _runge_kutta_step(self.step.inverse, self.branches, h, throw=True).value


def _runge_kutta_step(step: RungeKutta, branches: nn.ModuleList, h: Tensor, throw: bool) -> Solution:
    """One step; slope number i is that of branch i // stages, at a stage that starts from the part of that branch."""
    parts, tableaus = (h,), (step.tableau,)
    if isinstance(step.tableau, PartitionedTableau):
        parts, tableaus = halves(h), (step.tableau.y, step.tableau.z)
    needs = _needs(step.tableau)
    starts, stages = parts[::-1], len(tableaus[0].b)  # f of the stages of z is the slope of y, and the other way round
    sequence = _sequence(needs)
    if sequence is None:
        for branch in branches:
            check_pure(branch)
        wide = tuple(start.to(precision(start)) for start in starts)
        with torch.autocast(h.device.type, enabled=False), held(branches):
            solution = _solved_slopes(step, branches, wide, needs, throw)
        slopes = solution.value.unbind(1)
    else:
        with held(branches):
            slopes = _slopes_in_turn(sequence, step.dt, branches, starts, needs)
        solution = _solved(h, evaluations=len(sequence))
    moved = []
    for p, (part, tableau) in enumerate(zip(parts, tableaus, strict=True)):
        for weight, slope in zip(tableau.b, slopes[p * stages : (p + 1) * stages], strict=True):
            part = torch.add(part, slope, alpha=step.dt * weight) if weight else part
        moved.append(part)
    return replace(solution, value=moved[0] if len(moved) == 1 else torch.cat(moved, 1))


def in_turn(tableau: Tableau | PartitionedTableau) -> bool:
    """Whether the slopes of a method are found one after the other, without a solve."""
    return _sequence(_needs(tableau)) is not None


def _needs(tableau: Tableau | PartitionedTableau) -> list[list[float]]:
    """Which slopes each slope needs, and how much of them."""
    if isinstance(tableau, Tableau):
        return [list(row) for row in tableau.a]
    nothing = [0.0] * len(tableau.y.b)
    return [[*nothing, *row] for row in tableau.z.a] + [[*row, *nothing] for row in tableau.y.a]


def _sequence(needs: list[list[float]]) -> list[int] | None:
    """An order in which each slope comes after those that it needs; None if there is none."""
    found: list[int] = []
    while len(found) < len(needs):
        missing = [i for i in range(len(needs)) if i not in found]
        ready = [i for i in missing if not any(needs[i][j] for j in missing)]
        if not ready:
            return None
        found += ready
    return found


def _slopes_in_turn(
    sequence: list[int], dt: float, branches: nn.ModuleList, starts: Sequence[Tensor], needs: list[list[float]]
) -> list[Tensor]:
    slopes: dict[int, Tensor] = {}
    for i in sequence:
        part = i * len(starts) // len(needs)
        stage = starts[part]
        for j, slope in slopes.items():
            stage = torch.add(stage, slope, alpha=dt * needs[i][j]) if needs[i][j] else stage
        slopes[i] = applied(branches[part], stage)
    return [slopes[i] for i in range(len(needs))]


def _solved_slopes(
    step: RungeKutta,
    branches: nn.ModuleList,
    starts: Sequence[Tensor],
    needs: list[list[float]],
    throw: bool,
) -> Solution:
    """All slopes at once, `[example, slope, *shape]`; the stages of a branch are one batch for it."""
    stages = len(needs) // len(starts)
    base = torch.stack([start for start in starts for _ in range(stages)], 1)
    matrix = step.dt * base.new_tensor(needs)

    def equation(slopes: Tensor) -> Tensor:
        states = (base + torch.einsum("ij,ej...->ei...", matrix, slopes)).chunk(len(starts), 1)
        pairs = zip(branches, states, strict=True)
        return torch.cat([f(part.flatten(0, 1)).unflatten(0, (len(part), stages)) for f, part in pairs], 1)

    return fixed_point(equation, torch.zeros_like(base), step.solver, adjoint=step.adjoint, throw=throw)


def _solved(value: Tensor, *, evaluations: int = 1) -> Solution:
    """What needed no solver."""
    count = len(value)
    return Solution(
        value=value,
        steps=torch.zeros(count, dtype=torch.long, device=value.device),
        residual=value.new_zeros(count, dtype=torch.float64),
        converged=torch.ones(count, dtype=torch.bool, device=value.device),
        evaluations=evaluations,
        adjoint=[],
    )


def check_pure(branch: nn.Module, what: str = "a solve") -> None:
    """Refuse a branch that cannot be treated as one function of each example, by a solver or whoever else.

    Args:
        branch: The branch.
        what: What wants to treat it so, for the message.

    Raises:
        ValueError: If the branch holds batch norm that uses or updates statistics of the batch, or dropout in training
            mode.
    """
    for name, module in branch.named_modules():
        if of_the_batch(module):
            raise ValueError(
                f"{what} cannot run {name or 'its branch'}, {type(module).__name__} with statistics of the batch: "
                "each evaluation would have its own; use group norm or none, or eval()"
            )
        if draws(module):
            raise ValueError(
                f"{what} cannot run {name or 'its branch'}, {type(module).__name__} in training mode: each evaluation "
                "would be another function; use it outside of the branch"
            )
