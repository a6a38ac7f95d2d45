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

import functools
import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cotam.entropy.compiled import compiled
from cotam.entropy.rans import SYMBOL_MAX, RansDecoder, Segment, pop_symbol
from cotam.entropy.skip import coded_rows, drop_skipped, restore_skipped
from cotam.entropy.tables import LEVEL_STEP, NUM_SCALES, NUM_SKIPPED_SCALES, PRECISION_BITS, level_mass, scales

MEAN_STEPS = 8  # means and reconstructions of y are integers in units of 1/8
LEVEL_OFFSET = 1 / 8  # how much farther from the mean all but 0 are: a search by rate favours small levels
NUM_PATHS = 4
_STATE_BITS = 11
NUM_STATES = 1 << _STATE_BITS
_QUANTISER_TAPS, _SUBSET_TAPS = 0x375, 0x691
# A squared error of one unit in bits: the high-rate optimum of a uniform quantiser of step 1, by what is best.
_BITS_PER_ERROR = 6 / math.log(2) / 0.6
_COSTED_LEVELS = 256  # rates of larger levels differ little
_BLOCK_STEPS, _LOOKAHEAD_STEPS = 2048, 192  # how many symbols of a path are decided at once, seeing so many more
_WINDOW_STEPS = _BLOCK_STEPS + _LOOKAHEAD_STEPS
_STEPS_MASK = 2 * _BLOCK_STEPS - 1  # takes nothing from the number of a step in a window
_SHARED_SIZE = 2**15  # halves with fewer elements are not worth the threads
_HALF, _EIGHTH = NUM_STATES // 2, NUM_STATES // 16
# Totals are uint8, of which a vector holds most; so many make a squared error of one unit. They are cut off at their
# largest: a way so much worse than the best is hardly ever taken. All this costs 0.03 % of the bits.
_COST_UNIT = np.float32(80)
_LARGEST_TOTAL = np.uint8(255)
_RESET_STEPS = 16  # the least total becomes 0 so often
# Costs are found in float32 throughout: numba makes 64 bits of mixed numbers, and no vectors.
_ZERO, _ONE, _FOUR, _QUARTER = map(np.float32, (0, 1, 4, 0.25))
_STEP, _STEPS_IN_UNIT, _OFFSET = map(np.float32, (LEVEL_STEP, 1 / LEVEL_STEP, LEVEL_OFFSET))
_LAST_COSTED, _LARGEST = np.float32(_COSTED_LEVELS - 1), np.float32(SYMBOL_MAX * LEVEL_STEP - 4)
_HALF_UNIT, _LARGEST_COST = np.float32(0.5), np.float32(255)


def _parity(states: NDArray[np.int64], taps: int) -> NDArray[np.int64]:
    bits: NDArray[np.int64] = ((states & taps)[:, None] >> np.arange(_STATE_BITS) & 1).sum(1) & 1
    return bits


_STATES = np.arange(NUM_STATES)
ODD = _parity(_STATES, _QUANTISER_TAPS).astype(np.uint8)  # which quantiser a state has
_BITS = _parity(_STATES, _SUBSET_TAPS)[:, None] ^ ODD[:, None] ^ np.arange(2)
FOLLOWING = (2 * _STATES[:, None] + _BITS) % NUM_STATES  # (NUM_STATES, 2): the next state by k mod 2
# The same for the kernels, flat: the bit above the next state is its quantiser (in 64 bits: numpy 2 would keep 8).
_NEXT = (FOLLOWING + NUM_STATES * ODD[FOLLOWING].astype(np.int64)).astype(np.uint16).ravel()
# The levels n fall into four subsets, n mod 4, with 0 in 0 and in 3: (NUM_STATES,), the one with which a 0 goes in.
# The one two further goes with a 1; and in the state _HALF further, the other way round.
_SUBSET = (ODD + 2 * (_BITS[:, 0] ^ ODD)).astype(np.uint8)
# All bits of the subset's lower bit, and of its upper one.
_LOWER, _UPPER = ((-(bit.astype(np.int16))).astype(np.uint8) for bit in (_SUBSET[:_HALF] & 1, _SUBSET[:_HALF] >> 1))


def reconstruct(levels: Tensor) -> Tensor:
    """What float ``levels`` add to the means: whole numbers in units of 1/MEAN_STEPS."""
    return levels * int(MEAN_STEPS * LEVEL_STEP) + levels.sign() * int(MEAN_STEPS * LEVEL_OFFSET)


def quantise(residuals: NDArray[np.float32], rows: NDArray[np.uint8], num_threads: int = 1) -> NDArray[np.int16]:
    """Levels of a half of ``y`` of each of B images, 0 where nothing is coded.

    Args:
        residuals: ``y`` less its means, contiguous (B, ...), an image in the order of coding.
        rows: scale indexes, of the same shape.
        num_threads: how many share the images, or the paths of an image.
    """
    levels = np.zeros(residuals.shape, dtype=np.int16)
    shares = NUM_PATHS if len(levels) < num_threads and levels[0].size >= _SHARED_SIZE else 1

    def search(image: int, share: int) -> None:
        arrays = residuals[image].ravel(), rows[image].ravel(), levels[image].reshape(-1)
        _quantise(*arrays, *_costs(), NUM_SKIPPED_SCALES, share, shares)

    tasks = list(itertools.product(range(len(levels)), range(shares)))
    if num_threads == 1 or len(tasks) == 1:
        list(itertools.starmap(search, tasks))
    else:
        list(_threads(num_threads).map(search, *zip(*tasks, strict=True)))
    return levels


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, thread_name_prefix="trellis")


os.register_at_fork(after_in_child=_threads.cache_clear)  # threads stay behind


def coded_segment(levels: NDArray[Any], rows: NDArray[np.uint8]) -> Segment:
    """Symbols and CDF rows of what is coded of a half of ``y``: contiguous ``levels`` and scale indexes ``rows``."""
    segment: Segment = _to_symbols(*drop_skipped(levels, rows))
    return segment


def estimated_bits(levels: NDArray[np.int32], rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What each of a half's ``levels`` costs by the Gaussian of its scale index: float32 of their shape."""
    symbols, cdf_rows = coded_segment(levels, rows)
    odd, scale_index = np.divmod(cdf_rows, NUM_SCALES)
    magnitudes = np.minimum(2 * np.abs(symbols.astype(np.int32)) - (odd & (symbols != 0)), _COSTED_LEVELS - 1)
    costs, zero_costs = _costs()
    bits = np.zeros(levels.shape, dtype=np.float32)
    bits[rows >= NUM_SKIPPED_SCALES] = _BITS_PER_ERROR * np.where(
        odd & (symbols == 0), zero_costs[scale_index], costs[scale_index.astype(int) * _COSTED_LEVELS + magnitudes]
    )
    return bits


def decode_levels(decoder: RansDecoder, rows: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The levels of a half of ``y``, the decoder's next segment, from contiguous scale indexes of the same shape.

    Raises RansError at the string's end.
    """
    coded = coded_rows(rows)
    levels = np.zeros(len(coded), dtype=np.int32)
    decoder.decode_with(_decode, coded, levels)
    return restore_skipped(levels, rows)


@functools.cache
def _costs() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rates as squared errors: of levels, (NUM_SCALES * _COSTED_LEVELS,), and of 0 among odd ones, (NUM_SCALES,)."""
    levels, zero = np.empty((NUM_SCALES, _COSTED_LEVELS)), np.empty(NUM_SCALES)
    symbols = np.arange(_COSTED_LEVELS // 2 + 1)
    for row, scale in enumerate(scales()):
        even, odd = (level_mass(symbols, quantiser, scale / LEVEL_STEP) for quantiser in (0, 1))
        levels[row, 0::2], levels[row, 1::2], zero[row] = even[:-1], odd[1:], odd[0]
    return _as_cost(levels).ravel(), _as_cost(zero)


def _as_cost(mass: NDArray[np.float64]) -> NDArray[np.float32]:
    bits = -np.log2(np.maximum(mass, 2.0 ** -(PRECISION_BITS + 2)))
    return (bits / _BITS_PER_ERROR).astype(np.float32)


@compiled
def _quantise(residuals, rows, levels, costs, zero_costs, num_skipped, share, shares):  # type: ignore[no-untyped-def]
    """Find the levels of the elements on paths ``share``, ``share + shares``, ..."""
    block, window = _BLOCK_STEPS * NUM_PATHS, _WINDOW_STEPS * NUM_PATHS
    where = np.empty(window + 1, dtype=np.int64)
    best = np.empty((4, _WINDOW_STEPS), dtype=np.uint8)  # by how much the best level of each subset costs more than all
    choices = np.empty((4, _WINDOW_STEPS), dtype=np.int16)  # and which it is
    taken = np.empty((_WINDOW_STEPS, 2, _EIGHTH), dtype=np.uint8)
    starts = np.zeros(NUM_PATHS, dtype=np.int64)
    at = n = 0
    ended = False
    while not ended:
        while at < residuals.size and n < window:
            where[n] = at
            n += rows[at] >= num_skipped
            at += 1
        ended = at == residuals.size
        for path in range(share, min(NUM_PATHS, n), shares):
            of_path = where[path:n:NUM_PATHS]
            _choose(residuals, rows, costs, zero_costs, of_path, best, choices)
            state = _search(best, len(of_path), starts[path], taken)
            decided = len(of_path) if ended else _BLOCK_STEPS
            start = starts[path]
            for back in range(len(of_path)):
                t = len(of_path) - 1 - back
                if t == decided - 1:
                    starts[path] = state
                bit, before = state & 1, state >> 1
                # The first bits to leave the state are those of the start, whatever totals cut off said.
                if t < _STATE_BITS:
                    upper = start >> (_STATE_BITS - 1 - t) & 1
                else:
                    upper = np.int64(taken[t, bit, before % _EIGHTH]) >> (before // _EIGHTH) & 1
                before += _HALF * upper
                if t < decided:
                    level = choices[_SUBSET[before] ^ (2 * bit), t]
                    levels[of_path[t]] = level if residuals[of_path[t]] >= 0 else -level
                state = before
        n -= block
        where[: max(n, 0)] = where[block : block + max(n, 0)]


@compiled
def _choose(residuals, rows, costs, zero_costs, where, best, choices):  # type: ignore[no-untyped-def]
    """Of each subset the cheapest level, as a magnitude, for the elements at ``where``."""
    totals = np.empty(4, dtype=np.float32)
    for t in range(len(where)):
        i = np.uint64(where[t])
        magnitude, row = abs(residuals[i]), np.uint32(rows[i])
        magnitude = magnitude if magnitude < _LARGEST else _LARGEST  # nor is NaN
        lowest = max(np.floor(magnitude * _STEPS_IN_UNIT) - _ONE, _ZERO)
        square = magnitude * magnitude
        for subset in range(4):  # the levels from ``lowest`` on have one of each among four
            first = np.float32(subset)
            level = first + _FOUR * np.ceil((lowest - first) * _QUARTER)
            error = magnitude - (level * _STEP + min(level, _ONE) * _OFFSET)
            cost = costs[np.uint32(row * np.uint32(_COSTED_LEVELS)) + np.uint32(min(level, _LAST_COSTED))]
            total = error * error + cost
            if subset == 0 or subset == 3:
                zero = square + (costs[np.uint32(row * np.uint32(_COSTED_LEVELS))] if subset == 0 else zero_costs[row])
                if zero < total:
                    total, level = zero, _ZERO
            totals[subset] = total
            choices[subset, t] = np.int16(level)
        least = min(min(totals[0], totals[1]), min(totals[2], totals[3]))
        for subset in range(4):
            best[subset, t] = np.uint8(min((totals[subset] - least) * _COST_UNIT + _HALF_UNIT, _LARGEST_COST))


@compiled
def _search(best, steps, start, taken):  # type: ignore[no-untyped-def]
    """Take a path ``steps`` further: the state it ends in, and in ``taken`` which were reached from the upper half."""
    totals = np.full(NUM_STATES, _LARGEST_TOTAL, dtype=np.uint8)
    totals[start] = 0
    even, odd = np.empty(_HALF, dtype=np.uint8), np.empty(_HALF, dtype=np.uint8)
    from_uppers = np.empty((2, _HALF), dtype=np.uint8)
    half, two, one_more = np.uint64(_HALF), np.uint64(2), np.uint64(1)
    for t in range(steps):
        cost0, cost2 = best[0, t], best[2, t]
        either01, either23 = cost0 ^ best[1, t], cost2 ^ best[3, t]
        # Masked, though t is no larger: or LLVM fears that rows wrap around to others, and makes no vectors.
        row = np.uint64(t & _STEPS_MASK)
        for k in range(half):
            one = np.uint8(cost0 ^ (_LOWER[k] & either01))
            other = np.uint8(cost2 ^ (_LOWER[k] & either23))
            either = np.uint8((one ^ other) & _UPPER[k])
            one, other = np.uint8(one ^ either), np.uint8(other ^ either)
            lower, upper = totals[k], totals[k + half]
            from_lower, from_upper = _add(lower, one), _add(upper, other)
            even[k] = from_upper if from_upper < from_lower else from_lower
            from_uppers[0, k] = from_upper < from_lower
            from_lower, from_upper = _add(lower, other), _add(upper, one)
            odd[k] = from_upper if from_upper < from_lower else from_lower
            from_uppers[1, k] = from_upper < from_lower
        for k in range(half):
            totals[two * k] = even[k]
            totals[two * k + one_more] = odd[k]
        _pack(from_uppers[0], taken[row, 0])
        _pack(from_uppers[1], taken[row, 1])
        if t % _RESET_STEPS == _RESET_STEPS - 1:
            least = _LARGEST_TOTAL
            for k in range(np.uint64(NUM_STATES)):
                least = totals[k] if totals[k] < least else least
            for k in range(np.uint64(NUM_STATES)):
                totals[k] = np.uint8(totals[k] - least)
    reached = min(steps, _STATE_BITS)  # so many bits of the start have left
    first = (start << reached) % NUM_STATES
    return first + np.argmin(totals[first : first + (1 << reached)])


@compiled
def _pack(flags, packed):  # type: ignore[no-untyped-def]
    """Eight to a byte, in a form that becomes vectors: bits of a byte are _EIGHTH apart."""
    n = np.uint64(_EIGHTH)
    for k in range(n):
        bits = flags[k]
        for part in range(1, 8):
            bits |= np.uint8(flags[k + np.uint64(part) * n] << np.uint8(part))
        packed[k] = bits


@compiled
def _add(total, cost):  # type: ignore[no-untyped-def]
    both = np.uint8(total + cost)
    return both if both >= total else _LARGEST_TOTAL


@compiled
def _to_symbols(levels, rows):  # type: ignore[no-untyped-def]
    symbols, cdf_rows = np.empty(levels.size, dtype=np.int16), np.empty(levels.size, dtype=np.uint8)
    states = np.zeros(NUM_PATHS, dtype=np.uint16)
    for k in range(levels.size):
        i = np.uint64(k)
        path = i & np.uint64(NUM_PATHS - 1)
        state, level = np.uint64(states[path]), np.int32(levels[i])
        odd = state >> np.uint64(_STATE_BITS)
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
        odd = state >> np.uint64(_STATE_BITS)
        row = np.uint64(rows[i]) + odd * np.uint64(NUM_SCALES)
        at, x, symbol = pop_symbol(words, at, states[i & last_lane], row, entries, prefix)
        if at > num_words:
            break
        states[i & last_lane] = x
        levels[i] = np.int32(2) * symbol - np.int32(odd) * (np.int32(symbol > 0) - np.int32(symbol < 0))
        machines[path] = _NEXT[_branch(state, symbol)]
    return at
