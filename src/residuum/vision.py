"""torchvision beside a torch that it was not built for: one function that makes the import work."""

import sys
import warnings

import torch

_schemas: list[torch.library.Library] = []  # the declarations live as long as the library object


def import_torchvision() -> None:
    """Import torchvision, also where its compiled operators do not load (its usual wheel beside a CPU torch).

    Call it before the first import of torchvision, timm or a transformers model class. Where the operators are missing
    their two schemas are declared, which is all that the import asks for; models, transforms and data sets then work,
    detection operators and image decoding do not. The schemas are never declared before an import has failed, because
    declaring them twice is an error where torchvision is whole.

    Raises:
        ImportError: If torchvision is not installed, or does not import for another reason.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise ImportError(f"torchvision does not import: {error}") from error
    else:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    import torchvision  # noqa: F401

    warnings.warn(
        "torchvision has no compiled operators for this torch: detection operators and image decoding will not work",
        RuntimeWarning,
        stacklevel=2,
    )
