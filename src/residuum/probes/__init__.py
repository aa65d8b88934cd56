"""Probes: what can be measured on a stream. Functions that return values per example; `profiles.profile` averages them.

Passive probes look at one step of one forward and share it: `passive(perturbation, state_norm, update_angle)`. The
interventions share their prefixes: `interventions(drops, swaps)`. The others get a stream and its target.
"""

from residuum.probes.borderline import groups, margins, unrolled, unrolled_last
from residuum.probes.compare import collect, compare
from residuum.probes.gradient import gradients, loss_changes
from residuum.probes.intervene import (
    SCALES,
    drops,
    drops_first,
    drops_last,
    extra_runs,
    interventions,
    repeats,
    replacements,
    shuffles,
    swaps,
    unrolls,
)
from residuum.probes.pair import pairs
from residuum.probes.passive import PassiveProbe, first_not_finite, passive, perturbation, state_norm, update_angle
from residuum.probes.readout import misfit, readouts
from residuum.probes.spectral import lipschitz, settling

__all__ = [
    "SCALES",
    "PassiveProbe",
    "collect",
    "compare",
    "drops",
    "drops_first",
    "drops_last",
    "extra_runs",
    "first_not_finite",
    "gradients",
    "groups",
    "interventions",
    "lipschitz",
    "loss_changes",
    "margins",
    "misfit",
    "pairs",
    "passive",
    "perturbation",
    "readouts",
    "repeats",
    "replacements",
    "settling",
    "shuffles",
    "state_norm",
    "swaps",
    "unrolled",
    "unrolled_last",
    "unrolls",
    "update_angle",
]
