"""A CLIP image tower up to one layer, and the attention of its tokens there."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from safetensors.torch import load_file
from torch import Tensor, nn

from cotam.importance import Attention
from cotam.weights import PACKAGED_FOLDERS, model_folder


class LoadedClip(NamedTuple):
    """A CLIP of open_clip, and mean and deviation of the channels for pixels in [0, 1]."""

    model: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_clip(name: str) -> LoadedClip:
    """A CLIP by name.

    Args:
        name: a packaged name (``cotam-clip-tiny``); a folder with open_clip_config.json and
            open_clip_model.safetensors; or ``ARCHITECTURE:PRETRAINED`` (``ViT-L-14-336:openai``) of open_clip, where
            PRETRAINED is a safetensors file, or a tag, which open_clip may download.

    Raises:
        ValueError: unknown, or weights that cannot be had or do not fit.
    """
    architecture, _, pretrained = name.partition(":")
    try:
        if name in PACKAGED_FOLDERS or Path(name).is_dir():
            return _load_folder(model_folder(name))
        if architecture not in open_clip.list_models() or not pretrained:
            raise ValueError("write a packaged name, a folder, or ARCHITECTURE:PRETRAINED like ViT-L-14-336:openai")
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if pretrained not in tags and not (pretrained.endswith(".safetensors") and Path(pretrained).is_file()):
            raise ValueError(f"{pretrained!r} is no safetensors file and no tag of {architecture} ({', '.join(tags)})")
        quick = needs_quick_gelu(architecture, pretrained)
        model = open_clip.create_model(architecture, pretrained=pretrained, force_quick_gelu=quick)
    except Exception as error:  # open_clip, the hub client and the network raise whatever they like
        raise ValueError(f"cannot load CLIP {name}: {(str(error).splitlines() or [repr(error)])[0]}") from error
    config = open_clip.get_model_preprocess_cfg(model)
    return LoadedClip(model, config["mean"], config["std"])


def _load_folder(folder: Path) -> LoadedClip:
    config = json.loads((folder / "open_clip_config.json").read_text())
    model = CLIP(**config["model_cfg"])
    state = load_file(folder / "open_clip_model.safetensors")
    model.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    preprocess = config["preprocess_cfg"]
    return LoadedClip(model, tuple(preprocess["mean"]), tuple(preprocess["std"]))


class AttentionTower(nn.Module):
    """Attention over patches in layer ``layer`` of a ViT, averaged over heads: of the class token, or of all tokens.

    Only the layers below run, and of the layer itself only queries and keys (early exit). Images of any aspect are
    taken: positions are interpolated.

    Args:
        visual: open_clip's image tower, a plain ViT. Its later layers are dropped.
        layer: which layer is read, from 1.
        queries: "class", or "all": half the class token's attention, half the mean of the patches'.
        mean, std: of the channels, for pixels in [0, 1].

    Raises:
        ValueError: not a plain ViT, or no such layer.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        visual: nn.Module,
        layer: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        queries: str = "class",
    ) -> None:
        super().__init__()
        if not isinstance(visual, VisionTransformer) or not isinstance(
            visual.transformer.resblocks[0], ResidualAttentionBlock
        ):
            raise ValueError("importance needs a plain ViT of open_clip, such as ViT-L-14-336 or ViT-B-32")
        blocks = visual.transformer.resblocks
        if not 1 <= layer <= len(blocks):
            raise ValueError(f"layer {layer} is outside [1, {len(blocks)}] of this tower")
        self.visual, self.layer, self.queries = visual, layer, queries
        visual.transformer.resblocks = blocks[:layer]
        self.patch_px: int = visual.patch_size[0]
        self.grid: tuple[int, int] = visual.grid_size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, attention: Attention) -> AttentionTower:
        """The image tower of ``load_clip``. Raises ValueError as that does, or for an unknown layer."""
        loaded = load_clip(attention.clip)
        return cls(loaded.model.visual, attention.layer, loaded.mean, loaded.std, attention.queries)

    def fingerprint(self) -> str:
        """The sha256 of everything that attention depends on, hexadecimal."""
        blocks = self.visual.transformer.resblocks
        activation = type(blocks[0].mlp.gelu).__name__
        digest = hashlib.sha256(f"{self.layer} {self.queries} {blocks[0].attn.num_heads} {activation}".encode())
        for part in (self.visual.conv1, self.visual.ln_pre, *blocks):
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.float().cpu().numpy().tobytes())
        for tensor in (self.visual.class_embedding, self.visual.positional_embedding, self.mean, self.std):
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """The patch grid for an image: its aspect, at most as many patches as the tower was trained with."""
        num_patches = self.grid[0] * self.grid[1]
        rows = math.sqrt(num_patches * height / width)
        rows = min(max(1, round(rows)), num_patches)
        return rows, min(max(1, round(rows * width / height)), num_patches // rows)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB (B, 3, rows * patch_px, columns * patch_px) to attention, float32 (B, rows, columns), sum <= 1."""
        visual = self.visual
        dtype = visual.conv1.weight.dtype
        x = ((images.float() / 255 - self.mean) / self.std).to(dtype)
        patches = visual.conv1(x)
        rows, columns = patches.shape[2:]
        tokens = patches.flatten(2).transpose(1, 2)
        class_token = visual.class_embedding.to(dtype).expand(len(x), 1, -1)
        x = visual.ln_pre(torch.cat([class_token, tokens], dim=1) + self._positions(rows, columns, dtype, x.device))
        *below, read = visual.transformer.resblocks
        for block in below:
            x = block(x)
        x = read.ln_1(x)
        width, num_heads = x.shape[2], read.attn.num_heads
        weight, bias = read.attn.in_proj_weight, read.attn.in_proj_bias
        asking = x if self.queries == "all" else x[:, :1]
        queries = F.linear(asking, weight[:width], bias[:width]).unflatten(2, (num_heads, -1))
        keys = F.linear(x, weight[width : 2 * width], bias[width : 2 * width]).unflatten(2, (num_heads, -1))
        scale = 1 / math.sqrt(width // num_heads)
        attention = torch.zeros(len(x), asking.shape[1], x.shape[1], device=x.device)
        for head in range(num_heads):  # one at a time: (B, tokens, tokens) is enough memory
            scores = queries[:, :, head] @ keys[:, :, head].transpose(1, 2)
            attention += (scores.float() * scale).softmax(dim=-1) / num_heads
        over_patches = attention[:, 0, 1:]
        if self.queries == "all":
            patches = attention[:, 1:, 1:].mean(dim=1)
            shares = [part / part.sum(dim=1, keepdim=True) for part in (over_patches, patches)]
            over_patches = (shares[0] + shares[1]) / 2
        return over_patches.unflatten(1, (rows, columns))

    @functools.lru_cache(maxsize=32)  # noqa: B019 - a tower lives as long as its process
    def _positions(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Positional embeddings (1 + rows * columns, width), interpolated where the grid is not the tower's own.

        ``device`` is the tower's: what was cached on another one does not fit any more.
        """
        embedding = self.visual.positional_embedding
        if (rows, columns) == self.grid:
            return embedding.to(dtype)
        grid = embedding[1:].float().unflatten(0, self.grid).permute(2, 0, 1)[None]
        resized = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([embedding[:1].float(), resized[0].flatten(1).T]).to(dtype)


def needs_quick_gelu(architecture: str, pretrained: str) -> bool:
    """Whether a pretrained tag was trained with GELU's sigmoid approximation, which open_clip leaves to the caller."""
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    return pretrained in tags and bool(open_clip.get_pretrained_cfg(architecture, pretrained).get("quick_gelu"))
