"""Steps of two states, the halves of the channels: Verlet, additive coupling, leapfrog, midpoint, momentum.

All are explicit and have an exact inverse, of the same cost.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from residuum.graphs import applied
from residuum.layers.held import check_still, held
from residuum.names import unknown

State = Float[Tensor, "example *shape"]
_FORMS = ("symplectic", "stoermer")


@runtime_checkable
class PairStep(Protocol):
    """What a step of two states offers."""

    def forth(self, p: Tensor, q: Tensor, branches: nn.ModuleList) -> tuple[Tensor, Tensor]:
        """The next two states."""

    def back(self, p: Tensor, q: Tensor, branches: nn.ModuleList) -> tuple[Tensor, Tensor]:
        """The two states before."""


class PairBlock(nn.Module):
    """A block of a step of two states, the halves of the channels (dimension 1) of h.

    Args:
        step: The step.
        *branches: Modules that keep the shape of a half.
    """

    def __init__(self, step: PairStep, *branches: nn.Module) -> None:
        super().__init__()
        self.step, self.branches = step, nn.ModuleList(branches)

    def forward(self, h: State) -> State:
        """The next state.

        Raises:
            ValueError: If the number of channels is odd.
        """
        with held(self.branches):
            return torch.cat(self.step.forth(*halves(h), self.branches), 1)

    def inverse(self, h: State) -> State:
        """The state before the one that is given.

        Raises:
            ValueError: If the number of channels is odd, or dropout, batch norm or limited weights of a branch are in
                training mode, so that each use draws other numbers or changes them.
        """
        check_still(self.branches)
        with held(self.branches):
            return torch.cat(self.step.back(*halves(h), self.branches), 1)


@dataclass(frozen=True)
class Verlet:
    """`y' = f(z)`, `z' = g(y)`: `y <- y + dt f(z)`, then `z <- z + dt g(y)`; it keeps volumes, and energies nearly.

    With a Hamiltonian pair (`branches.hamiltonian`) it is symplectic: the energy swings, but does not drift away. On
    y' = w z, z' = -w y it is stable for dt w < 2.

    Attributes:
        dt: Step size.
        form: "symplectic": as above (symplectic Euler), order 1. "stoermer": half a step of y, one of z, half of y
            (Stoermer-Verlet), order 2, symmetric.

    Source: P3 (Reshniak & Webster), section 2; Hairer, Lubich, Wanner, Geometric Numerical Integration, section I.1.4.
    """

    dt: float = 1.0
    form: str = "symplectic"

    def __post_init__(self) -> None:
        check_dt(self.dt)
        if self.form not in _FORMS:
            raise unknown("form", self.form, _FORMS)

    def __call__(self, f: nn.Module, g: nn.Module) -> PairBlock:
        """The block with these branches."""
        return PairBlock(self, f, g)

    def forth(self, p: Tensor, q: Tensor, branches: nn.ModuleList) -> tuple[Tensor, Tensor]:
        """The next two states."""
        f, g = branches
        part = self.dt if self.form == "symplectic" else self.dt / 2
        p = torch.add(p, applied(f, q), alpha=part)
        q = torch.add(q, applied(g, p), alpha=self.dt)
        return (p, q) if self.form == "symplectic" else (torch.add(p, applied(f, q), alpha=part), q)

    def back(self, p: Tensor, q: Tensor, branches: nn.ModuleList) -> tuple[Tensor, Tensor]:
        """The two states before."""
        f, g = branches
        part = self.dt if self.form == "symplectic" else self.dt / 2
        p = p if self.form == "symplectic" else torch.sub(p, applied(f, q), alpha=part)
        q = torch.sub(q, applied(g, p), alpha=self.dt)
        return torch.sub(p, applied(f, q), alpha=part), q


@dataclass(frozen=True)
class Additive:
    """Additive coupling: `y <- y + f(z)`, then `z <- z + g(y)`: a RevNet block, Verlet with step size 1.

    Source: Gomez et al. 2017, "The Reversible Residual Network", eq. 6.
    """

    def __call__(self, f: nn.Module, g: nn.Module) -> PairBlock:
        """The block with these branches."""
        return Verlet()(f, g)


@dataclass(frozen=True)
class Leapfrog:
    """`h_(n+1) = 2 h_n - h_(n-1) + dt^2 f(h_n)` for `h'' = f(h)`; the halves are h_(n-1) and h_n. Order 2.

    Attributes:
        dt: Step size.

    Source: Chang et al. 2018, "Reversible Architectures for Arbitrarily Deep Residual Neural Networks".
    """

    dt: float = 1.0

    def __post_init__(self) -> None:
        check_dt(self.dt)

    def __call__(self, branch: nn.Module) -> PairBlock:
        """The block with this branch."""
        return PairBlock(self, branch)

    def forth(self, p: Tensor, q: Tensor, branches: nn.ModuleList) -> tuple[Tensor, Tensor]:
        """The next two states."""
        return q, torch.add(2 * q - p, applied(branches[0], q), alpha=self.dt**2)

    def back(self, p: Tensor, q: Tensor, branches: nn.ModuleList) -> tuple[Tensor, Tensor]:
        """The two states before: the same formula."""
        return torch.add(2 * p - q, applied(branches[0], p), alpha=self.dt**2), p


@dataclass(frozen=True)
class Midpoint:
    """`h_(n+1) = h_(n-1) + 2 dt f(h_n)` for `h' = f(h)`; the halves are h_(n-1) and h_n. Order 2, weakly unstable.

    Not the implicit midpoint rule, which is `Theta(form="midpoint")`.

    Attributes:
        dt: Step size.

    Source: Chang et al. 2018, "Reversible Architectures for Arbitrarily Deep Residual Neural Networks".
    """

    dt: float = 1.0

    def __post_init__(self) -> None:
        check_dt(self.dt)

    def __call__(self, branch: nn.Module) -> PairBlock:
        """The block with this branch."""
        return PairBlock(self, branch)

    def forth(self, p: Tensor, q: Tensor, branches: nn.ModuleList) -> tuple[Tensor, Tensor]:
        """The next two states."""
        return q, torch.add(p, applied(branches[0], q), alpha=2 * self.dt)

    def back(self, p: Tensor, q: Tensor, branches: nn.ModuleList) -> tuple[Tensor, Tensor]:
        """The two states before."""
        return torch.sub(q, applied(branches[0], p), alpha=2 * self.dt), p


@dataclass(frozen=True)
class Momentum:
    """`v <- gamma v + (1 - gamma) f(h)`, `h <- h + v`; the halves are h and v.

    The inverse divides by gamma: over n blocks it amplifies rounding by up to gamma^-n.

    Attributes:
        gamma: In (0, 1). Near 0 it is a residual block that cannot be inverted; its authors take 1 - 1 / (50 depth).

    Source: Sander et al. 2021, "Momentum Residual Neural Networks", eq. 3 and 4.
    """

    gamma: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma is {self.gamma}; it must lie between 0 and 1")

    def __call__(self, branch: nn.Module) -> PairBlock:
        """The block with this branch."""
        return PairBlock(self, branch)

    def forth(self, p: Tensor, q: Tensor, branches: nn.ModuleList) -> tuple[Tensor, Tensor]:
        """The next two states."""
        q = torch.add(self.gamma * q, applied(branches[0], p), alpha=1 - self.gamma)
        return p + q, q

    def back(self, p: Tensor, q: Tensor, branches: nn.ModuleList) -> tuple[Tensor, Tensor]:
        """The two states before."""
        p = p - q
        return p, torch.sub(q, applied(branches[0], p), alpha=1 - self.gamma) / self.gamma


def energy_drift(
    block: nn.Module, h: State, energy: Callable[[Tensor], Tensor], *, steps: int
) -> Float[Tensor, "example step"]:
    """How the energy of a state changes while one block is applied again and again.

    `(H(h_n) - H(h_0)) / max(|H(h_0)|, tiny)` for n = 1 .. steps. 0: the energy is conserved; a symplectic step swings
    around 0 by O(dt) (symplectic Euler) or O(dt^2) (Stoermer-Verlet); a drift is what grows with n.

    Args:
        block: A block that keeps the shape of the state.
        h: The first state.
        energy: H per example.
        steps: How often the block is applied.

    Raises:
        ValueError: If there are no steps.

    Source: Hairer, Lubich, Wanner, Geometric Numerical Integration, theorem IX.8.1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; the drift needs at least 1")
    with torch.no_grad():
        first, found = energy(h), []
        for _ in range(steps):
            h = block(h)
            found.append(energy(h) - first)
        return torch.stack(found, 1) / first.abs().clamp_min(torch.finfo(first.dtype).tiny)[:, None]


def check_dt(dt: float) -> None:
    """Refuse step sizes that are no numbers.

    Raises:
        ValueError: If the step size is 0 or not finite; it may be negative.
    """
    if dt == 0 or not math.isfinite(dt):
        raise ValueError(f"dt is {dt}; it must be a finite number other than 0")


def halves(h: State) -> tuple[Tensor, Tensor]:
    """The two halves of the channels (dimension 1): the two states of a two-state step.

    Raises:
        ValueError: If the number of channels is odd.
    """
    if h.dim() < 2 or h.shape[1] % 2:
        raise ValueError(
            f"a state of shape {tuple(h.shape)} has no two equal halves along dimension 1; use even channels"
        )
    return h.chunk(2, 1)
