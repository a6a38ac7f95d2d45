"""Counting what a task does with its partition, for the progress bar and the completion record."""

from __future__ import annotations

import time
from collections.abc import Callable

from cotam.store.readers import Partition
from cotam.store.records import Completion
from cotam.store.schema import Row

Counts = dict[str, int]
Report = Callable[[Counts], None]

_NAMES = ("images", "rejects", "num_pixels", "source_num_bytes", "bitstream_num_bytes")
_REPORT_S = 0.5


class Counter:
    """Adds up the rows and rejects of one partition, and reports what is new twice a second.

    Args:
        report: gets the counts since its last call.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._total: Counts = dict.fromkeys(_NAMES, 0)
        self._reported = dict(self._total)
        self._started = self._last = time.monotonic()

    def row(self, row: Row) -> None:
        """Count an encoded image that made it."""
        self.image(row.width * row.height, row.source_num_bytes, len(row.bitstream))

    def image(self, num_pixels: int, source_num_bytes: int, num_bytes: int) -> None:
        """Count an image that made it, of which ``num_bytes`` are stored."""
        self._add(images=1, num_pixels=num_pixels, source_num_bytes=source_num_bytes, bitstream_num_bytes=num_bytes)

    def reject(self) -> None:
        """Count an image that did not."""
        self._add(images=1, rejects=1)

    def completion(self, partition: Partition, data: str, num_bytes: int | None, sha256: str | None) -> Completion:
        """The completion record of the partition, whose output is at ``data``."""
        self._send()
        total = self._total
        return Completion(
            partition_id=partition.partition_id,
            source=partition.source,
            num_images=total["images"],
            num_rows=total["images"] - total["rejects"],
            num_rejects=total["rejects"],
            num_pixels=total["num_pixels"],
            source_num_bytes=total["source_num_bytes"],
            bitstream_num_bytes=total["bitstream_num_bytes"],
            data=data,
            data_num_bytes=num_bytes,
            data_sha256=sha256,
            seconds=time.monotonic() - self._started,
        )

    def _add(self, **counts: int) -> None:
        for name, value in counts.items():
            self._total[name] += value
        if time.monotonic() - self._last > _REPORT_S:
            self._send()

    def _send(self) -> None:
        self._report({n: self._total[n] - self._reported[n] for n in _NAMES})
        self._reported, self._last = dict(self._total), time.monotonic()
