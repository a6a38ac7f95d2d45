"""Images per second of `cotam encode` beside what the codec alone reaches on the same bytes, and where the rest goes.

    python benchmarks/pipeline.py 'photos-{000000..000008}.tar' --workers 1 2 4

The codec alone is a process a core, one thread each, that reads tars, decodes images and encodes them one by one, timed
from after its start. The pipeline is timed from the first partition's begin to the last one's end; the start of Ray and
of its workers is said beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cotam.codec import Codec
from cotam.image import ImageError, decode_image
from cotam.store.partitions import Partition, Partitions
from cotam.store.readers import read_partition
from cotam.store.records import RunStore
from cotam.store.schema import Sample
from pipelines.cluster import Resources, init_ray
from pipelines.encode import EncodeConfig, EncodeTask
from pipelines.runner import run_partitions
from pipelines.sources import list_partitions


def encode_alone(partitions: list[Partition], ready: Any, results: Any) -> None:
    torch.set_num_threads(1)
    codec = Codec.load()
    _encode_all(codec, partitions[:1], 8)
    ready.wait()
    started = time.perf_counter()
    count = sum(_encode_all(codec, [p], None) for p in partitions)
    results.put((count, time.perf_counter() - started))


def _encode_all(codec: Codec, partitions: list[Partition], limit: int | None) -> int:
    count = 0
    for sample in read_partition(partitions[0]):
        if not isinstance(sample, Sample) or count == limit:
            continue
        try:
            codec.encode(decode_image(sample.image).pixels)
            count += 1
        except ImageError:
            continue
    return count


def facade(partitions: list[Partition], num_processes: int) -> float:
    """Images per second."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(num_processes), context.Queue()
    shares = [partitions[k::num_processes] for k in range(num_processes)]
    processes = [context.Process(target=encode_alone, args=(share, ready, results)) for share in shares]
    for process in processes:
        process.start()
    outcomes = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(count for count, _ in outcomes) / max(seconds for _, seconds in outcomes)


def pipeline(partitions: list[Partition], num_workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        store, began = RunStore(folder), time.time()
        task = partial(EncodeTask, EncodeConfig(), "", "cpu", 1)
        summary = run_partitions(task, Partitions.of(partitions), store, Resources(num_workers=num_workers))
        records = list(store.completions())
        ends = {
            r.partition_id: (Path(folder) / f"_cotam/completed/{r.partition_id}.json").stat().st_mtime for r in records
        }
    first = min(ends[r.partition_id] - r.seconds for r in records)
    span, busy = max(ends.values()) - first, sum(r.seconds for r in records)
    stages: dict[str, float] = {}
    for record in records:
        for name, seconds in record.stage_seconds.items():
            stages[name] = stages.get(name, 0.0) + seconds
    return {
        "workers": num_workers,
        "images_per_s": summary.num_rows / span,
        "start_s": first - began,
        "span_s": span,
        "idle_workers": 1 - busy / (span * num_workers),
        "stage_ms_per_image": {n: round(1000 * s / summary.num_rows, 2) for n, s in sorted(stages.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    partitions = list(list_partitions(arguments.source))
    cores = os.cpu_count() or 1
    init_ray(num_cpus=max(*arguments.workers, cores) + 1)
    alone = facade(partitions, cores)
    results: dict[str, Any] = {"codec_alone_images_per_s": alone, "cores": cores, "pipeline": []}
    for count in arguments.workers:
        result = pipeline(partitions, count)
        result["of_codec_alone"] = result["images_per_s"] / alone
        results["pipeline"].append(result)
    results["codec_alone_again_images_per_s"] = facade(partitions, cores)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
