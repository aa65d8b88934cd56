"""Memory layouts: the one in which a network's convolutions are fast, and do not corrupt memory."""

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

_WIDE = 8  # numbers of float32 in a register of AVX2


def fast_layout(model: nn.Module) -> torch.memory_format:
    """The memory layout in which to run and train a network: channels last, a third faster on processors with AVX-512.

    Except where that corrupts memory: on x86 processors without AVX-512, oneDNN 3.12 (of torch 2.13) writes beyond its
    buffer in the gradient of the weights of a 1x1 convolution with a stride, if it is channels-last and its input
    channels are no multiple of 8. Networks with such a convolution stay in torch's usual layout on every processor that
    torch does not take for one with AVX-512.

    Args:
        model: Any network.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return torch.channels_last
    on_processor = all(parameter.device.type == "cpu" for parameter in model.parameters())
    risky = on_processor and any(map(_overruns, model.modules()))
    return torch.contiguous_format if risky else torch.channels_last


def arranged(
    x: Shaped[Tensor, "example channel row column"], layout: torch.memory_format
) -> Shaped[Tensor, "example channel row column"]:
    """Images in a memory layout, in which what convolutions make of them then is.

    Args:
        x: Images or states.
        layout: Of `fast_layout`.
    """
    if layout == torch.contiguous_format:
        # Images of one channel are in both layouts at once; a copy decides what convolutions take them for.
        return x.clone(memory_format=layout)
    return x.contiguous(memory_format=layout)


def _overruns(module: nn.Module) -> bool:
    """Whether a module is a convolution of the kind that oneDNN gets wrong."""
    if not isinstance(module, nn.Conv2d):
        return False
    pointwise = module.kernel_size == (1, 1) and max(module.stride) > 1
    return pointwise and module.in_channels // module.groups % _WIDE > 0
