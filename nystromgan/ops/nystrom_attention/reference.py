"""Nyström attention in plain PyTorch: the definition that every backend is tested against.

Letters: B batch, H heads, N query tokens, S key tokens, M landmarks, D query/key head dim, E value head dim.
"""

import torch
from torch import Tensor

from nystromgan.ops.iterative_pinv.reference import iterative_pinv
from nystromgan.ops.nystrom_attention.landmarks import Plan


def accumulated(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that the definition computes in: float64 stays, everything else is float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def masked_softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last axis without the entries where `mask` is True; zeros where it leaves none."""
    if mask is None:
        return logits.softmax(-1)
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(mask, lowest).softmax(-1).masked_fill(mask, 0.0)


def pool(tokens: Tensor, index: Tensor, num_landmarks: int) -> Tensor:
    """Means of tokens (B, H, N, D) by landmark index (B|1, H|1, N): (B, H, M, D); zeros for an empty landmark."""
    batch, heads, count, dim = tokens.shape
    index = index.expand(batch, heads, count).long()
    bin_ = torch.where(index < 0, num_landmarks, index)  # what belongs to no landmark goes to a bin of its own
    sums = tokens.new_zeros(batch, heads, num_landmarks + 1, dim)
    sums = sums.scatter_add(2, bin_[..., None].expand(tokens.shape), tokens)
    totals = tokens.new_zeros(batch, heads, num_landmarks + 1).scatter_add(2, bin_, torch.ones_like(tokens[..., 0]))
    return sums[:, :, :-1] / totals[:, :, :-1, None].clamp(min=1)


def landmarks_of(tokens: Tensor, landmarks: Tensor | None, index: Tensor | None, num_landmarks: int) -> Tensor:
    """(B, H, M, D): the landmarks given, or the means over an index; of both, the given where the means are empty."""
    if index is None:
        assert landmarks is not None
        return accumulated(landmarks)
    means = pool(tokens, index, num_landmarks)
    if landmarks is None:
        return means
    ones = torch.ones_like(tokens[..., :1])
    filled = pool(ones, index.expand(tokens.shape[:3]), num_landmarks) > 0
    return torch.where(filled, means, landmarks.detach().to(means.dtype))


def nystrom_attention(
    query: Tensor,  # (B, H, N, D)
    key: Tensor,  # (B, H, S, D)
    value: Tensor,  # (B, H, S, E)
    plan: Plan,
    num_landmarks: int,
    scale: float,
    pinv_iterations: int,
    global_init: bool,
) -> Tensor:
    """O = F Z (G V) of `plan`'s landmarks, (B, H, N, E) in query's dtype. Every token has its index in the plan."""
    dtype = query.dtype
    query, key, value = accumulated(query), accumulated(key), accumulated(value)
    key_mask = plan.key_padding_mask
    if key_mask is not None:  # what is masked may hold anything
        key = key.masked_fill(key_mask[:, None, :, None], 0.0)
        value = value.masked_fill(key_mask[:, None, :, None], 0.0)
        key_mask = key_mask[:, None, None]  # (B, 1, 1, S)
    landmark_mask = None if plan.key_landmark_mask is None else plan.key_landmark_mask[:, None, None]  # (B, 1, 1, M)
    query_landmarks = landmarks_of(query, plan.query_landmarks, plan.query_index, num_landmarks)
    key_landmarks = landmarks_of(key, plan.key_landmarks, plan.key_index, num_landmarks)

    query_factor = masked_softmax(scale * query @ key_landmarks.mT, landmark_mask)  # F (B, H, N, M)
    core = masked_softmax(scale * query_landmarks @ key_landmarks.mT, landmark_mask)  # A (B, H, M, M)
    key_factor = masked_softmax(scale * query_landmarks @ key.mT, key_mask)  # G (B, H, M, S)
    if plan.query_landmark_mask is not None:
        absent = plan.query_landmark_mask[:, None, :, None]  # (B, 1, M, 1)
        core, key_factor = core.masked_fill(absent, 0.0), key_factor.masked_fill(absent, 0.0)
    mixed = iterative_pinv(core, pinv_iterations, global_init) @ (key_factor @ value)  # W (B, H, M, E)
    if plan.exact_rows is not None:
        assert plan.key_index is not None
        mixed = torch.where(plan.exact_rows[:, None, None, None], pool(value, plan.key_index, num_landmarks), mixed)
    return (query_factor @ mixed).to(dtype)


def cluster_landmarks(
    tokens: Tensor,  # (B, H, N, D)
    index: Tensor,  # (B|1, H|1, N)
    landmark_mask: Tensor | None,  # (B, M)
    frozen_rows: Tensor | None,  # (B,)
    num_landmarks: int,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Lloyd steps from the means over `index`: (landmarks (B, H, M, D), index (B, H, N) int32).

    Each token goes to the landmark with the largest x . m - |m|^2 / 2, the first of equals; an empty one keeps its
    place; tokens in no landmark stay so, and rows of `frozen_rows` keep their index.
    """
    tokens = accumulated(tokens)
    tokens = torch.where((index < 0)[..., None], 0.0, tokens)
    start = index.expand(tokens.shape[:3])
    absent = None if landmark_mask is None else landmark_mask[:, None, None]  # (B, 1, 1, M)
    landmarks = pool(tokens, start, num_landmarks)
    current = start
    for _ in range(iterations):
        score = tokens @ landmarks.mT - 0.5 * landmarks.square().sum(-1)[..., None, :]  # (B, H, N, M)
        if absent is not None:
            score = score.masked_fill(absent, -torch.inf)
        moved = torch.where(start < 0, start, score.argmax(-1).to(torch.int32))
        current = moved if frozen_rows is None else torch.where(frozen_rows[:, None, None], start, moved)
        landmarks = landmarks_of(tokens, landmarks, current, num_landmarks)
    return landmarks, current.contiguous()
