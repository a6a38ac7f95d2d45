"""Asking an MLLM about the images of a partition: what inference and sweeps have in common."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from cotam.image import MAX_PIXELS, RGBImage
from cotam.mllm.backend import Asked, Mllm, MllmConfig, MllmError
from cotam.stage_times import StageTimes
from cotam.store.partitions import Partition
from cotam.store.records import Completion, RunStore
from cotam.store.schema import Reject, Sample
from cotam.store.shard import RejectWriter
from cotam.stream import decode_samples
from cotam.tasks.questions import Question, QuestionSource
from cotam.tasks.scores import METRICS, check_metric
from pipelines.counter import PartitionCounter
from pipelines.publish import publish_shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskConfig:
    """What is asked, and of what; part of the run's identity.

    Attributes:
        task: a question file, "member:NAME", "columns", or "sceneqa".
        task_sha256: of the question file, if it is one.
        metric: of the scores, a name in ``METRICS``.
        mllm: which MLLM, and how it is asked.
        mllm_sha256: of its weights, where they are local.
        adapter_sha256: of the adapter's file.
        model, model_sha256: of the codec; empty where there is none.
        max_pixels: larger images are rejects.
        image_column: of Parquet files, where it was named.
    """

    task: str
    task_sha256: str | None = None
    metric: str = "exact_match"
    mllm: MllmConfig = dataclasses.field(default_factory=MllmConfig)
    mllm_sha256: str = ""
    adapter_sha256: str = ""
    model: str = ""
    model_sha256: str = ""
    max_pixels: int = MAX_PIXELS
    image_column: str | None = None

    def __post_init__(self) -> None:
        check_metric(self.metric)

    def identity(self) -> dict[str, Any]:
        """What answers depend on, for the manifest."""
        return {**dataclasses.asdict(self), "mllm": self.mllm.identity()}


class View(NamedTuple):
    """An image to be asked about.

    Attributes:
        key, source, members: of its sample.
        pixels: uint8 (H, W, 3).
        num_bytes: what is stored of it. source_num_bytes: of its original file.
        y_hat: latents (M, h, w), where visual tokens are wanted.
    """

    key: str
    source: str
    members: dict[str, Any]
    pixels: RGBImage
    num_bytes: int
    source_num_bytes: int
    y_hat: Tensor | None = None

    @property
    def num_pixels(self) -> int:
        """Of the image."""
        return self.pixels.shape[0] * self.pixels.shape[1]


Questioned = tuple[View, list[Question]]  # an image with what is asked about it


def read_views(
    samples: Iterable[Sample | Reject], max_pixels: int, num_threads: int, times: StageTimes
) -> Iterator[View | Reject]:
    """The images of a source as they are, decoded in threads, in order."""
    with ThreadPoolExecutor(num_threads, thread_name_prefix="cotam-decode") as executor:
        for item in decode_samples(times.iterate("read", samples), max_pixels, executor, 2 * num_threads, times):
            if isinstance(item, Reject):
                yield item
            else:
                sample, size = item.sample, len(item.sample.image)
                yield View(sample.key, sample.source, sample.members, item.pixels, size, size)


def publish_answers(
    views: Iterable[Sequence[View | Reject]],
    questions: QuestionSource,
    answer: Callable[[list[Questioned]], Iterable[list[dict[str, Any]]]],
    schema: pa.Schema,
    partition: Partition,
    store: RunStore,
    counts: PartitionCounter,
) -> Completion:
    """Ask about the images of a partition; publishes rejects, then rows.

    Args:
        views: the images, in batches that are asked about at a time.
        questions: about each.
        answer: rows of ``schema`` for a batch, some at a time.
        schema: has the columns of ``PREDICTION_SCHEMA``.
        partition, store, counts: whose rows they are, where they go, and who counts.

    Returns:
        The completion record, not yet written.

    Raises:
        RuntimeError: there were questions, but no answer: the MLLM is at fault, and another run asks again.
        OSError: the MLLM or the store failed.
    """
    any_answer, error = False, ""
    with tempfile.TemporaryDirectory(prefix="cotam-") as folder:
        path, bad = Path(folder) / "rows.parquet", Path(folder) / "rejects.parquet"
        with pq.ParquetWriter(path, schema, compression="ZSTD") as writer, RejectWriter(bad) as rejects:
            for batch in views:
                questioned = []
                for view in batch:
                    item = _with_questions(view, questions)
                    if isinstance(item, Reject):
                        rejects.write(item)
                        counts.reject(item)
                    else:
                        questioned.append(item)
                for rows in answer(questioned) if questioned else ():
                    any_answer = any_answer or any(row["error"] is None for row in rows)
                    error = error or next((row["error"] for row in rows if row["error"]), "")
                    if rows:  # none where nobody asks about these images
                        writer.write_table(pa.Table.from_pylist(rows, schema))
                for view, _ in questioned:
                    counts.image(view.num_pixels, view.source_num_bytes, view.num_bytes)
        if error and not any_answer:
            raise RuntimeError(f"no question has an answer: {error}")
        return publish_shard(store, partition, path, rejects, counts)


def _with_questions(view: View | Reject, source: QuestionSource) -> Questioned | Reject:
    """An image with what is asked about it, or a reject where its questions cannot be read."""
    if isinstance(view, Reject):
        return view
    try:
        return view, source(view.key, view.members)
    except ValueError as error:
        return Reject(key=view.key, source=view.source, stage="questions", error=str(error))


def ask(mllm: Mllm, questioned: Sequence[Questioned], metric: str) -> list[dict[str, Any]]:
    """Rows of ``PREDICTION_SCHEMA`` for the questions about some images. Raises OSError as ``Mllm.answer``."""
    questioned = [(view, questions) for view, questions in questioned if questions]
    if not questioned:
        return []
    score = METRICS[metric].score  # others score when all is answered
    answers = mllm.answer([Asked(v.pixels, [q.question for q in questions], v.y_hat) for v, questions in questioned])
    rows = []
    for (view, questions), row in zip(questioned, answers, strict=True):
        for question, answer in zip(questions, row, strict=True):
            failed = isinstance(answer, MllmError)
            rows.append(
                {
                    "key": view.key,
                    "source": view.source,
                    "width": view.pixels.shape[1],
                    "height": view.pixels.shape[0],
                    "num_bytes": view.num_bytes,
                    "bpp": 8 * view.num_bytes / view.num_pixels,
                    "question": question.question,
                    "answers": list(question.answers),
                    "type": question.type,
                    "level": question.level,
                    "prediction": None if failed else answer,
                    "error": str(answer) if failed else None,
                    "score": None if score is None else 0.0 if failed else score(str(answer), question.answers),
                }
            )
    return rows
