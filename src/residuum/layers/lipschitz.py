"""Lipschitz limits: convolutions and linear maps whose true operator norm does not exceed a bound."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from residuum.copies import copied
from residuum.layers.sharing import BATCH_NORMS
from residuum.names import unknown
from residuum.spectra import Operator, guaranteed_norm, largest_singular_value, operator_norm

Settings = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # stride, padding, dilation, groups
_TOLERANCE, _PRODUCTS = 1e-4, 400  # in eval mode: relative residual of the norm, most products to reach it
_LEAST = 30  # products at least: near a vector that was the largest's, its residual is soon small and tells nothing


@dataclass(frozen=True)
class Limit:
    """The Lipschitz limit of the branches of all residual blocks of a network.

    Attributes:
        bound: c: with two convolutions each is limited to sqrt(c) on maps of the section's size.
        size: Rows and columns of the images.
        norm: "clipped": batch norm's affine map is limited to 1, so the branch has the bound c. "allowed": batch norm
            is left alone, so there is no bound on the branch. Networks without norm have neither.

    Source: P0 (Lippl et al. 2024), Lipschitz constraint; what became of batch norm could not be read.
    """

    bound: float = 1.0
    size: int = 32
    norm: str = "clipped"

    def __post_init__(self) -> None:
        if not 0 < self.bound < float("inf") or self.size < 1:
            raise ValueError(f"limit: bound is {self.bound} and size {self.size}; they must be above 0")
        if self.norm not in ("clipped", "allowed"):
            raise unknown("norm", self.norm, ("clipped", "allowed"))


def limit_(module: nn.Module, bound: float, size: tuple[int, int] | tuple[()] = ()) -> None:
    """Limit the true operator norm of a convolution or linear module: `W / max(1, sigma(W) / bound)`.

    sigma is the norm `max |W x| / |x|` of the module as it works: on maps of that size, with its stride, padding,
    dilation and groups. (torch's `spectral_norm` limits the kernel reshaped to a matrix: what it normalises to 1 has a
    true norm of 1.5 to 3.) In training mode sigma follows the weights by one product of the power iteration a forward,
    `v = W^T u / |W^T u|` and `u = W v / |W v|` in turn, under `parametrize.cached()`, as in `train`, also where the
    module is applied several times; so the norm can exceed the bound a little (`limits` says by how much). In eval mode
    the first use after a change of the weights converges sigma to a residual of 1e-4; after that the norm is at most
    1.005 times the bound, unless a random start vector is very unlucky, and within 0.005 of it where the limit is
    active. A guaranteed bound is what `export` writes.

    The gradient is that of `<u, W v>` with the singular vectors u and v held constant. The state of the iteration is
    saved with the model.

    Args:
        module: nn.Conv2d with zero padding, or nn.Linear; changed in place.
        bound: Largest norm, above 0.
        size: Rows and columns of the map that the convolution reads; () for nn.Linear.

    Raises:
        ValueError: If the module is something else (also of a class whose forward is not torch's), its weight is
            limited or parametrized already, or it pads otherwise; if the bound is not above 0 or the size does not fit;
            when it runs, if a map is larger.

    Source: P0 (Lippl et al. 2024), Lipschitz constraint; mechanics after Gouk et al. (2018) and Behrmann et al. (2019),
    with the norm of the operator in place of that of the kernel.
    """
    attach_(module, limit_of(module, bound, size))


def limit_of(module: nn.Module, bound: float, size: tuple[int, int] | tuple[()] = ()) -> "Limited":
    """The limit that `limit_` puts on a module, which is not changed; refuses what it refuses."""
    if not 0 < bound < float("inf"):
        raise ValueError(f"the bound of a limit is {bound}; it must be above 0")
    _check_plain(module)
    return Limited(module, bound, size)


def attach_(module: nn.Module, limit: "Limited") -> None:
    """Put a limit that was made for it on a module."""
    parametrize.register_parametrization(module, "weight", limit)
    if limit.size:
        hook = partial(_refuse_larger, limit.size)
        hook.only_looks = True  # so that a chain with it still has a bound
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _check_plain(module: nn.Module) -> None:
    if parametrize.is_parametrized(module, "weight"):
        raise ValueError(
            f"this {type(module).__name__} is limited already, or its weight is parametrized otherwise; export the "
            "network, or remove the parametrization, first"
        )


class Limited(nn.Module):
    """The limit of one module's weight, as a torch parametrization; see `limit_`.

    Args:
        module: nn.Conv2d or nn.Linear.
        bound: Largest norm.
        size: Rows and columns of the map that the convolution reads; () for nn.Linear.
    """

    def __init__(self, module: nn.Module, bound: float, size: tuple[int, int] | tuple[()]) -> None:
        super().__init__()
        self.bound, self.size = bound, tuple(size)
        self.settings = _settings(module) if isinstance(module, nn.Conv2d) else None
        try:
            norm = operator_norm(module, self.size, products=2).value  # refuses modules of other kinds
        except RuntimeError as error:
            raise ValueError(f"{module} does not run on maps of size {self.size}: {error}") from error
        width = module.in_features if self.settings is None else module.in_channels
        v = torch.randn(1, width, *self.size, generator=torch.Generator().manual_seed(0)).to(module.weight)
        image = self._image(module.weight.detach(), v)
        u = torch.randn(image.shape, generator=torch.Generator().manual_seed(1)).to(image)
        self.register_buffer("v", _unit(v, v))
        self.register_buffer("u", _unit(u, u))
        self.register_buffer("sigma", norm.to(v))
        self.register_buffer("overshoot", torch.ones_like(self.sigma))
        self.register_buffer("turn", torch.zeros((), dtype=torch.bool))  # whether u is the next to be renewed
        # Of the weight for which sigma has converged; 0 in training mode.
        self.register_buffer("checksum", torch.zeros((), dtype=torch.int64))
        self._converge(module.weight)

    def forward(self, weight: Float[Tensor, "out inner *kernel"]) -> Float[Tensor, "out inner *kernel"]:
        """The weight within the limit."""
        if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(weight.device.type):
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                self._update(weight.detach())
        else:
            self._update(weight.detach())
        scale = float(self.sigma) / self.bound
        # A view with the same strides: `view_as` would lose the layout of one channel, whose derivatives are slow then.
        return _Scaled.apply(weight, scale, self) if scale > 1 else weight.expand_as(weight)

    def _update(self, weight: Tensor) -> None:
        """Sigma and its vectors for this weight, known to need no gradient: half a step of power iteration in training.

        After either half sigma is <u, W v>. On one image calls cost as much as their arithmetic, hence few of them, and
        not by attributes of the module.
        """
        buffers = self._buffers
        if self.training:
            renewed = "u" if buffers["turn"] else "v"
            found = self._image(weight, buffers["v"]) if renewed == "u" else self._adjoint(weight, buffers["u"])
            sigma = torch.linalg.vector_norm(found)
            if float(sigma) > 0:  # else the vectors stay, so that the iteration can go on from them
                # Replaced, not written to: a gradient that is still to come is that of the vectors that were used.
                buffers[renewed] = found.div_(sigma)
            buffers["sigma"] = sigma
            buffers["turn"].logical_not_()
            buffers["checksum"].zero_()
        elif self.checksum != _checksum(weight):
            trained, allowed = not self.checksum, self.sigma.clamp_min(self.bound)
            self._converge(weight)
            self.overshoot = self.sigma / allowed if trained else self.overshoot

    def _converge(self, weight: Tensor) -> None:
        weight = weight.detach()
        operator = Operator(
            lambda v: self._image(weight, v.to(weight)), lambda u: self._adjoint(weight, u.to(weight)), self.v
        )
        found, v = largest_singular_value(operator, near=self.v, products=_LEAST)
        if found.residual[0] > _TOLERANCE * found.value[0]:
            found, v = largest_singular_value(operator, near=v, products=_PRODUCTS, tolerance=_TOLERANCE)
        self.v, self.sigma = v.to(weight), found.value[0].to(weight)
        self.u = _unit(self._image(weight, self.v), self.u)
        self.checksum = _checksum(weight)

    def _image(self, weight: Tensor, v: Tensor) -> Tensor:
        return F.linear(v, weight) if self.settings is None else F.conv2d(v, weight, None, *self.settings)

    def _adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        return u @ weight if self.settings is None else _backward(u, self.v, weight, self.settings, of_weight=False)


class _Scaled(torch.autograd.Function):
    """`W / scale` for scale = sigma / bound, with the derivative of sigma = <u, W v>."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: float, limit: Limited) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.scale, ctx.bound, ctx.settings = scale, limit.bound, limit.settings
        ctx.u, ctx.v = limit._buffers["u"], limit._buffers["v"]
        return weight / scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,), v, settings = ctx.saved_tensors, ctx.v, ctx.settings
        u = ctx.u * ((gradient * weight).sum() * (-1 / (ctx.scale**2 * ctx.bound)))
        of_sigma = u.mT @ v if settings is None else _backward(u, v, weight, settings, of_weight=True)
        return of_sigma.add_(gradient, alpha=1 / ctx.scale), None, None


def _backward(u: Tensor, v: Tensor, weight: Tensor, settings: Settings, *, of_weight: bool) -> Tensor:
    """Derivative of `<u, W v>` for a convolution W, in the weight or in v."""
    stride, padding, dilation, groups = settings
    mask = (not of_weight, of_weight, False)
    found = torch.ops.aten.convolution_backward(
        u, v, weight, None, stride, padding, dilation, False, (0, 0), groups, mask
    )
    return found[of_weight]


class Clipped(nn.Module):
    """The scale of a batch norm, clipped so that its affine map in eval mode has a norm of at most a bound.

    `gamma_c min(1, bound sqrt(var_c + eps) / |gamma_c|)` with the running variance, also in training mode. The norm of
    the map is its largest factor, so only channels above the bound are made smaller. One common factor for all channels
    would hold the same bound, but follow the least varying channel from step to step, and train far worse. The gradient
    takes the factor `min(..)` as constant, so a clipped scale goes on learning where its exact derivative is 0.

    Args:
        norm: The batch norm whose scale it is.
        bound: Largest norm.

    Source: P0 (Lippl et al. 2024) limits residual blocks; how it treats batch norm could not be read. Ours.
    """

    def __init__(self, norm: nn.Module, bound: float) -> None:
        super().__init__()
        self.bound, self.of = bound, (norm,)  # in a tuple: the norm is the parent, not a part

    def forward(self, gamma: Float[Tensor, " channel"]) -> Float[Tensor, " channel"]:
        """The scale within the limit."""
        (norm,) = self.of
        factors = gamma.detach().abs() * (norm.running_var + norm.eps).rsqrt()
        return gamma * (self.bound / factors.clamp_min(1e-12)).clamp_max(1)


def clip_(norm: nn.Module, bound: float = 1.0) -> None:
    """Clip the scale of a batch norm, so that its map in eval mode has a norm of at most a bound; see `Clipped`.

    Raises:
        ValueError: If it has no scale or no running variance, the scale is clipped or parametrized already, or the
            bound is not above 0.
    """
    if not 0 < bound < float("inf"):
        raise ValueError(f"the bound of a limit is {bound}; it must be above 0")
    if not isinstance(norm, BATCH_NORMS) or norm.running_var is None or norm.weight is None:
        raise ValueError(f"clip_ needs a batch norm with scale and running variance, given {norm}")
    _check_plain(norm)
    parametrize.register_parametrization(norm, "weight", Clipped(norm, bound))


def limits(model: nn.Module) -> dict[str, dict[str, float | bool]]:
    """What the limits in a model come to, by module name.

    Args:
        model: A model in eval mode.

    Returns:
        Of each limited module: "bound"; "norm", its true operator norm as it works now (of convolutions an estimate
        from below to 1e-4); "active", whether the weights had to be made smaller; "overshoot", the norm that it had in
        training mode just before it was converged, relative to the bound.

    Raises:
        ValueError: If the model or a limited part of it is in training mode, or a limited weight has been parametrized
            once more.
    """
    _check_eval("limits", model)
    found = {}
    for name, module in model.named_modules():
        limit = _limit(module)
        if limit is None:
            continue
        with torch.no_grad():
            weight = module.weight  # converges sigma, if that is still to be done
        plain = _plain(module, weight)
        value = operator_norm(plain, limit.size, tolerance=1e-4, products=_PRODUCTS).value
        found[name] = {
            "bound": limit.bound,
            "norm": float(value),
            "active": bool(limit.sigma > limit.bound),
            "overshoot": float(limit.overshoot),
        }
    return found


def overshoot(model: nn.Module) -> float | None:
    """The largest norm over its bound that limited modules had when training mode ended; None if none is limited.

    Args:
        model: A model in eval mode that has run since.
    """
    found = [float(limit.overshoot) for limit in map(_limit, model.modules()) if limit is not None]
    return max(found, default=None)


def export(model: nn.Module) -> nn.Module:
    """A copy with plain weights, that holds its bounds strictly and that stock torch layers load.

    Every limited weight is divided by its `guaranteed_norm` over the bound where
    that is above 1, so it can be a few percent smaller than in the model; every clipped scale is written as it works.

    Args:
        model: A model in eval mode; it is left as it is. To save a copy of a `ResNet` as a run, also take the limit out
            of its configuration: `copy.config = replace(copy.config, limit=None)`.

    Raises:
        ValueError: If the model or a limited part of it is in training mode, or a limited weight has been parametrized
            once more.
    """
    _check_eval("export", model)
    model = copied(model)
    for module in list(model.modules()):
        limit = _limit(module)
        if limit is not None:
            _make_plain_(module)
            _scale_to_(module, limit)
        elif parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], Clipped):
            _make_plain_(module)
    return model


def _check_eval(what: str, model: nn.Module) -> None:
    """Refuse a model in training mode, also where a limited part alone is."""
    for name, module in model.named_modules():
        if module.training and (module is model or _limit(module) is not None):
            raise ValueError(
                f"{what} needs model.eval(): {name or type(model).__name__} is in training mode, where norms are still "
                "followed, not converged"
            )


def _make_plain_(module: nn.Module) -> None:
    """Put the weight as it works in place of the parametrized one, and whatever else is parametrized there.

    Not by torch's `remove_parametrizations`: it takes the weight from the module's class, which a deep copy shares with
    its original, so that the original would break.
    """
    plain = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    learned = {name: [p.requires_grad for p in chain.parameters()] for name, chain in module.parametrizations.items()}
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, value in plain.items():
        if learned[name]:
            setattr(module, name, nn.Parameter(value, any(learned[name])))
        else:
            module.register_buffer(name, value)
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "func", None) is _refuse_larger]:
        del hooks[key], module._forward_pre_hooks_with_kwargs[key]


def _scale_to_(module: nn.Module, limit: Limited) -> None:
    """Make a plain weight so small that its guaranteed norm is within the bound, rounding included."""
    for _ in range(2):  # the second round takes care of rounding in the first
        scale = float(limit.bound / guaranteed_norm(module, limit.size).value)
        if scale < 1:
            with torch.no_grad():
                module.weight.mul_(scale * (1 - 2 * torch.finfo(module.weight.dtype).eps))


def _refuse_larger(limited: tuple[int, int], module: nn.Module, given: tuple, named: dict[str, Any]) -> None:
    """A norm on larger maps can be above the bound; on smaller ones it cannot."""
    *_, rows, columns = (*given, *named.values())[0].shape
    if rows > limited[0] or columns > limited[1]:
        raise ValueError(
            f"this convolution is limited on maps of size {limited}, given one of {(rows, columns)}; limit it on that"
        )


def _limit(module: nn.Module) -> Limited | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    first, *others = module.parametrizations.weight
    if isinstance(first, Limited) and others:
        raise ValueError(
            f"a limit is followed by {type(others[0]).__name__} on the same weight of {type(module).__name__}, so its "
            "bound does not hold; leave out one of them"
        )
    return first if isinstance(first, Limited) else None


def _plain(module: nn.Module, weight: Tensor) -> nn.Module:
    """A stock module with that weight and no bias."""
    if isinstance(module, nn.Linear):
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    else:
        settings = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        plain = nn.Conv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            groups=module.groups,
            padding_mode=module.padding_mode,
            bias=False,
            device="meta",
            **settings,
        )
    plain.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return plain


def _settings(conv: nn.Conv2d) -> Settings:
    """Stride, padding, dilation and groups as numbers."""
    if conv.padding_mode != "zeros":
        raise ValueError(f"limit_: padding_mode is {conv.padding_mode!r}; only 'zeros' has a certificate")
    around = conv._reversed_padding_repeated_twice  # (left, right, top, bottom), also of "same" and "valid"
    if around[0] != around[1] or around[2] != around[3]:
        raise ValueError(f"limit_: the padding {conv.padding!r} of an even kernel is uneven; give numbers")
    return conv.stride, (around[2], around[0]), conv.dilation, conv.groups


def _checksum(weight: Tensor) -> Tensor:
    """The bits of the weight's Euclidean distance from a ramp: an integer.

    No change of precision or layout touches it. The norm itself would not see that entries change signs or places.
    """
    entries = weight.detach().contiguous().double().flatten()
    ramp = torch.linspace(1, 2, len(entries), dtype=torch.float64, device=weight.device)
    return torch.linalg.vector_norm(entries - ramp).view(torch.int64)


def _unit(v: Tensor, otherwise: Tensor) -> Tensor:
    """v at length 1; something else where v is 0, so that an iteration can go on from it."""
    size = torch.linalg.vector_norm(v)
    return torch.where(size > 0, v / size, otherwise)
