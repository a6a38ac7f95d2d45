"""What can be answered without looking: the baseline that scores on questions have to be compared with."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple


class AskedQuestion(NamedTuple):
    """A question's text, its type, its answers, and the number of its image."""

    text: str
    type: str
    answers: tuple[str, ...]
    image: int


def blind_answers(asked: Sequence[AskedQuestion]) -> list[str]:
    """The most frequent answer to the same text, or where there is none, to the same type, in the other half of images.

    No answer knows itself. The empty string where nothing is known. It does not see that an answer is one of two that
    the question names: there a coin does better.
    """
    by_text: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    by_type: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    for question in asked:
        half = _half(question.image)
        by_text[half, question.text][question.answers[0]] += 1
        by_type[half, question.type][question.answers[0]] += 1
    answers = []
    for question in asked:
        other = 1 - _half(question.image)
        counts = by_text.get((other, question.text)) or by_type.get((other, question.type)) or Counter({"": 1})
        answers.append(counts.most_common(1)[0][0])
    return answers


def _half(image: int) -> int:
    # Not simply every second image: corpora may alternate between kinds of images, too.
    return image * 0x9E3779B1 >> 31 & 1
