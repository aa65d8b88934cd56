"""A residual network on CIFAR-10: trains it, measures it with every probe, and writes the report.

python examples/cifar10.py OUT [--data FILE.npz] [--data-root DIR] [--blocks 5 5 5] [--epochs 8] [--images 12000]

Trains into OUT/network (stopped by Ctrl-C or a crash, the same command goes on), measures it on test images into
OUT/probe and prints what docs/results/examples.md says. One thread: OMP_NUM_THREADS=1.
"""

import argparse
from pathlib import Path

from residuum.cli import main as residuum


def run(*arguments: object) -> None:
    """One command of residuum; an error has been said."""
    if residuum([str(argument) for argument in arguments]):
        raise SystemExit(2)


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--blocks", type=int, nargs=3, default=[5, 5, 5])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=12000, help="training images")
    parser.add_argument("--measured", type=int, default=500, help="test images that are measured")
    flags = parser.parse_args()
    data = ["--data", flags.data, *(["--data-root", flags.data_root] if flags.data_root else [])]
    network, probed = flags.out / "network", flags.out / "probe"
    if not network.exists():
        settings = ["--epochs", flags.epochs, "--batch", 64, "--augment", "crop_flip", "--rate", "cosine"]
        faster = ["--precision", "bfloat16", "--limit", flags.images]
        run("train", "--out", network, *data, "--blocks", *flags.blocks, *settings, *faster)
    if not probed.exists():
        run("probe", network, *data, "--out", probed, "--probes", "all", "--limit", flags.measured)


if __name__ == "__main__":
    main()
