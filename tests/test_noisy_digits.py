"""P3's networks for MNIST under noise, on small digits: what they are, and that they are jobs like others."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datafiles import write_npz
from residuum.jobs import Settings
from residuum.layers.lipschitz import limits
from residuum.reproduce import check_data
from residuum.runs import execute
from residuum.stability import amplification
from residuum.toys import digits
from residuum.toys.digits import NOISE, NoisyDigits, balanced, under_noise

TINY = NoisyDigits(data="digits", images=60, epochs=2, batch=30, draws=2)


@pytest.mark.parametrize(("spectrum", "count"), [("free", 31208), ("unit", 31208), ("stable", 31310)])
def test_networks_for_mnist_have_four_states_and_so_many_parameters(spectrum: str, count: int) -> None:
    """1 x 28 x 28, 6 x 6 x 6, 12 x 3 x 3, 24 x 2 x 2; by hand: four convolutions per block 36 (1 + 36 + 144 + 576) and
    4 (1 + 6 + 12 + 24), the maps between them 294 + 648 + 2592, the last one 250; with a disc to learn 2 + width more
    per step."""
    network, shapes = NoisyDigits(spectrum=spectrum).network(), []
    for block in (step for steps in network.blocks for step in steps):
        block.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape[1:])))
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert shapes[::2] == shapes[1::2] == [(1, 28, 28), (6, 6, 6), (12, 3, 3), (24, 2, 2)]
    assert 36 * (1 + 36 + 144 + 576) + 4 * (1 + 6 + 12 + 24) + 294 + 648 + 2592 + 250 == 31208
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
def test_steps_of_stable_networks_amplify_within_the_limits(theta: float) -> None:
    job = replace(TINY, theta=theta)
    network = job.network(8).eval()
    for block in (step for steps in network.blocks for step in steps):
        ends = np.array([block.branch.spectrum.low, block.branch.spectrum.high]) * job.step.dt
        assert amplification(ends, theta=theta).real == pytest.approx([0.2, 1.2])
    assert all(found["bound"] == 1 for found in limits(network).values())
    x = torch.randn(4, 1, 8, 8)
    near = x + 1e-3 * torch.randn_like(x)
    with torch.no_grad():
        step = network.blocks[0][0]
        apart = (step(near) - step(x)).flatten(1).norm(dim=1)
    ratio = apart / (near - x).flatten(1).norm(dim=1)
    assert (ratio > 0.2 - 1e-2).all()
    assert (ratio < 1.2 + 1e-2).all()


def test_free_branches_begin_small_and_limited_ones_at_their_limit() -> None:
    """Frobenius norm 1, as in the paper's code; its limited weights are divided by their norm from the start."""
    free, unit = (replace(TINY, theta=0.0, spectrum=spectrum).network(8) for spectrum in ("free", "unit"))
    for steps in free.blocks:
        for step in steps:
            for layer in (step.branch[1], step.branch[3]):
                assert layer.weight.norm().item() == pytest.approx(1, rel=1e-5)
                assert not layer.bias.any()
    assert all(found["active"] for found in limits(unit.eval()).values())


def test_every_class_counts_the_same_in_the_loss() -> None:
    train = TINY.first(None).train
    model, (x, y) = torch.nn.Flatten(), (torch.randn(60, 10), train.labels)
    counts = torch.bincount(y, minlength=10)
    each = torch.stack([F.cross_entropy(x[y == label], y[y == label]) for label in range(10)])
    assert counts.unique().numel() > 1
    assert float(balanced(train)(model, x, y)) == pytest.approx(float(each.mean()), rel=1e-5)


def test_noise_is_the_same_for_all_networks_and_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    class AlwaysZero(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return F.one_hot(torch.zeros(len(x), dtype=torch.long), 10)

    monkeypatch.setattr(digits, "NOISE", (0.0, 0.5))
    images = TINY.first(None).test
    first, second = (under_noise(AlwaysZero(), images, replace(TINY, theta=theta)) for theta in (0.0, 1.0))
    assert first == second
    assert {sd: len(draws) for sd, draws in first.items()} == {"0.0": 1, "0.5": 2}
    assert first["0.5"] == [float((images.labels == 0).double().mean())] * 2
    clean, one, other, *again = seen
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], again, strict=True))
    assert not torch.equal(one, other)
    assert torch.allclose(clean, images.preparation(images.images))
    assert (clean.min(), clean.max()) == (one.min(), one.max()) == (0, 1)


def test_it_is_a_job_that_ends_the_same_twice(tmp_path: Path) -> None:
    done, again = (execute(TINY, tmp_path / name, Settings()) for name in "ab")
    values = [{name: value for name, value in one.values.items() if name != "seconds"} for one in (done, again)]
    for value in values:
        for row in value["history"]:
            row.pop("seconds")
    assert values[0] == values[1]
    assert set(done.values["noise"]) == {"train", "test"}
    assert [float(sd) for sd in done.values["noise"]["train"]] == list(NOISE)
    assert len(done.values["history"]) == 2
    assert "blocks.0.0" in done.values["history"][0]["solves"]
    assert NoisyDigits.from_description(TINY.describe()) == TINY
    assert TINY.key != replace(TINY, spectrum="unit").key


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"spectrum": "loose"}, "spectrum"),
        ({"images": 0}, "images \\(0\\)"),
        ({"seed": -1}, "seed \\(-1\\)"),
        ({"theta": 2.0}, "theta"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_bad_settings_are_refused(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(TINY, **wrong)


def test_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    colour = str(write_npz(tmp_path / "colour.npz"))
    with pytest.raises(ValueError, match=r"noisy digits: .*colour\.npz.* has 3 channels .* must be square"):
        replace(TINY, data=colour).first(None)
    with pytest.raises(ValueError, match="mnits"):
        replace(TINY, data="mnits").first(None)


def test_missing_digits_are_asked_for_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as refused:
        check_data([replace(TINY, data="mnist")], tmp_path)
    assert "--files" not in str(refused.value)  # which would not help
