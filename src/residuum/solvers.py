"""Solvers of x = f(x) without derivatives, on rows `[example, n]`; products with the Jacobian."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vjp

from residuum.graphs import leaf, recorded
from residuum.linear import GMRES, LinearSolver, Map, Progress, Record, check_settings, iterate, iterate_linear


@runtime_checkable
class Solver(Protocol):
    """Solves x = f(x); states are rows, the map may be nonlinear."""

    tol: float
    max_steps: int

    def solve(self, f: Map, x: Float[Tensor, "example n"]) -> tuple[Tensor, Record]:
        """The solution from the start x, and what it took."""


@dataclass(frozen=True)
class Picard:
    """Fixed-point iteration x <- f(x). Converges where f contracts, by the contraction per step.

    Attributes:
        tol: Relative residual at which an example is finished.
        max_steps: Most steps before an example is given up.
    """

    tol: float = 1e-6
    max_steps: int = 100

    def __post_init__(self) -> None:
        check_settings(self, "max_steps")

    def solve(self, f: Map, x: Float[Tensor, "example n"]) -> tuple[Tensor, Record]:
        """The solution from the start x, and what it took."""
        return iterate(f, x, tol=self.tol, max_steps=self.max_steps)


@dataclass(frozen=True)
class Anderson:
    """Anderson's mixing: the combination of the last steps whose residuals cancel best; for nonlinear and linear maps.

    `x <- f(x) - sum_i gamma_i df_i` with gamma from min |g - sum_i gamma_i dg_i|, where g = f(x) - x and df_i, dg_i are
    the last differences of f(x) and g; on linear maps it behaves like GMRES. An example whose residual falls to 0.15 of
    itself per plain step takes plain steps. The small systems are solved in float64, scaled to a diagonal of ones, to
    which 1e-10 is added: relative to the residuals, which shrink by orders of magnitude during a solve.

    Attributes:
        tol: Relative residual at which an example is finished.
        max_steps: Most steps before an example is given up.
        memory: Differences kept; two states each.

    Source: Anderson (1965); Walker & Ni (2011), algorithm AA.
    """

    tol: float = 1e-6
    max_steps: int = 50
    memory: int = 5

    def __post_init__(self) -> None:
        check_settings(self, "max_steps", "memory")

    def solve(self, f: Map, x: Float[Tensor, "example n"]) -> tuple[Tensor, Record]:
        """The solution from the start x, and what it took."""
        return iterate(f, x, tol=self.tol, max_steps=self.max_steps, memory=self.memory)

    def invert(self, A: Map, b: Float[Tensor, "example n"]) -> tuple[Tensor, Record]:
        """The solution v = (I - A)^-1 b, and what it took."""
        return iterate_linear(A, b, tol=self.tol, max_steps=self.max_steps, memory=self.memory)


@dataclass(frozen=True)
class NewtonKrylov:
    """Newton's method, x <- x + (I - J)^-1 (f(x) - x), with a linear solve by Jacobian products at every step.

    For maps that do not contract. A product with J costs about two evaluations of f, so where `Anderson` converges it
    is cheaper. f must be twice differentiable by autograd.

    Attributes:
        tol: Relative residual at which an example is finished.
        max_steps: Most steps before an example is given up.
        linear: Solver of the inner equations; its tolerance is the factor by which a step lowers the residual, where
            f is nearly linear. An inner solve that fails only makes a worse step.

    Source: Dembo, Eisenstat & Steihaug (1982), constant forcing term.
    """

    tol: float = 1e-6
    max_steps: int = 20
    linear: LinearSolver = field(default_factory=lambda: GMRES(tol=1e-3, max_steps=60))

    def __post_init__(self) -> None:
        check_settings(self, "max_steps")

    def solve(self, f: Map, x: Float[Tensor, "example n"]) -> tuple[Tensor, Record]:
        """The solution from the start x, and what it took."""
        progress = Progress(x, self.tol)
        evaluations = 0
        for step in range(self.max_steps + 1):
            at_x = linearise(f, x)
            g = at_x.value.detach() - x
            evaluations += 1
            if not progress.note(g, x) or step == self.max_steps:
                break
            d, inner = self.linear.invert(at_x.push, progress.kept(g))
            evaluations += inner.evaluations
            x = torch.where(progress.active[:, None], x + d, x)
            progress.steps += progress.active
        return x, progress.record(evaluations)


@dataclass(frozen=True)
class GradientDescent:
    """Descent on the squared residual: `x <- x - rate 2 (I - J)^T (x - f(x))`. The paper's solver; not the best.

    A step costs an evaluation of f and a product with J^T and lowers the error by `|I - 2 rate (I - J)^T (I - J)|`,
    where fixed-point iteration lowers it by |J| for one evaluation. Where |J| < 1, a rate of 1/4 or less converges.

    Attributes:
        tol: Relative residual at which an example is finished.
        max_steps: Most steps before an example is given up.
        rate: Length of a step. The paper's code has 1e-5, with which 21 steps change the residual by less than 0.2 %.

    Source: P3 (Reshniak & Webster), section 2.2, and its code.
    """

    tol: float = 1e-6
    max_steps: int = 200
    rate: float = 0.25

    def __post_init__(self) -> None:
        check_settings(self, "max_steps")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"GradientDescent: rate is {self.rate!r}; it must be above 0")

    def solve(self, f: Map, x: Float[Tensor, "example n"]) -> tuple[Tensor, Record]:
        """The solution from the start x, and what it took."""
        progress = Progress(x, self.tol)
        evaluations = 0
        for step in range(self.max_steps + 1):
            at_x = linearise(f, x)
            g = at_x.value.detach() - x
            evaluations += 1
            if not progress.note(g, x) or step == self.max_steps:
                break
            descent = g - at_x.pull(g)
            evaluations += 1
            x = torch.where(progress.active[:, None], x + 2 * self.rate * descent, x)
            progress.steps += progress.active
        return x, progress.record(evaluations)


def transforms() -> list[str]:
    """The transforms of torch.func at work, outermost first: "Grad" (also vjp), "Jvp", "Vmap", .."""
    return [level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()]


@contextmanager
def constant() -> Iterator[None]:
    """What is computed here has no derivatives, of either mode and at any level of nested transforms."""
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        yield


@dataclass(frozen=True, eq=False)
class Linearised:
    """A map at a state: its value, and products with its Jacobian J.

    Attributes:
        value: f(x), with its graph in what f captures.
        pull: v -> J^T v. Both products are for use where all is `constant`.
        push: v -> J v, by differentiating J^T v, which is recorded when this is first used.
        leaf: What f was applied to, where there are leaves.
    """

    value: Tensor
    pull: Map
    push: Map
    leaf: Tensor | None


def linearise(f: Map, x: Tensor) -> Linearised:
    """One recorded evaluation of f."""
    if transforms():  # there are no leaves, and all must be recorded here, at the level of what f captures
        fx, pulled = vjp(f, x)
        _, pushed = vjp(lambda u: pulled(u)[0], torch.zeros_like(x))
        return Linearised(fx, lambda v: pulled(v)[0], lambda v: pushed(v)[0], None)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    with recorded():
        at = leaf(x)
        fx = f(at)

    def pull(v: Tensor) -> Tensor:
        return torch.autograd.grad(fx, at, v, **options)[0] if fx.requires_grad else torch.zeros_like(v)

    @cache
    def transposed() -> tuple[Tensor, Tensor]:
        with recorded():
            u = torch.zeros_like(fx, requires_grad=True)
            return torch.autograd.grad(fx, at, u, create_graph=True, **options)[0], u

    def push(v: Tensor) -> Tensor:
        if not fx.requires_grad:
            return torch.zeros_like(v)
        pulled, u = transposed()
        return torch.autograd.grad(pulled, u, v, **options)[0] if pulled.requires_grad else torch.zeros_like(v)

    return Linearised(fx, pull, push, at)
