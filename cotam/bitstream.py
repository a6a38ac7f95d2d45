"""The container of one image: pack, unpack, validate. docs/format.md specifies it.

version      1 byte
model id     4 bytes, the start of the weights' sha256
flags        1 byte: bits 0-1 log2 of the rANS lanes, bit 2 a quality map follows, bits 3-5 the tier, others 0
quality      1 byte, the quality index of a uniform map, or the lowest of a map
width, height   varints
map code     1 byte, only with a quality map
string       the rest: quality map and latents, entropy-coded
CRC32        4 bytes over everything before it, little-endian
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

from cotam.image import MAX_SIDE_PX, size_problem

VERSION = 6
MODEL_ID_BYTES = 4
MAX_TIERS = 8
_HAS_MAP = 4
_TIER_SHIFT = 3
_FIXED_BYTES = 1 + MODEL_ID_BYTES + 1 + 1
_CRC_BYTES = 4


class BitstreamError(ValueError):
    """A byte string that is not a whole, unaltered bitstream; the message names what is wrong."""


class ModelMismatchError(BitstreamError):
    """A bitstream that another model wrote."""


class Bitstream(NamedTuple):
    """The parts of one encoded image.

    model_id: 4 bytes; width, height: in pixels; quality_index: of a uniform map, or the lowest of a map;
    lanes_log2: in [0, 3]; tier: which of the codec's models; map_code: how the quality map is coded, None for a uniform
    one; string: the map, if there is one, z, then both halves of y.
    """

    model_id: bytes
    width: int
    height: int
    quality_index: int
    lanes_log2: int
    tier: int
    map_code: int | None
    string: bytes


def pack(stream: Bitstream) -> bytes:
    """The byte string: at most 16 bytes more than its ``string`` for images up to 16383 pixels a side."""
    flags = stream.lanes_log2 | stream.tier << _TIER_SHIFT | (_HAS_MAP if stream.map_code is not None else 0)
    parts = [
        bytes([VERSION]),
        stream.model_id,
        bytes([flags, stream.quality_index]),
        _varint(stream.width),
        _varint(stream.height),
    ]
    if stream.map_code is not None:
        parts.append(bytes([stream.map_code]))
    body = b"".join([*parts, stream.string])
    return body + zlib.crc32(body).to_bytes(_CRC_BYTES, "little")


def unpack(data: bytes, max_pixels: int) -> Bitstream:
    """Parse and check a byte string.

    Args:
        data: the byte string.
        max_pixels: larger images are refused, so that a hostile header cannot make the decoder allocate.

    Raises:
        BitstreamError: anything but a whole, unaltered bitstream of this version.
    """
    if len(data) < _FIXED_BYTES + _CRC_BYTES + 2:
        raise BitstreamError(f"bitstream too short: {len(data)} bytes")
    if data[0] != VERSION:
        raise BitstreamError(f"bitstream version {data[0]}, this decoder reads version {VERSION}")
    body, crc = data[:-_CRC_BYTES], int.from_bytes(data[-_CRC_BYTES:], "little")
    if zlib.crc32(body) != crc:
        raise BitstreamError("bitstream checksum does not match: truncated or altered")
    model_id = bytes(data[1 : 1 + MODEL_ID_BYTES])
    flags, quality_index = data[_FIXED_BYTES - 2], data[_FIXED_BYTES - 1]
    if flags >= MAX_TIERS << _TIER_SHIFT:
        raise BitstreamError(f"bitstream has unknown flags {flags:#x}")
    width, at = _read_varint(body, _FIXED_BYTES)
    height, at = _read_varint(body, at)
    if not (0 < width <= MAX_SIDE_PX and 0 < height <= MAX_SIDE_PX):
        raise BitstreamError(f"bitstream has an impossible size of {width}x{height} pixels")
    if problem := size_problem(width, height, max_pixels):
        raise BitstreamError(f"bitstream of {problem}")
    map_code = None
    if flags & _HAS_MAP:
        if at == len(body):
            raise BitstreamError("bitstream ends before its quality map")
        map_code = body[at]
        at += 1
    return Bitstream(
        model_id, width, height, quality_index, flags & 3, flags >> _TIER_SHIFT, map_code, bytes(body[at:])
    )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if byte == 0 and shift:
                break  # one value, one spelling
            return value, at
    raise BitstreamError("bitstream has a malformed number in its header")
