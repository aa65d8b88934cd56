"""Branches whose Jacobian has its spectrum in a given disc, whatever the weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from residuum.layers.lipschitz import attach_, limit_of
from residuum.spectra import map_size

# Largest slopes of activations; those of GELU and SiLU, 1.129 and 1.0998, are rounded up.
SLOPES = {nn.Identity: 1.0, nn.ReLU: 1.0, nn.Tanh: 1.0, nn.Softplus: 1.0, nn.Sigmoid: 0.25, nn.GELU: 1.13, nn.SiLU: 1.1}


@dataclass(frozen=True)
class Spectrum:
    """The largest disc for the eigenvalues of a branch's Jacobian, with the real axis from `low` to `high` as diameter.

    Attributes:
        low: Smallest real part.
        middle: In [low, high]: where the disc can shrink to when it is learned.
        high: Largest real part.
        learned: The disc reaches from `middle + s(p) (low - middle)` to `middle + s(q) (high - middle)`, s the sigmoid,
            p and q learned and 0 at first; within it a factor s(r) per channel, 1/2 at first, scales the branch. False:
            it is the whole disc, and the factor is 1.

    Source: P3 (Reshniak & Webster), extended version; -1, 0, 1 are the defaults there.
    """

    low: float = -1.0
    middle: float = 0.0
    high: float = 1.0
    learned: bool = True

    def __post_init__(self) -> None:
        if not -math.inf < self.low <= self.middle <= self.high < math.inf or self.low == self.high:
            raise ValueError(
                f"spectrum: low is {self.low}, middle {self.middle}, high {self.high}; they must be finite, in this "
                "order, and low below high"
            )


class Controlled(nn.Module):
    """`f(h) = ((b - a) s(r) g(h) + (a + b) h) / 2` with Lip(g) <= 1: `|J - (a + b) / 2| <= (b - a) / 2` at every state.

    So all eigenvalues of the Jacobian J lie in the disc with the diameter [a, b], within that of the spectrum, and
    `a <= v^T J v <= b` for every unit vector v: for b < 0 the flow of h' = f(h) is a contraction. g is the layers one
    after another, each limited to the norm 1 (`limit_`, on maps of its size), divided by the largest slopes of the
    activations. A limit only bounds the norm, where the published code divides by it.

    What `limit_` says holds for the disc, too: in eval mode its radius is exceeded by at most 0.5 % per limited layer,
    in training mode norms follow the weights and can overshoot, and the copy of `export` stays within it strictly.

    Args:
        layers: Convolutions, linear modules and activations of `SLOPES`; the first and the last state have one shape.
            All keep the size of maps. They are limited in place. Activations before the first weights must not work in
            place.
        spectrum: The disc.
        size: Rows and columns of the state; () for vectors.

    Raises:
        ValueError: If a layer has no bound, is limited already, stands there twice or would overwrite the state, none
            has weights, or the shape of the state changes. No layer is limited then.

    Source: P3 (Reshniak & Webster), extended version.
    """

    def __init__(
        self, layers: Iterable[nn.Module], spectrum: Spectrum | None = None, *, size: tuple[int, int] | tuple[()] = ()
    ) -> None:
        super().__init__()
        self.layers, self.spectrum = nn.Sequential(*layers), spectrum or Spectrum()
        self.slope = _slope(self.layers)
        linear = [layer for layer in self.layers if isinstance(layer, nn.Conv2d | nn.Linear)]
        if len(set(linear)) < len(linear):
            raise ValueError("controlled: a layer stands twice among these layers; give a copy (copy.deepcopy) of it")
        width, now, like = _widths(linear[0])[0], tuple(size), linear[0].weight.detach()
        limits = [limit_of(layer, 1.0, now) for layer in linear]  # all before the first is put on its layer
        keep = (map_size(layer, now) == now for layer in linear if isinstance(layer, nn.Conv2d) and now)
        if width != _widths(linear[-1])[1] or not all(keep):
            raise ValueError("controlled: a branch keeps the shape of the state; these layers change it, or its size")
        for layer, limit in zip(linear, limits, strict=True):
            attach_(layer, limit)
        if self.spectrum.learned:
            self.ends = nn.Parameter(like.new_zeros(2))
            self.factor = nn.Parameter(like.new_zeros(width, *(1,) * len(size)))

    def disc(self) -> tuple[Float[Tensor, ""] | float, Float[Tensor, ""] | float]:
        """a and b, as they are now."""
        low, middle, high = self.spectrum.low, self.spectrum.middle, self.spectrum.high
        if not self.spectrum.learned:
            return low, high
        p, q = torch.sigmoid(self.ends)
        return middle + p * (low - middle), middle + q * (high - middle)

    def forward(self, h: Float[Tensor, " example *state"]) -> Float[Tensor, " example *state"]:
        """The slope at a state."""
        a, b = self.disc()
        g = self.layers(h) / self.slope
        if self.spectrum.learned:
            g = torch.sigmoid(self.factor) * g
        return ((b - a) * g + (a + b) * h) / 2


def _slope(layers: nn.Sequential) -> float:
    """The product of the largest slopes of the activations."""
    slope, weights = 1.0, False
    for number, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weights = True
        elif type(layer) in SLOPES:
            if not weights and getattr(layer, "inplace", False):
                raise ValueError(
                    f"controlled: layer {number}, {type(layer).__name__}(inplace=True), would overwrite the state, "
                    "which is needed afterwards; use inplace=False before the first layer with weights"
                )
            slope *= SLOPES[type(layer)]
        else:
            raise ValueError(
                f"controlled: layer {number}, {type(layer).__name__}, has no known bound; use nn.Conv2d, nn.Linear and "
                f"{', '.join(kind.__name__ for kind in SLOPES)}"
            )
    if not weights:
        raise ValueError("controlled: no layer has weights; give nn.Linear or nn.Conv2d among them")
    return slope


def _widths(layer: nn.Module) -> tuple[int, int]:
    """How many channels a layer takes and gives."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features
