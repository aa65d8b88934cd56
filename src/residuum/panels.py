"""Panels: which charts and tables a result gives, each under its conclusion; what was not measured is left out."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from residuum import changed, charts, conclusions, efforts, facts, plots, titles
from residuum.changed import by_count, kind
from residuum.charts import Chart, Curve
from residuum.facts import Facts
from residuum.folders import Result
from residuum.plots import Line
from residuum.readings import Table, Value, place
from residuum.schedules import last_section


class Panel(NamedTuple):
    """A chart under its conclusion."""

    chart: Chart
    title: str


def one_panels(result: Result) -> dict[str, Panel]:
    """The charts of one result by key; those that were not measured are left out."""
    curves = curves_of(result)
    made = _along_depth(curves, result.about["loss"])
    made["cuts"] = charts.cheapest_cuts("cuts", "angular_distance", curves[0], label="turn, as part of a half turn")
    found = {
        key: Panel(chart, _title(key, result))
        for key, chart in made.items()
        if chart and ("angular_distance" if key == "cuts" else _quantity(key, curves)) in result.trained
    }
    found |= _further(curves) | _changes(result, curves) | _losses(result) | _groups(result) | _epochs(result)
    advice = [row for row in result.advice.get("sections", []) if row["fixed_distance"] > 0]
    if advice and "scaled_perturbation" in result.trained:
        eps = result.advice["eps"]
        found["depth"] = Panel(charts.depth_ranges("depth", advice, eps), titles.depth(advice, eps))
    return found | _training(result) | {key: Panel(*solves) for key, solves in efforts.charts(result).items()}


def many_panels(results: Sequence[Result]) -> dict[str, Panel]:
    """The charts that compare several results; the networks at initialisation are there, hidden at first."""
    curves = [Curve(result.label, result.trained, result.sections, i) for i, result in enumerate(results)]
    fresh = [
        Curve(words, table, result.sections, i, fresh=True, hidden=True)
        for i, result in enumerate(results)
        for key, words, table in facts.networks(result, alone=False)
        if key == "initial_" and table is not None
    ]
    losses = {result.about["loss"] for result in results}
    made = _along_depth([*curves, *fresh], losses.pop() if len(losses) == 1 else "different losses")
    networks = [(curve.name, curve.table, curve.lengths) for curve in curves]
    found = {}
    for key, chart in made.items():
        having = [network for network in networks if _quantity(key, curves) in network[1]]
        if chart and having:
            found[key] = Panel(chart, titles.compared(key, having))
    found |= _further([*curves, *fresh])
    # Logarithms need distances above 0.
    having = [network for network in networks if "scaled_perturbation" in network[1] and titles.distance(network[1])]
    same_sections = len({len(lengths) for _, _, lengths in having}) == 1
    if same_sections and len({sum(lengths) for _, _, lengths in having}) > 1:
        found["law"] = Panel(charts.distance_by_depth("law", having), titles.law(having))
    return found


def tables(results: Sequence[Result]) -> dict[str, Facts]:
    """The tables of indices, verdicts and brackets by key; those that were not measured are left out."""
    many = len(results) > 1
    found = facts.of_many(results) if many else facts.of_one(results[0]) | {"solved": efforts.table(results[0])}
    return {key: table for key, table in found.items() if table.rows}


def curves_of(result: Result) -> list[Curve]:
    """The network of a result and those beside it."""
    return [
        Curve(words, table, result.sections, style, fresh=key == "initial_")
        for style, (key, words, table) in enumerate(facts.networks(result, alone=True))
        if table is not None
    ]


def _title(key: str, result: Result) -> str:
    """Of a chart along depth."""
    if key == "step":
        before = "before training" if result.about.get("training") else "at initialisation"
        return titles.step(result.trained, result.initial, before)
    return titles.TITLES[key](result.trained, result.lengths)


GOOD = {"accuracy": "right answers", "agreement": "answers as without the change"}
SHARE = (-0.02, 1.04)

# key, quantity, label of the vertical axis, unit, whether its points are states, range of the axis; where a key stands
# twice, the first quantity that was measured is shown
DEPTH = (
    ("step", "scaled_perturbation", "step, as part of the state's length", "%", False, None),
    ("distance", "scaled_perturbation", "steps added up, in lengths of the state", "", True, None),
    ("accuracy", "accuracy", "right answers", "%", True, SHARE),
    ("loss", "loss", "loss", "", True, None),
    ("agreement", "agreement", "same answer as at the end", "%", True, SHARE),
    ("angle", "update_angle", "cosine with the update before", "", False, (-1.05, 1.05)),
    ("last", "distance_to_last", "distance left, as part of the way", "%", True, None),
    ("pull", "gradient_cosine", "cosine of update and loss gradient", "", False, None),
    ("direct", "plugin_gradient_cosine", "cosine with the gradient of the loss read off right there", "", False, None),
    ("steepness", "gradient_norm", "length of the loss gradient, in nats per unit of the state", "", False, None),
    ("without", "drop_accuracy", "right answers without the block", "%", False, SHARE),
    ("without", "drop_agreement", "same answers without the block", "%", False, SHARE),
    ("twice", "repeat_2_accuracy", "right answers with the block run twice", "%", False, SHARE),
    ("twice", "repeat_2_agreement", "same answers with the block run twice", "%", False, SHARE),
    ("stretch", "update_lipschitz", "largest stretching by the update", "", False, None),
    ("tail", "log_tail_product", "growth through the rest of the network, as a power of ten", "", True, None),
)
FURTHER = (
    ("perturbation", "perturbation", "Absolute perturbation: length of the update", "", False, None),
    ("norm", "state_norm", "Length of the state before the block", "", False, None),
    ("cosine", "cosine_to_last", "Cosine with the section's last state", "", True, None),
    ("influence", "block_influence", "Block influence (ShortGPT) of single blocks", "", False, None),
    ("entropy", "entropy", "Entropy of an early exit's answer, in nats", "", True, None),
    ("change", "label_change", "Examples whose answer the block changes", "%", True, None),
)


def _quantity(key: str, curves: Sequence[Curve]) -> str:
    """What a chart along depth shows: the first of its quantities that a network has."""
    named = [quantity for name, quantity, *_ in DEPTH if name == key]
    return next((quantity for quantity in named if any(quantity in curve.table for curve in curves)), named[0])


def _along_depth(curves: Sequence[Curve], loss: str) -> dict[str, Chart | None]:
    """The main charts along depth; None where no curve has the quantity."""
    made: dict[str, Chart | None] = {}
    for key, quantity, label, unit, state, span in DEPTH:
        if quantity != _quantity(key, curves):
            continue
        shown = _shown(key, curves)
        text = f"loss: {loss}" if key == "loss" else label
        made[key] = charts.along_depth(key, quantity, shown, label=text, unit=unit, state=state, span=span)
    return made


def _shown(key: str, curves: Sequence[Curve]) -> list[Curve]:
    """The curves of a chart: sums, powers of ten, and bounds beside what they bound."""
    if key == "distance":
        return [charts.running(curve) for curve in curves]
    if key == "tail":
        name = "log_tail_product"
        return [
            replace(
                c, table={name: {p: conclusions.power(v) for p, v in c.table[name].items()}} if name in c.table else {}
            )
            for c in curves
        ]
    if key == "stretch":
        apart = max([4, *(curve.style + 1 for curve in curves)])  # so that no bound looks like another network
        bounds = [
            replace(
                curve,
                name=f"{curve.name}: upper bound",
                table={"update_lipschitz": curve.table["update_lipschitz_bound"]},
                style=curve.style + apart,
                hidden=curve.hidden or curve.fresh,
            )
            for curve in curves
            if "update_lipschitz_bound" in curve.table
        ]
        return [*(replace(c, name=f"{c.name}: from below") if bounds else c for c in curves), *bounds]
    return list(curves)


def _further(curves: Sequence[Curve]) -> dict[str, Panel]:
    """The charts of the quantities that the page only shows."""
    found = {}
    for key, quantity, label, unit, state, span in FURTHER:
        chart = charts.along_depth(key, quantity, curves, label="", unit=unit, state=state, span=span)
        if chart:
            found[key] = Panel({**chart, "height": 260}, label)
    return found


def _changes(result: Result, curves: Sequence[Curve]) -> dict[str, Panel]:
    """The charts of networks with blocks left out at an end, moved, replaced, or run on."""
    table, lengths = result.trained, result.lengths
    label = GOOD[kind(table)]
    drops, orders, swaps = (
        [found for name, word in named for found in _counts(curves, name, word)]
        for named in (
            (("drop_last", "last blocks"), ("drop_first", "first blocks")),
            (("shuffle", ""),),
            (("swap", ""),),
        )
    )
    made: dict[str, tuple[Chart | None, Any]] = {
        "ends": (charts.counted("ends", drops, label=label, counts="blocks left out"), conclusions.ends),
        "order": (charts.counted("order", orders, label=label, counts="blocks moved"), conclusions.shuffled),
        "swap": (charts.counted("swap", swaps, label=label, counts="places apart"), conclusions.swapped),
    }
    found = {key: Panel(chart, title(table)) for key, (chart, title) in made.items() if chart and _has(key, table)}
    cells = {}
    for section, length in enumerate(lengths):
        start, whole = sum(lengths[:section]), changed.intact(table, kind(table))
        pairs = list(changed.pairs(table, section))
        cells |= {(start + at, start + other): value for at, other, value in pairs}
        cells |= {(start + i, start + i): whole for i in range(length)} if pairs else {}
    names = [place(s, i, lengths) for s, length in enumerate(lengths) for i in range(length)]
    heat = plots.heat("replace", cells, names, x="block that runs", y="place", label=label)
    if heat:
        found["replace"] = Panel(heat, conclusions.replaced(table, lengths))
    return found | _unrolled(result, curves)


def _has(key: str, table: Table) -> bool:
    names = {"ends": ("drop_first", "drop_last"), "order": ("shuffle",), "swap": ("swap",)}[key]
    return any(by_count(table, name) for name in names)


def _counts(curves: Sequence[Curve], intervention: str, word: str) -> list[Curve]:
    """The curves of an intervention by its count of blocks; networks beside the first are hidden at first."""
    found = []
    for number, curve in enumerate(curves):
        name = f"{word}, {curve.name}" if word else curve.name
        style = curve.style if intervention != "drop_first" else curve.style + 3
        table = {"count": by_count(curve.table, intervention)}
        found.append(replace(curve, name=name, table=table, style=style, hidden=bool(word and number)))
    return found


def _unrolled(result: Result, curves: Sequence[Curve]) -> dict[str, Panel]:
    """Good answers and loss after extra steps of each section's last block; scales other than 1 in the last section."""
    found = {}
    for key, quantity in (("unroll", kind(result.trained)), ("unroll_loss", "loss")):
        lines = [line for number, curve in enumerate(curves) for line in _steps(curve, quantity, hidden=number > 0)]
        unit, span = ("", None) if quantity == "loss" else ("%", SHARE)
        label = f"loss: {result.about['loss']}" if quantity == "loss" else GOOD[quantity]
        chart = plots.plain(
            key, lines, x="extra steps", label=label, unit=unit, span=span, say=lambda k: f"{k} extra steps"
        )
        if chart and changed.scales(result.trained, quantity):
            if quantity == "loss":
                title = conclusions.unrolled_loss(result.trained, result.lengths, _exploded(result))
            else:
                title = conclusions.unrolled(result.trained, result.lengths)
            found[key] = Panel(chart, title)
    return found


def _steps(curve: Curve, quantity: str, *, hidden: bool) -> list[Line]:
    """The lines of one network over extra steps."""
    lines, last = [], last_section(curve.lengths)
    for scale in changed.scales(curve.table, quantity):
        for s, (section, blocks) in enumerate(curve.sections):
            # Far sections and other scales of the networks beside this one would crowd the legend.
            if (s != last and (hidden or scale != "1")) or (hidden and scale != "1"):
                continue
            steps = changed.unrolled(curve.table, quantity, scale, s, len(blocks))
            how = "" if scale == "1" else f", steps \u00d7 {scale}"
            name = f"{section}{how}, {curve.name}"
            style = s if scale == "1" else last + changed.scales(curve.table, quantity).index(scale)
            if hidden and not curve.fresh:  # open markers tell the one at initialisation from the network itself
                style += 4 + curve.style
            lines.append(Line(name, style, steps, curve.fresh, hidden))
    return lines


def _exploded(result: Result) -> int | None:
    """The first extra step of the last section, unscaled, after which some example's loss is infinite."""
    last = last_section(result.lengths)
    steps = [i - result.lengths[last] for s, i, _ in result.infinite.get("unroll_1_loss", ()) if s == last]
    return min(steps, default=None)


def _losses(result: Result) -> dict[str, Panel]:
    """Changes of the loss to first order beside the true ones."""
    found = {}
    for key, first, true in (
        ("expected", "first_order_change", result.trained.get("loss_change", {})),
        ("expected_direct", "plugin_first_order_change", result.trained.get("plugin_loss_change", {})),
    ):
        if first in result.trained and true:
            curves = [
                Curve("to first order", {"change": result.trained[first]}, result.sections, 0),
                Curve("in truth", {"change": true}, result.sections, 3),
            ]
            label = "change of the loss by the block, in nats"
            chart = charts.along_depth(key, "change", curves, label=label, unit="", state=False, span=None)
            if chart:
                found[key] = Panel(chart, conclusions.expected(result.trained[first], true))
    return found


GROUPS = (("borderline", "borderline", 1), ("correct", "right at the end", 2), ("all", "all examples", 0))


def _groups(result: Result) -> dict[str, Panel]:
    """Borderline, right and all examples over the last blocks, and over extra steps of the last block."""
    found: dict[str, Panel] = {}
    lengths = result.lengths
    last = last_section(lengths)
    first = max(0, lengths[last] - 5) if lengths else 0
    for quantity, label, unit in (
        ("accuracy", "right answers", "%"),
        ("loss", f"loss: {result.about['loss']}", ""),
        ("entropy", "entropy of the answer, in nats", ""),
    ):
        span = SHARE if unit else None
        blocks, steps = [], []
        for name, word, style in GROUPS:
            table = result.groups.get(name, {})
            values = {i: v for (s, i, _), v in table.get(quantity, {}).items() if s == last and i >= first}
            blocks.append(Line(word, style, values))
            more = {i - lengths[last]: v for (s, i, _), v in table.get(f"unroll_1_{quantity}", {}).items() if s == last}
            start = {0: values[lengths[last]]} if more and lengths[last] in values else {}
            steps.append(Line(word, style, start | more))
        for key, lines, x, say in (
            (f"group_{quantity}", blocks, "blocks run in the last section", lambda k: f"after block {k}"),
            (f"group_steps_{quantity}", steps, "extra steps of the last block", lambda k: f"{k} extra steps"),
        ):
            chart = plots.plain(key, lines, x=x, label=label, unit=unit, span=span, say=say)
            if chart:
                found[key] = Panel({**chart, "height": 260}, _group_title(quantity, result, lines, x))
    return found


def _group_title(quantity: str, result: Result, lines: Sequence[Line], x: str) -> str:
    if quantity == "accuracy" and "blocks" in x:
        return conclusions.borderline(result.groups, result.lengths)
    return conclusions.moved(quantity, {line.name: line.points for line in lines if line.points}, x)


def _training(result: Result) -> dict[str, Panel]:
    """Accuracy on the test split after each epoch."""
    if not result.history or "test_accuracy" not in result.history[-1]:
        return {}
    rows = [row for row in result.history if "test_accuracy" in row]
    line = Line("test examples", 0, {int(row["epoch"]): Value(float(row["test_accuracy"]), 0.0, 0) for row in rows})
    say = "epoch {}".format
    chart = plots.plain("training", [line], x="epoch", label="right answers", unit="%", say=say)
    return {"training": Panel({**chart, "height": 260}, titles.training(rows))}


CURVES = ("accuracy", "loss", "borderline_accuracy", "correct_accuracy")


def _epochs(result: Result) -> dict[str, Panel]:
    """What early exits of the last section would answer after each epoch, one line per block."""
    rows = [row for row in result.history if row.get("curves")]
    found = {}
    for quantity in CURVES if rows else ():
        having = [row for row in rows if quantity in row["curves"]]
        section = next((name for name, blocks in reversed(result.sections) if blocks), "")
        having = [row for row in having if row["curves"][quantity].get(section)]
        if not having:
            continue
        length = len(having[-1]["curves"][quantity][section])
        entry = length > len(dict(result.sections)[section])  # states begin at the entry, blocks after it
        points = {
            "entry" if entry and not i else f"block {i + (not entry)}": {
                int(row["epoch"]): Value(float(row["curves"][quantity][section][i]), 0.0, 0)
                for row in having
                if row["curves"][quantity][section][i] is not None
            }
            for i in range(length)
        }
        unit, span = ("", None) if quantity == "loss" else ("%", SHARE)
        label = f"loss: {result.about['loss']}" if quantity == "loss" else "right answers"
        say = "epoch {}".format
        key = f"curves_{quantity}"
        chart = plots.plain(key, plots.ordered(points), x="epoch", label=label, unit=unit, span=span, say=say)
        if chart:
            found[key] = Panel(chart, conclusions.learned(having, quantity, section))
    return found
