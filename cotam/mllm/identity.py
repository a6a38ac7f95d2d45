"""What identifies an MLLM in a run: its weights' and its adapter's sha256, where they are local."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cotam.mllm.backend import MllmConfig
from cotam.weights import model_folder, read_weights

_PIECE_BYTES = 2**20
_NUM_PIECES = 64  # of a file, evenly spaced, from its beginning (a safetensors header) to its end


def mllm_fingerprints(config: MllmConfig) -> dict[str, str]:
    """``mllm_sha256`` and ``adapter_sha256`` of a configuration, empty where there are no local files.

    Raises:
        FileNotFoundError, ValueError: as ``model_folder`` and ``read_weights``.
    """
    return {"mllm_sha256": _mllm_sha256(config), "adapter_sha256": _adapter_sha256(config)}


def refuse_other_mllm(config: MllmConfig, mllm_sha256: str, adapter_sha256: str) -> None:
    """Raise ValueError where the MLLM's or the adapter's local files are not those of that sha256 (hex; empty: any)."""
    if mllm_sha256 and _mllm_sha256(config) != mllm_sha256:
        raise ValueError(f"{config.name} differs from the MLLM that this run started with")
    if adapter_sha256 and _adapter_sha256(config) != adapter_sha256:
        raise ValueError(f"{config.adapter} differs from the adapter that this run started with")


def _adapter_sha256(config: MllmConfig) -> str:
    return hashlib.sha256(read_weights(config.adapter)).hexdigest() if config.adapter else ""


def _mllm_sha256(config: MllmConfig) -> str:
    if config.backend == "served":
        return ""
    if config.backend == "local":
        return _folder_sha256(model_folder(config.place))
    folder = Path(config.place)
    return _folder_sha256(folder) if folder.is_dir() else ""  # else a name on the hub


def _folder_sha256(folder: Path) -> str:
    """Of names, sizes and contents; of large files pieces of a mebibyte."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        last = max(0, size - _PIECE_BYTES)
        with path.open("rb") as file:
            for start in sorted({round(k * last / (_NUM_PIECES - 1)) for k in range(_NUM_PIECES)}):
                file.seek(start)
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()
