"""Butcher tableaus that check themselves: row sums, and every order condition up to the order they claim."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod, sqrt

import numpy as np

# A rooted tree is the sorted tuple of the trees that hang on its root; () is a single node.
_Tree = tuple[tuple, ...]
_TOLERANCE = 1e-12
_HIGHEST = 8  # 200 trees


@dataclass(frozen=True)
class Tableau:
    """A Runge-Kutta method: `Y_i = h + dt sum_j a_ij f(Y_j)`, and the next state `h + dt sum_i b_i f(Y_i)`.

    A tableau that is built is right: its nodes are its row sums, and all order conditions up to its order hold.

    Attributes:
        name: What the method is called.
        a: Coefficients of the stages, one row each.
        b: Weights.
        c: Nodes, the row sums of a.
        order: p: the error of one step is O(dt^(p + 1)), that at a fixed time O(dt^p). From 1 to 8.

    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, theorem II.2.13 (order conditions).
    """

    name: str
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int

    def __post_init__(self) -> None:
        stages = len(self.b)
        if not stages or len(self.c) != stages or [len(row) for row in self.a] != [stages] * stages:
            raise ValueError(f"tableau {self.name}: a must be square, with one weight b and one node c per row")
        for i, (row, node) in enumerate(zip(self.a, self.c, strict=True)):
            if not abs(sum(row) - node) <= _TOLERANCE:
                raise ValueError(
                    f"tableau {self.name}: row {i + 1} of a sums to {sum(row):.15g}, its node is {node:.15g}"
                )
        _check_order(self.name, self.order, (self, self))

    @property
    def adjoint(self) -> "Tableau":
        """The method whose step of -dt undoes a step of dt: `a*_ij = b_(s+1-j) - a_(s+1-i)(s+1-j)`, b reversed.

        Source: Hairer, Lubich, Wanner, Geometric Numerical Integration, theorem V.1.5 (there with weights b_j).
        """
        a, b = np.array(self.a)[::-1, ::-1], np.array(self.b)[::-1]
        return tableau(f"adjoint of {self.name}", b - a, b, self.order)


@dataclass(frozen=True)
class PartitionedTableau:
    """Two tableaus for `y' = f(z)`, `z' = g(y)`: `Y_i = y + dt sum_j a_ij f(Z_j)`, `Z_i = z + dt sum_j A_ij g(Y_j)`.

    Attributes:
        name: What the method is called.
        y: Tableau (a, b) of the first state.
        z: Tableau (A, B) of the second state.
        order: The order of both together on systems of this form; it is checked, too.

    Source: Hairer, Lubich, Wanner, Geometric Numerical Integration, sections II.2.1 and III.2.
    """

    name: str
    y: Tableau
    z: Tableau
    order: int

    def __post_init__(self) -> None:
        if len(self.y.b) != len(self.z.b):
            raise ValueError(f"tableau {self.name}: its parts have {len(self.y.b)} and {len(self.z.b)} stages")
        _check_order(self.name, self.order, (self.y, self.z))

    @property
    def adjoint(self) -> "PartitionedTableau":
        """The method whose step of -dt undoes a step of dt."""
        return PartitionedTableau(f"adjoint of {self.name}", self.y.adjoint, self.z.adjoint, self.order)


def tableau(
    name: str, a: Sequence[Sequence[float]] | np.ndarray, b: Sequence[float] | np.ndarray, order: int
) -> Tableau:
    """A tableau with its row sums as nodes.

    Args:
        name: What the method is called.
        a: Coefficients of the stages.
        b: Weights.
        order: The order that it claims.

    Raises:
        ValueError: If an order condition does not hold.
    """
    rows = tuple(tuple(float(value) for value in row) for row in a)
    return Tableau(name, rows, tuple(float(value) for value in b), tuple(map(sum, rows)), order)


def collocation(name: str, nodes: Sequence[float], order: int) -> Tableau:
    """The collocation method with these nodes: `sum_j a_ij c_j^k = c_i^(k+1) / (k+1)`, likewise b up to 1.

    Args:
        name: What the method is called.
        nodes: Different numbers, usually in [0, 1].
        order: The order that it claims.

    Raises:
        ValueError: If an order condition does not hold.

    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, theorem II.7.7.
    """
    c, powers = np.array(nodes, dtype=float), np.arange(len(nodes))
    vandermonde = c[None] ** powers[:, None]
    ends = np.append(c, 1.0)
    rows = np.linalg.solve(vandermonde, (ends[None] ** (powers[:, None] + 1)) / (powers[:, None] + 1)).T
    return Tableau(name, tuple(map(tuple, rows[:-1].tolist())), tuple(rows[-1].tolist()), tuple(c.tolist()), order)


def symplectic_pair(name: str, z: Tableau, order: int) -> PartitionedTableau:
    """The partitioned method that is symplectic with this one for z: `a_ij = b_j - b_j A_ji / b_i`, the same weights.

    Args:
        name: What the method is called.
        z: Tableau of the second state; no weight is 0.
        order: The order that both together claim.

    Raises:
        ValueError: If an order condition does not hold.

    Source: Hairer, Lubich, Wanner, Geometric Numerical Integration, theorem IV.2.4.
    """
    a, b = np.array(z.a), np.array(z.b)
    return PartitionedTableau(name, tableau(f"partner of {z.name}", b - b * a.T / b[:, None], b, order), z, order)


def _check_order(name: str, order: int, pair: tuple[Tableau, Tableau]) -> None:
    if not 1 <= order <= _HIGHEST:
        raise ValueError(f"tableau {name} claims order {order}; orders from 1 to {_HIGHEST} can be checked")
    for nodes in range(1, order + 1):
        for tree in _trees(nodes):
            for root in (0, 1):
                value, wanted = float(np.dot(pair[root].b, _weights(tree, pair, root))), 1 / _density(tree)
                if not abs(value - wanted) <= _TOLERANCE:
                    raise ValueError(
                        f"tableau {name} claims order {order}, but a condition of order {nodes} does not hold: "
                        f"{value:.15g} in place of {wanted:.15g}"
                    )


@cache
def _trees(nodes: int) -> tuple[_Tree, ...]:
    """All rooted trees of so many nodes: those of one less, with a leaf on every one of their nodes."""
    if nodes == 1:
        return ((),)
    return tuple(sorted({grown for tree in _trees(nodes - 1) for grown in _grown(tree)}))


def _grown(tree: _Tree) -> list[_Tree]:
    found = [tuple(sorted((*tree, ())))]
    for i, part in enumerate(tree):
        found += [tuple(sorted((*tree[:i], grown, *tree[i + 1 :]))) for grown in _grown(part)]
    return found


def _size(tree: _Tree) -> int:
    return 1 + sum(map(_size, tree))


def _density(tree: _Tree) -> int:
    """gamma(t): the size of the tree times the densities of what hangs on its root."""
    return _size(tree) * prod(map(_density, tree))


def _weights(tree: _Tree, pair: tuple[Tableau, Tableau], root: int) -> np.ndarray:
    """Elementary weights per stage; a slope of one part sees stages of the other part, so the parts alternate."""
    other = 1 - root
    factors = [np.array(pair[other].a) @ _weights(part, pair, other) for part in tree]
    return np.prod([np.ones(len(pair[root].b)), *factors], axis=0)


_S3, _S6, _S15 = sqrt(3), sqrt(6), sqrt(15)
_G = 1 - 1 / sqrt(2)  # Alexander 1977
_D = (3 + _S3) / 6  # Crouzeix; Norsett 1974

EULER = tableau("euler", [[0.0]], [1.0], 1)
BACKWARD_EULER = tableau("backward euler", [[1.0]], [1.0], 1)
HEUN = tableau("heun", [[0.0, 0.0], [1.0, 0.0]], [1 / 2, 1 / 2], 2)
RK4 = tableau(
    "rk4",
    [[0.0] * 4, [0.5, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]],
    [1 / 6, 1 / 3, 1 / 3, 1 / 6],
    4,
)
GAUSS2 = collocation("gauss2", [1 / 2], 2)
GAUSS4 = collocation("gauss4", [1 / 2 - _S3 / 6, 1 / 2 + _S3 / 6], 4)
GAUSS6 = collocation("gauss6", [1 / 2 - _S15 / 10, 1 / 2, 1 / 2 + _S15 / 10], 6)
RADAU3 = collocation("radau3", [1 / 3, 1.0], 3)
RADAU5 = collocation("radau5", [(4 - _S6) / 10, (4 + _S6) / 10, 1.0], 5)
TRAPEZOID = collocation("trapezoid", [0.0, 1.0], 2)
LOBATTO4 = collocation("lobatto4", [0.0, 0.5, 1.0], 4)
DIRK2 = tableau("dirk2", [[_G, 0.0], [1 - _G, _G]], [1 - _G, _G], 2)
DIRK3 = tableau("dirk3", [[_D, 0.0], [1 - 2 * _D, _D]], [1 / 2, 1 / 2], 3)
SYMPLECTIC_EULER = PartitionedTableau("symplectic euler", BACKWARD_EULER, EULER, 1)
STOERMER_VERLET = symplectic_pair("stoermer-verlet", TRAPEZOID, 2)
LOBATTO_PAIR4 = symplectic_pair("lobatto pair", LOBATTO4, 4)

_ALL = (EULER, BACKWARD_EULER, HEUN, RK4, GAUSS2, GAUSS4, GAUSS6, RADAU3, RADAU5, TRAPEZOID, LOBATTO4, DIRK2, DIRK3)
_ALL_PAIRS = (SYMPLECTIC_EULER, STOERMER_VERLET, LOBATTO_PAIR4)
TABLEAUS = {made.name.replace(" ", "-"): made for made in (*_ALL, *_ALL_PAIRS)}
