"""The command line from end to end: what each command writes, says and returns."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from datafiles import hf_folder, write_npz
from residuum import commands, files, profiles, training
from residuum.cli import main
from residuum.probing import NAMES

SMALL = ("--blocks", "2", "2", "--widths", "4", "8", "--epochs", "1", "--limit", "60")
OF_A_PROBE = {
    "profile.parquet",
    "profile.safetensors",
    "initial.parquet",
    "initial.safetensors",
    "indices.json",
    "provenance.json",
    "report.html",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network, trained a little by the command line."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "--out", str(folder), *SMALL]) == 0
    return folder


@pytest.fixture(scope="module")
def trained_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one block in all."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "--out", str(folder), *SMALL, "--blocks", "1", "--widths", "4"]) == 0
    return folder


def read(folder: Path, name: str) -> dict[str, object]:
    return json.loads((folder / name).read_text())


def test_help_imports_no_torch_and_lists_the_commands() -> None:
    code = "import sys, residuum.cli\ntry: residuum.cli.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    commands = ["demo", "train", "probe", "report", "sweep", "runs", "reproduce", "fold", "stability", "data"]
    assert re.findall(r"• (\w+)", done.stdout) == commands


@pytest.mark.parametrize(
    ("message", "advised"),
    [
        ("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it.", True),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 40 bytes.", True),
        ("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 40 bytes.", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_a_smaller_batch_is_advised_where_memory_ran_out(
    message: str, advised: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(commands, "demo", fail)
    if not advised:
        with pytest.raises(RuntimeError, match=message):
            main(["demo"])
        return
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == f"residuum: {message.splitlines()[0]}; try a smaller --batch\n"


@pytest.mark.parametrize("command", ["demo", "train", "probe"])
def test_every_command_that_runs_a_network_has_the_common_options(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--device", "--dtype", "--batch", "--limit", "--seed"))


def test_a_mistyped_option_is_refused_with_the_nearest(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--out", "x", "--epoch", "3"])
    assert stop.value.code == 2
    assert "--epochs" in capsys.readouterr().err


def test_train_writes_a_run_folder(trained: Path) -> None:
    assert {entry.name for entry in trained.iterdir()} == {
        "config.json",
        "weights.safetensors",
        "history.json",
        "provenance.json",
    }
    about = read(trained, "provenance.json")
    assert about["command"].startswith("residuum train --out ")
    assert about["training"]["epochs"] == 1
    assert about["training"]["images"] == 60
    assert len(read(trained, "history.json")) == 1
    assert all(entry.stat().st_mode & 0o777 == 0o666 & ~_umask() for entry in trained.iterdir())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_training_twice_gives_the_same_weights(trained: Path, tmp_path: Path) -> None:
    assert main(["train", "--out", str(tmp_path / "again"), *SMALL]) == 0
    assert (tmp_path / "again" / "weights.safetensors").read_bytes() == (trained / "weights.safetensors").read_bytes()


def test_probe_writes_the_result_folder(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "result"
    assert main(["probe", str(trained), "--data", "digits", "--out", str(out), "--limit", "30", "--seed", "4"]) == 0
    assert {entry.name for entry in out.iterdir()} == OF_A_PROBE | {"history.json"}
    columns = ["quantity", "section", "point", "length", "at", "mean", "stderr", "count", "update"]
    for name in ("profile", "initial"):
        assert list(pd.read_parquet(out / f"{name}.parquet").columns) == columns
        assert profiles.load(out / f"{name}.safetensors").examples.tolist() == list(range(30))
    about, numbers = read(out, "provenance.json"), read(out, "indices.json")
    assert about["examples"] == 30
    assert about["network"]["settings"]["limit"] is None
    assert about["seed"] == 4
    assert about["data"] == "digits"
    assert len(about["data_sha256"]) == 64
    assert about["loss"] == "cross-entropy (nats)"
    assert about["versions"].keys() == {"residuum", "torch", "numpy", "python"}
    assert [len(section["blocks"]) for section in about["network"]["sections"]] == [2, 2]
    assert about["notes"] == []
    assert numbers["measured"]["scaled_distance"]["network"] > 0
    assert numbers["initial"]["scaled_distance"]["network"] > 0
    assert numbers["initial_reason"] == ""
    assert len(numbers["advice"]["sections"]) == 2
    assert str(out / "report.html") in capsys.readouterr().out


def test_probing_twice_gives_the_same_values(trained: Path, tmp_path: Path) -> None:
    for name, batch in (("a", "30"), ("b", "7")):
        command = ["probe", str(trained), "--data", "digits", "--out", str(tmp_path / name), "--limit", "30"]
        assert main([*command, "--batch", batch]) == 0
    tables = [pd.read_parquet(tmp_path / name / "profile.parquet") for name in ("a", "b")]
    pd.testing.assert_frame_equal(*tables, rtol=1e-4, atol=1e-5)


def test_report_compares_folders(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = [str(tmp_path / name) for name in ("a", "b")]
    for name, split in zip(names, ("test", "train"), strict=True):
        assert main(["probe", str(trained), "--data", "digits", "--out", name, "--limit", "20", "--split", split]) == 0
    page = tmp_path / "page.html"
    assert main(["report", *names, "--out", str(page)]) == 0
    assert page.stat().st_size > 1000
    assert str(page) in capsys.readouterr().out
    assert main(["report", *names, "--out", str(page)]) == 2
    assert main(["report", *names, "--out", str(page), "--force"]) == 0


def test_demo_can_be_repeated_and_replaces_only_a_demo(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["demo", "--epochs", "1", "--limit", "40"]
    for _ in range(2):
        assert main(command) == 0
        assert {entry.name for entry in Path("residuum-demo").iterdir()} == files.NETWORK | OF_A_PROBE
        assert str(tmp_path / "residuum-demo" / "report.html") in capsys.readouterr().out
    assert main(["probe", str(trained), "--data", "digits", "--out", "mine", "--limit", "10"]) == 0
    assert main([*command, "--out", "mine"]) == 2
    assert "mine exists" in capsys.readouterr().err


def test_chosen_probes_only(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "result"
    command = ["probe", str(trained), "--data", "digits", "--out", str(out), "--limit", "10", "--no-initial"]
    assert main([*command, "--probes", "perturbation", "update_angle"]) == 0
    found = set(pd.read_parquet(out / "profile.parquet").quantity)
    assert found == {"perturbation", "scaled_perturbation", "update_angle"}
    assert read(out, "indices.json")["initial"] is None
    assert read(out, "indices.json")["initial_reason"] == "it was not asked for"
    assert not (out / "initial.parquet").exists()


@pytest.mark.parametrize("probes", [*((name,) for name in NAMES), ("perturbation", "margins")], ids=" ".join)
def test_any_probes_give_a_page(probes: tuple[str, ...], trained_one: Path, tmp_path: Path) -> None:
    """Also margins without the answers that they sort, and those that have no value in sections of one block."""
    out = tmp_path / "result"
    command = ["probe", str(trained_one), "--data", "digits", "--out", str(out), "--limit", "10", "--no-initial"]
    assert main([*command, "--probes", *probes]) == 0
    page = (out / "report.html").read_text()
    assert ("has a value in this network" in page) == (probes == ("update_angle",))
    assert not (out / "groups.parquet").exists()


def test_a_foreign_network_gets_its_kind_of_images_and_no_labels_of_others(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A classifier of 3 named classes on the 10 digits: resized, repeated, and measured without labels."""
    processor = {"size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    model, out = hf_folder(tmp_path / "model", processor=processor), tmp_path / "result"
    assert main(["probe", f"hf:{model}", "--data", "digits", "--out", str(out), "--limit", "10"]) == 0
    images, labels = read(out, "provenance.json")["notes"]
    assert images == (
        "images: resized from 8x8 to 16x16, their channel repeated 3 times, "
        "standardised with the network's own mean and deviation"
    )
    assert re.search(r"has outputs \[3\], digits 10 classes: measures with labels are skipped", labels)
    assert labels in capsys.readouterr().err.replace("\n", "")
    found = set(pd.read_parquet(out / "profile.parquet").quantity)
    assert {"entropy", "agreement", "label_change"} <= found
    assert not found & {"loss", "accuracy"}


@pytest.mark.parametrize(("classes", "labelled"), [(("cat", "dog", "owl"), True), (("cat", "owl", "dog"), False)])
def test_labels_are_used_only_where_the_classes_are_the_same(
    classes: tuple[str, ...], labelled: bool, tmp_path: Path
) -> None:
    data = write_npz(tmp_path / "x.npz", classes=np.array(classes))
    model, out = hf_folder(tmp_path / "model", processor=None), tmp_path / "result"
    assert main(["probe", f"hf:{model}", "--data", str(data), "--out", str(out)]) == 0
    found = set(pd.read_parquet(out / "profile.parquet").quantity)
    assert ("accuracy" in found) == labelled


def test_secondary_readings_alone_are_not_called_undefined(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "result"
    command = ["probe", str(trained), "--data", "digits", "--out", str(out), "--limit", "10"]
    assert main([*command, "--probes", "drops_first"]) == 0
    page = (out / "report.html").read_text()
    assert "<h3>Secondary readings of iteration</h3>" in page
    assert "iteration are undefined" not in page
    assert "no initial values" not in capsys.readouterr().err  # there are, though not in the table here


@pytest.mark.parametrize("kept", [True, False], ids=["as buffers", "not at all"])
def test_a_network_without_parameters(kept: bool, tmp_path: Path) -> None:
    keep = 'self.register_buffer("w", w)' if kept else "self.w = w"
    (tmp_path / "fixed.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Cell(nn.Module):\n"
        f"    def __init__(self):\n        super().__init__()\n        w = torch.randn(64, 64) / 20\n        {keep}\n"
        "    def forward(self, h):\n        return h + torch.tanh(h @ self.w)\n"
        "def net():\n    return nn.Sequential(nn.Flatten(), Cell(), Cell())\n"
    )
    out = tmp_path / "out"
    command = ["probe", f"{tmp_path / 'fixed.py'}:net", "--data", "digits", "--out", str(out), "--limit", "10"]
    assert main([*command, "--blocks", "1", "2", "--probes", "perturbation"]) == 0
    about = read(out, "provenance.json")
    assert about["parameters"] == 0
    assert (about.get("device"), about.get("dtype")) == (("cpu", "float32") if kept else (None, None))


def test_size_and_normalise_override_the_network(tmp_path: Path) -> None:
    out = tmp_path / "result"
    command = ["probe", "timm:resnet26", "--weights", "random", "--data", "digits", "--out", str(out), "--limit", "4"]
    assert main([*command, "--size", "32", "--normalise", "imagenet", "--probes", "perturbation"]) == 0
    assert "to 32x32" in read(out, "provenance.json")["notes"][0]
    assert read(out, "indices.json")["initial_reason"] == "this is the network at initialisation"


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_number_formats(trained: Path, dtype: str, tmp_path: Path) -> None:
    out = tmp_path / "result"
    command = ["probe", str(trained), "--data", "digits", "--out", str(out), "--limit", "10", "--dtype", dtype]
    assert main(command) == 0
    assert read(out, "provenance.json")["dtype"] == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_that_are_rounding_are_told(dtype: str, tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(
        "from torch import nn\n"
        "class Cell(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.conv = nn.Conv2d(1, 1, 3, padding=1)\n"
        "    def forward(self, h):\n        return h + 1e-3 * self.conv(h)\n"
        "def net():\n    return nn.Sequential(Cell(), Cell(), nn.Flatten(), nn.Linear(64, 10))\n"
    )
    out = tmp_path / "out"
    command = ["probe", f"{tmp_path / 'small.py'}:net", "--data", "digits", "--out", str(out), "--limit", "10"]
    assert main([*command, "--dtype", dtype, "--no-initial", "--probes", "perturbation"]) == 0
    told = any(
        "of 2 of 2 blocks, differences of rounded states" in note for note in read(out, "provenance.json")["notes"]
    )
    assert told == (dtype == "bfloat16")


def test_multi_hot_data_from_training_to_report(tmp_path: Path) -> None:
    labels = np.eye(3, dtype=np.uint8)[np.arange(12) % 3] | np.eye(3, dtype=np.uint8)[0]
    data = str(write_npz(tmp_path / "x.npz", train_labels=labels, test_labels=labels[:6]))
    run, out = str(tmp_path / "run"), tmp_path / "result"
    network = ("--blocks", "2", "--widths", "4", "--epochs", "1")
    assert main(["train", "--data", data, "--out", run, *network]) == 0
    assert main(["probe", run, "--data", data, "--out", str(out)]) == 0
    assert read(out, "provenance.json")["loss"].startswith("binary cross-entropy")


def test_interrupting_returns_130_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "train_network", stop)
    assert main(["train", "--out", str(tmp_path / "run"), *SMALL]) == 130
    assert capsys.readouterr().err.endswith("residuum: stopped; no result was written\n")
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_was_stopped_goes_on_with_the_same_command(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Ctrl-C after the first epoch; the same command ends with the weights of an undisturbed run."""
    command = ["train", "--blocks", "1", "--widths", "4", "--epochs", "3", "--limit", "200", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    steps = 0

    class Interrupting(training.Training):
        def _step(self, *arguments: object) -> float:
            nonlocal steps
            steps += 1
            if steps == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return super()._step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Training", Interrupting)
        assert main([*command, str(tmp_path / "parts")]) == 130
    assert "the same command goes on from" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "parts" in path.name] == ["parts.checkpoint"]
    assert main([*command, str(tmp_path / "parts")]) == 0
    assert "going on from" in capsys.readouterr().err
    assert not (tmp_path / "parts.checkpoint").exists()
    whole, parts = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_a_language_model_on_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 60)
    (tmp_path / "tiny.py").write_text(
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "def tiny():\n"
        "    size = dict(vocab_size=256, n_positions=32, n_embd=16, n_layer=3, n_head=2)\n"
        "    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=1))\n"
    )
    text, model = str(tmp_path / "text.txt"), f"{tmp_path / 'tiny.py'}:tiny"
    assert main(["probe", model, "--data", text, "--window", "16", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "indices.json").read_text())
    assert 4.5 < found["measured"]["final_loss"] < 6.5  # log(256) = 5.5 for a network that knows nothing
    assert found["initial"] is not None
    for wrong, said in (
        (["probe", model, "--data", "digits"], "reads text, not images; give --data FILE.txt"),
        (["probe", model, "--data", text, "--window", "4000"], "a window of 4000 needs 4001"),
        (["probe", "torchvision:resnet18", "--weights", "random", "--data", text], "reads images, not text"),
    ):
        capsys.readouterr()
        assert main([*wrong, "--out", str(tmp_path / "no")]) == 2
        assert said in capsys.readouterr().err


def test_data_are_listed_and_fetched(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "list", "--data-root", str(tmp_path)]) == 0
    assert "cifar100" in capsys.readouterr().out
    assert main(["data", "fetch", "digits"]) == 2
    assert "come with scikit-learn" in capsys.readouterr().err
    assert main(["data", "fetch", "mnits"]) == 2
    assert "did you mean 'mnist'" in capsys.readouterr().err


def test_all_probes_at_once(trained: Path, tmp_path: Path) -> None:
    """Gradients, interventions, spectra: in the tables, and the indices of iterative convergence beside the others."""
    out = tmp_path / "all"
    command = ["probe", str(trained), "--data", "digits", "--out", str(out), "--limit", "6", "--probes", "all"]
    assert main(command) == 0
    quantities = set(pd.read_parquet(out / "profile.parquet").quantity)
    assert {
        "gradient_cosine",
        "drop_accuracy",
        "replace_flip",
        "unroll_1_loss",
        "update_lipschitz",
        "margin",
        "loss_change",
        "unroll_0.05_loss",
    } <= quantities
    groups = pd.read_parquet(out / "groups.parquet")
    assert set(groups.group) == {"borderline", "correct", "all"}
    assert {"accuracy", "unroll_1_loss"} <= set(groups.quantity)
    page = (out / "report.html").read_text()
    for title in (
        "updates point downhill on the loss",
        "of the answers are right; with all blocks",
        "Updates stretch small changes",
        "Run 20 more times",
        "Run on and on, the last block would",
        "Leaving out the first blocks",
        "Is it one repeated step?",
    ):
        assert title in page
    found = json.loads((out / "indices.json").read_text())
    assert {"convergence", "recurrence", "divergence", "drop_gap", "remaining_distance"} <= found["convergence"].keys()
    assert found["initial_convergence"].keys() == found["convergence"].keys()
    again = ["probe", str(trained), "--data", "digits", "--out", str(out), "--limit", "6", "--force"]
    assert main(again) == 0  # everything in the folder is known to be ours


def test_text_is_read_with_the_tokenizer_that_belongs_to_the_weights(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["to", "be", "or", "not", ",", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "<unk>"])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / "model")
    size = {"vocab_size": 7, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=1)).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("to be , or not to be ? " * 60)
    command = ["probe", f"hf:{tmp_path / 'model'}", "--data", str(tmp_path / "text.txt"), "--window", "16"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert 1.5 < json.loads((tmp_path / "out" / "indices.json").read_text())["measured"]["final_loss"] < 2.5


SHARED = ("--free", "1", "--epochs", "1", "--limit", "60", "--lr", "0.02")


@pytest.mark.parametrize("sharing", ["naive", "ubn"])
def test_shared_networks_are_trained_and_probed(sharing: str, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    network = ("--network", "resnet20", "--width-factor", "0.25", "--sharing", sharing)
    assert main(["train", "--out", str(run), *network, *SHARED]) == 0
    written = read(run, "config.json")["network"]
    assert (written["blocks"], written["widths"], written["transition"]) == ([3, 3, 3], [4, 8, 16], "projection")
    assert written["sharing"]["statistics"] == ("shared" if sharing == "naive" else "unshared")
    command = ["probe", str(run), "--data", "digits", "--out", str(out), "--limit", "10", "--probes", "all"]
    assert main(command) == 0
    assert [len(part["blocks"]) for part in read(out, "provenance.json")["network"]["sections"]] == [3, 2, 2]


def test_a_named_network_decides_about_its_shape(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["train", "--out", str(tmp_path / "x"), *SHARED]
    assert main([*command, "--network", "single", "--blocks", "3"]) != 0
    assert "--network single decides about blocks; leave out one or the other" in capsys.readouterr().err
    assert main([*command, "--network", "resnt32"]) != 0
    assert "unknown network 'resnt32'; did you mean 'resnet32'" in capsys.readouterr().err
    assert main([*command, "--sharing", "ubn", "--blocks", "1", "1", "1"]) != 0
    assert "nothing is shared" in capsys.readouterr().err


def test_penalties_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = ("--blocks", "2", "--widths", "4", "--penalty", "jacobian:0.5", "variation:0.1", *SHARED[2:])
    assert main(["train", "--out", str(tmp_path / "run"), "--norm", "group", *small]) == 0
    penalty = read(tmp_path / "run", "config.json")["training"]["penalty"]
    assert (penalty["jacobian"], penalty["variation"], penalty["divergence"]) == (0.5, 0.1, 0.0)
    assert main(["train", "--out", str(tmp_path / "x"), *small]) != 0
    assert "a penalty cannot run norm1, BatchNorm2d" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["train", "--out", str(tmp_path / "x"), "--penalty", "jacobean:1"]) != 0
    assert "unknown penalty 'jacobean'; did you mean 'jacobian'" in capsys.readouterr().err
