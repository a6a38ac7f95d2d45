"""A source file opened for reading: what the storage raises is told from what the file's content raises."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
from typing import IO, Any, cast

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from cotam.store.fs import split_uri

_MAGIC_BYTES = 6


class SourceFile(io.RawIOBase):
    """A binary file on any filesystem that remembers its own failure.

    Decompressors and Arrow raise OSError for bad bytes, too, but only a failed read is worth another try.

    Args:
        uri: path or fsspec URI.

    Attributes:
        error: what reading raised, or None.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is a folder, a pipe or a device, which could block for ever.
    """

    def __init__(self, uri: str) -> None:
        fs, path = split_uri(uri)
        check_regular(fs, path)
        self._file: Any = fs.open(path, "rb")
        self.error: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most ``size``."""
        try:
            return bytes(self._file.read(size))
        except Exception as error:  # object stores raise more than OSError
            self.error = error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}")
            raise self.error from error

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer``; returns how much of it."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """As the file below."""
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a position, which is returned."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """The position."""
        return int(self._file.tell())

    def close(self) -> None:
        """Close the file below, too."""
        if not self.closed:
            self._file.close()
        super().close()


def check_regular(fs: AbstractFileSystem, path: str) -> None:
    """Raise ValueError where a local path is a folder, a pipe or a device, OSError where there is none."""
    if isinstance(fs, LocalFileSystem) and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is a folder, a pipe or a device, not a file")


def decompressed(file: SourceFile) -> Any:
    """``file`` as it is, or through gzip, bzip2, xz or zstd, told by its first bytes: names are often wrong."""
    magic = file.read(_MAGIC_BYTES)
    file.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if magic == b"\xfd7zXZ\0":
        return lzma.LZMAFile(cast(IO[bytes], file))
    is_skippable_frame = magic[1:4] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5  # what pzstd starts with
    if magic.startswith(b"\x28\xb5\x2f\xfd") or is_skippable_frame:
        return pa.CompressedInputStream(file, "zstd")
    return file
