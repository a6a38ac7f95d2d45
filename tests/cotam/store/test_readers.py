"""Reading partitions of loose files and Parquet, and of altered bytes of any kind."""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from cotam.store.fs import Root
from cotam.store.partitions import Partition
from cotam.store.readers import image_column, image_columns, member_types, parquet_metadata, read_partition
from cotam.store.schema import Reject, Row, Sample
from cotam.store.shard import ShardWriter, read_rows
from cotam.store.source_file import SourceFile
from tests.bad_corpora import AFTER, COMPRESSIONS, END, GOOD, JPEG, member, pax, pax_record
from tests.cotam.store.reading import split


def parquet(path: Path) -> Partition:
    metadata = parquet_metadata(str(path))
    column = image_column(metadata.schema.to_arrow_schema())
    groups = (0, metadata.num_row_groups)
    return Partition(partition_id="p", kind="parquet", source=str(path), row_groups=groups, image_column=column)


def stored(sample: Sample) -> Row:
    """The row of a sample, with a bitstream of no image."""
    return Row(
        key=sample.key, source="s", width=1, height=1, bitstream=b"x", quality=1.0, source_num_bytes=1,
        source_format="JPEG", source_sha256="", members=sample.members,
    )  # fmt: skip


def test_a_loose_file_without_permission_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jpg", "b.jpg", "b.txt", "c.jpg"):
        (tmp_path / name).write_bytes(JPEG if name.endswith("jpg") else b"t")
    read_whole = LocalFileSystem.cat_file

    def cat_file(fs: LocalFileSystem, path: str) -> bytes:  # tests may run as root, who may read everything
        if path.endswith(("a.jpg", "b.txt")):
            raise PermissionError(path)
        return bytes(read_whole(fs, path))

    monkeypatch.setattr(LocalFileSystem, "cat_file", cat_file)
    names = ("a.jpg", "b.jpg", "b.txt", "c.jpg")
    samples, rejects = split(Partition(partition_id="p", kind="files", source=str(tmp_path), paths=names))
    assert [s.key for s in samples] == ["c.jpg"]
    assert [(r.key, r.image) for r in rejects] == [("a.jpg", None), ("b.jpg", JPEG)]
    assert all("no permission" in r.error for r in rejects)


def test_names_of_hugging_face_files_are_keys(tmp_path: Path) -> None:
    images = [{"bytes": JPEG, "path": "dog_001.jpg"}, {"bytes": JPEG, "path": None}]
    pq.write_table(pa.table({"image": images, "label": [1, 2]}), tmp_path / "a.parquet")
    samples, rejects = split(parquet(tmp_path / "a.parquet"))
    assert [s.key for s in samples] == ["dog_001.jpg", "a-000000001"] and not rejects
    pq.write_table(pa.table({"image": images, "id": ["x", "y"]}), tmp_path / "b.parquet")
    assert [s.key for s in split(parquet(tmp_path / "b.parquet"))[0]] == ["x", "y"]


@pytest.mark.parametrize("as_list", [pa.list_, pa.large_list])
@pytest.mark.parametrize("as_struct", [True, False], ids=["structs", "bytes"])
def test_each_image_of_a_list_is_a_sample(as_list: Callable[..., pa.DataType], as_struct: bool, tmp_path: Path) -> None:
    """As in datasets of conversations about several images."""
    lists = [[JPEG, None, JPEG], [JPEG], [], None]
    images = [row and [{"bytes": image, "path": None} if as_struct else image for image in row] for row in lists]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kind = struct if as_struct else pa.binary()
    table = pa.table({"images": pa.array(images, as_list(kind)), "id": ["x", "y", "z", ""], "text": list("abcd")})
    pq.write_table(table, tmp_path / "a.parquet")
    samples, rejects = split(parquet(tmp_path / "a.parquet"))
    assert [(s.key, s.image, s.members) for s in samples] == [
        ("x-0", JPEG, {"text": "a"}),
        ("x-2", JPEG, {"text": "a"}),
        ("y-0", JPEG, {"text": "b"}),
    ]
    assert [r.key for r in rejects] == ["x-1", "z-0", "a-000000003"]
    assert {r.error for r in rejects} == {"no image in column images"}
    pq.write_table(table.drop_columns("id"), tmp_path / "b.parquet")
    keys = [s.key for s in split(parquet(tmp_path / "b.parquet"))[0]]
    assert keys == ["b-000000000-0", "b-000000000-2", "b-000000001-0"]
    named = pa.array([[{"bytes": JPEG, "path": "p.jpg"}, {"bytes": JPEG, "path": None}]], as_list(struct))
    pq.write_table(pa.table({"images": named}), tmp_path / "c.parquet")
    assert [s.key for s in split(parquet(tmp_path / "c.parquet"))[0]] == ["p.jpg", "c-000000000-1"]


def test_a_list_is_taken_for_images_by_its_name_and_where_nothing_else_is() -> None:
    one, several = pa.binary(), pa.list_(pa.binary())
    for fields, expected in (
        ({"photo": one, "hashes": several}, "photo"),
        ({"images": several, "jpg": one}, "jpg"),
        ({"images": several, "hashes": several}, "images"),
    ):
        assert image_column(pa.schema(list(fields.items()))) == expected
    hashes = pa.schema([("hashes", several)])
    assert image_column(hashes, "hashes") == "hashes" and not image_columns(hashes)
    with pytest.raises(ValueError, match="no column holds the bytes of images"):
        image_column(hashes)


def test_columns_of_keys_and_what_folders_say_of_rows(tmp_path: Path) -> None:
    text = pa.array(["x", "y"])
    for keys, expected in (
        (pa.array([0, 7], pa.int64()), ["0", "7"]),
        (text.dictionary_encode(), ["x", "y"]),
        (text.cast(pa.string_view()), ["x", "y"]),
        (pa.array([1.5, 2.5]), ["part-000000000", "part-000000001"]),
    ):
        path = tmp_path / "date=2024-01-01/country=D%C3%A9/city=__HIVE_DEFAULT_PARTITION__/part.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [JPEG] * 2, "image_id": keys, "date": [3, 4]}), path)
        samples, rejects = split(parquet(path))
        assert [s.key for s in samples] == expected and not rejects
        assert [s.members["date"] for s in samples] == [3, 4]  # the file's own column
        assert samples[0].members["country"] == "Dé" and samples[0].members["city"] is None
        assert member_types(parquet(path))["country"] == pa.string()


def test_loose_files_that_are_none_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "good.jpg").write_bytes(JPEG)
    names = ("pipe.jpg", "folder.jpg", "zero.jpg", "gone.jpg", "good.jpg")
    samples, rejects = split(Partition(partition_id="p", kind="files", source=str(tmp_path), paths=names))
    assert [s.key for s in samples] == ["good.jpg"]
    assert [r.key for r in rejects] == list(names[:4])
    assert all("a folder, a pipe or a device" in r.error for r in rejects[:3]) and "disappeared" in rejects[3].error


@pytest.mark.parametrize("kind", ["tar", "parquet", "files"])
def test_a_disk_that_cannot_be_read_is_an_os_error(kind: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").symlink_to("/proc/self/mem")  # fails at its first seek or byte
    source = tmp_path if kind == "files" else tmp_path / "bad.jpg"
    partition = Partition(partition_id="p", kind=kind, source=str(source), paths=("bad.jpg",), row_groups=(0, 1))
    with pytest.raises(OSError, match=r"Input/output error|Invalid argument"):
        list(read_partition(partition))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_pipes_and_folders_in_place_of_containers(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="a folder, a pipe or a device"):
            list(read_partition(Partition(partition_id="p", kind=kind, source=str(source), row_groups=(0, 1))))


def test_rows_of_a_damaged_row_group_are_rejects_and_the_others_are_read(tmp_path: Path) -> None:
    images = [random.Random(k).randbytes(3000) for k in range(60)]
    path = tmp_path / "damaged.parquet"
    pq.write_table(pa.table({"image": images}), path, row_group_size=20, write_page_checksum=True, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[data.index(images[30])] ^= 1
    path.write_bytes(data)
    samples, rejects = split(parquet(path))
    assert [s.image for s in samples] == images[:20] + images[40:]
    assert [r.key for r in rejects] == [f"damaged-{k:09d}" for k in range(20, 40)]
    assert all("row group 1 is damaged" in r.error for r in rejects)


def test_columns_of_every_type_come_back_and_rows_that_cannot_are_rejects(tmp_path: Path) -> None:
    broken = pa.array([b"ok", b"\xff\xfe", b"ok"])
    text = pa.Array.from_buffers(pa.string(), 3, broken.buffers())
    members = {
        "txt": text,
        "when": pa.array([1, 2, 3], pa.timestamp("ns", "UTC")),
        "map": pa.array([[("k", 1)]] * 3, pa.map_(pa.string(), pa.int32())),
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        "nested": pa.array([{"a": [{"b": None}]}, None, {"a": []}]),
        "large": pa.array([[1.5]] * 3, pa.large_list(pa.float32())),
        "nothing": pa.nulls(3),
        "width": pa.array([1, 2, 3]),
        "member_width": pa.array([4, 5, 6]),
    }
    for images in (
        pa.array([JPEG] * 3, pa.large_binary()),
        pa.array([JPEG] * 3).dictionary_encode(),
        pa.array([JPEG] * 3, pa.binary(len(JPEG))),
        pa.array([{"bytes": JPEG, "path": "p"}] * 3),
    ):
        path = tmp_path / "types.parquet"
        pq.write_table(pa.table({"image": images, **members}), path)
        samples, rejects = split(parquet(path))
        named = pa.types.is_struct(images.type)
        assert [s.image for s in samples] == [JPEG] * 2 and [r.key for r in rejects] == [
            "p" if named else "types-000000001"
        ]
        assert rejects[0].error.startswith("row cannot be read") and rejects[0].error.endswith("(column txt)")
        assert "utf-8" in rejects[0].error and rejects[0].image == JPEG
        with ShardWriter(tmp_path / "shard.parquet", {}, member_types(parquet(path))) as writer:
            for s in samples:
                writer.write(stored(s))
        last = list(read_rows(Root(str(tmp_path)), "shard.parquet"))[1].members
        assert last["nested"] == {"a": []} and last["map"] == [("k", 1)] and last["kind"] == "x"
        assert last["member_width"] == 3 and last["member_member_width"] == 6


@pytest.mark.parametrize("seconds", [4, pytest.param(120, marks=pytest.mark.slow)])
def test_altered_tars_and_parquet_files_never_do_anything_else(seconds: float, tmp_path: Path) -> None:
    rng = random.Random(int(seconds))
    images = [rng.randbytes(500 + k) for k in range(30)]
    table = pa.table({"image": images, "id": [f"k{k}" for k in range(30)], "n": list(range(30))})
    seeds: list[tuple[str, bytes]] = []
    for options in ({"compression": "zstd", "data_page_version": "2.0"}, {"use_dictionary": False}):
        file = io.BytesIO()
        pq.write_table(table, file, row_group_size=10, **options)
        seeds.append(("parquet", file.getvalue()))
    tar = GOOD + pax(pax_record("path", "long" * 40 + ".jpg")) + member("x.jpg") + AFTER + END
    seeds += [("tar", tar), *(("tar", compress(tar)) for compress in COMPRESSIONS.values())]
    end = time.monotonic() + seconds
    num_items = num_rejects = 0
    while time.monotonic() < end:
        kind, seed = rng.choice(seeds)
        path = tmp_path / f"altered.{kind}"
        path.write_bytes(_altered(seed, rng))
        started = time.monotonic()
        try:
            partition = parquet(path) if kind == "parquet" else Partition(partition_id="p", kind=kind, source=str(path))
            for item in read_partition(partition):
                num_items += 1
                num_rejects += isinstance(item, Reject)
                item.key.encode()  # a string that Arrow takes
        except ValueError:
            assert kind == "parquet"
        assert time.monotonic() - started < 10
    assert num_items > num_rejects > 0


def _altered(data: bytes, rng: random.Random) -> bytes:
    altered = bytearray(data)
    match rng.randrange(4):
        case 0:
            del altered[rng.randrange(len(altered)) :]
        case 1:
            for _ in range(rng.choice([1, 3, 20])):
                altered[rng.randrange(len(altered))] = rng.randrange(256)
        case 2:
            at = rng.randrange(len(altered))
            altered[at:at] = rng.randbytes(rng.randrange(600))
        case 3:  # a footer
            for _ in range(3):
                altered[-1 - rng.randrange(min(len(altered), 700))] = rng.randrange(256)
    return bytes(altered)


def test_members_of_extension_types_are_stored_as_what_they_are_made_of(tmp_path: Path) -> None:
    flags = pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0, None], pa.int8()))
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12, dtype=np.float32).reshape(3, 2, 2))
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"image": [b"x"] * 3, "flag": flags, "tensor": tensors}), path)
    samples, _ = split(parquet(path))
    types = member_types(parquet(path))
    with ShardWriter(tmp_path / "out.parquet", {}, types) as writer:
        for sample in samples:
            writer.write(stored(sample))
    rows = list(read_rows(Root(str(tmp_path)), "out.parquet"))
    assert [r.members.get("flag") for r in rows] == [1, 0, None]
    assert rows[2].members["tensor"] == [8.0, 9.0, 10.0, 11.0]


def test_a_large_row_group_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, generator = tmp_path / "in.parquet", np.random.default_rng(0)
    images = [generator.bytes(2**16) for _ in range(512)]
    pq.write_table(pa.table({"image": images}), path, compression="NONE", use_dictionary=False, write_batch_size=8)
    largest = 0

    def read_some(self: SourceFile, size: int = -1) -> bytes:
        nonlocal largest
        data = original(self, size)
        largest = max(largest, len(data))
        return data

    original = SourceFile.read
    monkeypatch.setattr(SourceFile, "read", read_some)
    assert [sample.image for sample in split(parquet(path))[0]] == images
    assert largest < 2**23, "the row group of 32 MiB was read at once"
