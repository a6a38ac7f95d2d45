"""What can be answered without looking: the baseline that scores on questions have to be compared with."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cotam.tasks.questions import Question
from cotam.tasks.scores import Score

_MAX_QUESTIONS = 200_000  # in memory
_HASH_BITS = 31


class BlindScores(NamedTuple):
    """Mean scores over questions; of types and levels that the sample has."""

    overall: float | None
    by_type: Mapping[str, float]
    by_level: Mapping[str, float]


class BlindSample:
    """The questions of a sample of images, and what guessing their answers scores.

    A guess is the most frequent answer to the same text, or where there is none, to the same type, in the other half of
    the images, so no answer knows itself; the empty string where nothing is known. It does not see that an answer is
    one of two that the question names: there a coin does better.

    Args:
        max_questions: how many are kept; of more, those of some images, chosen by hash.
    """

    def __init__(self, max_questions: int = _MAX_QUESTIONS) -> None:
        self._max_questions, self._limit = max_questions, 2**_HASH_BITS
        self._asked: list[tuple[int, Question]] = []

    def add(self, image: int, questions: Sequence[Question]) -> None:
        """Add an image by its number."""
        mixed = zlib.crc32(b"%d" % image)  # corpora may alternate between kinds of images
        if mixed % 2**_HASH_BITS < self._limit:
            self._asked += [(mixed, question) for question in questions]
        while len(self._asked) > self._max_questions and self._limit > 1:
            self._limit //= 2
            self._asked = [(mixed, q) for mixed, q in self._asked if mixed % 2**_HASH_BITS < self._limit]

    def guesses(self) -> list[tuple[Question, str]]:
        """Every question of the sample, and the answer that one would guess."""
        by_text: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
        by_type: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
        for mixed, question in self._asked:
            by_text[_half(mixed), question.question][question.answers[0]] += 1
            by_type[_half(mixed), question.type][question.answers[0]] += 1
        best_of_text, best_of_type = _most_frequent(by_text), _most_frequent(by_type)
        guesses = []
        for mixed, question in self._asked:
            other = 1 - _half(mixed)
            guess = best_of_text.get((other, question.question), best_of_type.get((other, question.type), ""))
            guesses.append((question, guess))
        return guesses

    def scores(self, score: Score) -> BlindScores:
        """What the guesses score."""
        overall: list[float] = []
        by_type: dict[str, list[float]] = defaultdict(list)
        by_level: dict[str, list[float]] = defaultdict(list)
        for question, guess in self.guesses():
            scored = score(guess, question.answers)
            overall.append(scored)
            by_type[question.type].append(scored)
            by_level[question.level].append(scored)
        by_type_mean, by_level_mean = ({k: sum(v) / len(v) for k, v in by.items()} for by in (by_type, by_level))
        return BlindScores(sum(overall) / len(overall) if overall else None, by_type_mean, by_level_mean)


def _most_frequent(counts: Mapping[tuple[int, str], Counter[str]]) -> dict[tuple[int, str], str]:
    return {key: max(counter, key=counter.__getitem__) for key, counter in counts.items()}


def _half(mixed: int) -> int:
    return mixed >> _HASH_BITS & 1
