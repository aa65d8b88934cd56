"""Means over examples that are drawn with replacement, for bootstrap intervals."""

import math

from jaxtyping import Float, Float64, Real
from torch import Tensor


def means_of_draws(
    values: Float[Tensor, "example column"], times: Real[Tensor, "draw example"]
) -> Float64[Tensor, "draw column"]:
    """The mean of each column in each draw, over the examples that have a value there.

    Args:
        values: One row per example; nan where undefined.
        times: How often each draw has each example.

    Returns:
        The means; nan where no example has a value, infinite where an infinite value was drawn, nan where both were.
    """
    values, times = values.double(), times.double()
    finite = values.isfinite()
    means = (times @ values.where(finite, 0)) / (times @ (~values.isnan()).double())
    if not finite.all():
        for end in (math.inf, -math.inf):
            means = means.where(times @ (values == end).double() == 0, means + end)
    return means
