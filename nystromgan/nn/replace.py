"""Landmarks in an existing model."""

import importlib
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from nystromgan.nn.nystrom_attention import NystromAttention

Model = TypeVar("Model", bound=nn.Module)

# Attention of other libraries, and the module here that knows it. A model that holds one has imported its library.
CONVERTERS = {"timm.layers.attention.Attention": "nystromgan.integrations.timm"}


def replace_attention(model: Model, num_landmarks: int | Sequence[int] = 64, **options: Any) -> Model:
    """Puts landmarks in the place of every torch.nn.MultiheadAttention, and of timm's Attention, of a model.

    The parameters stay the very ones, so optimisers, checkpoints and tied weights stay as they are. A
    torch.nn.MultiheadAttention becomes a `NystromAttention` around them. Subclasses of both are left alone, and so are
    modules that only look like them.

    Args:
        model: changed in place. A torch.nn.MultiheadAttention itself gives a new module.
        num_landmarks: as for `NystromAttention`.
        options: grid, cluster_iterations, pinv_iterations, conv_kernel_size and backend, likewise.

    Returns:
        The model.

    Raises:
        ValueError: the model has no such module, or a torch.nn.MultiheadAttention with kdim, vdim, add_bias_kv,
            add_zero_attn or hooks; then nothing is changed.
    """
    names = {module: name for name, module in model.named_modules() if _is_attention(module)}
    if not names:
        wanted = "a torch.nn.MultiheadAttention or timm's Attention"
        raise ValueError(f"model must contain {wanted}, got {type(model).__name__} without one")
    for module, name in names.items():
        if isinstance(module, nn.MultiheadAttention):
            _check_replaceable(name or "model", module)
    new = {module: _converted(module, num_landmarks, options) for module in names}
    if model in new:
        return new[model]  # type: ignore[return-value]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False  # a nested tensor has no key_padding_mask
    return model


def _is_attention(module: nn.Module) -> bool:
    return type(module) is nn.MultiheadAttention or _qualified_name(module) in CONVERTERS


def _qualified_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _converted(module: nn.Module, num_landmarks: int | Sequence[int], options: dict[str, Any]) -> nn.Module:
    """The module with landmarks around the same parameters."""
    if isinstance(module, nn.MultiheadAttention):
        return _landmarks_of(module, num_landmarks, options)
    return importlib.import_module(CONVERTERS[_qualified_name(module)]).convert(module, num_landmarks, **options)


def _check_replaceable(name: str, module: nn.MultiheadAttention) -> None:
    """Raises for what a `NystromAttention` would leave out."""
    if not module._qkv_same_embed_dim:
        raise ValueError(
            f"{name} must have kdim and vdim equal to embed_dim {module.embed_dim}, got {module.kdim} and {module.vdim}"
        )
    for setting, present in (("add_bias_kv", module.bias_k is not None), ("add_zero_attn", module.add_zero_attn)):
        if present:
            raise ValueError(f"{name} must have {setting}=False, got {present}")
    hooks = [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]
    if any(hooks):
        raise ValueError(f"{name} must have no hooks, since they would be lost, got {sum(map(len, hooks))}")


def _landmarks_of(
    module: nn.MultiheadAttention, num_landmarks: int | Sequence[int], options: dict[str, Any]
) -> NystromAttention:
    """A `NystromAttention` around the module's own parameters."""
    weight = module.in_proj_weight
    new = NystromAttention(
        module.embed_dim,
        module.num_heads,
        num_landmarks=num_landmarks,
        bias=module.in_proj_bias is not None,
        dropout=module.dropout,
        batch_first=module.batch_first,
        device="meta",
        dtype=weight.dtype,
        **options,
    )
    if new.conv_weight is not None:
        new.conv_weight = nn.Parameter(weight.new_zeros(new.conv_weight.shape))
    new.in_proj_weight, new.in_proj_bias, new.out_proj = weight, module.in_proj_bias, module.out_proj
    return new.train(module.training)
