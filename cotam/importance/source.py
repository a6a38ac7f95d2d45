"""Where importance maps come from: a CLIP tower, or a member of the sample itself."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cotam.image import RGBImage
from cotam.store.schema import Sample

ImportanceMap = NDArray[np.float32]  # (rows, columns) in [0, 1]
# From samples and their decoded images to a map for each, or the error that makes it a reject.
ImportanceSource = Callable[[Sequence[Sample], Sequence[RGBImage]], Sequence[ImportanceMap | ValueError]]


def from_member(name: str) -> ImportanceSource:
    """Maps that the samples bring along as member ``name``: the bytes of a .npy file, or nested lists; in [0, 1]."""

    def read(samples: Sequence[Sample], images: Sequence[RGBImage]) -> list[ImportanceMap | ValueError]:
        return [_read_member(sample, name) for sample in samples]

    return read


def _read_member(sample: Sample, name: str) -> ImportanceMap | ValueError:
    value = sample.members.get(name)
    if value is None:
        return ValueError(f"no importance: the sample has no member {name!r}")
    try:
        importance = (_read_npy(value) if isinstance(value, bytes) else np.asarray(value)).astype(np.float32)
    except MemoryError:
        raise
    except Exception as error:  # numpy's parser of headers raises whatever it likes on bad bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return ValueError(f"importance member {name!r} is no array of numbers: {reason}")
    if importance.ndim != 2 or importance.size == 0 or not ((importance >= 0) & (importance <= 1)).all():
        return ValueError(f"importance member {name!r} must be a 2-D map of values in [0, 1]")
    return importance


def _read_npy(data: bytes) -> NDArray[np.generic]:
    """An array from the bytes of a .npy file, whose header is not believed. Raises ValueError."""
    if not data.startswith(np.lib.format.MAGIC_PREFIX):
        raise ValueError("not a .npy file")
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize > len(data):
        raise ValueError("its header and its size do not fit")
    array: NDArray[np.generic] = np.load(io.BytesIO(data), allow_pickle=False)
    return array
