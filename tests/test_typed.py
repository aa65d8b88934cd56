"""Types are checked at the first calls in each test, and in the next test again."""

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

import typed


@jaxtyped(typechecker=typed.checked)
def total(x: Float[Tensor, "n d"], weights: Float[Tensor, " n"]) -> Float[Tensor, " d"]:
    return weights @ x if x.ndim == 2 else x


class Sized:
    @property
    @jaxtyped(typechecker=typed.checked)
    def size(self) -> int:
        return "three"  # type: ignore[return-value]


def test_first_calls_are_checked_and_in_the_next_test_again() -> None:
    right, wrong = (torch.ones(2, 3), torch.ones(2)), (torch.ones(2, 3), torch.ones(3))
    for _ in range(2):
        with pytest.raises(TypeCheckError, match="weights"):
            total(*wrong)
        for _ in range(2 * typed.CALLS):
            total(*right)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):  # torch's own: it is asked no more
            total(*wrong)
        typed.begin()


def test_returned_values_and_properties_are_checked() -> None:
    for _ in range(3):
        with pytest.raises(TypeCheckError, match="return"):
            Sized().size  # noqa: B018
