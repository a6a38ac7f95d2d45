"""Elements that are not coded: a CDF row below NUM_SKIPPED_SCALES means that the symbol is 0, and nothing is written.

Elements are visited in C order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cotam.entropy.compiled import compiled
from cotam.entropy.tables import NUM_SKIPPED_SCALES


def drop_skipped(symbols: NDArray[np.int16], rows: NDArray[np.uint8]) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """The coded symbols and their CDF rows, each (n,), from contiguous arrays of one shape."""
    coded: tuple[NDArray[np.int16], NDArray[np.uint8]] = _drop(symbols.ravel(), rows.ravel(), NUM_SKIPPED_SCALES)
    return coded


def coded_rows(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The CDF rows, (n,), of the elements that are coded."""
    return rows[rows >= NUM_SKIPPED_SCALES]


def restore_skipped(coded: NDArray[np.int16], rows: NDArray[np.uint8]) -> NDArray[np.int16]:
    """The inverse of ``drop_skipped``: int16 of the shape of ``rows``, zero where nothing was coded."""
    restored: NDArray[np.int16] = _restore(coded, rows.ravel(), NUM_SKIPPED_SCALES)
    return restored.reshape(rows.shape)


# The number of skipped rows is an argument: numba's cache does not notice a constant that changes in another file.


@compiled
def _drop(symbols, rows, num_skipped):  # type: ignore[no-untyped-def]
    out_symbols = np.empty(rows.size + 1, dtype=np.int16)
    out_rows = np.empty(rows.size + 1, dtype=np.uint8)
    n = 0
    for k in range(rows.size):
        out_symbols[n] = symbols[k]
        out_rows[n] = rows[k]
        n += rows[k] >= num_skipped  # branch-free: a skipped element is overwritten by the next
    return out_symbols[:n], out_rows[:n]


@compiled
def _restore(coded, rows, num_skipped):  # type: ignore[no-untyped-def]
    out = np.zeros(rows.size, dtype=np.int16)
    n = 0
    for k in range(rows.size):
        if rows[k] >= num_skipped:
            out[k] = coded[n]
            n += 1
    return out
