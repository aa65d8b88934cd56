"""Probing: a loaded network on a data set, measured as given and at initialisation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from residuum.cutting import cut
from residuum.data import ImageSet, Preparation, Splits, TextSet, TextSplits, batches, text_batches
from residuum.loading import LoadedModel
from residuum.names import unknown
from residuum.nulls import NoNullModel, calibrate_, null_is_reset, null_model
from residuum.probes import (
    SCALES,
    drops,
    drops_first,
    drops_last,
    gradients,
    interventions,
    lipschitz,
    margins,
    misfit,
    pairs,
    passive,
    perturbation,
    readouts,
    repeats,
    replacements,
    settling,
    shuffles,
    state_norm,
    swaps,
    unrolls,
    update_angle,
)
from residuum.profiles import Probe, Profile, profile
from residuum.progress import Bar, quiet
from residuum.streams import Stream

CALIBRATION, CALIBRATION_BATCH = 1000, 100  # training images that set batch-norm statistics at initialisation
# What `--probes` names. The passive ones share one walk, the interventions one prefix tree.
PASSIVE = {"perturbation": perturbation, "state_norm": state_norm, "update_angle": update_angle}
OTHERS = {"pairs": pairs, "readouts": readouts, "lipschitz": lipschitz, "settling": settling}
LABELLED = {"gradients": gradients(), "plugin_gradients": gradients(grad="plugin"), "margins": margins}
CHANGES = {
    "drops": drops,
    "drops_first": drops_first,
    "drops_last": drops_last,
    "repeats": repeats,
    "swaps": swaps,
    "replacements": replacements,
    "shuffles": shuffles,
    "unrolls": partial(unrolls, scales=SCALES),
}
NAMES = (*PASSIVE, *OTHERS, *LABELLED, *CHANGES)
USUAL = (*PASSIVE, "pairs", "readouts")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class ProbeConfig:
    """Settings of a probing run.

    Attributes:
        probes: Names of what is measured.
        blocks: Names of the block modules where the search finds the wrong ones; empty searches.
        size: Rows and columns that images are resized to; None is the network's own size, or else that of the data.
        normalise: Whose mean and standard deviation: the network's own (the data's where it has none), the data's, or
            ImageNet's.
        initial: Measure the network at initialisation, too.
        batch: Images measured at a time.
        device: Where the work is done.
        dtype: Number format of weights and states.
        seed: Seed of the weights at initialisation and of the choice of images.
    """

    probes: tuple[str, ...] = USUAL
    blocks: tuple[str, ...] = ()
    size: int | None = None
    normalise: Literal["model", "data", "imagenet"] = "model"
    initial: bool = True
    batch: int = 64
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass(frozen=True)
class Findings:
    """What probing found.

    Attributes:
        profile: The network as given.
        initial: The same network at initialisation; None if there is none.
        initial_reason: Why there is none.
        network: Class, sections and blocks, as JSON values.
        notes: What a reader must know.
    """

    profile: Profile
    initial: Profile | None
    initial_reason: str
    network: dict[str, Any]
    notes: tuple[str, ...]


def choose(names: Sequence[str], *, labelled: bool = True) -> list[Probe]:
    """Probes by their names; the passive ones share one walk, the interventions one prefix tree.

    Args:
        names: Of `NAMES`; "all" stands for them all.
        labelled: Whether there are labels; without them the probes that need some are left out.

    Raises:
        ValueError: If a name is unknown (the nearest are offered), given twice, or none is given.
    """
    names = NAMES if tuple(names) == ("all",) else names
    for name in names:
        if name not in NAMES:
            raise unknown("probe", name, (*NAMES, "all"))
        if names.count(name) > 1:
            raise ValueError(f"probe {name!r} is given twice")
    if not names:
        raise ValueError(f"no probes given; known: {', '.join(NAMES)}")
    walked = [PASSIVE[name] for name in names if name in PASSIVE]
    changed = [CHANGES[name] for name in names if name in CHANGES]
    single = OTHERS | (LABELLED if labelled else {})
    return [
        *([passive(*walked)] if walked else []),
        *(single[name] for name in names if name in single),
        *([interventions(*changed)] if changed else []),
    ]


def prepare_for(loaded: LoadedModel, data: ImageSet, config: ProbeConfig) -> Preparation:
    """How pixels become the input of a network: by its own constants, or those of the data where it has none.

    Raises:
        ValueError: If the channels do not fit.
    """
    own, reads = data.preparation, loaded.reads
    mean, std = own.mean, own.std
    if config.normalise == "imagenet":
        mean, std = IMAGENET
    elif config.normalise == "model" and reads.mean is not None:
        mean, std = reads.mean, reads.std
    channels = _channels(loaded.model) or len(mean)
    if len(mean) == 1:
        mean, std = mean * channels, std * channels
    if len(mean) != channels:
        raise ValueError(
            f"{loaded.name} reads {channels} channels, the images have {len(mean)} "
            "(the images of an npz file are [N, row, column, channel])"
        )
    size = reads.size if config.size is None else (config.size, config.size)
    return Preparation(own.white, mean, std, size)


def probe(loaded: LoadedModel, data: Splits | TextSplits, config: ProbeConfig, *, bar: Bar = quiet) -> Findings:
    """Measure a network as given and at initialisation.

    The network itself is moved to the device and number format and its parameters stop asking for gradients. Batch norm
    of random weights, which knows no data yet, gets its statistics from training images first.

    Args:
        loaded: The network.
        data: Training examples for batch norm at initialisation; test examples, which are measured.
        config: The settings.
        bar: Opens a progress bar.

    Raises:
        ValueError: If the network does not read such examples, or cannot be cut; the message says why.
    """
    _check_kind(loaded, data.test)
    if isinstance(data.test, TextSet):
        give, about_input = partial(text_batches, device=config.device), ""
    else:
        preparation = prepare_for(loaded, data.test, config)
        give = partial(batches, preparation=preparation, device=config.device, dtype=config.dtype)
        about_input = _about_images(loaded, data.test, preparation, config)
    model = loaded.model.to(device=config.device, dtype=config.dtype).requires_grad_(False)
    stream, output = _try(loaded, give(data.test.take(2, seed=0), batch=2), config)
    labelled, about_labels = _labels(loaded, data.test, output)
    probes = choose(config.probes, labelled=labelled)
    if readouts in probes and output.ndim > 3:
        probes.remove(readouts)
        about_labels = f"outputs of shape {list(output.shape)} are no classes: readouts are skipped"

    def calibration() -> Iterator[tuple[Tensor, Tensor]]:
        chosen = _for_calibration(data.train, config.seed)
        return _shown(give(chosen, batch=CALIBRATION_BATCH), bar, "batch-norm statistics", len(chosen))

    def measure(network: nn.Module, title: str) -> Profile:
        given = _shown(give(data.test, batch=config.batch), bar, title, len(data.test))
        return profile(network, ((x, y if labelled else None) for x, y in given), probes, blocks=config.blocks or None)

    if loaded.fresh:
        calibrate_(model, calibration())
    found = measure(model, "measuring")
    initial, reason = None, "this is the network at initialisation" if loaded.fresh else "it was not asked for"
    if config.initial and not loaded.fresh:
        try:
            null = null_model(model, calibration(), seed=config.seed)
            initial, reason = measure(null, "measuring at initialisation"), ""
        except NoNullModel as error:
            reason = str(error)
    about_null = ""
    if initial is not None and null_is_reset(model):
        about_null = (
            "at initialisation: weights drawn by torch's default for each layer (reset_parameters), which can differ "
            "from what the network's authors start from"
        )
    notes = tuple(filter(None, (about_input, about_labels, _about_outputs(found), about_null)))
    return Findings(found, initial, reason, _describe(model, stream), notes)


def _check_kind(loaded: LoadedModel, data: ImageSet | TextSet) -> None:
    """Refuse images for a network that reads text, text for one that reads images, tokens that it does not know."""
    reads_text = getattr(loaded.model, "main_input_name", "") == "input_ids"
    if reads_text and not isinstance(data, TextSet):
        raise ValueError(f"{loaded.name} reads text, not images; give --data FILE.txt")
    if isinstance(data, TextSet):
        if not reads_text:
            raise ValueError(f"{loaded.name} reads images, not text; give --data digits or FILE.npz")
        known = loaded.model.get_input_embeddings().num_embeddings
        if data.classes > known:
            raise ValueError(f"{data.name} has {data.classes} different tokens, {loaded.name} knows {known}")


def _for_calibration(data: ImageSet | TextSet, seed: int) -> ImageSet | TextSet:
    """Training images for batch-norm statistics; where there are enough, so many that all batches are of one size."""
    count = min(len(data), CALIBRATION)
    return data.take(count - count % CALIBRATION_BATCH or count, seed=seed)


def _shown(given: Iterator[tuple[Tensor, Tensor]], bar: Bar, title: str, total: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches with a bar, which opens when the first is asked for."""
    done = 0
    with bar(title, total) as show:
        for x, y in given:
            yield x, y
            done += len(y)
            show(done, "")


def _try(loaded: LoadedModel, given: Iterator[tuple[Tensor, Tensor]], config: ProbeConfig) -> tuple[Stream, Tensor]:
    """The stream and the output of a few images, so that what does not fit is refused before the work."""
    x, _ = next(given)
    try:
        with torch.no_grad():
            stream = cut(loaded.model, x, config.blocks or None)
            return stream, stream.run(keep=False).output
    except ValueError:
        raise
    except Exception as error:  # whatever a network, perhaps of the user's file, says to a wrong shape
        shape = list((x["input_ids"] if isinstance(x, dict) else x).shape[1:])
        advice = "--window" if isinstance(x, dict) else "--size"
        raise ValueError(
            f"{loaded.name} does not run on examples of shape {shape}: {type(error).__name__}: {error}; "
            f"try another {advice}"
        ) from error


def _labels(loaded: LoadedModel, data: ImageSet | TextSet, output: Tensor) -> tuple[bool, str]:
    """Whether the labels are those of the network's outputs, and a line about it."""
    skipped = "measures with labels are skipped"
    if isinstance(data, TextSet):
        reason = misfit(output, data.targets[: len(output)])
        return not reason, f"{reason}: {skipped}" if reason else ""
    if output.ndim != 2 or output.shape[1] != len(data.classes):
        return (
            False,
            f"{loaded.name} has outputs {list(output.shape[1:])}, {data.name} {len(data.classes)} classes: {skipped}",
        )
    if loaded.classes is not None and loaded.classes != data.classes:
        return False, f"the classes of {loaded.name} are not those of {data.name}: {skipped}"
    reason = misfit(output, data.labels[: len(output)])
    if reason:
        return False, f"{reason}: {skipped}"
    if loaded.classes is None and not loaded.fresh:
        return True, "the network does not name its classes; they are taken to be in the order of the data's"
    return True, ""


def _about_images(loaded: LoadedModel, data: ImageSet, preparation: Preparation, config: ProbeConfig) -> str:
    """What was done to the images for a network that reads others; "" if nothing."""
    done = []
    rows, columns = data.images.shape[2:]
    if preparation.size not in (None, (rows, columns)):
        done.append(f"resized from {rows}x{columns} to {preparation.size[0]}x{preparation.size[1]}")
    if len(preparation.mean) != data.images.shape[1]:
        done.append(f"their channel repeated {len(preparation.mean)} times")
    if preparation.mean[: len(data.preparation.mean)] != data.preparation.mean:
        whose = "ImageNet's" if config.normalise == "imagenet" else "the network's own"
        done.append(f"standardised with {whose} mean and deviation")
    return f"images: {', '.join(done)}" if done else ""


def _about_outputs(found: Profile) -> str:
    """How many outputs are nan or infinite; "" if none."""
    if "entropy" not in found.measures:
        return ""
    bad = int((~found.measures["entropy"].values[:, -1].isfinite()).sum())
    return f"the outputs of {bad} of {len(found.examples)} examples are not finite; they count as wrong" if bad else ""


def _channels(model: nn.Module) -> int | None:
    """Channels that the first convolution reads; None if there is none."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)


def _describe(model: nn.Module, stream: Stream) -> dict[str, Any]:
    """Class, sections and blocks, as JSON values."""
    sections = [
        {"name": s.name, "blocks": [block.name for block in s.blocks], "passed": list(s.passed)}
        for s in stream.sections
    ]
    return {"class": type(model).__name__, "sections": sections}
