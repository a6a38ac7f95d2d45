"""Predictions: the rows that inference writes, and what they add up to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cotam.store.fs import Root
from cotam.tasks.blind import AskedQuestion, blind_answers
from cotam.tasks.intervals import ImageSums
from cotam.tasks.scores import SCORES, yes_no

PREDICTION_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("source", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("num_bytes", pa.int64()),
        pa.field("bpp", pa.float32()),
        pa.field("question", pa.string()),
        pa.field("answers", pa.list_(pa.string())),
        pa.field("type", pa.string()),
        pa.field("level", pa.string()),
        pa.field("prediction", pa.string()),
        pa.field("error", pa.string()),
        pa.field("score", pa.float32()),
    ]
)


class _Mean:
    """A mean over questions, and what guessing blind gives."""

    def __init__(self) -> None:
        self.sums, self.blind = ImageSums(), 0.0

    def result(self) -> dict[str, Any]:
        """JSON-serialisable."""
        num = round(self.sums.questions)
        return {
            "score": self.sums.score / num,
            "ci95": list(self.sums.interval()),
            "num_questions": num,
            "blind": self.blind / num,
        }


def summarise(rows: Iterable[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Scores over all questions, by type and by level, and bits per pixel.

    Args:
        rows: of ``PREDICTION_SCHEMA``, those of an image in one run. A question without an answer scores 0.
        metric: the name of the score.

    Returns:
        JSON-serialisable: num_images, num_questions, num_errors, bpp (all bytes over all pixels), metric, overall,
        by_type, by_level (each with score, ci95, num_questions, and blind: the score of the answers that the question
        alone suggests, ``blind_answers``), and yes_no where all answers are yes or no.
    """
    overall = _Mean()
    by_type: dict[str, _Mean] = {}
    by_level: dict[str, _Mean] = {}
    binary: list[tuple[str, str]] = []
    asked_alone: list[tuple[AskedQuestion, str]] = []
    num_images = num_errors = num_bytes = num_pixels = 0
    for _, group in groupby(rows, key=lambda row: (row["source"], row["key"])):
        asked = list(group)
        num_images += 1
        num_bytes += asked[0]["num_bytes"]
        num_pixels += asked[0]["width"] * asked[0]["height"]
        num_errors += sum(row["error"] is not None for row in asked)
        overall.sums.add(sum(row["score"] for row in asked), len(asked))
        for means, name in ((by_type, "type"), (by_level, "level")):
            for value in {row[name] for row in asked if row[name]}:
                scores = [r["score"] for r in asked if r[name] == value]
                means.setdefault(value, _Mean()).sums.add(sum(scores), len(scores))
        for row in asked:
            alone = AskedQuestion(row["question"], row["type"], tuple(row["answers"]), num_images)
            asked_alone.append((alone, row["level"]))
            right = {answer.strip().lower() for answer in row["answers"]}
            if right in ({"yes"}, {"no"}):
                other = "no" if right == {"yes"} else "yes"
                binary.append((row["prediction"] or other, right.pop()))  # no answer is a wrong one
    for (question, level), guess in zip(asked_alone, blind_answers([q for q, _ in asked_alone]), strict=True):
        score = SCORES[metric](guess, question.answers)
        for mean in (overall, by_type.get(question.type), by_level.get(level)):
            if mean is not None:
                mean.blind += score
    results: dict[str, Any] = {
        "num_images": num_images,
        "num_questions": round(overall.sums.questions),
        "num_errors": num_errors,
        "bpp": 8 * num_bytes / num_pixels if num_pixels else None,
        "metric": metric,
        "overall": overall.result() if overall.sums.images else None,
        "by_type": {name: mean.result() for name, mean in sorted(by_type.items())},
        "by_level": {name: mean.result() for name, mean in sorted(by_level.items())},
    }
    if binary:
        results["yes_no"] = yes_no(*zip(*binary, strict=True))._asdict()
    return results


def read_predictions(root: Root, paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The rows of prediction files, one after another."""
    for path in paths:
        with root.fs.open(root.join(path), "rb") as file, pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches():
                yield from batch.to_pylist()
