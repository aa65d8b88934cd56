"""Slow, obvious twins of the clever routines: one example, one token, one pair at a time, in float64."""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from residuum.streams import Stream

# Measures -----------------------------------------------------------------------------------------------------------


def flat(h: Tensor, mask: Tensor | None, example: int) -> np.ndarray:
    """All counted entries of one example's state as one float64 vector."""
    tokens = h[example]
    if mask is not None and h.ndim == 3:
        tokens = tokens[mask[example]]
    return tokens.double().numpy().ravel()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors; nan if one is 0."""
    size = math.sqrt(float((a * a).sum())) * math.sqrt(float((b * b).sum()))
    return float((a * b).sum()) / size if size else math.nan


def perturbations(stream: Stream, example: int) -> dict[str, list[float]]:
    """Passive measures of one example, from the states of a kept run."""
    found: dict[str, list[float]] = {
        k: [] for k in ("perturbation", "scaled_perturbation", "state_norm", "update_angle")
    }
    for states in stream.run().states:
        vectors = [flat(h, stream.mask, example) for h in states]
        updates = [b - a for a, b in pairwise(vectors)]
        for before, update in zip(vectors, updates, strict=False):
            size, base = float(np.linalg.norm(update)), float(np.linalg.norm(before))
            found["perturbation"].append(size)
            found["state_norm"].append(base)
            found["scaled_perturbation"].append(size / base if base else math.nan)
        found["update_angle"] += [cosine(a, b) for a, b in pairwise(updates)]
    return found


def pairs(stream: Stream, example: int) -> dict[str, list[float]]:
    """Pair measures of one example: the formulas of ShortGPT and PruneMe, pair by pair and token by token."""
    found: dict[str, list[float]] = {
        k: [] for k in ("distance_to_last", "cosine_to_last", "block_influence", "angular_distance")
    }
    for states in (states for states in stream.run().states if len(states) > 1):
        vectors = [flat(h, stream.mask, example) for h in states]
        whole = float(np.linalg.norm(vectors[0] - vectors[-1]))
        for vector in vectors:
            rest = float(np.linalg.norm(vector - vectors[-1]))
            found["distance_to_last"].append(rest / whole if whole else math.nan)
            found["cosine_to_last"].append(cosine(vector, vectors[-1]))
        tokens = [token_vectors(h, stream.mask, example) for h in states]
        for start in range(len(states)):
            for end in range(start + 1, len(states)):
                cosines = [cosine(a, b) for a, b in zip(tokens[start], tokens[end], strict=True)]
                found["block_influence"].append(float(np.mean([1 - c for c in cosines])) if cosines else math.nan)
                last = min(1.0, max(-1.0, cosines[-1])) if cosines else math.nan
                found["angular_distance"].append(math.acos(last) / math.pi)
    return found


def token_vectors(h: Tensor, mask: Tensor | None, example: int) -> list[np.ndarray]:
    """The counted tokens of one example; a state without tokens is one token."""
    if h.ndim != 3:
        return [flat(h, None, example)]
    counted = range(h.shape[1]) if mask is None else torch.nonzero(mask[example]).flatten().tolist()
    return [h[example, t].double().numpy() for t in counted]


def exits(stream: Stream) -> list[Tensor]:
    """The output at every state, each by its own exit from the states of a kept run."""
    return [stream.exit(h, s) for s, states in enumerate(stream.run().states) if len(states) > 1 for h in states]


def cross_entropy(logits: Tensor, label: int) -> float:
    """`-log softmax(logits)[label]`."""
    z = logits.double().numpy()
    return float(np.log(np.exp(z - z.max()).sum()) + z.max() - z[label])


def entropy(logits: Tensor) -> float:
    """`-sum p log p` of the softmax."""
    z = logits.double().numpy()
    p = np.exp(z - z.max())
    p /= p.sum()
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def batch_norm_inputs(model: nn.Module, name: str, batches: list[Tensor]) -> list[Tensor]:
    """What one batch norm gets in each batch when all batch norms normalise by the batch itself."""
    seen: list[Tensor] = []
    module = dict(model.named_modules())[name]
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    model.train()
    with torch.no_grad():
        for x in batches:
            model(x)
    handle.remove()
    return seen


class Tied(nn.Module):
    """One block applied several times: weight tying as autograd does it, by the sum of the gradients."""

    def __init__(self, block: nn.Module, times: int) -> None:
        super().__init__()
        self.block, self.times = block, times

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(self.times):
            h = h + self.block(h)
        return h


def sharing(weights: list[np.ndarray]) -> tuple[float, float]:
    """Achieved sharing and effective number of parameters of flat weights, by their singular values."""
    matrix = np.stack(weights)
    mean = matrix.mean(0)
    s = 1 - sum(((w - mean) ** 2).sum() for w in weights) / sum((w**2).sum() for w in weights)
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    return float(s), float(matrix.shape[1] * squares.sum() ** 2 / (squares**2).sum())
