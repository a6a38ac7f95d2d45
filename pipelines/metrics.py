"""The metrics of a run: what workers count, under which names and tags; Ray exports them to Prometheus.

    cotam_images{command}                   images in: those that made it, and rejects
    cotam_rejects{command, stage, reason}   images that did not
    cotam_pixels{command}                   of the images that made it
    cotam_source_bytes{command}             bytes in, of the images that made it
    cotam_stored_bytes{command}             bytes out
    cotam_bpp{command}                      histogram: bits per pixel of an image
    cotam_stage_seconds{command, stage}     seconds that threads were busy with a stage
    cotam_partitions{command, outcome}      finished partitions: completed, failed or abandoned
    cotam_retries{command, reason}          partitions begun again: source (or store) failed, or the worker died
    cotam_partition_seconds{command}        histogram: wall time of a completed partition
    cotam_workers{command}                  gauge: 1 of every worker that lives

Prometheus sees ``ray_`` before the names and ``_total`` after those of counters. They count work that was done: what
was begun again counts again. A worker that is killed takes along what it has not exported yet, 10 seconds at most.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Literal, get_args

from ray.util.metrics import Counter, Gauge, Histogram

from cotam.store.schema import Reject, RejectStage

Outcome = Literal["completed", "failed", "abandoned"]
RetryReason = Literal["source", "worker"]

# Name: description and tags, and the boundaries of a histogram's buckets.
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cotam_images": ("Images in", ("command",)),
    "cotam_rejects": ("Images that could not be processed", ("command", "stage", "reason")),
    "cotam_pixels": ("Pixels of processed images", ("command",)),
    "cotam_source_bytes": ("Source bytes of processed images", ("command",)),
    "cotam_stored_bytes": ("Stored bytes of processed images", ("command",)),
    "cotam_stage_seconds": ("Seconds that threads were busy", ("command", "stage")),
    "cotam_partitions": ("Finished partitions", ("command", "outcome")),
    "cotam_retries": ("Partitions begun again", ("command", "reason")),
}
HISTOGRAMS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "cotam_bpp": ("Bits per pixel of an image", ("command",), (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 2, 4, 8)),
    "cotam_partition_seconds": ("Seconds of a partition", ("command",), (1, 3, 10, 30, 60, 120, 300, 600, 1800, 7200)),
}
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {"cotam_workers": ("Workers that live", ("command",))}

STAGES = get_args(RejectStage)
# Rejects say in words what is wrong, a tag has to be one of a few: how the words begin, by reason.
_REASON = re.compile(
    r"""(?P<empty>empty\ file)
    |(?P<format>not\ an\ image|floating-point\ samples|signed\ or|planes\ of|several\ pages)
    |(?P<corrupt>corrupt\ or\ truncated\ image)
    |(?P<size>\d+x\d+\ pixels,\ over|a\ JPEG\ of\ over|over\ )
    |(?P<missing>file\ has\ disappeared|no\ image\ in\ column|sample\ has\ no\ image)
    |(?P<damaged>tar\ is\ damaged|tar\ has\ no\ end\ marker|row\ group\ \d+\ is\ damaged|row\ cannot\ be\ read)
    |(?P<permission>no\ permission)
    |(?P<member>member\ |a\ member\ has|no\ importance|importance\ member|questions\ of\ image)
    |(?P<key>key\ |another\ image|the\ name\ of\ one\ image)
    |(?P<bitstream>bitstream)""",
    re.VERBOSE,
)
REASONS = tuple(_REASON.groupindex)


def reject_stage(reject: Reject) -> str:
    """The stage of a reject: one of STAGES, or "other"."""
    return reject.stage if reject.stage in STAGES else "other"


def reject_reason(reject: Reject) -> str:
    """Why an image is a reject: one of REASONS, or "other"."""
    match = _REASON.match(reject.error)
    return (match and match.lastgroup) or "other"


class Metrics:
    """Records the metrics of one command in this process.

    Args:
        command: "encode", "decode", "infer" or "sweep".
    """

    def __init__(self, command: str) -> None:
        self._tags = {"command": command}
        self._counters = {name: Counter(name, text, tags) for name, (text, tags) in COUNTERS.items()}
        self._histograms = {name: Histogram(name, text, list(b), tags) for name, (text, tags, b) in HISTOGRAMS.items()}
        self._gauges = {name: Gauge(name, text, tags) for name, (text, tags) in GAUGES.items()}

    def worker(self) -> None:
        """Note that this process is a worker."""
        self._gauges["cotam_workers"].set(1, self._tags)

    def images(self, num_images: int, num_pixels: int, source_num_bytes: int, stored_num_bytes: int) -> None:
        """Add images in, rejects included, and sums over those that made it."""
        self._add("cotam_images", num_images)
        self._add("cotam_pixels", num_pixels)
        self._add("cotam_source_bytes", source_num_bytes)
        self._add("cotam_stored_bytes", stored_num_bytes)

    def bpp(self, value: float) -> None:
        """Observe the bits per pixel of an image."""
        self._histograms["cotam_bpp"].observe(value, self._tags)

    def reject(self, reject: Reject) -> None:
        """Count a reject by stage and reason; it is one of the images, too."""
        self._add("cotam_rejects", 1, stage=reject_stage(reject), reason=reject_reason(reject))

    def stage_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add seconds by stage."""
        for stage, value in seconds.items():
            self._add("cotam_stage_seconds", value, stage=stage)

    def partition(self, outcome: Outcome, seconds: float | None = None) -> None:
        """Count a finished partition, with its wall time if it was completed."""
        self._add("cotam_partitions", 1, outcome=outcome)
        if seconds is not None:
            self._histograms["cotam_partition_seconds"].observe(seconds, self._tags)

    def retry(self, reason: RetryReason) -> None:
        """Count a partition that is begun again."""
        self._add("cotam_retries", 1, reason=reason)

    def _add(self, name: str, value: float, **tags: str) -> None:
        if value > 0:  # Ray refuses to add 0
            self._counters[name].inc(value, {**self._tags, **tags})


@functools.cache
def metrics_of(command: str) -> Metrics:
    """The ``Metrics`` of a command, one in a process."""
    return Metrics(command)
