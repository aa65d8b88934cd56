"""Tables of the report: indices of iteration, the verdict on the last block, and brackets of Lipschitz constants."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from residuum import conclusions
from residuum.folders import Result
from residuum.readings import Table, Value, number, percent, place, signed, whole, with_error

INDICES = {
    "convergence": "convergence",
    "recurrence": "recurrence (replace)",
    "divergence": "divergence",
    "drop_gap": "gap first/last",
    "recurrence_shuffle": "recurrence (shuffle)",
    "recurrence_drop_first": "recurrence (drop first)",
}
COMPANIONS = {
    "remaining_distance": "way left, mean",
    "last_step": "last step / first step",
    "turning": "cosine of successive steps",
    "changed_labels": "answers changed, per example",
}
VERDICT = {
    "settles": "settles",
    "marginal": "marginal",
    "drifts": "drifts",
    "spectral_radius": "spectral radius (estimate)",
    "spectral_radius_residual": "its residual",
    "step_growth": "growth per further step",
    "step_straightness": "straightness",
}
BRACKET = {
    "update_lipschitz": "update: at least (mean estimate)",
    "update_lipschitz_residual": "its relative residual",
    "update_lipschitz_bound": "update: at most",
    "block_lipschitz": "block: at least (mean estimate)",
    "block_lipschitz_residual": "its relative residual",
    "block_lipschitz_bound": "block: at most",
}


class Facts(NamedTuple):
    """A table under its conclusion; the first column names the rows."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def networks(result: Result, *, alone: bool) -> list[tuple[str, str, Table | None]]:
    """A network, the same at initialisation, and the same trained on shuffled labels.

    Args:
        result: What was measured.
        alone: Whether the page is about this result only, so that names need not say whose they are.

    Returns:
        How the names of its indices begin, what the page calls it, and its values, if there are some.
    """
    own = ("after training" if result.about.get("training") else "this model") if alone else result.label
    before = "" if alone else f"{result.label}, "
    return [
        ("", own, result.trained),
        ("initial_", f"{before}at initialisation", result.initial),
        ("shuffled_", f"{before}trained on shuffled labels", result.shuffled),
    ]


def of_one(result: Result) -> dict[str, Facts]:
    """The tables of one result; those without rows were not measured."""
    given, agreeing = _networks([result]), _networks([result], "_by_agreement")
    tables = _tables([result])
    names = [name for name, _ in result.sections]
    beside = [(name, found) for name, found, _ in given[1:]]
    title = conclusions.iterative(given[0][1], beside) if given and _has(given[0][1], INDICES) else ""
    sections = [
        (f"{network}, {names[s]}", found, s, lengths)
        for network, found, lengths in given
        for s in range(len(names) if len(names) > 1 else 0)
    ]
    whole = [(network, found, None, lengths) for network, found, lengths in given]
    return {
        "indices": _index_table(title, INDICES, whole),
        "indices_sections": _index_table("The same in each section", INDICES, sections),
        "agreement_indices": _index_table(
            conclusions.iterative(agreeing[0][1], [(name, found) for name, found, _ in agreeing[1:]])
            if agreeing and _has(agreeing[0][1], INDICES)
            else "",
            INDICES,
            [(network, found, None, lengths) for network, found, lengths in agreeing],
        ),
        "companions": _index_table(conclusions.companions(given[0][1]) if given else "", COMPANIONS, whole),
        "companions_sections": _index_table("The same in each section", COMPANIONS, sections),
        "settling": _settling(tables, result),
        "bracket": _bracket(result),
    }


def of_many(results: Sequence[Result]) -> dict[str, Facts]:
    """The tables that compare results."""
    whole = [(network, found, None, lengths) for network, found, lengths in _networks(results)]
    own = [(result.label, result.indices.get("convergence") or {}) for result in results]
    return {
        "indices": _index_table(conclusions.iterative_of_many(own), INDICES, whole),
        "companions": _index_table("The same asked of the path, without errors", COMPANIONS, whole),
        "settling": _verdicts(
            conclusions.settling_of_many([(result.label, result.trained) for result in results]), _tables(results), ""
        ),
    }


Network = tuple[str, dict[str, Any], Sequence[int]]  # name, indices.json's part, blocks per section


def _networks(results: Sequence[Result], by: str = "") -> list[Network]:
    """Each network with the ones beside it; those at initialisation also where they are missing, with the reason."""
    found = []
    for result in results:
        for key, words, _ in networks(result, alone=len(results) == 1):
            values = result.indices.get(f"{key}convergence{by}")
            if values:
                found.append((words, values, result.lengths))
            elif key == "initial_" and result.indices.get(f"convergence{by}"):
                reason = result.initial_reason if result.initial is None else "not measured"
                found.append((words, {"absent": reason}, result.lengths))
    return found


def _tables(results: Sequence[Result]) -> list[tuple[str, Table]]:
    found = [network for result in results for network in networks(result, alone=len(results) == 1)]
    return [(words, table) for _, words, table in found if table is not None]


def _has(found: dict[str, Any], names: dict[str, str]) -> bool:
    return any(found.get(name) for name in names)


def _index_table(
    title: str, names: dict[str, str], rows: Sequence[tuple[str, dict[str, Any], int | None, Sequence[int]]]
) -> Facts:
    """A row per network or section, a column per index that some network has."""
    shown = {name: words for name, words in names.items() if any(found.get(name) for _, found, _, _ in rows)}
    cells = [
        (label + _reason(found, shown), *(_index(found, name, section, lengths) for name in shown))
        for label, found, section, lengths in rows
    ]
    return Facts(title, ("network", *shown.values()), cells if shown else [])


def _reason(found: dict[str, Any], shown: dict[str, str]) -> str:
    """Why a whole row has no value, beside its name."""
    if "absent" in found:
        return f": {found['absent']}"
    hopeless = conclusions.hopeless(found)
    return f": {hopeless}" if hopeless and "convergence" in shown else ""


def _index(found: dict[str, Any], name: str, section: int | None, lengths: Sequence[int]) -> str:
    """An index with its interval, or why it has none."""
    if "absent" in found:
        return "none"
    if name not in found:
        return "not measured"
    index = found[name]
    estimate = index["network"] if section is None else index["sections"][section]
    if estimate is None:
        blocks = max(lengths) if section is None else lengths[section]
        alone = "" if conclusions.hopeless(found) and name in INDICES else conclusions.undefined(found, blocks, name)
        return f"undefined: {alone}" if alone else "undefined"
    low, high = estimate["low"], estimate["high"]
    show = number if name == "last_step" else "{:.2f}".format  # a ratio, of any size
    text = signed(show(estimate["value"]))
    if low is not None and high is not None:
        text += f" [{signed(show(low))}, {signed(show(high))}]"
    lost = estimate.get("undefined_draws")
    return text + (f", undefined in {lost} draws" if lost else "")


def _settling(tables: Sequence[tuple[str, Table]], result: Result) -> Facts:
    title = conclusions.settling(result.trained) if {"settles", "drifts", "marginal"} <= set(result.trained) else ""
    rows = _verdicts(title, tables, "infinite for some examples" if "step_growth" in result.infinite else "")
    return rows if title else Facts("", (), [])


def _verdicts(title: str, tables: Sequence[tuple[str, Table]], growth: str) -> Facts:
    rows = []
    for words, table in tables:
        if "settles" not in table:
            continue
        cells = []
        for name in VERDICT:
            value = next(iter(table.get(name, {}).values()), None)
            show = percent if name in ("settles", "marginal", "drifts") else number
            other = growth if name == "step_growth" and growth and not rows else "undefined"
            cells.append(_amount(value, show) if value else other)
        rows.append((words, *cells))
    return Facts(title, ("network", *VERDICT.values()), rows)


def _amount(value: Value, show: Any = number) -> str:
    if show is percent and not value.stderr:
        return whole(value.mean)
    return with_error(value) if show is number else f"{show(value.mean)} \u00b1 {show(value.stderr)}"


def _bracket(result: Result) -> Facts:
    """Estimates from below and bounds from above, block by block."""
    table, lengths = result.trained, result.lengths
    if "update_lipschitz" not in table:
        return Facts("", (), [])
    rows = []
    for s, (_, blocks) in enumerate(result.sections):
        for i in range(len(blocks)):
            cells = []
            for name in BRACKET:
                value = table.get(name, {}).get((s, i, 1))
                none = "none known" if name.endswith("bound") else "undefined"
                # A bound holds for all states, so it has no spread.
                cells.append(
                    none if value is None else number(value.mean) if name.endswith("bound") else _amount(value)
                )
            rows.append((f"block {place(s, i, lengths)}", *cells))
    return Facts("Block by block: estimates from below and bounds from above", ("block", *BRACKET.values()), rows)
