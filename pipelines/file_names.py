"""Names for files that come from outside: inside their folder, and such as every file system takes."""

from __future__ import annotations

import hashlib
import re

_MAX_PART_BYTES = 200  # file systems take 255, of which a temporary name needs some
_KEPT_BYTES = 120, 40  # of a longer one, at its beginning and its end


def safe_path(name: str) -> str:
    """A relative path with "/", made of ``name``: without a root, "." and "..", control characters and long parts."""
    plain = re.sub(r"[\x00-\x1f\x7f]", "_", name.replace("\\", "/"))
    return "/".join(_shortened(part) for part in plain.split("/") if part not in ("", ".", "..")) or "_"


def _shortened(part: str) -> str:
    data = part.encode(errors="replace")
    if len(data) <= _MAX_PART_BYTES:
        return data.decode()
    begin, end = _KEPT_BYTES
    digest = hashlib.sha256(data).hexdigest()[:12]
    return f"{data[:begin].decode(errors='ignore')}~{digest}~{data[-end:].decode(errors='ignore')}"
