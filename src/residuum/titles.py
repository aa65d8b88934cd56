"""The conclusion above each chart of the report, worked out from its numbers."""

from collections.abc import Callable, Sequence
from math import exp, fsum, inf
from statistics import fmean
from typing import Any

from residuum.answers import GUESSING
from residuum.changed import intact, kind
from residuum.conclusions import Lengths, costs, power
from residuum.readings import Table, cosine, listed, number, percent, place, shortened, whole
from residuum.schedules import last_section

SAME = 0.01  # an early exit within one point of the final accuracy is "as good"


def mean_of(table: Table, quantity: str) -> float:
    """The mean over all points."""
    values = [value.mean for value in table[quantity].values()]
    return sum(values) / len(values)


def distance(table: Table, section: int | None = None) -> float:
    """Scaled distance: the sum of the scaled perturbations of one section, or of all."""
    steps = table["scaled_perturbation"].items()
    return fsum(value.mean for (s, _, _), value in steps if section in (None, s))


def settled(table: Table, quantity: str = "accuracy") -> tuple[int, int]:
    """The first state from which on an early exit is never worse than the last one by more than one point."""
    states = sorted((s, i, value.mean) for (s, i, _), value in table[quantity].items())
    final, first = states[-1][2], states[-1][:2]
    for s, i, value in reversed(states):
        if value < final - SAME:
            break
        first = (s, i)
    return first


def blocks_until(state: tuple[int, int], lengths: Lengths) -> int:
    """How many blocks have run when the network is in a state."""
    return sum(lengths[: state[0]]) + state[1]


def half_way(table: Table, section: int) -> int | None:
    """After how many blocks a section stays within half of its way to its last state; None where that is undefined."""
    curve = [value.mean for (s, _, _), value in sorted(table["distance_to_last"].items()) if s == section]
    return next((i for i in range(len(curve)) if all(left <= 0.5 for left in curve[i:])), None)


def step(trained: Table, initial: Table | None, before: str) -> str:
    """Of the chart of scaled perturbations."""
    mean = mean_of(trained, "scaled_perturbation")
    text = f"A block changes the state by {percent(mean)} of its length on average"
    if not initial or "scaled_perturbation" not in initial:
        return text
    fresh = mean_of(initial, "scaled_perturbation")
    ratio = mean / fresh if fresh else inf if mean else 1.0
    word = "about as much as" if 0.9 <= ratio <= 1.1 else "less than" if ratio < 1 else "more than"
    return f"{text}, {word} {before} ({percent(fresh)})"


def sums(trained: Table, lengths: Lengths) -> str:
    """Of the chart of running sums."""
    if len(lengths) == 1:
        return f"Added up, the steps come to {number(distance(trained))} times the length of the state"
    parts = [f"{number(distance(trained, s))} in section {s + 1}" for s in range(len(lengths))]
    return f"Added up, the steps come to {listed(parts)}, in lengths of the state"


def accuracy(trained: Table, lengths: Lengths) -> str:
    """Of the chart of early exits."""
    final = trained["accuracy"][max(trained["accuracy"])].mean
    right = percent(final)
    if "chance" in trained:
        guess = next(iter(trained["chance"].values())).mean
        if final - guess <= GUESSING:
            return f"Early exits tell little: the whole network is right for {right}, guessing for {percent(guess)}"
    good = f"the answers are as good as the final ones ({right} right), within one point"
    late = f"No early exit is as good as the end ({right} right)"
    return _settling(trained, lengths, "accuracy", good, f"{late}: stopping one block early costs more than one point")


def agreement(trained: Table, lengths: Lengths) -> str:
    """Of the chart of agreement with the final answer."""
    good, late = "at least 99\u00a0% of the answers are the final ones", "The last block still changes answers"
    return _settling(trained, lengths, "agreement", good, f"{late}: more than 1\u00a0% of them")


def _settling(trained: Table, lengths: Lengths, quantity: str, good: str, late: str) -> str:
    where, total = settled(trained, quantity), sum(lengths)
    run = blocks_until(where, lengths)
    if run == total:
        return late
    if where[1]:
        start = f"After block {place(where[0], where[1] - 1, lengths)}"
    else:
        start = f"At the entry of section {where[0] + 1}" if len(lengths) > 1 else "Before the first block"
    return f"{start}, with {run} of {total} blocks run, {good}"


def loss(trained: Table, lengths: Lengths) -> str:
    """Of the chart of losses."""
    values = trained["loss"]
    steps = [values[s, i + 1, n].mean - value.mean for (s, i, n), value in values.items() if (s, i + 1, n) in values]
    first, last = values[min(values)].mean, values[max(values)].mean
    falls = sum(change < 0 for change in steps)
    text = f"{falls} of {len(steps)} blocks lower the loss of an early exit"
    if number(first) == number(last):
        return f"{text}, which hardly changes from the first ({number(first)}) to the last"
    return f"{text}, from {number(first)} to {number(last)}"


def angle(trained: Table, lengths: Lengths) -> str:
    """Of the chart of angles between updates."""
    values = list(trained["update_angle"].values())
    if len(values) == 1:
        return f"The one block that follows another has a cosine of {cosine(values[0].mean)} with it"
    on = sum(value.mean > max(0.1, 2 * value.stderr) for value in values)
    back = sum(value.mean < -max(0.1, 2 * value.stderr) for value in values)
    kinds = {
        "lean towards the direction of the block before": on,
        "lean against the direction of the block before": back,
        "take a new direction, nearly at right angles to the block before": len(values) - on - back,
    }
    word, most = max(kinds.items(), key=lambda kind: kind[1])
    return f"{most} of {len(values)} blocks {word} (mean cosine {cosine(mean_of(trained, 'update_angle'))})"


def last(trained: Table, lengths: Lengths) -> str:
    """Of the chart of distances to a section's last state."""
    halves = [(s, half_way(trained, s)) for s in range(len(lengths))]
    parts = [
        f"{half} of {lengths[s]} blocks" + (f" in section {s + 1}" if len(lengths) > 1 else "")
        for s, half in halves
        if half is not None and lengths[s] > 1
    ]
    if max(lengths) == 1:
        return "Every section has one block, which goes all of its way"
    return f"Half of the way to the last state is done after {listed(parts)}" if parts else "The state does not move"


def cuts(trained: Table, lengths: Lengths) -> str:
    """Of the chart of runs of consecutive blocks."""
    singles = {key: value.mean for key, value in trained["angular_distance"].items() if key[2] == 1}
    (section, index, _), least = min(singles.items(), key=lambda item: item[1])
    size = "by less than 0.01\u00a0% of" if least < 1e-4 else f"by {percent(least)} of"
    return f"Block {place(section, index, lengths)} turns the state least, {size} a half turn"


def pull(trained: Table, lengths: Lengths) -> str:
    """Of the chart of cosines between updates and the gradient of the loss."""
    values = list(trained["gradient_cosine"].values())
    down = sum(value.mean < -2 * value.stderr for value in values)
    mean = cosine(mean_of(trained, "gradient_cosine"))
    text = f"{down} of {len(values)} updates point downhill on the loss (mean cosine {mean})"
    if "loss_change" not in trained:
        return text
    useful = sum(value.mean < -2 * value.stderr for value in trained["loss_change"].values())
    return f"{text}; {useful} lower it when the whole block is left in instead of out"


def without(trained: Table, lengths: Lengths) -> str:
    """Of the chart of answers without one block."""
    (section, index, _), worst = min(trained[f"drop_{kind(trained)}"].items(), key=lambda item: item[1].mean)
    name, whole = place(section, index, lengths), intact(trained, kind(trained)).mean
    if kind(trained) == "agreement":
        return f"Without block {name}, {percent(1 - worst.mean)} of the answers change, the most of all blocks"
    return f"Without block {name}, {percent(worst.mean)} of the answers are right; with all blocks {percent(whole)}"


def twice(trained: Table, lengths: Lengths) -> str:
    """Of the chart of answers with one block run twice."""
    values = trained[f"repeat_2_{kind(trained)}"]
    whole = intact(trained, kind(trained)).mean
    (section, index, _), worst = min(values.items(), key=lambda item: item[1].mean)
    harmless = sum(value.mean >= whole - SAME for value in values.values())
    text = f"{harmless} of {len(values)} blocks can run twice at a cost of no more than one point"
    if harmless == len(values):
        return text
    return f"{text}; block {place(section, index, lengths)} {costs(whole - worst.mean)}"


def direct(trained: Table, lengths: Lengths) -> str:
    """Of the chart of cosines with the gradient of the loss that the readout gives right at the state."""
    values = list(trained["plugin_gradient_cosine"].values())
    down = sum(value.mean < -2 * value.stderr for value in values)
    mean = cosine(mean_of(trained, "plugin_gradient_cosine"))
    return f"Read off right there, {down} of {len(values)} updates point downhill (mean cosine {mean})"


def stretch(trained: Table, lengths: Lengths) -> str:
    """Of the chart of local Lipschitz constants, with the bounds where there are some."""
    values, bounds = trained["update_lipschitz"], trained.get("update_lipschitz_bound", {})
    small = sum(value.mean < 1 for value in values.values())
    most = max(value.mean for value in values.values())
    text = f"Updates stretch small changes up to {number(most)} times; {small} of {len(values)} shrink them, on average"
    if not bounds:
        return f"{text}, no upper bound is known"
    proved = sum(value.mean < 1 for value in bounds.values())
    return f"{text}, {proved} by proof"


def steepness(trained: Table, lengths: Lengths) -> str:
    """Of the chart of gradient norms: from the first block to the last section, or to the last block."""
    ratios = trained.get("gradient_ratio")
    if ratios:
        found, end = ratios[min(ratios)].mean, "the last section"
    else:
        norms = trained["gradient_norm"]
        first, last = norms[min(norms)].mean, norms[max(norms)].mean
        if not last:
            return "The gradient of the loss is zero at the last block"
        found, end = first / last, "the last block"
    start = "At the first block the gradient of the loss"
    if 0.9 <= found <= 1.1:
        return f"{start} is about as long as at {end if ratios is None else f'the first of {end}'}"
    return f"{start} is {number(found)} times as long as at {f'the first of {end}' if ratios else end}"


def tail(trained: Table, lengths: Lengths) -> str:
    """Of the chart of growth through the rest of the network."""
    values = trained["log_tail_product"]
    value, start = values[min(values)], "From the first state to the last, small changes"
    if abs(value.mean) < 0.05:
        return f"{start} grow at most to about their own size"
    tens = power(value).mean
    if tens > 4:
        return f"{start} may grow 10 to the power of {tens:.1f} times"
    if tens > 0:
        return f"{start} may grow up to {number(exp(value.mean))} times"
    return f"{start} shrink to {percent(exp(value.mean))} or less"


Title = Callable[[Table, Lengths], str]
TITLES: dict[str, Title] = {
    "distance": sums,
    "accuracy": accuracy,
    "loss": loss,
    "agreement": agreement,
    "angle": angle,
    "last": last,
    "cuts": cuts,
    "pull": pull,
    "without": without,
    "twice": twice,
    "direct": direct,
    "steepness": steepness,
    "stretch": stretch,
    "tail": tail,
}


def depth(advice: Sequence[dict[str, Any]], eps: float) -> str:
    """Of the chart of depth ranges."""
    has, fixed, root = (sum(row[field] for row in advice) for field in ("blocks", "fixed_distance", "square_root"))
    low, high = sorted((fixed, root))
    span = f"{low} to {high}" if low < high else f"{low}"
    why = "depending on how distance grows with depth"
    return f"A mean step of {whole(eps)} would take {span} blocks, {why}; there are {has}"


def training(history: Sequence[dict[str, Any]]) -> str:
    """Of the chart of training."""
    final = history[-1]
    return (
        f"After {final['epoch']} epochs the network is right on {percent(final['test_accuracy'])} of the test examples"
    )


def _settled_part(table: Table, lengths: Lengths, quantity: str = "accuracy") -> float:
    return blocks_until(settled(table, quantity), lengths) / sum(lengths)


def _half_part(table: Table, lengths: Lengths) -> float:
    section = last_section(lengths)
    half = half_way(table, section)
    return 0.0 if half is None else half / lengths[section]


def _good(table: Table, change: str) -> float:
    """Mean part of good answers of changed networks: right ones, or unchanged ones where there are no labels."""
    return mean_of(table, f"{change}_accuracy" if f"{change}_accuracy" in table else f"{change}_agreement")


# What is compared under each chart: the beginning of the sentence, the number of one network, and how it is written.
COMPARED: dict[str, tuple[str, Callable[[Table, Lengths], float], Callable[[float], str]]] = {
    "step": ("Mean step of a block", lambda table, _: mean_of(table, "scaled_perturbation"), percent),
    "distance": ("All steps added up, in lengths of the state", lambda table, _: distance(table), number),
    "accuracy": ("Blocks until early exits are as good as the last", _settled_part, percent),
    "loss": ("Loss at the end", lambda table, _: table["loss"][max(table["loss"])].mean, number),
    "agreement": (
        "Blocks until 99\u00a0% of the answers are final",
        lambda table, lengths: _settled_part(table, lengths, "agreement"),
        percent,
    ),
    "angle": ("Mean cosine between successive updates", lambda table, _: mean_of(table, "update_angle"), cosine),
    "last": ("Blocks of the last section until half of its way is done", _half_part, percent),
    "pull": ("Mean cosine of update and loss gradient", lambda table, _: mean_of(table, "gradient_cosine"), cosine),
    "direct": (
        "Mean cosine with the gradient read off right there",
        lambda table, _: mean_of(table, "plugin_gradient_cosine"),
        cosine,
    ),
    "steepness": ("Mean length of the loss gradient", lambda table, _: mean_of(table, "gradient_norm"), number),
    "without": ("Good answers without one block, mean", lambda table, _: _good(table, "drop"), percent),
    "twice": ("Good answers with one block run twice, mean", lambda table, _: _good(table, "repeat_2"), percent),
    "tail": (
        "Growth from the first state to the last, as a power of ten",
        lambda table, _: power(min(table["log_tail_product"].items())[1]).mean,
        number,
    ),
    "stretch": ("Mean stretching by the updates", lambda table, _: mean_of(table, "update_lipschitz"), number),
}


def compared(key: str, networks: Sequence[tuple[str, Table, Lengths]]) -> str:
    """Of a chart with several networks: the number of each, or the extremes where there are more than four."""
    beginning, value, show = COMPARED[key]
    found = [(value(table, lengths), shortened(name, 40)) for name, table, lengths in networks]
    if len(found) > 4:
        return f"{beginning}: from {' to '.join(f'{show(v)} in {name}' for v, name in (min(found), max(found)))}"
    return f"{beginning}: {listed([f'{show(v)} in {name}' for v, name in found])}"


def law(networks: Sequence[tuple[str, Table, Lengths]]) -> str:
    """Of the chart of distances against depth: growth from the shallowest to the deepest networks, each in the mean."""
    depths = [sum(lengths) for *_, lengths in networks]
    low, high = min(depths), max(depths)
    few, many = (
        fmean(distance(table) for (_, table, _), depth in zip(networks, depths, strict=True) if depth == end)
        for end in (low, high)
    )
    growth = many / few
    return (
        f"From {low} to {high} blocks the scaled distance is multiplied by {number(growth)} "
        f"(1 if it were fixed, {number((high / low) ** 0.5)} under the square-root law)"
    )
