"""Jobs on S3 while the server throttles, resets, stalls and restarts; atomic output; secrets that stay secret."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec.config
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from cotam.store import lock, s3
from cotam.store.fs import Root, is_transient
from cotam.store.readers import read_partition
from cotam.store.records import RunStore
from cotam.store.storage_options import set_storage_options
from cotam.store.verify import verify_shard
from pipelines.cluster import Resources
from pipelines.encode import EncodeConfig, EncodeTask
from pipelines.runner import JobSummary, run_partitions
from pipelines.sources import list_partitions
from tests.corpus import write_webdataset
from tests.s3_server import (
    ACCESS_KEY,
    REGION,
    SECRET_KEY,
    Deny,
    Fault,
    FaultProxy,
    Request,
    Reset,
    SlowDown,
    Stall,
    Trickle,
    moto_server,
    s3_client,
)

NUM_TARS, SAMPLES_PER_TAR = 4, 2
SRC = "s3://corpus/in/*.tar"
COTAM = [sys.executable, "-m", "jobs.cli"]
# What a user's shell has, without any trace of AWS or of other tests.
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_", "FSSPEC_", "COTAM_"))}
pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's own URL, with a corpus in s3://corpus/in."""
    folder = tmp_path_factory.mktemp("corpus")
    write_webdataset(folder, NUM_TARS, SAMPLES_PER_TAR)
    with moto_server() as url:
        client = s3_client(url)
        client.create_bucket(Bucket="corpus")
        for path in sorted(folder.glob("*.tar")):
            client.upload_file(str(path), "corpus", f"in/{path.name}")
        yield url


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The way of this process, and of the workers of its jobs, to the server."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    proxy = FaultProxy(server)
    set_storage_options(json.dumps(proxy.options()))
    yield proxy
    proxy.stop()


@pytest.fixture(scope="module")
def undisturbed(server: str) -> dict[str, str | None]:
    """Partition id to shard hash of a run without any fault."""
    proxy = FaultProxy(server)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "s3", proxy.options())
        assert encode("s3://corpus/undisturbed").num_failed == 0
        hashes = shard_hashes("s3://corpus/undisturbed")
    proxy.stop()
    return hashes


def encode(dst: str, num_workers: int = 1) -> JobSummary:
    store = RunStore(dst)
    config = EncodeConfig()
    with store.lock():
        config_hash = store.open_run("encode", dataclasses.asdict(config), [SRC])
        make_task = partial(EncodeTask, config, config_hash, "cpu", 1)
        return run_partitions(make_task, list_partitions(SRC), store, Resources(num_workers=num_workers))


def shard_hashes(dst: str) -> dict[str, str | None]:
    return {record.partition_id: record.data_sha256 for record in RunStore(dst).completions()}


def now_and_then(rate: float, *faults: Fault) -> Callable[[Request], Fault | None]:
    """Faults for a share of all requests, the same ones every time for the same order of requests."""
    generator = random.Random(0)
    return lambda request: generator.choice(faults) if generator.random() < rate else None


class Reader:
    """Opens whatever appears in DST/data as Parquet, again and again, as someone who cannot wait for the job's end."""

    def __init__(self, server: str, dst: str) -> None:
        self._client, self._prefix = s3_client(server), f"{dst.removeprefix('s3://corpus/')}/data/"
        self.num_opened, self.broken = 0, []  # type: int, list[str]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            listed = self._client.list_objects_v2(Bucket="corpus", Prefix=self._prefix).get("Contents", [])
            for entry in listed:
                data = self._client.get_object(Bucket="corpus", Key=entry["Key"])["Body"].read()
                try:
                    assert pq.read_table(io.BytesIO(data)).num_rows > 0
                    self.num_opened += 1
                except (pa.ArrowException, OSError, AssertionError) as error:
                    self.broken.append(f"{entry['Key']}: {error}")


def test_throttling_resets_and_a_restart_change_nothing_and_no_reader_sees_half_a_shard(
    server: str, proxy: FaultProxy, undisturbed: dict[str, str | None]
) -> None:
    sporadic, restarted = now_and_then(0.25, SlowDown(), Reset()), threading.Event()

    def restart() -> None:
        proxy.stop()
        time.sleep(3)
        proxy.start()
        restarted.set()

    def rule(request: Request) -> Fault | None:
        if "/disturbed/data/" in request.path and restarting.ident is None:  # while the first shard is on its way
            restarting.start()
        return sporadic(request)

    restarting = threading.Thread(target=restart)
    proxy.rule = rule
    with Reader(server, "s3://corpus/disturbed") as reader:
        summary = encode("s3://corpus/disturbed", num_workers=2)
    assert restarted.is_set() and proxy.num_faults > 5
    assert (summary.num_rows, summary.num_failed) == (NUM_TARS * SAMPLES_PER_TAR, 0), summary.failures
    assert shard_hashes("s3://corpus/disturbed") == undisturbed
    assert reader.num_opened > 0 and reader.broken == []
    proxy.rule = lambda request: None
    store = RunStore("s3://corpus/disturbed")
    assert [p for record in store.completions() for p in verify_shard(store, record, None).problems] == []
    shards = ds.dataset("corpus/disturbed/data", filesystem=store.root.fs)
    assert shards.count_rows() == NUM_TARS * SAMPLES_PER_TAR


def test_sources_that_fail_for_good_fail_alone_and_a_rerun_completes_them(
    proxy: FaultProxy, undisturbed: dict[str, str | None]
) -> None:
    dst = "s3://corpus/some-fail"
    set_storage_options(json.dumps(proxy.options(retries={"mode": "standard", "total_max_attempts": 2})))
    throttled, refused = "s3://corpus/in/part-0001.tar", "s3://corpus/in/part-0002.tar"
    faults: dict[str, Fault] = {throttled: SlowDown(), refused: Deny()}
    proxy.rule = lambda r: faults.get(f"s3:/{r.path}") if r.method == "GET" else None
    summary = encode(dst)
    assert (summary.num_failed, summary.num_rows) == (2, (NUM_TARS - 2) * SAMPLES_PER_TAR)
    errors = {failure["source"]: failure["error"] for failure in summary.failures}
    assert throttled in errors[throttled] and "SlowDown" in errors[throttled]
    assert refused in errors[refused] and "AccessDenied" in errors[refused]
    reads = [f"s3:/{r.path}" for r in proxy.requests if r.method == "GET"]
    assert reads.count(throttled) == 2 * 3  # requests by attempts at the partition
    assert reads.count(refused) == 1  # a refusal is final

    proxy.rule = lambda r: None
    summary = encode(dst)
    assert (summary.num_skipped, summary.num_failed) == (NUM_TARS - 2, 0)
    assert shard_hashes(dst) == undisturbed
    assert RunStore(dst).failures() == []


def test_bodies_that_stall_trickle_or_break_off_are_read_again(server: str, proxy: FaultProxy) -> None:
    content = np.random.default_rng(0).bytes(2**20)
    s3_client(server).put_object(Bucket="corpus", Key="bodies/file", Body=content)
    set_storage_options(json.dumps(proxy.options(read_timeout=0.6)))
    root = Root("s3://corpus/bodies")

    def first(num: int, fault: Fault) -> Callable[[Request], Fault | None]:
        left = iter([fault] * num)
        return lambda request: next(left, None) if request.method == "GET" else None

    for fault in (Reset(), Stall(1.2), Trickle(4, 0.3)):
        proxy.rule = first(1, fault)
        assert root.read("file") == content
        proxy.rule = first(2, fault)
        with root.fs.open(root.join("file"), "rb") as file:
            assert file.read(1000) + file.read() == content


def test_a_trickle_that_never_ends_is_given_up(server: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_client(server).put_object(Bucket="corpus", Key="bodies/slow", Body=bytes(1000))
    monkeypatch.setattr(s3, "BODY_TIMEOUT_S", 0.4)
    proxy.rule = lambda request: Trickle(1000, 0.1) if request.method == "GET" else None
    with pytest.raises(OSError, match="reading broke off"):
        Root("s3://corpus/bodies").read("slow")


def test_what_no_retry_helps_with_fails_at_once(proxy: FaultProxy) -> None:
    with pytest.raises(FileNotFoundError, match=r"s3://no-such-bucket/out/a.json: .*NoSuchBucket"):
        Root("s3://no-such-bucket/out").write_json("a.json", {})
    proxy.rule = lambda request: Deny()
    for operation in (
        lambda: Root("s3://corpus/in").read("part-0000.tar"),
        lambda: list(Root("s3://corpus/in").list("folder")),
        lambda: list_partitions(SRC),
    ):
        proxy.requests.clear()
        with pytest.raises(PermissionError, match=r"s3://corpus/in.*AccessDenied"):
            operation()
        assert len(proxy.requests) == 1
    set_storage_options(json.dumps({**proxy.options(), "secret": "wrong"}))
    proxy.rule = lambda request: None
    with pytest.raises(PermissionError):
        Root("s3://corpus/in").read("part-0000.tar")


def test_a_server_that_is_away_is_an_oserror_and_the_lock_outlives_it(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    retries = {"mode": "standard", "total_max_attempts": 2}
    set_storage_options(json.dumps(proxy.options(retries=retries)))
    monkeypatch.setattr(lock, "_HEARTBEAT_S", 0.1)
    store = RunStore("s3://corpus/locked")
    with store.lock():
        proxy.stop()
        with pytest.raises(OSError, match="s3://corpus/locked"):
            store.completed_ids()
        time.sleep(1.5)
        proxy.start()
        started, deadline = time.time(), time.monotonic() + 20
        while store.root.read_json("_cotam/lock.json")["heartbeat"] < started:
            assert time.monotonic() < deadline, "the heartbeat has stopped"
            time.sleep(0.1)
    assert not store.root.exists("_cotam/lock.json")


def test_loose_files_are_asked_for_many_at_a_time_and_come_in_order(server: str, proxy: FaultProxy) -> None:
    names = [f"{k:03d}.jpg" for k in range(40)]
    for name in names:
        s3_client(server).put_object(Bucket="corpus", Key=f"loose/{name}", Body=name.encode())
    (partition,) = list_partitions("s3://corpus/loose")

    def slow(request: Request) -> None:
        time.sleep(0.1)

    proxy.rule = slow
    started = time.monotonic()
    items = list(read_partition(partition))
    assert [item.key for item in items] == names and [item.image for item in items] == [n.encode() for n in names]
    assert time.monotonic() - started < 2.5  # 4 s one after another


def test_a_lock_is_created_once(server: str, proxy: FaultProxy) -> None:
    root = Root("s3://corpus/created")
    root.create_json("_cotam/lock.json", {"token": "first"})
    with pytest.raises(FileExistsError):
        root.create_json("_cotam/lock.json", {"token": "second"})
    assert root.read_json("_cotam/lock.json") == {"token": "first"}
    with RunStore("s3://corpus/created").lock():  # that one is of no job
        assert root.read_json("_cotam/lock.json")["token"] != "first"


def big_shard(path: Path, seed: int) -> Path:
    """A Parquet file of 12 MB that nothing compresses."""
    generator = np.random.default_rng(seed)
    table = pa.table({"bitstream": [generator.bytes(2**20) for _ in range(12)]})
    pq.write_table(table, path, compression="NONE", use_dictionary=False)
    return path


def test_a_multipart_upload_is_seen_whole_or_not_at_all(
    server: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", 5 * 2**20)  # the smallest that S3 takes; files of 10 MiB are multipart
    root, client = Root("s3://corpus/multipart"), s3_client(server)

    def uploads() -> list[Any]:
        return client.list_multipart_uploads(Bucket="corpus", Prefix="multipart/").get("Uploads", [])

    for seed in (1, 2):  # a new object, then one that replaces it
        shard = big_shard(tmp_path / "shard.parquet", seed)
        whole = shard.read_bytes()
        proxy.rule = lambda r: Trickle(1, 0.3) if r.method == "PUT" else None
        with Reader(server, "s3://corpus/multipart") as reader:
            root.publish(shard, "data/big.parquet")
        assert reader.broken == []
        assert root.read("data/big.parquet") == whole and not shard.exists()
    assert any("partNumber=3" in r.query for r in proxy.requests) and reader.num_opened > 0

    proxy.rule = lambda r: SlowDown() if "partNumber=2" in r.query else None
    with pytest.raises(OSError, match="SlowDown"):
        root.publish(big_shard(tmp_path / "shard.parquet", 3), "data/failed.parquet")
    assert not root.exists("data/failed.parquet") and uploads() == []

    # An upload that was completed while the answer was lost may not be known any more: that is no missing file.
    proxy.rule = lambda r: Deny(404, "NoSuchUpload") if r.method == "POST" and "uploadId" in r.query else None
    with pytest.raises(OSError, match="NoSuchUpload") as raised:
        root.publish(big_shard(tmp_path / "shard.parquet", 3), "data/failed.parquet")
    assert is_transient(raised.value)

    # Killed in the middle: nothing is seen, and the next attempt clears up.
    proxy.rule = lambda r: Stall(60.0) if "partNumber=2" in r.query else None
    proxy.requests.clear()
    program = (
        "import sys; from pathlib import Path; from cotam.store import s3; from cotam.store.fs import Root;"
        "s3._PART_BYTES = 5 * 2**20; Root('s3://corpus/multipart').publish(Path(sys.argv[1]), 'data/killed.parquet')"
    )
    environment = {**ENVIRONMENT, "FSSPEC_S3": json.dumps(proxy.options(read_timeout=60))}
    shard = big_shard(tmp_path / "shard.parquet", 4)
    process = subprocess.Popen([sys.executable, "-c", program, str(shard)], env=environment)
    deadline = time.monotonic() + 60
    while not any("partNumber=2" in r.query for r in list(proxy.requests)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(uploads()) == 1 and not root.exists("data/killed.parquet")
    proxy.rule = lambda r: None
    root.publish(shard, "data/killed.parquet")
    assert uploads() == [] and root.exists("data/killed.parquet")


def test_credentials_on_the_command_line_work_and_are_found_nowhere(server: str, proxy: FaultProxy) -> None:
    options = json.dumps(proxy.options())
    dst = "s3://corpus/cli"
    ray_folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: it holds sockets
    environment = {**ENVIRONMENT, "RAY_TMPDIR": ray_folder}
    proxy.rule = lambda r: Deny() if r.path.endswith("part-0002.tar") and r.method == "GET" else None
    written: dict[str, bytes] = {}
    try:
        # --debug, too: tracebacks are where secrets like to turn up.
        arguments = ["encode", SRC, dst, "--json", "--num-workers", "1", "--debug", "--storage-options", options]
        with subprocess.Popen(
            [*COTAM, *arguments], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as driver:
            deadline = time.monotonic() + 120
            while not proxy.requests:
                assert time.monotonic() < deadline and driver.poll() is None
                time.sleep(0.05)
            command_line = Path(f"/proc/{driver.pid}/cmdline").read_bytes()
            stdout, stderr = driver.communicate(timeout=180)
        assert driver.returncode == 3, stderr
        assert json.loads(stdout)["num_failed"] == 1 and "part-0002" in stderr and "AccessDenied" in stderr
        written |= {str(p): p.read_bytes() for p in Path(ray_folder).rglob("*") if p.is_file() and not p.is_symlink()}
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    assert any("/logs/" in path for path in written)

    by_variable = {**ENVIRONMENT, "COTAM_STORAGE_OPTIONS": options}
    shown = subprocess.run([*COTAM, "status", dst, "--json"], env=by_variable, capture_output=True, text=True)
    assert shown.returncode == 0 and json.loads(shown.stdout)["num_partitions"] == NUM_TARS - 1, shown.stderr
    broken = f'{{"secret": "{SECRET_KEY}", "key": }}'
    wrong = subprocess.run([*COTAM, "status", dst, "--storage-options", broken], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "not JSON" in wrong.stderr

    client = s3_client(server)
    for entry in client.list_objects_v2(Bucket="corpus", Prefix="cli/")["Contents"]:
        written[entry["Key"]] = client.get_object(Bucket="corpus", Key=entry["Key"])["Body"].read()
    assert "cli/_cotam/manifest.json" in written
    results = (shown, wrong)
    written |= {"stdout": stdout.encode(), "stderr": stderr.encode(), "command line": command_line}
    written |= {f"{k}": (r.stdout + r.stderr).encode() for k, r in enumerate(results)}
    for secret in (SECRET_KEY, ACCESS_KEY):
        assert [name for name, content in written.items() if secret.encode() in content] == []


def test_aws_variables_are_enough(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    for name, value in {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_MAX_ATTEMPTS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    assert len(list_partitions(SRC)) == NUM_TARS
    proxy.requests.clear()
    proxy.rule = lambda request: SlowDown()
    with pytest.raises(OSError, match="SlowDown"):
        list_partitions(SRC)
    assert len(proxy.requests) == 3


def test_listings_of_several_pages_are_complete_and_in_order(server: str, proxy: FaultProxy) -> None:
    client = s3_client(server)
    client.create_bucket(Bucket="many")
    names = [f"part-{k:04d}.tar" for k in range(1003)]
    for key in (
        "in/",
        "in/deep/",
        *(f"in/{name}" for name in reversed(names)),
        "in/deep/a.tar",
        "in/_cotam/b.tar",
        "c.tar",
    ):
        client.put_object(Bucket="many", Key=key, Body=b"")
    expected = [f"s3://many/in/{name}" for name in names]
    assert [p.source for p in list_partitions("s3://many/in")] == ["s3://many/in/deep/a.tar", *expected]
    assert [p.source for p in list_partitions("s3://many/in/*.tar")] == expected
    tens = [f"s3://many/in/part-00{k}{j}.tar" for k in range(10) for j in (1, 3)]
    proxy.requests.clear()
    assert [p.source for p in list_partitions("s3://many/in/part-00?[13].tar")] == tens
    assert sum("continuation-token" in r.query for r in proxy.requests) == 0, "all of the folder was listed"
    assert [p.source for p in list_partitions("s3://many/*/*/*.tar")] == [
        "s3://many/in/_cotam/b.tar",
        "s3://many/in/deep/a.tar",
    ]
    assert sorted(Root("s3://many/in").list("")) == names
    assert list(Root("s3://many").list("nothing")) == []


def test_options_that_are_wrong_are_refused_without_their_values() -> None:
    before = dict(fsspec.config.conf)
    for options, expected in (
        ('{"key": SECRET}', "not JSON"),
        ('["SECRET"]', "JSON object"),
        ('{"secrt": "SECRET"}', "unknown storage options: secrt; known: .*secret"),
        ('{"endpoint_url": "http://user:SECRET@host"}', "do not belong in endpoint_url"),
        ('{"endpoint_url": "SECRET"}', "https:// URL"),
        ('{"config_kwargs": {"timeout": "SECRET"}}', "'timeout'"),
        ('{"client_kwargs": "SECRET"}', "client_kwargs is an object"),
        ('{"secret": ["SECRET"]}', "secret is a string"),
    ):
        with pytest.raises(ValueError, match=expected) as raised:
            set_storage_options(options)
        assert "SECRET" not in str(raised.value)
    assert fsspec.config.conf == before


@pytest.mark.slow
def test_chaos(server: str, proxy: FaultProxy, undisturbed: dict[str, str | None]) -> None:
    """A third of all requests go wrong in every way, the server restarts three times, and a rerun settles the rest."""
    proxy.rule = now_and_then(0.3, SlowDown(), Reset(), Stall(2.0), Trickle(3, 0.2))
    stop = threading.Event()

    def restart() -> None:
        for _ in range(3):
            if stop.wait(6):
                return
            proxy.stop()
            time.sleep(2)
            proxy.start()

    restarting = threading.Thread(target=restart)
    restarting.start()
    with Reader(server, "s3://corpus/chaos") as reader:
        for _ in range(5):
            if encode("s3://corpus/chaos").num_failed == 0:
                break
    stop.set()
    restarting.join()
    assert shard_hashes("s3://corpus/chaos") == undisturbed
    assert reader.broken == []
