"""Golden bitstreams: three small images and what ``cotam-base`` made of them, so that no change alters what is stored.

What is pinned is what the format defines: that a stored bitstream decodes to exactly these integers. Pixels come out of
floating-point arithmetic and are pinned to 50 dB. New weights need new files: ``python -m tests.cotam.golden``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cotam.codec import Codec, DecompressedImage
from cotam.image import RGBImage, encode_image

FOLDER = Path(__file__).parent
MANIFEST = FOLDER / "manifest.json"


class GoldenImage(NamedTuple):
    """An image and the arguments it is encoded with."""

    pixels: RGBImage
    quality: float
    importance: NDArray[np.float64] | None = None


def golden_images() -> dict[str, GoldenImage]:
    """The images by name; integer arithmetic, so the same everywhere."""
    importance = np.zeros((6, 5))
    importance[1:4, 1:3] = 1
    return {
        "uniform": GoldenImage(_texture(64, 96), 4.0),
        "mapped": GoldenImage(_texture(90, 70), 2.75, importance),
        "sliver": GoldenImage(_texture(37, 1), 8.0),
    }


def y_fixed_sha256(image: DecompressedImage) -> str:
    """The sha256 of the decoded integers, int32 little-endian in the order of memory."""
    return hashlib.sha256(image.y_fixed.numpy().astype("<i4").tobytes()).hexdigest()


def write(codec: Codec) -> None:
    """Write all files anew."""
    manifest: dict[str, Any] = {"model_sha256": codec.sha256, "y_fixed_sha256": {}}
    for name, image in golden_images().items():
        data = codec.encode(image.pixels, image.quality, image.importance)
        (FOLDER / f"{name}.bin").write_bytes(data)
        (FOLDER / f"{name}.png").write_bytes(encode_image(codec.decode(data)))
        manifest["y_fixed_sha256"][name] = y_fixed_sha256(codec.decompress([data])[0])
    MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n")


def _texture(height: int, width: int) -> RGBImage:
    i, j, c = np.ogrid[:height, :width, :3]
    ramp = 2 * i + j + 20 * c
    ripples = (i - height // 3) ** 2 // 9 + (j - width // 2) ** 2 // 7
    noise = (i * 7919 + j * 104729 + c * 1299709) % 23
    return ((ramp + np.abs(ripples % 64 - 32) * 3 + noise) % 256).astype(np.uint8)
