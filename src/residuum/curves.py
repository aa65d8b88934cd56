"""Curves over epochs: what a network would answer after each of its blocks, measured while it is trained."""

from torch import nn

from residuum.calls import evaluating
from residuum.data import ImageSet, Preparation
from residuum.probes import groups, margins, readouts
from residuum.profiles import Profile, profile
from residuum.readings import finite
from residuum.training import AfterEpoch, Row, batches_for

_QUANTITIES = ("accuracy", "loss", "entropy")


def watch(
    data: ImageSet, *, limit: int | None = 1000, preparation: Preparation | None = None, seed: int = 0
) -> AfterEpoch:
    """A function for `train(..., after_epoch=...)` that records what each block does to the answer after every epoch.

    Always on the same examples, with the network in eval mode; the network is left as it was. The row gets:

    - "curves": {quantity: {section: [mean at state 0, 1, ..]}}. The quantities are those of `readouts`: "accuracy" in
      [0, 1], "loss" and "entropy" in nats, and each of them over the "borderline" and the "correct" examples only, as
      "borderline_accuracy" and so on. None: no finite mean, as in a group without examples.
    - "watched": {"all": examples, "borderline": examples, "correct": examples}: over how many the means are.

    An example is borderline or correct by the answer that the network gives at that epoch (see `groups`), because the
    end of the training is not known yet. So examples change groups between epochs, "correct_accuracy" at the last state
    is always 1, and early on most examples are borderline because all classes are about equally probable. The groups
    that the paper shows are those of the trained network: apply `groups` to a profile of it.

    The last state of a section and the first of the next have the same answer, as in `readouts`. After a stop and with
    another `limit` the training goes on, so a history can hold rows with and without curves.

    Args:
        data: The examples, with labels.
        limit: At most so many of them, drawn with `seed`; None is all.
        preparation: The network's own preparation of pixels; None is the data set's.
        seed: Seed of the draw.

    Returns:
        The function. It raises what `profile` raises, for networks without blocks or that cannot be cut.

    Raises:
        ValueError: If `limit` is below 1.

    Source: P1 (Jastrzebski et al. 2018), figures 5 (accuracy after each block) and 6 (borderline examples).
    """
    chosen = data.take(limit, seed=seed)

    def after_epoch(model: nn.Module) -> Row:
        given = batches_for(model, chosen, preparation=preparation)
        with evaluating(model):
            parts = groups(profile(model, given, [readouts, margins]))
        curves = {
            name if group == "all" else f"{group}_{name}": _by_section(part, name)
            for group, part in parts.items()
            for name in _QUANTITIES
        }
        return {"curves": curves, "watched": {group: len(part.examples) for group, part in parts.items()}}

    return after_epoch


def _by_section(found: Profile, name: str) -> dict[str, list[float | None]]:
    """Means at the states of every section, in their order; None for what JSON cannot say."""
    points = found.measures[name].points
    means = [finite(mean) for mean in found.mean(name).tolist()]
    return {
        section: [mean for mean, point in zip(means, points, strict=True) if point.section == s]
        for s, section in enumerate(found.sections)
    }
