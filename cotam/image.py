"""Image bytes to RGB and back: one decoder for everything people store, with a guard on size.

Rules: EXIF orientation is applied; transparency is composited over white; 16-bit samples keep their upper 8 bits;
CMYK, palette and grey images become RGB; of an animation the first frame counts; a TIFF of several pages is none.
Colour profiles are not applied, as they are not by what feeds MLLMs.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from cotam.config import LATENT_STRIDE
from cotam.errors import one_line

RGBImage = NDArray[np.uint8]  # (H, W, 3)

MAX_PIXELS = 2**27  # 134 megapixels
MAX_SIDE_PX = 2**24
# Pillow would open fifty more, of which some run programs (EPS) or unpack without limit.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "GIF", "PPM")
_WHITE = (255, 255, 255, 255)
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 274, 258, 262, 339  # tags of TIFF and EXIF
_SUBFILE_TYPE = 254
_WHITE_IS_ZERO, _UNSIGNED, _REDUCED_OR_MASK = 0, 1, 1 | 4
_MAX_THUMBNAILS = 32  # pages of a TIFF that are looked at
_LFS = b"version https://git-lfs.github.com/spec/"  # how a pointer begins
_MAX_SCANS = 1000  # of a JPEG, each of which goes over the whole image
_NO_RANGE = "signed or 32-bit samples, whose range no file says: convert it to 8 or 16 bits"
# Of sizes and damaged EXIF: the guard below decides. Not set and reset around each image, as threads share them.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """Bytes that are no image this package can read; the message says why."""


class SourceImage(NamedTuple):
    """A decoded image: ``pixels`` uint8 (H, W, 3), and the ``format`` of its bytes, such as "JPEG"."""

    pixels: RGBImage
    format: str


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> SourceImage:
    """Decode image bytes to RGB.

    Args:
        data: the bytes of a JPEG, PNG, WebP, AVIF, TIFF, BMP, GIF or PPM file, whatever its name says.
        max_pixels: larger images are refused before their pixels are decoded.

    Raises:
        ImageError: empty, unknown, corrupt, truncated or too large; or pages or samples that would be lost.
        MemoryError: there is too little.
    """
    if not data:
        raise ImageError("empty file")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit must not undercut the one asked for
    _check_size(_webp_size(data), max_pixels)
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > _MAX_SCANS:
        raise ImageError(f"a JPEG of over {_MAX_SCANS} scans, perhaps a decompression bomb")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size, max_pixels)
            if image.format == "TIFF":
                _check_tiff(image)
            pixels = np.asarray(_to_rgb(image))
            return SourceImage(np.ascontiguousarray(pixels), image.format or "unknown")
    except UnidentifiedImageError:
        if bytes(data[: len(_LFS)]) == _LFS:
            raise ImageError("a pointer of Git LFS, not the image: fetch it with git lfs pull") from None
        raise ImageError(f"not an image in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise ImageError(f"over the limit of {max_pixels} pixels, perhaps a decompression bomb") from None
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever they like on bad bytes
        reason = one_line(error)
        raise ImageError(f"corrupt or truncated image: {reason}") from None


def num_pixels_of(data: bytes) -> int:
    """Pixels that the header claims, 0 if unreadable; bounds the work in flight only, as decoding checks the size."""
    width, height = _webp_size(data)
    if width * height:
        return width * height
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.width * image.height
    except Exception:  # as above
        return 0


def encode_image(pixels: RGBImage, format: str = "PNG", **options: object) -> bytes:
    """Encode uint8 RGB (H, W, 3) to the bytes of a file of Pillow's ``format``."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def check_rgb(image: RGBImage) -> None:
    """Raise ValueError unless ``image`` is a non-empty uint8 array of shape (H, W, 3)."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        shape = getattr(image, "shape", None)
        raise ValueError(
            f"expected a uint8 array of shape (H, W, 3), got {getattr(image, 'dtype', type(image))} {shape}"
        )
    if image.size == 0:
        raise ValueError(f"image has no pixels: {image.shape}")


def latent_size(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the latent grid of an image."""
    return -(-height // LATENT_STRIDE), -(-width // LATENT_STRIDE)


def pad_to_latents(image: RGBImage) -> RGBImage:
    """The image with its last row and column repeated up to multiples of the latent stride; writeable."""
    height, width = image.shape[:2]
    if height % LATENT_STRIDE or width % LATENT_STRIDE:
        rows, columns = latent_size(height, width)
        padded = np.empty((LATENT_STRIDE * rows, LATENT_STRIDE * columns, 3), dtype=np.uint8)
        pad_into(padded, image)
        return padded
    padded = np.ascontiguousarray(image)
    return padded if padded.flags.writeable else padded.copy()  # torch takes no read-only arrays without a warning


def pad_into(padded: RGBImage, image: RGBImage) -> None:
    """Fill ``padded``, uint8 (H', W', 3), with ``image``, no larger, and its last row and column repeated."""
    height, width = image.shape[:2]
    padded[:height, :width] = image
    padded[:height, width:] = image[:, -1:]
    padded[height:] = padded[height - 1]


def num_computed_pixels(width: int, height: int) -> int:
    """What an image counts to the codec, which computes in latent positions: a line of pixels costs as much as 16."""
    rows, columns = latent_size(height, width)
    return LATENT_STRIDE**2 * rows * columns


def size_problem(width: int, height: int, max_pixels: int) -> str | None:
    """What is wrong with the size of an image, by a limit that may come from the user; None if nothing is."""
    size = f"{width}x{height} pixels"
    if max(width, height) > MAX_SIDE_PX:
        return f"{size}, over the limit of {MAX_SIDE_PX} a side"
    if width * height > max_pixels:
        return f"{size}, over the limit of {max_pixels} pixels"
    if (computed := num_computed_pixels(width, height)) > 1.25 * max_pixels + 2**16:  # room to pad what is just below
        return f"{size}, as much to compute as {computed}, over the limit of {max_pixels} pixels"
    return None


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if problem := size_problem(*size, max_pixels):
        raise ImageError(problem)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of a WebP from its first chunk, (0, 0) of anything else: Pillow allocates when it opens one."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return 0, 0
    kind, head = data[12:16], data[20:30]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF


def _check_tiff(image: Any) -> None:
    """Raise ImageError for a TIFF of which Pillow would read something else than is in it."""
    tags = image.tag_v2
    formats, bits = tags.get(_SAMPLE_FORMAT, (_UNSIGNED,)), tags.get(_BITS_PER_SAMPLE, (1,))
    if any(sample != _UNSIGNED for sample in formats) and image.mode != "F":
        raise ImageError(_NO_RANGE)
    raw = [tile.args if isinstance(tile.args, str) else tile.args[0] for tile in image.tile if tile.codec_name == "raw"]
    if max(bits) > 8 and any(len(name) == 1 for name in raw):
        raise ImageError("planes of 16-bit samples: interleave or compress them, or convert it to 8 bits")
    for page in range(1, _MAX_THUMBNAILS):
        try:
            image.seek(page)
        except EOFError:
            break
        if not image.tag_v2.get(_SUBFILE_TYPE, 0) & _REDUCED_OR_MASK:
            raise ImageError("several pages: split it into one image a page")
    image.seek(0)


def _to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    key = image.info.get("transparency")
    if isinstance(key, tuple) and image.tile[0].args == "RGB;16B":  # Pillow compares its lower bytes with upper ones
        image.info["transparency"] = tuple(sample >> 8 for sample in key)
    image.load()
    upright = _upright(image)
    if upright.mode == "F":
        raise ImageError("floating-point samples, whose range no file says: convert it to 8 or 16 bits")
    if upright.mode.startswith("I"):
        upright = _upper_8_bits(upright, getattr(image, "tag_v2", {}))
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba)
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """As ``ImageOps.exif_transpose``, which writes the other tags anew and so fails where any of them is damaged."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises whatever it likes on bad bytes, and the pixels are sound
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _upper_8_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Grey samples of more than 8 bits to "L"; ``tags`` are those of a TIFF."""
    num_bits, sample_format = tags.get(_BITS_PER_SAMPLE, (16,))[0], tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0]
    if num_bits > 16 or sample_format != _UNSIGNED:
        raise ImageError(_NO_RANGE)
    samples = np.asarray(image)
    grey = (samples >> (num_bits - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow heeds it in files of 8 bits only
        grey = 255 - grey
    if (key := image.info.get("transparency")) is not None:
        grey[samples == key] = 255
    return Image.fromarray(grey)
