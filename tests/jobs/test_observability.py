"""What a run shows while it runs: metrics that Prometheus scrapes, structured logs, progress."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from pipelines import metrics
from tests.corpus import bad_files, photograph, to_bytes, write_tar
from tests.infra.test_dashboard import queried_series
from tests.jobs.test_cli import COTAM
from tests.jobs.test_submit import PATHS, RAY, free_port

# A cluster of its own and four runs of the command: what is recorded, and the lines, have fast tests elsewhere.
pytestmark = pytest.mark.slow
SECRET = "only-the-environment-knows-this"
_METRICS_S = 30.0


class Cluster(NamedTuple):
    """A Ray cluster: where to connect to, where its metrics are, and its folder."""

    address: str
    metrics_url: str
    folder: Path


class Run(NamedTuple):
    """A run of the command with structured logs."""

    summary: dict[str, Any]
    driver_log: list[dict[str, object]]
    worker_log: list[dict[str, object]]
    samples: dict[str, dict[tuple[str, ...], float]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    port, metrics_port = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="ray-")  # short: the paths of its sockets may not be long
    options = ["--head", "--block", "--port", str(port), "--num-cpus", "3", "--include-dashboard", "false"]
    options += ["--metrics-export-port", str(metrics_port), "--object-store-memory", str(100 * 2**20)]
    head = subprocess.Popen(
        [RAY, "start", *options, "--temp-dir", folder],
        env=PATHS,  # with a token, without which Ray's clusters refuse
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{metrics_port}/metrics"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert time.monotonic() < deadline and head.poll() is None, "the cluster did not start"
            with contextlib.suppress(requests.RequestException):
                requests.get(url, timeout=5)
                break
            time.sleep(0.2)
        yield Cluster(f"127.0.0.1:{port}", url, Path(folder))
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good images, bad ones, and a tar whose reading fails."""
    folder = tmp_path_factory.mktemp("corpus")
    write_tar(folder / "a.tar", [(f"{k}.jpg", to_bytes(photograph(k), quality=90)) for k in range(12)])
    write_tar(folder / "b.tar", [(name, content) for name, (content, _) in bad_files().items()])
    (folder / "c.tar").symlink_to("/proc/self/mem")  # a file that cannot be read
    return folder


def encode(cluster: Cluster, *arguments: str) -> list[str]:
    return [*COTAM, "encode", *arguments, "--ray-address", cluster.address]


@pytest.fixture(scope="module")
def run(cluster: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    dst = tmp_path_factory.mktemp("out")
    environment = {
        **PATHS,
        "COTAM_LOG_FORMAT": "json",
        "COTAM_LOG_LEVEL": "debug",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    result = subprocess.run(
        encode(cluster, str(corpus), str(dst), "--json"), env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 3, result.stderr
    *driver_log, last = result.stderr.splitlines()
    assert last.startswith("cotam: 1 of 3 partitions failed")
    worker_log = [
        json.loads(line)
        for path in (cluster.folder / "session_latest" / "logs").glob("worker-*.err")
        for line in path.read_text().splitlines()
        if line.startswith("{")
    ]
    summary = json.loads(result.stdout)
    deadline = time.monotonic() + _METRICS_S  # workers export what they have counted when they go
    while sum((samples := scrape(cluster)).get("ray_cotam_partitions_total", {}).values()) < 3:
        assert time.monotonic() < deadline, samples
        time.sleep(0.5)
    return Run(summary, [json.loads(line) for line in driver_log], worker_log, samples)


def scrape(cluster: Cluster) -> dict[str, dict[tuple[str, ...], float]]:
    """Sums over processes, by series and values of the tags that are ours."""
    series: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(requests.get(cluster.metrics_url, timeout=10).text):
        for sample in family.samples:
            if sample.name.startswith("ray_cotam_"):
                tags = tuple(
                    sample.labels[n] for n in ("command", "stage", "reason", "outcome", "le") if n in sample.labels
                )
                sums = series.setdefault(sample.name, {})
                sums[tags] = sums.get(tags, 0.0) + sample.value
    return series


def test_prometheus_sees_what_the_summary_says(run: Run) -> None:
    summary, samples = run.summary, run.samples
    assert samples["ray_cotam_images_total"] == {("encode",): summary["num_images"]}
    assert samples["ray_cotam_pixels_total"] == {("encode",): summary["num_pixels"]}
    assert samples["ray_cotam_source_bytes_total"] == {("encode",): summary["source_num_bytes"]}
    assert samples["ray_cotam_stored_bytes_total"] == {("encode",): summary["bitstream_num_bytes"]}
    assert samples["ray_cotam_bpp_count"] == {("encode",): summary["num_rows"]}
    rejects = samples["ray_cotam_rejects_total"]
    assert sum(rejects.values()) == summary["num_rejects"] == 4
    assert rejects == {("encode", "decode", reason): 1 for reason in ("empty", "corrupt", "format", "size")}
    assert samples["ray_cotam_partitions_total"] == {("encode", "completed"): 2, ("encode", "failed"): 1}
    assert samples["ray_cotam_retries_total"] == {("encode", "source"): 2}
    stages = samples["ray_cotam_stage_seconds_total"]
    assert {stage for _, stage in stages} == {"read", "image", "networks", "entropy", "write"}
    assert all(seconds > 0 for seconds in stages.values())


def test_every_series_of_the_dashboard_exists(run: Run) -> None:
    assert queried_series() <= set(run.samples)
    defined = {*metrics.COUNTERS, *metrics.HISTOGRAMS, *metrics.GAUGES}
    suffix = re.compile(r"_(total|bucket|count|sum)$")
    assert {suffix.sub("", name).removeprefix("ray_") for name in run.samples} == defined


def test_workers_log_what_becomes_of_each_partition(run: Run) -> None:
    events: dict[str, list[str]] = {}
    for line in run.worker_log:
        events.setdefault(str(line.get("partition_id", ""))[:1], []).append(str(line["event"]))
    started, retried, done = "partition_started", "partition_retried", "partition_completed"
    assert events["a"] == [started, done]
    assert events["b"] == [started, *["image_rejected"] * 4, done]
    assert events["c"] == [started, retried, retried, "partition_failed"]
    done_lines = [line for line in run.worker_log if line["event"] == done]
    assert sum(int(str(line["num_images"])) for line in done_lines) == run.summary["num_images"]
    for line in run.worker_log:
        assert line["level"] in ("debug", "info", "warning", "error") and str(line["time"]).endswith("Z")
        assert line["command"] == "encode" and str(line["source"]).endswith(".tar")
        assert ("error" in line) == (line["event"] in ("image_rejected", retried, "partition_failed"))


def test_the_driver_logs_the_run_and_its_progress(run: Run) -> None:
    events = [line["event"] for line in run.driver_log]
    assert events[0] == "run_started" and events[-1] == "run_finished" and set(events[1:-1]) == {"progress"}
    progress, finished = run.driver_log[-2:]
    assert (progress["partitions_done"], progress["partitions_total"], progress["seconds_left"]) == (3, 3, 0)
    assert progress["images"] == finished["num_images"] == run.summary["num_images"]
    assert SECRET not in json.dumps([run.driver_log, run.worker_log])


LINE = re.compile(
    r"2/2 partitions  22 images  [\d.]+/s  [\d.]+ MB/s  0\.\d{3} bpp  4 rejects  0:00:\d\d gone, 0:00:00 left"
)


def test_progress_is_lines_in_a_file_a_bar_in_a_terminal_and_nothing_if_quiet(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    good = tmp_path / "good"
    good.mkdir()
    for name in ("a", "b"):
        shutil.copy(corpus / f"{name}.tar", good)
    with (tmp_path / "log").open("w") as log:
        result = subprocess.run(
            encode(cluster, str(good), str(tmp_path / "one"), "--json"),
            env=PATHS, stdout=subprocess.PIPE, stderr=log, text=True, timeout=300,
        )  # fmt: skip
    assert result.returncode == 0 and json.loads(result.stdout)["num_images"] == 22
    *_, last = (tmp_path / "log").read_text().splitlines()
    assert LINE.fullmatch(last), last

    quiet = subprocess.run(
        encode(cluster, str(good), str(tmp_path / "two"), "--json", "--quiet"),
        env=PATHS, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (quiet.returncode, quiet.stderr) == (0, "") and json.loads(quiet.stdout)["num_images"] == 22

    shown, stdout = in_terminal(encode(cluster, str(good), str(tmp_path / "three"), "--json"))
    assert json.loads(stdout)["num_images"] == 22
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert text != shown and "━" in text and re.search(r"2/2 partitions +22 images .*4 rejects", text), shown


def in_terminal(command: list[str]) -> tuple[str, str]:
    """Run a command whose stderr is a terminal. Returns what that shows, and its stdout."""
    ours, theirs = pty.openpty()
    environment = {**PATHS, "TERM": "xterm-256color", "COLUMNS": "160"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=theirs, stdin=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    return shown.decode(errors="replace"), stdout.decode()
