"""CDF rows of the hyper-latent: the scale index of an element's channel, moved by what is around it.

A channel's residuals (``z`` less its prediction) have one scale in all images, but they are large together: where those
of the same channel are near, and those of the channels before at the same place. Knowing that saves 4 % of their bits.

Residuals are coded channel by channel, each in raster order. A residual r of scale index k counts as its magnitude in
sixteenths of what is expected, at most six times that: ``min(floor(2^20 |r| / unit[k]), 96)``, where ``unit[k]`` is
2^16 times the mean magnitude of the k-th Gaussian of the tables, at least 2^12. With

    near   = floor((ul + 2 u + ur + 2 l + 32) / (weights of those inside of the grid + 2))
             of the positions above left, above, above right and left in the same channel
    before = floor((4 s + s_above + s_below + s_left + s_right + 1024) / (8 (n + 8)))
             of the sums s over the n channels before whose scale index has an expected magnitude of 1/16 or more, here
             and beside; a position outside of the grid is the nearest one inside

the row is that of index ``k + round(4 log2((near + 2 before) / 48))``, in the range of indexes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cotam.entropy.compiled import compiled
from cotam.entropy.rans import RansDecoder, pop_symbol
from cotam.entropy.tables import GAUSSIAN_ROWS, NUM_SCALES, PRECISION_BITS, Z_ROWS, Tables

_EXPECTED = 16  # the expected magnitude
_LARGEST = 6 * _EXPECTED
_LEAST_UNIT = 1 << (PRECISION_BITS - 4)
_CHANNELS_FIRST = 8  # so many as expected go before those that there are
_SHIFTS = np.array([round(4 * math.log2(max(a, 1) / (3 * _EXPECTED))) for a in range(3 * _LARGEST + 1)])


class HyperRows:
    """CDF rows of residuals of the hyper-latent.

    Args:
        tables: of which the Gaussians say what is expected of a scale index.
    """

    def __init__(self, tables: Tables) -> None:
        units = []
        for row in range(GAUSSIAN_ROWS, GAUSSIAN_ROWS + NUM_SCALES):
            frequencies = np.diff(tables.cdf[tables.start[row] : tables.start[row + 1]].astype(np.int64))[:-1]
            radius = int(tables.radius[row])
            units.append(int(frequencies @ np.abs(np.arange(-radius, radius + 1))))
        self._counted = np.array([unit >= _LEAST_UNIT for unit in units], dtype=np.int32)
        sizes = np.arange(_LARGEST * max(units) // (_EXPECTED << PRECISION_BITS) + 2)  # all larger ones count alike
        magnitudes = (sizes * _EXPECTED << PRECISION_BITS) // np.maximum(units, _LEAST_UNIT)[:, None]
        self._magnitudes = np.minimum(magnitudes, _LARGEST).astype(np.uint8)

    def rows(self, residuals: NDArray[np.int16], indexes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Rows, uint8 (C, hz, wz), of ``residuals`` with scale ``indexes``, both of that shape."""
        rows: NDArray[np.uint8] = _rows(residuals, indexes, self._magnitudes, self._counted)
        return rows

    def decode(self, decoder: RansDecoder, indexes: NDArray[np.uint8]) -> NDArray[np.int16]:
        """The residuals, int16 (C, hz, wz), that are the decoder's next segment. Raises RansError."""
        residuals = np.zeros(indexes.shape, dtype=np.int16)
        decoder.decode_with(_decode, indexes, self._magnitudes, self._counted, residuals)
        return residuals


@compiled
def _rows(residuals, indexes, magnitudes, counted):  # type: ignore[no-untyped-def]
    channels, height, width = residuals.shape
    rows = np.empty(residuals.shape, dtype=np.uint8)
    near, inverse_weights, sums, counts, before = _start(height, width)
    for c in range(channels):
        _sum_up(sums, counts, before)
        for i in range(height):
            for j in range(width):
                index = indexes[c, i, j]
                rows[c, i, j] = _row(index, near, inverse_weights, before, i, j)
                near[i + 1, j + 1] = _magnitude(magnitudes, index, residuals[c, i, j])
        _count(indexes[c], counted, near[1:, 1:], sums, counts)
    return rows


@compiled
def _decode(words, at, states, entries, prefix, indexes, magnitudes, counted, residuals):  # type: ignore[no-untyped-def]
    channels, height, width = residuals.shape
    num_words, last_lane = len(words) - 2, np.uint64(len(states) - 1)
    near, inverse_weights, sums, counts, before = _start(height, width)
    k = np.uint64(0)
    for c in range(channels):
        _sum_up(sums, counts, before)
        for i in range(height):
            for j in range(width):
                index = indexes[c, i, j]
                row = np.uint64(_row(index, near, inverse_weights, before, i, j))
                at, x, symbol = pop_symbol(words, at, states[k & last_lane], row, entries, prefix)
                if at > num_words:
                    return at
                states[k & last_lane] = x
                k += np.uint64(1)
                residuals[c, i, j] = symbol
                near[i + 1, j + 1] = _magnitude(magnitudes, index, symbol)
        _count(indexes[c], counted, near[1:, 1:], sums, counts)
    return at


@compiled
def _row(index, near, inverse_weights, before, i, j):  # type: ignore[no-untyped-def]
    """Of the element at (i, j) of a channel, whose magnitudes are known up to there: ``near``, in a border of zeros."""
    k, one, two = np.uint64(j), np.uint64(1), np.uint64(2)
    above, own = near[np.uint64(i)], near[np.uint64(i) + one]
    total = above[k] + above[k + two] + 2 * (above[k + one] + own[k]) + 2 * _EXPECTED
    activity = (total * inverse_weights[np.uint64(i), k] >> 16) + 2 * before[np.uint64(i), k]
    return Z_ROWS + min(max(np.int64(index) + _SHIFTS[np.uint64(activity)], 0), NUM_SCALES - 1)


@compiled
def _start(height, width):  # type: ignore[no-untyped-def]
    """``near``, and for each position 2^16 by the weights inside of the grid, ``sums``, ``counts`` and ``before``."""
    near, inverse = np.zeros((height + 1, width + 2), dtype=np.int32), np.empty((height, width), dtype=np.int32)
    for i in range(height):
        for j in range(width):
            above = 2 + (j > 0) + (j + 1 < width) if i > 0 else 0
            inverse[i, j] = (1 << 16) // (2 + above + 2 * (j > 0)) + 1  # rounded up: exact for sums this small
    return near, inverse, np.zeros_like(inverse), np.zeros_like(inverse), np.zeros_like(inverse)


@compiled
def _magnitude(magnitudes, index, residual):  # type: ignore[no-untyped-def]
    return magnitudes[index, min(abs(np.int64(residual)), magnitudes.shape[1] - 1)]


@compiled
def _sum_up(sums, counts, before):  # type: ignore[no-untyped-def]
    """What the channels before a channel say about its positions."""
    height, width = sums.shape
    for i in range(height):
        above, below = max(i - 1, 0), min(i + 1, height - 1)
        for j in range(width):
            left, right = max(j - 1, 0), min(j + 1, width - 1)
            around = sums[above, j] + sums[below, j] + sums[i, left] + sums[i, right]
            total = np.int32(4 * sums[i, j] + around + 8 * _EXPECTED * _CHANNELS_FIRST)
            before[i, j] = total // np.int32(8 * (counts[i, j] + _CHANNELS_FIRST))


@compiled
def _count(indexes, counted, magnitudes, sums, counts):  # type: ignore[no-untyped-def]
    """Add a channel to the sums, where its expected magnitude is not too small to say much."""
    for i in range(indexes.shape[0]):
        for j in range(indexes.shape[1]):
            counts[i, j] += counted[indexes[i, j]]
            sums[i, j] += counted[indexes[i, j]] * magnitudes[i, j]
