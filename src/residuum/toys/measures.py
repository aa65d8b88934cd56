"""What trained members do to small changes of their input: Jacobians, accuracy under noise and after shifts."""

import numpy as np
import torch
from torch import Tensor, nn

from residuum.toys import problems
from residuum.toys.networks import Chain
from residuum.toys.problems import Pairs

NOISE = (0.0, 0.02, 0.04, 0.06, 0.08)
SHIFTS = (0.0, 0.1, 0.2, 0.33, 0.4, 0.5)  # of "arms", which are 1 apart


def jacobians(network: Chain, x: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, from the largest, of the Jacobians input -> last state and first -> last state, per row."""
    with torch.enable_grad():
        passage = network(x.clone().requires_grad_())
        first, last = passage.states[0], passage.states[-1]
        columns = [torch.autograd.grad(last[:, i].sum(), first, retain_graph=True)[0] for i in range(last.shape[1])]
    inner = torch.stack(columns, 1)
    lift = network.lift.weight.detach().mT
    whole = (inner.view(len(lift), -1, *inner.shape[1:]) @ lift[:, None]).flatten(0, 1)
    return torch.linalg.svdvals(whole), torch.linalg.svdvals(inner)


@torch.no_grad()
def noisy_accuracy(network: nn.Module, pairs: Pairs, sd: float, draws: int) -> list[float]:
    """Of each member, the accuracy on points with Gaussian noise; the same noise for all, mean over draws."""
    random, right = np.random.default_rng(0), []
    for _ in range(draws if sd else 1):
        noise = torch.tensor(random.normal(0, sd, pairs.x.shape[1:]))
        output = network((pairs.x + noise).flatten(0, 1)).output.view(pairs.y.shape)
        right.append(((output > 0) == (pairs.y > 0.5)).double().mean((1, 2)))
    return torch.stack(right).mean(0).tolist()


@torch.no_grad()
def shifted_accuracy(network: nn.Module, members: int, by: float) -> list[float]:
    """Of each member, the accuracy on "arms" that are moved so far outwards and so far inwards, mean of both."""
    x, y = map(torch.tensor, problems.two_arms(500))
    outwards, right = x / x.norm(dim=1, keepdim=True), []
    for shift in (by, -by):
        output = network((x + shift * outwards).repeat(members, 1)).output.view(members, -1)
        right.append(((output > 0) == (y[:, 0] > 0.5)).double().mean(1))
    return torch.stack(right).mean(0).tolist()
