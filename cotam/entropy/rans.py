"""Interleaved range asymmetric numeral systems (rANS, Duda 2013) over integer CDF tables, in numba.

Each lane has a 32-bit state x in [2^16, 2^32) and moves 16-bit words; symbol k of a segment belongs to lane k mod lanes.
All lanes share one word stream. The encoder runs backwards and writes the words back to front, so the decoder reads
states, then words, front to back. A symbol without an entry of its own is the row's escape symbol, followed in the same
lane by symbol + 2^15 as a raw 16-bit step.

A string is made of segments because a decoder learns the CDF rows of a later segment from an earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
from numpy.typing import NDArray

from cotam.entropy.tables import PRECISION_BITS, Tables

MAX_LANES_LOG2 = 3
SYMBOL_MAX = 2**15 - 1
_LOW = np.uint32(1 << 16)
_PREFIX_BITS = 10
_SYMBOLS_PER_LANE = 8192  # a lane costs 2 bytes: worth it only where there is work for it

Segment = tuple[NDArray[np.int16], NDArray[np.uint8]]


class RansError(ValueError):
    """A string that no encoder wrote for these tables and CDF rows."""


class RansCoder:
    """Encoder and decoder for one set of tables; stateless and safe to share between threads.

    Args:
        tables: the integer CDF tables, checked by the caller.
    """

    def __init__(self, tables: Tables) -> None:
        self.cdf = np.ascontiguousarray(tables.cdf, dtype=np.uint32)
        self.start = np.ascontiguousarray(tables.start, dtype=np.int32)
        self.radius = np.ascontiguousarray(tables.radius, dtype=np.int32)
        self.prefix = _prefix_table(self.cdf, self.start)

    def encode(self, segments: Sequence[Segment], lanes_log2: int | None = None) -> tuple[bytes, int]:
        """Encode segments of symbols, each in [-32767, 32767], with their CDF rows.

        Args:
            segments: pairs of symbols, int16 (n,), and rows, uint8 (n,), decoded later in this order.
            lanes_log2: log2 of the number of lanes in [0, 3]; chosen from the number of symbols if None.

        Returns:
            The string, and log2 of its number of lanes.
        """
        symbols = np.concatenate([s for s, _ in segments])
        rows = np.concatenate([r for _, r in segments])
        if lanes_log2 is None:
            lanes_log2 = min(MAX_LANES_LOG2, max(0, (len(symbols) // _SYMBOLS_PER_LANE)).bit_length())
        ends = np.cumsum([len(s) for s, _ in segments])
        words = _encode(symbols, rows, ends, self.cdf, self.start, self.radius, 1 << lanes_log2)
        return words.tobytes(), lanes_log2

    def decoder(self, string: bytes | memoryview, lanes_log2: int) -> RansDecoder:
        """Start decoding ``string``. Raises RansError when it cannot hold the lanes' states."""
        return RansDecoder(self, string, lanes_log2)


class RansDecoder:
    """Decodes one string, segment by segment."""

    def __init__(self, coder: RansCoder, string: bytes | memoryview, lanes_log2: int) -> None:
        if len(string) % 2 or len(string) < 4 << lanes_log2:
            raise RansError("entropy-coded substream has an impossible length")
        self._coder = coder
        self._words = np.frombuffer(string, dtype="<u2")
        lanes = 1 << lanes_log2
        head = self._words[: 2 * lanes].astype(np.uint32).reshape(lanes, 2)
        self._states = head[:, 0] | (head[:, 1] << np.uint32(16))
        self._position = 2 * lanes
        if (self._states < _LOW).any():
            raise RansError("entropy-coded substream starts with an impossible state")

    def decode(self, rows: NDArray[np.uint8]) -> NDArray[np.int16]:
        """The next segment's symbols, int16 (n,), for CDF rows uint8 (n,). Raises RansError at the string's end."""
        c = self._coder
        symbols = np.empty(len(rows), dtype=np.int16)
        self._position = _decode(
            self._words, self._position, self._states, rows, c.cdf, c.start, c.radius, c.prefix, symbols
        )
        if self._position < 0:
            raise RansError("entropy-coded substream ends too early")
        return symbols

    def finish(self) -> None:
        """Check that the string is used up and every lane is back at its start. Raises RansError otherwise."""
        if self._position != len(self._words) or (self._states != _LOW).any():
            raise RansError("entropy-coded substream does not end where its symbols do")


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _encode(symbols, rows, ends, cdf, start, radius, lanes):  # type: ignore[no-untyped-def]
    num_escapes = 0
    for i in range(len(symbols)):
        r = radius[rows[i]]
        num_escapes += (symbols[i] > r) | (symbols[i] < -r)
    words = np.empty(len(symbols) + num_escapes + 2 * lanes, dtype=np.uint16)
    states = np.full(lanes, np.uint32(65536), dtype=np.uint32)
    at = len(words)
    for segment in range(len(ends) - 1, -1, -1):
        first = ends[segment - 1] if segment else 0
        for i in range(ends[segment] - 1, first - 1, -1):
            lane = (i - first) & (lanes - 1)
            row = rows[i]
            r = radius[row]
            symbol = np.int32(symbols[i])
            x = states[lane]
            k = start[row] + symbol + r
            if symbol > r or symbol < -r:
                k = start[row] + 2 * r + 1
                at -= 1
                words[at] = x & np.uint32(0xFFFF)
                x = (x & np.uint32(0xFFFF0000)) | np.uint32(symbol + 32768)
            low = cdf[k]
            frequency = cdf[k + 1] - low
            if (x >> np.uint32(16)) >= frequency:
                at -= 1
                words[at] = x & np.uint32(0xFFFF)
                x >>= np.uint32(16)
            quotient = x // frequency
            states[lane] = (quotient << np.uint32(16)) + (x - quotient * frequency) + low
    for lane in range(lanes - 1, -1, -1):
        at -= 2
        words[at] = states[lane] & np.uint32(0xFFFF)
        words[at + 1] = states[lane] >> np.uint32(16)
    return words[at:]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _decode(words, at, states, rows, cdf, start, radius, prefix, symbols):  # type: ignore[no-untyped-def]
    lanes = len(states)
    num_words = len(words)
    for i in range(len(rows)):
        lane = i & (lanes - 1)
        row = rows[i]
        x = states[lane]
        slot = x & np.uint32(0xFFFF)
        base = start[row]
        k = base + np.int32(prefix[row, slot >> np.uint32(PRECISION_BITS - _PREFIX_BITS)])
        while cdf[k + 1] <= slot:
            k += 1
        low = cdf[k]
        x = (cdf[k + 1] - low) * (x >> np.uint32(16)) + slot - low
        if x < _LOW:
            if at >= num_words:
                return -1
            x = (x << np.uint32(16)) | np.uint32(words[at])
            at += 1
        r = radius[row]
        symbol = k - base - r
        if symbol > r:
            symbol = np.int32(x & np.uint32(0xFFFF)) - 32768
            if at >= num_words:
                return -1
            x = (x & np.uint32(0xFFFF0000)) | np.uint32(words[at])
            at += 1
        states[lane] = x
        symbols[i] = symbol
    return at


def _prefix_table(cdf: NDArray[np.uint32], start: NDArray[np.int32]) -> NDArray[np.uint16]:
    """For each row and leading bits of a slot, the first symbol that the slot can be: uint16 (rows, 2^_PREFIX_BITS)."""
    slots = np.arange(1 << _PREFIX_BITS, dtype=np.uint32) << np.uint32(PRECISION_BITS - _PREFIX_BITS)
    rows = [np.searchsorted(cdf[a:b], slots, side="right") - 1 for a, b in zip(start[:-1], start[1:], strict=True)]
    return np.stack(rows).astype(np.uint16)
