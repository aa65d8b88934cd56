"""What a training step costs against a plain eager loop in the default memory layout; and its data: `make bench`.

P2's network for MNIST with 4 blocks per section, batches of 128, one thread (see timing.py). Ours includes gathering
the images; the plain loop finds its batches ready.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.streams import Plain
from benchmarks.timing import Side, Work, heading, ratio, row
from residuum.checkpoints import Progress
from residuum.data import ClutterConfig, ImageSet, Preparation, Splits, TrainingImages, digitclutter
from residuum.layers.coupling import Coupling
from residuum.layers.sharing import Sharing
from residuum.models import ResNet, ResNetConfig
from residuum.processes import Group
from residuum.training import Job, TrainConfig, label_loss

BLOCKS, BATCH = 4, 128


def images(channels: int, size: int) -> ImageSet:
    """Random images: what they show does not change what they cost."""
    pixels = torch.randint(0, 256, (10 * BATCH, channels, size, size), dtype=torch.uint8)
    preparation = Preparation(255, (0.5,) * channels, (0.25,) * channels)
    return ImageSet("random", "train", pixels, torch.randint(10, (len(pixels),)), tuple("0123456789"), preparation, "")


def ours(precision: str) -> Work:
    torch.set_grad_enabled(True)
    data = images(1, 28)
    model = ResNet(ResNetConfig(blocks=(BLOCKS,) * 3, channels=1))
    config = TrainConfig(epochs=1000, batch=BATCH, lr=1e-3, precision=precision)
    job = Job(model, Splits(data, data), config, label_loss, Group(), None, None)

    def forever():
        while True:
            yield from job.steps(Progress())

    steps = forever()
    return lambda: next(steps)


def forward_backward(sharing: Sharing | None) -> Work:
    """Forward and backward of 16 blocks of 16 channels, all but the first with one set of weights, or each its own."""
    torch.set_grad_enabled(True)
    model = ResNet(ResNetConfig((16,), (16,), channels=1, sharing=sharing)).train()
    x = torch.randn(BATCH, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    return lambda: model(x).sum().backward()


def plain() -> Work:
    """A loop as it stands in most scripts: default layout, new tensors, torch's default optimiser."""
    torch.set_grad_enabled(True)
    model: nn.Module = Plain(BLOCKS).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))

    def work() -> None:
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
        loss.item()

    return work


def convolutions() -> Work:
    """Forward and backward of the blocks' convolutions alone, in channels-last memory: no step can cost less."""
    torch.set_grad_enabled(True)
    layers = []
    for width, size in ((16, 28), (32, 14), (64, 7)):
        conv = nn.Conv2d(width, width, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
        x = torch.randn(BATCH, width, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
        layers.append((conv, x, torch.randn_like(x)))

    def work() -> None:
        for conv, x, gradient in layers:
            for _ in range(2 * BLOCKS):
                conv(x).backward(gradient)

    return work


def data_share() -> None:
    """Processor time of making the batches, as part of a step."""
    step = ours("float32")
    for name, channels, size, augment in (("MNIST", 1, 28, "none"), ("CIFAR, crop and flip", 3, 32, "crop_flip")):
        source = TrainingImages(images(channels, size), augment=augment)
        draw = torch.Generator().manual_seed(0)
        per_batch = (
            _seconds(lambda source=source, draw=draw: sum(1 for _ in source.batches(batch=BATCH, generator=draw))) / 10
        )
        per_step = _seconds(lambda: [step() for _ in range(3)]) / 3
        print(f"data, {name}: {1e6 * per_batch / BATCH:.1f} us per image, {100 * per_batch / per_step:.2f} % of a step")


def clutter_rate() -> None:
    """Images of Digitclutter per second of processor time, the median of 9 times 500."""
    for config in (ClutterConfig(4), ClutterConfig(4, "heavy"), ClutterConfig(5, "heavy")):
        seconds = statistics.median(_seconds(partial(digitclutter, config, 500)) for _ in range(9))
        print(f"Digitclutter, {config.digits} digits, {config.debris} debris: {500 / seconds:,.0f} images per second")


def coupling_share() -> None:
    """Processor time of coupling the gradients of all blocks, as part of a step."""
    step = ours("float32")
    model = ResNet(ResNetConfig(blocks=(BLOCKS,) * 3, channels=1))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for couple in ("weights", "all"):
        coupling = Coupling(0.9, couple)
        shares = [
            _seconds(lambda coupling=coupling: [coupling.after_backward(model, 0.5) for _ in range(100)]) / 100
            / (_seconds(lambda: [step() for _ in range(3)]) / 3)
            for _ in range(5)
        ]  # fmt: skip
        print(f"coupling, {couple}: {100 * statistics.median(shares):.2f} % of a step  [2 %]")


def _seconds(work: Callable[[], object]) -> float:
    work()
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    pairs = parser.parse_args().pairs
    print(heading(pairs))
    script = Side(plain, keep=False)
    ubn = partial(forward_backward, Sharing(free=1))
    for name, side, theirs, limit in (
        ("training step, float32 / plain eager NCHW loop", Side(partial(ours, "float32")), script, 0.88),
        ("training step, bfloat16 / plain eager NCHW loop", Side(partial(ours, "bfloat16")), script, 0.58),
        ("training step, float32 / its convolutions alone", Side(partial(ours, "float32")), Side(convolutions), None),
        (
            "block with unshared batch norm / ordinary block",
            Side(ubn),
            Side(partial(forward_backward, None)),
            1.05,
        ),
    ):
        print(row(name, *ratio(side, theirs, pairs=pairs), limit), flush=True)
    torch.set_num_threads(1)
    data_share()
    clutter_rate()
    coupling_share()


if __name__ == "__main__":
    main()
