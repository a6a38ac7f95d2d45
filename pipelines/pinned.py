"""The codec of a run, which is the one that it started with or none."""

from __future__ import annotations

from cotam.codec import Codec


def load_codec(model: str, sha256: str, device: str, max_pixels: int) -> Codec:
    """Load a codec. Raises ValueError where its file is not the one of that sha256 (hex; empty: any)."""
    codec = Codec.load(model, device, max_pixels)
    if sha256 and codec.sha256 != sha256:
        raise ValueError(f"{model} differs from the weights that this run started with, or that its bitstreams are of")
    return codec
