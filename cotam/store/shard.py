"""Shards: a writer that streams rows to a local Parquet file, and a reader in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cotam.store.fs import Root
from cotam.store.schema import REJECT_SCHEMA, SHARD_COLUMNS, SHARD_FIELDS, Reject, Row, column_name

ROW_GROUP_BYTES = 64 * 2**20
_ROW_GROUP_ROWS = 10_000
_READ_BATCH_ROWS = 64
_NEVER_NULL = ("key", "source", "width", "height", "bitstream", "quality", "source_num_bytes")


class ShardWriter:
    """Writes rows to a local Parquet file in row groups near 64 MiB; used as a context manager.

    Args:
        path: local file to write.
        metadata: strings for the Parquet metadata.
        member_types: Arrow types of members where the source declares them; others are inferred from the first value.
    """

    def __init__(
        self, path: Path, metadata: dict[str, str], member_types: dict[str, pa.DataType] | None = None
    ) -> None:
        self.path, self._metadata = path, metadata
        types = {column_name(name): t for name, t in (member_types or {}).items()}
        self._schema = pa.schema([*SHARD_FIELDS, *(pa.field(n, t) for n, t in types.items())], metadata)
        self._rows: list[Row] = []
        self._buffered_bytes = 0
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self._flush()
            self._open()  # a shard without rows is still a Parquet file
        if self._writer is not None:
            self._writer.close()

    def write(self, row: Row) -> None:
        """Append a row."""
        self._rows.append(row)
        self._buffered_bytes += len(row.bitstream) + _num_bytes(row.members)
        if row.importance is not None:
            self._buffered_bytes += row.importance.nbytes
        if self._buffered_bytes >= ROW_GROUP_BYTES or len(self._rows) >= _ROW_GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        self._grow_schema()
        columns: dict[str, list[Any]] = {name: [getattr(r, name) for r in self._rows] for name in SHARD_COLUMNS}
        columns["importance"] = [None if r.importance is None else list(r.importance) for r in self._rows]
        members = [{column_name(n): v for n, v in r.members.items()} for r in self._rows]
        for field in list(self._schema)[len(SHARD_FIELDS) :]:
            columns[field.name] = [m.get(field.name) for m in members]
        self._open().write_table(pa.table(columns, schema=self._schema))
        self._rows, self._buffered_bytes = [], 0

    def _open(self) -> pq.ParquetWriter:
        if self._writer is None:
            texts = [f.name for f in self._schema if f.name != "bitstream"]
            self._writer = pq.ParquetWriter(
                self.path,
                self._schema,
                # Bitstreams are incompressible: neither codec nor dictionary nor statistics would pay.
                compression={f.name: "NONE" if f.name == "bitstream" else "ZSTD" for f in self._schema},
                use_dictionary=["source", "source_format"],
                write_statistics=texts,
            )
        return self._writer

    def _grow_schema(self) -> None:
        """Add columns for members that show up for the first time; what is written already gets nulls there."""
        new: dict[str, pa.DataType] = {}
        for row in self._rows:
            for name, value in row.members.items():
                column = column_name(name)
                if value is not None and column not in new and self._schema.get_field_index(column) < 0:
                    new[column] = pa.scalar(value).type
        if not new:
            return
        self._schema = pa.schema([*self._schema, *(pa.field(n, t) for n, t in new.items())], self._metadata)
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        old = self.path.rename(self.path.with_suffix(".narrow"))
        with pq.ParquetFile(old) as file:
            for k in range(file.num_row_groups):
                table = file.read_row_group(k)
                for name, kind in new.items():
                    table = table.append_column(name, pa.nulls(len(table), kind))
                self._open().write_table(table.cast(self._schema))
        old.unlink()


def _num_bytes(value: Any) -> int:
    """About how much memory a member's value takes, whatever it is nested in."""
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_bytes, value.values()))
    return sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 8


def read_keys(root: Root, path: str) -> pa.ChunkedArray:
    """The keys of a shard, or of predictions, strings. Raises ValueError where it has none."""
    with root.fs.open(root.join(path), "rb") as file, pq.ParquetFile(file) as parquet:
        if "key" not in parquet.schema_arrow.names:
            raise ValueError(f"{path} has no keys")
        return parquet.read(columns=["key"])["key"]


def read_rows(root: Root, path: str) -> Iterator[Row]:
    """The rows of a shard, a small batch at a time.

    Raises:
        ValueError: not a shard of this schema.
    """
    with root.fs.open(root.join(path), "rb") as file, pq.ParquetFile(file) as parquet:
        missing = [name for name in SHARD_COLUMNS if name not in parquet.schema_arrow.names]
        if missing:
            raise ValueError(f"{path} is not a CoTAM shard: no column {missing[0]!r}")
        wrong = [f for f in SHARD_FIELDS if not parquet.schema_arrow.field(f.name).type.equals(f.type)]
        if wrong:
            raise ValueError(f"{path} is not a CoTAM shard: column {wrong[0].name!r} is not of type {wrong[0].type}")
        for batch in parquet.iter_batches(batch_size=_READ_BATCH_ROWS):
            for values in batch.to_pylist():
                fixed = {name: values.pop(name) for name in SHARD_COLUMNS}
                del fixed["bpp"]
                if any(fixed[name] is None for name in _NEVER_NULL) or min(fixed["width"], fixed["height"]) < 1:
                    raise ValueError(f"{path} is not a CoTAM shard: a row without key, size or bitstream")
                if fixed["importance"] is not None:
                    fixed["importance"] = np.array(fixed["importance"], dtype=np.float32)
                yield Row(**fixed, members={n: v for n, v in values.items() if v is not None})


class RejectWriter:
    """Writes rejects to a local Parquet file, created with the first one; used as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rejects: list[Reject] = []
        self._buffered_bytes = 0
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> RejectWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def write(self, reject: Reject) -> None:
        """Append a reject."""
        self._rejects.append(reject)
        self._buffered_bytes += len(reject.image or b"")
        if self._buffered_bytes >= ROW_GROUP_BYTES or len(self._rejects) >= _ROW_GROUP_ROWS:
            self._flush()

    def publish(self, root: Root, partition_id: str) -> str | None:
        """After closing: move the file to its place in a store, or remove what an earlier attempt left there.

        Returns:
            The file's sha256 (hex); None where there are no rejects.
        """
        target = rejects_path(partition_id)
        if not self.path.exists():
            root.remove(target)
            return None
        sha256 = file_sha256(self.path)
        root.publish(self.path, target)
        return sha256

    def _flush(self) -> None:
        if not self._rejects:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, REJECT_SCHEMA, compression="ZSTD")
        columns = {name: [_plain(getattr(r, name)) for r in self._rejects] for name in REJECT_SCHEMA.names}
        self._writer.write_table(pa.table(columns, schema=REJECT_SCHEMA))
        self._rejects, self._buffered_bytes = [], 0


def _plain(value: bytes | str | None) -> bytes | str | None:
    """Text that Arrow takes: an error may quote a file name that is no UTF-8."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def rejects_path(partition_id: str) -> str:
    """Where a store has the rejects of a partition."""
    return f"_cotam/rejects/{partition_id}.parquet"


def read_rejects(root: Root, partition_id: str) -> list[Reject]:
    """The rejects of a partition, without their bytes; none when it has no file of them."""
    path = rejects_path(partition_id)
    if not root.exists(path):
        return []
    # Not pq.read_table: its scanner's threads may outlive the file, and then abort the process at its end.
    with root.fs.open(root.join(path), "rb") as file, pq.ParquetFile(file) as parquet:
        table = parquet.read(columns=["key", "source", "stage", "error"])
    return [Reject(**row) for row in table.to_pylist()]


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a local file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
