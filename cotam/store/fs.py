"""One thin wrapper around fsspec: a root URI, paths below it, and atomic writes."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem
from fsspec.utils import glob_translate

from cotam.credentials import redact, refuse_credentials

_FILES_AT_A_TIME = 500
_MAX_JSON_BYTES = 2**24  # of a manifest or record: whoever may write to a store must not fill its readers' memory
_FINAL = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
for _protocol in ("s3", "s3a"):
    fsspec.register_implementation(_protocol, "cotam.store.s3.S3", clobber=True)


class Root:
    """A folder on any filesystem; every path argument is relative to it, with "/" between parts.

    Args:
        uri: a local path or any fsspec URI (s3://bucket/prefix, gs://, az://, memory://).

    Raises:
        ValueError: no filesystem is known for the URI's protocol.
    """

    def __init__(self, uri: str) -> None:
        self.fs, self.path = split_uri(uri.rstrip("/") or uri)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.uri = self.path if self.is_local else uri.rstrip("/")  # absolute: workers run elsewhere

    def join(self, path: str) -> str:
        """The full path of ``path`` on the filesystem."""
        return f"{self.path}/{path}"

    def exists(self, path: str) -> bool:
        """Whether the file is there."""
        return bool(self.fs.exists(self.join(path)))

    def read(self, path: str) -> bytes:
        """The file's bytes. Raises FileNotFoundError."""
        return bytes(self.fs.cat_file(self.join(path)))

    def list(self, folder: str) -> Iterator[str]:
        """Names of the files directly in ``folder``, in no order; none when there is no such folder."""
        with contextlib.suppress(FileNotFoundError):
            if self.is_local:
                with os.scandir(self.join(folder)) as found:
                    yield from (e.name for e in found if e.is_file() and not e.name.startswith("."))
            else:
                paths = (file.name for file in _scan(self.fs, self.join(folder), recursive=False))
                names = (path.rsplit("/", 1)[-1] for path in paths)
                yield from (name for name in names if not name.startswith("."))

    def write(self, path: str, data: bytes) -> None:
        """Write a file so that readers see the whole of it or nothing."""
        target = self.join(path)
        if not self.is_local:
            self.fs.pipe_file(target, data)  # a single PUT
            return
        with _becoming(target) as temporary, open(temporary, "wb") as file:
            file.write(data)

    def create_json(self, path: str, value: Any) -> None:
        """Write JSON that must not be there yet; of several that try at once one succeeds.

        A filesystem that cannot say so replaces it.

        Raises:
            FileExistsError: it is there; on an object store perhaps by this very call, if an answer to it was lost.
        """
        target, data = self.join(path), _json_bytes(value)
        if not self.is_local:
            try:
                self.fs.pipe_file(target, data, mode="create")
            except (NotImplementedError, TypeError, ValueError):
                self.fs.pipe_file(target, data)
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                self.fs.pipe_file(target, data)
            return
        with _becoming(target, _link) as temporary, open(temporary, "wb") as file:
            file.write(data)

    def publish(self, local_file: Path, path: str) -> None:
        """Move a finished local file to ``path`` so that readers see the whole of it or nothing."""
        target = self.join(path)
        if not self.is_local:
            self.fs.put_file(str(local_file), target)  # objects appear when their upload is complete
            local_file.unlink()
            return
        with _becoming(target) as temporary:
            try:
                os.replace(local_file, temporary)
            except OSError:  # another device
                self.fs.put_file(str(local_file), temporary)
                local_file.unlink()

    def remove(self, path: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.join(path))

    def remove_folder(self, path: str) -> None:
        """Delete a folder with everything in it, if it is there."""
        if self.fs.isdir(target := self.join(path)):
            self.fs.rm(target, recursive=True)

    def read_json(self, path: str) -> Any:
        """The parsed JSON of a file. Raises FileNotFoundError, or ValueError for a file that is not JSON."""
        return self._parse(bytes(self.fs.cat_file(self.join(path), start=0, end=_MAX_JSON_BYTES)), path)

    def read_jsons(self, paths: Iterable[str], may_be_gone: bool = False) -> Iterator[Any]:
        """``read_json`` of many files, in order; object stores are asked for many at a time.

        ``may_be_gone``: None comes for a file that is not there.
        """
        remaining = iter(paths)
        while chunk := list(islice(remaining, _FILES_AT_A_TIME)):
            targets = [self.join(path) for path in chunk]
            contents = self.fs.cat_ranges(targets, 0, _MAX_JSON_BYTES, on_error="return")
            for path, content in zip(chunk, contents, strict=True):
                if may_be_gone and isinstance(content, FileNotFoundError):
                    yield None
                elif isinstance(content, BaseException):
                    raise content
                else:
                    yield self._parse(content, path)

    def _parse(self, content: bytes, path: str) -> Any:
        try:
            if len(content) >= _MAX_JSON_BYTES:
                raise ValueError(f"it has {_MAX_JSON_BYTES} bytes and more")
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.uri}/{path} is not JSON of a store: {error}") from None

    def write_json(self, path: str, value: Any) -> None:
        """Write JSON atomically, readable by people."""
        self.write(path, _json_bytes(value))


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


class File(NamedTuple):
    """Full name of a file, bytes, and its version: the etag on object stores, the time of modification elsewhere."""

    name: str
    num_bytes: int
    version: str


def find_files(fs: AbstractFileSystem, path: str) -> Iterator[File]:
    """All files below a folder, by name. Raises OSError for a folder that cannot be read."""
    if not isinstance(fs, LocalFileSystem):
        return _by_name(_scan(fs, path, recursive=True))

    def refuse(error: OSError) -> None:
        raise error

    def names() -> Iterator[str]:
        for folder, folders, files in os.walk(path, onerror=refuse, followlinks=True):
            folders[:] = [name for name in folders if not _is_loop(folder, name)]
            yield from (os.path.join(folder, name) for name in files)

    return _by_name(map(_local_file, names()))


def _is_loop(folder: str, name: str) -> bool:
    """Whether a folder in ``folder`` is a link to one that it is in, by this way: "latest" may be a link to "."."""
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return False
    real = os.path.realpath(path)
    way = [folder]
    while (above := os.path.dirname(way[-1])) != way[-1]:
        way.append(above)
    return any(os.path.realpath(above) == real for above in way)


def glob_files(fs: AbstractFileSystem, pattern: str) -> Iterator[File]:
    """All files whose path matches, by name."""
    if not isinstance(fs, LocalFileSystem):
        literal = pattern[: min(pattern.index(c) for c in "*?[" if c in pattern)]
        folder, _, start = literal.rpartition("/")
        rest = pattern[len(folder) + 1 :]
        matches = re.compile(glob_translate(pattern)).match
        found = _scan(fs, folder, recursive="/" in rest or "**" in rest, start=start)
        return _by_name(file for file in found if matches(file.name))
    return _by_name(_local_file(n) for n in glob.iglob(pattern, recursive=True) if not os.path.isdir(n))


def one_file(fs: AbstractFileSystem, path: str) -> File:
    """A file by its name. Raises FileNotFoundError."""
    return _file(path, fs.info(path))


def _scan(fs: AbstractFileSystem, path: str, recursive: bool, start: str = "") -> Iterator[File]:
    """The files in a folder, in no order; ``start`` may leave out those whose names do not start with it.

    fsspec alone would hold a kilobyte for each.
    """
    if hasattr(fs, "scan"):
        return (_file(name, info) for name, info in fs.scan(path, recursive, start))
    found = fs.find(path, maxdepth=None if recursive else 1, detail=True)
    return (_file(name, info) for name, info in found.items())


def _by_name(files: Iterator[File]) -> Iterator[File]:
    """Sorted, in columns meanwhile."""
    chunks = []
    while chunk := list(islice(files, _FILES_AT_A_TIME)):
        names = [file.name.encode(errors="surrogateescape") for file in chunk]
        sizes, versions = [file.num_bytes for file in chunk], [file.version for file in chunk]
        columns = pa.array(names, pa.large_binary()), sizes, pa.array(versions, pa.large_string())
        chunks.append(pa.table(columns, names=File._fields))
    if chunks:
        for batch in pa.concat_tables(chunks).sort_by("name").to_batches(_FILES_AT_A_TIME):
            for name, num_bytes, version in zip(*(column.to_pylist() for column in batch), strict=True):
                yield File(name.decode(errors="surrogateescape"), num_bytes, version)


def _file(name: str, info: dict[str, Any]) -> File:
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    return File(name, int(info["size"]), str(etag or info.get("mtime") or info.get("LastModified") or ""))


def _local_file(name: str) -> File:
    try:
        status = os.stat(name)
    except OSError:  # a link to nowhere or to itself: reading it says so
        return File(name, 0, "")
    return File(name, status.st_size, str(status.st_mtime))


@contextlib.contextmanager
def _becoming(target: str, become: Callable[[str, str], None] = os.replace) -> Iterator[str]:
    """A temporary file beside ``target`` that becomes it at the end; where that fails, a full disk for one, it goes."""
    head, tail = os.path.split(target)
    os.makedirs(head, exist_ok=True)
    temporary = os.path.join(head, f".{tail}.{uuid.uuid4().hex[:8]}.tmp")  # hidden: listings and datasets pass it over
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        become(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _link(temporary: str, target: str) -> None:
    """Give a file its name unless there is one of that name: FileExistsError; without hard links, replace that."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:
        os.replace(temporary, target)


def is_transient(error: BaseException) -> bool:
    """Whether what raised this may succeed another time: not a refusal, and nothing that is missing."""
    return isinstance(error, OSError) and not isinstance(error, _FINAL)


def split_uri(uri: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URI and the path on it. Raises ValueError for an unknown protocol, or credentials in it."""
    refuse_credentials(uri)
    if "://" not in uri and "::" in uri:  # to fsspec, a chain of filesystems; to others, a time of day
        return LocalFileSystem(), os.path.abspath(uri)
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {uri}: {redact(str(error))}") from None
    return fs, path


def uri_of(fs: AbstractFileSystem, path: str) -> str:
    """The URI of a path on a filesystem, which for local ones is the path."""
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))
