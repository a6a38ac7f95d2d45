"""Encoding and decoding of streams: reading, image decoding, networks and entropy coding overlap; memory is bounded.

    samples -(thread)-> image decoding (threads) -> batches -(thread)-> importance -(thread)-> networks
        -> entropy coding (threads) -> in order

Every stage holds a bounded number of images, so memory does not depend on the length of the stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

from torch import Tensor

from cotam.bitstream import BitstreamError, unpack
from cotam.codec import Codec, CompressedImage, DecompressedImage
from cotam.image import ImageError, RGBImage, decode_image, num_computed_pixels, num_pixels_of
from cotam.importance import DEFAULT_STRENGTH
from cotam.importance.source import ImportanceMap, ImportanceSource
from cotam.overlap import ordered_map, prefetch
from cotam.stage_times import StageTimes
from cotam.store.schema import Reject, Row, Sample

A = TypeVar("A")
B = TypeVar("B")

_BATCH_IMAGES = 16
_BATCH_PIXELS = 2**24
_BATCHES_ON_GPU = 2


class Steering(NamedTuple):
    """How importance steers quality: where maps come from, how many levels they span, and whether rows keep them."""

    source: ImportanceSource
    strength: float = DEFAULT_STRENGTH
    keep_map: bool = False


class DecodedSample(NamedTuple):
    """A sample with its image, uint8 (H, W, 3), the format that it was stored in, and its importance, if asked for."""

    sample: Sample
    pixels: RGBImage
    format: str
    importance: ImportanceMap | None = None


class _Compressed(NamedTuple):
    sample: Sample
    format: str
    importance: ImportanceMap | None
    compressed: CompressedImage


class DecodedRow(NamedTuple):
    """A row with the image that its bitstream decodes to, uint8 (H, W, 3), and, if asked for, y_hat (M, h, w)."""

    row: Row
    pixels: RGBImage
    y_hat: Tensor | None = None


def encode_stream(
    samples: Iterable[Sample | Reject],
    codec: Codec,
    quality: float = 4.0,
    num_threads: int = 2,
    steering: Steering | None = None,
    times: StageTimes | None = None,
) -> Iterator[Row | Reject]:
    """Encode samples: one row or one reject for each, in order.

    Args:
        samples: what to encode; rejects among them pass through.
        codec: shared by all threads.
        quality: level of every image.
        num_threads: threads for image decoding, and as many for entropy coding.
        steering: by importance; None for a uniform quality.
        times: gets the seconds by stage.

    Raises:
        Whatever ``samples`` raises.
    """
    times = times or StageTimes()
    with (
        ThreadPoolExecutor(num_threads, thread_name_prefix="cotam-decode") as decoders,
        ThreadPoolExecutor(num_threads, thread_name_prefix="cotam-rans") as coders,
    ):
        read = prefetch(times.iterate("read", samples), 4)
        decoded = decode_samples(read, codec.max_pixels, decoders, 2 * num_threads, times)
        runs = batches(decoded, lambda d: num_computed_pixels(d.pixels.shape[1], d.pixels.shape[0]))
        if steering is not None:
            runs = prefetch(_estimate(runs, steering.source, times), 1)
        strength, keep_map = (steering.strength, steering.keep_map) if steering is not None else (0.0, False)
        compress = partial(_compress, codec=codec, quality=quality, strength=strength, times=times)
        compressed = prefetch(_each(compress, runs, codec), num_threads)
        yield from ordered_map(coders, lambda c: _pack(c, codec, keep_map, times), compressed, 2 * num_threads)


def decode_stream(
    rows: Iterable[Row],
    codec: Codec,
    num_threads: int = 2,
    with_latents: bool = False,
    times: StageTimes | None = None,
) -> Iterator[DecodedRow | Reject]:
    """Decode rows: one image or one reject for each, in order. Arguments and errors as ``encode_stream``."""
    times = times or StageTimes()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="cotam-rans") as coders:
        checked = (_check_row(row, codec) for row in times.iterate("read", rows))
        runs = batches(prefetch(checked, 2 * _BATCH_IMAGES), lambda r: num_computed_pixels(r.width, r.height))
        decode = partial(_decode_rows, codec=codec, executor=coders, with_latents=with_latents, times=times)
        yield from prefetch(_each(decode, runs, codec), num_threads)


def decode_samples(
    samples: Iterable[Sample | Reject], max_pixels: int, executor: ThreadPoolExecutor, in_flight: int, times: StageTimes
) -> Iterator[DecodedSample | Reject]:
    """Decode image files in an executor's threads, ``in_flight`` at most: an image or a reject for each, in order."""

    def decode(sample: Sample | Reject) -> DecodedSample | Reject:
        if isinstance(sample, Reject):
            return sample
        try:
            with times.measure("image"):
                image = decode_image(sample.image, max_pixels)
        except ImageError as error:
            return Reject(key=sample.key, source=sample.source, stage="decode", error=str(error), image=sample.image)
        return DecodedSample(sample, image.pixels, image.format)

    def num_pixels(sample: Sample | Reject) -> int:
        return 0 if isinstance(sample, Reject) else num_pixels_of(sample.image)

    return ordered_map(executor, decode, samples, in_flight, num_pixels)


def batches(
    items: Iterable[A | Reject],
    num_pixels: Callable[[A], int],
    max_images: int = _BATCH_IMAGES,
    max_pixels: int = _BATCH_PIXELS,
) -> Iterator[list[A | Reject]]:
    """Runs of items of bounded number and pixels."""
    batch: list[A | Reject] = []
    pixels = 0
    for item in items:
        size = 0 if isinstance(item, Reject) else num_pixels(item)
        if batch and (pixels + size > max_pixels or len(batch) == max_images):
            yield batch
            batch, pixels = [], 0
        batch.append(item)
        pixels += size
    if batch:
        yield batch


def _estimate(
    batches: Iterable[list[DecodedSample | Reject]], source: ImportanceSource, times: StageTimes
) -> Iterator[list[DecodedSample | Reject]]:
    for batch in batches:
        images = [item for item in batch if isinstance(item, DecodedSample)]
        with times.measure("importance"):
            maps = iter(source([i.sample for i in images], [i.pixels for i in images]))
        yield [item if isinstance(item, Reject) else _with_importance(item, next(maps)) for item in batch]


def _with_importance(item: DecodedSample, importance: ImportanceMap | ValueError) -> DecodedSample | Reject:
    if isinstance(importance, ValueError):
        sample = item.sample
        error = str(importance)
        return Reject(key=sample.key, source=sample.source, stage="importance", error=error, image=sample.image)
    return item._replace(importance=importance)


def _each(function: Callable[[A], list[B]], batches: Iterable[A], codec: Codec) -> Iterator[B]:
    """What ``function`` makes of every batch, in order; on a GPU of two at once, as they use CPU and GPU by turns."""
    under_way = 1 if codec.device.type == "cpu" else _BATCHES_ON_GPU
    with ThreadPoolExecutor(under_way, thread_name_prefix="cotam-networks") as executor:
        for items in ordered_map(executor, function, batches, under_way):
            yield from items


def _compress(
    batch: list[DecodedSample | Reject], codec: Codec, quality: float, strength: float, times: StageTimes
) -> list[_Compressed | Reject]:
    images = [item for item in batch if isinstance(item, DecodedSample)]
    with times.measure("networks"):
        indexes = [codec.quality_index(quality, item.pixels, item.importance, strength) for item in images]
        compressed = iter(codec.compress([item.pixels for item in images], indexes))
    return [
        item if isinstance(item, Reject) else _Compressed(item.sample, item.format, item.importance, next(compressed))
        for item in batch
    ]


def _pack(item: _Compressed | Reject, codec: Codec, keep_map: bool, times: StageTimes) -> Row | Reject:
    if isinstance(item, Reject):
        return item
    sample, compressed, importance = item.sample, item.compressed, item.importance
    with times.measure("entropy"):
        bitstream = codec.pack(compressed)
    return Row(
        key=sample.key,
        source=sample.source,
        width=compressed.width,
        height=compressed.height,
        bitstream=bitstream,
        quality=codec.mean_quality(compressed.quality_index),
        source_num_bytes=len(sample.image),
        source_format=item.format,
        source_sha256=hashlib.sha256(sample.image).hexdigest(),
        mean_importance=None if importance is None else float(importance.mean()),
        importance=importance if keep_map else None,
        members=sample.members,
    )


def _decode_rows(
    batch: list[Row | Reject], codec: Codec, executor: ThreadPoolExecutor, with_latents: bool, times: StageTimes
) -> list[DecodedRow | Reject]:
    rows = [item for item in batch if isinstance(item, Row)]
    with times.measure("entropy"):
        try:
            decompressed: list[DecompressedImage | BitstreamError] = [
                *codec.decompress([r.bitstream for r in rows], executor)
            ]
        except BitstreamError:
            decompressed = [_decompress_one(r, codec) for r in rows]  # find the bad one, keep the others
    good = [d for d in decompressed if isinstance(d, DecompressedImage)]
    with times.measure("networks"):
        images = iter(codec.reconstruct(good))
        latents = iter(codec.latents(good) if with_latents else [None] * len(good))
    outcomes, items = iter(decompressed), list[DecodedRow | Reject]()
    for item in batch:
        outcome = next(outcomes) if isinstance(item, Row) else None
        if isinstance(item, Reject):
            items.append(item)
        elif isinstance(outcome, BitstreamError):
            error = str(outcome)
            items.append(Reject(key=item.key, source=item.source, stage="decode", error=error, image=item.bitstream))
        else:
            items.append(DecodedRow(item, next(images), next(latents)))
    return items


def _check_row(row: Row, codec: Codec) -> Row | Reject:
    """A row whose size is that of its bitstream, which batches are made by, or why it is none."""
    try:
        stream = unpack(row.bitstream, codec.max_pixels)
        if (stream.width, stream.height) == (row.width, row.height):
            return row
        error = f"bitstream is {stream.width}x{stream.height}, its row says {row.width}x{row.height}"
    except BitstreamError as problem:
        error = str(problem)
    return Reject(key=row.key, source=row.source, stage="decode", error=error, image=row.bitstream)


def _decompress_one(row: Row, codec: Codec) -> DecompressedImage | BitstreamError:
    try:
        return codec.decompress([row.bitstream])[0]
    except BitstreamError as error:
        return error
