"""What the solvers of a network's blocks take while it is trained: per block, forwards and backwards."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from residuum.layers.anystep import Step, solves
from residuum.solve import ConvergenceError, Record, Solution


@dataclass(frozen=True)
class Effort:
    """What the solves of one block took in one direction, added up; JSON values.

    Attributes:
        solves: Batches that were solved.
        examples: Examples in them.
        evaluations: Evaluations of f, or products with its Jacobian or the transpose, each of a whole batch. Those that
            rebuild gradients in a reversible stack do not count.
        steps: Steps of the solver, over the examples.
        residual: The largest at the end of a solve.
        contraction: Sum of the examples' contractions (see `summary`).
        moved: Examples that have a contraction: the solver took a step and says where it began.
        failures: Examples that were not solved.
    """

    solves: int = 0
    examples: int = 0
    evaluations: int = 0
    steps: int = 0
    residual: float = 0.0
    contraction: float = 0.0
    moved: int = 0
    failures: int = 0

    def __add__(self, other: "Effort") -> "Effort":
        """Both together."""
        sums = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return Effort(**sums | {"residual": max(self.residual, other.residual)})


Efforts = dict[str, dict[str, dict[str, int | float]]]  # block -> direction -> the fields of an `Effort`


def effort_of(solved: Record | Solution) -> Effort:
    """What one solve of a batch took."""
    residual = solved.residual.double().nan_to_num(math.inf, math.inf)
    factor = contraction(solved)
    known = factor.isfinite()
    return Effort(
        solves=1,
        examples=len(residual),
        evaluations=solved.evaluations,
        steps=int(solved.steps.sum()),
        residual=residual.max().item() if len(residual) else 0.0,
        contraction=factor[known].sum().item(),
        moved=int(known.sum()),
        failures=int((~solved.converged).sum()),
    )


def contraction(solved: Record | Solution) -> Tensor:
    """By how much a step of the solver lowers the residual: `(r_end / r_start)^(1 / steps)` per example.

    0.1: a digit per step; near 1: the solver hardly moves; above 1: it was given up further away than it began. nan
    where it took no step or does not say where it began. Of a mixing solver it is that of its steps, not of the map's.
    """
    if solved.start is None:
        return torch.full_like(solved.residual, math.nan, dtype=torch.float64)
    ratio = solved.residual.double() / solved.start.double()
    return torch.where(solved.steps > 0, ratio ** (1 / solved.steps.clamp(min=1)), math.nan)


def summary(total: Efforts) -> dict[str, Any]:
    """What a history says of each block and direction.

    Returns:
        Block -> "forward" and "backward" -> "solves" and "examples" (counts), "evaluations" (mean of a batch), "steps"
        (mean of an example), "residual" (the largest; None where not finite), "contraction" (mean over the examples
        that took a step; None where none did), "failures" (examples not solved).
    """
    return {
        block: {direction: _means(Effort(**effort)) for direction, effort in efforts.items()}
        for block, efforts in total.items()
    }


def _means(effort: Effort) -> dict[str, Any]:
    return {
        "solves": effort.solves,
        "examples": effort.examples,
        "evaluations": effort.evaluations / effort.solves,
        "steps": effort.steps / max(1, effort.examples),
        "residual": effort.residual if math.isfinite(effort.residual) else None,
        "contraction": effort.contraction / effort.moved if effort.moved else None,
        "failures": effort.failures,
    }


def added(total: Efforts, more: Efforts) -> Efforts:
    """Both together, block by block."""
    found = {block: dict(efforts) for block, efforts in total.items()}
    for block, efforts in more.items():
        own = found.setdefault(block, {})
        for direction, effort in efforts.items():
            own[direction] = asdict(Effort(**own.get(direction, {})) + Effort(**effort))
    return found


class Solves:
    """Follows the solves of a network's blocks, and says which block it is that fails.

    Followed are all modules with a method `solve` that gives a `Solution`: those of implicit steps, and the user's own.
    A block that stands at several places is one, under its first name.

    Args:
        model: The network; it is as it was outside of `forward` and `backward`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.blocks = {name: module for name, module in model.named_modules() if _is_solving(module)}
        self._seen: list[tuple[str, Effort, list[Record]]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Within it solves are noted.

        Raises:
            ConvergenceError: If a solve raised it, with the block's name.
        """
        with _replaced(self.blocks, "solve", self._solve):
            yield

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Within it stands the backward pass of what `forward` noted.

        Raises:
            ConvergenceError: If the adjoint of a solve did not converge, or a reversible block could not be inverted,
                with the block's name.
        """
        with _replaced(self.blocks, "inverse", _named):
            try:
                yield
            except ConvergenceError as error:
                failed = [name for name, _, records in self._seen if any(not r.converged.all() for r in records)]
                if failed:
                    raise _of(", ".join(failed), error) from error
                raise

    def take(self) -> Efforts:
        """What was noted since it was last taken."""
        total: Efforts = {}
        for name, effort, records in self._seen:
            total = added(total, {name: {"forward": asdict(effort)}})
            for record in records:
                total = added(total, {name: {"backward": asdict(effort_of(record))}})
        self._seen = []
        return total

    def _solve(self, name: str, solve: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        solution = _named(name, solve, *args, **kwargs)
        if isinstance(solution, Solution):  # the list fills in the backward pass; the value is let go
            self._seen.append((name, effort_of(solution), solution.adjoint))
        return solution


def _is_solving(module: nn.Module) -> bool:
    step = getattr(module, "step", None)
    return callable(getattr(module, "solve", None)) and not (isinstance(step, Step) and not solves(step))


@contextmanager
def _replaced(blocks: Mapping[str, nn.Module], method: str, run: Callable[..., Any]) -> Iterator[None]:
    """Calls of a method of these modules go through `run(name, method, ...)`."""
    having = {name: module for name, module in blocks.items() if callable(getattr(module, method, None))}
    own = [(module, vars(module).get(method)) for module in having.values()]
    for name, module in having.items():
        vars(module)[method] = partial(run, name, getattr(module, method))
    try:
        yield
    finally:
        for module, before in own:
            if before is None:
                del vars(module)[method]
            else:
                vars(module)[method] = before


def _named(name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return method(*args, **kwargs)
    except ConvergenceError as error:
        raise _of(name, error) from error


def _of(name: str, error: ConvergenceError) -> ConvergenceError:
    return ConvergenceError(f"block {name}: {error}")
