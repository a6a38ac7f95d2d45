"""Where a vision encoder looks: importance maps that steer the codec."""

from __future__ import annotations

import dataclasses

DEFAULT_STRENGTH = 4.0
QUERIES = ("class", "all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Whose attention is the importance.

    Attributes:
        clip: a packaged CLIP, a folder, or an open_clip ViT as ARCHITECTURE:PRETRAINED.
        layer: of its image tower, from 1; later ones do not run.
        queries: "class" for the class token's attention alone, "all" for the mean of it and of the patches' own.
    """

    clip: str = "cotam-clip-tiny"
    layer: int = 6
    queries: str = "all"

    def __post_init__(self) -> None:
        if self.queries not in QUERIES:
            raise ValueError(f"queries must be class or all, not {self.queries!r}")
