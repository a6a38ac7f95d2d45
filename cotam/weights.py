"""Weights: where they are found, how they are checked, and the one file format of a codec.

A codec file is a safetensors file. The floating-point transforms are float16; every integer layer is stored as the
integers it computes with; the CDF tables are stored, not recomputed. Its identity is its sha256.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from cotam.config import CodecConfig, from_mapping
from cotam.entropy.tables import Tables, build_tables, check_tables, scales
from cotam.models.codec_model import CodecModel
from cotam.models.integer import IntConv2d
from cotam.store.fs import split_uri

FORMAT = "cotam-codec/2"
# Packaged weights by name: the sha256 of cotam/packaged/{name}.safetensors.
PACKAGED: dict[str, str] = {
    "cotam-adapter-tiny": "f7b051cdbdd9326e57af748ad0400ee5e20646190785ffa48f60b8c0e6803a92",
    "cotam-base": "6eebb246a3a81dec9d985916b37711fafee94c5ab8d924516541aeee33102cef",
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


class LoadedCodec(NamedTuple):
    """A frozen model with its tables and the sha256 (hex) of the file it came from."""

    model: CodecModel
    tables: Tables
    sha256: str


def read_weights(name_or_path_or_uri: str) -> bytes:
    """The bytes of a packaged model by name, or of a local path or any fsspec URI.

    Raises:
        FileNotFoundError: no such name or file.
        ValueError: a packaged file differs from its pinned sha256.
    """
    pinned = PACKAGED.get(name_or_path_or_uri)
    if pinned is not None:
        data = resources.files("cotam").joinpath(f"packaged/{name_or_path_or_uri}.safetensors").read_bytes()
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


def dump_codec(model: CodecModel, tables: Tables | None = None) -> bytes:
    """Serialise a codec.

    Args:
        model: the codec.
        tables: those that it was loaded with, or fitted; None builds Gaussian ones.

    Raises:
        ValueError: an integer layer could overflow its accumulator.
    """
    model = model.freeze()
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
    tables = tables or build_tables()
    arrays.update({"tables.cdf": tables.cdf, "tables.start": tables.start, "tables.radius": tables.radius})
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {"format": FORMAT, "config": json.dumps(dataclasses.asdict(model.config), sort_keys=True)}
    return with_sorted_header(save_safetensors(arrays, metadata))


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
        model = CodecModel(from_mapping(CodecConfig, json.loads(metadata["config"])))
        tables = Tables(arrays["tables.cdf"], arrays["tables.start"], arrays["tables.radius"])
        check_tables(tables)
        _load_state(model, arrays)
        model.freeze()
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} does not fit its own configuration: {error}") from None
    _check_integers(model, arrays, where)
    return LoadedCodec(model, tables, hashlib.sha256(data).hexdigest())


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
        state[name] = torch.from_numpy(np.ascontiguousarray(array))
    model.load_state_dict(state)


def _check_integers(model: CodecModel, arrays: _Arrays, where: str) -> None:
    for name, layer in _integer_layers(model).items():
        ints = layer.frozen_integers()
        for leaf in ("weight", "bias", "gain"):
            if not np.array_equal(getattr(ints, leaf).numpy(), arrays[f"{name}.{leaf}"]):
                raise ValueError(f"{where}: the integers of {name}.{leaf} are not in normal form")
    if not np.array_equal(model.z_indexes().numpy(), arrays["z_indexes"]):
        raise ValueError(f"{where}: z_indexes out of range")


def _integer_layers(model: CodecModel) -> dict[str, IntConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, IntConv2d)}
