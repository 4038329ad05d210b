"""Every spectral norm of a model in one grouped launch, and what moves between torch's two forms of it."""

import collections
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm as LegacyHook

from nystromgan.nn._pickle import make_picklable
from nystromgan.nn._scaled_input import PLAIN, scaled_input
from nystromgan.nn.spectral_norm import SpectralNorm
from nystromgan.ops.power_iteration import power_iteration, power_iteration_step, spectral_normalize

Model = TypeVar("Model", bound=nn.Module)
Site = tuple[nn.Module, Any, Tensor]  # a module, its parametrization or hook, and the weight before normalisation

BUFFERS = ("_u", "_v")
SMALL = 2**19  # elements: dividing them takes 0.09 ms, no more than the call that divides a weight of 128 x 1152


class FusedLegacyHook(LegacyHook):
    """torch.nn.utils.spectral_norm's hook, which takes the weight that a grouped launch has normalised."""

    ready: Tensor | None = None

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        if self.ready is not None:
            ready, self.ready = self.ready, None
            return ready
        weight = getattr(module, f"{self.name}_orig")
        iterations = self.n_power_iterations if do_power_iteration else 0
        return _normalized_legacy([(module, self, weight)], iterations, self.eps)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ready": None}


def fuse_spectral_norm(model: Model) -> Model:
    """Updates every spectral norm of a model by one grouped launch at the start of each training forward.

    Takes `spectral_norm` of this package, torch.nn.utils.parametrizations.spectral_norm and the older
    torch.nn.utils.spectral_norm. State dict, values and derivatives stay as they are. A weight that a forward uses a
    second time takes another step of its own, as with torch; one that it does not use takes its step too, where torch
    takes none. On the CPU a linear layer or convolution gets x / sigma, where x is small, in place of W / sigma, and
    hooks on it see that input.

    Args:
        model: changed in place; its forward is what updates. Fusing it again changes nothing.

    Returns:
        The model.

    Raises:
        ValueError: the model has no spectral norm.
    """
    for module in model.modules():
        _adopt(module)
    if not any(_sites(model)):
        raise ValueError(f"model must contain a spectral norm, got {type(model).__name__} without one")
    for module in model.modules():
        if _is_plain(module) and _scale not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_scale)
            module.parametrizations.weight[0].divides_input = True  # type: ignore[index, union-attr]
    if _normalize_all not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_normalize_all)
        model.register_forward_hook(_forget, always_call=True)
    return model


def spectral_norm_buffers(model: nn.Module) -> set[str]:
    """The names in the state dict of every u and v, in any of the three forms.

    An average of weights must copy them from the trained model: the mean of unit vectors is no unit vector.
    """
    names = set()
    for prefix, module in model.named_modules():
        path = f"{prefix}." if prefix else ""
        if isinstance(module, (SpectralNorm, parametrizations._SpectralNorm)):
            names |= {f"{path}{buffer}" for buffer in BUFFERS if buffer in module._buffers}
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, LegacyHook):
                names |= {f"{path}{hook.name}{buffer}" for buffer in BUFFERS}
    return names


def convert_legacy_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of torch.nn.utils.spectral_norm in the names of `spectral_norm` and torch's parametrization.

    `weight_orig`, `weight_u` and `weight_v` become `parametrizations.weight.original`, `....0._u` and `....0._v`; other
    entries stay. Eval gives the same weights; in training the legacy form updates v before u, so its sigma is half a
    step ahead.

    Raises:
        ValueError: a `weight_orig` has no u or v, as before torch 1.0.
    """
    converted = dict(state_dict)
    for key in state_dict:
        stem = key.removesuffix("_orig")
        if stem == key:
            continue
        for suffix in BUFFERS:
            if stem + suffix not in state_dict:
                raise ValueError(f"state_dict must have {stem}{suffix} beside {key}, got none")
        path, _, name = stem.rpartition(".")
        prefix = f"{path}.parametrizations.{name}" if path else f"parametrizations.{name}"
        converted[f"{prefix}.original"] = converted.pop(key)
        for suffix in BUFFERS:
            converted[f"{prefix}.0.{suffix}"] = converted.pop(stem + suffix)
    return converted


def _adopt(module: nn.Module) -> None:
    """Puts this package's classes in the place of torch's spectral norms of one module, around the same buffers."""
    for chain in getattr(module, "parametrizations", {}).values():
        for i, parametrization in enumerate(chain):
            if type(parametrization) is parametrizations._SpectralNorm:
                chain[i] = _recast(parametrization, SpectralNorm)
                make_picklable(module)
    for key, hook in module._forward_pre_hooks.items():
        if type(hook) is LegacyHook:
            module._forward_pre_hooks[key] = _recast(hook, FusedLegacyHook)


def _recast(source: Any, target: type) -> Any:
    """An instance of `target` with the attributes of `source`."""
    instance: Any = object.__new__(target)
    instance.__dict__.update(source.__dict__)
    return instance


def _sites(model: nn.Module) -> Iterator[Site]:
    for module in model.modules():
        if "parametrizations" in module._modules:
            chains: Any = module.parametrizations
            for chain in chains.values():
                if isinstance(chain[0], SpectralNorm):
                    yield chain[0], chain[0], chain.original
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, FusedLegacyHook):
                yield module, hook, getattr(module, f"{hook.name}_orig")


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is one of torch's layers that are linear in the weight, with spectral norm as its one change."""
    if "parametrizations" not in module._modules or type(module).__mro__[1] not in PLAIN:
        return False
    chains: Any = module.parametrizations
    return list(chains) == ["weight"] and len(chains.weight) == 1 and isinstance(chains.weight[0], SpectralNorm)


def _normalize_all(model: nn.Module, arguments: Any) -> None:
    """Before a forward: normalises every weight in training, in one launch for those with the same settings."""
    groups = collections.defaultdict(list)
    for site in _sites(model):
        module, norm, weight = site
        # A sharded weight is whole only inside the forward of its own module, and is normalised there.
        if module.training and weight.ndim > 1 and norm.ready is None and type(weight) in (Tensor, nn.Parameter):
            method = _method(norm, weight)
            groups[method, norm.n_power_iterations, norm.eps, weight.dtype, weight.device].append(site)
    for (method, iterations, eps, *_), sites in groups.items():
        method(sites, iterations, eps)
    model.__dict__["_awaiting"] = [norm for sites in groups.values() for _, norm, _ in sites]


def _method(norm: Any, weight: Tensor) -> Callable[[list[Site], int, float], None]:
    if isinstance(norm, FusedLegacyHook):
        return _normalize_legacy
    # Of bfloat16 the gradient's sum over the input would lose what sums over a weight in float32 keep.
    suits = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
    plain = not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
    plain = plain and not torch._C._are_functorch_transforms_active()
    return _step if norm.divides_input and suits and plain else _normalize


def _normalize(sites: list[Site], iterations: int, eps: float) -> None:
    matrices = [norm.matrix(weight) for _, norm, weight in sites]
    u, v = [norm._u for _, norm, _ in sites], [norm._v for _, norm, _ in sites]
    values = spectral_normalize(matrices, u, v, iterations=iterations, eps=eps)
    for (_, norm, weight), value in zip(sites, values, strict=True):
        norm.ready = norm.unmatrix(value, weight.shape)


def _step(sites: list[Site], iterations: int, eps: float) -> None:
    """A step of every matrix; each weight's own forward then divides what is smaller, its input or the weight.

    Dividing 56 MB of weights before a forward writes them past the cache and reads them again: 9 ms of a 20-layer
    discriminator's forward, and 5 with the inputs divided (batch 1, 2 cores).
    """
    matrices = [norm.matrix(weight) for _, norm, weight in sites]
    u, v = [norm._u for _, norm, _ in sites], [norm._v for _, norm, _ in sites]
    steps = power_iteration_step(matrices, u, v, iterations=iterations, eps=eps)
    for (_, norm, _), step in zip(sites, steps, strict=True):
        norm.__dict__["step"] = step


def _scale(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Before a layer's forward: divides its input by the sigma of the step that awaits it, if that is less work."""
    chain: Any = module._modules["parametrizations"]._modules["weight"]  # type: ignore[union-attr]
    norm, weight = chain._modules["0"], chain.original
    x = arguments[0] if arguments else None
    if norm.step is None or not isinstance(x, Tensor) or x.dtype != weight.dtype:
        return None
    if x.numel() > max(weight.numel(), SMALL) or torch.is_autocast_enabled("cpu"):
        return None
    # A network's input needs no gradient; for sigma's the first layer, often the widest, would have to find it.
    if torch.is_grad_enabled() and weight.requires_grad and not x.requires_grad:
        return None
    # Past nn.Module's own __setattr__, which takes longer than a division.
    step, norm.__dict__["step"] = norm.step, None
    if torch.is_grad_enabled():
        sigma, u, v = step
        x, weight = scaled_input(x, weight, sigma, u, v, norm.dim)
    else:
        x, weight = x / step[0], weight.detach()
    norm.__dict__["ready"] = weight
    return (x, *arguments[1:])


def _normalize_legacy(sites: list[Site], iterations: int, eps: float) -> None:
    for (_, hook, _), value in zip(sites, _normalized_legacy(sites, iterations, eps), strict=True):
        hook.ready = value


def _normalized_legacy(sites: list[Site], iterations: int, eps: float) -> list[Tensor]:
    """The older form updates v before u: the same steps on the transposed matrix, with u and v exchanged."""
    matrices = [hook.reshape_weight_to_matrix(weight).mT for _, hook, weight in sites]
    u, v = ([getattr(module, hook.name + suffix) for module, hook, _ in sites] for suffix in BUFFERS)
    sigma = power_iteration(matrices, v, u, iterations=iterations, eps=eps)
    return [weight / scale.to(weight.dtype) for (_, _, weight), scale in zip(sites, sigma.unbind(), strict=True)]


def _forget(model: nn.Module, arguments: Any, output: Any) -> None:
    """After a forward: drops what it did not use, which the next change of weights makes stale."""
    for norm in model.__dict__.pop("_awaiting", ()):
        norm.__dict__.update(ready=None, step=None)
