"""The inference task: images of a shard, or of a source as it is, through an MLLM to predictions."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cotam.image import MAX_PIXELS, ImageError, RGBImage, decode_image, num_pixels_of
from cotam.mllm.backend import Asked, Mllm, MllmConfig, MllmError, load_mllm
from cotam.mllm.identity import refuse_other_mllm
from cotam.overlap import ordered_map, prefetch
from cotam.stage_times import StageTimes
from cotam.store.fs import Root
from cotam.store.partitions import Partition
from cotam.store.readers import read_partition
from cotam.store.records import Completion, RunStore
from cotam.store.schema import Reject, Sample
from cotam.store.shard import RejectWriter, read_rows
from cotam.stream import batches, decode_stream
from cotam.tasks.questions import Question, QuestionSource
from cotam.tasks.results import PREDICTION_SCHEMA
from cotam.tasks.scores import METRICS, check_metric
from pipelines.counter import Counter, Report
from pipelines.pinned import load_codec
from pipelines.publish import publish_shard

_BATCH_PIXELS = 2**26  # of images that the MLLM is asked about at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferConfig:
    """What is asked, and of what; part of the run's identity.

    Attributes:
        task: a question file, "member:NAME", or "sceneqa".
        metric: of the scores, a name in ``METRICS``.
        mllm: which MLLM, and how it is asked.
        mllm_sha256: of its weights, where they are local.
        adapter_sha256: of the adapter's file.
        model, model_sha256: of the codec; empty where the source is images as they are.
        max_pixels: larger images are rejects.
        image_column: of Parquet files, where it was named.
        task_sha256: of the question file, if it is one.
    """

    task: str
    metric: str = "exact_match"
    mllm: MllmConfig = dataclasses.field(default_factory=MllmConfig)
    mllm_sha256: str = ""
    adapter_sha256: str = ""
    model: str = ""
    model_sha256: str = ""
    max_pixels: int = MAX_PIXELS
    image_column: str | None = None
    task_sha256: str | None = None

    def __post_init__(self) -> None:
        check_metric(self.metric)


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


class InferTask:
    """Asks an MLLM about the images of a partition.

    Args:
        config: what is asked.
        device: "cpu" or "cuda".
        num_threads: for the networks on a CPU, and for decoding.
    """

    command = "infer"

    def __init__(self, config: InferConfig, device: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._config, self._num_threads = config, num_threads
        self._codec = None
        if config.model:
            self._codec = load_codec(config.model, config.model_sha256, device, config.max_pixels)
        self._questions = QuestionSource(config.task, config.task_sha256)
        refuse_other_mllm(config.mllm, config.mllm_sha256)
        self._mllm = load_mllm(config.mllm, device, config.model_sha256)

    def process(self, partition: Partition, store: RunStore, report: Report) -> Completion:
        """Ask about one partition; publishes rejects, then predictions. Errors as ``PartitionTask.process``."""
        counts = Counter(self.command, partition, report)
        times = counts.times
        views = prefetch(self._views(partition, times), 2 * self._num_threads)
        answered = Answered()
        runs = batches(views, lambda view: view.pixels.size // 3, self._config.mllm.batch_size, _BATCH_PIXELS)
        with tempfile.TemporaryDirectory(prefix="cotam-") as folder:
            path, bad = Path(folder) / "predictions.parquet", Path(folder) / "rejects.parquet"
            with pq.ParquetWriter(path, PREDICTION_SCHEMA, compression="ZSTD") as writer, RejectWriter(bad) as rejects:
                for batch in runs:
                    asked: list[tuple[View, list[Question]]] = []
                    for view in batch:
                        item = with_questions(view, self._questions) if isinstance(view, View) else view
                        if isinstance(item, Reject):
                            rejects.write(item)
                            counts.reject(item)
                        else:
                            asked.append(item)
                            counts.image(view.pixels.size // 3, view.source_num_bytes, view.num_bytes)
                    with times.measure("mllm"):
                        rows = ask(self._mllm, asked, self._config.metric)
                    if rows:
                        answered.add(rows)
                        writer.write_table(pa.Table.from_pylist(rows, PREDICTION_SCHEMA))
            answered.check()
            return publish_shard(store, partition, path, rejects, counts)

    def _views(self, partition: Partition, times: StageTimes) -> Iterator[View | Reject]:
        if partition.kind != "shard":
            yield from read_views(read_partition(partition), self._config.max_pixels, self._num_threads, times)
            return
        assert self._codec is not None, "shards need a codec"
        rows = read_rows(Root(partition.source), partition.paths[0])
        with_latents = bool(self._config.mllm.adapter)
        for item in decode_stream(rows, self._codec, self._num_threads, with_latents, times):
            if isinstance(item, Reject):
                yield item
            else:
                row = item.row
                sizes = len(row.bitstream), row.source_num_bytes
                yield View(row.key, row.source, row.members, item.pixels, *sizes, item.y_hat)


class Answered:
    """Whether any question of a partition has an answer: where none has, the MLLM is at fault."""

    def __init__(self) -> None:
        self._any, self._error = False, ""

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Note rows of ``PREDICTION_SCHEMA``."""
        self._any = self._any or any(row["error"] is None for row in rows)
        self._error = self._error or next((row["error"] for row in rows if row["error"]), "")

    def check(self) -> None:
        """Raise RuntimeError where there were questions and no answer: the partition fails, and a rerun asks again."""
        if self._error and not self._any:
            raise RuntimeError(f"no question has an answer: {self._error}")


def read_views(
    samples: Iterable[Sample | Reject], max_pixels: int, num_threads: int, times: StageTimes
) -> Iterator[View | Reject]:
    """The images of a source as they are, decoded in threads, in order."""

    def decode(sample: Sample | Reject) -> View | Reject:
        if isinstance(sample, Reject):
            return sample
        try:
            with times.measure("image"):
                pixels = decode_image(sample.image, max_pixels).pixels
        except ImageError as error:
            return Reject(key=sample.key, source=sample.source, stage="decode", error=str(error), image=sample.image)
        size = len(sample.image)
        return View(sample.key, sample.source, sample.members, pixels, size, size)

    with ThreadPoolExecutor(num_threads, thread_name_prefix="cotam-decode") as executor:
        read = times.iterate("read", samples)
        yield from ordered_map(
            executor, decode, read, 2 * num_threads, lambda s: 0 if isinstance(s, Reject) else num_pixels_of(s.image)
        )


def with_questions(view: View, source: QuestionSource) -> tuple[View, list[Question]] | Reject:
    """An image with what is asked about it, or a reject where its questions cannot be read."""
    try:
        return view, source(view.key, view.members)
    except ValueError as error:
        return Reject(key=view.key, source=view.source, stage="questions", error=str(error))


def ask(mllm: Mllm, asked: Sequence[tuple[View, Sequence[Question]]], metric: str) -> list[dict[str, Any]]:
    """Rows of ``PREDICTION_SCHEMA`` for the questions about some images. Raises OSError as ``Mllm.answer``."""
    asked = [(view, questions) for view, questions in asked if questions]
    if not asked:
        return []
    score = METRICS[metric].score  # others score when all is answered
    answers = mllm.answer([Asked(v.pixels, [q.question for q in questions], v.y_hat) for v, questions in asked])
    rows = []
    for (view, questions), row in zip(asked, answers, strict=True):
        for question, answer in zip(questions, row, strict=True):
            failed = isinstance(answer, MllmError)
            rows.append(
                {
                    "key": view.key,
                    "source": view.source,
                    "width": view.pixels.shape[1],
                    "height": view.pixels.shape[0],
                    "num_bytes": view.num_bytes,
                    "bpp": 8 * view.num_bytes / (view.pixels.size // 3),
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
