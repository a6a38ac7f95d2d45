"""From what a user names as SRC to partitions: tars with braces and globs, folders of images, Parquet files."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import braceexpand
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from cotam.memory import return_freed_memory
from cotam.store.fs import FileInfo, Files, find_files, glob_files, one_file, split_uri
from cotam.store.partitions import Partition, Partitions
from cotam.store.readers import TAR_SUFFIXES, image_column, parquet_metadata
from cotam.store.tars import IMAGE_EXTENSIONS

FILES_PER_PARTITION = 500
_LIST_ONCE = 16
PARQUET_PARTITION_BYTES = 128 * 2**20
# Images that are not read: listed all the same, so that each becomes a reject instead of being passed over.
_OTHER_EXTENSIONS = ("heic", "heif", "jp2", "jxl")


class SourceError(ValueError):
    """A SRC in which nothing can be found; the message says what was looked for."""


def list_partitions(source: str, wanted_image_column: str | None = None) -> Partitions:
    """Partitions of a source, in the order of its names.

    Args:
        source: a .tar or .parquet path with {00..99} braces or globs, or a folder of tars, of Parquet files or of
            images (searched recursively); local or on any fsspec URI.
        wanted_image_column: the image column of Parquet files, where it cannot be told.

    Raises:
        SourceError: nothing is found, or nothing but Parquet files that cannot be read. One such file among others is
            a partition that fails.
        ValueError: unknown protocol.
        OSError: the storage fails.
    """
    partitions = Partitions.of(_find_partitions(source, wanted_image_column))
    if not len(partitions):
        raise SourceError(f"{source} holds no rows")
    if all(p.problem for p in partitions):
        raise SourceError(f"{partitions[0].source}: {partitions[0].problem}")
    return_freed_memory()
    return partitions


def _find_partitions(source: str, wanted_image_column: str | None) -> Iterator[Partition]:
    patterns = _expand_braces(source)
    folders = _list_once(patterns)
    for pattern in patterns:
        fs, path = split_uri(pattern)
        siblings = folders.get(pattern.rpartition("/")[0])
        if siblings is not None and path in siblings:
            files = Files([path], siblings.__getitem__)
        elif _has_magic(path):
            files = glob_files(fs, path)
            if not files.names:
                raise SourceError(f"no file matches {pattern}")
        elif fs.isdir(path):
            yield from _list_folder(fs, path, pattern, wanted_image_column)
            continue
        else:
            try:
                files = one_file(fs, path)
            except FileNotFoundError:
                raise SourceError(f"{pattern} does not exist") from None
        for name in files.names:
            yield from _list_file(fs, name, files.info(name), wanted_image_column)


def _list_once(patterns: list[str]) -> dict[str, dict[str, FileInfo]]:
    """The files of folders of which many are named: asking for each by itself is a request a file."""
    counts = Counter(p.rpartition("/")[0] for p in patterns if not _has_magic(p))
    folders = {}
    for folder, count in counts.items():
        if folder and count > _LIST_ONCE:
            fs, path = split_uri(folder)
            names, info = glob_files(fs, f"{glob.escape(path)}/*")
            folders[folder] = {name: info(name) for name in names}
    return folders


def _has_magic(path: str) -> bool:
    return any(c in path for c in "*?[")


def _expand_braces(source: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(source))
    except braceexpand.UnbalancedBracesError:
        raise SourceError(f"unbalanced braces in {source}") from None


def _list_folder(fs: AbstractFileSystem, path: str, uri: str, wanted: str | None) -> Iterator[Partition]:
    found, info = find_files(fs, path)
    names = [n for n in found if not any(part.startswith((".", "_")) for part in _relative(n, path).split("/"))]
    containers = [n for n in names if n.lower().endswith((*TAR_SUFFIXES, ".parquet"))]
    images = [n for n in names if n.lower().rsplit(".", 1)[-1] in (*IMAGE_EXTENSIONS, *_OTHER_EXTENSIONS)]
    if containers and images:
        raise SourceError(
            f"{uri} holds images beside tars or Parquet files; name the one or the other, as in {uri}/*.tar"
        )
    if containers:
        for name in containers:
            yield from _list_file(fs, name, info(name), wanted)
        return
    if not images:
        raise SourceError(
            f"no tar, Parquet or image file in {uri}; looked for .tar, .parquet, .{', .'.join(IMAGE_EXTENSIONS)}"
        )
    source = _uri(fs, path)
    for k in range(0, len(images), FILES_PER_PARTITION):
        run = [(_relative(n, path), *info(n)) for n in images[k : k + FILES_PER_PARTITION]]
        yield Partition(
            partition_id=_partition_id(f"{PurePosixPath(path).name}-{k // FILES_PER_PARTITION:06d}", run),
            kind="files",
            source=source,
            paths=tuple(name for name, _, _ in run),
            num_bytes=sum(num_bytes for _, num_bytes, _ in run),
        )


def _list_file(fs: AbstractFileSystem, path: str, info: FileInfo, wanted: str | None) -> Iterator[Partition]:
    name = PurePosixPath(path).name
    source = _uri(fs, path)
    if name.lower().endswith(".parquet"):
        yield from _list_parquet(path, info, source, wanted)
    elif name.lower().endswith(TAR_SUFFIXES):
        partition_id = _partition_id(name[: name.lower().rindex(".t")], [(source, *info)])
        yield Partition(partition_id=partition_id, kind="tar", source=source, num_bytes=info.num_bytes)
    else:
        raise SourceError(f"{source} is neither a tar nor a Parquet file nor a folder")


def _list_parquet(path: str, info: FileInfo, source: str, wanted: str | None) -> Iterator[Partition]:
    def partition(groups: tuple[int, int], column: str, num_bytes: int, problem: str = "") -> Partition:
        identity = [(source, *info, *groups, column)]
        return Partition(
            partition_id=_partition_id(f"{PurePosixPath(path).stem}-{groups[0]:05d}", identity),
            kind="parquet",
            source=source,
            row_groups=groups,
            image_column=column,
            num_bytes=num_bytes,
            problem=problem,
        )

    try:
        metadata = parquet_metadata(source)
        column = image_column(metadata.schema.to_arrow_schema(), wanted)
    except ValueError as error:
        yield partition((0, 0), wanted or "", info.num_bytes, str(error))
        return
    first, num_bytes = 0, 0
    for k in range(metadata.num_row_groups):
        num_bytes += metadata.row_group(k).total_byte_size
        if num_bytes >= PARQUET_PARTITION_BYTES or k == metadata.num_row_groups - 1:
            yield partition((first, k + 1), column, num_bytes)
            first, num_bytes = k + 1, 0


def _partition_id(stem: str, identity: list[tuple[Any, ...]]) -> str:
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', stem)[:48]}-{digest}"


def _relative(name: str, folder: str) -> str:
    return name[len(folder.rstrip("/")) + 1 :]


def _uri(fs: AbstractFileSystem, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))
