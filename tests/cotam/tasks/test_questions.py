"""Questions: files and members in, and what is wrong with them by row."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cotam.tasks.questions import Question, questions_of_member, read_questions

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


def test_members() -> None:
    rows = [{**r, "key": 7} for r in ROWS if r["key"] == "a"]  # the sample's own key counts
    for value in (rows, json.dumps(rows), json.dumps(rows).encode(), {"questions": rows}):
        assert questions_of_member("a", value) == EXPECTED["a"]
    with pytest.raises(ValueError, match="questions of image 'a': no 'answers'"):
        questions_of_member("a", [{"question": "Why?"}])
    with pytest.raises(ValueError, match="questions of image 'a'"):
        questions_of_member("a", "{not json")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"key": "a", "question": "?"}, "row 2: no 'answers'"),
        ({"key": "a", "question": "?", "answers": []}, "row 2: answers must be strings, one at least"),
        ({"key": "a", "question": "?", "answers": [1]}, "row 2: answers must be strings"),
        ({"key": 1, "question": "?", "answers": ["x"]}, "row 2: key must be a string"),
        ({"key": "a", "question": "?", "answers": {"x": 1}}, "row 2: answers must be a list"),
        ([1], "row 2: "),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: object, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        read_questions(str(tmp_path / "q.jsonl"))
    with pytest.raises(ValueError, match=r"come as \.jsonl or \.parquet"):
        read_questions(str(tmp_path / "q.csv"))
