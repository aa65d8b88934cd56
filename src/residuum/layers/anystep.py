"""Any step: what the kinds of steps have in common, their names, and all that a step can be made of."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from residuum.layers.pairs import Additive, Leapfrog, Midpoint, Momentum, Verlet
from residuum.layers.steps import Explicit, RungeKutta, Theta, in_turn
from residuum.layers.tableaus import TABLEAUS, PartitionedTableau, Tableau
from residuum.linear import GMRES, BiCGStab, Dense, Neumann
from residuum.names import unknown
from residuum.solvers import Anderson, GradientDescent, NewtonKrylov, Picard

Step = Explicit | Theta | RungeKutta | Verlet | Additive | Leapfrog | Midpoint | Momentum

# What `descriptions.rebuilt` may build where a step is described.
_SOLVERS = (Picard, Anderson, NewtonKrylov, GradientDescent, Neumann, GMRES, BiCGStab, Dense)
STEPS = (*Step.__args__, Tableau, PartitionedTableau, *_SOLVERS)

_REBUILT = 1e-5  # a tenth of the drift that a reversible stack allows, which adds up over the blocks between anchors
# Steps by the names of the command line, with the setting that may follow the colon.
_NAMED = {
    "explicit": (Explicit, None),
    "theta": (Theta, "theta"),
    "rk": (RungeKutta, "tableau"),
    "verlet": (Verlet, "form"),
    "additive": (Additive, None),
    "leapfrog": (Leapfrog, None),
    "midpoint": (Midpoint, None),
    "momentum": (Momentum, "gamma"),
}


def step_of(text: str, *, dt: float | None = None, tol: float | None = None) -> Step:
    """A step by its name: explicit, theta:0.5, rk:gauss4, verlet, additive, leapfrog, midpoint, momentum:0.9.

    Args:
        text: The name; after a colon theta, a tableau of `TABLEAUS`, the form of Verlet, or gamma of momentum.
        dt: Step size; None is that of the step, 1.
        tol: Tolerance of the solver, `Anderson`; None is its own.

    Raises:
        ValueError: If there is no such step, what follows the colon is not its, or it has no step size or solver.
    """
    name, colon, value = text.partition(":")
    if name not in _NAMED:
        raise unknown("step", name, _NAMED)
    kind, setting = _NAMED[name]
    if (colon and setting is None) or (name == "rk" and not value):
        what = "nothing after a colon" if setting is None else f"a tableau after a colon: {', '.join(TABLEAUS)}"
        raise ValueError(f"step {text!r}: {name} takes {what}")
    given = {setting: _setting(text, setting, value)} if colon else {}
    given |= {} if dt is None else {"dt": dt}
    given |= {} if tol is None else {"solver": Anderson(tol)}
    made = kind(**given) if given.keys() <= {f.name for f in fields(kind)} else None
    if made is None or (tol is not None and not solves(made)):
        raise ValueError(f"step {text!r} has no {'step size' if made is None and dt is not None else 'solver'}")
    return made


def _setting(text: str, setting: str, value: str) -> Any:
    if setting == "form":
        return value
    if setting == "tableau":
        if value not in TABLEAUS:
            raise unknown("tableau", value, TABLEAUS)
        return TABLEAUS[value]
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"step {text!r}: {setting} must be a number, not {value!r}") from error


def check_network(step: Step, *, norm: str, widths: Sequence[int], reversible: bool) -> None:
    """Refuse a step that the blocks of a network cannot take.

    Raises:
        ValueError: If it solves an equation with batch norm in it, cannot halve the channels, or cannot be undone
            well enough.
    """
    name = type(step).__name__
    if solves(step) and norm == "batch":
        raise ValueError(f"{name} solves an equation, which batch norm changes; use norm 'group' or 'none'")
    if any(width % branches_of(step)[1] for width in widths):
        raise ValueError(f"{name} acts on halves of the channels, but widths are {tuple(widths)}")
    if not reversible:
        return
    if isinstance(step, Explicit):
        raise ValueError("Explicit has no inverse; reversible needs another step, as Verlet or Theta")
    if isinstance(step, Theta | RungeKutta) and (solves(step) or solves(step.inverse)):
        if norm == "batch":
            raise ValueError(f"the inverse of {name} solves an equation, which batch norm changes; use norm 'group'")
        if step.solver.tol > _REBUILT:
            raise ValueError(
                f"reversible rebuilds states by solving the equation backwards, to {_REBUILT:g} or better; tol of the "
                f"solver is {step.solver.tol:g}"
            )


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
