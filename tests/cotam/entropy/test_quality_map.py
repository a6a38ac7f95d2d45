"""Quality maps: lossless, small when smooth, and safe to decode from anything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from cotam.entropy.quality_map import decode_quality_map, encode_quality_map
from cotam.entropy.rans import MAX_LANES_LOG2, RansCoder, RansError
from cotam.entropy.tables import build_tables

NUM_Q = 29
CODER = RansCoder(build_tables())


@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.integers(0, NUM_Q - 1)))
@settings(max_examples=200, deadline=None)
def test_round_trip(quality_map: NDArray[np.uint8]) -> None:
    lowest, code, segment = encode_quality_map(quality_map, CODER)
    for lanes_log2 in range(MAX_LANES_LOG2 + 1):
        after = np.arange(-5, 5, dtype=np.int16), np.full(10, 140, dtype=np.uint8)
        decoder = CODER.decoder(*CODER.encode([segment, after], lanes_log2))
        decoded = decode_quality_map(lowest, code, decoder, *quality_map.shape, NUM_Q)
        np.testing.assert_array_equal(decoded, quality_map)
        np.testing.assert_array_equal(decoder.decode(after[1]), after[0])
        decoder.finish()


def _num_bytes(quality_map: NDArray[np.uint8]) -> int:
    return len(CODER.encode([encode_quality_map(quality_map, CODER)[2]], 0)[0])


def test_smooth_map_is_small() -> None:
    """The map of a 768x512 image with one object in it, in quarters of levels."""
    i, j = np.mgrid[:32, :48]
    bump = np.exp(-((i - 14) ** 2 + (j - 20) ** 2) / 120)
    quality_map = np.rint(10 + 8 * bump).astype(np.uint8)
    assert _num_bytes(quality_map) < 150
    assert _num_bytes(np.full((32, 48), 12, np.uint8)) < 8


@pytest.mark.parametrize("step", [2, 4, 8])
def test_a_map_in_steps_costs_no_more_than_one_in_ones(step: int) -> None:
    fine = np.random.default_rng(0).integers(0, 4, (24, 24), dtype=np.uint8)
    coarse = (2 + step * fine).astype(np.uint8)
    assert encode_quality_map(coarse, CODER)[0] == 2 and _num_bytes(coarse) == _num_bytes(fine)


def test_hostile_strings_are_refused() -> None:
    rng = np.random.default_rng(0)
    lowest, code, segment = encode_quality_map(np.arange(80, dtype=np.uint8).reshape(8, 10) % NUM_Q, CODER)
    valid, _ = CODER.encode([segment], 0)

    def decode(lowest: int, code: int, string: bytes) -> None:
        decoder = CODER.decoder(string, 0)
        decode_quality_map(lowest, code, decoder, 8, 10, NUM_Q)
        decoder.finish()

    for string in (b"", b"\x05", valid[:-2], valid + b"\0\0", *(rng.bytes(n) for n in range(200))):
        with pytest.raises(RansError):
            decode(lowest, code, string)
    for bad_lowest, bad_code in ((lowest + 1, code), (lowest, code | 0xC0), (lowest, 0x3F)):
        with pytest.raises(RansError, match="out of range"):
            decode(bad_lowest, bad_code, valid)
