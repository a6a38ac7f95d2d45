"""`cotam train vlm`: a small LLaVA of transformers learns to answer SceneQA's questions.

All questions about an image share its visual tokens: they lie behind one another in one sequence, and the attention
mask keeps each from seeing the others.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from cotam.mllm.tiny import half_precision, make_processor, num_image_tokens
from cotam.sceneqa.questions import place_questions, scene_questions
from cotam.sceneqa.tokenizer import ASSISTANT, BOS, EOS, IMAGE, PAD, TOKEN_IDS, USER, build_tokenizer
from cotam.tasks.questions import Question
from cotam.train.clip import MEAN, STD, to_float
from cotam.train.config import VlmTrainConfig
from cotam.train.dense import PatchHeads, dense_loss, stack_labels
from cotam.train.scenes import Example, held_out_examples, scene_batches, stack_images
from cotam.train.trainer import Trainer, transformer_groups

_EVAL_BATCH = 32


class VlmBatch(NamedTuple):
    """Images with all their questions, T tokens a row.

    Attributes:
        images: uint8 (B, 3, S, S).
        ids: int64 (B, T): visual tokens, then the questions with their answers.
        owners: int64 (B, T): 0 for what all share, the number of the question from 1, -1 for padding.
        answered: bool (B, T): tokens of answers, which are what is learned.
        questions: of every image, in order.
        labels: of the patches.
    """

    images: Tensor
    ids: Tensor
    owners: Tensor
    answered: Tensor
    questions: list[list[Question]]
    labels: tuple[Tensor, ...]


class AnswerModel(nn.Module):
    """A LLaVA on packed questions: logits for the tokens of answers."""

    def __init__(self, llava: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.llava = llava
        vision: Any = llava.config.vision_config
        self.heads = PatchHeads(vision.hidden_size, vision.image_size // vision.patch_size)

    def forward(self, images: Tensor, ids: Tensor, owners: Tensor, answered: Tensor) -> tuple[Tensor, list[Tensor]]:
        """float images, ids, owners, answered as in ``VlmBatch``.

        Returns:
            Logits of the answers' tokens (number of answered, vocabulary), and of the heads.
        """
        model = self.llava.model
        seen = model.get_image_features(images)
        features = torch.stack(list(seen.pooler_output))
        dense = self.heads(model.vision_tower.post_layernorm(seen.last_hidden_state[:, 1:]))
        embeddings = model.get_input_embeddings()(ids)
        first = 2  # after <s><user>
        last = first + features.shape[1]
        embeddings = torch.cat([embeddings[:, :first], features.to(embeddings.dtype), embeddings[:, last:]], dim=1)
        positions, mask = positions_and_mask(owners)
        hidden = model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return self.llava.lm_head(hidden[:, :-1][answered[:, 1:]]), dense


def positions_and_mask(owners: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token stands, (B, T), if its question were alone; what it may attend to, bool (B, 1, T, T)."""
    num_tokens = owners.shape[1]
    index = torch.arange(num_tokens, device=owners.device)
    shared = (owners == 0).sum(1, keepdim=True)
    begins = torch.cat([torch.ones_like(owners[:, :1], dtype=torch.bool), owners[:, 1:] != owners[:, :-1]], dim=1)
    begin = torch.where(begins, index, 0).cummax(1).values
    positions = torch.where(owners == 0, index, shared + index - begin)
    keys, queries = owners[:, None, :], owners[:, :, None]
    causal = index[None, None] <= index[None, :, None]
    return positions, (causal & ((keys == 0) | (keys == queries)))[:, None]


class VlmTrainer(Trainer[AnswerModel, VlmBatch]):
    """One training run of ``llava``, new or trained before. Other arguments as of ``Trainer``."""

    def __init__(
        self, config: VlmTrainConfig, out_dir: Path, llava: LlavaForConditionalGeneration, device: str = "cpu"
    ) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        llava.model.vision_tower.requires_grad_(config.tower_lr_factor > 0)
        vision: Any = llava.config.vision_config
        self.image_px: int = vision.image_size
        shape = {k: v for k, v in llava.config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
        super().__init__(AnswerModel(llava), config, out_dir, device, shape)
        self._collate = partial(
            collate,
            tokenizer=build_tokenizer(),
            num_visual=num_image_tokens(llava),
            draws=config.draws,
            num_places=config.place_questions,
        )

    def batches(self) -> Iterator[VlmBatch]:
        """Rendered scenes with their questions."""
        config = self.config
        return scene_batches(
            config.data, self.image_px, self._collate, config.batch_size, self.next_batch, self.num_ranks
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The tower, which knows something already, learns slower."""
        named = list(self.model.named_parameters())
        tower = [(name, p) for name, p in named if ".vision_tower." in name]
        rest = [(name, p) for name, p in named if ".vision_tower." not in name]
        groups = [*transformer_groups(rest), *transformer_groups(tower, self.config.tower_lr_factor)]
        return [group for group in groups if group["params"]]

    def losses(self, batch: VlmBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the answers' tokens, and of what is in the patches."""
        logits, dense, targets = self._logits(batch, self.forward)
        answers = F.cross_entropy(logits.float(), targets)
        patches = dense_loss(dense, [target.to(self.device) for target in batch.labels])
        with torch.no_grad():
            right = (logits.argmax(1) == targets).float().mean()
        shown = {"answers": answers.detach(), "dense": patches.detach(), "accuracy_by_token": right}
        return answers + self.config.dense_weight * patches, shown

    @torch.no_grad()
    def evaluate(self) -> list[dict[str, Any]]:
        """Exact match of greedy answers on test scenes, by type and over all."""
        examples = held_out_examples(self.config.data, self.image_px)
        results: dict[str, list[bool]] = defaultdict(list)
        for k in range(0, len(examples), _EVAL_BATCH):
            batch = self._collate(examples[k : k + _EVAL_BATCH], draws=1, num_places=0)
            logits, _, targets = self._logits(batch, self.ema)
            right = (logits.argmax(1) == targets).cpu()
            rows, columns = batch.answered.nonzero(as_tuple=True)
            owners = batch.owners[rows, columns]
            for row, questions in enumerate(batch.questions):
                for number, question in enumerate(questions, 1):
                    # All tokens right given the right ones before: then greedy decoding finds them.
                    results[question.type].append(bool(right[(rows == row) & (owners == number)].all()))
        everything = [r for values in results.values() for r in values]
        by_type = {name: round(sum(values) / len(values), 4) for name, values in sorted(results.items())}
        return [{"exact_match": sum(everything) / max(1, len(everything)), **by_type}]

    def _logits(self, batch: VlmBatch, model: Any) -> tuple[Tensor, list[Tensor], Tensor]:
        images = to_float(batch.images.to(self.device))
        ids, owners, answered = (t.to(self.device) for t in (batch.ids, batch.owners, batch.answered))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits, dense = model(images, ids, owners, answered)
        return logits, dense, ids[:, 1:][answered[:, 1:]]


def export_vlm(llava: LlavaForConditionalGeneration, folder: Path) -> Path:
    """Write ``llava`` in float16 with its processor as a folder for transformers. Returns the weights' path."""
    vision: Any = llava.config.vision_config
    llava.config.dtype = torch.float16
    llava.save_pretrained(folder, state_dict=half_precision(llava.state_dict()), safe_serialization=True)
    make_processor(vision.image_size, vision.patch_size, MEAN, STD).save_pretrained(folder)
    return folder / "model.safetensors"


def collate(
    examples: Sequence[Example], tokenizer: Tokenizer, num_visual: int, draws: int, num_places: int = 0
) -> VlmBatch:
    """Pack the questions of every example behind its visual tokens: ``draws`` of each type, ``num_places`` further."""
    asked = [_questions(example, draws, num_places) for example in examples]
    rows = []
    for questions in asked:
        ids = [TOKEN_IDS[BOS], TOKEN_IDS[USER], *[TOKEN_IDS[IMAGE]] * num_visual]
        owners, answered = [0] * len(ids), [False] * len(ids)
        for number, question in enumerate(questions, 1):
            text = [*tokenizer.encode(question.question, add_special_tokens=False).ids, TOKEN_IDS[ASSISTANT]]
            answer = [*tokenizer.encode(question.answers[0], add_special_tokens=False).ids, TOKEN_IDS[EOS]]
            ids += text + answer
            owners += [number] * len(text + answer)
            answered += [False] * len(text) + [True] * len(answer)
        rows.append((ids, owners, answered))
    length = max(len(ids) for ids, _, _ in rows)

    def padded(column: int, value: int) -> Tensor:
        return torch.tensor([row[column] + [value] * (length - len(row[column])) for row in rows])

    return VlmBatch(
        stack_images(examples),
        padded(0, TOKEN_IDS[PAD]),
        padded(1, -1),
        padded(2, 0).bool(),
        asked,
        stack_labels(examples, math.isqrt(num_visual)),
    )


def _questions(example: Example, draws: int, num_places: int) -> list[Question]:
    by_text: dict[str, Question] = {}
    for draw in range(draws):
        for question in scene_questions(example.scene, with_kind=example.with_kind, draw=draw):
            by_text.setdefault(question.question, question)
    for question in place_questions(example.scene, num_places):
        by_text.setdefault(question.question, question)
    return list(by_text.values())
