"""Work on items that come one after another, overlapped in threads, in order, and bounded in memory."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")
_PIXELS_UNDER_WAY = 2**26  # decoded ahead: 200 MB, and what decoders take beside them


def prefetch(items: Iterable[A], depth: int) -> Iterator[A]:
    """Iterate in a thread of its own, at most ``depth`` items ahead; exceptions arrive where they belong."""
    ahead: queue.Queue[tuple[A | None, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: A | None, error: BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ahead.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for item in items:
                if not put(item, None):
                    return
        except BaseException as error:  # handed over to the consumer, whatever it is
            put(None, error)
        else:
            put(None, StopIteration())

    thread = threading.Thread(target=run, daemon=True, name="cotam-prefetch")
    thread.start()
    try:
        while True:
            item, error = ahead.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # an item, since there was no error
    finally:
        stop.set()
        thread.join()


def ordered_map(
    executor: ThreadPoolExecutor,
    function: Callable[[A], B],
    items: Iterable[A],
    in_flight: int,
    num_pixels: Callable[[A], int] = lambda _: 0,
) -> Iterator[B]:
    """Map in an executor's threads, in order.

    At most ``in_flight`` items at once, and at most _PIXELS_UNDER_WAY pixels in total unless a single item is larger.
    """
    pending: deque[tuple[Future[B], int]] = deque()
    under_way = 0
    try:
        for item in items:
            size = num_pixels(item)
            while pending and (len(pending) >= in_flight or under_way + size > _PIXELS_UNDER_WAY):
                result = pending[0][0].result()
                under_way -= pending.popleft()[1]
                yield result
            pending.append((executor.submit(function, item), size))
            under_way += size
        while pending:
            yield pending.popleft()[0].result()
    finally:
        for future, _ in pending:
            future.cancel()
