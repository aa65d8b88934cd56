"""Spectra: operator norms, certificates, singular values and spectral radii of linear maps given by their products."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from residuum.graphs import leaf, recorded

Map = Callable[[Tensor], Tensor]
_DENSE = 512  # entries of a map up to which a convolution is a dense matrix
Kind = Literal["estimate from below", "estimate", "exact", "upper bound"]

_LUCK = 1e-3  # how rarely a random start may be so far from the right vector that `Norm.error` is too small


@dataclass(frozen=True, eq=False)
class Norm:
    """The size of a linear map, and what kind of number it is.

    Attributes:
        value: One number, or one per example; nan where the map is not finite.
        kind: "estimate from below": not above the truth beyond rounding; "estimate": on either side of it; "exact": up
            to rounding in float64; "upper bound": not below the truth.
        residual: How far the vectors found are from true ones, in the unit of `value`: some singular value, not always
            the largest, is at most this far away. None if not iterated.
        error: The truth is at most this far above `value`, for all but 1 in 1000 random start vectors; usually much
            less. None if not known.
        products: Products of the map or its adjoint with a vector that it took.
    """

    value: Float[Tensor, "*example"]
    kind: Kind
    residual: Float[Tensor, "*example"] | None = None
    error: Float[Tensor, "*example"] | None = None
    products: int = 0


@dataclass(frozen=True, eq=False)
class Operator:
    """A linear map per example, known by its products only.

    Attributes:
        apply: v -> A v, all examples at once.
        adjoint: u -> A^T u.
        domain: A tensor of the shape, precision and device of v; its values do not matter.
    """

    apply: Map
    adjoint: Map
    domain: Float[Tensor, " example *state"]


def value_and_jacobian(f: Map, h: Float[Tensor, " example *state"]) -> tuple[Tensor, Operator]:
    """The value of a map at a state, detached, and its Jacobian, one per example; from one forward.

    `A^T u` is a backward pass; `A v` is the derivative of `A^T u` in u, which is linear in u (double backward). Only
    derivatives in the state are formed, parameters keep theirs. Attention runs in its plain form, the only one that
    can be differentiated twice. Below float32 the map is `widened`. It must treat examples independently, as blocks in
    eval mode do.
    """
    with recorded(), sdpa_kernel(SDPBackend.MATH):
        h = leaf(in_float32(h.detach()))
        out = widened(f)(h)
        u = torch.zeros_like(out, requires_grad=True)
        pulled = _pull(out, h, u, create_graph=True)
    there, back = (lambda v: _pull(pulled, u, v.to(h.dtype))), (lambda w: _pull(out, h, w.to(out.dtype)))
    return out.detach(), Operator(there, back, h.detach())


def in_float32(h: Tensor) -> Tensor:
    """A state of bfloat16 or float16 in float32; others as they are."""
    return h.float() if h.dtype in (torch.bfloat16, torch.float16) else h


def widened(f: Map) -> Map:
    """A map that does in float32 what it would do in bfloat16 or float16, with the weights that it has.

    The derivatives of a map that rounds to 3 digits at every step are known to 2 or 3 digits only, and a Krylov method
    on them measures the rounding. Nothing that the map has is copied or changed: tensors are converted where an
    operation reads or makes them, so what is written in place to a tensor that the map has made is not lost on a copy.
    """

    def wide(h: Tensor) -> Tensor:
        with _Wide():
            return f(h)

    return wide


class _Wide(TorchFunctionMode):
    """Operations read bfloat16 and float16 tensors as float32, and give float32 in their place."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _wide(function(*_wide(args), **{name: _wide(value) for name, value in (kwargs or {}).items()}))


def _wide(given: Any) -> Any:
    if isinstance(given, Tensor):
        return in_float32(given)
    return type(given)(map(_wide, given)) if type(given) in (tuple, list) else given


def _pull(out: Tensor, of: Tensor, weights: Tensor, *, create_graph: bool = False) -> Tensor:
    """Gradient of <out, weights>; zero where `out` does not depend on `of`."""
    if not out.requires_grad:
        return torch.zeros_like(of)
    keep = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(out, of, weights, **keep)[0]


def linear_part(module: nn.Module, size: tuple[int, ...] = ()) -> Operator:
    """A convolution on maps of a size (any stride, padding, groups), or a linear module, without bias; one example.

    Raises:
        ValueError: As `operator_norm`.
    """
    _check(module, size)
    width = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    bias = {} if module.bias is None else {"bias": torch.zeros_like(module.bias)}
    at = module.weight.new_zeros(1, width, *size)
    return value_and_jacobian(lambda v: functional_call(module, bias, (v,)), at)[1]


def operator_norm(
    module: nn.Module, size: tuple[int, ...] = (), *, tolerance: float = 1e-6, products: int = 200
) -> Norm:
    """The true operator norm `max |W x| / |x|` of a convolution on maps of a size, or of a linear module.

    An estimate from below for convolutions, exact for nn.Linear. Not the norm of the kernel reshaped to a matrix
    (torch's `spectral_norm`), which is up to the kernel size too small.

    Args:
        module: nn.Conv2d or nn.Linear.
        size: Rows and columns of the convolution's map; () for nn.Linear.
        tolerance: Residual relative to the value at which the iteration ends.
        products: Most vector products to spend; if they do not suffice the residual says so.

    Raises:
        ValueError: If the module is something else (also of a class whose forward is not torch's), its weight is
            complex, or limited in training mode, where each look changes it; if the size does not fit.

    Source: Golub & Kahan (1965); P0 (Lippl et al. 2024) limits this norm.
    """
    if isinstance(module, nn.Linear):
        _check(module, size)
        return Norm(torch.linalg.matrix_norm(module.weight.detach().double(), 2), "exact")
    found, _ = largest_singular_value(linear_part(module, size), products=products, tolerance=tolerance)
    return Norm(found.value[0], found.kind, found.residual[0], found.error[0], found.products)


def certificate(conv: nn.Conv2d, size: tuple[int, int]) -> Norm:
    """A guaranteed bound of a convolution's operator norm: the norm of the circular one on a larger map.

    `max over frequencies w of |K(w)|` with `K(w) = sum_k W[:, :, k] exp(-i w . dilation k)`, by FFT on a map of
    n + dilation (k - 1) rows and columns, in float64. On that map nothing wraps around, so the zero-padded convolution
    is a part of the circular one, whatever its padding and stride. On n itself it is no bound. Tight to a few percent
    on maps larger than a few kernels.

    Raises:
        ValueError: If the convolution pads otherwise, or the size is not two positive numbers.

    Source: Sedghi, Gupta & Long (2019) for the circular operator; the larger map is ours.
    """
    _check(conv, size)
    if conv.padding_mode != "zeros":
        raise ValueError(f"certificate: padding_mode is {conv.padding_mode!r}; the bound holds for 'zeros' only")
    weight = conv.weight.detach().double()
    out, inner, rows, columns = weight.shape
    down, right = conv.dilation
    spread = weight.new_zeros(out, inner, down * (rows - 1) + 1, right * (columns - 1) + 1)
    spread[..., ::down, ::right] = weight
    # A kernel of one row has the same spectrum at all vertical frequencies: one is enough.
    around = [n + extent - 1 if extent > 1 else 1 for n, extent in zip(size, spread.shape[2:], strict=True)]
    spectrum = torch.fft.rfft2(spread, s=around).unflatten(0, (conv.groups, -1))
    return Norm(torch.linalg.matrix_norm(spectrum.permute(0, 3, 4, 1, 2), 2).max(), "upper bound")


def guaranteed_norm(module: nn.Module, size: tuple[int, ...] = ()) -> Norm:
    """The operator norm of a convolution or linear module, or a bound of it: never below the truth beyond rounding.

    Exact for linear modules and for convolutions on maps of at most 512 entries, from the dense matrix: there the
    certificate is loose (up to 2.5 times on maps of 2x2), because such maps are mostly border. Otherwise `certificate`.

    Raises:
        ValueError: As `operator_norm` and `certificate`.
    """
    if isinstance(module, nn.Linear):
        return operator_norm(module)
    _check(module, size)
    entries = module.in_channels * size[0] * size[1]
    if entries > _DENSE or module.padding_mode != "zeros":
        return certificate(module, size)
    settings = (module.stride, module.padding, module.dilation, module.groups)
    units = torch.eye(entries, dtype=torch.float64, device=module.weight.device).view(-1, module.in_channels, *size)
    matrix = nn.functional.conv2d(units, module.weight.detach().double(), None, *settings).flatten(1)
    return Norm(torch.linalg.matrix_norm(matrix, 2), "exact")


def map_size(conv: nn.Conv2d, size: tuple[int, ...]) -> tuple[int, ...]:
    """Rows and columns of what a convolution makes of maps of a size."""
    return tuple(conv(conv.weight.new_zeros(1, conv.in_channels, *size)).shape[2:])


def batch_norm_norm(norm: nn.Module) -> Norm:
    """The norm of a batch norm's affine map in eval mode, `max_c |gamma_c| / sqrt(var_c + eps)`; exact.

    Refuses one without running variance, which is not an affine map, with a ValueError.
    """
    variance = getattr(norm, "running_var", None)
    if variance is None:
        raise ValueError(f"{type(norm).__name__} has no running variance, so it is not an affine map in eval mode")
    scale = 1 if norm.weight is None else norm.weight.detach().double().abs()
    return Norm((scale * (variance.double() + norm.eps).rsqrt()).max(), "exact")


def chain_bound(layers: Iterable[nn.Module], size: tuple[int, ...] = ()) -> Norm | None:
    """A Lipschitz bound of layers one after another in eval mode, or None where there is none.

    The product of guaranteed norms of convolutions, linear modules and batch norms in eval mode; what is 1-Lipschitz
    (ReLU, identity) may stand between them. None if there is a layer of another kind, or one whose output hooks can
    change.

    Args:
        layers: The modules in the order in which they are applied.
        size: Rows and columns of the maps that the first of them reads; () for vectors.
    """
    bound = torch.ones((), dtype=torch.float64)
    for layer in layers:
        hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
        moving = layer.training and is_parametrized(layer)  # reading its weight would change it
        known = not moving and all(getattr(hook, "only_looks", False) for hook in hooks)
        factor = _layer_bound(layer, size) if known else None
        if factor is None:
            return None
        bound = bound * factor.value.cpu()
        size = map_size(layer, size) if isinstance(layer, nn.Conv2d) else size
    return Norm(bound, "upper bound")


def _layer_bound(layer: nn.Module, size: tuple[int, ...]) -> Norm | None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        known = _works_as_torchs(layer) and getattr(layer, "padding_mode", "zeros") == "zeros"
        return guaranteed_norm(layer, size) if known else None
    if type(layer).forward is nn.BatchNorm2d.forward and not layer.training and layer.running_var is not None:
        return batch_norm_norm(layer)
    return Norm(torch.ones((), dtype=torch.float64), "exact") if type(layer) in (nn.ReLU, nn.Identity) else None


def largest_singular_value(
    operator: Operator,
    *,
    near: Float[Tensor, " example *state"] | None = None,
    products: int = 30,
    tolerance: float = 0.0,
    seed: int = 0,
) -> tuple[Norm, Tensor]:
    """The largest singular value per example, by Golub-Kahan-Lanczos with full reorthogonalisation.

    After k steps `A^T U = V B^T` with orthonormal columns, k of U and k + 1 of V, and B bidiagonal: the value s is the
    largest singular value of B, in float64. With its left vector p and u = U p the residual is `B[k, k+1] |p[k]|`, and
    `|A A^T u - s^2 u| <= residual |A|`: a singular value of A is at most the residual away from s, usually much less.
    Every example has the same start vector, so that a result does not depend on the rest of the batch. About
    `products` vectors are kept per example.

    What is missing depends on the gap between the largest singular values and on how much of the right vector the start
    has, not on precision: after 30 products a gap of 1 % leaves about 1e-3, and no start known beforehand does better.
    The error says how far: `q = p(A^T A) v` is the last vector of V, and p is known from B. Were the truth t above
    `value + error`, |p(t^2)| > 1/d, then v had less than d of t's vector; for a random v in n dimensions that has
    probability d sqrt(2n/pi), which is set to 1 in 1000.

    Args:
        operator: The map.
        near: Where its vector is expected, found without this seed; half as much of a random vector is added. None: a
            random vector alone.
        products: Most vector products to spend, at least 2; each step takes two.
        tolerance: Stop early when every example's residual is at most this part of its value.
        seed: Of the start vector.

    Returns:
        An estimate from below per example, and the unit vectors v where `|A v|` is about that.

    Source: Golub & Kahan (1965); Golub & Van Loan, Matrix Computations, 10.4; error: Hochstenbach (2013),
    Probabilistic upper bounds for the matrix two-norm.
    """
    _need("largest_singular_value", "products", products, 2)
    start = _start(operator, seed, near)
    steps = min(products // 2, start.shape[1])
    right, diagonal, above = _basis(start, steps + 1), [], []
    v = start
    for step in range(1, steps + 1):
        image = operator.apply(v.view_as(operator.domain))
        if step == 1:
            left = _basis(image.flatten(1), steps)
        u, alpha = _new_direction(image.flatten(1), left[:, : step - 1])
        left[:, step - 1] = u
        v, beta = _new_direction(operator.adjoint(u.view_as(image)).flatten(1).to(start), right[:, :step])
        right[:, step] = v
        diagonal, above = [*diagonal, alpha], [*above, beta]
        if tolerance and step % 5 == 0:
            value, residual, _ = _bidiagonal(diagonal, above)
            if (residual <= tolerance * value).all():
                break
    value, residual, weights = _bidiagonal(diagonal, above)
    # Of a start (near + random / 2) at length 1, at least a third of the random one's part is left.
    highest = _highest(diagonal, above, _LUCK * math.sqrt(math.pi / 2 / start.shape[1]) / (1 if near is None else 3))
    v = torch.bmm(weights.to(right)[:, None], right[:, : step + 1])[:, 0]
    error = (highest - value).clamp_min(0)
    return Norm(value, "estimate from below", residual, error, 2 * step), v.view_as(operator.domain)


def _bidiagonal(diagonal: list[Tensor], above: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Largest singular value of the k x (k + 1) bidiagonal matrices, the residual, and the right vector."""
    alpha, beta = torch.stack(diagonal, 1).double().cpu(), torch.stack(above, 1).double().cpu()
    known = (alpha + beta).isfinite().all(1)
    alpha, beta = alpha.nan_to_num(0, 0, 0), beta.nan_to_num(0, 0, 0)
    B = nn.functional.pad(torch.diag_embed(alpha), (0, 1)) + nn.functional.pad(torch.diag_embed(beta), (1, 0))
    p, values, q = torch.linalg.svd(B, full_matrices=False)
    residual = beta[:, -1] * p[:, -1, 0].abs()
    return values[:, 0].masked_fill(~known, torch.nan), residual.masked_fill(~known, torch.nan), q[:, 0]


def _highest(diagonal: list[Tensor], above: list[Tensor], part: float) -> Float[Tensor, " example"]:
    """The t where |p(t^2)| = 1 / part: no singular value is higher unless the start had less than `part` of its vector.

    `p(z) = prod_i (z - theta_i) / (alpha_i beta_i)`, theta the squared singular values of the square part of B.
    """
    alpha, beta = (torch.stack(entries, 1).double().cpu() for entries in (diagonal, above))
    known = (alpha + beta).isfinite().all(1)
    alpha, beta = alpha.nan_to_num(0, 0, 0), beta.nan_to_num(0, 0, 0)
    B = torch.diag_embed(alpha) + nn.functional.pad(torch.diag_embed(beta[:, :-1]), (1, 0, 0, 1))
    theta = torch.linalg.svdvals(B).square()
    level = (alpha * beta).log().sum(1) - math.log(part)  # -inf where nothing was left: the truth is found
    low, high = theta[:, 0], theta[:, 0] + (level / len(diagonal)).exp()  # |p(z)| >= (z - theta_1)^k / prod
    for _ in range(60):
        middle = (low + high) / 2
        above_it = (middle[:, None] - theta).log().sum(1) > level
        low, high = torch.where(above_it, low, middle), torch.where(above_it, middle, high)
    return high.sqrt().masked_fill(~known, torch.nan)


def spectral_radius(operator: Operator, *, products: int = 30, seed: int = 0) -> Norm:
    """The largest absolute eigenvalue per example, by Arnoldi's method on the adjoint, which has the same ones.

    `A^T Q = Q H + eta q e^T` with Q orthonormal and H small; the value is the largest `|theta|` of H's eigenvalues, in
    float64, and with its eigenvector y the residual is `eta |y_last| / |y|`: theta is an eigenvalue of a map that is
    so close to A. For maps far from normal it may still be far from one of A.

    Args:
        operator: A map from a state to a state of the same shape.
        products: Vector products to spend, at least 1.
        seed: Of the start vector.

    Source: Arnoldi (1951); Saad, Numerical Methods for Large Eigenvalue Problems, 6.2.
    """
    _need("spectral_radius", "products", products, 1)
    q = _start(operator, seed)
    steps = min(products, q.shape[1])
    basis = _basis(q, steps + 1)
    H = torch.zeros(len(q), steps + 1, steps, dtype=torch.float64)
    for j in range(steps):
        w = operator.adjoint(q.view_as(operator.domain)).flatten(1).to(q)
        q, size = _new_direction(w, basis[:, : j + 1])
        basis[:, j + 1] = q
        H[:, : j + 1, j] = torch.bmm(basis[:, : j + 1], w[:, :, None])[:, :, 0].double().cpu()
        H[:, j + 1, j] = size.double().cpu()
    known = H.isfinite().all((1, 2))
    H = H.nan_to_num(0, 0, 0)
    values, vectors = torch.linalg.eig(H[:, :-1])
    top = values.abs().argmax(1)
    value, y = values.abs().gather(1, top[:, None])[:, 0], vectors[torch.arange(len(H)), :, top]
    residual = H[:, -1, -1] * y[:, -1].abs() / torch.linalg.vector_norm(y, dim=1)
    value, residual = (found.masked_fill(~known, torch.nan) for found in (value, residual))
    return Norm(value, "estimate", residual, products=steps)


def _start(operator: Operator, seed: int, near: Tensor | None = None) -> Float[Tensor, "example n"]:
    """The same random unit vector for every example, or half of it added to given ones, in float32 at least."""
    like = operator.domain
    one = torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wide = torch.promote_types(like.dtype, torch.float32)
    start = (one / one.norm()).to(like.device, wide).flatten().repeat(len(like), 1)
    return start if near is None else _unit(_unit(near.flatten(1).to(wide))[0] + start / 2)[0]


def _basis(first: Float[Tensor, "example n"], count: int) -> Float[Tensor, "example {count} n"]:
    """Room for so many vectors; the first is given."""
    room = first.new_empty(len(first), count, first.shape[1])
    room[:, 0] = first
    return room


def _new_direction(
    w: Float[Tensor, "example n"], basis: Float[Tensor, "example k n"]
) -> tuple[Float[Tensor, "example n"], Float[Tensor, " example"]]:
    """The part of w that is orthogonal to the basis, as a unit vector and its length; 0 where only rounding is left."""
    before = torch.linalg.vector_norm(w, dim=1)
    for _ in range(2):  # once leaves a part of the size of the rounding errors, twice is enough (Giraud et al. 2005)
        w = torch.baddbmm(w[:, None], torch.bmm(w[:, None], basis.mT), basis, alpha=-1)[:, 0]
    unit, size = _unit(w)
    gone = size <= 32 * torch.finfo(w.dtype).eps * before
    return unit.masked_fill(gone[:, None], 0), size.masked_fill(gone, 0)


def _unit(w: Float[Tensor, " example *state"]) -> tuple[Float[Tensor, " example *state"], Float[Tensor, " example"]]:
    """w at length 1 and its length; 0 stays 0."""
    size = torch.linalg.vector_norm(w, dim=tuple(range(1, w.ndim)), keepdim=True)
    return w / size.masked_fill(size == 0, 1), size.flatten()


def _need(what: str, name: str, given: int, least: int) -> None:
    if given < least:
        raise ValueError(f"{what}: {name} is {given}; at least {least} is needed")


def _works_as_torchs(module: nn.Conv2d | nn.Linear) -> bool:
    """Whether a module does with its weight what torch's own class does; a derived class may do something else."""
    kind = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    names = ("forward", "_conv_forward") if kind is nn.Conv2d else ("forward",)
    return all(getattr(getattr(module, name), "__func__", None) is getattr(kind, name) for name in names)


def _check(module: nn.Module, size: tuple[int, ...]) -> None:
    if not isinstance(module, nn.Conv2d | nn.Linear):
        raise ValueError(f"norms are for nn.Conv2d and nn.Linear, given {type(module).__name__}")
    if not _works_as_torchs(module):
        raise ValueError(
            f"norms are for nn.Conv2d and nn.Linear with torch's own forward; {type(module).__name__} has another, so "
            "the norm of its weight says nothing about it"
        )
    for name, chain in module.parametrizations.items() if is_parametrized(module) else ():
        if chain.training and next(chain.buffers(), None) is not None:
            raise ValueError(f"norms: each look at a limited {name} in training mode changes it; use eval()")
    if module.weight.is_complex():
        raise ValueError(f"norms are for real weights; those of this {type(module).__name__} are complex")
    needed = 2 if isinstance(module, nn.Conv2d) else 0
    if len(size) != needed or min(size, default=1) < 1:
        what = "rows and columns of the map, such as (28, 28)" if needed else "()"
        raise ValueError(f"{type(module).__name__} needs as size {what}; given {size}")
