"""Corpora into Parquet and back, as the commands do it; tests/pipelines/test_ray.py has what is Ray's."""

from __future__ import annotations

import dataclasses
import io
import os
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cotam.codec import Codec
from cotam.metrics import psnr_rgb
from cotam.store.fs import Root
from cotam.store.partitions import Partition, partition_id
from cotam.store.records import Completion, RunStore
from cotam.store.shard import read_rejects, rejects_path
from pipelines.counter import Report
from pipelines.decode import list_shards
from pipelines.encode import EncodeConfig, EncodeTask
from pipelines.runner import run_partitions
from pipelines.sources import list_partitions
from tests.corpus import bad_files, photograph, to_bytes, write_tar, write_webdataset
from tests.pipelines.running import RESOURCES, decode, encode, problems

pytestmark = pytest.mark.usefixtures("in_process")


def test_every_name_of_a_source_gives_shards_that_readers_of_parquet_see(tmp_path: Path) -> None:
    write_webdataset(tmp_path, 3, 2)
    names = ["照片.tar", "_raw (1).tar", ".-.tar"]
    for k, name in enumerate(names):
        (tmp_path / f"part-{k:04d}.tar").rename(tmp_path / name)
    assert encode(f"{tmp_path}/*.tar", f"{tmp_path}/out").num_rows == 4  # the last one is hidden from globs
    assert ds.dataset(tmp_path / "out/data").count_rows() == 4
    assert partition_id("照片", [("x",)]).startswith("part-") and partition_id("_raw", [("x",)]).startswith("raw-")


def test_ten_bad_files_among_good_ones(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    bad = bad_files()
    for name, (content, _) in bad.items():
        (folder / name).write_bytes(content)
    for k in range(5):
        (folder / f"{k:02d}-good.jpg").write_bytes(to_bytes(photograph(k), quality=90))
    (folder / "notes.txt").write_text("not an image and not named like one")
    dst = str(tmp_path / "out")
    summary = encode(str(folder), dst)
    expected = {name: error for name, (_, error) in bad.items() if error is not None}
    assert (summary.num_images, summary.num_rejects, summary.num_failed) == (15, len(expected), 0)

    store = RunStore(dst)
    rejects = read_rejects(store.root, next(store.completions()).partition_id)
    assert {r.key for r in rejects} == set(expected)
    assert all(expected[r.key] in r.error and r.stage == "decode" for r in rejects)

    codec = Codec.load()
    decoded = {
        r["key"]: codec.decode(r["bitstream"])
        for r in ds.dataset(f"{dst}/data").to_table(columns=["key", "bitstream"]).to_pylist()
    }
    assert decoded["08-long.png"].shape == (1, 20000, 3)
    assert decoded["09-rotated.jpg"].shape == (48, 32, 3)
    grey = decoded["04-grey16.png"].astype(int)
    assert grey[0, 0].max() < 40 and grey[-1, -1].min() > 215
    assert psnr_rgb(np.asarray(photograph(0)), decoded["05-cmyk.jpg"]) > 22
    with Image.open(io.BytesIO(bad["06-palette-alpha.png"][0])) as palette:
        white = Image.new("RGBA", palette.size, "white")
        expected_pixels = np.asarray(Image.alpha_composite(white, palette.convert("RGBA")).convert("RGB"))
    assert psnr_rgb(expected_pixels, decoded["06-palette-alpha.png"]) > 22

    assert problems(dst) == []
    kept = next((tmp_path / "out/_cotam/rejects").iterdir())
    kept.write_bytes(kept.read_bytes().replace(b"PAR1", b"PAR2", 1))
    assert any(p.startswith(f"_cotam/rejects/{kept.name}: sha256") for p in problems(dst))


def test_parquet_with_an_image_column(tmp_path: Path) -> None:
    images = [to_bytes(photograph(k)) for k in range(6)]
    images[4] = None
    table = pa.table(
        {
            "image": pa.array([{"bytes": i, "path": None} if i else None for i in images]),
            "id": [f"img/{k}" for k in range(6)],
            "width": list(range(6)),
            "boxes": [[1.5, k] for k in range(6)],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=2)
    summary = encode(str(tmp_path / "in.parquet"), str(tmp_path / "out"))
    assert (summary.num_rows, summary.num_rejects) == (5, 1)
    rows = ds.dataset(tmp_path / "out/data").to_table().to_pylist()
    assert [r["key"] for r in rows] == [f"img/{k}" for k in (0, 1, 2, 3, 5)]
    assert [r["member_width"] for r in rows] == [0, 1, 2, 3, 5] and rows[4]["boxes"] == [1.5, 5.0]
    assert all(r["width"] == 96 for r in rows)


def test_whatever_keys_and_members_are_called_every_image_is_decoded_inside_its_folder(tmp_path: Path) -> None:
    long = "x" * 250
    keys = ["../../escape", "fine/name", "/mnt/a/1", "C:\\x", "line\nbreak", "..", long]
    images = [to_bytes(photograph(k)) for k in range(len(keys))]
    second = [{"bytes": b"another image", "path": "image_2.webp"}] * len(keys)
    members = {"../climbs": ["c"] * len(keys), "image_2": second, "nested": [[{"b": b"\xff"}]] * len(keys)}
    pq.write_table(pa.table({"jpg": images, "key": keys, **members}), tmp_path / "in.parquet")
    encode(str(tmp_path / "in.parquet"), str(tmp_path / "out"))
    before = set(tmp_path.rglob("*"))
    for kind in ("jpg", "webdataset"):
        summary = decode(str(tmp_path / "out"), str(tmp_path / kind), kind)
        assert (summary.num_rows, summary.num_rejects) == (len(keys), 0)
    outside = {p for p in tmp_path.rglob("*") if not {tmp_path / "jpg", tmp_path / "webdataset"} & {p, *p.parents}}
    assert outside == before
    (folder,) = (tmp_path / "jpg/data").iterdir()
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    decoded = {name: content for name, content in files.items() if name.endswith(".jpg")}
    assert {*decoded} >= {"escape.jpg", "fine/name.jpg", "mnt/a/1.jpg", "C:/x.jpg", "line_break.jpg", "_.jpg"}
    assert len(decoded) == len(keys) and max(len(Path(name).name) for name in files) < 255
    with Image.open(io.BytesIO(decoded["fine/name.jpg"])) as image:
        assert image.format == "JPEG" and psnr_rgb(np.asarray(photograph(1)), np.asarray(image)) > 22
    assert files["escape.key.txt"] == b"../../escape" and "fine/name.key.txt" not in files
    assert files["fine/name.image_2.webp"] == b"another image" and files["fine/name..._climbs"] == b"c"
    assert files["fine/name.nested"] == b'[{"b": "/w=="}]'
    again = encode(str(tmp_path / "webdataset/data/*.tar"), str(tmp_path / "again"))
    assert (again.num_rows, again.num_rejects) == (len(keys), 0)
    rows = ds.dataset(tmp_path / "again/data").to_table().to_pylist()
    assert {row["key.txt"] or row["key"] for row in rows} == {*keys}


def test_names_that_meet_on_a_disk_or_in_a_tar_cost_no_image(tmp_path: Path) -> None:
    """One path in three spellings; a name that is a folder of another; names that a tar's readers cut at a dot."""
    keys = ["a/b", "./a/b", "a//b", "x", "x.png/y", "img.0001.jpg", "img.0002.jpg", "dir.v2/.hidden.jpg"]
    table = pa.table({"jpg": [to_bytes(photograph(k)) for k in range(len(keys))], "key": keys})
    pq.write_table(table, tmp_path / "in.parquet")
    out = str(tmp_path / "out")
    encode(str(tmp_path / "in.parquet"), out)
    summary = decode(out, str(tmp_path / "files"), "png")
    files = [path for path in (tmp_path / "files/data").rglob("*.png") if path.is_file()]
    assert (summary.num_rows, summary.num_rejects) == (len(files), 3) == (5, 3)
    reasons = [
        r.error for p in list_shards(RunStore(out)) for r in read_rejects(Root(str(tmp_path / "files")), p.partition_id)
    ]
    assert sorted({(r, reasons.count(r)) for r in reasons}) == [
        ("another image of this shard has the same key", 2),
        ("the name of one image of this shard is a folder of another's", 1),
    ]

    summary = decode(out, str(tmp_path / "tars"), "webdataset")
    again = encode(str(tmp_path / "tars/data/*.tar"), str(tmp_path / "again"))
    assert summary.num_rows == again.num_rows == len(keys) - 3 and again.num_rejects == 0
    rows = ds.dataset(tmp_path / "again/data").to_table().to_pylist()
    assert {row["key.txt"] or row["key"] for row in rows} == {*keys} - {"./a/b", "a//b", "x.png/y"}


def test_a_changed_source_replaces_what_was_made_of_it(tmp_path: Path) -> None:
    keys = write_webdataset(tmp_path / "in", 3, 2)
    source, dst = str(tmp_path / "in"), str(tmp_path / "out")
    encode(source, dst)
    before = {r.source: r.partition_id for r in RunStore(dst).completions()}
    changed = tmp_path / "in/part-0001.tar"
    write_tar(changed, [("new.jpg", to_bytes(photograph(9))), ("bad.jpg", b"")])
    summary = encode(source, dst)
    assert (summary.num_skipped, summary.num_replaced, summary.num_rows, summary.num_rejects) == (2, 1, 5, 1)
    rows = ds.dataset(f"{dst}/data").to_table(columns=["key"])["key"].to_pylist()
    assert rows == [*keys[:2], "new", *keys[4:]]
    after = {r.source: r.partition_id for r in RunStore(dst).completions()}
    assert [s for s in before if before[s] != after[s]] == [str(changed)]

    # A job that is killed while it works on one version, and finds another when it is started again.
    store = RunStore(dst)
    abandoned = "part-0001-000000000000"
    store.count_attempt(abandoned)
    store.root.write(f"data/{abandoned}.parquet", (tmp_path / "out" / next(store.completions()).data).read_bytes())
    write_tar(changed, [("newer.jpg", to_bytes(photograph(8)))])
    encode(source, dst)
    assert ds.dataset(f"{dst}/data").to_table(columns=["key"])["key"].to_pylist() == [*keys[:2], "newer", *keys[4:]]
    assert problems(dst) == []


def test_originals_that_are_gone_take_nothing_with_them(tmp_path: Path) -> None:
    """A folder that is emptied after each run, as the originals are not wanted any more."""
    source, dst = tmp_path / "in", str(tmp_path / "out")
    source.mkdir()
    for k in range(3):
        (source / f"{k}.jpg").write_bytes(to_bytes(photograph(k)))
    encode(str(source), dst)
    (source / os.fsdecode(b"\xff.jpg")).write_bytes(b"")  # no UTF-8, and a reject
    (source / "3.jpg").write_bytes(to_bytes(photograph(3)))
    summary = encode(str(source), dst)  # all that was there still is: replaced
    assert (summary.num_replaced, summary.num_kept, summary.num_rows, summary.num_rejects) == (1, 0, 4, 1)
    for k in range(4):
        (source / f"{k}.jpg").unlink()
    (source / "4.jpg").write_bytes(to_bytes(photograph(4)))
    summary = encode(str(source), dst)
    assert (summary.num_replaced, summary.num_kept, summary.num_rows) == (0, 1, 1)
    keys = ds.dataset(f"{dst}/data").to_table(columns=["key"])["key"].to_pylist()
    assert sorted(keys) == [f"{k}.jpg" for k in range(5)]
    assert problems(dst) == []

    # Killed between a shard's removal and its record's.
    store = RunStore(dst)
    kept = next(r for r in store.completions() if r.num_rows == 4)
    store.root.remove(kept.data)
    store.root.remove(rejects_path(kept.partition_id))
    summary = encode(str(source), dst)
    assert (summary.num_replaced, summary.num_kept, len(list(store.completions()))) == (1, 0, 1)


def test_a_bad_partition_of_a_folder_keeps_no_old_version_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(4):
        (tmp_path / f"in/{k}").mkdir(parents=True)
        (tmp_path / f"in/{k}/a.jpg").write_bytes(to_bytes(photograph(k)))
    monkeypatch.setattr("pipelines.image_runs._ends_partition", lambda num_images, last: True)
    source, dst = str(tmp_path / "in"), str(tmp_path / "out")
    first = encode(source, dst)
    for k in range(first.num_partitions):
        os.utime(tmp_path / f"in/{k}/a.jpg", (k, k))
    store = RunStore(dst)
    config = EncodeConfig()
    config_hash = store.open_run("encode", dataclasses.asdict(config), ["in"])
    summary = run_partitions(
        partial(_Failing, config, config_hash, "cpu", 1), list_partitions(source), store, RESOURCES
    )
    assert (summary.num_failed, summary.num_replaced, summary.num_kept) == (1, first.num_partitions - 1, 1)
    keys = ds.dataset(f"{dst}/data").to_table(columns=["key"])["key"].to_pylist()
    assert sorted(keys) == [f"{k}/a.jpg" for k in range(4)]


class _Failing(EncodeTask):
    def process(self, partition: Partition, store: RunStore, report: Report) -> Completion:
        if "2/a.jpg" in partition.paths:
            raise ValueError("not this one")
        return super().process(partition, store, report)


def test_a_shard_that_was_made_again_is_decoded_again(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "in", 1, 2)
    ids = []
    for quality in (2.0, 6.0):
        store = RunStore(f"{tmp_path}/{quality}")
        config = EncodeConfig(quality=quality)
        config_hash = store.open_run("encode", dataclasses.asdict(config), ["in"])
        partitions = list_partitions(f"{tmp_path}/in")
        run_partitions(partial(EncodeTask, config, config_hash, "cpu", 1), partitions, store, RESOURCES)
        ids += [partition.partition_id for partition in list_shards(store)]
    assert len(set(ids)) == 2
    assert list_shards(store) == list_shards(RunStore(str(store.root.uri)))


def test_a_source_that_disappears_is_one_failed_partition(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "in", 2, 2)
    partitions = list_partitions(str(tmp_path / "in"))
    (tmp_path / "in/part-0000.tar").unlink()
    store = RunStore(str(tmp_path / "out"))
    config = EncodeConfig()
    config_hash = store.open_run("encode", dataclasses.asdict(config), ["in"])
    summary = run_partitions(partial(EncodeTask, config, config_hash, "cpu", 1), partitions, store, RESOURCES)
    assert (summary.num_rows, summary.num_failed) == (2, 1)
    assert "part-0000.tar" in summary.failures[0]["error"]
