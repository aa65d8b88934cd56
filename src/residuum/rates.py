"""Learning-rate schedules: the factor on the starting rate at each share of the training; those of the papers too."""

import math
from dataclasses import dataclass

from residuum.names import unknown


@dataclass(frozen=True)
class Steps:
    """A rate that changes at certain shares of the training.

    Attributes:
        at: (share of the training, factor on the starting rate from there on), shares ascending.
    """

    at: tuple[tuple[float, float], ...] = ((0.5, 0.1), (0.75, 0.01))

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.at]
        if shares != sorted(shares) or not all(0 < share < 1 and factor > 0 for share, factor in self.at):
            raise ValueError(f"steps {self.at} need shares of the training ascending between 0 and 1, and factors > 0")

    def __call__(self, share: float) -> float:
        """The factor at a share of the training."""
        return next((factor for start, factor in reversed(self.at) if share >= start), 1.0)


@dataclass(frozen=True)
class Cosine:
    """A rate that falls to zero along half a cosine: `(1 + cos(pi share)) / 2`."""

    def __call__(self, share: float) -> float:
        """The factor at a share of the training."""
        return (1 + math.cos(math.pi * share)) / 2


Rate = Steps | Cosine


def _epochs(total: int, *changes: tuple[int, float]) -> Steps:
    return Steps(tuple((epoch / total, factor) for epoch, factor in changes))


# P1 (Jastrzebski et al. 2018), training settings; all start at 0.1. The last two rates of its ResNet-110 are printed as
# 1e-5 and 1.1e-5, which breaks the sequence of tens: a misprint for 1e-4 and 1e-5.
RATES: dict[str, Rate] = {
    "steps": Steps(),
    "cosine": Cosine(),
    "constant": Steps(()),
    "p1-resnet110": _epochs(300, (80, 0.1), (120, 0.01), (200, 0.001), (240, 0.0001)),
    "p1-resnet110-as-printed": _epochs(300, (80, 0.1), (120, 0.01), (200, 0.0001), (240, 0.00011)),
    "p1-single": _epochs(200, (40, 0.2), (60, 0.04), (80, 0.008)),
    "p1-avgpool": _epochs(100, (40, 0.2), (60, 0.04), (80, 0.008)),
    "p1-wide": _epochs(100, (60, 0.2)),
}


def rate(name: str) -> Rate:
    """A schedule by its name in `RATES`.

    Raises:
        ValueError: If there is none of that name; the nearest is offered.
    """
    if name not in RATES:
        raise unknown("rate", name, RATES)
    return RATES[name]
