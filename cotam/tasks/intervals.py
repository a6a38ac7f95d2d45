"""How sure a mean over questions is, when the questions of an image are no independent draws."""

from __future__ import annotations

import dataclasses
import math

from scipy.stats import t


@dataclasses.dataclass
class ImageSums:
    """Sums over images, of which each has a score, summed over its questions, and a number of questions.

    Attributes:
        max_score: of a question. is_graded: whether it can be partly right.
    """

    max_score: float = 1.0
    is_graded: bool = False
    images: int = 0
    score: float = 0.0
    questions: float = 0.0
    squares: float = 0.0
    products: float = 0.0
    counts: float = 0.0

    def add(self, score: float, questions: float) -> None:
        """Add an image."""
        self.images += 1
        self.score += score
        self.questions += questions
        self.squares += score * score
        self.products += score * questions
        self.counts += questions * questions

    def standard_error(self) -> float:
        """Of the mean score over questions: a ratio estimator whose clusters are images (Cochran 1977, chapter 6)."""
        mean = self.score / self.questions
        spread = max(0.0, self.squares - 2 * mean * self.products + mean * mean * self.counts)
        return math.sqrt(spread * self.images / max(1, self.images - 1)) / self.questions

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean score: Wilson's, of as many independent questions as would be as sure.

        Wilson 1927, with Student's quantile for few images. The plain interval is a point where all answers are right.
        """
        top = self.max_score
        mean, variance = self.score / self.questions / top, (self.standard_error() / top) ** 2
        num = float(self.images)  # where all images agree, each is one question
        if variance > 1e-12 and 0 < mean < 1:
            num = max(1.0, mean * (1 - mean) / variance)
            if not self.is_graded:  # what is right or wrong does not vary less than that
                num = min(num, self.questions)
        quantile = float(t.ppf(0.975, max(1, self.images - 1)))
        centre = mean + quantile**2 / (2 * num)
        width = quantile * math.sqrt(mean * (1 - mean) / num + quantile**2 / (4 * num**2))
        scale = 1 + quantile**2 / num
        return top * max(0.0, (centre - width) / scale), top * min(1.0, (centre + width) / scale)
