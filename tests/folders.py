"""Result folders made up from arrays, for tests of the report: the format of `residuum probe`, without a model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from residuum.indices import ADVICE, stopping_depth

COLUMNS = ["quantity", "section", "point", "length", "at", "mean", "stderr", "count", "update"]
HOSTILE = '<script>alert(1)</script></script><!-- & "quoted" <img src=x onerror=alert(2)> %{x}'


def folder(
    path: Path,
    *,
    lengths: Sequence[int] = (4, 4, 4),
    names: Sequence[str] | None = None,
    block: str = "sections.{section}.{index}",
    title: str = "A small ResNet on digits",
    labels: bool = True,
    initial: bool = True,
    trained: bool = True,
    seed: int = 0,
    step: float = 0.35,
) -> Path:
    """Write a folder with values that look like those of a network with sections of these lengths."""
    path.mkdir(parents=True)
    names = names or [f"section {s + 1}" for s in range(len(lengths))]
    generator = np.random.default_rng(seed)
    curves = {"profile": _rows(generator, names, lengths, step, labels, learned=True)}
    if initial:
        curves["initial"] = _rows(generator, names, lengths, 0.6, labels, learned=False)
    for name, rows in curves.items():
        pd.DataFrame(rows, columns=COLUMNS).to_parquet(path / f"{name}.parquet")
    blocks = [
        [block.replace("{section}", str(s)).replace("{index}", str(i)) for i in range(n)] for s, n in enumerate(lengths)
    ]
    history = [_epoch(epoch) for epoch in range(1, 13)] if trained else []
    if history:
        (path / "history.json").write_text(json.dumps(history))
    about = _about(title, names, blocks, labels, trained, history)
    (path / "provenance.json").write_text(json.dumps(about))
    (path / "indices.json").write_text(json.dumps(_indices(curves["profile"], names, lengths, initial)))
    return path


def _rows(
    generator: np.random.Generator,
    names: Sequence[str],
    lengths: Sequence[int],
    step: float,
    labels: bool,
    learned: bool,
) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    total, run = sum(lengths), 0

    def add(quantity: str, name: str, point: int, mean: float, *, length: int = 1, at: str = "block") -> None:
        error = 0.01 * abs(mean) * generator.uniform(0.5, 1.5)
        rows.append(
            (quantity, name, point, length, at, mean, error, 500, "own branch" if quantity == "perturbation" else "")
        )

    for name, length in zip(names, lengths, strict=True):
        for i in range(length):
            size = step * (1.3 / np.sqrt(1 + i)) * generator.uniform(0.7, 1.3)
            norm = 20.0 + 2 * i
            add("scaled_perturbation", name, i, size)
            add("perturbation", name, i, size * norm)
            add("state_norm", name, i, norm)
            if i:
                add("update_angle", name, i, generator.normal(0.15 if learned else 0.0, 0.12))
            for n in range(1, length - i + 1):
                turn = min(1.0, 0.08 * np.sqrt(n) * generator.uniform(0.8, 1.2))
                add("block_influence", name, i, 1 - np.cos(np.pi * turn), length=n, at="span")
                add("angular_distance", name, i, turn, length=n, at="span")
        for i in range(length + 1):
            done = (run + i) / total
            left = (1 - i / length) ** 0.8
            add("distance_to_last", name, i, left, at="state")
            add("cosine_to_last", name, i, 1 - 0.4 * left, at="state")
            right = 0.1 + 0.87 / (1 + np.exp(-12 * (done - 0.6))) if learned else generator.normal(0.1, 0.01)
            add("agreement", name, i, 1.0 if done == 1 else min(1.0, right), at="state")
            add("entropy", name, i, 2.3 * (1.02 - done), at="state")
            if i or run:
                add("label_change", name, i, 0.5 * (1 - done), at="state")
            if labels:
                add("accuracy", name, i, right, at="state")
                add("loss", name, i, 2.5 - 2.4 * right, at="state")
        run += length
    return rows


def _epoch(epoch: int) -> dict[str, float]:
    right = 0.98 - 0.6 / epoch
    return {"epoch": epoch, "lr": 0.1, "train_loss": 1 / epoch, "test_loss": 1.2 / epoch, "test_accuracy": right}


def _about(
    title: str,
    names: Sequence[str],
    blocks: Sequence[Sequence[str]],
    labels: bool,
    trained: bool,
    history: list[dict[str, float]],
) -> dict[str, Any]:
    sections = [{"name": n, "blocks": list(b), "passed": []} for n, b in zip(names, blocks, strict=True)]
    return {
        "title": title,
        "model": "run/model",
        "weights": "trained here" if trained else "random",
        "data": "digits",
        "split": "test",
        "examples": 500,
        "data_sha256": "ab" * 32,
        "loss": "cross-entropy",
        "seed": 0,
        "command": "residuum demo --out residuum-demo",
        "created": "2026-11-21T09:00:00+00:00",
        "seconds": 41.2,
        "versions": {"residuum": "0.1.0", "torch": "2.13.0", "numpy": "2.3.0", "python": "3.11.9"},
        "device": "cpu",
        "dtype": "float32",
        "parameters": 175258,
        "network": {"class": "ResNet", "sections": sections},
        "training": {"epochs": 12, "batch": 64, "lr": 0.1, "milestones": [0.5, 0.75], "history": history}
        if trained
        else None,
        "notes": [] if labels else ["labels do not match the 1000 classes of the model: label measures skipped"],
    }


def _indices(
    rows: list[tuple[Any, ...]], names: Sequence[str], lengths: Sequence[int], initial: bool
) -> dict[str, Any]:
    sums = [sum(row[5] for row in rows if row[:2] == ("scaled_perturbation", name)) for name in names]
    measured: dict[str, Any] = {
        "scaled_distance": {"sections": sums, "network": sum(sums)},
        "mean_scaled_perturbation": {"sections": [], "network": sum(sums) / sum(lengths)},
    }
    for quantity in ("accuracy", "loss"):
        last = [row[5] for row in rows if row[0] == quantity]
        if last:
            measured[f"final_{quantity}"] = last[-1]
    advice = [
        {
            "section": name,
            "blocks": blocks,
            "scaled_distance": distance,
            "fixed_distance": stopping_depth(distance, 0.1),
            "square_root": stopping_depth(distance**2 / blocks, 0.01),
        }
        for name, blocks, distance in zip(names, lengths, sums, strict=True)
    ]
    return {
        "measured": measured,
        "initial": measured if initial else None,
        "initial_reason": "" if initial else "parameter cls_token belongs to no module that can be reset",
        "advice": {"eps": 0.1, "sentence": ADVICE, "sections": advice},
    }
