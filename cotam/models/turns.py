"""Turns on a GPU for threads that compute on it and on the CPU alternately.

Two batches that share a GPU leave it at the same time, and then share the CPU: they take as long as one after the
other. If only one has the GPU at a time, the other is on the CPU meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class Turns:
    """A resource that one thread has at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = threading.local()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Have a turn, once it is free."""
        with self._lock:
            self._thread.has_turn = True
            try:
                yield
            finally:
                self._thread.has_turn = False

    @contextmanager
    def give_way(self) -> Iterator[None]:
        """Within a turn: let others have theirs meanwhile. Elsewhere it does nothing."""
        if not getattr(self._thread, "has_turn", False):
            yield
            return
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()


_GPU = Turns()


def turn_on(device: torch.device) -> AbstractContextManager[None]:
    """A turn on ``device``; on a CPU there are none. What ends it has to wait for the device: ``to_host`` does."""
    return nullcontext() if device.type == "cpu" else _GPU.take()


def give_way() -> AbstractContextManager[None]:
    """While a thread computes on the CPU others may have its turn on the GPU."""
    return _GPU.give_way()
