"""Launch configurations of `nystrom_attention` in Triton, by pass, dtype and head dim class.

Only the shapes of one batch and head enter, so that a row's bits do not depend on what else is in the batch.
"""

import torch

Config = dict[str, int]

SPLITS = 32  # programs that share the tokens of one head: eight heads fill the 132 SMs of an H200 twice
SPLIT_LEAST = 256


def split_tokens(count: int) -> int:
    """Tokens of one split: a power of two."""
    return max(SPLIT_LEAST, 1 << (-(-count // SPLITS) - 1).bit_length())


def steps(count: int) -> int:
    """Tiles of tokens that one program of the output and of d query works through with the landmarks at hand."""
    return 8 if count >= 32768 else 2 if count >= 4096 else 1


# Tokens of a tile by (pass, half precision, widest head dim tile): the largest that spills nothing.
TOKENS: dict[tuple[str, bool], dict[int, int]] = {
    ("index_sum", True): {16: 64, 32: 64, 64: 64, 128: 64, 256: 32},
    ("index_sum", False): {16: 64, 32: 64, 64: 32, 128: 32, 256: 16},
    ("lloyd", True): {16: 64, 32: 64, 64: 64, 128: 32, 256: 16},
    ("lloyd", False): {16: 64, 32: 64, 64: 32, 128: 32, 256: 16},
    ("landmarks", True): {16: 64, 32: 64, 64: 64, 128: 64, 256: 32},
    ("landmarks", False): {16: 64, 32: 64, 64: 32, 128: 32, 256: 16},
    ("output", True): {16: 64, 32: 64, 64: 64, 128: 64, 256: 64},
    ("output", False): {16: 64, 32: 64, 64: 64, 128: 32, 256: 16},
    ("query_sums", True): {16: 64, 32: 64, 64: 64, 128: 32, 256: 32},
    ("query_sums", False): {16: 64, 32: 32, 64: 32, 128: 16, 256: 16},
    ("keys", True): {16: 64, 32: 64, 64: 64, 128: 32, 256: 32},
    ("keys", False): {16: 64, 32: 32, 64: 32, 128: 16, 256: 16},
    ("query", True): {16: 64, 32: 64, 64: 64, 128: 64, 256: 32},
    ("query", False): {16: 64, 32: 64, 64: 32, 128: 32, 256: 16},
}


def tokens_of(name: str, dtype: torch.dtype, widest: int) -> int:
    """Tokens of a tile of pass `name`; `widest` is the larger tile of the head dims."""
    return TOKENS[name, dtype != torch.float32][widest]


def launch(name: str, dtype: torch.dtype, landmarks: int, widest: int) -> Config:
    """Warps and stages of pass `name` on tiles of `landmarks` landmarks."""
    warps = 8 if landmarks >= 128 or widest >= 128 else 4
    return {"num_warps": warps, "num_stages": 3 if dtype != torch.float32 and widest <= 64 else 2}
