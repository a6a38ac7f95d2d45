"""Small corpora for tests: photographs from scikit-image cut to size, in tars, folders and Parquet."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


def photograph(index: int, width: int = 96, height: int = 80) -> Image.Image:
    """A cut-out of one of the photographs, another one for every index."""
    name = PHOTOGRAPHS[index % len(PHOTOGRAPHS)]
    image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    left = (37 * index) % (image.width - width)
    top = (53 * index) % (image.height - height)
    return image.crop((left, top, left + width, top + height))


def to_bytes(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_webdataset(folder: Path, num_tars: int, samples_per_tar: int, width: int = 96, height: int = 80) -> list[str]:
    """WebDataset tars of JPEG, caption and JSON. Returns the keys in order."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = []
    for t in range(num_tars):
        members: list[tuple[str, bytes]] = []
        for k in range(samples_per_tar):
            index = t * samples_per_tar + k
            key = f"{index:05d}"
            keys.append(key)
            members += [
                (f"{key}.jpg", to_bytes(photograph(index, width, height), quality=90)),
                (f"{key}.txt", f"caption {index} with ünicode".encode()),
                (f"{key}.json", json.dumps({"index": index}).encode()),
            ]
        write_tar(folder / f"part-{t:04d}.tar", members)
    return keys


def bad_files() -> dict[str, tuple[bytes, str | None]]:
    """Ten files of the kinds that real corpora hold: name to bytes, and what the reject says, None if it encodes."""
    photo = photograph(0)
    grey16 = np.linspace(0, 65535, 96 * 80).reshape(80, 96).astype(np.uint16)
    rotated = Image.new("RGB", (48, 32))
    exif = rotated.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    palette = photo.convert("RGBA")
    palette.putalpha(Image.linear_gradient("L").resize(photo.size))
    jpeg = to_bytes(photo, quality=90)
    return {
        "01-empty.jpg": (b"", "empty file"),
        "02-truncated.jpg": (jpeg[: len(jpeg) // 2], "corrupt or truncated image"),
        "03-text.jpg": (b"this is no image, whatever its name says\n", "not an image in a known format"),
        "04-grey16.png": (to_bytes(Image.fromarray(grey16), "PNG"), None),
        "05-cmyk.jpg": (to_bytes(photo.convert("CMYK"), quality=90), None),
        "06-palette-alpha.png": (to_bytes(palette.quantize(64), "PNG"), None),
        "07-one.png": (to_bytes(Image.new("RGB", (1, 1), (200, 30, 60)), "PNG"), None),
        "08-long.png": (to_bytes(photo.resize((20000, 1)), "PNG"), None),
        "09-rotated.jpg": (to_bytes(rotated, exif=exif), None),
        "10-bomb.png": (png_bomb(100_000, 100_000), "over the limit of"),
    }


def png_bomb(width: int, height: int) -> bytes:
    """A few bytes that claim to be a PNG of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
