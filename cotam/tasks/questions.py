"""Questions about images: from a question file, or from the samples themselves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from cotam.errors import one_line
from cotam.store.fs import split_uri

SCENEQA_MEMBER = "member:questions.json"
COLUMNS = "columns"  # the task whose questions are members of their own: question, answers, type, level
# Names that the fields of a question have in question files, the first that is there being taken.
_FIELDS = {
    "key": ("key", "image"),
    "question": ("question", "text"),
    "answers": ("answers", "answer", "label"),
    "type": ("type",),
    "level": ("level",),
}


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


class Coverage(NamedTuple):
    """What became of the questions of a file.

    not_asked: how many are about each key that is no image's. repeated: keys of several images, about each of which
    their questions were asked.
    """

    not_asked: dict[str, int]
    repeated: list[str]


class QuestionSource:
    """The questions about an image: from a question file, or from the sample.

    Args:
        task: a .jsonl or .parquet file, "member:NAME" of a list of questions, "columns" where the sample's own columns
            are one question, or "sceneqa", whose samples bring theirs as a member.
        sha256: of the file, where it has to be that one.

    Raises:
        ValueError, OSError: as ``read_questions``, another file than that of ``sha256``, or one without questions.
    """

    def __init__(self, task: str, sha256: str | None = None) -> None:
        if sha256 is not None and task_sha256(task) != sha256:
            raise ValueError(f"{task} has changed since this run started; run it again")
        task = SCENEQA_MEMBER if task == "sceneqa" else task
        self._member = task.removeprefix("member:") if task.startswith("member:") else None
        self._columns = task == COLUMNS
        in_samples = self._columns or self._member is not None
        self._by_key = {} if in_samples else read_questions(task)
        if not in_samples and not self._by_key:
            raise ValueError(f"{task} has no questions")

    def __call__(self, key: str, members: Mapping[str, Any]) -> list[Question]:
        """Of the image ``key``; none where nobody asks. Raises ValueError where what it brings is no question."""
        if self._columns:
            return questions_of_columns(key, members)
        if self._member is None:
            return self._by_key.get(key, [])
        value = members.get(self._member)
        return [] if value is None else questions_of_member(key, value)

    def other_keys(self, keys: Iterable[str]) -> tuple[str, str] | None:
        """Of a file, one of its keys and one of ``keys``, where they have none in common; else None."""
        remaining = iter(keys)
        if not self._by_key or (first := next(remaining, None)) is None:
            return None
        if any(key in self._by_key for key in chain([first], remaining)):
            return None
        return next(iter(self._by_key)), first

    def coverage(self, keys: Iterable[str]) -> Coverage:
        """What became of the questions of a file; ``keys`` are of the images, once for each question."""
        if not self._by_key:  # nor are the keys read
            return Coverage({}, [])
        num_asked = Counter(key for key in keys if key in self._by_key)
        num = {key: len(questions) for key, questions in self._by_key.items()}
        not_asked = {key: n for key, n in num.items() if key not in num_asked}
        return Coverage(not_asked, [key for key, n in num_asked.items() if n > num[key]])


def task_sha256(task: str) -> str | None:
    """The sha256 of a question file; None for a task whose questions come with the samples. Raises OSError."""
    if task in ("sceneqa", COLUMNS) or task.startswith("member:"):
        return None
    fs, path = split_uri(task)
    with fs.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_questions(uri: str) -> dict[str, list[Question]]:
    """The questions of a JSON, JSONL or Parquet file by image key, in the order of the file.

    Columns: key (or image), question (or text), answers (a list, or one; or answer, or label), and type and level if
    there are any. So the files of POPE and the like are taken as they are; answers may be objects as VQA's.

    Raises:
        ValueError: another kind of file, or a row at fault, named by its number from 1.
        OSError: the file cannot be read.
    """
    if not uri.endswith((".json", ".jsonl", ".ndjson", ".parquet")):
        raise ValueError(f"{uri}: questions come as .json, .jsonl or .parquet")
    fs, path = split_uri(uri)
    by_key: dict[str, list[Question]] = {}
    with fs.open(path, "rb") as file:
        if path.endswith(".parquet"):
            parquet = pq.ParquetFile(file)
            there = parquet.schema_arrow.names
            firsts = (next((name for name in names if name in there), None) for names in _FIELDS.values())
            columns = [name for name in firsts if name is not None]  # no bytes of images where there is a key
            rows: Iterable[Any] = parquet.read(columns).to_pylist()
        elif file.read(1) == b"[":
            file.seek(0)
            rows = json.load(file)
        else:
            file.seek(0)
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


def questions_of_columns(key: str, members: Mapping[str, Any]) -> list[Question]:
    """The question that a sample's columns are, as a row of a question file; none where it has no question.

    Raises:
        ValueError: a question without an answer, or no text.
    """
    if all(members.get(name) is None for name in _FIELDS["question"]):
        return []
    # A column may be called so and be something else.
    named = {n: v for n, v in members.items() if isinstance(v, str) or n not in (*_FIELDS["type"], *_FIELDS["level"])}
    try:
        return [_question({**named, "key": key})]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"question of image {key!r}: {_reason(error)}") from None


def _question(row: Mapping[str, Any]) -> Question:
    if not isinstance(row, Mapping):
        raise ValueError("no object with key, question and answers")
    values = {field: next((row[n] for n in names if row.get(n) is not None), None) for field, names in _FIELDS.items()}
    missing = [" or ".join(_FIELDS[field]) for field in ("key", "question", "answers") if values[field] is None]
    if missing:
        raise ValueError(f"no {', no '.join(missing)}; there is {', '.join(map(str, row))}"[:300])
    answers = values["answers"] if isinstance(values["answers"], list | tuple) else [values["answers"]]
    answers = tuple(_text(a.get("answer") if isinstance(a, Mapping) else a, "an answer") for a in answers)
    if not answers:
        raise ValueError("no answer")
    key, question = _text(values["key"], "key"), _text(values["question"], "question")
    kind, level = (sys.intern(_text(values[name] or "", name)) for name in ("type", "level"))
    return Question(key=key, question=question, answers=answers, type=kind, level=level)


def _text(value: Any, what: str) -> str:
    """A string, or a whole number as one."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{what} is no string")
    text = str(value)
    text.encode()  # half of a cut emoji is JSON, but no text that can be asked or stored
    return text


def _reason(error: Exception) -> str:
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else one_line(error)[:300]
