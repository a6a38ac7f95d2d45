"""Training crops cut on a device that holds all images: a GPU takes them faster than loader processes make them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from cotam.image import RGBImage
from cotam.overlap import ordered_map
from cotam.train.data import decode_rgb, expand_urls, image_members, open_tars

_SCALES = (1.0, 2**-0.25, 2**-0.5, 2**-0.75, 0.5)  # of an image: what crops are cut from


@dataclasses.dataclass(frozen=True)
class ImagePool:
    """Images in several sizes, one after the other.

    Attributes:
        pixels: uint8 (P, 3), all of them, row by row.
        offsets, heights, widths: int64 (N,), where an image of a size starts, and its sides.
        areas: float64 (N,), what crops are drawn in proportion to.
        crop_px: side of the crops; no image is smaller.
    """

    pixels: Tensor
    offsets: Tensor
    heights: Tensor
    widths: Tensor
    areas: Tensor
    crop_px: int

    @classmethod
    def load(cls, urls: Sequence[str], crop_px: int, device: torch.device, num_threads: int) -> ImagePool:
        """Decode and shrink the images of WebDataset tars, on ``device``; those smaller than a crop are skipped.

        Raises:
            ValueError: no image is large enough, or no tar is there.
        """
        parts: list[Tensor] = []
        areas: list[float] = []
        dataset = open_tars(expand_urls(urls), shardshuffle=False)
        with ThreadPoolExecutor(max(1, num_threads)) as executor:
            for image in ordered_map(executor, decode_rgb, image_members(dataset), 4 * max(1, num_threads)):
                if image is None or min(image.shape[:2]) < crop_px:
                    continue
                sizes = list(_sizes(image, crop_px, device))
                parts += sizes
                areas += [image.shape[0] * image.shape[1] / len(sizes)] * len(sizes)
        if not parts:
            raise ValueError(f"no image of at least {crop_px}x{crop_px} pixels in {', '.join(urls)}; check data.train")
        heights, widths = torch.tensor([part.shape[:2] for part in parts], device=device).T
        ends = (heights * widths).cumsum(0)
        pixels = torch.cat([part.flatten(0, 1) for part in parts])
        weights = torch.tensor(areas, dtype=torch.float64, device=device)
        return cls(pixels, ends - heights * widths, heights, widths, weights, crop_px)

    def batches(self, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Endless batches of random crops, half of them mirrored: uint8 (B, 3, crop_px, crop_px), channels last."""
        device, side = self.pixels.device, self.crop_px
        generator = torch.Generator(device).manual_seed(seed)
        line = torch.arange(side, device=device)
        every = self.areas.cumsum(0)
        while True:
            drawn, *places = torch.rand(4, batch_size, generator=generator, device=device)
            chosen = torch.searchsorted(every, drawn * every[-1]).clamp_max_(len(every) - 1)
            height, width = self.heights[chosen], self.widths[chosen]
            top, left = ((p * (s - side + 1)).long() for p, s in zip(places, (height, width), strict=False))
            columns = torch.where(places[2][:, None] < 0.5, line, side - 1 - line) + left[:, None]
            rows = self.offsets[chosen, None] + (top[:, None] + line) * width[:, None]
            yield self.pixels[rows[:, :, None] + columns[:, None]].permute(0, 3, 1, 2)


def _sizes(image: RGBImage, crop_px: int, device: torch.device) -> Iterator[Tensor]:
    """An image in all sizes that hold a crop, uint8 (H, W, 3)."""
    whole = torch.tensor(image, device=device)
    yield whole
    planes = whole.permute(2, 0, 1)[None].float()
    for scale in _SCALES[1:]:
        height, width = (round(side * scale) for side in image.shape[:2])
        if min(height, width) >= crop_px:
            small = F.interpolate(planes, (height, width), mode="bicubic", antialias=True)
            yield small[0].permute(1, 2, 0).round_().clamp_(0, 255).to(torch.uint8)
