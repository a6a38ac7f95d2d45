"""Running a partition job for a subcommand: Ray, progress, summary, exit status."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import partial

from rich.filesize import decimal

from cotam.store.partitions import Partitions
from cotam.store.records import RunStore
from jobs.console import Incomplete, partition_progress, print_json, say
from pipelines.cluster import Resources, init_ray
from pipelines.logs import LogConfig, log_event
from pipelines.runner import JobSummary, PartitionTask, run_partitions

_log = logging.getLogger(__name__)


def run_job(
    make_task: Callable[[], PartitionTask],
    partitions: Partitions,
    store: RunStore,
    resources: Resources,
    ray_address: str | None,
    quiet: bool,
) -> JobSummary:
    """Run the job, with progress on stderr unless ``quiet``. The store has to be locked.

    Raises:
        ValueError: the cluster cannot hold a worker.
    """
    log = LogConfig.from_environment()
    log.start_in_driver()
    num_pending = len(partitions.without(store.completed_ids()))
    store.note_job(len(partitions), has_ended=False)
    if num_pending:
        init_ray(ray_address)
    uri = store.root.uri
    log_event(_log, logging.INFO, "run_started", store=uri, partitions=len(partitions), partitions_pending=num_pending)
    with partition_progress(num_pending, "partitions", quiet=quiet or not num_pending) as update:
        summary = run_partitions(partial(_logged, log, make_task), partitions, store, resources, update)
    store.note_job(len(partitions), has_ended=True)
    sums = {name: value for name, value in dataclasses.asdict(summary).items() if name != "failures"}
    log_event(_log, logging.INFO, "run_finished", store=uri, **sums, bpp=summary.bpp)
    return summary


def check_complete(summary: JobSummary, max_reject_rate: float = 1.0) -> None:
    """Raise Incomplete for failed partitions, for more rejects than allowed, or for nothing else."""
    if summary.num_failed:
        shown = "; ".join(f"{f['partition_id']}: {f['error']}" for f in summary.failures[:3])
        raise Incomplete(
            f"{summary.num_failed} of {summary.num_partitions} partitions failed, run again to retry: {shown}"
        )
    if summary.num_images and not summary.num_rows:
        raise Incomplete(f"all {summary.num_images} images are rejects")
    if summary.num_rejects > max_reject_rate * summary.num_images:
        rate = summary.num_rejects / summary.num_images
        raise Incomplete(f"{rate:.1%} of the images are rejects, more than --max-reject-rate {max_reject_rate}")


def finished_data(store: RunStore, partitions: Partitions) -> list[str]:
    """The output files, below the store's root, of those partitions that are finished."""
    ids = {partition.partition_id for partition in partitions}
    return [record.data for record in store.completions() if record.partition_id in ids]


def _logged(log: LogConfig, make_task: Callable[[], PartitionTask]) -> PartitionTask:
    """Build the task in a worker that logs."""
    log.start_in_worker()
    return make_task()


def print_summary(summary: JobSummary, uri: str, as_json: bool = False) -> None:
    """Print the outcome of a run on the store at ``uri``."""
    if as_json:
        print_json({**dataclasses.asdict(summary), "bpp": summary.bpp})
        return
    if summary.num_skipped == summary.num_partitions:
        say(f"Nothing to do: all {summary.num_partitions} partitions are in {uri} already.")
    num_new = summary.num_partitions - summary.num_skipped - summary.num_failed
    if num_new:
        say(f"{num_new} partitions in {summary.seconds:.1f} s; {summary.num_skipped} were there already.")
    if summary.num_replaced:
        say(f"{summary.num_replaced} partitions of sources that have changed were replaced by these.")
    if summary.num_kept:
        say(
            f"{summary.num_kept} partitions of earlier runs stay, as images in them are no longer in SRC; such as"
            " still are may be in two shards."
        )
    say(f"{summary.num_images} images: {summary.num_rows} rows, {summary.num_rejects} rejects.")
    if summary.num_rejects:
        say(f"`cotam inspect {uri} --rejects` lists what was rejected, and why.")
    if summary.num_rows:
        before, after = summary.source_num_bytes, max(1, summary.bitstream_num_bytes)
        change = (
            f"{before / after:.1f} times smaller" if before >= after else f"{after / max(1, before):.1f} times larger"
        )
        say(
            f"{decimal(summary.source_num_bytes)} of source files, {decimal(summary.bitstream_num_bytes)} of"
            f" bitstreams ({change}), {summary.bpp:.3f} bpp."
        )
