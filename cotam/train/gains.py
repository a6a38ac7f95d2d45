"""Gains of groups of channels by what they really cost: coordinate descent on real bits at equal PSNR.

Training sees rates through noise and distortion straight through the quantiser, and both say little about channels
whose elements mostly become 0: it leaves the steps of weak channels too fine and those of strong ones too coarse. Real
code lengths and real errors, level by level, mend that (docs/training.md has what it saved).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cotam.config import Q_STEPS
from cotam.entropy.rans import Segment
from cotam.entropy.tables import Tables, build_tables
from cotam.models.codec_model import CodecModel
from cotam.train.rates import code_length, count_symbols, segments_of

_EDGES = (0, 3, 16, 64, 128, 208)  # of the groups; channels are in the order of their energy
_GAIN_STEP, _RATIO_STEP = 0.16, 0.03  # of log gain and of the log of its inverse's part, halved in every further round
_ROUNDS = 2
_MOST_MOVES = 8  # of a group in one direction and round
_LEAST = 1e-4  # a smaller share of the bits is noise


class Cost(NamedTuple):
    """Bits of all crops, and the mean squared error of each, (B,)."""

    bits: float
    mse: Tensor


class RealCost:
    """What the crops cost at one quality, by tables fitted to them as the model is now.

    Args:
        model: frozen; its gains may change between calls.
        crops: batches, uint8 (B, 3, S, S).
        q: the quality index.
    """

    def __init__(self, model: CodecModel, crops: list[Tensor], q: int) -> None:
        self._model, self._crops = model, [batch.to(model.gains.log_gain.device) for batch in crops]
        self._q = torch.full((1, 1, 1, 1), float(q), device=self._crops[0].device)
        with torch.inference_mode():
            self._raw = [model.g_a(batch.float() / 255).float() for batch in self._crops]  # gains do not change it
        self._tables: Tables = build_tables(count_symbols(s for k in range(len(crops)) for s in self._code(k)[0]))

    def __call__(self) -> Cost:
        """The cost with the gains as they are."""
        bits, errors = 0.0, []
        for k, batch in enumerate(self._crops):
            segments, x_hat = self._code(k)
            bits += code_length(segments, self._tables)
            errors.append((x_hat.float() - batch.float()).square().mean((1, 2, 3)))
        return Cost(bits, torch.cat(errors))

    @torch.inference_mode()
    def _code(self, k: int) -> tuple[list[Segment], Tensor]:
        """Symbols of a batch, and its decoded images."""
        model, raw = self._model, self._raw[k]
        q = self._q.expand(len(raw), 1, 1, 1)
        y = raw * model.gains.gain(q)
        quantised = model.quantise(y, model.h_a(y).float().round(), q)
        y_fixed = [model.y_fixed(*half) for half in zip(quantised.levels, quantised.params, strict=True)]
        return segments_of(model, model.pack(quantised), q), model.reconstruct(torch.stack(y_fixed, dim=1), q)


@torch.no_grad()
def tune_gains(model: CodecModel, crops: list[Tensor], levels: range, say: Callable[[str], None]) -> None:
    """Move the gains of groups of channels, and their inverses, to fewer bits at equal PSNR.

    Args:
        model: frozen; only its gains change.
        crops: batches of training crops, uint8 (B, 3, S, S).
        levels: which, from 0.
        say: told a line for every level.
    """
    for level in levels:
        saved = _tune_level(model, crops, level)
        say(f"gains of quality {level + 1}: {100 * saved:.2f} % fewer bits at equal PSNR")


def _tune_level(model: CodecModel, crops: list[Tensor], level: int) -> float:
    """The share of the bits saved."""
    gains, q = model.gains, level * Q_STEPS
    num_channels = model.config.num_channels(q)
    # Not by changing all gains alike, which is no good way from one quality to another.
    beside = (max(q - 1, 0), min(q + 1, model.config.num_q - 1))
    trade_off = _trade_off(*(RealCost(model, crops, index)() for index in beside))
    if trade_off <= 0:  # hardly trained: a higher quality buys nothing
        return 0.0
    cost = RealCost(model, crops, q)
    start = cost()

    def change() -> float:
        now = cost()
        # Errors, not PSNR: along the codec's own curve this has its minimum where it starts.
        return now.bits / start.bits - 1 + trade_off * float((now.mse / start.mse).mean() - 1)

    edges = [edge for edge in _EDGES if edge < num_channels] + [num_channels]
    best = 0.0
    for round_ in range(_ROUNDS):
        for low, high in itertools.pairwise(edges):
            for table, step in ((gains.log_gain, _GAIN_STEP), (gains.log_ratio, _RATIO_STEP)):
                group = table[level, low:high]
                for move in (step / 2**round_, -step / 2**round_):
                    best, improved = _walk(group, move, best, change)
                    if improved:
                        break
    return -best


def _trade_off(coarse: Cost, fine: Cost) -> float:
    """By how many shares bits grow for each share that errors fall, between two quality indexes."""
    fallen = -float((fine.mse / coarse.mse).log().mean())
    return math.log(fine.bits / coarse.bits) / fallen if fallen > 0 else 0.0


def _walk(group: Tensor, move: float, best: float, change: Callable[[], float]) -> tuple[float, bool]:
    """Move ``group`` for as long as that helps: the best change then, and whether anything helped."""
    improved = False
    for _ in range(_MOST_MOVES):
        group += move
        found = change()
        if found > best - _LEAST:
            group -= move
            break
        best, improved = found, True
    return best, improved
