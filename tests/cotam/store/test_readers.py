"""Reading partitions: whole, cut, damaged and hostile; what WebDataset's convention makes of odd names."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import random
import resource
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from cotam.store.fs import Root
from cotam.store.partitions import Partition
from cotam.store.readers import image_column, member_types, parquet_metadata, read_partition, with_members
from cotam.store.schema import Reject, Row, Sample
from cotam.store.shard import ShardWriter, read_rows
from cotam.store.source_file import SourceFile
from cotam.store.tars import IMAGE_EXTENSIONS
from tests.bad_corpora import AFTER, COMPRESSIONS, END, GOOD, JPEG, bad_tars, header, member, pax, pax_record
from tests.corpus import photograph, to_bytes, write_tar, write_webdataset

TARS = bad_tars()


def split(partition: Partition) -> tuple[list[Sample], list[Reject]]:
    items = list(read_partition(partition))
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Reject)]


def read(path: Path) -> tuple[list[Sample], list[Reject]]:
    return split(Partition(partition_id="p", kind="tar", source=str(path)))


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


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    write_webdataset(tmp_path, 1, 6)
    return tmp_path / "part-0000.tar"


def test_whole_tar(tar: Path) -> None:
    samples, rejects = read(tar)
    assert [s.key for s in samples] == [f"{k:05d}" for k in range(6)]
    assert samples[3].members == {"txt": "caption 3 with ünicode", "json": '{"index": 3}'}
    assert not rejects


def test_compressed_tar(tar: Path) -> None:
    packed = tar.with_suffix(".tar.gz")
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    samples, rejects = read(packed)
    assert len(samples) == 6 and not rejects
    packed.write_bytes(packed.read_bytes()[:-3000])
    samples, rejects = read(packed)
    assert len(rejects) == 1 and len(samples) < 6


@pytest.mark.parametrize("cut", ["inside a member", "at a member boundary", "inside a header", "without end marker"])
def test_cut_tar_gives_its_good_samples_and_one_reject(tar: Path, cut: str) -> None:
    import tarfile

    with tarfile.open(tar) as whole:
        members = whole.getmembers()
    third = members[9]  # the JPEG of sample 3
    data = tar.read_bytes()
    end = {
        "inside a member": third.offset_data + third.size // 2,
        "at a member boundary": third.offset,
        "inside a header": third.offset + 100,
        "without end marker": members[-1].offset_data + 512,
    }[cut]
    tar.write_bytes(data[:end])
    samples, rejects = read(tar)
    assert [s.key for s in samples] == [f"{k:05d}" for k in range(6 if cut == "without end marker" else 3)]
    assert len(rejects) == 1
    assert "tar" in rejects[0].error and rejects[0].stage == "read"


def test_damaged_header_in_the_middle_is_noticed(tar: Path) -> None:
    import tarfile

    with tarfile.open(tar) as whole:
        offset = whole.getmembers()[6].offset
    data = bytearray(tar.read_bytes())
    data[offset : offset + 100] = b"\xff" * 100  # the checksum no longer fits
    tar.write_bytes(data)
    samples, rejects = read(tar)
    assert len(samples) == 2 and len(rejects) == 1


def test_which_images_of_a_tar_are_samples_and_which_are_members(tmp_path: Path) -> None:
    jpeg, other = to_bytes(photograph(1)), to_bytes(photograph(2))
    mac = [("._a.jpg", b"\0\5"), ("a.jpg", jpeg), ("._a.txt", b"\0"), ("a.txt", b"A"), (".DS_Store", b"x")]
    content = {
        "mac": [*mac, ("__MACOSX/a.jpg", b"x"), ("./b/c.jpg", jpeg)],
        "dates": [("IMG.2024.01.02.jpg", jpeg), ("IMG.2024.01.03.jpg", other), ("v1.5_x.jpg", jpeg)],
        "masks": [("a.depth.png", other), ("a.jpg", jpeg), ("b.seg.png", other), ("b.jpg", jpeg), ("b.json", b"{}")],
        "pairs": [("a.left.jpg", jpeg), ("a.right.jpg", other), ("b.right.jpg", other), ("b.left.jpg", jpeg)],
        "with text": [("b.right.jpg", other), ("b.left.jpg", jpeg), ("b.json", b"{}")],
        "phone": [("a.heic", b"not yet"), ("a.txt", b"A"), ("b.MPO", jpeg)],
        "many": [(f"IMG.{k:04d}.jpg", jpeg) for k in range(1200)],
    }
    found = {name: read(write_tar(tmp_path / f"{name}.tar", files)) for name, files in content.items()}
    assert not any(rejects for _, rejects in found.values())
    samples = {name: [(s.key, s.image == jpeg, s.members) for s in samples] for name, (samples, _) in found.items()}
    assert samples["mac"] == [("a", True, {"txt": "A"}), ("b/c", True, {})]
    assert samples["dates"] == [("IMG.2024.01.02", True, {}), ("IMG.2024.01.03", False, {}), ("v1.5_x", True, {})]
    assert samples["masks"] == [
        ("a", True, {"depth.png": other}),
        ("b", True, {"seg.png": other, "json": "{}"}),
    ]
    assert samples["pairs"] == [
        ("a.left", True, {}), ("a.right", False, {}), ("b.right", False, {}), ("b.left", True, {}),
    ]  # fmt: skip
    assert samples["with text"] == [("b", True, {"right.jpg": other, "json": "{}"})]
    assert samples["phone"] == [("a", False, {"txt": "A"}), ("b", True, {})]
    assert [key for key, _, _ in samples["many"]] == [f"IMG.{k:04d}" for k in range(1200)]


@pytest.mark.parametrize("extension", IMAGE_EXTENSIONS)
def test_files_of_every_kind_of_image_are_images_in_tars_and_folders(extension: str, tmp_path: Path) -> None:
    samples, rejects = read(write_tar(tmp_path / "a.tar", [(f"x.{extension}", JPEG), ("x.txt", b"t")]))
    assert [(s.key, s.image, s.members) for s in samples] == [("x", JPEG, {"txt": "t"})] and not rejects
    assert with_members(["x.txt", f"x.{extension.upper()}"]) == {f"x.{extension.upper()}": {"txt": "x.txt"}}


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


def test_a_cut_tar_of_photographs_with_dots_in_their_names_loses_only_what_is_cut(tmp_path: Path) -> None:
    images = {f"IMG.2024.01.{k:02d}": to_bytes(photograph(k)) for k in range(8)}
    tar = write_tar(tmp_path / "a.tar", [(f"{key}.jpg", image) for key, image in images.items()])
    data = tar.read_bytes()
    tar.write_bytes(data[: data.index(images["IMG.2024.01.06"]) + 100])
    samples, (reject,) = read(tar)
    assert {s.key: s.image for s in samples} == dict(list(images.items())[:6])
    assert "tar is damaged after 6 samples" in reject.error


def test_names_without_images_and_odd_members(tmp_path: Path) -> None:
    jpeg = to_bytes(photograph(1))
    tar = write_tar(
        tmp_path / "odd.tar",
        [
            ("a/one.JPG", jpeg),
            ("a/one.left.png", b"another image stays a member"),
            ("b/one.txt", b"no image here"),
            ("c.jpg", jpeg),
            ("c.txt", b"\xff\xfe not text"),
            ("d.jpg", jpeg),
            ("d.npy", b"\x00\x01"),
        ],
    )
    samples, rejects = read(tar)
    assert [(s.key, s.members) for s in samples] == [
        ("a/one", {"left.png": b"another image stays a member"}),
        ("d", {"npy": b"\x00\x01"}),
    ]
    assert [(r.key, r.error) for r in rejects] == [
        ("b/one", "sample has no image beside it, only txt (members of a sample follow each other in a tar)"),
        ("c", "member txt is not UTF-8 text"),
    ]
    assert rejects[1].image == jpeg


@pytest.mark.parametrize("name", TARS)
def test_every_bad_tar_gives_its_good_samples_and_says_what_is_wrong(name: str, tmp_path: Path) -> None:
    content, outcome = TARS[name]
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    started = time.perf_counter()
    samples, rejects = read(path)
    assert time.perf_counter() - started < 3
    assert [s.key for s in samples] == outcome.keys
    assert len(rejects) == len(outcome.rejects), rejects
    for reject, error in zip(rejects, outcome.rejects, strict=True):
        assert error in reject.error and reject.stage == "read" and "\n" not in reject.error


def test_no_image_of_a_tar_with_doubles_is_lost(tmp_path: Path) -> None:
    (tmp_path / "doubles.tar").write_bytes(TARS["the same name twice"][0])
    samples, _ = read(tmp_path / "doubles.tar")
    assert [(s.key, s.image == JPEG, s.members) for s in samples] == [
        ("k", True, {"txt": "1"}),
        ("k~2", False, {}),
        ("k~3", True, {"txt": "2"}),
    ]
    (tmp_path / "pax.tar").write_bytes(GOOD + header("pax", 2**40, b"x") + bytes(2**21))
    _, (reject,) = read(tmp_path / "pax.tar")
    assert reject.key == "a" and reject.image == JPEG  # whole, for all that can be told


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed_tars_under_any_name_whole_cut_and_altered(compression: str, tmp_path: Path) -> None:
    images = {f"{k:03d}": random.Random(k).randbytes(4000) for k in range(80)}
    tar = b"".join(member(f"{key}.jpg", image) for key, image in images.items()) + END
    packed = COMPRESSIONS[compression](tar)
    path = tmp_path / "named-like-a-plain-one.tar"
    path.write_bytes(packed)
    samples, rejects = read(path)
    assert {s.key: s.image for s in samples} == images and not rejects
    for end in (5, len(packed) * 2 // 3, len(packed) - 3):
        path.write_bytes(packed[:end])
        samples, rejects = read(path)
        assert len(rejects) == 1 and "tar is damaged after" in rejects[0].error
        assert all(images[s.key] == s.image for s in samples)
    path.write_bytes(packed[: len(packed) // 3] + b"\0" * 100 + packed[len(packed) // 3 + 100 :])
    samples, rejects = read(path)
    # zstd and gzip streams may go on after wrong bytes, and gzip's checksum comes last; never is a tar said to be whole
    assert len(rejects) == 1 or (compression == "zst" and len(samples) == len(images))


def test_a_bomb_of_a_compressed_tar_is_limited_before_it_fills_memory(tmp_path: Path) -> None:
    zeros = 2**29 + 2**24
    path = tmp_path / "bomb.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(GOOD)
        file.write(header("b.jpg", zeros))
        for _ in range(zeros // 2**24):
            file.write(bytes(2**24))
        file.write(AFTER + END)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    samples, rejects = read(path)
    assert [s.key for s in samples] == ["a", "z"]
    assert [r.error for r in rejects] == ["over 536870912 bytes"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 2**10  # KiB


def test_an_xz_file_gets_no_memory_that_its_header_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.xz"
    parts = GOOD + AFTER, END
    path.write_bytes(lzma.compress(parts[0]) + bytes(8) + lzma.compress(parts[1]))  # two streams, padded
    samples, rejects = read(path)
    assert [s.key for s in samples] == ["a", "z"] and not rejects

    data = bytearray(lzma.compress(GOOD + AFTER + END))
    start, end = 12, 12 + 4 * (data[12] + 1)  # of the first block's header
    data[start + 4] = 36  # a dictionary of 1 GiB
    data[end - 4 : end] = zlib.crc32(data[start : end - 4]).to_bytes(4, "little")
    path.write_bytes(data)
    samples, rejects = read(path)
    assert not samples and len(rejects) == 1 and "emory" in rejects[0].error


def test_names_of_hugging_face_files_are_keys(tmp_path: Path) -> None:
    images = [{"bytes": JPEG, "path": "dog_001.jpg"}, {"bytes": JPEG, "path": None}]
    pq.write_table(pa.table({"image": images, "label": [1, 2]}), tmp_path / "a.parquet")
    samples, rejects = split(parquet(tmp_path / "a.parquet"))
    assert [s.key for s in samples] == ["dog_001.jpg", "a-000000001"] and not rejects
    pq.write_table(pa.table({"image": images, "id": ["x", "y"]}), tmp_path / "b.parquet")
    assert [s.key for s in split(parquet(tmp_path / "b.parquet"))[0]] == ["x", "y"]


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


def test_a_hundred_thousand_members_in_flat_memory(tmp_path: Path) -> None:
    tiny = to_bytes(photograph(0, 8, 8), quality=50)
    block = header("000000.jpg", len(tiny))
    body = tiny + bytes(-len(tiny) % 512)
    rest = sum(block) - 6 * ord("0") - sum(block[148:156]) + 8 * ord(" ")
    path = tmp_path / "many.tar"
    with path.open("wb") as file:
        for k in range(100_000):
            name = b"%06d" % k
            file.write(name + block[6:148] + b"%06o\0 " % (rest + sum(name)) + block[156:] + body)
        file.write(END)
    items = iter(read_partition(Partition(partition_id="p", kind="tar", source=str(path))))
    for _ in range(1000):
        next(items)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(isinstance(item, Sample) for item in items) == 99_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 * 2**10  # KiB; a header takes 1


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


def test_a_parallel_zstd_archive_starts_with_a_frame_to_skip(tar: Path) -> None:
    data = pa.Codec("zstd").compress(tar.read_bytes(), asbytes=True)
    packed = tar.with_suffix(".tar.zst")
    packed.write_bytes(b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + len(data).to_bytes(4, "little") + data)
    samples, rejects = read(packed)
    assert len(samples) == 6 and not rejects


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
