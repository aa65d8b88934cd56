"""Result folders in which everything was measured, made up from arrays."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from folders import COLUMNS, folder

ESTIMATE = {"value": 0.8, "low": 0.7, "high": 0.9, "undefined_draws": 0}
NAMES = ("convergence", "recurrence", "divergence", "drop_gap", "recurrence_shuffle", "recurrence_drop_first")
COMPANIONS = ("remaining_distance", "last_step", "turning", "changed_labels")


def everything(path: Path, *, lengths: Sequence[int] = (4, 4, 4), labels: bool = True, **settings: Any) -> Path:
    """A folder as `folders.folder` makes it, with all other measures, groups, indices and curves over epochs."""
    path = folder(path, lengths=lengths, labels=labels, **settings)
    sections = [part["name"] for part in json.loads((path / "provenance.json").read_text())["network"]["sections"]]
    rows = pd.DataFrame(_rows(sections, lengths, labels), columns=COLUMNS)
    for name in ("profile", "initial"):
        if (path / f"{name}.parquet").exists():
            pd.concat([pd.read_parquet(path / f"{name}.parquet"), rows]).to_parquet(path / f"{name}.parquet")
    wanted = ["accuracy", "loss", "entropy", "unroll_1_accuracy", "unroll_1_loss", "unroll_1_entropy"]
    measured = pd.read_parquet(path / "profile.parquet")
    if labels:
        groups = [
            measured[measured["quantity"].isin(wanted)].assign(group=group)
            for group in ("borderline", "correct", "all")
        ]
        pd.concat(groups).to_parquet(path / "groups.parquet")
    edit(path, "indices.json", convergence=estimates(len(lengths)), initial_convergence=estimates(len(lengths), None))
    if (path / "history.json").exists():
        history = json.loads((path / "history.json").read_text())
        for row in history:
            row["curves"] = {
                name: {s: [0.1 * i for i in range(n + 1)] for s, n in zip(sections, lengths, strict=True)}
                for name in ("accuracy", "loss", "borderline_accuracy", "correct_accuracy")
            }
        (path / "history.json").write_text(json.dumps(history))
    return path


def estimates(sections: int, value: dict[str, Any] | None = ESTIMATE) -> dict[str, Any]:
    """Indices of a network, all the same; None: undefined because it guesses."""
    index = {"sections": [value] * sections, "network": value}
    companion = {"sections": [ESTIMATE] * sections, "network": ESTIMATE}
    errors = {"intact_error": 0.05 if value else 0.9, "chance_error": 0.9}
    return dict.fromkeys(NAMES, index) | dict.fromkeys(COMPANIONS, companion) | errors


def edit(path: Path, name: str, **values: Any) -> None:
    """Change some values of a JSON file."""
    (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | values))


def change(path: Path, quantity: str, mean: float, *, stderr: float = 0.0, table: str = "profile") -> None:
    """Set a quantity at all its points."""
    frame = pd.read_parquet(path / f"{table}.parquet")
    frame.loc[frame["quantity"] == quantity, ["mean", "stderr"]] = [mean, stderr]
    frame.to_parquet(path / f"{table}.parquet")


def without(path: Path, *beginnings: str) -> None:
    """Take quantities whose names begin so out of all tables."""
    for name in ("profile", "initial", "groups"):
        if (path / f"{name}.parquet").exists():
            frame = pd.read_parquet(path / f"{name}.parquet")
            frame[~frame["quantity"].str.startswith(beginnings)].to_parquet(path / f"{name}.parquet")


def _rows(sections: Sequence[str], lengths: Sequence[int], labels: bool) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    generator = np.random.default_rng(1)
    end = (sections[-1], lengths[-1])

    def add(quantity: str, name: str, point: int, *, length: int = 1, at: str = "block", mean: float = 0.0) -> None:
        rows.append((quantity, name, point, length, at, mean or generator.uniform(0.3, 0.9), 0.01, 500, ""))

    def answers(intervention: str, *where: Any, **more: Any) -> None:
        for quantity in ("accuracy", "loss", "agreement", "entropy") if labels else ("agreement", "entropy"):
            add(f"{intervention}_{quantity}", *where, **more)

    if labels:
        for quantity, mean in (("accuracy", 0.95), ("loss", 0.2), ("entropy", 0.3)):
            add(f"intact_{quantity}", *end, at="state", mean=mean)
        add("margin", *end, at="state")
    add("chance", *end, at="state", mean=0.1)
    for quantity, mean in (("settles", 0.2), ("marginal", 0.3), ("drifts", 0.5)):
        add(quantity, sections[-1], lengths[-1] - 1, mean=mean)
    for quantity in ("spectral_radius", "spectral_radius_residual", "step_growth", "step_straightness"):
        add(quantity, sections[-1], lengths[-1] - 1)
    for s, (name, length) in enumerate(zip(sections, lengths, strict=True)):
        for i in range(length):
            answers("drop", name, i)
            answers("repeat_2", name, i)
            answers("drop_first", name, 0, length=i + 1, at="span")
            answers("drop_last", name, length - i - 1, length=i + 1, at="span")
            if i:
                answers("shuffle", name, 0, length=i + 1, at="span")
            for j in range(length):
                if j > i:
                    answers("swap", name, i, length=j, at="pair")
                if j != i:
                    answers("replace", name, i, length=j, at="pair")
            for quantity in ("update", "block"):
                add(f"{quantity}_lipschitz", name, i)
                add(f"{quantity}_lipschitz_residual", name, i)
                add(f"{quantity}_lipschitz_bound", name, i, mean=5.0)
            if labels:
                plugin = ("plugin_",) if s == len(lengths) - 1 else ()
                for prefix in ("", *plugin):
                    add(f"{prefix}gradient_cosine", name, i, mean=-0.2)
                    add(f"{prefix}gradient_norm", name, i)
                    add(f"{prefix}first_order_change", name, i, mean=-0.1)
                    add(f"{prefix}loss_change", name, i, mean=-0.15)
        for i in range(length + 1):
            add("log_tail_product", name, i, at="state", mean=0.1 * (length - i) + 1e-9)
        for k in range(1, 21):
            for scale in ("1", "0.5"):
                answers(f"unroll_{scale}", name, length + k, at="state")
        if labels and s < len(lengths) - 1:
            add("gradient_ratio", name, 0, mean=3.0)
    return rows
