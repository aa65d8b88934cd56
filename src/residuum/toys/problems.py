"""The small problems of P3: what is fitted, for several networks that are trained side by side.

Each gives inputs and targets `[member, example, ..]`, one member per seed. Only the regression's training points are
random; everything else is the same for all members.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

PREY = (2 / 3, 4 / 3, 1.0, 1.0)  # a, b, c, d of y' = a y - b y z, z' = d y z - c z
STIFF = -20.0


class Pairs(NamedTuple):
    """Inputs and what the networks should make of them."""

    x: Float[Tensor, "member example entry"]
    y: Float[Tensor, "member example *output"]


class Problem(NamedTuple):
    """What networks are trained on, and what they are judged by."""

    train: Pairs
    validation: Pairs


def sine(seeds: Sequence[int]) -> Problem:
    """`sin(2 pi x) exp(-x^2 / 2)` on [-1, 1]: 100 points uniform at random, and 200 equispaced ones to validate.

    Source: P3 (Reshniak & Webster), example 1; points and function from its code, where they have no seed.
    """
    drawn = np.stack([np.random.default_rng((seed, 0)).uniform(-1, 1, (100, 1)) for seed in seeds])
    even = np.broadcast_to(np.linspace(-1, 1, 200)[:, None], (len(seeds), 200, 1))
    return Problem(*(_pairs(x, damped_sine(x)) for x in (drawn, even)))


def damped_sine(x: np.ndarray) -> np.ndarray:
    """The function of the regression."""
    return np.sin(2 * np.pi * x) * np.exp(-(x**2) / 2)


def spirals(seeds: Sequence[int]) -> Problem:
    """Two spirals of two turns, 513 points each, 0.2 apart; every second of the 1026 rows is for training.

    Source: P3 (Reshniak & Webster), example 2; from its code.
    """
    phi, rho = np.linspace(0, 4 * np.pi, 513), np.linspace(0, 1, 513)
    turn = np.stack([np.cos(phi), np.sin(phi)], 1)
    x = np.concatenate([rho[:, None] * turn, (rho + 0.2)[:, None] * turn])
    y = np.repeat([0.0, 1.0], 513)[:, None]
    return Problem(*(_for_all(seeds, x[rows], y[rows]) for rows in (slice(1, None, 2), slice(0, None, 2))))


def wave(seeds: Sequence[int]) -> Problem:
    """`sin x` on [-5, 5]: 20 equispaced points to train, 40 to validate.

    Source: P3 (Reshniak & Webster), extended version.
    """
    return Problem(*(_for_all(seeds, x, np.sin(x)) for x in (np.linspace(-5, 5, count)[:, None] for count in (20, 40))))


def arms(seeds: Sequence[int]) -> Problem:
    """Two spirals whose arms are 1 apart, 400 points of each (`two_arms`): every second to train, others to validate.

    Source: P3 (Reshniak & Webster), the code of the extended version.
    """
    x, y = two_arms(400)
    return Problem(*(_for_all(seeds, x[rows], y[rows]) for rows in (slice(0, None, 2), slice(1, None, 2))))


def two_arms(count: int) -> tuple[Float[np.ndarray, "row 2"], Float[np.ndarray, "row 1"]]:
    """Two spirals of three turns, of radius 6.5 to 0.5, so many points on each; class 0, then class 1."""
    s = np.linspace(0, 96, count)
    turn = np.stack([np.sin(s * np.pi / 16), np.cos(s * np.pi / 16)], 1)
    one = 6.5 * (1 - s / 104)[:, None] * turn
    return np.concatenate([one, -one]), np.repeat([0.0, 1.0], count)[:, None]


def stiff(seeds: Sequence[int], *, steps: int, time: float) -> Problem:
    """`y' = -20 (y - cos t)` from y(0) = -2, -1.5, .., 2, of which every second to train; the state is (y, t).

    The targets are the exact solution after each step, `[member, example, step, 1]`.

    Source: P3 (Reshniak & Webster), extended version; starting values are ours.
    """
    start = np.linspace(-2, 2, 9)[:, None]
    t = np.linspace(0, time, steps + 1)[1:]
    k = -STIFF
    slow = (k * k * np.cos(t) + k * np.sin(t)) / (k * k + 1)
    y = slow + (start - k * k / (k * k + 1)) * np.exp(-k * t)
    x = np.concatenate([start, np.zeros_like(start)], 1)
    return Problem(*(_for_all(seeds, x[rows], y[rows, :, None]) for rows in (slice(0, None, 2), slice(1, None, 2))))


def lotka_volterra(seeds: Sequence[int], *, steps: int, time: float) -> Problem:
    """Prey and predators from (1, 0.5 + 0.1 k), k = 0 .. 13; odd k to train, even k to validate.

    The targets are the solution after each step, `[member, example, step, 2]`, to a relative error of 1e-10.

    Source: P3 (Reshniak & Webster), extended version.
    """
    start = np.array([(1.0, 0.5 + 0.1 * k) for k in range(14)])
    y = np.stack([orbit(s, np.linspace(0, time, steps + 1)[1:]) for s in start])
    return Problem(*(_for_all(seeds, start[rows], y[rows]) for rows in (slice(1, None, 2), slice(0, None, 2))))


def orbit(start: Float[np.ndarray, "2"], times: Float[np.ndarray, " time"]) -> Float[np.ndarray, "time 2"]:
    """The exact orbit of prey and predators, to a relative error of 1e-10."""
    from scipy.integrate import solve_ivp

    a, b, c, d = PREY

    def slope(_: float, h: np.ndarray) -> list[float]:
        y, z = h
        return [a * y - b * y * z, d * y * z - c * z]

    return solve_ivp(slope, (0, times[-1]), start, t_eval=times, rtol=1e-10, atol=1e-12, method="DOP853").y.T


def _for_all(seeds: Sequence[int], x: np.ndarray, y: np.ndarray) -> Pairs:
    return _pairs(*(np.broadcast_to(part, (len(seeds), *part.shape)) for part in (x, y)))


def _pairs(x: np.ndarray, y: np.ndarray) -> Pairs:
    return Pairs(torch.tensor(np.ascontiguousarray(x)), torch.tensor(np.ascontiguousarray(y)))
