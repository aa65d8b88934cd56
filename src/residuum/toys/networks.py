"""Small networks of P3, several side by side: member m of a batch `[member * example, ..]` has weights of its own.

Nothing is shared by the members but the evaluations, which cost a few small tensors as much time as one of them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn.utils import parametrize

from residuum.layers.branches import activation_of
from residuum.layers.steps import Theta
from residuum.solve import Solution

Draws = Sequence[np.random.Generator]  # one per member
# Most damped steps of Newton's method, how often one is halved, and how many may be no improvement after that.
_DAMPED, _HALVED, _STUCK = 200, 20, 10


@dataclass(frozen=True, eq=False)
class Passage:
    """What a network made of a batch.

    Attributes:
        output: Its output.
        states: The states before the first block and after each.
        solutions: How each block's equation was solved.
    """

    output: Float[Tensor, " row *output"]
    states: list[Float[Tensor, "row width"]]
    solutions: list[Solution]

    def solved(self, members: int) -> Bool[Tensor, " member"]:
        """Whether all equations of a member have been solved, those of a backward pass, too, if there was one."""
        fine = [s.converged for s in self.solutions] + [a.converged for s in self.solutions for a in s.adjoint]
        return torch.stack(fine).view(len(fine), members, -1).all(2).all(0)

    def steps(self, members: int) -> Float[Tensor, " member"]:
        """Mean number of the solver's steps per block and example."""
        steps = torch.stack([s.steps for s in self.solutions]).double()
        return steps.view(len(steps), members, -1).mean((0, 2))


class Dense(nn.Module):
    """`s(x W + b)` for each member; Glorot-uniform W, b = 0.

    Args:
        draws: Random generators of the members.
        inputs: Entries of x.
        outputs: Entries of the result.
        activation: tanh, relu, gelu or identity.
        bias: Whether b is learned; else it stays 0.
    """

    def __init__(
        self, draws: Draws, inputs: int, outputs: int, activation: str = "identity", *, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = _glorot(draws, inputs, outputs)
        zeros = torch.zeros(len(draws), 1, outputs, dtype=torch.float64)
        if bias:
            self.bias = nn.Parameter(zeros)
        else:
            self.register_buffer("bias", zeros)
        self.act = torch.nn.functional.gelu if activation == "gelu" else activation_of(activation).value

    def forward(self, h: Float[Tensor, "row inputs"]) -> Float[Tensor, "row outputs"]:
        """The result for all members."""
        return self.act(_times(h, self.weight, self.bias))


class Turning(nn.Module):
    """`s(h (K - K^T) + b)` for each member: the branch of both examples of the paper; see `branches.Antisymmetric`.

    Args:
        draws: Random generators of the members.
        width: Width of the state.
        activation: tanh, relu or identity.
    """

    def __init__(self, draws: Draws, width: int, activation: str) -> None:
        super().__init__()
        self.weight = _glorot(draws, width, width)
        self.bias = nn.Parameter(torch.zeros(len(draws), 1, width, dtype=torch.float64))
        self.activation, self.act = activation, activation_of(activation).value

    def forward(self, h: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        """The slope at a state."""
        return self.slope(h, self.weight - self.weight.mT)

    def slope(self, h: Float[Tensor, "row width"], turn: Float[Tensor, "member width width"]) -> Tensor:
        """The slope at a state, with K - K^T known."""
        return self.act(_times(h, turn, self.bias))

    def rise(self, slope: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        """s' where s has these values."""
        if self.activation == "tanh":
            return 1 - slope.square()
        return (slope > 0).to(slope) if self.activation == "relu" else torch.ones_like(slope)


class _Inverted(Function):
    """matrix^-1 gap per row, with the matrix held constant, which makes second derivatives wrong."""

    @staticmethod
    def forward(ctx: Any, gap: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(*(factors := torch.linalg.lu_factor_ex(matrix)[:2]))
        return torch.linalg.lu_solve(*factors, gap[:, :, None])[:, :, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return torch.linalg.lu_solve(*ctx.saved_tensors, g[:, :, None], adjoint=True)[:, :, 0], None


class DirectTheta(nn.Module):
    """The block of a two-point `Theta` step on `Turning`, by Newton's method with the branch's own Jacobian.

    Full steps first; the rows that they miss are solved by damped ones. For states of a few entries; what `Theta` does
    with a general solver takes ten times as long there. Gradients are those of the equation: the last Newton step is
    differentiated with its matrix held constant, which is right once; second derivatives are refused.

    Args:
        step: The step; of its solver the tolerance and `max_steps` count.
        branch: The branch.
    """

    def __init__(self, step: Theta, branch: Turning) -> None:
        super().__init__()
        if step.form != "two_point":
            raise ValueError(f"the direct solver knows the form 'two_point', not {step.form!r}; take another solver")
        self.step, self.branch = step, branch

    def solve(self, h: Float[Tensor, "row width"], *, throw: bool) -> Solution:
        """The next state, and per row how it was found.

        Args:
            h: The state.
            throw: Must be False: rows that were not solved are told by `converged`.
        """
        inner, outer, f = self.step.theta * self.step.dt, (1 - self.step.theta) * self.step.dt, self.branch
        turn = f.weight - f.weight.mT
        slope = f.slope(h, turn)
        known = torch.add(h, slope, alpha=outer)
        with torch.no_grad():
            y, matrix, steps, residual = self._newton(torch.add(known, slope, alpha=inner), known, turn)
            truncated = self.step.param_grad == "truncated"
            slope = f.slope(y, turn) if truncated else None
        gap = torch.add(known, f.slope(y, turn) if slope is None else slope, alpha=inner) - y
        value = y + _Inverted.apply(gap, matrix)
        return Solution(value, steps, residual, residual <= self.step.solver.tol, max(steps.tolist(), default=0) + 3)

    def _newton(self, y: Tensor, known: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The solution, the matrix I - theta dt J there, steps and residuals per row."""
        start, most = y, self.step.solver.max_steps
        steps = y.new_zeros(len(y), dtype=torch.long)
        for step in range(most + 1):
            gap, matrix, residual = self._system(y, known, turn)
            active = residual > self.step.solver.tol  # not where it is nan
            if step == most or not active.any():
                break
            y = torch.where(active[:, None], y + torch.linalg.solve_ex(matrix, gap)[0], y)
            steps += active
        missed = ~(residual <= self.step.solver.tol)
        if missed.any():
            y, more = self._damped(torch.where(missed[:, None], start, y), known, turn, missed)
            _, matrix, residual = self._system(y, known, turn)
            steps += more
        return y, matrix, steps, residual

    def _gap(self, y: Tensor, known: Tensor, slope: Tensor) -> Tensor:
        """What is missing at y, of which the slope is known."""
        return torch.add(known, slope, alpha=self.step.theta * self.step.dt).sub_(y)

    def _system(self, y: Tensor, known: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is missing at y, the matrix I - theta dt J there, and the residual of each row."""
        inner, f = self.step.theta * self.step.dt, self.branch
        slope = f.slope(y, turn)
        gap = self._gap(y, known, slope)
        rise = f.rise(slope).view(len(turn), -1, y.shape[1], 1)
        unit = torch.eye(y.shape[1], dtype=y.dtype)
        matrix = torch.addcmul(unit, rise, turn.mT[:, None], value=-inner).flatten(0, 1)
        return gap, matrix, torch.linalg.vector_norm(gap, dim=1) / (1 + torch.linalg.vector_norm(y, dim=1))

    def _damped(self, y: Tensor, known: Tensor, turn: Tensor, missed: Tensor) -> tuple[Tensor, Tensor]:
        """Newton's method in rows where full steps have missed the solution, and its steps.

        A step is halved until the residual falls. J is similar to a skew-symmetric matrix, so I - theta dt J is never
        singular, the equation has one solution for every dt, and the size of what is missing no other minimum.
        """
        steps, stuck = (torch.zeros_like(missed, dtype=torch.long) for _ in range(2))
        for _ in range(_DAMPED):
            gap, matrix, residual = self._system(y, known, turn)
            active = missed & (residual > self.step.solver.tol)
            if not active.any():
                break
            move, size = torch.linalg.solve_ex(matrix, gap)[0], torch.linalg.vector_norm(gap, dim=1)
            share = active.to(y)[:, None]
            for _ in range(_HALVED):
                new = torch.addcmul(y, share, move)
                missing = torch.linalg.vector_norm(self._gap(new, known, self.branch.slope(new, turn)), dim=1)
                worse = active & ~(missing <= (1 - share[:, 0] / 10) * size)
                if not worse.any():
                    break
                share = torch.where(worse[:, None], share / 2, share)
            y = torch.addcmul(y, share, move)  # one that is no improvement leaves a kink of relu behind
            stuck += worse
            missed = missed & (stuck < _STUCK)
            steps += active
        return y, steps


def _glorot(draws: Draws, inputs: int, outputs: int) -> nn.Parameter:
    """Weights, drawn member by member: a member's do not depend on the others."""
    most = (6 / (inputs + outputs)) ** 0.5
    return nn.Parameter(torch.tensor(np.stack([draw.uniform(-most, most, (inputs, outputs)) for draw in draws])))


def _times(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias, h.reshape(len(weight), -1, h.shape[1]), weight).flatten(0, 1)


class Chain(nn.Module):
    """A map to the state, blocks one after another, a map to one output.

    Args:
        lift: Of the input.
        blocks: The blocks.
        readout: Of the last state.
        times: How often the row of blocks runs.

    Source: P3 (Reshniak & Webster), the networks of its examples.
    """

    def __init__(self, lift: nn.Module, blocks: Iterable[nn.Module], readout: nn.Module, *, times: int = 1) -> None:
        super().__init__()
        self.lift, self.blocks, self.readout = lift, nn.ModuleList(blocks), readout
        self.times = times

    def forward(self, x: Float[Tensor, "row entry"]) -> Passage:
        """Run all members."""
        with parametrize.cached():
            states, solutions = _walk(self.lift(x), list(self.blocks) * self.times)
        return Passage(self.readout(states[-1]), states, solutions)

    def variation(self) -> Float[Tensor, " member"]:
        """`1/L sum_t |K_t - K_(t-1)|^2`, the variation of the weights along depth, of each member."""
        weights = torch.stack([block.branch.weight for block in self.blocks])
        return weights.diff(dim=0).square().sum((0, 2, 3)) / len(self.blocks)


def turning(step: Theta, draws: Draws, *, inputs: int, width: int, depth: int, activation: str, direct: bool) -> Chain:
    """A linear map to the state, blocks with antisymmetric weights of their own, a linear map to one output.

    Args:
        step: The step that makes blocks of branches.
        draws: Random generators of the members.
        inputs: Entries of the input.
        width: Width of the state.
        depth: Number of blocks.
        activation: Of the branches.
        direct: Blocks of `DirectTheta` in place of the step's own.

    Source: P3 (Reshniak & Webster), the network of examples 1 and 2.
    """
    lift = Dense(draws, inputs, width)
    branches = [Turning(draws, width, activation) for _ in range(depth)]
    blocks = [DirectTheta(step, f) if direct and step.theta else step(f) for f in branches]
    return Chain(lift, blocks, Dense(draws, width, 1))


@torch.no_grad()
def refine_(fine: Chain, coarse: Chain) -> None:
    """Give a network of 2 L - 1 blocks the weights of one with L: blocks 0, 2, .. theirs, those between the means.

    Args:
        fine: Its weights are replaced.
        coarse: The other.

    Raises:
        ValueError: If the numbers of blocks do not fit.

    Source: P3 (Reshniak & Webster), training by levels in its code of September 2019.
    """
    if len(fine.blocks) != 2 * len(coarse.blocks) - 1:
        raise ValueError(
            f"refine: {len(coarse.blocks)} blocks become {2 * len(coarse.blocks) - 1}, not {len(fine.blocks)}"
        )
    for part in ("lift", "readout"):
        getattr(fine, part).load_state_dict(getattr(coarse, part).state_dict())
    for number, block in enumerate(fine.blocks):
        before, after = (coarse.blocks[n].parameters() for n in (number // 2, (number + 1) // 2))
        for p, a, b in zip(block.parameters(), before, after, strict=True):
            p.copy_((a + b) / 2)


class Last(nn.Module):
    """The last entry of the state."""

    def forward(self, h: Float[Tensor, "row width"]) -> Float[Tensor, "row 1"]:
        """The entry."""
        return h[:, -1:]


class Flow(nn.Module):
    """One block again and again: a right-hand side that is fitted to orbits; the output is the state after each step.

    Args:
        step: The step.
        branch: The right-hand side.
        times: Number of steps.
        shown: Entries of the state that are the output.
    """

    def __init__(self, step: Theta, branch: nn.Module, *, times: int, shown: int) -> None:
        super().__init__()
        self.block, self.times, self.shown = step(branch), times, shown

    def forward(self, x: Float[Tensor, "row entry"]) -> Passage:
        """Run all members."""
        with parametrize.cached():
            states, solutions = _walk(x, [self.block] * self.times)
        return Passage(torch.stack(states[1:], 1)[..., : self.shown], states, solutions)


def _walk(h: Tensor, blocks: Iterable[nn.Module]) -> tuple[list[Tensor], list[Solution]]:
    states, solutions = [h], []
    for block in blocks:
        solutions.append(block.solve(states[-1], throw=False))
        states.append(solutions[-1].value)
    return states, solutions


def perceptron(draws: Draws, width: int) -> nn.Sequential:
    """The right-hand side for prey and predators: tanh layers 2 -> width -> width -> width, and a linear one back to 2.

    Source: P3 (Reshniak & Webster), extended version.
    """
    tanh = (Dense(draws, inputs, width, "tanh") for inputs in (2, width, width))
    return nn.Sequential(*tanh, Dense(draws, width, 2))


def small_perceptron(draws: Draws, state: int, width: int, *, hidden: int, activation: str) -> nn.Sequential:
    """A right-hand side that begins near 0: layers state -> width -> .. -> width and, without bias, back to the state.

    Args:
        draws: Random generators of the members.
        state: Entries of the state.
        width: Of the hidden layers.
        hidden: How many.
        activation: As of `Dense`.

    Returns:
        It, each matrix of Frobenius norm 1.

    Source: P3 (Reshniak & Webster), the code of the extended version, whose `depth` is one less than `hidden`.
    """
    sizes = [state, *[width] * hidden]
    layers = [Dense(draws, *pair, activation) for pair in pairwise(sizes)]
    layers.append(Dense(draws, width, state, bias=False))
    for layer in layers:
        layer.weight.data /= torch.linalg.matrix_norm(layer.weight.data, keepdim=True)
    return nn.Sequential(*layers)


class Scaled(nn.Module):
    """`c g(h)`.

    Args:
        branch: g.
        factor: c.
    """

    def __init__(self, branch: nn.Module, factor: float) -> None:
        super().__init__()
        self.branch, self.factor = branch, factor

    def forward(self, h: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        """The slope at a state."""
        return self.factor * self.branch(h)


def unit_(branch: nn.Sequential) -> None:
    """Divide every matrix of a perceptron by its norm from now on; its Lipschitz constant is 1 at most (tanh, ReLU).

    Source: P3 (Reshniak & Webster), extended version; there by power iterations.
    """
    for layer in branch:
        parametrize.register_parametrization(layer, "weight", _Unit())


class Stiff(nn.Module):
    """Slope of (y, t): `y' = m y + r f(y, t) + g(t)`, `t' = 1`, with |df/dy| <= 1: dy'/dy lies within r of m.

    f has two tanh layers and a linear one, each divided by its norm as far as y goes through it; time enters f by the
    biases of its first layer. g is a free network of time alone.

    Args:
        draws: Random generators of the members.
        width: Width of the layers of f and g.
        limits: m - r and m + r.

    Source: P3 (Reshniak & Webster), extended version: right-hand sides of a controlled spectrum; how time enters is
    ours.
    """

    def __init__(self, draws: Draws, width: int, limits: tuple[float, float]) -> None:
        super().__init__()
        self.middle, self.radius = (limits[0] + limits[1]) / 2, (limits[1] - limits[0]) / 2
        self.first, self.clock = Dense(draws, 1, width), Dense(draws, 1, width)
        self.second, self.third = Dense(draws, width, width), Dense(draws, width, 1)
        self.force = nn.Sequential(Dense(draws, 1, width, "tanh"), Dense(draws, width, 1))
        for layer in (self.first, self.second, self.third):
            parametrize.register_parametrization(layer, "weight", _Unit())

    def forward(self, h: Float[Tensor, "row 2"]) -> Float[Tensor, "row 2"]:
        """The slope at a state."""
        y, t = h.split(1, 1)
        f = self.third(torch.tanh(self.second(torch.tanh(self.first(y) + self.clock(t)))))
        return torch.cat([self.middle * y + self.radius * f + self.force(t), torch.ones_like(t)], 1)


class _Unit(nn.Module):
    """Matrices divided by their norms."""

    def forward(self, weight: Float[Tensor, "member inputs outputs"]) -> Float[Tensor, "member inputs outputs"]:
        """The weights of norm 1, or 0 where they are 0."""
        norm = torch.linalg.matrix_norm(weight, 2, keepdim=True)
        return weight / torch.where(norm > 0, norm, 1)


Loss = Callable[[Tensor, Tensor], Float[Tensor, " row"]]


def squared(output: Float[Tensor, " row *output"], y: Float[Tensor, " row *output"]) -> Float[Tensor, " row"]:
    """Mean squared error per example."""
    return (output - y).square().flatten(1).mean(1)


def crossed(output: Float[Tensor, "row 1"], y: Float[Tensor, "row 1"]) -> Float[Tensor, " row"]:
    """Binary cross-entropy of the sigmoid of an output, per example."""
    return nn.functional.binary_cross_entropy_with_logits(output, y, reduction="none")[:, 0]
