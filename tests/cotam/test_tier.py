"""Which of a codec's models codes an image."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skimage.data
import torch

from cotam.bitstream import BitstreamError, pack, unpack
from cotam.codec import Codec
from cotam.config import Q_STEPS
from cotam.image import RGBImage
from cotam.models.codec_model import CodecModel
from cotam.models.int8_blocks import Int8Blocks
from cotam.models.precision import multiplies_int8
from cotam.weights import dump_codec, parse_codec, read_weights


def test_each_image_has_the_most_special_tier_and_no_other_decodes_it(codec: Codec) -> None:
    ramp = np.tile(np.linspace(0, 1, 8), (8, 1))
    image = np.ascontiguousarray(skimage.data.coffee()[:128, :128])
    assert [(tier.lowest_quality, tier.highest_quality) for tier in codec.tiers] == [
        (3.5, 4),
        (1, 1.75),
        (4.25, 5),
        (2.25, 3.25),
        (1, 3.25),
        (5, 8),
        (1, 5),
        (1, 8),
    ]
    assert [list(tier.models) for tier in codec.tiers] == [
        [160],
        [64],
        [256],
        [96, 160],
        [64, 96, 160],
        [256, 320],
        [64, 96, 160, 256],
        [64, 96, 160, 256, 320],
    ]
    cases = ((1, 0, 1), (1.75, 0, 1), (2, 0, 4), (2.25, 0, 3), (3.25, 0, 3), (3.5, 0, 0), (4, 0, 0), (4.25, 0, 2))
    cases += ((5, 0, 2), (5.25, 0, 5), (8, 0, 5), (2, 2, 4), (6.5, 2, 5), (2.5, 4, 6), (3.5, 4, 6), (5, 4, 7))
    for quality, strength, tier in cases:
        stream = unpack(codec.encode(image, quality, ramp, strength), codec.max_pixels)
        assert stream.tier == tier
        for other in {*range(8)} - {tier}:
            is_refused = stream.map_code is None and not codec.tiers[other].covers(stream.quality_index)
            with pytest.raises(BitstreamError, match=f"tier, {other}, is not for" if is_refused else None):
                codec.decode(pack(stream._replace(tier=other)))


def test_a_tier_that_a_codec_has_not_is_refused() -> None:
    weights = parse_codec(read_weights("cotam-base"), "packaged").tiers[-1]
    codec = Codec(parse_codec(dump_codec([weights]), "one tier"))
    stream = unpack(codec.encode(np.zeros((64, 64, 3), np.uint8)), codec.max_pixels)
    with pytest.raises(BitstreamError, match="bitstream has tier 1, the model has 1"):
        codec.decode(pack(stream._replace(tier=1)))


def test_models_are_made_once_and_alike_whoever_asks_first(codec: Codec, photos: dict[str, RGBImage]) -> None:
    image = photos["astronaut"][:128, :192]
    fresh = Codec.load()

    def make(_: int) -> CodecModel:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            return fresh.tiers[0].models[160]

    with ThreadPoolExecutor(8) as threads:
        (model,) = {*threads.map(make, range(16))}
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    string = codec.encode(image)
    for other in (fresh, pickle.loads(pickle.dumps(fresh))):  # as a task of Ray or a process may get it
        assert other.encode(image) == string
        np.testing.assert_array_equal(other.decode(string), codec.decode(string))


@pytest.mark.skipif(not multiplies_int8(torch.device("cpu")), reason="needs a CPU that multiplies int8")
def test_images_up_to_quality_5_are_transformed_in_int8(codec: Codec) -> None:
    for tier in codec.tiers:
        for num_channels, model in tier.models.items():
            in_int8 = [isinstance(model.g_a.body[1], Int8Blocks), isinstance(model.g_s.body[2], Int8Blocks)]
            assert in_int8 == 2 * [num_channels <= codec.config.num_channels(4 * Q_STEPS)]
