"""Branches f for steps: dense, antisymmetric, convolutional, gradients of an energy. Any other module does as well."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from residuum.names import unknown


class Activation(NamedTuple):
    """An activation and its integral.

    Attributes:
        value: s(x).
        integral: S(x) with S' = s and S(0) = 0.
    """

    value: Callable[[Tensor], Tensor]
    integral: Callable[[Tensor], Tensor]


def _log_cosh(x: Tensor) -> Tensor:
    """`log cosh x`, which does not overflow."""
    return x.abs() + F.softplus(-2 * x.abs()) - F.softplus(torch.zeros_like(x))


ACTIVATIONS = {
    "tanh": Activation(torch.tanh, _log_cosh),
    "relu": Activation(torch.relu, lambda x: torch.relu(x).square() / 2),
    "identity": Activation(lambda x: x, lambda x: x.square() / 2),
}


def activation_of(name: str) -> Activation:
    """An activation by its name: tanh, relu or identity.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


class Dense(nn.Module):
    """`f(h) = s(h K + b)`, weights Glorot-uniform, b = 0.

    Args:
        width: Width of the state.
        activation: tanh, relu or identity.
    """

    def __init__(self, width: int, activation: str = "tanh") -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(width, width)))
        self.bias = nn.Parameter(torch.zeros(width))
        self.act = activation_of(activation)

    def forward(self, h: Float[Tensor, "*example width"]) -> Float[Tensor, "*example width"]:
        """The slope at a state."""
        return self.act.value(h @ self.weight + self.bias)


class Antisymmetric(nn.Module):
    """`f(h) = s(h (K - K^T) + b)`: where s' > 0 its Jacobian has an imaginary spectrum: states turn.

    K has width^2 free numbers, of which width (width - 1) / 2 matter; Glorot-uniform, b = 0.

    Args:
        width: Width of the state.
        activation: tanh, relu or identity.

    Source: Reshniak & Webster (P3), the network of both examples.
    """

    def __init__(self, width: int, activation: str = "tanh") -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(width, width)))
        self.bias = nn.Parameter(torch.zeros(width))
        self.act = activation_of(activation)

    def forward(self, h: Float[Tensor, "*example width"]) -> Float[Tensor, "*example width"]:
        """The slope at a state."""
        return self.act.value(h @ (self.weight - self.weight.mT) + self.bias)


class Convolution(nn.Module):
    """`f(h) = s(conv(h) + b)` with a 3x3 convolution that keeps the shape.

    Args:
        channels: Channels of the state.
        activation: tanh, relu or identity.
    """

    def __init__(self, channels: int, activation: str = "tanh") -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.act = activation_of(activation)

    def forward(self, h: Float[Tensor, "example channel row column"]) -> Float[Tensor, "example channel row column"]:
        """The slope at a state."""
        return self.act.value(self.conv(h))


class Gradient(nn.Module):
    """The gradient of an energy: `f(z) = sign * K^T s(K z + b)`, that of `sign * sum_i S(K z + b)_i` with S' = s.

    Args:
        width: Width of the state.
        hidden: Rows of K.
        activation: tanh, relu or identity.
        sign: 1 or -1.
    """

    def __init__(self, width: int, hidden: int, activation: str = "tanh", sign: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(hidden, width)))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.act, self.sign = activation_of(activation), sign

    def forward(self, z: Float[Tensor, "*example width"]) -> Float[Tensor, "*example width"]:
        """The slope at a state."""
        return self.sign * F.linear(self.act.value(F.linear(z, self.weight, self.bias)), self.weight.mT)

    def energy(self, z: Float[Tensor, "*example width"]) -> Float[Tensor, "*example"]:
        """`sum_i S(K z + b)_i` per example, without the sign."""
        return self.act.integral(F.linear(z, self.weight, self.bias)).sum(-1)


def hamiltonian(width: int, hidden: int, activation: str = "tanh") -> tuple[Gradient, Gradient]:
    """Branches f, g of `y' = K^T s(K z + b)`, `z' = -K^T s(K y + c)`, one K: a Hamiltonian system.

    It conserves `H(y, z) = f.energy(z) + g.energy(y)`: y' = dH/dz, z' = -dH/dy.

    Args:
        width: Width of y and of z.
        hidden: Rows of K.
        activation: tanh, relu or identity.
    """
    f, g = Gradient(width, hidden, activation), Gradient(width, hidden, activation, sign=-1.0)
    g.weight = f.weight
    return f, g


def hamiltonian_inspired(width: int, activation: str = "tanh") -> tuple[nn.Module, nn.Module]:
    """Branches f, g of the papers' `y' = s(K z + b)`, `z' = -s(K^T y + b)`: one K, one b; only inspired by mechanics.

    It is Hamiltonian where s is linear; else s(K z + b) is not the gradient of any function of z, in general, and no
    energy is known to be conserved.

    Args:
        width: Width of y and of z.
        activation: tanh, relu or identity.

    Source: Haber & Ruthotto 2017, as cited by P3 (Reshniak & Webster).
    """
    f = Dense(width, activation)
    return f, _MinusTransposed(f)


class _MinusTransposed(nn.Module):
    """`-s(h K^T + b)` with the weights of a dense branch."""

    def __init__(self, dense: Dense) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, h: Tensor) -> Tensor:
        return -self.dense.act.value(h @ self.dense.weight.mT + self.dense.bias)
