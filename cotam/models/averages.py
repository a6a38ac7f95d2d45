"""What the trellis search makes of an element on average: smooth where the search is not, so that training can use it.

The search (cotam.entropy.search) has no gradient, and what it decides about an element depends on all others of its
path. But the state of the machine is as good as random: given an element's scale index and its magnitude, its level,
its bits and its reconstruction have distributions of their own, which are measured here on random numbers. Training
draws levels from the one and takes the means of the others, with their slopes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotam.entropy.search import quantise
from cotam.entropy.tables import LEVEL_STEP, NUM_SCALES, NUM_SKIPPED_SCALES, Tables, code_lengths, scales
from cotam.entropy.trellis import LEVEL_OFFSET, coded_segment

_LARGEST = 4.0  # magnitudes are measured up to here; beyond, all is as it was a whole number of levels before
_PER_UNIT = 12  # nodes a unit of magnitude, between which everything is linear
_NODES = int(_LARGEST * _PER_UNIT) + 1
_SAMPLES = 2**22
_PROBES = 0.03  # of them are of any scale and half of those, and 0.03 of the others, of any magnitude
_BINS_PER_UNIT = 32
_BINS = int(_LARGEST * _BINS_PER_UNIT)
_DRAWS = 256  # equally probable levels of each bin
_LEVELS = np.arange(-4, 13)  # with the sign of the element: no search goes farther


class SearchAverages(NamedTuple):
    """Measured for one set of CDF tables.

    bits, magnitudes: float (NUM_SCALES * nodes,), the mean bits and reconstruction at each node of magnitude, the
    latter with the sign of the element. draws: int8 (NUM_SCALES * bins * draws,), equally probable levels of each bin
    of magnitude, with that sign, too.
    """

    bits: Tensor
    magnitudes: Tensor
    draws: Tensor

    @classmethod
    def measure(cls, tables: Tables, rows: NDArray[np.uint8]) -> SearchAverages:
        """Search random numbers; always the same ones for the same arguments. Takes about two seconds.

        Args:
            tables: what levels are coded with.
            rows: scale indexes of coded elements in the order of coding: whether a machine's state costs an element
                little depends on which others are on its path.
        """
        rng = np.random.default_rng(0)
        every = np.arange(NUM_SKIPPED_SCALES, NUM_SCALES, dtype=np.uint8)
        rows = np.resize(rows if len(rows) else every, _SAMPLES)  # a model that codes nothing yet has none
        of_any_scale = rng.random(_SAMPLES) < _PROBES
        rows[of_any_scale] = rng.integers(NUM_SKIPPED_SCALES, NUM_SCALES, np.count_nonzero(of_any_scale), np.uint8)
        residuals = rng.standard_normal(_SAMPLES, np.float32) * scales().astype(np.float32)[rows]
        anywhere = rng.random(_SAMPLES) < np.where(of_any_scale, 0.5, _PROBES)
        residuals[anywhere] = rng.uniform(-_LARGEST - 0.2, _LARGEST + 0.2, np.count_nonzero(anywhere))
        levels = quantise(residuals[None], rows[None], torch.get_num_threads())[0]
        lengths = code_lengths(*coded_segment(levels, rows), tables)

        measured = np.flatnonzero(np.abs(residuals) < _LARGEST)
        position = np.abs(residuals[measured]) * _PER_UNIT
        low = position.astype(np.int64)
        weight, cells = position - low, rows[measured].astype(np.int64) * _NODES + low
        weights, cells = np.concatenate([1 - weight, weight]), np.concatenate([cells, cells + 1])
        signed = np.where(residuals < 0, -levels, levels)[measured].clip(_LEVELS[0], _LEVELS[-1])
        values = LEVEL_STEP * signed + LEVEL_OFFSET * np.sign(signed)
        bits, magnitudes = (_means(cells, weights, np.tile(v, 2)) for v in (lengths[measured], values))
        bins = (np.abs(residuals[measured]) * _BINS_PER_UNIT).astype(np.int64)
        cells = rows[measured].astype(np.int64) * _BINS + bins
        at = cells * len(_LEVELS) + signed - _LEVELS[0]
        shares = np.bincount(at, minlength=NUM_SCALES * _BINS * len(_LEVELS)).reshape(-1, len(_LEVELS)).cumsum(1)
        quantiles = (np.arange(_DRAWS) + 0.5) / _DRAWS
        drawn = _LEVELS[(shares[:, None, :-1] < quantiles[:, None] * shares[:, -1:, None]).sum(2)]
        nearest = np.round((np.arange(_BINS) + 0.5) / _BINS_PER_UNIT / LEVEL_STEP).astype(np.int64)
        drawn = np.where(shares[:, -1:] > 0, drawn, np.tile(nearest, NUM_SCALES)[:, None])  # a bin may have seen none
        drawn[: NUM_SKIPPED_SCALES * _BINS] = 0
        return cls(
            torch.from_numpy(bits).float().flatten(),
            torch.from_numpy(magnitudes).float().flatten(),
            torch.from_numpy(drawn.astype(np.int8)).flatten(),
        )

    def to(self, device: torch.device) -> SearchAverages:
        """On another device."""
        return SearchAverages(*(t.to(device) for t in self))

    @torch.no_grad()
    def draw(self, residual: Tensor, indexes: Tensor) -> Tensor:
        """Levels as the search has them, as float32: of ``y`` less its means, with its scale indexes."""
        magnitude = residual.abs()
        levels_off = ((magnitude - _LARGEST) / LEVEL_STEP).ceil().clamp_min_(0)
        bin_ = ((magnitude - levels_off * LEVEL_STEP) * _BINS_PER_UNIT).floor().clamp_(0, _BINS - 1)
        random = (torch.rand_like(residual) * _DRAWS).long()
        cell = (indexes * _BINS + bin_).long() * _DRAWS + random
        levels = self.draws[cell] + levels_off * (indexes >= NUM_SKIPPED_SCALES)
        return levels * residual.sign()

    def mean_bits(self, residual: Tensor, indexes: Tensor) -> Tensor:
        """Mean bits, 0 where nothing is coded; constant beyond what was measured. Differentiable by ``residual``."""
        return self._interpolated(self.bits, residual.abs().clamp_max(_LARGEST), indexes)

    def mean_reconstruction(self, residual: Tensor, indexes: Tensor) -> Tensor:
        """Mean reconstruction; beyond the largest magnitude ``residual``. Differentiable by it."""
        mean = self._interpolated(self.magnitudes, residual.abs().clamp_max(_LARGEST), indexes) * residual.sign()
        return torch.where(self.beyond(residual, indexes), residual, mean)

    @staticmethod
    def beyond(residual: Tensor, indexes: Tensor) -> Tensor:
        """Which elements are coded, and larger than what was measured."""
        return (residual.abs() > _LARGEST) & (indexes >= NUM_SKIPPED_SCALES)

    @staticmethod
    def _interpolated(table: Tensor, magnitude: Tensor, indexes: Tensor) -> Tensor:
        position = magnitude * _PER_UNIT
        node = position.detach().floor().clamp_(0, _NODES - 2)
        cell = (indexes.detach() * _NODES + node).long()
        low, high = table[cell], table[cell + 1]
        return low + (high - low) * (position - node)


def _means(cells: NDArray[Any], weights: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """Weighted means of ``values`` in each cell, (NUM_SCALES, nodes); where there is none, between those beside it."""
    size = NUM_SCALES * _NODES
    total, sums = (np.bincount(cells, w, size).reshape(NUM_SCALES, _NODES) for w in (weights, weights * values))
    means = np.zeros((NUM_SCALES, _NODES))
    for row in range(NUM_SKIPPED_SCALES, NUM_SCALES):
        found = np.flatnonzero(total[row] > 0)
        means[row] = np.interp(np.arange(_NODES), found, sums[row, found] / total[row, found])
    return means
