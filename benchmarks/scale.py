"""What a driver needs for many partitions: listing, scheduling, resuming; seconds and memory over an idle driver.

    python benchmarks/scale.py --partitions 1000 10000 100000

The partitions are empty tars, and the workers' task does nothing but record them, so what is measured is the driver,
Ray and the bookkeeping. Every size runs in a process of its own; the files lie in --folder (a RAM disk by default).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from cotam.store.partitions import Partition
from cotam.store.records import Completion, RunStore
from pipelines.counter import Counter, Report


class RecordTask:
    """Records a partition as finished."""

    command = "encode"

    def process(self, partition: Partition, store: RunStore, report: Report) -> Completion:
        return Counter(self.command, partition, report).completion(
            f"data/{partition.partition_id}.parquet", 0, "0" * 64
        )


def measure(num_partitions: int, folder: Path, num_workers: int) -> dict[str, float]:
    from pipelines.cluster import Resources, init_ray
    from pipelines.runner import run_partitions
    from pipelines.sources import list_partitions

    with tempfile.TemporaryDirectory(dir=folder) as name:
        source, store = Path(name) / "in", RunStore(f"{name}/out")
        source.mkdir()
        for k in range(num_partitions):
            (source / f"photographs-{k:08d}.tar").touch()
        init_ray()
        run_partitions(RecordTask, list_partitions(str(source))[:1], RunStore(f"{name}/warm"), Resources())
        idle = psutil.Process().memory_info().rss
        peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        started = time.perf_counter()
        partitions = list_partitions(str(source))
        listed = time.perf_counter()
        summary = run_partitions(RecordTask, partitions, store, Resources(num_workers=num_workers))
        ran = time.perf_counter()
        assert summary.num_partitions == num_partitions and not summary.failures
        again = run_partitions(RecordTask, partitions, store, Resources(num_workers=num_workers))
        resumed = time.perf_counter()
        assert again.num_skipped == num_partitions
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "partitions": num_partitions,
        "list_s": listed - started,
        "run_s": ran - listed,
        "resume_s": resumed - ran,
        "driver_over_idle_mib": (max(peak, peak_before) - idle) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--partitions", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.partitions[0], arguments.folder, arguments.num_workers)))
        return
    for count in arguments.partitions:
        options = ["--one", "--partitions", str(count), "--num-workers", str(arguments.num_workers)]
        command = [sys.executable, __file__, *options, "--folder", str(arguments.folder)]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
