"""What local Lipschitz constants cost in vector products, and how far they are from the full Jacobian's: `make bench`.

Updates of 6 blocks at 4 images each: our own network in float32, batch norm calibrated, states of 1,024 and 512
entries. Truth: SVD of the full Jacobian in float64. A product is one Jacobian-vector or one vector-Jacobian product;
a pass of a method that uses no derivatives counts as one, too. Counts and errors, not times.

Peers (`pip install 'residuum[peers]'`), left out by name where they are not installed: deel-torchlip's
`evaluate_lip_const`, in its three ways, and torchdeq's `power_method`, which estimates a spectral radius, so that its
distance from the largest singular value is not an error of its own.
"""

from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from residuum.models import ResNet, ResNetConfig
from residuum.nulls import calibrate_
from residuum.spectra import Operator, largest_singular_value, value_and_jacobian

Estimate = Callable[[nn.Module, Tensor], tuple[float, int]]


class Update(nn.Module):
    """The update of a block as a module, as the peers want it; counts its own passes."""

    def __init__(self, branch: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.branch, self.passes = branch, 0

    def forward(self, h: Tensor) -> Tensor:
        self.passes += 1
        return self.branch(h).contiguous()  # a peer needs it so


def cases() -> list[tuple[Update, Tensor]]:
    """Updates with one state each."""
    model, x = ResNet(ResNetConfig(blocks=(3, 3), widths=(16, 32), channels=1)), torch.randn(32, 1, 8, 8)
    calibrate_(model, [(x, None)])
    stream = model.eval().requires_grad_(False).cut(x[:4])
    return [
        (Update(stream.sections[step.section].blocks[step.index].branch), step.before[i : i + 1].contiguous())
        for step in stream.walk()
        for i in range(4)
    ]


def truth(update: Update, h: Tensor) -> float:
    """Largest singular value of the full Jacobian, all of its rows at once at copies of the state."""
    with torch.enable_grad():
        copies = h.repeat(h.numel(), 1, 1, 1).requires_grad_()
        (rows,) = torch.autograd.grad(update.branch(copies), copies, torch.eye(h.numel()).view_as(copies))
    return float(torch.linalg.svdvals(rows.flatten(1).double())[0])


def ours(products: int) -> Estimate:
    """Golub-Kahan-Lanczos; the products are counted here, not taken from what it says."""

    def estimate(update: Update, h: Tensor) -> tuple[float, int]:
        calls = []

        def counting(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda v: calls.append(0) or f(v)

        _, operator = value_and_jacobian(update.branch, h)
        operator = Operator(counting(operator.apply), counting(operator.adjoint), operator.domain)
        found, _ = largest_singular_value(operator, products=products)
        assert float(found.error) >= 0
        return float(found.value), len(calls)

    return estimate


def torchlip(kind: str) -> Estimate:
    """deel-torchlip; its full Jacobian takes one vector-Jacobian product per entry of the state."""
    from deel.torchlip.utils.evaluate_lip_const import evaluate_lip_const

    def estimate(update: Update, h: Tensor) -> tuple[float, int]:
        with torch.enable_grad():
            update.passes = 0
            with redirect_stdout(None):
                value = evaluate_lip_const(update, h, kind)
        return value, h.numel() if kind == "jacobian_norm" else update.passes

    return estimate


def torchdeq(products: int) -> Estimate:
    """torchdeq: the power method on v -> v J."""
    from torchdeq.loss.jacobian import power_method

    def estimate(update: Update, h: Tensor) -> tuple[float, int]:
        with torch.enable_grad():
            h = h.clone().requires_grad_()
            return float(power_method(update(h), h, n_iters=products)[1]), products

    return estimate


def row(name: str, estimate: Estimate, where: list[tuple[Update, Tensor]], exact: list[float]) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    found = [estimate(update, h) for update, h in where]
    errors = torch.tensor([value / true - 1 for (value, _), true in zip(found, exact, strict=True)])
    counts = sorted({count for _, count in found})
    near = float((errors.abs() <= 1e-3).double().mean())
    products = "-".join(f"{count:,}" for count in (counts[0], counts[-1])[: len(counts)])
    return f"| {name} | {products} | {errors.abs().median():.0e} | {errors.abs().max():.0e} | {near:.0%} |"


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    with torch.no_grad():
        where = cases()
        exact = [truth(update, h) for update, h in where]
        print("| local Lipschitz constant of an update | products | median error | largest | within 1e-3 |")
        print("| --- | --- | --- | --- | --- |")
        for products in (20, 30, 60):
            print(row("ours", ours(products), where, exact), flush=True)
        if find_spec("deel") is None:
            print("deel-torchlip is not installed: left out")
        else:
            for kind in ("jacobian_norm", "noise_norm", "attack"):
                print(row(f"deel-torchlip `{kind}`", torchlip(kind), where, exact), flush=True)
        if find_spec("torchdeq") is None:
            print("torchdeq is not installed: left out")
        else:
            for products in (30, 100):
                print(row("torchdeq `power_method`", torchdeq(products), where, exact), flush=True)


if __name__ == "__main__":
    main()
