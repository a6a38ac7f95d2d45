"""Predictions: the rows that inference writes, and what they add up to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cotam.store.fs import Root
from cotam.tasks.blind import BlindSample
from cotam.tasks.intervals import ImageSums
from cotam.tasks.questions import Question
from cotam.tasks.scores import METRICS, Metric, Score, is_yes, yes_no

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


Row = Mapping[str, Any]  # of PREDICTION_SCHEMA
Rows = Callable[[], Iterable[Row]]  # from the first one each time; memory does not hold them all


def score_of(metric: Metric, rows: Rows) -> Score:
    """A metric's score; one that needs the references of all ``rows`` reads them."""
    if metric.score is not None:
        return metric.score
    assert metric.of_corpus is not None
    return metric.of_corpus(row["answers"] for row in rows())


def score_row(row: Row, score: Score) -> float:
    """The row's stored score; if it has none, ``score`` of its prediction; 0 if there is no prediction."""
    if row["score"] is not None:
        return float(row["score"])
    return 0.0 if row["error"] is not None else score(row["prediction"], row["answers"])


def image_of(row: Row) -> tuple[int, str]:
    """What tells images apart: their keys are unique in a file of predictions, which is of one partition."""
    return row.get("file", 0), row["key"]


def summarise(rows: Rows, metric: str) -> dict[str, Any]:
    """Scores over all questions, by type and by level, and bits per pixel.

    Args:
        rows: of ``PREDICTION_SCHEMA``, those of an image in one run. A question without an answer scores 0.
        metric: the name of the score.

    Returns:
        JSON-serialisable: num_images, num_questions, num_errors, bpp (all bytes over all pixels), metric, overall,
        by_type, by_level (each with score, ci95, num_questions, and blind: the score of the answers that the question
        alone suggests, ``BlindSample``), and yes_no where all answers are yes or no.
    """
    chosen = METRICS[metric]
    score = score_of(chosen, rows)

    def no_sums() -> ImageSums:
        return ImageSums(chosen.max_score, chosen.is_graded)

    overall = no_sums()
    by_type: dict[str, ImageSums] = defaultdict(no_sums)
    by_level: dict[str, ImageSums] = defaultdict(no_sums)
    binary: Counter[tuple[bool, bool]] = Counter()
    blind = BlindSample()
    num_images = num_errors = num_bytes = num_pixels = 0
    for _, group in groupby(rows(), key=image_of):
        asked = list(group)
        scores = [score_row(row, score) for row in asked]
        num_images += 1
        num_bytes += asked[0]["num_bytes"]
        num_pixels += asked[0]["width"] * asked[0]["height"]
        num_errors += sum(row["error"] is not None for row in asked)
        overall.add(sum(scores), len(scores))
        for sums, name in ((by_type, "type"), (by_level, "level")):
            for value in {row[name] for row in asked if row[name]}:
                own = [s for s, row in zip(scores, asked, strict=True) if row[name] == value]
                sums[value].add(sum(own), len(own))
        blind.add(num_images, [_question(row) for row in asked])
        for row in asked:
            right = {answer.strip().lower() for answer in row["answers"]}
            if right in ({"yes"}, {"no"}):
                yes = right == {"yes"}
                binary[is_yes(row["prediction"]) if row["prediction"] else not yes, yes] += 1  # no answer is wrong
    guessed = blind.scores(score)
    results: dict[str, Any] = {
        "num_images": num_images,
        "num_questions": round(overall.questions),
        "num_errors": num_errors,
        "bpp": 8 * num_bytes / num_pixels if num_pixels else None,
        "metric": metric,
        "overall": _result(overall, guessed.overall) if overall.images else None,
        "by_type": {name: _result(sums, guessed.by_type.get(name)) for name, sums in sorted(by_type.items())},
        "by_level": {name: _result(sums, guessed.by_level.get(name)) for name, sums in sorted(by_level.items())},
    }
    if binary:
        results["yes_no"] = yes_no(binary)._asdict()
    return results


def _question(row: Row) -> Question:
    asked = {name: row[name] for name in ("key", "question", "type", "level")}
    return Question(**asked, answers=tuple(row["answers"]))


def _result(sums: ImageSums, blind: float | None) -> dict[str, Any]:
    """JSON-serialisable."""
    num = round(sums.questions)
    return {"score": sums.score / num, "ci95": list(sums.interval()), "num_questions": num, "blind": blind}


def read_predictions(root: Root, paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The rows of prediction files, one after another; ``file`` in each is the number of its file."""
    for number, path in enumerate(paths):
        with root.fs.open(root.join(path), "rb") as file, pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches():
                for row in batch.to_pylist():
                    yield {**row, "file": number}
