"""The sweep task: images of a source at many operating points, each with real bytes and an MLLM's real answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cotam.baselines import BASELINES, check_installed, transcode
from cotam.importance import Attention
from cotam.importance.source import ImportanceMap
from cotam.metrics import psnr_rgb
from cotam.mllm.backend import load_mllm
from cotam.mllm.identity import refuse_other_mllm
from cotam.pinned import load_codec, load_estimator
from cotam.stage_times import StageTimes
from cotam.store.partitions import Partition
from cotam.store.readers import read_partition
from cotam.store.records import Completion, RunStore
from cotam.store.schema import Reject
from cotam.stream import batches
from cotam.tasks.questions import QuestionSource
from cotam.tasks.results import PREDICTION_SCHEMA
from pipelines.asking import AskConfig, Questioned, View, ask, publish_answers, read_views
from pipelines.counter import PartitionCounter, Report

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
        check_installed(self.codec)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(AskConfig):
    """What is compared; part of the run's identity.

    Attributes:
        points: the operating points; the MLLM's adapter is used at those whose input is "tokens".
        attention: whose is the importance.
        clip_sha256: the fingerprint of its tower, where a point is guided.
    """

    points: tuple[Point, ...]
    attention: Attention = dataclasses.field(default_factory=Attention)
    clip_sha256: str = ""


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
        refuse_other_mllm(config.mllm, config.mllm_sha256, config.adapter_sha256)
        self._mllm = load_mllm(config.mllm, device, self._codec.sha256)
        self._estimator = None
        if any(point.strength for point in config.points):
            self._estimator = load_estimator(config.attention, config.clip_sha256, device)

    def process(self, partition: Partition, store: RunStore, report: Report) -> Completion:
        """Measure one partition; publishes rejects, then rows. Errors as ``PartitionTask.process``."""
        counts = PartitionCounter(self.command, partition, report)
        views = read_views(read_partition(partition), self._config.max_pixels, self._num_threads, counts.times)
        chunks = batches(views, lambda view: view.num_pixels, _CHUNK_IMAGES, _CHUNK_PIXELS)
        fitting = ([self._that_fits(view) for view in chunk] for chunk in chunks)
        measure = partial(self._measure, counts.times)
        return publish_answers(fitting, self._questions, measure, SWEEP_SCHEMA, partition, store, counts)

    def _that_fits(self, view: View | Reject) -> View | Reject:
        """A view, or a reject where a codec that it is compared with takes no image of its size."""
        if isinstance(view, View):
            height, width = view.pixels.shape[:2]
            compared = {point.codec for point in self._config.points}
            for codec, baseline in BASELINES.items():
                if codec in compared and max(height, width) > baseline.max_side_px:
                    error = f"{width}x{height} pixels, over {codec}'s limit of {baseline.max_side_px} a side"
                    return Reject(key=view.key, source=view.source, stage="encode", error=error, image=None)
        return view

    def _measure(self, times: StageTimes, questioned: list[Questioned]) -> Iterator[list[dict[str, Any]]]:
        views, questions = zip(*questioned, strict=True)
        with times.measure("importance"):
            maps = self._estimator([view.pixels for view in views]) if self._estimator is not None else None
        stored_as, decoded, psnr = None, views, dict[str, float]()
        for point in self._config.points:
            how = point.codec, point.quality, point.strength
            if how != stored_as:  # points that differ in the input only, which follow each other, share bitstreams
                stored_as, decoded = how, self._store(views, point, maps)
                psnr = {d.key: psnr_rgb(v.pixels, d.pixels) for v, d in zip(views, decoded, strict=True)}
            seen = decoded if point.input == "tokens" else [view._replace(y_hat=None) for view in decoded]
            with times.measure("mllm"):
                rows = ask(self._mllm, list(zip(seen, questions, strict=True)), self._config.metric)
            same = dataclasses.asdict(point)
            yield [{**same, "psnr_rgb": psnr[row["key"]], **row} for row in rows]

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
        latents = codec.latents(decompressed) if self._config.mllm.adapter else [None] * len(views)
        decoded = zip(codec.reconstruct(decompressed), latents, strings, strict=True)
        return [
            view._replace(pixels=pixels, num_bytes=len(data), y_hat=y_hat)
            for view, (pixels, y_hat, data) in zip(views, decoded, strict=True)
        ]
