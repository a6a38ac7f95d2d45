"""Crops cut on the device: they are windows of the images, in all sizes, as often as an image is large."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cotam.image import RGBImage
from cotam.train.pool import ImagePool
from tests.corpus import to_bytes, write_tar

CPU = torch.device("cpu")
CROP_PX = 64


def ramps(height: int, width: int, blue: int) -> RGBImage:
    """Red is the row, green the column, blue the same everywhere."""
    image = np.full((height, width, 3), blue, np.uint8)
    image[..., 0], image[..., 1] = np.arange(height)[:, None], np.arange(width)
    return image


@pytest.fixture
def pool(tmp_path: Path) -> ImagePool:
    images = {"a": ramps(80, 100, 20), "b": ramps(200, 160, 120), "small": ramps(60, 90, 220)}
    members = [(f"{name}.png", to_bytes(Image.fromarray(image), format="PNG")) for name, image in images.items()]
    write_tar(tmp_path / "ramps.tar", members)
    (tmp_path / "none.tar").write_bytes(b"<html>not found</html>" * 100)
    return ImagePool.load([str(tmp_path / "*.tar")], CROP_PX, CPU, 2)


def test_crops_are_windows_of_the_images_in_every_size(pool: ImagePool) -> None:
    crops = torch.cat(list(itertools.islice(pool.batches(32, 0), 16))).int()
    assert crops.shape == (512, 3, CROP_PX, CROP_PX)
    inside = slice(4, -4)  # a filter looks beyond an image's edges
    slopes, mirrored = set(), 0
    for crop in crops:
        red, green, blue = crop[:, inside, inside]
        down, across = ((ends[-1] - ends[0]) / (CROP_PX - 9) for ends in (red.double(), green.double().T))
        assert torch.allclose(down, down[0], atol=0.1)
        assert torch.allclose(across.abs(), down[0], atol=0.1)
        line = torch.arange(red.shape[0])
        assert torch.allclose(red.double(), red[0] + line[:, None] * down, atol=2)
        assert torch.allclose(green.double(), green[:, :1] + line * across[:, None], atol=2)
        slopes.add((int(blue[0, 0]), round(2 * float(np.log2(down[0]))) / 2))
        mirrored += int(across[0] < 0)
    assert {value for value, _ in slopes} == {20, 120}  # the third is smaller than a crop
    assert {slope for value, slope in slopes if value == 120} == {0, 0.5, 1}
    assert 0.4 < mirrored / len(crops) < 0.6
    large = (crops[:, 2, 0, 0] == 120).double().mean()
    assert abs(large - 0.8) < 0.07  # it has four times the pixels


def test_a_seed_repeats_its_crops(pool: ImagePool) -> None:
    first, again, other = (next(pool.batches(8, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_image_that_is_large_enough_is_said(tmp_path: Path) -> None:
    write_tar(tmp_path / "small.tar", [("a.png", to_bytes(Image.fromarray(ramps(30, 90, 0)), format="PNG"))])
    with pytest.raises(ValueError, match=r"no image of at least 64x64 pixels in .*small\.tar; check data.train"):
        ImagePool.load([str(tmp_path / "small.tar")], CROP_PX, CPU, 1)
