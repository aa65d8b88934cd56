"""Result folders: what a run found and where it came from, as files that the report reads."""

import platform
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from residuum import __version__
from residuum.convergence import companions, convergence_indices
from residuum.data import ImageSet, Splits, TextSet
from residuum.files import write_atomically, write_json
from residuum.indices import depth_advice, indices
from residuum.loading import LoadedModel, save_run, trained_on
from residuum.models import ResNet
from residuum.probes import groups
from residuum.probing import Findings
from residuum.profiles import Profile
from residuum.training import Row, TrainConfig
from residuum.zoos import Reads

if TYPE_CHECKING:
    import pandas


def write_run(folder: Path, model: ResNet, data: Splits, config: TrainConfig, history: list[Row]) -> LoadedModel:
    """Write a trained network: config.json and weights.safetensors.

    Returns:
        The network as it is measured, with settings, data and history of its training.
    """
    about = {
        "data": data.train.name,
        "data_sha256": data.train.sha256,
        "images": len(data.train),
        "labels": data.train.labelling,
        "history": history,
    }
    training = config.describe() | about
    prepare, classes = data.train.preparation, data.train.classes
    save_run(folder, model, preparation=prepare, classes=classes, training=training)
    reads = Reads(prepare.size, prepare.mean, prepare.std)
    return LoadedModel(model, "residual network", trained_on(training), reads, classes, training)


def write_findings(folder: Path, findings: Findings) -> None:
    """Write profile.parquet and .safetensors, the same for "initial" and "shuffled", groups.parquet and indices.json.

    indices.json holds, for the network as given, at initialisation and trained on shuffled labels (None where that was
    not measured):

    - "measured", "initial", "shuffled": `indices`;
    - "convergence", "initial_convergence", "shuffled_convergence": `convergence_indices` by accuracy, and `companions`;
    - the same three with "_by_agreement": `convergence_indices` by agreement with the network's own answers. They are
      defined also where accuracy is that of guessing, as on test images for the last two networks; there read what
      `convergence_indices` says of networks with one answer for all.
    """
    networks = {"": findings.profile, "initial": findings.initial, "shuffled": findings.shuffled}
    content = {"initial_reason": findings.initial_reason, "advice": depth_advice(findings.profile)}
    for name, found in networks.items():
        prefix = name and f"{name}_"
        content[name or "measured"] = found and indices(found)
        content[f"{prefix}convergence"] = found and _convergence(found)
        content[f"{prefix}convergence_by_agreement"] = found and _by_agreement(found)
        if found:
            write_profile(folder, name or "profile", found)
    if "margin" in findings.profile.measures and len(table := _groups(findings.profile)):
        write_atomically(folder / "groups.parquet", lambda path: table.to_parquet(path, index=False))
    write_json(folder / "indices.json", content)


def _convergence(profile: Profile) -> dict[str, Any]:
    """The indices of iterative convergence and their companions, as far as they were measured."""
    intact = "intact_accuracy" in profile.measures
    return (convergence_indices(profile) if intact else {}) | companions(profile)


def _by_agreement(profile: Profile) -> dict[str, Any]:
    """The indices of iterative convergence that need no labels, as far as they were measured."""
    return convergence_indices(profile, by="agreement") if "chance" in profile.measures else {}


def _groups(profile: Profile) -> "pandas.DataFrame":
    """Answers of borderline, right and all examples at every state and after extra steps; "group" says which."""
    import pandas as pd

    names = ("accuracy", "loss", "entropy")
    wanted = {*names, *(f"unroll_1_{name}" for name in names)}
    parts = [part.select(wanted).to_pandas().assign(group=group) for group, part in groups(profile).items()]
    return pd.concat(parts, ignore_index=True)


def _with_true_changes(profile: Profile) -> Profile:
    """With what each block truly changes in the loss, as `loss_changes` has it, where its dropping was measured."""
    known = profile.measures
    if "loss_change" in known or not {"intact_loss", "drop_loss"} <= set(known):
        return profile
    values = known["intact_loss"].values - known["drop_loss"].values
    return replace(profile, measures=known | {"loss_change": replace(known["drop_loss"], values=values)})


def write_profile(folder: Path, name: str, profile: Profile) -> None:
    """Write a profile as a table of means and as values per example."""
    profile = _with_true_changes(profile)
    profile.save(folder / f"{name}.safetensors")
    write_atomically(folder / f"{name}.parquet", lambda path: profile.to_pandas().to_parquet(path, index=False))


def write_provenance(
    folder: Path,
    loaded: LoadedModel,
    data: ImageSet | TextSet,
    findings: Findings | None,
    *,
    title: str,
    seed: int,
    command: str,
    seconds: float,
) -> None:
    """Write provenance.json: what was measured, on what, by which command and versions; and history.json, if known.

    Args:
        folder: The result folder.
        loaded: The network.
        data: The images that were measured.
        findings: What was found; None for a run that was trained only.
        title: Heading of the report.
        seed: Seed of the run.
        command: The command line.
        seconds: How long it took.
    """
    if loaded.training and "history" in loaded.training:
        write_json(folder / "history.json", loaded.training["history"])
    like = next(chain(loaded.model.parameters(), loaded.model.buffers()), None)
    kind = {} if like is None else {"device": str(like.device), "dtype": str(like.dtype).removeprefix("torch.")}
    versions = {
        "residuum": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
    network = findings.network if findings else {"class": type(loaded.model).__name__, "sections": []}
    if isinstance(loaded.model, ResNet):
        network = network | {"settings": asdict(loaded.model.config)}
    content = {
        "title": title,
        "model": loaded.name,
        "weights": loaded.weights,
        "data": data.name,
        "split": data.split,
        "examples": len(data),
        "data_sha256": data.sha256,
        "loss": findings.profile.about.get("loss", "") if findings else "",
        "seed": seed,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "versions": versions,
        **kind,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "network": network,
        "training": loaded.training,
        "notes": list(findings.notes) if findings else [],
    }
    write_json(folder / "provenance.json", content)
