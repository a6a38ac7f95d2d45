"""docs/format.md: a decoder written from it gives the same integers."""

from __future__ import annotations

import numpy as np
import pytest

from cotam.bitstream import unpack
from cotam.codec import Codec
from cotam.models.halves import merge_halves
from cotam.weights import read_weights
from tests.cotam import golden
from tests.cotam.reference_decoder import ReferenceDecoder


@pytest.fixture(scope="module")
def reference() -> ReferenceDecoder:
    return ReferenceDecoder(read_weights("cotam-base"))


def check(codec: Codec, reference: ReferenceDecoder, data: bytes) -> None:
    (expected,) = codec.decompress([data])
    decoded = reference.decode(data)
    assert (decoded.width, decoded.height) == (expected.width, expected.height)
    np.testing.assert_array_equal(decoded.quality_index, expected.quality_index)
    first, second = expected.y_fixed.unbind(0)
    y_fixed = merge_halves(first[None], second[None])[0].numpy()
    np.testing.assert_array_equal(decoded.y_fixed[: len(y_fixed)], y_fixed)
    assert not decoded.y_fixed[len(y_fixed) :].any()


@pytest.mark.parametrize("name", golden.golden_images())
def test_golden_bitstreams(codec: Codec, reference: ReferenceDecoder, name: str) -> None:
    check(codec, reference, (golden.FOLDER / f"{name}.bin").read_bytes())


@pytest.mark.parametrize(("tier", "quality"), enumerate([4.0, 1.0, 5.0, 3.0, 2.0, 6.0, 2.5, 4.0]))
def test_every_tier(codec: Codec, reference: ReferenceDecoder, tier: int, quality: float) -> None:
    image = np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    data = codec.encode(image, quality, np.eye(4), strength=4 * (tier >= 6))
    assert unpack(data, codec.max_pixels).tier == tier
    check(codec, reference, data)


def test_eight_lanes_escapes_and_a_map_in_coarse_steps(
    codec: Codec, reference: ReferenceDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotam.entropy.rans._SYMBOLS_PER_LANE", 2**14)  # as an image of a megapixel would have
    generator = np.random.default_rng(0)
    image = generator.integers(0, 2, (250, 390, 3), dtype=np.uint8) * 255  # nothing is as dear
    data = codec.encode(image, 5.0, generator.random((5, 4)), strength=3.0)
    stream = unpack(data, codec.max_pixels)
    assert stream.lanes_log2 == 3 and stream.map_code is not None
    check(codec, reference, data)
