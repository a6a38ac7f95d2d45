"""Counting what a task does with its partition, for the progress bar, the metrics and the completion record."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from cotam.stage_times import StageTimes
from cotam.store.partitions import Partition
from cotam.store.records import Completion
from cotam.store.schema import Reject, Row
from pipelines.logs import log_event
from pipelines.metrics import metrics_of, reject_reason, reject_stage

Counts = dict[str, int]
Report = Callable[[Counts], None]

_NAMES = ("num_images", "num_rejects", "num_pixels", "source_num_bytes", "bitstream_num_bytes")
_REPORT_S = 0.5
_log = logging.getLogger(__name__)


class PartitionCounter:
    """Adds up the rows and rejects of one partition, and reports what is new twice a second.

    Args:
        command: "encode", "decode", "infer" or "sweep".
        partition: whose images are counted.
        report: gets the counts since its last call.

    Attributes:
        times: of the partition's stages, for the streams that it goes through.
    """

    def __init__(self, command: str, partition: Partition, report: Report) -> None:
        self.times = StageTimes()
        self._command, self._partition, self._report = command, partition, report
        self._metrics = metrics_of(command)
        self._total: Counts = dict.fromkeys(_NAMES, 0)
        self._reported = dict(self._total)
        self._reported_seconds: dict[str, float] = {}
        self._started = self._last = time.monotonic()

    def row(self, row: Row) -> None:
        """Count an encoded image that made it."""
        self.image(row.width * row.height, row.source_num_bytes, len(row.bitstream))

    def image(self, num_pixels: int, source_num_bytes: int, num_bytes: int) -> None:
        """Count an image that made it, of which ``num_bytes`` are stored."""
        self._metrics.bpp(8 * num_bytes / num_pixels)
        self._add(num_images=1, num_pixels=num_pixels, source_num_bytes=source_num_bytes, bitstream_num_bytes=num_bytes)

    def reject(self, reject: Reject) -> None:
        """Count an image that did not."""
        self._metrics.reject(reject)
        log_event(
            _log, logging.DEBUG, "image_rejected", command=self._command, partition_id=self._partition.partition_id,
            source=reject.source, key=reject.key, stage=reject_stage(reject), reason=reject_reason(reject),
            error=reject.error,
        )  # fmt: skip
        self._add(num_images=1, num_rejects=1)

    def completion(
        self, data: str, num_bytes: int | None, sha256: str | None, rejects_sha256: str | None
    ) -> Completion:
        """The completion record of the partition, whose output is at ``data``."""
        self._send()
        return Completion(
            partition_id=self._partition.partition_id,
            source=self._partition.source,
            num_rows=self._total["num_images"] - self._total["num_rejects"],
            **self._total,
            data=data,
            data_num_bytes=num_bytes,
            data_sha256=sha256,
            rejects_sha256=rejects_sha256,
            partition_num_bytes=self._partition.num_bytes,
            seconds=time.monotonic() - self._started,
            stage_seconds=self._reported_seconds,
        )

    def _add(self, **counts: int) -> None:
        for name, value in counts.items():
            self._total[name] += value
        if time.monotonic() - self._last > _REPORT_S:
            self._send()

    def _send(self) -> None:
        new = {n: self._total[n] - self._reported[n] for n in _NAMES}
        self._report(new)
        self._metrics.images(new["num_images"], new["num_pixels"], new["source_num_bytes"], new["bitstream_num_bytes"])
        seconds = self.times.seconds()
        self._metrics.stage_seconds({n: s - self._reported_seconds.get(n, 0.0) for n, s in seconds.items()})
        self._reported, self._reported_seconds, self._last = dict(self._total), seconds, time.monotonic()
