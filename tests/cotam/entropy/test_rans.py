"""rANS: exact, near the entropy, unbreakable, and pinned byte by byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cotam.entropy.rans import MAX_LANES_LOG2, SYMBOL_MAX, RansCoder, RansError, Segment
from cotam.entropy.tables import (
    COUNTED_MAX,
    NUM_SCALES,
    PRECISION_BITS,
    Tables,
    build_tables,
    check_tables,
    scales,
)

TABLES = build_tables()
CODER = RansCoder(TABLES)

_symbols = st.integers(-3, 3) | st.integers(-SYMBOL_MAX, SYMBOL_MAX)
_segments = st.lists(st.lists(st.tuples(_symbols, st.integers(0, NUM_SCALES - 1)), max_size=120), max_size=4)
_lanes_log2 = st.none() | st.integers(0, MAX_LANES_LOG2)


def _arrays(pairs: list[tuple[int, int]]) -> Segment:
    return np.array([s for s, _ in pairs], np.int16), np.array([r for _, r in pairs], np.uint8)


def _decode(coder: RansCoder, string: bytes, lanes_log2: int, segments: list[Segment]) -> list[NDArray[np.int16]]:
    decoder = coder.decoder(string, lanes_log2)
    symbols = [decoder.decode(rows) for _, rows in segments]
    decoder.finish()
    return symbols


def _latent_like(num_symbols: int, seed: int = 0) -> Segment:
    """Symbols of deviations as in the latents of a photograph: most below one step, few above ten."""
    rng = np.random.default_rng(seed)
    rows = np.minimum(3 + rng.gamma(2.0, 6.0, num_symbols), NUM_SCALES - 1).astype(np.uint8)
    return np.rint(rng.standard_normal(num_symbols) * scales()[rows]).astype(np.int16), rows


def _cross_entropy_bits(symbols: NDArray[np.int16], rows: NDArray[np.uint8], tables: Tables = TABLES) -> float:
    """Ideal code length under the tables, computed from their definition."""
    values, radius = symbols.astype(np.int64), tables.radius[rows].astype(np.int64)
    escaped = np.abs(values) > radius
    entry = tables.start[rows] + np.where(escaped, 2 * radius + 1, values + radius)
    frequency = tables.cdf[entry + 1].astype(np.int64) - tables.cdf[entry]
    return float((PRECISION_BITS - np.log2(frequency)).sum() + 16 * escaped.sum())


def _triangular_tables() -> Tables:
    radius = np.tile(np.arange(NUM_SCALES, dtype=np.int32) // 8 + 1, 4)
    rows = []
    for r in radius:
        frequency = np.append(1 + (r + 1 - np.abs(np.arange(-r, r + 1))) * 40000 // (r + 1) ** 2, 1)
        frequency[r] += (1 << PRECISION_BITS) - frequency.sum()
        rows.append(np.append(0, np.cumsum(frequency)))
    start = np.append(0, np.cumsum([len(row) for row in rows]))
    tables = Tables(np.concatenate(rows).astype(np.uint32), start.astype(np.int32), radius)
    check_tables(tables)
    return tables


@given(segments=_segments, lanes_log2=_lanes_log2)
@settings(max_examples=300, deadline=None)
def test_round_trip(segments: list[list[tuple[int, int]]], lanes_log2: int | None) -> None:
    arrays = [_arrays(pairs) for pairs in segments]
    string, used_lanes_log2 = CODER.encode(arrays, lanes_log2)
    assert lanes_log2 in (None, used_lanes_log2)
    for (symbols, _), decoded in zip(arrays, _decode(CODER, string, used_lanes_log2, arrays), strict=True):
        np.testing.assert_array_equal(decoded, symbols)


@pytest.mark.parametrize("lanes_log2", range(MAX_LANES_LOG2 + 1))
def test_code_length_is_that_of_the_entropy(lanes_log2: int) -> None:
    symbols, rows = _latent_like(400_000)
    string, _ = CODER.encode([(symbols, rows)], lanes_log2)
    state_bits = 8 * (5 << lanes_log2)
    assert len(string) * 8 - state_bits < 1.0002 * _cross_entropy_bits(symbols, rows)


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["even levels", "odd levels", "hyper-latent"])
def test_fitted_tables_code_what_they_were_fitted_to_near_its_entropy(kind: int) -> None:
    rng = np.random.default_rng(4)
    rows = np.repeat(np.array([12, 16, 20, 40], np.uint8), 50_000)
    deviations = rng.laplace(size=(2, len(rows))) * scales()[rows] * 0.7
    fitted, coded = (np.trunc(d + np.copysign(0.4, d)).astype(np.int16) for d in deviations)  # with a dead zone
    counts = np.zeros((3, NUM_SCALES, 2 * COUNTED_MAX + 1), np.int64)
    np.add.at(counts[kind], (rows, fitted.astype(np.int64) + COUNTED_MAX), 1)
    rows += kind * NUM_SCALES
    tables = build_tables(counts)
    check_tables(tables)
    for row in np.unique(rows):
        symbols, its_rows = coded[rows == row], rows[rows == row]
        frequency = np.unique(symbols, return_counts=True)[1] / len(symbols)
        entropy = -float((frequency * np.log2(frequency)).sum()) * len(symbols)
        bits = _cross_entropy_bits(symbols, its_rows, tables)
        assert bits < 1.01 * entropy
        assert bits < 0.98 * _cross_entropy_bits(symbols, its_rows)
        assert 8 * len(RansCoder(tables).encode([(symbols, its_rows)])[0]) < 1.005 * bits + 256
    for seldom in (0, 30, 63, 64, 94, 127, 158, 191):  # what was never seen is coded as a Gaussian
        assert tables.radius[seldom] == TABLES.radius[seldom]


def test_altered_strings_are_refused_or_decode_to_something() -> None:
    rng = np.random.default_rng(1)
    segments = [_latent_like(500, seed) for seed in (2, 3)]
    string, lanes_log2 = CODER.encode(segments, lanes_log2=1)
    num_refused = 0
    for _ in range(3000):
        altered = bytearray(string[: rng.integers(len(string)) if rng.random() < 0.3 else None])
        for _ in range(rng.integers(1, 8)):
            if altered:
                altered[rng.integers(len(altered))] = rng.integers(256)
        try:
            decoded = _decode(CODER, bytes(altered), lanes_log2, segments)
        except RansError:
            num_refused += 1
        else:
            assert [len(d) for d in decoded] == [500, 500]
    assert num_refused > 2900  # lanes have to end where they began, which hardly any altered string achieves


def test_bytes_are_pinned() -> None:
    """The format itself: a change here makes every stored image unreadable. Built from integers, so exact anywhere."""
    coder = RansCoder(_triangular_tables())
    noise = np.arange(3000) * 2654435761 % 2**32 >> 16
    symbols = np.where(noise % 97 == 0, noise - 2**15, noise % 7 - 3).clip(-SYMBOL_MAX).astype(np.int16)
    rows = (noise // 7 % NUM_SCALES).astype(np.uint8)
    segments = list(zip(np.split(symbols, [7, 1000]), np.split(rows, [7, 1000]), strict=True))

    short, _ = coder.encode([(symbols[1:9], rows[1:9])], lanes_log2=0)
    assert short.hex() == "b61d660a012044fe7f5e03"
    digests = [hashlib.sha256(coder.encode(segments, lanes_log2)[0]).hexdigest()[:16] for lanes_log2 in range(4)]
    assert digests == ["8e59b60014510f05", "48470536b62225b1", "b480cfd75885fa32", "9b9111c65b43437d"]


@pytest.mark.parametrize(
    ("field", "alter", "message"),
    [
        ("cdf", lambda cdf: np.where(np.arange(len(cdf)) == 2, cdf[1], cdf), "row 0 is not a CDF"),
        ("cdf", lambda cdf: cdf + np.uint32(1), "row 0 is not a CDF"),
        ("cdf", lambda cdf: cdf[:-1], "wrong number of rows"),
        ("start", lambda start: start[:-1], "wrong number of rows"),
        ("start", lambda start: np.append(start[:1], start[1:] - 1), "wrong number of rows"),
        ("radius", lambda radius: radius + 1, "row lengths and radii disagree"),
        ("radius", lambda radius: radius[:-1], "wrong number of rows"),
    ],
)
def test_malformed_tables_are_refused(field: str, alter: Callable[..., NDArray[Any]], message: str) -> None:
    check_tables(TABLES)
    with pytest.raises(ValueError, match=message):
        check_tables(TABLES._replace(**{field: alter(getattr(TABLES, field))}))
