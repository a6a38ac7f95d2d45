"""The decode task: a shard of bitstreams to image files or a WebDataset tar."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from cotam.image import MAX_PIXELS, encode_image
from cotam.overlap import ordered_map
from cotam.pinned import load_codec
from cotam.stage_times import StageTimes
from cotam.store.fs import Root
from cotam.store.partitions import Partition, Partitions, partition_id
from cotam.store.records import Completion, RunStore
from cotam.store.schema import Reject, Row
from cotam.store.shard import RejectWriter, read_rows
from cotam.stream import DecodedRow, decode_stream
from pipelines.counter import PartitionCounter, Report
from pipelines.file_names import safe_path
from pipelines.publish import publish_shard

FORMATS = ("png", "jpg", "webdataset")
_JPEG_OPTIONS = {"quality": 95, "subsampling": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """What decoded images look like; part of the run's identity.

    Attributes:
        model: name, path or URI of the codec.
        model_sha256: of its file.
        format: "png" or "jpg" for a folder of files a shard, "webdataset" for a tar of PNG a shard.
        max_pixels: larger images are rejects.
    """

    model: str = "cotam-base"
    model_sha256: str = ""
    format: str = "png"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r} is none of {', '.join(FORMATS)}")


def list_shards(source: RunStore) -> Partitions:
    """The finished shards of an encoded store, as partitions.

    Raises:
        StoreError: not the output of `cotam encode`.
    """
    source.manifest_of("encode")
    return Partitions.of(
        Partition(
            # Its source made with other options, or again, is another shard.
            partition_id=partition_id(record.partition_id[:-13], [(record.partition_id, record.data_sha256)]),
            kind="shard",
            source=source.root.uri,
            paths=(record.data,),
            num_bytes=record.data_num_bytes or 0,
        )
        for record in source.completions()
    )


class DecodeTask:
    """Decodes shards with one codec on one device.

    Args:
        config: what to decode with and to.
        device: "cpu" or "cuda".
        num_threads: for the networks on a CPU, for entropy decoding and for image files.
    """

    command = "decode"

    def __init__(self, config: DecodeConfig, device: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._config, self._num_threads = config, num_threads
        self._codec = load_codec(config.model, config.model_sha256, device, config.max_pixels)

    def process(self, partition: Partition, store: RunStore, report: Report) -> Completion:
        """Decode one shard; publishes its images and rejects. Errors as ``PartitionTask.process``."""
        counts = PartitionCounter(self.command, partition, report)
        times = counts.times
        rows = read_rows(Root(partition.source), partition.paths[0])
        decoded = decode_stream(rows, self._codec, self._num_threads, times=times)
        data = f"data/{partition.partition_id}"  # a folder of files
        with (
            tempfile.TemporaryDirectory(prefix="cotam-") as folder,
            ThreadPoolExecutor(self._num_threads, thread_name_prefix="cotam-files") as executor,
        ):
            tar, bad = Path(folder) / "shard.tar", RejectWriter(Path(folder) / "rejects.parquet")
            with bad:
                files = ordered_map(executor, lambda d: self._to_files(d, times), decoded, 2 * self._num_threads)
                if self._config.format == "webdataset":
                    _write_tar(_counted(files, counts, bad), tar)
                else:
                    for name, content in _counted(files, counts, bad):
                        with times.measure("write"):
                            store.root.write(f"{data}/{name}", content)
            if self._config.format == "webdataset":
                return publish_shard(store, partition, tar, bad, counts)
            rejects_sha256 = bad.publish(store.root, partition.partition_id)
        return counts.completion(data, None, None, rejects_sha256)

    def _to_files(self, item: DecodedRow | Reject, times: StageTimes) -> tuple[Row, list[tuple[str, bytes]]] | Reject:
        if isinstance(item, Reject):
            return item
        row = item.row
        extension = "png" if self._config.format == "webdataset" else self._config.format
        stem, members = safe_path(row.key), row.members  # a/b, a//b and ./a/b are one file
        if self._config.format == "webdataset":
            stem = _without_dots(stem)
        if stem != str(PurePosixPath(row.key)):
            members = {"key.txt": row.key, **members}
        files = [_member_file(stem, name, value, extension) for name, value in members.items() if value is not None]
        with times.measure("image"):
            if extension == "png":
                image = encode_image(item.pixels, "PNG", compress_level=1)
            else:
                image = encode_image(item.pixels, "JPEG", **_JPEG_OPTIONS)
        return row, [(safe_path(f"{stem}.{extension}"), image), *files]


def _counted(
    items: Iterable[tuple[Row, list[tuple[str, bytes]]] | Reject], counts: PartitionCounter, bad: RejectWriter
) -> Iterator[tuple[str, bytes]]:
    written: set[bytes] = set()  # by digest: names may be long, and there may be many
    folders: set[bytes] = set()
    for item in items:
        if not isinstance(item, Reject):
            names = [name for name, _ in item[1]]
            digests = set(map(_digest, names))
            parents = {_digest(str(p)) for name in names for p in PurePosixPath(name).parents}
            if len(digests) < len(names) or not written.isdisjoint(digests):
                item = _reject(item[0], "another image of this shard has the same key")
            elif any(not taken.isdisjoint(parents) for taken in (written, digests)) or not folders.isdisjoint(digests):
                item = _reject(item[0], "the name of one image of this shard is a folder of another's")
        if isinstance(item, Reject):
            bad.write(item)
            counts.reject(item)
            continue
        row, files = item
        written |= digests
        folders |= parents
        counts.row(row)
        yield from files


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def _without_dots(key: str) -> str:
    """A key that WebDataset, which ends keys at the first dot of a file's name, reads back as one."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.replace(".", "_")


def _write_tar(files: Iterable[tuple[str, bytes]], path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _reject(row: Row, error: str) -> Reject:
    return Reject(key=row.key, source=row.source, stage="decode", error=error, image=row.bitstream)


def _member_file(stem: str, member: str, value: Any, extension: str) -> tuple[str, bytes]:
    """Name and content of the file of a member, beside an image ``stem``.``extension``."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):  # as Hugging Face's
        suffix = PurePosixPath(str(value.get("path") or "")).suffix
        member, value = member if member.endswith(suffix) else f"{member}{suffix}", value["bytes"]
    # Of a sample with several images one is a member, which may have the decoded image's name.
    name = f"{stem}.member.{member}" if member == extension else f"{stem}.{member.replace('/', '_')}"
    if not isinstance(value, bytes):
        value = (value if isinstance(value, str) else json.dumps(value, default=_for_json)).encode()
    return safe_path(name), value


def _for_json(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
