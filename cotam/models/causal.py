"""Restoring the hyper-latent from what it differs by from the prediction of its decoded neighbours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cotam.entropy.compiled import compiled
from cotam.models.integer import ACTIVATION_MAX, Integers


class CausalPredictor:
    """The integer layer ``z_context`` one element after the other, as a decoder has to compute it.

    Args:
        integers: of a causal depthwise layer of C channels, with a filter for each of L levels.
        num_channels: C.
    """

    def __init__(self, integers: Integers, num_channels: int) -> None:
        # Whole numbers and a power of two: float64 computes what the layer does, exactly.
        weight, bias, _, scale = (t.cpu().numpy().astype(np.float64) for t in integers)
        self._weight = weight[:, 0, [0, 0, 0, 1], [0, 1, 2, 0]].reshape(num_channels, -1, 4)
        self._bias, self._scale = bias.reshape(num_channels, -1), scale.reshape(num_channels, -1)

    def restore(self, residuals: NDArray[np.int16], levels: NDArray[np.int64]) -> NDArray[np.int32]:
        """``z`` from ``z`` less its prediction, both (C, hz, wz), and the ``levels`` of its positions (hz, wz)."""
        z: NDArray[np.int32] = _restore(residuals, levels, self._weight, self._bias, self._scale, ACTIVATION_MAX)
        return z


@compiled
def _restore(residuals, levels, weight, bias, scale, limit):  # type: ignore[no-untyped-def]
    channels, height, width = residuals.shape
    z = np.zeros((channels, height + 1, width + 2), dtype=np.int32)  # with a border of zeros
    for c in range(channels):
        for i in range(1, height + 1):
            for j in range(1, width + 1):
                k = levels[i - 1, j - 1]
                w = weight[c, k]
                total = bias[c, k] + w[0] * z[c, i - 1, j - 1] + w[1] * z[c, i - 1, j]
                total += w[2] * z[c, i - 1, j + 1] + w[3] * z[c, i, j - 1]
                predicted = min(max(np.rint(total * scale[c, k]), -limit), limit)
                z[c, i, j] = residuals[c, i - 1, j - 1] + np.int32(predicted)
    return np.ascontiguousarray(z[:, 1:, 1:-1])
