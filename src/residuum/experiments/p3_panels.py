"""What P3's figures share: titles, the look and the name of an example, and what its run left."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residuum.drawing import COLOURS, MARKERS
from residuum.toys.examples import Example
from residuum.toys.networks import Chain, Flow

if TYPE_CHECKING:
    import matplotlib.figure

Folders = Mapping[Example, Path]
STYLES = {0.0: 1, 0.25: 4, 0.5: 0, 0.75: 5, 1.0: 2}  # theta: number of the line's colour and marker
OTHER = 3


def values(folder: Path) -> dict[str, Any]:
    """What an example's training and measures gave."""
    return json.loads((folder / "values.json").read_text(encoding="utf-8"))


def final(found: dict[str, Any], name: str) -> list[float]:
    """The last values of the history of the members that have not failed."""
    return [value for value in found["history"][-1][name] if value is not None]


def label(example: Example) -> str:
    """What tells an example from its neighbours in a figure."""
    what = f"theta = {example.theta:g}" + (" (residual network)" if example.theta == 0 else "")
    what += ", truncated gradient" if example.param_grad == "truncated" else ""
    return what + (f", from {example.stages[0].depth} blocks" if example.levels > 1 else "")


def short(example: Example) -> str:
    """The same, without what theta = 0 is."""
    return label(example).replace(" (residual network)", "")


def one(example: Example, folder: Path, member: int) -> Chain | Flow:
    """The trained network of one member alone."""
    rate, seed = example.members[member]
    network = replace(example, rates=(rate,), seeds=(seed,)).network().requires_grad_(False)
    for p, trained in zip(network.parameters(), example.trained(folder).parameters(), strict=True):
        p.copy_(trained[member : member + 1])
    return network


def colour_of(example: Example) -> str:
    """The colour of its theta."""
    return COLOURS[STYLES.get(example.theta, OTHER)]


def line_of(example: Example) -> dict[str, Any]:
    """The look of its line: colour and marker say theta; dashed are truncated gradients and training by levels."""
    style = "--" if example.param_grad == "truncated" or example.levels > 1 else "-"
    marker = MARKERS[STYLES.get(example.theta, OTHER)]
    return {"color": colour_of(example), "ls": style, "marker": marker, "ms": 4, "markevery": 0.12}


def failed_of(history: list[dict[str, Any]]) -> str:
    """How many members have failed, in words; "" if none has."""
    last = history[-1]["validation_loss"]
    lost = sum(value is None for value in last)
    return f" ({lost} of {len(last)} failed, left out)" if lost else ""


def titled(figure: "matplotlib.figure.Figure", what: str, numbers: Sequence[str]) -> None:
    """Give a figure its conclusion as a title: what it is of, and the numbers, two in a line."""
    lines = ["; ".join(numbers[i : i + 2]) for i in range(0, len(numbers), 2)]
    figure.suptitle("\n".join([f"{what}:", *lines]), fontsize=11)
