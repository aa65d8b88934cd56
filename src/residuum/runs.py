"""Runs: a network, its data, its training and its probes as one value with a key; carried out once, then read."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from residuum import __version__, runfolders
from residuum.curves import watch
from residuum.data import ClutterConfig, Splits, load_splits, write_digitclutter
from residuum.data.images import NAMES
from residuum.descriptions import described, key_of
from residuum.files import checksum
from residuum.jobs import Job, Settings, from_checkpoint, job_from, threads_of_torch
from residuum.layers.coupling import Coupling
from residuum.loading import NETWORK
from residuum.models import ResNet, ResNetConfig
from residuum.names import unknown
from residuum.penalties import Penalty
from residuum.probing import ProbeConfig, choose
from residuum.probing import probe as probe_network
from residuum.profiles import Profile, load
from residuum.progress import Bar, quiet
from residuum.rates import Cosine, Steps
from residuum.results import write_findings, write_profile, write_provenance, write_run
from residuum.runfolders import CHECKPOINT, FORMAT, locked, log
from residuum.training import AfterEpoch, Row, TrainConfig, train
from residuum.watching import gradient_ratios, recalibration

_MADE = "digitclutter"  # the data set that is made, not read
_FILE = "FILE.npz"  # stands for the place of a file in what a key is made of
# What a run can follow over its epochs. How many images each looks at is part of what its name means.
WATCHED: dict[str, Callable[[Splits], AfterEpoch]] = {
    "readout": lambda data: watch(data.test, preparation=data.train.preparation),
    "gradient_ratio": lambda data: gradient_ratios(data, images=200),
    "recalibration": recalibration,
}


@dataclass(frozen=True)
class DataConfig:
    """What a run reads.

    Attributes:
        name: "digits", "mnist", "fashion-mnist", "cifar10", "cifar100"; "digitclutter", which is made; or a file
            "path/FILE.npz", of which the content counts and not the place.
        train: So many training images, equally many of every class, drawn with the seed of the run; None: all.
        test: At most so many test images, always the same; None: all.
        shuffled: Permute the labels of the training images among them, with the seed of the run.
        clutter: What is in the images of "digitclutter".
        clutter_sizes: Training and test images of "digitclutter" that are made.
        sha256: Of a file: its content. Left out, it is read from the file.
    """

    name: str
    train: int | None = None
    test: int | None = None
    shuffled: bool = False
    clutter: ClutterConfig | None = None
    clutter_sizes: tuple[int, int] = (100_000, 10_000)
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.name.endswith(".npz"):
            self._find()
        elif self.name not in (*NAMES, _MADE):
            raise unknown("data", self.name, (*NAMES, _MADE, "path/FILE.npz"))
        elif self.sha256:
            raise ValueError(f"sha256 is for a file FILE.npz, not for {self.name}")
        if (self.name == _MADE) != (self.clutter is not None):
            raise ValueError(f"clutter says what is in the images of {_MADE!r}: give both or none, not {self.name!r}")
        if self.clutter is None and self.clutter_sizes != type(self).clutter_sizes:
            raise ValueError(f"clutter_sizes is for {_MADE!r}; use train and test to take fewer images of {self.name}")
        counts = (self.train, self.test, *self.clutter_sizes)
        if min(count for count in counts if count is not None) < 1:
            raise ValueError(f"train, test and clutter_sizes are {counts}; they must be at least 1")

    def _find(self) -> None:
        """Make the place of a file one for every working directory, and look at its content if nobody did."""
        path = Path(self.name).absolute()
        if not self.sha256 and not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        object.__setattr__(self, "name", str(path))
        if not self.sha256:
            object.__setattr__(self, "sha256", checksum(path))

    def load(self, *, seed: int, root: Path | None, made: Path, progress: Bar = quiet) -> Splits:
        """Both splits.

        Args:
            seed: Seed of the run.
            root: See `load_splits`.
            made: Folder for data that are made, once for all runs.
            progress: Shows how far the making is.

        Raises:
            ValueError: If the file is not the one that was meant, or there are too few images.
            OSError: If the data are not there.
        """
        official = self.name in NAMES and self.name != "digits"
        name = str(self._make(made, progress)) if self.name == _MADE else self.name
        data = load_splits(name, root if official else None)
        if self.sha256 not in ("", data.train.sha256):
            raise ValueError(
                f"{self.name} has changed: its SHA-256 is {data.train.sha256[:8]}.., it was {self.sha256[:8]}.."
            )
        train = data.train.balanced(self.train, seed=seed)
        return Splits(train.shuffled(seed=seed) if self.shuffled else train, data.test.take(self.test, seed=0))

    def _make(self, folder: Path, progress: Bar) -> Path:
        """The file of the data set that is made; the first process that needs it makes it, others wait."""
        sizes = {"train": self.clutter_sizes[0], "test": self.clutter_sizes[1]}
        path = folder / f"{_MADE}-{key_of(described(self.clutter) | sizes)}.npz"
        folder.mkdir(exist_ok=True)
        with locked(path):
            if not path.exists():
                write_digitclutter(path, self.clutter, train=sizes["train"], test=sizes["test"], bar=progress)
        return path


@dataclass(frozen=True)
class Run:
    """A network of ours, trained on data and measured before and after.

    Attributes:
        model: The network.
        data: What it reads.
        training: How it is trained; its seed stays 0, that of the run counts.
        probes: Names of what is measured on test images, see `residuum.probing.NAMES`; none: it is trained only.
        probe_limit: At most so many test images are measured, always the same; None: all.
        probe_train: Measure as many training images, too, after training: "train" beside "profile".
        watch: What is followed over the epochs and written to the history, see `WATCHED`.
        seed: Seed of the weights, of the order of the images and of the draws from them.
    """

    model: ResNetConfig
    data: DataConfig
    training: TrainConfig = field(default_factory=TrainConfig)
    probes: tuple[str, ...] = ()
    probe_limit: int | None = 1000
    seed: int = 0
    probe_train: bool = False
    watch: tuple[str, ...] = ()

    kind: ClassVar[str] = "network"

    def __post_init__(self) -> None:
        if self.training.seed:
            raise ValueError(f"training.seed is {self.training.seed}; leave it 0 and give the seed of the run")
        if self.seed < 0 or (self.probe_limit is not None and self.probe_limit < 1):
            raise ValueError(f"seed ({self.seed}) must be 0 or more, probe_limit ({self.probe_limit}) at least 1")
        if "all" in self.probes:
            raise ValueError("probes 'all' is not for runs, since there may be more of them later; give their names")
        if self.probes:
            choose(self.probes)
        elif self.probe_train:
            raise ValueError("probe_train measures training images, too; give probes")
        for name in self.watch:
            if name not in WATCHED:
                raise unknown("thing to watch", name, WATCHED)
        try:
            hash(self)
        except TypeError as error:
            raise ValueError(f"settings of a run are tuples and numbers, not lists or dictionaries ({error})") from None
        self.describe()

    def describe(self) -> dict[str, Any]:
        """What determines the result, as JSON values, without fields that have their default; and where a file is."""
        return described(self, defaults=False) | {"kind": self.kind, "format": FORMAT}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "Run":
        """The run that `describe` described.

        Raises:
            ValueError: If it is not one, or of another format, or does not fit this version of the code.
        """
        return job_from(description, cls, _KINDS)

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits, of all settings that determine the result: the place of a file does not."""
        description = self.describe()
        if self.data.sha256:
            description["data"]["name"] = _FILE
        if not self.probes:
            description.pop("probe_limit", None)
        return key_of(description)

    def execute(self, folder: Path, settings: Settings, progress: Bar = quiet) -> None:
        """Train, measure at calibrated initialisation and after, and write all that was found; see `execute`.

        Args:
            folder: OUT/runs/<key>; made data are kept in OUT/data. A training that was stopped goes on.
            settings: Where and how.
            progress: Opens a progress bar.

        Raises:
            FloatingPointError: If the training diverges.
            ValueError: If network, data, training and probes do not fit each other.
            OSError: If data are not there or results cannot be written.
        """
        start = time.perf_counter()
        with threads_of_torch(settings.threads):
            made = folder.absolute().parent.parent / "data"
            data = self.data.load(seed=self.seed, root=settings.data_root, made=made, progress=progress)
            config = replace(self.training, seed=self.seed)
            model, history = self._trained(data, config, folder, settings, progress)
            loaded = write_run(folder, model, data, config, history)
            measured, findings = data, None
            if self.probes:
                measured = data._replace(test=data.test.take(self.probe_limit, seed=0))
                asked = ProbeConfig(self.probes, batch=settings.batch, device=settings.device, seed=self.seed)
                findings = probe_network(loaded, measured, asked, bar=progress)
                write_findings(folder, findings)
                if self.probe_train:
                    seen = data._replace(test=data.train.take(self.probe_limit, seed=0))
                    once = replace(asked, initial=False)
                    write_profile(folder, "train", probe_network(loaded, seen, once, bar=progress).profile)
                for note in findings.notes:
                    log(folder, note)
        blocks = "-".join(map(str, self.model.blocks))
        title = f"{data.test.name}, {blocks} blocks, seed {self.seed} ({self.key})"
        seconds, command = time.perf_counter() - start, f"run {self.key}"
        write_provenance(
            folder, loaded, measured.test, findings, title=title, seed=self.seed, command=command, seconds=seconds
        )

    def _trained(
        self, data: Splits, config: TrainConfig, folder: Path, settings: Settings, progress: Bar
    ) -> tuple[ResNet, list[Row]]:
        """The trained network and its history."""
        looks = [WATCHED[name](data) for name in self.watch]

        def look(model: nn.Module) -> Row:
            return {name: value for each in looks for name, value in each(model).items()}

        def attempt() -> tuple[ResNet, list[Row]]:
            model, checkpoint = ResNet(self.model, seed=self.seed).to(settings.device), folder / CHECKPOINT
            with progress("training", config.epochs * len(data.train)) as show:
                return model, train(model, data, config, after_epoch=look, progress=show, checkpoint=checkpoint)

        return from_checkpoint(folder, attempt)


_KINDS = (Run, DataConfig, TrainConfig, *NETWORK, Coupling, Penalty, Steps, Cosine, ClutterConfig)


@dataclass(frozen=True)
class Finished:
    """A complete run, read from its folder.

    Attributes:
        job: What was asked for.
        folder: Where it is.
    """

    job: Job
    folder: Path

    @property
    def history(self) -> list[Row]:
        """One row per epoch."""
        return self._read("history.json")

    @property
    def indices(self) -> dict[str, Any]:
        """indices.json: see `results.write_findings`."""
        return self._read("indices.json")

    @property
    def provenance(self) -> dict[str, Any]:
        """provenance.json: what was measured, on what, by which versions."""
        return self._read("provenance.json")

    @property
    def values(self) -> dict[str, Any]:
        """values.json, of jobs that are no networks."""
        return self._read("values.json")

    def profile(self, name: str = "profile") -> Profile:
        """What was measured: "profile" after training, "initial" at calibrated initialisation.

        "train" holds the same as "profile" of training images, where the run asks for them.

        Raises:
            ValueError: If it was not measured.
        """
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            raise self._lacks(path.name)
        return load(path)

    def _read(self, name: str) -> Any:
        path = self.folder / name
        if not path.is_file():
            raise self._lacks(name)
        return json.loads(path.read_text(encoding="utf-8"))

    def _lacks(self, name: str) -> ValueError:
        files = sorted(path.name for path in self.folder.iterdir())
        return ValueError(f"the run {self.job.key} has no {name}; it has {', '.join(files)}")


def finished(job: Job, out: Path) -> Finished | None:
    """A run that is complete and undamaged in `out`; None if it is not. Every byte is checked."""
    folder = Path(out) / "runs" / job.key
    return Finished(job, folder) if runfolders.stand(folder).state == "complete" else None


def execute(job: Job, out: Path, settings: Settings | None = None, *, progress: Bar = quiet) -> Finished:
    """Carry out a run in OUT/runs/<key>, once.

    A complete folder is read. A half one goes on and ends with the bits with which it would have ended, on the same
    machine with the same number of threads; elsewhere its training begins anew. A damaged one is set aside as
    <key>.damaged-N and done again, one that failed is tried again. If another process works on it, this one waits.

    Args:
        job: What to do.
        out: Folder of runs.
        settings: Where and how.
        progress: Opens a progress bar.

    Returns:
        The finished run.

    Raises:
        FileExistsError: If `out` holds other files than those of runs.
        Exception: Whatever the run raises; failed.json says it, too.
    """
    folder = runfolders.prepare(out) / job.key
    with locked(folder):
        perform(job, folder, settings or Settings(), progress)
    return Finished(job, folder)


def perform(job: Job, folder: Path, settings: Settings, progress: Bar = quiet) -> None:
    """What `execute` does while it holds the lock of the folder, for those who hold it already.

    Args:
        job: What to do.
        folder: OUT/runs/<key>; OUT/runs is there.
        settings: Where and how.
        progress: Opens a progress bar.

    Raises:
        Exception: Whatever the run raises; failed.json says it, too.
    """
    if not runfolders.begin(folder, job.key, job.describe(), described(job)):
        (folder / CHECKPOINT).unlink(missing_ok=True)
        return
    try:
        log(folder, f"begins; residuum {__version__}")
        start = time.perf_counter()
        job.execute(folder, settings, progress)
        runfolders.finish(folder, time.perf_counter() - start)
    except Exception as error:
        runfolders.fail(folder, *runfolders.failure_of(error))
        raise
