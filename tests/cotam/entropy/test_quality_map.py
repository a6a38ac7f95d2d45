"""Quality maps: lossless, small when smooth, and safe to decode from anything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from cotam.entropy.quality_map import decode_quality_map, encode_quality_map
from cotam.entropy.rans import RansCoder, RansError
from cotam.entropy.tables import build_tables

NUM_Q = 29
CODER = RansCoder(build_tables())


@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.integers(0, NUM_Q - 1)))
@settings(max_examples=200, deadline=None)
def test_round_trip(quality_map: NDArray[np.uint8]) -> None:
    encoded = encode_quality_map(quality_map, CODER)
    np.testing.assert_array_equal(decode_quality_map(*encoded, *quality_map.shape, NUM_Q, CODER), quality_map)


def test_smooth_map_is_small() -> None:
    """The map of a 768x512 image with one object in it: under 80 bytes, 3 % of a bitstream of 0.055 bpp."""
    i, j = np.mgrid[:32, :48]
    bump = np.exp(-((i - 14) ** 2 + (j - 20) ** 2) / 120)
    quality_map = np.rint(10 + 8 * bump).astype(np.uint8)
    assert len(encode_quality_map(quality_map, CODER)[1]) < 200
    assert len(encode_quality_map(np.full((32, 48), 12, np.uint8), CODER)[1]) < 20


@pytest.mark.parametrize("step", [2, 4, 8])
def test_a_map_in_steps_costs_no_more_than_one_in_ones(step: int) -> None:
    fine = np.random.default_rng(0).integers(0, 4, (24, 24), dtype=np.uint8)
    lowest, string = encode_quality_map((2 + step * fine).astype(np.uint8), CODER)
    assert lowest == 2 and len(string) == len(encode_quality_map(fine, CODER)[1])


def test_hostile_strings_are_refused() -> None:
    rng = np.random.default_rng(0)
    lowest, valid = encode_quality_map(np.arange(80, dtype=np.uint8).reshape(8, 10) % NUM_Q, CODER)
    strings = [b"", b"\x05", b"\x3f" + valid[1:], valid[:-2], valid + b"\0\0", *(rng.bytes(n) for n in range(200))]
    for string in strings:
        with pytest.raises(RansError):
            decode_quality_map(lowest, string, 8, 10, NUM_Q, CODER)
    for bad in ((lowest + 1, valid), (lowest, bytes([valid[0] | 0xC0]) + valid[1:])):
        with pytest.raises(RansError, match="out of range"):
            decode_quality_map(*bad, 8, 10, NUM_Q, CODER)
