"""Samples of a tar, streamed: WebDataset's convention, and what hostile or damaged tars make of it.

Neighbours whose names agree up to the first dot of the file name are one sample; the first image among them is its
image, everything else its members. Nothing touches the file system, and nothing that a header claims is allocated
before the bytes are there.
"""

from __future__ import annotations

import dataclasses
import tarfile
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

from cotam.errors import one_line
from cotam.store.schema import Reject, Sample
from cotam.store.source_file import SourceFile, decompressed

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jfif", "png", "webp", "avif", "tif", "tiff", "bmp", "gif", "ppm")
MAX_SAMPLE_BYTES = 2**29
_TEXT_EXTENSIONS = ("txt", "text", "caption", "json", "jsonl", "cls", "csv", "html", "xml", "yaml")
_MAX_MEMBERS = 256  # of a sample
_MAX_NAMES = 1000  # of all members of a tar: each becomes a column
_MAX_HEADER_BYTES = 2**20  # before a member, with long names and PAX records
_MAX_PADDING_BYTES = 2**28  # zeros after the end; what comes later was never written by a tar
_MAX_EMPTY_READS = 8
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


def read_tar(source: str) -> Iterator[Sample | Reject]:
    """Stream the samples of a tar, compressed or not; a damaged one gives its good samples and one reject.

    Raises:
        OSError: reading it fails.
        ValueError: it is no regular file.
    """
    with SourceFile(source) as file:
        tar = _TarReader(source)
        try:
            yield from tar.samples(_Stream(decompressed(file)))
        except Exception as error:  # tarfile and decompressors raise whatever they like on bad bytes
            if file.error is not None:
                raise file.error from None
            reason = one_line(error)
            yield tar.damage(f"tar is damaged after {tar.num_samples} samples: {reason}")


@dataclasses.dataclass
class _Group:
    """The members of one sample so far, and the first thing that is wrong with it."""

    key: str
    members: dict[str, bytes] = dataclasses.field(default_factory=dict)
    num_bytes: int = 0
    problem: str = ""


class _TarReader:
    def __init__(self, source: str) -> None:
        self.num_samples = 0
        self._source = source
        self._group: _Group | None = None
        self._names: set[str] = set()

    def samples(self, stream: _Stream) -> Iterator[Sample | Reject]:
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all headers
                stream.limit = tar.offset + _MAX_HEADER_BYTES
                if info.isdir():
                    continue
                key, name = _key_and_name(info.name)
                if self._group is not None and (key != self._group.key or name in self._group.members):
                    yield self._finish(self._group)
                self._group = self._group or _Group(key)
                self._add(self._group, name, info, tar)
            end = tar.offset
        if self._group is not None:
            yield self._finish(self._group)
        # tarfile takes a damaged header, or none, for the end: only the end marker proves that nothing is missing.
        if not stream.only_zeros_from(end):
            yield self.damage(
                f"tar has no end marker after {self.num_samples} samples: it is cut short or damaged there"
            )

    def damage(self, error: str) -> Reject:
        """The reject for what is missing from here on; the sample that was being read may be incomplete."""
        group = self._group or _Group("(end)")
        image_name = _image_name(group.members)
        image = group.members[image_name] if image_name is not None else None
        return Reject(key=group.key, source=self._source, stage="read", error=error, image=image)

    def _add(self, group: _Group, name: str, info: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        problem = ""
        content = b""
        if len(group.members) >= _MAX_MEMBERS:
            problem = f"over {_MAX_MEMBERS} members: names that agree up to their first dot are one sample"
        elif len(self._names) >= _MAX_NAMES and name not in self._names:
            problem = f"over {_MAX_NAMES} kinds of members in one tar"
        elif not info.isfile() or info.issparse():
            kind = "a sparse file" if info.issparse() else _KINDS.get(info.type, f"of unknown type {info.type!r}")
            problem = f"member {name or group.key} is {kind}"
        elif group.num_bytes + info.size > MAX_SAMPLE_BYTES:
            problem = f"over {MAX_SAMPLE_BYTES} bytes"
        else:
            reader = tar.extractfile(info)
            assert reader is not None  # a regular file
            content = reader.read(info.size)
            if len(content) < info.size:
                raise tarfile.ReadError("unexpected end of data")
            self._names.add(name)
        group.num_bytes += len(content)
        group.problem = group.problem or problem
        if len(group.members) < _MAX_MEMBERS:
            group.members[name] = content

    def _finish(self, group: _Group) -> Sample | Reject:
        self._group = None
        self.num_samples += 1
        members: dict[str, Any] = dict(group.members)
        image_name = _image_name(members)
        image = members.pop(image_name) if image_name is not None else None

        def reject(error: str) -> Reject:
            return Reject(key=group.key, source=self._source, stage="read", error=error, image=image or None)

        if group.problem:
            return reject(group.problem)
        if image is None:
            return reject(f"sample has no image, only {', '.join(n or 'a name without extension' for n in members)}")
        for name in members:
            if name.rsplit(".", 1)[-1] in _TEXT_EXTENSIONS:
                try:
                    members[name] = members[name].decode()
                except UnicodeDecodeError:
                    return reject(f"member {name} is not UTF-8 text")
        return Sample(key=group.key, source=self._source, image=image, members=members)


def _image_name(members: Iterable[str]) -> str | None:
    return next((name for name in members if name.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS), None)


def _key_and_name(path: str) -> tuple[str, str]:
    """Key and member name of a path in a tar; bytes that are not UTF-8 become replacement characters."""
    path = path.encode(errors="surrogateescape").decode(errors="replace")
    folder, slash, file = path.rpartition("/")
    dot = file.find(".", 1)  # a leading dot is part of the key
    stem, name = (file, "") if dot < 0 else (file[:dot], file[dot + 1 :])
    return f"{folder}{slash}{stem}", name.lower()


class _Stream:
    """What tarfile reads: counts bytes and the zeros they end with, and stops at ``limit``.

    Attributes:
        limit: position up to which the current member and the headers of the next one may reach.
    """

    def __init__(self, file: Any) -> None:
        self._file, self._num_bytes, self._num_zeros, self._num_empty = file, 0, 0, 0
        self.limit = _MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        if self._num_bytes > self.limit:
            raise tarfile.ReadError(f"over {_MAX_HEADER_BYTES} bytes of headers before a member")
        data = bytes(self._file.read(size))
        self._num_empty += not data
        if self._num_empty > _MAX_EMPTY_READS:  # tarfile skips a terabyte that is not there in small steps
            raise tarfile.ReadError("unexpected end of data")
        num_zeros = len(data) - len(data.rstrip(b"\0"))
        self._num_bytes += len(data)
        self._num_zeros = num_zeros + (self._num_zeros if num_zeros == len(data) else 0)
        return data

    def only_zeros_from(self, offset: int) -> bool:
        """Whether what follows ``offset`` is at least one block of zeros, a tar's end marker, and nothing else."""
        self.limit = offset + _MAX_PADDING_BYTES
        while self._num_zeros >= self._num_bytes - offset and self._num_bytes < self.limit and self.read(2**20):
            pass
        num_bytes = self._num_bytes - offset
        return num_bytes >= tarfile.BLOCKSIZE and self._num_zeros >= num_bytes
