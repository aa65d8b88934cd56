"""Slow, obvious twins of gradients, interventions and indices: one example, one block at a time, in float64."""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

import oracles
from residuum.streams import Stream


def mean_entropy(output: Tensor, mask: Tensor | None, example: int) -> float:
    """Entropy of one example's output, a mean over its counted tokens if it has tokens."""
    if output.ndim == 1:
        return oracles.entropy(output)
    counted = range(len(output)) if mask is None else torch.nonzero(mask[example]).flatten().tolist()
    return float(np.mean([oracles.entropy(output[t]) for t in counted]))


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of one example (a batch of one), a mean over the tokens that count."""
    logs = output[0].double().log_softmax(-1)
    if logs.ndim == 1:
        return -logs[target[0]]
    return torch.stack([-logs[t, c] for t, c in enumerate(target[0].tolist()) if c != -100]).mean()


def gradients(stream: Stream, target: Tensor, *, grad: str, at: str) -> dict[str, list[float]]:
    """Cosine, norm and product of update and gradient for every block of a stream of one example.

    Every gradient has a backward of its own, from a run that starts at that state.
    """
    found: dict[str, list[float]] = {"gradient_cosine": [], "gradient_norm": [], "first_order_change": []}
    sections = stream.run().states
    last = max(s for s, states in enumerate(sections) if len(states) > 1)
    for s, states in enumerate(sections):
        if grad == "plugin" and s != last:
            continue
        for i, (before, after) in enumerate(pairwise(states)):
            h = (before if at == "input" else after).detach().requires_grad_()
            rest = i - 1 if at == "input" else i
            output = stream.exit(h, s) if grad == "plugin" else stream.finish(h, (s, rest))
            (g,) = torch.autograd.grad(loss(output, target), h)
            update, slope = (oracles.flat(v.detach(), stream.mask, 0) for v in (after - before, g))
            found["gradient_cosine"].append(oracles.cosine(update, slope))
            found["gradient_norm"].append(float(np.linalg.norm(slope)))
            found["first_order_change"].append(float(update @ slope))
    return found


def normalised_errors(errors: list[float], intact: float, chance: float) -> list[float]:
    """Excess error as a part of what there is between the network and guessing, clipped to [0, 1]."""
    if intact >= chance - 0.02:
        return [math.nan] * len(errors)
    return [min(1.0, max(0.0, (e - intact) / (chance - intact))) for e in errors]
