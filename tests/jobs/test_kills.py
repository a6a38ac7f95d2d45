"""kill -9 of driver, worker and node at random moments: afterwards every image is there once, in the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.dataset as ds
import pytest
from ray.cluster_utils import Cluster

from cotam.store.records import RunStore
from tests.corpus import write_webdataset

NUM_TARS, PER_TAR = 8, 12
TIMES = [pytest.param(k, marks=pytest.mark.slow if k else ()) for k in range(10)]
ALL_SLOW = [pytest.param(k, marks=pytest.mark.slow) for k in range(10)]  # test_cli.py and test_ray.py have one of each
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


class Corpus:
    """A corpus on a cluster of two nodes, and what an undisturbed run with one worker makes of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, folder / "in"
        self.keys = write_webdataset(self.source, NUM_TARS, PER_TAR, width=384, height=256)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
        self.second: Any = None
        self.add_node()
        started = time.monotonic()
        undisturbed = self.start(folder / "undisturbed", num_workers=1)
        assert undisturbed.wait(300) == 0, undisturbed.stderr.read()
        self.seconds = time.monotonic() - started
        self.hashes = hashes(folder / "undisturbed")

    def add_node(self) -> None:
        if self.second is None:
            self.second = self.cluster.add_node(num_cpus=2)

    def kill_node(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None

    def start(self, dst: Path, num_workers: int) -> subprocess.Popen[str]:
        arguments = ["encode", str(self.source), str(dst), "--num-workers", str(num_workers), "--json"]
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *arguments, "--ray-address", self.cluster.address],
            env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def check(self, dst: Path) -> None:
        assert hashes(dst) == self.hashes
        assert ds.dataset(dst / "data").to_table(columns=["key"])["key"].to_pylist() == self.keys
        store = RunStore(str(dst))
        assert store.failures() == [] and list(store.root.list("_cotam/attempts")) == []
        assert all(r.num_images == r.num_rows + r.num_rejects for r in store.completions())


def hashes(dst: Path) -> dict[str, str | None]:
    return {record.partition_id: record.data_sha256 for record in RunStore(str(dst)).completions()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    corpus = Corpus(tmp_path_factory.mktemp("kills"))
    yield corpus
    corpus.cluster.shutdown()


def a_moment_of_work(corpus: Corpus, driver: subprocess.Popen[str], dst: Path, seed: int) -> None:
    """Wait until workers are busy, and then some more."""
    deadline = time.monotonic() + 120
    while not list(dst.glob("_cotam/attempts/*")):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.02)
    time.sleep(random.Random(seed).uniform(0, 0.15 * corpus.seconds))


def workers() -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if " ".join(p.info["cmdline"] or []).startswith("ray::Map")]


@pytest.mark.parametrize("seed", ALL_SLOW)
def test_the_driver_is_killed(corpus: Corpus, tmp_path: Path, seed: int) -> None:
    corpus.add_node()
    driver = corpus.start(tmp_path, num_workers=2)
    a_moment_of_work(corpus, driver, tmp_path, seed)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    again = corpus.start(tmp_path, num_workers=2)
    assert again.wait(300) == 0, again.stderr.read()
    corpus.check(tmp_path)


@pytest.mark.parametrize("seed", ALL_SLOW)
def test_a_worker_is_killed(corpus: Corpus, tmp_path: Path, seed: int) -> None:
    corpus.add_node()
    driver = corpus.start(tmp_path, num_workers=2)
    a_moment_of_work(corpus, driver, tmp_path, seed)
    if victims := workers():  # none: the job was faster
        random.Random(seed).choice(victims).send_signal(signal.SIGKILL)
    assert driver.wait(300) == 0, driver.stderr.read()
    corpus.check(tmp_path)


@pytest.mark.parametrize("seed", TIMES)
def test_a_node_is_killed_and_does_not_come_back(corpus: Corpus, tmp_path: Path, seed: int) -> None:
    """Four workers fill the cluster, so that what is left has no room for all of them."""
    corpus.add_node()
    driver = corpus.start(tmp_path, num_workers=4)
    a_moment_of_work(corpus, driver, tmp_path, seed)
    corpus.kill_node()
    assert driver.wait(300) == 0, driver.stderr.read()
    corpus.check(tmp_path)
