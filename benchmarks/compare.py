"""Bits at equal PSNR of one codec against another, quality by quality: what decides whether new weights are kept.

    python benchmarks/compare.py cotam-base OUT/codec.safetensors --images HELD_OUT.tar

Real bytes of whole bitstreams, summed over images that neither codec was trained on, and the mean of the images' PSNR.
Negative: the second codec needs fewer bits. The first one's are interpolated (PCHIP, log bits over PSNR, in quarters of
a quality), and there is no number where the PSNR is beyond the ends of its curve.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from cotam.codec import Codec
from cotam.image import RGBImage
from cotam.metrics import psnr_rgb
from cotam.train.data import decode_rgb, expand_urls, image_members, open_tars

_STEP = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", help="codec, name or path")
    parser.add_argument("codec", help="codec, name or path")
    parser.add_argument("--images", required=True, help="WebDataset tars")
    parser.add_argument("--num-images", type=int, default=60)
    parser.add_argument("--max-px", type=int, default=320, help="sides are cut to so much, around the middle")
    parser.add_argument("--lowest", type=float, default=1)
    parser.add_argument("--highest", type=float, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = photographs(args.images, args.num_images, args.max_px)
    if not images:
        sys.exit(f"no images in {args.images}")
    if args.highest < args.lowest + _STEP:
        sys.exit(f"--highest has to be {_STEP} above --lowest")
    qualities = np.arange(args.lowest, args.highest + _STEP / 2, _STEP)
    print(f"{len(images)} images, {sum(i.shape[0] * i.shape[1] for i in images) / 1e6:.1f} megapixels")
    reference, other = (curve(Codec.load(name), images, qualities) for name in (args.reference, args.codec))
    changes = bits_at_equal_psnr(reference, other)
    print(f"{'quality':>7}{'bytes':>12}{'PSNR':>9}{'bytes':>12}{'PSNR':>9}{'bits at equal PSNR':>21}")
    for quality, ours, theirs, change in zip(qualities, reference, other, changes, strict=True):
        shown = "-" if np.isnan(change) else f"{100 * change:+.1f} %"
        print(f"{quality:7g}{ours[0]:12.0f}{ours[1]:9.3f}{theirs[0]:12.0f}{theirs[1]:9.3f}{shown:>21}")
    print(f"mean{100 * np.nanmean(changes):+64.1f} %")


def photographs(tars: str, num_images: int, max_px: int) -> list[RGBImage]:
    """The first images of ``tars``, cut to their middles."""
    images: list[RGBImage] = []
    for data in image_members(open_tars(expand_urls([tars]), shardshuffle=False)):
        image = decode_rgb(data)
        if image is None:
            continue
        height, width = (min(side, max_px) for side in image.shape[:2])
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        images.append(np.ascontiguousarray(image[top : top + height, left : left + width]))
        if len(images) == num_images:
            break
    return images


def curve(codec: Codec, images: list[RGBImage], qualities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bytes of all ``images`` and the mean of their PSNR at each of ``qualities``, (Q, 2)."""
    points = []
    for quality in qualities:
        strings = [codec.encode(image, float(quality)) for image in images]
        psnr = np.mean([psnr_rgb(i, codec.decode(s)) for i, s in zip(images, strings, strict=True)])
        points.append((sum(map(len, strings)), psnr))
    return np.array(points, dtype=np.float64)


def bits_at_equal_psnr(reference: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """The bytes of ``other`` over those that ``reference`` has at its PSNR, less 1, (Q,); NaN beyond its ends."""
    rises = reference[:, 1] > np.maximum.accumulate(np.concatenate([[-np.inf], reference[:-1, 1]]))
    bytes_of = PchipInterpolator(reference[rises, 1], np.log(reference[rises, 0]), extrapolate=False)
    change: NDArray[np.float64] = other[:, 0] / np.exp(bytes_of(other[:, 1])) - 1
    return change


if __name__ == "__main__":
    main()
