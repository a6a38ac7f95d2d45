"""A CLIP, a LLaVA and an adapter that a few training steps make: small, and as good as random."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cotam.importance import Attention
from cotam.train.config import AdapterTrainConfig, ClipTrainConfig, SceneConfig, VlmTrainConfig
from cotam.train.run import train_adapter, train_clip, train_vlm

DATA = SceneConfig(num_eval_scenes=6, num_workers=0)
CLIP = ClipTrainConfig(
    image_px=64, width=32, layers=2, head_width=16, text_width=32, text_layers=1, embed_dim=16, batch_size=4,
    max_steps=2, data=DATA,
)  # fmt: skip
VLM = VlmTrainConfig(hidden=32, layers=1, heads=2, intermediate=64, batch_size=4, max_steps=2, data=DATA)
ADAPTER = AdapterTrainConfig(image_px=96, batch_size=3, max_steps=2, data=DATA, low_only=0.4)


class TinyModels(NamedTuple):
    """Folders of the runs, and what they exported."""

    root: Path
    clip: str
    vlm: str
    adapter: str


def train_tiny_models(root: Path) -> TinyModels:
    """Train all three, one from the other."""
    clip = str(train_clip(CLIP, root / "clip", "cpu"))
    vlm = str(train_vlm(VLM, root / "vlm", clip, "cpu"))
    adapter = str(train_adapter(ADAPTER, root / "adapter", "cotam-base", vlm, Attention(clip=clip, layer=1), "cpu"))
    return TinyModels(root, clip, vlm, adapter)
