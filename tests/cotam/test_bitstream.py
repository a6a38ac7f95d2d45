"""The container: lossless, at most 20 bytes, and every byte string is either a bitstream or a BitstreamError."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotam.bitstream import MAX_SIDE_PX, VERSION, Bitstream, BitstreamError, pack, unpack

NO_LIMIT = MAX_SIDE_PX**2
EXAMPLE = Bitstream(b"\x01\x02\x03\x04", 768, 512, 0, 2, 1, 0x85, b"the latents")


def _streams(max_side_px: int) -> st.SearchStrategy[Bitstream]:
    side = st.integers(1, max_side_px)
    return st.builds(
        Bitstream,
        model_id=st.binary(min_size=4, max_size=4),
        width=side,
        height=side,
        quality_index=st.integers(0, 255),
        lanes_log2=st.integers(0, 3),
        tier=st.integers(0, 7),
        map_code=st.none() | st.integers(0, 255),
        string=st.binary(max_size=300),
    )


def _with_crc(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "little")


@given(_streams(MAX_SIDE_PX))
@settings(deadline=None)
def test_round_trip(stream: Bitstream) -> None:
    assert unpack(pack(stream), NO_LIMIT) == stream


@given(_streams(16383))
@settings(deadline=None)
def test_overhead_is_at_most_16_bytes(stream: Bitstream) -> None:
    assert len(pack(stream)) - len(stream.string) <= 16


def test_bytes_are_pinned() -> None:
    assert pack(EXAMPLE).hex() == "06010203040e008006800485746865206c6174656e7473e6c788da"


def test_every_truncation_and_every_flipped_bit_is_noticed() -> None:
    data = pack(EXAMPLE)
    for length in range(len(data)):
        with pytest.raises(BitstreamError):
            unpack(data[:length], NO_LIMIT)
    for bit in range(8 * len(data)):
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            unpack(bytes(altered), NO_LIMIT)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "too short: 4 bytes"),
        (bytes([VERSION + 1]) + bytes(20), f"version {VERSION + 1}, this decoder reads version {VERSION}"),
        (b"\x06mode\x40\x00\x01\x01", "unknown flags 0x40"),
        (b"\x06mode\x00\x00\x00\x01", "impossible size of 0x1 pixels"),
        (b"\x06mode\x00\x00\xff\xff\xff\xff\x0f\x01", "impossible size of 4294967295x1 pixels"),
        (b"\x06mode\x00\x00\x80\x80\x04\x80\x80\x04", "65536x65536 pixels, over the limit of 67108864 pixels"),
        (b"\x06mode\x00\x00\x81\x00\x01", "malformed number"),
        (b"\x06mode\x00\x00\xff\xff\xff\xff\xff\xff\x01", "malformed number"),
        (b"\x06mode\x00\x00\x01\x80", "malformed number"),
        (b"\x06mode\x04\x00\x01\x01", "ends before its quality map"),
    ],
)
def test_errors_name_what_is_wrong(body: bytes, message: str) -> None:
    with pytest.raises(BitstreamError, match=message):
        unpack(_with_crc(body), 2**26)


def test_wrong_checksum_is_named() -> None:
    with pytest.raises(BitstreamError, match="checksum does not match: truncated or altered"):
        unpack(pack(EXAMPLE)[:-1], NO_LIMIT)


@pytest.mark.parametrize("num_strings", [4000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_fuzz(num_strings: int) -> None:
    """Random and altered strings, half of them with a valid checksum, raise BitstreamError or parse; nothing else."""
    rng = np.random.default_rng(num_strings)
    data = pack(EXAMPLE)[:-4]
    for _ in range(num_strings):
        if rng.random() < 0.2:
            body = bytearray([VERSION]) + rng.bytes(int(rng.integers(40)))
        else:
            body = bytearray(data[: rng.integers(1, len(data) + 1)])
            for _ in range(rng.integers(1, 6)):
                body[rng.integers(len(body))] = rng.integers(256)
        string = _with_crc(bytes(body)) if rng.random() < 0.5 else bytes(body)
        try:
            stream = unpack(string, 2**26)
        except BitstreamError:
            continue
        assert 0 < stream.width * stream.height <= 2**26
