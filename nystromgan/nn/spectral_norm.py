"""Spectral normalisation of weights, in torch's places and under torch's names."""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from nystromgan import _check
from nystromgan.nn._pickle import make_picklable
from nystromgan.ops.power_iteration import normalize_by, power_iteration, spectral_normalize

Module = TypeVar("Module", bound=nn.Module)

INITIAL_ITERATIONS = 15  # torch's number
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class _Cached(NamedTuple):
    """A normalised weight, and what it was made of."""

    sources: tuple[Tensor, ...]
    versions: tuple[tuple[int, int], ...]
    value: Tensor


class SpectralNorm(nn.Module):
    """The parametrization that `spectral_norm` registers: weight -> weight / sigma, as torch's, with its buffers."""

    _u: Tensor
    _v: Tensor
    n_power_iterations: int
    ready: Tensor | None = None  # the weight that a grouped launch has normalised for the next access
    step: tuple[Tensor, Tensor, Tensor] | None = None  # sigma, u and v of a grouped step that the next forward uses
    divides_input = False  # whether its layer may use x / sigma and W in place of x and W / sigma
    _cached: _Cached | None = None

    def __init__(self, weight: Tensor, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12) -> None:
        super().__init__()
        _check.at_least("n_power_iterations", n_power_iterations, 1)
        if not -weight.ndim <= dim < weight.ndim:
            raise IndexError(f"dim must be between {-weight.ndim} and {weight.ndim - 1}, got {dim}")
        self.dim = dim % weight.ndim
        self.eps = eps
        self.n_power_iterations = n_power_iterations
        if weight.ndim > 1:
            with torch.no_grad():
                matrix = self.matrix(weight)
                for name, length in zip(("_u", "_v"), matrix.shape, strict=True):
                    start = matrix.new_empty(length).normal_()
                    self.register_buffer(name, functional.normalize(start, dim=0, eps=eps))
                if not weight.is_meta:
                    power_iteration([matrix], [self._u], [self._v], iterations=INITIAL_ITERATIONS, eps=eps)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 1:
            return functional.normalize(weight, dim=0, eps=self.eps)
        if weight.is_meta:
            return weight
        if self.ready is not None:
            ready, self.__dict__["ready"] = self.ready, None
            return ready
        # A weight that takes gradients is also written to through `.data`, by gradcheck for one, and no version tells.
        if self.training or torch.compiler.is_compiling() or (torch.is_grad_enabled() and weight.requires_grad):
            self._cached = None
            return self._normalized(weight)
        return self._recalled(weight)

    def train(self, mode: bool = True) -> "SpectralNorm":
        self._cached = None
        return super().train(mode)

    def matrix(self, weight: Tensor) -> Tensor:
        """(O, I): the weight with `dim` first and the others flattened."""
        return (weight.movedim(self.dim, 0) if self.dim else weight).flatten(1)

    def unmatrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrix`, contiguous."""
        if self.dim == 0:
            return matrix.view(shape)
        rest = [size for axis, size in enumerate(shape) if axis != self.dim]
        return matrix.unflatten(1, rest).movedim(0, self.dim).contiguous()

    def _normalized(self, weight: Tensor) -> Tensor:
        if self.step is not None:
            (sigma, u, v), self.step = self.step, None
            return self.unmatrix(normalize_by(self.matrix(weight), sigma, u, v), weight.shape)
        iterations = self.n_power_iterations if self.training else 0
        matrices = spectral_normalize([self.matrix(weight)], [self._u], [self._v], iterations=iterations, eps=self.eps)
        return self.unmatrix(matrices[0], weight.shape)

    def _recalled(self, weight: Tensor) -> Tensor:
        """The normalised weight of the last call, while nothing that it was made of has changed.

        A change shows as another tensor, another version or another place in memory. A write through `.data` shows as
        none of them; switching between train and eval, or a call with gradients, forgets the value.
        """
        sources = (weight, self._u, self._v)
        if any(tensor.is_inference() for tensor in sources):  # they have no versions
            return self._normalized(weight)
        versions = tuple((tensor._version, tensor.data_ptr()) for tensor in sources)
        cached = self._cached
        if cached and versions == cached.versions and all(map(_is, sources, cached.sources)):
            return cached.value
        with torch.inference_mode(False), torch.no_grad():  # the value may serve a call that tracks gradients
            value = self._normalized(weight)
        self._cached = _Cached(sources, versions, value)
        return value

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ready": None, "step": None, "_cached": None}

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eps={self.eps}"


def _is(one: object, other: object) -> bool:
    return one is other


def spectral_norm(
    module: Module, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> Module:
    """Divides a weight by its largest singular value, estimated by power iteration.

        W_sn = W / sigma,  sigma = u^T W v,  u <- W v / |W v|, v <- W^T u / |W^T u| at each access in training

    In the place of torch.nn.utils.parametrizations.spectral_norm: the same values and the same state dict.

    Args:
        module: changed in place.
        name: of the parameter. A vector is divided by its norm.
        n_power_iterations: steps at each access in training; eval makes none.
        eps: the smallest norm that u and v are divided by.
        dim: the axis of the outputs; 0, and 1 for transposed convolutions, unless given.

    Returns:
        The module.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, the rule and the value.

    Differentiable to any order in the weight, with u and v as constants. Where W takes no gradient,
    eval computes W_sn once and keeps it until W changes; writes through `.data` are seen at the next train() or eval().
    Source: Miyato et al., "Spectral normalization for generative adversarial networks", 2018, algorithm 1.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"name must be a parameter of {type(module).__name__}, got {name!r}")
    if dim is None:
        dim = int(isinstance(module, TRANSPOSED))
    parametrize.register_parametrization(module, name, SpectralNorm(weight, n_power_iterations, dim, eps))
    make_picklable(module)
    return module
