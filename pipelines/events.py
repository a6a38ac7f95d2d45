"""What happens to the partitions of a worker: a line in the log and a count in the metrics for each event."""

from __future__ import annotations

import dataclasses
import logging

from tenacity import RetryCallState

from cotam.errors import with_type
from cotam.store.partitions import Partition
from cotam.store.records import Completion
from pipelines.logs import log_event
from pipelines.metrics import metrics_of

_log = logging.getLogger(__name__)


class PartitionEvents:
    """Records what becomes of partitions in this worker.

    Args:
        command: "encode", "decode", "infer" or "sweep".
    """

    def __init__(self, command: str) -> None:
        self._command, self._metrics = command, metrics_of(command)
        self._metrics.worker()

    def started(self, partition: Partition, num_deaths: int) -> None:
        """A partition is begun, after ``num_deaths`` workers began it and did not come back."""
        self._say(logging.INFO, "partition_started", partition, num_bytes=partition.num_bytes, worker_deaths=num_deaths)
        if num_deaths:
            self._metrics.retry("worker")

    def retried(self, partition: Partition, failed: RetryCallState) -> None:
        """An attempt failed, and the partition is begun again after a while."""
        error = failed.outcome.exception() if failed.outcome is not None else None
        text = with_type(error) if error is not None else ""
        self._say(logging.WARNING, "partition_retried", partition, attempt=failed.attempt_number, error=text)
        self._metrics.retry("source")

    def lost_device(self, partition: Partition, error: Exception) -> None:
        """This process lost its device and ends: the partition is begun again in another."""
        self._say(logging.ERROR, "worker_lost_device", partition, error=with_type(error))

    def completed(self, partition: Partition, record: Completion) -> None:
        """A partition is finished, and its record is written."""
        counts = {
            f.name: getattr(record, f.name)
            for f in dataclasses.fields(record)
            if f.name.startswith("num_") or f.name in ("source_num_bytes", "bitstream_num_bytes", "data_num_bytes")
        }
        stages = {stage: round(seconds, 3) for stage, seconds in record.stage_seconds.items()}
        seconds = round(record.seconds, 3)
        self._say(logging.INFO, "partition_completed", partition, **counts, seconds=seconds, stage_seconds=stages)
        self._metrics.partition("completed", record.seconds)

    def failed(self, partition: Partition, error: str) -> None:
        """A partition could not be finished; it is recorded as failed."""
        self._say(logging.ERROR, "partition_failed", partition, error=error)
        self._metrics.partition("failed")

    def abandoned(self, partition: Partition, error: str) -> None:
        """A partition took down too many workers; it is recorded as failed."""
        self._say(logging.ERROR, "partition_abandoned", partition, error=error)
        self._metrics.partition("abandoned")

    def _say(self, level: int, event: str, partition: Partition, **fields: object) -> None:
        names = {"command": self._command, "partition_id": partition.partition_id, "source": partition.source}
        log_event(_log, level, event, **names, **fields)
