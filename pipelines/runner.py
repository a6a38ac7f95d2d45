"""The partition runner: partitions through a pool of Ray Data actors, with retries, progress and a summary.

A partition is the unit of everything: one Ray Data row, one task, one completion record. Pixels never cross the object
store; an actor streams its partition from source to shard and returns a few counts.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import ray
import ray.data
from ray.data import ActorPoolStrategy
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from cotam.store.readers import Partition, partition_from_json
from cotam.store.records import Completion, RunStore
from pipelines.counter import Counts, Report

PARTITIONS_PER_WAVE = 1000
_WORKER_ATTEMPTS = 3  # a partition that takes down this many workers is left alone
_SOURCE_ATTEMPTS = 3
_POLL_S = 0.5


class PartitionTask(Protocol):
    """What an actor does with its partitions; built once an actor, inside it."""

    def process(self, partition: Partition, store: RunStore, report: Report) -> Completion:
        """Turn one partition into published output.

        Args:
            partition: the input.
            store: where the output goes.
            report: call it with the counts since the last call: images, rejects, source_num_bytes,
                bitstream_num_bytes, num_pixels.

        Raises:
            OSError: the source or the store failed; the partition is tried again.
            Exception: anything else fails the partition.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What one worker gets.

    Attributes:
        num_workers: actors in the pool; 0 chooses from the cluster.
        cpus_per_worker: CPUs, and threads for the networks.
        gpus_per_worker: GPUs, fractions allowed; 0 runs on CPUs.
    """

    num_workers: int = 0
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSummary:
    """The outcome of a run.

    Attributes:
        num_partitions: in the source; of these num_skipped were finished before and num_failed could not be finished.
        failures: partition_id, source and error of the failed ones.
        num_images, num_rows, num_rejects, num_pixels, source_num_bytes, bitstream_num_bytes: sums over all finished
            partitions of the source, earlier runs included.
        seconds: wall time of this run.
    """

    num_partitions: int
    num_skipped: int
    num_failed: int
    failures: list[dict[str, str]]
    num_images: int
    num_rows: int
    num_rejects: int
    num_pixels: int
    source_num_bytes: int
    bitstream_num_bytes: int
    seconds: float

    @property
    def bpp(self) -> float:
        """Bits per pixel over all rows."""
        return 8 * self.bitstream_num_bytes / self.num_pixels if self.num_pixels else 0.0


class ResourceError(ValueError):
    """The cluster does not have what was asked for."""


def run_partitions(
    make_task: Callable[[], PartitionTask],
    partitions: list[Partition],
    store: RunStore,
    resources: Resources,
    on_progress: Callable[[Counts, int], None] | None = None,
) -> JobSummary:
    """Process the partitions that have no completion record yet. Ray has to be initialised, the store locked.

    Args:
        make_task: builds the task inside each actor; pickled, so it carries plain values only.
        partitions: all of the source's.
        store: bookkeeping and output.
        resources: of each worker.
        on_progress: called about twice a second with the counts so far and the number of finished partitions.

    Raises:
        ResourceError: the cluster cannot hold one such worker.
    """
    started = time.monotonic()
    done = store.completed_ids()
    pending = [p for p in partitions if p.partition_id not in done]
    if pending:
        store.forget_attempts()
        pool_size = _pool_size(resources, len(pending))
        progress = _Progress.remote()  # type: ignore[attr-defined]  # added by ray.remote
        with _polling(progress, on_progress):
            for k in range(0, len(pending), PARTITIONS_PER_WAVE):
                wave = pending[k : k + PARTITIONS_PER_WAVE]
                _run_wave(make_task, wave, store.root.uri, resources, pool_size, progress)
    return _summary(partitions, len(partitions) - len(pending), store, time.monotonic() - started)


def init_ray(address: str | None = None, num_cpus: int | None = None) -> None:
    """Connect to the cluster at ``address``, or start a quiet one on this machine; does nothing when Ray is up."""
    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    local: dict[str, Any] = {
        # One CPU more than there is, so that a worker a core leaves room for Ray's own tasks.
        "num_cpus": num_cpus or (os.cpu_count() or 1) + 1,
        "include_dashboard": False,
        "object_store_memory": 150 * 2**20,
    }
    cluster = address or os.environ.get("RAY_ADDRESS")
    with _quiet_stderr():
        ray.init(**({"address": cluster} if cluster else local), log_to_driver=False, logging_level=logging.ERROR)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Ray's C++ core greets on stderr whatever its log level; what goes wrong in ray.init is raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _run_wave(
    make_task: Callable[[], PartitionTask],
    wave: list[Partition],
    store_uri: str,
    resources: Resources,
    pool_size: int,
    progress: Any,
) -> None:
    dataset = ray.data.from_items(
        [{"partition": json.dumps(dataclasses.asdict(p))} for p in wave], override_num_blocks=len(wave)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray 2.60 has no other way to bound restarts
        results = dataset.map_batches(
            _Worker,
            batch_size=1,
            batch_format="numpy",
            fn_constructor_args=(make_task, store_uri, progress),
            compute=ActorPoolStrategy(size=min(pool_size, len(wave)), max_tasks_in_flight_per_actor=1),
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker or None,
            # Ray Data would restart actors and retry their tasks for ever.
            max_restarts=_WORKER_ATTEMPTS * len(wave),
            max_task_retries=_WORKER_ATTEMPTS,
        )
    for _ in results.iter_rows():
        pass


class _Worker:
    """The actor: one task, partitions one after another, every outcome recorded in the store."""

    def __init__(self, make_task: Callable[[], PartitionTask], store_uri: str, progress: Any) -> None:
        self._task = make_task()
        self._store = RunStore(store_uri)
        self._progress = progress

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        partition = partition_from_json(str(batch["partition"][0]))
        if self._store.count_attempt(partition.partition_id) >= _WORKER_ATTEMPTS:
            error = f"{_WORKER_ATTEMPTS} workers died on it; left alone until the next run"
            self._store.fail(partition.partition_id, partition.source, error)
        else:
            try:
                retrying = Retrying(
                    retry=retry_if_exception_type(OSError),
                    stop=stop_after_attempt(_SOURCE_ATTEMPTS),
                    wait=wait_random_exponential(multiplier=1, max=30),
                    reraise=True,
                )
                self._store.complete(retrying(self._process, partition))
            except Exception as error:  # one partition's failure is recorded and never stops the others
                self._store.fail(partition.partition_id, partition.source, _one_line(error))
        self._progress.add.remote({}, 1)
        return {"partition_id": [partition.partition_id]}

    def _process(self, partition: Partition) -> Completion:
        reported: Counts = {}

        def report(counts: Counts) -> None:
            for name, value in counts.items():
                reported[name] = reported.get(name, 0) + value
            self._progress.add.remote(counts, 0)

        try:
            return self._task.process(partition, self._store, report)
        except OSError:
            self._progress.add.remote({name: -value for name, value in reported.items()}, 0)
            raise


@ray.remote(num_cpus=0)
class _Progress:
    """Adds up what the workers report."""

    def __init__(self) -> None:
        self._counts: Counts = {}
        self._num_done = 0

    def add(self, counts: Counts, num_done: int) -> None:
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + value
        self._num_done += num_done

    def snapshot(self) -> tuple[Counts, int]:
        return self._counts, self._num_done


class _polling:
    """While in this context, a thread hands the workers' counts to ``on_progress``."""

    def __init__(self, progress: Any, on_progress: Callable[[Counts, int], None] | None) -> None:
        self._progress, self._on_progress = progress, on_progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="cotam-progress")

    def __enter__(self) -> None:
        if self._on_progress is not None:
            self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._on_progress is not None:
            self._thread.join()

    def _run(self) -> None:
        assert self._on_progress is not None
        while not self._stop.wait(_POLL_S):
            self._on_progress(*ray.get(self._progress.snapshot.remote()))
        self._on_progress(*ray.get(self._progress.snapshot.remote()))


def _pool_size(resources: Resources, num_partitions: int) -> int:
    cluster = ray.cluster_resources()
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    if resources.gpus_per_worker > gpus:
        raise ResourceError(f"{resources.gpus_per_worker:g} GPUs a worker, but the cluster has {gpus:g}")
    if resources.cpus_per_worker > cpus - 1:
        raise ResourceError(f"{resources.cpus_per_worker:g} CPUs a worker, but the cluster has {cpus - 1:g} to spare")
    fits = (cpus - 1) // resources.cpus_per_worker
    if resources.gpus_per_worker:
        fits = min(fits, gpus // resources.gpus_per_worker)
    if resources.num_workers > fits:
        raise ResourceError(f"{resources.num_workers} workers, but the cluster has room for {fits:g}")
    return min(resources.num_workers or int(fits), num_partitions)


def _summary(partitions: list[Partition], num_skipped: int, store: RunStore, seconds: float) -> JobSummary:
    ids = {p.partition_id for p in partitions}
    records = [r for r in store.completions() if r.partition_id in ids]
    failures = [f for f in store.failures() if f["partition_id"] in ids]

    def total(name: str) -> int:
        return sum(getattr(r, name) for r in records)

    return JobSummary(
        num_partitions=len(partitions),
        num_skipped=num_skipped,
        num_failed=len(failures),
        failures=failures,
        num_images=total("num_images"),
        num_rows=total("num_rows"),
        num_rejects=total("num_rejects"),
        num_pixels=total("num_pixels"),
        source_num_bytes=total("source_num_bytes"),
        bitstream_num_bytes=total("bitstream_num_bytes"),
        seconds=seconds,
    )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
