"""From what a user names as SRC to partitions: tars with braces and globs, folders of images, Parquet files."""

from __future__ import annotations

import glob
import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, groupby
from pathlib import PurePosixPath
from typing import NamedTuple

import braceexpand
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from cotam.memory import return_freed_memory, use_malloc_for_arrow
from cotam.store.fs import File, find_files, glob_files, is_transient, one_file, split_uri, uri_of
from cotam.store.partitions import Partition, Partitions, partition_id
from cotam.store.readers import TAR_SUFFIXES, image_column, image_columns, parquet_metadata
from cotam.store.tars import IMAGE_EXTENSIONS, extension_of
from pipelines.image_runs import ImageRuns

_MIN_NAMES_TO_LIST_FOLDER = 16
_FOOTERS_AT_A_TIME = 32
PARQUET_PARTITION_BYTES = 128 * 2**20
_MAX_LEFT_OUT = 8  # extensions that are named
# Folders in which other programs keep their books. Names of cameras' images start with "_", too.
_BOOKS = ("_temporary", "_spark_metadata")
# Formats of tables whose folders also hold files that the table does not refer to any more, by a folder of theirs.
_TABLES = {"_delta_log": "a Delta", ".hoodie": "a Hudi"}
_MAGIC = "*?["

_Footer = Future[pq.FileMetaData]
_log = logging.getLogger(__name__)


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
    use_malloc_for_arrow()
    partitions = _without_repeats(Partitions.of(_find_partitions(source, wanted_image_column)))
    if not len(partitions):
        raise SourceError(f"{source} holds no rows")
    if all(p.problem for p in partitions):
        raise SourceError(f"{partitions[0].source}: {partitions[0].problem}")
    return_freed_memory()
    return partitions


def _without_repeats(partitions: Partitions) -> Partitions:
    """Each partition once: braces and globs may name a file twice."""
    if pc.count_distinct(partitions.ids).as_py() == len(partitions):
        return partitions
    by_id: dict[str, Partition] = {}
    for partition in partitions:
        by_id.setdefault(partition.partition_id, partition)
    return Partitions.of(by_id.values())


def _find_partitions(source: str, wanted: str | None) -> Iterator[Partition]:
    patterns = _expand_braces(source)
    folders = _list_once(patterns)
    parsed = (_parse(pattern, folders) for pattern in patterns)
    for (kind, folder), group in groupby(parsed, lambda pattern: (pattern.kind, pattern.folder)):
        if kind == "files":  # together: many names of one folder may be images, which are no partition each
            first = next(group)
            files = (pattern.file for pattern in chain([first], group) if pattern.file is not None)
            yield from _partitions_of(first.fs, first.path.rpartition("/")[0], folder, files, wanted, all_named=True)
            continue
        list_all = _list_matches if kind == "glob" else _list_folder
        for pattern in group:
            yield from list_all(pattern.fs, pattern.path, pattern.uri, wanted)


class _Pattern(NamedTuple):
    """What one of the names that braces make is: "files", with the file, "folder" or "glob"."""

    kind: str
    folder: str
    uri: str
    fs: AbstractFileSystem
    path: str
    file: File | None = None


def _parse(uri: str, folders: Mapping[str, Mapping[str, File]]) -> _Pattern:
    """Raises SourceError where there is no such file."""
    fs, path = split_uri(uri)
    folder = uri.rpartition("/")[0]
    if (file := folders.get(folder, {}).get(path)) is not None:
        return _Pattern("files", folder, uri, fs, path, file)
    if _has_magic(path) and not (isinstance(fs, LocalFileSystem) and fs.exists(path)):  # a name may have brackets
        return _Pattern("glob", folder, uri, fs, path)
    if fs.isdir(path):
        return _Pattern("folder", folder, uri, fs, path)
    try:
        return _Pattern("files", folder, uri, fs, path, one_file(fs, path))
    except FileNotFoundError:
        raise SourceError(f"{uri} does not exist") from None


def _list_matches(fs: AbstractFileSystem, path: str, pattern: str, wanted: str | None) -> Iterator[Partition]:
    """What a glob names: files, or where it matches none, or ends with "/", folders."""
    root = path[: min(path.index(c) for c in _MAGIC if c in path)].rpartition("/")[0]
    found = False
    files = iter(()) if pattern.endswith("/") else glob_files(fs, path)
    for partition in _partitions_of(fs, root, pattern, files, wanted):
        found = True
        yield partition
    if not found:
        folders = sorted(folder for folder in fs.glob(path.rstrip("/")) if fs.isdir(folder))
        if not folders:
            raise SourceError(f"no file matches {pattern}")
        for folder in folders:
            yield from _list_folder(fs, folder, uri_of(fs, folder), wanted)


def _list_once(patterns: list[str]) -> dict[str, dict[str, File]]:
    """The files of folders of which many are named: asking for each by itself is a request a file."""
    counts = Counter(p.rpartition("/")[0] for p in patterns if not _has_magic(p))
    folders = {}
    for folder, count in counts.items():
        if folder and count > _MIN_NAMES_TO_LIST_FOLDER:
            fs, path = split_uri(folder)
            folders[folder] = {file.name: file for file in glob_files(fs, f"{glob.escape(path)}/*")}
    return folders


def _has_magic(path: str) -> bool:
    return any(c in path for c in _MAGIC)


def _expand_braces(source: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(source))
    except braceexpand.UnbalancedBracesError:
        raise SourceError(f"unbalanced braces in {source}") from None


def _list_folder(fs: AbstractFileSystem, path: str, uri: str, wanted: str | None) -> Iterator[Partition]:
    stores: set[str] = set()  # folders below this one that hold the output of a job
    found = False
    for partition in _partitions_of(fs, path, uri, _without_books(find_files(fs, path), path, uri, stores), wanted):
        found = True
        yield partition
    if not found and stores:
        raise SourceError(f"{uri} is the output of a job; name its data, as in {uri}/data, or its source")
    if not found:
        raise SourceError(
            f"no tar, Parquet or image file in {uri}; looked for .tar, .parquet, .{', .'.join(IMAGE_EXTENSIONS)}"
        )


def _without_books(files: Iterable[File], root: str, uri: str, stores: set[str]) -> Iterator[File]:
    """Without hidden files, other programs' books and the output of jobs, whose folders are added to ``stores``."""
    for file in files:
        parts = _relative(file.name, root).split("/")
        if table := next((kind for mark, kind in _TABLES.items() if mark in parts[:-1]), None):
            raise SourceError(
                f"{uri} is {table} table, whose files hold rows that are deleted from it: export it to Parquet, or name"
                " the files that count"
            )
        if "_cotam" in parts[:-1]:  # sorted before what belongs to it
            stores.add("/".join([*parts[: parts.index("_cotam")], "data"]))
        inside = ("/".join(parts[: k + 1]) for k in range(len(parts) - 1))
        is_book = any(part in (*_BOOKS, "_cotam") or part.startswith(".") for part in parts)
        if not is_book and stores.isdisjoint(inside):
            yield file


def _partitions_of(
    fs: AbstractFileSystem, root: str, uri: str, files: Iterable[File], wanted: str | None, all_named: bool = False
) -> Iterator[Partition]:
    """Partitions of files below ``root``, in order: tars and Parquet files, or runs of images and what is beside them.

    What is neither is left out aloud; with ``all_named`` it is an error.
    """
    found = False  # tars or Parquet files with images
    images = ImageRuns(fs, root)
    tables: list[tuple[File, _Footer]] = []  # without images
    for file, footer in _with_footers(fs, files):
        name = _relative(file.name, root)
        if footer is not None and wanted is None and not all_named and _has_no_images(footer):
            tables.append((file, footer))
        elif footer is not None or name.lower().endswith(TAR_SUFFIXES):
            found = True
            yield from _list_file(fs, file, footer, wanted)
        else:
            if all_named and extension_of(name) not in IMAGE_EXTENSIONS:
                raise SourceError(
                    f"{uri_of(fs, file.name)} is neither a tar nor a Parquet file nor an image nor a folder"
                )
            yield from images.add(name, file)
        if found and images.found:
            raise SourceError(
                f"{uri} holds images beside tars or Parquet files; name the ones or the others, as in {uri}/**/*.jpg"
            )
    yield from images.rest()
    if not (found or images.found):
        for file, footer in tables:
            yield from _list_parquet(file, uri_of(fs, file.name), footer, wanted)
    elif tables:
        images.left_out[".parquet (without images)"] = len(tables)
    if images.left_out and (images.found or tables):  # beside tars there may be anything
        counts = ", ".join(f"{num} {suffix}" for suffix, num in images.left_out.most_common(_MAX_LEFT_OUT))
        _log.warning("left out of %s: %s", uri, counts)


def _has_no_images(footer: _Footer) -> bool:
    """Whether a Parquet file is metadata: that of one that cannot be read is told later."""
    try:
        return not image_columns(footer.result().schema.to_arrow_schema())
    except (ValueError, OSError):
        return False


def _with_footers(fs: AbstractFileSystem, files: Iterable[File]) -> Iterator[tuple[File, _Footer | None]]:
    """Files in order, with what Parquet files say of themselves; on an object store that is a request or two each."""
    with ThreadPoolExecutor(_FOOTERS_AT_A_TIME, thread_name_prefix="cotam-footers") as executor:
        ahead: deque[tuple[File, _Footer | None]] = deque()
        try:
            for file in files:
                is_parquet = file.name.lower().endswith(".parquet")
                ahead.append((file, executor.submit(parquet_metadata, uri_of(fs, file.name)) if is_parquet else None))
                if len(ahead) > _FOOTERS_AT_A_TIME:
                    yield ahead.popleft()
            while ahead:
                yield ahead.popleft()
        finally:
            for _, footer in ahead:
                if footer is not None:
                    footer.cancel()


def _list_file(fs: AbstractFileSystem, file: File, footer: _Footer | None, wanted: str | None) -> Iterator[Partition]:
    name = PurePosixPath(file.name).name
    source = uri_of(fs, file.name)
    if footer is not None:
        yield from _list_parquet(file, source, footer, wanted)
    else:
        stem, identity = name[: name.lower().rindex(".t")], [(source, file.num_bytes, file.version)]
        yield Partition(partition_id=partition_id(stem, identity), kind="tar", source=source, num_bytes=file.num_bytes)


def _list_parquet(file: File, source: str, footer: _Footer, wanted: str | None) -> Iterator[Partition]:
    def partition(groups: tuple[int, int], column: str, num_bytes: int, problem: str = "") -> Partition:
        identity = [(source, file.num_bytes, file.version, *groups, column)]
        return Partition(
            partition_id=partition_id(f"{PurePosixPath(file.name).stem}-{groups[0]:05d}", identity),
            kind="parquet",
            source=source,
            row_groups=groups,
            image_column=column,
            num_bytes=num_bytes,
            problem=problem,
        )

    try:
        metadata = footer.result()
        column = image_column(metadata.schema.to_arrow_schema(), wanted)
    except (ValueError, OSError) as error:
        if is_transient(error):
            raise
        yield partition((0, 0), wanted or "", file.num_bytes, str(error))
        return
    first, num_bytes = 0, 0
    for k in range(metadata.num_row_groups):
        num_bytes += metadata.row_group(k).total_byte_size
        if num_bytes >= PARQUET_PARTITION_BYTES or k == metadata.num_row_groups - 1:
            yield partition((first, k + 1), column, num_bytes)
            first, num_bytes = k + 1, 0


def _relative(name: str, folder: str) -> str:
    return name[len(folder.rstrip("/")) + 1 :]
