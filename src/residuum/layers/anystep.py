"""Any step: what the kinds of steps have in common, and how one is written to a file and read again."""

from dataclasses import fields, is_dataclass
from typing import Any

from residuum.layers.pairs import Additive, Leapfrog, Midpoint, Momentum, Verlet
from residuum.layers.steps import Explicit, RungeKutta, Theta, in_turn
from residuum.layers.tableaus import PartitionedTableau, Tableau
from residuum.linear import GMRES, BiCGStab, Neumann
from residuum.names import unknown
from residuum.solvers import Anderson, NewtonKrylov, Picard

Step = Explicit | Theta | RungeKutta | Verlet | Additive | Leapfrog | Midpoint | Momentum

_VALUES = (*Step.__args__, Tableau, PartitionedTableau, Picard, Anderson, NewtonKrylov, Neumann, GMRES, BiCGStab)
_KINDS = {kind.__name__: kind for kind in _VALUES}


def solves(step: Step) -> bool:
    """Whether blocks of a step solve an equation, so that their branches must treat examples one by one."""
    if isinstance(step, RungeKutta):
        return not in_turn(step.tableau)
    return isinstance(step, Theta) and step.theta > 0


def branches_of(step: Step) -> tuple[int, int]:
    """How many branches a block of a step takes, and into how many parts it cuts the channels for them."""
    if isinstance(step, RungeKutta):
        return (2, 2) if isinstance(step.tableau, PartitionedTableau) else (1, 1)
    if isinstance(step, Verlet | Additive):
        return 2, 2
    return 1, 1 if isinstance(step, Explicit | Theta) else 2


def described(value: Any) -> Any:
    """A step as JSON: its kind and its fields."""
    if is_dataclass(value):
        return {"kind": type(value).__name__} | {f.name: described(getattr(value, f.name)) for f in fields(value)}
    return [described(part) for part in value] if isinstance(value, tuple) else value


def rebuilt(written: Any) -> Any:
    """What `described` wrote, checked anew as it is built.

    Raises:
        ValueError: If it names a kind that is not known, or has a field that the kind has not.
    """
    if isinstance(written, list):
        return tuple(rebuilt(part) for part in written)
    if not isinstance(written, dict):
        return written
    given = {name: rebuilt(value) for name, value in written.items()}
    kind = given.pop("kind", None)
    if kind not in _KINDS:
        raise unknown("kind of step", str(kind), _KINDS)
    strange = given.keys() - {f.name for f in fields(_KINDS[kind])}
    if strange:
        raise ValueError(f"{kind} has no {sorted(strange)[0]!r}; it has {[f.name for f in fields(_KINDS[kind])]}")
    return _KINDS[kind](**given)
