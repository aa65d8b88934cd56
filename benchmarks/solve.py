"""What an implicit block costs, forward and backward, beside torchdeq's: `make bench`.

The block is y = x + (F(x) + F(y)) / 2. F is the worst case of a field with Lipschitz constant 1 (an orthogonal matrix
on both sides of tanh), the same with 1.8 ("stiff"), or two convolutions of norm 1. Both sides start at x + F(x) in
float32 and solve to a relative residual of 1e-6; values and gradients are first compared with float64. torchdeq's is
its best solver, found anew on each problem. One thread, processor time (see timing.py).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.timing import Side, Work, heading, ratios, row
from residuum.layers.steps import Theta
from residuum.solve import Anderson, fixed_point

TOLERANCE = 1e-6
PACKAGES = {"fixed_point_iter": "torchdeq"}
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
    """Ten in turn: one of the small blocks takes too little time to be measured after a change of process."""
    work = block(problem, solve)

    def ten() -> None:
        for _ in range(10):
            work()

    return ten


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


def layer(norm: float) -> tuple[Tensor, Tensor]:
    """W and x of y = tanh(W y) + x, with 64 x 128 values in float64 and that norm of W."""
    torch.manual_seed(0)
    W = torch.randn(128, 128, dtype=torch.float64)
    W = (norm * W / torch.linalg.matrix_norm(W, 2)).requires_grad_()
    return W, torch.randn(64, 128, dtype=torch.float64)


def solve_layer(who: str, W: Tensor, x: Tensor) -> Tensor:
    """Its solution to 1e-10."""
    if who == "ours":
        return fixed_point(lambda y: torch.tanh(y @ W.T) + x, x, Anderson(1e-10, 500)).value
    if who == "xitorch":
        from xitorch.optimize import equilibrium

        return equilibrium(lambda y, W: torch.tanh(y @ W.T) + x, x, params=(W,), f_tol=1e-10, x_tol=1e-10)
    from torchdeq import get_deq

    settings = {"f_tol": 1e-10, "b_tol": 1e-10, "f_stop_mode": "rel", "b_stop_mode": "rel"}
    deq = get_deq(f_solver=who, b_solver=who, ift=True, f_max_iter=3000, b_max_iter=3000, **settings)
    return deq(lambda y: torch.tanh(y @ W.T) + x, x)[0][-1]


def first_derivative(who: str, norm: float) -> Work:
    W, x = layer(norm)

    def work() -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad(solve_layer(who, W, x).square().sum(), W)[0]

    return work


def second_derivative(who: str) -> Work:
    """The gradient of the gradient's size: solve, backward, backward of that."""
    W, x = layer(0.9)

    def work() -> Tensor:
        with torch.enable_grad():
            (g,) = torch.autograd.grad(solve_layer(who, W, x).square().sum(), W, create_graph=True)
            return torch.autograd.grad(g.square().sum(), W)[0]

    return work


def dense_derivative(norm: float) -> Tensor:
    """The first derivative by dense solves of every example."""
    W, x = layer(norm)
    W = W.detach()
    y = x
    for _ in range(3000):
        y = torch.tanh(y @ W.T) + x
    slope = 1 - (y - x).square()
    J = slope[:, :, None] * W
    v = torch.linalg.solve(torch.eye(128, dtype=W.dtype) - J.mT, 2 * y)
    return (v * slope).T @ y


def layers(pairs: int) -> None:
    """Print first derivatives beside torchdeq's plain iteration, which is its fastest here, and second ones."""
    for norm in (0.9, 0.99):
        true = dense_derivative(norm)
        for who in ("ours", "fixed_point_iter"):
            wrong = error([first_derivative(who, norm)()], [true])
            assert wrong < 1e-8, (who, wrong)
        mine, base = (Side(partial(first_derivative, who, norm)) for who in ("ours", "fixed_point_iter"))
        (found,), seconds = ratios((mine,), base, pairs=pairs)
        print(row(f"gradient, norm of W {norm} / torchdeq's fixed_point_iter", found, seconds, 1.0), flush=True)
    true = second_derivative("ours")()
    for who in ("fixed_point_iter", "xitorch"):
        if find_spec(PACKAGES.get(who, who)):
            start = time.process_time()
            wrong = error([second_derivative(who)()], [true])
            print(f"second derivative, {who}: {wrong:.0e} from ours, {time.process_time() - start:.2f} s, once")


def trapezoids() -> Work:
    """Four trapezoidal steps of 64 x 64 values in float32, forward and backward, to a squared residual of 1e-8."""
    steps = nn.Sequential(*[Theta(0.5, solver=Anderson(1e-5))(Dense(64)) for _ in range(4)])
    x = torch.randn(64, 64)
    y = steps[0].solve(x)
    assert float((y.residual * (1 + y.value.norm(dim=1))).square().max()) <= 1e-8
    return lambda: torch.autograd.grad(steps(x).sum(), tuple(steps.parameters()))


def euler(channels: int, size: int) -> Work:
    """Backward Euler of one convolutional state, y = x + F(y) / 2 with F of norm 1, forward and backward."""
    field = Convolutions(channels)
    x = torch.randn(1, channels, size, size)

    def work() -> object:
        y = fixed_point(lambda y: x + field(y) / 2, x, Anderson(TOLERANCE)).value
        return torch.autograd.grad(y.sum(), tuple(field.parameters()))

    return work


ALONE: dict[str, tuple[Callable[[], Work], float]] = {
    "gradient, 64 x 128 values, norm of W 0.9, float64, to 1e-10": (partial(first_derivative, "ours", 0.9), 0.021),
    "second derivative of that": (partial(second_derivative, "ours"), 0.1),
    "four trapezoidal steps, 64 x 64 values, float32 (ImplicitResNet, published: 0.028)": (trapezoids, 0.028),
    "backward Euler, one state of 4,096 values": (partial(euler, 16, 16), 0.02),
    "backward Euler, one state of 524,288 values": (partial(euler, 32, 128), 0.5),
}


def alone(repeats: int) -> None:
    """Print what has no peer to run beside it: medians in seconds."""
    print("\n| alone | s | limit |\n| --- | --- | --- |")
    for name, (make, limit) in ALONE.items():
        torch.manual_seed(0)
        work, times = make(), []
        for _ in range(repeats + 2):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        seconds = statistics.median(times[2:])
        print(f"| {name} | {seconds:.3f}{' **over**' * (seconds > limit)} | {limit} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    alone(options.pairs)
    if not find_spec("torchdeq"):
        print("torchdeq is not installed: skipped (pip install residuum[peers])")
        return
    print()
    print(heading(options.pairs))
    layers(options.pairs)
    for problem in options.problems:
        wrong = error(block(problem, ours)(), truth(problem))
        assert wrong < 20 * TOLERANCE, (problem, wrong)
        peer = best(problem)
        mine, base = Side(partial(side, problem, ours)), Side(partial(side, problem, partial(theirs, peer)))
        (found,), seconds = ratios((mine,), base, pairs=options.pairs)
        print(row(f"implicit block, {problem} / torchdeq's {peer}", found, seconds, PROBLEMS[problem][1]), flush=True)


if __name__ == "__main__":
    main()
