"""Fixed points x = f(x), per example, differentiable by the implicit function theorem.

Nothing is differentiated through the iterations. Where gradients are wanted two applications of f at the solution y are
recorded. The first, the last of the solve, is at a leaf: its graph gives the products with J = df/dx and, once
`(I - J^T) v = g` is solved, the gradients of all that f captures. Its result with these derivatives, y1, is what f is
applied to the second time; `f(y1) - J y1` with J held constant has the right first and second derivatives. Only a
backward pass that is differentiated itself walks that graph.
"""

import dis
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from types import CodeType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from residuum.derivatives import Maps, differentiable, forwards, no_vmap
from residuum.graphs import applied
from residuum.linear import GMRES, BiCGStab, Dense, LinearSolver, Map, Neumann, Record
from residuum.solvers import (
    Anderson,
    GradientDescent,
    NewtonKrylov,
    Picard,
    Solver,
    constant,
    linearise,
    transforms,
)

__all__ = [
    "GMRES",
    "Anderson",
    "BiCGStab",
    "ConvergenceError",
    "Dense",
    "GradientDescent",
    "LinearSolver",
    "Neumann",
    "NewtonKrylov",
    "Picard",
    "Record",
    "Solution",
    "Solver",
    "fixed_point",
]


class ConvergenceError(RuntimeError):
    """A solve that did not reach its tolerance; the message says how far it came and what may help."""


@dataclass(frozen=True, eq=False)
class Solution:
    """The fixed point of every example, and how it was found.

    Attributes:
        value: The solutions, differentiable in everything that f captures; where `converged` is False the last iterate.
        steps: Steps of the solver per example.
        residual: `|f(x) - x| / (1 + |x|)` at the value per example, 2-norms, dimensionless.
        converged: Whether the residual is within the tolerance.
        evaluations: Evaluations of f on the batch, those for the gradients included, and products with its Jacobian.
        adjoint: One record per linear solve of a backward pass so far; its residual is `|g + J^T v - v| / (|g| + |v|)`.
        start: The residual at the start per example; None of a solver that does not say it.
    """

    value: Float[Tensor, " example *state"]
    steps: Int[Tensor, " example"]
    residual: Float[Tensor, " example"]
    converged: Bool[Tensor, " example"]
    evaluations: int
    adjoint: list[Record] = field(default_factory=list)
    start: Float[Tensor, " example"] | None = None


def fixed_point(
    f: Map,
    x0: Float[Tensor, " example *state"],
    solver: Solver,
    *,
    adjoint: LinearSolver | None = None,
    throw: bool = True,
) -> Solution:
    """The solution of x = f(x) for every example along dimension 0, with first and second derivatives.

    An example is finished when `|f(x) - x| <= tol (1 + |x|)`. It is then left as it is while the others go on, so its
    answer is bitwise the same whatever the other rows hold, provided that f treats examples independently. Gradients
    reach all tensors that f captures (parameters, inputs), not x0. With v from `(I - J^T) v = g` the gradient is
    `(df/dp)^T v`; its error is proportional to the residual. Third derivatives are refused. `torch.func.grad`, `vjp`
    and `jvp` work, `vmap` does not. Under autocast everything here runs in float32 (float64 stays). Backward hooks of
    modules in f see the vectors of the adjoint's solver, once per product.

    Args:
        f: The map. It must give the same result each time and change nothing.
        x0: Where to start; also gives shape, precision and device. No gradient flows to it.
        solver: `Picard`, `Anderson`, `NewtonKrylov`, or P3's `GradientDescent`.
        adjoint: Solver of the backward pass: `Neumann`, `Anderson`, `BiCGStab`, `GMRES`, `Dense`. None: the companion
            of the solver with its tolerance: Neumann for Picard, BiCGStab for Anderson, GMRES for NewtonKrylov.
        throw: Raise where an example does not converge, here or in the backward pass; False: `converged` and the
            records in `adjoint` say so.

    Raises:
        ConvergenceError: If an example did not converge; from `backward()` if the adjoint did not.
        TypeError: If f gives no tensor, x0 is not of floating point, or a solver is of the other kind.
        ValueError: If f gives another shape or precision, holds a batch norm in training mode, or a tolerance is below
            what the precision can resolve.
        NotImplementedError: Under `torch.vmap`, or a jvp inside a jvp; from the pass that asks for third derivatives.

    Source: implicit function theorem; Bai, Kolter & Koltun (2019), theorem 1, for the first derivative.
    """
    _check(f, x0)
    device = x0.device.type
    dtype = precision(x0)
    adjoint = adjoint or companion(solver)
    _check_solvers(solver, adjoint, dtype)
    forward_mode = forwards()
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    recording = torch.is_grad_enabled() and not (transforms() or forward_mode or hooked)
    with torch.autocast(device, enabled=False):
        with constant(), _unseen() if hooked else nullcontext():
            x = x0.to(dtype, copy=True)
            rows = _Rows(x)
            map_ = _Recorded(f, rows, recording)
            y, record = solver.solve(map_, rows.flat(x))
        _judge("fixed_point", solver, record, throw)
        solution = Solution(
            rows.shaped(y), record.steps, record.residual, record.converged, record.evaluations, start=record.start
        )
        if torch.is_grad_enabled() or forward_mode:
            return _differentiable(map_, solution, y, adjoint, throw)
        return solution


def precision(h: Tensor) -> torch.dtype:
    """The precision in which a state is solved for: its own, but float32 under autocast, which leaves float64 alone."""
    return torch.float32 if torch.is_autocast_enabled(h.device.type) and h.dtype != torch.float64 else h.dtype


def _unseen() -> AbstractContextManager[None]:
    """Within it graphs go past the caller's hooks for saved tensors.

    How many graphs a solve makes and drops depends on rounding; whoever saves tensors must not see that, or a block
    that runs again is taken for another.
    """
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def companion(solver: Solver) -> LinearSolver:
    """The linear solver that goes with a nonlinear one, with its tolerance."""
    if isinstance(solver, Picard):
        return Neumann(solver.tol, solver.max_steps)
    return GMRES(solver.tol) if isinstance(solver, NewtonKrylov) else BiCGStab(solver.tol)


class _Rows:
    """States as rows `[example, n]`, in the order in which the first state lies in memory, and back."""

    def __init__(self, x: Float[Tensor, " example *state"]) -> None:
        order = sorted(range(1, x.ndim), key=lambda d: -x.stride(d))
        self.plain, self.order = x.ndim == 2, (0, *order)
        self.inside = [x.shape[d] for d in self.order]
        self.size = x.shape[1:].numel()
        self.back = [self.order.index(d) for d in range(x.ndim)]

    def flat(self, x: Tensor) -> Float[Tensor, "example n"]:
        return x if self.plain else x.permute(self.order).reshape(len(x), self.size)

    def shaped(self, r: Tensor) -> Float[Tensor, " example *state"]:
        return r if self.plain else r.view(self.inside).permute(self.back)


class _Recorded:
    """f on rows, for a solver; its last evaluation is recorded where gradients may be wanted.

    A solver ends with f at the solution, to know its residual. Recording every evaluation, and dropping the graph of
    the one before, costs less than one more.
    """

    def __init__(self, f: Map, rows: _Rows, recording: bool) -> None:
        self.f, self.rows, self.recording = f, rows, recording
        self.at, self.last = None, None

    def __call__(self, r: Float[Tensor, "example n"]) -> Tensor:
        self.last = None
        x = self.rows.shaped(r)
        if self.recording and not torch.is_grad_enabled():  # a solver that differentiates f needs it as it is
            self.at, self.last = r, linearise(self._checked, x)
            return self.rows.flat(self.last.value.detach())
        return self.rows.flat(self._checked(x))

    def _checked(self, x: Tensor) -> Tensor:
        out = applied(self.f, x)
        if not isinstance(out, Tensor):
            raise TypeError(f"fixed_point: f must give a tensor; it gave {type(out).__name__}")
        if out.shape != x.shape or out.dtype != x.dtype:
            raise ValueError(
                f"fixed_point: f must keep shape and precision; it made {out.dtype} {tuple(out.shape)} "
                f"of {x.dtype} {tuple(x.shape)}"
            )
        return out


def _differentiable(f: _Recorded, solution: Solution, at: Tensor, linear: LinearSolver, throw: bool) -> Solution:
    """The solution, found as the rows `at`, with derivatives in everything that f captures, if that asks for any."""
    y, rows, count = solution.value, f.rows, solution.evaluations
    at_y = f.last
    if at_y is None or f.at is not at:
        at_y = linearise(f.f, y)
        count += 1
    if at_y.leaf is not None and not forwards() and not depends(at_y.value, at_y.leaf):
        return replace(solution, evaluations=count)

    def inverse(product: Map, g: Tensor) -> Tensor:
        with constant(), torch.autocast(y.device.type, enabled=False):
            v, record = linear.invert(lambda r: rows.flat(product(rows.shaped(r))), rows.flat(g))
        solution.adjoint.append(record)
        _judge("the adjoint of fixed_point", linear, record, throw)
        return rows.shaped(v)

    def product(of: Map, v: Tensor) -> Tensor:
        with constant():
            return of(v)

    push, pull = at_y.push, at_y.pull
    maps = Maps(partial(product, push), partial(product, pull), partial(inverse, push), partial(inverse, pull))
    value = differentiable(f.f, at_y.value, y, maps)
    return replace(solution, value=value, evaluations=count + 1)


def depends(value: Tensor, leaf: Tensor) -> bool:
    """Whether a value has derivatives in anything but this leaf; it may be a leaf itself."""
    if value.grad_fn is None:
        return value.requires_grad and value is not leaf
    seen, todo = set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if not node.next_functions and getattr(node, "variable", None) is not leaf:
                return True
            todo += [after for after, _ in node.next_functions]
    return False


def _judge(what: str, solver: Solver | LinearSolver, record: Record, throw: bool) -> None:
    """Raise where an example has not converged."""
    failed = ~record.converged
    if not throw or not failed.any():
        return
    worst = record.residual.nan_to_num(math.inf, math.inf).max()
    raise ConvergenceError(
        f"{what}: {int(failed.sum())} of {len(failed)} examples did not converge: {type(solver).__name__} took up to "
        f"{int(record.steps.max())} steps, the largest residual is {float(worst):.1e}, the tolerance {solver.tol:.1e}. "
        "A smaller step size, a Lipschitz limit on f, Anderson or NewtonKrylov may help, or more steps (max_steps) or "
        "float64; f must give the same result each time (no dropout). throw=False returns a flag per example instead"
    )


def _check_solvers(solver: Solver, adjoint: LinearSolver, dtype: torch.dtype) -> None:
    """Refuse solvers of the other kind, and tolerances below the precision."""
    least = 5 * torch.finfo(dtype).eps
    for used, kind, what in (
        (solver, Solver, "solves no nonlinear equation; give Picard, Anderson, NewtonKrylov or GradientDescent"),
        (adjoint, LinearSolver, "is no adjoint, which is linear; give Neumann, Anderson, BiCGStab, GMRES or Dense"),
    ):
        if not isinstance(used, kind):
            raise TypeError(f"fixed_point: {type(used).__name__} {what}")
        if used.tol < least:
            raise ValueError(
                f"{type(used).__name__}: tol={used.tol:.1e} is below what {dtype} can resolve; give at least "
                f"{least:.1e} or solve in higher precision"
            )


def _check(f: Map, x0: Tensor) -> None:
    """Refuse what cannot be solved: transforms, starts, and batch norm that every evaluation would update."""
    if "Vmap" in transforms():
        raise no_vmap()
    if transforms().count("Jvp") > 1:  # torch gets forward mode over forward mode of autograd functions wrong
        raise NotImplementedError("fixed_point: no jvp inside a jvp; take grad or vjp for one of them")
    if not x0.is_floating_point():
        raise TypeError(f"fixed_point: x0 must be of floating point; it is {x0.dtype}")
    if x0.ndim == 0:
        raise ValueError("fixed_point: x0 has no dimensions; examples lie along dimension 0")
    for module in _modules(f):
        for name, part in module.named_modules():
            if of_the_batch(part):
                raise ValueError(
                    f"fixed_point: {name or 'f'} is a {type(part).__name__} with statistics of the batch, which every "
                    "evaluation of f would update or which tie the examples together; use group norm or none, or "
                    ".eval()"
                )


def of_the_batch(module: nn.Module) -> bool:
    """Whether a module is a norm that updates statistics, or with statistics of the batch at hand.

    Args:
        module: The module; its parts do not count.
    """
    if isinstance(module, _InstanceNorm):  # of each example alone; it updates whatever statistics it has
        return module.running_mean is not None and (module.training or not module.track_running_stats)
    return isinstance(module, _NormBase) and (module.training or module.running_mean is None)


def _modules(f: object) -> Iterator[nn.Module]:
    """The modules that a callable is, is a method of, has as arguments of a partial, in its closure or as globals.

    Also those in lists, tuples and dictionaries there.
    """
    held = [f, getattr(f, "__self__", None)]
    if isinstance(f, partial):
        yield from _modules(f.func)
        held += [*f.args, *f.keywords.values()]
    for cell in getattr(f, "__closure__", None) or ():
        with suppress(ValueError):  # a name that has no value yet
            held.append(cell.cell_contents)
    if code := getattr(f, "__code__", None):
        held += [f.__globals__[name] for name in _globals_of(code) if name in f.__globals__]
    for thing in held:
        parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else (thing,)
        yield from (part for part in parts if isinstance(part, nn.Module))


@cache
def _globals_of(code: CodeType) -> list[str]:
    """Names that a code takes from its globals; `co_names` has those of attributes as well."""
    return sorted({step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"})
