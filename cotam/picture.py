"""One picture of one encoded image: original, importance, quality map, bits per position, decoded image."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cotam.codec import Codec
from cotam.image import ImageError, RGBImage, decode_image
from cotam.metrics import psnr_rgb
from cotam.store.readers import find_sample
from cotam.store.schema import Row


def write_picture(row: Row, codec: Codec, path: Path) -> None:
    """Draw how ``row`` was encoded, to an image file in the format of its suffix.

    The original comes from the row's source, the importance map from the row; a panel says so where there is none.

    Raises:
        BitstreamError: the row's bitstream cannot be decoded.
    """
    decoded = codec.decode(row.bitstream)
    quality, bits = codec.quality_and_bits(row.bitstream)
    original = _original(row)

    figure = Figure(figsize=(15, 7.5), layout="constrained")
    axes = figure.subplots(2, 3).flat
    title = f"original, {row.source_num_bytes} bytes of {row.source_format}"
    _show(axes[0], original, title, "not at its source any more")
    title = f"decoded, {len(row.bitstream)} bytes, {row.bpp:.3f} bpp"
    if original is not None and original.shape == decoded.shape:
        title += f", {psnr_rgb(original, decoded):.2f} dB"
    _show(axes[1], decoded, title)
    _show(axes[2], _difference(original, decoded), "difference, 4 times", "no original")
    _show(axes[3], row.importance, "importance", "not stored (--keep-importance) or none", scale=(0, 1))
    _show(axes[4], quality, "quality level", scale=(1, codec.config.num_levels))
    _show(axes[5], bits, "bits of each 16x16 position, without z", scale=(0, max(1.0, float(bits.max()))))
    figure.suptitle(row.key.replace("$", r"\$"))  # else a formula
    figure.savefig(path, dpi=100)


def _original(row: Row) -> RGBImage | None:
    try:
        image = find_sample(row.source, row.key).image
        same = hashlib.sha256(image).hexdigest() == row.source_sha256
        return decode_image(image).pixels if same else None
    except (OSError, ValueError, ImageError):
        return None


def _difference(original: RGBImage | None, decoded: RGBImage) -> RGBImage | None:
    if original is None or original.shape != decoded.shape:
        return None
    return (128 + 4 * (decoded.astype(np.int16) - original)).clip(0, 255).astype(np.uint8)


def _show(
    axes: Axes,
    image: NDArray | None,  # type: ignore[type-arg]
    title: str,
    missing: str = "",
    scale: tuple[float, float] | None = None,
) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    if image is None:
        axes.text(0.5, 0.5, missing, ha="center", va="center", transform=axes.transAxes)
        return
    low, high = scale or (None, None)
    shown = axes.imshow(image, vmin=low, vmax=high, cmap="viridis", interpolation="nearest")
    axes.set_adjustable("datalim")  # the panel keeps its width, and its title has room, however narrow the image is
    if scale is not None:
        axes.figure.colorbar(shown, ax=axes, fraction=0.04)
