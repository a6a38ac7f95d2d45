"""From what a user names as SRC to partitions: tars with braces and globs, folders of images, Parquet files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

import braceexpand
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from cotam.store.fs import split_uri
from cotam.store.readers import IMAGE_EXTENSIONS, Partition, image_column

FILES_PER_PARTITION = 500
PARQUET_PARTITION_BYTES = 128 * 2**20
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class SourceError(ValueError):
    """A SRC in which nothing can be found; the message says what was looked for."""


def list_partitions(source: str, wanted_image_column: str | None = None) -> list[Partition]:
    """Partitions of a source, in the order of its names.

    Args:
        source: a .tar or .parquet path with {00..99} braces or globs, or a folder of tars, of Parquet files or of
            images (searched recursively); local or on any fsspec URI.
        wanted_image_column: the image column of Parquet files, where it cannot be told.

    Raises:
        SourceError: nothing is found.
        ValueError: unknown protocol, or a Parquet file without an image column.
    """
    partitions: list[Partition] = []
    for pattern in _expand_braces(source):
        fs, path = split_uri(pattern)
        if any(c in path for c in "*?["):
            files = {name: info for name, info in fs.glob(path, detail=True).items() if info["type"] == "file"}
            if not files:
                raise SourceError(f"no file matches {pattern}")
        elif fs.isdir(path):
            partitions += _list_folder(fs, path, pattern, wanted_image_column)
            continue
        else:
            try:
                files = {path: fs.info(path)}
            except FileNotFoundError:
                raise SourceError(f"{pattern} does not exist") from None
        for name in sorted(files):
            partitions += _list_file(fs, name, files[name], wanted_image_column)
    return partitions


def _expand_braces(source: str) -> Iterable[str]:
    try:
        return list(braceexpand.braceexpand(source))
    except braceexpand.UnbalancedBracesError:
        raise SourceError(f"unbalanced braces in {source}") from None


def _list_folder(fs: AbstractFileSystem, path: str, uri: str, wanted: str | None) -> list[Partition]:
    found: dict[str, dict[str, Any]] = fs.find(path, detail=True)
    files = {
        n: i for n, i in found.items() if not any(part.startswith((".", "_")) for part in _relative(n, path).split("/"))
    }
    containers = sorted(n for n in files if n.lower().endswith((*_TAR_SUFFIXES, ".parquet")))
    if containers:
        return [p for name in containers for p in _list_file(fs, name, files[name], wanted)]
    images = sorted(n for n in files if n.lower().rsplit(".", 1)[-1] in IMAGE_EXTENSIONS)
    if not images:
        raise SourceError(
            f"no tar, Parquet or image file in {uri}; looked for .tar, .parquet, .{', .'.join(IMAGE_EXTENSIONS)}"
        )
    runs = [images[k : k + FILES_PER_PARTITION] for k in range(0, len(images), FILES_PER_PARTITION)]
    source = _uri(fs, path)
    return [
        Partition(
            partition_id=_partition_id(
                f"{PurePosixPath(path).name}-{k:06d}", [(_relative(n, path), *_version(files[n])) for n in run]
            ),
            kind="files",
            source=source,
            paths=tuple(_relative(n, path) for n in run),
            num_bytes=sum(files[n]["size"] for n in run),
        )
        for k, run in enumerate(runs)
    ]


def _list_file(fs: AbstractFileSystem, path: str, info: dict[str, Any], wanted: str | None) -> list[Partition]:
    name = PurePosixPath(path).name
    source = _uri(fs, path)
    if name.lower().endswith(".parquet"):
        return _list_parquet(fs, path, source, info, wanted)
    if name.lower().endswith(_TAR_SUFFIXES):
        identity = [(source, *_version(info))]
        stem = name[: name.lower().index(".t")]
        return [
            Partition(partition_id=_partition_id(stem, identity), kind="tar", source=source, num_bytes=info["size"])
        ]
    raise SourceError(f"{source} is neither a tar nor a Parquet file nor a folder")


def _list_parquet(
    fs: AbstractFileSystem, path: str, source: str, info: dict[str, Any], wanted: str | None
) -> list[Partition]:
    try:
        with fs.open(path, "rb") as file:
            metadata = pq.read_metadata(file)
        column = image_column(metadata.schema.to_arrow_schema(), wanted)
    except (OSError, ValueError) as error:
        raise SourceError(f"{source}: {error}") from None
    partitions, first, num_bytes = [], 0, 0
    for k in range(metadata.num_row_groups):
        num_bytes += metadata.row_group(k).total_byte_size
        if num_bytes >= PARQUET_PARTITION_BYTES or k == metadata.num_row_groups - 1:
            groups = (first, k + 1)
            partitions.append(
                Partition(
                    partition_id=_partition_id(
                        f"{PurePosixPath(path).stem}-{first:05d}", [(source, *_version(info), *groups, column)]
                    ),
                    kind="parquet",
                    source=source,
                    row_groups=groups,
                    image_column=column,
                    num_bytes=num_bytes,
                )
            )
            first, num_bytes = k + 1, 0
    return partitions


def _partition_id(stem: str, identity: list[tuple[Any, ...]]) -> str:
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', stem)[:48]}-{digest}"


def _version(info: dict[str, Any]) -> tuple[int, str]:
    """Size and version of a file: the etag on object stores, the time of modification elsewhere."""
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    return int(info["size"]), str(etag or info.get("mtime") or info.get("LastModified") or "")


def _relative(name: str, folder: str) -> str:
    return name[len(folder.rstrip("/")) + 1 :]


def _uri(fs: AbstractFileSystem, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))
