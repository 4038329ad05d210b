"""What else computes the same on a GPU, each in its best form; a peer takes the public function's tensors by name."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nystromgan import testing

Peer = Callable[..., Tensor]
FUSED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def _fused(name: str, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Torch's fused attention of (B, H, N, D) tokens by one backend, or by torch's choice."""
    if name not in FUSED:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    with sdpa_kernel(FUSED[name]):
        return F.scaled_dot_product_attention(query, key, value, scale=scale)


def compiled(peer: Peer) -> Peer:
    """The peer as torch.compile makes it at its best, from its first call on."""
    compiled_once = functools.cache(lambda: torch.compile(peer, mode="max-autotune-no-cudagraphs", dynamic=False))
    return lambda query, key, value: compiled_once()(query, key, value)


def full_attention(device: str) -> dict[str, Peer]:
    """Exact attention of tokens by each of torch's kernels."""
    names = tuple(FUSED) if device == "cuda" else ("default",)

    def peer(name: str) -> Peer:
        return lambda query, key, value: _fused(name, query, key, value)

    return {f"sdpa {name}": peer(name) for name in names}


def landmark_attention(num_landmarks: int) -> dict[str, Peer]:
    """Segment-mean Nyström attention: eager, compiled, and as two calls of torch's fused attention."""

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return testing.eager_nystrom_attention(query, key, value, num_landmarks=num_landmarks)

    def two_calls(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query_landmarks, key_landmarks = (
            x.unflatten(2, (num_landmarks, -1)).mean(3) for x in (query, key)
        )  # (B, H, M, D)
        core = (query.shape[-1] ** -0.5 * query_landmarks.float() @ key_landmarks.float().mT).softmax(-1)
        summary = F.scaled_dot_product_attention(query_landmarks, key, value)  # G V
        landmark_values = (pinv(core) @ summary.float()).to(value.dtype)
        return F.scaled_dot_product_attention(query, key_landmarks, landmark_values)

    return {"two sdpa": two_calls, "eager": eager, "compiled": compiled(eager)}


def pinv(matrix: Tensor, iterations: int = 6) -> Tensor:
    """The iteration in eager float32."""
    inverse = matrix.mT / (matrix.abs().sum(-2).amax(-1) * matrix.abs().sum(-1).amax(-1))[..., None, None]
    eye = torch.eye(matrix.shape[-1], device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = 0.25 * inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    return inverse


def authors_form(num_landmarks: int) -> Peer:
    """SAVGAN's own: the N x N product of the three factors, then one product with the values."""

    def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = query.shape[-1] ** -0.5
        query_landmarks, key_landmarks = (x.unflatten(2, (num_landmarks, -1)).mean(3) for x in (query, key))
        query_factor = (scale * query @ key_landmarks.mT).softmax(-1)
        core = (scale * query_landmarks.float() @ key_landmarks.float().mT).softmax(-1)
        key_factor = (scale * query_landmarks @ key.mT).softmax(-1)
        return query_factor @ pinv(core).to(query.dtype) @ key_factor @ value

    return form


def map_attention(device: str) -> dict[str, Peer]:
    """Exact attention of maps (B, C, *grid): each fused kernel, with the transposes and padding it needs, and eager."""

    def fused(name: str) -> Peer:
        def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            grid, values = query.shape[2:], value.shape[1]
            tokens = [x.flatten(2).mT.unsqueeze(1) for x in (query, key, value)]  # (B, 1, N, C)
            widest = max(x.shape[-1] for x in tokens)
            padded = [F.pad(x, (0, widest - x.shape[-1])).contiguous() for x in tokens]
            output = _fused(name, padded[0], padded[1], padded[2], query.shape[1] ** -0.5)
            return output[..., :values].squeeze(1).mT.contiguous().unflatten(2, grid)

        return form

    names = tuple(FUSED) if device == "cuda" else ("default",)
    eager = testing.eager_spatiotemporal_attention
    return {**{f"sdpa {name}": fused(name) for name in names}, "eager": eager, "compiled": compiled(eager)}
