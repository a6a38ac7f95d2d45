"""Loose images, and what lies beside them, cut into partitions."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath

from fsspec.spec import AbstractFileSystem

from cotam.store.fs import File, uri_of
from cotam.store.partitions import Partition, partition_id
from cotam.store.readers import with_members
from cotam.store.tars import IMAGE_EXTENSIONS, extension_of

FILES_PER_PARTITION = 500  # images, on average; half to twice as many
_MAX_SINCE_IMAGE = 1000  # files that wait for an image that they belong to


class ImageRuns:
    """Cuts the files of a folder, by name, into runs of images with what lies beside them.

    Attributes:
        found: whether there was an image. left_out: how many files belong to none, by extension.
    """

    def __init__(self, fs: AbstractFileSystem, root: str) -> None:
        self._fs, self._root = fs, root
        self._files: dict[str, tuple[str, int, str]] = {}  # not in a partition yet: name, size and version by name
        self._num_images, self._num_since, self._ends = 0, 0, False
        self.found = False
        self.left_out: Counter[str] = Counter()

    def add(self, name: str, file: File) -> Iterator[Partition]:
        """Add the next file; yields the partition that ends before it, if one does."""
        is_image = extension_of(name) in IMAGE_EXTENSIONS
        if (is_image and self._ends) or (self._num_since >= _MAX_SINCE_IMAGE and not is_image):
            yield from self._cut(name)
        self._files[name] = (name, file.num_bytes, file.version)
        self._num_since = 0 if is_image else self._num_since + 1
        if is_image:
            self.found = True
            self._num_images += 1
            self._ends = _ends_partition(self._num_images, name)

    def rest(self) -> Iterator[Partition]:
        """The last partition."""
        yield from self._cut("")

    def _cut(self, next_name: str) -> Iterator[Partition]:
        images = with_members(self._files)
        used = {*images}.union(*(members.values() for members in images.values()))
        if images:
            yield _image_partition(self._fs, self._root, [file for name, file in self._files.items() if name in used])
        unused = [name for name in self._files if name not in used]
        kept = {name: self._files[name] for name in unused if _stem(name) == _stem(next_name)}
        self.left_out.update(PurePosixPath(n).suffix or "without an extension" for n in unused if n not in kept)
        self._files = kept
        self._num_images, self._num_since, self._ends = 0, len(kept), False


def _stem(name: str) -> str:
    """Up to the first dot of the file name: a file and its image agree in that."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _ends_partition(num_images: int, last: str) -> bool:
    """Whether a partition ends after so many images: mostly at a name whose hash is 0, not at a count.

    So one image more in a folder changes its own partition only (content-defined chunking), and the others stay done.
    """
    half = FILES_PER_PARTITION // 2
    says_so = zlib.crc32(last.encode(errors="surrogateescape")) % half == 0
    return num_images >= 2 * FILES_PER_PARTITION or (num_images >= half and says_so)


def _image_partition(fs: AbstractFileSystem, folder: str, images: list[tuple[str, int, str]]) -> Partition:
    """The partition of some images and what is beside them: names below ``folder``, sizes and versions."""
    stem = f"{PurePosixPath(folder).name}-{images[0][0]}"  # ids in the order of names
    return Partition(
        partition_id=partition_id(stem, [(uri_of(fs, folder),), *images]),
        kind="files",
        source=uri_of(fs, folder),
        paths=tuple(name for name, _, _ in images),
        num_bytes=sum(num_bytes for _, num_bytes, _ in images),
    )
