"""Is a network iterative and convergent? The three indices of P0, with intervals, and what tells it without labels."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from residuum.answers import GUESSING
from residuum.draws import means_of_draws
from residuum.probes.passive import ratio
from residuum.profiles import Profile
from residuum.readings import finite

_ENTRIES_AT_ONCE = 2**22  # entries of the table of draws that are held in float64 at once


def convergence_indices(
    profile: Profile, *, by: str = "accuracy", level: float = 0.95, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """How convergent, recurrent and divergent each section of a network is.

    With e(k) the error of the network changed by k, e(0) its own and e_chance that of guessing:
    `x(k) = clip((e(k) - e(0)) / (e_chance - e(0)), 0, 1)`, `AUC = mean_k x(k)`, in [0, 1].

    - "convergence": 1 - AUC of dropping the last k blocks, k = 1 .. all. 1: the answer is there from the start; 0:
      every block is needed.
    - "recurrence": 1 - AUC of replacing block t by t', over all pairs. 1 if all blocks do the same.
      "recurrence_shuffle" (k blocks change places) and "recurrence_drop_first" (the first k blocks left out; for equal
      blocks the same as "convergence") are secondary readings.
    - "drop_gap": |AUC(drop first) - AUC(drop last)|, 0 for equal blocks. Its interval is that of the difference in
      the direction in which it was found; where it reaches below 0 even the direction is not certain.
    - "divergence": AUC of running the last block k more times, k = 1 .. number of blocks (or as many as were
      measured). 0: stable under further iteration; 1: the answer is lost.

    An iterative convergent network has the first two near 1 and the third near 0. A network of identity blocks has
    them too, so read them beside the companions and beside the network at initialisation. Undefined if e(0) is within
    0.02 of chance or above; "recurrence" also for sections of one block. Each is left out if it was not measured.

    Args:
        profile: A profile of `interventions(drops_last, drops_first, replacements, shuffles, unrolls)`, or some.
        by: "accuracy": errors are wrong labels; several labels count as right only if all are. "agreement": errors
            are answers other than the network's own, which needs no labels; then e(0) = 0. A network that gives nearly
            all examples the same answer, as untrained ones do, agrees with itself whatever its blocks do: it looks
            convergent and recurrent by agreement. Look at "agreement" of `readouts` at the first state.
        level: Part of the draws that intervals hold.
        draws: Draws of the bootstrap over examples; the same draws are used for all indices and networks, so their
            differences are paired.
        seed: Seed of the draws.

    Returns:
        Ready for JSON, by index: {"sections": [estimate or None], "network": estimate or None}, where the network's is
        the mean of its sections and an estimate is {"value", "low", "high", "undefined_draws"}; besides,
        "intact_error" and "chance_error".

    Raises:
        ValueError: If the profile has no interventions, `by` is something else, or level or draws are out of range.

    Source: P0 (Lippl et al. 2024). Names and normalisation are reconstructed: the definitions could not be read.
    """
    if by not in ("accuracy", "agreement"):
        raise ValueError(f"convergence_indices: by is {by!r}; allowed are 'accuracy' and 'agreement'")
    if "chance" not in profile.measures or (by == "accuracy" and "intact_accuracy" not in profile.measures):
        raise ValueError(
            "convergence_indices: the profile has no interventions"
            + (" with labels" if "chance" in profile.measures else "")
            + "; measure it with interventions(drops_last, replacements, unrolls), "
            "or give by='agreement' where there are no labels"
        )
    sample = _Sample.of(profile, draws, level, seed)
    chance = 1 - sample.means("chance")
    own = 1 - sample.means("intact_accuracy") if by == "accuracy" else torch.zeros_like(chance)
    room = (chance - own).masked_fill(chance - own <= GUESSING, torch.nan)

    areas: dict[str, Float64[Tensor, "draw section"]] = {}
    for intervention in ("drop_last", "drop_first", "replace", "shuffle", "unroll_1"):
        name = f"{intervention}_{by}"
        if name in profile.measures:
            excess = ((1 - sample.means(name) - own) / room).clamp(0, 1)
            areas[intervention] = sample.by_section(name, excess)
    found = {
        "convergence": 1 - areas["drop_last"] if "drop_last" in areas else None,
        "recurrence": 1 - areas["replace"] if "replace" in areas else None,
        "recurrence_shuffle": 1 - areas["shuffle"] if "shuffle" in areas else None,
        "recurrence_drop_first": 1 - areas["drop_first"] if "drop_first" in areas else None,
        "drop_gap": _oriented(areas["drop_first"] - areas["drop_last"])
        if {"drop_first", "drop_last"} <= set(areas)
        else None,
        "divergence": areas.get("unroll_1"),
    }
    errors = {"intact_error": finite(own[0].item()), "chance_error": finite(chance[0].item())}
    return {name: sample.index(table) for name, table in found.items() if table is not None} | errors


def _oriented(difference: Float64[Tensor, "draw section"]) -> Float64[Tensor, "draw section"]:
    """Differences turned so that estimates (row 0) are positive: absolute values near 0 would lie above them."""
    return difference * torch.where(difference[0] < 0, -1.0, 1.0)


def companions(profile: Profile, *, level: float = 0.95, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """What tells a converging path without any error: read beside `convergence_indices`, and from the same draws.

    Whichever the profile has values for, per section of T blocks:

    - "remaining_distance": mean of `|h_t - h_T| / |h_0 - h_T|` over t = 1 .. T (of `pairs`). Near 0: there at once;
      (T - 1) / (2 T): moves evenly along a line; `mean_t (r^t - r^T) / (1 - r^T)`: a contraction by r.
    - "last_step": |f_T| / |f_1|, of `perturbation`. Much below 1: steps die out. Not for sections of one block.
    - "turning": mean cosine of successive updates (of `update_angle`). 1: one direction; 0: unrelated steps.
    - "changed_labels": how many of its T blocks change the answer (of `readouts`).

    Args:
        profile: What was measured.
        level: Part of the draws that intervals hold.
        draws: Draws of the bootstrap over examples.
        seed: Seed of the draws.

    Returns:
        As `convergence_indices`.

    Raises:
        ValueError: If level or draws are out of range.

    Source: ours, beside the indices of P0 (Lippl et al. 2024).
    """
    sample = _Sample.of(profile, draws, level, seed)
    found = {}
    if "distance_to_last" in profile.measures:
        found["remaining_distance"] = sample.by_section("distance_to_last", sample.means("distance_to_last"), first=1)
    if "perturbation" in profile.measures:
        found["last_step"] = _last_step(sample)
    if "update_angle" in profile.measures:
        found["turning"] = sample.by_section("update_angle", sample.means("update_angle"))
    if "label_change" in profile.measures:
        lengths = torch.tensor(profile.lengths, dtype=torch.float64)
        found["changed_labels"] = lengths * sample.by_section("label_change", sample.means("label_change"), first=1)
    return {name: sample.index(table) for name, table in found.items()}


def _last_step(sample: "_Sample") -> Float64[Tensor, "draw section"]:
    """Mean over examples of |f_T| / |f_1|, per section."""
    steps = sample.profile.measures["perturbation"]
    table = torch.full((len(sample.times), len(sample.profile.sections)), torch.nan, dtype=torch.float64)
    for s, length in enumerate(sample.profile.lengths):
        if length > 1:
            first, last = (
                steps.values[:, next(c for c, p in enumerate(steps.points) if p[:2] == (s, i))] for i in (0, length - 1)
            )
            table[:, s] = sample.means_of(ratio(last, first)[:, None])[:, 0]
    return table


def best_scale(profile: Profile) -> dict[str, Any]:
    """The factor on extra steps of the last block that leaves the least loss after the last of them.

    Args:
        profile: A profile of training examples that has `interventions(partial(unrolls, scales=SCALES))`.

    Returns:
        Ready for JSON: "scale", None if no loss is finite; "loss": {scale: mean loss after the last step, None if any
        example's is infinite}; "exploded": {scale: part of the examples whose output is not finite any more}.

    Raises:
        ValueError: If the profile has no unrolled steps with labels.

    Source: P1 (Jastrzebski et al. 2018), section 4.4: "appropriate scaling", chosen on the training loss by us.
    """
    losses: dict[str, Tensor] = {}
    for name, found in profile.measures.items():
        if name.startswith("unroll_") and name.endswith("_loss"):
            last = max(range(len(found.points)), key=lambda c, found=found: found.points[c])
            losses[name.removeprefix("unroll_").removesuffix("_loss")] = found.values[:, last].double()
    if not losses:
        raise ValueError(
            "best_scale: the profile has no loss after extra steps; measure it with labels and interventions(unrolls)"
        )
    means = {scale: finite(values.nanmean().item()) for scale, values in losses.items()}
    known = {scale: mean for scale, mean in means.items() if mean is not None}
    return {
        "scale": float(min(known, key=known.__getitem__)) if known else None,
        "loss": means,
        "exploded": {scale: values.isinf().double().mean().item() for scale, values in losses.items()},
    }


@dataclass(frozen=True)
class _Sample:
    """A profile with draws of its examples: row 0 is every example once, the other rows are the bootstrap."""

    profile: Profile
    times: UInt8[Tensor, "draw example"]
    level: float

    @classmethod
    def of(cls, profile: Profile, draws: int, level: float, seed: int) -> "_Sample":
        if not 0 < level < 1 or draws < 1:
            raise ValueError(f"level must be between 0 and 1 and draws at least 1; given {level} and {draws}")
        n, generator = len(profile.examples), torch.Generator().manual_seed(seed)
        rows = [torch.randint(n, (n,), generator=generator).bincount(minlength=n).byte() for _ in range(draws)]
        return cls(profile, torch.stack([torch.ones(n, dtype=torch.uint8), *rows]), level)

    def means(self, name: str) -> Float64[Tensor, "draw point"]:
        """Mean of a quantity in every draw."""
        return self.means_of(self.profile.measures[name].values)

    def means_of(self, values: Float[Tensor, "example point"]) -> Float64[Tensor, "draw point"]:
        size = max(1, _ENTRIES_AT_ONCE // max(1, len(values)))
        return torch.cat([means_of_draws(values, times) for times in self.times.split(size)])

    def by_section(
        self, name: str, table: Float64[Tensor, "draw point"], *, first: int = 0
    ) -> Float64[Tensor, "draw section"]:
        """Mean over the points of each section, from an index on; states beyond twice the blocks are left out."""
        sections = []
        for s, length in enumerate(self.profile.lengths):
            points = enumerate(self.profile.measures[name].points)
            columns = [c for c, p in points if p.section == s and first <= p.index <= 2 * length]
            sections.append(table[:, columns].mean(1))
        return torch.stack(sections, 1)

    def index(self, table: Float64[Tensor, "draw section"]) -> dict[str, Any]:
        """Each section, and the mean of those that have a value."""
        sections = [self._estimate(column) for column in table.unbind(1)]
        return {"sections": sections, "network": self._estimate(table.nanmean(1))}

    def _estimate(self, column: Float64[Tensor, " draw"]) -> dict[str, float | int | None] | None:
        if column[0].isnan():
            return None
        tail = (1 - self.level) / 2
        low, high = column[1:].nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        undefined = int(column[1:].isnan().sum())
        return {"value": column[0].item(), "low": finite(low), "high": finite(high), "undefined_draws": undefined}
