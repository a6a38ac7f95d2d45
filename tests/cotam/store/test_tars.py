"""Samples of tars: whole, cut, damaged and hostile; what WebDataset's convention makes of odd names."""

from __future__ import annotations

import gzip
import lzma
import random
import resource
import time
import zlib
from pathlib import Path

import pyarrow as pa
import pytest

from cotam.store.partitions import Partition
from cotam.store.readers import read_partition, with_members
from cotam.store.schema import Sample
from cotam.store.tars import IMAGE_EXTENSIONS
from tests.bad_corpora import AFTER, COMPRESSIONS, END, GOOD, JPEG, bad_tars, header, member
from tests.corpus import photograph, to_bytes, write_tar, write_webdataset
from tests.cotam.store.reading import read

TARS = bad_tars()


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


def test_a_parallel_zstd_archive_starts_with_a_frame_to_skip(tar: Path) -> None:
    data = pa.Codec("zstd").compress(tar.read_bytes(), asbytes=True)
    packed = tar.with_suffix(".tar.zst")
    packed.write_bytes(b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + len(data).to_bytes(4, "little") + data)
    samples, rejects = read(packed)
    assert len(samples) == 6 and not rejects
