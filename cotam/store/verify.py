"""Checking a store against its own records."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import pyarrow as pa

from cotam.codec import Codec
from cotam.errors import one_line
from cotam.store.ids import difference, each, ids_of, in_order
from cotam.store.records import Completion, RunStore
from cotam.store.schema import Reject
from cotam.store.shard import read_rejects, read_rows, rejects_path
from cotam.stream import decode_stream


class ShardReport(NamedTuple):
    """Rows found in a shard, and what is wrong with it, a line each."""

    num_rows: int
    problems: list[str]


def verify_store(store: RunStore) -> list[str]:
    """What is wrong with the store as a whole: shards without a record, a line each."""
    names = {name.partition(".")[0]: name for name in store.root.list("data")}
    unknown = each(in_order(difference(ids_of(names), store.completed_ids())))
    return [f"data/{names[name]}: no completion record" for name in unknown]


def verify_shard(store: RunStore, record: Completion, codec: Codec | None) -> ShardReport:
    """Check hashes of a shard and its rejects, counts and, with a codec, that bitstreams decode to their sizes."""
    problems: list[str] = []
    num_rows = 0
    try:
        if (digest := _sha256(store, record.data)) != record.data_sha256:
            problems.append(f"{record.data}: sha256 is {digest}, its record says {record.data_sha256}")
        rejects = rejects_path(record.partition_id)
        if record.rejects_sha256 is not None and (digest := _sha256(store, rejects)) != record.rejects_sha256:
            problems.append(f"{rejects}: sha256 is {digest}, its record says {record.rejects_sha256}")
        num_rejects = len(read_rejects(store.root, record.partition_id))
        rows = read_rows(store.root, record.data)
        for item in rows if codec is None else decode_stream(rows, codec):
            num_rows += 1
            if isinstance(item, Reject):
                problems.append(f"{record.data}: {item.key}: {item.error}")
    except (OSError, ValueError, pa.ArrowException) as error:
        problems.append(f"{record.data}: cannot be read: {one_line(error)}")
        return ShardReport(num_rows, problems)
    if num_rows != record.num_rows:
        problems.append(f"{record.data}: {num_rows} rows, its record says {record.num_rows}")
    if num_rejects != record.num_rejects:
        problems.append(f"{record.data}: {num_rejects} rejects, its record says {record.num_rejects}")
    return ShardReport(num_rows, problems)


def _sha256(store: RunStore, path: str) -> str:
    with store.root.fs.open(store.root.join(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
