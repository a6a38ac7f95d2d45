"""Sets of ids as Arrow strings: an eighth of the memory that Python's take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_AT_A_TIME = 1000


def sorted_ids(ids: Iterable[str]) -> pa.Array:
    """``ids``, of which an iterator is taken a thousand at a time, as sorted strings."""
    remaining = iter(ids)
    chunks = []
    while chunk := list(islice(remaining, _AT_A_TIME)):
        chunks.append(pa.array(chunk, pa.string()))
    array = pa.chunked_array(chunks, pa.string()).combine_chunks()
    return array.take(pc.sort_indices(array))


def each(ids: pa.Array) -> Iterator[str]:
    """The ids, one after another."""
    for start in range(0, len(ids), _AT_A_TIME):
        yield from ids.slice(start, _AT_A_TIME).to_pylist()


def difference(ids: pa.Array, others: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Those of ``ids`` that are none of ``others``."""
    return ids.filter(none_of(ids, others))


def none_of(ids: pa.Array | pa.ChunkedArray, others: pa.Array | pa.ChunkedArray) -> Any:
    """For each of ``ids`` whether it is none of ``others``, bool."""
    return pc.invert(pc.is_in(ids, value_set=others))
