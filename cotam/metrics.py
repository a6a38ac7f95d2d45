"""Measures of rate and distortion."""

from __future__ import annotations

from collections.abc import Sequence

import bjontegaard
import numpy as np

from cotam.image import RGBImage

_YCBCR = np.array(  # BT.601: rows Y, Cb, Cr of RGB
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=np.float32
)


def bpp(num_bytes: int, width: int, height: int) -> float:
    """Stored bits per pixel of the original image."""
    return 8 * num_bytes / (width * height)


def psnr_rgb(original: RGBImage, decoded: RGBImage) -> float:
    """Peak signal-to-noise ratio over all samples of two uint8 images of one shape, in dB; infinite when equal."""
    mse = float(np.mean((original.astype(np.float32) - decoded.astype(np.float32)) ** 2, dtype=np.float64))
    return 10 * float(np.log10(255**2 / mse)) if mse else float("inf")


def psnr_ycbcr(original: RGBImage, decoded: RGBImage) -> float:
    """Mean of the PSNRs of Y, Cb and Cr with the weights 6:1:1, in dB, as in the testing of video codecs (JCTVC).

    BT.601 full range. Arguments as for ``psnr_rgb``; of shape (H, W, 3).
    """
    difference = (original.astype(np.float32) - decoded.astype(np.float32)) @ _YCBCR.T
    mse = np.mean(difference.reshape(-1, 3) ** 2, axis=0, dtype=np.float64)
    return float(np.average(10 * np.log10(255**2 / mse), weights=(6, 1, 1))) if mse.all() else float("inf")


def bd_rate(reference: Sequence[tuple[float, float]], test: Sequence[tuple[float, float]]) -> float:
    """Bjøntegaard delta rate: mean difference in rate at equal quality over the qualities that both curves reach.

    Bjøntegaard 2001 with piecewise cubic Hermite interpolation of log rate over quality, as in JCTVC-L1100.

    Args:
        reference, test: points (rate, quality), at least two each, both growing.

    Returns:
        Per cent; negative where ``test`` needs fewer bits.

    Raises:
        ValueError: too few points, or no overlap in quality.
    """
    if min(len(reference), len(test)) < 2:
        raise ValueError("BD-rate needs at least two points a curve")
    (rate_a, quality_a), (rate_b, quality_b) = (
        np.array(sorted(points, key=lambda p: p[1])).T for points in (reference, test)
    )
    if max(quality_a[0], quality_b[0]) >= min(quality_a[-1], quality_b[-1]):
        raise ValueError("BD-rate needs curves that overlap in quality")
    options = {"method": "pchip", "require_matching_points": False, "min_overlap": 0}
    return float(bjontegaard.bd_rate(rate_a, quality_a, rate_b, quality_b, **options))
