"""Questions: files and members in, and what is wrong with them by row."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cotam.tasks.questions import Question, QuestionSource, questions_of_member, read_questions

ROWS = [
    {"key": "a", "question": "What colour?", "answers": ["red", "dark red"], "type": "colour"},
    {"key": "b", "question": "How many?", "answers": "2"},
    {"key": "a", "question": "Is there a cat?", "answers": ["no"], "type": None},
]
EXPECTED = {
    "a": [
        Question(key="a", question="What colour?", answers=("red", "dark red"), type="colour"),
        Question(key="a", question="Is there a cat?", answers=("no",)),
    ],
    "b": [Question(key="b", question="How many?", answers=("2",))],
}


def test_files_of_both_formats(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("\n\n".join(json.dumps(r) for r in ROWS) + "\n")
    rows = [
        {"type": None, **r, "answers": [r["answers"]] if isinstance(r["answers"], str) else r["answers"]} for r in ROWS
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    assert read_questions(str(tmp_path / "q.jsonl")) == EXPECTED
    assert read_questions(str(tmp_path / "q.parquet")) == EXPECTED


def test_published_files_are_taken_as_they_are(tmp_path: Path) -> None:
    pope = {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard?", "label": "yes"}
    vqa = {"image": 262148, "question": "Where?", "answers": [{"answer": "down", "answer_id": 1}, {"answer": 2}]}
    for name, text in (("pope.json", json.dumps(pope) + "\n"), ("list.json", json.dumps([pope]))):
        (tmp_path / name).write_text(text)
        (question,) = read_questions(str(tmp_path / name))[pope["image"]]
        assert (question.question, question.answers) == ("Is there a snowboard?", ("yes",))
    (tmp_path / "vqa.json").write_text(json.dumps([vqa]))
    assert read_questions(str(tmp_path / "vqa.json"))["262148"][0].answers == ("down", "2")


def test_what_became_of_the_questions_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(r) for r in ROWS))
    source = QuestionSource(str(tmp_path / "q.jsonl"))
    asked = [question.key for questions in EXPECTED.values() for question in questions]
    assert source.coverage(asked) == ({}, [])
    assert source.coverage([*asked, asked[0], "other"]).repeated == [asked[0]]
    assert {*source.coverage(["other"]).not_asked} == {*EXPECTED}
    assert source.other_keys(iter(["x/a.jpg", asked[0]])) is None and source.other_keys([]) is None
    assert source.other_keys(["x/a.jpg", "y"]) == (asked[0], "x/a.jpg")


def test_members() -> None:
    rows = [{**r, "key": 7} for r in ROWS if r["key"] == "a"]  # the sample's own key counts
    for value in (rows, json.dumps(rows), json.dumps(rows).encode(), {"questions": rows}):
        assert questions_of_member("a", value) == EXPECTED["a"]
    with pytest.raises(ValueError, match="image 'a': no answers or answer or label; there is question, key"):
        questions_of_member("a", [{"question": "Why?"}])
    with pytest.raises(ValueError, match="questions of image 'a'"):
        questions_of_member("a", "{not json")


def test_columns() -> None:
    """As in benchmarks on hubs: a row is an image and a question; other columns may have any names and types."""
    source = QuestionSource("columns")
    members = {"question": "How many?", "answer": 2, "type": {"a": 1}, "level": "low", "image": b"", "key": "x"}
    expected = Question(key="a", question="How many?", answers=("2",), level="low")
    assert source("a", members) == [expected]
    assert source("a", {"answer": "2", "question": None}) == []
    assert source.coverage(["a"]) == ({}, []) and source.other_keys(["a"]) is None
    with pytest.raises(ValueError, match="question of image 'a': no answers or answer or label"):
        source("a", {"question": "Why?"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 3, "question": "?"}, "row 2: no key or image, no answers or answer or label; there is id, question"),
        ({"key": "a", "question": "?", "answers": []}, "row 2: no answer"),
        ({"key": "a", "question": "?", "answers": [1.5]}, "row 2: an answer is no string"),
        ({"key": True, "question": "?", "answers": ["x"]}, "row 2: key is no string"),
        ({"key": "a", "question": "?", "answers": {"x": 1}}, "row 2: an answer is no string"),
        ([1], "row 2: no object"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: object, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        read_questions(str(tmp_path / "q.jsonl"))
    with pytest.raises(ValueError, match=r"come as \.json, \.jsonl or \.parquet"):
        read_questions(str(tmp_path / "q.csv"))
