"""Classical codecs to compare with, through Pillow: JPEG, WebP, AVIF, JPEG XL."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from cotam.image import MAX_SIDE_PX, RGBImage, encode_image
from cotam.metrics import psnr_rgb


class Baseline(NamedTuple):
    """A codec: the longest side that it takes, and options of Pillow's encoder beside its quality."""

    max_side_px: int
    options: Mapping[str, object]


# Each at the fullest effort that is still a common default; 4:2:0 where it is, as people store photographs.
BASELINES = {
    "jpeg": Baseline(65500, {"optimize": True}),
    "webp": Baseline(16383, {"method": 4}),
    "avif": Baseline(32768, {"speed": 6}),
    "jxl": Baseline(MAX_SIDE_PX, {"effort": 7}),
}


class BaselinePoint(NamedTuple):
    """One operating point: the codec's own quality setting, bytes, and PSNR in dB."""

    setting: int
    num_bytes: int
    psnr_rgb: float


def check_installed(codec: str) -> None:
    """Raise ValueError where ``codec`` needs a package that is missing."""
    if codec == "jxl":
        try:
            import pillow_jxl  # noqa: F401  # which makes Pillow know JPEG XL
        except ImportError:
            raise ValueError("JPEG XL is not installed: pip install 'cotam[jxl]'") from None


def encode_baseline(image: RGBImage, codec: str, setting: int) -> BaselinePoint:
    """Encode uint8 RGB (H, W, 3) with one of ``BASELINES`` at the codec's quality ``setting`` in [0, 100]."""
    data, decoded = transcode(image, codec, setting)
    return BaselinePoint(setting, len(data), psnr_rgb(image, decoded))


def transcode(image: RGBImage, codec: str, setting: int) -> tuple[bytes, RGBImage]:
    """The bytes that one of ``BASELINES`` makes of an image, and the image that they decode to."""
    check_installed(codec)
    data = encode_image(image, codec.upper(), quality=setting, **BASELINES[codec].options)
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
