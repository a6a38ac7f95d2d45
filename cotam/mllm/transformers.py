"""MLLMs of transformers in process: any AutoModelForImageTextToText, and LLaVA with visual tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging

from cotam.adapter import Adapter, check_fit, first_layer, load_adapter, tower_sha256
from cotam.config import LATENT_STRIDE
from cotam.errors import one_line
from cotam.mllm.backend import Asked, Mllm, MllmConfig, MllmError, answer_by_bisection
from cotam.weights import model_folder

_MAX_SEQUENCES = 64  # of one call of generate
_CLIP = "clip_vision_model"


def load_transformers(config: MllmConfig, device: str, codec_sha256: str = "") -> Mllm:
    """Load a packaged name, a folder, or hf:NAME; only safetensors. Errors as of ``load_mllm``."""
    logging.disable_progress_bar()
    is_hub = config.backend == "hf"
    place = config.place if is_hub else str(model_folder(config.place))
    try:
        # No code that comes with a model, and no pickle.
        source: dict[str, Any] = {"local_files_only": not is_hub, "revision": config.revision or "main"}
        processor = AutoProcessor.from_pretrained(place, trust_remote_code=False, **source)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            place, use_safetensors=True, trust_remote_code=False, dtype="auto", **source
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"cannot load MLLM {config.name}: {one_line(error)[:300]}") from error
    tower = ""
    # Pixtral is of this class, too, but its tower has no token of its own beside the patches, and images of any shape.
    vision: Any = getattr(model.config, "vision_config", None)
    is_llava = isinstance(model, LlavaForConditionalGeneration) and vision.model_type == _CLIP
    if is_llava:
        tower = tower_sha256(model.model.vision_tower)  # as it is stored: in bfloat16 it would be another
    model = model.to(device, _dtype_on(device)).eval().requires_grad_(False)
    if is_llava:
        return LlavaMllm(config, model, processor, tower, codec_sha256)
    if config.adapter:
        raise ValueError(f"{config.name} has no token path, which the LLaVA family has; use --input pixels")
    return TransformersMllm(config, model, processor)


def _dtype_on(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


class TransformersMllm:
    """Any image-text-to-text model, greedy.

    Args:
        config: how it is asked.
        model, processor: of transformers; the processor has a chat template.
    """

    def __init__(self, config: MllmConfig, model: Any, processor: Any) -> None:
        self.config, self.model, self.processor = config, model, processor
        self.processor.tokenizer.padding_side = "left"
        self._max_sequences = _MAX_SEQUENCES

    def answer(self, asked: Sequence[Asked]) -> list[list[str | MllmError]]:
        """Answers, all questions of some images in one batch."""
        pairs = [(k, question) for k, item in enumerate(asked) for question in item.questions]
        answers: list[list[str | MllmError]] = [[] for _ in asked]
        while pairs:
            chunk, pairs = pairs[: self._max_sequences], pairs[self._max_sequences :]
            # An image that the processor does not take must not fail the others.
            found = answer_by_bisection(
                lambda some: self._generate(asked, some), chunk, (ValueError, torch.OutOfMemoryError)
            )
            for (k, _), answer in zip(chunk, found, strict=True):
                answers[k].append(answer)
        return answers

    @torch.inference_mode()
    def _generate(self, asked: Sequence[Asked], pairs: Sequence[tuple[int, str]]) -> list[str]:
        try:
            inputs = self._inputs(asked, pairs)
            generated = self.model.generate(**inputs, max_new_tokens=self.config.max_new_tokens, do_sample=False)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self._max_sequences = max(1, len(pairs) // 2)  # from now on
            raise
        repeats = "input_ids" in inputs and not self.model.config.is_encoder_decoder
        new = generated[:, inputs["input_ids"].shape[1] :] if repeats else generated
        texts: list[str] = self.processor.batch_decode(new, skip_special_tokens=True)
        return texts

    def _inputs(self, asked: Sequence[Asked], pairs: Sequence[tuple[int, str]]) -> dict[str, Tensor]:
        images = {k: Image.fromarray(asked[k].image) for k in {k for k, _ in pairs}}  # each a copy
        return self._processed([images[k] for k, _ in pairs], [question for _, question in pairs])

    def _processed(self, images: list[Image.Image], questions: list[str]) -> dict[str, Tensor]:
        text = [self._prompt(question) for question in questions]
        # A template that has the first token already must not get another one.
        options = {"add_special_tokens": False} if self._starts_itself(text) else {}
        # Some processors take a flat list for the images of one text.
        inputs = self.processor(
            images=[[image] for image in images], text=text, padding=True, return_tensors="pt", **options
        )
        return dict(inputs.to(self.model.device, dtype=self.model.dtype))

    def _starts_itself(self, prompts: list[str]) -> bool:
        """Whether the chat template begins with the token that begins a text."""
        first = self.processor.tokenizer.bos_token
        return bool(first) and all(prompt.startswith(first) for prompt in prompts)

    def _prompt(self, question: str) -> str:
        text = self.config.prompt_for(question)
        if token := getattr(self.processor, "image_token", None):
            text = text.replace(token, " ")  # an image more than there is would fail the whole batch
        content = [{"type": "image"}, {"type": "text", "text": text}]
        prompt: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return prompt


class LlavaMllm(TransformersMllm):
    """LLaVA: visual tokens are computed once an image, whatever the number of questions.

    Where items come with latents, an adapter's tokens are added.

    Attributes:
        tower: the image tower. tower_sha256: of it as it is stored.
    """

    def __init__(
        self, config: MllmConfig, model: Any, processor: Any, tower_sha256: str, codec_sha256: str = ""
    ) -> None:
        super().__init__(config, model, processor)
        self.tower, self.tower_sha256 = model.model.vision_tower, tower_sha256
        self.adapter: Adapter | None = None
        if config.adapter:
            self.adapter = load_adapter(config.adapter).to(model.device)
            check_fit(self.adapter, codec_sha256, tower_sha256)

    def _inputs(self, asked: Sequence[Asked], pairs: Sequence[tuple[int, str]]) -> dict[str, Tensor]:
        used = sorted({k for k, _ in pairs})
        features = self._features([asked[k] for k in used])
        num_tokens = features.shape[1]
        token = self.processor.image_token
        text = [self._prompt(question).replace(token, token * num_tokens) for _, question in pairs]
        begin = not self._starts_itself(text)
        tokens = self.processor.tokenizer(text, padding=True, return_tensors="pt", add_special_tokens=begin)
        ids = tokens["input_ids"].to(self.model.device)
        embeddings = self.model.get_input_embeddings()(ids)
        visual = features[[used.index(k) for k, _ in pairs]].to(embeddings.dtype)
        is_visual = (ids == self.model.config.image_token_id)[:, :, None].expand_as(embeddings)
        embeddings = embeddings.masked_scatter(is_visual, visual)
        return {"inputs_embeds": embeddings, "attention_mask": tokens["attention_mask"].to(self.model.device)}

    def _features(self, asked: Sequence[Asked]) -> Tensor:
        """Visual tokens, (B, patches, hidden size of the language model)."""
        images = [Image.fromarray(item.image) for item in asked]
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.model.device, dtype=self.model.dtype)
        if self.adapter is None or all(item.y_hat is None for item in asked):
            return torch.stack(list(self.model.model.get_image_features(pixels).pooler_output))
        patch = self.model.config.vision_config.patch_size
        rows, columns = pixels.shape[2] // patch, pixels.shape[3] // patch
        tokens = []
        for item in asked:
            assert item.y_hat is not None, "latents of all images of a call, or of none"
            seen = seen_part(item.y_hat, item.image.shape[:2], self.processor.image_processor)
            tokens.append(self.adapter(seen[None].to(self.model.device), rows, columns)[0])
        with adding_tokens(self.tower, torch.stack(tokens)):
            return torch.stack(list(self.model.model.get_image_features(pixels).pooler_output))


def seen_part(y_hat: Tensor, size: Sequence[int], image_processor: Any) -> Tensor:
    """The part (M, h', w') of ``y_hat`` (M, h, w) that a tower sees of an image of ``size`` (height, width).

    LLaVA-1.5 scales the shorter side and crops the centre; to a position of the latents, which is 16 pixels.
    """
    if not getattr(image_processor, "do_center_crop", False):
        return y_hat
    target, crop = image_processor.size, image_processor.crop_size
    shortest = target.get("shortest_edge")
    spans = []
    for length, side in zip(size, ("height", "width"), strict=True):
        scale = shortest / min(size) if shortest else target[side] / length
        seen = crop[side] / scale
        if seen >= length:
            spans.append(slice(None))
            continue
        start = round((length - seen) / 2 / LATENT_STRIDE)
        spans.append(slice(start, max(start + 1, round((length + seen) / 2 / LATENT_STRIDE))))
    return y_hat[:, spans[0], spans[1]]


@contextmanager
def adding_tokens(tower: torch.nn.Module, tokens: Tensor) -> Iterator[None]:
    """While in this context, a CLIP tower of transformers adds ``tokens`` (B, patches, width) to its patches' own."""

    def add(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, :1], output[:, 1:] + tokens.to(output.dtype)], dim=1)

    handle = first_layer(tower).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
