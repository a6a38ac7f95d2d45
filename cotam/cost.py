"""What a corpus costs as its source files and as a store of bitstreams, and when encoding has paid for itself."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch

from cotam.codec import Codec
from cotam.store.fs import Root
from cotam.store.records import Completion
from cotam.store.shard import read_rows

GIB = 2**30  # bytes: the GB that S3 bills
_DECODED_IMAGES = 32
_DECODED_PIXELS = 2**25
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}
_BINARY_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus, stored both ways.

    Attributes:
        num_images, num_pixels: in it.
        source_num_bytes, stored_num_bytes: of its source files (tars, Parquet, loose files), and of shards, with all
            that is in them: images, other members, metadata.
        encode_s, decode_s: seconds of a worker to encode all of it, and of a CPU to decode all of it.
    """

    num_images: float
    num_pixels: float
    source_num_bytes: float
    stored_num_bytes: float
    encode_s: float
    decode_s: float

    def scaled_to(self, source_num_bytes: float) -> Corpus:
        """A corpus of such images with so many bytes of source files. Raises ValueError where this one has none."""
        if not self.source_num_bytes:
            raise ValueError("a corpus without bytes of source files cannot be scaled")
        factor = source_num_bytes / self.source_num_bytes
        return Corpus(**{name: factor * value for name, value in dataclasses.asdict(self).items()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices in any one currency; the defaults are examples, in dollars.

    Attributes:
        storage, archive: of a GiB for a month, and where the originals are kept beside the bitstreams, if they are.
        egress: of reading a GiB.
        worker_hour, cpu_hour: of a worker that encodes, and of a CPU that decodes.

    Raises:
        ValueError: a price is negative or no number.
    """

    storage: float = 0.023
    archive: float | None = None
    egress: float = 0.0
    worker_hour: float = 0.045
    cpu_hour: float = 0.045

    def __post_init__(self) -> None:
        for name, price in dataclasses.asdict(self).items():
            if price is not None and not 0 <= price < float("inf"):
                raise ValueError(f"{name} {price} is no price")


class Costs(NamedTuple):
    """``once``: encoding. ``source_files`` and ``bitstreams``: of a month, by what is paid for."""

    once: float
    source_files: dict[str, float]
    bitstreams: dict[str, float]

    @property
    def saved_per_month(self) -> float:
        """How much less a month costs; negative where it costs more."""
        return sum(self.source_files.values()) - sum(self.bitstreams.values())

    @property
    def break_even_months(self) -> float | None:
        """After how many months encoding has paid for itself; None where it never does."""
        return self.once / self.saved_per_month if self.saved_per_month > 0 else None

    def total(self, months: float) -> tuple[float, float]:
        """Over so many months, as source files and as bitstreams, encoding included."""
        return months * sum(self.source_files.values()), self.once + months * sum(self.bitstreams.values())


def costs(corpus: Corpus, prices: Prices, reads_per_month: float = 1.0) -> Costs:
    """The costs of a corpus of which everything is read ``reads_per_month`` times.

    Decoding source files is not counted, nor are requests: a shard takes one where loose files take one each.

    Raises:
        ValueError: ``reads_per_month`` is negative or no number.
    """
    if not 0 <= reads_per_month < float("inf"):
        raise ValueError(f"reads_per_month {reads_per_month} is no number of times")
    source_gib, stored_gib = corpus.source_num_bytes / GIB, corpus.stored_num_bytes / GIB
    bitstreams = {
        "storage": prices.storage * stored_gib,
        "reading": prices.egress * reads_per_month * stored_gib,
        "decoding": prices.cpu_hour * reads_per_month * corpus.decode_s / 3600,
    }
    if prices.archive is not None:
        bitstreams["originals"] = prices.archive * source_gib
    source_files = {"storage": prices.storage * source_gib, "reading": prices.egress * reads_per_month * source_gib}
    return Costs(prices.worker_hour * corpus.encode_s / 3600, source_files, bitstreams)


def measured_corpus(root: Root, records: Iterable[Completion], codec: Codec) -> Corpus:
    """What is in a store of `cotam encode`; decoding is timed on some of its images, on one CPU.

    Raises:
        ValueError: no row, or output that is no shard.
        OSError: it cannot be read.
    """
    sums = dict.fromkeys(("num_rows", "num_pixels", "data_num_bytes", "seconds"), 0.0)
    source_num_bytes = 0
    sample: list[bytes] = []
    sampled_pixels = 0
    for record in records:
        for name in sums:
            sums[name] += getattr(record, name) or 0
        # As they were listed, with members, as shards have; images may be more than a compressed tar.
        source_num_bytes += max(record.source_num_bytes, record.partition_num_bytes or 0)
        if len(sample) < _DECODED_IMAGES and sampled_pixels < _DECODED_PIXELS and record.num_rows:
            for row in read_rows(root, record.data):
                sample.append(row.bitstream)
                sampled_pixels += row.width * row.height
                if len(sample) >= _DECODED_IMAGES or sampled_pixels >= _DECODED_PIXELS:
                    break
    if not sample:
        raise ValueError(f"{root.uri} has no encoded images yet")
    return Corpus(
        num_images=sums["num_rows"],
        num_pixels=sums["num_pixels"],
        source_num_bytes=source_num_bytes,
        stored_num_bytes=sums["data_num_bytes"],
        encode_s=sums["seconds"],
        decode_s=sums["num_pixels"] * _decode_s(codec, sample) / sampled_pixels,
    )


def _decode_s(codec: Codec, strings: list[bytes]) -> float:
    """Seconds of one CPU to decode all of ``strings``."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        codec.decode(strings[0])  # compiles kernels
        start = time.process_time()
        for string in strings:
            codec.decode(string)
        return time.process_time() - start
    finally:
        torch.set_num_threads(num_threads)


def parse_num_bytes(text: str) -> float:
    """Bytes of "1PB", "1.5 TiB", "2e15". Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([kMGTPE]|[KMGTPE]i)?B?\s*", text)
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not 0 < number < float("inf"):
        raise ValueError(f"{text!r} is no number of bytes, such as 1PB, 1.5TiB or 2e15")
    return number * (_UNITS | _BINARY_UNITS)[match[2] or ""]
