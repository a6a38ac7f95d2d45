"""The models of a run, which are those that it started with or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cotam.codec import Codec
from cotam.importance import Attention

if TYPE_CHECKING:
    from cotam.importance.estimate import ImportanceEstimator


def load_codec(model: str, sha256: str, device: str, max_pixels: int) -> Codec:
    """Load a codec. Raises ValueError where its file is not the one of that sha256 (hex; empty: any)."""
    codec = Codec.load(model, device, max_pixels)
    if sha256 and codec.sha256 != sha256:
        raise ValueError(
            f"{model} differs from the weights that this run started with, or that its bitstreams are of: "
            "use those, or the version of cotam that has them"
        )
    return codec


def codec_of(config: Mapping[str, Any]) -> Codec:
    """The codec of a store, by the configuration in its manifest, on a CPU. Raises as ``load_codec``."""
    return load_codec(config["model"], config["model_sha256"], "cpu", config["max_pixels"])


def load_estimator(attention: Attention, sha256: str, device: str) -> ImportanceEstimator:
    """Load an estimator. Raises ValueError where its tower's fingerprint is another (hex; empty: any)."""
    from cotam.importance.estimate import ImportanceEstimator  # open_clip takes seconds to import
    from cotam.importance.tower import AttentionTower

    tower = AttentionTower.load(attention)
    if sha256 and tower.fingerprint() != sha256:
        raise ValueError(f"{attention.clip} differs from the weights that this run started with")
    return ImportanceEstimator(tower, device)
