"""What a driver needs for many partitions: listing, scheduling, resuming; seconds and memory over an idle driver.

    python benchmarks/scale.py --partitions 1000 10000 100000

The partitions are empty tars, and the workers' task does nothing but record them, so what is measured is the driver,
Ray and the bookkeeping. Every run is a process of its own, a new one and one that finds everything done; the files lie
in --folder (a RAM disk by default).
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

from cotam.memory import return_freed_memory
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


def measure(source: Path, folder: str, num_workers: int) -> dict[str, float]:
    """A driver's run over ``source``, new or again, in this process."""
    from pipelines.cluster import Resources, init_ray
    from pipelines.runner import run_partitions
    from pipelines.sources import list_partitions

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    init_ray()
    first = list_partitions(f"{source}/photographs-00000000.tar")
    run_partitions(RecordTask, first, RunStore(tempfile.mkdtemp(dir=folder)), Resources())
    return_freed_memory()
    idle, peak_before = psutil.Process().memory_info().rss, peak()
    started, busy = time.perf_counter(), time.process_time()
    partitions = list_partitions(str(source))
    listed = time.perf_counter()
    summary = run_partitions(RecordTask, partitions, RunStore(f"{folder}/out"), Resources(num_workers=num_workers))
    ran = time.perf_counter()
    assert summary.num_partitions == len(partitions) and not summary.failures
    return {
        "list_s": listed - started,
        "run_s": ran - listed,
        "skipped": summary.num_skipped,
        "driver_cpu_s": time.process_time() - busy,
        "driver_over_idle_mib": (peak() - idle) / 2**20,
        "idle_peak_mib": (peak_before - idle) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--partitions", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--in-process", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        source, folder = arguments.in_process
        print(json.dumps(measure(Path(source), folder, arguments.num_workers)))
        return
    for count in arguments.partitions:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            source = Path(folder) / "in"
            source.mkdir()
            for k in range(count):
                (source / f"photographs-{k:08d}.tar").touch()
            command = [sys.executable, __file__, "--num-workers", str(arguments.num_workers)]
            for run in ("new", "again"):
                done = subprocess.run(
                    [*command, "--in-process", str(source), folder], stdout=subprocess.PIPE, check=True
                )
                result = {"partitions": count, "run": run, **json.loads(done.stdout.splitlines()[-1])}
                print(
                    json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}), flush=True
                )


if __name__ == "__main__":
    main()
