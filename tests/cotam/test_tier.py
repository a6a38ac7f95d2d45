"""Which of a codec's models codes an image."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data

from cotam.bitstream import BitstreamError, pack, unpack
from cotam.codec import Codec


def test_each_image_has_the_most_special_tier_and_no_other_decodes_it(codec: Codec) -> None:
    ramp = np.tile(np.linspace(0, 1, 8), (8, 1))
    image = np.ascontiguousarray(skimage.data.coffee()[:128, :128])
    assert [(tier.lowest_quality, tier.highest_quality) for tier in codec.tiers] == [(1, 3.75), (5, 8), (1, 8)]
    cases = ((1, 0, 0), (3.75, 0, 0), (4, 0, 2), (5, 0, 1), (8, 0, 1), (2, 2, 0), (6.5, 2, 1), (3.5, 4, 2), (5, 4, 2))
    for quality, strength, tier in cases:
        stream = unpack(codec.encode(image, quality, ramp, strength), codec.max_pixels)
        assert stream.tier == tier
        for other in {0, 1, 2} - {tier}:
            with pytest.raises(BitstreamError):
                codec.decode(pack(stream._replace(tier=other)))
        with pytest.raises(BitstreamError, match="bitstream has tier 3, the model has 3"):
            codec.decode(pack(stream._replace(tier=3)))
