"""Training: one plain loop from a network and a data set to a trained network and its history."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from residuum.answers import correct, found_classes, label_loss
from residuum.calls import cuda_devices, evaluating
from residuum.checkpoints import Progress, here, resume_, save
from residuum.data import ImageSet, Preparation, Splits, TrainingImages, batches
from residuum.layers.coupling import Coupling
from residuum.layers.held import part_copies_
from residuum.layers.lipschitz import overshoot
from residuum.layers.reversible import DriftError
from residuum.layers.sharing import weights_of
from residuum.layouts import arranged, fast_layout
from residuum.names import name_of, unknown
from residuum.penalties import Loss, Penalty, penalised
from residuum.processes import Group, asked_to_stop, processes
from residuum.progress import Show
from residuum.rates import Rate, Steps
from residuum.solve import ConvergenceError
from residuum.solving import Solves, added, summary

Row = dict[str, Any]  # one epoch of a history
AfterEpoch = Callable[[nn.Module], Row]
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        epochs: Passes over the training images.
        batch: Images in each optimiser step, of all processes together; the last step of an epoch may have fewer.
        lr: Learning rate at the start.
        rate: Its factor at each share of the training.
        optimiser: "sgd" (with momentum, without Nesterov's correction) or "adam".
        momentum: Of SGD.
        weight_decay: On weights only: not on biases and other vectors, nor on the scales and shifts of norms.
        clip: Largest norm of all gradients together, coupled and without weight decay; longer ones are scaled down.
            None: no limit.
        accumulate: Parts in which a step's images are run, one after the other, for less memory. Batch norm then
            normalises each part by itself.
        precision: "float32", or "bfloat16" for the forward pass where torch's autocast allows it; weights, gradients
            and evaluation stay in the network's own format.
        augment: "none", or "crop_flip" for random windows after padding by 4 pixels, and mirror images.
        coupling: How the gradients of each section's blocks are coupled; None: they are not. The history then says what
            the coupling has achieved.
        penalty: What is added to the loss in training, for networks of ours; None: nothing. For other networks give
            `train` a loss that `penalised` has made.
        test_every: Epochs from one look at the test images to the next; the last epoch always has one. Epochs of few
            images are shorter than a look. A look converges the norms of limited networks, so the next epoch follows
            them from there: other looks make another training of these.
        seed: Seed of the order of the images, of their augmentation, and of dropout where the network has it.

    Source: The papers leave the settings open; these are those of the pre-activation ResNet paper (He et al. 2016),
    lr 0.1 divided by 10 at 50 % and 75 %, except for fewer epochs and smaller batches, which suit small data. P2
    (Hauser 2019), section 3: crop and flip on CIFAR-10.
    """

    epochs: int = 20
    batch: int = 64
    lr: float = 0.1
    rate: Rate = field(default_factory=Steps)
    optimiser: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float | None = None
    accumulate: int = 1
    precision: str = "float32"
    augment: str = "none"
    coupling: Coupling | None = None
    penalty: Penalty | None = None
    test_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("epochs", "batch", "accumulate", "test_every")}
        if min(counts.values()) < 1:
            raise ValueError(f"{', '.join(f'{name} ({n})' for name, n in counts.items())} must be at least 1 each")
        if not (0 < self.lr < math.inf and 0 <= self.momentum < 1 and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"lr ({self.lr}) must be above 0, momentum ({self.momentum}) in [0, 1), "
                f"weight_decay ({self.weight_decay}) 0 or more"
            )
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip is {self.clip}; it must be above 0, or None")
        kinds = {"optimiser": ("sgd", "adam"), "precision": ("float32", "bfloat16"), "augment": ("none", "crop_flip")}
        for name, known in kinds.items():
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)

    def describe(self) -> dict[str, Any]:
        """The settings as JSON values."""
        coupling = None if self.coupling is None else asdict(self.coupling) | {"rate": repr(self.coupling.rate)}
        return asdict(self) | {"rate": repr(self.rate), "coupling": coupling}


def batches_for(
    model: nn.Module, data: ImageSet, *, batch: int = EVALUATION_BATCH, preparation: Preparation | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """`batches` where a model works and in its number format."""
    like = next(model.parameters())
    return batches(data, batch=batch, preparation=preparation, device=str(like.device), dtype=like.dtype)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: ImageSet, *, loss: Loss = label_loss, preparation: Preparation | None = None
) -> dict[str, float]:
    """Mean loss and accuracy over a split, in eval mode; the modes of all its modules are put back.

    Args:
        model: The network.
        data: The split.
        loss: Loss of a batch.
        preparation: The network's own preparation of pixels; None is the data set's.

    Returns:
        "loss" and "accuracy"; for 0/1 labels also "digits", the mean of `found_classes`.
    """
    total, right, found = 0.0, 0, 0.0
    outputs: list[Tensor] = []  # what the model gave to the loss, so that it runs once
    handle = model.register_forward_hook(lambda _, __, output: outputs.append(output))
    with handle, evaluating(model):
        for x, y in batches_for(model, data, preparation=preparation):
            total += len(y) * loss(model, x, y).item()
            output = outputs[-1] if outputs else model(x)
            right += int(correct(output, y).sum())
            if y.ndim == 2:
                found += found_classes(output, y).sum().item()
            outputs.clear()
    result = {"loss": total / len(data), "accuracy": right / len(data)}
    return result if data.labels.ndim == 1 else result | {"digits": found / len(data)}


def train(
    model: nn.Module,
    data: Splits,
    config: TrainConfig,
    *,
    loss: Loss = label_loss,
    after_backward: Callable[[nn.Module, float], None] | None = None,
    after_epoch: AfterEpoch | None = None,
    progress: Show | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 120.0,
) -> list[Row]:
    """Train a network in place. It ends in eval mode; for the same seed, machine and thread count it ends the same.

    With a checkpoint file the training can be stopped at any moment, by Ctrl-C, SIGTERM or a crash, and called again:
    it goes on from the file and ends with the bits with which it would have ended. The file is written after every
    epoch, when the training is asked to stop, and every few minutes; it stays when the training is complete.

    Under torchrun every process trains on its part of each batch and gradients are averaged over all images, so the
    result is that of one process to rounding. Batch norm normalises each process's part by itself on processors, and
    all parts together on CUDA (SyncBatchNorm); the running statistics that are kept are those of process 0. Process 0
    alone writes the checkpoint. `after_backward` and `after_epoch` are called in every process.

    Args:
        model: The network; its parameters say where and in which number format the work is done.
        data: Training and test split.
        config: The settings.
        loss: Mean loss of a batch.
        after_backward: Called once per optimiser step, when all gradients are complete and before they are clipped,
            with the model and the share of the training that is done; may change gradients.
        after_epoch: Called with the model in eval mode after each epoch; what it returns is merged into the history.
        progress: Called after each step with the number of images so far and a line that says how it goes.
        checkpoint: The file to go on from, and to write. None: nothing is kept.
        checkpoint_seconds: Longest time between two writings.

    Returns:
        One row per epoch: epoch (from 1), lr, train_loss (mean over the epoch's steps, as the network was then, with
        the penalty if there is one), seconds, what `after_epoch` returned, and where the test images were looked at
        test_loss, test_accuracy (after the epoch; for 0/1 labels also test_digits, see `evaluate`).
        There limited networks also have overshoot, the largest norm over its bound at the end of the epoch's training.
        For coupled ones what the coupling has achieved; for implicit ones solves, the `summary` per block of the
        epoch's training steps (under torchrun of process 0's images).

    Raises:
        ConvergenceError: If a block's equation was not solved, forwards or backwards; the message says in which block,
            epoch and step. The checkpoint is as for the next.
        DriftError: If a reversible stack rebuilt its states too badly; the message says in which epoch and step. The
            checkpoint is as for the next.
        FloatingPointError: If the loss is not finite; the message says where and what to do. The checkpoint is that of
            the last complete epoch or step before.
        KeyboardInterrupt: If it was asked to stop, also after the last step; the checkpoint is written.
        CheckpointError: If the checkpoint is damaged or belongs to another loss, other settings, data, machine or
            numbers of threads or processes; a ValueError.
        ValueError: If network, data, loss and settings do not fit each other.
        OSError: If the checkpoint cannot be written.
    """
    with processes() as group, torch.random.fork_rng(devices=cuda_devices(model)), asked_to_stop() as asked:
        training = Training(model, data, config, loss, group, after_backward, progress)
        about = {} if checkpoint is None else _about(training, loss)
        at = Progress()
        if checkpoint is not None and checkpoint.exists():
            at = resume_(checkpoint, model, training.optimiser, about)
        keep = checkpoint is not None and group.rank == 0
        written = perf_counter()
        while at.epoch < config.epochs:
            start = perf_counter()
            for done in training.steps(at):
                at = done
                stop = group.any(asked.is_set())
                if keep and (stop or perf_counter() - written >= checkpoint_seconds):
                    save(checkpoint, model, training.optimiser, at, about)
                    written = perf_counter()
                if stop:
                    raise KeyboardInterrupt
            row = training.finish_epoch(at) | {"seconds": perf_counter() - start}
            at = Progress(at.epoch + 1, history=(*at.history, row | (after_epoch(model) if after_epoch else {})))
            if keep:
                save(checkpoint, model, training.optimiser, at, about)
                written = perf_counter()
        training.wrapped = model  # lets go of what belongs to the processes before they part
        model.eval()
        if group.any(asked.is_set()):  # after the last step
            raise KeyboardInterrupt
        return list(at.history)


class Training:
    """One training: what its steps share.

    Args:
        model: The network, brought into the memory layout that is fast for it.
        data: Training and test split.
        config: The settings.
        loss: Mean loss of a batch.
        group: The processes that train it.
        after_backward: As in `train`.
        progress: As in `train`.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Splits,
        config: TrainConfig,
        loss: Loss,
        group: Group,
        after_backward: Callable[[nn.Module, float], None] | None,
        progress: Show | None,
    ) -> None:
        self.model, self.data, self.config, self.group = model, data, config, group
        self.loss = loss if config.penalty is None else penalised(config.penalty, loss)
        self.after_backward, self.progress = after_backward, progress
        _check(model, data, config, loss, group)
        like = next(model.parameters())
        self.device = str(like.device)
        self.solves = Solves(model)
        self.images = TrainingImages(data.train, augment=config.augment, device=like.device, dtype=like.dtype)
        self.count = math.ceil(len(data.train) / config.batch)  # steps of an epoch
        self.layout = fast_layout(model)
        model.to(memory_format=self.layout)
        part_copies_(model)
        self.wrapped = group.wrap(model)
        self.optimiser = make_optimiser(model, config)

    def steps(self, at: Progress) -> Iterator[Progress]:
        """The steps of the next epoch that are not done yet; after each, how far the training is."""
        self.model.train()
        order = torch.Generator().manual_seed(_seed(self.config.seed, at.epoch, 0))
        part = (self.group.rank, self.group.size)
        for x, y in self.images.batches(batch=self.config.batch, generator=order, skip=at.step, part=part):
            torch.manual_seed(_seed(self.config.seed, at.epoch * self.count + at.step, 1 + self.group.rank))
            images = min(self.config.batch, len(self.images) - at.step * self.config.batch)
            value = self._step(arranged(x, self.layout), y, at, images)
            solves = added(at.solves, self.solves.take())
            at = replace(at, step=at.step + 1, total=at.total + images * value, solves=solves)
            if self.progress:
                done = at.epoch * len(self.images) + min(at.step * self.config.batch, len(self.images))
                self.progress(done, f"epoch {at.epoch + 1}/{self.config.epochs}, loss {value:.3f}")
            yield at

    def _share(self, epoch: int, step: int) -> float:
        """How much of the training is done before a step."""
        return (epoch + step / self.count) / self.config.epochs

    def _step(self, x: Tensor, y: Tensor, at: Progress, images: int) -> float:
        """One step of the optimiser; the mean loss over its images."""
        config = self.config
        share = self._share(at.epoch, at.step)
        for settings in self.optimiser.param_groups:
            settings["lr"] = config.lr * config.rate(share)
        try:
            value = self._gradients(x, y, images)
        except ConvergenceError as error:
            raise ConvergenceError(f"epoch {at.epoch + 1}, step {at.step + 1} of {self.count}, {error}") from error
        except DriftError as error:
            error.args = (f"epoch {at.epoch + 1}, step {at.step + 1} of {self.count}, {error}",)
            raise
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} in epoch {at.epoch + 1}, step {at.step + 1} of {self.count}: "
                f"training has diverged; try a smaller learning rate than {config.lr:g}"
            )
        if config.coupling:
            config.coupling.after_backward(self.model, share)
        if self.after_backward:
            self.after_backward(self.model, share)
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimiser.step()
        return value

    def _gradients(self, x: Tensor, y: Tensor, images: int) -> float:
        """Gradients of the mean loss over the images of a step, those of all processes; and that mean."""
        self.optimiser.zero_grad()
        total = 0.0
        size = _part(images, self.config.accumulate * self.group.size)
        parts = list(zip(x.split(size), y.split(size), strict=True))
        for number, (some, labels) in enumerate(parts):
            weight = len(some) / images
            bf16 = torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")
            with self.group.gradients_wait(self.wrapped, number + 1 < len(parts)):
                # Limits take one step, however often a block is applied.
                with bf16, parametrize.cached(), self.solves.forward():
                    value = self.loss(self.wrapped, some, labels)
                # Processes' gradients are averaged, so each counts its images as if all processes had as many.
                with self.solves.backward():
                    (value * (weight * self.group.size)).backward()
            total += weight * value.item()
        return self.group.sum(total)

    def finish_epoch(self, at: Progress) -> Row:
        """The epoch's row of the history; the model is in eval mode from here on."""
        self.model.eval()
        self.group.share_buffers(self.model)
        row = {
            "epoch": at.epoch + 1,
            # Not the optimiser's: after a stop at the end of an epoch it has made no step yet.
            "lr": self.config.lr * self.config.rate(self._share(at.epoch, self.count - 1)),
            "train_loss": at.total / len(self.images),
        }
        if (at.epoch + 1) % self.config.test_every == 0 or at.epoch + 1 == self.config.epochs:
            row |= self._tested(at.epoch + 1)
        row |= {"solves": summary(at.solves)} if at.solves else {}
        return row | (self.config.coupling.after_epoch(self.model) if self.config.coupling else {})

    def _tested(self, epoch: int) -> Row:
        """What the network does on the test images; the model is in eval mode."""
        try:
            with self.solves.forward():
                found = evaluate(self.model, self.data.test, loss=self.loss, preparation=self.data.train.preparation)
        except ConvergenceError as error:
            raise ConvergenceError(f"on the test images after epoch {epoch}, {error}") from error
        self.solves.take()  # a history tells of training steps
        if not math.isfinite(found["loss"]):
            raise FloatingPointError(
                f"the loss on the test images is {found['loss']} after epoch {epoch}: training has diverged; "
                f"try a smaller learning rate than {self.config.lr:g}"
            )
        if self.progress:
            said = f"epoch {epoch}/{self.config.epochs}, test accuracy {found['accuracy']:.1%}"
            self.progress(epoch * len(self.images), said)
        over = overshoot(self.model)
        return {f"test_{name}": value for name, value in found.items()} | ({} if over is None else {"overshoot": over})


def _check(model: nn.Module, data: Splits, config: TrainConfig, loss: Loss, group: Group) -> None:
    """Refuse before the first step what would fail at some later one."""
    for split in data:
        if not len(split):
            raise ValueError(f"the {split.split} split of {split.name} has no images")
    if config.coupling is not None:
        config.coupling.check(model)
    last = len(data.train) % config.batch or config.batch
    if last < group.size:
        raise ValueError(
            f"the last step of an epoch has {last} images, too few for {group.size} processes; choose another batch"
        )
    normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    for images in (last, min(config.batch, len(data.train))) if normalised else ():
        size = _part(images, config.accumulate * group.size)
        for own in (images // group.size, -(-images // group.size)):
            if 1 in (size, own % size):
                other = f"choose another batch ({config.batch}) or accumulate ({config.accumulate})"
                raise ValueError(
                    f"{'the last' if images == last else 'a'} step of an epoch has {images} images, of which batch "
                    f"norm would see 1 at a time; {other if len(data.train) > 1 else 'give more images'}"
                )
    if loss is not label_loss:
        return
    like = next(model.parameters())
    with torch.no_grad(), evaluating(model):
        x = data.train.preparation(data.train.images[:2].to(like.device)).to(like.dtype)
        classes = model(x).shape[-1]
    labels = torch.cat([split.labels for split in data])
    found = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    if found > classes or (labels.ndim == 2 and found != classes):
        raise ValueError(f"the labels of {data.train.name} need {found} classes, the network has {classes} outputs")


def _part(images: int, parts: int) -> int:
    """Images of each part of a step; a process's last part may have fewer.

    Of processes with unequal shares all have as many parts, since SyncBatchNorm waits for all in each; one image that
    would be a part of its own `_check` refuses where there is batch norm.
    """
    return -(-images // parts)


def _about(training: "Training", loss: Loss) -> dict[str, Any]:
    """What a checkpoint must have in common with a training that goes on from it."""
    about = training.config.describe() | here(training.group.size, training.device)
    about["labels"] = training.data.train.labelling
    about |= {f"{name} images": split.fingerprint() for name, split in training.data._asdict().items()}
    about["loss"] = name_of(loss)
    about["network"] = repr(getattr(training.model, "config", type(training.model).__name__))
    return about


def make_optimiser(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of a training, with weight decay on weights only: two or more dimensions, and not of a norm."""
    weights = {id(p) for p in weights_of(model).values()}
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in model.parameters():
        if p.requires_grad:
            parts[p.ndim > 1 and id(p) in weights].append(p)
    groups = [{"params": p, "weight_decay": config.weight_decay * decays} for decays, p in parts.items()]
    groups = [group for group in groups if group["params"]]
    if config.optimiser == "adam":
        return torch.optim.Adam(groups, lr=config.lr, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)


def _seed(seed: int, number: int, stream: int) -> int:
    """A seed for one epoch's order or one step's dropout, so that no random state has to be kept.

    A hash, because torch's generator for processors uses the low 32 bits only.
    """
    return int.from_bytes(sha256(f"{seed} {number} {stream}".encode()).digest()[:7])
