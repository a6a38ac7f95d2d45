"""Trellis-coded quantisation: the cheapest levels there are, exactly decodable, better than rounding."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cotam.entropy import search
from cotam.entropy.rans import SYMBOL_MAX, RansCoder
from cotam.entropy.search import estimated_bits, quantise
from cotam.entropy.tables import LEVEL_STEP, NUM_SCALES, NUM_SKIPPED_SCALES, build_tables, level_mass, scales
from cotam.entropy.trellis import (
    FOLLOWING,
    LEVEL_OFFSET,
    MEAN_STEPS,
    NUM_PATHS,
    ODD,
    coded_segment,
    decode_levels,
    reconstruct,
)

CODER = RansCoder(build_tables())


def _coded_in(levels: NDArray[np.int16], rows: NDArray[np.uint8], lanes_log2: int | None = None) -> int:
    """Bits of a string, which has to decode to ``levels``."""
    string, lanes_log2 = CODER.encode([coded_segment(levels, rows)], lanes_log2)
    decoder = CODER.decoder(string, lanes_log2)
    np.testing.assert_array_equal(decode_levels(decoder, rows), levels)
    decoder.finish()
    return 8 * (len(string) - (5 << lanes_log2))


def _reconstructed(levels: NDArray[np.int16]) -> NDArray[np.float32]:
    pixels: NDArray[np.float32] = reconstruct(torch.from_numpy(levels).float()).numpy() / MEAN_STEPS
    return pixels


@given(
    elements=st.lists(
        st.tuples(st.floats(-30, 30) | st.floats(-1e6, 1e6), st.integers(0, NUM_SCALES - 1)), min_size=1, max_size=200
    ),
    lanes_log2=st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_levels_come_back_and_are_near_what_was_quantised(elements: list[tuple[float, int]], lanes_log2: int) -> None:
    residuals, rows = np.array([e for e, _ in elements], np.float32), np.array([r for _, r in elements], np.uint8)
    levels = quantise(residuals[None], rows[None])[0]
    _coded_in(levels, rows, lanes_log2)
    skipped = rows < NUM_SKIPPED_SCALES
    assert not levels[skipped].any()
    largest = (SYMBOL_MAX - 8) * LEVEL_STEP
    errors = np.abs(_reconstructed(levels) - residuals.clip(-largest, largest))[~skipped]
    # Where rate matters small residuals become 0; nothing is off by more than what a symbol of many bits is worth.
    assert (errors < 2.5).all()


def test_any_symbols_decode_to_levels_that_a_decoder_can_hold() -> None:
    """A hostile string may have any 16-bit symbol."""
    symbols, rows = np.full(3, -SYMBOL_MAX, np.int16), np.full(3, 10, np.uint8)
    string, lanes_log2 = CODER.encode([(symbols, rows)], 0)
    assert decode_levels(CODER.decoder(string, lanes_log2), rows).tolist() == [-2 * SYMBOL_MAX] * 3


@pytest.mark.parametrize(
    ("num_steps", "largest_row", "spread", "off"),
    [(2000, 30, 1, 1e-4), (2000, 9, 12, 1e-3), (2300, 30, 1, 1e-3), (2300, 9, 12, 1e-3)],
    ids=["as in images", "dear symbols", "as in images, two blocks", "dear symbols, two blocks"],
)
def test_the_search_finds_the_cheapest_of_all_symbols(
    num_steps: int, largest_row: int, spread: float, off: float
) -> None:
    """Also where every symbol costs nearly as much as one can. Between blocks, where it decides, a little is lost."""
    rng = np.random.default_rng(0)
    rows = rng.integers(NUM_SKIPPED_SCALES, largest_row, NUM_PATHS * num_steps).astype(np.uint8)
    residuals = (spread * rng.standard_normal(len(rows)) * scales()[rows]).astype(np.float32)
    levels = quantise(residuals[None], rows[None])[0]
    of_path = slice(3, None, NUM_PATHS)
    totals = np.full(len(ODD), np.inf)  # of the best way to each state
    totals[0] = 0
    state, found = 0, 0.0
    for residual, row, level in zip(residuals[of_path], rows[of_path].tolist(), levels[of_path].tolist(), strict=True):
        before, totals = totals, np.full(len(ODD), np.inf)
        nearest = round(float(residual) / (2 * LEVEL_STEP))
        for symbol in {0, *range(nearest - 2, nearest + 3)}:
            costs = np.array([_cost(float(residual), row, symbol, odd) for odd in (0, 1)])
            np.minimum.at(totals, FOLLOWING[:, symbol & 1], before + costs[ODD])
        symbol = (level + int(ODD[state]) * int(np.sign(level))) // 2
        found += _cost(float(residual), row, symbol, int(ODD[state]))
        state = FOLLOWING[state, symbol & 1]
    assert math.isclose(found, totals.min(), rel_tol=off)


@pytest.mark.parametrize("dearest", [0.1, 1, 10, 100])
def test_paths_stay_whole_whatever_is_searched(dearest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that make every total as large as it gets, residuals of any size and that are no numbers."""
    rng = np.random.default_rng(5)
    costs = [np.float32(dearest * rng.random(known.shape)) for known in search._costs()]
    monkeypatch.setattr(search, "_costs", lambda: costs)
    for num_elements in (1, 7, NUM_PATHS * 10, NUM_PATHS * 5000 + 3):
        rows = rng.integers(NUM_SKIPPED_SCALES, NUM_SCALES, num_elements).astype(np.uint8)
        residuals = 10 * rng.standard_normal(num_elements).astype(np.float32)
        for share, value in ((0.05, np.nan), (0.1, 1e38)):
            residuals[rng.random(num_elements) < share] = value
        _coded_in(quantise(residuals[None], rows[None])[0], rows)


@functools.cache
def _cost(residual: float, row: int, symbol: int, odd: int) -> float:
    """The squared error and the rate of one symbol, from their definitions."""
    sign = int(np.sign(symbol))
    value = (2 * symbol - odd * sign) * LEVEL_STEP + sign * LEVEL_OFFSET
    mass = level_mass(np.array([symbol]), odd, scales()[row] / LEVEL_STEP)[0]
    return float((value - residual) ** 2 - math.log2(max(mass, 2**-18)) / search._BITS_PER_ERROR)


def test_bits_and_errors_are_fewer_than_those_of_rounding_with_a_dead_zone() -> None:
    """At equal bits less distortion, for elements of any deviation."""
    rng = np.random.default_rng(1)
    for row in (20, 30, 40):
        residuals = (rng.standard_normal(100_000) * scales()[row]).astype(np.float32)
        rows = np.full(len(residuals), row, np.uint8)
        levels = quantise(residuals[None], rows[None])[0]
        bits = _coded_in(levels, rows)
        error = float(np.mean((residuals - _reconstructed(levels)) ** 2))
        rounded = []
        for step in np.linspace(0.6, 2.5, 39):
            magnitudes = np.floor(np.abs(residuals) / step + 0.4)
            symbols = np.copysign(magnitudes, residuals).astype(np.int64)
            counts = np.unique(symbols, return_counts=True)[1] / len(symbols)
            entropy = -float((counts * np.log2(counts)).sum()) * len(symbols)
            rounded.append((entropy, float(np.mean((residuals - symbols * step) ** 2))))
        entropies, errors = np.array(rounded).T
        assert error < 0.93 * np.interp(bits, entropies[::-1], errors[::-1])


@pytest.mark.parametrize("num_images", [1, 5])
def test_threads_find_what_one_finds(num_images: int) -> None:
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 40, (num_images, 300, 160)).astype(np.uint8)
    residuals = (rng.standard_normal(rows.shape) * scales()[rows]).astype(np.float32)
    alone = quantise(residuals, rows)
    assert alone.any()
    np.testing.assert_array_equal(quantise(residuals, rows, num_threads=3), alone)


def test_estimated_bits_are_those_of_tables_of_gaussians() -> None:
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 50, (1, 200, 300)).astype(np.uint8)
    levels = quantise((rng.standard_normal(rows.shape) * scales()[rows]).astype(np.float32), rows)
    estimated = estimated_bits(levels[0], rows[0])
    assert not estimated[rows[0] < NUM_SKIPPED_SCALES].any()
    assert abs(float(estimated.sum()) / _coded_in(levels[0], rows[0]) - 1) < 0.01


def test_the_machine_is_pinned() -> None:
    """It is part of the format: the levels of a string of symbols that are all 1, by the rule in docs/format.md."""
    levels = np.repeat([2, 1, 1, 2, 1, 2, 2, 1, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 2, 2, 1, 1, 1], NUM_PATHS)
    symbols, rows = coded_segment(levels, np.full(len(levels), 20, np.uint8))
    assert (symbols == 1).all()
    np.testing.assert_array_equal(rows, 20 + NUM_SCALES * (2 - levels))
