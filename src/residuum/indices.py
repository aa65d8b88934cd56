"""Indices: a profile as a few named numbers; slopes over depth, the stopping rule and advice on depth."""

import math
from collections.abc import Mapping
from itertools import chain

import numpy as np

from residuum.profiles import Measure, Profile
from residuum.readings import finite

# An index: {"sections": one number per section, "network": one for all}; None where it is not defined.
Index = dict[str, float | list[float | None] | None]

# Ranges of L that P2's curves are read in separately, and in which a null model has another slope than a trained one.
RANGES = ((2, 20), (20, 80), (70, 100))

ADVICE = (
    "A range, because one network cannot tell how its distance grows with depth: if training fixes the scaled distance "
    "d of a section, d / eps blocks make the mean step eps (Hauser's rule); if it grows like the square root of the "
    "number of blocks L, as in an untrained network, d^2 / (L eps^2) do. Only networks of several depths can tell."
)


def indices(profile: Profile) -> dict[str, Index | float | None]:
    """The numbers that a profile is summed up by; ready for JSON, None where undefined.

    Per section and for the whole network, whichever the profile has values for:

    - "computational_distance": `d = sum_l mean |f_l|`, "scaled_distance": `d_scaled = sum_l mean (|f_l| / |h_l|)`;
      the network's is the sum over its sections.
    - "mean_perturbation" and "mean_scaled_perturbation": these by the number of blocks, d / L.
    - "mean_state_norm", "mean_update_angle": means over the blocks; "mean_block_influence" and
      "mean_angular_distance": means over spans of one block; "label_changes": sum over the states.

    For the network's answer, one number each: "final_loss", "final_accuracy", "final_entropy".

    Args:
        profile: What was measured.

    Returns:
        Each index as {"sections": [one per section], "network": one}, the final ones as numbers.

    Source: P2 (Hauser 2019), eq. 4 and figure 3 (distance), figure 4 (its mean), figure 6 (scaled), eq. 11 and figure 7
    (its mean).
    """
    found: dict[str, Index | float | None] = {}
    for quantity, sum_name, mean_name in _READ:
        if quantity not in profile.measures:
            continue
        by_section = _by_section(profile, quantity)
        if sum_name:
            found[sum_name] = _index([sum(v, 0.0) for v in by_section], sum(chain.from_iterable(by_section), 0.0))
        if mean_name:
            found[mean_name] = _index([_mean(v) for v in by_section], _mean(list(chain.from_iterable(by_section))))
    for quantity in ("loss", "accuracy", "entropy"):
        if quantity in profile.measures:
            found[f"final_{quantity}"] = finite(profile.mean(quantity)[-1].item())
    return found


# quantity, name of its sum along the blocks, name of its mean over them
_READ = (
    ("perturbation", "computational_distance", "mean_perturbation"),
    ("scaled_perturbation", "scaled_distance", "mean_scaled_perturbation"),
    ("state_norm", "", "mean_state_norm"),
    ("update_angle", "", "mean_update_angle"),
    ("block_influence", "", "mean_block_influence"),
    ("angular_distance", "", "mean_angular_distance"),
    ("label_change", "label_changes", ""),
)


def _by_section(profile: Profile, quantity: str) -> list[list[float]]:
    """Means at the points of each section, of spans only those of one block."""
    points: Measure = profile.measures[quantity]
    values = list(zip(points.points, profile.mean(quantity).tolist(), strict=True))
    return [[v for p, v in values if p.section == s and p.length == 1] for s in range(len(profile.sections))]


def _index(sections: list[float], network: float) -> Index:
    return {"sections": [finite(v) for v in sections], "network": finite(network)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def slopes(
    by_depth: Mapping[int, float], *, ranges: tuple[tuple[int, int], ...] = RANGES
) -> dict[tuple[int, int], float]:
    """Log-log slopes of an index against depth, each over one range of depths, by least squares.

    For the mean scaled perturbation: -1 if the distance of a section does not grow with its depth, 0 if it grows like
    L. An untrained network with batch norm comes near -1/2 from above (distance like sqrt(L); -0.42 in the first
    section at L = 70 to 100), so a falling mean by itself shows nothing. For the slope of a distance add 1.

    Args:
        by_depth: The index of one section by its number of blocks L, from networks of several depths.
        ranges: Ranges of L, both ends included.

    Returns:
        The slope by range; nan where fewer than two depths lie in it.

    Raises:
        ValueError: If a depth or a value is not positive.

    Source: P2 (Hauser 2019), sections 3.2 and 3.3: the distance doubles with L, then flattens.
    """
    for depth, value in by_depth.items():
        if not (depth > 0 and value > 0):
            raise ValueError(f"slopes: logarithms need positive depths and values, given {value} at depth {depth}")
    found = {}
    for low, high in ranges:
        inside = [(math.log(depth), math.log(value)) for depth, value in by_depth.items() if low <= depth <= high]
        found[low, high] = float(np.polyfit(*np.array(inside).T, 1)[0]) if len(inside) > 1 else math.nan
    return found


def stopping_depth(distance: float, eps: float) -> int:
    """Blocks that a section needs for a mean scaled perturbation of at most eps: `L = ceil(d_scaled / eps)`.

    Holds if the scaled distance d_scaled does not change with depth, so measure it on a deep network. Quotients that
    are whole but for rounding are not rounded up: 0.07 / 0.01 gives 7.

    Args:
        distance: Scaled distance d_scaled of the section.
        eps: The mean scaled perturbation to reach.

    Raises:
        ValueError: If the distance is negative or not finite, or eps not positive.

    Source: P2 (Hauser 2019), section 3.5.1. Its printed predictions are exchanged between the two data sets.
    """
    if not (0 <= distance < math.inf and 0 < eps < math.inf):
        raise ValueError(f"stopping_depth: needs distance >= 0 and eps > 0, both finite; given {distance} and {eps}")
    return math.ceil(distance / eps - 1e-9)


def depth_advice(profile: Profile, *, eps: float = 0.1) -> dict[str, object]:
    """How many blocks each section needs for a mean scaled perturbation of eps: a range, and why it is one.

    With the scaled distance d of a section, measured at its L0 blocks: "fixed_distance" `d / eps` if d stays the same
    at other depths, "square_root" `d^2 / (L0 eps^2)` if it grows like sqrt(L), as at initialisation. Rounded up.

    Args:
        profile: A profile that has "scaled_perturbation".
        eps: The mean scaled perturbation to reach; 0.1 as in P2.

    Returns:
        {"eps", "sentence", "sections": [{"section", "blocks", "scaled_distance", "fixed_distance", "square_root"}]},
        ready for JSON; sections without blocks or without a finite distance are left out.

    Source: P2 (Hauser 2019), section 3.5.1, for the fixed distance; the square-root law is that of the null model.
    """
    distances = indices(profile)["scaled_distance"]["sections"] if "scaled_perturbation" in profile.measures else []
    rows = [
        {
            "section": name,
            "blocks": blocks,
            "scaled_distance": distance,
            "fixed_distance": stopping_depth(distance, eps),
            "square_root": stopping_depth(distance**2 / blocks, eps**2),
        }
        for name, blocks, distance in zip(profile.sections, profile.lengths, distances, strict=False)
        if blocks and distance is not None
    ]
    return {"eps": eps, "sentence": ADVICE, "sections": rows}
