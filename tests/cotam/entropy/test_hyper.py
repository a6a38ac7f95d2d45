"""CDF rows of the hyper-latent: the same in a decoder, and worth their while where residuals are large together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cotam.entropy.hyper import HyperRows
from cotam.entropy.rans import SYMBOL_MAX, RansCoder, RansError
from cotam.entropy.tables import NUM_SCALES, Z_ROWS, build_tables, code_lengths, scales

TABLES = build_tables()
CODER, ROWS = RansCoder(TABLES), HyperRows(TABLES)


def _coded(residuals: NDArray[np.int16], indexes: NDArray[np.uint8]) -> bytes:
    return CODER.encode([(residuals.ravel(), ROWS.rows(residuals, indexes).ravel())], 1)[0]


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 1000),
    largest=st.sampled_from([0, 1, 5, 127, SYMBOL_MAX]),
)
@settings(max_examples=200, deadline=None)
def test_round_trip(shape: tuple[int, int, int], seed: int, largest: int) -> None:
    rng = np.random.default_rng(seed)
    residuals = rng.integers(-largest, largest, shape, endpoint=True).astype(np.int16)
    indexes = rng.integers(0, NUM_SCALES, shape).astype(np.uint8)
    decoder = CODER.decoder(_coded(residuals, indexes), 1)
    np.testing.assert_array_equal(ROWS.decode(decoder, indexes), residuals)
    decoder.finish()


def test_truncated_strings_are_refused() -> None:
    indexes = np.full((8, 6, 6), 25, np.uint8)
    string = _coded(np.random.default_rng(0).integers(-9, 9, indexes.shape).astype(np.int16), indexes)
    for length in range(10, len(string), 2):
        with pytest.raises(RansError):
            ROWS.decode(CODER.decoder(string[:length], 1), indexes)


def test_rows_follow_what_is_around() -> None:
    """The first element has the row of its index, later ones higher rows after large residuals, lower after zeros."""
    indexes = np.full((40, 6, 6), 25, np.uint8)
    quiet = ROWS.rows(np.zeros(indexes.shape, np.int16), indexes)
    loud = ROWS.rows(np.full(indexes.shape, 20, np.int16), indexes)
    assert quiet[0, 0, 0] == loud[0, 0, 0] == Z_ROWS + 25
    assert quiet[1:].max() < Z_ROWS + 25 < loud[1:].min()
    assert quiet[-1, -1, -1] <= Z_ROWS + 15 and loud[-1, -1, -1] >= Z_ROWS + 33
    nowhere = ROWS.rows(np.full(indexes.shape, 20, np.int16), np.zeros_like(indexes))  # channels that are always 0
    assert nowhere.min() == Z_ROWS


def test_bits_are_saved_where_residuals_are_large_together() -> None:
    rng = np.random.default_rng(1)
    indexes = np.broadcast_to(rng.integers(10, 30, (64, 1, 1)), (64, 8, 12)).astype(np.uint8)
    saved = []
    for spread in (0.0, 0.6):  # of the log of the deviation over the image
        together = np.exp(spread * rng.standard_normal((8, 12)))
        residuals = np.rint(rng.standard_normal(indexes.shape) * scales()[indexes] * together).astype(np.int16)
        moved, fixed = (
            code_lengths(residuals.ravel(), rows.ravel(), TABLES).sum()
            for rows in (ROWS.rows(residuals, indexes), indexes + np.uint8(Z_ROWS))
        )
        saved.append(1 - moved / fixed)
    alike, apart = saved
    assert alike > -0.03 and apart > 0.05
