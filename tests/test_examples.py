"""The examples run from end to end, at toy size; a second call repeats nothing, one that was stopped goes on."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from datafiles import write_npz

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    """One call of an example."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = write_npz(tmp_path / "data.npz"), tmp_path / "out"
    for _ in range(2):
        run(monkeypatch, "cifar10.py", out, "--data", data, "--blocks", 2, 2, 2, "--epochs", 1, "--measured", 6)
    written = (out / "probe" / "report.html").stat().st_mtime_ns
    assert len(json.loads((out / "network" / "history.json").read_text())) == 1
    run(monkeypatch, "cifar10.py", out, "--data", data, "--blocks", 2, 2, 2)
    assert (out / "probe" / "report.html").stat().st_mtime_ns == written


def test_shakespeare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, settings = tmp_path / "input.txt", ("--steps", 2, "--width", 16, "--measured", 1)
    text.write_bytes(b"To be, or not to be: that is the question.\r\n" * 200)
    run(monkeypatch, "shakespeare.py", text, tmp_path / "out", *settings)
    history = json.loads((tmp_path / "out" / "decoder" / "history.json").read_text())
    assert [row["step"] for row in history] == [2]
    indices = json.loads((tmp_path / "out" / "probe" / "indices.json").read_text())
    assert {"convergence", "recurrence", "divergence"} <= indices["convergence"].keys()
    assert len(indices["measured"]["scaled_distance"]["sections"]) == 1


def test_a_stopped_training_of_the_decoder_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from residuum.data import load_text

    example = runpy.run_path(str(EXAMPLES / "shakespeare.py"))
    text = tmp_path / "input.txt"
    text.write_text("To be, or not to be: that is the question.\n" * 200)
    tokenizer = example["characters_of"](text.read_text())
    data = load_text(text, window=128, tokenizer=tokenizer)
    assert tokenizer.decode(data.train.inputs[0]) == text.read_text()[:128]
    monkeypatch.setitem(example["train"].__globals__, "EVERY", 1)

    def trained(checkpoint: Path) -> torch.Tensor:
        torch.manual_seed(0)
        model = example["decoder"](tokens=len(tokenizer), width=16)
        assert [row["step"] for row in example["train"](model, data, steps=3, checkpoint=checkpoint)] == [1, 2, 3]
        return model.lm_head.weight

    calls = iter([example["test_loss"]] * 2)

    def stopping(model: object, test: object) -> float:
        for measure in calls:
            return measure(model, test)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(example["train"].__globals__, "test_loss", stopping)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "stopped")
    assert torch.equal(trained(tmp_path / "stopped"), trained(tmp_path / "whole"))
