"""P3's networks for MNIST under noise as jobs: blocks with a spectrum in a given disc, solved explicitly or not."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from residuum.data.images import ImageSet, Preparation, Splits, load_splits
from residuum.descriptions import described, key_of
from residuum.files import stored, write_json, write_tensors
from residuum.jobs import Settings, from_checkpoint, job_from, threads_of_torch
from residuum.layers.controlled import Controlled, Spectrum
from residuum.layers.steps import Theta
from residuum.names import unknown
from residuum.penalties import Loss, Penalty, penalised
from residuum.progress import Bar, quiet
from residuum.rates import Steps
from residuum.runfolders import CHECKPOINT, FORMAT
from residuum.solve import Anderson
from residuum.stability import spectrum_of
from residuum.training import EVALUATION_BATCH, TrainConfig, train

NOISE = (0.0, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
WIDTHS = (1, 6, 12, 24)  # channels of the four states
_WEIGHTS = "residuum noisy digits 2"
_RATE = Steps(tuple((part / 10, 0.1 ** (part / 10)) for part in range(1, 10)))  # "evenly to 10 %"


@dataclass(frozen=True)
class NoisyDigits:
    """A network of four ODE blocks for the first images of MNIST, trained and then looked at under noise.

    The states are 1 x 28 x 28 (pixels from 0 to 1), 6 x 6 x 6 (after a 7x7 convolution of stride 2 and 3x3 max
    pooling), 12 x 3 x 3 and 24 x 2 x 2 (after 3x3 convolutions of stride 2); then come average pooling and a linear
    map. Each block makes `steps` steps; each has a right-hand side of its own, two convolutions with ReLU before each.

    Attributes:
        theta: Of the `Theta` step. 0: an ordinary residual network.
        spectrum: "free": the convolutions as they are, small at first ("plain" in the paper's table). "unit": limited,
            Lipschitz constant 1 ("1Lip"). "stable": `Controlled` so that a step amplifies by what lies in [0.2, 1.2],
            the disc learned around 1, and its divergence penalised.
        seed: Of weights, order and noise.
        data: The data set: "mnist", or another of square images of one channel.
        images: So many first training images; and first test images that noise is tried on.
        epochs: Passes over them.
        batch: Images in a step of Adam.
        lr: Its rate at the start; times 0.1^(1/10) after each tenth of the epochs, so 0.126 of it in the last.
        steps: Of each block.
        time: T; dt = T / steps.
        divergence: Weight of the penalty, of "stable" alone.
        tol: Of solver and adjoint.
        draws: Of the noise.

    Source: P3 (Reshniak & Webster), extended version, its code of February 2021. Ours: norms are limited to 1, and not
    divided by where they have become smaller; the steps of a block learn a disc each, there one together; tol, there
    1e-6.
    """

    theta: float = 0.5
    spectrum: str = "stable"
    seed: int = 0
    data: str = "mnist"
    images: int = 1000
    epochs: int = 300
    batch: int = 100
    lr: float = 1e-2
    steps: int = 2
    time: float = 2.0
    divergence: float = 0.1
    tol: float = 1e-5
    draws: int = 10

    kind: ClassVar[str] = "digits under noise"

    def __post_init__(self) -> None:
        if self.spectrum not in ("free", "unit", "stable"):
            raise unknown("spectrum", self.spectrum, ("free", "unit", "stable"))
        counts = {name: getattr(self, name) for name in ("images", "epochs", "batch", "steps", "draws")}
        if min(counts.values()) < 1 or self.seed < 0:
            given = ", ".join(f"{name} ({count})" for name, count in counts.items())
            raise ValueError(f"{given} must be at least 1 each, seed ({self.seed}) 0 or more")
        _ = self.step, self.training

    @property
    def step(self) -> Theta:
        """The step of the blocks."""
        return Theta(self.theta, self.time / self.steps, solver=Anderson(self.tol))

    @property
    def training(self) -> TrainConfig:
        """The settings of the training."""
        return TrainConfig(
            epochs=self.epochs,
            batch=self.batch,
            lr=self.lr,
            rate=_RATE,
            optimiser="adam",
            weight_decay=0.0,
            test_every=self.epochs,
            seed=self.seed,
        )

    def network(self, rows: int = 28) -> "Network":
        """The network with fresh weights for images of so many rows; the global random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Network(self, rows)

    def first(self, root: Path | None) -> Splits:
        """The first images of both splits, read as numbers from 0 to 1.

        Raises:
            ValueError: If they are not square, of one channel and of at most ten classes.
            OSError: If they are not there.
        """
        splits = load_splits(self.data, root)
        channels, *size = splits.train.images.shape[1:]
        classes = len(splits.train.classes)
        if channels != 1 or size[0] != size[1] or classes > 10 or splits.train.labels.ndim > 1:
            raise ValueError(
                f"noisy digits: {self.data!r} has {channels} channels of {size[0]}x{size[1]} pixels and {classes} "
                "classes; it must be square images of one channel, each of one of at most ten classes"
            )
        plain = replace(splits.train.preparation, mean=(0.0,), std=(1.0,))
        return Splits(
            *(
                replace(part, images=part.images[: self.images], labels=part.labels[: self.images], preparation=plain)
                for part in splits
            )
        )

    def describe(self) -> dict[str, Any]:
        """What determines the result, as JSON values, without settings that are as in the class."""
        return described(self, defaults=False) | {"kind": self.kind, "format": FORMAT}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "NoisyDigits":
        """The inverse of `describe`.

        Raises:
            ValueError: If it is not one, or of another format, or does not fit this version of the code.
        """
        return job_from(description, cls, (cls,))

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits, of its settings and nothing else; what the code makes of them is not in it."""
        return key_of(self.describe())

    def execute(self, folder: Path, settings: Settings, progress: Bar = quiet) -> None:
        """Train the network and look at it under noise; stopped and called again it ends with the same bits.

        Writes values.json (parameters, history, "noise": of "train" and "test" images, by standard deviation, the
        accuracy in each draw) and weights.safetensors.

        Args:
            folder: Where to write; it exists.
            settings: Where the data are, and the number of threads; the work is done on the processor.
            progress: Opens a progress bar.

        Raises:
            ConvergenceError: If an equation was not solved.
            FloatingPointError: If the training diverges.
            OSError: If data are not there or results cannot be written.
        """
        start = perf_counter()
        with threads_of_torch(settings.threads):
            data = self.first(settings.data_root)
            penalty = Penalty(self.divergence if self.spectrum == "stable" else 0.0, power=2.0, draws="gaussian")
            losses = penalised(penalty, balanced(data.train), sections=_along)

            def attempt() -> tuple[Network, list[dict[str, Any]]]:
                network = self.network(data.train.images.shape[-1])
                with progress("training", self.epochs * len(data.train)) as show:
                    history = train(
                        network,
                        data,
                        self.training,
                        loss=losses,
                        progress=show,
                        checkpoint=folder / CHECKPOINT,
                    )
                return network, history

            network, history = from_checkpoint(folder, attempt)
            values = {
                "parameters": sum(p.numel() for p in network.parameters()),
                "history": history,
                "noise": {part.split: under_noise(network, part, self) for part in data},
                "seconds": perf_counter() - start,
            }
        write_tensors(folder / "weights.safetensors", stored(network), self.describe(), format=_WEIGHTS)
        write_json(folder / "values.json", values)


class Network(nn.Module):
    """The network of `NoisyDigits`.

    Args:
        job: Its settings.
        rows: Of the images.
    """

    def __init__(self, job: NoisyDigits, rows: int) -> None:
        super().__init__()
        half = -(-rows // 2)
        sizes = [rows, (half - 3) // 2 + 1]
        sizes += [-(-sizes[1] // 2), -(-sizes[1] // 4)]
        self.blocks = nn.ModuleList(
            nn.ModuleList(job.step(_branch(job, channels, size)) for _ in range(job.steps))
            for channels, size in zip(WIDTHS, sizes, strict=True)
        )
        self.between = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(1, 6, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, 2)),
                nn.Conv2d(6, 12, 3, stride=2, padding=1, bias=False),
                nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False),
            ]
        )
        self.dense = nn.Linear(WIDTHS[-1], 10)
        # Derivatives of convolutions of one channel take twenty times as long otherwise.
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Float[Tensor, "example 1 row row"]) -> Float[Tensor, "example class"]:
        """Scores of the classes."""
        x = x.contiguous(memory_format=torch.channels_last)
        for steps, between in zip(self.blocks, (*self.between, None), strict=True):
            for step in steps:
                x = step(x)
            x = x if between is None else between(x)
        return self.dense(x.mean((2, 3)))


def _branch(job: NoisyDigits, channels: int, size: int) -> nn.Module:
    """A right-hand side: two convolutions with ReLU before each, free or limited."""
    convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
    for convolution in convolutions:
        nn.init.zeros_(convolution.bias)
        # Limited weights begin above their limit, and so are divided by their norm, as in the paper's code.
        nn.init.xavier_uniform_(convolution.weight, gain=3.0)
        if job.spectrum == "free":
            convolution.weight.data /= convolution.weight.data.norm()
    layers = [layer for convolution in convolutions for layer in (nn.ReLU(), convolution)]
    if job.spectrum == "free":
        return nn.Sequential(*layers)
    disc = Spectrum(learned=False) if job.spectrum == "unit" else spectrum_of(job.step, 0.2, 1.0, 1.2)
    return Controlled(layers, disc, size=(size, size))


def _along(network: nn.Module) -> Sequence[Sequence[nn.Module]]:
    """The steps of each block, in the order in which they run."""
    return [list(steps) for steps in network.blocks]


def balanced(images: ImageSet) -> Loss:
    """Cross-entropy in which every class of these images counts the same."""
    weights = 1 / torch.bincount(images.labels, minlength=len(images.classes)).clamp_min(1).float()
    weights /= weights.sum()

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, weight=weights)

    return loss


@torch.no_grad()
def under_noise(network: nn.Module, images: ImageSet, job: NoisyDigits) -> dict[str, list[float]]:
    """Accuracy by the standard deviation of Gaussian noise on pixels from 0 to 1, clipped there, in each draw.

    The draws are the same for all networks of one seed. Without noise there is one.

    Args:
        network: In eval mode.
        images: What the noise is added to.
        job: The seed and the number of draws.

    Raises:
        ConvergenceError: If an equation was not solved.
    """
    draw = torch.Generator().manual_seed(job.seed)
    batches = list(zip(images.images.split(EVALUATION_BATCH), images.labels.split(EVALUATION_BATCH), strict=True))

    def accuracy(sd: float) -> float:
        right = [network(_noisy(x, sd, images.preparation, draw)).argmax(1) == y for x, y in batches]
        return float(torch.cat(right).double().mean())

    return {str(sd): [accuracy(sd) for _ in range(job.draws if sd else 1)] for sd in NOISE}


def _noisy(
    pixels: UInt8[Tensor, "example channel row column"], sd: float, preparation: Preparation, draw: torch.Generator
) -> Float[Tensor, "example channel row column"]:
    x = pixels.float() / preparation.white
    x = (x + sd * torch.randn(x.shape, generator=draw)).clamp(0, 1)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (preparation.mean, preparation.std))
    return (x - mean) / std
