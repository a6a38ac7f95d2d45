"""The photographs that benchmarks run on: 768x512 pixels each, from a folder or from scikit-image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image, ImageOps

from cotam.image import RGBImage, decode_image

SIZE = (768, 512)


def load_images(folder: Path | None) -> list[RGBImage]:
    """The PNG and JPEG files of ``folder`` by name, or scikit-image's photographs, turned and cropped to 768x512.

    Raises:
        FileNotFoundError: no image in ``folder``.
    """
    if folder is None:
        names = ("astronaut", "chelsea", "coffee", "rocket")
        photographs = [getattr(skimage.data, name)() for name in names]
    else:
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not paths:
            raise FileNotFoundError(f"no PNG or JPEG in {folder}")
        photographs = [decode_image(path.read_bytes()).pixels for path in paths]
    landscape = [p if p.shape[1] >= p.shape[0] else np.rot90(p) for p in photographs]
    return [np.array(ImageOps.fit(Image.fromarray(p), SIZE)) for p in landscape]
