"""Loading: any network by its name, with its weights, and what it reads. Own networks are saved here, too."""

import importlib.util
import json
import math
import sys
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from residuum.data import Preparation
from residuum.descriptions import described, rebuilt
from residuum.files import restore_, stored, write_atomically, write_json
from residuum.layers.anystep import STEPS
from residuum.layers.lipschitz import Limit
from residuum.layers.sharing import Sharing
from residuum.models import ResNet, ResNetConfig
from residuum.names import nearest, one_line, unknown
from residuum.zoos import ZOOS, Found, Reads, find

FORMS = ("RUN_FOLDER", "torchvision:NAME", "timm:NAME", "hf:NAME", "path/to/file.py:function")
NETWORK = (ResNetConfig, Sharing, Limit, *STEPS)  # what a network of ours is described by
FORMAT = 1  # of config.json
BARE = ("resnet18", "resnet50", "vit_b_16", "vit_tiny_patch16_224")  # names that people type without their source


@dataclass(frozen=True)
class LoadedModel:
    """A network, and what is known about it.

    Attributes:
        model: The network in eval mode.
        name: The name that it was loaded by, without the folders before it.
        weights: Where its weights come from, in words.
        reads: The images that it reads.
        classes: Names of its outputs, if they are known.
        training: How it was trained (settings and history), if it is our own run.
        fresh: True if the weights are random, so that batch norm knows no data yet.
    """

    model: nn.Module
    name: str
    weights: str
    reads: Reads
    classes: tuple[str, ...] | None = None
    training: dict[str, Any] | None = None
    fresh: bool = False


def load_model(name: str, *, weights: str = "pretrained", classes: int | None = None, seed: int = 0) -> LoadedModel:
    """A network by its name.

    Nothing in a file is trusted: weights are read from safetensors, or unpickled with `weights_only=True` where
    torchvision and timm offer nothing else. The one exception is `path/to/file.py:function`, which runs your own code,
    as you ask for by naming it.

    Args:
        name: A folder written by `save_run`; "torchvision:resnet18"; "timm:vit_tiny_patch16_224"; "hf:" with a model of
            the Hugging Face hub, a folder of one, or with random weights a type such as "vit" or "gpt2" in its default
            size; "path/to/file.py:function", a function without arguments that returns a module.
        weights: "pretrained" (for a run folder and a function: as they are), "random", or a file "FILE.safetensors".
        classes: Outputs of a network with random weights, and of one whose weights file does not fit its usual number
            of outputs; None is the network's usual number.
        seed: Seed of random weights, and of torch's generator while a function runs.

    Raises:
        ValueError: If a name is unknown (the nearest are offered), a package is missing, or the weights do not fit.
        OSError: If a file or folder is not there or cannot be read, or trained weights cannot be had.
    """
    _check_weights(weights)
    if not name:
        raise ValueError(f"no model given; a model is one of {', '.join(FORMS)}")
    kind, _, rest = name.partition(":")
    if Path(name).is_dir():
        loaded = _run(Path(name), weights, seed)
    elif kind in ZOOS and rest:
        loaded = _of_a_zoo(kind, rest, weights, classes, seed)
    elif name.rpartition(":")[0].endswith(".py"):
        loaded = _function(name, weights, seed)
    else:
        raise _unknown_model(name)
    loaded.model.eval()
    return loaded


def save_run(
    folder: Path, model: ResNet, *, preparation: Preparation, classes: tuple[str, ...], training: dict[str, Any]
) -> None:
    """Write config.json and weights.safetensors, from which `load_model(folder)` makes the same network again.

    Args:
        folder: An existing folder.
        model: The network.
        preparation: How it reads pixels.
        classes: Names of its outputs.
        training: How it was trained: settings and data, as JSON values.

    Raises:
        ValueError: If the network is no longer what its configuration makes.
    """
    from safetensors.torch import save_file

    if model.state_dict().keys() != ResNet(model.config).state_dict().keys():
        raise ValueError(
            "this network was tied, folded or exported: its weights are no longer those of its configuration"
        )
    write_atomically(folder / "weights.safetensors", lambda path: save_file(stored(model), path))
    content = {
        "format": FORMAT,
        "network": described(model.config),
        "preparation": asdict(preparation),
        "classes": classes,
        "training": training,
    }
    write_json(folder / "config.json", content)


def load_weights_(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into a network; every tensor must be there, fit and be finite.

    Nothing is rounded: where the file has float64, the network becomes float64.

    Raises:
        ValueError: If the file is damaged or does not fit; the message names the first differences.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        if any(value.dtype == torch.float64 for value in tensors.values()):
            model.double()
        restore_(model, tensors)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, cut short or not a safetensors file: {error}") from error
    except RuntimeError as error:
        raise _MisfitError(f"{path} does not fit {type(model).__name__}: {one_line(error)}") from error
    wrong = [
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if wrong:
        raise ValueError(f"{path} holds nan or infinity in {wrong[0]}")


class _MisfitError(ValueError):
    """Weights of another network."""


def _check_weights(weights: str) -> None:
    """Refuse weights that are neither a known word nor a safetensors file, before anything is loaded."""
    if weights in ("pretrained", "random"):
        return
    if weights.endswith((".pt", ".pth", ".bin", ".ckpt", ".pkl")):
        raise ValueError(
            f"{weights} is a pickle, which can run code; only FILE.safetensors is read. Convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')"
        )
    if not weights.endswith(".safetensors"):
        raise unknown("weights", weights, ("pretrained", "random", "FILE.safetensors"))
    if not Path(weights).is_file():
        raise FileNotFoundError(f"no such file: {weights}")


def _unknown_model(name: str) -> Exception:
    """The error for a name of no known form."""
    kind, colon, rest = name.partition(":")
    if colon:
        return unknown("kind of model", kind, ZOOS) if rest else ValueError(f"{name!r} lacks a name after the colon")
    if Path(name).is_file():
        return ValueError(f"{name} is a file; a model is one of {', '.join(FORMS)}")
    parent = Path(name).parent
    folders = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    near = nearest(Path(name).name, folders)
    if not near and nearest(name, BARE):
        near = f"did you mean torchvision:{name} or timm:{name}?"
    return ValueError(
        " ".join(filter(None, (f"unknown model {name!r};", near, f"a model is one of {', '.join(FORMS)}")))
    )


def _run(folder: Path, weights: str, seed: int) -> LoadedModel:
    """A network that we trained, or one of its configuration."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.json (residuum train writes one)")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format", FORMAT) != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, this version of residuum reads {FORMAT}")
        config = _network(content["network"])
        preparation = _preparation(content["preparation"])
        classes, origin = tuple(map(str, content["classes"])), trained_on(content.get("training"))
        model = ResNet(config, seed=seed)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or not of a run: {type(error).__name__}: {error}") from error
    reads, name = Reads(preparation.size, preparation.mean, preparation.std), folder.resolve().name
    if weights == "random":
        return LoadedModel(model, name, f"random, seed {seed}", reads, classes, fresh=True)
    file = folder / "weights.safetensors" if weights == "pretrained" else Path(weights)
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    load_weights_(model, file)
    own = weights == "pretrained"
    training = content.get("training") if own else None
    return LoadedModel(model, name, origin if own else weights, reads, classes, training)


def trained_on(training: dict[str, Any] | None) -> str:
    """Where the weights of a network of our own come from, in words, by how it was trained."""
    labelling = (training or {}).get("labels", "true")
    return "trained by residuum" + (f" on labels that were {labelling}" if labelling != "true" else "")


def _network(written: dict[str, Any]) -> ResNetConfig:
    """The network that a config.json describes; what it does not say has its default."""
    return rebuilt({"kind": ResNetConfig.__name__} | written, NETWORK)


def _preparation(written: dict[str, Any]) -> Preparation:
    """The preparation of pixels that a config.json describes."""
    numbers = [written["white"], *written["mean"], *written["std"]]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError(f"white, mean and std of its preparation must be finite numbers, they are {numbers}")
    return Preparation(**{key: _tupled(value) for key, value in written.items()})


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def returned(name: str) -> Any:
    """What a function without arguments in a file of the user's returns. This runs the file.

    Args:
        name: "path/to/file.py:function".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the name has another form, there is no such function (the nearest are offered), or it fails.
    """
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise ValueError(f"{name!r} names no function; write path/to/file.py:function")
    if not Path(file).is_file():
        raise FileNotFoundError(f"no such file: {file}")
    if not function:
        raise ValueError(f"{name!r} lacks a function after the colon; write path/to/file.py:function")
    path, folder = Path(file).resolve(), str(Path(file).resolve().parent)
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and torch.compile look it up; no package has such a name
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
        if callable(make := getattr(module, function, None)):
            return make()
    except (Exception, SystemExit) as error:  # the user's own code: any error of it is shown as its, in one line
        del sys.modules[spec.name]
        raise ValueError(f"{name} failed with {type(error).__name__}: {one_line(error)}") from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    raise unknown("function", function, [key for key, value in vars(module).items() if callable(value)])


def _function(name: str, weights: str, seed: int) -> LoadedModel:
    """What a function in a file of the user's returns. This runs the file."""
    if weights == "random" and Path(name.rpartition(":")[0]).is_file():
        raise ValueError(f"{name} decides about its weights; name a function that returns random ones")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = returned(name)
    function = name.rpartition(":")[2]
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returned a {type(model).__name__}; it must return a torch.nn.Module")
    name = f"{Path(name.rpartition(':')[0]).name}:{function}"
    if weights == "pretrained":
        return LoadedModel(model, name, f"as {function} returned them", Reads())
    load_weights_(model, Path(weights))
    return LoadedModel(model, name, weights, Reads())


def _of_a_zoo(kind: str, name: str, weights: str, classes: int | None, seed: int) -> LoadedModel:
    """A network of torchvision, timm or transformers."""
    shown = f"{kind}:{Path(name).name if Path(name).is_dir() else name}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights == "pretrained":
            found = find(kind, name, pretrained=True, classes=None)
            return LoadedModel(found.model, shown, found.weights, found.reads, found.classes)
        if weights == "random":
            found = find(kind, name, pretrained=False, classes=classes)
            return LoadedModel(found.model, shown, f"random, seed {seed}", found.reads, fresh=True)
        found = _with_file(kind, name, Path(weights), classes)
        return LoadedModel(found.model, shown, weights, found.reads)


def _with_file(kind: str, name: str, path: Path, classes: int | None) -> Found:
    """A network with weights from a file, made for the network's usual number of outputs or for that of the data."""
    found = find(kind, name, pretrained=False, classes=None)
    try:
        load_weights_(found.model, path)
    except _MisfitError:
        if classes is None:
            raise
        found = find(kind, name, pretrained=False, classes=classes)
        load_weights_(found.model, path)
    return found
