"""Scores of answers, as the benchmarks define them: exact match, VQA accuracy, ANLS, CIDEr-D, yes/no classification."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein

from cotam.tasks.captions import CIDER_MAX, cider_d

Score = Callable[[str, Sequence[str]], float]

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS = {**{word: str(k) for k, word in enumerate(_NUMBERS)}, "none": "0", "a": "", "an": "", "the": ""}
_ANLS_THRESHOLD = 0.5
_NEGATIONS = {"no", "not"}


class YesNo(NamedTuple):
    """Classification with "yes" as the positive class, each in [0, 1]; 0 where a ratio has no cases."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_rate: float


def normalise(answer: str) -> str:
    """An answer nearly as VQA v2 compares it: lower case, no punctuation or articles, number words as digits.

    Apostrophes are dropped on both sides, where the original spells contractions out from a list, and all punctuation
    but decimal points, where the original keeps some of it by what is around.
    """
    text = re.sub(r"\s+", " ", answer.lower().replace("\n", " ")).strip().replace("'", "")
    text = re.sub(r"(?<=\d),(?=\d)", "", text)  # thousands
    text = re.sub(r"\.(?!\d)", "", text)  # full stops, not decimal points
    text = re.sub(r"[;/\[\]\"{}()=+\\_\-><@`,?!:]", " ", text)
    words = [_WORDS.get(word, word) for word in text.split()]
    return " ".join(word for word in words if word) or text.strip()  # an article alone is an answer: choice A


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers after ``normalise``, else 0; signs of numbers count, unlike in VQA."""
    predicted = _with_signs(prediction)
    return float(any(predicted == _with_signs(a) and (predicted or prediction.strip() == a.strip()) for a in answers))


def _with_signs(answer: str) -> str:
    return normalise(re.sub(r"(?<![\w-])[-\u2212](?=\.?\d)", "minus ", answer))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy (Antol et al. 2015; Goyal et al. 2017): right if three annotators said so.

    The mean over annotators left out of min(matches among the others / 3, 1). With fewer than four annotators no
    answer could reach 1, so one match counts as right.
    """
    predicted = normalise(prediction)
    matches = [normalise(a) == predicted for a in answers]
    if len(answers) < 4:
        return float(any(matches))
    total = sum(matches)
    return sum(min((total - match) / 3, 1.0) for match in matches) / len(matches)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest answer, 0 below 1/2 (Biten et al. 2019, equation 1).

    Averaged over questions it is ANLS. Case and outer white space do not count.
    """
    predicted = " ".join(prediction.lower().split())
    distance = min(Levenshtein.normalized_distance(predicted, " ".join(a.lower().split())) for a in answers)
    return 1 - distance if distance < _ANLS_THRESHOLD else 0.0


def is_yes(prediction: str) -> bool:
    """Whether a free answer says yes, as POPE reads it (Li et al. 2023): its first sentence has no "no" or "not"."""
    first = prediction.split(".")[0].replace(",", "").lower()
    return not _NEGATIONS & set(first.split())


def yes_no(cases: Mapping[tuple[bool, bool], int]) -> YesNo:
    """Precision, recall and F1 of yes/no questions: how often (the prediction is yes, the answer is yes)."""
    true_yes, total = cases.get((True, True), 0), sum(cases.values())
    said_yes = true_yes + cases.get((True, False), 0)
    are_yes = true_yes + cases.get((False, True), 0)
    precision, recall = _ratio(true_yes, said_yes), _ratio(true_yes, are_yes)
    return YesNo(
        accuracy=_ratio(true_yes + cases.get((False, False), 0), total),
        precision=precision,
        recall=recall,
        f1=_ratio(2 * precision * recall, precision + recall),
        yes_rate=_ratio(said_yes, total),
    )


class Metric(NamedTuple):
    """A score of answers.

    Attributes:
        score: of an answer by itself; None where it needs all references.
        of_corpus: makes the score from the references of all questions, which are known when a run ends.
        max_score: of an answer.
        is_graded: whether an answer can be partly right.
    """

    score: Score | None = None
    of_corpus: Callable[[Iterable[Sequence[str]]], Score] | None = None
    max_score: float = 1.0
    is_graded: bool = False


METRICS = {
    "exact_match": Metric(exact_match),
    "vqa_accuracy": Metric(vqa_accuracy, is_graded=True),
    "anls": Metric(anls, is_graded=True),
    "cider": Metric(of_corpus=cider_d, max_score=CIDER_MAX, is_graded=True),
}


def check_metric(name: str) -> None:
    """Raise ValueError for a name that is none of ``METRICS``."""
    if name not in METRICS:
        raise ValueError(f"metric {name!r} is none of {', '.join(METRICS)}")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
