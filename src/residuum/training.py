"""Training: one plain loop from a network and a data set to a trained network and its history."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from residuum.data import ImageSet, Preparation, Splits, batches
from residuum.names import unknown

Row = dict[str, int | float]  # one epoch of a history
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        epochs: Passes over the training images.
        batch: Images in each step; the last step of an epoch may have fewer.
        lr: Learning rate at the start; divided by 10 at each milestone.
        momentum: Of the optimiser, without Nesterov's correction.
        weight_decay: On weights only: not on biases nor on the scales and shifts of norms.
        milestones: Shares of the training after which the learning rate falls.
        seed: Seed of the order of the images, and of dropout where the model has it.
        optimiser: "sgd".

    Source: The papers leave the settings open; these are those of the pre-activation ResNet paper (He et al. 2016),
    lr 0.1 divided by 10 at 50 % and 75 %, except for fewer epochs and smaller batches, which suit small data.
    """

    epochs: int = 20
    batch: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[float, ...] = (0.5, 0.75)
    seed: int = 0
    optimiser: Literal["sgd"] = "sgd"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise ValueError(f"epochs ({self.epochs}) and batch ({self.batch}) must be at least 1")
        if not (0 < self.lr < math.inf and 0 <= self.momentum < 1 and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"lr ({self.lr}) must be above 0, momentum ({self.momentum}) in [0, 1), "
                f"weight_decay ({self.weight_decay}) 0 or more"
            )
        if not all(0 < milestone < 1 for milestone in self.milestones):
            raise ValueError(f"milestones {self.milestones} must be shares of the training, between 0 and 1")
        if self.optimiser != "sgd":
            raise unknown("optimiser", self.optimiser, ("sgd",))


def label_loss(model: nn.Module, x: Float[Tensor, "example ..."], y: Tensor) -> Float[Tensor, ""]:
    """Mean over the examples: cross-entropy, or for 0/1 labels the binary cross-entropy averaged over classes."""
    output = model(x)
    return F.cross_entropy(output, y) if y.ndim == 1 else F.binary_cross_entropy_with_logits(output, y.to(output))


def correct(output: Float[Tensor, "example class"], y: Tensor) -> Bool[Tensor, " example"]:
    """Whether the answer is right: the largest output, or for m classes present the m largest (exact match).

    Source: exact match with the m largest outputs: Spoerer et al. 2017, "Recurrent Convolutional Neural Networks: A
    Better Model of Biological Object Recognition".
    """
    if y.ndim == 1:
        return output.argmax(1) == y
    ranks = output.argsort(1, descending=True).argsort(1)
    return ((ranks < y.sum(1, keepdim=True)) == y.bool()).all(1)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: ImageSet, *, loss: Loss = label_loss, preparation: Preparation | None = None
) -> dict[str, float]:
    """Mean loss and accuracy over a split, in eval mode; the model's mode is put back.

    Args:
        model: The network.
        data: The split.
        loss: Loss of a batch.
        preparation: The network's own preparation of pixels; None is the data set's.

    Returns:
        "loss" and "accuracy".
    """
    training, total, right = model.training, 0.0, 0
    model.eval()
    like = next(model.parameters())
    for x, y in batches(
        data, batch=EVALUATION_BATCH, preparation=preparation, device=str(like.device), dtype=like.dtype
    ):
        total += len(y) * loss(model, x, y).item()
        right += int(correct(model(x), y).sum())
    model.train(training)
    return {"loss": total / len(data), "accuracy": right / len(data)}


def train(
    model: nn.Module,
    data: Splits,
    config: TrainConfig,
    *,
    loss: Loss = label_loss,
    after_backward: Callable[[nn.Module, float], None] | None = None,
    after_epoch: Callable[[nn.Module], Row] | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> list[Row]:
    """Train a network in place. It ends in eval mode; for the same seed, machine and thread count it ends the same.

    Args:
        model: The network; its parameters say where and in which number format the work is done.
        data: Training and test split.
        config: The settings.
        loss: Loss of a batch.
        after_backward: Called once per step between backward and the optimiser's step with the model and the share of
            the training that is done; may change gradients.
        after_epoch: Called with the model in eval mode after each epoch; what it returns is merged into the history.
        progress: Called after each step with the number of images so far and a line that says how it goes.

    Returns:
        One row per epoch: epoch (from 1), lr, train_loss (mean over the epoch's steps, as the network was then),
        test_loss, test_accuracy (after the epoch), seconds, and what `after_epoch` returned.

    Raises:
        FloatingPointError: If the loss is not finite; the message says where and what to do.
    """
    optimiser = _sgd(model, config)
    order = torch.Generator().manual_seed(config.seed)
    history: list[Row] = []
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(config.seed)
        for epoch in range(config.epochs):
            start = perf_counter()
            model.train()
            row = _epoch(model, data.train, config, optimiser, order, epoch, loss, after_backward, progress)
            model.eval()
            test = evaluate(model, data.test, loss=loss, preparation=data.train.preparation)
            row |= {f"test_{name}": value for name, value in test.items()} | {"seconds": perf_counter() - start}
            history.append(row | (after_epoch(model) if after_epoch else {}))
            if progress:
                done = (epoch + 1) * len(data.train)
                progress(done, f"epoch {epoch + 1}/{config.epochs}, test accuracy {test['accuracy']:.1%}")
    return history


def _epoch(
    model: nn.Module,
    data: ImageSet,
    config: TrainConfig,
    optimiser: torch.optim.Optimizer,
    order: torch.Generator,
    epoch: int,
    loss: Loss,
    after_backward: Callable[[nn.Module, float], None] | None,
    progress: Callable[[int, str], None] | None,
) -> Row:
    """One pass over the training images in a new order."""
    like = next(model.parameters())
    steps = torch.randperm(len(data), generator=order).split(config.batch)
    total = 0.0
    for step, chosen in enumerate(steps):
        share = (epoch + step / len(steps)) / config.epochs
        rate = config.lr * 0.1 ** sum(share >= milestone for milestone in config.milestones)
        for group in optimiser.param_groups:
            group["lr"] = rate
        x = data.preparation(data.images[chosen].to(like.device)).to(like.dtype)
        value = loss(model, x, data.labels[chosen].to(like.device))
        if not value.isfinite():
            raise FloatingPointError(
                f"the loss is {value.item()} in epoch {epoch + 1}, step {step + 1} of {len(steps)}: "
                f"training has diverged; try a smaller learning rate than {config.lr:g}"
            )
        optimiser.zero_grad()
        value.backward()
        if after_backward:
            after_backward(model, share)
        optimiser.step()
        total += len(chosen) * value.item()
        if progress:
            done = epoch * len(data) + min((step + 1) * config.batch, len(data))
            progress(done, f"epoch {epoch + 1}/{config.epochs}, loss {value.item():.3f}")
    return {"epoch": epoch + 1, "lr": rate, "train_loss": total / len(data)}


def _sgd(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Stochastic gradient descent with weight decay on weights (two or more dimensions) only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=config.lr, momentum=config.momentum)


def _cuda_devices(model: nn.Module) -> list[int]:
    """The graphics cards that the model uses."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
