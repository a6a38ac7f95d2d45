"""`cotam cost`: amounts that a person would compute, from what a store really holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotam.codec import Codec
from cotam.cost import GIB, Corpus, Prices, costs, measured_corpus, parse_num_bytes
from cotam.report.cost import cost_summary
from cotam.store.records import RunStore
from jobs.cost import cost
from tests.corpus import write_webdataset
from tests.encoded import encode_here

CORPUS = Corpus(
    num_images=1000, num_pixels=1e9, source_num_bytes=100 * GIB, stored_num_bytes=10 * GIB, encode_s=7200, decode_s=3600
)  # fmt: skip
PRICES = Prices(storage=0.02, egress=0.05, worker_hour=3.0, cpu_hour=0.5)


def test_amounts() -> None:
    result = costs(CORPUS, PRICES, reads_per_month=2)
    assert result.source_files == pytest.approx({"storage": 2, "reading": 10})
    assert result.bitstreams == pytest.approx({"storage": 0.2, "reading": 1, "decoding": 1})
    assert result.once == pytest.approx(6)
    assert result.break_even_months == pytest.approx(6 / 9.8)
    assert result.total(10) == pytest.approx((120, 6 + 22))
    kept = costs(CORPUS, Prices(storage=0.02, archive=0.001), reads_per_month=0)
    assert kept.bitstreams == pytest.approx({"storage": 0.2, "reading": 0, "decoding": 0, "originals": 0.1})
    ten = costs(CORPUS.scaled_to(1000 * GIB), PRICES, reads_per_month=2)
    assert ten.once == pytest.approx(60) and ten.total(1) == pytest.approx([10 * a for a in result.total(1)])


def test_encoding_that_never_pays_says_so() -> None:
    result = costs(CORPUS, Prices(storage=0.001, cpu_hour=1.0))
    assert result.saved_per_month < 0 and result.break_even_months is None
    assert "does not pay" in cost_summary(result, 12)
    for prices in ({"storage": -1.0}, {"egress": float("nan")}, {"archive": float("inf")}):
        with pytest.raises(ValueError, match="is no price"):
            Prices(**prices)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("1PB", 1e15), ("1.5 TiB", 1.5 * 2**40), ("2e15", 2e15), ("500T", 5e14), ("7", 7)]
)
def test_numbers_of_bytes(text: str, num_bytes: float) -> None:
    assert parse_num_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "lots", "-1PB", "0", "1.2.3", "1 XB", "nan", "1e999"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="no number of bytes"):
        parse_num_bytes(text)


def test_decoding_is_timed_on_a_sample_and_scaled_by_pixels(
    tmp_path: Path, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_webdataset(tmp_path / "in", 2, 6, width=160, height=128)
    store = encode_here(tmp_path / "in", tmp_path / "out")
    sampled: list[int] = []

    def half_a_second_each(codec: Codec, strings: list[bytes]) -> float:
        sampled.append(len(strings))
        return 0.5 * len(strings)

    monkeypatch.setattr("cotam.cost._decode_s", half_a_second_each)
    monkeypatch.setattr("cotam.cost._DECODED_IMAGES", 4)
    measured = measured_corpus(store.root, store.completions(), codec)
    assert sampled == [4] and measured.decode_s == pytest.approx(0.5 * 12)
    monkeypatch.setattr("cotam.cost._DECODED_PIXELS", 160 * 128 + 1)  # two images are over it
    assert measured_corpus(store.root, store.completions(), codec).decode_s == pytest.approx(0.5 * 12)
    assert sampled == [4, 2]


def test_a_store_is_measured_and_scaled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_webdataset(tmp_path / "in", 2, 6, width=160, height=128)
    dst = str(tmp_path / "out")
    encode_here(tmp_path / "in", tmp_path / "out")
    cost(dst, corpus_bytes="1PB", report=tmp_path / "cost.html", as_json=True)
    found = json.loads(capsys.readouterr().out)
    records = list(RunStore(dst).completions())
    measured = found["measured"]
    assert measured["num_images"] == 12 and measured["num_pixels"] == 12 * 160 * 128
    assert measured["source_num_bytes"] == sum(f.stat().st_size for f in (tmp_path / "in").iterdir())
    assert measured["stored_num_bytes"] == sum(f.stat().st_size for f in (tmp_path / "out/data").iterdir())
    assert measured["encode_s"] == pytest.approx(sum(r.seconds for r in records))
    assert 0 < measured["decode_s"] < 60
    assert found["corpus"]["source_num_bytes"] == pytest.approx(1e15)
    assert found["once"] == pytest.approx(0.045 / 3600 * found["corpus"]["encode_s"])
    page = (tmp_path / "cost.html").read_text()
    assert "1.0 PB of source files" in page and "<img" in page
    with pytest.raises(ValueError, match="it is no output of `cotam encode`"):
        cost(str(tmp_path / "in"))
