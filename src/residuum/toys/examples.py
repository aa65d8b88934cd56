"""P3's small examples as jobs: each a training of several networks side by side, and what they do to their input."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from residuum.checkpoints import Progress, here, progress_of, resume_, save
from residuum.descriptions import described, key_of
from residuum.files import read_tensors, restore_, stored, write_json, write_tensors
from residuum.jobs import Settings, from_checkpoint, job_from, threads_of_torch
from residuum.layers.steps import Theta
from residuum.names import unknown
from residuum.penalties import hutchinson, right_hand_side, trapezoidal
from residuum.progress import Bar, Show, quiet
from residuum.runfolders import CHECKPOINT, FORMAT
from residuum.solve import Anderson, Dense, GradientDescent, NewtonKrylov, Picard, Solver
from residuum.toys import networks, problems
from residuum.toys.measures import NOISE, SHIFTS, jacobians, noisy_accuracy, shifted_accuracy
from residuum.toys.networks import (
    Chain,
    Flow,
    Last,
    Loss,
    Passage,
    Scaled,
    Stiff,
    crossed,
    perceptron,
    refine_,
    small_perceptron,
    squared,
    turning,
    unit_,
)
from residuum.toys.problems import Pairs, Problem

_WEIGHTS = "residuum example 1"
_ROWS = 50  # of a history
_SECONDS = 60.0  # between two checkpoints
_FREE = 15.0  # factor on their branches without a bound
_POWER = 2  # of time in the penalty on the divergence


def _solver(name: str, tol: float) -> Solver:
    known = {
        "direct": NewtonKrylov(tol, linear=Dense()),
        "anderson": Anderson(tol),
        "picard": Picard(tol),
        "newton": NewtonKrylov(tol, linear=Dense()),
        "gradient descent": GradientDescent(tol),
    }
    if name not in known:
        raise unknown("solver", name, known)
    return known[name]


class Member(NamedTuple):
    """One of the networks that are trained side by side."""

    rate: float
    seed: int


@dataclass(frozen=True)
class Example:
    """A problem of P3 and the networks to fit to it: one for each pair of learning rate and seed, side by side.

    Members share evaluations, nothing else: one that fails is left alone, and the others go on as without it. A job, as
    `jobs.Job` has it.

    Attributes:
        problem: "sine", "spirals", "wave", "arms", "stiff" or "lotka_volterra".
        theta: Of the `Theta` step. 0: an ordinary residual network.
        depth: Blocks, or steps.
        time: T; dt = T / depth.
        width: Of the state of "sine" and "spirals"; else of the layers of the right-hand side.
        activation: Of the branches of "sine" and "spirals".
        epochs: Passes over the training examples.
        batch: Examples in a step; 0: all.
        optimiser: "sgd" (without momentum) or "adam".
        rates: Learning rates.
        seeds: Of initial weights, order, and drawn points.
        variation: alpha of the penalty `alpha/L sum |K_t - K_(t-1)|^2` of "sine" and "spirals".
        param_grad: "exact", or the "truncated" gradient of the paper's code.
        form: Of the `Theta` step.
        solver: "direct" (Newton's method with the Jacobian that "sine" and "spirals" know), "anderson", "picard",
            "newton" or the paper's "gradient descent".
        tol: Of solver and adjoint.
        every: Of the orbits of "stiff" and "lotka_volterra", the state after every so many steps is trained on.
        limits: Of "stiff", the interval of dy'/dy.
        decay: What the rates have come down to at the end, evenly in their logarithm.
        bound: Of "arms", the bound on the Lipschitz constant of each branch; 0: none, and 15 times the branch.
        divergence: Of "wave", weight of the mean of tr J / d along the path of states, late ones above all; the states
            are constants in its gradient.
        jacobian: Of "wave", weight of the mean of |J|_F^2 / d^2 along that path, in the same way.
        levels: Of "sine" and "spirals", in how many levels they are trained, each with an equal share of the epochs and
            a fresh optimiser: from few blocks, L of which become 2 L - 1 with half the dt (`networks.refine_`), to
            `depth` blocks at the last.
        draws: Of the noise under which "spirals" are measured.
    """

    problem: str
    theta: float = 0.5
    depth: int = 10
    time: float = 1.0
    width: int = 5
    activation: str = "relu"
    epochs: int = 1000
    batch: int = 4
    optimiser: str = "sgd"
    rates: tuple[float, ...] = (0.01,)
    seeds: tuple[int, ...] = (0,)
    variation: float = 0.0
    param_grad: str = "exact"
    form: str = "two_point"
    solver: str = "direct"
    tol: float = 1e-6
    every: int = 1
    limits: tuple[float, float] = (-25.0, -15.0)
    decay: float = 1.0
    bound: float = 0.0
    divergence: float = 0.0
    jacobian: float = 0.0
    levels: int = 1
    draws: int = 20

    kind: ClassVar[str] = "example"

    def __post_init__(self) -> None:
        if self.problem not in LOSSES:
            raise unknown("problem", self.problem, LOSSES)
        if self.optimiser not in ("sgd", "adam"):
            raise unknown("optimiser", self.optimiser, ("sgd", "adam"))
        counts = {name: getattr(self, name) for name in ("depth", "width", "epochs", "every", "draws")}
        if min(counts.values()) < 1 or self.batch < 0 or self.depth % self.every:
            raise ValueError(f"{counts} must be 1 or more, batch {self.batch} 0 or more, and every a divisor of depth")
        if not (self.rates and self.seeds and min(self.rates) > 0 and math.isfinite(self.time) and self.time > 0):
            raise ValueError(f"time {self.time}, rates {self.rates} and seeds {self.seeds} must be above 0, not empty")
        for name, value, kinds in (
            ("variation", self.variation, ("sine", "spirals")),
            ("bound", self.bound, ("arms",)),
            ("divergence", self.divergence, ("wave",)),
            ("jacobian", self.jacobian, ("wave",)),
            ("levels", self.levels - 1, ("sine", "spirals")),
        ):
            if value and (not 0 <= value < math.inf or self.problem not in kinds):
                least = "1 or more" if name == "levels" else "0 or more"
                raise ValueError(f"{name} is {getattr(self, name)}; it is {least}, and for {' and '.join(kinds)} only")
        if self.levels > self.epochs or (self.depth - 1) % 2 ** (self.levels - 1):
            raise ValueError(
                f"levels is {self.levels}: {self.epochs} epochs must be as many at least, and depth {self.depth} must "
                f"be 1 more than a multiple of {2 ** (self.levels - 1)}"
            )
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is {self.decay}; it must be above 0, and at most 1, which leaves the rates alone")
        if self.solver == "direct" and not (self.turning and self.form == "two_point"):
            raise ValueError("solver 'direct' is for sine and spirals in the two-point form; take 'anderson'")
        _ = self.step, self.stages

    @property
    def turning(self) -> bool:
        """Whether it is one of the paper's two examples, with antisymmetric weights of each block's own."""
        return self.problem in ("sine", "spirals")

    @property
    def orbits(self) -> bool:
        """Whether the output is the state after every step."""
        return self.problem in ("stiff", "lotka_volterra")

    @property
    def stages(self) -> "tuple[Example, ...]":
        """The networks of the levels, from the fewest blocks; the last is this example's."""
        coarse = []
        for doubled in (2**k for k in range(self.levels - 1, 0, -1)):
            depth = (self.depth - 1) // doubled + 1
            coarse.append(replace(self, depth=depth, time=depth * doubled * self.step.dt, levels=1))
        return (*coarse, replace(self, levels=1) if coarse else self)

    @property
    def step(self) -> Theta:
        """The step of the blocks."""
        return Theta(
            self.theta,
            self.time / self.depth,
            form=self.form,
            solver=_solver(self.solver, self.tol),
            param_grad=self.param_grad,
            start="state" if self.problem == "wave" else "euler",  # as in the paper's code; Euler's is far off there
            adjoint=Dense(self.tol),
        )

    @property
    def members(self) -> tuple[Member, ...]:
        """The networks, in the order of everything that has one value per member."""
        return tuple(Member(*pair) for pair in product(self.rates, self.seeds))

    def data(self) -> Problem:
        """The data of all members."""
        seeds = [member.seed for member in self.members]
        make = getattr(problems, self.problem)
        return make(seeds, steps=self.depth, time=self.time) if self.orbits else make(seeds)

    def network(self) -> nn.Module:
        """All members with fresh weights."""
        draws = [np.random.default_rng((member.seed, 1)) for member in self.members]
        if self.turning:
            inputs = 1 if self.problem == "sine" else 2
            sizes = {"inputs": inputs, "width": self.width, "depth": self.depth, "activation": self.activation}
            return turning(self.step, draws, **sizes, direct=self.solver == "direct")
        if self.problem == "wave":
            block = self.step(small_perceptron(draws, 2, self.width, hidden=4, activation="gelu"))
            return Chain(nn.ZeroPad1d((0, 1)), [block], Last(), times=self.depth)
        if self.problem == "arms":
            branches = [small_perceptron(draws, 3, self.width, hidden=3, activation="relu") for _ in range(self.depth)]
            for branch in branches if self.bound else ():
                unit_(branch)
            blocks = [self.step(Scaled(branch, self.bound or _FREE)) for branch in branches]
            return Chain(nn.ZeroPad1d((0, 1)), blocks, networks.Dense(draws, 3, 1, bias=False))
        branch = Stiff(draws, self.width, self.limits) if self.problem == "stiff" else perceptron(draws, self.width)
        return Flow(self.step, branch, times=self.depth, shown=1 if self.problem == "stiff" else 2)

    def trained(self, folder: Path) -> nn.Module:
        """All members with the weights that `execute` left in a folder."""
        network = self.network()
        restore_(network, read_tensors(folder / "weights.safetensors", format=_WEIGHTS)[0])
        return network.requires_grad_(False)

    def describe(self) -> dict[str, Any]:
        """What determines the result, as JSON values, without settings that are as in the class."""
        return described(self, defaults=False) | {"kind": self.kind, "format": FORMAT}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "Example":
        """The inverse of `describe`.

        Raises:
            ValueError: If it is not one, or of another format, or does not fit this version of the code.
        """
        return job_from(description, cls, (cls,))

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits, of its settings and nothing else; what the code makes of them is not in it."""
        return key_of(self.describe())

    def execute(self, folder: Path, settings: Settings, progress: Bar = quiet) -> None:
        """Train all members and measure them; stopped and called again it goes on and ends with the same bits.

        Writes values.json (members, history, failures, measures) and weights.safetensors into the folder. Members that
        fail are no failure of the example: values.json says why each did.

        Args:
            folder: Where to write; it exists.
            settings: Of these only the number of threads counts; the networks are too small for anything but a core.
            progress: Opens a progress bar.

        Raises:
            OSError: If the folder cannot be written.
        """
        start = perf_counter()
        with threads_of_torch(settings.threads):
            problem = self.data()

            def attempt() -> tuple[nn.Module, list[dict]]:
                with progress(f"{self.problem}, theta {self.theta:g}", self.epochs) as show:
                    return _train(self, problem, folder / CHECKPOINT, show)

            network, history = from_checkpoint(folder, attempt)
            values = {
                "members": [member._asdict() for member in self.members],
                "parameters": sum(p.numel() for p in network.parameters()) // len(self.members),
                "failed": history[-1]["failed"],
                "history": history,
                "measured": measured(self, network, problem),
                "seconds": perf_counter() - start,
            }
        write_tensors(folder / "weights.safetensors", stored(network), self.describe(), format=_WEIGHTS)
        write_json(folder / "values.json", values)


LOSSES: dict[str, Loss] = {
    "sine": squared,
    "spirals": crossed,
    "wave": squared,
    "arms": crossed,
    "stiff": squared,
    "lotka_volterra": squared,
}


def _train(example: Example, problem: Problem, checkpoint: Path, show: Show) -> tuple[nn.Module, list[dict]]:
    """Train all members, level by level; the network, and a row of the history now and then."""
    about, stages = example.describe() | here(1, "cpu"), example.stages
    at = progress_of(checkpoint, about) if checkpoint.exists() else Progress()

    def level_of(epoch: int) -> int:
        return epoch * example.levels // example.epochs

    def begun(level: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        network = stages[level].network()
        kind = torch.optim.SGD if example.optimiser == "sgd" else torch.optim.Adam
        return network, kind(network.parameters(), lr=1.0)  # moves are scaled to each member's rate

    level = level_of(max(at.epoch - 1, 0))
    network, optimiser = begun(level)
    if checkpoint.exists():
        at = resume_(checkpoint, network, optimiser, about)
    failed: list[str | None] = list(at.history[-1]["failed"]) if at.history else [None] * len(example.members)
    written, apart = perf_counter(), max(1, example.epochs // _ROWS)
    for epoch in range(at.epoch, example.epochs):
        if level_of(epoch) > level:
            coarse, level = network, level + 1
            network, optimiser = begun(level)
            refine_(network, coarse)
        for number, (x, y) in enumerate(_batches(example, problem.train, epoch)):
            rates = [member.rate * example.decay ** (epoch / example.epochs) for member in example.members]
            found = _train_step(example, network, optimiser, x, y, [why is None for why in failed], rates)
            where = f"in epoch {epoch + 1}, step {number + 1}"
            failed = [old or (new and f"{new} {where}") for old, new in zip(failed, found, strict=True)]
        if epoch + 1 == example.epochs or (epoch + 1) % apart == 0:
            row = {"epoch": epoch + 1, "failed": failed} | _row(example, network, problem, failed)
            at = Progress(epoch + 1, history=(*at.history, row))
            if perf_counter() - written >= _SECONDS:
                save(checkpoint, network, optimiser, at, about)
                written = perf_counter()
        show(epoch + 1, "")
    return network, list(at.history)


def _batches(example: Example, pairs: Pairs, epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
    """The training examples in an order of each member's own."""
    count = pairs.x.shape[1]
    orders = [np.random.default_rng((member.seed, 2, epoch)).permutation(count) for member in example.members]
    order = torch.tensor(np.stack(orders))
    which = torch.arange(len(order))[:, None]
    for some in order.split(example.batch or count, 1):
        yield pairs.x[which, some].flatten(0, 1), pairs.y[which, some].flatten(0, 1)


def losses_of(example: Example, passage: Passage, y: Tensor) -> Tensor:
    """Of each example; of orbits at the steps that are trained on."""
    steps = slice(example.every - 1, None, example.every)
    output, y = (passage.output[:, steps], y[:, steps]) if example.orbits else (passage.output, y)
    return LOSSES[example.problem](output, y)


def _train_step(
    example: Example,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    alive: list[bool],
    rates: list[float],
) -> list[str | None]:
    """One step of every member that is alive; of each, why it failed. Those that failed get weights of 0."""
    count = len(alive)
    optimiser.zero_grad()
    passage = network(x)
    losses = losses_of(example, passage, y).view(count, -1).mean(1)
    if example.variation:
        losses = losses + example.variation * network.variation()
    if example.divergence or example.jacobian:
        losses = losses + _along_the_path(example, network, passage)
    losses[torch.tensor(alive)].sum().backward()
    finite, solved = losses.detach().isfinite(), passage.solved(count)
    fine = finite & solved & torch.tensor(alive)
    before = [p.detach().clone() for p in network.parameters()]
    optimiser.step()
    shares = torch.tensor(rates, dtype=torch.float64)
    with torch.no_grad():
        for p, old in zip(network.parameters(), before, strict=True):
            shape = (count, *[1] * (p.ndim - 1))
            p.copy_(torch.where(fine.view(shape), torch.lerp(old, p, shares.view(shape)), 0))
    reasons = zip(finite.tolist(), solved.tolist(), strict=True)
    return [None if s and f else "not solved" if f else "not finite" for f, s in reasons]


def _along_the_path(example: Example, network: Chain, passage: Passage) -> Float[Tensor, " member"]:
    """The penalties of "wave" on its one right-hand side, of each member: `penalties.Penalty` of power 2, not squashed.

    Of exact traces and norms. The states are constants in its gradient, as in the paper's code.
    """
    f, dt = right_hand_side(network.blocks[0])
    h = torch.stack(passage.states, 1).detach()
    rows, points, d = h.shape
    unit = math.sqrt(d) * torch.eye(d, dtype=h.dtype)  # of these as probes both estimates are exact
    _, trace, square = hutchinson(f, h.flatten(0, 1), unit[:, None].expand(d, rows * points, d))
    shares = torch.tensor(trapezoidal([dt] * (points - 1)), dtype=h.dtype)
    growth = (torch.arange(1, points + 1, dtype=h.dtype) / points) ** _POWER
    divergence, jacobian = trace.view(rows, points) @ (shares * growth), square.view(rows, points) @ shares
    paths = example.divergence * divergence / d + example.jacobian * jacobian / d**2
    return paths.view(len(example.members), -1).mean(1)


@torch.no_grad()
def _row(example: Example, network: nn.Module, problem: Problem, failed: Sequence[str | None]) -> dict[str, list]:
    """Losses on all examples of both splits, accuracy of spirals, the solver's steps; None for members that failed."""
    found: dict[str, Tensor] = {}
    for name, pairs in zip(Problem._fields, problem, strict=True):
        y = pairs.y.flatten(0, 1)
        passage = network(pairs.x.flatten(0, 1))
        losses = losses_of(example, passage, y) if name == "train" else LOSSES[example.problem](passage.output, y)
        found[f"{name}_loss"] = losses.view(len(failed), -1).mean(1)
        if LOSSES[example.problem] is crossed:
            found[f"{name}_accuracy"] = ((passage.output > 0) == (y > 0.5)).view(len(failed), -1).double().mean(1)
        found["solved"], found["steps"] = passage.solved(len(failed)), passage.steps(len(failed))
    lists = {name: value.tolist() for name, value in found.items()}
    fine = [why is None and math.isfinite(loss) for why, loss in zip(failed, lists["validation_loss"], strict=True)]
    return {name: [v if ok else None for v, ok in zip(row, fine, strict=True)] for name, row in lists.items()}


def measured(example: Example, network: nn.Module, problem: Problem) -> dict[str, Any]:
    """What trained members do to small changes of their input.

    Returns:
        For "sine" and "spirals", per member: "jacobian", "expansion" and "contraction", quantiles over the validation
        points (5 %, 50 %, 95 %) of the largest singular value of the Jacobian from the input to the last state, of the
        largest of that from the first state to the last, and of its smallest; for "spirals" also "noise": by standard
        deviation, the accuracy on validation points with Gaussian noise, mean over `draws`, the same for all members.
        For "arms", per member: "shifted", by length, the accuracy on 500 points of each spiral that are moved so far
        outwards and so far inwards, mean of both.

    Source: P3 (Reshniak & Webster), the claim of robustness, how it is measured is ours; the shifts are those of its
    extended version.
    """
    if example.problem == "arms":
        return {"shifted": {str(by): shifted_accuracy(network, len(example.members), by) for by in SHIFTS}}
    if not example.turning:
        return {}
    pairs, count = problem.validation, len(example.members)
    whole, inner = jacobians(network, pairs.x.flatten(0, 1))
    values = {"jacobian": whole[:, 0], "expansion": inner[:, 0], "contraction": inner[:, -1]}
    at = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    found: dict[str, Any] = {name: value.view(count, -1).quantile(at, 1).mT.tolist() for name, value in values.items()}
    if example.problem == "spirals":
        found["noise"] = {str(sd): noisy_accuracy(network, pairs, sd, example.draws) for sd in NOISE}
    return found
