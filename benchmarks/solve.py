"""What an implicit block costs, forward and backward, beside torchdeq's: `make bench`.

The block is y = x + (F(x) + F(y)) / 2. F is the worst case of a field with Lipschitz constant 1 (an orthogonal matrix
on both sides of tanh), the same with 1.8 ("stiff"), or two convolutions of norm 1. Both sides start at x + F(x) in
float32 and solve to a relative residual of 1e-6; values and gradients are first compared with float64. torchdeq is its
best solver, found anew on each problem. One thread, processor time (see timing.py).
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.timing import Side, Work, heading, ratios, row
from residuum.solve import Anderson, fixed_point

TOLERANCE = 1e-6
THEIRS = ("fixed_point_iter", "anderson", "broyden")


class Dense(nn.Module):
    """F(y) = h (-W^T tanh(W y + b) + c) with W orthogonal."""

    def __init__(self, width: int, h: float = 1.0) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.linalg.qr(torch.randn(width, width))[0])
        self.b, self.c, self.h = nn.Parameter(torch.randn(width) / 10), nn.Parameter(torch.randn(width) / 10), h

    def forward(self, y: Tensor) -> Tensor:
        return self.h * torch.addmm(self.c, torch.tanh(torch.addmm(self.b, y, self.W.T)), self.W, alpha=-1)


class Convolutions(nn.Module):
    """Two convolutions of spectral norm about 1 with tanh between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        with torch.no_grad():
            for conv in (self.first, self.second):  # the largest over frequencies of the circular operator's norm
                spectrum = torch.fft.fft2(conv.weight, s=(32, 32)).permute(2, 3, 0, 1)
                conv.weight /= torch.linalg.matrix_norm(spectrum, 2).max()

    def forward(self, y: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(y)))


PROBLEMS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], float]] = {
    "mlp64": (lambda: (Dense(64), torch.randn(128, 64)), 0.50),
    "mlp512": (lambda: (Dense(512), torch.randn(128, 512)), 0.65),
    "stiff": (lambda: (Dense(64, 1.8), torch.randn(128, 64)), 0.45),
    "conv": (lambda: (Convolutions(16), torch.randn(32, 16, 32, 32)), 0.90),
}


def ours(f: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
    return fixed_point(f, x0, Anderson(TOLERANCE)).value


def theirs(solver: str, f: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
    from torchdeq import get_deq

    settings = {"f_tol": TOLERANCE, "b_tol": TOLERANCE, "f_stop_mode": "rel", "b_stop_mode": "rel"}
    deq = get_deq(f_solver=solver, b_solver=solver, ift=True, f_max_iter=100, b_max_iter=100, **settings)
    return deq(f, x0)[0][-1]


def block(problem: str, solve: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> Callable[[], list[Tensor]]:
    """Forward and backward of the block; gives the value and all gradients."""
    torch.manual_seed(0)
    field, x = PROBLEMS[problem][0]()
    weights = torch.randn_like(x).to(dtype)
    field, x = field.to(dtype), x.to(dtype).requires_grad_()

    def work() -> list[Tensor]:
        with torch.enable_grad():
            at_x = field(x)
            constant = x + at_x / 2
            y = solve(lambda y: constant + field(y) / 2, (x + at_x).detach())
            return [y.detach(), *torch.autograd.grad(y, (x, *field.parameters()), weights)]

    return work


def truth(problem: str) -> list[Tensor]:
    return block(problem, lambda f, x0: fixed_point(f, x0, Anderson(1e-13, 500)).value, torch.float64)()


def error(found: list[Tensor], true: list[Tensor]) -> float:
    """The largest relative error, over value and gradients."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, true, strict=True))


def side(problem: str, solve: Callable[..., Tensor]) -> Work:
    return block(problem, solve)


def best(problem: str) -> str:
    """torchdeq's solver that takes the least time of those whose answer is right."""
    times, true = {}, truth(problem)
    for solver in THEIRS:
        work = block(problem, partial(theirs, solver))
        wrong = error(work(), true)
        start = time.process_time()
        for _ in range(3):
            work()
        seconds = (time.process_time() - start) / 3
        print(f"<!-- torchdeq {solver} on {problem}: error {wrong:.1e}, {seconds:.4f} s -->")
        if wrong < 20 * TOLERANCE:
            times[solver] = seconds
    return min(times, key=times.__getitem__)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS))
    options = parser.parse_args()
    if not find_spec("torchdeq"):
        print("torchdeq is not installed: skipped (pip install residuum[peers])")
        return
    torch.set_num_threads(1)
    print(heading(options.pairs))
    for problem in options.problems:
        wrong = error(block(problem, ours)(), truth(problem))
        assert wrong < 20 * TOLERANCE, (problem, wrong)
        peer = best(problem)
        mine, base = Side(partial(side, problem, ours)), Side(partial(side, problem, partial(theirs, peer)))
        (found,), seconds = ratios((mine,), base, pairs=options.pairs)
        print(row(f"implicit block, {problem} / torchdeq's {peer}", found, seconds, PROBLEMS[problem][1]), flush=True)


if __name__ == "__main__":
    main()
