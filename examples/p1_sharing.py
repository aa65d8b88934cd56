"""Shared weights on MNIST and Digitclutter-3: unshared, naive, unshared batch norm; what wrong statistics cost.

python examples/p1_sharing.py OUT [--data-root DIR] [--images 6000] [--epochs 5]

Trains one network each, follows gradient-norm ratio and accuracy with re-estimated statistics over the epochs, measures
it, and prints the table of docs/results/p1.md. Stopped, the same command goes on.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from residuum.cli import main as residuum
from residuum.data import Splits, batches, load_splits
from residuum.files import new_folder
from residuum.layers.sharing import NAIVE, UBN, Sharing
from residuum.models import ResNet, ResNetConfig, count_parameters
from residuum.nulls import calibrate_
from residuum.probes import passive, state_norm
from residuum.profiles import profile
from residuum.results import write_run
from residuum.training import TrainConfig, train
from residuum.watching import gradient_ratios, recalibration

FREE = 2
CLUTTER, CLUTTER_RATE = 40000, 0.1  # images and learning rate with which Digitclutter-3 is learned in four epochs
SHARINGS: dict[str, Sharing | None] = {
    "unshared": None,
    "naive": replace(NAIVE, free=FREE),
    "UBN": replace(UBN, free=FREE),
    "UBN, gamma 1": replace(UBN, free=FREE, gamma=1.0),
    "UBN, shared statistics": replace(UBN, free=FREE, statistics="shared"),
    "UBN, shared affine": replace(UBN, free=FREE, affine="shared"),
}


def network_of(data: Splits, sharing: Sharing | None) -> ResNetConfig:
    """P1's construction at a third of its depth and half its width."""
    channels, classes = data.train.images.shape[1], len(data.train.classes)
    return ResNetConfig((6, 6, 6), (8, 16, 32), channels, classes, "projection", bias=True, sharing=sharing)


def trained(out: Path, data: Splits, sharing: Sharing | None, epochs: int, lr: float) -> list[dict]:
    """The history of one network, trained unless it is there."""
    if out.exists():
        return json.loads((out / "history.json").read_text())
    network = network_of(data, sharing)
    config, model = TrainConfig(epochs=epochs, batch=64, lr=lr), ResNet(network)
    ratios, again = gradient_ratios(data), recalibration(data)
    growth = norms_at_initialisation(network, data)
    history = train(
        model,
        data,
        config,
        after_epoch=lambda network: ratios(network) | again(network) | {"growth": growth},
        checkpoint=out.with_suffix(".checkpoint"),
    )
    with new_folder(out) as folder:
        write_run(folder, model, data, config, history)
        (folder / "history.json").write_text(json.dumps(history))
    return history


def norms_at_initialisation(network: ResNetConfig, data: Splits) -> float:
    """Growth of the state's norm over the last section of the calibrated fresh network (M9)."""
    model, some = ResNet(network, seed=1), data.train.take(1000, seed=0)
    calibrate_(model, batches(some, batch=100, dtype=torch.float32))
    found = profile(model.eval(), batches(some, batch=100, dtype=torch.float32), [passive(state_norm)])
    means = [
        m
        for m, p in zip(found.mean("state_norm").tolist(), found.measures["state_norm"].points, strict=True)
        if p.section == 2
    ]
    return means[-1] / means[0]


def main() -> None:
    """Do the work and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=5)
    flags = parser.parse_args()
    clutter = flags.out / "digitclutter-3.npz"
    if not clutter.exists() and residuum(
        ["data", "digitclutter", "--digits", "3", "--n", str(CLUTTER), "--test", "5000", "--out", str(clutter)]
    ):
        raise SystemExit(2)
    for name, path, images, epochs, lr in (
        ("mnist", "mnist", flags.images, flags.epochs, 0.05),
        ("clutter", str(clutter), CLUTTER, 4, CLUTTER_RATE),
    ):
        data = Splits(
            *(
                part.take(min(images, len(part)), seed=0)
                for part in load_splits(path, flags.data_root if name == "mnist" else None)
            )
        )
        print(f"\n{name}, {images} images")
        print("| network | parameters | train loss | accuracy, % | re-estimated, % | gradient ratio | growth |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for label, sharing in list(SHARINGS.items())[: None if name == "mnist" else 3]:
            folder = flags.out / f"{name}-{label}".replace(", ", "-").replace(" ", "-")
            rows = trained(folder, data, sharing, epochs, lr)
            last, (first, end) = rows[-1], [rows[i]["test_gradient_ratio"] for i in (0, -1)]
            size = count_parameters(ResNet(network_of(data, sharing)), statistics=False)
            accuracies = f"{100 * last['test_accuracy']:.1f} | {100 * last['recalibrated_test_accuracy']:.1f}"
            numbers = f"{last['train_loss']:.3f} | {accuracies} | {first:.3g} -> {end:.3g} | {last['growth']:.2f}"
            print(f"| {label} | {size:,} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
