"""Samples of a tar, streamed: WebDataset's convention, and what hostile or damaged tars make of it.

Neighbours whose names agree up to the first dot of the file name are one sample. Its image is the one whose name has no
second dot, or the first by name; everything else are its members. Where there are only images that have one, as of
photographs with dates in their names, each is a sample. Hidden files (".DS_Store", "._a.jpg") are passed over.
Nothing touches the file system, and nothing that a header claims is allocated before the bytes are there.
"""

from __future__ import annotations

import dataclasses
import tarfile
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

from cotam.errors import one_line
from cotam.store.schema import Reject, Sample
from cotam.store.source_file import SourceFile, decompressed

# Of image files; those that cannot be decoded become rejects, with their bytes.
IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "jpe", "jfif", "mpo", "png", "webp", "avif", "tif", "tiff", "bmp", "gif", "ppm", "pgm", "pbm", "pnm",
    "heic", "heif", "jp2", "jxl",
)  # fmt: skip
MAX_SAMPLE_BYTES = 2**29
_TEXT_EXTENSIONS = ("txt", "text", "caption", "json", "jsonl", "cls", "csv", "html", "xml", "yaml")
_MAX_MEMBERS = 256  # of a sample
MAX_MEMBER_NAMES = 1000  # of all members of a tar: each becomes a column
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
            yield from tar.finished_series()
            yield tar.damage(f"tar is damaged after {tar.num_samples} samples: {reason}")


@dataclasses.dataclass
class _Group:
    """The members of one sample so far, and the first thing that is wrong with it."""

    key: str
    members: dict[str, bytes] = dataclasses.field(default_factory=dict)
    num_bytes: int = 0
    problem: str = ""

    def is_series(self) -> bool:
        """Whether it is images with dots in their names, and nothing else."""
        return not self.problem and all(map(_is_dotted_image, self.members))


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
                if info.isdir() or _is_hidden(info.name):
                    continue
                key, name = _key_and_name(info.name)
                if (group := self._group) is not None:
                    is_full = len(group.members) >= _MAX_MEMBERS or group.num_bytes + info.size > MAX_SAMPLE_BYTES
                    if key != group.key or name in group.members or (is_full and group.is_series()):
                        yield from self._finish(group)
                self._group = self._group or _Group(key)
                self._add(self._group, name, info, tar)
            end = tar.offset
        if self._group is not None:
            yield from self._finish(self._group)
        # tarfile takes a damaged header, or none, for the end: only the end marker proves that nothing is missing.
        if not stream.only_zeros_from(end):
            yield self.damage(
                f"tar has no end marker after {self.num_samples} samples: it is cut short or damaged there"
            )

    def finished_series(self) -> Iterator[Sample | Reject]:
        """Of a tar that breaks off in a series, its images so far, each of which is whole."""
        if self._group is not None and self._group.members and self._group.is_series():
            yield from self._finish(self._group)

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
        group.num_bytes += len(content)
        group.problem = group.problem or problem
        if len(group.members) < _MAX_MEMBERS:
            group.members[name] = content

    def _finish(self, group: _Group) -> Iterator[Sample | Reject]:
        self._group = None
        if group.is_series():
            for name, content in group.members.items():
                stem, _, extension = name.rpartition(".")
                self.num_samples += 1
                yield self._sample(_Group(f"{group.key}.{stem}", {extension: content}))
        else:
            self.num_samples += 1
            yield self._sample(group)

    def _sample(self, group: _Group) -> Sample | Reject:
        members: dict[str, Any] = dict(group.members)
        image_name = _image_name(members)
        image = members.pop(image_name) if image_name is not None else None

        def reject(error: str) -> Reject:
            return Reject(key=group.key, source=self._source, stage="read", error=error, image=image or None)

        if group.problem:
            return reject(group.problem)
        if len(self._names.union(members)) > MAX_MEMBER_NAMES:
            return reject(f"over {MAX_MEMBER_NAMES} kinds of members in one tar")
        self._names.update(members)
        if image is None:
            names = ", ".join(name or "a name without extension" for name in members)
            return reject(
                f"sample has no image beside it, only {names} (members of a sample follow each other in a tar)"
            )
        try:
            members = {name: member_value(name, content) for name, content in members.items()}
        except ValueError as error:
            return reject(str(error))
        return Sample(key=group.key, source=self._source, image=image, members=members)


def member_value(name: str, content: bytes) -> str | bytes:
    """A member as it is stored: text as such, by its name. Raises ValueError where that is not UTF-8."""
    if extension_of(name) not in _TEXT_EXTENSIONS:
        return content
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ValueError(f"member {name} is not UTF-8 text") from None


def extension_of(name: str) -> str:
    """What follows the last dot, in lower case; of a name without one the whole."""
    return name.rsplit(".", 1)[-1].lower()


def _image_name(members: Iterable[str]) -> str | None:
    """The image of a sample, the same kind in every sample that has the same members."""
    images = [name for name in members if extension_of(name) in IMAGE_EXTENSIONS]
    return min(images, key=lambda name: ("." in name, name), default=None)


def _is_dotted_image(name: str) -> bool:
    return "." in name and extension_of(name) in IMAGE_EXTENSIONS


def _is_hidden(path: str) -> bool:
    parts = path.removeprefix("./").split("/")
    return parts[-1].startswith(".") or "__MACOSX" in parts


def _key_and_name(path: str) -> tuple[str, str]:
    """Key and member name of a path in a tar; bytes that are not UTF-8 become replacement characters."""
    path = path.encode(errors="surrogateescape").decode(errors="replace")
    folder, slash, file = path.removeprefix("./").rpartition("/")
    dot = file.find(".")
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
