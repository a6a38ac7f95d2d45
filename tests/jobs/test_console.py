"""Progress where there is no terminal."""

from __future__ import annotations

import re
import time

import pytest

from jobs.console import partition_progress

COUNTS = {
    "num_images": 30,
    "num_rejects": 1,
    "num_pixels": 8000,
    "source_num_bytes": 4_000_000,
    "bitstream_num_bytes": 500,
}


def test_a_line_every_so_often_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    with partition_progress(10, "partitions", interval_s=0.2) as update:
        for k in range(10):
            update({**COUNTS, "num_images": 30 * k}, k)
            time.sleep(0.05)
        update(COUNTS | {"num_images": 300}, 10)
    most = (time.monotonic() - started) / 0.2 + 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and 2 <= len(lines) <= most
    first, last = lines[0], lines[-1]
    pattern = (
        r"(\d+)/10 partitions  (\d+) images  [\d.]+/s  [\d.]+ MB/s  0\.500 bpp  1 rejects  0:00:0\d gone, 0:00:0\d left"
    )
    for line in lines:
        assert re.fullmatch(pattern, line), line
    assert last.startswith("10/10 partitions  300 images")
    assert not first.startswith(("0/", "10/"))


def test_nothing_is_shown_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), partition_progress(10, "partitions"):
        raise ValueError("before it began")
    with partition_progress(10, "partitions", quiet=True) as update:
        update(COUNTS, 10)
    assert capsys.readouterr() == ("", "")


def test_nothing_is_known_of_the_time_left_before_a_partition_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with partition_progress(10, "partitions", interval_s=0) as update:
        update({}, 0)
    assert (
        capsys.readouterr()
        .err.splitlines()[0]
        .endswith("0 images  0.0/s  0.0 MB/s  0.000 bpp  0 rejects  0:00:00 gone, ? left")
    )
