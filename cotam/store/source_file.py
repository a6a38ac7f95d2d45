"""A source file opened for reading: what the storage raises is told from what the file's content raises."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import stat
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from cotam.store.fs import split_uri

_MAGIC_BYTES = 6
_XZ_MEMORY_BYTES = 2**27  # xz -9 needs 65 MiB; a header may ask for 4 GiB
_XZ_READ_BYTES = 2**18


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


class _XzFile(io.RawIOBase):
    """The content of an xz file. Unlike ``lzma.LZMAFile`` it does not take the memory that a header asks for."""

    def __init__(self, file: SourceFile) -> None:
        self._file, self._input = file, b""
        self._decompressor = self._next_stream()

    @staticmethod
    def _next_stream() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer``; returns how much of it. Raises LZMAError, EOFError where the file breaks off."""
        data = b""
        while not data and len(buffer):
            if self._decompressor.eof:
                self._input = self._decompressor.unused_data.lstrip(b"\0")  # padding between streams
                while not self._input:
                    if not (more := self._file.read(_XZ_READ_BYTES)):
                        return 0
                    self._input = more.lstrip(b"\0")
                self._decompressor = self._next_stream()
            if self._decompressor.needs_input and not self._input:
                self._input = self._file.read(_XZ_READ_BYTES)
                if not self._input:
                    raise EOFError("the file ends before its end-of-stream marker")
            data = self._decompressor.decompress(self._input, len(buffer))
            self._input = b""
        buffer[: len(data)] = data
        return len(data)


def check_regular(fs: AbstractFileSystem, path: str) -> None:
    """Raise ValueError where a local path is a folder, a pipe or a device, OSError where there is none."""
    if not isinstance(fs, LocalFileSystem):
        return
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a link that leads to itself") from None
        raise
    if not stat.S_ISREG(mode):
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
        return io.BufferedReader(_XzFile(file))
    is_skippable_frame = magic[1:4] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5  # what pzstd starts with
    if magic.startswith(b"\x28\xb5\x2f\xfd") or is_skippable_frame:
        return pa.CompressedInputStream(file, "zstd")
    return file
