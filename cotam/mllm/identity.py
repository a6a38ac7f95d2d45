"""What identifies an MLLM in a run: its weights' and its adapter's sha256, where they are local."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cotam.mllm.backend import MllmConfig
from cotam.weights import model_folder, read_weights

_HASHED_BYTES = 2**28  # of larger files only name and size count


def check_mllm(config: MllmConfig) -> dict[str, str]:
    """``mllm_sha256`` and ``adapter_sha256`` of a configuration, empty where there are no local files.

    Raises:
        FileNotFoundError, ValueError: as ``model_folder`` and ``read_weights``.
    """
    is_local = not config.name.startswith(("http://", "https://", "hf:", "vllm:"))
    adapter = hashlib.sha256(read_weights(config.adapter)).hexdigest() if config.adapter else ""
    return {"mllm_sha256": _folder_sha256(model_folder(config.name)) if is_local else "", "adapter_sha256": adapter}


def _folder_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        if size <= _HASHED_BYTES:
            digest.update(path.read_bytes())
    return digest.hexdigest()
