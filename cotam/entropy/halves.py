"""Between latents (M, h, w) and the flat arrays that the entropy coder takes, one checkerboard half at a time.

Element (c, i, j) is in half (c + i + j) mod 2; elements whose CDF row is below ``num_skipped`` are zero and not coded.
The order is that of memory: channel, row, column.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray


def gather_half(
    symbols: NDArray[np.int16] | None, rows: NDArray[np.uint8], half: int, num_skipped: int
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """The coded symbols and CDF rows of one half, each (n,), from arrays (M, h, w); no symbols for None."""
    if symbols is None:
        out_rows = _gather_rows(rows, half, num_skipped)
        return np.empty(0, dtype=np.int16), out_rows
    out_symbols, out_rows = _gather(symbols, rows, half, num_skipped)
    return out_symbols, out_rows


def scatter_half(coded: NDArray[np.int16], rows: NDArray[np.uint8], half: int, num_skipped: int) -> NDArray[np.int16]:
    """The inverse of ``gather_half``: int16 (M, h, w), zero where nothing was coded."""
    out = np.zeros(rows.shape, dtype=np.int16)
    _scatter(coded, rows, half, num_skipped, out)
    return out


@numba.njit(nogil=True, cache=True)
def _gather(symbols, rows, half, num_skipped):  # type: ignore[no-untyped-def]
    num_c, num_i, num_j = rows.shape
    out_symbols = np.empty(rows.size // 2 + num_c * num_i + 1, dtype=np.int16)
    out_rows = np.empty(rows.size // 2 + num_c * num_i + 1, dtype=np.uint8)
    n = 0
    for c in range(num_c):
        for i in range(num_i):
            for j in range((c + i + half) & 1, num_j, 2):
                row = rows[c, i, j]
                out_symbols[n] = symbols[c, i, j]
                out_rows[n] = row
                n += row >= num_skipped  # branch-free: a skipped element is overwritten by the next
    return out_symbols[:n], out_rows[:n]


@numba.njit(nogil=True, cache=True)
def _gather_rows(rows, half, num_skipped):  # type: ignore[no-untyped-def]
    num_c, num_i, num_j = rows.shape
    out_rows = np.empty(rows.size // 2 + num_c * num_i + 1, dtype=np.uint8)
    n = 0
    for c in range(num_c):
        for i in range(num_i):
            for j in range((c + i + half) & 1, num_j, 2):
                row = rows[c, i, j]
                out_rows[n] = row
                n += row >= num_skipped
    return out_rows[:n]


@numba.njit(nogil=True, cache=True)
def _scatter(coded, rows, half, num_skipped, out):  # type: ignore[no-untyped-def]
    num_c, num_i, num_j = rows.shape
    n = 0
    for c in range(num_c):
        for i in range(num_i):
            for j in range((c + i + half) & 1, num_j, 2):
                if rows[c, i, j] >= num_skipped:
                    out[c, i, j] = coded[n]
                    n += 1
