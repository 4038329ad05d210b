"""When landmarks cost more than what they approximate."""

import functools
import warnings


@functools.lru_cache(maxsize=256)
def warn_if_dearer_than_exact(tokens: int, keys: int, dims: int, landmarks: int, pinv_iterations: int) -> None:
    """Warns, once for each size, where landmarks take more flops than exact attention; dims is D + E of one head."""
    exact = 2 * tokens * keys * dims
    nystrom = 2 * (tokens + keys) * landmarks * dims + 8 * pinv_iterations * landmarks**3
    if landmarks < min(tokens, keys) and nystrom > exact:
        warnings.warn(
            f"num_landmarks={landmarks} takes {nystrom / exact:.1f} times the arithmetic of exact attention over "
            f"{tokens} x {keys} positions: fewer landmarks, or exact attention, are faster here",
            stacklevel=6,  # past torch's two frames of a module's call,
        )
