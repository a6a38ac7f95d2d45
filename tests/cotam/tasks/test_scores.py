"""Scores: worked examples of the papers that define them."""

from __future__ import annotations

import pytest

from cotam.tasks.scores import anls, exact_match, is_yes, normalise, vqa_accuracy, yes_no


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The two dogs.", "2 dogs"),
        ("  A  Red\nball! ", "red ball"),
        ("1,000", "1000"),
        ("3.5 m", "3.5 m"),
        ("Don't", "dont"),
        ("ice-cream/cone", "ice cream cone"),
        ("none", "0"),
        ("U.S.A.", "usa"),
        (".5", ".5"),
        ("A", "a"),
        ("...", ""),
    ],
)
def test_answers_are_normalised_as_in_vqa(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


def test_exact_match_knows_signs_and_that_nothing_is_no_answer() -> None:
    assert (
        exact_match("-5", ["5"]) == exact_match("5", ["-5"]) == exact_match("+", ["-"]) == exact_match("", ["?"]) == 0
    )
    assert exact_match("-5", ["-5."]) == exact_match("minus five", ["-5"]) == exact_match("T-shirt", ["t shirt"]) == 1
    assert exact_match("?", ["?"]) == exact_match("2-3", ["2 3"]) == 1


def test_exact_match_takes_any_answer() -> None:
    assert exact_match("The Stop sign", ["stop sign", "sign"]) == 1
    assert exact_match("stop", ["stop sign"]) == 0
    assert exact_match("", ["A"]) == exact_match("5", [".5"]) == 0


@pytest.mark.parametrize(("num_agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_over_ten_annotators(num_agreeing: int, accuracy: float) -> None:
    """Goyal et al. 2017: min(agreeing / 3, 1), averaged over the ten sets of nine annotators."""
    answers = ["yes"] * num_agreeing + ["no"] * (10 - num_agreeing)
    assert vqa_accuracy("Yes.", answers) == pytest.approx(accuracy)


def test_vqa_accuracy_with_one_answer_is_exact_match() -> None:
    assert vqa_accuracy("two", ["2"]) == 1
    assert vqa_accuracy("three", ["2"]) == 0


def test_anls() -> None:
    """Biten et al. 2019: a small misreading costs little, a wrong answer all."""
    assert anls("Coca Cola", ["coca cola", "coca cola company"]) == 1
    assert anls("cola", ["coca cola"]) == 0  # distance 5 of 9
    assert anls("Coca Cula", ["coca cola"]) == pytest.approx(1 - 1 / 9)
    assert anls("abcd", ["abxy"]) == 0  # at the threshold of 1/2
    assert anls("abcde", ["abcxy"]) == pytest.approx(0.6)
    assert anls("", ["a"]) == 0


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes, there is a dog in the image.", True),
        ("No, there is no dog.", False),
        ("There is not a dog. Yes.", False),
        ("A dog is there. No cat.", True),
        ("no", False),
        ("Nothing of that kind", True),  # as POPE's rule has it
    ],
)
def test_free_answers_are_read_as_pope_reads_them(answer: str, yes: bool) -> None:
    assert is_yes(answer) == yes


def test_yes_no_classification() -> None:
    cases = {(True, True): 3, (True, False): 1, (False, True): 2, (False, False): 4}
    assert yes_no(cases) == pytest.approx((0.7, 0.75, 0.6, 2 / 3, 0.4))
    assert yes_no({}) == (0, 0, 0, 0, 0)
    assert yes_no({(False, False): 1}) == (1, 0, 0, 0, 0)
