"""Bits at equal PSNR of one codec against another, quality by quality, on photographs that neither was trained on.

    python benchmarks/compare.py cotam-base OUT/codec.safetensors --images HELD_OUT.tar

What decides whether new weights are kept. Real bytes of whole bitstreams, mean PSNR over images, the first codec's
curve interpolated (PCHIP in log bits, in steps of a quarter of quality); where both give the bits of two qualities or
fewer in common there is nothing to say.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from cotam.codec import Codec
from cotam.image import RGBImage
from cotam.metrics import psnr_rgb
from cotam.train.data import decode_rgb, image_members, open_tars

_STEP = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", help="codec, name or path")
    parser.add_argument("codec", help="codec, name or path")
    parser.add_argument("--images", required=True, help="WebDataset tars")
    parser.add_argument("--num-images", type=int, default=60)
    parser.add_argument("--max-px", type=int, default=320, help="images are cropped to squares of that at most")
    parser.add_argument("--qualities", default="1,8", help="the lowest and the highest")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = photographs(args.images, args.num_images, args.max_px)
    low, high = map(float, args.qualities.split(","))
    qualities = np.arange(low, high + _STEP / 2, _STEP)
    print(f"{len(images)} photographs, {sum(i.shape[0] * i.shape[1] for i in images) / 1e6:.1f} megapixels")
    reference, other = (curve(Codec.load(name), images, qualities) for name in (args.reference, args.codec))
    bits_of = PchipInterpolator(reference[1], np.log(reference[0]), extrapolate=False)
    print(f"{'quality':>8}{'bytes':>12}{'PSNR':>9}{'bytes':>12}{'PSNR':>9}{'bits at equal PSNR':>20}")
    for quality, *ours, bits, psnr in zip(qualities, *reference, *other, strict=True):
        change = 100 * (bits / np.exp(bits_of(psnr)) - 1)  # no number beyond the ends of the reference
        print(f"{quality:8g}{ours[0] / 8:12.0f}{ours[1]:9.3f}{bits / 8:12.0f}{psnr:9.3f}{change:+18.2f} %")


def photographs(tars: str, num_images: int, max_px: int) -> list[RGBImage]:
    """The first images of ``tars``, their middles."""
    images: list[RGBImage] = []
    for data in image_members(open_tars([tars], shardshuffle=False)):
        image = decode_rgb(data)
        if image is None:
            continue
        height, width = (min(side, max_px) for side in image.shape[:2])
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        images.append(np.ascontiguousarray(image[top : top + height, left : left + width]))
        if len(images) == num_images:
            break
    return images


def curve(codec: Codec, images: list[RGBImage], qualities: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """Bits of all images, and their mean PSNR, at each of ``qualities``."""
    bits, psnrs = [], []
    for quality in qualities:
        strings = [codec.encode(image, float(quality)) for image in images]
        bits.append(8.0 * sum(map(len, strings)))
        psnrs.append(float(np.mean([psnr_rgb(i, codec.decode(s)) for i, s in zip(images, strings, strict=True)])))
        print(f"quality {quality:g}", end="\r", flush=True)
    return bits, psnrs


if __name__ == "__main__":
    main()
