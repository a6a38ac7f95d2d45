"""One small Ray for the tests that need it, and none for the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pyarrow as pa
import pytest

import jobs.run
from cotam.store.partitions import Partitions
from pipelines import cluster, runner


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    import ray

    cluster.init_ray(num_cpus=4)
    yield
    ray.shutdown()


class _NobodyWatches:
    """Instead of the reporter of progress."""

    def __init__(self, progress: Any) -> None: ...

    def add(self, counts: dict[str, int], num_done: int = 0) -> None: ...

    def flush(self) -> None: ...


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waves run in this process: for what tasks and the runner do, not how Ray does it, which takes seconds a job."""

    def run_wave(make_task: Any, tasks: list[Partitions], store_uri: str, *_: Any) -> pa.ChunkedArray:
        worker = runner._Worker(make_task, store_uri, None, runner._Secrets())
        return pa.chunked_array([c for task in tasks for c in worker(task.table)["partition_id"].chunks], pa.string())

    monkeypatch.setattr(runner, "_run_wave", run_wave)
    monkeypatch.setattr(runner, "pool_size", lambda *_, **__: 2)
    monkeypatch.setattr(runner, "start_progress", lambda: None)
    monkeypatch.setattr(runner, "polling", lambda *_: nullcontext())
    monkeypatch.setattr(runner, "Reporter", _NobodyWatches)
    monkeypatch.setattr(jobs.run, "init_ray", lambda *_: None)
