"""From what a user names as SRC to partitions: tars with braces and globs, folders of images, Parquet files."""

from __future__ import annotations

import glob
import logging
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath

import braceexpand
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from cotam.memory import return_freed_memory, use_malloc_for_arrow
from cotam.store.fs import File, find_files, glob_files, is_transient, one_file, split_uri
from cotam.store.partitions import Partition, Partitions, partition_id
from cotam.store.readers import TAR_SUFFIXES, image_column, parquet_metadata
from cotam.store.tars import IMAGE_EXTENSIONS

FILES_PER_PARTITION = 500  # on average; half to twice as many
_MIN_NAMES_TO_LIST_FOLDER = 16
_FOOTERS_AT_A_TIME = 32
PARQUET_PARTITION_BYTES = 128 * 2**20
# Image files that no tar member is recognised by, or that cannot be decoded: each becomes a row or a reject.
_OTHER_EXTENSIONS = ("jpe", "pgm", "pnm", "pbm", "heic", "heif", "jp2", "jxl")
_MAX_LEFT_OUT = 8  # extensions that are named
# Folders in which other programs keep their books. Names of cameras' images start with "_", too.
_BOOKS = ("_temporary", "_delta_log", "_spark_metadata")

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


def _find_partitions(source: str, wanted_image_column: str | None) -> Iterator[Partition]:
    patterns = _expand_braces(source)
    folders = _list_once(patterns)
    for pattern in patterns:
        fs, path = split_uri(pattern)
        siblings = folders.get(pattern.rpartition("/")[0])
        files: Iterable[File]
        if siblings is not None and path in siblings:
            files = [siblings[path]]
        elif _has_magic(path) and not (isinstance(fs, LocalFileSystem) and fs.exists(path)):  # a name may have brackets
            files = glob_files(fs, path)
        elif fs.isdir(path):
            yield from _list_folder(fs, path, pattern, wanted_image_column)
            continue
        else:
            try:
                files = [one_file(fs, path)]
            except FileNotFoundError:
                raise SourceError(f"{pattern} does not exist") from None
        found = False
        for file, footer in _with_footers(fs, files):
            found = True
            yield from _list_file(fs, file, footer, wanted_image_column)
        if not found:
            raise SourceError(f"no file matches {pattern}")


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
    return any(c in path for c in "*?[")


def _expand_braces(source: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(source))
    except braceexpand.UnbalancedBracesError:
        raise SourceError(f"unbalanced braces in {source}") from None


def _list_folder(fs: AbstractFileSystem, path: str, uri: str, wanted: str | None) -> Iterator[Partition]:
    found = False  # tars or Parquet files
    stores: set[str] = set()  # folders below this one that hold the output of a job
    images: list[tuple[str, int, str]] = []
    found_images = False
    left_out: Counter[str] = Counter()  # files by extension
    for file, footer in _with_footers(fs, find_files(fs, path)):
        name = _relative(file.name, path)
        folders = name.split("/")[:-1]
        if "_cotam" in folders:  # sorted before what belongs to it
            stores.add("/".join([*folders[: folders.index("_cotam")], "data"]))
        inside = ("/".join(folders[: k + 1]) for k in range(len(folders)))
        is_book = any(part in (*_BOOKS, "_cotam") or part.startswith(".") for part in name.split("/"))
        if is_book or not stores.isdisjoint(inside):
            continue
        if name.lower().endswith((*TAR_SUFFIXES, ".parquet")):
            found = True
            yield from _list_file(fs, file, footer, wanted)
        elif name.lower().rsplit(".", 1)[-1] in (*IMAGE_EXTENSIONS, *_OTHER_EXTENSIONS):
            images.append((name, file.num_bytes, file.version))
            found_images = True
        else:
            left_out[PurePosixPath(name).suffix or "without an extension"] += 1
        if found and found_images:
            raise SourceError(
                f"{uri} holds images beside tars or Parquet files; name the one or the other, as in {uri}/*.tar"
            )
        if images and _ends_partition(len(images), images[-1][0]):
            yield _image_partition(fs, path, images)
            images = []
    if images:
        yield _image_partition(fs, path, images)
    if left_out and found_images:  # captions, perhaps; beside tars there may be anything
        counts = ", ".join(f"{num} {suffix}" for suffix, num in left_out.most_common(_MAX_LEFT_OUT))
        _log.warning("left out of %s: %s", uri, counts)
    if not (found or found_images):
        if stores:
            raise SourceError(f"{uri} is the output of a job; name its data, as in {uri}/data, or its source")
        raise SourceError(
            f"no tar, Parquet or image file in {uri}; looked for .tar, .parquet, .{', .'.join(IMAGE_EXTENSIONS)}"
        )


def _ends_partition(num_images: int, last: str) -> bool:
    """Whether a partition ends after so many images: mostly at a name whose hash is 0, not at a count.

    So one image more in a folder changes its own partition only (content-defined chunking), and the others stay done.
    """
    half = FILES_PER_PARTITION // 2
    says_so = zlib.crc32(last.encode(errors="surrogateescape")) % half == 0
    return num_images >= 2 * FILES_PER_PARTITION or (num_images >= half and says_so)


def _image_partition(fs: AbstractFileSystem, folder: str, images: list[tuple[str, int, str]]) -> Partition:
    """Names below ``folder``, sizes and versions of some images."""
    stem = f"{PurePosixPath(folder).name}-{images[0][0]}"  # ids in the order of names
    return Partition(
        partition_id=partition_id(stem, [(_uri(fs, folder),), *images]),
        kind="files",
        source=_uri(fs, folder),
        paths=tuple(name for name, _, _ in images),
        num_bytes=sum(num_bytes for _, num_bytes, _ in images),
    )


def _with_footers(fs: AbstractFileSystem, files: Iterable[File]) -> Iterator[tuple[File, _Footer | None]]:
    """Files in order, with what Parquet files say of themselves; on an object store that is a request or two each."""
    with ThreadPoolExecutor(_FOOTERS_AT_A_TIME, thread_name_prefix="cotam-footers") as executor:
        ahead: deque[tuple[File, _Footer | None]] = deque()
        try:
            for file in files:
                is_parquet = file.name.lower().endswith(".parquet")
                ahead.append((file, executor.submit(parquet_metadata, _uri(fs, file.name)) if is_parquet else None))
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
    source = _uri(fs, file.name)
    if footer is not None:
        yield from _list_parquet(file, source, footer, wanted)
    elif name.lower().endswith(TAR_SUFFIXES):
        stem, identity = name[: name.lower().rindex(".t")], [(source, file.num_bytes, file.version)]
        yield Partition(partition_id=partition_id(stem, identity), kind="tar", source=source, num_bytes=file.num_bytes)
    else:
        raise SourceError(f"{source} is neither a tar nor a Parquet file nor a folder")


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


def _uri(fs: AbstractFileSystem, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))
