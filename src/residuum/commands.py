"""What the commands do: resolve data, then a network, then measure, write, and say on the screen what came out."""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.table import Table

from residuum import flags as options
from residuum import report as report_page
from residuum.curves import watch
from residuum.data import ClutterConfig, Splits, TextSplits, catalogue, load_splits, load_text, write_digitclutter
from residuum.data.images import NAMES
from residuum.files import FIGURES, NETWORK, RESULT, new_folder
from residuum.folding import fold_coupled
from residuum.indices import depth_advice, indices
from residuum.layers.anystep import step_of
from residuum.layers.coupling import Coupling
from residuum.layers.lipschitz import Limit
from residuum.layers.sharing import NAIVE, UBN
from residuum.loading import LoadedModel, load_model, save_run
from residuum.models import ResNet, ResNetConfig, network_of, scaled
from residuum.names import one_line, unknown
from residuum.penalties import penalty_of
from residuum.probing import Findings, ProbeConfig, choose, prepare_for
from residuum.probing import probe as probe_network
from residuum.processes import rank
from residuum.progress import bar, console
from residuum.rates import rate
from residuum.results import write_findings, write_provenance, write_run
from residuum.stability import draw
from residuum.training import AfterEpoch, TrainConfig
from residuum.training import train as train_network

screen, notices = console(), console(stderr=True)


def demo(flags: options.Demo, command: str) -> None:
    """Train a small network on the digits, measure it, write folder and report.

    Args:
        flags: The command's options.
        command: The command as it was typed, for the provenance.
    """
    start, common = perf_counter(), flags.common
    device, data = find_device(common.device), _images("digits", None, common)
    config = TrainConfig(epochs=flags.epochs, batch=common.batch, seed=common.seed)
    with new_folder(flags.out, writes=NETWORK | RESULT, replace=flags.force or _of_a_demo(flags.out)) as folder:
        network = ResNetConfig(blocks=(8, 8, 8), widths=(8, 16, 32), channels=1)
        loaded = _trained(folder, network, data, config, device, common)
        settings = ProbeConfig(batch=common.batch, device=device, dtype=_dtype(common), seed=common.seed)
        findings = probe_network(loaded, data, settings, bar=bar)
        title = "A residual network learns to read digits"
        _write(folder, loaded, data, findings, title=title, seed=common.seed, command=command, start=start)
    _say(flags.out, loaded, findings)


def train(flags: options.Train, command: str) -> None:
    """Train a network of our own and write it; under torchrun process 0 writes.

    Args:
        flags: The command's options.
        command: The command as it was typed, for the provenance.
    """
    start, common = perf_counter(), flags.common
    if flags.watch < 0:
        raise ValueError(f"--watch is {flags.watch}; it must be 0 (nothing is watched) or more images")
    device, data = find_device(common.device), _images(flags.data, flags.data_root, common)
    if flags.shuffle_labels:
        data = data._replace(train=data.train.shuffled(seed=common.seed))
    channels, classes = data.train.images.shape[1], len(data.train.classes)
    network = _network(flags, channels, classes, data.train.images.shape[2:])
    config = TrainConfig(
        epochs=flags.epochs,
        batch=common.batch,
        lr=flags.lr,
        rate=rate(flags.rate),
        optimiser=flags.optimiser,
        momentum=flags.momentum,
        weight_decay=flags.weight_decay,
        clip=flags.clip,
        accumulate=flags.accumulate,
        precision=flags.precision,
        augment=flags.augment,
        coupling=Coupling(flags.couple, "all" if flags.couple_norms else "weights") if flags.couple else None,
        penalty=penalty_of(flags.penalty),
        seed=common.seed,
    )
    if rank():
        model = ResNet(network, seed=config.seed).to(device=device, dtype=_dtype(common))
        train_network(model, data, config, checkpoint=_checkpoint(flags.out))
        return
    watched = None
    if flags.watch:
        watched = watch(data.test, limit=flags.watch, preparation=data.train.preparation, seed=common.seed)
    with new_folder(flags.out, writes=NETWORK, replace=flags.force) as folder:
        kept = _checkpoint(flags.out)
        loaded = _trained(folder, network, data, config, device, common, checkpoint=kept, after_epoch=watched)
        seconds = perf_counter() - start
        title = f"{flags.out.name}, trained"
        write_provenance(
            folder, loaded, data.test, None, title=title, seed=common.seed, command=command, seconds=seconds
        )
    _checkpoint(flags.out).unlink(missing_ok=True)
    last = loaded.training["history"][-1]
    found = f" (of the classes {last['test_digits']:.1%})" if "test_digits" in last else ""
    screen.print(f"test accuracy {last['test_accuracy']:.1%}{found}, loss {last['test_loss']:.3f}, {seconds:.0f} s")
    if flags.shuffle_labels:
        screen.print("labels of the training images were shuffled, those of the test images are true")
    screen.print(f"network: {flags.out.resolve()}")


def probe(flags: options.Probe, command: str) -> None:
    """Measure a network and write folder and report.

    Args:
        flags: The command's options.
        command: The command as it was typed, for the provenance.
    """
    start, common = perf_counter(), flags.common
    choose(flags.probes)
    device = find_device(common.device)
    _check(common)
    text = flags.data.endswith(".txt")
    if text:
        data = load_text(Path(flags.data), window=flags.window, tokenizer=_tokenizer(flags))
    else:
        data = load_splits(flags.data, flags.data_root)
    measured = getattr(data, flags.split).take(common.limit, seed=common.seed)  # batch norm is calibrated by all
    settings = ProbeConfig(
        probes=flags.probes,
        blocks=flags.blocks,
        size=flags.size,
        normalise=flags.normalise,
        initial=flags.initial,
        batch=common.batch,
        device=device,
        dtype=_dtype(common),
        seed=common.seed,
    )
    inputs = (flags.model, flags.shuffled)
    with new_folder(flags.out, writes=RESULT, replace=flags.force, reads=inputs) as folder:
        loaded = _loaded(flags, None if text else len(measured.classes))
        shuffled = _of_folder(flags.shuffled) if flags.shuffled else None
        splits = data._replace(test=measured)
        findings = probe_network(loaded, splits, settings, shuffled=shuffled, bar=bar)
        title = f"{loaded.name} on {measured.name}"
        _write(folder, loaded, splits, findings, title=title, seed=common.seed, command=command, start=start)
    _say(flags.out, loaded, findings)


def report(flags: options.Report, command: str) -> None:
    """Write one page about result folders.

    Args:
        flags: The command's options.
        command: Not used.
    """
    report_page.check_free(flags.out, replace=flags.force)
    report_page.write(flags.folders, flags.out)
    screen.print(f"report: {flags.out.resolve()}")


def stability(flags: options.Stability, command: str) -> None:
    """Draw phase planes and regions of stability.

    Args:
        flags: The command's options.
        command: Not used.
    """
    with new_folder(flags.out, writes=FIGURES, replace=flags.force) as folder:
        draw(folder)
    screen.print(f"figures: {flags.out.resolve()}")


def fold(flags: options.Fold, command: str) -> None:
    """Fold a network of our own and write it.

    Args:
        flags: The command's options.
        command: The command as it was typed, for the provenance.
    """
    start, common = perf_counter(), flags.common
    loaded = _of_folder(flags.model)
    data = _images_of(loaded, flags)
    preparation = prepare_for(loaded, data.train, ProbeConfig())
    model = loaded.model.to(device=find_device(common.device), dtype=_dtype(common))
    with new_folder(flags.out, writes=NETWORK, replace=flags.force, reads=(flags.model,)) as folder:
        found = fold_coupled(model, data, couple="all" if flags.norms else "weights", preparation=preparation)
        cost = {"parameters": found.parameters, "loss": found.loss, "accuracy": found.accuracy}
        about = {"sharing": found.sharing, **cost, "data": data.test.name, "images": len(data.test)}
        training = (loaded.training or {}) | {"folded": about}
        save_run(folder, found.model, preparation=preparation, classes=loaded.classes, training=training)
        now = replace(loaded, model=found.model, weights=f"{loaded.weights}, folded", training=training)
        title, seconds = f"{flags.out.name}, folded", perf_counter() - start
        write_provenance(folder, now, data.test, None, title=title, seed=common.seed, command=command, seconds=seconds)
    alike = ", ".join("one block" if s is None else f"{s:.4f}" for s in found.sharing)
    screen.print(f"how alike the weights of each section were (1: equal): {alike}")
    for (name, (before, after)), form in zip(cost.items(), (",", ".4f", ".1%"), strict=True):
        screen.print(f"{name}: {before:{form}} -> {after:{form}}")
    screen.print(f"evaluated: {len(data.test)} test images of {data.test.name}")
    screen.print(f"network: {flags.out.resolve()}")


def data(flags: options.DataCommand, command: str) -> None:
    """List, fetch or make data sets.

    Args:
        flags: The command's options.
        command: Not used.
    """
    if isinstance(flags.what, options.DataDigitclutter):
        _digitclutter(flags.what)
    elif isinstance(flags.what, options.DataFetch):
        screen.print(f"{flags.what.name}: {catalogue.fetch(flags.what.name, flags.what.data_root)}")
    else:
        screen.print(catalogue.listing(flags.what.data_root))


def _digitclutter(flags: options.DataDigitclutter) -> None:
    """Make the images and say where they are."""
    config = ClutterConfig(flags.digits, flags.debris, flags.grey, flags.seed)
    if flags.data_root is not None and flags.handwriting is None:
        raise ValueError(f"a data root ({flags.data_root}) is for --handwriting, which was not given")
    write_digitclutter(
        flags.out,
        config,
        train=flags.n,
        test=flags.test,
        handwriting=load_splits(flags.handwriting, flags.data_root) if flags.handwriting else None,
        workers=flags.workers,
        replace=flags.force,
        bar=bar,
    )
    screen.print(f"images: {flags.out.resolve()}")


def find_device(name: str) -> str:
    """The device of that name, or with "auto" a graphics card if there is one.

    Raises:
        ValueError: If the name is unknown, or torch sees no such device here.
    """
    if not re.fullmatch(r"auto|cpu(:0)?|cuda(:[0-9]+)?|mps(:0)?", name):
        raise unknown("device", name, ("auto", "cpu", "cuda", "cuda:1", "mps"))
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= cards:
        raise ValueError(f"device {name!r}: torch sees {cards} cuda devices here; use --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {name!r}: torch sees none here; use --device cpu")
    return name


def _dtype(common: options.Common) -> torch.dtype:
    return getattr(torch, common.dtype)


def _check(common: options.Common) -> None:
    """Refuse numbers that no command can work with."""
    if common.batch < 1:
        raise ValueError(f"batch is {common.batch}; it must be at least 1")
    if abs(common.seed) >= 2**62:
        raise ValueError(f"seed is {common.seed}; it must lie between -2^62 and 2^62")


def _images(name: str, root: Path | None, common: options.Common) -> Splits:
    """Both splits, each limited."""
    _check(common)
    return Splits(*(part.take(common.limit, seed=common.seed) for part in load_splits(name, root)))


def _images_of(loaded: LoadedModel, flags: options.Fold) -> Splits:
    """The images that a network is evaluated on: those asked for, else those of its training."""
    training = loaded.training or {}
    name = flags.data or training.get("data", "data that it does not name")
    if flags.data is None and name not in NAMES and not Path(name).is_file():
        raise ValueError(f"{flags.model} was trained on {name}, which is not here; say where with --data")
    data = _images(name, flags.data_root, flags.common)
    if data.test.classes != loaded.classes:
        raise ValueError(
            f"the classes of {name} ({', '.join(data.test.classes)}) are not those of {flags.model} "
            f"({', '.join(loaded.classes)}); give images of these with --data"
        )
    if data.test.sha256 != training.get("data_sha256"):
        notices.print(f"note: {flags.model} was trained on other data than {name}: {training.get('data', 'unknown')}")
    return data


def _tokenizer(flags: options.Probe) -> Any:
    """The tokenizer that belongs to the weights of a Hugging Face model; None (bytes) for random weights."""
    kind, _, name = flags.model.partition(":")
    if kind != "hf" or flags.weights == "random":
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flags.model} has no tokenizer for the text: {one_line(error)}") from error


def _network(flags: options.Train, channels: int, classes: int, size: Sequence[int]) -> ResNetConfig:
    """The network that the options of `train` describe."""
    own = {name: getattr(flags, name) for name in ("blocks", "widths", "transition", "head")}
    if flags.network is None:
        config = ResNetConfig(**own, channels=channels, classes=classes)
    else:
        given = [name for name, value in own.items() if value != getattr(options.Train, name)]
        if given:
            raise ValueError(f"--network {flags.network} decides about {', '.join(given)}; leave out one or the other")
        config = network_of(flags.network, channels=channels, classes=classes)
    idle = {
        "--couple-norms needs --couple": flags.couple_norms and not flags.couple,
        "--lipschitz-norm needs --lipschitz": flags.lipschitz_norm != "clipped" and flags.lipschitz is None,
        "--dt, --tol and --reversible need --step": flags.step is None
        and (flags.dt is not None or flags.tol is not None or flags.reversible),
        "--free needs --sharing": flags.free != options.Train.free and flags.sharing == "none",
        "blocks that share their weights cannot be coupled: leave out --couple or --sharing": flags.couple
        and flags.sharing != "none",
    }
    for problem, present in idle.items():
        if present:
            raise ValueError(problem)
    step = None if flags.step is None else step_of(flags.step, dt=flags.dt, tol=flags.tol)
    alike = float(flags.couple > 0) if flags.alike is None else flags.alike
    limit = None if flags.lipschitz is None else Limit(flags.lipschitz, max(size), flags.lipschitz_norm)
    config = replace(
        scaled(config, flags.width_factor),
        norm=flags.norm,
        alike=alike,
        limit=limit,
        step=step,
        reversible=flags.reversible,
    )
    if flags.sharing == "none":
        return config
    return replace(config, sharing=replace(UBN if flags.sharing == "ubn" else NAIVE, free=flags.free))


def _checkpoint(out: Path) -> Path:
    """Where a training that writes to `out` keeps what it needs to go on."""
    return out.with_name(f"{out.name}.checkpoint")


def _trained(
    folder: Path,
    network: ResNetConfig,
    data: Splits,
    config: TrainConfig,
    device: str,
    common: options.Common,
    checkpoint: Path | None = None,
    after_epoch: AfterEpoch | None = None,
) -> LoadedModel:
    """A network trained and written to a folder."""
    model = ResNet(network, seed=config.seed).to(device=device, dtype=_dtype(common))
    if checkpoint and checkpoint.exists():
        notices.print(f"note: going on from {checkpoint}")
    try:
        with bar("training", config.epochs * len(data.train)) as show:
            history = train_network(model, data, config, after_epoch=after_epoch, progress=show, checkpoint=checkpoint)
    except KeyboardInterrupt:
        if checkpoint and checkpoint.exists():
            raise KeyboardInterrupt(f"the same command goes on from {checkpoint}") from None
        raise
    return write_run(folder, model, data, config, history)


def _loaded(flags: options.Probe, classes: int | None) -> LoadedModel:
    """The network that was asked for; warnings of its package in one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        loaded = load_model(flags.model, weights=flags.weights, classes=classes, seed=flags.common.seed)
    for message in {str(warning.message) for warning in caught}:
        notices.print(f"note: {message}")
    return loaded


def _of_folder(path: Path) -> LoadedModel:
    """The network in a folder that `train` wrote."""
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; give one that residuum train wrote")
    return load_model(str(path))


def _write(
    folder: Path,
    loaded: LoadedModel,
    data: Splits | TextSplits,
    findings: Findings,
    *,
    title: str,
    seed: int,
    command: str,
    start: float,
) -> None:
    """Everything that was found, and the page about it."""
    write_findings(folder, findings)
    seconds = perf_counter() - start
    write_provenance(folder, loaded, data.test, findings, title=title, seed=seed, command=command, seconds=seconds)
    report_page.write([folder], folder / "report.html")


def _say(out: Path, loaded: LoadedModel, findings: Findings) -> None:
    """Sections, what was measured, notes and the place of the report, on the screen."""
    measured = indices(findings.profile)
    initial = {} if findings.initial is None else indices(findings.initial)
    measures = ("scaled distance", "at initialisation", "depth for steps of 0.1")
    table = Table("section", "blocks", *(measures if "scaled_distance" in measured else ()), title=loaded.name)
    depths = {row["section"]: row for row in depth_advice(findings.profile)["sections"]}
    for s, (name, blocks) in enumerate(zip(findings.profile.sections, findings.profile.lengths, strict=True)):
        distances = [_number(found.get("scaled_distance"), s) for found in (measured, initial)]
        laws = sorted(depths[name][law] for law in ("fixed_distance", "square_root")) if name in depths else ()
        cells = (*distances, " to ".join(map(str, laws))) if "scaled_distance" in measured else ()
        table.add_row(name, str(blocks), *cells)
    screen.print(table)
    if "final_accuracy" in measured:
        screen.print(f"accuracy {measured['final_accuracy']:.1%}")
    absent = [f"no initial values: {findings.initial_reason}"] if findings.initial is None else []
    for note in (*findings.notes, *absent):
        notices.print(f"note: {note}")
    screen.print(f"report: {(out / 'report.html').resolve()}")


def _number(index: dict[str, Any] | None, section: int) -> str:
    value = index["sections"][section] if index else None
    return "" if value is None else f"{value:.2f}"


def _of_a_demo(folder: Path) -> bool:
    """Whether an earlier demo wrote the folder, so that a second one may replace it."""
    try:
        about = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        return str(about["command"]).startswith("residuum demo")
    except (OSError, ValueError, KeyError, TypeError):
        return False
