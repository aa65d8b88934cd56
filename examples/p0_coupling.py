"""Coupled and limited networks on MNIST and Digitclutter-3: trains, measures and tabulates; nothing is repeated.

python examples/p0_coupling.py OUT [--data-root DIR] [--images 6000] [--epochs 5]

For each data set and each pair of coupling (0, 0.9 and 1 of the weights, 1 of all) and Lipschitz limit (none, 1) a
network is trained into OUT/<data>-<coupling>-<limit>, its indices written beside it, and the table of
docs/results/p0.md is printed. Stopped, the same command goes on.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from residuum.cli import main as residuum
from residuum.convergence import convergence_indices
from residuum.data import Splits, batches, load_splits
from residuum.layers.lipschitz import limits
from residuum.loading import load_model
from residuum.models import ResNet
from residuum.nulls import null_model
from residuum.probes import drops_first, drops_last, interventions, replacements, unrolls
from residuum.profiles import profile

COUPLINGS = {
    "0": (),
    "0.9": ("--couple", 0.9),
    "1": ("--couple", 1),
    "1, all": ("--couple", 1, "--couple-norms"),
    "1, all, group norm": ("--couple", 1, "--couple-norms", "--norm", "group"),
}
# These once only: the recurrent ends; group norm has no limit.
ONCE = {"1, all": (("mnist", "none"), ("mnist", "1")), "1, all, group norm": (("mnist", "none"),)}
LIMITS = {"none": (), "1": ("--lipschitz", 1)}
INDICES = ("convergence", "recurrence", "divergence", "drop_gap")
BLOCKS, TESTED = 3, 500
CLUTTER, CLUTTER_RATE = 40000, 0.1  # images and learning rate with which Digitclutter-3 is learned in four epochs


def run(*arguments: object) -> None:
    """One command of residuum; an error has been said."""
    if residuum([str(argument) for argument in arguments]):
        raise SystemExit(2)


def measure(out: Path, name: str, data: list[object], coupling: str, limit: str, size: list[object]) -> dict:
    """Everything about one network."""
    label = f"{name}-{coupling}-{limit}".replace(", ", "-").replace(" ", "-")
    trained, probed = out / label, out / f"indices-{label}.json"
    if not trained.exists():
        run("train", "--out", trained, *data, *size, "--alike", 1, *COUPLINGS[coupling], *LIMITS[limit])
    model = load_model(str(trained)).model.eval().requires_grad_(False)
    if not probed.exists():
        splits = load_splits(str(data[1]), data[3] if len(data) > 2 else None)
        probed.write_text(
            json.dumps({"trained": indices(model, splits), "initial": indices(model, splits, fresh=True)})
        )
    row = json.loads((trained / "history.json").read_text())[-1]
    norms = list(limits(model).values())
    return {"row": row, "norms": norms} | json.loads(probed.read_text())


def indices(model: ResNet, data: Splits, *, fresh: bool = False) -> dict:
    """The indices of iterative convergence on test images."""
    test = data.test.take(TESTED, seed=0)
    if fresh:
        model = null_model(model, batches(data.train.take(1000, seed=0), batch=100, dtype=torch.float32), seed=0)
    given = batches(test, batch=100, preparation=data.train.preparation, dtype=torch.float32)
    probe = interventions(drops_last, drops_first, replacements, partial(unrolls, times=BLOCKS))
    return convergence_indices(profile(model, given, [probe]))


def estimate(index: dict | None) -> str:
    """The network's value with its interval."""
    if index is None or index["network"] is None:
        return "undefined"
    value = index["network"]
    return f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def line(coupling: str, limit: str, found: dict) -> str:
    """One row of the table."""
    row = found["row"]
    accuracy = f"{100 * row['test_accuracy']:.1f}" + (
        f" ({100 * row['test_digits']:.1f})" if "test_digits" in row else ""
    )
    shared = [f"{s['above_unrelated']:.2f}" for s in row["sharing"]] if "sharing" in row else ["not coupled"]
    norms = [max(norm[key] for norm in found["norms"]) for key in ("norm", "overshoot") if found["norms"]]
    said = f"{norms[0]:.3f} ({norms[1]:.2f})" if norms else ""
    estimates = " | ".join(estimate(found["trained"].get(name)) for name in INDICES)
    return f"| {coupling} | {limit} | {accuracy} | {estimates} | {', '.join(shared)} | {said} |"


def main() -> None:
    """Do the work and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=5)
    flags = parser.parse_args()
    clutter = flags.out / "digitclutter-3.npz"
    if not clutter.exists():
        run("data", "digitclutter", "--digits", 3, "--n", CLUTTER, "--test", 5000, "--out", clutter)
    mnist = ["--data", "mnist", *(["--data-root", flags.data_root] if flags.data_root else [])]
    size = f"--blocks {BLOCKS} {BLOCKS} {BLOCKS} --widths 8 16 32 --batch 64".split()
    settings = {
        "mnist": (mnist, ["--epochs", flags.epochs, "--lr", 0.05, "--limit", flags.images]),
        "clutter": (["--data", clutter], ["--epochs", 4, "--lr", CLUTTER_RATE]),
    }
    for name, (data, training) in settings.items():
        rows = []
        for limit in LIMITS:
            for coupling in COUPLINGS:
                if coupling in ONCE and (name, limit) not in ONCE[coupling]:
                    continue
                found = measure(flags.out, name, data, coupling, limit, [*size, *training])
                rows.append(line(coupling, limit, found))
        print(f"\n{name}")
        print(
            "| coupling | limit | accuracy, % | convergence | recurrence | divergence | gap | sharing | norm (over) |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
