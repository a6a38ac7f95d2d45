"""Elements that are not coded: a CDF row below NUM_SKIPPED_SCALES means that the symbol is 0, and nothing is written.

Elements are visited in C order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotam.entropy.compiled import compiled
from cotam.entropy.tables import NUM_SKIPPED_SCALES


def drop_skipped(symbols: NDArray[Any], rows: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """The coded symbols and their CDF rows, each (n,), from contiguous arrays of one shape."""
    coded: tuple[NDArray[Any], NDArray[np.uint8]] = _drop(symbols.ravel(), rows.ravel(), NUM_SKIPPED_SCALES)
    return coded


def coded_rows(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The CDF rows, (n,), of the elements that are coded."""
    coded: NDArray[np.uint8] = _coded(rows.ravel(), NUM_SKIPPED_SCALES)
    return coded


def restore_skipped(coded: NDArray[np.int32], rows: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The inverse of ``drop_skipped``: of the shape of ``rows``, zero where nothing was coded."""
    restored: NDArray[np.int32] = _restore(coded, rows.ravel(), NUM_SKIPPED_SCALES)
    return restored.reshape(rows.shape)


# The number of skipped rows is an argument: numba's cache does not notice a constant that changes in another file.


@compiled
def _drop(symbols, rows, num_skipped):  # type: ignore[no-untyped-def]
    out_symbols = np.empty(rows.size + 1, dtype=symbols.dtype)
    out_rows = np.empty(rows.size + 1, dtype=np.uint8)
    n = 0
    for k in range(rows.size):
        out_symbols[n] = symbols[k]
        out_rows[n] = rows[k]
        n += rows[k] >= num_skipped  # branch-free: a skipped element is overwritten by the next
    return out_symbols[:n], out_rows[:n]


@compiled
def _coded(rows, num_skipped):  # type: ignore[no-untyped-def]
    out = np.empty(rows.size + 1, dtype=np.uint8)
    n = 0
    for k in range(rows.size):
        out[n] = rows[k]
        n += rows[k] >= num_skipped
    return out[:n]


@compiled
def _restore(coded, rows, num_skipped):  # type: ignore[no-untyped-def]
    out = np.zeros(rows.size, dtype=np.int32)
    n = 0
    for k in range(rows.size):
        if rows[k] >= num_skipped:
            out[k] = coded[n]
            n += 1
    return out
