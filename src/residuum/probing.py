"""Probing: a loaded network on a data set, measured as given and at initialisation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from residuum.cutting import cut_all
from residuum.data import ImageSet, Preparation, Splits, TextSet, TextSplits, batches, text_batches
from residuum.fitting import channels_of, check, labels_of, run_once
from residuum.loading import LoadedModel
from residuum.names import one_line, unknown
from residuum.nulls import calibrate_, kept_buffers, null_is_reset, null_model
from residuum.probes import (
    SCALES,
    drops,
    drops_first,
    drops_last,
    extra_runs,
    first_not_finite,
    gradients,
    interventions,
    lipschitz,
    margins,
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
    unrolled_last,
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
LABELLED = {
    "gradients": gradients(),
    "plugin_gradients": gradients(grad="plugin"),
    "margins": margins,
    "unrolled_last": unrolled_last,
}
CHANGES = {
    "drops": drops,
    "drops_first": drops_first,
    "drops_last": drops_last,
    "repeats": repeats,
    "swaps": swaps,
    "replacements": replacements,
    "shuffles": shuffles,
    "extra_runs": extra_runs,
    "unrolls": partial(unrolls, scales=SCALES),
}
NAMES = (*PASSIVE, *OTHERS, *LABELLED, *CHANGES)
USUAL = (*PASSIVE, "pairs", "readouts")
RESET = (
    "weights drawn by torch's default for each layer (reset_parameters), which can differ from what the network's "
    "authors start from"
)
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
        shuffled: The same network trained on shuffled labels; None if none was given.
        network: Class, sections and blocks, as JSON values.
        notes: What a reader must know.
    """

    profile: Profile
    initial: Profile | None
    initial_reason: str
    shuffled: Profile | None
    network: dict[str, Any]
    notes: tuple[str, ...]


def choose(names: Sequence[str]) -> dict[str, Probe]:
    """Probes by their names; the passive ones share one walk, the interventions one prefix tree.

    Args:
        names: Of `NAMES`; "all", alone, stands for them all.

    Returns:
        The probes, by the name or names that they stand for.

    Raises:
        ValueError: If a name is unknown (the nearest are offered), given twice, or none is given, or "all" with others.
    """
    names = NAMES if tuple(names) == ("all",) else names
    for name in names:
        if name == "all":
            raise ValueError("probe 'all' stands for every probe: give it alone, or give the others without it")
        if name not in NAMES:
            raise unknown("probe", name, (*NAMES, "all"))
        if names.count(name) > 1:
            raise ValueError(f"probe {name!r} is given twice")
    if not names:
        raise ValueError(f"no probes given; known: {', '.join(NAMES)}")
    walked = [name for name in names if name in PASSIVE]
    changed = [name for name in names if name in CHANGES]
    return (
        ({", ".join(walked): passive(*map(PASSIVE.get, walked))} if walked else {})
        | {name: (OTHERS | LABELLED)[name] for name in names if name in OTHERS | LABELLED}
        | ({", ".join(changed): interventions(*map(CHANGES.get, changed))} if changed else {})
    )


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
    size = reads.size if config.size is None else (config.size, config.size)
    channels = channels_of(loaded.model, data.images[:1], size) or len(mean)
    if len(mean) == 1:
        mean, std = mean * channels, std * channels
    if len(mean) != channels:
        raise ValueError(
            f"{loaded.name} reads {channels} channels, the images have {len(mean)} "
            "(the images of an npz file are [N, row, column, channel])"
        )
    return Preparation(own.white, mean, std, size)


def probe(
    loaded: LoadedModel,
    data: Splits | TextSplits,
    config: ProbeConfig,
    *,
    shuffled: LoadedModel | None = None,
    bar: Bar = quiet,
) -> Findings:
    """Measure a network as given and at initialisation.

    The network itself is moved to the device and number format and its parameters stop asking for gradients. Batch norm
    of random weights, which knows no data yet, gets its statistics from training images first.

    Args:
        loaded: The network.
        data: Training examples for batch norm at initialisation; test examples, which are measured.
        config: The settings.
        shuffled: The same network trained on shuffled labels (see `subsets.shuffled_labels`), which is measured on the
            same examples with their true labels.
        bar: Opens a progress bar.

    Raises:
        ValueError: If the network does not read such examples, or cannot be cut, or `shuffled` is no such network; the
            message says why.
    """
    about_shuffled = _about_shuffled(loaded, shuffled)
    check(loaded, data.test)
    if isinstance(data.test, TextSet):
        give, about_input = partial(text_batches, device=config.device), ""
    else:
        preparation = prepare_for(loaded, data.test, config)
        give = partial(batches, preparation=preparation, device=config.device, dtype=config.dtype)
        about_input = _about_images(loaded, data.test, preparation, config)
    model = loaded.model.to(device=config.device, dtype=config.dtype).requires_grad_(False)
    stream, output = run_once(loaded, give(data.test.take(2, seed=0), batch=2), config.blocks)
    labelled, about_labels = labels_of(loaded, data.test, output)
    probes = choose(config.probes)
    if not labelled and probes.keys() <= LABELLED.keys():
        raise ValueError(f"nothing to measure: {', '.join(probes)} need labels; {about_labels}")

    def calibration() -> Iterator[tuple[Tensor, Tensor]]:
        chosen = _for_calibration(data.train, config.seed)
        return _shown(give(chosen, batch=CALIBRATION_BATCH), bar, "batch-norm statistics", len(chosen))

    def shown(title: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        given = _shown(give(data.test, batch=config.batch), bar, title, len(data.test))
        return ((x, y if labelled else None) for x, y in given)

    if loaded.fresh:
        calibrate_(model, calibration())
    found, lost, about_found = _measure(model, partial(shown, "measuring"), probes, config)
    kept = {name: probe for name, probe in probes.items() if name not in lost}
    initial, about_initial = None, []
    reason = "this is the network at initialisation" if loaded.fresh else "it was not asked for"
    if config.initial and not loaded.fresh:
        again = partial(shown, "measuring at initialisation")
        initial, reason, about_initial = _at_initialisation(model, calibration, again, kept, config)
    memorised, about_memorised = None, []
    if shuffled is not None:
        other = shuffled.model.to(device=config.device, dtype=config.dtype).requires_grad_(False)
        memorised, _, about_memorised = _measure(other, partial(shown, "measuring after shuffled labels"), kept, config)
    about = (
        about_input,
        about_labels,
        _about_limit(model),
        *about_found,
        _about_outputs(found),
        _about_entries(found),
        _about_rounding(found, config.dtype),
        _about_underflow(found, config.dtype),
        about_shuffled,
    )
    others = [f"at initialisation: {line}" for line in about_initial]
    others += [f"after shuffled labels: {line}" for line in about_memorised]
    notes = (*filter(None, about), *others)
    return Findings(found, initial, reason, memorised, _describe(model, stream), notes)


def _measure(
    network: nn.Module,
    given: Callable[[], Iterator[tuple[Any, Tensor | None]]],
    probes: dict[str, Probe],
    config: ProbeConfig,
) -> tuple[Profile, set[str], list[str]]:
    """The profile, the names of the probes that failed, and lines about why, and about states that are not finite."""
    names = {probe: name for name, probe in probes.items()}
    lost, blocks = {}, config.blocks or None

    def failed(probe: Probe, error: Exception) -> None:
        name, kind = names[probe], "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        lost[name] = f"{name} not measured: {kind}{one_line(error).removeprefix(f'{name}: ')}"

    found = profile(network, given(), list(names), blocks=blocks, failed=failed)
    lines = list(lost.values())
    if lost or any(not m.values.isfinite().all() for m in found.measures.values()):
        places = first_not_finite(cut_all(network, (x for x, _ in given()), blocks))
        lines += _about_states(places, len(found.examples))
    return found, set(lost), lines


def _at_initialisation(
    model: nn.Module,
    calibration: Callable[[], Iterator[tuple[Any, Tensor]]],
    given: Callable[[], Iterator[tuple[Any, Tensor | None]]],
    probes: dict[str, Probe],
    config: ProbeConfig,
) -> tuple[Profile | None, str, list[str]]:
    """The profile of the network at initialisation, or None and why there is none; and lines about it."""
    try:
        null = null_model(model, calibration(), seed=config.seed)
        found, _, lines = _measure(null, given, probes, config)
    except ValueError as error:  # there is none, or it cannot be measured: what was found is kept
        return None, str(error), []
    about = [RESET + _about_kept(kept_buffers(model, null))] if null_is_reset(model) else []
    return found, "", [*about, *lines]


def _about_shuffled(loaded: LoadedModel, shuffled: LoadedModel | None) -> str:
    """How the two were trained, where it differs; "" without the second. Refuses what cannot be compared."""
    if shuffled is None:
        return ""
    ours, theirs = loaded.training, shuffled.training
    if theirs is None or theirs.get("labels", "true") == "true":
        raise ValueError(
            f"{shuffled.name} was not trained on shuffled labels; give a folder of `residuum train --shuffle-labels`"
        )
    if ours is None:
        raise ValueError(
            f"{loaded.name} was not trained by residuum, so no network trained on shuffled labels is comparable; "
            "leave out --shuffled"
        )
    must_agree = {
        "networks": (loaded.model.config, shuffled.model.config),
        "data": tuple(f"{training.get('data')} {training.get('data_sha256')}" for training in (ours, theirs)),
    }
    for what, (own, other) in must_agree.items():
        if own != other:
            raise ValueError(
                f"{loaded.name} and {shuffled.name} are of different {what} ({own} and {other}); "
                "train the latter with the same options, and --shuffle-labels"
            )
    names = [name for name in ours if name not in ("history", "labels") and ours[name] != theirs.get(name)]
    differing = ", ".join(f"{name} {theirs.get(name)} there, {ours[name]} here" for name in names)
    losses = [f"{training['history'][-1]['train_loss']:.3f}" for training in (theirs, ours)]
    return f"training loss at the end: {losses[0]} with shuffled labels, {losses[1]} with true ones" + (
        f"; the former was trained otherwise: {differing}" if names else ""
    )


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


def _about_limit(model: nn.Module) -> str:
    """What is limited in a network of our own; "" if nothing."""
    config = getattr(model, "config", None)
    limit = getattr(config, "limit", None)
    if limit is None:
        return ""
    norms = {"none": "removed"}.get(config.norm, limit.norm)
    return f"Lipschitz limit {limit.bound:g} on the branch of every block, batch norm {norms}" + (
        "" if norms != "allowed" else ": the limit holds for the convolutions only"
    )


def _about_kept(names: Sequence[str]) -> str:
    """Which values of a network its null model still has; "" if none."""
    if not names:
        return ""
    more = f" and {len(names) - 3} others" if len(names) > 3 else ""
    return f"; buffers that these leave alone have the values of the network as given: {', '.join(names[:3])}{more}"


def _about_outputs(found: Profile) -> str:
    """How many outputs are nan or infinite; "" if none."""
    if "entropy" not in found.measures:
        return ""
    bad = int((~found.measures["entropy"].values[:, -1].isfinite()).sum())
    return f"the outputs of {bad} of {len(found.examples)} examples are not finite; they count as wrong" if bad else ""


def _about_entries(found: Profile) -> str:
    """Which blocks dropping does not leave out; "" if none, or if blocks were not dropped."""
    remark = found.about.get("drop_agreement", "")
    return f"dropping blocks: {remark}" if remark else ""


def _about_rounding(found: Profile, dtype: torch.dtype) -> str:
    """Which updates are rounding, being differences of states in few digits; "" if none."""
    steps = found.measures.get("scaled_perturbation")
    if steps is None or steps.update != "after - before" or dtype not in (torch.bfloat16, torch.float16):
        return ""
    least = torch.finfo(dtype).eps
    small = int((found.mean("scaled_perturbation") < least).sum())
    if not small:
        return ""
    return (
        f"in {str(dtype).removeprefix('torch.')} the updates of {small} of {len(steps.points)} blocks, differences of "
        f"rounded states and below {least:.2g} of their length, are rounding in good part; measure in float32"
    )


def _about_underflow(found: Profile, dtype: torch.dtype) -> str:
    """How many examples have gradients that float16 has no numbers for, as behind tiny weights; "" if none."""
    norms = [measure.values for name, measure in found.measures.items() if "gradient_norm" in name]
    if not norms or dtype != torch.float16:
        return ""
    lost = int((torch.cat(norms, 1) == 0).any(1).sum())
    if not lost:
        return ""
    return (
        f"in float16 the gradients of {lost} of {len(found.examples)} examples are 0 at some block: it has no numbers "
        "below 6e-08; no mean of a gradient's cosine there counts them; measure in float32 or bfloat16"
    )


def _about_states(places: dict[str, int], examples: int) -> list[str]:
    """Where states stopped being finite, as one line; none if they are."""
    if not places:
        return []
    (place, count), *others = places.items()
    more = f" and at {len(others)} later places in others" if others else ""
    return [
        f"the states of {sum(places.values())} of {examples} examples are not finite, "
        f"first after {place} in {count} of them{more}"
    ]


def _describe(model: nn.Module, stream: Stream) -> dict[str, Any]:
    """Class, sections and blocks, as JSON values."""
    sections = [
        {"name": s.name, "blocks": [block.name for block in s.blocks], "passed": list(s.passed)}
        for s in stream.sections
    ]
    return {"class": type(model).__name__, "sections": sections}
