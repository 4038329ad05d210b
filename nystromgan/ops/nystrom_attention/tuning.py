"""Launch configurations of `nystrom_attention` in Triton, by pass, dtype class and head dim class.

Only the shapes of one batch and head enter, so that a row's bits do not depend on what else is in the batch.
"""

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """The most landmarks of a tile, its tokens, and the launch options."""

    landmarks: int
    tokens: int
    num_warps: int
    num_stages: int


SPLITS = 32  # programs that share the tokens of one head: eight heads fill the 132 SMs of an H200 twice
SPLIT_LEAST = 256


def split_tokens(count: int) -> int:
    """Tokens of one split: a power of two."""
    return max(SPLIT_LEAST, 1 << (-(-count // SPLITS) - 1).bit_length())


def steps(count: int) -> int:
    """Tiles of tokens that one program of the output and of d query works through with the landmarks at hand."""
    return 8 if count >= 32768 else 2 if count >= 4096 else 1


# By (pass, half precision) and the wider head dim's tile, up to which a row serves. Chosen by compiling for sm_80,
# sm_90 and sm_100: the largest tiles that spill nothing and keep to the shared memory of sm_86.
TABLE: dict[tuple[str, bool], dict[int, Config]] = {
    ("index_sum", True): {64: Config(64, 64, 4, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 2)},
    ("index_sum", False): {64: Config(32, 32, 4, 1), 128: Config(16, 32, 4, 1), 256: Config(16, 16, 4, 1)},
    ("lloyd", True): {64: Config(64, 32, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(16, 16, 8, 1)},
    ("lloyd", False): {64: Config(32, 32, 4, 1), 128: Config(16, 16, 4, 1), 256: Config(16, 16, 4, 1)},
    ("landmarks", True): {64: Config(64, 64, 4, 3), 128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 2)},
    ("landmarks", False): {64: Config(32, 32, 8, 1), 128: Config(32, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    ("output", True): {64: Config(128, 64, 8, 3), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 2)},
    ("output", False): {64: Config(64, 32, 8, 1), 128: Config(32, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    ("query_stats", True): {64: Config(64, 64, 4, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 16, 8, 1)},
    ("query_stats", False): {64: Config(32, 32, 8, 1), 128: Config(16, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    ("query_sums", True): {64: Config(64, 64, 4, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 16, 8, 1)},
    ("query_sums", False): {64: Config(32, 32, 8, 1), 128: Config(16, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    ("keys", True): {64: Config(64, 64, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 16, 8, 1)},
    ("keys", False): {64: Config(32, 16, 8, 1), 128: Config(16, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    ("query", True): {64: Config(64, 32, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 16, 8, 1)},
    ("query", False): {64: Config(32, 32, 8, 1), 128: Config(16, 16, 8, 1), 256: Config(16, 16, 8, 1)},
}


# Where an architecture has its own: sm_80 spills on the 64 tokens that sm_90 needs for wgmma.
OWN: dict[tuple[int, str, bool], dict[int, Config]] = {(90, "query", True): {64: Config(64, 64, 4, 2)}}


def choose(name: str, dtype: torch.dtype, widest: int, architecture: int) -> Config:
    """The configuration of pass `name`; `widest` is the larger tile of the head dims."""
    half, row = dtype != torch.float32, max(widest, 64)
    return OWN.get((architecture, name, half), {}).get(row) or TABLE[name, half][row]
