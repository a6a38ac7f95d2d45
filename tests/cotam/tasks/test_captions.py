"""CIDEr-D of captions."""

from __future__ import annotations

import pytest

from cotam.tasks.captions import cider_d
from cotam.tasks.results import summarise
from tests.cotam.tasks.test_results import row

REFERENCES = [
    ["a red kite over a green hill", "someone flies a kite on a hill"],
    ["two dogs run on the beach", "a pair of dogs running along the sea"],
    ["a bowl of soup on a wooden table"],
    ["the empty street at night", "a street lamp in the dark"],
]
CAPTIONS = [
    "a kite over a green hill", "two cats sleep on the beach beside the sea", "a bowl of soup on a wooden table", "kite"
]  # fmt: skip
EXPECTED = [4.3952843, 1.42964618, 10, 0]


def test_captions_score_as_by_the_code_of_the_papers_authors() -> None:
    """The numbers are pycocoevalcap's, of the same words."""
    score = cider_d(REFERENCES)
    assert [score(*pair) for pair in zip(CAPTIONS, REFERENCES, strict=True)] == pytest.approx(EXPECTED)
    assert score("A bowl of soup, on a wooden table.", REFERENCES[2]) == pytest.approx(10)
    assert score("", REFERENCES[0]) == score("?!", REFERENCES[0]) == 0


def test_a_summary_scores_captions_once_all_references_are_known() -> None:
    asked = [
        {**row(str(k), 0.0, type="", level="", question="Describe.", prediction=p, answers=a), "score": None}
        for k, (p, a) in enumerate(zip(CAPTIONS, REFERENCES, strict=True))
    ]
    overall = summarise(lambda: iter(asked), "cider")["overall"]
    assert overall["score"] == pytest.approx(sum(EXPECTED) / 4)
    low, high = overall["ci95"]
    assert 0 <= low < overall["score"] < high <= 10
    asked[2].update(prediction=None, error="busy")
    assert summarise(lambda: iter(asked), "cider")["overall"]["score"] == pytest.approx((sum(EXPECTED) - 10) / 4)
