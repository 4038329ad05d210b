"""Segment-mean Nyström attention as people write it, each in its best form; forms take query, key and value.

The pseudo-inverse is in float32 and scaled per matrix in all of them, so that they run in half precision and give
the numbers of one definition; as shipped (`packages.py`) nystrom-attention and transformers raise there, and scale by
the maximum over the batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nystromgan.ops.nystrom_attention.landmarks import masked_segments

Form = Callable[..., Tensor]


def pinv(matrix: Tensor, iterations: int = 6) -> Tensor:
    """The iteration of Nyströmformer, eq. 11, in eager float32."""
    A = matrix.float()
    Z = A.mT / (A.abs().sum(-2).amax(-1) * A.abs().sum(-1).amax(-1))[..., None, None]
    eye = torch.eye(A.shape[-1], device=A.device)
    for _ in range(iterations):
        AZ = A @ Z
        Z = 0.25 * Z @ (13 * eye - AZ @ (15 * eye - AZ @ (7 * eye - AZ)))
    return Z


def segment_means(tokens: Tensor, num_landmarks: int) -> Tensor:
    """(B, H, N, D) -> (B, H, M, D)."""
    return tokens.unflatten(2, (num_landmarks, -1)).mean(3)


def convolved(make: Callable[[int], Form], num_landmarks: int) -> Form:
    """A form with the depthwise convolution of the values that Nyströmformer adds, by torch's conv2d."""
    attend = make(num_landmarks)

    def form(query: Tensor, key: Tensor, value: Tensor, conv_weight: Tensor) -> Tensor:
        heads, taps = conv_weight.shape
        added = F.conv2d(value, conv_weight[:, None, :, None], padding=(taps // 2, 0), groups=heads)
        return attend(query, key, value) + added

    return form


def two_sdpa(num_landmarks: int) -> Form:
    """G V and F (Z G V) each by torch's fused attention, which wants equal head dims; nothing N x M is stored."""

    def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale, width = query.shape[-1] ** -0.5, value.shape[-1]
        if query.shape[-1] < width:
            query, key = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key))
        query_landmarks, key_landmarks = (segment_means(x, num_landmarks) for x in (query, key))
        core = (scale * query_landmarks.float() @ key_landmarks.float().mT).softmax(-1)
        summary = F.scaled_dot_product_attention(query_landmarks, key, value, scale=scale)  # G V
        mixed = (pinv(core) @ summary.float()).to(value.dtype)
        return F.scaled_dot_product_attention(query, key_landmarks, mixed, scale=scale)

    return form


def two_sdpa_padded(num_landmarks: int, padding: Callable[[Tensor], Tensor]) -> Form:
    """`two_sdpa` under a mask (B, N) of the key, True = ignore: means over valid tokens by a product, G masked."""

    def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale, padding_mask = query.shape[-1] ** -0.5, padding(key)
        index, _, _ = masked_segments(padding_mask, num_landmarks)
        members = F.one_hot(index.long() + 1, num_landmarks + 1)[..., 1:].mT.to(query.dtype)  # (B, 1, M, N)
        query_landmarks, key_landmarks = (members @ x / members.sum(-1, keepdim=True) for x in (query, key))
        core = (scale * query_landmarks.float() @ key_landmarks.float().mT).softmax(-1)
        valid = ~padding_mask[:, None, None]
        summary = F.scaled_dot_product_attention(query_landmarks, key, value, attn_mask=valid, scale=scale)  # G V
        mixed = (pinv(core) @ summary.float()).to(value.dtype)
        return F.scaled_dot_product_attention(query, key_landmarks, mixed, scale=scale)

    return form


def _factors(query: Tensor, key: Tensor, num_landmarks: int) -> tuple[Tensor, Tensor, Tensor]:
    """F (B, H, N, M), A (B, H, M, M) and G (B, H, M, N), by plain products and softmax."""
    query = query * query.shape[-1] ** -0.5
    query_landmarks, key_landmarks = segment_means(query, num_landmarks), segment_means(key, num_landmarks)
    pairs = ((query, key_landmarks), (query_landmarks, key_landmarks), (query_landmarks, key))
    F_, A, G = ((left @ right.mT).softmax(-1) for left, right in pairs)
    return F_, A, G


def eager(num_landmarks: int) -> Form:
    """F (Z (G V)): the least arithmetic in plain PyTorch."""

    def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query_factor, core, key_factor = _factors(query, key, num_landmarks)
        return query_factor @ (pinv(core).to(value.dtype) @ (key_factor @ value))

    return form


def eager_left(num_landmarks: int) -> Form:
    """(F Z) (G V), the order of mlpen's and transformers' Nyströmformer, and the scale on both sides as there."""

    def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        root = query.shape[-1] ** -0.25
        query, key = query * root, key * root
        query_landmarks, key_landmarks = segment_means(query, num_landmarks), segment_means(key, num_landmarks)
        query_factor = (query @ key_landmarks.mT).softmax(-1)
        core = (query_landmarks @ key_landmarks.mT).softmax(-1)
        key_factor = (query_landmarks @ key.mT).softmax(-1)
        return (query_factor @ pinv(core).to(value.dtype)) @ (key_factor @ value)

    return form


def einsums(num_landmarks: int) -> Form:
    """nystrom-attention's maths between its projections: sums over segments, einsums, (F Z) (G V)."""

    def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = query * query.shape[-1] ** -0.5
        length = query.shape[2] // num_landmarks
        query_landmarks, key_landmarks = (x.unflatten(2, (num_landmarks, -1)).sum(3) / length for x in (query, key))
        equation = "... i d, ... j d -> ... i j"
        similarities = (
            torch.einsum(equation, query, key_landmarks),
            torch.einsum(equation, query_landmarks, key_landmarks),
            torch.einsum(equation, query_landmarks, key),
        )
        query_factor, core, key_factor = (x.softmax(dim=-1) for x in similarities)
        return (query_factor @ pinv(core).to(value.dtype)) @ (key_factor @ value)

    return form


def authors(num_landmarks: int) -> Form:
    """SAVGAN's own: the N x N product of the three factors, then one product with the values."""

    def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query_factor, core, key_factor = _factors(query, key, num_landmarks)
        return ((query_factor @ pinv(core).to(value.dtype)) @ key_factor) @ value

    return form
