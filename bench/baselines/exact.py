"""Exact attention by each of torch's fused kernels, FlexAttention and the optional packages that are installed.

Every form takes tokens query (B, H, N, D), key (B, H, S, D) and value (B, H, S, E), padded to the value's width
where a kernel wants equal head dims; `maps` makes one of them take channel-first maps.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Form = Callable[..., Tensor]
FUSED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def fused(device: str) -> dict[str, Form]:
    """Torch's kernels by name, each forced; the CPU has flash alone."""
    names = ("flash",) if device == "cpu" else FUSED
    return {name: functools.partial(_sdpa, FUSED[name]) for name in names}


def _sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scale = query.shape[-1] ** -0.5
    query, key = padded(query, key, value.shape[-1])
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, scale=scale)


def masked(padding: Callable[[Tensor], Tensor]) -> Form:
    """Torch's fused attention, whichever takes a boolean mask, under a mask (B, N) of the key, True = ignore."""

    def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=~padding(key)[:, None, None])

    return form


def padded(query: Tensor, key: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Query and key with zeros up to `width` channels."""
    missing = width - query.shape[-1]
    return (F.pad(query, (0, missing)), F.pad(key, (0, missing))) if missing > 0 else (query, key)


def packages() -> dict[str, Form]:
    """The fused kernels of installed packages, which run on a GPU in half precision."""
    made = {"flash_attn": _flash_attn, "xformers": _xformers}
    return {name: form for name, form in made.items() if has(name)}


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _flash_attn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dao-AILab's flash-attn, which wants (B, N, H, D)."""
    function = importlib.import_module("flash_attn").flash_attn_func
    scale = query.shape[-1] ** -0.5
    query, key = padded(query, key, value.shape[-1])
    tokens = (x.transpose(1, 2) for x in (query, key, value))
    return function(*tokens, softmax_scale=scale).transpose(1, 2)


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """xformers' memory_efficient_attention, which wants (B, N, H, D)."""
    function = importlib.import_module("xformers.ops").memory_efficient_attention
    tokens = (x.transpose(1, 2) for x in (query, key, value))
    return function(*tokens, scale=query.shape[-1] ** -0.5).transpose(1, 2)


def flex() -> Form:
    """FlexAttention under torch.compile, which it is made for; on a CPU it has no backward."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def neighbourhood_mask(grid: Sequence[int], window: int) -> Callable[..., Tensor]:
    """Whether query i sees key j (row-major indices): the window of each axis nearest to i that lies in the grid."""

    def seen(i: Tensor, j: Tensor) -> Tensor:
        inside = torch.ones((), dtype=torch.bool, device=j.device)
        for size in reversed(grid):
            start = (i % size - window // 2).clamp(0, size - window)
            inside = inside & (j % size >= start) & (j % size < start + window)
            i, j = i // size, j // size
        return inside

    return seen


def flex_neighbourhood(grid: Sequence[int], window: int) -> Form:
    """Neighbourhood attention over a grid, by FlexAttention with a block mask that is made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seen, compiled = neighbourhood_mask(grid, window), torch.compile(flex_attention, dynamic=False)

    @functools.lru_cache(maxsize=1)
    def mask(tokens: int, device: str) -> object:
        return create_block_mask(lambda b, h, i, j: seen(i, j), None, None, tokens, tokens, device=device)

    return lambda query, key, value: compiled(query, key, value, block_mask=mask(query.shape[2], query.device.type))


def natten_neighbourhood(grid: Sequence[int], window: int) -> Form:
    """Neighbourhood attention over a grid, by NATTEN, which wants (B, *grid, H, D)."""
    function = importlib.import_module("natten").na3d

    def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        maps = (x.transpose(1, 2).unflatten(1, tuple(grid)) for x in (query, key, value))
        return function(*maps, kernel_size=window).flatten(1, 3).transpose(1, 2)

    return form


def neighbourhood(grid: Sequence[int], window: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition of neighbourhood attention, for the queries given: the first of the grid."""
    rows, columns = torch.arange(query.shape[2]), torch.arange(key.shape[2])
    seen = neighbourhood_mask(grid, window)(rows[:, None], columns[None, :]).to(query.device)
    logits = (query.shape[-1] ** -0.5 * query @ key.mT).masked_fill(~seen, float("-inf"))
    return logits.softmax(-1) @ value


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition of exact attention."""
    return (query.shape[-1] ** -0.5 * query @ key.mT).softmax(-1) @ value


def maps(form: Form) -> Form:
    """Exact attention of channel-first maps (B, C, *grid) by a form of tokens: transposed there and back."""

    def on_maps(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens = (x.flatten(2).mT.unsqueeze(1).contiguous() for x in (query, key, value))  # (B, 1, N, C)
        return form(*tokens).squeeze(1).mT.contiguous().unflatten(2, query.shape[2:])

    return on_maps


def unpadded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's own choice where head dims differ, which is no fused kernel."""
    return F.scaled_dot_product_attention(query, key, value)


def unfused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's own products and softmax, the one kernel that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value)


def eager_maps(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Exact attention of maps as SAGAN and SAVGAN write it, with the N x N weights."""
    weights = (query.shape[1] ** -0.5 * query.flatten(2).mT @ key.flatten(2)).softmax(-1)  # (B, N, S)
    return (value.flatten(2) @ weights.mT).unflatten(2, query.shape[2:])
