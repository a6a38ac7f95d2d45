"""Weights: where they are found, how they are checked, and the one file format of a codec.

A codec file is a safetensors file. It has one model or several, its tiers, each for a range of qualities; the arrays of
tier k have names that begin with "k.". The floating-point transforms are float16; every integer layer is stored as the
integers it computes with; the CDF tables are stored, not recomputed. Its identity is its sha256.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from cotam.bitstream import MAX_TIERS
from cotam.config import Q_STEPS, CodecConfig, from_mapping
from cotam.entropy.tables import Tables, check_tables, scales
from cotam.errors import one_line
from cotam.models.codec_model import CodecModel
from cotam.models.integer import IntConv2d
from cotam.store.fs import split_uri

FORMAT = "cotam-codec/6"
# Packaged weights by name: the sha256 of cotam/packaged/{name}.safetensors, or of its parts, .0, .1, together.
PACKAGED: dict[str, str] = {
    "cotam-adapter-tiny": "ab106fdd315335cab5a0828606e59738a1ec95e628cfbd36383f4a7a18b48ceb",
    "cotam-adapter-tiny-large": "e0b9d22dc967d59a2b1f3ed37fbcabae6adfac2d7c339117ed8e9b8de0daa8e5",
    "cotam-base": "84ffbe767cefec6b487fd3306e861ec78b42b74ce8308b1c2f2d3e6dd313e436",
    "cotam-large": "fd7fe306e1c27f280cb9b670e5aedf8fb430031e490b4bfda89a5f041760758e",
}
# Packaged folders by name: the sha256 of the weights in cotam/packaged/{name}.
PACKAGED_FOLDERS: dict[str, tuple[str, str]] = {
    "cotam-clip-tiny": (
        "open_clip_model.safetensors",
        "10610c61d74f582792ced8e5a65c556c0323dea9d84c38542e0058ddf5f28850",
    ),
    "cotam-vlm-tiny": (
        "model.safetensors",
        "fc4c543e50c737eb1586540a33a45efbc9e0bb5df9b5110fff436dc06a45c808",
    ),
}
_MAX_FILE_BYTES = 2**30
_Arrays = dict[str, NDArray[Any]]


class TierWeights(NamedTuple):
    """One model of a codec, frozen, with its tables. lowest_quality, highest_quality: what it is for."""

    lowest_quality: float
    highest_quality: float
    model: CodecModel
    tables: Tables

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest quality that it is for."""
        return self.lowest_quality, self.highest_quality


class LoadedCodec(NamedTuple):
    """The tiers of a codec, narrow ranges first, and the sha256 (hex) of the file they came from.

    The last tier is for all qualities. The others have its shape, but for the channels that their qualities have not.
    """

    tiers: tuple[TierWeights, ...]
    sha256: str

    @property
    def config(self) -> CodecConfig:
        """The shape of the last tier."""
        return self.tiers[-1].model.config


def read_weights(name_or_path_or_uri: str) -> bytes:
    """The bytes of a packaged model by name, or of a local path or any fsspec URI.

    Raises:
        FileNotFoundError: no such name or file.
        ValueError: a packaged file differs from its pinned sha256.
    """
    pinned = PACKAGED.get(name_or_path_or_uri)
    if pinned is not None:
        files = resources.files("cotam").joinpath("packaged").iterdir()
        parts = [file for file in files if file.name.startswith(f"{name_or_path_or_uri}.safetensors")]
        data = b"".join(part.read_bytes() for part in sorted(parts, key=lambda part: part.name))
        if hashlib.sha256(data).hexdigest() != pinned:
            raise ValueError(f"packaged weights {name_or_path_or_uri} are damaged; reinstall the package")
        return data
    if "/" not in name_or_path_or_uri and not name_or_path_or_uri.endswith(".safetensors"):
        raise FileNotFoundError(f"no packaged model {name_or_path_or_uri!r}; packaged: {', '.join(PACKAGED)}")
    fs, path = split_uri(name_or_path_or_uri)
    with fs.open(path, "rb") as file:
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"{name_or_path_or_uri}: more than {_MAX_FILE_BYTES} bytes, not a codec file")
    return bytes(data)


def model_folder(name_or_path: str) -> Path:
    """The folder of a packaged CLIP or MLLM by name, its weights checked; any other name is a local path.

    Raises:
        FileNotFoundError: no such name or folder.
        ValueError: packaged weights differ from their pinned sha256.
    """
    pinned = PACKAGED_FOLDERS.get(name_or_path)
    if pinned is None:
        folder = Path(name_or_path)
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {name_or_path!r}; packaged: {', '.join(PACKAGED_FOLDERS) or 'none'}")
        return folder
    folder = Path(str(resources.files("cotam").joinpath(f"packaged/{name_or_path}")))
    file, sha256 = pinned
    if hashlib.sha256((folder / file).read_bytes()).hexdigest() != sha256:
        raise ValueError(f"packaged weights {name_or_path} are damaged; reinstall the package")
    return folder


def with_tier(tiers: Sequence[TierWeights], tier: TierWeights) -> list[TierWeights]:
    """``tiers`` with ``tier`` in place of the one of the same range, or beside them."""
    others = [other for other in tiers if other.range != tier.range]
    return sorted([*others, tier], key=lambda t: (t.highest_quality - t.lowest_quality, t.lowest_quality))


def dump_codec(tiers: Sequence[TierWeights]) -> bytes:
    """Serialise a codec.

    Args:
        tiers: in the order that an encoder tries them in, the last one for all qualities.

    Raises:
        ValueError: too many tiers, or of unlike shapes, or none for all qualities; or an integer layer could overflow
            its accumulator.
    """
    config = tiers[-1].model.config
    _check_ranges([tier.range for tier in tiers], config)
    if any(tier.model.config != config.up_to(tier.highest_quality) for tier in tiers):
        raise ValueError("the tiers of a codec must have one shape, cut to the channels of their highest quality")
    arrays: _Arrays = {}
    for k, tier in enumerate(tiers):
        arrays.update({f"{k}.{name}": array for name, array in _tier_arrays(tier).items()})
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(config), sort_keys=True),
        "tiers": json.dumps([list(map(float, tier.range)) for tier in tiers]),
    }
    return with_sorted_header(save_safetensors(arrays, metadata))


def _check_ranges(ranges: list[tuple[float, float]], config: CodecConfig) -> None:
    whole = (1, config.num_levels)
    inside = all(whole[0] <= low <= high <= whole[1] for low, high in ranges)
    inside = inside and all(Q_STEPS * quality == int(Q_STEPS * quality) for both in ranges for quality in both)
    if not 1 <= len(ranges) <= MAX_TIERS or not inside or ranges[-1] != whole:
        raise ValueError(f"tiers must be one to {MAX_TIERS}, from quarter to quarter, the last one {whole}: {ranges}")


def _tier_arrays(tier: TierWeights) -> _Arrays:
    model, tables = tier.model.freeze(), tier.tables
    arrays: _Arrays = {}
    layers = _integer_layers(model)
    for name, tensor in model.state_dict().items():
        owner = name.rpartition(".")[0]
        if owner in layers or name == "z_log_scale":
            continue
        arrays[name] = tensor.detach().cpu().numpy().astype(np.float32 if owner == "gains" else np.float16)
    for name, layer in layers.items():
        ints = layer.frozen_integers()
        arrays[f"{name}.weight"] = ints.weight.cpu().numpy().astype(np.int8)
        arrays[f"{name}.bias"] = ints.bias.cpu().numpy().astype(np.int32)
        arrays[f"{name}.gain"] = ints.gain.cpu().numpy().astype(np.int8)
        arrays[f"{name}.exponent"] = np.log2(ints.scale.cpu().numpy()).round().astype(np.int8)
    arrays["z_indexes"] = model.z_indexes().cpu().numpy().astype(np.uint8)
    return arrays | {"tables.cdf": tables.cdf, "tables.start": tables.start, "tables.radius": tables.radius}


def parse_codec(data: bytes, where: str) -> LoadedCodec:
    """Rebuild a codec from the bytes of its file.

    Args:
        data: the file's bytes.
        where: its name, for messages.

    Raises:
        ValueError: not a codec file, of another format version, or inconsistent.
    """
    try:
        arrays = load_safetensors(data)
        metadata = file_metadata(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{where} is not a safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{where} has format {metadata.get('format')!r}, this version reads {FORMAT!r}")
    try:
        config = from_mapping(CodecConfig, json.loads(metadata["config"]))
        ranges = [(float(low), float(high)) for low, high in json.loads(metadata["tiers"])]
        _check_ranges(ranges, config)
        tiers = tuple(_parse_tier(config, *both, _of_tier(arrays, k)) for k, both in enumerate(ranges))
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} does not fit its own configuration: {one_line(error)[:300]}") from None
    return LoadedCodec(tiers, hashlib.sha256(data).hexdigest())


def _of_tier(arrays: _Arrays, k: int) -> _Arrays:
    prefix = f"{k}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _parse_tier(config: CodecConfig, lowest: float, highest: float, arrays: _Arrays) -> TierWeights:
    model = CodecModel(config.up_to(highest))
    tables = Tables(arrays["tables.cdf"], arrays["tables.start"], arrays["tables.radius"])
    check_tables(tables)
    _load_state(model, arrays)
    model.freeze()
    _check_integers(model, arrays)
    return TierWeights(lowest, highest, model, tables)


def file_metadata(data: bytes) -> dict[str, str]:
    """The metadata of the bytes of a safetensors file. Raises ValueError where there is no header."""
    header_bytes = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + header_bytes]).get("__metadata__", {})
    return metadata


def with_sorted_header(data: bytes) -> bytes:
    """The same file with its header sorted: safetensors writes metadata in random order, but bytes are identity."""
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + header_bytes]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + header_bytes :]


def _load_state(model: CodecModel, arrays: _Arrays) -> None:
    state: dict[str, torch.Tensor] = {}
    layers = _integer_layers(model)
    for name in model.state_dict():
        owner, _, leaf = name.rpartition(".")
        if owner in layers:
            # The parameters that quantise to exactly these integers, so that training can go on from them.
            scale = np.exp2(arrays[f"{owner}.exponent"].astype(np.float32))
            array = arrays[name].astype(np.float32)
            array = array * scale.reshape(-1, *([1] * (array.ndim - 1))) / layers[owner].units[leaf]
        elif name == "z_log_scale":
            array = np.log(scales())[arrays["z_indexes"]].astype(np.float32)
        else:
            array = arrays[name].astype(np.float32)
            if not np.isfinite(array).all():
                raise ValueError(f"{name} has values that are no numbers")
        state[name] = torch.from_numpy(np.ascontiguousarray(array))
    model.load_state_dict(state)


def _check_integers(model: CodecModel, arrays: _Arrays) -> None:
    for name, layer in _integer_layers(model).items():
        ints = layer.frozen_integers()
        for leaf in ("weight", "bias", "gain"):
            if not np.array_equal(getattr(ints, leaf).numpy(), arrays[f"{name}.{leaf}"]):
                raise ValueError(f"the integers of {name}.{leaf} are not in normal form")
    if not np.array_equal(model.z_indexes().numpy(), arrays["z_indexes"]):
        raise ValueError("z_indexes out of range")


def _integer_layers(model: CodecModel) -> dict[str, IntConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, IntConv2d)}
