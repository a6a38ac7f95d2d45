"""Listing partitions: deterministic, sensitive to changes, and clear when there is nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cotam.store.readers import parquet_metadata, read_partition
from cotam.store.records import RunStore
from cotam.store.schema import Reject, Sample
from pipelines import image_runs, sources
from pipelines.sources import SourceError, list_partitions
from tests.corpus import photograph, to_bytes, write_tar, write_webdataset


def test_braces_globs_and_folders_name_the_same_partitions(tmp_path: Path) -> None:
    write_webdataset(tmp_path, 3, 1)
    by_braces = list_partitions(f"{tmp_path}/part-{{0000..0002}}.tar")
    assert [p.source for p in by_braces] == [f"{tmp_path}/part-{k:04d}.tar" for k in range(3)]
    assert list_partitions(f"{tmp_path}/*.tar") == by_braces == list_partitions(str(tmp_path))


def test_many_names_in_one_folder_are_looked_up_in_its_listing(tmp_path: Path) -> None:
    write_webdataset(tmp_path, 30, 1)
    named = list_partitions(f"{tmp_path}/part-{{0000..0029}}.tar")
    assert named == list_partitions(str(tmp_path)) and len(named) == 30
    (tmp_path / "part-0017.tar").unlink()
    with pytest.raises(SourceError, match=r"part-0017.tar does not exist"):
        list_partitions(f"{tmp_path}/part-{{0000..0029}}.tar")


def test_a_changed_tar_is_a_new_partition(tmp_path: Path) -> None:
    write_webdataset(tmp_path, 2, 1)
    before = list_partitions(str(tmp_path))
    with (tmp_path / "part-0001.tar").open("ab") as file:
        file.write(bytes(512))
    after = list_partitions(str(tmp_path))
    assert before[0] == after[0]
    assert before[1].partition_id != after[1].partition_id


def test_folders_of_images_are_cut_into_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(image_runs, "_ends_partition", lambda num_images, last: num_images == 2)
    image = to_bytes(photograph(0))
    names = ["a/3.jpg", "a/1.PNG", "a/3.txt", "b.webp", ".hidden/x.jpg", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image)
    assert [p.paths for p in list_partitions(str(tmp_path))] == [("a/1.PNG", "a/3.jpg", "a/3.txt"), ("b.webp",)]
    assert f"left out of {tmp_path}: 1 .txt" in caplog.text


def test_what_lies_beside_images_belongs_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As img2dataset's "files", YOLO, Google Takeout and kohya write it."""
    image = to_bytes(photograph(0))
    files = {
        "0/a.jpg": image, "0/a.txt": b"A", "0/a.json": b"{}", "0/b.png": image, "0/b.saliency.npy": b"\x93",
        "0/c.caption": b"C", "0/c.d.jpg": image, "0/c.jpg": image, "0/d.jpg": image, "0/d.jpg.json": b"[]",
        "0/e.txt": b"of nobody", "0/f.jpg": image, "0/f.txt": b"\xff", "README.md": b"# x",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"url": ["http://x"], "status": ["success"]}), tmp_path / "0.parquet")
    for per_partition in (1, 2, 100):
        monkeypatch.setattr(image_runs, "_ends_partition", lambda num, last, limit=per_partition: num == limit)
        caplog.clear()
        partitions = list_partitions(str(tmp_path))
        items = [item for partition in partitions for item in read_partition(partition)]
        samples = {item.key: item.members for item in items if isinstance(item, Sample)}
        assert samples == {
            "0/a.jpg": {"json": "{}", "txt": "A"},
            "0/b.png": {"saliency.npy": b"\x93"},
            "0/c.d.jpg": {},
            "0/c.jpg": {"caption": "C"},
            "0/d.jpg": {"json": "[]"},
        }
        (reject,) = (item for item in items if isinstance(item, Reject))
        assert (reject.key, reject.error, reject.image) == ("0/f.jpg", "member txt is not UTF-8 text", image)
        assert "1 .parquet (without images)" in caplog.text and "1 .md" in caplog.text
    before = [p.partition_id for p in partitions]
    (tmp_path / "0/a.txt").write_bytes(b"another caption")
    assert [p.partition_id for p in list_partitions(str(tmp_path))] != before

    keys = [key for p in list_partitions(f"{tmp_path}/*/*.jpg") for key in p.paths]
    assert keys == ["0/a.jpg", "0/c.d.jpg", "0/c.jpg", "0/d.jpg", "0/f.jpg"]
    assert list_partitions(f"{tmp_path}/*/") == list_partitions(f"{tmp_path}/0")
    (one,) = list_partitions(f"{tmp_path}/0/{{a,c}}.jpg")
    assert one.paths == ("a.jpg", "c.jpg")


def test_parquet_files_that_are_no_images_are_left_out_beside_tars(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_webdataset(tmp_path, 2, 1)
    for k in range(2):
        pq.write_table(pa.table({"url": ["http://x"]}), tmp_path / f"part-{k:04d}.parquet")
    assert [p.kind for p in list_partitions(str(tmp_path))] == ["tar", "tar"]
    assert "2 .parquet (without images)" in caplog.text


@pytest.mark.parametrize("book", ["_delta_log/00000000000000000000.json", ".hoodie/hoodie.properties"])
def test_tables_that_keep_deleted_rows_are_refused(tmp_path: Path, book: str) -> None:
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "part-0.parquet")
    assert len(list_partitions(str(tmp_path))) == 1
    (tmp_path / book).parent.mkdir()
    (tmp_path / book).write_text("{}")
    with pytest.raises(SourceError, match="rows that are deleted from it"):
        list_partitions(str(tmp_path))


def test_links_to_themselves_and_upwards_stop_nothing(tmp_path: Path) -> None:
    image = to_bytes(photograph(0))
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/sub/a.jpg").write_bytes(image)
    (tmp_path / "in/self.jpg").symlink_to("self.jpg")
    (tmp_path / "in/latest").symlink_to(".")
    (tmp_path / "in/sub/up").symlink_to("../..")
    (partition,) = list_partitions(str(tmp_path / "in"))
    items = {item.key: item for item in read_partition(partition)}
    assert {*items} == {"self.jpg", "sub/a.jpg"}
    reject = items["self.jpg"]
    assert isinstance(reject, Reject) and "leads to itself" in reject.error

    for folder, other in (("2023", "2024"), ("2024", "2023")):
        (tmp_path / f"years/{folder}").mkdir(parents=True)
        (tmp_path / f"years/{folder}/{folder}.jpg").write_bytes(image)
        (tmp_path / f"years/{folder}/beside").symlink_to(f"../{other}")
    paths = [path for partition in list_partitions(str(tmp_path / "years")) for path in partition.paths]
    assert paths == ["2023/2023.jpg", "2023/beside/2024.jpg", "2024/2024.jpg", "2024/beside/2023.jpg"]

    pq.write_table(pa.table({"image": [image]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").symlink_to("nowhere")
    assert [bool(p.problem) for p in list_partitions(f"{tmp_path}/*.parquet")] == [False, True]


def test_what_is_named_twice_is_one_partition(tmp_path: Path) -> None:
    write_webdataset(tmp_path, 3, 1)
    once = [p.partition_id for p in list_partitions(f"{tmp_path}/*.tar")]
    assert [p.partition_id for p in list_partitions(f"{tmp_path}/{{part-0001,*}}.tar")] == [once[1], once[0], once[2]]


def test_an_image_more_changes_the_partitions_around_it_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_runs, "FILES_PER_PARTITION", 20)
    for k in range(2000):
        (tmp_path / f"IMG_{k:05d}.jpg").touch()
        os.utime(tmp_path / f"IMG_{k:05d}.jpg", (1, 1))
    before = list_partitions(str(tmp_path))
    sizes = [len(p.paths) for p in before]
    assert sum(sizes) == 2000 and max(sizes) <= 40 and min(sizes[:-1]) >= 10 and 70 < len(sizes) < 140
    assert [p.partition_id for p in before] == sorted(p.partition_id for p in before)
    for name in ("A.jpg", "IMG_01000b.jpg", "Z.jpg"):
        (tmp_path / name).touch()
        after = list_partitions(str(tmp_path))
        assert sum(len(p.paths) for p in after) == 2001
        assert len({p.partition_id for p in after} - {p.partition_id for p in before}) <= 4
        (tmp_path / name).unlink()


def test_names_that_cameras_and_clocks_write_are_listed(tmp_path: Path) -> None:
    image = to_bytes(photograph(0))
    names = ["_DSC0001.JPG", "_sub/y.png", "g.pgm", "scan.jpe", "_SUCCESS", "_temporary/0/part.jpg", "._DSC0001.JPG"]
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    (found,) = list_partitions(f"{tmp_path}/in")
    assert found.paths == ("_DSC0001.JPG", "_sub/y.png", "g.pgm", "scan.jpe")
    (tmp_path / "tars").mkdir()
    for name in ("12::30::00.tar", "q[1].tar", "what?.tar"):
        write_tar(tmp_path / "tars" / name, [("a.jpg", image)])
        (partition,) = list_partitions(f"{tmp_path}/tars/{name}")
        assert partition.source.endswith(name)
        assert [item.key for item in read_partition(partition)] == ["a"]


def test_output_of_a_job_inside_the_source_is_no_source(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "in", 1, 1)
    for dst in ("in", "in/deeper/out"):
        store = RunStore(f"{tmp_path}/{dst}")
        store.open_run("encode", {}, [])
        store.root.write("data/part-0000-000000000000.parquet", b"bitstreams")
    assert [p.kind for p in list_partitions(f"{tmp_path}/in")] == ["tar"]


def test_the_same_names_in_two_folders_are_two_partitions(tmp_path: Path) -> None:
    ids = []
    for folder in ("monday/cam", "tuesday/cam"):
        (tmp_path / folder).mkdir(parents=True)
        path = tmp_path / folder / "000.bmp"
        path.write_bytes(to_bytes(photograph(len(ids)), "BMP"))
        os.utime(path, (0, 0))
        ids.append(list_partitions(f"{tmp_path}/{folder}")[0].partition_id)
    assert len(set(ids)) == 2


def test_parquet_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PARQUET_PARTITION_BYTES", 1)
    pq.write_table(pa.table({"image": [b"x"] * 6}), tmp_path / "in.parquet", row_group_size=2)
    assert [p.row_groups for p in list_partitions(str(tmp_path))] == [(0, 1), (1, 2), (2, 3)]


def test_footers_are_read_many_at_a_time_and_partitions_stay_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an object store, where each takes a round trip or two."""
    for k in range(64):
        pq.write_table(pa.table({"image": [b"x"]}), tmp_path / f"{k:02d}.parquet")

    def slow(source: str) -> pq.FileMetaData:
        time.sleep(0.1)
        return parquet_metadata(source)

    monkeypatch.setattr(sources, "parquet_metadata", slow)
    started = time.monotonic()
    found = [p.source for p in list_partitions(str(tmp_path))]
    assert time.monotonic() - started < 3 and found == [f"{tmp_path}/{k:02d}.parquet" for k in range(64)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.tar", "does not exist"),
        ("*.tar", "no file matches"),
        ("{0..1.tar", "unbalanced braces|does not exist"),
        ("empty", "no tar, Parquet or image file"),
        ("file.bin", "neither a tar nor a Parquet file"),
        ("wrong.parquet", "wrong.parquet"),
        ("text.parquet", "no column holds the bytes of images.*text string"),
    ],
)
def test_nothing_to_read_is_said_clearly(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").write_bytes(b"x")
    (tmp_path / "wrong.parquet").write_bytes(b"not parquet")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(SourceError, match=message):
        list_partitions(f"{tmp_path}/{name}")
