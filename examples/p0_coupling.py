"""Coupled and limited networks on MNIST and Digitclutter-3: trains, measures and tabulates; nothing is repeated.

python examples/p0_coupling.py OUT [--data-root DIR] [--images 6000] [--epochs 5]

For each data set and each pair of coupling (0, 0.9 and 1 of the weights, 1 of all) and Lipschitz limit (none, 1) a
network is trained into OUT/<data>-<coupling>-<limit> and measured into OUT/probe-.., and the table of
docs/results/p0.md is printed. Stopped, the same command goes on.
"""

import argparse
import json
from pathlib import Path

from residuum.cli import main as residuum
from residuum.layers.lipschitz import limits
from residuum.loading import load_model

COUPLINGS = {
    "0": (),
    "0.9": ("--couple", 0.9),
    "1": ("--couple", 1),
    "1, all": ("--couple", 1, "--couple-norms"),
    "1, all, group norm": ("--couple", 1, "--couple-norms", "--norm", "group"),
}
LIMITS = {"none": (), "1": ("--lipschitz", 1)}
PROBES = ("perturbation", "update_angle", "pairs", "readouts", "drops_last", "drops_first", "replacements", "unrolls")


def run(*arguments: object) -> None:
    """One command of residuum; an error has been said."""
    if residuum([str(argument) for argument in arguments]):
        raise SystemExit(2)


def measure(out: Path, name: str, data: list[object], coupling: str, limit: str, size: list[object]) -> dict:
    """Everything about one network."""
    label = f"{name}-{coupling}-{limit}".replace(", ", "-")
    trained, probed = out / label, out / f"probe-{label}"
    if not trained.exists():
        run("train", "--out", trained, *data, *size, "--alike", 1, *COUPLINGS[coupling], *LIMITS[limit])
    if not probed.exists():
        run("probe", trained, *data, "--out", probed, "--limit", 1000, "--probes", *PROBES)
    row = json.loads((trained / "history.json").read_text())[-1]
    found = json.loads((probed / "indices.json").read_text())
    norms = limits(load_model(str(trained)).model.eval()).values()
    return {"row": row, "indices": found, "norms": [n["norm"] for n in norms], "over": [n["overshoot"] for n in norms]}


def estimate(index: dict | None) -> str:
    """The network's value with its interval."""
    if index is None or index["network"] is None:
        return "undefined"
    value = index["network"]
    return f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def line(coupling: str, limit: str, found: dict) -> str:
    """One row of the table."""
    row, index = found["row"], found["indices"]["convergence"]
    accuracy = f"{100 * row['test_accuracy']:.1f}" + (
        f" ({100 * row['test_digits']:.1f})" if "test_digits" in row else ""
    )
    shared = [f"{s['above_unrelated']:.2f}" for s in row["sharing"]] if "sharing" in row else ["not coupled"]
    norms = f"{max(found['norms']):.3f} ({max(found['over']):.2f})" if found["norms"] else ""
    indices = (estimate(index.get(name)) for name in ("convergence", "recurrence", "divergence", "drop_gap"))
    return f"| {coupling} | {limit} | {accuracy} | {' | '.join(indices)} | {', '.join(shared)} | {norms} |"


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
        run("data", "digitclutter", "--digits", 3, "--n", 20000, "--test", 5000, "--out", clutter)
    mnist = ["--data", "mnist", *(["--data-root", flags.data_root] if flags.data_root else [])]
    size = ["--blocks", 3, 3, 3, "--widths", 8, 16, 32, "--epochs", flags.epochs, "--batch", 64, "--lr", 0.05]
    for name, data, images in (("mnist", mnist, flags.images), ("clutter", ["--data", clutter], 3 * flags.images)):
        rows = []
        for limit in LIMITS:
            for coupling in COUPLINGS if limit == "none" else list(COUPLINGS)[:-1]:  # group norm has no limit
                found = measure(flags.out, name, data, coupling, limit, [*size, "--limit", images])
                rows.append(line(coupling, limit, found))
        print(f"\n{name}, {images} images")
        print(
            "| coupling | limit | accuracy, % | convergence | recurrence | divergence | gap | sharing | norm (over) |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
