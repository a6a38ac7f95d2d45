"""Integer CDF tables: four rows per scale, 16 bits, with an escape symbol.

Rows 0 to NUM_SCALES - 1 are for the symbols of ``y`` in the even levels, NUM_SCALES to 2 NUM_SCALES - 1 in the odd ones
(cotam.entropy.trellis), those from Z_ROWS on for the hyper-latent: the distributions that symbols really have where the
model predicts a scale. Those from GAUSSIAN_ROWS on are zero-mean discretised Gaussians, for maps.
The tables are part of a checkpoint (stored as integers, never recomputed by a decoder), so they cannot differ between
machines. Row r covers symbols -radius[r] .. radius[r] and, last, the escape symbol, which stands for anything outside.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_SCALES = 64
NUM_SKIPPED_SCALES = 6  # below this index (a deviation of 0.23) an element is 0 and not coded at all
Z_ROWS = 2 * NUM_SCALES  # the first row of the hyper-latent
GAUSSIAN_ROWS = 3 * NUM_SCALES  # the first row of Gaussians
NUM_ROWS = 4 * NUM_SCALES
COUNTED_MAX = 1279  # five deviations of the largest scale
SCALE_MIN = 0.11
SCALE_MAX = 256.0
LEVEL_STEP = 5 / 8  # how far the levels of y lie apart; numba's caches of other files do not notice a change here
PRECISION_BITS = 16
_TAIL_MASS = 2.0**-15  # mass left to the escape symbol: rare enough to cost nothing, common enough for a frequency
_PRIOR_COUNT = 64  # pseudo-counts a symbol: the weight of the Gaussian in a fitted row


class Tables(NamedTuple):
    """Frequencies of every row, concatenated.

    cdf: uint32 (K,), cumulative frequencies; row r is cdf[start[r] : start[r + 1]], from 0, its last entry 65536.
    start: int32 (NUM_ROWS + 1,), where each row begins in ``cdf``.
    radius: int32 (NUM_ROWS,), largest magnitude with a symbol of its own.
    """

    cdf: NDArray[np.uint32]
    start: NDArray[np.int32]
    radius: NDArray[np.int32]


def scales() -> NDArray[np.float64]:
    """The NUM_SCALES standard deviations, log-spaced, in units of what they are of."""
    return np.exp(np.linspace(math.log(SCALE_MIN), math.log(SCALE_MAX), NUM_SCALES))


def build_tables(counts: NDArray[np.int64] | None = None) -> Tables:
    """Build the tables; done once, when a checkpoint is exported.

    Args:
        counts: int (3, NUM_SCALES, 2 COUNTED_MAX + 1), how often each symbol from -COUNTED_MAX to COUNTED_MAX of ``y``,
            in even and in odd levels, and of the hyper-latent was coded under each scale index; None takes Gaussians
            for them, too. A search by rate and heavy tails make real symbols differ from them by some 2 % of the bits.
    """
    symbols = np.arange(-COUNTED_MAX, COUNTED_MAX + 1)
    gaussians = [_mass_between(np.append(symbols, COUNTED_MAX + 1) - 0.5, scale) for scale in scales()]
    of_levels = [level_mass(symbols, odd, scale / LEVEL_STEP) for odd in (0, 1) for scale in scales()]
    fitted = [*of_levels, *gaussians]
    if counts is not None:
        both_signs = (counts + counts[..., ::-1]).reshape(Z_ROWS + NUM_SCALES, -1)
        expected, fitted = fitted, []
        for row, gaussian in zip(both_signs, expected, strict=True):
            width = 1 + np.count_nonzero(gaussian > 2.0**-PRECISION_BITS)  # a Gaussian fills in what was seldom seen
            fitted.append((row + _PRIOR_COUNT * width * gaussian) / (row.sum() + _PRIOR_COUNT * width))
    rows, radii = [], []
    for mass in (*fitted, *gaussians):
        radius = max(1, int(np.argmax(1 - _mass_within(mass) <= _TAIL_MASS)))
        kept = mass[COUNTED_MAX - radius : COUNTED_MAX + radius + 1]
        rows.append(np.concatenate([[0], np.cumsum(_to_frequencies(np.append(kept, max(1 - kept.sum(), 2.0**-16))))]))
        radii.append(radius)
    start = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    return Tables(np.concatenate(rows).astype(np.uint32), start.astype(np.int32), np.array(radii, dtype=np.int32))


def level_mass(symbols: NDArray[np.int64], odd: int, deviation: float) -> NDArray[np.float64]:
    """Mass of a zero-mean Gaussian nearest to the level of each of ``symbols``, which follow each other.

    Args:
        odd: which quantiser, 0 or 1.
        deviation: of the Gaussian, in steps between levels.
    """
    beside = np.concatenate([[symbols[0] - 1], symbols, [symbols[-1] + 1]])
    levels = 2 * beside - odd * np.sign(beside)
    return _mass_between((levels[1:] + levels[:-1]) / 2, deviation)


def _mass_between(edges: NDArray[np.float64], deviation: float) -> NDArray[np.float64]:
    """Mass of a zero-mean Gaussian between each of ``edges`` and the next."""
    return np.diff([0.5 * math.erfc(-e / (deviation * math.sqrt(2))) for e in edges])


def _mass_within(mass: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mass of the symbols up to each magnitude from 0 on."""
    pairs = mass[COUNTED_MAX:] + mass[COUNTED_MAX::-1]
    pairs[0] /= 2
    within: NDArray[np.float64] = np.cumsum(pairs)
    return within


def code_lengths(symbols: NDArray[Any], rows: NDArray[np.uint8], tables: Tables) -> NDArray[np.float64]:
    """Bits of each of ``symbols`` in its CDF row; one without an entry costs the escape and 16 bits."""
    values, radius = symbols.astype(np.int64), tables.radius[rows].astype(np.int64)
    escaped = np.abs(values) > radius
    entry = tables.start[rows] + np.where(escaped, 2 * radius + 1, values + radius)
    frequency = tables.cdf[entry + 1].astype(np.int64) - tables.cdf[entry]
    bits: NDArray[np.float64] = PRECISION_BITS - np.log2(frequency) + 16 * escaped
    return bits


def check_tables(tables: Tables) -> None:
    """Raise ValueError unless every row is a proper CDF: used on tables that come from a file."""
    cdf, start, radius = tables
    if start.shape != (NUM_ROWS + 1,) or radius.shape != (NUM_ROWS,) or start[0] != 0 or start[-1] != len(cdf):
        raise ValueError("CDF tables: wrong number of rows")
    if (np.diff(start) != 2 * radius + 3).any() or (radius < 0).any():
        raise ValueError("CDF tables: row lengths and radii disagree")
    for r in range(NUM_ROWS):
        row = cdf[start[r] : start[r + 1]].astype(np.int64)
        if row[0] != 0 or row[-1] != 1 << PRECISION_BITS or (np.diff(row) <= 0).any():
            raise ValueError(f"CDF tables: row {r} is not a CDF")


def _to_frequencies(mass: NDArray[np.float64]) -> NDArray[np.int64]:
    """Integer frequencies >= 1 that sum to 2^16, close to ``mass`` in relative entropy."""
    total = 1 << PRECISION_BITS
    frequencies = np.maximum(1, np.round(mass * total)).astype(np.int64)
    while (surplus := int(frequencies.sum()) - total) != 0:
        # Take from (or give to) the symbols where one unit changes the code length least.
        # Stable: other kinds of sorting leave ties in an order that depends on the processor.
        order = np.argsort(-frequencies, kind="stable")[: min(abs(surplus), len(frequencies))]
        order = order[frequencies[order] > 1] if surplus > 0 else order
        frequencies[order] -= np.sign(surplus)
    return frequencies
