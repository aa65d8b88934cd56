"""The cost model of `residuum reproduce --list` against measured training steps.

Run as `python -m benchmarks.costs`, one thread, processor time. On one core of an AMD EPYC (Zen 4), torch 2.13, other
work beside, predicted / measured was 0.77 to 0.91 for widths 4, 8, 16 and 1.00 to 1.11 for wider networks. A whole run
(MNIST, L = 2, 10,000 images, one epoch) took 10.8 s where 8.8 s were predicted, start and reading included.
"""

import time
from dataclasses import replace

import torch

from residuum import ResNet, ResNetConfig
from residuum.experiments.costs import A, B
from residuum.memory import keep_freed_memory
from residuum.training import label_loss

REPEATS = 3


def step(config: ResNetConfig, side: int, batch: int) -> float:
    """Seconds of the fastest of a few training steps, without the optimiser's."""
    model = ResNet(config).train()
    x, y = torch.randn(batch, config.channels, side, side), torch.randint(10, (batch,))
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.process_time()
        label_loss(model, x.contiguous(memory_format=torch.channels_last), y).backward()
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


def main() -> None:
    """Print a table: milliseconds per image and block of each of three sections, measured and predicted."""
    torch.set_num_threads(1)
    keep_freed_memory()
    print("widths  side  batch  measured  predicted  ratio")
    for width in (4, 8, 16):
        for side, channels in ((28, 1), (32, 3)):
            for batch in (32, 128):
                widths = (width, 2 * width, 4 * width)
                config = ResNetConfig(blocks=(6,) * 3, widths=widths, channels=channels)
                few = replace(config, blocks=(2,) * 3)
                measured = 1e3 * (step(config, side, batch) - step(few, side, batch)) / (4 * batch)
                sides = (side, -(-side // 2), -(-side // 4))
                predicted = sum(s**2 * (A + B * w**2) for s, w in zip(sides, widths, strict=True))
                ratio = predicted / measured
                print(f"{width:>6}  {side:>4}  {batch:>5}  {measured:>8.3f}  {predicted:>9.3f}  {ratio:>5.2f}")


if __name__ == "__main__":
    main()
