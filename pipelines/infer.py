"""The inference task: images of a shard, or of a source as it is, through an MLLM to predictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cotam.mllm.backend import load_mllm
from cotam.mllm.identity import refuse_other_mllm
from cotam.overlap import prefetch
from cotam.pinned import load_codec
from cotam.stage_times import StageTimes
from cotam.store.fs import Root
from cotam.store.partitions import Partition
from cotam.store.readers import read_partition
from cotam.store.records import Completion, RunStore
from cotam.store.schema import Reject
from cotam.store.shard import read_rows
from cotam.stream import batches, decode_stream
from cotam.tasks.questions import QuestionSource
from cotam.tasks.results import PREDICTION_SCHEMA
from pipelines.asking import AskConfig, Questioned, View, ask, publish_answers, read_views
from pipelines.counter import PartitionCounter, Report

_BATCH_PIXELS = 2**26  # of images that the MLLM is asked about at once


class InferTask:
    """Asks an MLLM about the images of a partition.

    Args:
        config: what is asked; its codec decodes shards.
        device: "cpu" or "cuda".
        num_threads: for the networks on a CPU, and for decoding.
    """

    command = "infer"

    def __init__(self, config: AskConfig, device: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._config, self._num_threads = config, num_threads
        self._codec = None
        if config.model:
            self._codec = load_codec(config.model, config.model_sha256, device, config.max_pixels)
        self._questions = QuestionSource(config.task, config.task_sha256)
        refuse_other_mllm(config.mllm, config.mllm_sha256, config.adapter_sha256)
        self._mllm = load_mllm(config.mllm, device, config.model_sha256)

    def process(self, partition: Partition, store: RunStore, report: Report) -> Completion:
        """Ask about one partition; publishes rejects, then predictions. Errors as ``PartitionTask.process``."""
        counts = PartitionCounter(self.command, partition, report)

        def answer(questioned: list[Questioned]) -> list[list[dict[str, Any]]]:
            with counts.times.measure("mllm"):
                return [ask(self._mllm, questioned, self._config.metric)]

        views = prefetch(self._views(partition, counts.times), 2 * self._num_threads)
        runs = batches(views, lambda view: view.num_pixels, self._config.mllm.batch_size, _BATCH_PIXELS)
        return publish_answers(runs, self._questions, answer, PREDICTION_SCHEMA, partition, store, counts)

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
