"""The lock of a store: one job at a time, whatever becomes of the one before."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cotam.store.fs import Root

_LOCK = "_cotam/lock.json"
_CLAIM = "_cotam/takeover.json"
_HEARTBEAT_S = 20.0
_STALE_S = 90.0
_INTERRUPT = signal.SIGUSR2  # raises KeyboardInterrupt; not SIGINT, which shells make background jobs ignore


class StoreError(ValueError):
    """A store that does not fit what is asked of it; the message says what to do."""


@contextlib.contextmanager
def store_lock(root: Root) -> Iterator[None]:
    """Hold the store for one job; a lock whose process is gone or whose heartbeat stopped is taken over.

    A job in the main thread that was taken over, after a standstill for one, is interrupted.

    Raises:
        StoreError: another job works on this store, or has taken it over.
    """
    token = uuid.uuid4().hex
    owner = {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pids": _pid_space(),
        "started": _started(os.getpid()),
    }
    _take_lock(root, {**owner, "heartbeat": time.time()})
    if (held := _read_lock(root)) is None or held["token"] != token:  # several wrote it at once: the last one holds it
        raise StoreError(f"another job has just started on {root.uri}; wait for it or choose another DST")
    stop, lost = threading.Event(), threading.Event()
    is_main = threading.current_thread() is threading.main_thread()
    this_thread = threading.get_ident()

    def beat() -> None:
        while not stop.wait(_HEARTBEAT_S):
            with contextlib.suppress(Exception):  # a missed beat is made up for by the next
                if _is_locked_by_another(root, token):
                    lost.set()
                    if is_main:  # interrupt_main() would wait until whatever it waits for is over
                        signal.pthread_kill(this_thread, _INTERRUPT)
                    return
                root.write_json(_LOCK, {**owner, "heartbeat": time.time()})

    thread = threading.Thread(target=beat, daemon=True, name="cotam-lock")
    handler = signal.signal(_INTERRUPT, signal.default_int_handler) if is_main else None
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost.is_set():
            raise StoreError(f"another job has taken over {root.uri}, which this one lost sight of") from None
        raise
    finally:
        stop.set()
        thread.join()
        if is_main:
            signal.signal(_INTERRUPT, handler or signal.SIG_DFL)
        with contextlib.suppress(OSError):  # it goes stale by itself, and is no reason to fail a finished job
            if not _is_locked_by_another(root, token):
                root.remove(_LOCK)


def _is_locked_by_another(root: Root, token: str) -> bool:
    held = _read_lock(root)
    return held is not None and held["token"] != token


def _take_lock(root: Root, owner: dict[str, Any]) -> None:
    """Write the lock where there is none, or one that nobody holds; raise StoreError where somebody does."""
    held = _read_lock(root)
    if held is not None:
        _refuse_if_alive(root, held)
    if not root.exists(_LOCK):
        with contextlib.suppress(FileExistsError):
            root.create_json(_LOCK, owner)
        return
    try:  # of those who take over one lock, one at a time
        root.create_json(_CLAIM, owner)
    except FileExistsError:
        claim = _read_lock(root, _CLAIM)
        if claim is not None and claim["heartbeat"] < time.time() - _STALE_S:  # whoever made it was killed
            root.remove(_CLAIM)
        if claim is None or claim["token"] != owner["token"]:  # ours, where an answer to its creation was lost
            return
    try:
        if _read_lock(root) == held:
            root.write_json(_LOCK, owner)
    finally:
        root.remove(_CLAIM)


def _refuse_if_alive(root: Root, held: dict[str, Any]) -> None:
    if held["pids"] == _pid_space():
        # Another container, or a later process, may have the same numbers.
        alive = _process_exists(held["pid"]) and held.get("started") in (None, _started(held["pid"]))
    else:
        alive = 0 <= time.time() - held["heartbeat"] < _STALE_S
        if not alive:  # or a clock is wrong: then it goes on beating
            time.sleep(1.5 * _HEARTBEAT_S)
            later = _read_lock(root)
            alive = later is not None and later != held
    if alive:
        raise StoreError(
            f"another job (process {held['pid']} on {held['host']}) works on {root.uri}; wait for it or stop it"
        )


def _read_lock(root: Root, path: str = _LOCK) -> dict[str, Any] | None:
    """The lock, or None where there is none that a job has written."""
    try:
        held = root.read_json(path)
        texts, numbers = (held["token"], held["host"]), (held["pid"], held["heartbeat"])
        is_lock = all(isinstance(t, str) for t in texts) and all(isinstance(n, int | float) for n in numbers)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return {"pids": "", **held} if is_lock else None


def _pid_space() -> str:
    """Where a process id means the same process: one start of one kernel, and within that one container."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> str | None:
    """When a process began, in ticks of the kernel's clock; None where that cannot be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
