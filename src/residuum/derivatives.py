"""Derivatives of a fixed point y = f(y) by the implicit function theorem, as functions of autograd.

The first derivatives of `y1`, f at a leaf with (I - J)^-1 behind it, are right; so are then the first and second ones
of `f(y1) - J y1` with J held constant, behind another (I - J)^-1. Third ones are not, and are refused.
"""

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from residuum.linear import Map, norms
from residuum.solvers import transforms


@dataclass(frozen=True, eq=False)
class Maps:
    """v -> J v and J^T v, and v -> (I - J)^-1 v and its transpose, with J constant.

    Attributes:
        push: J v.
        pull: J^T v.
        inverse: (I - J)^-1 v.
        adjoint: (I - J^T)^-1 v.
    """

    push: Map
    pull: Map
    inverse: Map
    adjoint: Map


def differentiable(f: Map, first: Tensor, y: Tensor, maps: Maps) -> Tensor:
    """The value y with the right first and second derivatives in all that f captures.

    Args:
        f: The map, which is applied once more.
        first: f(y), with its graph.
        y: The solution of y = f(y), a constant.
        maps: Products with the Jacobian of f at y and with the inverse of I - J.

    Raises:
        NotImplementedError: From the pass that asks for third derivatives.
    """
    inside, once = _Once.apply(first, y, maps)
    return _Twice.apply(first, f(inside), once, maps)


def no_vmap() -> NotImplementedError:
    """What a solve under vmap raises."""
    return NotImplementedError(
        "fixed_point does not work under torch.vmap, which allows no loop that ends when all have converged; "
        "it solves every example along dimension 0 on its own, so batch there"
    )


def _no_third() -> NotImplementedError:
    return NotImplementedError(
        "fixed_point: third derivatives are not offered; what asks for them is a backward pass or a jvp through second "
        "derivatives. Differentiate unrolled iterations for them"
    )


class _Linear(Function):
    """A linear map, given with its transpose."""

    @staticmethod
    def forward(v: Tensor, there: Map, back: Map) -> Tensor:
        return there(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.maps = inputs[1:]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        there, back = ctx.maps
        return _Linear.apply(g, back, there), None, None

    @staticmethod
    def jvp(ctx: Any, v: Tensor, *_: None) -> Tensor:
        return _Linear.apply(v, *ctx.maps)

    @staticmethod
    def vmap(*_: Any) -> None:
        raise no_vmap()


def forwards() -> bool:
    """Whether forward mode is at work."""
    return forward_ad._current_level >= 0


def _watched() -> bool:
    """Whether somebody may differentiate what is computed here."""
    return torch.is_grad_enabled() or forwards() or bool(transforms())


def _linear(v: Tensor, there: Map, back: Map) -> Tensor:
    """A linear map, with derivatives where somebody may ask for them."""
    return _Linear.apply(v, there, back) if _watched() else there(v)


class _Third(Function):
    """Zeros in the shape of the solution, which refuse to be differentiated by it.

    One jvp may be allowed; its tangent is then such zeros as well, whose jvp is not.
    """

    @staticmethod
    def forward(once: Tensor, jvp: bool) -> Tensor:
        return torch.zeros_like(once)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_forward(inputs[0])
        ctx.allowed = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        raise _no_third()

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Tensor:
        if not ctx.allowed:
            raise _no_third()
        return _Third.apply(*ctx.saved_tensors, False)

    @staticmethod
    def vmap(*_: Any) -> None:
        raise no_vmap()


class _Once(Function):
    """The value y twice, with the right first derivatives from `first` = f(y): (I - J)^-1 of its own.

    The first is for f, the second for `_Twice`. What they get in the pass that differentiates `_Twice` cancels. All
    else that they get belongs to second derivatives, which know nothing of how (I - J)^-1 changes with y.
    """

    @staticmethod
    def forward(first: Tensor, y: Tensor, maps: Maps) -> tuple[Tensor, Tensor]:
        return y.clone(), y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.maps = inputs[2]
        ctx.save_for_backward(output[0])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, against: Tensor | None) -> tuple:
        if g is None and against is None:
            return None, None, None
        total = against if g is None else g if against is None else g + against
        v = _linear(total, ctx.maps.adjoint, ctx.maps.inverse)
        if not _watched():
            return v, None, None
        first = _cancel(total, against)
        if not first or forwards():  # a tangent of the first pass is a second derivative, which is right
            v = v + _Third.apply(*ctx.saved_tensors, first)
        return v, None, None

    @staticmethod
    def jvp(ctx: Any, first: Tensor, *_: None) -> tuple[Tensor, Tensor]:
        v = _Linear.apply(first, ctx.maps.inverse, ctx.maps.adjoint)
        return v, v.clone()

    @staticmethod
    def vmap(*_: Any) -> None:
        raise no_vmap()


def _cancel(total: Tensor, against: Tensor | None) -> bool:
    """Whether in every example what is left beside `against` is rounding."""
    if against is None:
        return False
    left, whole = (norms(t.unsqueeze(-1).flatten(1)) for t in (total, against))
    lost = ~whole.isfinite()  # an example that was not solved
    return bool((lost | (left <= torch.finfo(total.dtype).eps ** 0.5 * whole)).all())


class _Twice(Function):
    """The value y, with the right first derivatives from `first`, and those with the right ones from `second` = f(y1).

    The derivatives of `second - J y1` are those of `first` in value, and themselves differentiable.
    """

    @staticmethod
    def forward(first: Tensor, second: Tensor, once: Tensor, maps: Maps) -> Tensor:
        return once.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.maps = inputs[3]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        maps = ctx.maps
        v = _linear(g, maps.adjoint, maps.inverse)
        if not _watched():
            return v, None, None, None
        return None, v, -_Linear.apply(v, maps.pull, maps.push), None

    @staticmethod
    def jvp(ctx: Any, first: Tensor, second: Tensor, once: Tensor, _: None) -> Tensor:
        maps = ctx.maps
        return _Linear.apply(second - _Linear.apply(once, maps.push, maps.pull), maps.inverse, maps.adjoint)

    @staticmethod
    def vmap(*_: Any) -> None:
        raise no_vmap()


# torch asks for signatures at each use; making them up takes longer than the rest.
for _function in (_Linear, _Once, _Twice, _Third):
    _function.forward.__signature__ = signature(_function.forward)
