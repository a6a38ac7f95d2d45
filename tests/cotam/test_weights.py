"""Codec files: the same bytes again when saved again, and anything that is no intact codec file is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save

from cotam import weights
from cotam.codec import Codec
from cotam.config import CodecConfig
from cotam.entropy.tables import build_tables
from cotam.models.codec_model import CodecModel
from cotam.pinned import load_codec
from cotam.weights import FORMAT, TierWeights, dump_codec, parse_codec, read_weights

Arrays = dict[str, NDArray[Any]]


CONFIG = CodecConfig(M=16, N8=8, N16=8, analysis_blocks=(1, 1), synthesis_blocks=(1, 1), N_z=8, N_hyper=8)


@pytest.fixture(scope="module")
def file_bytes() -> bytes:
    """The file of a small codec."""
    return dump_codec([TierWeights(1.0, 8.0, CodecModel(CONFIG), build_tables())])


@pytest.mark.parametrize("training", [False, True])
def test_saving_a_loaded_codec_gives_its_bytes_and_identity(codec: Codec, tmp_path: Path, training: bool) -> None:
    """Also when training was about to go on: the thawed parameters quantise to the stored integers."""
    loaded = parse_codec(read_weights("cotam-base"), "packaged")
    for tier in loaded.tiers:
        tier.model.train(training)
    (tmp_path / "codec.safetensors").write_bytes(dump_codec(loaded.tiers))
    assert Codec.load(str(tmp_path / "codec.safetensors")).sha256 == codec.sha256


def _with(**changes: NDArray[Any]) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update(changes)


def _change(name: str, value: float) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name].flat[0] = value

    return change


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda a: a.pop("0.g_a.linear.weight"), "does not fit its own configuration.*g_a.linear.weight"),
        (lambda a: a.pop("0.tables.cdf"), "does not fit its own configuration.*tables.cdf"),
        (_with(**{"0.g_a.linear.weight": np.zeros((2, 3), np.float16)}), "does not fit its own configuration"),
        (_with(**{"0.tables.start": np.zeros(257, np.int32)}), "CDF tables"),
        (_change("0.tables.cdf", 5), "CDF tables"),
        (_change("0.entropy_parameters.first.mix.weight", -128), "not in normal form"),
        (_change("0.entropy_parameters.first.mix.bias", 2**30), "overflow"),
        (_change("0.entropy_parameters.first.mix.exponent", 100), "overflow"),
        (_change("0.g_a.linear.weight", math.nan), "does not fit its own configuration.*no numbers"),
        (_change("0.z_indexes", 64), "does not fit its own configuration"),
    ],
)
def test_tampered_arrays_are_refused(file_bytes: bytes, alter: Callable[[Arrays], object], message: str) -> None:
    arrays = {name: array.copy() for name, array in load(file_bytes).items()}
    alter(arrays)
    with pytest.raises(ValueError, match=message):
        parse_codec(
            save(arrays, {"format": FORMAT, "config": json.dumps(dataclasses.asdict(CONFIG)), "tiers": "[[1, 8]]"}),
            "codec",
        )


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "codec has format None, this version reads"),
        ({"format": "cotam-codec/9"}, "codec has format 'cotam-codec/9', this version reads"),
        ({"format": FORMAT}, "does not fit its own configuration: 'config'"),
        ({"format": FORMAT, "config": "no json"}, "does not fit its own configuration"),
        ({"format": FORMAT, "config": "[1]"}, "does not fit its own configuration"),
        ({"format": FORMAT, "config": '{"N_w": 3}'}, "unknown key 'N_w'"),
        ({"format": FORMAT, "config": '{"M": "wide"}'}, "does not fit its own configuration"),
        ({"format": FORMAT, "config": '{"M": 64}', "tiers": "[[1, 8]]"}, "does not fit its own configuration"),
        ({"format": FORMAT, "config": "{}"}, "does not fit its own configuration: 'tiers'"),
        ({"format": FORMAT, "config": "{}", "tiers": "[1, 8]"}, "does not fit its own configuration"),
        ({"format": FORMAT, "config": "{}", "tiers": "[]"}, "tiers must be one to 8"),
        ({"format": FORMAT, "config": "{}", "tiers": "[[1, 8], [4, 8]]"}, "tiers must be one to 8"),
        ({"format": FORMAT, "config": "{}", "tiers": "[[5, 4], [1, 8]]"}, "tiers must be one to 8"),
        ({"format": FORMAT, "config": "{}", "tiers": "[[0, 4], [1, 8]]"}, "tiers must be one to 8"),
    ],
)
def test_other_metadata_is_refused(file_bytes: bytes, metadata: dict[str, str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_codec(save(load(file_bytes), metadata), "codec")


@pytest.mark.parametrize("data", [b"", b"\x80\x04pickle", bytes(100), b"\xff" * 100], ids=["empty", "text", "0", "255"])
def test_other_files_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"other\.safetensors is not a safetensors file"):
        Codec.load(str(tmp_path / "other.safetensors"))


def test_truncated_file_is_refused(file_bytes: bytes) -> None:
    with pytest.raises(ValueError, match="not a safetensors file"):
        parse_codec(file_bytes[:-1], "codec")


def test_damaged_packaged_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(weights.PACKAGED, "cotam-base", "0" * 64)
    with pytest.raises(ValueError, match="packaged weights cotam-base are damaged"):
        read_weights("cotam-base")


@pytest.mark.parametrize("name", ["cotam-giant", "missing/codec.safetensors", "memory://missing.safetensors"])
def test_unknown_names_are_file_not_found(name: str) -> None:
    with pytest.raises(FileNotFoundError):
        read_weights(name)


def test_channels_whose_weights_are_too_small_for_integers_come_back() -> None:
    model = CodecModel(CodecConfig(M=32, N8=8, N16=16, N_z=8, N_hyper=16))
    layer = model.entropy_parameters.h_s.coarse
    with torch.no_grad():
        layer.weight[0], layer.bias[0] = 1e-7, 2.0**-14  # a bias of one integer beside weights of none
    loaded = parse_codec(dump_codec([TierWeights(1.0, 8.0, model, build_tables())]), "codec").tiers[0].model
    for ours, theirs in zip(
        layer.frozen_integers(), loaded.entropy_parameters.h_s.coarse.frozen_integers(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_store_of_other_weights_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"cotam-base differs from the weights .* use those, or the version of cotam"):
        load_codec("cotam-base", "0" * 64, "cpu", 2**20)
