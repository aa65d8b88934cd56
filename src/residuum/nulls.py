"""Null models: the same network with fresh weights, which a measured one must be compared with; and their theory."""

import copy
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from residuum.calls import call_model, cuda_devices, evaluating
from residuum.copies import copied
from residuum.layers.held import held
from residuum.layers.sharing import BATCH_NORMS, batch_norms, unshare_statistics
from residuum.names import one_line


class NoNullModel(ValueError):  # noqa: N818 - reads as the answer that it is
    """There is no null model of a network; the message says why."""


def calibrate_(model: nn.Module, batches: Iterable[tuple[Any, Tensor | None]]) -> int:
    """Set batch-norm statistics to those of the data, by one pass with cumulative averaging.

    Every batch norm in turn sees batches normalised by themselves, and keeps the mean of their statistics. Only batch
    norms run in training mode (dropout stays off); parameters, modes and momenta are as before. Scales that are clipped
    by the running variance (`clip_`) stay as they are during a pass, and passes are repeated until they no longer
    change: at most one for each batch norm, because its statistics depend on those before it only.

    Args:
        model: The network, modified.
        batches: (input, target) pairs as `profile` takes them, at least 1,000 images of the training set where there
            are as many; targets are not used. Batches of equal size weigh examples equally.

    Returns:
        Number of batches that were used; 0 if the network has no batch-norm statistics.

    Raises:
        ValueError: If there are statistics to set and no batches.
        NoNullModel: If an InstanceNorm has running statistics.
        Exception: Whatever the network raises, such as batch norm for a batch of one vector. Statistics are then as
            they were.

    Source: ours. Fresh statistics are 0 and 1, so that batch norm would do nothing in eval mode and the states of deep
    networks would explode; the papers do not say how they measure at initialisation.
    """
    if any(isinstance(m, _InstanceNorm) and m.running_mean is not None for m in model.modules()):
        raise NoNullModel("calibrate_: torch does not average statistics of InstanceNorm; track_running_stats=False")
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None]
    if not norms:
        return 0
    clipped = any(parametrize.is_parametrized(module) for module in norms)
    given = list(batches) if clipped else batches
    statistics = [(b, b.clone()) for m in norms for b in (m.running_mean, m.running_var, m.num_batches_tracked)]
    try:
        for _ in norms if clipped else (None,):
            before = [module.running_var.clone() for module in norms]
            used = _pass(model, norms, given)
            if not used:
                raise ValueError("calibrate_: no batches given, and the network has batch-norm statistics to set")
            if all(torch.allclose(m.running_var, v, rtol=1e-4, atol=0) for m, v in zip(norms, before, strict=True)):
                break
    except BaseException:
        for buffer, was in statistics:
            buffer.copy_(was)
        raise
    return used


def _pass(model: nn.Module, norms: Sequence[nn.Module], batches: Iterable[tuple[Any, Tensor | None]]) -> int:
    """One pass over the data, with statistics that begin anew; the number of batches."""
    momenta = {module: module.momentum for module in norms}
    used = 0
    try:
        with evaluating(model), torch.no_grad(), held(model):
            for module in norms:
                module.reset_running_stats()
                module.training = True  # not train(), which would reach dropout inside of it
                module.momentum = None
            for x, _ in batches:
                call_model(model, x)
                used += 1
    finally:
        for module, momentum in momenta.items():
            module.momentum = momentum
    return used


def recalibrated(
    model: nn.Module, batches: Iterable[tuple[Any, Tensor | None]], *, per_application: bool = True
) -> nn.Module:
    """A copy whose batch-norm statistics are those of the data: what wrong statistics cost is the difference.

    A block that is applied many times with one batch norm is trained with the statistics of each application, but
    evaluated with their running mixture. In the copy each application has statistics of its own, with the scales and
    shifts and all other weights tied as in the model; applications are those of `unshare_statistics`.

    Args:
        model: The network; it is not changed.
        batches: (input, target) pairs of the training set, as for `calibrate_`.
        per_application: False: statistics are estimated anew, but applications that share them still do.

    Raises:
        ValueError: If there are statistics to set and no batches; with `per_application`, if a forward still runs one
            batch norm several times.
        NoNullModel: If an InstanceNorm has running statistics.

    Source: ours, a diagnostic of the overfitting that P1 (Jastrzebski et al. 2018), section 4.5, reports of shared
    networks.
    """
    found = unshare_statistics(model) if per_application else copied(model)
    with _each_once(found) if per_application else nullcontext():
        calibrate_(found, batches)
    return found


@contextmanager
def _each_once(model: nn.Module) -> Iterator[None]:
    """Within it a forward of the model is refused that runs a batch norm with statistics a second time."""
    norms = {norm: name for name, norm in batch_norms(model).items() if norm.running_mean is not None}
    ran: set[nn.Module] = set()

    def run(norm: nn.Module, _: Any) -> None:
        if norm in ran:
            raise ValueError(
                f"recalibrated: a forward runs {norms[norm] or 'the batch norm'} several times from one place, so its "
                "applications cannot have statistics of their own; let them be a Loop or places of a list, or give "
                "per_application=False"
            )
        ran.add(norm)

    handles = [model.register_forward_pre_hook(lambda *_: ran.clear())]
    handles += [norm.register_forward_pre_hook(run) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def null_model(model: nn.Module, batches: Iterable[tuple[Any, Tensor | None]], *, seed: int) -> nn.Module:
    """The same network with fresh weights and calibrated batch norm, in eval mode, as frozen as the network is.

    Networks that define `fresh(seed)` (ours do) make it themselves, Hugging Face models make it from their config.
    Of any other a copy is re-initialised through the `reset_parameters` of its modules, which is torch's default for
    each kind of layer and can differ from what the network's authors start from; `kept_buffers` names what it leaves.

    Args:
        model: The network; it is not changed.
        batches: Data for `calibrate_`; read only if there are batch-norm statistics.
        seed: Seed of the weights; the global random state is left alone.

    Raises:
        NoNullModel: If some parameters are whole numbers or belong to no module that can reset them, if what the
            network or a module of it has for that fails, or if the network that it makes has other parameters. The
            message names them.
    """
    parameters = list(model.parameters())
    with torch.random.fork_rng(devices=cuda_devices(model)):
        torch.manual_seed(seed)
        if hasattr(type(model), "fresh"):
            null = _from_own(f"{type(model).__name__}.fresh({seed})", lambda: model.fresh(seed))
        elif _is_hugging_face(model):
            kind, config = type(model), copy.deepcopy(model.config)
            null = _from_own(f"{kind.__name__}(config)", lambda: kind(config).to(parameters[0]))
        else:
            null = _reset(_from_own(f"a copy of {type(model).__name__}", lambda: copied(model)))
    if [p.shape for p in null.parameters()] != [p.shape for p in parameters]:
        raise NoNullModel(
            f"there is no null model: this {type(model).__name__} was tied, folded, exported or given other layers "
            "since it was made"
        )
    for ours, theirs in zip(null.parameters(), parameters, strict=True):
        ours.requires_grad_(theirs.requires_grad)
    null.eval()
    calibrate_(null, batches)
    return null


def null_is_reset(model: nn.Module) -> bool:
    """Whether `null_model` re-initialises layer by layer, because the network does not say itself how it starts."""
    return not hasattr(type(model), "fresh") and not _is_hugging_face(model)


def _is_hugging_face(model: nn.Module) -> bool:
    loaded = sys.modules.get("transformers")  # a model of its classes cannot exist before it is imported
    return loaded is not None and isinstance(model, loaded.PreTrainedModel)


def kept_buffers(model: nn.Module, null: nn.Module) -> tuple[str, ...]:
    """Names of what is stored with a network, is no parameter, and is the same in its null model.

    Frozen batch norm is of this kind: scales, shifts and statistics are buffers, which no `reset_parameters` sets.

    Args:
        model: The network.
        null: Its null model.
    """
    stored, other = model.state_dict().keys(), dict(null.named_buffers())
    floats = ((name, b) for name, b in model.named_buffers() if name in stored and b.is_floating_point())
    return tuple(name for name, b in floats if name in other and torch.equal(b, other[name]))


def _from_own(what: str, make: Callable[[], Any]) -> Any:
    """What code of the network itself gives; if it fails, that is why there is no null model."""
    try:
        return make()
    except Exception as error:
        raise NoNullModel(f"there is no null model: {what} fails: {type(error).__name__}: {one_line(error)}") from error


def _reset(model: nn.Module) -> nn.Module:
    """Re-initialise in place; what is still nan afterwards belongs to nobody."""
    whole = [name for name, p in model.named_parameters() if not (p.is_floating_point() or p.is_complex())]
    if whole:
        raise NoNullModel(f"there is no null model: parameters that are whole numbers have no fresh values: {whole[0]}")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        for name, module in reversed(list(model.named_modules())):  # parents last: they may change their parts
            # MultiheadAttention and Transformer have theirs with an underscore.
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if reset is not None:
                _from_own(f"{reset.__name__}() of {name or 'the model'} ({type(module).__name__})", reset)
    left = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    if left:
        computed = "parametrizations" in left[0]
        why = "are computed by a parametrization" if computed else "belong to modules without reset_parameters"
        names = ", ".join(left[:3])
        raise NoNullModel(
            f"there is no null model: {len(left)} parameters of {type(model).__name__} {why}, among them {names}"
        )
    return model


@dataclass(frozen=True)
class SectionTheory:
    """What theory expects of one section of an untrained network.

    Attributes:
        variance: Variance v0 of an entry of the section's first state.
        scaled_perturbation: Of each block.
        scaled_distance: Of the section.
    """

    variance: float
    scaled_perturbation: tuple[float, ...]
    scaled_distance: float


def null_theory(lengths: Sequence[int]) -> tuple[SectionTheory, ...]:
    """Scaled perturbation and distance of an untrained pre-activation network with calibrated batch norm.

    Batch norm makes a branch independent of the size of the state, and He-normal weights give each of its entries
    variance about 1. So the variance of the state grows by 1 per block:
    `q_l = 1 / sqrt(v0 + l)`, `d_scaled = 2 (sqrt(v0 + L) - sqrt(v0))`, with v0 = 2 after a He-normal stem on
    standardised images.
    A He-normal 1x1 transition doubles it: `v0(s+1) = 2 (v0(s) + L_s)`. Zero padding, left out here, lowers the variance
    of the branch, the more so the smaller the images; +-25 % is a fair tolerance for 28x28 and 32x32.

    Args:
        lengths: Blocks of each section.

    Source: derived for P2's network (Hauser 2019, section 3); P2 itself shows no curves at initialisation.
    """
    variance, found = 2.0, []
    for length in lengths:
        steps = tuple(1 / math.sqrt(variance + k) for k in range(length))
        found.append(SectionTheory(variance, steps, 2 * (math.sqrt(variance + length) - math.sqrt(variance))))
        variance = 2 * (variance + length)
    return tuple(found)
