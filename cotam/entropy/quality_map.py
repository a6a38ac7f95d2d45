"""Lossless coding of quality index maps: median edge detection (LOCO-I, Weinberger et al. 2000) and rANS.

The indexes of a map are its lowest one plus multiples of a step, 1, 2, 4 or 8. A map_string is one byte, the CDF row of
all residuals, chosen by the encoder, and above it log2 of the step in two bits, and then a one-lane rANS string.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from cotam.entropy.rans import RansCoder, RansError
from cotam.entropy.tables import NUM_SCALES, scales

_STEP_SHIFT = 6
_MAX_STEP_LOG2 = 3


def encode_quality_map(quality_map: NDArray[np.uint8], coder: RansCoder) -> tuple[int, bytes]:
    """The lowest of the quality indexes (h, w), and the map_string of what they lie above it."""
    lowest = int(quality_map.min())
    above = quality_map.astype(np.int16) - lowest
    step_log2 = next(s for s in range(_MAX_STEP_LOG2, -1, -1) if not (above & ((1 << s) - 1)).any())
    residuals = _residuals(above >> step_log2)
    # The maximum-likelihood deviation of the residuals, and its neighbours: a Gaussian only fits roughly.
    deviation = max(float(np.sqrt(np.mean(residuals.astype(np.float64) ** 2))), scales()[0])
    nearest = int(np.abs(np.log(scales() / deviation)).argmin())
    candidates = range(max(0, nearest - 6), min(NUM_SCALES, nearest + 3))
    strings = [bytes([row | step_log2 << _STEP_SHIFT]) + _code(residuals, row, coder) for row in candidates]
    return lowest, min(strings, key=len)


def decode_quality_map(
    lowest: int, string: bytes, height: int, width: int, num_q: int, coder: RansCoder
) -> NDArray[np.uint8]:
    """Quality indexes (height, width) in [0, num_q). Raises RansError for a string that encodes no such map."""
    if not string:
        raise RansError("no CDF row")
    row, step_log2 = string[0] & (NUM_SCALES - 1), string[0] >> _STEP_SHIFT
    decoder = coder.decoder(string[1:], 0)
    residuals = decoder.decode(np.full(height * width, row, dtype=np.uint8)).reshape(height, width)
    decoder.finish()
    quality_map = lowest + (_reconstruct(residuals) << step_log2)
    if quality_map.min() < 0 or quality_map.max() >= num_q:
        raise RansError("quality index out of range")
    return quality_map.astype(np.uint8)


def _code(residuals: NDArray[np.int16], row: int, coder: RansCoder) -> bytes:
    return coder.encode([(residuals.ravel(), np.full(residuals.size, row, dtype=np.uint8))], lanes_log2=0)[0]


@numba.njit(nogil=True, cache=True)
def _predict(values, i, j):  # type: ignore[no-untyped-def]
    if i == 0:
        return values[0, j - 1] if j else 0
    above = values[i - 1, j]
    if j == 0:
        return above
    left, corner = values[i, j - 1], values[i - 1, j - 1]
    if corner >= max(left, above):
        return min(left, above)
    if corner <= min(left, above):
        return max(left, above)
    return left + above - corner


@numba.njit(nogil=True, cache=True)
def _residuals(values):  # type: ignore[no-untyped-def]
    out = np.empty(values.shape, dtype=np.int16)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            out[i, j] = values[i, j] - _predict(values, i, j)
    return out


@numba.njit(nogil=True, cache=True)
def _reconstruct(residuals):  # type: ignore[no-untyped-def]
    out = np.empty(residuals.shape, dtype=np.int32)
    for i in range(residuals.shape[0]):
        for j in range(residuals.shape[1]):
            out[i, j] = residuals[i, j] + _predict(out, i, j)
    return out
