"""Interleaved range asymmetric numeral systems (rANS, Duda 2013) over integer CDF tables, in numba.

Each lane has a 40-bit state x in [2^24, 2^40) and moves 16-bit words; symbol k of a segment belongs to lane k mod
lanes. All lanes share one word stream. The encoder runs backwards and writes the words back to front, so the decoder
reads states, then words, front to back, all little-endian. A symbol without an entry of its own is the row's escape
symbol, followed in the same lane by symbol + 2^15 as a raw 16-bit step. (States from 2^16 on, the least for frequencies
of 16 bits, cost 0.2 % more bits: integer divisions of small states round.)

A string is made of segments because a decoder learns the CDF rows of a later segment from an earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cotam.entropy.compiled import compiled
from cotam.entropy.tables import PRECISION_BITS, Tables

MAX_LANES_LOG2 = 3
SYMBOL_MAX = 2**15 - 1
_LOW_BITS, _WORD_BITS = np.uint64(24), np.uint64(16)
_LOW, _WORD = np.uint64(1 << 24), np.uint64(0xFFFF)
_UPPER = ~_WORD
_STATE_BYTES = 5
_PREFIX_BITS = 9
_ESCAPE = 2**15  # stands for the escape symbol in a table of symbols, being none itself
_SYMBOLS_PER_LANE = 2**16  # a lane costs 3 bytes of unused state, 0.05 % of what so many symbols take at low rates

Segment = tuple[NDArray[np.int16], NDArray[np.uint8]]


class RansError(ValueError):
    """A string that no encoder wrote for these tables and CDF rows."""


class RansCoder:
    """Encoder and decoder for one set of tables; stateless and safe to share between threads.

    Args:
        tables: the integer CDF tables, checked by the caller.
    """

    def __init__(self, tables: Tables) -> None:
        cdf, start = tables.cdf.astype(np.uint64), tables.start.astype(np.int64)
        frequency = np.diff(cdf, append=np.uint64(0))
        frequency[start[1:] - 1] = 1  # where a row ends there is no symbol
        symbols = [np.append(np.arange(-r, r + 1), [_ESCAPE, 0]) for r in tables.radius]
        # One load a symbol: cumulative frequency in bits 0-15, frequency in 16-31, the symbol from bit 32 on.
        self.entries = (
            (cdf & np.uint64(0xFFFF))
            | (frequency << np.uint64(16))
            | (np.concatenate(symbols).astype(np.uint32).astype(np.uint64) << np.uint64(32))
        )
        self.centre = tables.start[:-1].astype(np.int32) + tables.radius.astype(np.int32)
        self.radius = tables.radius.astype(np.int32)
        self.prefix = _prefix_table(tables)

    def encode(self, segments: Sequence[Segment], lanes_log2: int | None = None) -> tuple[bytes, int]:
        """Encode segments of symbols, each in [-32767, 32767], with their CDF rows.

        Args:
            segments: pairs of symbols, int16 (n,), and rows, uint8 (n,), decoded later in this order.
            lanes_log2: log2 of the number of lanes in [0, 3]; chosen from the number of symbols if None.

        Returns:
            The string, and log2 of its number of lanes.
        """
        num_symbols = sum(len(symbols) for symbols, _ in segments)
        if lanes_log2 is None:
            lanes_log2 = min(MAX_LANES_LOG2, (num_symbols // _SYMBOLS_PER_LANE).bit_length())
        states = np.full(1 << lanes_log2, _LOW, dtype=np.uint64)
        words = np.empty(2 * num_symbols + 1, dtype=np.uint16)  # an escape may move two words
        at = len(words)
        for symbols, rows in reversed(segments):
            at = _encode(symbols, rows, words, at, states, self.entries, self.centre, self.radius)
        return _to_bytes(states) + words[at:].astype("<u2").tobytes(), lanes_log2

    def decoder(self, string: bytes | memoryview, lanes_log2: int) -> RansDecoder:
        """Start decoding ``string``. Raises RansError when it cannot hold the lanes' states."""
        return RansDecoder(self, string, lanes_log2)


class RansDecoder:
    """Decodes one string, segment by segment."""

    def __init__(self, coder: RansCoder, string: bytes | memoryview, lanes_log2: int) -> None:
        states_end = _STATE_BYTES << lanes_log2
        if len(string) < states_end or (len(string) - states_end) % 2:
            raise RansError("entropy-coded substream has an impossible length")
        self._coder = coder
        self._states = _from_bytes(string[:states_end])
        words = np.frombuffer(string, dtype="<u2", offset=states_end).astype(np.uint16)
        self._num_words = len(words)
        self._words = np.append(words, np.zeros(2, dtype=np.uint16))  # symbols look up to two words ahead
        self._position = 0
        if (self._states < _LOW).any():
            raise RansError("entropy-coded substream starts with an impossible state")

    def decode(self, rows: NDArray[np.uint8]) -> NDArray[np.int16]:
        """The next segment's symbols, int16 (n,), for CDF rows uint8 (n,). Raises RansError at the string's end."""
        symbols = np.empty(len(rows), dtype=np.int16)
        self._position = _decode(
            self._words, self._position, self._states, rows, self._coder.entries, self._coder.prefix, symbols
        )
        self._check_position()
        return symbols

    def decode_with(self, kernel: Callable[..., int], *arguments: object) -> None:
        """Decode symbols whose rows depend on symbols before them. Raises RansError at the string's end.

        Args:
            kernel: ``kernel(words, at, states, entries, prefix, *arguments)`` in numba, which calls ``pop_symbol``
                and returns its last ``at``, at once when that is past the last word (two are appended).
            arguments: what it writes the symbols to, and the rest that it needs.
        """
        coder = self._coder
        self._position = kernel(self._words, self._position, self._states, coder.entries, coder.prefix, *arguments)
        self._check_position()

    def _check_position(self) -> None:
        if self._position > self._num_words:
            raise RansError("entropy-coded substream ends too early")

    def finish(self) -> None:
        """Check that the string is used up and every lane is back at its start. Raises RansError otherwise."""
        if self._position != self._num_words or (self._states != _LOW).any():
            raise RansError("entropy-coded substream does not end where its symbols do")


def _to_bytes(states: NDArray[np.uint64]) -> bytes:
    return states.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :_STATE_BYTES].tobytes()


def _from_bytes(data: bytes | memoryview) -> NDArray[np.uint64]:
    padded = np.zeros((len(data) // _STATE_BYTES, 8), dtype=np.uint8)
    padded[:, :_STATE_BYTES] = np.frombuffer(data, dtype=np.uint8).reshape(-1, _STATE_BYTES)
    return padded.view("<u8")[:, 0].astype(np.uint64)


# The kernels work in unsigned integers throughout: uint64 mixed with int64 becomes float64. Moving a word is
# branch-free, because no predictor guesses when one is due.


@compiled
def _encode(symbols, rows, words, at, states, entries, centre, radius):  # type: ignore[no-untyped-def]
    """Push one segment, last symbol first; words grow down from ``at``. Returns where they begin now."""
    last_lane = np.uint64(len(states) - 1)
    for back in range(len(symbols)):
        i = np.uint64(len(symbols) - 1 - back)
        row = rows[i]
        symbol = np.int64(symbols[i])
        x = states[i & last_lane]
        k = np.uint64(centre[row] + symbol)
        if abs(symbol) > radius[row]:
            k = np.uint64(centre[row] + radius[row] + 1)
            at -= 1
            words[np.uint64(at)] = x
            x = (x & _UPPER) | np.uint64(symbol + 32768)
        entry = np.uint64(np.uint32(entries[k]))
        frequency = entry >> _WORD_BITS
        full = x >= frequency << _LOW_BITS
        words[np.uint64(at - 1)] = x
        at -= full
        x >>= np.uint64(full) << np.uint64(4)
        # Exact: x has 40 bits, so its quotient is never so near to the next whole number that float64 rounds up to it.
        quotient = np.uint64(np.int64(np.float64(np.int64(x)) / np.float64(np.int64(frequency))))
        states[i & last_lane] = (quotient << _WORD_BITS) + x - quotient * frequency + (entry & _WORD)
    return at


@compiled
def pop_symbol(words, at, x, row, entries, prefix):  # type: ignore[no-untyped-def]
    """Pop one symbol off the state ``x``: the position after its words, the state and the symbol."""
    slot = np.uint32(x & _WORD)
    k = np.uint64(prefix[row, slot >> np.uint32(PRECISION_BITS - _PREFIX_BITS)])
    entry = entries[k]
    offset = slot - np.uint32(entry & _WORD)
    frequency = np.uint32(entry) >> np.uint32(16)
    while offset >= frequency:
        k += np.uint64(1)
        entry = entries[k]
        offset = slot - np.uint32(entry & _WORD)
        frequency = np.uint32(entry) >> np.uint32(16)
    x = np.uint64(frequency) * (x >> _WORD_BITS) + np.uint64(offset)
    word = np.uint64(words[np.uint64(at)])
    empty = x < _LOW
    at += empty
    x = (x << _WORD_BITS) | word if empty else x
    symbol = np.int32(entry >> np.uint64(32))
    if symbol == _ESCAPE:
        symbol = np.int32(x & _WORD) - np.int32(32768)
        x = (x & _UPPER) | np.uint64(words[np.uint64(at)])
        at += 1
    return at, x, symbol


@compiled
def _decode(words, at, states, rows, entries, prefix, symbols):  # type: ignore[no-untyped-def]
    """Pop one segment. Returns the position after its words: past the last word if there were not enough."""
    num_words = len(words) - 2
    last_lane = np.uint64(len(states) - 1)
    for forth in range(len(rows)):
        i = np.uint64(forth)
        at, x, symbol = pop_symbol(words, at, states[i & last_lane], rows[i], entries, prefix)
        if at > num_words:
            break
        states[i & last_lane] = x
        symbols[i] = symbol
    return at


def _prefix_table(tables: Tables) -> NDArray[np.uint32]:
    """The first entry that a slot with these leading bits can belong to: uint32 (rows, 2^_PREFIX_BITS)."""
    slots = np.arange(1 << _PREFIX_BITS, dtype=np.uint32) << np.uint32(PRECISION_BITS - _PREFIX_BITS)
    rows = [
        a + np.searchsorted(tables.cdf[a:b], slots, side="right") - 1
        for a, b in zip(tables.start[:-1], tables.start[1:], strict=True)
    ]
    return np.stack(rows).astype(np.uint32)
