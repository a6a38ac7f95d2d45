"""The codec: what is encoded anywhere is decoded everywhere, and nothing breaks it."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cotam.bitstream import BitstreamError, ModelMismatchError, pack, unpack
from cotam.codec import Codec
from cotam.config import Q_STEPS
from cotam.image import RGBImage, decode_image
from cotam.metrics import psnr_rgb
from cotam.models.codec_model import CodecModel
from cotam.models.precision import multiplies_int8
from cotam.weights import dump_codec, parse_codec, read_weights
from tests.cotam import golden

Coded = tuple[list[bytes], list[RGBImage]]


@pytest.fixture(scope="module")
def images(photos: dict[str, RGBImage]) -> list[RGBImage]:
    """Eight images, of sizes that share a latent size and sizes that do not."""
    astronaut, chelsea, coffee = photos.values()
    crops = [astronaut[:128, :128], astronaut[120:241, :113], chelsea[:65, :63], coffee[:17, :33], coffee[40:57, :33]]
    return [astronaut, chelsea, coffee, *map(np.ascontiguousarray, crops)]


@pytest.fixture(scope="module")
def coded(codec: Codec, images: list[RGBImage]) -> Coded:
    """What one thread, one image at a time, makes of the images: the reference of the tests below."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    strings = [codec.encode(image, 3.25) for image in images]
    pixels = [codec.decode(s) for s in strings]
    torch.set_num_threads(num_threads)
    return strings, pixels


def _in_batches(codec: Codec, images: list[RGBImage], num_threads: int = 2) -> Coded:
    torch.set_num_threads(num_threads)
    with ThreadPoolExecutor(2) as executor:
        strings = codec.encode_batch(images, 3.25, executor=executor)
        return strings, codec.decode_batch(strings, executor)


def _one_at_a_time(codec: Codec, images: list[RGBImage]) -> Coded:
    torch.set_num_threads(2)
    strings = [codec.encode(image, 3.25) for image in images]
    return strings, [codec.decode(s) for s in strings]


def _in_threads(codec: Codec, images: list[RGBImage]) -> Coded:
    with ThreadPoolExecutor(4) as executor:
        strings = list(executor.map(lambda image: codec.encode(image, 3.25), images))
        return strings, list(executor.map(codec.decode, strings))


def _after_a_round_trip_of_the_weights(codec: Codec, images: list[RGBImage]) -> Coded:
    data = dump_codec(parse_codec(read_weights("cotam-base"), "packaged").tiers)
    return _in_batches(Codec(parse_codec(data, "dumped")), images)


def _in_another_process(codec: Codec, images: list[RGBImage]) -> Coded:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_load_and_code, images).result()


def _load_and_code(images: list[RGBImage]) -> Coded:
    return _in_batches(Codec.load(), images, num_threads=1)


@pytest.mark.usefixtures("num_threads")
def test_latents_have_all_channels_at_every_quality(codec: Codec, photos: dict[str, RGBImage]) -> None:
    for quality in (1.0, 8.0):
        (y_hat,) = codec.latents(codec.decompress([codec.encode(photos["coffee"][:70, :100], quality)]))
        used = codec.config.num_channels(round((quality - 1) * Q_STEPS))
        assert y_hat.shape == (codec.config.M, 5, 7)
        assert y_hat[:used].abs().sum() > 0 and not y_hat[used:].any()


@pytest.mark.parametrize(
    "code", [_one_at_a_time, _in_batches, _in_threads, _after_a_round_trip_of_the_weights, _in_another_process]
)
def test_bytes_and_pixels_are_the_same_however_they_are_made(
    codec: Codec, images: list[RGBImage], coded: Coded, code: Callable[[Codec, list[RGBImage]], Coded]
) -> None:
    strings, pixels = code(codec, images)
    assert strings == coded[0]
    for actual, expected in zip(pixels, coded[1], strict=True):
        np.testing.assert_array_equal(actual, expected)


def _models(codec: Codec) -> list[CodecModel]:
    return [model for tier in codec.tiers for model in tier.models.values()]


@contextmanager
def _bfloat16(codec: Codec) -> Iterator[Codec]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield codec


@contextmanager
def _float32(codec: Codec) -> Iterator[Codec]:
    """As on a CPU that neither computes in bfloat16 nor multiplies int8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cotam.models.precision._cpu_flags", frozenset)
        multiplies_int8.cache_clear()
        yield Codec.load()
    multiplies_int8.cache_clear()


@contextmanager
def _without_onednn(codec: Codec) -> Iterator[Codec]:
    with torch.backends.mkldnn.flags(enabled=False):
        yield codec


@contextmanager
def _contiguous(codec: Codec) -> Iterator[Codec]:
    other = Codec.load()
    for model in _models(other):
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    yield other


@contextmanager
def _reduced_float32(codec: Codec) -> Iterator[Codec]:
    """What TF32 and its like on CPUs are asked for with, where the hardware has them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield codec
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _compiled(codec: Codec) -> Iterator[Codec]:
    other = Codec.load()
    for model in _models(other):
        for module, name in ((model.g_a, "of_pixels"), (model.g_s, "pixels"), (model.h_a, "forward")):
            setattr(module, name, torch.compile(getattr(module, name), dynamic=True))
    yield other


@pytest.mark.parametrize(
    "another_way",
    [
        _bfloat16,
        _float32,
        _without_onednn,
        _contiguous,
        _reduced_float32,
        pytest.param(_compiled, marks=pytest.mark.slow),
    ],
)
def test_encoded_one_way_decodes_the_other_way(
    codec: Codec, images: list[RGBImage], coded: Coded, another_way: Callable[[Codec], AbstractContextManager[Codec]]
) -> None:
    with another_way(codec) as other:
        strings = other.encode_batch(images[3:], 3.25)
        decompressed = other.decompress([*coded[0], *strings])
    for there, here in zip(decompressed, codec.decompress([*coded[0], *strings]), strict=True):
        assert torch.equal(there.y_fixed, here.y_fixed)
    for pixels, expected, original in zip(codec.decode_batch(strings), coded[1][3:], images[3:], strict=True):
        luck = 1.5 if original.size < 2000 else 0.5  # a dozen bytes may say this or that
        assert psnr_rgb(pixels, original) > psnr_rgb(expected, original) - luck


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("strength", [0.0, 4.0], ids=["uniform", "map"])
@pytest.mark.parametrize("quality", [1.0, 3.0, 3.75, 4.5, 6.0, 8.0])
def test_encoded_on_a_gpu_decodes_on_a_cpu_and_the_other_way_round(
    codec: Codec, images: list[RGBImage], quality: float, strength: float
) -> None:
    gpu = Codec.load(device="cuda")
    large = np.array(Image.fromarray(images[0]).resize((1920, 1080)))
    several = [*images, large, *images, large[::-1].copy()]
    importances = [np.linspace(0, 1, 48).reshape(6, 8) for _ in several]
    by_cpu, by_gpu = (c.encode_batch(several, quality, importances, strength) for c in (codec, gpu))
    for strings in (by_cpu, by_gpu):
        for here, there in zip(codec.decompress(strings), gpu.decompress(strings), strict=True):
            assert torch.equal(here.y_fixed, there.y_fixed.cpu())
    for here, there in zip(codec.decode_batch(by_gpu), gpu.decode_batch(by_gpu), strict=True):
        difference = here.astype(int) - there  # the synthesis may round otherwise, up to quality 5 to int8
        assert np.abs(difference).max() <= (4 if quality > 5 else 12)
        assert np.square(difference).mean() < 1


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (17, 33), (63, 65), (64, 64)])
def test_any_size_round_trips(codec: Codec, photos: dict[str, RGBImage], size: tuple[int, int]) -> None:
    image = photos["astronaut"][: size[0], : size[1]]
    decoded = codec.decode(codec.encode(image, 6))
    assert decoded.dtype == np.uint8
    assert decoded.shape == image.shape
    assert psnr_rgb(decoded, image) > 25


_RGB = np.zeros((20, 30, 3), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": np.zeros((20, 30), np.uint8)}, "uint8 array of shape"),
        ({"image": np.zeros((20, 30, 4), np.uint8)}, "uint8 array of shape"),
        ({"image": np.zeros((20, 30, 3), np.float32)}, "uint8 array of shape"),
        ({"image": [[0, 0, 0]]}, "uint8 array of shape"),
        ({"image": np.zeros((0, 30, 3), np.uint8)}, "no pixels"),
        ({"quality": 0.9}, r"quality 0.9 is outside \[1, 8\]"),
        ({"quality": 8.1}, r"quality 8.1 is outside \[1, 8\]"),
        ({"quality": float("nan")}, "quality nan is outside"),
        ({"importance": np.full((4, 4), 1.5)}, "importance must be"),
        ({"importance": np.full((4, 4), np.nan)}, "importance must be"),
        ({"importance": np.zeros((4, 4, 1))}, "importance must be"),
        ({"importance": np.zeros((0, 4))}, "importance must be"),
        ({"importance": np.eye(2), "strength": float("nan")}, "strength"),
        ({"importance": np.ones((2, 2)), "strength": 1e39}, "strength"),
    ],
)
def test_unusable_arguments_are_named(codec: Codec, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec.encode(**{"image": _RGB, **arguments})


def test_images_over_the_limit_are_refused(codec: Codec) -> None:
    small = Codec.load(max_pixels=599)
    with pytest.raises(ValueError, match="over the limit of 599"):
        small.encode(_RGB)
    with pytest.raises(BitstreamError, match="over the limit of 599"):
        small.decode(codec.encode(_RGB))


def test_bitstream_of_another_model_names_both(codec: Codec) -> None:
    stream = unpack(codec.encode(_RGB), codec.max_pixels)
    with pytest.raises(ModelMismatchError, match=f"by model 00c0ffee, this codec is model {codec.sha256[:8]}"):
        codec.decode(pack(stream._replace(model_id=bytes.fromhex("00c0ffee"))))


def test_altered_bitstreams_with_a_valid_checksum_are_refused_or_decode(
    codec: Codec, photos: dict[str, RGBImage]
) -> None:
    rng = np.random.default_rng(0)
    image = photos["chelsea"][:40, :50]
    uniform, mapped = codec.encode(image), codec.encode(image, importance=np.eye(4))
    num_refused = 0
    for k in range(100):
        body = bytearray((uniform, mapped)[k % 2][:-4])
        start = 5 if k % 4 < 2 else len(body) // 2  # from the flags on, or only in the latents
        for at in rng.integers(start, len(body), rng.integers(1, 6)):
            body[at] = rng.integers(256)
        if k % 8 == 7:
            del body[int(rng.integers(start, len(body))) :]
        try:
            pixels = codec.decode(bytes(body) + zlib.crc32(body).to_bytes(4, "little"))
        except BitstreamError:
            num_refused += 1
        else:
            assert pixels.dtype == np.uint8
    assert num_refused > 80


def test_golden_bitstreams_decode_to_what_they_always_did(codec: Codec) -> None:
    manifest = json.loads(golden.MANIFEST.read_text()) if golden.MANIFEST.exists() else {"model_sha256": "none"}
    assert manifest["model_sha256"] == codec.sha256, "the packaged weights changed: run python -m tests.cotam.golden"
    for name, image in golden.golden_images().items():
        (decompressed,) = codec.decompress([(golden.FOLDER / f"{name}.bin").read_bytes()])
        assert golden.y_fixed_sha256(decompressed) == manifest["y_fixed_sha256"][name]
        pixels = codec.reconstruct([decompressed])[0]
        assert pixels.shape == image.pixels.shape
        # Other machines wrote them: samples differ by 1 or 2, some by more where transforms are in int8.
        assert psnr_rgb(pixels, decode_image((golden.FOLDER / f"{name}.png").read_bytes()).pixels) > 45


@pytest.mark.slow
def test_a_hundred_thousand_bad_strings_are_refused_in_bounded_time(codec: Codec) -> None:
    """Truncated, altered, random, and altered with a valid checksum: a few of the last kind decode, none does harm."""
    rng = random.Random(1)
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    good = [codec.encode(image, 1), codec.encode(image, 4, np.linspace(0, 1, 12).reshape(3, 4))]
    num_refused = 0
    for _ in range(100_000):
        string, kind = bytearray(rng.choice(good)), rng.randrange(10)
        if kind < 3:
            string = string[: rng.randrange(len(string))]
        elif kind < 6:
            string[rng.randrange(len(string))] ^= 1 << rng.randrange(8)
        elif kind < 9:
            string = bytearray(rng.randbytes(rng.randrange(200)))
        else:
            for _ in range(rng.randint(1, 3)):
                string[rng.randrange(5, len(string) - 4)] = rng.randrange(256)
            string[-4:] = zlib.crc32(string[:-4]).to_bytes(4, "little")
        start = time.process_time()
        try:
            codec.decode(bytes(string))
        except BitstreamError:
            num_refused += 1
        assert time.process_time() - start < 1
    assert num_refused > 90_000
