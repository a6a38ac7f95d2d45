"""Batches on a GPU: one at a time has it, while the others are on the CPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import cotam.codec
from cotam.bitstream import BitstreamError, pack, unpack
from cotam.codec import Codec
from cotam.image import RGBImage
from cotam.models import turns
from cotam.models.turns import Turns


def test_one_thread_has_the_turn_and_gives_way_while_it_is_elsewhere() -> None:
    resource = Turns(threading.Lock())
    arrived = [threading.Event(), threading.Event()]
    holders, most = 0, 0

    def hold() -> None:
        nonlocal holders, most
        holders += 1
        most = max(most, holders)
        threading.Event().wait(0.01)
        holders -= 1

    def work(own: int) -> bool:
        with resource.take():
            hold()
            arrived[own].set()
            with resource.give_way():
                met = arrived[1 - own].wait(10)  # the other has its turn before this one is back
            hold()
        return met

    with ThreadPoolExecutor(2) as executor:
        assert list(executor.map(work, range(2))) == [True, True]
    assert most == 1
    with resource.give_way():  # without a turn there is nothing to give
        pass


def test_turns_change_no_bytes_and_end_with_what_fails(
    codec: Codec, photos: dict[str, RGBImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken on a CPU here: two batches under way, and a bitstream that is cut off in between."""
    images = [photo[:96, :128] for photo in list(photos.values())[:2]]
    expected = codec.encode_batch(images, 5.0)
    pixels = codec.decode_batch(expected)
    stream = unpack(expected[0], codec.max_pixels)
    monkeypatch.setattr(cotam.codec, "turn_on", lambda _: turns._GPU.take())
    with ThreadPoolExecutor(2) as executor:
        for strings in executor.map(lambda _: codec.encode_batch(images, 5.0), range(4)):
            assert strings == expected
        with pytest.raises(BitstreamError):
            codec.decode(pack(stream._replace(string=stream.string[:-8])))
        for decoded in executor.map(codec.decode_batch, [expected] * 4):
            assert all((here == there).all() for here, there in zip(decoded, pixels, strict=True))
