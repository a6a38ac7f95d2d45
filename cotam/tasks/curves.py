"""Score against bits per pixel: the curves of a sweep, and what one saves against another at equal score."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from cotam.metrics import bd_rate
from cotam.tasks.intervals import ImageSums
from cotam.tasks.results import image_of
from cotam.tasks.scores import METRICS, Metric

_Floats = NDArray[np.float64]
_NUM_RESAMPLES = 400


class Measured(NamedTuple):
    """One operating point on N images, each array float64 (N,) in the same order of images.

    bits, pixels: stored bits, and pixels of the original. scores: summed over an image's questions, questions: their
    number, failed: how many of them have no answer. psnr_rgb: dB, infinite where nothing was lost.
    """

    quality: float
    bits: _Floats
    pixels: _Floats
    scores: _Floats
    questions: _Floats
    failed: _Floats
    psnr_rgb: _Floats

    def sums(self, metric: Metric = METRICS["exact_match"]) -> ImageSums:
        """For intervals of the score, which is of that metric."""
        sums = ImageSums(metric.max_score, metric.is_graded)
        for score, questions in zip(self.scores.tolist(), self.questions.tolist(), strict=True):
            sums.add(score, questions)
        return sums

    def bpp(self, weights: _Floats | None = None) -> float:
        """All bits over all pixels; ``weights`` (N,) say how often each image counts."""
        return float(np.average(self.bits, weights=weights) / np.average(self.pixels, weights=weights))

    def score(self, weights: _Floats | None = None) -> float:
        """The mean score over questions; ``weights`` as of ``bpp``."""
        return float(np.average(self.scores, weights=weights) / np.average(self.questions, weights=weights))


Curve = list[Measured]  # growing in bits per pixel


class Saving(NamedTuple):
    """Bits that one curve saves against another at equal score, in per cent (positive is less), with a 95 % interval.

    low and high are None where too few resamples of the images gave curves that overlap. lowest_score and
    highest_score bound what both curves reach, over which it is a mean.
    """

    percent: float
    low: float | None
    high: float | None
    lowest_score: float
    highest_score: float


class Measurements:
    """Gathers the rows of a sweep, one after another, into curves: 6 numbers for an image at a point."""

    def __init__(self) -> None:
        self._points: dict[tuple[str, float], dict[tuple[int, str], array[float]]] = {}

    def add(self, curve: str, row: Mapping[str, Any], score: float) -> None:
        """Add an answer that has a score; ``row`` of ``SWEEP_SCHEMA``, as ``read_predictions`` has it."""
        point = self._points.setdefault((curve, row["quality"]), {})
        entry = point.get(image_of(row))
        if entry is None:
            size = 8.0 * row["num_bytes"], float(row["width"] * row["height"])
            entry = point[image_of(row)] = array("d", [*size, 0.0, 0.0, 0.0, row["psnr_rgb"]])
        entry[2] += score
        entry[3] += 1
        entry[4] += row["error"] is not None

    def curves(self) -> dict[str, Curve]:
        """Curves by name, their images in the same order."""
        curves: dict[str, Curve] = {}
        for (name, quality), entries in self._points.items():
            columns = np.array([entries[image] for image in sorted(entries)]).T
            curves.setdefault(name, []).append(Measured(quality, *columns))
        return {name: sorted(curve, key=lambda m: m.bpp()) for name, curve in sorted(curves.items())}


def saving(reference: Curve, test: Curve, seed: int = 0) -> Saving | None:
    """What ``test`` saves against ``reference``: Bjøntegaard's delta rate over the score instead of the PSNR.

    Scores are noisy where they hardly change, so the growing curve nearest to the points is taken (isotonic
    regression). The interval comes from resampling images, the same for both curves.

    Returns:
        None if the range of scores that both curves reach is narrower than twice the points' mean standard error: a
        saving there would be chance.
    """
    estimate = _saving(reference, test, None)
    if estimate is None:
        return None
    scores = [[score for _, score in _growing(curve, None)] for curve in (reference, test)]
    lowest, highest = max(s[0] for s in scores), min(s[-1] for s in scores)
    if highest - lowest < 2 * np.mean([m.sums().standard_error() for m in (*reference, *test)]):
        return None
    rng = np.random.default_rng(seed)
    num_images = len(reference[0].bits)
    resampled = []
    if all(len(m.bits) == num_images for m in (*reference, *test)):
        for _ in range(_NUM_RESAMPLES):
            weights = np.bincount(rng.integers(0, num_images, num_images), minlength=num_images).astype(np.float64)
            value = _saving(reference, test, weights)
            if value is not None:
                resampled.append(value)
    if len(resampled) < _NUM_RESAMPLES // 2:
        return Saving(estimate, None, None, lowest, highest)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Saving(estimate, float(low), float(high), lowest, highest)


def _saving(reference: Curve, test: Curve, weights: _Floats | None) -> float | None:
    try:
        return -bd_rate(_growing(reference, weights), _growing(test, weights))
    except ValueError:
        return None


def _growing(curve: Sequence[Measured], weights: _Floats | None) -> list[tuple[float, float]]:
    """Points (bpp, score) of the growing curve nearest to the measured one; equal scores are one point."""
    rates = [m.bpp(weights) for m in curve]
    fitted = isotonic_regression([m.score(weights) for m in curve]).x
    points: list[tuple[float, float]] = []
    for rate, score in sorted(zip(rates, fitted.tolist(), strict=True)):
        if not points or score > points[-1][1] + 1e-9:  # of equal scores the cheapest
            points.append((rate, score))
    return points
