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
RELATIVE = 1e-10  # what is added to the diagonal of ones of Anderson's small systems
MIXED_FROM = 0.15  # contraction above which Anderson's mixing saves more evaluations than it costs


@dataclass(frozen=True, eq=False)
class Record:
    """What a solve came to, per example.

    Attributes:
        steps: Steps until the example was finished or given up.
        residual: `|f(x) - x| / (1 + |x|)`, or `|b + A v - v| / (|b| + |v|)` of a linear solve, where |v| counts up to
            `|b| / sqrt(tol)`; 2-norms over the state, of the very value that is returned, dimensionless; nan or inf
            where the map is not finite.
        converged: Whether the residual is within the tolerance.
        evaluations: Evaluations of f, or products with the Jacobian or its transpose, each for the whole batch.
        start: The residual at the start; None of a solver that does not say it.
    """

    steps: Int[Tensor, " example"]
    residual: Float[Tensor, " example"]
    converged: Bool[Tensor, " example"]
    evaluations: int
    start: Float[Tensor, " example"] | None = None


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
        return iterate_linear(A, b, tol=self.tol, max_steps=self.max_steps)


@dataclass(frozen=True)
class BiCGStab:
    """Stabilised bi-conjugate gradients; about eight vectors however many steps.

    Examples that A shrinks to 0.15 at once take the Neumann series instead, which needs no more products there.

    The residual that the recursion carries drifts from the true one, so an example is finished only when the residual
    of its solution, computed anew, is within the tolerance; otherwise the solve goes on from there.

    Attributes:
        tol: Relative residual at which an example is finished.
        max_steps: Most steps, one product each, before an example is given up.

    Source: van der Vorst (1992).
    """

    tol: float = 1e-6
    max_steps: int = 200

    def __post_init__(self) -> None:
        check_settings(self, "max_steps")

    def invert(self, A: Map, b: Float[Tensor, "example n"]) -> tuple[Tensor, Record]:
        """The solution v = (I - A)^-1 b, and what it took."""

        def cycle(A: Map, r: Tensor, target: Tensor, left: Tensor) -> tuple[Tensor, Tensor, int]:
            # After two products per entry the shadow residual has seen all there is: only a new one gets on.
            return _bicgstab(A, r, target, left.clamp_max(2 * r.shape[1]))

        return _refine(cycle, A, b, self)


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

        return _refine(cycle, A, b, self)


@dataclass(frozen=True)
class Dense:
    """The matrix of A itself, by one product per entry of a state, and its LU factors: for states of a few entries.

    It solves whatever is not singular, in a known time; with more than about ten entries the others are cheaper.

    Attributes:
        tol: Relative residual that the solution must have.
        max_steps: Most entries of a state, one product each; each example's matrix has the square of that.
    """

    tol: float = 1e-6
    max_steps: int = 64

    def __post_init__(self) -> None:
        check_settings(self, "max_steps")

    def invert(self, A: Map, b: Float[Tensor, "example n"]) -> tuple[Tensor, Record]:
        """The solution v = (I - A)^-1 b, and what it took.

        Raises:
            ValueError: If states have more entries than `max_steps`.
        """
        n = b.shape[1]
        if n > self.max_steps:
            raise ValueError(f"Dense: states have {n} entries, more than max_steps={self.max_steps}; GMRES suits them")
        b, size = scaled(b)
        units = torch.eye(n, dtype=b.dtype, device=b.device)
        matrix = units - torch.stack([A(unit.expand_as(b)) for unit in units], 2)
        wide = torch.promote_types(b.dtype, torch.float32)  # there are no LU factors in half precision
        v, singular = torch.linalg.solve_ex(matrix.to(wide), b.to(wide))
        v = torch.where(singular[:, None] == 0, v, 0).to(b.dtype)
        progress = Progress(b, self.tol, most=_most(self.tol))
        progress.steps += n
        progress.note(b - torch.bmm(matrix, v[:, :, None])[:, :, 0], v)
        return _times(v, size), progress.record(n)


class Progress:
    """Which rows are still at work, their steps and residuals.

    A residual is `|g| / (1 + |x|)`, with |x| counted up to `most`. A row stops for good when it is within the tolerance
    or not finite.
    """

    def __init__(self, x: Float[Tensor, "example n"], tol: float, *, most: float = math.inf) -> None:
        self.tol, self.most = tol, most
        self.active = x.new_ones(len(x), dtype=torch.bool)
        self.steps = x.new_zeros(len(x), dtype=torch.long)
        self.residual = x.new_full((len(x),), math.inf, dtype=torch.float64)
        self.start: Tensor | None = None

    def note(self, g: Tensor, x: Tensor) -> int:
        """Take the residuals g at x down; how many rows are still at work."""
        self.size, length = norms(g), norms(x)
        seen = self.size
        if self.most < math.inf:  # where x is huge g may be 0 by rounding alone
            seen, length = seen.maximum(torch.finfo(x.dtype).eps * length), length.clamp_max(self.most)
        residual = (seen / (1 + length)).masked_fill(~length.isfinite(), math.inf)
        self.residual = torch.where(self.active, residual, self.residual)
        self.start = self.residual if self.start is None else self.start
        self.active = self.active & (self.residual > self.tol) & (self.residual < math.inf)
        return int(self.active.sum())

    def kept(self, g: Tensor) -> Tensor:
        """g with zeros in the rows that are no longer at work."""
        return g.masked_fill(~self.active[:, None], 0)

    def record(self, evaluations: int) -> Record:
        """How it ended."""
        return Record(self.steps, self.residual, self.residual <= self.tol, evaluations, self.start)


def norms(x: Float[Tensor, "example n"]) -> Float[Tensor, " example"]:
    """The 2-norm of each row, in float64: also where the squares are beyond what the precision of x holds.

    In float32 that is so for entries above 1e19 and below 1e-22, in float16 for rows longer than 65504.
    """
    size, least = torch.linalg.vector_norm(x, dim=1).double(), torch.finfo(x.dtype).tiny ** 0.5
    low, high = torch.aminmax(size) if len(size) else (size.new_ones(()), size.new_ones(()))
    if least < low.item() and high.item() < math.inf:
        return size
    odd = ~((size > least) & (size < math.inf))  # these rows alone: what a row gives must not depend on the others
    size[odd] = torch.linalg.vector_norm(x[odd], dim=1, dtype=torch.float64)
    return size


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products over the last dimension."""
    return (x * y).sum(-1)


def scaled(b: Float[Tensor, "example n"]) -> tuple[Float[Tensor, "example n"], Float[Tensor, "example 1"]]:
    """b with rows of length 1, and the lengths in float64; rows of zeros stay, with length 1."""
    size = norms(b)[:, None]
    size = size.masked_fill(size == 0, 1)
    return _times(b, 1 / size), size


def _times(b: Float[Tensor, "example n"], size: Float[Tensor, "example 1"]) -> Float[Tensor, "example n"]:
    """b with rows that many times as long, in its own precision."""
    return (b * size).to(b.dtype)


def _most(tol: float) -> float:
    """How far |v| / |b| counts in the rule to stop; a singular system has a v so large that any residual is small."""
    return tol**-0.5


def iterate_linear(
    A: Map, b: Float[Tensor, "example n"], *, tol: float, max_steps: int, memory: int = 0
) -> tuple[Tensor, Record]:
    """v <- b + A v, mixed as in `iterate`; b is scaled to length 1 meanwhile, so that the rule to stop is relative."""
    b, size = scaled(b)
    v, record = iterate(lambda v: b + A(v), b, tol=tol, max_steps=max_steps, memory=memory, most=_most(tol))
    return _times(v, size), record


def iterate(
    f: Map,
    x: Float[Tensor, "example n"],
    *,
    tol: float,
    max_steps: int,
    memory: int = 0,
    most: float = math.inf,
) -> tuple[Tensor, Record]:
    """x <- f(x), mixed with the last `memory` steps in the rows where plain steps are slow."""
    progress = Progress(x, tol, most=most)
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
            if not mixed.all():
                mixed = mixed | (progress.active & (progress.size > MIXED_FROM * before[2]))
            if mixture is None and mixed.any():
                mixture = Mixture(x, memory)
            if mixture is not None:
                new = mixture.step(step, fx, g, *before[:2], mixed)
        before = fx, g, progress.size
        x = new if working == x.shape[0] else torch.where(progress.active[:, None], new, x)
        progress.steps += progress.active
    return x, progress.record(step + 1)


class Mixture:
    """The last differences of f(x) and g = f(x) - x, and the small system that they make, per row.

    Both differences are divided by the length of that of g, so the Gram matrix has a diagonal of ones.
    """

    def __init__(self, like: Float[Tensor, "example n"], memory: int) -> None:
        rows, n = like.shape
        self.df, self.dg = like.new_zeros(2, rows, memory, n)
        self.gram = torch.eye(memory, dtype=torch.float64, device=like.device).expand(rows, -1, -1).clone()

    def step(self, step: int, fx: Tensor, g: Tensor, fx_before: Tensor, g_before: Tensor, mixed: Tensor) -> Tensor:
        """Where to go from fx; fx itself in the rows that are not mixed, which leave no differences behind."""
        slot = step % self.gram.shape[1]  # not a count of calls: when others began must not change the order of sums
        dg = g - g_before
        factor = (mixed / norms(dg).clamp_min(1e-20))[:, None].to(dg.dtype)
        torch.mul(dg, factor, out=self.dg[:, slot])
        torch.mul(fx - fx_before, factor, out=self.df[:, slot])
        self.gram[:, slot] = self.gram[:, :, slot] = _dot(self.dg, self.dg[:, slot, None]).double()
        self.gram[:, slot, slot] = 1 + RELATIVE
        right = _dot(self.dg, g[:, None]).double()
        gamma = torch.linalg.solve_ex(self.gram, right[:, :, None])[0].to(fx.dtype)
        new = fx.clone()
        for weight, df in zip(gamma.unbind(1), self.df.unbind(1), strict=True):
            new.addcmul_(weight, df, value=-1)
        return new


Cycle = Callable[[Map, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, int]]


def _refine(cycle: Cycle, A: Map, b: Tensor, settings: LinearSolver) -> tuple[Tensor, Record]:
    """v = b + A v: corrections by a Krylov method until the true residual is small; b is scaled to length 1 meanwhile.

    A cycle takes the residuals, scaled too, the size to bring each down to, and how many steps are left to each row
    (0: leave it alone); it gives the corrections, the steps taken per row and the number of products.
    """
    b, size = scaled(b)
    progress = Progress(b, settings.tol, most=_most(settings.tol))
    v, r, scale, products = torch.zeros_like(b), b, torch.ones_like(size), 0
    working = progress.note(r, v)
    while working:
        left = (settings.max_steps - progress.steps) * (progress.active & (progress.size > 0))  # 0 corrects nothing
        if not left.any():
            break
        target = settings.tol * (1 + norms(v).clamp_max(progress.most)) / scale[:, 0]
        d, steps, used = cycle(A, r, target, left)
        v = v + _times(d, scale)
        r = b + A(v) - v
        products += used + 1
        progress.steps += steps
        working = progress.note(r, v)
        r, scale = scaled(progress.kept(r)) if working else (r, scale)
    return _times(v, size), progress.record(products)


def _bicgstab(A: Map, r: Tensor, target: Tensor, left: Tensor) -> tuple[Tensor, Tensor, int]:
    """(I - A) d = r for the rows with steps left, until the residual of the recursion is small.

    In the rows that A contracts well at once alpha = omega = 1 and p = r: there the recursion is the Neumann series.
    """
    image, active = A(r), left > 0
    plain = norms(image) <= MIXED_FROM * norms(r)
    if plain.all():
        return _neumann(A, r, image, target, left)
    plain = plain if plain.any() else None
    shadow, p, rho = r, r, _dot(r, r)
    d, steps, products = torch.zeros_like(r), active.long(), 1
    while True:
        q = p - image
        alpha = _ratio(rho, _dot(shadow, q), active, plain)
        d = torch.addcmul(d, alpha, p)
        s = _either(plain, image, torch.addcmul(r, alpha, q, value=-1))
        active = active & (norms(s) > target) & (steps < left)
        if not active.any():
            return d, steps, products
        image, steps, products = A(s), steps + active, products + 1
        t = s - image
        omega = _ratio(_dot(t, s), _dot(t, t), active, plain)
        d = torch.addcmul(d, omega, s)
        r = _either(plain, image, torch.addcmul(s, omega, t, value=-1))
        active = active & (norms(r) > target) & (steps < left)
        if not active.any():
            return d, steps, products
        last, rho = rho, _dot(shadow, r)
        beta = _ratio(rho * alpha[:, 0], last * omega[:, 0], active)
        p = _either(plain, r, torch.addcmul(r, beta, torch.addcmul(p, omega, q, value=-1)))
        image, steps, products = A(p), steps + active, products + 1


def _either(plain: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """a in the plain rows, b in the others."""
    return b if plain is None else torch.where(plain[:, None], a, b)


def _neumann(A: Map, r: Tensor, image: Tensor, target: Tensor, left: Tensor) -> tuple[Tensor, Tensor, int]:
    """What `_bicgstab` does, bitwise, where all its rows are plain."""
    d, active, steps, products = torch.zeros_like(r), left > 0, torch.zeros_like(left), 1
    while True:
        d = torch.addcmul(d, active[:, None].to(d.dtype), r)
        r, steps = image, steps + active
        active = active & (norms(r) > target) & (steps < left)
        if not active.any():
            return d, steps, products
        image, products = A(r), products + 1


def _ratio(a: Tensor, b: Tensor, active: Tensor, one: Tensor | None = None) -> Float[Tensor, "example 1"]:
    """a / b as a column, but 1 in the rows `one`; 0 in rows that are not active.

    Any number keeps the recursion true, so where b is 0 it does not matter which.
    """
    ratio = a / (b + (b == 0))
    return ((ratio if one is None else ratio.masked_fill(one, 1)) * active)[:, None]


def _gmres(A: Map, r: Tensor, target: Tensor, left: Tensor) -> tuple[Tensor, Tensor, int]:
    """(I - A) d = r for the rows with steps left, over the Krylov space of that many steps."""
    rows, most = len(r), min(int(left.max()), r.shape[1])
    size = norms(r)
    basis = r.new_zeros(rows, most + 1, r.shape[1])
    basis[:, 0] = _times(r, 1 / size.masked_fill(size == 0, 1)[:, None])
    wide = {"dtype": torch.float64, "device": r.device}
    rotation = torch.eye(most + 1, **wide).repeat(rows, 1, 1)
    R, right = torch.eye(most, **wide).repeat(rows, 1, 1), torch.zeros(rows, most, **wide)
    steps, active = torch.zeros_like(left), (left > 0) & (size > 0)
    for k in range(most):
        if not active.any():
            break
        w = basis[:, k] - A(basis[:, k])
        column = torch.zeros(rows, most + 1, **wide)
        before = norms(w)
        for _ in range(2):  # once leaves a part of the size of the rounding errors
            along = _dot(basis[:, : k + 1], w[:, None])
            w = w - torch.bmm(along[:, None], basis[:, : k + 1])[:, 0]
            column[:, : k + 1] += along
        length = norms(w)
        gone = length <= 32 * torch.finfo(w.dtype).eps * before
        column[:, k + 1] = length.masked_fill(gone, 0)
        basis[:, k + 1] = _times(w, 1 / length.masked_fill(gone, math.inf)[:, None])
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
