"""What qualities and importance maps are worth: fidelity for bytes, and bits where they are asked for."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data

from cotam.codec import Codec
from cotam.entropy.quality_map import encode_quality_map
from cotam.image import RGBImage
from cotam.importance import DEFAULT_STRENGTH
from cotam.metrics import psnr_rgb


def test_quality_buys_fidelity_with_bytes(packaged_codec: Codec, photos: dict[str, RGBImage]) -> None:
    for image in photos.values():
        strings = [
            packaged_codec.encode(image[:144, :144], quality) for quality in (1, 1.25, 2, 3, 3.75, 4, 4.75, 5, 6, 7, 8)
        ]
        num_bytes = [len(s) for s in strings]
        psnrs = [psnr_rgb(packaged_codec.decode(s), image[:144, :144]) for s in strings]
        assert num_bytes == sorted(set(num_bytes))
        assert psnrs == sorted(psnrs)
        assert psnrs[8] > 27


def test_importance_moves_bits_to_where_it_is(codec: Codec, photos: dict[str, RGBImage]) -> None:
    image = photos["astronaut"]
    importance = np.zeros((16, 16))
    importance[2:10, 6:14] = 1
    inside = np.kron(importance, np.ones((16, 16))) > 0
    steered = codec.decode(codec.encode(image, 4, importance, strength=4))
    uniform = codec.decode(codec.encode(image, 4))
    assert psnr_rgb(steered[inside], image[inside]) > psnr_rgb(uniform[inside], image[inside]) + 1
    assert psnr_rgb(steered[~inside], image[~inside]) < psnr_rgb(uniform[~inside], image[~inside])


def test_each_region_has_the_fidelity_of_its_own_quality(packaged_codec: Codec) -> None:
    """Quality 7 in a square, 1 around it: away from the seam as with 7, or 1, everywhere; and the bits follow."""
    image = np.ascontiguousarray(skimage.data.coffee()[:384, :576])
    region = np.zeros((24, 36))
    region[6:18, 10:26] = 1
    inside = np.zeros(image.shape[:2], bool)
    inside[128:256, 192:384] = True
    outside = np.ones(image.shape[:2], bool)
    outside[64:320, 128:448] = False
    strength = 6.0
    mixed = packaged_codec.encode(image, 1 + strength * region.mean(), region, strength)
    low, high = packaged_codec.encode(image, 1), packaged_codec.encode(image, 7)
    decoded, decoded_low, decoded_high = packaged_codec.decode_batch([mixed, low, high])
    assert abs(psnr_rgb(decoded[inside], image[inside]) - psnr_rgb(decoded_high[inside], image[inside])) < 0.3
    assert abs(psnr_rgb(decoded[outside], image[outside]) - psnr_rgb(decoded_low[outside], image[outside])) < 0.3
    expected = (
        region.mean() * len(packaged_codec.encode(image[96:288, 160:416], 7)) * image.size / image[96:288, 160:416].size
    )
    expected += (1 - region.mean()) * len(low)
    assert abs(len(mixed) - expected) < 0.15 * expected


def test_importance_without_contrast_or_strength_is_a_uniform_quality(
    codec: Codec, photos: dict[str, RGBImage]
) -> None:
    image, importance = photos["coffee"], np.random.default_rng(0).random((24, 24))
    uniform = codec.encode(image, 4)
    assert codec.encode(image, 4, importance, strength=0) == uniform
    assert codec.encode(image, 4, np.full((3, 3), 0.7)) == uniform
    flipped = codec.encode(image, 4, importance[:, ::-1])
    assert flipped == codec.encode(image, 4, importance[:, ::-1].copy()) != uniform


@pytest.mark.parametrize("quality", [1.0, 1.5, 7.5, 8.0])
@pytest.mark.parametrize("strength", [6.0, -6.0])
def test_maps_stay_inside_the_model_and_decode(
    codec: Codec, photos: dict[str, RGBImage], quality: float, strength: float
) -> None:
    image = photos["coffee"]
    importance = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    quality_map = codec.quality_index(quality, image, importance, strength)
    assert isinstance(quality_map, np.ndarray) and quality_map.max() < codec.config.num_q
    assert quality_map.min() == 0 if quality < 4 else quality_map.max() == codec.config.num_q - 1
    grid = np.asarray(quality_map, dtype=float)
    rises = np.corrcoef(grid.mean(0), np.arange(grid.shape[1]))[0, 1]
    assert rises * strength > 0  # more where it is more important
    assert codec.decode(codec.encode(image, quality, importance, strength)).shape == image.shape


def test_map_takes_at_most_3_percent(codec: Codec, photos: dict[str, RGBImage]) -> None:
    """At the default quality and strength, for a map as smooth as attention is: together, and 4 % of any one."""
    i, j = np.mgrid[-1:1:24j, -1:1:24j]  # type: ignore[misc]
    importance = np.exp(-3 * (i**2 + j**2))
    coder = codec.tiers[0].coder
    maps, wholes = [], []
    for name, image in photos.items():
        q = codec.quality_index(4.0, image, importance, DEFAULT_STRENGTH)
        assert not isinstance(q, int)
        _, _, segment = encode_quality_map(q, coder)
        maps.append(1 + len(coder.encode([segment], 0)[0]) - len(coder.encode([], 0)[0]))  # its code and its words
        wholes.append(len(codec.encode(image, importance=importance)))
        assert 0 < maps[-1] <= 0.04 * wholes[-1], name
    assert sum(maps) <= 0.03 * sum(wholes)
