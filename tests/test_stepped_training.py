"""Stepped networks through the loop and the command line: reversible, in parts, in two processes, probed."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from forked import program
from residuum.bytes import Bytes
from residuum.cli import main
from residuum.layers.anystep import step_of
from residuum.layers.lipschitz import Limit
from residuum.layers.pairs import Additive, Leapfrog, Midpoint, Momentum, Verlet
from residuum.layers.reversible import DriftError
from residuum.layers.sharing import NAIVE
from residuum.layers.steps import Explicit, RungeKutta, Theta
from residuum.layers.tableaus import BACKWARD_EULER, GAUSS4, STOERMER_VERLET, TABLEAUS
from residuum.loading import load_model
from residuum.models import ResNet, ResNetConfig
from residuum.solvers import Anderson
from residuum.training import TrainConfig, train
from test_resume import result
from trainer import data

SMALL = ResNetConfig(blocks=(2, 1), widths=(4, 8), channels=1, norm="group")
# Solved ones differ by what their solvers leave, 1e-9, times a few.
STEPS = {
    "theta": (Theta(0.5, 0.25, solver=Anderson(1e-9)), 1e-7),
    "gauss": (RungeKutta(GAUSS4, 0.25, solver=Anderson(1e-9)), 1e-7),
    "verlet": (Verlet(0.5), 1e-10),
    "momentum": (Momentum(0.9), 1e-10),
}


def trained(config: ResNetConfig, **settings: int) -> tuple[dict[str, torch.Tensor], list[dict]]:
    model = ResNet(config).double()
    history = train(model, data(), TrainConfig(epochs=1, batch=25, lr=0.05, **settings))
    return model.state_dict(), history


@pytest.mark.parametrize("kind", ["theta", pytest.param("gauss", marks=pytest.mark.slow), "verlet", "momentum"])
def test_reversible_training_in_parts_is_ordinary_training(kind: str) -> None:
    step, tolerance = STEPS[kind]
    weights, history = trained(replace(SMALL, step=step))
    others, rows = trained(replace(SMALL, step=step, reversible=True), accumulate=2)
    assert rows[0]["train_loss"] == pytest.approx(history[0]["train_loss"], rel=tolerance)
    for name, value in weights.items():
        assert (others[name] - value).norm() <= tolerance * value.norm(), name


def test_a_drift_says_in_which_step_of_the_training_it_was() -> None:
    config = replace(SMALL, blocks=(48, 1), step=Momentum(0.3), reversible=True)
    with pytest.raises(DriftError, match=r"^epoch 1, step 1 of 4, reversible: the state before block \d+") as refused:
        train(ResNet(config), data(), TrainConfig(epochs=1, batch=25, lr=0.05))
    assert refused.value.drift > refused.value.tolerance


@pytest.mark.parametrize("step", [Additive(), Verlet(0.1), Leapfrog(0.1), Midpoint(0.1), Momentum(0.99)])
def test_reversible_couplings_in_bfloat16_are_refused_before_a_step_is_done(step: object) -> None:
    model, steps = ResNet(replace(SMALL, step=step, reversible=True)), []
    config = TrainConfig(epochs=1, batch=25, precision="bfloat16")
    with pytest.raises(ValueError, match=r"in torch.bfloat16, too coarse .*; use float32 \(--precision float32\)"):
        train(model, data(), config, after_backward=lambda *given: steps.append(given))
    assert not steps


def test_statistics_of_batch_norm_are_bitwise_those_of_ordinary_training() -> None:
    config = replace(SMALL, norm="batch", step=Verlet(0.5))
    plain, rebuilt, x = ResNet(config), ResNet(replace(config, reversible=True)), torch.randn(6, 1, 8, 8)
    for model in (plain, rebuilt):
        model(x).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), rebuilt.buffers(), strict=True))
    for p, q in zip(plain.parameters(), rebuilt.parameters(), strict=True):
        assert (q.grad - p.grad).norm() <= 1e-4 * p.grad.norm()


@pytest.mark.parametrize(
    "more",
    [
        {"step": Theta(0.5, 0.25, solver=Anderson(1e-9)), "blocks": (4, 1), "sharing": replace(NAIVE, free=1)},
        {"step": Verlet(0.5), "norm": "none", "limit": Limit(0.8, 8)},
        {"step": Verlet(0.5), "transition": "projection"},
    ],
    ids=["shared", "limited", "an empty section"],
)
def test_reversible_sections_with_other_settings(more: dict) -> None:
    config, x = replace(SMALL, **more), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    plain, rebuilt = ResNet(config).double(), ResNet(replace(config, reversible=True)).double()
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in rebuilt.named_parameters()]
    losses = [model(x).square().sum() for model in (plain, rebuilt)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-9)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), rebuilt.parameters(), strict=True):
        assert (q.grad - p.grad).norm() <= 1e-6 * p.grad.norm(), name
    rebuilt.eval()
    assert torch.equal(rebuilt(x), rebuilt.cut(x).run().output)


def test_reversible_sections_of_limited_implicit_blocks() -> None:
    """In training mode each look at a limited weight improves its estimate, also where a state is rebuilt."""
    config = replace(SMALL, step=Theta(0.5, solver=Anderson(1e-9)), norm="none", limit=Limit(0.8, 8))
    plain, rebuilt, x = ResNet(config), ResNet(replace(config, reversible=True)), torch.randn(3, 1, 8, 8)
    for model in (plain, rebuilt):
        model.double()(x.double()).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), rebuilt.parameters(), strict=True):
        assert (q.grad - p.grad).norm() <= 1e-3 * p.grad.norm(), name


@pytest.mark.parametrize("step", [Verlet(0.25), Theta(0.5, 0.05, solver=Anderson(1e-5))], ids=["verlet", "theta"])
def test_memory_is_flat_in_depth(step: object) -> None:
    """States that a block more costs in a training step: none below the first anchor, several if not reversible."""
    slopes = {}
    for reversible in (True, False):
        peaks = []
        for depth in (4, 12):
            model = ResNet(ResNetConfig((depth,), (4,), 1, norm="group", step=step, reversible=reversible))
            x = torch.randn(8, 1, 12, 12)
            model(x).sum().backward()  # the first backward measures amplifications
            for p in model.parameters():
                p.grad.zero_()
            with Bytes() as bytes_:
                model(x).sum().backward()
            peaks.append(bytes_.peak / (8 * 4 * 12 * 12 * 4))
        slopes[reversible] = (peaks[1] - peaks[0]) / 8
    assert slopes[True] <= 0.1
    assert slopes[False] > 2


@pytest.mark.parametrize("step", ["verlet", pytest.param("theta:0.5", marks=pytest.mark.slow)])
def test_two_processes_that_rebuild_states_equal_one_that_stores_them(tmp_path: Path, step: str) -> None:
    common = ("none", 0, "dtype=float64", "augment=none", f"step={step}")
    assert program(tmp_path / "one", "-", *common) == [0]
    assert program(tmp_path / "two", "-", *common, "reversible=1", "accumulate=2", processes=2) == [0, 0]
    (one, history), (two, rows) = result(tmp_path / "one"), result(tmp_path / "two")
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-6, atol=1e-8), name
    for row, other in zip(history, rows, strict=True):
        ours, theirs = row.pop("solves", {}), other.pop("solves", {})
        assert row == pytest.approx(other, rel=1e-6)
        assert ours.keys() == theirs.keys()
        for block, passes in ours.items():
            assert passes["forward"]["examples"] == 100
            assert theirs[block]["forward"]["examples"] == 50  # those of process 0


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("explicit", Explicit()),
        ("theta", Theta()),
        ("theta:1", Theta(1.0)),
        ("rk:gauss4", RungeKutta(GAUSS4)),
        ("rk:backward-euler", RungeKutta(BACKWARD_EULER)),
        ("rk:stoermer-verlet", RungeKutta(STOERMER_VERLET)),
        ("verlet", Verlet()),
        ("verlet:stoermer", Verlet(form="stoermer")),
        ("additive", Additive()),
        ("leapfrog", Leapfrog()),
        ("midpoint", Midpoint()),
        ("momentum:0.8", Momentum(0.8)),
    ],
)
def test_steps_have_names(text: str, step: object) -> None:
    assert step_of(text) == step


def test_steps_have_a_size_and_a_tolerance() -> None:
    assert step_of("theta:0.5", dt=0.25, tol=1e-4) == Theta(0.5, 0.25, solver=Anderson(1e-4))
    assert step_of("leapfrog", dt=0.25) == Leapfrog(0.25)
    assert step_of("rk:gauss4", tol=1e-4) == RungeKutta(GAUSS4, solver=Anderson(1e-4))
    assert len(TABLEAUS) == 16


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("thetta", {}, "did you mean 'theta'"),
        ("theta:half", {}, "step 'theta:half': theta must be a number, not 'half'"),
        ("theta:2", {}, r"theta is 2\.0; it must lie in"),
        ("verlet:leap", {}, "unknown form 'leap'"),
        ("rk", {}, "step 'rk': rk takes a tableau after a colon: euler, .*gauss4"),
        ("rk:", {}, "rk takes a tableau after a colon"),
        ("rk:gaus4", {}, "did you mean 'gauss4'"),
        ("leapfrog:2", {}, "step 'leapfrog:2': leapfrog takes nothing after a colon"),
        ("momentum", {"dt": 0.5}, "step 'momentum' has no step size"),
        ("additive", {"dt": 0.5}, "step 'additive' has no step size"),
        ("verlet", {"tol": 1e-3}, "step 'verlet' has no solver"),
        ("rk:rk4", {"tol": 1e-3}, "step 'rk:rk4' has no solver"),
        ("theta:0", {"tol": 1e-3}, "step 'theta:0' has no solver"),
        ("theta", {"dt": 0.0}, "dt is 0.0"),
        ("theta", {"tol": 0.0}, "tol is 0.0"),
    ],
)
def test_names_that_are_wrong_are_refused(text: str, more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_of(text, **more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"reversible": True}, r"blocks h \+ f\(h\) cannot be undone; reversible needs a step, as Verlet or Theta"),
        ({"reversible": True, "step": Explicit()}, "Explicit has no inverse; reversible needs another step"),
        (
            {"reversible": True, "step": Theta(0.0), "norm": "batch"},
            "the inverse of Theta solves an equation, which batch norm changes; use norm 'group'",
        ),
        (
            {"reversible": True, "step": Theta(solver=Anderson(1e-4))},
            "reversible rebuilds states by solving .* to 1e-05 or better; tol of the solver is 0.0001",
        ),
    ],
)
def test_networks_that_cannot_be_undone_are_refused(more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small implicit network that the command line has trained."""
    out = tmp_path_factory.mktemp("runs") / "theta"
    network = "--blocks 2 1 --widths 4 8 --norm group --step theta:0.5 --dt 0.25 --tol 1e-5 --reversible"
    assert main(f"train --out {out} {network} --limit 40 --epochs 2 --batch 20".split()) == 0
    return out


def test_the_command_line_trains_an_implicit_network(folder: Path) -> None:
    config = load_model(str(folder)).model.config
    assert config.step == Theta(0.5, 0.25, solver=Anderson(1e-5))
    assert config.reversible
    history = json.loads((folder / "history.json").read_text())
    assert [row["solves"]["sections.1.0"]["backward"]["examples"] for row in history] == [40, 40]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["theta", "verlet"])
def test_every_probe_measures_a_stepped_network(folder: Path, step: str, tmp_path: Path) -> None:
    run = folder
    if step == "verlet":
        run = tmp_path / "verlet"
        network = "--blocks 2 1 --widths 4 8 --step verlet --dt 0.5 --reversible"
        assert main(f"train --out {run} {network} --limit 40 --epochs 1 --batch 20".split()) == 0
    out = tmp_path / "page"
    assert main(f"probe {run} --data digits --out {out} --limit 6 --probes all".split()) == 0
    about = json.loads((out / "provenance.json").read_text())
    assert not [note for note in about["notes"] if "not measured" in note]
    found = set(pd.read_parquet(out / "profile.parquet").quantity)
    assert {"scaled_perturbation", "gradient_cosine", "drop_accuracy", "update_lipschitz", "settles", "margin"} <= found
    page = (out / "report.html").read_text()
    assert ("What the solvers took" in page) == (step == "theta")


def test_a_failing_solver_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    network = "--blocks 2 --widths 4 --norm group --step theta:0.5 --lr 1e4 --epochs 3 --clip 1e9"
    assert main(f"train --out {tmp_path / 'run'} {network} --limit 40 --batch 20".split()) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("residuum: ")
    assert "block sections.0." in said
    assert "did not converge" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--dt 0.5", "--dt, --tol and --reversible need --step"),
        ("--reversible", "--dt, --tol and --reversible need --step"),
        ("--step theta", "use norm 'group' or 'none'"),
        ("--step explicit --reversible", "Explicit has no inverse"),
        ("--step verlet --tol 0.1", "has no solver"),
        ("--step verlet --widths 3 4 5", "halves of the channels"),
    ],
)
def test_options_that_do_not_go_together(arguments: str, said: str, tmp_path: Path, capsys) -> None:
    assert main(f"train --out {tmp_path / 'run'} {arguments}".split()) == 2
    assert said in capsys.readouterr().err
