"""Questions about images: from a question file, or from a member of the samples themselves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow.parquet as pq

from cotam.errors import one_line
from cotam.store.fs import split_uri

SCENEQA_MEMBER = "member:questions.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question about the image ``key``.

    Attributes:
        key: of the image.
        question: the text.
        answers: all that count as right; one an annotator where there are several.
        type: what kind of question it is; results are also given by type. May be empty.
        level: "low", "high" or "cross" (arXiv 2509.24258); results are also given by level. May be empty.
    """

    key: str
    question: str
    answers: tuple[str, ...]
    type: str = ""
    level: str = ""


class QuestionSource:
    """The questions about an image: from a question file, or from a member of the sample.

    Args:
        task: a .jsonl or .parquet file, "member:NAME", or "sceneqa", whose samples bring theirs as a member.
        sha256: of the file, where it has to be that one.

    Raises:
        ValueError, OSError: as ``read_questions``, another file than that of ``sha256``, or one without questions.
    """

    def __init__(self, task: str, sha256: str | None = None) -> None:
        if sha256 is not None and task_sha256(task) != sha256:
            raise ValueError(f"{task} has changed since this run started; run it again")
        task = SCENEQA_MEMBER if task == "sceneqa" else task
        self._member = task.removeprefix("member:") if task.startswith("member:") else None
        self._by_key = read_questions(task) if self._member is None else {}
        if self._member is None and not self._by_key:
            raise ValueError(f"{task} has no questions")

    def __call__(self, key: str, members: Mapping[str, Any]) -> list[Question]:
        """Of the image ``key``; none where nobody asks. Raises ValueError where the member is no list of questions."""
        if self._member is None:
            return self._by_key.get(key, [])
        value = members.get(self._member)
        return [] if value is None else questions_of_member(key, value)

    def left_out(self, keys: Iterable[str]) -> dict[str, int]:
        """Of a file, how many questions are about each image that is none of ``keys``."""
        left = {key: len(questions) for key, questions in self._by_key.items()}
        for key in keys:
            left.pop(key, None)
        return left


def task_sha256(task: str) -> str | None:
    """The sha256 of a question file; None for a task whose questions come with the samples. Raises OSError."""
    if task == "sceneqa" or task.startswith("member:"):
        return None
    fs, path = split_uri(task)
    with fs.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_questions(uri: str) -> dict[str, list[Question]]:
    """The questions of a JSONL or Parquet file by image key, in the order of the file.

    Columns: key, question, answers (a list, or one string), and type and level if there are any.

    Raises:
        ValueError: another kind of file, or a row at fault, named by its number from 1.
        OSError: the file cannot be read.
    """
    if not uri.endswith((".jsonl", ".ndjson", ".parquet")):
        raise ValueError(f"{uri}: questions come as .jsonl or .parquet")
    fs, path = split_uri(uri)
    by_key: dict[str, list[Question]] = {}
    with fs.open(path, "rb") as file:
        if path.endswith(".parquet"):
            parquet = pq.ParquetFile(file)
            columns = [c for c in ("key", "question", "answers", "type", "level") if c in parquet.schema_arrow.names]
            rows: Iterable[Any] = parquet.read(columns).to_pylist()
        else:
            rows = (line for line in file if line.strip())
        for number, row in enumerate(rows, 1):
            try:
                question = _question(json.loads(row) if isinstance(row, bytes) else row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{uri}, row {number}: {_reason(error)}") from None
            by_key.setdefault(question.key, []).append(question)
    return by_key


def questions_of_member(key: str, value: Any) -> list[Question]:
    """The questions that a sample brings along: a list of mappings, or JSON text of one, as rows of a question file.

    Raises:
        ValueError: no such list.
    """
    try:
        rows = json.loads(value) if isinstance(value, str | bytes) else value
        if isinstance(rows, Mapping):
            rows = rows["questions"]
        return [_question({**row, "key": key}) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"questions of image {key!r}: {_reason(error)}") from None


def _question(row: Mapping[str, Any]) -> Question:
    answers = row["answers"]
    if isinstance(answers, Mapping):
        raise ValueError("answers must be a list of strings, or one string")
    answers = (answers,) if isinstance(answers, str) else tuple(answers)
    if not answers or not all(isinstance(a, str) for a in answers):
        raise ValueError("answers must be strings, one at least")
    for name in ("key", "question"):
        if not isinstance(row[name], str):
            raise ValueError(f"{name} must be a string")
    kind, level = (sys.intern(str(row.get(name) or "")) for name in ("type", "level"))
    for text in (row["key"], row["question"], *answers, kind, level):
        text.encode()  # half of a cut emoji is JSON, but no text that can be asked or stored
    return Question(key=row["key"], question=row["question"], answers=answers, type=kind, level=level)


def _reason(error: Exception) -> str:
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else one_line(error)[:300]
