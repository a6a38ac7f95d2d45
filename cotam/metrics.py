"""Measures of rate and distortion."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from cotam.image import RGBImage


def bpp(num_bytes: int, width: int, height: int) -> float:
    """Stored bits per pixel of the original image."""
    return 8 * num_bytes / (width * height)


def psnr_rgb(original: RGBImage, decoded: RGBImage) -> float:
    """Peak signal-to-noise ratio over all samples of two uint8 images of one shape, in dB; infinite when equal."""
    mse = float(np.mean((original.astype(np.float32) - decoded.astype(np.float32)) ** 2, dtype=np.float64))
    return 10 * float(np.log10(255**2 / mse)) if mse else float("inf")


def bd_rate(
    reference: Sequence[tuple[float, float]], test: Sequence[tuple[float, float]]
) -> float:
    """Bjøntegaard delta rate: mean difference in rate at equal quality over the qualities that both curves reach.

    Bjøntegaard 2001 with piecewise cubic Hermite interpolation of log rate over quality, as in JCTVC-L1100.

    Args:
        reference, test: points (rate, quality), at least two each, both growing.

    Returns:
        Per cent; negative where ``test`` needs fewer bits.

    Raises:
        ValueError: too few points, or no overlap in quality.
    """
    curves = [np.array(sorted(points, key=lambda p: p[1])) for points in (reference, test)]
    if min(len(c) for c in curves) < 2:
        raise ValueError("BD-rate needs at least two points a curve")
    low, high = max(c[0, 1] for c in curves), min(c[-1, 1] for c in curves)
    if low >= high:
        raise ValueError("BD-rate needs curves that overlap in quality")
    means = [_mean_log_rate(c, low, high) for c in curves]
    return 100 * (float(np.exp(means[1] - means[0])) - 1)


def _mean_log_rate(curve: NDArray[np.float64], low: float, high: float) -> float:
    interpolated = PchipInterpolator(curve[:, 1], np.log(curve[:, 0]))
    return float(interpolated.integrate(low, high)) / (high - low)
