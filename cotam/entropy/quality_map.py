"""Lossless coding of quality index maps: median edge detection (LOCO-I, Weinberger et al. 2000) and rANS.

The indexes of a map are its lowest one plus multiples of a step, 1, 2, 4 or 8. A map's code is one byte: in its lower
six bits the scale index of residuals in flat surroundings, chosen by the encoder, and above log2 of the step; where the
decoded neighbours differ, the index is _BUSY higher. The residuals are a segment of a rANS string.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cotam.entropy.compiled import compiled
from cotam.entropy.rans import RansCoder, RansDecoder, RansError, Segment, pop_symbol
from cotam.entropy.tables import GAUSSIAN_ROWS, NUM_SCALES, scales

_STEP_SHIFT = 6
_MAX_STEP_LOG2 = 3
_BUSY = 6  # saves 15 % of a map against one index for all


def encode_quality_map(quality_map: NDArray[np.uint8], coder: RansCoder) -> tuple[int, int, Segment]:
    """The lowest of the quality indexes (h, w), and the code and segment of what they lie above it."""
    lowest = int(quality_map.min())
    above = quality_map.astype(np.int16) - lowest
    step_log2 = next(s for s in range(_MAX_STEP_LOG2, -1, -1) if not (above & ((1 << s) - 1)).any())
    residuals, rows = _residuals(above >> step_log2)
    # Indexes around that of all residuals' deviation: a Gaussian only fits roughly.
    deviation = max(float(np.sqrt(np.mean(residuals.astype(np.float64) ** 2))), scales()[0])
    nearest = int(np.abs(np.log(scales() / deviation)).argmin())
    candidates = range(max(0, nearest - 9), max(1, min(NUM_SCALES - _BUSY, nearest + 2)))
    segments = {k: (residuals.ravel(), rows.ravel() + np.uint8(k)) for k in candidates}
    index = min(segments, key=lambda k: len(coder.encode([segments[k]], lanes_log2=0)[0]))
    return lowest, index | step_log2 << _STEP_SHIFT, segments[index]


def decode_quality_map(
    lowest: int, code: int, decoder: RansDecoder, height: int, width: int, num_q: int
) -> NDArray[np.uint8]:
    """Quality indexes (height, width) in [0, num_q). Raises RansError where ``decoder`` has no such map."""
    index, step_log2 = code & ((1 << _STEP_SHIFT) - 1), code >> _STEP_SHIFT
    if index + _BUSY >= NUM_SCALES:
        raise RansError("scale index of the quality map out of range")
    values = np.zeros((height, width), dtype=np.int32)
    decoder.decode_with(_decode, values, np.uint8(index))
    quality_map = lowest + (values << step_log2)
    if quality_map.min() < 0 or quality_map.max() >= num_q:
        raise RansError("quality index out of range")
    return quality_map.astype(np.uint8)


@compiled
def _predict(values, i, j):  # type: ignore[no-untyped-def]
    """What values[i, j] is predicted to be, and the row of its residual where that of flat surroundings is 0."""
    if i == 0:
        left = values[0, j - 1] if j else 0
        return left, np.uint8(GAUSSIAN_ROWS + _BUSY)
    above = values[i - 1, j]
    left = values[i, j - 1] if j else above
    corner = values[i - 1, j - 1] if j else above
    right = values[i - 1, j + 1] if j + 1 < values.shape[1] else above
    flat = left == corner and corner == above and above == right
    predicted = max(min(left, above), min(max(left, above), left + above - corner))  # their median
    return predicted, np.uint8(GAUSSIAN_ROWS if flat else GAUSSIAN_ROWS + _BUSY)


@compiled
def _residuals(values):  # type: ignore[no-untyped-def]
    residuals = np.empty(values.shape, dtype=np.int16)
    rows = np.empty(values.shape, dtype=np.uint8)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            predicted, rows[i, j] = _predict(values, i, j)
            residuals[i, j] = values[i, j] - predicted
    return residuals, rows


@compiled
def _decode(words, at, states, entries, prefix, values, index):  # type: ignore[no-untyped-def]
    lane = 0
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            predicted, offset = _predict(values, i, j)
            at, states[lane], residual = pop_symbol(words, at, states[lane], offset + index, entries, prefix)
            lane = (lane + 1) % len(states)
            if at > len(words) - 2:
                return at
            values[i, j] = predicted + residual
    return at
