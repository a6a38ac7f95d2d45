"""Shards, records and the lock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cotam.store.fs import Root
from cotam.store.records import RunStore, StoreError
from cotam.store.schema import Row
from cotam.store.shard import ShardWriter, read_rows


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
    store.open_run("encode", {"quality": 4.0, "model": "m"}, ["a"])
    store.open_run("encode", {"quality": 4.0, "model": "m"}, ["b"])
    assert store.manifest()["sources"] == ["a", "b"]
    with pytest.raises(StoreError, match=r"made with quality=4.0"):
        store.open_run("encode", {"quality": 5.0, "model": "m"}, ["a"])
    with pytest.raises(StoreError, match="cotam encode"):
        store.open_run("decode", {"quality": 4.0, "model": "m"}, ["a"])


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
    held = {"token": "t", "host": "another-host", "pid": 1, "heartbeat": time.time()}
    (tmp_path / "_cotam/lock.json").write_text(json.dumps(held))
    with pytest.raises(StoreError, match="another-host"), store.lock():
        pass


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
