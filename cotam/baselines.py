"""Classical codecs to compare with, through Pillow: JPEG, WebP, AVIF."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from cotam.image import RGBImage, encode_image
from cotam.metrics import psnr_rgb

# Each codec's fullest effort that is still a common default; 4:2:0 as people store photographs.
BASELINES = ("jpeg", "webp", "avif")
MAX_SIDES_PX = {"jpeg": 65500, "webp": 16383, "avif": 32768}
_OPTIONS: dict[str, dict[str, object]] = {
    "jpeg": {"optimize": True},
    "webp": {"method": 4},
    "avif": {"speed": 6},
}


class Point(NamedTuple):
    """One operating point: the codec's own quality setting, bytes, and PSNR in dB."""

    setting: int
    num_bytes: int
    psnr_rgb: float


def encode_baseline(image: RGBImage, codec: str, setting: int) -> Point:
    """Encode uint8 RGB (H, W, 3) with "jpeg", "webp" or "avif" at the codec's quality ``setting`` in [0, 100]."""
    data, decoded = transcode(image, codec, setting)
    return Point(setting, len(data), psnr_rgb(image, decoded))


def transcode(image: RGBImage, codec: str, setting: int) -> tuple[bytes, RGBImage]:
    """The bytes that "jpeg", "webp" or "avif" makes of an image, and the image that they decode to."""
    data = encode_image(image, codec.upper(), quality=setting, **_OPTIONS[codec])
    with Image.open(io.BytesIO(data)) as decoded:
        return data, np.asarray(decoded.convert("RGB"))


def bytes_at_psnr(image: RGBImage, codec: str, target: float) -> int | None:
    """Bytes that ``codec`` needs for a PSNR of ``target`` dB: bisection, then interpolation between two settings.

    Returns None when the target is outside of what the codec's settings reach.
    """
    low, high = encode_baseline(image, codec, 1), encode_baseline(image, codec, 98)
    if not low.psnr_rgb <= target <= high.psnr_rgb:
        return None
    while high.setting - low.setting > 1:
        middle = encode_baseline(image, codec, (low.setting + high.setting) // 2)
        low, high = (middle, high) if middle.psnr_rgb <= target else (low, middle)
    weight = (target - low.psnr_rgb) / max(high.psnr_rgb - low.psnr_rgb, 1e-9)
    return round(low.num_bytes * (1 - weight) + high.num_bytes * weight)
