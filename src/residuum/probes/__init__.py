"""Probes: what can be measured on a stream. Functions that return values per example; `profiles.profile` averages them.

Passive probes look at one step of one forward and share it: `passive(perturbation, state_norm, update_angle)`. The
others get the stream of one batch and its target.
"""

from residuum.probes.pair import pairs
from residuum.probes.passive import PassiveProbe, passive, perturbation, state_norm, update_angle
from residuum.probes.readout import misfit, readouts

__all__ = ["PassiveProbe", "misfit", "pairs", "passive", "perturbation", "readouts", "state_norm", "update_angle"]
