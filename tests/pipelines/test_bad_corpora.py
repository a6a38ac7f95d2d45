"""One job over everything that can be wrong with a corpus: the accounting closes, and status shows it."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cotam.store.partitions import Partition
from cotam.store.records import Completion, RunStore
from cotam.store.shard import read_rejects
from jobs.cli import app
from pipelines.cluster import Resources
from pipelines.counter import Report
from pipelines.decode import DecodeConfig, DecodeTask, list_shards
from pipelines.encode import EncodeConfig, EncodeTask
from pipelines.runner import JobSummary, run_partitions
from pipelines.sources import SourceError, list_partitions
from tests.bad_corpora import AFTER, END, GOOD, JPEG, bad_tars, header, member
from tests.corpus import photograph, to_bytes, write_webdataset

RESOURCES = Resources(num_workers=2)


def encode(source: str, dst: str, task: type[EncodeTask] = EncodeTask) -> JobSummary:
    store = RunStore(dst)
    config = EncodeConfig()
    config_hash = store.open_run("encode", dataclasses.asdict(config), [source])
    return run_partitions(partial(task, config, config_hash, "cpu", 1), list_partitions(source), store, RESOURCES)


def status(dst: str) -> tuple[str, dict[str, object]]:
    runner = CliRunner()
    people, machines = runner.invoke(app, ["status", dst]), runner.invoke(app, ["status", dst, "--json"])
    assert people.exit_code == machines.exit_code == 0
    return people.stdout, json.loads(machines.stdout)


def write_bad_parquet(folder: Path) -> dict[str, str]:
    """Parquet files that cannot be read, by name, and what is said about each; and one with doubles and nulls."""
    folder.mkdir(exist_ok=True)
    images = [JPEG, None, JPEG, JPEG, b""]
    table = pa.table({"image": images, "id": ["k", "none", "k", "K", "empty"], "../../../climbs": ["x"] * 5})
    pq.write_table(table, folder / "good.parquet")
    pq.write_table(pa.table({"text": ["no image"]}), folder / "no-column.parquet")
    pq.write_table(pa.table({"image": [[1, 2], [3]]}), folder / "lists.parquet")
    pq.write_table(pa.table({"image": [1, 2]}), folder / "numbers.parquet")
    twice = pa.Table.from_arrays([pa.array([JPEG])] * 2, names=["image", "image"])
    pq.write_table(twice, folder / "twice.parquet")
    whole = (folder / "good.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[:-20])
    (folder / "encrypted.parquet").write_bytes(whole[:-4] + b"PARE")
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "garbage.parquet").write_bytes(b"PAR1" + os.urandom(500) + b"\x00\x01\x00\x00PAR1")
    no_rows = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(folder / "no-row-groups.parquet", no_rows):
        pass
    return {
        "no-column": "which column holds the images",
        "lists": "which column holds the images",
        "numbers": "which column holds the images",
        "twice": "two columns are named 'image'",
        "cut": "not a Parquet file",
        "encrypted": "not a Parquet file",
        "empty": "not a Parquet file",
        "garbage": "not a Parquet file",
    }


@pytest.mark.usefixtures("in_process")
def test_everything_bad_in_one_job(tmp_path: Path) -> None:
    source, dst = tmp_path / "in", str(tmp_path / "out")
    source.mkdir()
    tars = bad_tars()
    for name, (content, _) in tars.items():
        (source / f"{name.replace(' ', '-')}.tar").write_bytes(content)
    (source / "packed.tar.gz").write_bytes(gzip.compress(GOOD + AFTER)[:-30])
    os.mkfifo(source / "pipe.tar")
    (source / "disk.tar").symlink_to("/proc/self/mem")  # fails at its first seek or byte
    (source / "folder.tar").mkdir()
    (source / os.fsdecode(b"latin-\xe9.tar")).write_bytes(GOOD + AFTER)
    failures = {
        **write_bad_parquet(source),
        "pipe": "a folder, a pipe or a device",
        "latin-\udce9": "not UTF-8: rename it",
        "disk": "OSError: [Errno ",
    }
    for without_images in ("lists", "no-column", "numbers"):  # beside others they are metadata, and left out
        del failures[without_images]
    summary = encode(str(source), dst)
    store = RunStore(dst)
    records = {Path(r.source).name: r for r in store.completions()}
    for name, (_, outcome) in tars.items():
        record = records[f"{name.replace(' ', '-')}.tar"]
        assert (record.num_rows, record.num_rejects) == (len(outcome.keys), len(outcome.rejects)), name
        assert record.num_images == record.num_rows + record.num_rejects
        rejects = read_rejects(store.root, record.partition_id)
        assert all(e in r.error for e, r in zip(outcome.rejects, rejects, strict=True)), name
    assert (records["good.parquet"].num_rows, records["good.parquet"].num_rejects) == (3, 2)
    assert records["packed.tar.gz"].num_rejects == 1
    assert {Path(f["source"]).name.split(".")[0] for f in summary.failures} == {*failures}
    for failure in summary.failures:
        assert failures[Path(failure["source"]).name.split(".")[0]] in failure["error"] and "\n" not in failure["error"]
    assert summary.num_images == summary.num_rows + summary.num_rejects
    assert ds.dataset(f"{dst}/data").count_rows() == summary.num_rows

    people, machines = status(dst)
    assert f"{summary.num_images} images: {summary.num_rows} rows, {summary.num_rejects} rejects" in people
    assert f"{len(records)} partitions finished, {len(failures)} failed" in people
    assert all(error in people for error in failures.values()) and "cotam inspect" in people
    assert {f["partition_id"] for f in machines["failures"]} == {f["partition_id"] for f in summary.failures}  # type: ignore[attr-defined]
    assert (machines["num_rows"], machines["num_rejects"]) == (summary.num_rows, summary.num_rejects)
    assert machines["num_failed"] == len(failures)

    decodes_to_safe_and_different_names(tmp_path, dst, summary.num_rows)


def decodes_to_safe_and_different_names(tmp_path: Path, dst: str, num_rows: int) -> None:
    before = {path for path in tmp_path.rglob("*") if tmp_path / "back" not in path.parents}
    back = str(tmp_path / "back")
    store, config = RunStore(back), DecodeConfig()
    store.open_run("decode", dataclasses.asdict(config), [dst])
    summary = run_partitions(partial(DecodeTask, config, "cpu", 1), list_shards(RunStore(dst)), store, RESOURCES)
    assert (summary.num_images, summary.num_failed) == (num_rows, 0), summary.failures
    assert summary.num_rejects == 0  # in spite of /etc/x, ../../y, a newline, a NUL, and a column that climbs
    assert {p for p in tmp_path.rglob("*") if tmp_path / "back" not in p.parents} - {tmp_path / "back"} == before
    files = {p.name: p for p in Path(back, "data").rglob("*") if p.is_file()}
    assert {"k.png", "k~2.png", "k~3.png", "m.png", "m.member.png"} <= {*files}
    assert len([p for p in Path(back, "data").rglob("*.png") if ".member." not in p.name]) == summary.num_rows


def test_where_there_is_nothing_a_line_says_so(tmp_path: Path) -> None:
    for name in write_bad_parquet(tmp_path / "in"):
        with pytest.raises(SourceError, match=rf"{name}\.parquet"):
            list_partitions(f"{tmp_path}/in/{name}.parquet")
    with pytest.raises(SourceError, match="holds no rows"):
        list_partitions(f"{tmp_path}/in/no-row-groups.parquet")
    with pytest.raises(SourceError, match="column 'photo' is none that holds"):
        list_partitions(f"{tmp_path}/in/good.parquet", "photo")
    (tmp_path / "in/beside.jpg").write_bytes(JPEG)
    with pytest.raises(SourceError, match="images beside tars or Parquet files"):
        list_partitions(f"{tmp_path}/in")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/link.tar").symlink_to(tmp_path / "elsewhere.tar")
    (tmp_path / "elsewhere.tar").write_bytes(GOOD + END)
    assert len(list_partitions(f"{tmp_path}/tars/*.tar")) == len(list_partitions(f"{tmp_path}/tars")) == 1
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone/photo.HEIC").write_bytes(b"not read, but not passed over")
    assert list_partitions(f"{tmp_path}/phone")[0].paths == ("photo.HEIC",)


class _SmallTemporaryFolder(EncodeTask):
    """Its disk takes files of 60 kB: what a full one does to whoever writes, without a disk."""

    def process(self, partition: Partition, store: RunStore, report: Report) -> Completion:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
        try:
            return super().process(partition, store, report)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_corpus_of_one_large_tar(folder: Path) -> int:
    """A tar of large members between two small ones; returns how many images there are."""
    write_webdataset(folder, 2, 2)
    large = [
        member(f"large-{k}.jpg", to_bytes(photograph(k))) + member(f"large-{k}.npy", os.urandom(50_000))
        for k in range(8)
    ]
    (folder / "part-0000b.tar").write_bytes(b"".join(large) + END)
    return 12


@pytest.mark.usefixtures("in_process")
def test_a_full_disk_of_a_worker_fails_its_partition_and_a_rerun_makes_it_good(tmp_path: Path) -> None:
    num_images = write_corpus_of_one_large_tar(tmp_path / "in")
    dst = str(tmp_path / "out")
    left = {path for path in Path(tempfile.gettempdir()).glob("cotam-*") if path.is_dir()}
    summary = encode(str(tmp_path / "in"), dst, _SmallTemporaryFolder)
    assert (summary.num_rows, summary.num_failed) == (4, 1)
    assert "File too large" in summary.failures[0]["error"]
    assert {path for path in Path(tempfile.gettempdir()).glob("cotam-*") if path.is_dir()} == left
    summary = encode(str(tmp_path / "in"), dst)
    assert (summary.num_rows, summary.num_failed, summary.num_skipped) == (num_images, 0, 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.usefixtures("ray_session")
def test_a_full_disk_under_dst_fails_what_does_not_fit(tmp_path: Path, small_disk: Path) -> None:
    num_images = write_corpus_of_one_large_tar(tmp_path / "in")
    dst = str(small_disk / "out")
    summary = encode(str(tmp_path / "in"), dst)
    assert (summary.num_rows, summary.num_failed) == (4, 1)
    assert "No space left on device" in summary.failures[0]["error"]
    assert not list(small_disk.rglob("*.tmp"))  # half a shard would keep the disk full
    people, _ = status(dst)
    assert "No space left on device" in people
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    summary = encode(str(tmp_path / "in"), dst)
    assert (summary.num_rows, summary.num_failed, summary.num_skipped) == (num_images, 0, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_tar_of_a_hundred_thousand_images_end_to_end(tmp_path: Path) -> None:
    tiny = to_bytes(photograph(0, 16, 16), quality=50)
    body = tiny + bytes(-len(tiny) % 512)
    (tmp_path / "in").mkdir()
    with (tmp_path / "in/many.tar").open("wb") as file:
        for k in range(100_000):
            file.write(header(f"{k:06d}.jpg", len(tiny)) + body)
        file.write(END)
    summary = encode(str(tmp_path / "in"), str(tmp_path / "out"))
    assert (summary.num_images, summary.num_rows, summary.num_failed) == (100_000, 100_000, 0)
