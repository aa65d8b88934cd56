"""The conclusions above charts and tables of changed networks, of gradients, of settling and of iteration."""

from collections.abc import Iterable, Sequence
from math import exp, log10
from typing import Any

from residuum import changed
from residuum.answers import GUESSING
from residuum.changed import by_count, intact, kind
from residuum.readings import Table, Value, listed, number, percent, place
from residuum.schedules import last_section

Lengths = Sequence[int]
NAMES = ("convergence", "recurrence", "divergence")
_FEW = 10  # examples: what happens to fewer is no conclusion
_LOST = 25  # of 1000 draws: without more of them an interval of 95 % has no end


def good(table: Table) -> str:
    """What an answer is that counts as good."""
    return "right answers" if kind(table) == "accuracy" else "unchanged answers"


def cost(table: Table, values: Iterable[float]) -> float:
    """Good answers that the network has more than changed ones, on average; negative where the change helps."""
    found = list(values)
    return intact(table, kind(table)).mean - sum(found) / len(found)


def costs(lost: float, of: str = "") -> str:
    """A difference of good answers in words: 0.021 -> "costs 2.1 points of right answers".

    Args:
        lost: Part of the answers.
        of: Which answers; "" where the sentence has said it.
    """
    if abs(lost) < 0.0005:
        return f"costs no {of}" if of else "costs nothing"
    return f"{'costs' if lost > 0 else 'gains'} {100 * abs(lost):.1f}\u00a0points" + (f" of {of}" if of else "")


def ends(table: Table) -> str:
    """Of the chart of first and last blocks left out."""
    parts = [
        f"eaving out the {'first' if name == 'drop_first' else 'last'} blocks "
        + costs(_mean_cost(table, name), good(table))
        for name in ("drop_first", "drop_last")
        if by_count(table, name)
    ]
    return f"L{', l'.join(parts)}, on average over their number"


def shuffled(table: Table) -> str:
    """Of the chart of blocks in other places."""
    values = by_count(table, "shuffle")
    most = {s: max(k for section, k, _ in values if section == s) for s, _, _ in values}
    lost = cost(table, [values[s, k, 1].mean for s, k in most.items()])
    return f"With all blocks of a section in other places, the new order {costs(lost, good(table))}"


def swapped(table: Table) -> str:
    """Of the chart of pairs exchanged."""
    values = by_count(table, "swap")
    near = cost(table, [value.mean for (_, far, _), value in values.items() if far == 1])
    text = f"Exchanging two neighbours {costs(near, good(table))} on average"
    last = max(far for _, far, _ in values)
    if last == 1:
        return text
    far = cost(table, [value.mean for (_, far, _), value in values.items() if far == last])
    return f"{text}; two blocks {last} apart, it {costs(far)}"


def replaced(table: Table, lengths: Lengths) -> str:
    """Of the table of blocks that run in place of others."""
    places: dict[tuple[int, int], list[float]] = {}
    for section in range(len(lengths)):
        for at, _, value in changed.pairs(table, section):
            places.setdefault((section, at), []).append(value.mean)
    mean = cost(table, [value for values in places.values() for value in values])
    worst, values = max(places.items(), key=lambda item: cost(table, item[1]))
    text = f"Another block of its section in a block's place {costs(mean, good(table))} on average"
    most = costs(cost(table, values))
    return text if most == "costs nothing" else f"{text}; in the place of block {place(*worst, lengths)} it {most}"


def unrolled(table: Table, lengths: Lengths) -> str:
    """Of the chart of good answers after extra steps."""
    scale, steps = _last_steps(table, lengths, kind(table))
    end = max(steps)
    lost = steps[0].mean - steps[end].mean
    how = "Run" if scale == "1" else f"With steps of {scale} times their size, run"
    return f"{how} {end} more times, the last block {costs(lost, good(table))}"


def unrolled_loss(table: Table, lengths: Lengths, exploded: int | None) -> str:
    """Of the chart of losses after extra steps.

    Args:
        table: The values.
        lengths: Blocks per section.
        exploded: First extra step of the very last block, unscaled, with an infinite loss; None: there is none.
    """
    if exploded is not None:
        return (
            f"The loss explodes: from {exploded} extra step{'s'[: exploded != 1]} on it is infinite for some examples"
        )
    scale, steps = _last_steps(table, lengths, "loss")
    end = max(steps)
    first, last = number(steps[0].mean), number(steps[end].mean)
    how = "" if scale == "1" else f" of {scale} times their size"
    if first == last:
        return f"Over {end} extra steps{how} the loss stays at {first}"
    word = "rises" if steps[end].mean > steps[0].mean else "falls"
    return f"Over {end} extra steps{how} the loss {word} from {first} to {last}"


def expected(first_order: dict[Any, Value], true: dict[Any, Value]) -> str:
    """Of the chart of changes of the loss to first order and in truth."""
    both = [(first_order[key].mean, true[key].mean) for key in true if key in first_order]
    lower = sum(truth < 0 for _, truth in both)
    same = sum((guess < 0) == (truth < 0) for guess, truth in both)
    return f"{lower} of {len(both)} blocks lower the loss; the first order has the right sign for {same}"


def settling(table: Table) -> str:
    """Of the verdict on the last block: which of the three most examples get, or that they are divided."""
    words = {"settles": "settle", "marginal": "be marginal", "drifts": "drift"}
    shares = {word: next(iter(table[name].values())).mean for name, word in words.items()}
    word, most = max(shares.items(), key=lambda item: item[1])
    if most == 1:
        return f"Run on and on, the last block would {word} for every example"
    parts = ", ".join(f"{word} for {percent(share)}" for word, share in shares.items() if share > 0)
    return f"Run on and on, the last block would {parts} of the examples"


def settling_of_many(networks: Sequence[tuple[str, Table]]) -> str:
    """Of the verdicts on the last blocks of several networks.

    Args:
        networks: Names and values.
    """
    shares = [(name, next(iter(table["settles"].values())).mean) for name, table in networks if "settles" in table]
    if not 0 < len(shares) <= 4:
        return "Run on and on, would the last block settle"
    return f"Examples for which the last block would settle: {listed([f'{percent(v)} in {n}' for n, v in shares])}"


def iterative(found: dict[str, Any], others: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Of the table of the three indices.

    Args:
        found: The network's own.
        others: Names and indices of the networks beside it.
    """
    values = {name: found[name]["network"]["value"] for name in NAMES if found.get(name) and found[name]["network"]}
    if not any(name in found for name in NAMES):
        return "Secondary readings of iteration"
    if not values:
        return f"The indices of iteration are undefined: {undefined(found)}"
    ideal = {"convergence": "1", "recurrence": "1", "divergence": "0"}
    if _unsure(found, values):
        text = "The indices of iteration are unsure, too near to guessing"
    else:
        text = ", ".join(f"{name} {value:.2f}" for name, value in values.items()).capitalize()
    for words, other in others:
        theirs = [(other.get(name) or {}).get("network") for name in values]
        shown = ", ".join(f"{index['value']:.2f}" if index else "undefined" for index in theirs)
        if _unsure(other, values):
            shown = "unsure, too near to guessing"
        text += f"; {words} {shown if any(theirs) else 'undefined'}"
    return f"{text}; a converged iteration has {', '.join(ideal[name] for name in values)}"


def _unsure(found: dict[str, Any], names: Iterable[str]) -> bool:
    """Whether some index has no interval, because too many draws of the examples leave it undefined."""
    given = [(found.get(name) or {}).get("network") for name in names]
    return any(index and index.get("undefined_draws", 0) > _LOST for index in given)


def iterative_of_many(networks: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Of the table of the three indices of several networks.

    Args:
        networks: Names and indices.
    """
    parts = []
    for words, found in networks:
        theirs = [(found.get(name) or {}).get("network") for name in NAMES]
        if any(theirs):
            shown = ", ".join(f"{index['value']:.2f}" if index else "undefined" for index in theirs)
            parts.append(f"{'unsure' if _unsure(found, NAMES) else shown} in {words}")
    if not 0 < len(parts) <= 4:
        return "How iterative and convergent the networks are"
    return f"Convergence, recurrence, divergence: {'; '.join(parts)}"


def companions(found: dict[str, Any]) -> str:
    """Of the table of what tells a converging path without errors."""
    step, left = ((found.get(name) or {}).get("network") for name in ("last_step", "remaining_distance"))
    if step is not None:
        word = "shorter than" if step["value"] < 0.9 else "longer than" if step["value"] > 1.1 else "about as long as"
        return f"The last step of a section is {word} its first: {number(step['value'])} times"
    if left is not None:
        return f"After a block, {percent(left['value'])} of the way are left on average"
    return "The path of the states"


def undefined(found: dict[str, Any], blocks: int | None = None, name: str = "") -> str:
    """Why an index has no value."""
    reason = hopeless(found)
    if reason:
        return reason
    if blocks == 0:
        return "no blocks"
    if blocks == 1 and (name.startswith("recurrence") or name in ("last_step", "turning")):
        return "one block only"
    return "no value at any example"


def hopeless(found: dict[str, Any]) -> str:
    """That a network is too close to guessing for indices of errors; "" if it is not."""
    own, chance = found.get("intact_error"), found.get("chance_error")
    if own is None or chance is None or chance - own > GUESSING:
        return ""
    return f"{percent(own)} of its answers are wrong, by guessing {percent(chance)}"


def borderline(groups: dict[str, Table], lengths: Lengths) -> str:
    """Of the charts of borderline examples: their part, and what the last block does to them."""
    if "accuracy" not in groups.get("borderline", {}):
        return "No example is borderline: every answer is clear by 10\u00a0points or more"
    values = groups["borderline"]["accuracy"]
    count = values[max(values)].count
    states = [values[key].mean for key in sorted(values) if key[0] == last_section(lengths)]
    start, end = states[-2:] if len(states) > 1 else states * 2
    total = next(iter(groups["all"]["accuracy"].values())).count
    if count < _FEW:
        verb = "is" if count == 1 else "are"
        return f"{count} of {total} examples {verb} borderline, too few to say what the last blocks do to them"
    return (
        f"The last block takes the {count} borderline examples of {total} from {percent(start)} to {percent(end)} right"
    )


def moved(quantity: str, lines: dict[str, dict[int, Value]], x: str) -> str:
    """Of the other charts of groups: from where to where each group goes."""
    show = percent if quantity == "accuracy" else number
    parts = [f"{show(v[min(v)].mean)} to {show(v[max(v)].mean)} ({name})" for name, v in lines.items()]
    what = {"accuracy": "Right answers", "loss": "Loss", "entropy": "Entropy"}[quantity]
    where = "the last blocks" if "blocks" in x else "extra steps"
    return f"{what} over {where}: {', '.join(parts)}"


def learned(rows: Sequence[dict[str, Any]], quantity: str, section: str) -> str:
    """Of the chart of readouts over epochs."""
    first, last = rows[0]["curves"][quantity][section], rows[-1]["curves"][quantity][section]
    show = number if quantity == "loss" else percent
    what = {
        "accuracy": "right answers",
        "loss": "the loss",
        "borderline_accuracy": "right answers on borderline examples",
        "correct_accuracy": "right answers on examples that the network has right",
    }[quantity]
    if last[0] is None or last[-1] is None:
        return f"Over the epochs, {what} of early exits from {section}"
    start = f"After the last epoch {what} of early exits from {section}: {show(last[0])} at its start"
    earlier = f"; after the first epoch {show(first[-1])} at its end" if first[-1] is not None and len(rows) > 1 else ""
    return f"{start}, {show(last[-1])} at its end{earlier}"


def power(value: Value) -> Value:
    """A natural logarithm as a power of ten."""
    return Value(value.mean * log10(exp(1)), value.stderr * log10(exp(1)), value.count)


def _mean_cost(table: Table, intervention: str) -> float:
    return cost(table, [value.mean for (_, k, _), value in by_count(table, intervention).items() if k])


def _last_steps(table: Table, lengths: Lengths, quantity: str) -> tuple[str, dict[int, Value]]:
    """The first scale with extra steps in the last section that has some, and the values."""
    for section in reversed(range(len(lengths))):
        for scale in changed.scales(table, quantity):
            steps = changed.unrolled(table, quantity, scale, section, lengths[section])
            if steps:
                return scale, steps
    raise ValueError(f"no extra steps with {quantity} were measured")
