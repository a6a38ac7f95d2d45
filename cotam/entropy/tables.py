"""Integer CDF tables: one row per scale of a zero-mean discretised Gaussian, 16 bits, with an escape symbol.

The tables are part of a checkpoint (stored as integers, never recomputed by a decoder), so they cannot differ between
machines. Row r covers symbols -radius[r] .. radius[r] and, last, the escape symbol, which stands for anything outside.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_SCALES = 64
SCALE_MIN = 0.11
SCALE_MAX = 256.0
PRECISION_BITS = 16
_TAIL_MASS = 2.0**-15  # mass left to the escape symbol: rare enough to cost nothing, common enough for a frequency


class Tables(NamedTuple):
    """Frequencies of every row, concatenated.

    cdf: uint32 (K,), cumulative frequencies; row r is cdf[start[r] : start[r + 1]], from 0, its last entry 65536.
    start: int32 (NUM_SCALES + 1,), where each row begins in ``cdf``.
    radius: int32 (NUM_SCALES,), largest magnitude with a symbol of its own.
    """

    cdf: NDArray[np.uint32]
    start: NDArray[np.int32]
    radius: NDArray[np.int32]


def scales() -> NDArray[np.float64]:
    """The NUM_SCALES standard deviations, log-spaced, in quantisation steps."""
    return np.exp(np.linspace(math.log(SCALE_MIN), math.log(SCALE_MAX), NUM_SCALES))


def gaussian_tables() -> Tables:
    """Build the tables of ``scales()``; done once, when a checkpoint is exported."""
    rows, radii = [], []
    for scale in scales():
        radius = 1
        while math.erfc((radius + 0.5) / (scale * math.sqrt(2))) > _TAIL_MASS:
            radius += 1
        edges = np.arange(-radius, radius + 2) - 0.5
        cumulative = np.array([0.5 * math.erfc(-e / (scale * math.sqrt(2))) for e in edges])
        mass = np.append(np.diff(cumulative), max(1.0 - (cumulative[-1] - cumulative[0]), 2.0**-16))
        rows.append(np.concatenate([[0], np.cumsum(_to_frequencies(mass))]))
        radii.append(radius)
    start = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    return Tables(np.concatenate(rows).astype(np.uint32), start.astype(np.int32), np.array(radii, dtype=np.int32))


def check_tables(tables: Tables) -> None:
    """Raise ValueError unless every row is a proper CDF: used on tables that come from a file."""
    cdf, start, radius = tables
    if start.shape != (NUM_SCALES + 1,) or radius.shape != (NUM_SCALES,) or start[0] != 0 or start[-1] != len(cdf):
        raise ValueError("CDF tables: wrong number of rows")
    if (np.diff(start) != 2 * radius + 3).any() or (radius < 0).any():
        raise ValueError("CDF tables: row lengths and radii disagree")
    for r in range(NUM_SCALES):
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
