"""Losses between visual tokens of an original and of a decoded image (arXiv 2509.24258)."""

from __future__ import annotations

from torch import Tensor

# As in the paper's public code: of the sum, and of the first layer within it.
TOTAL_WEIGHT = 11.52
FIRST_LAYER_WEIGHT = 0.1


def token_distance(tokens: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared distance of tokens, relative to the target's variance: 1 is as far off as the mean token.

    Args:
        tokens, target: (B, patches, width).
        weights: (B, patches), not negative, of the patches; those of an image count by their share. None: all alike.

    Returns:
        A scalar.
    """
    error = (tokens - target).square().mean(2)
    spread = (target - target.mean((0, 1))).square().mean()
    if weights is not None:
        error = error * weights / weights.mean(1, keepdim=True).clamp_min(1e-6)
    return error.mean() / spread
