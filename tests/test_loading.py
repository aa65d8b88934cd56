"""Loading: every kind of name gives its network, in eval mode, with the constants of the images that it reads."""

import builtins
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from datafiles import hf_folder
from residuum.data import Preparation
from residuum.loading import load_model, load_weights_, save_run
from residuum.models import ResNet, ResNetConfig
from residuum.vision import import_torchvision
from residuum.zoos import Reads

CODE = """
from torch import nn
from parts import Middle

def net():
    return nn.Sequential(nn.Flatten(), Middle(), nn.Linear(3, 2))

def text():
    return "no network"

def broken():
    return 1 / 0

def ended():
    raise SystemExit(3)

def wrong():
    raise ValueError("the width is 0")
"""
PARTS = """
from torch import nn

class Middle(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)
"""


@pytest.fixture
def run_folder(tmp_path: Path) -> tuple[Path, ResNet]:
    model = ResNet(ResNetConfig(blocks=(2, 1), widths=(4, 6), channels=1, classes=3, transition="projection"), seed=5)
    model(torch.randn(8, 1, 8, 8))  # batch-norm statistics that are not those of a fresh network
    preparation = Preparation(16, (0.3,), (0.4,), None)
    save_run(tmp_path, model, preparation=preparation, classes=("a", "b", "c"), training={"epochs": 1, "history": []})
    return tmp_path, model.eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_saved_run_comes_back(run_folder: tuple[Path, ResNet]) -> None:
    folder, model = run_folder
    loaded = load_model(str(folder))
    x = torch.randn(2, 1, 8, 8)
    assert same(loaded.model, model)
    assert torch.equal(loaded.model(x), model(x))
    assert not loaded.model.training
    assert loaded.reads == Reads(None, (0.3,), (0.4,))
    assert loaded.classes == ("a", "b", "c")
    assert loaded.training == {"epochs": 1, "history": []}
    assert not loaded.fresh


def test_a_run_in_float64_comes_back_unrounded(tmp_path: Path) -> None:
    model = ResNet(ResNetConfig(blocks=(1,), widths=(4,), channels=1)).double()
    with torch.no_grad():
        model.stem.weight += 1e-9
    save_run(tmp_path, model, preparation=Preparation(16, (0.3,), (0.4,)), classes=tuple("0123456789"), training={})
    assert same(load_model(str(tmp_path)).model, model)


def test_a_run_with_random_weights_is_fresh(run_folder: tuple[Path, ResNet]) -> None:
    folder, model = run_folder
    loaded = load_model(str(folder), weights="random", seed=5)
    assert loaded.fresh
    assert loaded.training is None
    assert torch.equal(loaded.model.stem.weight, model.stem.weight)
    assert not same(loaded.model, load_model(str(folder), weights="random", seed=6).model)


def test_a_run_with_weights_of_a_file(run_folder: tuple[Path, ResNet], tmp_path: Path) -> None:
    folder, model = run_folder
    other = ResNet(model.config, seed=9)
    file = tmp_path / "other.safetensors"
    save_file({name: value.contiguous() for name, value in other.state_dict().items()}, file)
    loaded = load_model(str(folder), weights=str(file))
    assert same(loaded.model, other)
    assert loaded.weights == str(file)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t", "timm:vit_tiny_patch16_224"])
def test_zoo_networks_with_random_weights(name: str) -> None:
    before = torch.get_rng_state()
    loaded = load_model(name, weights="random", classes=7, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert loaded.fresh
    assert not loaded.model.training
    assert loaded.name == name
    rows, columns = loaded.reads.size
    assert len(loaded.reads.mean) == len(loaded.reads.std) == 3
    with torch.no_grad():
        assert loaded.model(torch.randn(1, 3, rows, columns)).shape == (1, 7)
    assert same(loaded.model, load_model(name, weights="random", classes=7, seed=1).model)


def test_weights_of_a_file_decide_the_number_of_outputs(tmp_path: Path) -> None:
    import timm

    for classes in (1000, 4):
        file = tmp_path / f"{classes}.safetensors"
        save_file(timm.create_model("resnet10t", num_classes=classes).state_dict(), file)
        loaded = load_model("timm:resnet10t", weights=str(file), classes=4)
        assert loaded.model.fc.out_features == classes
        assert not loaded.fresh
    with pytest.raises(ValueError, match=r"does not fit ResNet.*size mismatch for fc.weight"):
        load_model("timm:resnet10t", weights=str(file), classes=5)


def test_a_hugging_face_folder_with_its_constants(tmp_path: Path) -> None:
    processor = {"size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    loaded = load_model(f"hf:{hf_folder(tmp_path, processor=processor)}")
    assert loaded.reads == Reads((16, 16), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert loaded.classes == ("cat", "dog", "owl")
    assert loaded.name == f"hf:{tmp_path.name}"
    assert not loaded.fresh
    assert not loaded.model.training


@pytest.mark.parametrize(
    ("says", "reads"),
    [
        ({"size": {"height": 16, "width": 24}}, Reads((16, 24), (0.5,) * 3, (0.1,) * 3)),
        (
            {"size": {"shortest_edge": 32}, "crop_size": {"height": 16, "width": 24}},
            Reads((16, 24), (0.5,) * 3, (0.1,) * 3),
        ),
        ({"size": 16, "crop_size": 24, "do_center_crop": False}, Reads((16, 16), (0.5,) * 3, (0.1,) * 3)),
        ({"size": 16, "do_normalize": False}, Reads((16, 16), (0.0,) * 3, (1.0,) * 3)),
        ({"size": 16, "do_rescale": False}, Reads((16, 16), (0.5 / 255,) * 3, (0.1 / 255,) * 3)),
        ({"size": 16, "rescale_factor": 2 / 255, "rescale_offset": True}, Reads((16, 16), (0.75,) * 3, (0.05,) * 3)),
    ],
)
def test_what_an_image_processor_does_is_what_counts(says: dict[str, Any], reads: Reads, tmp_path: Path) -> None:
    processor = {"image_mean": [0.5] * 3, "image_std": [0.1] * 3} | says
    assert load_model(f"hf:{hf_folder(tmp_path, processor=processor)}").reads == reads


def test_reversed_channels_are_refused(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, processor={"size": 16, "do_flip_channel_order": True})
    with pytest.raises(ValueError, match=r"reads blue, green, red \(do_flip_channel_order\); images are red"):
        load_model(f"hf:{folder}")


def test_weights_that_the_files_of_a_model_lack_are_named(tmp_path: Path) -> None:
    from transformers import ViTForImageClassification

    folder = hf_folder(tmp_path, processor=None)
    assert load_model(f"hf:{folder}").weights == "pretrained, Hugging Face"
    ViTForImageClassification.from_pretrained(folder).vit.save_pretrained(folder)
    assert load_model(f"hf:{folder}").weights == (
        "pretrained, Hugging Face, except classifier.bias and 1 others, which its files lack: drawn at random"
    )


def test_a_hugging_face_folder_without_constants_with_random_weights(tmp_path: Path) -> None:
    loaded = load_model(f"hf:{hf_folder(tmp_path, processor=None)}", weights="random", classes=5)
    assert loaded.reads == Reads((16, 16), None, None)
    assert loaded.model(torch.randn(1, 3, 16, 16)).logits.shape == (1, 5)


def test_a_hugging_face_type_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The type's default configuration, made small: the real one has 124 million parameters."""
    import transformers

    small = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=8, vocab_size=20)
    monkeypatch.setattr(transformers, "CONFIG_MAPPING", {"gpt2": lambda: small})
    loaded = load_model("hf:gpt2", weights="random")
    assert type(loaded.model).__name__ == "GPT2LMHeadModel"
    assert loaded.reads == Reads()


def test_a_hugging_face_type_with_several_classes_gives_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    small = transformers.DeiTConfig(**size, image_size=16, patch_size=8)
    monkeypatch.setattr(transformers, "CONFIG_MAPPING", {"deit": lambda: small})
    assert type(load_model("hf:deit", weights="random", classes=3).model).__name__ == "DeiTForImageClassification"


def test_a_function_in_a_file_beside_another(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    (tmp_path / "parts.py").write_text(PARTS)
    path = list(sys.path)
    loaded = load_model(f"{file}:net")
    assert loaded.model(torch.randn(2, 1, 2, 2)).shape == (2, 2)
    assert loaded.weights == "as net returned them"
    assert sys.path == path
    weights = tmp_path / "w.safetensors"
    save_file({name: torch.ones_like(value) for name, value in loaded.model.state_dict().items()}, weights)
    assert (load_model(f"{file}:net", weights=str(weights)).model[2].weight == 1).all()


def test_a_function_is_seeded_and_its_file_is_a_module(tmp_path: Path) -> None:
    file = tmp_path / "json.py"  # a name that must not hide what others import
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport sys\nfrom torch import nn\n"
        "@dataclass\nclass Size:\n    width: int = 3\n"
        "def net():\n    sys.path.insert(0, 'mine')\n    return nn.Linear(Size().width, 2)\n"
    )
    before, path, known = torch.get_rng_state(), list(sys.path), sys.modules["json"]
    weights = [load_model(f"{file}:net", seed=seed).model.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(before, torch.get_rng_state())
    assert sys.path == ["mine"] * 3 + path
    sys.path[:] = path
    assert sys.modules["json"] is known
    file.write_text("1 / 0")
    loaded = set(sys.modules)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        load_model(f"{tmp_path / 'json.py'}:net")
    assert not {name for name in set(sys.modules) - loaded if name.startswith("json")}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no model given; a model is one of RUN_FOLDER"),
        ("torchvision:resnet81", "did you mean 'resnet18'"),
        ("timm:resnet_18", "did you mean 'resnet18'"),
        ("timm:resnet18.a1_in1", "unknown timm model 'resnet18.a1_in1'; did you mean 'resnet18.a1_in1k'"),
        ("torchvison:resnet18", "did you mean 'torchvision'"),
        ("hf:", "lacks a name after the colon"),
        ("resnet18", "did you mean torchvision:resnet18 or timm:resnet18"),
        ("a wholly unknown thing", "a model is one of RUN_FOLDER, torchvision:NAME"),
        ("hf:gtp2", "did you mean 'gpt2'"),
    ],
)
def test_unknown_models_offer_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(name, weights="random")


def test_a_mistyped_run_folder_offers_the_nearest(run_folder: tuple[Path, ResNet], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="did you mean 'runs'"):
        load_model(str(tmp_path / "rnus"))


def test_a_type_without_trained_weights_says_so() -> None:
    with pytest.raises(ValueError, match="type of model without trained weights; use --weights random"):
        load_model("hf:vit")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("text", "returned a str; it must return a torch.nn.Module"),
        ("broken", r"mine\.py:broken failed with ZeroDivisionError: division by zero"),
        ("ended", r"mine\.py:ended failed with SystemExit: 3"),
        ("wrong", r"mine\.py:wrong failed with ValueError: the width is 0"),
        ("", "lacks a function after the colon; write path/to/file.py:function"),
        ("nett", "unknown function 'nett'; did you mean 'net'"),
    ],
)
def test_functions_that_give_no_network(tmp_path: Path, function: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "parts.py").write_text(PARTS)
    with pytest.raises(ValueError, match=message):
        load_model(f"{tmp_path / 'mine.py'}:{function}")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_model(f"{tmp_path / 'other.py'}:{function}")
    with pytest.raises(ValueError, match="decides about its weights"):
        load_model(f"{tmp_path / 'mine.py'}:{function}", weights="random")


def test_weights_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a pickle, which can run code; only FILE\.safetensors"):
        load_model("torchvision:resnet18", weights="weights.pth")
    with pytest.raises(ValueError, match="unknown weights 'randon'; did you mean 'random'"):
        load_model("torchvision:resnet18", weights="randon")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_model("torchvision:resnet18", weights=str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize(("kind", "extra"), [("torchvision:resnet18", "vision"), ("timm:x", "vision"), ("hf:x", "hf")])
def test_missing_packages_say_how_to_install_them(kind: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=rf'"{kind}" needs .*: pip install residuum\[{extra}\]'):
        load_model(kind)


def test_damaged_runs_are_refused(run_folder: tuple[Path, ResNet]) -> None:
    folder, _ = run_folder
    weights, config = folder / "weights.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged, cut short"):
        load_model(str(folder))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"weights\.safetensors"):
        load_model(str(folder))
    whole = config.read_text()
    damaged = ['{"network": {}}', *(whole.replace(*change) for change in (('"blocks"', '"block"'), ("0.3", "NaN")))]
    for text in ("{", "[]", *damaged, whole.replace("0.3", '"a"'), whole.replace('"format": 1', '"format": 99')):
        config.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is damaged or not of a run"):
            load_model(str(folder))
    config.unlink()
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        load_model(str(folder))


def test_weights_that_do_not_fit_or_are_not_finite_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"weight": torch.zeros(2, 3)}, file)
    with pytest.raises(ValueError, match=r"does not fit Linear.*Missing key"):
        load_weights_(nn.Linear(3, 2), file)
    save_file({"weight": torch.zeros(2, 3), "bias": torch.tensor([0, torch.nan])}, file)
    with pytest.raises(ValueError, match="holds nan or infinity in bias"):
        load_weights_(nn.Linear(3, 2), file)


def test_import_torchvision_can_be_repeated_and_says_other_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchvision()
    assert sys.modules["torchvision"].__version__
    real = builtins.__import__

    def fail(name: str, *rest: Any) -> Any:
        if name == "torchvision":
            raise RuntimeError("something else")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ImportError, match="torchvision does not import: something else"):
        import_torchvision()
    with pytest.raises(ValueError, match=r'^"timm:resnet10t" cannot be made: .*torchvision does not import: something'):
        load_model("timm:resnet10t")
