"""Trellis-coded quantisation of ``y`` (Marcellin and Fischer 1990; in VVC as dependent quantisation).

Reconstruction levels n are whole numbers that lie closer together than those of one quantiser of the same rate could.
Two quantisers share them: one has the even levels, the other the odd ones and 0. Which of them an element has depends
on the symbols before it, by a machine of 2048 states, so that a decoder knows it; an encoder takes, of all the ways
through the machine, the one with the least distortion plus rate (Viterbi's algorithm). Against one quantiser with a
dead zone this saves some 9 % of the bits; with 8 states it would be 5 %, with 64 7 %.

The coded elements of a half of ``y``, i = 0, 1, ... (cotam.entropy.skip), are dealt to NUM_PATHS paths, i mod
NUM_PATHS, each with a machine of its own that starts in state 0: no symbol waits for the one just before it.

The machine is a convolutional code like Ungerboeck's (1982) for amplitude modulation, in its form without feedback. Its
state is the last eleven bits that went in, the newest lowest. With parity(x) the sum of the bits of x modulo 2, and a
symbol k:

    odd = parity(state & 0x375)                   which quantiser
    n = 2 k - odd sign(k)                         the level
    bit = k + odd + parity(state & 0x691) mod 2    what goes in

The masks are the cheapest that a random search found for elements of photographs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cotam.entropy.compiled import compiled
from cotam.entropy.rans import RansDecoder, Segment, pop_symbol
from cotam.entropy.skip import coded_rows, drop_skipped, restore_skipped
from cotam.entropy.tables import LEVEL_STEP, NUM_SCALES

MEAN_STEPS = 8  # means and reconstructions of y are integers in units of 1/8
LEVEL_OFFSET = 1 / 8  # how much farther from the mean all but 0 are: a search by rate favours small levels
_UNIT, _OFFSET = np.float32(MEAN_STEPS * LEVEL_STEP), np.float32(MEAN_STEPS * LEVEL_OFFSET)
NUM_PATHS = 4
STATE_BITS = 11
NUM_STATES = 1 << STATE_BITS
_QUANTISER_TAPS, _SUBSET_TAPS = 0x375, 0x691  # numba's cache of search.py notices no change up to here


def _parity(states: NDArray[np.int64], taps: int) -> NDArray[np.int64]:
    bits: NDArray[np.int64] = ((states & taps)[:, None] >> np.arange(STATE_BITS) & 1).sum(1) & 1
    return bits


_STATES = np.arange(NUM_STATES)
ODD = _parity(_STATES, _QUANTISER_TAPS).astype(np.uint8)  # which quantiser a state has
_BITS = _parity(_STATES, _SUBSET_TAPS)[:, None] ^ ODD[:, None] ^ np.arange(2)
FOLLOWING = (2 * _STATES[:, None] + _BITS) % NUM_STATES  # (NUM_STATES, 2): the next state by k mod 2
# The same for the kernels, flat: the bit above the next state is its quantiser (in 64 bits: numpy 2 would keep 8).
_NEXT = (FOLLOWING + NUM_STATES * ODD[FOLLOWING].astype(np.int64)).astype(np.uint16).ravel()
# The levels n fall into four subsets, n mod 4, with 0 in 0 and in 3: (NUM_STATES,), the one with which a 0 goes in.
# The one two further goes with a 1; and in the state half of them further, the other way round.
SUBSET = (ODD + 2 * (_BITS[:, 0] ^ ODD)).astype(np.uint8)


def reconstruct(levels: Tensor) -> Tensor:
    """What float ``levels`` add to the means: whole numbers in units of 1/MEAN_STEPS."""
    return levels * int(_UNIT) + levels.sign() * int(_OFFSET)


def reconstruct_on(levels: NDArray[Any], means: NDArray[np.float32]) -> NDArray[np.float32]:
    """``reconstruct`` plus ``means``, of one contiguous shape, in one pass."""
    assert levels.shape == means.shape
    out = np.empty_like(means)
    _reconstruct_on(levels.reshape(-1), means.reshape(-1), _UNIT, _OFFSET, out.reshape(-1))
    return out


def coded_segment(levels: NDArray[Any], rows: NDArray[np.uint8]) -> Segment:
    """Symbols and CDF rows of what is coded of a half of ``y``: contiguous ``levels`` and scale indexes ``rows``."""
    segment: Segment = _to_symbols(*drop_skipped(levels, rows))
    return segment


def decode_levels(decoder: RansDecoder, rows: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The levels of a half of ``y``, the decoder's next segment, from contiguous scale indexes of the same shape.

    Raises RansError at the string's end.
    """
    coded = coded_rows(rows)
    levels = np.zeros(len(coded), dtype=np.int32)
    decoder.decode_with(_decode, coded, levels)
    return restore_skipped(levels, rows)


@compiled
def _reconstruct_on(levels, means, unit, offset, out):  # type: ignore[no-untyped-def]
    for k in range(len(out)):
        level = np.float32(levels[k])
        out[k] = level * unit + np.sign(level) * offset + means[k]


@compiled
def _to_symbols(levels, rows):  # type: ignore[no-untyped-def]
    symbols, cdf_rows = np.empty(levels.size, dtype=np.int16), np.empty(levels.size, dtype=np.uint8)
    states = np.zeros(NUM_PATHS, dtype=np.uint16)
    for k in range(levels.size):
        i = np.uint64(k)
        path = i & np.uint64(NUM_PATHS - 1)
        state, level = np.uint64(states[path]), np.int32(levels[i])
        odd = state >> np.uint64(STATE_BITS)
        symbol = (level + np.int32(odd) * (np.int32(level > 0) - np.int32(level < 0))) >> 1
        symbols[i] = symbol
        cdf_rows[i] = np.uint64(rows[i]) + odd * np.uint64(NUM_SCALES)
        states[path] = _NEXT[_branch(state, symbol)]
    return symbols, cdf_rows


@compiled
def _branch(state, symbol):  # type: ignore[no-untyped-def]
    """Where _NEXT has what follows a state, in its lowest bits, with a symbol."""
    return ((state & np.uint64(NUM_STATES - 1)) << np.uint64(1)) | np.uint64(np.uint32(symbol) & np.uint32(1))


@compiled
def _decode(words, at, states, entries, prefix, rows, levels):  # type: ignore[no-untyped-def]
    num_words = len(words) - 2
    last_lane = np.uint64(len(states) - 1)
    machines = np.zeros(NUM_PATHS, dtype=np.uint16)
    for forth in range(len(rows)):
        i = np.uint64(forth)
        path = i & np.uint64(NUM_PATHS - 1)
        state = np.uint64(machines[path])
        odd = state >> np.uint64(STATE_BITS)
        row = np.uint64(rows[i]) + odd * np.uint64(NUM_SCALES)
        at, x, symbol = pop_symbol(words, at, states[i & last_lane], row, entries, prefix)
        if at > num_words:
            break
        states[i & last_lane] = x
        levels[i] = np.int32(2) * symbol - np.int32(odd) * (np.int32(symbol > 0) - np.int32(symbol < 0))
        machines[path] = _NEXT[_branch(state, symbol)]
    return at
