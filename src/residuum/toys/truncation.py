"""How far the truncated gradient of P3's code is from the exact one."""

from dataclasses import replace

import torch

from residuum.toys.examples import Example, losses_of


def truncation(example: Example) -> dict[str, list[float]]:
    """How far the truncated gradient of the blocks' fresh weights is from the exact one, on all training examples.

    Args:
        example: "sine" or "spirals".

    Returns:
        Per member: "error", |truncated - exact| / |exact|, and "cosine" of the two; 0 where the truncated one is 0.

    Raises:
        ValueError: If it is another example.

    Source: P3 (Reshniak & Webster): what its code computes, where the text has the exact gradient.
    """
    if not example.turning:
        raise ValueError(f"truncation is for 'sine' and 'spirals', not for {example.problem!r}")
    weights, found = example.network().state_dict(), []
    for param_grad in ("exact", "truncated"):
        kind = replace(example, param_grad=param_grad)
        given, (x, y) = kind.network(), kind.data().train
        given.load_state_dict(weights)
        losses_of(kind, given(x.flatten(0, 1)), y.flatten(0, 1)).sum().backward()
        found.append(torch.cat([p.grad.flatten(1) for p in given.blocks.parameters()], 1))
    exact, truncated = found
    error = (truncated - exact).norm(dim=1) / exact.norm(dim=1)
    return {"error": error.tolist(), "cosine": torch.cosine_similarity(truncated, exact).tolist()}
