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
from torch import Tensor, nn

from residuum.checkpoints import Progress, here, resume_, save
from residuum.descriptions import described, key_of
from residuum.files import read_tensors, restore_, stored, write_json, write_tensors
from residuum.jobs import Settings, from_checkpoint, job_from, threads_of_torch
from residuum.layers.steps import Theta
from residuum.names import unknown
from residuum.progress import Bar, Show, quiet
from residuum.runfolders import CHECKPOINT, FORMAT
from residuum.solve import Anderson, Dense, GradientDescent, NewtonKrylov, Picard, Solver
from residuum.toys import problems
from residuum.toys.networks import Chain, Flow, Loss, Run, Stiff, crossed, perceptron, squared
from residuum.toys.problems import Pairs, Problem

_WEIGHTS = "residuum example 1"
_ROWS = 50  # of a history
_SECONDS = 60.0  # between two checkpoints
NOISE = (0.0, 0.02, 0.04, 0.06, 0.08)
_DRAWS = 20


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
        problem: "sine", "spirals", "stiff" or "lotka_volterra".
        theta: Of the `Theta` step. 0: an ordinary residual network.
        depth: Blocks, or steps.
        time: T; dt = T / depth.
        width: Of the state; for "stiff" and "lotka_volterra" of the layers of the right-hand side.
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

    kind: ClassVar[str] = "example"

    def __post_init__(self) -> None:
        if self.problem not in LOSSES:
            raise unknown("problem", self.problem, LOSSES)
        if self.optimiser not in ("sgd", "adam"):
            raise unknown("optimiser", self.optimiser, ("sgd", "adam"))
        if min(self.depth, self.width, self.epochs, self.every) < 1 or self.batch < 0 or self.depth % self.every:
            raise ValueError(
                f"depth {self.depth}, width {self.width}, epochs {self.epochs} and every {self.every} must be 1 or "
                f"more, batch {self.batch} 0 or more, and every a divisor of depth"
            )
        if not (self.rates and self.seeds and min(self.rates) > 0 and math.isfinite(self.time) and self.time > 0):
            raise ValueError(f"time {self.time}, rates {self.rates} and seeds {self.seeds} must be above 0, not empty")
        if self.variation < 0 or (self.variation and not self.chained):
            raise ValueError(f"variation is {self.variation}; it is 0 or more, and for sine and spirals only")
        if self.solver == "direct" and not (self.chained and self.form == "two_point"):
            raise ValueError("solver 'direct' is for sine and spirals in the two-point form; take 'anderson'")
        _ = self.step

    @property
    def chained(self) -> bool:
        """Whether blocks have weights of their own."""
        return self.problem in ("sine", "spirals")

    @property
    def step(self) -> Theta:
        """The step of the blocks."""
        return Theta(
            self.theta,
            self.time / self.depth,
            form=self.form,
            solver=_solver(self.solver, self.tol),
            param_grad=self.param_grad,
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
        return make(seeds) if self.chained else make(seeds, steps=self.depth, time=self.time)

    def network(self) -> nn.Module:
        """All members with fresh weights."""
        draws = [np.random.default_rng((member.seed, 1)) for member in self.members]
        if self.chained:
            inputs = 1 if self.problem == "sine" else 2
            sizes = {"inputs": inputs, "width": self.width, "depth": self.depth, "activation": self.activation}
            return Chain(self.step, draws, **sizes, direct=self.solver == "direct")
        if self.problem == "stiff":
            return Flow(self.step, Stiff(draws, self.width, self.limits), times=self.depth, shown=1)
        return Flow(self.step, perceptron(draws, self.width), times=self.depth, shown=2)

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
        """16 hexadecimal digits, of all that determines the result and nothing else."""
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
                network = self.network()
                with progress(f"{self.problem}, theta {self.theta:g}", self.epochs) as show:
                    return network, _train(self, network, problem, folder / CHECKPOINT, show)

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


LOSSES: dict[str, Loss] = {"sine": squared, "spirals": crossed, "stiff": squared, "lotka_volterra": squared}


def _train(example: Example, network: nn.Module, problem: Problem, checkpoint: Path, show: Show) -> list[dict]:
    """Train all members; a row of the history now and then."""
    kind = torch.optim.SGD if example.optimiser == "sgd" else torch.optim.Adam
    optimiser = kind(network.parameters(), lr=1.0)  # moves are scaled to each member's rate
    about = example.describe() | here(1, "cpu")
    at = resume_(checkpoint, network, optimiser, about) if checkpoint.exists() else Progress()
    failed: list[str | None] = list(at.history[-1]["failed"]) if at.history else [None] * len(example.members)
    written, apart = perf_counter(), max(1, example.epochs // _ROWS)
    for epoch in range(at.epoch, example.epochs):
        for number, (x, y) in enumerate(_batches(example, problem.train, epoch)):
            found = _train_step(example, network, optimiser, x, y, [why is None for why in failed])
            where = f"in epoch {epoch + 1}, step {number + 1}"
            failed = [old or (new and f"{new} {where}") for old, new in zip(failed, found, strict=True)]
        if epoch + 1 == example.epochs or (epoch + 1) % apart == 0:
            row = {"epoch": epoch + 1, "failed": failed} | _row(example, network, problem, failed)
            at = Progress(epoch + 1, history=(*at.history, row))
            if perf_counter() - written >= _SECONDS:
                save(checkpoint, network, optimiser, at, about)
                written = perf_counter()
        show(epoch + 1, "")
    return list(at.history)


def _batches(example: Example, pairs: Pairs, epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
    """The training examples in an order of each member's own."""
    count = pairs.x.shape[1]
    orders = [np.random.default_rng((member.seed, 2, epoch)).permutation(count) for member in example.members]
    order = torch.tensor(np.stack(orders))
    which = torch.arange(len(order))[:, None]
    for some in order.split(example.batch or count, 1):
        yield pairs.x[which, some].flatten(0, 1), pairs.y[which, some].flatten(0, 1)


def _losses(example: Example, run: Run, y: Tensor) -> Tensor:
    """Of each example; of orbits at the steps that are trained on."""
    steps = slice(example.every - 1, None, example.every)
    output, y = (run.output, y) if example.chained else (run.output[:, steps], y[:, steps])
    return LOSSES[example.problem](output, y)


def _train_step(
    example: Example, network: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor, alive: list[bool]
) -> list[str | None]:
    """One step of every member that is alive; of each, why it failed. Those that failed get weights of 0."""
    count = len(alive)
    optimiser.zero_grad()
    run = network(x)
    losses = _losses(example, run, y).view(count, -1).mean(1)
    if example.variation:
        losses = losses + example.variation * network.variation()
    losses[torch.tensor(alive)].sum().backward()
    finite, solved = losses.detach().isfinite(), run.solved(count)
    fine = finite & solved & torch.tensor(alive)
    before = [p.detach().clone() for p in network.parameters()]
    optimiser.step()
    rates = torch.tensor([member.rate for member in example.members], dtype=torch.float64)
    with torch.no_grad():
        for p, old in zip(network.parameters(), before, strict=True):
            shape = (count, *[1] * (p.ndim - 1))
            p.copy_(torch.where(fine.view(shape), torch.lerp(old, p, rates.view(shape)), 0))
    reasons = zip(finite.tolist(), solved.tolist(), strict=True)
    return [None if s and f else "not solved" if f else "not finite" for f, s in reasons]


@torch.no_grad()
def _row(example: Example, network: nn.Module, problem: Problem, failed: Sequence[str | None]) -> dict[str, list]:
    """Losses on all examples of both splits, accuracy of spirals, the solver's steps; None for members that failed."""
    found: dict[str, Tensor] = {}
    for name, pairs in zip(Problem._fields, problem, strict=True):
        y = pairs.y.flatten(0, 1)
        run = network(pairs.x.flatten(0, 1))
        losses = _losses(example, run, y) if name == "train" else LOSSES[example.problem](run.output, y)
        found[f"{name}_loss"] = losses.view(len(failed), -1).mean(1)
        if example.problem == "spirals":
            found[f"{name}_accuracy"] = ((run.output > 0) == (y > 0.5)).view(len(failed), -1).double().mean(1)
        found["solved"], found["steps"] = run.solved(len(failed)), run.steps(len(failed))
    lists = {name: value.tolist() for name, value in found.items()}
    fine = [why is None and math.isfinite(loss) for why, loss in zip(failed, lists["validation_loss"], strict=True)]
    return {name: [v if ok else None for v, ok in zip(row, fine, strict=True)] for name, row in lists.items()}


def measured(example: Example, network: nn.Module, problem: Problem) -> dict[str, Any]:
    """What trained members do to small changes of their input.

    Returns:
        For "sine" and "spirals", per member: "jacobian", "expansion" and "contraction", quantiles over the validation
        points (5 %, 50 %, 95 %) of the largest singular value of the Jacobian from the input to the last state, of the
        largest of that from the first state to the last, and of its smallest; for "spirals" also "noise": by standard
        deviation, the accuracy on validation points with Gaussian noise, mean over 20 draws, the same for all members.

    Source: P3 (Reshniak & Webster), the claim of robustness; how it is measured is ours.
    """
    if not example.chained:
        return {}
    pairs, count = problem.validation, len(example.members)
    whole, inner = jacobians(network, pairs.x.flatten(0, 1))
    values = {"jacobian": whole[:, 0], "expansion": inner[:, 0], "contraction": inner[:, -1]}
    at = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    found: dict[str, Any] = {name: value.view(count, -1).quantile(at, 1).mT.tolist() for name, value in values.items()}
    if example.problem == "spirals":
        found["noise"] = {str(sd): _noisy_accuracy(network, pairs, sd) for sd in NOISE}
    return found


def jacobians(network: Chain, x: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, from the largest, of the Jacobians input -> last state and first -> last state, per row."""
    with torch.enable_grad():
        run = network(x.clone().requires_grad_())
        first, last = run.states[0], run.states[-1]
        columns = [torch.autograd.grad(last[:, i].sum(), first, retain_graph=True)[0] for i in range(last.shape[1])]
    inner = torch.stack(columns, 1)
    lift = network.lift.weight.detach().mT
    whole = (inner.view(len(lift), -1, *inner.shape[1:]) @ lift[:, None]).flatten(0, 1)
    return torch.linalg.svdvals(whole), torch.linalg.svdvals(inner)


@torch.no_grad()
def _noisy_accuracy(network: nn.Module, pairs: Pairs, sd: float) -> list[float]:
    draw, right = np.random.default_rng(0), []
    for _ in range(_DRAWS if sd else 1):
        noise = torch.tensor(draw.normal(0, sd, pairs.x.shape[1:]))
        output = network((pairs.x + noise).flatten(0, 1)).output.view(pairs.y.shape)
        right.append(((output > 0) == (pairs.y > 0.5)).double().mean((1, 2)))
    return torch.stack(right).mean(0).tolist()


def truncation(example: Example, network: nn.Module | None = None) -> dict[str, list[float]]:
    """How far the truncated gradient of the blocks' weights is from the exact one, on all training examples.

    Args:
        example: "sine" or "spirals".
        network: Its members; None: with fresh weights.

    Returns:
        Per member: "error", |truncated - exact| / |exact|, and "cosine" of the two; 0 where the truncated one is 0.

    Raises:
        ValueError: If the example has no blocks with weights of their own.

    Source: P3 (Reshniak & Webster): what its code computes, where the text has the exact gradient.
    """
    if not example.chained:
        raise ValueError(f"truncation is for 'sine' and 'spirals', not for {example.problem!r}")
    weights, found = (network or example.network()).state_dict(), []
    for param_grad in ("exact", "truncated"):
        kind = replace(example, param_grad=param_grad)
        given, (x, y) = kind.network(), kind.data().train
        given.load_state_dict(weights)
        _losses(kind, given(x.flatten(0, 1)), y.flatten(0, 1)).sum().backward()
        found.append(torch.cat([p.grad.flatten(1) for p in given.blocks.parameters()], 1))
    exact, truncated = found
    error = (truncated - exact).norm(dim=1) / exact.norm(dim=1)
    return {"error": error.tolist(), "cosine": torch.cosine_similarity(truncated, exact).tolist()}
