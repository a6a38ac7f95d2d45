"""Turns on a GPU for threads that compute on it and on the CPU alternately.

Two batches that share a GPU leave it at the same time, and then share the CPU: they take as long as one after the
other. If only one has the GPU at a time, the other is on the CPU meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class Turns(threading.local):
    """A resource that one thread has at a time. Turns do not nest."""

    has_turn = False  # of each thread

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    @contextmanager
    def take(self) -> Iterator[None]:
        """Have a turn, once it is free."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def give_way(self) -> Iterator[None]:
        """Within a turn: let others have theirs meanwhile. Elsewhere it does nothing."""
        if not self.has_turn:
            yield
            return
        self._end()
        try:
            yield
        finally:
            self._begin()

    def _begin(self) -> None:
        self._lock.acquire()
        self.has_turn = True

    def _end(self) -> None:
        if self.has_turn:  # not where waiting for it was interrupted
            self.has_turn = False
            self._lock.release()


_GPU = Turns(threading.Lock())


def turn_on(device: torch.device) -> AbstractContextManager[None]:
    """A turn on ``device``: one for all GPUs of a process, none on a CPU. Its work should be done where it ends."""
    return nullcontext() if device.type == "cpu" else _GPU.take()


def give_way() -> AbstractContextManager[None]:
    """While a thread computes on the CPU others may have its turn on the GPU."""
    return _GPU.give_way()
