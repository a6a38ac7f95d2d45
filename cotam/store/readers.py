"""The readers that stream the samples of a partition: tars, loose files, Parquet row groups."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from cotam.errors import one_line
from cotam.overlap import ordered_map
from cotam.store.fs import split_uri
from cotam.store.partitions import Partition
from cotam.store.schema import Reject, Sample
from cotam.store.source_file import SourceFile, check_regular
from cotam.store.tars import (
    IMAGE_EXTENSIONS,
    MAX_MEMBER_NAMES,
    MAX_SAMPLE_BYTES,
    extension_of,
    member_value,
    read_tar,
)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "content")
_IMAGE_LISTS = ("images", "image")  # nothing else is taken for one: lists of bytes may be anything
_KEY_COLUMNS = ("key", "__key__", "id", "image_id", "filename", "file_name", "path")
_FILES_AHEAD = 16
_MAX_MEAN_BYTES_AHEAD = 2**23  # of the files of a partition that is read ahead
_PARQUET_BATCH_ROWS = 16
_PARQUET_BUFFER_BYTES = 2**20
_MAX_LOST_ROWS = 100_000  # of a damaged row group get a reject each; a footer may claim any number
_MAX_KEY_CHARACTERS = 1024
_MAX_SHOWN_COLUMNS = 12
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


def read_partition(partition: Partition) -> Iterator[Sample | Reject]:
    """Stream the samples of a partition in order; what cannot be read as a sample comes as a reject.

    Keys are unique: one that comes again gets "~2", "~3" and so on. No key has over 1024 characters.

    Raises:
        OSError: the source cannot be opened or reading it fails; worth another try.
        ValueError: the source is not what its name says.
    """
    if partition.problem:
        raise ValueError(f"{partition.source}: {partition.problem}")
    if not _is_utf8(partition.source):
        raise ValueError(f"{partition.source!a}: the name is not UTF-8: rename it")  # every row has it in a column
    times_seen: dict[bytes, int] = {}  # by digest: keys may be long, and there may be many
    for item in _READERS[partition.kind](partition):
        if len(item.key) > _MAX_KEY_CHARACTERS:
            error = f"key of {len(item.key)} characters"
            yield Reject(key=item.key[:100] + "...", source=item.source, stage="read", error=error, image=item.image)
        elif isinstance(item, Sample):
            key = _unique(item.key, times_seen)
            yield item if key == item.key else dataclasses.replace(item, key=key)
        else:
            yield item


def _is_utf8(name: str) -> bool:
    return name.encode(errors="replace").decode() == name


def _unique(key: str, times_seen: dict[bytes, int]) -> str:
    name = key
    while times := times_seen.get(digest := hashlib.blake2b(name.encode(), digest_size=16).digest(), 0):
        times_seen[digest] = times + 1
        name = f"{key}~{times + 1}"
    times_seen[digest] = 1
    return name


def find_sample(source: str, key: str) -> Sample:
    """The sample of a row's ``source`` and ``key``, read again from where it came from.

    Of a Parquet file the image column is guessed as ``image_column`` does: compare the row's source_sha256.

    Raises:
        OSError: the source cannot be read any more.
        ValueError: it has no such sample.
    """
    if source.lower().endswith(".parquet"):
        metadata = parquet_metadata(source)
        column, end = image_column(metadata.schema.to_arrow_schema()), metadata.num_row_groups
        partition = Partition(partition_id="", kind="parquet", source=source, row_groups=(0, end), image_column=column)
    elif source.lower().endswith(TAR_SUFFIXES):
        partition = Partition(partition_id="", kind="tar", source=source)
    else:
        partition = Partition(partition_id="", kind="files", source=source, paths=(key,))
    for sample in read_partition(partition):
        if isinstance(sample, Sample) and sample.key == key:
            return sample
    raise ValueError(f"{source} has no image {key!r}")


def member_types(partition: Partition) -> dict[str, pa.DataType]:
    """Arrow types that the source declares for its members; empty for tars and files. Errors as ``read_partition``."""
    if partition.kind != "parquet" or partition.problem:
        return {}
    schema = parquet_metadata(partition.source).schema.to_arrow_schema()
    members = (f for f in schema if f.name not in (partition.image_column, key_column(schema)))
    types = {f.name: f.type.storage_type if isinstance(f.type, pa.BaseExtensionType) else f.type for f in members}
    return {**dict.fromkeys(hive_columns(partition.source), pa.string()), **types}


def parquet_metadata(source: str) -> pq.FileMetaData:
    """The footer of a Parquet file.

    Raises:
        OSError: reading it fails.
        ValueError: it is no Parquet file that can be read, or two of its columns have one name.
    """
    with SourceFile(source) as file, _arrow_errors(file):
        metadata = pq.read_metadata(file)
        names = metadata.schema.to_arrow_schema().names
    twice = {name for name in names if names.count(name) > 1}
    if twice:  # the values of one of them would be lost
        raise ValueError(f"two columns are named {min(twice)!r}")
    return metadata


def image_column(schema: pa.Schema, wanted: str | None = None) -> str:
    """The column that holds images: binary, or a struct with a binary field ``bytes``, or lists of either.

    Raises:
        ValueError: there is none, or not the one that is wanted.
    """
    fits, lists = ([f.name for f in schema if holds(f.type)] for holds in (_holds_images, _holds_image_lists))
    if wanted is not None and wanted in (*fits, *lists):
        return wanted
    if wanted is None:
        for name in (*_IMAGE_COLUMNS, *(fits if len(fits) == 1 else ())):
            if name in fits:
                return name
        for name in _IMAGE_LISTS:
            if name in lists and not fits:
                return name
        if fits:
            raise ValueError(
                f"cannot tell which column holds the images; name it with --image-column: {', '.join(fits)}"
            )
    columns = ", ".join(f"{field.name} {str(field.type)[:60]}" for field in list(schema)[:_MAX_SHOWN_COLUMNS])
    asked = "no column" if wanted is None else f"column {wanted!r} is none that"
    raise ValueError(
        f"{asked} holds the bytes of images (binary, a struct with bytes, as Hugging Face's, or lists of them):"
        f" {columns}; images behind URLs have to be downloaded first"
    )


def image_columns(schema: pa.Schema) -> list[str]:
    """The columns that may hold images."""
    return [f.name for f in schema if _holds_images(f.type) or (f.name in _IMAGE_LISTS and _holds_image_lists(f.type))]


def _holds_image_lists(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_large_list_view)
    return any(test(kind) for test in tests) and _holds_images(kind.value_type)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        k = kind.get_field_index("bytes")
        return k >= 0 and not pa.types.is_struct(kind.field(k).type) and _holds_images(kind.field(k).type)
    if pa.types.is_dictionary(kind):
        return _holds_images(kind.value_type)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def key_column(schema: pa.Schema) -> str | None:
    """The column, of strings or integers, that names the images, if there is one with a usual name."""
    for name in _KEY_COLUMNS:
        k = schema.get_field_index(name)
        if k >= 0 and _holds_keys(schema.field(k).type):
            return name
    return None


def _holds_keys(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_keys(kind.value_type)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer)
    return any(test(kind) for test in tests)


def hive_columns(source: str) -> dict[str, str | None]:
    """What the folders of a Parquet file say of its rows, as in "date=2024-01-01/part-0.parquet": values by name."""
    pairs = (part.split("=", 1) for part in source.split("/")[:-1] if "=" in part)
    return {name: None if value == _HIVE_NULL else unquote(value) for name, value in pairs if name.isidentifier()}


def key_of_file(path: str) -> str:
    """The key of a loose file: its path, with replacement characters for bytes that are not UTF-8."""
    return path.encode(errors="surrogateescape").decode(errors="replace")


def with_members(paths: Iterable[str]) -> dict[str, dict[str, str]]:
    """The images among the files of a folder, each with what lies beside it: paths of its members by name.

    "a.txt", "a.saliency.npy" and "a.jpg.json" are the members txt, saliency.npy and json of "a.jpg".
    """
    files = list(paths)
    images: dict[str, dict[str, str]] = {path: {} for path in files if extension_of(path) in IMAGE_EXTENSIONS}
    by_stem: dict[str, str] = {}
    for path in images:
        by_stem.setdefault(path.rpartition(".")[0], path)
    for path in files:
        if path in images:
            continue
        stem, name = path, ""
        while True:  # without one extension after another
            stem, dot, extension = stem.rpartition(".")
            name = f"{extension}.{name}" if name else extension
            if not dot or "/" in extension:
                break
            if (image := stem if stem in images else by_stem.get(stem)) is not None:
                images[image].setdefault(name.lower(), path)
                break
    return images


def _read_files(partition: Partition) -> Iterator[Sample | Reject]:
    fs, root = split_uri(partition.source)
    images = with_members(partition.paths)
    num_names = len({name for members in images.values() for name in members})

    def read(path: str) -> Sample | Reject:
        key, data, members = key_of_file(path), None, {}
        try:
            data = _read_file(fs, f"{root}/{path}", partition.num_bytes)
            if num_names > MAX_MEMBER_NAMES:
                raise ValueError(f"over {MAX_MEMBER_NAMES} kinds of members in one partition")
            for name, beside in images[path].items():
                members[name] = member_value(name, _read_file(fs, f"{root}/{beside}", partition.num_bytes))
        except FileNotFoundError:
            error = "file has disappeared" if data is None else "a member has disappeared"
            return Reject(key=key, source=partition.source, stage="read", error=error, image=data)
        except ValueError as error:
            return Reject(key=key, source=partition.source, stage="read", error=str(error), image=data)
        return Sample(key=key, source=partition.source, image=data, members=members)

    mean_num_bytes = partition.num_bytes / max(1, len(images))
    if isinstance(fs, LocalFileSystem) or mean_num_bytes > _MAX_MEAN_BYTES_AHEAD:
        yield from map(read, images)
        return
    # An object store answers each request late, and many at a time.
    with ThreadPoolExecutor(_FILES_AHEAD, thread_name_prefix="cotam-files") as executor:
        yield from ordered_map(executor, read, images, 2 * _FILES_AHEAD)


def _read_file(fs: AbstractFileSystem, path: str, partition_num_bytes: int) -> bytes:
    """The bytes of a loose file. Raises ValueError where another try would not help."""
    check_regular(fs, path)
    if partition_num_bytes > MAX_SAMPLE_BYTES and fs.size(path) > MAX_SAMPLE_BYTES:
        raise ValueError(f"over {MAX_SAMPLE_BYTES} bytes")
    try:
        return bytes(fs.cat_file(path))
    except PermissionError:
        if isinstance(fs, LocalFileSystem):  # on an object store it may be the credentials, and so every file
            raise ValueError("no permission to read the file") from None
        raise


def _read_parquet(partition: Partition) -> Iterator[Sample | Reject]:
    source, column, (first, end) = partition.source, partition.image_column, partition.row_groups
    with SourceFile(source) as file:
        with _arrow_errors(file):
            # With pre_buffer, or without a buffer's size, the first row fetches its column of the whole row group.
            parquet = pq.ParquetFile(
                file, page_checksum_verification=True, pre_buffer=False, buffer_size=_PARQUET_BUFFER_BYTES
            )
            schema, metadata = parquet.schema_arrow, parquet.metadata
        keys = key_column(schema)
        if column not in schema.names:
            raise ValueError(f"{source} has no column {column!r} any more")
        if end > metadata.num_row_groups:
            raise ValueError(f"{source} has {metadata.num_row_groups} row groups, fewer than when it was listed")
        batch_rows = 1 if _holds_image_lists(schema.field(column).type) else _PARQUET_BATCH_ROWS
        row = sum(metadata.row_group(k).num_rows for k in range(first))
        stem, folders = PurePosixPath(source).stem, hive_columns(source)
        for k in range(first, end):
            last = row + metadata.row_group(k).num_rows
            try:
                for values, problem in _rows(parquet, k, batch_rows):
                    yield from _parquet_items({**folders, **values}, problem, source, column, keys, f"{stem}-{row:09d}")
                    row += 1
                reason = "fewer rows than its footer says"
            except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
                if file.error is not None:
                    raise file.error from None
                reason = one_line(error)
            if last - row > _MAX_LOST_ROWS:
                raise ValueError(f"row group {k} is damaged, {last - row} rows from row {row} on: {reason}")
            for lost in range(row, last):
                error_text = f"row group {k} is damaged: {reason}"
                yield Reject(key=f"{stem}-{lost:09d}", source=source, stage="read", error=error_text)
            row = last


def _rows(parquet: pq.ParquetFile, row_group: int, batch_rows: int) -> Iterator[tuple[dict[str, Any], str | None]]:
    """The rows of a row group; of one with values that Python cannot have, as text that is no UTF-8, the others."""
    for batch in parquet.iter_batches(batch_size=batch_rows, row_groups=[row_group]):
        batch = _without_extensions(batch)
        try:
            for values in batch.to_pylist():
                yield values, None
        except (pa.ArrowException, ValueError, OverflowError):
            for k in range(batch.num_rows):
                yield _row(batch, k)


def _row(batch: pa.RecordBatch, k: int) -> tuple[dict[str, Any], str | None]:
    values: dict[str, Any] = {}
    problem = None
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column[k].as_py()
        except (pa.ArrowException, ValueError, OverflowError) as error:
            problem = f"row cannot be read: {one_line(error)} (column {name})"
    return values, problem


def _without_extensions(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Columns of extension types as what is stored of them, which is what members are stored as."""
    if not any(isinstance(kind, pa.BaseExtensionType) for kind in batch.schema.types):
        return batch
    columns = [c.storage if isinstance(c.type, pa.BaseExtensionType) else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _parquet_items(
    values: dict[str, Any], problem: str | None, source: str, column: str, keys: str | None, default_key: str
) -> Iterator[Sample | Reject]:
    """The images of a row: one, or where the column has lists several, with the same members.

    Those of a list have the row's key with -0, -1, ... behind it, or the names that they have themselves.
    """
    key = values.pop(keys, None) if keys is not None else None
    content = values.pop(column, None)
    if not isinstance(content, list):
        yield _parquet_item(content, key, values, problem, source, column, default_key)
        return
    for k, image in enumerate(content or [None]):  # a row without any is a reject
        in_row = None if key is None or key == "" else f"{key}-{k}"
        yield _parquet_item(image, in_row, values, problem, source, column, f"{default_key}-{k}")


def _parquet_item(
    image: Any, key: Any, members: dict[str, Any], problem: str | None, source: str, column: str, default_key: str
) -> Sample | Reject:
    if isinstance(image, dict) and isinstance(image.get("path"), str):  # as Hugging Face's datasets have it
        key = image["path"] if key is None else key
    key = default_key if key is None or key == "" else str(key)
    image = image.get("bytes") if isinstance(image, dict) else image
    if image is not None and len(image) > MAX_SAMPLE_BYTES:
        image, problem = None, f"over {MAX_SAMPLE_BYTES} bytes"
    if image is None or problem is not None:
        problem = problem or f"no image in column {column}"
        return Reject(key=key, source=source, stage="read", error=problem, image=image)
    return Sample(key=key, source=source, image=image, members=members)


@contextmanager
def _arrow_errors(file: SourceFile) -> Iterator[None]:
    """Of what Arrow raises, only a failed read stays an OSError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if file.error is not None:
            raise file.error from None
        raise ValueError(f"not a Parquet file that can be read: {one_line(error)}") from None


# A new kind also needs its listing in pipelines/sources.py and, to find a row's original again, ``find_sample``.
_READERS: dict[str, Callable[[Partition], Iterator[Sample | Reject]]] = {
    "tar": lambda partition: read_tar(partition.source),
    "files": _read_files,
    "parquet": _read_parquet,
}
