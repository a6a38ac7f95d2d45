"""Partitions: the units of input, and many of them in columns, as a driver holds hundreds of thousands."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc

from cotam.store.ids import none_of

_ROWS_PER_CHUNK = 1000
_SCHEMA = pa.schema(
    {
        "partition_id": pa.string(),
        "kind": pa.string(),
        "source": pa.binary(),  # names of files may be no UTF-8
        "paths": pa.list_(pa.binary()),
        "row_groups": pa.list_(pa.int32(), 2),
        "image_column": pa.string(),
        "num_bytes": pa.int64(),
        "problem": pa.string(),
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """A unit of input: one tar, a run of loose files, or a run of row groups of one Parquet file.

    Attributes:
        partition_id: hash of its name, size, version and range; the same input always has the same id.
        kind: "tar", "files", "parquet", or "shard" for a shard of bitstreams.
        source: URI of the tar, the folder or the Parquet file.
        paths: for "files", images and what lies beside them, for "shard" the shard, relative to ``source``, in order.
        row_groups: for "parquet", first and one past the last row group.
        image_column: for "parquet", the column of image bytes.
        num_bytes: size of the input.
        problem: why it cannot be read, where listing has shown that already; reading it raises this.
    """

    partition_id: str
    kind: str
    source: str
    paths: tuple[str, ...] = ()
    row_groups: tuple[int, int] = (0, 0)
    image_column: str = ""
    num_bytes: int = 0
    problem: str = ""


class Partitions(Sequence[Partition]):
    """An immutable sequence of partitions in some hundred bytes each; slices share their memory.

    Args:
        table: one column for each field of ``Partition``.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def of(cls, partitions: Iterable[Partition]) -> Partitions:
        """``partitions`` in columns; an iterator is taken a thousand at a time."""
        remaining = iter(partitions)
        chunks = []
        while chunk := list(islice(remaining, _ROWS_PER_CHUNK)):
            chunks.append(pa.RecordBatch.from_pylist([_row(p) for p in chunk], _SCHEMA))
        return cls(pa.Table.from_batches(chunks, _SCHEMA))

    @classmethod
    def joined(cls, parts: Iterable[Partitions]) -> Partitions:
        """One after another."""
        return cls(pa.concat_tables(part.table for part in parts))

    @property
    def ids(self) -> pa.ChunkedArray:
        """The ids, strings."""
        return self.table["partition_id"]

    def without(self, ids: pa.ChunkedArray) -> Partitions:
        """Those whose id is none of ``ids``."""
        return self._those(none_of(self.ids, ids))

    def of_sources(self, sources: Iterable[str]) -> Partitions:
        """Those of some sources."""
        names = pa.array([_encode(source) for source in sources], pa.binary())
        return self._those(pc.is_in(self.table["source"], value_set=names))

    def chunks(self, size: int) -> Iterator[Partitions]:
        """Slices of ``size`` partitions, the last one shorter."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Partition: ...

    @overload
    def __getitem__(self, index: slice) -> Partitions: ...

    def __getitem__(self, index: int | slice) -> Partition | Partitions:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1, "slices are contiguous"
            return Partitions(self.table.slice(start, max(0, stop - start)))
        position = range(len(self))[index]  # IndexError, and from the end where it is negative
        return next(iter(self[position : position + 1]))

    def __iter__(self) -> Iterator[Partition]:
        for batch in self.table.to_batches(_ROWS_PER_CHUNK):
            yield from map(_partition, batch.to_pylist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Partitions) and bool(self.table.equals(other.table))

    def _those(self, mask: pa.ChunkedArray) -> Partitions:
        return self if pc.all(mask).as_py() else Partitions(self.table.filter(mask))


def partition_id(stem: str, identity: Sequence[tuple[Any, ...]]) -> str:
    """The id of what ``identity``, JSON-serialisable, tells from everything else, with a readable ``stem``."""
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    # What begins with "_" is no data to pyarrow, Spark and Hive.
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', stem).lstrip('_-')[:48] or 'part'}-{digest}"


def _row(partition: Partition) -> dict[str, Any]:
    values = {field.name: getattr(partition, field.name) for field in _SCHEMA}
    return {**values, "source": _encode(partition.source), "paths": [_encode(path) for path in partition.paths]}


def _partition(row: dict[str, Any]) -> Partition:
    source, paths = _decode(row["source"]), tuple(_decode(path) for path in row["paths"])
    return Partition(**{**row, "source": source, "paths": paths, "row_groups": tuple(row["row_groups"])})


def _encode(name: str) -> bytes:
    return name.encode(errors="surrogateescape")


def _decode(name: bytes) -> str:
    return name.decode(errors="surrogateescape")
