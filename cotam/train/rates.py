"""Real rates of latents: their symbols, CDF tables fitted to them, and the length of their code."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotam.entropy.hyper import HyperRows
from cotam.entropy.rans import Segment
from cotam.entropy.tables import COUNTED_MAX, NUM_SCALES, Z_ROWS, Tables, build_tables, code_lengths
from cotam.entropy.trellis import coded_segment
from cotam.models.codec_model import CodecModel, Latents

_WIDTH = 2 * COUNTED_MAX + 1


def segments_of(model: CodecModel, latents: Latents, q: Tensor) -> list[Segment]:
    """Symbols and CDF rows of the ``latents`` of a batch under ``q``."""
    z, levels, indexes = (t.cpu().numpy() for t in latents)
    z_indexes = model.z_indexes()[model.z_levels(q)].permute(0, 3, 1, 2).expand_as(latents.z).to(torch.uint8)
    images = zip(z, z_indexes.contiguous().cpu().numpy(), strict=True)
    z_rows = np.stack([_hyper_rows().rows(*image) for image in images])
    halves = zip(levels.reshape(-1, *levels.shape[2:]), indexes.reshape(-1, *indexes.shape[2:]), strict=True)
    return [*(coded_segment(*half) for half in halves), (z.ravel(), z_rows.ravel())]


@functools.cache
def _hyper_rows() -> HyperRows:
    return HyperRows(build_tables())  # their Gaussians are in all tables


def count_symbols(segments: Iterable[Segment]) -> NDArray[np.int64]:
    """How often each symbol was coded under each CDF row, as ``build_tables`` takes it."""
    counts = np.zeros((Z_ROWS + NUM_SCALES) * _WIDTH, dtype=np.int64)
    for symbols, rows in segments:
        cells = rows.astype(np.int64) * _WIDTH + symbols.clip(-COUNTED_MAX, COUNTED_MAX) + COUNTED_MAX
        counts += np.bincount(cells, minlength=len(counts))
    return counts.reshape(-1, NUM_SCALES, _WIDTH)


def code_length(segments: Iterable[Segment], tables: Tables) -> float:
    """Bits that the symbols take under ``tables``."""
    return sum(float(code_lengths(*segment, tables).sum()) for segment in segments)
