"""Any step: what the kinds of steps have in common, and all that a step can be made of."""

from residuum.layers.pairs import Additive, Leapfrog, Midpoint, Momentum, Verlet
from residuum.layers.steps import Explicit, RungeKutta, Theta, in_turn
from residuum.layers.tableaus import PartitionedTableau, Tableau
from residuum.linear import GMRES, BiCGStab, Neumann
from residuum.solvers import Anderson, NewtonKrylov, Picard

Step = Explicit | Theta | RungeKutta | Verlet | Additive | Leapfrog | Midpoint | Momentum

# What `descriptions.rebuilt` may build where a step is described.
STEPS = (*Step.__args__, Tableau, PartitionedTableau, Picard, Anderson, NewtonKrylov, Neumann, GMRES, BiCGStab)


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
