"""The partition runner: partitions through a pool of Ray Data actors, with retries, progress and a summary.

A partition is the unit of everything: it has one completion record, whoever worked on it and however often. Pixels
never cross the object store; an actor streams its partitions from source to shard and returns their ids.

    pending partitions -> rounds of waves -> tasks of some partitions each -> workers -> outcomes in the store

Ray retries nothing. A task that is lost with its worker or node comes back in the next round, whose pool is sized to
the cluster as it is then, so nothing waits for a node that does not return; partitions that were finished meanwhile
are recognised by their completion records.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import re
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy
from ray.exceptions import ObjectLostError, RayActorError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from cotam.errors import with_type
from cotam.memory import return_freed_memory, use_malloc_for_arrow
from cotam.store.fs import is_transient
from cotam.store.ids import HashedIds, difference, each, ids_of
from cotam.store.partitions import Partition, Partitions
from cotam.store.readers import key_of_file
from cotam.store.records import SUMMED, Completion, RunStore
from cotam.store.shard import read_keys, read_rejects
from cotam.store.storage_options import storage_configuration, use_storage_configuration
from pipelines.cluster import Resources, pool_size
from pipelines.counter import Counts, Report
from pipelines.events import PartitionEvents
from pipelines.progress import OnProgress, Reporter, polling, start_progress

# A wave is one execution of Ray Data: the smaller of so many tasks and so many partitions, but enough for all workers.
_TASKS_PER_WAVE = 250
_PARTITIONS_PER_WAVE = 2**14
_TASKS_PER_WORKER = 16  # while there are partitions: no worker idles for long at the end
_PARTITIONS_PER_TASK = 512  # at most: a task of Ray Data costs the driver some 10 ms and 15 kB
_WORKER_ATTEMPTS = 3  # a partition that takes down this many workers is left alone
_SOURCE_ATTEMPTS = 3


class PartitionTask(Protocol):
    """What an actor does with its partitions; built once an actor, inside it.

    ``command`` is "encode", "decode", "infer" or "sweep": a tag of logs and metrics.
    """

    command: str

    def process(self, partition: Partition, store: RunStore, report: Report) -> Completion:
        """Turn one partition into published output.

        Args:
            partition: the input.
            store: where the output goes.
            report: call it with the counts since the last call: num_images, num_rejects,
                source_num_bytes, bitstream_num_bytes, num_pixels.

        Raises:
            OSError: the source or the store failed; the partition is tried again, unless ``is_transient`` says no.
            Exception: anything else fails the partition.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSummary:
    """The outcome of a run.

    Attributes:
        num_partitions: in the source; of these num_skipped were finished before and num_failed could not be finished.
        num_replaced: partitions of earlier runs whose source has changed since: their output is gone.
        num_kept: those that hold images which are in the source no longer: their output stays.
        failures: partition_id, source and error of the failed ones.
        num_images, num_rows, num_rejects, num_pixels, source_num_bytes, bitstream_num_bytes: sums over all finished
            partitions of the source, earlier runs included.
        seconds: wall time of this run.
    """

    num_partitions: int
    num_skipped: int
    num_replaced: int
    num_kept: int
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


def run_partitions(
    make_task: Callable[[], PartitionTask],
    partitions: Partitions,
    store: RunStore,
    resources: Resources,
    on_progress: OnProgress | None = None,
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
        RuntimeError: round after round no partition gets to an outcome, or outcomes are not where the store is.
    """
    use_malloc_for_arrow()
    logging.getLogger("ray.data._internal.execution.streaming_executor_state").addFilter(_without_traceback)
    started = time.monotonic()
    pending = partitions.without(store.completed_ids())
    num_skipped = len(partitions) - len(pending)
    if len(pending):
        store.forget_attempts(pending.ids)
        progress = start_progress()
        with polling(progress, on_progress) if on_progress is not None else nullcontext():
            _run_rounds(make_task, pending, store.root.uri, resources, progress)
    return _summarise(partitions, num_skipped, store, started)


def _run_rounds(
    make_task: Callable[[], PartitionTask],
    pending: Partitions,
    store_uri: str,
    resources: Resources,
    progress: Any,
) -> None:
    futile = 0
    per_task = _PARTITIONS_PER_TASK
    is_first = True
    while len(pending):
        workers = pool_size(resources, len(pending), at_most=not is_first)
        is_first = False
        per_task = max(1, min(per_task, len(pending) // (_TASKS_PER_WORKER * workers)))
        left, num_settled = [], 0
        per_wave = max(min(_TASKS_PER_WAVE * per_task, _PARTITIONS_PER_WAVE), _TASKS_PER_WORKER * workers * per_task)
        for wave in pending.chunks(per_wave):
            settled = _run_wave(make_task, list(wave.chunks(per_task)), store_uri, resources, workers, progress)
            left.append(wave.without(settled))
            num_settled += len(settled)
            gc.collect()  # the error of a lost task keeps its pool in a cycle, whose workers keep CPUs and GPUs
            return_freed_memory()
        # A poisonous partition kills its worker in _WORKER_ATTEMPTS rounds and is given up in the next one.
        futile = 0 if num_settled else futile + 1
        if futile > _WORKER_ATTEMPTS:
            raise RuntimeError(
                "no partition gets to an end, neither done nor failed: is the store away, or are workers killed for"
                " their memory? Ray's logs and the workers' say more"
            )
        pending = Partitions.joined(left)
        per_task = 1  # what takes down workers takes nothing else with it


def _run_wave(
    make_task: Callable[[], PartitionTask],
    tasks: list[Partitions],
    store_uri: str,
    resources: Resources,
    num_workers: int,
    progress: Any,
) -> pa.ChunkedArray:
    """Ids of the partitions whose outcome is in the store; those of lost tasks are missing."""
    dataset = ray.data.from_blocks([task.table for task in tasks])
    dataset.context.max_errored_blocks = -1  # a lost task is not the job's end
    dataset.context.actor_init_retry_on_errors = True  # nor is one worker that could not load a model at once
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray 2.60 has no other way to bound restarts
        results = dataset.map_batches(
            _Worker,
            batch_size=None,  # a whole task
            batch_format="pyarrow",
            fn_constructor_args=(make_task, store_uri, progress, _Secrets()),
            compute=ActorPoolStrategy(size=min(num_workers, len(tasks)), max_tasks_in_flight_per_actor=1),
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker or None,
            # Ray Data would restart actors and retry their tasks for ever, and wait for ever where there is no room.
            max_restarts=_WORKER_ATTEMPTS * len(tasks),
            max_task_retries=0,
        )
    settled: list[pa.Array] = []
    try:
        for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            settled += batch["partition_id"].chunks
    except ObjectLostError as error:  # ids that were on a lost node
        logging.getLogger(__name__).warning("a wave was cut short: %s", error)
    except RayActorError as error:
        raise RuntimeError(f"a worker could not start: {_cause(error)}") from None
    return pa.chunked_array(settled, pa.string())


class _Secrets:
    """What workers on other machines need to know and nobody else: Ray writes arguments to logs, by their ``repr``."""

    def __init__(self) -> None:
        self._storage = storage_configuration()
        self._environment = {name: os.environ[name] for name in ("OPENAI_API_KEY",) if name in os.environ}

    def __repr__(self) -> str:
        return "_Secrets(...)"

    def use(self) -> None:
        """In the worker."""
        os.environ.update(self._environment)
        use_storage_configuration(self._storage)


class _Worker:
    """The actor: one task, partitions one after another, every outcome recorded in the store."""

    def __init__(
        self,
        make_task: Callable[[], PartitionTask],
        store_uri: str,
        progress: Any,
        secrets: _Secrets,
    ) -> None:
        secrets.use()
        use_malloc_for_arrow()
        self._task = make_task()
        self._store = RunStore(store_uri)
        self._progress = Reporter(progress)
        self._events = PartitionEvents(self._task.command)

    def __call__(self, task: pa.Table) -> pa.Table:
        for partition in Partitions(task):
            self._settle(partition)
            return_freed_memory()
            self._progress.add({}, 1)
        self._progress.flush()
        return task.select(["partition_id"])

    def _settle(self, partition: Partition) -> None:
        """Process a partition, unless that has been done since the job began, and record what comes of it."""
        store, name = self._store, partition.partition_id
        retrying = Retrying(
            retry=retry_if_exception(is_transient),
            stop=stop_after_attempt(_SOURCE_ATTEMPTS),
            wait=wait_exponential_jitter(initial=1, max=30, jitter=3),
            before_sleep=lambda failed: self._events.retried(partition, failed),
            reraise=True,
        )
        if retrying(store.is_complete, name):
            return
        num_deaths = retrying(store.count_attempt, name)
        if num_deaths >= _WORKER_ATTEMPTS:
            error = f"{_WORKER_ATTEMPTS} workers died on it; left alone until the next run"
            retrying(store.fail, name, partition.source, error)
            self._events.abandoned(partition, error)
            return
        self._events.started(partition, num_deaths)
        try:
            record = retrying(self._process, partition)
            retrying(store.complete, record)
            self._events.completed(partition, record)
        except torch.AcceleratorError as error:  # the device is lost to this process: another one takes the partition
            self._events.lost_device(partition, error)
            os._exit(1)
        except Exception as error:  # one partition's failure is recorded and never stops the others
            retrying(store.fail, name, partition.source, with_type(error))
            self._events.failed(partition, with_type(error))

    def _process(self, partition: Partition) -> Completion:
        reported: Counts = {}

        def report(counts: Counts) -> None:
            for name, value in counts.items():
                reported[name] = reported.get(name, 0) + value
            self._progress.add(counts)

        try:
            return self._task.process(partition, self._store, report)
        except OSError:
            self._progress.add({name: -value for name, value in reported.items()})
            raise


def _summarise(partitions: Partitions, num_skipped: int, store: RunStore, started: float) -> JobSummary:
    """Sums over the records of ``partitions``; what earlier versions of their sources left behind is removed."""
    done = store.completed_ids()
    other_ids = set(each(difference(done, partitions.ids)))
    return_freed_memory()
    totals = dict.fromkeys(SUMMED, 0)
    others: list[Completion] = []
    for record in store.completions(done):
        if record.partition_id in other_ids:
            others.append(record)
            continue
        for name in SUMMED:
            totals[name] += getattr(record, name)
    outdated = _outdated(partitions, others, done) if others else []
    replaced = _without_lost_images(outdated, partitions, store, done)
    for record in replaced:
        store.discard(record)
    failures = store.failures()
    if failures:
        failed = ids_of(failure["partition_id"] for failure in failures)
        elsewhere = set(each(difference(failed, partitions.ids)))
        failures = [failure for failure in failures if failure["partition_id"] not in elsewhere]
    if missing := len(partitions.without(done)) - len(failures):
        raise RuntimeError(
            f"workers finished {missing} partitions of which nothing is in {store.root.uri}: every machine has to see"
            " the same DST; name a folder that all share, or an object store"
        )
    return JobSummary(
        num_partitions=len(partitions),
        num_skipped=num_skipped,
        num_replaced=len(replaced),
        num_kept=len(outdated) - len(replaced),
        num_failed=len(failures),
        failures=failures,
        seconds=time.monotonic() - started,
        **totals,
    )


def _outdated(partitions: Partitions, others: list[Completion], done: pa.ChunkedArray) -> list[Completion]:
    """Of records that are none of ``partitions``: earlier versions of sources that are finished as they are now.

    Folders count as finished where some of their partitions are: each image of theirs is looked for.
    """
    current = partitions.of_sources({record.source for record in others})
    unfinished = {p.source for p in current.without(done) if p.kind != "files"}
    finished = {p.source for p in current} - unfinished
    return [record for record in others if record.source in finished]


def _without_lost_images(
    outdated: list[Completion], partitions: Partitions, store: RunStore, done: pa.ChunkedArray
) -> list[Completion]:
    """Those all of whose images are in finished ``partitions``: loose files may be gone from their folder."""
    current = partitions.of_sources({record.source for record in outdated})
    folders = {partition.source for partition in current if partition.kind == "files"}
    current = current.without(current.without(done).ids)
    found = [record for record in outdated if record.source not in folders]
    for folder in folders:
        files = (path for partition in current.of_sources([folder]) for path in partition.paths)
        keys = HashedIds(key_of_file(path) for path in files)
        records = (record for record in outdated if record.source == folder)
        found += [record for record in records if not _has_others(record, keys, store)]
    return found


def _has_others(record: Completion, keys: HashedIds, store: RunStore) -> bool:
    """Whether a partition has images, or rejects, whose key is none of ``keys``; or cannot be read."""
    try:
        rows = read_keys(store.root, record.data)
    except FileNotFoundError:  # a job was killed while it removed the partition
        rows = ids_of([])
    except (OSError, ValueError, pa.ArrowException):
        return True
    rejects = (reject.key for reject in read_rejects(store.root, record.partition_id))
    return keys.lacks_any(each(rows)) or keys.lacks_any(rejects)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Filter: a lost task in one line, without the frames, by which handlers that keep records would keep its pool."""
    if record.exc_info and (error := record.exc_info[1]) is not None:
        record.msg, record.args, record.exc_info = f"a task was lost: {with_type(error)}", (), None
    return True


def _cause(error: RayActorError) -> str:
    """The last line of a worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[0])[:500]
