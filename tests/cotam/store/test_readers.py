"""Reading partitions: tars whole, cut and damaged; what WebDataset's convention makes of odd names."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from cotam.store.readers import Partition, read_partition
from cotam.store.schema import Reject, Sample
from tests.corpus import photograph, to_bytes, write_tar, write_webdataset


def read(path: Path) -> tuple[list[Sample], list[Reject]]:
    items = list(read_partition(Partition(partition_id="p", kind="tar", source=str(path))))
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Reject)]


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
        ("b/one", "sample has no image, only txt"),
        ("c", "member txt is not UTF-8 text"),
    ]
    assert rejects[1].image == jpeg
