"""Reversible stacks: training with the memory of a few states, whatever the depth.

The forward builds the ordinary gradient graph, but of what the gradient needs from a block only a name is kept. When
the backward arrives there, the state before the block is computed from the state after it, and with it what is needed.
So every parameter, captured value and hook gets its gradient from autograd itself, once.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from residuum.layers.held import Weights
from residuum.layers.implicit import LightRecord, is_light
from residuum.layers.replays import Key, Record
from residuum.linear import norms

State = Float[Tensor, "example *shape"]
SPACING = 20
_PROBE = 100  # backwards from one in which amplifications are measured to the next


class DriftError(RuntimeError):
    """Rebuilt states are too far from the true ones, so that gradients of this backward are wrong.

    Args:
        drift: Relative error of the state, of the worst example.
        tolerance: What was allowed.
        block: Number of the block before which the state stands.
        how: How the drift is known.
    """

    def __init__(self, drift: float, tolerance: float, block: int, how: str) -> None:
        super().__init__(
            f"reversible: the state before block {block} is rebuilt with a relative error of {drift:.1e} ({how}), more "
            f"than the tolerance {tolerance:.1e}; gradients of this backward are not to be used. The inverses of the "
            "blocks amplify errors: take blocks that contract less (momentum: a gamma nearer to 1), float64, a smaller "
            "solver tolerance, or a plain nn.Sequential, which stores all states"
        )
        self.drift, self.tolerance, self.block = drift, tolerance, block


def reversible(blocks: Iterable[nn.Module], *, tolerance: float = 1e-4, spacing: int = SPACING) -> "Reversible":
    """A stack of blocks that trains with a number of stored states that hardly grows with its depth.

    `h -> block_n(.. block_1(h))`, with the gradients, buffers and random numbers of `nn.Sequential(*blocks)`: batch
    norm counts each step once, dropout is drawn again, limited weights move once. In the backward `block.inverse`
    rebuilds the states from the last one. Stored are that, the first, and anchors every `spacing` blocks, from which
    rebuilding starts anew. At each of them the rebuilt state is compared with the stored one. In the first backward and
    every hundredth, a second state close by is rebuilt as well, which measures how the inverses amplify rounding. What
    exceeds the tolerance is refused.

    Args:
        blocks: Modules with `forward(h)` and `inverse(h)` of one tensor; the user's own as well. Parameters and values
            that they use need not be named.
        tolerance: Largest relative error of a rebuilt state, per example. Gradients are off by a small multiple of it.
        spacing: Blocks from one anchor to the next, 20 or more: 1 / spacing of a state per block is stored.

    Returns:
        The stack. In eval mode, or without gradients, it is a plain sequence of its blocks.

    Raises:
        TypeError: If a block has no inverse.
        ValueError: If there is no block, or tolerance or spacing are out of range.
        ValueError: From a forward, if a state has a precision that cannot resolve the tolerance, as bfloat16.
        DriftError: From a backward, if a state was rebuilt with more than the tolerance.
        RuntimeError: From a backward, for second derivatives, and if parameters have changed since the forward.

    Source: Gomez et al. 2017, "The Reversible Residual Network"; P3 (Reshniak & Webster), section 2.3.
    """
    return Reversible(blocks, tolerance=tolerance, spacing=spacing)


class Reversible(nn.Module):
    """What `reversible` returns.

    Args:
        blocks: As there; a stack among them gives its blocks.
        tolerance: As there.
        spacing: As there.

    Raises:
        TypeError: As there.
        ValueError: As there.
    """

    def __init__(self, blocks: Iterable[nn.Module], *, tolerance: float = 1e-4, spacing: int = SPACING) -> None:
        super().__init__()
        flat = [single for block in blocks for single in (block.blocks if isinstance(block, Reversible) else (block,))]
        if not flat:
            raise ValueError("reversible: no blocks given; a stack needs at least 1")
        for number, block in enumerate(flat):
            if not callable(getattr(block, "inverse", None)):
                raise TypeError(
                    f"reversible: block {number}, {type(block).__name__}, has no inverse(h), so its state cannot be "
                    "rebuilt; use a reversible step or give it one"
                )
        if not 0 < tolerance < math.inf:
            raise ValueError(f"reversible: tolerance is {tolerance}; it must be a finite number above 0")
        if spacing < SPACING:
            raise ValueError(f"reversible: spacing is {spacing}; it must be {SPACING} or more")
        self.blocks, self.tolerance, self.spacing = nn.ModuleList(flat), tolerance, spacing
        self._backwards = 0
        self._inverse_is_enough: dict[int, bool] = {}

    def forward(self, h: State) -> State:
        """The state after all blocks."""
        if self.training and torch.is_grad_enabled():
            return _Path(self, h).forward(h)
        for block in self.blocks:
            h = block(h)
        return h

    def inverse(self, h: State) -> State:
        """The state before all blocks."""
        for block in reversed(self.blocks):
            h = block.inverse(h)
        return h

    def extra_repr(self) -> str:
        """What is allowed and stored."""
        return f"tolerance={self.tolerance:g}, spacing={self.spacing}"


@dataclass(frozen=True)
class _Stored:
    """A state that is kept; whoever changes it in place is found out."""

    state: Tensor
    version: int

    def get(self) -> Tensor:
        """The state."""
        if self.state._version != self.version:
            raise RuntimeError(
                "a state of the stack, its input or its output, was changed in place after the forward; the "
                "backward starts from it"
            )
        return self.state


class _Path:
    """One forward of a stack, and what its backward needs."""

    def __init__(self, stack: Reversible, h: Tensor) -> None:
        self.stack, self.records = stack, []
        self.stored = {0: _Stored(h.detach(), h._version)}
        self.place, self.kept = -1, {}  # the block whose tensors are at hand, and they
        self.rebuilt: tuple[int, Tensor] | None = None
        self.errors: _Errors | None = None
        self.weights = Weights(stack)

    def forward(self, h: Tensor) -> Tensor:
        """The state after all blocks."""
        with self.weights.used():
            return self._forward(h)

    def _forward(self, h: Tensor) -> Tensor:
        depth = len(self.stack.blocks)
        for place, block in enumerate(self.stack.blocks):
            record = LightRecord(block, h) if is_light(block) else Record(block, h)
            self.records.append(record)
            kept: dict[Key, Any] = {}
            h = record.run(h, kept, partial(self._give, place))
            kept.clear()
            self._check_precision(place, h)
            if place + 1 == depth or ((place + 1) % self.stack.spacing == 0 and depth - place > self.stack.spacing):
                self.stored[place + 1] = _Stored(h.detach(), h._version)
        return h

    def _check_precision(self, place: int, h: Tensor) -> None:
        """Refuse in the forward what no backward could rebuild: autocast rounds the states of some blocks only."""
        if torch.finfo(h.dtype).eps > self.stack.tolerance:
            raise ValueError(
                f"reversible: the state after block {place} is in {h.dtype}, too coarse for a rebuilt one to keep the "
                f"tolerance {self.stack.tolerance:.1e}; use float32 (--precision float32), or Theta, which solves in "
                "float32, or no reversible stack: nn.Sequential stores all states"
            )

    def _give(self, place: int, key: Key) -> Any:
        """What the gradient of a block needs, by its key."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "reversible: second derivatives (create_graph=True) are not offered: rebuilt states know nothing of "
                "where they come from; use eval mode or nn.Sequential for them"
            )
        if place != self.place or key not in self.kept:
            with self.weights.used():
                self._rebuild(place)
        return self.kept[key]

    def _state(self, place: int) -> Tensor:
        """The state before a block; the nearest known one above it is where rebuilding starts."""
        if place in self.stored:
            return self.stored[place].get()
        if self.rebuilt is None or self.rebuilt[0] != place:
            self.rebuilt = place, self.records[place].back(self._state(place + 1))[0]
            self.errors = None
        return self.rebuilt[1]

    def _rebuild(self, place: int) -> None:
        """What the gradient of a block needs, and the state before it."""
        self.kept = {}
        y, stack, record = self._state(place + 1), self.stack, self.records[place]
        if place + 1 == len(stack.blocks):
            probe = stack._backwards % _PROBE == 0
            stack._backwards += 1
            self.errors = _Errors(stack.tolerance) if probe else None
        enough = stack._inverse_is_enough.get(place)
        x, kept = record.back(y, capture=enough is not False)
        if kept is None or enough is None:
            true = self.stored[place].get() if place in self.stored else x
            kept = self._checked(place, y, kept, *record.again(true))
        self.place, self.kept, self.rebuilt = place, kept, (place, x)
        if self.errors:
            self.errors.back(place, y, x, record)
        if place in self.stored:
            self._compare(place, x)

    def _checked(
        self, place: int, y: Tensor, kept: dict[Key, Any] | None, after: Tensor, again: dict[Key, Any]
    ) -> dict[Key, Any]:
        """What the inverse has captured, if that is what the forward computes; else what that does."""
        drift, tolerance = _distance(after, y), self._tolerance(y)
        if not drift <= tolerance and bool(torch.isfinite(y).all()):
            raise DriftError(drift, tolerance, place, "forward and inverse do not agree")
        enough = kept is not None and all(self._alike(kept[key], value) for key, value in again.items())
        self.stack._inverse_is_enough[place] = enough
        return kept if enough else again

    def _tolerance(self, like: Tensor) -> float:
        return max(self.stack.tolerance, 8 * torch.finfo(like.dtype).eps)

    def _alike(self, a: Any, b: Any) -> bool:
        """Whether two values that a gradient needs are one; whole numbers and products are not compared."""
        if not isinstance(b, Tensor) or a.shape != b.shape or not b.is_floating_point():
            return not isinstance(b, Tensor) or a.shape == b.shape
        return bool((a - b).norm() <= self._tolerance(b) * b.norm())

    def _compare(self, place: int, x: Tensor) -> None:
        """The rebuilt state and the true one."""
        true = self.stored[place].get()
        drift = _distance(x, true)
        if not drift <= self.stack.tolerance and bool(torch.isfinite(true).all()):
            raise DriftError(drift, self.stack.tolerance, place, "measured")
        if self.errors:
            self.errors.calibrate(drift)


class _Errors:
    """How rounding errors grow while states are rebuilt: a second state, off by many times as much, is rebuilt, too."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.draw = torch.Generator().manual_seed(0)
        self.begin()

    def begin(self) -> None:
        """At a state without error."""
        self.delta: Tensor | None = None
        self.scale = self.error = self.worst = 0.0  # delta is the error times this
        self.where = 0

    def back(self, place: int, y: Tensor, x: Tensor, record: Record) -> None:
        """One block further: the error of the state before it, from that of the state after it and fresh rounding."""
        unit = torch.finfo(y.dtype).eps
        noise = torch.randn(y.shape, generator=self.draw, dtype=y.dtype).to(y.device) * y
        if self.delta is None:
            self.scale = unit**-0.5
            delta = noise * (unit * self.scale)
        else:
            # Small enough for the blocks to be linear, large enough not to be rounded away.
            shrink = min(1.0, 10 * math.sqrt(unit) / max(self.error * self.scale, unit))
            self.scale *= shrink
            delta = self.delta * shrink + noise * (unit * self.scale)
        near, _ = record.back(y + delta)
        self.delta = near - x
        self.error = _distance(near, x) / self.scale
        if self.error > self.worst or math.isnan(self.error):
            self.worst, self.where = self.error, place
        if not self.worst <= self.tolerance and bool(torch.isfinite(y).all()):
            raise DriftError(self.worst, self.tolerance, self.where, "predicted from the measured amplification")

    def calibrate(self, drift: float) -> None:
        """At an anchor the true drift is known; so is then the largest one since the last anchor. Begin anew."""
        largest = self.worst * max(drift / self.error, 1.0) if self.error else drift
        if largest > self.tolerance:
            raise DriftError(largest, self.tolerance, self.where, "from the measured amplification and drift")
        self.begin()


def _sizes(h: Tensor) -> Tensor:
    """The norm of each example, in a shape that divides the state."""
    return norms(h.flatten(1)).reshape(-1, *(1,) * (h.dim() - 1)) if h.dim() > 1 else h.abs()


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest relative distance of an example from b."""
    if not b.numel() or a.shape != b.shape:
        return 0.0 if a.shape == b.shape else math.inf
    difference, size = _sizes(a.detach() - b), _sizes(b)
    return float((difference / size.clamp_min(torch.finfo(b.dtype).tiny)).max())
