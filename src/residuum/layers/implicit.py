"""An implicit block in a reversible stack: its gradient graph without the tensors that a solve holds on to."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from residuum.layers.replays import Key, Record, captured
from residuum.layers.steps import ThetaBlock, rows
from residuum.solve import ConvergenceError, companion, depends
from residuum.solve import Record as Solved

_PULL: Key = (-2, 0)  # the product with the transposed Jacobian of f at its place in the equation


def is_light(block: nn.Module) -> bool:
    """Whether a block's graph can be built by `LightRecord`."""
    return (
        type(block) is ThetaBlock
        and block.step.theta > 0
        and block.step.param_grad == "exact"
        and not (block._forward_hooks or block._forward_pre_hooks)
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_autocast_enabled("cuda")
    )


class LightRecord(Record):
    """One forward of a `ThetaBlock`.

    With `u = dL/dy` and z from `(I - theta dt J^T) z = u`, J the Jacobian of f at y (two-point) or at the point between
    (midpoint), the gradient is that of z times the right-hand side of the equation with y held constant.

    Source: P3 (Reshniak & Webster), section 2.3.
    """

    def run(self, h: Tensor, kept: dict[Key, Any], give: Callable[[Key], Any]) -> Tensor:
        """As of a record; nothing of the solve is kept."""
        step, f = self.block.step, self.block.branch
        with torch.no_grad():
            solution = self.block.solve(h)
        y = solution.value
        door = torch.zeros((), device=h.device, requires_grad=True)
        held = _Hold.apply(door, y)
        slots: dict[Key, Tensor] = {}
        if step.form == "midpoint":
            slopes = captured(f, torch.lerp(h, held, step.theta), 0, slots, give)[0]
            side = torch.add(h, slopes, alpha=step.dt)
        else:
            side = torch.add(h, captured(f, held, 1, slots, give)[0], alpha=step.theta * step.dt)
            if step.theta < 1:
                side = torch.add(side, captured(f, h, 0, slots, give)[0], alpha=(1 - step.theta) * step.dt)
        slots.clear()
        if not depends(side, door):
            return y
        return _Solved.apply(side, y, lambda: give(_PULL), step, solution.adjoint)

    def back(self, y: Tensor, *, capture: bool = False) -> tuple[Tensor, dict[Key, Any] | None]:
        """As of a record; two evaluations of f more than the inverse give all that the gradient needs."""
        with self._as_it_was(), torch.no_grad():
            x = self.block.inverse(y).detach()
            return x, self._at(x, y) if capture else None

    def again(self, x: Tensor) -> tuple[Tensor, dict[Key, Any]]:
        """As of a record."""
        with self._as_it_was(), torch.no_grad():
            y = self.block(x)
            return y, self._at(x, y)

    def _at(self, x: Tensor, y: Tensor) -> dict[Key, Any]:
        """What the gradient needs, and the product with the transposed Jacobian."""
        step, f, tensors = self.block.step, self.block.branch, {}
        if step.form == "midpoint":
            leaf, number = torch.lerp(x, y, step.theta), 0
        else:
            leaf, number = y, 1
            if step.theta < 1:
                captured(f, x.detach().requires_grad_(self.needs), 0, tensors)
        leaf = leaf.detach().requires_grad_()
        slope, _ = captured(f, leaf, number, tensors)

        def pull(v: Tensor) -> Tensor:
            if not slope.requires_grad:
                return torch.zeros_like(v)
            options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
            return torch.autograd.grad(slope, leaf, v, **options)[0]  # 0 where the branch ignores its state

        return tensors | {_PULL: pull}  # not in `tensors`, which the graph of the slope refers to


class _Hold(Function):
    """The value y, through which no gradient passes, though it seems so."""

    @staticmethod
    def forward(ctx: Any, door: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        return None, None


class _Solved(Function):
    """The value y; its backward solves the adjoint equation."""

    @staticmethod
    def forward(ctx: Any, side: Tensor, y: Tensor, ask: Callable[[], Any], step: Any, records: list[Solved]) -> Tensor:
        ctx.ask, ctx.step, ctx.records = ask, step, records
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        pull, step = ctx.ask(), ctx.step
        factor, linear = step.theta * step.dt, step.adjoint or companion(step.solver)
        z, record = linear.invert(lambda v: factor * rows(pull(v.view(g.shape))), rows(g))
        ctx.records.append(record)
        ctx.records = []  # lets go of it: deep stacks of narrow states would keep more for records than for states
        if not bool(record.converged.all()):
            raise ConvergenceError(
                f"reversible: the adjoint of a Theta step did not converge for {int((~record.converged).sum())} of "
                f"{len(g)} examples in {int(record.steps.max())} steps to {linear.tol:.1e}; a smaller dt or another "
                "adjoint solver may help"
            )
        return z.view(g.shape), None, None, None, None
