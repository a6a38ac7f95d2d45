"""What is counted, and under which tags."""

from __future__ import annotations

from collections import Counter as Tally
from pathlib import Path

import pytest
from ray.util import metrics as ray_metrics

from cotam.codec import Codec
from cotam.stage_times import StageTimes
from cotam.store.partitions import Partition
from cotam.store.readers import read_partition
from cotam.store.schema import Reject, Row
from cotam.stream import decode_stream, encode_stream
from pipelines import metrics
from pipelines.counter import Counts, PartitionCounter
from tests.corpus import bad_files, photograph, to_bytes, write_tar

PARTITION = Partition(partition_id="p-1", kind="tar", source="s3://corpus/a.tar")


class Recorded:
    """What was handed to Ray's metrics, by name and tag values."""

    def __init__(self) -> None:
        self.sums: Tally[tuple[str, ...]] = Tally()
        self.num_calls = 0

    def record(self, metric: ray_metrics.Metric, value: float, tags: dict[str, str] | None = None) -> None:
        assert set(tags or {}) == set(metric.info["tag_keys"])
        self.sums[(metric.info["name"], *(tags or {}).values())] += value  # type: ignore[assignment]
        self.num_calls += 1


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    seen = Recorded()
    monkeypatch.setattr(ray_metrics.Metric, "_record", lambda self, value, tags=None: seen.record(self, value, tags))
    return seen


def test_reasons_that_no_bad_corpus_has() -> None:
    reasons = {
        "key": ["another image of this shard has the same key", "the name of one image of this shard is a folder of x"],
        "format": ["several pages: split it", "signed or 32-bit samples, whose range", "planes of 16-bit samples: x"],
        "size": ["a JPEG of over 1000 scans, perhaps", "160x64 pixels, over webp's limit of 100 a side"],
        "member": ["a member has disappeared", "questions of image 'a': no answer"],
    }
    for reason, errors in reasons.items():
        for error in errors:
            reject = Reject(key="k", source="s", stage="read", error=error)
            assert (error, metrics.reject_reason(reject)) == (error, reason)


def test_every_reject_of_a_bad_corpus_has_one_of_a_few_reasons(tmp_path: Path, codec: Codec) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name, (content, _) in bad_files().items():
        (folder / name).write_bytes(content)
    paths = (*sorted(bad_files()), "gone.jpg")
    good = to_bytes(photograph(0), quality=90)
    whole = write_tar(
        tmp_path / "a.tar",
        [("1.jpg", good), ("2.txt", b"alone"), ("3.jpg", good), ("3.txt", b"\xff\xfe"), ("4.jpg", good)],
    )
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    partitions = [
        Partition(partition_id="1", kind="files", source=str(folder), paths=paths),
        Partition(partition_id="2", kind="tar", source=str(whole)),
        Partition(partition_id="3", kind="tar", source=str(cut)),
    ]
    # The cut tar has the faults of the whole one again, and its own.
    rejects = [r for p in partitions for r in encode_stream(read_partition(p), codec) if isinstance(r, Reject)]
    rows = [r for r in encode_stream(read_partition(partitions[1]), codec) if isinstance(r, Row)]
    altered = Row(**{f: getattr(rows[0], f) for f in rows[0].__dataclass_fields__} | {"bitstream": b"short"})
    rejects += [r for r in decode_stream([altered], codec) if isinstance(r, Reject)]
    tags = Tally((metrics.reject_stage(r), metrics.reject_reason(r)) for r in rejects)
    assert tags == {
        ("decode", "empty"): 1, ("decode", "corrupt"): 1, ("decode", "format"): 1, ("decode", "size"): 1,
        ("read", "missing"): 3, ("read", "member"): 2, ("read", "damaged"): 1, ("decode", "bitstream"): 1,
    }  # fmt: skip
    # What an error says never becomes a tag.
    strange = Reject(key="k", source="s", stage="never heard of", error="s3://bucket/secret is odd")
    assert (metrics.reject_stage(strange), metrics.reject_reason(strange)) == ("other", "other")


def test_a_partition_is_recorded_as_it_is_reported(recorded: Recorded) -> None:
    reports: list[Counts] = []
    counter = PartitionCounter("encode", PARTITION, reports.append)
    for _ in range(1000):
        counter.image(num_pixels=100, source_num_bytes=30, num_bytes=5)
    counter.reject(Reject(key="k", source="s", stage="decode", error="empty file"))
    with counter.times.measure("networks"):
        pass
    record = counter.completion("data/p-1.parquet", 1, "0", None)
    assert (record.num_images, record.num_rejects, record.source_num_bytes) == (1001, 1, 30_000)
    sums = recorded.sums
    assert sums["cotam_images", "encode"] == 1001 == sum(r["num_images"] for r in reports)
    assert sums["cotam_rejects", "encode", "decode", "empty"] == 1
    assert (sums["cotam_source_bytes", "encode"], sums["cotam_stored_bytes", "encode"]) == (30_000, 5000)
    assert (sums["cotam_pixels", "encode"], sums["cotam_bpp", "encode"]) == (100_000, pytest.approx(400))
    assert sums["cotam_stage_seconds", "encode", "networks"] == pytest.approx(record.stage_seconds["networks"])
    # Counters go out with the reports, not with the images.
    assert recorded.num_calls < 1000 + 10 * len(reports)


def test_stages_of_encoding_and_decoding(codec: Codec, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{k}.jpg", to_bytes(photograph(k), quality=90)) for k in range(6)])
    times = StageTimes()
    samples = read_partition(Partition(partition_id="1", kind="tar", source=str(path)))
    rows = [r for r in encode_stream(samples, codec, times=times) if isinstance(r, Row)]
    assert len(rows) == 6
    assert set(times.seconds()) == {"read", "image", "networks", "entropy"}
    assert all(seconds > 0 for seconds in times.seconds().values())
    times = StageTimes()
    assert len(list(decode_stream(rows, codec, times=times))) == 6
    assert set(times.seconds()) == {"read", "networks", "entropy"}


def test_times_are_those_of_the_stage_alone_and_errors_pass() -> None:
    import time

    times = StageTimes()

    def items():  # type: ignore[no-untyped-def]
        for k in range(3):
            time.sleep(0.02)
            yield k
        raise OSError("the source is away")

    with pytest.raises(OSError, match="away"):
        for _ in times.iterate("read", items()):
            time.sleep(0.1)  # the consumer's own time
    assert 0.06 <= times.seconds()["read"] < 0.25
