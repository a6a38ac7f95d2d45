"""Large latents in tiles that overlap, so that memory is bounded whatever the size of an image.

A stage of the codec whose outputs depend on inputs at most ``halo`` latent positions away gives in the interior of a
tile what it gives on the whole. Each stage is finished on all tiles before the next one reads it: nothing is computed
twice that could come out differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

MAX_TILE_POSITIONS = 2**14  # 4.2 megapixels: latents up to this size are one tile
_SIDE = 128
_ALIGN = 4  # edges of tiles fall between positions of z, and on the same colour of the checkerboard


class Span(NamedTuple):
    """One side of a tile in latent positions: [start, stop) is computed, [keep_start, keep_stop) is kept."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


class Tile(NamedTuple):
    """A tile of the latent grid."""

    rows: Span
    columns: Span

    def cut(self, tensor: Tensor, up: int = 1, down: int = 1) -> Tensor:
        """What the tile computes from: a view of ``tensor`` (..., h up/down, w up/down); a 1x1 one stays as it is."""
        if tensor.shape[-2:] == (1, 1):
            return tensor
        i, j = (slice(s.start * up // down, -(-s.stop * up // down)) for s in self)
        return tensor[..., i, j]


def tiles(height: int, width: int, halo: int) -> Iterator[Tile]:
    """The tiles of a latent grid, overlapping by ``halo`` positions on each side."""
    if height * width <= MAX_TILE_POSITIONS:
        sides = height, width
    else:
        rows = min(height, _SIDE)
        sides = rows, max(_SIDE, MAX_TILE_POSITIONS // rows // _ALIGN * _ALIGN)
    halo = -(-halo // _ALIGN) * _ALIGN
    for rows_span in _spans(height, sides[0], halo):
        for columns_span in _spans(width, sides[1], halo):
            yield Tile(rows_span, columns_span)


def map_tiles(
    stage: Callable[[Tile], tuple[Tensor, ...]], height: int, width: int, halo: int, up: int = 1, down: int = 1
) -> tuple[Tensor, ...]:
    """Run ``stage`` on all tiles of a latent grid and put the results together.

    Args:
        stage: from a tile to tensors (..., rows up/down, columns up/down) of its computed extent.
        height, width: of the grid.
        halo: how far a result depends on its surroundings, in latent positions.
        up, down: positions of the results per latent position, as a fraction.
    """
    wholes: tuple[Tensor, ...] = ()
    for tile in tiles(height, width, halo):
        parts = stage(tile)
        if tile.rows[:2] == (0, height) and tile.columns[:2] == (0, width):
            return parts
        if not wholes:
            size = -(-height * up // down), -(-width * up // down)
            wholes = tuple(part.new_empty(*part.shape[:-2], *size) for part in parts)
        at, kept = zip(*(_kept(span, up, down) for span in tile), strict=True)
        for whole, part in zip(wholes, parts, strict=True):
            whole[(..., *at)] = part[(..., *kept)]
    return wholes


def _spans(length: int, side: int, halo: int) -> Iterator[Span]:
    for start in range(0, length, side):
        stop = min(start + side, length)
        yield Span(max(0, start - halo), min(length, stop + halo), start, stop)


def _kept(span: Span, up: int, down: int) -> tuple[slice, slice]:
    """Where a tile's kept positions lie in the whole result, and where in the tile's."""
    first, start, stop = (-(-p * up // down) for p in (span.start, span.keep_start, span.keep_stop))
    return slice(start, stop), slice(start - first, stop - first)
