"""The search for the cheapest levels of ``y``: Viterbi's algorithm on the machine of ``cotam.entropy.trellis``.

Of all the ways through the machine it takes the one with the least squared error plus rate, by the Gaussians that scale
indexes stand for. Ways reach 2048 states, each from two others, for every element, which is most of the time; so that
step is written in vectors (``_advance``), whose width LLVM adapts to the processor. Numba's own loops took twice as
long.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from cotam.entropy.compiled import compiled
from cotam.entropy.rans import SYMBOL_MAX
from cotam.entropy.tables import LEVEL_STEP, NUM_SCALES, NUM_SKIPPED_SCALES, PRECISION_BITS, level_mass, scales
from cotam.entropy.trellis import LEVEL_OFFSET, NUM_PATHS, NUM_STATES, STATE_BITS, SUBSET, coded_segment

# A squared error of one unit in bits: the high-rate optimum of a uniform quantiser of step 1, by what is best.
_BITS_PER_ERROR = 6 / math.log(2) / 0.6
_COSTED_LEVELS = 256  # rates of larger levels differ little
_BLOCK_STEPS, _LOOKAHEAD_STEPS = 2048, 192  # how many symbols of a path are decided at once, seeing so many more
_WINDOW_STEPS = _BLOCK_STEPS + _LOOKAHEAD_STEPS
_SHARED_SIZE = 2**15  # halves with fewer elements are not worth the threads
# Totals are uint8, of which a vector holds most; so many make a squared error of one unit. They are cut off at their
# largest: a way so much worse than the best is hardly ever taken. All this costs 0.03 % of the bits.
_COST_UNIT = np.float32(80)
_LARGEST_TOTAL = np.uint8(255)
_RESET_STEPS = 16  # the least total becomes 0 so often
# Costs are found in float32 throughout.
_ZERO, _ONE = map(np.float32, (0, 1))
_STEP, _STEPS_IN_UNIT, _OFFSET = map(np.float32, (LEVEL_STEP, 1 / LEVEL_STEP, LEVEL_OFFSET))
_LAST_COSTED, _LARGEST = np.float32(_COSTED_LEVELS - 1), np.float32(SYMBOL_MAX * LEVEL_STEP - 4)
_HALF_UNIT, _LARGEST_COST = np.float32(0.5), np.float32(255)
_HALF = NUM_STATES // 2
_LANES = 64  # states in a vector: 512 bits, which LLVM splits where there are fewer
_FLAG_WORDS = _HALF // _LANES
_STEP_BYTES = 2 * _HALF // 8


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
    best = np.empty((_WINDOW_STEPS, 4), dtype=np.uint8)  # by how much the best level of each subset costs more than all
    choices = np.empty((_WINDOW_STEPS, 4), dtype=np.int16)  # and which it is
    flags = np.empty((_WINDOW_STEPS, 2, _FLAG_WORDS), dtype=np.uint64)  # a bit a state: reached from the upper half
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
            steps = len(of_path)
            _choose(residuals, rows, costs, zero_costs, of_path, best, choices)
            state = _search(best, steps, starts[path], flags)
            decided = steps if ended else _BLOCK_STEPS
            starts[path] = _way_back(choices, flags, state, steps, decided, starts[path])
            for k in range(decided):
                levels[of_path[k]] = choices[k, 0]
        n -= block
        where[: max(n, 0)] = where[block : block + max(n, 0)]


@compiled
def _choose(residuals, rows, costs, zero_costs, where, best, choices):  # type: ignore[no-untyped-def]
    """Of each subset the cheapest level for the elements at ``where``."""
    totals, levels = np.empty(4, dtype=np.float32), np.empty(4, dtype=np.int16)
    for t in range(len(where)):
        i = np.uint64(where[t])
        residual, row = residuals[i], np.uint32(rows[i])
        row_at = row * np.uint32(_COSTED_LEVELS)
        magnitude = abs(residual)
        magnitude = magnitude if magnitude < _LARGEST else _LARGEST  # nor is NaN
        sign = np.int16(1) if residual >= _ZERO else np.int16(-1)
        lowest = max(np.floor(magnitude * _STEPS_IN_UNIT) - _ONE, _ZERO)
        for k in range(4):  # one of each subset
            level = lowest + np.float32(k)
            error = magnitude - (level * _STEP + min(level, _ONE) * _OFFSET)
            own = np.uint32(level) & np.uint32(3)
            totals[own] = error * error + costs[row_at + np.uint32(min(level, _LAST_COSTED))]
            levels[own] = level
        square = magnitude * magnitude
        for subset, cost in ((0, costs[row_at]), (3, zero_costs[row])):
            if square + cost < totals[subset]:
                totals[subset], levels[subset] = square + cost, 0
        least = min(min(totals[0], totals[1]), min(totals[2], totals[3]))
        for subset in range(4):
            choices[t, subset] = sign * levels[subset]
            best[t, subset] = np.uint8(min((totals[subset] - least) * _COST_UNIT + _HALF_UNIT, _LARGEST_COST))


@compiled
def _search(best, steps, start, flags):  # type: ignore[no-untyped-def]
    """Take a path ``steps`` further: the state it ends in, and in ``flags`` which were reached from the upper half."""
    memory = np.full(2 * NUM_STATES + _LANES, _LARGEST_TOTAL, dtype=np.uint8)
    memory = memory[(-memory.ctypes.data) % _LANES :]  # vectors lie in one cache line each
    totals, following = memory[:NUM_STATES], memory[NUM_STATES : 2 * NUM_STATES]
    totals[start] = 0
    cost_at, flags_at = np.uint64(best.ctypes.data), np.uint64(flags.ctypes.data)
    for t in range(np.uint64(steps)):
        _advance(np.uint64(totals.ctypes.data), cost_at, np.uint64(following.ctypes.data), flags_at)  # type: ignore[call-arg]
        totals, following = following, totals
        cost_at, flags_at = cost_at + np.uint64(4), flags_at + np.uint64(_STEP_BYTES)
        if t % _RESET_STEPS == _RESET_STEPS - 1:
            least = _LARGEST_TOTAL
            for k in range(np.uint64(NUM_STATES)):
                least = totals[k] if totals[k] < least else least
            for k in range(np.uint64(NUM_STATES)):
                totals[k] = np.uint8(totals[k] - least)
    reached = min(steps, STATE_BITS)  # so many bits of the start have left
    first = (start << reached) % NUM_STATES
    return first + np.argmin(totals[first : first + (1 << reached)])


@compiled
def _way_back(choices, flags, state, steps, decided, start):  # type: ignore[no-untyped-def]
    """From the last state to ``start``; what is taken goes to ``choices[:, 0]``. The state after ``decided`` steps."""
    end = state
    for back in range(steps):
        t = np.uint64(steps - 1 - back)
        if t == decided - 1:
            end = state
        bit, before = state & 1, state >> 1
        # The first bits to leave the state are those of the start, whatever totals cut off said.
        if t < STATE_BITS:
            upper = start >> (STATE_BITS - 1 - np.int64(t)) & 1
        else:
            upper = np.int64(flags[t, np.uint64(bit), np.uint64(before // _LANES)] >> np.uint64(before % _LANES)) & 1
        state = before + _HALF * upper
        choices[t, 0] = choices[t, np.uint64(SUBSET[np.uint64(state)] ^ (2 * bit))]
    return end


@intrinsic
def _advance(_: Any, totals: Any, costs: Any, following: Any, flags: Any) -> Any:
    """One step of all states, from the addresses of their totals, the four subsets' costs, and where results belong.

    The state before, k or k + _HALF, has the two ways 2 k and 2 k + 1 on. Those with a 0 cost what the subset of k
    costs from k and the one two further from k + _HALF, those with a 1 the other way round. Subsets are parities, so
    those of a vector's states are those of the first vector, exclusive or with that of its first state.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, addresses: Sequence[ir.Value]) -> Any:
        byte, word = ir.IntType(8), ir.IntType(_LANES)
        vector = ir.VectorType(byte, _LANES)

        def function(name: str) -> ir.Function:
            name = f"llvm.{name}.v{_LANES}i8"
            module, type = builder.module, ir.FunctionType(vector, [vector, vector])
            return module.globals[name] if name in module.globals else ir.Function(module, type, name)

        add, least = function("uadd.sat"), function("umin")
        totals_at, costs_at, following_at, flags_at = (builder.inttoptr(a, byte.as_pointer()) for a in addresses)

        def pointer(base: ir.Value, offset: int, type: ir.Type) -> ir.Value:
            return builder.bitcast(builder.gep(base, [ir.IntType(64)(offset)]), type.as_pointer())

        def shuffled(a: ir.Value, b: ir.Value, indexes: Any) -> ir.Value:
            index = ir.IntType(32)
            mask = ir.Constant(ir.VectorType(index, _LANES), [index(int(i)) for i in indexes])
            return builder.shuffle_vector(a, b, mask)

        four = builder.load(pointer(costs_at, 0, ir.VectorType(byte, 4)), align=1)
        of_subsets = [shuffled(four, four, SUBSET[:_LANES] ^ subset) for subset in range(4)]
        lanes = np.arange(_LANES)
        for k in range(0, _HALF, _LANES):
            one, other = of_subsets[SUBSET[k]], of_subsets[SUBSET[k] ^ 2]
            lower, upper = (builder.load(pointer(totals_at, s, vector), align=_LANES) for s in (k, k + _HALF))
            reached = []
            for bit, (of_lower, of_upper) in enumerate(((one, other), (other, one))):
                from_lower, from_upper = builder.call(add, [lower, of_lower]), builder.call(add, [upper, of_upper])
                reached.append(builder.call(least, [from_lower, from_upper]))
                is_upper = builder.bitcast(builder.icmp_unsigned("<", from_upper, from_lower), word)
                builder.store(is_upper, pointer(flags_at, (bit * _HALF + k) // 8, word), align=1)
            for part in range(2):
                mixed = shuffled(reached[0], reached[1], (lanes % 2 * _LANES) + lanes // 2 + part * _LANES // 2)
                builder.store(mixed, pointer(following_at, 2 * k + part * _LANES, vector), align=_LANES)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp, types.uintp), codegen
