"""The options of every command, as dataclasses; their docstrings are what `--help` says."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Common:
    """Options of every command that runs a network.

    Attributes:
        device: Where the work is done: auto (cuda if there is one), cpu, cuda, cuda:1, mps.
        dtype: Number format of weights and states.
        batch: Images at a time.
        limit: Use at most so many images of each split, drawn with the seed; `probe` limits what is measured only.
        seed: Seed of weights, order and draws.
    """

    device: str = "auto"
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    batch: int = 64
    limit: int | None = None
    seed: int = 0


Shared = Annotated[Common, tyro.conf.arg(name="")]  # their flags carry no prefix


@dataclass(frozen=True)
class Demo:
    """Train a small residual network on real digits, measure it before and after, and explain it in a report.

    Attributes:
        out: Folder to write; one that an earlier demo wrote is replaced.
        epochs: Passes over the training images.
        force: Replace any result folder.
        common: Options of every command that runs a network.
    """

    out: Path = Path("residuum-demo")
    epochs: int = 20
    force: bool = False
    common: Shared = field(default_factory=Common)


@dataclass(frozen=True)
class Train:
    """Train a pre-activation residual network and write it to a folder, which `probe` reads.

    Stopped by Ctrl-C or a crash, the same command goes on from OUT.checkpoint. Under torchrun the processes share
    every batch.

    Attributes:
        out: Folder to write.
        data: digits, mnist, fashion-mnist, cifar10, cifar100, or path/FILE.npz.
        data_root: Folder with the official files of a data set; without it they are fetched to a cache.
        network: A network of P1 instead of blocks, widths, transition and head: resnet32 (38, 56, 110, 146, 182),
            single, avgpool, wide.
        width_factor: Factor on all widths.
        sharing: The last blocks of each section use the same weights: naive shares batch norms, too, ubn gives each
            block its own.
        free: With sharing: first blocks of each section that have weights of their own.
        norm: Norms inside the blocks: batch, group, none.
        couple: Strength in [0, 1] with which the gradients of each section's blocks are coupled; 1 trains all alike.
        couple_norms: Couple batch norm, too, and keep one set of statistics: with strength 1 one recurrent block.
        alike: How alike the blocks of a section start: 0 independent, 1 equal; as alike as can be if coupled.
        lipschitz: Lipschitz bound on the branch of each block; batch norm is clipped.
        lipschitz_norm: allowed leaves batch norm alone, so that only the convolutions are limited.
        penalty: Added to the loss, as name:weight: divergence, jacobian, magnitude (of what each block adds), variation
            (of the weights from block to block). All but the last need norm group or none.
        step: How blocks step on, if not by h + f(h): explicit, theta:0.5 (or another theta), rk:gauss4 (or another
            tableau), verlet, additive, leapfrog, midpoint, momentum:0.9. Those that solve an equation, theta and
            implicit rk, need --norm group or none.
        dt: Step size of that.
        tol: Tolerance of its solver.
        reversible: Train it with few stored states: the backward rebuilds them.
        blocks: Residual blocks of each section, e.g. 4 4 4.
        widths: Channels of each section.
        transition: How the shape changes between sections.
        head: With or without a norm before the last pooling.
        epochs: Passes over the training images.
        lr: Learning rate at the start.
        rate: How it changes: steps (divided by 10 at 50 % and 75 %), cosine, constant, or a schedule of P1.
        optimiser: sgd with momentum, or adam.
        momentum: Momentum of sgd.
        weight_decay: Weight decay, on weights only.
        clip: Largest norm of the gradients.
        accumulate: Parts in which the images of a step are run, for less memory.
        precision: Number format of the forward pass.
        augment: crop_flip pads by 4 pixels, crops and mirrors at random.
        shuffle_labels: Permute the labels of the training images among them, for `probe --shuffled`.
        watch: Test images whose answers after each block are written to the history after every epoch.
        force: Replace an existing result folder once the new one is complete.
        common: Options of every command that runs a network.
    """

    out: Path
    data: str = "digits"
    data_root: Path | None = None
    network: str | None = None
    width_factor: float = 1.0
    sharing: Literal["none", "naive", "ubn"] = "none"
    free: int = 5
    norm: Literal["batch", "group", "none"] = "batch"
    couple: float = 0.0
    couple_norms: bool = False
    alike: float | None = None
    lipschitz: float | None = None
    lipschitz_norm: Literal["clipped", "allowed"] = "clipped"
    penalty: tuple[str, ...] = ()
    step: str | None = None
    dt: float | None = None
    tol: float | None = None
    reversible: bool = False
    blocks: tuple[int, ...] = (4, 4, 4)
    widths: tuple[int, ...] = (16, 32, 64)
    transition: Literal["separate", "projection", "pool"] = "separate"
    head: Literal["norm", "pool"] = "norm"
    epochs: int = 20
    lr: float = 0.1
    rate: str = "steps"
    optimiser: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float | None = None
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    augment: Literal["none", "crop_flip"] = "none"
    shuffle_labels: bool = False
    watch: int = 0
    force: bool = False
    common: Shared = field(default_factory=Common)


@dataclass(frozen=True)
class Probe:
    """Cut a network into its residual stream, measure every block, and write the numbers and a report to a folder.

    Attributes:
        model: RUN_FOLDER, torchvision:NAME, timm:NAME, hf:NAME, or path/to/file.py:function (which runs that file).
        data: digits, mnist, fashion-mnist, cifar10, cifar100, path/FILE.npz, or path/FILE.txt for a language model.
        out: Folder to write.
        data_root: Folder with the official files of a data set; without it they are fetched to a cache.
        weights: pretrained, random, or FILE.safetensors.
        split: Images to measure.
        probes: What to measure: perturbation, state_norm, update_angle, pairs, readouts; also gradients,
            plugin_gradients, margins, unrolled_last, drops, drops_first, drops_last, repeats, swaps, replacements,
            shuffles, extra_runs (as unrolls, for the divergence index only), unrolls, lipschitz, settling; or all.
        blocks: Names of the block modules, where the search finds the wrong ones; * stands for one part of a name.
        size: Rows and columns that images are resized to, if not the network's own.
        normalise: Whose mean and deviation standardise the images; a network without its own takes the data's.
        window: Tokens of a text that are one example.
        initial: Measure the network at initialisation, too.
        shuffled: RUN_FOLDER of the same network trained on the same data with --shuffle-labels, to measure, too. Train
            it until its training loss is far below that of guessing, or it has learned nothing that could be compared.
        force: Replace an existing result folder once the new one is complete.
        common: Options of every command that runs a network.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    data: str
    out: Path
    data_root: Path | None = None
    weights: str = "pretrained"
    split: Literal["test", "train"] = "test"
    probes: tuple[str, ...] = ("perturbation", "state_norm", "update_angle", "pairs", "readouts")
    blocks: tuple[str, ...] = ()
    size: int | None = None
    normalise: Literal["model", "data", "imagenet"] = "model"
    window: int = 128
    initial: bool = True
    shuffled: Path | None = None
    force: bool = False
    common: Shared = field(default_factory=Common)


@dataclass(frozen=True)
class Report:
    """Write one page about a result folder, or one that compares several.

    Attributes:
        folders: Folders that probe or demo wrote.
        out: The page to write.
        force: Replace an existing page.
    """

    folders: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="DIR...")]
    out: Path = Path("residuum-report.html")
    force: bool = False


@dataclass(frozen=True)
class Runs:
    """List the runs of a folder, with what differs between them and what came out, or export them as one table.

    Attributes:
        out: Folder of runs, as residuum sweep writes it.
        where: Only runs for which these hold, e.g. data.name=mnist training.epochs>=20 state!=complete; the end of a
            name is enough where it is clear.
        compare: Keys of two runs (their first digits are enough): in what they differ.
        csv: File to write the table to, with every setting and every number.
        parquet: The same, as a parquet file.
        rebuild: Read every file of every run anew.
        force: Replace existing files.
    """

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    where: tuple[str, ...] = ()
    compare: tuple[str, str] | None = None
    csv: Path | None = None
    parquet: Path | None = None
    rebuild: bool = False
    force: bool = False


@dataclass(frozen=True)
class Fold:
    """Put the mean block of each section of a (coupled) network in the place of all, and say what that costs.

    Attributes:
        model: Folder that train wrote.
        out: Folder to write: a network that holds each section's weights once.
        data: Data set whose test images are evaluated, as in train; without it that of the training.
        data_root: Folder with the official files of a data set; without it they are fetched to a cache.
        norms: Fold norms, too; without it every place keeps its own batch norm.
        force: Replace an existing result folder once the new one is complete.
        common: Options of every command that runs a network.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_FOLDER")]
    out: Path
    data: str | None = None
    data_root: Path | None = None
    norms: bool = False
    force: bool = False
    common: Shared = field(default_factory=Common)


@dataclass(frozen=True)
class Stability:
    """Draw what one step, explicit or implicit, does to a rotation, and where each of them is stable.

    Attributes:
        out: Folder to write.
        force: Replace an existing folder of figures.
    """

    out: Path
    force: bool = False


@dataclass(frozen=True)
class Carried:
    """How runs are carried out.

    Attributes:
        engine: pool: processes on this machine. ray: the Ray cluster of RAY_ADDRESS or of this machine. slurm: jobs.
        workers: Runs at a time; without it one per processor (pool), all that there is room for (ray), 100 (slurm).
        time_limit: Minutes that a run may take.
        memory: GB that a run is known to need; the pool learns it from the largest so far.
        gpu: Share of a GPU for each run, e.g. 0.25 for four runs on a card; 0: runs use processors.
        data_root: Folder with the official files of a data set; without it they are fetched to a cache.
        retry_failed: Try runs that failed before again.
    """

    engine: Literal["pool", "ray", "slurm"] = "pool"
    workers: int | None = None
    time_limit: float | None = None
    memory: float = 0.0
    gpu: float = 0.0
    data_root: Path | None = None
    retry_failed: bool = False


@dataclass(frozen=True)
class Sweep:
    """Carry out the runs that a Python function returns, each once, and go on where an earlier sweep stopped.

    Attributes:
        runs: path/to/file.py:function, a function without arguments that returns runs (this runs the file).
        out: Folder of runs; what is complete in it is not repeated.
        carried: How they are carried out.
    """

    runs: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE.py:FUNCTION")]
    out: Path
    carried: Annotated[Carried, tyro.conf.arg(name="")] = field(default_factory=Carried)


@dataclass(frozen=True)
class Reproduce:
    """Carry out the runs of the papers that are missing, draw their figures, and give every claim a verdict.

    Writes OUT/<scale>/: a page and figures for each paper, claims.json, claims.md and claims.html.

    Attributes:
        ids: Papers (p2), figures (p2-3) or claims, by their names; without them all papers.
        out: Folder of runs; what is complete in it is not repeated.
        scale: tiny (seconds; shows that everything runs), small (hours on two cores), or paper (its settings).
        list: Say which runs there are, how many are complete, and how long the others will take; run nothing.
        check: Draw and judge what is there; run nothing.
        files: NAME=FILE.npz: read a file in the place of a data set, where its official files are not at hand.
        kept: Folder of kept runs, a small file each: they count as complete, and what is complete in OUT is added.
        carried: How the runs are carried out.
    """

    ids: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="ID...")] = ()
    out: Path = Path("residuum-reproduce")
    scale: Literal["tiny", "small", "paper"] = "small"
    list: bool = False
    check: bool = False
    files: tuple[str, ...] = ()
    kept: Path | None = None
    carried: Annotated[Carried, tyro.conf.arg(name="")] = field(default_factory=Carried)


@dataclass(frozen=True)
class DataList:
    """List the data sets that have a name, and whether they are on this machine.

    Attributes:
        data_root: Folder to look in; without it the cache.
    """

    data_root: Path | None = None


@dataclass(frozen=True)
class DataFetch:
    """Fetch a data set.

    Attributes:
        name: Its name.
        data_root: Folder to put it in; without it the cache.
    """

    name: tyro.conf.Positional[str]
    data_root: Path | None = None


@dataclass(frozen=True)
class DataDigitclutter:
    """Make a Digitclutter data set: grey images of several digits that hide parts of each other, with 0/1 labels.

    Attributes:
        out: File to write, FILE.npz, which train and probe read.
        digits: Digits in each image, all different.
        debris: Fragments of digits over the image: none, or 10 (light), 30 (medium) or 50 (heavy).
        n: Training images.
        test: Test images.
        grey: float, or overflow for the values of the reference generator, whose sums overflow 8 bits.
        handwriting: Take digits from these images, mnist or path/FILE.npz, instead of a font.
        data_root: Folder with the official files of mnist; without it they are fetched to a cache.
        workers: Processes that make images.
        seed: Seed of digits, places and debris.
        force: Replace an existing file once the new one is complete.
    """

    out: Path
    digits: int = 3
    debris: Literal["none", "light", "medium", "heavy"] = "none"
    n: int = 100_000
    test: int = 10_000
    grey: Literal["float", "overflow"] = "float"
    handwriting: str | None = None
    data_root: Path | None = None
    workers: int = 1
    seed: int = 0
    force: bool = False


Data = Annotated[
    Annotated[DataList, tyro.conf.subcommand("list")]
    | Annotated[DataFetch, tyro.conf.subcommand("fetch")]
    | Annotated[DataDigitclutter, tyro.conf.subcommand("digitclutter")],
    tyro.conf.arg(name=""),
]


@dataclass(frozen=True)
class DataCommand:
    """List, fetch or make data sets.

    Attributes:
        what: What to do.
    """

    what: Data


Command = (
    Demo
    | Train
    | Probe
    | Report
    | Sweep
    | Runs
    | Reproduce
    | Fold
    | Stability
    | Annotated[DataCommand, tyro.conf.subcommand("data")]
)
