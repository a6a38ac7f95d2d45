"""Seconds by stage of a stream: many threads add, one reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

A = TypeVar("A")

Stage = Literal["read", "image", "importance", "networks", "entropy", "mllm", "write"]


class StageTimes:
    """Adds up how long threads are busy with each stage; with several threads the sum may exceed the wall time.

    Stages are "read" (the source), "image" (image files to pixels and back), "importance", "networks", "entropy"
    (entropy coding; when decoding also the integer network between its passes), "mllm" (answers) and "write" (shard,
    rejects and their publication).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """Count the time spent in the context, also when it raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            with self._lock:
                self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def iterate(self, stage: Stage, items: Iterable[A]) -> Iterator[A]:
        """Pass items on, counting the time that it takes to get them."""
        iterator = iter(items)
        while True:
            with self.measure(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def seconds(self) -> dict[str, float]:
        """The sums so far."""
        with self._lock:
            return dict(self._seconds)
