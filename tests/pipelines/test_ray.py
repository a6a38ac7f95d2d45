"""What only Ray can show: workers that die, that cannot start, that write elsewhere, or for which there is no room."""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import os
import resource
import signal
import time
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import psutil
import pyarrow.dataset as ds
import pytest
import ray
import torch

from cotam.store.partitions import Partition
from cotam.store.records import Completion, RunStore
from jobs.console import Incomplete
from jobs.run import check_complete, run_job
from pipelines.cluster import ResourceError, Resources
from pipelines.counter import Report
from pipelines.encode import EncodeConfig, EncodeTask
from pipelines.runner import run_partitions
from pipelines.sources import list_partitions
from tests.corpus import write_webdataset
from tests.pipelines.running import RESOURCES, decode, encode, problems

pytestmark = pytest.mark.usefixtures("ray_session")


def test_webdataset_to_parquet_and_back(tmp_path: Path) -> None:
    keys = write_webdataset(tmp_path / "in", 3, 7)
    dst, back = str(tmp_path / "out"), str(tmp_path / "back")
    summary = encode(str(tmp_path / "in/part-{0000..0002}.tar"), dst)
    assert (summary.num_images, summary.num_rows, summary.num_rejects, summary.num_failed) == (21, 21, 0, 0)

    table = ds.dataset(f"{dst}/data").to_table()
    assert table["key"].to_pylist() == keys
    assert table["txt"].to_pylist() == [f"caption {k} with ünicode" for k in range(21)]
    query = f"select count(*), sum(octet_length(bitstream) * 8 / (width * height) - bpp) from '{dst}/data/*.parquet'"
    count, difference = duckdb.sql(query).fetchall()[0]
    assert count == 21 and abs(difference) < 1e-4
    assert problems(dst) == []

    decode(dst, back, "webdataset")
    again = encode(f"{back}/data", str(tmp_path / "again"))
    assert again.num_rows == 21
    assert ds.dataset(f"{tmp_path}/again/data").to_table()["json"].to_pylist() == table["json"].to_pylist()

    assert encode(str(tmp_path / "in/*.tar"), dst).num_skipped == 3


class _OnALostDevice(EncodeTask):
    """Its first process meets a device that does not come back to it."""

    def process(self, partition: Partition, store: RunStore, report: Report) -> Completion:
        if not store.root.exists("lost"):
            store.root.write("lost", b"")
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return super().process(partition, store, report)


def test_a_device_that_is_lost_to_a_process_costs_no_partition(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "in", 2, 2)
    store = RunStore(str(tmp_path / "out"))
    config = EncodeConfig()
    config_hash = store.open_run("encode", dataclasses.asdict(config), ["in"])
    partitions = list_partitions(str(tmp_path / "in"))
    summary = run_partitions(
        partial(_OnALostDevice, config, config_hash, "cpu", 1), partitions, store, Resources(num_workers=1)
    )
    assert (summary.num_rows, summary.num_failed) == (4, 0)


class _Deadly(EncodeTask):
    """Kills its worker on one partition, as a decoder with a fault would, and exhausts its memory on another."""

    def process(self, partition: Partition, store: RunStore, report: Report) -> Completion:
        if "part-0001" in partition.source:
            os.kill(os.getpid(), signal.SIGKILL)
        if "part-0002" in partition.source:
            resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**28,) * 2)
            faulthandler.disable()
            np.ones(2**29, np.uint8)
        return super().process(partition, store, report)


def all_cpus_come_back() -> bool:
    """Whether the cluster's CPUs are free within some seconds."""
    for _ in range(40):
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return True
        time.sleep(0.25)
    return False


def test_partitions_that_kill_workers_fail_alone_and_a_rerun_retries_just_those(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "in", 4, 2)
    dst = str(tmp_path / "out")
    store = RunStore(dst)
    config = EncodeConfig()
    config_hash = store.open_run("encode", dataclasses.asdict(config), ["in"])
    partitions = list_partitions(str(tmp_path / "in"))
    gc.disable()  # a driver that waits for its workers makes no garbage, so nothing is collected by the way
    try:
        make_task = partial(_Deadly, config, config_hash, "cpu", 1)
        summary = run_job(make_task, partitions, store, RESOURCES, None, quiet=True)
        assert all_cpus_come_back(), "workers of earlier rounds are left"
    finally:
        gc.enable()
    with pytest.raises(Incomplete, match=r"2 of 4 partitions failed.*part-0001.*workers died"):  # exit status 3
        check_complete(summary)
    errors = {f["source"].rpartition("/")[2]: f["error"] for f in store.failures()}
    assert set(errors) == {"part-0001.tar", "part-0002.tar"} and "MemoryError" in errors["part-0002.tar"]
    summary = encode(str(tmp_path / "in"), dst)
    assert (summary.num_skipped, summary.num_rows, summary.num_failed) == (2, 8, 0)
    assert problems(dst) == []


class _Elsewhere(EncodeTask):
    def process(self, partition: Partition, store: RunStore, report: Report) -> Completion:
        """As on a machine where the store's path is a folder of its own."""
        store.root.path += "-of-another-machine"
        return super().process(partition, store, report)


def _without_weights() -> EncodeTask:
    raise FileNotFoundError("no codec on this machine\nat all")


def test_a_worker_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "in", 1, 1)
    with pytest.raises(RuntimeError, match=r"^a worker could not start: FileNotFoundError: no codec on this machine"):
        run_partitions(
            _without_weights, list_partitions(str(tmp_path / "in")), RunStore(str(tmp_path / "out")), RESOURCES
        )


def test_outcomes_that_the_driver_cannot_see_are_not_success(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "in", 2, 1)
    store = RunStore(f"{tmp_path}/out")
    config = EncodeConfig()
    config_hash = store.open_run("encode", dataclasses.asdict(config), ["in"])
    partitions = list_partitions(f"{tmp_path}/in")
    with pytest.raises(RuntimeError, match=r"2 partitions of which nothing is in .*every machine has to see"):
        run_partitions(partial(_Elsewhere, config, config_hash, "cpu", 1), partitions, store, RESOURCES)


def test_more_than_the_cluster_has_is_refused_instead_of_waiting(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "in", 1, 1)
    partitions = list_partitions(str(tmp_path / "in"))
    store = RunStore(str(tmp_path / "out"))
    for resources in (Resources(gpus_per_worker=1), Resources(cpus_per_worker=64), Resources(num_workers=64)):
        with pytest.raises(ResourceError, match="the cluster has"):
            run_partitions(partial(EncodeTask, EncodeConfig(), "", "cpu", 1), partitions, store, resources)
