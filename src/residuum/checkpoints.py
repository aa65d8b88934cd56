"""Checkpoints: all that a training needs to go on as if it had not been stopped, in one file that appears whole."""

import json
import platform
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from residuum.files import read_tensors, restore_, stored, write_tensors
from residuum.names import one_line

_FORMAT = "residuum checkpoint 2"


class CheckpointError(ValueError):
    """A checkpoint that a training cannot go on from; the message says why."""


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        epoch: Epochs that are complete.
        step: Steps done in the next one.
        total: Sum of that epoch's losses over its images so far.
        history: One row per complete epoch.
        solves: What the blocks' solves took in the next epoch so far (`residuum.solving`).
    """

    epoch: int = 0
    step: int = 0
    total: float = 0.0
    history: tuple[dict[str, Any], ...] = ()
    solves: dict[str, Any] = field(default_factory=dict)


def here(world: int, device: str) -> dict[str, Any]:
    """What must be the same for two runs to give the same bits: processor, threads, processes, torch."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "processes": world,
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "cpu family", "model")
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return " ".join(found[key] for key in wanted if key in found) or platform.machine()


def save(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress, about: dict[str, Any]
) -> None:
    """Write a checkpoint, atomically. Random states are not in it: every step draws from a seed of its own.

    Args:
        path: The file.
        model: The network; its state is kept.
        optimiser: Its state is kept.
        progress: How far the training is.
        about: What a resumed run must have in common with this one: settings, data, machine.

    Raises:
        OSError: If the disk is full or the folder cannot be written; an older checkpoint stays.
    """
    tensors = {f"model/{name}": value for name, value in stored(model).items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{index}/{name}": v for name, v in state.items() if isinstance(v, Tensor)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    content = {"progress": vars(progress), "about": about, "trained": _trained(model, optimiser)}
    write_tensors(path, tensors, content | {"sha256": _sum(content, tensors)}, format=_FORMAT)


def resume_(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, about: dict[str, Any]) -> Progress:
    """Put a training back to where a checkpoint left it.

    Args:
        path: The file.
        model: The network, its state replaced.
        optimiser: Its state replaced.
        about: Settings, data and machine of this run.

    Returns:
        How far the training was.

    Raises:
        CheckpointError: If the file is no checkpoint, is damaged, or belongs to another run; the message says which.
    """
    tensors, content = _read(path, about)
    pairs = zip_longest(content["trained"], _trained(model, optimiser), fillvalue="none")
    if different := [f"{theirs} there, {own} here" for theirs, own in pairs if theirs != own]:
        raise CheckpointError(
            f"{path} belongs to another network, or to one of which other parameters are trained ({different[0]}); "
            "use the same one, or delete it to start anew"
        )
    try:
        restore_(model, {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")})
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} belongs to another network ({one_line(error)}); use the same one, or delete it to start anew"
        ) from error
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser/"):
            _, index, name = key.split("/")
            like = parameters[int(index)]
            # In the memory layout of the parameter, as the optimiser made it.
            kept = torch.empty_like(like).copy_(value) if value.shape == like.shape and value.ndim else value
            state.setdefault(int(index), {})[name] = kept
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    return _progress(content)


def progress_of(path: Path, about: dict[str, Any]) -> Progress:
    """How far the training of a checkpoint was.

    Args:
        path: The file.
        about: Settings, data and machine of this run.

    Raises:
        CheckpointError: If the file is no checkpoint, is damaged, or belongs to another run.
    """
    return _progress(_read(path, about)[1])


def _sum(content: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """The SHA-256 of what a checkpoint holds; content is text in the same order before it is written and after."""
    found = sha256(json.dumps(content).encode())
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _trained(model: nn.Module, optimiser: torch.optim.Optimizer) -> list[str]:
    """The parameters in the order by which the optimiser knows its state."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = enumerate(optimiser.param_groups)
    return [f"{names[id(p)]} {tuple(p.shape)} in group {number}" for number, group in groups for p in group["params"]]


def _progress(content: dict[str, Any]) -> Progress:
    found = content["progress"]
    return Progress(**found | {"history": tuple(found["history"])})


def _read(path: Path, about: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors, content = read_tensors(path, format=_FORMAT)
    except ValueError as error:
        raise CheckpointError(f"{error}; delete it to start anew, or choose another output folder") from error
    if content.pop("sha256", None) != _sum(content, tensors):
        raise CheckpointError(f"{path} is damaged: it is not what was written; delete it to start anew")
    theirs = content["about"]
    about = json.loads(json.dumps(about))  # as it was written: a tuple is a list there
    different = [f"{k}: {theirs.get(k)} there, {about.get(k)} here" for k in about if theirs.get(k) != about[k]]
    if different:
        raise CheckpointError(
            f"{path} belongs to a training that would not end with the same bits ({'; '.join(different)}); "
            "use the same settings, or delete it to start anew"
        )
    return tensors, content
