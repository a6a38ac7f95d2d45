"""Streams of samples and rows: what is odd becomes a reject in its place."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from cotam.codec import Codec
from cotam.image import num_computed_pixels, size_problem
from cotam.overlap import ordered_map
from cotam.store.schema import Reject, Row, Sample
from cotam.stream import DecodedRow, _each, decode_stream, encode_stream
from tests.corpus import photograph, to_bytes


def rows(codec: Codec, num: int) -> list[Row]:
    samples = [Sample(key=str(k), source="s", image=to_bytes(photograph(k))) for k in range(num)]
    return [item for item in encode_stream(samples, codec, 4.0) if isinstance(item, Row)]


def test_rows_that_lie_about_their_size_are_rejects_before_they_are_decoded(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are made by what rows say: sixteen huge images that say 1x1 would be decoded at once."""
    good = rows(codec, 4)
    lying = dataclasses.replace(good[1], width=1, height=1)
    broken = dataclasses.replace(good[2], bitstream=good[2].bitstream[:-1])
    decompress, num_decoded = codec.decompress, 0

    def counted(strings, executor=None):  # type: ignore[no-untyped-def]
        nonlocal num_decoded
        num_decoded += len(strings)
        return decompress(strings, executor)

    monkeypatch.setattr(codec, "decompress", counted)
    decoded = list(decode_stream([good[0], lying, broken, good[3]], codec))
    assert [type(item) for item in decoded] == [DecodedRow, Reject, Reject, DecodedRow]
    assert [item.error for item in decoded if isinstance(item, Reject)] == [
        f"bitstream is {good[1].width}x{good[1].height}, its row says 1x1",
        "bitstream checksum does not match: truncated or altered",
    ]
    assert num_decoded == 2


def test_few_large_images_are_decoded_ahead_and_many_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotam.overlap._PIXELS_UNDER_WAY", 100)
    under_way: list[int] = []
    most = 0

    def begin(item: int) -> int:
        nonlocal most
        under_way.append(item)
        most = max(most, sum(under_way))
        return item

    sizes = [10] * 20 + [90] * 5 + [500] * 3 + [10] * 20
    with ThreadPoolExecutor(8) as executor:
        results = []
        for item in ordered_map(executor, begin, sizes, 8, lambda size: size):
            time.sleep(0.005)
            under_way.remove(item)
            results.append(item)
    assert results == sizes and most <= 600  # one image beyond what is under way has just been handed on


def test_lines_count_as_what_they_cost(codec: Codec) -> None:
    """A line of pixels is padded to 16: a limit on pixels alone would let it take 16 times the memory."""
    assert num_computed_pixels(1, 2**20) == 2**24
    assert size_problem(1, 1, 1) is None and size_problem(11585, 11585, 2**27) is None
    assert "over the limit of 4194304 pixels" in (size_problem(1, 2**20, 2**22) or "")
    assert "a side" in (size_problem(2**24 + 1, 1, 2**30) or "")
    too_wide = b"P6 16777217 1 255\n" + bytes(3 * 16777217)
    (item,) = encode_stream([Sample(key="k", source="s", image=too_wide)], codec, 4.0)
    assert isinstance(item, Reject) and "16777217x1 pixels, over the limit" in item.error


@pytest.mark.parametrize(("device", "most"), [("cpu", 1), ("cuda", 2)])
def test_batches_take_turns_on_a_gpu_and_stay_in_order(device: str, most: int) -> None:
    running, largest = 0, 0

    def work(batch: int) -> list[int]:
        nonlocal running, largest
        running += 1
        largest = max(largest, running)
        time.sleep(0.05 / (1 + batch))
        running -= 1
        return [10 * batch, 10 * batch + 1]

    codec = SimpleNamespace(device=torch.device(device))
    assert list(_each(work, range(6), codec)) == [10 * k + i for k in range(6) for i in (0, 1)]  # type: ignore[arg-type]
    assert largest == most
