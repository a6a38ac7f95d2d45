"""Importance maps of images: attention over the whole image, and over tiles of it where it is large or long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cotam.grouping import in_groups
from cotam.image import RGBImage
from cotam.importance.source import ImportanceMap
from cotam.importance.tower import AttentionTower
from cotam.models.precision import computes_in_bfloat16

_TILE_SCALE = 2  # a tile is this many times the tower's input a side: finer detail than that is not read anyway
_MAX_TILES = 4  # a side
_TOP_FRACTION = 0.01  # of the positions may lie above an importance of 1: single patches attract most attention
_BATCH_PATCHES = 2**14


class _View(NamedTuple):
    """A part of an image to look at: of image ``image``, box in pixels, and its uint8 pixels for the tower."""

    image: int
    box: tuple[int, int, int, int]  # top, bottom, left, right
    pixels: Tensor


class ImportanceEstimator:
    """Importance maps from a tower's attention.

    The attention over the whole image is a distribution over its patches. An image much larger than the tower's input,
    or longer, is also cut into tiles: the attention inside a tile shares out what the whole image gave to the tile
    (hierarchical guidance), and the map is the mean of both.

    Args:
        tower: which attention.
        device: where it runs.
    """

    def __init__(self, tower: AttentionTower, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.tower = tower.to(self.device)
        # bfloat16 moves maps by 0.003 of their range (docs/performance.md).
        self.tower.visual.to(torch.bfloat16 if computes_in_bfloat16(self.device) else torch.float32)

    def __call__(self, images: Sequence[RGBImage]) -> list[ImportanceMap]:
        """The importance map of every image, uint8 RGB (H, W, 3) of any size, on a grid of patches."""
        views = [view for k, image in enumerate(images) for view in self._views(k, image)]
        attention = self._attend(views)
        maps: list[list[tuple[_View, NDArray[np.float32]]]] = [[] for _ in images]
        for view, values in zip(views, attention, strict=True):
            maps[view.image].append((view, values))
        return [_normalise(_merge(image.shape[:2], parts)) for image, parts in zip(images, maps, strict=True)]

    def _views(self, index: int, image: RGBImage) -> list[_View]:
        height, width = image.shape[:2]
        side = _TILE_SCALE * self.tower.patch_px * self.tower.grid[0]
        boxes = [(0, height, 0, width)]
        rows, columns = (min(_MAX_TILES, max(1, round(length / side))) for length in (height, width))
        if rows * columns > 1:
            tops, lefts = ([length * k // n for k in range(n + 1)] for length, n in ((height, rows), (width, columns)))
            boxes += [(tops[i], tops[i + 1], lefts[j], lefts[j + 1]) for i in range(rows) for j in range(columns)]
        return [_View(index, box, self._resize(image, box)) for box in boxes]

    def _resize(self, image: RGBImage, box: tuple[int, int, int, int]) -> Tensor:
        top, bottom, left, right = box
        rows, columns = self.tower.grid_of(bottom - top, right - left)
        size = rows * self.tower.patch_px, columns * self.tower.patch_px
        part = torch.from_numpy(image[top:bottom, left:right].copy()).permute(2, 0, 1)[None]
        return F.interpolate(part, size=size, mode="bicubic", antialias=True, align_corners=False)[0]

    def _attend(self, views: list[_View]) -> list[NDArray[np.float32]]:
        """Attention of every view, in batches of one grid."""

        def attend(at: list[int]) -> list[NDArray[np.float32]]:
            return list(self.tower(torch.stack([views[k].pixels for k in at]).to(self.device)).cpu().numpy())

        max_pixels = _BATCH_PATCHES * self.tower.patch_px**2
        sizes = [(view.pixels.shape[1], view.pixels.shape[2]) for view in views]
        return in_groups(sizes, lambda height, width: max(1, max_pixels // (height * width)), attend)


def _merge(size: tuple[int, ...], parts: list[tuple[_View, NDArray[np.float32]]]) -> NDArray[np.float32]:
    """One map from the whole image's attention, first in ``parts``, and its tiles'."""
    whole = parts[0][1]
    if len(parts) == 1:
        return whole
    tiles = parts[1:]
    height, width = size
    # The finest tile grid that has whole positions in every tile.
    rows = sum(t.shape[0] for v, t in tiles if v.box[2] == 0)
    columns = sum(t.shape[1] for v, t in tiles if v.box[0] == 0)
    merged = _resample(whole, rows, columns)
    merged /= merged.sum()
    hierarchical = np.empty_like(merged)
    for view, tile in tiles:
        top, bottom, left, right = view.box
        area = (
            slice(round(top * rows / height), round(bottom * rows / height)),
            slice(round(left * columns / width), round(right * columns / width)),
        )
        inside = merged[area]
        share = _resample(tile, *inside.shape)
        hierarchical[area] = share / share.sum() * inside.sum()
    return (merged + hierarchical) / 2


def _resample(values: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    tensor = torch.from_numpy(values)[None, None]
    resampled = F.interpolate(tensor, size=(rows, columns), mode="bilinear", antialias=True, align_corners=False)
    return resampled[0, 0].clamp_min(1e-12).numpy()


def _normalise(attention: NDArray[np.float32]) -> ImportanceMap:
    # Attention spans orders of magnitude: without a root, all but the few first places would be alike.
    root = np.cbrt(attention)
    low, high = root.min(), np.quantile(root, 1 - _TOP_FRACTION)
    if high <= low:
        return np.zeros_like(root)
    return np.clip((root - low) / (high - low), 0, 1).astype(np.float32)
