"""Partitions of a source, and the readers that stream their samples: tars, loose files, Parquet row groups."""

from __future__ import annotations

import dataclasses
import json
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from cotam.store.fs import split_uri
from cotam.store.schema import Reject, Sample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "avif", "tif", "tiff", "bmp", "gif", "ppm")
_TEXT_EXTENSIONS = ("txt", "text", "caption", "json", "jsonl", "cls", "csv", "html", "xml", "yaml")
_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "content")
_KEY_COLUMNS = ("key", "__key__", "id", "image_id", "filename", "file_name", "path")
_MAX_MEMBER_BYTES = 2**29
_PARQUET_BATCH_ROWS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """A unit of input: one tar, a run of loose files, or a run of row groups of one Parquet file.

    Attributes:
        partition_id: hash of its name, size, version and range; the same input always has the same id.
        kind: "tar", "files", "parquet", or "shard" for a shard of bitstreams.
        source: URI of the tar, the folder or the Parquet file.
        paths: for "files" and "shard", the paths relative to ``source``, in order.
        row_groups: for "parquet", first and one past the last row group.
        image_column: for "parquet", the column of image bytes.
        num_bytes: size of the input.
    """

    partition_id: str
    kind: str
    source: str
    paths: tuple[str, ...] = ()
    row_groups: tuple[int, int] = (0, 0)
    image_column: str = ""
    num_bytes: int = 0


def partition_from_json(text: str) -> Partition:
    """The inverse of json.dumps(dataclasses.asdict(partition))."""
    values = json.loads(text)
    return Partition(**{**values, "paths": tuple(values["paths"]), "row_groups": tuple(values["row_groups"])})


def read_partition(partition: Partition) -> Iterator[Sample | Reject]:
    """Stream the samples of a partition in order; what cannot be read as a sample comes as a reject.

    Raises:
        OSError: the source cannot be opened or reading it fails; worth another try.
        ValueError: the source is not what its name says.
    """
    readers = {"tar": _read_tar, "files": _read_files, "parquet": _read_parquet}
    return readers[partition.kind](partition)


def find_sample(source: str, key: str) -> Sample:
    """The sample of a row's ``source`` and ``key``, read again from where it came from.

    Of a Parquet file the image column is guessed as ``image_column`` does: compare the row's source_sha256.

    Raises:
        OSError: the source cannot be read any more.
        ValueError: it has no such sample.
    """
    if source.endswith(".parquet"):
        fs, path = split_uri(source)
        with fs.open(path, "rb") as file, pq.ParquetFile(file) as parquet:
            column, end = image_column(parquet.schema_arrow), parquet.num_row_groups
        partition = Partition(partition_id="", kind="parquet", source=source, row_groups=(0, end), image_column=column)
    elif source.endswith((".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tgz")):
        partition = Partition(partition_id="", kind="tar", source=source)
    else:
        partition = Partition(partition_id="", kind="files", source=source, paths=(key,))
    for sample in read_partition(partition):
        if isinstance(sample, Sample) and sample.key == key:
            return sample
    raise ValueError(f"{source} has no image {key!r}")


def member_types(partition: Partition) -> dict[str, pa.DataType]:
    """Arrow types that the source declares for its members; empty for tars and files."""
    if partition.kind != "parquet":
        return {}
    fs, path = split_uri(partition.source)
    with fs.open(path, "rb") as file:
        schema = pq.read_schema(file)
    return {f.name: f.type for f in schema if f.name not in (partition.image_column, key_column(schema))}


def image_column(schema: pa.Schema, wanted: str | None = None) -> str:
    """The column that holds images: binary, or a struct with a binary field ``bytes``.

    Raises:
        ValueError: there is none, or not the one that is wanted.
    """

    def holds_images(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    fits = [f.name for f in schema if holds_images(f.type)]
    if wanted is not None:
        if wanted not in fits:
            raise ValueError(f"no image column {wanted!r}; binary columns: {', '.join(fits) or 'none'}")
        return wanted
    for name in (*_IMAGE_COLUMNS, *(fits if len(fits) == 1 else ())):
        if name in fits:
            return name
    raise ValueError(
        f"cannot tell which column holds the images; name it with --image-column ({', '.join(fits) or 'none fits'})"
    )


def key_column(schema: pa.Schema) -> str | None:
    """The string column that names the images, if there is one with a usual name."""
    for name in _KEY_COLUMNS:
        k = schema.get_field_index(name)
        if k >= 0 and (pa.types.is_string(schema.field(k).type) or pa.types.is_large_string(schema.field(k).type)):
            return name
    return None


def _read_files(partition: Partition) -> Iterator[Sample | Reject]:
    fs, root = split_uri(partition.source)
    for path in partition.paths:
        try:
            data = bytes(fs.cat_file(f"{root}/{path}"))
        except FileNotFoundError:
            yield Reject(key=path, source=partition.source, stage="read", error="file has disappeared")
            continue
        yield Sample(key=path, source=partition.source, image=data)


def _read_parquet(partition: Partition) -> Iterator[Sample | Reject]:
    fs, path = split_uri(partition.source)
    first, end = partition.row_groups
    with fs.open(path, "rb") as file, pq.ParquetFile(file) as parquet:
        schema = parquet.schema_arrow
        column, keys = partition.image_column, key_column(schema)
        row = sum(parquet.metadata.row_group(k).num_rows for k in range(first))
        batches = parquet.iter_batches(batch_size=_PARQUET_BATCH_ROWS, row_groups=list(range(first, end)))
        for batch in batches:
            for values in batch.to_pylist():
                image = values.pop(column)
                image = image.get("bytes") if isinstance(image, dict) else image
                key = values.pop(keys) if keys is not None else None
                key = key if key is not None else f"{row:09d}"
                row += 1
                if image is None:
                    yield Reject(key=key, source=partition.source, stage="read", error=f"no image in column {column}")
                else:
                    yield Sample(key=key, source=partition.source, image=image, members=values)


def _read_tar(partition: Partition) -> Iterator[Sample | Reject]:
    """WebDataset convention: neighbours whose names agree up to the first dot of the file name are one sample."""
    source = partition.source
    fs, path = split_uri(source)
    num_samples = 0
    with fs.open(path, "rb", compression="infer") as file:
        tail = _Tail(file)
        key, members = "", cast(dict[str, Any], {})
        cut: str | None = None
        end = 0
        try:
            with tarfile.open(fileobj=cast(IO[bytes], tail), mode="r|") as tar:
                for info in tar:
                    if not info.isfile():
                        continue
                    folder, _, name = info.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    name_key = f"{folder}/{stem}" if folder else stem
                    if name_key != key and members:
                        yield _group(key, source, members)
                        num_samples += 1
                        members = {}
                    key = name_key
                    reader = tar.extractfile(info)
                    assert reader is not None
                    # Read before it counts: a size from a header is only believed once the bytes are there.
                    members[extension.lower()] = reader.read(min(info.size, _MAX_MEMBER_BYTES + 1))
                    if len(members[extension.lower()]) < min(info.size, _MAX_MEMBER_BYTES + 1):
                        raise tarfile.ReadError("unexpected end of data")
                end = tar.offset
        except (tarfile.TarError, EOFError, zlib.error) as error:
            cut = f"tar is damaged after {num_samples} samples: {error}"
        if cut is not None:  # the sample that was being read may be incomplete
            yield Reject(key=key or source, source=source, stage="read", error=cut)
            return
        if members:
            yield _group(key, source, members)
            num_samples += 1
        # tarfile takes a damaged header, or none, for the end: only the end marker proves that nothing is missing.
        if not tail.only_zeros_from(end):
            cut = f"tar has no end marker after {num_samples} samples: it is cut short or damaged there"
            yield Reject(key=f"{key}:end", source=source, stage="read", error=cut)


def _group(key: str, source: str, members: dict[str, Any]) -> Sample | Reject:
    images = [e for e in members if e.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS]
    if not images:
        return Reject(key=key, source=source, stage="read", error=f"sample has no image, only {', '.join(members)}")
    image = members.pop(images[0])
    if len(image) > _MAX_MEMBER_BYTES:
        return Reject(key=key, source=source, stage="read", error=f"image file over {_MAX_MEMBER_BYTES} bytes")
    for extension in members:
        if extension.rsplit(".", 1)[-1] in _TEXT_EXTENSIONS:
            try:
                members[extension] = members[extension].decode()
            except UnicodeDecodeError:
                error = f"member {extension} is not UTF-8 text"
                return Reject(key=key, source=source, stage="read", error=error, image=image)
    return Sample(key=key, source=source, image=image, members=members)


class _Tail:
    """A binary file that counts its bytes and the zeros they end with: to see a tar's end without seeking."""

    def __init__(self, file: Any) -> None:
        self._file, self.num_bytes, self.num_zeros = file, 0, 0

    def read(self, size: int = -1) -> bytes:
        data = bytes(self._file.read(size))
        num_zeros = len(data) - len(data.rstrip(b"\0"))
        self.num_bytes += len(data)
        self.num_zeros = num_zeros + (self.num_zeros if num_zeros == len(data) else 0)
        return data

    def only_zeros_from(self, offset: int) -> bool:
        """Whether the rest of the file, from ``offset``, is at least one block of zeros: a tar's end marker."""
        while self.read(2**20):
            pass
        return self.num_bytes - offset >= tarfile.BLOCKSIZE and self.num_zeros >= self.num_bytes - offset
