"""Progress of a running job: workers report counts to one actor, and a thread of the driver hands them on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.counter import Counts

OnProgress = Callable[[Counts, int], None]
_POLL_S = 0.5


@ray.remote(num_cpus=0)
class Progress:
    """Adds up what the workers report."""

    def __init__(self) -> None:
        self._counts: Counts = {}
        self._num_done = 0

    def add(self, counts: Counts, num_done: int) -> None:
        """Add counts, and a number of partitions that are done."""
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + value
        self._num_done += num_done

    def snapshot(self) -> tuple[Counts, int]:
        """The counts so far, and how many partitions are done."""
        return self._counts, self._num_done


def start_progress() -> Any:
    """A ``Progress`` on the driver's node, which is lost only with the job."""
    node = ray.get_runtime_context().get_node_id()
    return Progress.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()  # type: ignore[attr-defined]  # of ray.remote


class Reporter:
    """A worker's way to its job's ``Progress``: adds up what comes quickly one after another.

    Args:
        progress: the actor.
    """

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._counts: Counts = {}
        self._num_done = 0
        self._last = time.monotonic()

    def add(self, counts: Counts, num_done: int = 0) -> None:
        """Report counts, and a number of partitions that are done; sent at once where nothing was for a while."""
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + value
        self._num_done += num_done
        if time.monotonic() - self._last > _POLL_S:
            self.flush()

    def flush(self) -> None:
        """Send what is left."""
        if self._counts or self._num_done:
            self._progress.add.remote(self._counts, self._num_done)
        self._counts, self._num_done, self._last = {}, 0, time.monotonic()


@contextmanager
def polling(progress: Any, on_progress: OnProgress) -> Iterator[None]:
    """While in this context, a thread hands the counts of a ``Progress`` actor to ``on_progress``."""
    stop = threading.Event()

    def poll() -> None:
        last = False
        while not last:
            last = stop.wait(_POLL_S)
            try:
                snapshot = ray.get(progress.snapshot.remote())
            except RayError as error:
                logging.getLogger(__name__).warning("progress is lost: %s", type(error).__name__)
                return
            on_progress(*snapshot)

    thread = threading.Thread(target=poll, daemon=True, name="cotam-progress")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
