"""What the gradient probe and a sweep of interventions cost against the loops that scripts have: `make bench`.

Hauser's network for MNIST in its own memory layout on both sides, one thread (see timing.py); checked first to compute
the same. Most of the sweep's ratio is counting: about half of the block evaluations.
"""

import argparse
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.streams import hauser
from benchmarks.timing import Side, Work, heading, ratio, row
from residuum.models import ResNet
from residuum.probes import drops, gradients, interventions
from residuum.schedules import drop


def calibrated() -> tuple[ResNet, Tensor, Tensor]:
    """A network whose batch norm knows its images, so that gradients are of an ordinary size."""
    from residuum.nulls import calibrate_

    x, y = torch.randn(32, 1, 28, 28), torch.randint(10, (32,))
    model = hauser(8)
    calibrate_(model, [(x, y)])
    return model, x, y


def our_cosines() -> Work:
    model, x, y = calibrated()
    probe = gradients()
    return lambda: probe(model.cut(x), y)["gradient_cosine"].values


def loop_of_retained_gradients() -> Work:
    """Every state keeps its gradient, parameters too."""
    model, x, y = calibrated()

    def work() -> Tensor:
        with torch.enable_grad():
            model.zero_grad()
            trace = model.cut(x).run()
            pairs = [pair for states in trace.states for pair in pairwise(states)]
            for h, _ in pairs:
                h.retain_grad()
            F.cross_entropy(trace.output, y, reduction="sum").backward()
            cosines = [F.cosine_similarity((b - a).flatten(1), a.grad.flatten(1)) for a, b in pairs]
        return torch.stack(cosines, 1).detach()

    return work


def our_sweep() -> Work:
    model, x, y = calibrated()
    probe = interventions(drops)
    return lambda: probe(model.cut(x), y)["drop_accuracy"].values


def one_forward_per_drop() -> Work:
    model, x, y = calibrated()

    def work() -> Tensor:
        stream = model.cut(x)
        places = [(s, i) for s, length in enumerate(stream.lengths) for i in range(length)]
        outputs = [stream.run(drop(stream.full, s, i), keep=False).output for s, i in places]
        return torch.stack([(output.argmax(1) == y).float() for output in outputs], 1)

    return work


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    pairs = parser.parse_args().pairs
    comparisons = (
        ("gradient cosines of all blocks / loop that retains gradients", our_cosines, loop_of_retained_gradients, 0.75),
        ("accuracy without each block in turn / one forward each", our_sweep, one_forward_per_drop, 0.55),
    )
    print(heading(pairs))
    for name, ours, theirs, limit in comparisons:
        with torch.no_grad():
            results = []
            for make in (ours, theirs):
                torch.manual_seed(0)
                results.append(make()())
            assert torch.allclose(*results, atol=1e-4), name
        print(row(name, *ratio(Side(ours), Side(theirs), pairs=pairs), limit), flush=True)


if __name__ == "__main__":
    main()
