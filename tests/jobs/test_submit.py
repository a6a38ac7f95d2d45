"""Jobs on a running cluster: submitted, followed, asked about and stopped through Ray Jobs."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import requests

from tests.corpus import write_webdataset
from tests.jobs.test_cli import COTAM, ENVIRONMENT

# A second cluster with its dashboard takes minutes beside the other tests.
pytestmark = pytest.mark.slow
RAY = str(Path(sys.executable).with_name("ray"))
# The cluster runs `cotam` from here, wherever it was started from.
PATHS = {
    **ENVIRONMENT,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{ENVIRONMENT['PATH']}",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}


class Cluster(NamedTuple):
    """URL of its dashboard, and HOST:PORT."""

    dashboard: str
    address: str


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Ray cluster of its own, which asks for a token."""
    port, gcs_port = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="ray-")  # short: the paths of its sockets may not be long
    options = ["--head", "--block", "--port", str(gcs_port), "--dashboard-port", str(port), "--num-cpus", "3"]
    options += ["--object-store-memory", str(100 * 2**20), "--temp-dir", folder]
    head = subprocess.Popen(
        [RAY, "start", *options], env=PATHS, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert time.monotonic() < deadline and head.poll() is None, "the cluster did not start"
            try:
                requests.get(f"{url}/api/version", timeout=5)
                break
            except requests.RequestException:
                time.sleep(0.5)
        yield Cluster(url, f"127.0.0.1:{gcs_port}")
    finally:
        everything = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


WITHOUT_MODE = {k: v for k, v in PATHS.items() if k != "RAY_AUTH_MODE"}  # which people forget


def submit(url: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*COTAM, "submit", "--address", url, *arguments]
    return subprocess.run(command, env={**WITHOUT_MODE, **environment}, capture_output=True, text=True, timeout=300)


def ray_job(url: str, *arguments: str) -> str:
    command = [RAY, "job", *arguments, "--address", url]
    result = subprocess.run(command, env=PATHS, capture_output=True, text=True, timeout=120)
    return result.stdout + result.stderr


def test_a_job_runs_on_the_cluster_and_ends_with_its_exit_status(cluster: Cluster, tmp_path: Path) -> None:
    write_webdataset(tmp_path / "in", 1, 6, width=96, height=64)
    result = submit(cluster.dashboard, "--", "encode", str(tmp_path / "in"), str(tmp_path / "out"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 images: 6 rows" in result.stdout  # the job's log
    logged = submit(
        cluster.dashboard, "--", "encode", str(tmp_path / "in"), str(tmp_path / "out"), COTAM_LOG_FORMAT="json"
    )
    assert '"event": "run_finished"' in logged.stdout, logged.stdout + logged.stderr
    failed = submit(cluster.dashboard, "--", "encode", str(tmp_path / "nothing"), str(tmp_path / "other"))
    assert failed.returncode == 2, failed.stdout + failed.stderr


def test_a_driver_joins_the_cluster_with_a_token(cluster: Cluster, tmp_path: Path) -> None:
    write_webdataset(tmp_path / "in", 1, 6, width=96, height=64)
    command = [*COTAM, "encode", str(tmp_path / "in"), str(tmp_path / "out"), "--ray-address", cluster.address]
    result = subprocess.run(command, env=WITHOUT_MODE, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "6 images: 6 rows" in result.stdout, result.stdout + result.stderr


def test_a_detached_job_can_be_asked_about_and_stopped(cluster: Cluster, tmp_path: Path) -> None:
    write_webdataset(tmp_path / "in", 40, 20, width=384, height=256)
    result = submit(cluster.dashboard, "--detach", "--", "encode", str(tmp_path / "in"), str(tmp_path / "out"))
    job = result.stdout.strip()
    assert result.returncode == 0 and job
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("_cotam/completed/*.json")):
        assert time.monotonic() < deadline, ray_job(cluster.dashboard, "logs", job)
        time.sleep(0.5)
    assert "RUNNING" in ray_job(cluster.dashboard, "status", job)
    ray_job(cluster.dashboard, "stop", job)
    deadline = time.monotonic() + 60
    while "was stopped" not in (status := ray_job(cluster.dashboard, "status", job)):
        assert time.monotonic() < deadline, status


def test_what_cannot_be_submitted_says_so(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = submit(cluster.dashboard, "--", "encode", "a", "b", "--qualty", "3")
    assert wrong.returncode == 2 and "--qualty" in wrong.stderr
    monkeypatch.setitem(WITHOUT_MODE, "RAY_AUTH_TOKEN", secrets.token_hex(32))
    stranger = submit(cluster.dashboard, "--", "encode", "a", "b")
    assert stranger.returncode == 2 and "uthentication" in stranger.stderr and stranger.stderr.count("\n") == 1
    away = submit(f"http://127.0.0.1:{free_port()}", "--", "encode", "a", "b")
    assert away.returncode == 2 and "Ray's dashboard" in away.stderr and away.stderr.count("\n") == 1
