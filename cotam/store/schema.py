"""The columns of shards and rejects, and the rows and rejects that become them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

SCHEMA_VERSION = 1
RejectStage = Literal["read", "decode", "importance", "questions", "encode"]

SHARD_FIELDS = (
    pa.field("key", pa.string()),
    pa.field("source", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("bitstream", pa.binary()),
    pa.field("bpp", pa.float32()),
    pa.field("quality", pa.float32()),
    pa.field("mean_importance", pa.float32()),
    pa.field("importance", pa.list_(pa.list_(pa.float32()))),
    pa.field("source_num_bytes", pa.int64()),
    pa.field("source_format", pa.string()),
    pa.field("source_sha256", pa.string()),
)
SHARD_COLUMNS = tuple(f.name for f in SHARD_FIELDS)

REJECT_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("source", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("error", pa.string()),
        pa.field("image", pa.binary()),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of a source, as read.

    Attributes:
        key: its name, unique within its partition: readers add "~2", "~3" to one that comes again.
        source: URI of the tar, folder or Parquet file it came from.
        image: the original bytes.
        members: everything else that belongs to the sample, by name.
    """

    key: str
    source: str
    image: bytes
    members: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One encoded image: the columns of SHARD_FIELDS, and the sample's ``members``.

    ``mean_importance`` is None under a uniform quality, ``importance``, float32 (rows, columns), unless asked for.
    """

    key: str
    source: str
    width: int
    height: int
    bitstream: bytes
    quality: float
    source_num_bytes: int
    source_format: str
    source_sha256: str
    mean_importance: float | None = None
    importance: NDArray[np.float32] | None = None
    members: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def bpp(self) -> float:
        """Stored bits per pixel of the original image."""
        return len(self.bitstream) * 8 / (self.width * self.height)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reject:
    """One image that could not be processed.

    Attributes:
        key, source: as in ``Sample``.
        stage: at which it stopped.
        error: why, in one line.
        image: the original bytes, or None where there are none.
    """

    key: str
    source: str
    stage: RejectStage
    error: str
    image: bytes | None = None


def column_name(member: str) -> str:
    """The column that holds a member: its own name, unless a fixed column has it; no two members share one."""
    name = member
    while name.startswith("member_"):
        name = name.removeprefix("member_")
    return f"member_{member}" if name in SHARD_COLUMNS else member
