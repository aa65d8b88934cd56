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
        limit: Use at most so many images of each split, drawn with the seed.
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

    Attributes:
        out: Folder to write.
        data: digits, or path/FILE.npz.
        blocks: Residual blocks of each section, e.g. 4 4 4.
        widths: Channels of each section.
        transition: How the shape changes between sections.
        head: With or without batch norm before the last pooling.
        epochs: Passes over the training images.
        lr: Learning rate at the start; divided by 10 at half and at three quarters of the training.
        momentum: Momentum of the optimiser.
        weight_decay: Weight decay, on weights only.
        force: Replace an existing result folder once the new one is complete.
        common: Options of every command that runs a network.
    """

    out: Path
    data: str = "digits"
    blocks: tuple[int, ...] = (4, 4, 4)
    widths: tuple[int, ...] = (16, 32, 64)
    transition: Literal["separate", "projection"] = "separate"
    head: Literal["norm", "pool"] = "norm"
    epochs: int = 20
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    force: bool = False
    common: Shared = field(default_factory=Common)


@dataclass(frozen=True)
class Probe:
    """Cut a network into its residual stream, measure every block, and write the numbers and a report to a folder.

    Attributes:
        model: RUN_FOLDER, torchvision:NAME, timm:NAME, hf:NAME, or path/to/file.py:function (which runs that file).
        data: digits, or path/FILE.npz.
        out: Folder to write.
        weights: pretrained, random, or FILE.safetensors.
        split: Images to measure.
        probes: What to measure: perturbation, state_norm, update_angle, pairs, readouts.
        blocks: Names of the block modules, where the search finds the wrong ones; * stands for one part of a name.
        size: Rows and columns that images are resized to, if not the network's own.
        normalise: Whose mean and deviation standardise the images; a network without its own takes the data's.
        initial: Measure the network at initialisation, too.
        force: Replace an existing result folder once the new one is complete.
        common: Options of every command that runs a network.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    data: str
    out: Path
    weights: str = "pretrained"
    split: Literal["test", "train"] = "test"
    probes: tuple[str, ...] = ("perturbation", "state_norm", "update_angle", "pairs", "readouts")
    blocks: tuple[str, ...] = ()
    size: int | None = None
    normalise: Literal["model", "data", "imagenet"] = "model"
    initial: bool = True
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


Command = Demo | Train | Probe | Report
