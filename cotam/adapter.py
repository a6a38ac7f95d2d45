"""The adapter: latents of the codec to tokens that are added to those of an MLLM's image tower (arXiv 2509.24258)."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from cotam.config import from_mapping
from cotam.weights import PACKAGED, file_metadata, read_weights, with_sorted_header

FORMAT = "cotam-adapter/1"
PACKAGED_ADAPTERS = tuple(name for name in PACKAGED if name.startswith("cotam-adapter"))  # each for another codec


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The shape of an adapter, and what it was trained for.

    Attributes:
        M: channels of the codec's latents.
        width: of the tower's tokens.
        num_heads: of the transformer block.
        codec_sha256: of the codec whose latents it takes.
        tower_sha256: of the image tower whose tokens it adds to (``tower_sha256``).
    """

    M: int
    width: int
    num_heads: int
    codec_sha256: str = ""
    tower_sha256: str = ""


class Adapter(nn.Module):
    """y_hat -> linear -> one transformer block -> tokens on the tower's patch grid. Starts at zero: nothing added."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.M, config.width)
        self.block = nn.TransformerEncoderLayer(
            config.width, config.num_heads, 4 * config.width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.project = nn.Linear(config.width, config.width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, y_hat: Tensor, rows: int, columns: int) -> Tensor:
        """float32 (B, M, h, w), any h and w -> tokens (B, rows * columns, width).

        The latents' padding, less than one position at the lower and right edge, counts as image.
        """
        resized = F.interpolate(y_hat, size=(rows, columns), mode="bilinear", antialias=True, align_corners=False)
        tokens: Tensor = self.project(self.block(self.embed(resized.flatten(2).transpose(1, 2))))
        return tokens


def tower_sha256(tower: nn.Module) -> str:
    """Identifies an image tower by its weights, in half precision, as they are stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def dump_adapter(model: Adapter) -> bytes:
    """Serialise an adapter in float16."""
    metadata = {"format": FORMAT, "config": json.dumps(dataclasses.asdict(model.config), sort_keys=True)}
    state = {name: t.detach().cpu().half().contiguous() for name, t in model.state_dict().items()}
    return with_sorted_header(save(state, metadata))


def load_adapter(name_or_path_or_uri: str) -> Adapter:
    """A packaged adapter by name, or the file at a path or fsspec URI.

    Raises:
        FileNotFoundError: no such name or file.
        ValueError: not an adapter file, or damaged.
    """
    data = read_weights(name_or_path_or_uri)
    try:
        metadata = file_metadata(data)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"format {metadata.get('format')!r} instead of {FORMAT!r}")
        model = Adapter(from_mapping(AdapterConfig, json.loads(metadata["config"])))
        model.load_state_dict({name: t.float() for name, t in load(data).items()})
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name_or_path_or_uri} is not an adapter: {error}") from None
    return model.eval().requires_grad_(False)


def packaged_adapter(codec_sha256: str) -> str:
    """The name of the packaged adapter for a codec. Raises ValueError where there is none."""
    for name in PACKAGED_ADAPTERS:
        if load_adapter(name).config.codec_sha256 == codec_sha256:
            return name
    raise ValueError(
        f"no packaged adapter is for codec {codec_sha256[:8]}: use pixels alone (--input pixels; of a sweep, "
        "--inputs pixels), or name one with --adapter (cotam train adapter)"
    )


def check_fit(adapter: Adapter, codec_sha256: str, tower_sha256: str) -> None:
    """Raises ValueError where the adapter was trained for another codec or tower."""
    for part, expected, actual in (
        ("codec", adapter.config.codec_sha256, codec_sha256),
        ("image tower", adapter.config.tower_sha256, tower_sha256),
    ):
        if expected and expected != actual:
            raise ValueError(f"the adapter was trained for {part} {expected[:8]}, this one is {actual[:8]}")


def first_layer(tower: nn.Module) -> nn.Module:
    """The module of a CLIP tower of transformers whose output, (B, 1 + patches, width), its first layer takes.

    Raises:
        ValueError: not a CLIP tower.
    """
    for name, module in tower.named_modules():
        if name.endswith("pre_layrnorm"):
            return module
    raise ValueError("visual tokens need an MLLM with a CLIP tower (the LLaVA family); use --input pixels")
