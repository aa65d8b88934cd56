"""Zoos: the networks of torchvision, timm and transformers, with their weights and what they read."""

import importlib
import importlib.util
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from residuum.names import nearest, one_line, unknown


class Reads(NamedTuple):
    """The images that a network reads; None where it does not say, and the data decide.

    Attributes:
        size: Rows and columns.
        mean: Subtracted from each channel of images with values in [0, 1].
        std: Divides each channel.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class Found(NamedTuple):
    """A network of a zoo.

    Attributes:
        model: The network.
        reads: The images that it reads.
        weights: Where trained weights come from, in words.
        classes: Names of its outputs, if they are known.
    """

    model: nn.Module
    reads: Reads
    weights: str = ""
    classes: tuple[str, ...] | None = None


def find(kind: str, name: str, *, pretrained: bool, classes: int | None) -> Found:
    """A network of a zoo.

    Args:
        kind: One of `ZOOS`.
        name: The network's name there.
        pretrained: With trained weights; else with random ones, drawn from the global random state.
        classes: Outputs of a network with random weights; None is its usual number.

    Raises:
        ValueError: If the package is missing or does not import, or the name is unknown (the nearest are offered).
        OSError: If trained weights cannot be had.
    """
    package, extra, make = ZOOS[kind]
    try:
        if kind != "hf" or importlib.util.find_spec("torchvision"):  # transformers uses it if it is there
            from residuum.vision import import_torchvision

            import_torchvision()
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(f'"{kind}:{name}" needs {error.name or package}: pip install residuum[{extra}]') from error
    except ImportError as error:
        raise ValueError(f'"{kind}:{name}" cannot be made: {one_line(error)}') from error
    try:
        return make(name, pretrained, classes)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        advice = "fetch them where there is a network, or use --weights random or FILE.safetensors"
        raise OSError(f"no trained weights for {kind}:{name}: {one_line(error)}; {advice}") from error


def _torchvision(name: str, pretrained: bool, classes: int | None) -> Found:
    """A classifier of torchvision."""
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise unknown("torchvision model", name, names)
    best = models.get_model_weights(name).DEFAULT
    constants = best.transforms()
    reads = Reads(_pair(constants.crop_size), tuple(constants.mean), tuple(constants.std))
    if not pretrained:
        return Found(models.get_model(name, weights=None, **_outputs(classes)), reads)
    state = best.get_state_dict(progress=False, check_hash=True, weights_only=True)
    # The two inception networks rescale their input where they are given their trained weights by torchvision itself.
    rescale = {"transform_input": True} if name in ("googlenet", "inception_v3") else {}
    model = models.get_model(name, weights=None, num_classes=len(best.meta["categories"]), **rescale)
    model.load_state_dict(state)
    return Found(model, reads, f"pretrained, torchvision {best.name}", tuple(best.meta["categories"]))


def _timm(name: str, pretrained: bool, classes: int | None) -> Found:
    """A network of timm."""
    import timm

    names, bare = timm.list_models(), name.partition(".")[0]
    if bare not in names:
        raise unknown("timm model", name, names)
    tagged = timm.list_models(bare, include_tags=True)
    if name not in (bare, *tagged):
        raise unknown("timm model", name, tagged)
    model = timm.create_model(name, pretrained=pretrained, **_outputs(classes))
    constants = model.pretrained_cfg
    reads = Reads(tuple(constants["input_size"][1:]), tuple(constants["mean"]), tuple(constants["std"]))
    names_of_outputs = constants.get("label_names")
    known = tuple(map(str, names_of_outputs)) if pretrained and names_of_outputs else None
    return Found(model, reads, f"pretrained, timm {constants.get('tag') or name}", known)


def _huggingface(name: str, pretrained: bool, classes: int | None) -> Found:
    """A network of transformers: an image classifier, else a language model, else the bare encoder."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if not pretrained and name in CONFIG_MAPPING_NAMES:
        config = transformers.CONFIG_MAPPING[name]()
    else:
        config = _huggingface_config(name, CONFIG_MAPPING_NAMES)
    kinds = ("ForImageClassification", "ForMaskedLM", "ForCausalLM", "")
    makers = (getattr(transformers, f"AutoModel{kind}") for kind in kinds)
    make = next((maker for maker in makers if type(config) in maker._model_mapping), None)
    if make is None:
        raise ValueError(f"hf:{name} is a {type(config).__name__}, for which transformers has no model to measure")
    images = make is transformers.AutoModelForImageClassification
    weights = ""
    if pretrained:
        options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
        model, about = make.from_pretrained(name, **options)
        weights = f"pretrained, Hugging Face{_random_parts(about['missing_keys'])}"
    else:
        if images and classes:
            config.num_labels = classes
        config.architectures = config.architectures or []  # of a type with several classes transformers reads them
        model = make.from_config(config, trust_remote_code=False)
    labels = tuple(str(config.id2label[i]) for i in range(config.num_labels)) if pretrained and images else None
    # A bare type has no image processor, and asking the hub for one takes its time.
    asked = name if pretrained or name not in CONFIG_MAPPING_NAMES else ""
    reads = _huggingface_reads(asked, config) if images else Reads()
    return Found(model, reads, weights, labels)


def _random_parts(names: Collection[str]) -> str:
    """Which weights are not in the files of a model, such as a head that it was not trained with; "" if none."""
    if not names:
        return ""
    first, *others = sorted(names)
    more = f" and {len(others)} others" if others else ""
    return f", except {first}{more}, which its files lack: drawn at random"


def _huggingface_config(name: str, types: dict[str, str]) -> Any:
    """The configuration of a hub model or of a folder."""
    from transformers import AutoConfig

    if "/" not in name and not Path(name).is_dir() and nearest(name, types) and name not in types:
        raise ValueError(f"hf:{name} is no folder and no type of model; {nearest(name, types)}")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if name in types:
            raise ValueError(f"hf:{name} is a type of model without trained weights; use --weights random") from error
        near = nearest(name, types)
        advice = (
            f"{near} (types work with --weights random)" if near else "types such as gpt2 work with --weights random"
        )
        raise ValueError(
            f"hf:{name} is not a folder and was not found on the hub; {advice}. {one_line(error)}"
        ) from error


def _huggingface_reads(name: str, config: Any) -> Reads:
    """What the image processor beside the weights says, or at least the size in the configuration."""
    from transformers import ImageProcessingMixin

    size = _pair(config.image_size) if getattr(config, "image_size", None) else None
    if not name:
        return Reads(size)
    try:
        constants, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):  # a type in its default size, or a folder without one
        return Reads(size)
    crop = constants.get("crop_size") if constants.get("do_center_crop", True) else None
    given = crop or constants.get("size") or {}
    if isinstance(given, dict):
        given = (given["height"], given["width"]) if "height" in given else given.get("shortest_edge")
    channels = getattr(config, "num_channels", 3)
    return Reads(_pair(given) if given else size, *_huggingface_scale(name, constants, channels))


def _huggingface_scale(name: str, constants: dict[str, Any], channels: int) -> tuple[Any, Any]:
    """Mean and standard deviation for images with values in [0, 1]: a processor's are for `white x - offset`.

    Raises:
        ValueError: If the processor reverses the channels, which no mean and standard deviation can.
    """
    if constants.get("do_flip_channel_order"):
        raise ValueError(f"hf:{name} reads blue, green, red (do_flip_channel_order); images are red, green, blue here")
    mean, std = constants.get("image_mean"), constants.get("image_std")
    if not constants.get("do_normalize", True):
        mean, std = (0.0,) * channels, (1.0,) * channels
    if not (mean and std):
        return None, None
    white = 255 * constants.get("rescale_factor", 1 / 255) if constants.get("do_rescale", True) else 255.0
    offset = 1.0 if constants.get("rescale_offset") else 0.0
    return tuple((value + offset) / white for value in mean), tuple(value / white for value in std)


def _pair(size: Any) -> tuple[int, int]:
    """Rows and columns from one number or a list of one or two."""
    numbers = (size,) if isinstance(size, int) else tuple(size)
    return (int(numbers[0]), int(numbers[-1]))


def _outputs(classes: int | None) -> dict[str, int]:
    """The option for the number of outputs, left out where the usual number is wanted."""
    return {} if classes is None else {"num_classes": classes}


# prefix: package, extra that installs it, function
ZOOS: dict[str, tuple[str, str, Callable[[str, bool, int | None], Found]]] = {
    "torchvision": ("torchvision", "vision", _torchvision),
    "timm": ("timm", "vision", _timm),
    "hf": ("transformers", "hf", _huggingface),
}
