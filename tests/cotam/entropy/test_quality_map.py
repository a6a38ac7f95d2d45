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
from cotam.entropy.tables import gaussian_tables

NUM_Q = 29
CODER = RansCoder(gaussian_tables())


@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.integers(0, NUM_Q - 1)))
@settings(max_examples=200, deadline=None)
def test_round_trip(quality_map: NDArray[np.uint8]) -> None:
    string = encode_quality_map(quality_map, CODER)
    np.testing.assert_array_equal(decode_quality_map(string, *quality_map.shape, NUM_Q, CODER), quality_map)


def test_smooth_map_is_small() -> None:
    """The map of a 768x512 image with one object in it: under 80 bytes, 3 % of a bitstream of 0.055 bpp."""
    i, j = np.mgrid[:32, :48]
    bump = np.exp(-((i - 14) ** 2 + (j - 20) ** 2) / 120)
    quality_map = np.rint(10 + 8 * bump).astype(np.uint8)
    assert len(encode_quality_map(quality_map, CODER)) < 200
    assert len(encode_quality_map(np.full((32, 48), 12, np.uint8), CODER)) < 20


def test_hostile_strings_are_refused() -> None:
    rng = np.random.default_rng(0)
    valid = encode_quality_map(np.arange(80, dtype=np.uint8).reshape(8, 10) % NUM_Q, CODER)
    strings = [b"", b"\x05", b"\xff" + valid[1:], valid[:-2], valid + b"\0\0", *(rng.bytes(n) for n in range(200))]
    for string in strings:
        with pytest.raises(RansError):
            decode_quality_map(string, 8, 10, NUM_Q, CODER)
    with pytest.raises(RansError, match="out of range"):
        decode_quality_map(valid, 8, 10, NUM_Q - 1, CODER)
