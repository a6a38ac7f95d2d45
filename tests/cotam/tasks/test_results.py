"""What predictions add up to, and what one curve saves against another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cotam.tasks.blind import BlindSample
from cotam.tasks.curves import Measured, Measurements, saving
from cotam.tasks.questions import Question
from cotam.tasks.results import summarise
from cotam.tasks.scores import exact_match


def row(key: str, score: float, **changes: Any) -> dict[str, Any]:
    return {
        "key": key, "source": "s", "width": 100, "height": 50, "num_bytes": 500, "question": "Is it?",
        "answers": ["yes"], "type": "exists", "level": "cross", "prediction": "yes", "error": None,
        "score": score, **changes,
    }  # fmt: skip


def test_a_summary_counts_every_question_and_every_byte_once() -> None:
    rows = [
        row("a", 1.0),
        row("a", 0.0, type="read", level="low", answers=["12"], prediction=None, error="busy"),
        row("b", 1.0, num_bytes=1000),
        row("b", 0.0, num_bytes=1000, prediction="no"),
        row("b", 1.0, num_bytes=1000, answers=["no"], prediction="no"),
    ]
    summary = summarise(lambda: rows, "exact_match")
    assert (summary["num_images"], summary["num_questions"], summary["num_errors"]) == (2, 5, 1)
    assert summary["bpp"] == pytest.approx(8 * 1500 / 10_000)
    assert summary["overall"]["score"] == pytest.approx(3 / 5)
    assert summary["by_level"]["low"]["score"] == 0 and summary["by_type"]["exists"]["num_questions"] == 4
    assert summary["yes_no"]["precision"] == 1 and summary["yes_no"]["recall"] == pytest.approx(2 / 3)
    assert summarise(list, "exact_match")["overall"] is None


def test_questions_without_an_answer_are_wrong_whichever_class_they_are_of() -> None:
    failed = {"prediction": None, "error": "busy"}
    rows = [row(str(k), 0.0, answers=["Yes" if k % 2 else "no"], **failed) for k in range(10)]
    assert summarise(lambda: rows, "exact_match")["yes_no"] == {
        "accuracy": 0, "precision": 0, "recall": 0, "f1": 0, "yes_rate": 0.5,
    }  # fmt: skip


def test_a_few_right_answers_are_not_certainty() -> None:
    low, high = summarise(lambda: [row(str(k), 1.0) for k in range(5)], "exact_match")["overall"]["ci95"]
    assert low == pytest.approx(0.393, abs=0.001) and high == 1  # Wilson's interval of 5 of 5, with Student's t of 4
    low, high = summarise(lambda: [row("a", 1.0), row("a", 0.0)], "exact_match")["overall"]["ci95"]
    assert low < 0.1 and high > 0.9  # one image


def test_the_blind_baseline_knows_the_questions_and_nothing_of_the_answer_it_guesses() -> None:
    rows = []
    for k in range(20):
        rows.append(row(str(k), 1.0, question="Is it day?", answers=["yes" if k < 14 else "no"]))
        if k % 2:
            rows.append(row(str(k), 1.0, type="kind", question="What kind?", answers=["beach"]))
        rows.append(row(str(k), 1.0, type="read", level="low", question=f"Sign {k}?", answers=[str(k)]))
    summary = summarise(lambda: rows, "exact_match")
    assert summary["by_type"]["exists"]["blind"] == pytest.approx(0.7)
    assert summary["by_type"]["read"]["blind"] == summary["by_level"]["low"]["blind"] == 0
    assert summary["by_type"]["kind"]["blind"] == 1  # images that alternate between kinds are in both halves
    assert summary["overall"]["blind"] == pytest.approx((14 + 10) / 50)


def test_a_question_that_nobody_else_was_asked_is_guessed_by_its_type() -> None:
    sample = BlindSample()
    for k in range(40):
        sample.add(k, [Question(key="", question=f"Sign {k}?", type="read", answers=("A" if k % 3 else "B",))])
    sample.add(40, [Question(key="", question="Why?", type="reason", answers=("so",))])
    guesses = {question.question: guess for question, guess in sample.guesses()}
    assert guesses.pop("Why?") == "" and {*guesses.values()} == {"A"}


def test_the_blind_baseline_of_many_questions_is_that_of_a_sample_of_whole_images() -> None:
    sample = BlindSample(max_questions=1000)
    for k in range(20_000):
        answer = "yes" if k % 10 < 7 else "no"
        sample.add(
            k,
            [
                Question(key="", question="Is it?", type="exists", level="cross", answers=(answer,)),
                Question(key="", question="What?", answers=("x",)),
            ],
        )
    assert 400 <= len(sample.guesses()) <= 1000
    scores = sample.scores(exact_match)
    assert scores.by_type["exists"] == pytest.approx(0.7, abs=0.06) and scores.by_level["cross"] < 1
    assert scores.overall == pytest.approx((scores.by_type["exists"] + 1) / 2)


def test_the_interval_of_a_mean_covers_it_when_an_images_questions_stand_or_fall_together() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        rows = [row(str(k), float(right)) for k, right in enumerate(rng.random(80) < 0.7) for _ in range(5)]
        low, high = summarise(rows.copy, "exact_match")["overall"]["ci95"]
        covered += low <= 0.7 <= high
    assert 175 <= covered <= 200  # 190 expected; with questions as independent draws it would be about 120


def curve(factor: float, num_images: int = 60) -> list[Measured]:
    """Score 0.5 + 0.1 log2(rate), at rates that are ``factor`` times those of the reference."""
    rng = np.random.default_rng(1)
    points = []
    for quality, rate in enumerate((1.0, 2.0, 4.0, 8.0)):
        spread = rng.uniform(0.8, 1.2, num_images)
        scores = 0.5 + 0.1 * np.log2(rate) + rng.normal(0, 0.01, num_images)
        ones = np.ones(num_images)
        points.append(Measured(quality, factor * rate * spread * 100, 100 * ones, scores, ones, 0 * ones, 30 * ones))
    return points


def test_saving_is_the_difference_in_rate_at_equal_score() -> None:
    result = saving(curve(1.0), curve(0.7))
    assert result is not None and result.low is not None and result.high is not None
    assert result.percent == pytest.approx(30, abs=1e-6) and result.low <= result.percent <= result.high
    same = saving(curve(1.0), curve(1.0))
    assert same is not None and same.percent == pytest.approx(0, abs=1e-9)
    worse = saving(curve(0.7), curve(1.0))
    assert worse is not None and worse.percent < -40


def test_curves_that_share_less_than_the_error_of_a_point_have_no_saving() -> None:
    reference, test = curve(1.0), curve(0.7)
    result = saving(reference, test)
    assert result is not None and (result.lowest_score, result.highest_score) == pytest.approx((0.5, 0.8), abs=0.01)
    rng = np.random.default_rng(2)
    noise = [rng.normal(0, 0.4, 60) for _ in range(4)]
    noise = [n - n.mean() for n in noise]  # a standard error of 0.05, and the same curves
    unsure = [[m._replace(scores=m.scores + n) for m, n in zip(c, noise, strict=True)] for c in (reference, test)]
    assert saving(*unsure) is not None
    above = [m._replace(scores=m.scores + 0.25) for m in unsure[1]]  # from 0.75 on, where the reference ends at 0.8
    assert saving(unsure[0], above) is None
    assert saving(reference, [m._replace(scores=m.scores + 0.25) for m in test]) is not None


def test_noise_in_a_curve_does_not_break_it_and_curves_that_never_meet_have_no_saving() -> None:
    reference, noisy = curve(1.0), curve(0.7)
    noisy[2] = noisy[2]._replace(scores=noisy[2].scores - 0.15)  # below its cheaper neighbour
    result = saving(reference, noisy)
    assert result is not None and 0 < result.percent < 30
    high = [m._replace(scores=m.scores + 1) for m in reference]
    assert saving(reference, high) is None


def test_curves_are_built_from_rows_by_name_and_quality() -> None:
    gathered = Measurements()
    for codec, quality, score in (("jpeg", 5.0, 0.0), ("jpeg", 9.0, 1.0), ("cotam", 1.0, 1.0)):
        for key, file in (("a", 0), ("a", 0), ("b", 0), ("a", 1)):
            gathered.add(codec, row(key, score, quality=quality, psnr_rgb=30.0, file=file), score)
    curves = gathered.curves()
    assert [m.quality for m in curves["jpeg"]] == [5.0, 9.0] and set(curves) == {"cotam", "jpeg"}
    first = curves["jpeg"][0]
    # Two images of one key in different partitions are two.
    assert first.questions.tolist() == [2, 1, 1] and first.score() == 0 and first.bpp() == pytest.approx(0.8)
    assert first.bpp(np.array([1.0, 0.0, 0.0])) == pytest.approx(0.8)
    assert Measurements().curves() == {}


def test_a_point_is_all_bits_over_all_pixels_and_all_scores_over_all_questions() -> None:
    """Not the mean over images of either: images differ in size, and in how much is asked about them."""
    bits, pixels, scores, questions = map(np.array, ([100.0, 900.0], [1000.0, 3000.0], [3.0, 0.0], [4.0, 1.0]))
    point = Measured(1.0, bits, pixels, scores, questions, np.zeros(2), np.full(2, 30.0))
    assert point.bpp() == pytest.approx(1000 / 4000) and point.score() == pytest.approx(3 / 5)
    twice = np.array([2.0, 1.0])
    assert point.bpp(twice) == pytest.approx(1100 / 5000) and point.score(twice) == pytest.approx(6 / 9)


@pytest.mark.parametrize(("metric", "draw"), [("anls", "beta"), ("cider", "gamma")])
def test_intervals_of_graded_scores_are_as_wide_as_their_error(metric: str, draw: str) -> None:
    rng = np.random.default_rng(0)
    covered, width = 0, []
    for _ in range(200):
        scores = rng.beta(5, 2, 150) if draw == "beta" else rng.gamma(2, 0.5, 150).clip(0, 10)
        mean = 5 / 7 if draw == "beta" else 1.0
        rows = [row(str(k), float(score)) for k, score in enumerate(scores)]
        low, high = summarise(rows.copy, metric)["overall"]["ci95"]
        covered += low <= mean <= high
        width.append((high - low) / (2 * 1.96 * scores.std() / 150**0.5))
    assert 180 <= covered <= 199 and 0.95 < np.mean(width) < 1.1
