"""The sweep task: images of a source at many operating points, each with real bytes and an MLLM's real answers."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cotam.baselines import BASELINES, MAX_SIDES_PX, transcode
from cotam.image import MAX_PIXELS
from cotam.importance import Attention
from cotam.importance.estimate import ImportanceEstimator
from cotam.importance.source import ImportanceMap
from cotam.importance.tower import AttentionTower
from cotam.metrics import psnr_rgb
from cotam.mllm.backend import MllmConfig, load_mllm
from cotam.mllm.identity import refuse_other_mllm
from cotam.stage_times import StageTimes
from cotam.store.partitions import Partition
from cotam.store.readers import read_partition
from cotam.store.records import Completion, RunStore
from cotam.store.schema import Reject
from cotam.store.shard import RejectWriter
from cotam.stream import batches
from cotam.tasks.questions import Question, QuestionSource
from cotam.tasks.results import PREDICTION_SCHEMA
from cotam.tasks.scores import check_metric
from pipelines.counter import Counter, Report
from pipelines.infer import Answered, View, ask, read_views, with_questions
from pipelines.pinned import load_codec
from pipelines.publish import publish_shard

ORIGINAL = "original"
_CHUNK_IMAGES = 16
_CHUNK_PIXELS = 2**25  # of their originals, of which there is a decoded copy, too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One way to store an image and to hand it to the MLLM.

    Attributes:
        codec: "cotam", one of ``BASELINES``, or "original".
        quality: of that codec.
        strength: of the importance map; 0 is uniform.
        input: "pixels" or "tokens".
    """

    codec: str
    quality: float = 0.0
    strength: float = 0.0
    input: str = "pixels"

    def __post_init__(self) -> None:
        if self.codec not in ("cotam", ORIGINAL, *BASELINES):
            raise ValueError(f"codec {self.codec!r} is none of cotam, {', '.join(BASELINES)}")
        if self.input not in ("pixels", "tokens"):
            raise ValueError(f"input {self.input!r} is neither pixels nor tokens")
        if self.codec in BASELINES and not 0 <= self.quality <= 100:
            raise ValueError(f"quality {self.quality:g} of {self.codec} is outside [0, 100]")
        if not math.isfinite(self.quality) or not math.isfinite(self.strength):
            raise ValueError("qualities and strengths are finite numbers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What is compared; part of the run's identity.

    Attributes:
        points: the operating points.
        task, metric: as in ``InferConfig``.
        mllm: which MLLM; its adapter is used at points whose input is "tokens".
        mllm_sha256, adapter_sha256: of their weights.
        model, model_sha256: the codec.
        attention: whose is the importance.
        max_pixels: larger images are rejects.
        task_sha256: of the question file, if it is one.
        clip_sha256: the fingerprint of the importance's tower, where a point has one.
        image_column: of Parquet files, where it was named.
    """

    points: tuple[Point, ...]
    task: str
    metric: str = "exact_match"
    mllm: MllmConfig = dataclasses.field(default_factory=MllmConfig)
    mllm_sha256: str = ""
    adapter_sha256: str = ""
    model: str = "cotam-base"
    model_sha256: str = ""
    attention: Attention = dataclasses.field(default_factory=Attention)
    max_pixels: int = MAX_PIXELS
    task_sha256: str | None = None
    clip_sha256: str | None = None
    image_column: str | None = None

    def __post_init__(self) -> None:
        check_metric(self.metric)


SWEEP_SCHEMA = pa.schema(
    [
        pa.field("codec", pa.string()),
        pa.field("quality", pa.float32()),
        pa.field("strength", pa.float32()),
        pa.field("input", pa.string()),
        pa.field("psnr_rgb", pa.float32()),
        *PREDICTION_SCHEMA,
    ]
)


class SweepTask:
    """Takes the images of a partition through every point.

    Args:
        config: what is compared.
        device: "cpu" or "cuda".
        num_threads: for the networks on a CPU, and for entropy coding.
    """

    command = "sweep"

    def __init__(self, config: SweepConfig, device: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._config, self._num_threads = config, num_threads
        self._codec = load_codec(config.model, config.model_sha256, device, config.max_pixels)
        self._questions = QuestionSource(config.task, config.task_sha256)
        refuse_other_mllm(config.mllm, config.mllm_sha256)
        inputs = {point.input for point in config.points}
        plain = dataclasses.replace(config.mllm, adapter="")
        chosen = {"pixels": plain, "tokens": config.mllm}
        self._mllms = {name: load_mllm(chosen[name], device, self._codec.sha256) for name in sorted(inputs)}
        self._estimator = None
        if any(point.strength for point in config.points):
            tower = AttentionTower.load(config.attention)
            if config.clip_sha256 and tower.fingerprint() != config.clip_sha256:
                raise ValueError(f"{config.attention.clip} differs from the weights that this run started with")
            self._estimator = ImportanceEstimator(tower, device)

    def process(self, partition: Partition, store: RunStore, report: Report) -> Completion:
        """Measure one partition; publishes rejects, then rows. Errors as ``PartitionTask.process``."""
        counts = Counter(self.command, partition, report)
        times, answered = counts.times, Answered()
        views = read_views(read_partition(partition), self._config.max_pixels, self._num_threads, times)
        with tempfile.TemporaryDirectory(prefix="cotam-") as folder:
            path, bad = Path(folder) / "rows.parquet", Path(folder) / "rejects.parquet"
            with pq.ParquetWriter(path, SWEEP_SCHEMA, compression="ZSTD") as writer, RejectWriter(bad) as rejects:
                for chunk in batches(views, lambda view: view.pixels.size // 3, _CHUNK_IMAGES, _CHUNK_PIXELS):
                    asked: list[tuple[View, list[Question]]] = []
                    for view in chunk:
                        view = self._that_fits(view)
                        item = with_questions(view, self._questions) if isinstance(view, View) else view
                        if isinstance(item, Reject):
                            rejects.write(item)
                            counts.reject(item)
                        else:
                            asked.append(item)
                    for rows in self._measure(asked, times) if asked else ():
                        answered.add(rows)
                        writer.write_table(pa.Table.from_pylist(rows, SWEEP_SCHEMA))
                    for view, _ in asked:
                        counts.image(view.pixels.size // 3, view.source_num_bytes, view.num_bytes)
            answered.check()
            return publish_shard(store, partition, path, rejects, counts)

    def _that_fits(self, view: View | Reject) -> View | Reject:
        """A view, or a reject where a codec that it is compared with takes no image of its size."""
        if isinstance(view, View):
            height, width = view.pixels.shape[:2]
            for codec in {point.codec for point in self._config.points if point.codec in BASELINES}:
                if max(height, width) > MAX_SIDES_PX[codec]:
                    error = f"{width}x{height} pixels, over {codec}'s limit of {MAX_SIDES_PX[codec]} a side"
                    return Reject(key=view.key, source=view.source, stage="encode", error=error, image=None)
        return view

    def _measure(self, asked: list[tuple[View, list[Question]]], times: StageTimes) -> Iterator[list[dict[str, Any]]]:
        views, questions = zip(*asked, strict=True)
        with times.measure("importance"):
            maps = self._estimator([view.pixels for view in views]) if self._estimator is not None else None
        # Points that differ in the input only share their bitstreams.
        stored: dict[tuple[str, float, float], Sequence[View]] = {}
        for point in self._config.points:
            how = point.codec, point.quality, point.strength
            if how not in stored:
                stored = {how: self._store(views, point, maps)}
            decoded = stored[how]
            with times.measure("mllm"):
                rows = ask(self._mllms[point.input], list(zip(decoded, questions, strict=True)), self._config.metric)
            psnr = {d.key: psnr_rgb(v.pixels, d.pixels) for v, d in zip(views, decoded, strict=True)}
            if rows:
                same = dataclasses.asdict(point)
                yield [{**same, "psnr_rgb": psnr[r["key"]], **r} for r in rows]

    def _store(self, views: Sequence[View], point: Point, maps: list[ImportanceMap] | None) -> Sequence[View]:
        """The images as they come back from their bytes at ``point``."""
        if point.codec == ORIGINAL:
            return views
        if point.codec in BASELINES:
            pairs = [transcode(view.pixels, point.codec, round(point.quality)) for view in views]
            return [v._replace(pixels=np.array(p), num_bytes=len(d)) for v, (d, p) in zip(views, pairs, strict=True)]
        codec = self._codec
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="cotam-rans") as coders:
            images = [view.pixels for view in views]
            guides = maps if point.strength else None
            strings = codec.encode_batch(images, point.quality, guides, point.strength, coders)
            decompressed = codec.decompress(strings, coders)
        decoded = zip(codec.reconstruct(decompressed), codec.latents(decompressed), strings, strict=True)
        return [
            view._replace(pixels=pixels, num_bytes=len(data), y_hat=y_hat)
            for view, (pixels, y_hat, data) in zip(views, decoded, strict=True)
        ]
