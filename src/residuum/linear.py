"""Solvers of v = b + A v, for all examples of a batch at once and each on its own, and what all solvers share.

States are rows here, `[example, n]`. A row that is finished, or is lost to inf and nan, keeps its value from then on
while the others go on: with a map that treats examples independently no row depends on what the others hold.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Map = Callable[[Tensor], Tensor]
MIXED_FROM = 0.15  # contraction above which Anderson's mixing saves more evaluations than it costs


@dataclass(frozen=True, eq=False)
class Record:
    """What a solve came to, per example.

    Attributes:
        steps: Steps until the example was finished or given up.
        residual: `|f(x) - x| / (1 + |x|)`, or `|b + A v - v| / (|b| + |v|)` of a linear solve; 2-norms over the state,
            of the very value that is returned, dimensionless; nan or inf where the map is not finite.
        converged: Whether the residual is within the tolerance.
        evaluations: Evaluations of f, or products with the Jacobian or its transpose, each for the whole batch.
    """

    steps: Int[Tensor, " example"]
    residual: Float[Tensor, " example"]
    converged: Bool[Tensor, " example"]
    evaluations: int


@runtime_checkable
class LinearSolver(Protocol):
    """Solves v = b + A v for a linear map A."""

    tol: float
    max_steps: int

    def invert(self, A: Map, b: Float[Tensor, "example n"]) -> tuple[Tensor, Record]:
        """The solution v = (I - A)^-1 b, and what it took."""


def check_settings(solver: object, *least: str) -> None:
    """Refuse settings that make no sense."""
    for name in least:
        value = getattr(solver, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(solver).__name__}: {name} is {value!r}; a whole number of at least 1 is needed")
    if not 0 < solver.tol < 1:
        raise ValueError(f"{type(solver).__name__}: tol is {solver.tol!r}; it is relative and lies between 0 and 1")


@dataclass(frozen=True)
class Neumann:
    """The Neumann series v = b + A b + A^2 b + ..; Picard's iteration for a linear equation.

    Attributes:
        tol: Relative residual at which an example is finished.
        max_steps: Most steps before an example is given up.
    """

    tol: float = 1e-6
    max_steps: int = 100

    def __post_init__(self) -> None:
        check_settings(self, "max_steps")

    def invert(self, A: Map, b: Float[Tensor, "example n"]) -> tuple[Tensor, Record]:
        """The solution v = (I - A)^-1 b, and what it took."""
        return iterate(lambda v: b + A(v), b, unit(b), self.tol, self.max_steps, memory=0)


@dataclass(frozen=True)
class BiCGStab:
    """Stabilised bi-conjugate gradients; two products per step, six vectors however many steps.

    The residual that the recursion carries drifts from the true one, so an example is finished only when the residual
    of its solution, computed anew, is within the tolerance; otherwise the solve goes on from there.

    Attributes:
        tol: Relative residual at which an example is finished.
        max_steps: Most steps before an example is given up.

    Source: van der Vorst (1992).
    """

    tol: float = 1e-6
    max_steps: int = 100

    def __post_init__(self) -> None:
        check_settings(self, "max_steps")

    def invert(self, A: Map, b: Float[Tensor, "example n"]) -> tuple[Tensor, Record]:
        """The solution v = (I - A)^-1 b, and what it took."""
        return _refine(_bicgstab, A, b, self.tol, self.max_steps)


@dataclass(frozen=True)
class GMRES:
    """Generalised minimal residuals: the fewest products; keeps one vector per step until it restarts.

    Orthogonalised twice; the small least-squares problem is solved in float64 by rotations. As with `BiCGStab` the
    residual of the solution is computed anew before an example is finished, and at each restart.

    Attributes:
        tol: Relative residual at which an example is finished.
        max_steps: Most steps, one product each, before an example is given up.
        restart: Steps after which the basis is dropped.

    Source: Saad & Schultz (1986).
    """

    tol: float = 1e-6
    max_steps: int = 100
    restart: int = 20

    def __post_init__(self) -> None:
        check_settings(self, "max_steps", "restart")

    def invert(self, A: Map, b: Float[Tensor, "example n"]) -> tuple[Tensor, Record]:
        """The solution v = (I - A)^-1 b, and what it took."""

        def cycle(A: Map, r: Tensor, target: Tensor, left: Tensor) -> tuple[Tensor, Tensor, int]:
            return _gmres(A, r, target, left.clamp_max(self.restart))

        return _refine(cycle, A, b, self.tol, self.max_steps)


class Progress:
    """Which rows are still at work, their steps and residuals.

    A residual is `|g| / (base + |x|)`. A row stops for good when it is within the tolerance or not finite.
    """

    def __init__(self, base: Float[Tensor, " example"], tol: float) -> None:
        self.base, self.tol = base, tol
        self.active = torch.ones_like(base, dtype=torch.bool)
        self.steps = torch.zeros_like(base, dtype=torch.long)
        self.residual = torch.full_like(base, math.inf)

    def note(self, g: Tensor, x: Tensor) -> int:
        """Take the residuals g at x down; how many rows are still at work."""
        self.size = _norm(g)
        self.residual = torch.where(self.active, self.size / (self.base + _norm(x)), self.residual)
        self.active = self.active & (self.residual > self.tol) & self.residual.isfinite()
        return int(self.active.sum())

    def kept(self, g: Tensor) -> Tensor:
        """g with zeros in the rows that are no longer at work."""
        return g.masked_fill(~self.active[:, None], 0)

    def record(self, evaluations: int) -> Record:
        """How it ended."""
        return Record(self.steps, self.residual, self.residual <= self.tol, evaluations)


def _norm(x: Float[Tensor, "example n"]) -> Float[Tensor, " example"]:
    return torch.linalg.vector_norm(x, dim=1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products over the last dimension."""
    return (x * y).sum(-1)


def unit(b: Float[Tensor, "example n"]) -> Float[Tensor, " example"]:
    """|b|, or 1 where b is zero and so is the solution."""
    size = _norm(b)
    return size.masked_fill(size == 0, 1)


def iterate(
    f: Map, x: Float[Tensor, "example n"], base: Float[Tensor, " example"], tol: float, max_steps: int, memory: int
) -> tuple[Tensor, Record]:
    """x <- f(x), mixed with the last `memory` steps in the rows where plain steps are slow."""
    progress = Progress(base, tol)
    mixed = torch.zeros_like(progress.active)
    mixture = before = None
    for step in range(max_steps + 1):
        fx = f(x)
        g = fx - x
        working = progress.note(g, x)
        if not working or step == max_steps:
            break
        new = fx
        if step and memory:
            mixed = mixed | (progress.active & (progress.size > MIXED_FROM * before[2]))
            if mixture is None and mixed.any():
                mixture = Mixture(x, memory)
            if mixture is not None:
                new = mixture.step(step, fx, g, *before[:2], mixed)
        before = fx, g, progress.size
        x = new if working == len(x) else torch.where(progress.active[:, None], new, x)
        progress.steps += progress.active
    return x, progress.record(step + 1)


class Mixture:
    """The last differences of f(x) and g = f(x) - x, and the small system that they make, per row."""

    def __init__(self, like: Float[Tensor, "example n"], memory: int) -> None:
        rows, n = like.shape
        self.df, self.dg = like.new_zeros(2, rows, memory, n)
        self.gram = like.new_zeros(rows, memory, memory, dtype=torch.float64)
        self.eye = torch.eye(memory, dtype=torch.float64, device=like.device)

    def step(self, step: int, fx: Tensor, g: Tensor, fx_before: Tensor, g_before: Tensor, mixed: Tensor) -> Tensor:
        """Where to go from fx; fx itself in the rows that are not mixed, which leave no differences behind."""
        slot = step % self.gram.shape[1]  # not a count of calls: when others began must not change the order of sums
        self.df[:, slot] = (fx - fx_before).masked_fill_(~mixed[:, None], 0)
        self.dg[:, slot] = (g - g_before).masked_fill_(~mixed[:, None], 0)
        self.gram[:, slot] = self.gram[:, :, slot] = _dot(self.dg, self.dg[:, slot, None])
        size = self.gram.diagonal(dim1=1, dim2=2).sqrt()
        empty = size == 0
        size = size.masked_fill(empty, 1)
        system = self.gram / (size[:, :, None] * size[:, None]) + self.eye * (1e-10 + empty.double()[:, None])
        right = _dot(self.dg, g[:, None]).double() / size
        gamma = torch.linalg.solve_ex(system, right[:, :, None])[0][:, :, 0] / size
        return fx - torch.bmm(gamma.to(fx.dtype)[:, None], self.df)[:, 0]


Cycle = Callable[[Map, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, int]]


def _refine(cycle: Cycle, A: Map, b: Tensor, tol: float, max_steps: int) -> tuple[Tensor, Record]:
    """v = b + A v: corrections by a Krylov method until the true residual is small.

    A cycle takes the residuals, the size to bring each down to, and how many steps are left to each row (0: leave it
    alone); it gives the corrections, the steps taken per row and the number of products.
    """
    progress = Progress(unit(b), tol)
    v, r, products = torch.zeros_like(b), b, 0
    progress.note(r, v)
    while True:
        left = (max_steps - progress.steps) * progress.active
        if not left.any():
            return v, progress.record(products)
        target = tol * (progress.base + _norm(v))
        d, steps, used = cycle(A, progress.kept(r), target, left)
        v = v + d
        r = b + A(v) - v
        products += used + 1
        progress.steps += steps
        progress.note(r, v)


def _bicgstab(A: Map, r: Tensor, target: Tensor, left: Tensor) -> tuple[Tensor, Tensor, int]:
    """(I - A) d = r for the rows with steps left, until the residual of the recursion is small or it breaks down."""
    shadow, p, d, rho = r, r, torch.zeros_like(r), _dot(r, r)
    steps, products, active = torch.zeros_like(left), 0, left > 0
    while active.any():
        steps += active
        q = p - A(p)
        alpha = _ratio(rho, _dot(shadow, q), active)
        d = torch.addcmul(d, alpha, p)
        s = torch.addcmul(r, alpha, q, value=-1)
        products += 1
        half = active & (_norm(s) > target)
        if not half.any():
            break
        t = s - A(s)
        products += 1
        omega = _ratio(_dot(t, s), _dot(t, t), half)
        d = torch.addcmul(d, omega, s)
        r = torch.addcmul(s, omega, t, value=-1)
        last, rho = rho, _dot(shadow, r)
        beta = _ratio(rho, last, half) * _ratio(alpha[:, 0], omega[:, 0], half)
        p = r + beta * (p - omega * q)
        active = half & (_norm(r) > target) & (beta[:, 0] != 0) & (steps < left)
    return d, steps, products


def _ratio(a: Tensor, b: Tensor, where: Tensor) -> Float[Tensor, "example 1"]:
    """a / b as a column; 0 in the other rows and where it is not finite."""
    return torch.where(where, a / b, 0).nan_to_num(0, 0, 0)[:, None]


def _gmres(A: Map, r: Tensor, target: Tensor, left: Tensor) -> tuple[Tensor, Tensor, int]:
    """(I - A) d = r for the rows with steps left, over the Krylov space of that many steps."""
    rows, most = len(r), min(int(left.max()), r.shape[1])
    size = _norm(r)
    basis = r.new_zeros(rows, most + 1, r.shape[1])
    basis[:, 0] = r / size.masked_fill(size == 0, 1)[:, None]
    wide = {"dtype": torch.float64, "device": r.device}
    rotation = torch.eye(most + 1, **wide).repeat(rows, 1, 1)
    R, right = torch.eye(most, **wide).repeat(rows, 1, 1), torch.zeros(rows, most, **wide)
    steps, active = torch.zeros_like(left), (left > 0) & (size > 0)
    for k in range(most):
        if not active.any():
            break
        w = basis[:, k] - A(basis[:, k])
        column = torch.zeros(rows, most + 1, **wide)
        before = _norm(w)
        for _ in range(2):  # once leaves a part of the size of the rounding errors
            along = _dot(basis[:, : k + 1], w[:, None])
            w = w - torch.bmm(along[:, None], basis[:, : k + 1])[:, 0]
            column[:, : k + 1] += along
        length = _norm(w)
        gone = length <= 32 * torch.finfo(w.dtype).eps * before
        column[:, k + 1] = length.masked_fill(gone, 0)
        basis[:, k + 1] = w / length.masked_fill(gone, math.inf)[:, None]
        column = torch.bmm(rotation, column[:, :, None])[:, :, 0]
        top = torch.hypot(column[:, k], column[:, k + 1])
        usable = active & (top > 0) & top.isfinite()
        cos, sin = (torch.where(usable, column[:, j] / top, 0)[:, None] for j in (k, k + 1))
        upper, lower = rotation[:, k].clone(), rotation[:, k + 1].clone()
        rotation[:, k], rotation[:, k + 1] = cos * upper + sin * lower, cos * lower - sin * upper
        R[:, :k, k] = torch.where(usable[:, None], column[:, :k], 0)
        R[:, k, k] = torch.where(usable, top, 1)
        right[:, k] = torch.where(usable, rotation[:, k, 0] * size, 0)
        steps += active
        active = usable & (rotation[:, k + 1, 0].abs() * size > target) & ~gone & (steps < left)
    y = torch.linalg.solve_triangular(R, right[:, :, None], upper=True)[:, :, 0]
    return torch.bmm(y.to(r.dtype)[:, None], basis[:, :most])[:, 0], steps, int(steps.max())
