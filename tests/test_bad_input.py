"""Bad input at the command line: one clear line, exit code 2, no traceback, and nothing of the user's lost."""

import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from datafiles import write_npz
from residuum import commands
from residuum.cli import main
from residuum.files import NETWORK, new_folder, write_atomically, write_json
from residuum.models import ResNet, ResNetConfig

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Refused:
    """Runs a command that must be refused; gives the line that says why."""

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        shown = capsys.readouterr().err
        _, mark, message = shown.rpartition("residuum: ")
        assert mark
        assert "Traceback" not in shown
        return message

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "run"
    network = ("--blocks", "1", "1", "--widths", "4", "8", "--epochs", "1", "--limit", "20")
    assert main(["train", "--out", str(folder), *network]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name."""
    return {str(entry.relative_to(folder)): entry.read_bytes() for entry in folder.rglob("*") if entry.is_file()}


# Names -----------------------------------------------------------------------------------------------------------


def test_unknown_model_data_probe_device(refused: Refused, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    probe = ("probe", "--out", out, "--data", "digits")
    assert "did you mean 'resnet18'" in refused(*probe, "torchvision:resnet19", "--weights", "random")
    assert "unknown data 'digit'; did you mean 'digits'" in refused("train", "--out", out, "--data", "digit")
    assert "unknown probe 'pair'; did you mean 'pairs'" in refused(*probe, trained, "--probes", "pair")
    assert "unknown device 'gpu'" in refused(*probe, trained, "--device", "gpu")
    for name in ("auto:3", "cpu:", "cuda:", "cuda:-1"):
        assert f"unknown device '{name}'" in refused(*probe, trained, "--device", name)
    assert "unknown device 'cuda:x'" in refused(*probe, trained, "--device", "cuda:x")
    assert "given twice" in refused(*probe, trained, "--probes", "pairs", "pairs")
    for names in (("all", "drops"), ("pairs", "all"), ("all", "all")):
        assert "probe 'all' stands for every probe: give it alone" in refused(*probe, trained, "--probes", *names)
    assert "no probes given" in refused(*probe, trained, "--probes")
    assert not out.exists()


def test_a_missing_data_file_offers_the_nearest(refused: Refused, tmp_path: Path) -> None:
    write_npz(tmp_path / "birds.npz")
    message = refused("train", "--out", tmp_path / "out", "--data", tmp_path / "brids.npz")
    assert "no such file" in message
    assert "did you mean 'birds.npz'" in message


def test_data_are_resolved_before_any_weights_are_fetched(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(commands, "load_model", load)
    assert "unknown data" in refused("probe", "torchvision:resnet18", "--data", "x", "--out", tmp_path / "out")


# Data ------------------------------------------------------------------------------------------------------------

NO = np.zeros
WRONG_FILES = {
    "keys": ({"test_labels": None}, "keys must be train_images, train_labels, test_images, test_labels, classes"),
    "more keys": ({"extra": NO(1)}, "the file has classes, extra"),
    "shape": ({"train_images": NO((12, 5, 4), np.uint8)}, r"must be \[N, rows, columns, channels\]"),
    "shapes": ({"test_images": NO((6, 5, 5, 3), np.uint8)}, "they must agree"),
    "dtype": ({"train_images": NO((12, 5, 4, 3), np.float32)}, "must be uint8, 0 to 255, got float32"),
    "nan": ({"train_images": np.full((12, 5, 4, 3), np.nan)}, "train_images holds nan or infinity"),
    "no pixels": ({"train_images": NO((12, 0, 4, 3), np.uint8)}, "images without pixels"),
    "no examples": ({"test_images": NO((0, 5, 4, 3), np.uint8)}, "test_images has no examples"),
    "label dtype": ({"train_labels": NO(12, np.int32)}, r"must be int64 \[N\] or uint8 \[N, classes\], got int32"),
    "label float": ({"train_labels": NO(12)}, "got float64"),
    "label number": ({"train_labels": NO(11, np.int64)}, "11 labels for 12 images"),
    "label high": ({"train_labels": np.full(12, 3)}, r"must lie in 0\.\.2, got 3"),
    "label low": ({"test_labels": np.full(6, -1)}, r"must lie in 0\.\.2, got -1"),
    "label columns": ({"train_labels": NO((12, 4), np.uint8)}, "4 columns for 3 classes"),
    "label values": ({"train_labels": np.full((12, 3), 2, np.uint8)}, r"must lie in 0\.\.1, got 2"),
    "label kinds": ({"train_labels": NO((12, 3), np.uint8)}, "must be of one kind"),
    "classes": ({"classes": NO(3)}, "classes must be a list of names"),
    "pickle": ({"classes": np.array(["a", {}, 3], dtype=object)}, "not an npz file of plain arrays"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_npz_with_wrong_content(case: str, refused: Refused, tmp_path: Path) -> None:
    changes, message = WRONG_FILES[case]
    path = write_npz(tmp_path / "x.npz", **changes)
    said = refused("train", "--out", tmp_path / "out", "--data", path)
    assert re.search(message, said), said
    assert str(path) in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_cut_short_anywhere_is_refused(refused: Refused, tmp_path: Path) -> None:
    whole = write_npz(tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "cut.npz"
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "is damaged, cut short or not an npz file" in refused("train", "--out", tmp_path / "o", "--data", path)
    changed = bytearray(whole)
    changed[len(whole) // 3] ^= 255
    path.write_bytes(changed)
    assert "is damaged" in refused("train", "--out", tmp_path / "o", "--data", path)


def test_data_are_not_fetched_into_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused("data", "fetch", "mnist", "--data-root", tmp_path / "file")
    assert f"{tmp_path / 'file'} is a file, so mnist cannot be put there; choose another data root" in message


def test_other_files_are_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    assert "one bare array" in refused("train", "--out", tmp_path / "o", "--data", path)
    path.write_text("text")
    assert "not an npz file" in refused("train", "--out", tmp_path / "o", "--data", path)
    (tmp_path / "folder.npz").mkdir()
    assert "is a folder" in refused("train", "--out", tmp_path / "o", "--data", tmp_path / "folder.npz")


# Numbers ---------------------------------------------------------------------------------------------------------


def test_only_a_folder_is_folded_or_was_trained_on_shuffled_labels(
    refused: Refused, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "net.py", tmp_path / "out"
    file.write_text("from residuum import ResNet\ndef net(): return ResNet()\n")
    monkeypatch.chdir(tmp_path)
    for model in ("torchvision:resnet18", "net.py:net", "net.py", "none"):
        said = f"{model} is no folder; give one that residuum train wrote"
        assert said in refused("fold", model, "--data", "digits", "--out", out)
        assert said in refused("probe", trained, "--shuffled", model, "--data", "digits", "--out", out)


def test_zero_of_anything(refused: Refused, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    probe = ("probe", trained, "--data", "digits", "--out", out)
    assert "limit is 0; at least 1 example" in refused(*probe, "--limit", "0")
    assert "batch is 0" in refused(*probe, "--batch", "0")
    assert f"seed is {10**20}; it must lie between" in refused(*probe, "--seed", 10**20)
    assert f"seed is {10**20}; it must lie between" in refused("train", "--out", out, "--seed", 10**20)
    assert "size is (0, 0)" in refused(*probe, "--size", "0")
    assert "every section needs at least 1 block" in refused("train", "--out", out, "--blocks", "2", "0", "2")
    assert "one number per section" in refused("train", "--out", out, "--blocks", "2", "2")
    assert "epochs (0)" in refused("train", "--out", out, "--epochs", "0")
    assert "--watch is -1; it must be 0" in refused("train", "--out", out, "--watch", "-1")
    assert "no result folder given" in refused("report", "--out", tmp_path / "page.html")
    assert not out.exists()


def test_a_network_without_blocks(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "plain.py"
    file.write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n")
    message = refused("probe", f"{file}:net", "--data", "digits", "--out", tmp_path / "out", "--limit", "8")
    assert "no residual block found in Sequential" in message
    assert message.endswith("No module that has parts was called, so there are only single layers to name.\n")


def test_images_that_a_network_does_not_read(refused: Refused, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = write_npz(tmp_path / "x.npz")
    assert "reads 1 channels" in refused("probe", trained, "--data", data, "--out", out)
    file = tmp_path / "plain.py"
    file.write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(7, 10))\n")
    message = refused("probe", f"{file}:net", "--data", "digits", "--out", out)
    assert "does not run on examples of shape [1, 8, 8]" in message


STRANGE = """
import torch
from torch import nn
class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
    def forward(self, x):
        return x + self.conv(x)
class Net(nn.Module):
    def __init__(self, channels=1):
        super().__init__()
        self.blocks = nn.ModuleList(Block(4) for _ in range(2))  # registered before the stem
        self.stem, self.head = nn.Conv2d(channels, 4, 3), nn.Linear(4, 10)
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))
class Wrong(Net):
    def forward(self, x):
        raise ValueError("give exactly one of input_ids or inputs_embeds")
class Four(Net):
    def forward(self, x):
        return super().forward(x.expand(-1, 2, -1, -1))
def rgb(): return Net(3)
def traced(): return torch.jit.trace(Net(), torch.zeros(1, 1, 8, 8))
def meta(): return Net().to("meta")
def turning():
    net = Net()
    net.register_buffer("turns", torch.ones(2, dtype=torch.complex64))
    return net
"""


def test_networks_that_cannot_be_measured_say_why(
    refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file, out = tmp_path / "net.py", tmp_path / "out"
    file.write_text(STRANGE)
    options = ("--data", "digits", "--limit", "8", "--probes", "state_norm", "--out", out)
    assert main(["probe", f"{file}:rgb", *map(str, options)]) == 0
    assert "their channel repeated 3 times" in capsys.readouterr().err
    probe = lambda name: refused("probe", f"{file}:{name}", *options, "--force")  # noqa: E731
    assert "net.py:Wrong does not run on examples of shape" in probe("Wrong")
    message = probe("Four")
    assert "to have 1 channels, but got 2 channels instead" in message
    assert "--size" not in message
    assert "net.py:traced is scripted or traced; give the network as it was before" in probe("traced")
    assert "net.py:meta has no values in blocks.0.conv.weight (device meta); load its weights first" in probe("meta")
    assert "net.py:turning has complex numbers in turns" in probe("turning")
    assert "known: perturbation, state_norm" in refused(
        "probe", f"{file}:rgb", *options[:4], "--out", out, "--probes", "x"
    )


def test_cuda_where_there_is_none(
    refused: Refused, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (("demo",), ("train",), ("probe", trained, "--data", "digits")):
        message = refused(*command, "--out", tmp_path / "out", "--device", "cuda")
        assert "torch sees 0 cuda devices here; use --device cpu" in message
    assert not (tmp_path / "out").exists()


def test_a_learning_rate_that_explodes(refused: Refused, tmp_path: Path) -> None:
    message = refused("train", "--out", tmp_path / "out", "--lr", "1e30", "--limit", "200")
    assert "try a smaller learning rate" in message
    assert list(tmp_path.iterdir()) == []


# Folders ---------------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_kept(refused: Refused, trained: Path, tmp_path: Path) -> None:
    before = contents(trained)
    assert "exists; choose another output folder, or replace it with --force" in refused("train", "--out", trained)
    assert contents(trained) == before
    (tmp_path / "thesis.tex").write_text("years of work")
    message = refused("train", "--out", tmp_path, "--force")
    assert "holds other files (thesis.tex)" in message
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}
    assert "is a file" in refused("train", "--out", tmp_path / "thesis.tex", "--force")


def test_the_folder_that_one_is_in_is_not_exchanged_below_one(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("train", "demo", "stability"):
        assert f"{tmp_path} is the folder that the command is called in" in refused(command, "--out", ".")
    assert list(tmp_path.iterdir()) == []


def test_a_network_is_not_replaced_by_what_is_measured_of_it(refused: Refused, trained: Path, tmp_path: Path) -> None:
    before = contents(trained)
    probe = ("probe", trained, "--data", "digits", "--limit", "8", "--force", "--out")
    assert "is what the command reads; choose another output folder" in refused(*probe, trained)
    assert "is what the command reads" in refused("fold", trained, "--out", trained, "--force")
    assert "holds other files (config.json)" in refused("stability", "--out", trained, "--force")
    other = tmp_path / "other"
    assert main([str(word) for word in (*probe, other)]) == 0
    assert main([str(word) for word in (*probe, other)]) == 0
    assert "holds other files (config.json)" in refused("probe", other, *probe[2:], trained)
    assert contents(trained) == before


def test_a_page_replaces_only_a_page(refused: Refused, trained: Path, tmp_path: Path) -> None:
    result, other = tmp_path / "result", tmp_path / "other.html"
    probe = ("probe", trained, "--data", "digits", "--limit", "8", "--probes", "state_norm", "--out", result)
    assert main([str(word) for word in probe]) == 0
    other.write_text("<p>mine</p>")
    report = ("report", result, "--force", "--out")
    assert "is no name of a page; write --out FILE.html" in refused(*report, tmp_path / "data.npz")
    assert "exists and is no page of residuum" in refused(*report, other)
    assert "exists and is no page of residuum" in refused(*report, _made(tmp_path / "folder.html"))
    message = refused(*report, tmp_path / "none" / "sub" / "x.html")
    assert f"{tmp_path / 'none' / 'sub'} is no folder; make it first" in message
    assert main([str(word) for word in (*report, result / "report.html")]) == 0
    assert other.read_text() == "<p>mine</p>"
    assert "cannot write /proc/x: " in refused(*probe[:-1], "/proc/x")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*arguments: object, **options: object) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr(commands, "train_network", work)
    (tmp_path / "file").write_text("")
    assert "file is a file, so" in refused("train", "--out", tmp_path / "file" / "out")
    if os.geteuid():  # root may write everywhere
        tmp_path.chmod(0o500)
        assert "Permission denied" in refused("train", "--out", tmp_path / "out")
        tmp_path.chmod(0o700)


def test_force_keeps_the_old_folder_until_the_new_one_is_complete(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("train", "--out", tmp_path / "run", "--blocks", "1", "--widths", "4", "--epochs", "1", "--limit", "20")
    assert main([str(word) for word in command]) == 0
    before = contents(tmp_path)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(commands, "write_provenance", fail)
        assert "No space left on device" in refused(*command, "--force")
    checkpoint = tmp_path / "run.checkpoint"  # the training is not lost either
    assert {**contents(tmp_path), checkpoint.name: None} == {**before, checkpoint.name: None}
    assert "belongs to a training that would not end with the same bits" in refused(*command, "--force", "--seed", "1")
    assert main([str(word) for word in (*command, "--force")]) == 0
    assert not checkpoint.exists()
    assert main([str(word) for word in (*command, "--force", "--seed", "1")]) == 0
    assert contents(tmp_path).keys() == before.keys()
    assert contents(tmp_path) != before


def test_a_folder_in_the_place_of_a_checkpoint_is_named(refused: Refused, tmp_path: Path) -> None:
    _made(tmp_path / "run.checkpoint")
    message = refused("train", "--out", tmp_path / "run", "--limit", "20")
    assert f"{tmp_path / 'run.checkpoint'} is a folder, no file of residuum; delete it to start anew" in message


def test_a_report_of_what_is_no_result(refused: Refused, trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert "is not a folder" in refused("report", tmp_path / "none", "--out", page)
    assert "is not a complete result" in refused("report", trained, "--out", page)
    assert not page.exists()


# Writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [OSError("disk is full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(stop: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"kept": 1})

    def write(temporary: Path) -> None:
        temporary.write_text("half of it")
        raise stop

    with pytest.raises(type(stop)):
        write_atomically(path, write)
    assert contents(tmp_path) == {"x.json": b'{\n  "kept": 1\n}\n'}


def test_json_without_numbers_that_json_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_weights_are_written(tmp_path: Path) -> None:
    """The limit on the size of files stands in for the disk."""
    from residuum.data import Preparation
    from residuum.loading import save_run

    model = ResNet(ResNetConfig(blocks=(1,), widths=(32,)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with (
            pytest.raises(OSError, match=r"weights\.safetensors"),
            new_folder(tmp_path / "x", writes=NETWORK) as folder,
        ):
            save_run(folder, model, preparation=Preparation(255, (0.0,) * 3, (1.0,) * 3), classes=(), training={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    with new_folder(folder, writes=NETWORK) as new:
        write_json(new / "config.json", 1)
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target) == folder and not folder.exists() and (Path(source) / "history.json").exists():
            raise OSError("the disk was pulled")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="pulled"), new_folder(folder, writes=NETWORK, replace=True) as new:
        write_json(new / "history.json", 2)
    assert contents(tmp_path) == {"run/config.json": b"1\n"}


def test_outputs_that_are_not_numbers_are_never_right(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "nan.py").write_text(
        "from residuum import ResNet, ResNetConfig\n"
        "def net():\n"
        "    model = ResNet(ResNetConfig(blocks=(2,), widths=(4,), channels=1))\n"
        "    model.dense.weight.data.fill_(float('nan'))\n"
        "    return model\n"
    )
    command = [
        "probe",
        f"{tmp_path / 'nan.py'}:net",
        "--data",
        "digits",
        "--limit",
        "20",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "accuracy 0.0%" in said.out
    assert "the outputs of 20 of 20 examples are not finite; they count as wrong" in said.err


def test_states_that_grow_beyond_all_numbers_are_no_findings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    (tmp_path / "net.py").write_text(STRANGE.replace("x + self.conv(x)", "x + 1e30 * x + 0 * self.conv(x)"))
    command = ["probe", f"{tmp_path / 'net.py'}:Net", "--data", "digits", "--limit", "9", "--out", str(out)]
    assert main(command) == 0
    assert "0 to 0" not in capsys.readouterr().out
    short = (out / "report.html").read_text().partition("In short</h2>")[2].partition("</ul>")[0]
    assert "The outputs of 9 of 9\n  examples are not finite" in short
    assert short.count("<li>") == 1
    assert "How far each block moves the state</h2>" not in (out / "report.html").read_text()


def test_one_bad_block_costs_what_it_spoils_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "net.py").write_text(
        "from residuum import ResNet, ResNetConfig\n"
        "def bad():\n"
        "    config = ResNetConfig(blocks=(2, 2), widths=(4, 4), channels=1, transition='projection')\n"
        "    model = ResNet(config)\n"
        "    model.sections[0][1].conv2.weight.data.fill_(float('nan'))\n"
        "    return model\n"
    )
    out = tmp_path / "out"
    command = ["probe", f"{tmp_path / 'net.py'}:bad", "--data", "digits", "--limit", "20", "--out", str(out)]
    assert main([*command, "--probes", "state_norm", "drops"]) == 0
    notes = json.loads((out / "provenance.json").read_text())["notes"]
    assert (
        "the states of 20 of 20 examples are not finite, first after block sections.0.1 (section 1) in 20 of them"
        in notes
    )
    assert "dropping blocks: blocks inside entries run, except for drop_entry: transitions.0" in notes
    found = pd.read_parquet(out / "profile.parquet")
    assert found[found.quantity == "state_norm"]["count"].tolist() == [20, 20, 0]
    assert not any("at initialisation" in note for note in notes)
    assert notes[0] in capsys.readouterr().err.replace("\n", "")


def test_probes_that_need_labels_are_left_out_by_name(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from residuum import ResNet, ResNetConfig\n"
        "def three():\n"
        "    return ResNet(ResNetConfig(blocks=(2,), widths=(4,), channels=1, classes=3))\n"
    )
    command = [
        "probe",
        f"{tmp_path / 'net.py'}:three",
        "--data",
        "digits",
        "--limit",
        "9",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--probes", "pairs", "gradients", "margins"]) == 0
    notes = json.loads((tmp_path / "out" / "provenance.json").read_text())["notes"]
    assert "3" in notes[0]
    assert "measures with labels are skipped" in notes[0]
    assert notes[1] == "gradients not measured: need labels, because they are of the loss; the target is None"
    assert notes[2] == "margins not measured: need labels, because they are of the right answer; the target is None"
    said = refused(*command[:-1], str(tmp_path / "other"), "--probes", "gradients", "margins")
    assert "nothing to measure: gradients, margins need labels; " in said
    assert "digits 10 classes" in said
