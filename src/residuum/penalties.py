"""Penalties on the right-hand sides of blocks along the path of states: divergence, Jacobian, magnitude, variation."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from residuum.graphs import applied, leaf, recorded
from residuum.layers.coupling import alike
from residuum.layers.held import held
from residuum.layers.pairs import PairBlock
from residuum.layers.sharing import unrolled
from residuum.layers.steps import ExplicitBlock, RungeKuttaBlock, ThetaBlock, check_pure
from residuum.names import name_of, unknown
from residuum.spectra import Map, in_float32, widened

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Sections = Callable[[nn.Module], Sequence[Sequence[nn.Module]]]


@dataclass(frozen=True)
class Penalty:
    """What is added to a loss, for every section of blocks with right-hand sides f_t (a residual block is h + dt f(h)).

    With d entries of a state, T blocks, points t = 0 .. T where f_t is looked at in the state h_t (the last f once more
    at the end), weights w_t of the trapezoidal rule that add up to 1, J the Jacobian and means over the examples:

    - `divergence * sigmoid(sum_t w_t ((t + 1) / (T + 1))^power tr J / d)`: in (0, divergence); half of it for a flow
      that keeps volumes, less for one that shrinks them.
    - `jacobian * sum_t w_t |J|_F^2 / d^2`, 0 where f is constant.
    - `magnitude * sum_t w_t |f|^2 / d`, 0 where nothing is added.
    - `variation / T * sum_t |p_(t+1) - p_t|^2`, p_t all parameters of block t; 0 for equal blocks.

    tr J and |J|_F^2 are estimated (see `hutchinson`), without bias before the sigmoid. On our networks a training step
    with one of the first two costs about 5.5 plain steps (second derivatives of convolutions), with the third 2.5.

    Attributes:
        divergence: Its weight, 0 or more.
        jacobian: Its weight.
        magnitude: Its weight.
        variation: Its weight.
        power: Above 0 the divergence counts more at later blocks.
        squashed: False: without the sigmoid, as published before March 2021; then nothing bounds it from below.
        probes: Random vectors per example and point.
        draws: "signs", or "gaussian" as published, which has the larger variance.

    Source: P3 (Reshniak & Webster), extended version and its code, where states count as constants in the gradient of
    the first three; here the gradient is that of what is written above.
    """

    divergence: float = 0.0
    jacobian: float = 0.0
    magnitude: float = 0.0
    variation: float = 0.0
    power: float = 0.0
    squashed: bool = True
    probes: int = 1
    draws: str = "signs"

    def __post_init__(self) -> None:
        for name in (*WEIGHTS, "power"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"penalty: {name} is {getattr(self, name)}; it must be 0 or more, and finite")
        if self.probes < 1:
            raise ValueError(f"penalty: probes is {self.probes}; at least 1 is needed")
        if self.draws not in ("signs", "gaussian"):
            raise unknown("draws", self.draws, ("signs", "gaussian"))


WEIGHTS = ("divergence", "jacobian", "magnitude", "variation")


class Estimates(NamedTuple):
    """Per example: the value f(h), and estimates of tr J and of |J|_F^2 (Frobenius norm)."""

    value: Float[Tensor, " example *state"]
    trace: Float[Tensor, " example"]
    square: Float[Tensor, " example"]


def hutchinson(f: Map, h: Float[Tensor, " example *state"], probes: Float[Tensor, "probe example *state"]) -> Estimates:
    """Hutchinson's estimates of the trace and the squared Frobenius norm of the Jacobian: means of v^T J v, |J^T v|^2.

    Without bias where the probes v have independent entries of mean 0 and variance 1. The variance, for k probes, with
    S = (J + J^T) / 2 or S = J J^T: `2 |S|_F^2 / k` for Gaussian ones; for signs the diagonal of S does not count, so it
    is never larger, and zero where S is diagonal. One product with J^T per probe. Differentiable in h and in all that f
    uses.

    Args:
        f: The map, which treats examples independently.
        h: The states.
        probes: One vector per example; the mean is taken over dimension 0.

    Source: Hutchinson (1990); Avron & Toledo (2011) for the variances.
    """
    with recorded(), sdpa_kernel(SDPBackend.MATH):
        h = h if h.requires_grad else leaf(h)
        probes = probes.clone() if probes.is_inference() else probes
        value = f(h)
        trace = square = value.new_zeros(len(h))
        for v in probes if value.requires_grad else ():
            (pulled,) = torch.autograd.grad(value, h, v, create_graph=True, allow_unused=True, materialize_grads=True)
            trace = trace + (v * pulled).flatten(1).sum(1)
            square = square + pulled.flatten(1).square().sum(1)
    return Estimates(value, trace / len(probes), square / len(probes))


def terms(settings: Penalty, blocks: Sequence[nn.Module], states: Sequence[Tensor]) -> dict[str, Float[Tensor, ""]]:
    """What the penalties come to in one section; only those with a weight.

    Probes are drawn from torch's own random numbers, which `train` seeds at every step.

    Args:
        settings: The weights.
        blocks: The blocks in the order in which they run; one may run several times.
        states: The state before each of them, and the last.

    Raises:
        ValueError: If states and blocks do not match; if a block acts on two states; or, where its branch is looked at,
            if it holds batch norm or dropout in training mode, or changes its state in place.
    """
    if len(states) != len(blocks) + 1 or not blocks:
        raise ValueError(
            f"penalties: {len(blocks)} blocks need {len(blocks) + 1} states, given {len(states)}; not none"
        )
    found = _along_the_path(settings, blocks, states) if _of_branches(settings) else {}
    if settings.variation:
        found["variation"] = variation(blocks)
    if settings.divergence and settings.squashed:
        found["divergence"] = torch.sigmoid(found["divergence"])
    return {name: getattr(settings, name) * value for name, value in found.items() if getattr(settings, name)}


def _of_branches(settings: Penalty) -> bool:
    """Whether branches are looked at, and not their parameters alone."""
    return any(getattr(settings, name) for name in WEIGHTS[:3])


def _along_the_path(settings: Penalty, blocks: Sequence[nn.Module], states: Sequence[Tensor]) -> dict[str, Tensor]:
    """The integrals of divergence, Jacobian and magnitude, without their weights."""
    sides = [right_hand_side(block) for block in blocks]
    points = [*(f for f, _ in sides), sides[-1][0]]
    found = dict.fromkeys(WEIGHTS[:3], states[0].new_zeros((), dtype=in_float32(states[0]).dtype))
    with torch.autocast(states[0].device.type, enabled=False):
        for t, (f, h, share) in enumerate(zip(points, states, trapezoidal([dt for _, dt in sides]), strict=True)):
            f, h, d = widened(partial(applied, f)), in_float32(h), h[0].numel()
            if settings.divergence or settings.jacobian:
                value, trace, square = hutchinson(f, h, _draw(h, settings.probes, settings.draws))
                growth = ((t + 1) / len(points)) ** settings.power
                found["divergence"] = found["divergence"] + share * growth * trace.mean() / d
                found["jacobian"] = found["jacobian"] + share * square.mean() / d**2
            else:
                value = f(h)
            found["magnitude"] = found["magnitude"] + share * value.square().mean()
    return found


def _draw(h: Tensor, count: int, draws: str) -> Float[Tensor, "probe example *state"]:
    if draws == "gaussian":
        return torch.randn(count, *h.shape, dtype=h.dtype, device=h.device)
    return torch.randint(2, (count, *h.shape), device=h.device).to(h.dtype) * 2 - 1


def trapezoidal(dts: Sequence[float]) -> list[float]:
    """Weights of the trapezoidal rule for a mean over time, one more than there are steps: half a step at both ends."""
    sizes = [0.0, *map(abs, dts), 0.0]
    return [(a + b) / 2 / sum(sizes) for a, b in pairwise(sizes)]


def right_hand_side(block: nn.Module) -> tuple[Map, float]:
    """f and dt of a block: those of its step; of any other block what it adds, and 1.

    Raises:
        ValueError: If the block acts on two states, or has batch norm or dropout in training mode.
    """
    if isinstance(block, PairBlock) or (isinstance(block, RungeKuttaBlock) and len(block.branches) > 1):
        raise ValueError(
            f"penalties: a block of {type(block.step).__name__} acts on two states and has no single right-hand side; "
            "only variation is known for it"
        )
    check_pure(block, "a penalty")
    if isinstance(block, RungeKuttaBlock):
        return block.branches[0], block.step.dt
    if isinstance(block, ThetaBlock | ExplicitBlock):
        return block.branch, block.step.dt
    return lambda h: applied(block, h) - h, 1.0


def variation(blocks: Sequence[nn.Module]) -> Float[Tensor, ""]:
    """Variation in depth: `1/T sum_t |p_(t+1) - p_t|^2` over T blocks, all parameters p; 0 for equal blocks.

    Limited weights count as they are before they are limited.

    Raises:
        ValueError: If the blocks differ in a parameter's name or shape.

    Source: P3 (Reshniak & Webster), regulariser of example 1, there with the kernels only and without a gradient.
    """
    some = len(blocks) > 1 and any(True for block in blocks for _ in block.parameters())
    rows = alike(blocks, "all", tied=True) if some else []
    return sum(((b - a).square().sum() for row in rows for a, b in pairwise(row)), torch.zeros(())) / len(blocks)


def own_sections(model: nn.Module) -> list[list[nn.Module]]:
    """The residual blocks of a network of ours, section by section.

    Raises:
        ValueError: If the model is none of ours.
    """
    if not isinstance(getattr(model, "sections", None), nn.ModuleList):
        raise ValueError(f"penalties: which are the blocks of {type(model).__name__}? Give sections=")
    return [blocks for section in model.sections if (blocks := unrolled(section))]


def penalised(settings: Penalty, loss: Loss, *, sections: Sections = own_sections) -> Loss:
    """A loss with penalties, for `train`. In eval mode it is the loss alone, so that test losses compare.

    The states are those of the very forward that the loss runs; branches run once more on them. Branches must treat
    examples one by one: group norm or none, no dropout; blocks are called with their state alone, which nothing
    changes in place. Under torchrun the penalty of all examples is the mean of the
    processes' penalties, whose sigmoids are of means over fewer examples.

    Args:
        settings: The penalties.
        loss: Mean loss of a batch; it runs the model once.
        sections: model -> the blocks of each section, in the order in which they run.

    Returns:
        The loss; its name holds all three arguments.

    Raises:
        ValueError: From the loss, if other blocks have run than `sections` says, or, where branches are looked at, with
            more than their state, or if a state was changed in place; and what `terms` raises.
    """

    def with_penalties(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not (model.training and torch.is_grad_enabled()):
            return loss(model, x, y)
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        blocks = [list(section) for section in sections(inner)]
        with held(inner):
            with _watched(blocks, again=_of_branches(settings)) as states:
                value = loss(model, x, y)
            return value + sum(
                value
                for section, path in zip(blocks, states(), strict=True)
                for value in terms(settings, section, path).values()
            )

    # A checkpoint knows a loss by its name.
    with_penalties.__qualname__ = f"penalised({settings}, {name_of(loss)}, sections={name_of(sections)})"
    return with_penalties


def penalty_of(written: Sequence[str]) -> Penalty | None:
    """Penalties as they are written on the command line: name:weight, such as divergence:0.1. None if there are none.

    Raises:
        ValueError: If a name is unknown or given twice, or a weight is no number of 0 or more.
    """
    given: dict[str, float] = {}
    for text in written:
        name, _, weight = text.partition(":")
        if name not in WEIGHTS:
            raise unknown("penalty", name, WEIGHTS)
        try:
            given[name] = math.nan if name in given else float(weight)
        except ValueError:
            given[name] = math.nan
        if math.isnan(given[name]):
            raise ValueError(f"penalty {text!r}: write every name once, with its weight, such as {name}:0.1")
    return Penalty(**given) if given else None


@contextmanager
def _watched(blocks: list[list[nn.Module]], *, again: bool) -> Iterator[Callable[[], list[list[Tensor]]]]:
    """Keeps the states of a forward: when it is over, those of each section can be asked for.

    Args:
        blocks: The blocks of each section.
        again: Whether they will run again on these states, which must then be all that they got, and as they were.
    """
    calls: list[tuple[nn.Module, Any, Any]] = []
    kept: list[tuple[nn.Module, Any, int]] = []  # states are kept by reference, so with their count of changes in place
    expected = [block for section in blocks for block in section]

    def before(block: nn.Module, args: tuple, named: dict) -> None:
        if len(args) != 1 or named:
            raise ValueError(
                f"penalties: {type(block).__name__} is called with {', '.join([f'{len(args)} arguments', *named])}; "
                "its branch runs once more on the state: that, and not by name, must be all that it gets; keep the "
                "rest on the block, or in a module around it"
            )
        keep(block, args[0])

    def after(block: nn.Module, args: tuple, named: dict, output: Any) -> None:
        calls.append((block, (*args, *named.values())[0], output))
        keep(block, output)

    def keep(block: nn.Module, state: Any) -> None:
        kept.append((block, state, state._version if isinstance(state, Tensor) else 0))

    handles = [block.register_forward_hook(after, with_kwargs=True) for block in dict.fromkeys(expected)]
    if again:
        handles += [block.register_forward_pre_hook(before, with_kwargs=True) for block in dict.fromkeys(expected)]

    def states() -> list[list[Tensor]]:
        if [id(module) for module, _, _ in calls] != [id(block) for block in expected]:
            raise ValueError(
                f"penalties: {len(expected)} blocks were expected to run one after another, once each; {len(calls)} "
                "calls came, or in another order. Give sections= as the model runs them, and a loss that runs it once"
            )
        for block, state, version in kept if again else ():
            if isinstance(state, Tensor) and state._version != version:
                raise ValueError(
                    f"penalties: a state before or after {type(block).__name__} was changed in place, by it or by what "
                    "comes after it, so its branch would run once more on another one; use the operation that gives a "
                    "new tensor"
                )
        left = iter(calls)
        paths = [[next(left) for _ in section] for section in blocks]
        return [[*(before for _, before, _ in path), path[-1][2]] for path in paths]

    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
