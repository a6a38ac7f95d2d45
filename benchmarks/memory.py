"""Resident memory of an encoding worker: idle, and the peak in every shard.

    python benchmarks/memory.py --shard-mib 100 --num-shards 20
    python benchmarks/memory.py --shard-mib 2048 --num-shards 1

The shards are tars of PNG photographs of 768x512 pixels, made for the purpose (about 0.7 MiB each).
"""

from __future__ import annotations

import argparse
import gc
import json
import tarfile
import tempfile
import threading
import time
from io import BytesIO
from pathlib import Path

import psutil
from images import load_images

from cotam.image import encode_image
from cotam.memory import return_freed_memory
from cotam.store.records import RunStore
from pipelines.encode import EncodeConfig, EncodeTask
from pipelines.sources import list_partitions


class PeakMemory:
    """Samples this process's resident memory, in bytes, from a thread."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        process = psutil.Process()
        while True:
            self.peak = max(self.peak, process.memory_info().rss)
            time.sleep(0.05)

    def take(self) -> int:
        peak, self.peak = self.peak, 0
        return peak


def write_shard(path: Path, images: list[bytes], num_bytes: int) -> None:
    with tarfile.open(path, "w") as tar:
        written, k = 0, 0
        while written < num_bytes:
            info = tarfile.TarInfo(f"{k:06d}.png")
            info.size = len(images[k % len(images)])
            tar.addfile(info, BytesIO(images[k % len(images)]))
            written, k = written + info.size, k + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shard-mib", type=int, default=100)
    parser.add_argument("--num-shards", type=int, default=20)
    parser.add_argument("--images", type=Path, help="folder of photographs; scikit-image's otherwise")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = [encode_image(image) for image in load_images(arguments.images)]
        task = EncodeTask(EncodeConfig(), "", "cpu", 1)
        task._codec.encode(load_images(arguments.images)[0])
        gc.collect()
        idle, memory = psutil.Process().memory_info().rss, PeakMemory()
        peaks, num_images, started = [], 0, time.perf_counter()
        for k in range(arguments.num_shards):
            tar = Path(folder) / f"{k:04d}.tar"
            write_shard(tar, images, arguments.shard_mib * 2**20)
            (partition,) = list_partitions(str(tar))
            memory.take()
            record = task.process(partition, RunStore(f"{folder}/out"), lambda counts: None)
            peaks.append(memory.take())
            return_freed_memory()  # as a worker does
            num_images += record.num_rows
            tar.unlink()
        seconds = time.perf_counter() - started
    over_idle = [round((peak - idle) / 2**20) for peak in peaks]
    print(
        json.dumps({"images": num_images, "seconds": seconds, "idle_mib": idle >> 20, "peaks_over_idle_mib": over_idle})
    )


if __name__ == "__main__":
    main()
