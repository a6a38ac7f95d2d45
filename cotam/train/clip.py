"""`cotam train clip`: a small CLIP of open_clip on SceneQA scenes and their captions.

Beside the contrastive loss (Radford et al. 2021) the patch tokens learn what is in their patch (``cotam.train.dense``),
and the image's embedding which tokens its caption has (Huang et al. 2024, "Classification done right for
vision-language pre-training"): without that the class token hardly learns to look at signs.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from cotam.mllm.tiny import half_precision, make_tokenizer
from cotam.sceneqa.questions import caption
from cotam.sceneqa.tokenizer import BOS, EOS, PAD, TOKEN_IDS, build_tokenizer
from cotam.train.config import ClipTrainConfig
from cotam.train.dense import PatchHeads, dense_accuracy, dense_loss, stack_labels
from cotam.train.scenes import Example, held_out_examples, scene_batches, stack_images
from cotam.train.trainer import Trainer, transformer_groups

CONTEXT_LENGTH = 64
MEAN = STD = (0.5, 0.5, 0.5)
_INIT_SCALE = 0.1  # of patches and positions


class ClipBatch(NamedTuple):
    """uint8 images (B, 3, S, S), int64 captions (B, CONTEXT_LENGTH), and labels stacked over the batch.

    words: float (B, vocabulary), the tokens of the whole caption with equal shares that add up to 1.
    """

    images: Tensor
    captions: Tensor
    words: Tensor
    labels: tuple[Tensor, ...]


class DenseClip(nn.Module):
    """A CLIP with heads that tell what is in each patch; the heads are left behind after training."""

    def __init__(self, config: ClipTrainConfig) -> None:
        super().__init__()
        self.clip = CLIP(**open_clip_config(config)["model_cfg"])
        self.clip.visual.output_tokens = True
        self.heads = PatchHeads(config.width, config.image_px // config.patch_px)
        self.words = nn.Linear(config.embed_dim, self.clip.vocab_size)

    def forward(self, images: Tensor, captions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        """float images and token ids to image and text embeddings (B, D) of unit length, scale, logits of the words
        (B, vocabulary), and of the heads."""
        pooled, tokens = self.clip.visual(images)
        text = self.clip.encode_text(captions, normalize=True)
        return F.normalize(pooled, dim=-1), text, self.clip.logit_scale.exp(), self.words(pooled), self.heads(tokens)


def open_clip_config(config: ClipTrainConfig) -> dict[str, Any]:
    """The content of open_clip_config.json."""
    vision = {
        "image_size": config.image_px,
        "patch_size": config.patch_px,
        "width": config.width,
        "layers": config.layers,
        "head_width": config.head_width,
    }
    text = {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": build_tokenizer().get_vocab_size(),
        "width": config.text_width,
        "heads": config.text_width // 32,
        "layers": config.text_layers,
        "hf_tokenizer_name": "cotam-clip-tiny",  # the tokenizer beside the weights
        "pool_type": "eos",
        "eos_id": TOKEN_IDS[EOS],
        "pad_id": TOKEN_IDS[PAD],
    }
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    model = {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text}
    return {"model_cfg": model, "preprocess_cfg": preprocess}


class ClipTrainer(Trainer[DenseClip, ClipBatch]):
    """One training run of a CLIP, from ``init`` where there is one of the same shape. Others as of ``Trainer``."""

    def __init__(
        self, config: ClipTrainConfig, out_dir: Path, device: str = "cpu", init: dict[str, Tensor] | None = None
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self._is_new = config, init is None
        model = DenseClip(config)
        if init is not None:
            model.clip.load_state_dict(init)
        super().__init__(model, config, out_dir, device, open_clip_config(config)["model_cfg"])
        self._collate = partial(_collate, tokenizer=build_tokenizer(), rows=config.image_px // config.patch_px)

    def batches(self) -> Iterator[ClipBatch]:
        """Rendered scenes with captions and patch labels."""
        config = self.config
        return scene_batches(
            config.data, config.image_px, self._collate, config.batch_size, self.next_batch, self.num_ranks
        )

    def prepare(self) -> None:
        """A new image tower starts at whitened patches and sinusoidal positions, each as strong as the other."""
        if not self._is_new:
            return
        visual = self.model.clip.visual
        batches = self.batches()
        images = torch.cat([to_float(next(batches).images) for _ in range(max(1, 128 // self.config.batch_size))])
        weight = _INIT_SCALE * whitening(images, self.config.patch_px, self.config.width)
        positions = _INIT_SCALE * sinusoidal_positions(visual.grid_size[0], self.config.width)
        for model in (self.model, self.ema):
            with torch.no_grad():
                model.clip.visual.conv1.weight.copy_(weight)
                model.clip.visual.positional_embedding[1:] = positions

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Muon for the matrices of the blocks."""
        return transformer_groups(self.model.named_parameters())

    def losses(self, batch: ClipBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Symmetric contrastive loss within the batch, and cross-entropy of the patches."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            images = to_float(batch.images.to(self.device))
            image, text, scale, words, logits = self.forward(images, batch.captions.to(self.device))
        similarity = scale.float() * image.float() @ text.float().T
        target = torch.arange(len(similarity), device=self.device)
        contrastive = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
        dense = dense_loss(logits, [target.to(self.device) for target in batch.labels])
        bag = F.cross_entropy(words.float(), batch.words.to(self.device))
        shown = {"contrastive": contrastive.detach(), "words": bag.detach(), "dense": dense.detach()}
        return contrastive + self.config.words_weight * bag + self.config.dense_weight * dense, shown

    @torch.no_grad()
    def evaluate(self) -> list[dict[str, Any]]:
        """Retrieval of captions among 64 test scenes, and accuracy by patch where there is something."""
        size = 64
        examples = held_out_examples(self.config.data, self.config.image_px)
        found = total = 0
        counts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for k in range(0, len(examples), size):
            batch = self._collate(examples[k : k + size])
            image, text, _, _, logits = self.ema(to_float(batch.images.to(self.device)), batch.captions.to(self.device))
            nearest = (image @ text.T).argmax(1).cpu()
            found += int((nearest == torch.arange(len(nearest))).sum())
            total += len(nearest)
            for name, count in dense_accuracy([z.cpu() for z in logits], batch.labels).items():
                counts[name].append(count)
        accuracy = {name: sum(r for r, _ in c) / max(1, sum(n for _, n in c)) for name, c in counts.items()}
        return [{"retrieval": found / max(1, total), **accuracy}]


def export_clip(clip: CLIP, config: ClipTrainConfig, folder: Path) -> Path:
    """Write ``clip`` in float16 as a folder that open_clip loads ("local-dir:FOLDER"). Returns the weights' path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(config), indent=1))
    make_tokenizer(for_clip=True).save_pretrained(folder)
    weights = folder / "open_clip_model.safetensors"
    save_file(half_precision(clip.state_dict()), weights)
    return weights


def to_float(images: Tensor) -> Tensor:
    """uint8 RGB to what the tower takes."""
    return images.float() / 127.5 - 1


def whitening(images: Tensor, patch_px: int, width: int) -> Tensor:
    """Patch embedding (width, 3, patch_px, patch_px) that gives the main components of patches unit variance."""
    patches = F.unfold(images, patch_px, stride=patch_px).transpose(1, 2).flatten(0, 1)
    covariance = torch.cov(patches.T)
    values, vectors = torch.linalg.eigh(covariance)
    basis = vectors[:, -width:] / (values[-width:] + 1e-4).sqrt()
    return F.pad(basis.T, (0, 0, 0, max(0, width - basis.shape[1]))).unflatten(1, (3, patch_px, patch_px))


def sinusoidal_positions(rows: int, width: int) -> Tensor:
    """Sines and cosines of rows and of columns, (rows * rows, width), as in MAE (He et al. 2022)."""
    frequencies = 1 / 10000 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(rows)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    grid = torch.cat([waves[:, None].expand(-1, rows, -1), waves[None].expand(rows, -1, -1)], dim=2)
    return F.pad(grid.flatten(0, 1), (0, width - grid.shape[2]))


def _collate(examples: Sequence[Example], tokenizer: Tokenizer, rows: int) -> ClipBatch:
    captions = torch.full((len(examples), CONTEXT_LENGTH), TOKEN_IDS[PAD])
    for row, example in zip(captions, examples, strict=True):
        ids = caption_ids(tokenizer, example)
        row[: len(ids)] = torch.tensor(ids)
    words = torch.zeros(len(examples), tokenizer.get_vocab_size())
    for row, example in zip(words, examples, strict=True):
        whole = tokenizer.encode(caption(example.scene, with_kind=example.with_kind), add_special_tokens=False).ids
        row[torch.tensor(sorted(set(whole)))] = 1 / len(set(whole))
    return ClipBatch(stack_images(examples), captions, words, stack_labels(examples, rows))


def caption_ids(tokenizer: Tokenizer, example: Example) -> list[int]:
    """A caption of some of what there is, in random order: whoever matches it must have seen everything."""
    rng = random.Random(example.scene.seed + "/caption")
    parts = caption(example.scene, with_kind=example.with_kind).split(", ")
    chosen = rng.sample(parts, rng.randint(1, len(parts)))
    ids = tokenizer.encode(", ".join(chosen), add_special_tokens=False).ids[: CONTEXT_LENGTH - 2]
    return [TOKEN_IDS[BOS], *ids, TOKEN_IDS[EOS]]
