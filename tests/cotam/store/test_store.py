"""Shards, records and the lock."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cotam.store import lock
from cotam.store.fs import Root
from cotam.store.ids import ids_of
from cotam.store.lock import StoreError
from cotam.store.records import RunStore
from cotam.store.schema import Reject, Row
from cotam.store.shard import RejectWriter, ShardWriter, read_rejects, read_rows


def row(key: str, **members: object) -> Row:
    return Row(
        key=key, source="s", width=10, height=20, bitstream=key.encode() * 50, quality=4.0, source_num_bytes=7,
        source_format="JPEG", source_sha256="0" * 64, members=members,
    )  # fmt: skip


def test_members_that_show_up_late_get_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotam.store.shard.ROW_GROUP_BYTES", 100)  # a row group a row
    rows = [row("a", txt="one"), row("b", txt="two", cls=3), row("c", width=99, npy=b"\x00")]
    path = tmp_path / "shard.parquet"
    with ShardWriter(path, {"note": "kept"}) as writer:
        for r in rows:
            writer.write(r)
    assert list(read_rows(Root(str(tmp_path)), "shard.parquet")) == [
        rows[0],
        rows[1],
        row("c", member_width=99, npy=b"\x00"),
    ]
    file = pq.ParquetFile(path)
    assert file.schema_arrow.metadata[b"note"] == b"kept"
    column = file.metadata.row_group(0).column(file.schema_arrow.get_field_index("bitstream"))
    assert column.compression == "UNCOMPRESSED" and "RLE_DICTIONARY" not in column.encodings


def test_config_change_is_refused_with_what_changed(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    store.open_run("decode", {"quality": 3.0}, ["a"])
    store.open_run("encode", {"quality": 4.0, "model": "m"}, ["a"])  # nothing has been made yet
    store.count_attempt("p-000000000000")
    store.open_run("encode", {"quality": 4.0, "model": "m"}, ["b"])
    assert store.manifest()["sources"] == ["a", "b"]
    with pytest.raises(StoreError, match=r"made with quality=4.0"):
        store.open_run("encode", {"quality": 5.0, "model": "m"}, ["a"])
    with pytest.raises(StoreError, match="cotam encode"):
        store.open_run("decode", {"quality": 4.0, "model": "m"}, ["a"])
    with pytest.raises(StoreError, match="is SRC"):
        store.open_run("encode", {"quality": 4.0, "model": "m"}, [str(tmp_path)])


def test_a_job_that_was_stopped_can_be_told(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    assert store.unfinished_job() is None  # of an earlier version, or none
    store.note_job(4, has_ended=False)
    assert "over 4 partitions, was stopped or is running" in str(store.unfinished_job())
    store.note_job(4, has_ended=True)
    assert store.unfinished_job() is None


def test_two_jobs_on_one_store_are_refused_and_a_dead_one_is_not(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    with store.lock(), pytest.raises(StoreError, match=f"process {os.getpid()}"), RunStore(str(tmp_path)).lock():
        pass
    code = """if True:
        import os, sys
        from cotam.store.records import RunStore
        lock = RunStore(sys.argv[1]).lock()
        lock.__enter__()
        os._exit(9)
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (tmp_path / "_cotam/lock.json").exists()
    with store.lock():
        pass
    with store.lock():
        ours = json.loads((tmp_path / "_cotam/lock.json").read_text())
    # A killed container's process, whose numbers the next one's has again, began at another time.
    (tmp_path / "_cotam/lock.json").write_text(json.dumps({**ours, "started": "1"}))
    with store.lock():
        pass
    (tmp_path / "_cotam/lock.json").write_text(json.dumps(ours))
    with pytest.raises(StoreError, match=f"process {os.getpid()}"), store.lock():
        pass
    held = {"token": "t", "host": "another-host", "pid": 1, "heartbeat": time.time()}
    (tmp_path / "_cotam/lock.json").write_text(json.dumps(held))
    with pytest.raises(StoreError, match="another-host"), store.lock():
        pass


def test_of_jobs_that_start_at_once_one_gets_the_store(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def job(_: int) -> bool:
        together.wait()
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(RunStore(str(tmp_path)).lock())
            except StoreError:
                return False
            finally:
                together.wait()
            return True

    with ThreadPoolExecutor(4) as jobs:
        for _ in range(20):
            assert sum(jobs.map(job, range(4))) == 1
            assert not list((tmp_path / "_cotam").iterdir())
        stale = {"token": "t", "host": "h", "pid": 2**22 + 1, "pids": lock._pid_space(), "heartbeat": 0}
        for left in [json.dumps(stale), "{"] * 10:  # of a job that was killed, and of none
            (tmp_path / "_cotam/lock.json").write_text(left)
            assert sum(jobs.map(job, range(4))) <= 1
        (tmp_path / "_cotam/lock.json").write_text(json.dumps(stale))
        (tmp_path / "_cotam/takeover.json").write_text(json.dumps(stale))  # it was killed while it took over another's
    with pytest.raises(StoreError), RunStore(str(tmp_path)).lock():
        pass
    with RunStore(str(tmp_path)).lock():
        assert [path.name for path in (tmp_path / "_cotam").iterdir()] == ["lock.json"]


def test_options_that_came_later_do_not_change_a_run(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    first = store.open_run("encode", {"quality": 4.0}, ["a"])
    store.count_attempt("p-000000000000")
    assert store.open_run("encode", {"quality": 4.0, "image_column": None}, ["a"]) == first
    with pytest.raises(StoreError, match=r"made with image_column=None"):
        store.open_run("encode", {"quality": 4.0, "image_column": "mask"}, ["a"])


def test_a_job_that_lost_its_lock_is_interrupted_and_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_HEARTBEAT_S", 0.05)
    store, path = RunStore(str(tmp_path)), tmp_path / "_cotam/lock.json"
    other = {"token": "t", "host": "another-host", "pid": 1, "pids": "there", "heartbeat": time.time()}
    started = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup in a script
    with pytest.raises(StoreError, match="has taken over"), store.lock():
        for _ in range(60):  # a heartbeat may just be under way
            store.root.write_json("_cotam/lock.json", other)
            time.sleep(0.5)
    signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 10, "it went on with what it was doing"
    assert json.loads(path.read_text()) == other


@pytest.mark.parametrize("skew_s", [-1e5, 1e5])
def test_a_lock_that_beats_holds_whatever_its_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew_s: float
) -> None:
    monkeypatch.setattr(lock, "_HEARTBEAT_S", 0.2)
    store = RunStore(str(tmp_path))
    held = {"token": "t", "host": "another-host", "pid": 1, "pids": "there"}
    store.root.write_json("_cotam/lock.json", {**held, "heartbeat": time.time() + skew_s})
    beat = threading.Timer(
        0.1, store.root.write_json, ["_cotam/lock.json", {**held, "heartbeat": time.time() + skew_s + 1}]
    )
    beat.start()
    with pytest.raises(StoreError, match="another-host"), store.lock():
        pass
    with store.lock():  # it does not beat any more
        assert store.root.read_json("_cotam/lock.json")["token"] != "t"


def test_a_lock_survives_a_few_missed_heartbeats(tmp_path: Path) -> None:
    """An object store that answers nothing for a minute ends no job, nor starts a second one."""
    store = RunStore(str(tmp_path))
    held = {"token": "t", "host": "another-host", "pid": 1, "pids": "there"}
    store.root.write_json("_cotam/lock.json", {**held, "heartbeat": time.time() - 3.5 * lock._HEARTBEAT_S})
    started = time.monotonic()
    with pytest.raises(StoreError, match="another-host"), store.lock():
        pass
    assert time.monotonic() - started < lock._HEARTBEAT_S / 2


def test_what_killed_workers_left_goes_whether_file_or_folder(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    for name in ("old-1.parquet", "old-2/a.png", "new.parquet"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"half")
    for partition_id in ("old-1", "old-2", "new"):
        store.count_attempt(partition_id)
    store.forget_attempts(ids_of(["new"]))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["new.parquet"]


def test_rejects_may_quote_names_that_are_no_utf8(tmp_path: Path) -> None:
    reject = Reject(key="k", source="s", stage="read", error="\udcff.jpg is a pipe", image=None)
    with RejectWriter(tmp_path / "rejects.parquet") as writer:
        writer.write(reject)
    writer.publish(Root(str(tmp_path)), "p")
    assert [r.error for r in read_rejects(Root(str(tmp_path)), "p")] == ["\\udcff.jpg is a pipe"]


def test_rows_with_nested_members_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotam.store.shard.ROW_GROUP_BYTES", 10_000)
    with ShardWriter(tmp_path / "shard.parquet", {}) as writer:
        for k in range(10):
            writer.write(row(str(k), view={"bytes": b"x" * 4000, "path": "p"}, embedding=[0.5] * 500))
    assert pq.read_metadata(tmp_path / "shard.parquet").num_row_groups == 5


def test_a_write_that_breaks_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Root(str(tmp_path))
    root.write("a/file", b"old")

    def broken(fd: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        root.write("a/file", b"new")
    assert root.read("a/file") == b"old"
    assert list(root.list("a")) == ["file"]
