"""decode_image: what people store becomes upright RGB, and what is no image becomes an ImageError."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from cotam.image import MAX_PIXELS, ImageError, RGBImage, decode_image, encode_image, num_pixels_of, pad_to_latents
from cotam.models.transfer import to_device

RED, BLUE = (255, 0, 0), (0, 0, 255)


def _save(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _png16(samples: np.ndarray[Any, np.dtype[np.uint16]], transparent: tuple[int, ...] = ()) -> bytes:
    """A 16-bit PNG of (H, W) grey or (H, W, 3) RGB samples, which Pillow cannot write for RGB."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if samples.ndim == 2 else 2, 0, 0, 0)
    key = _chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    end = _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + key + end


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _close(pixels: RGBImage, expected: Any, tolerance: int = 6) -> bool:
    return bool((np.abs(pixels.astype(int) - np.asarray(expected)) <= tolerance).all())


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF"])
def test_every_common_format(format: str) -> None:
    pixels = np.full((24, 40, 3), (200, 100, 50), np.uint8)
    decoded = decode_image(encode_image(pixels, format))
    assert decoded.format == format
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.shape == (24, 40, 3)
    assert decoded.pixels.flags["C_CONTIGUOUS"]
    assert _close(decoded.pixels, pixels)


def test_png_is_lossless(photos: dict[str, RGBImage]) -> None:
    np.testing.assert_array_equal(decode_image(encode_image(photos["coffee"])).pixels, photos["coffee"])


def test_16_bit_samples_keep_their_upper_8_bits() -> None:
    grey = (np.arange(12, dtype=np.uint16) * 5000).reshape(3, 4)
    expected = (grey >> 8).astype(np.uint8)[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(decode_image(_png16(grey)).pixels, expected)
    rgb = (np.arange(36, dtype=np.uint16) * 1800).reshape(3, 4, 3)
    np.testing.assert_array_equal(decode_image(_png16(rgb)).pixels, (rgb >> 8).astype(np.uint8))
    tiff = _save(Image.fromarray(grey), "TIFF")
    np.testing.assert_array_equal(decode_image(tiff).pixels, expected)


def test_floating_point_samples_are_refused_since_their_range_is_unknown() -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 200, np.float32)).save(file, "TIFF")
    with pytest.raises(ImageError, match="floating-point samples"):
        decode_image(file.getvalue())


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_colour_models_become_rgb(mode: str) -> None:
    white = Image.new("RGB", (20, 10), "white").convert(mode)
    format = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    assert _close(decode_image(_save(white, format)).pixels, np.full((10, 20, 3), 255))


def test_transparency_is_over_white() -> None:
    rgba = Image.new("RGBA", (8, 8), (*RED, 255))
    rgba.paste((0, 0, 0, 0), (0, 0, 4, 8))
    rgba.paste((0, 0, 0, 128), (4, 0, 8, 4))
    pixels = decode_image(_save(rgba, "PNG")).pixels
    assert (pixels[:, :4] == 255).all()
    assert _close(pixels[:4, 4:], 127)
    assert (pixels[4:, 4:] == RED).all()

    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([*BLUE, *RED])
    palette.paste(0, (0, 0, 4, 8))
    pixels = decode_image(_save(palette, "PNG", transparency=0)).pixels
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == RED).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotated_images_come_out_upright(orientation: int) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = RED
    upright[:16, 32:] = BLUE
    # How a camera stores the scene under each orientation: the inverse of what a viewer has to do.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode_image(np.ascontiguousarray(stored), "JPEG", exif=exif, quality=95, subsampling=0)
    assert _close(decode_image(data).pixels[4:-4:8, 4:-4:8], upright[4:-4:8, 4:-4:8])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damage", ["odd type", "zeros", "cut"])
def test_damaged_exif_costs_no_image(format: str, damage: str) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16] = RED
    entries = [(0x0100, 2, 4, b"wide"), (0x0112, 3, 1, struct.pack("<HH", 6, 0))]  # the width is a text; orientation 6
    directory = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)
    if damage != "odd type":
        block = block[:6] + bytes(len(block)) if damage == "zeros" else block[:12]
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {"lossless": True}
    stored = np.ascontiguousarray(np.rot90(upright)) if damage == "odd type" else upright
    decoded = decode_image(encode_image(stored, format, exif=block, **options)).pixels
    assert _close(decoded[4:-4:8], upright[4:-4:8])


def test_grey_tiffs_of_other_depths_than_8_bits() -> None:
    ramp = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)
    expected = (ramp >> 8).astype(np.uint8)[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(decode_image(_tiff(ramp.tobytes(), 16)).pixels, expected)
    np.testing.assert_array_equal(decode_image(_tiff(ramp.tobytes(), 16, photometric=0)).pixels, 255 - expected)
    pairs = (ramp.ravel() >> 4).astype(int).reshape(-1, 2)
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    np.testing.assert_array_equal(decode_image(_tiff(packed, 12)).pixels, expected)
    for data in (_tiff(ramp.tobytes(), 16, sample_format=2), _tiff(ramp.astype(np.uint32).tobytes(), 32)):
        with pytest.raises(ImageError, match="signed or 32-bit samples"):
            decode_image(data)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_tiff_of_any_layout_is_right_or_refused(bits: int, planar: str, compression: str | None) -> None:
    rgb = np.random.default_rng(0).integers(0, 2**bits, (40, 56, 3)).astype(f"u{bits // 8}")
    file = io.BytesIO()
    samples = rgb if planar == "contig" else np.moveaxis(rgb, 2, 0)
    tifffile.imwrite(file, samples, photometric="rgb", planarconfig=planar, compression=compression)
    if bits == 16 and planar == "separate" and compression is None:  # Pillow takes its bytes for samples
        with pytest.raises(ImageError, match="planes of 16-bit samples"):
            decode_image(file.getvalue())
        return
    np.testing.assert_array_equal(decode_image(file.getvalue()).pixels, (rgb >> (bits - 8)).astype(np.uint8))


def test_no_page_of_a_tiff_is_lost_without_a_word() -> None:
    page = np.arange(64 * 48 * 3, dtype=np.uint8).reshape(64, 48, 3)
    pages, pyramid, signed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    tifffile.imwrite(pages, np.stack([page, page]), photometric="rgb")
    with pytest.raises(ImageError, match="several pages"):
        decode_image(pages.getvalue())
    with tifffile.TiffWriter(pyramid) as writer:
        writer.write(page, photometric="rgb")
        writer.write(page[::2, ::2], photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(decode_image(pyramid.getvalue()).pixels, page)
    tifffile.imwrite(signed, page[..., 0].astype(np.int8), photometric="minisblack")
    with pytest.raises(ImageError, match="signed"):
        decode_image(signed.getvalue())


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded() -> None:
    data = _save(Image.new("L", (64, 64), 80), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    length = int.from_bytes(data[at + 2 : at + 4], "big") + 2
    bomb = data[:-2] + data[at : at + length] * 2000 + data[-2:]
    with pytest.raises(ImageError, match="scans"):
        decode_image(bomb)


def test_pixels_are_counted_by_the_header_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (40, 30))
    for format in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF", "BMP"):
        assert num_pixels_of(_save(image, format)) == 1200
    assert num_pixels_of(b"") == num_pixels_of(b"RIFF....WEBP") == num_pixels_of(b"<html>") == 0
    webp = _save(image, "WEBP")
    monkeypatch.setattr(Image, "open", None)  # Pillow takes memory for all of a WebP when it opens one
    assert num_pixels_of(webp) == 1200


def test_too_little_memory_is_no_fault_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("cotam.image._to_rgb", full)
    with pytest.raises(MemoryError):
        decode_image(_save(Image.new("RGB", (8, 8)), "PNG"))


def _tiff(data: bytes, num_bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A grey TIFF of 4x3 samples."""
    tags = {256: 4, 257: 3, 258: num_bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 3, 279: len(data)}
    tags |= {339: sample_format}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def test_a_transparent_colour_of_16_bits() -> None:
    grey = np.array([[0, 1000, 40000, 65535]], np.uint16)
    assert decode_image(_png16(grey, transparent=(0,))).pixels[0, :, 0].tolist() == [255, 3, 156, 255]
    rgb = np.array([[0x1234, 0x3412, 0x3434]], np.uint16)[..., None].repeat(3, axis=2)
    assert decode_image(_png16(rgb, transparent=(0x1234,) * 3)).pixels[0, :, 0].tolist() == [255, 0x34, 0x34]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (9, 7), colour) for colour in (RED, BLUE)]
    decoded = decode_image(_save(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert decoded.format == "GIF"
    assert (decoded.pixels == np.full((7, 9, 3), RED)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    assert decode_image(encode_image(np.zeros((*size, 3), np.uint8))).pixels.shape == (*size, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"this is a text that someone named photo.jpg\n", "not an image in a known format"),
        (encode_image(np.zeros((64, 64, 3), np.uint8), "JPEG")[:400], "corrupt or truncated"),
        (encode_image(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))[:9000], "corrupt or truncated"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "not an image|corrupt or truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a pointer of Git LFS"),
    ],
    ids=["empty", "text", "truncated JPEG", "truncated PNG", "JPEG header only", "Git LFS"],
)
def test_bad_bytes_are_named(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_image(data)


@pytest.mark.parametrize("side_px", [MAX_PIXELS**0.5 + 1, 60_000])
def test_decompression_bomb_is_refused_before_it_is_decoded(side_px: float) -> None:
    header = struct.pack(">IIBBBBB", int(side_px), int(side_px), 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(10**6)))
    start = time.perf_counter()
    with pytest.raises(ImageError, match="pixels"):
        decode_image(data)
    assert time.perf_counter() - start < 1


def test_altered_files_never_raise_anything_else(photos: dict[str, RGBImage]) -> None:
    rng = np.random.default_rng(0)
    files = [encode_image(photos["chelsea"][:48, :48], format) for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF")]
    for k in range(500):
        data = bytearray(files[k % len(files)])
        for at in rng.integers(len(data), size=4):
            data[at] = rng.integers(256)
        try:
            pixels = decode_image(bytes(data)).pixels
        except ImageError:
            continue
        assert pixels.ndim == 3


def _bombs() -> dict[str, bytes]:
    """Small files of every format whose headers claim tens of thousands of pixels a side."""
    side = 60_000
    small = np.zeros((64, 64, 3), np.uint8)
    jpeg = bytearray(encode_image(small, "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", side, side)
    gif = bytearray(encode_image(small, "GIF"))
    gif[6:10] = struct.pack("<HH", side, side)
    bmp = bytearray(encode_image(small, "BMP"))
    bmp[18:26] = struct.pack("<ii", side, side)
    avif = bytearray(encode_image(small, "AVIF"))
    at = avif.index(b"ispe") + 8
    avif[at : at + 8] = struct.pack(">II", 16_000, 16_000)  # the most that Pillow opens
    tiff = bytearray(encode_image(small, "TIFF"))
    for tag in (256, 257):
        at = tiff.index(struct.pack("<HHI", tag, 4, 1)) if struct.pack("<HHI", tag, 4, 1) in tiff else -1
        at = at if at >= 0 else tiff.index(struct.pack("<HHI", tag, 3, 1))
        tiff[at : at + 12] = struct.pack("<HHII", tag, 4, 1, side)
    webp = bytearray(encode_image(small, "WEBP"))
    at = webp.index(b"\x9d\x01\x2a") + 3
    webp[at : at + 4] = struct.pack("<HH", 2**14 - 1, 2**14 - 1)  # the most that WebP can have
    vp8x = b"VP8X" + struct.pack("<I", 10) + bytes(4) + struct.pack("<I", side)[:3] * 2 + webp[12:]
    vp8x = b"RIFF" + struct.pack("<I", 4 + len(vp8x)) + b"WEBP" + vp8x
    vp8l = bytearray(encode_image(small, "WEBP", lossless=True))
    vp8l[21:25] = struct.pack("<I", 2**28 - 1)
    ppm = f"P6 {side} {side} 255\n".encode() + bytes(1000)
    return {
        "JPEG": bytes(jpeg), "GIF": bytes(gif), "BMP": bytes(bmp), "AVIF": bytes(avif), "TIFF": bytes(tiff),
        "WEBP": bytes(webp), "WEBP extended": vp8x, "WEBP lossless": bytes(vp8l), "PPM": ppm,
    }  # fmt: skip


def test_bombs_of_every_format_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    bombs = _bombs()
    for name, bomb in bombs.items():
        (tmp_path / f"{name}.bomb").write_bytes(bomb)
        (tmp_path / f"{name}.good").write_bytes(encode_image(np.zeros((64, 64, 3), np.uint8), name.split()[0]))
    code = """if True:
        import resource, sys
        from pathlib import Path
        from cotam.image import ImageError, decode_image
        for path in Path(sys.argv[1]).glob("*.good"):
            decode_image(path.read_bytes())  # loads what decoding needs
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, -1))
        for path in sorted(Path(sys.argv[1]).glob("*.bomb")):
            try:
                decode_image(path.read_bytes(), 2**27)
            except ImageError as error:
                print(path.stem, error)
    """
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(bombs) and all("over the limit of 134217728 pixels" in line for line in lines), lines


def test_formats_that_run_programs_or_unpack_without_limit_are_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "gs"
    fake.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    ico = _save(Image.new("RGB", (16, 16)), "ICO")
    for data in (eps, ico, b"SIMPLE  =                    T" + bytes(5000), b"8BPS\0\1" + bytes(100)):
        with pytest.raises(ImageError, match="not an image in a known format"):
            decode_image(data)
    assert not (tmp_path / "ran").exists()


def test_a_higher_limit_is_not_undercut_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode_image(encode_image(np.zeros((60, 60, 3), np.uint8)), max_pixels=3600).pixels.shape == (60, 60, 3)
    with pytest.raises(ImageError, match="60x61 pixels, over the limit of 3600"):
        decode_image(encode_image(np.zeros((61, 60, 3), np.uint8)), max_pixels=3600)


@pytest.mark.parametrize("size", [(16, 32), (17, 31), (1, 1), (5, 48), (48, 5)])
def test_images_are_padded_by_their_edges(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    below, right = (-side % 16 for side in size)
    expected = np.pad(image, ((0, below), (0, right), (0, 0)), "edge")
    padded = pad_to_latents(image)
    assert padded.flags.writeable
    np.testing.assert_array_equal(padded, expected)
    other = image[: size[0] - (size[0] % 16 > 1), ::-1]  # of the same latent size
    batch = to_device([image, other], torch.device("cpu"))
    np.testing.assert_array_equal(batch[0].permute(1, 2, 0).numpy(), expected)
    np.testing.assert_array_equal(batch[1].permute(1, 2, 0).numpy(), pad_to_latents(other))
