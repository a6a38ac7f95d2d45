"""The packaged MLLM's parts: a LLaVA of transformers around an image tower of open_clip, and its processor."""

from __future__ import annotations

import re
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from tokenizers import processors
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from cotam.sceneqa.tokenizer import ASSISTANT, BOS, EOS, IMAGE, PAD, TOKEN_IDS, UNKNOWN, USER, build_tokenizer

# A conversation: every message is its role, its images, its text; an answer ends with </s>.
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{{ '<user>' if message.role == 'user' else '<assistant>' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content if part.type == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
_RENAMED = (
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^class_embedding", "embeddings.class_embedding"),
    (r"^positional_embedding", "embeddings.position_embedding.weight"),
    (r"^ln_pre\.", "pre_layrnorm."),
    (r"^ln_post\.", "post_layernorm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def make_llava(
    visual: VisionTransformer, hidden: int, layers: int, heads: int, intermediate: int
) -> LlavaForConditionalGeneration:
    """A LLaVA with the weights of ``visual``, read after its last block, and a new projector and Llama."""
    block: Any = visual.transformer.resblocks[0]
    vision = CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(visual.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        image_size=visual.image_size[0],
        patch_size=visual.patch_size[0],
        hidden_act="gelu",
        projection_dim=visual.output_dim,
    )
    text = LlamaConfig(
        vocab_size=build_tokenizer().get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=1024,
        pad_token_id=TOKEN_IDS[PAD],
        bos_token_id=TOKEN_IDS[BOS],
        eos_token_id=TOKEN_IDS[EOS],
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKEN_IDS[IMAGE],
        image_seq_length=visual.grid_size[0] * visual.grid_size[1],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(clip_vision_state(visual))
    return model


def clip_vision_state(visual: VisionTransformer) -> dict[str, Tensor]:
    """open_clip's names and fused projections to those of transformers' CLIPVisionModel."""
    state: dict[str, Tensor] = {}
    for name, tensor in visual.state_dict().items():
        if name == "proj":
            continue
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        fused = re.match(r"(.*)\.attn\.in_proj_(weight|bias)$", name)
        if fused:
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{fused[1]}.self_attn.{part}_proj.{fused[2]}"] = values
        else:
            state[name] = tensor
    return state


def make_tokenizer(for_clip: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of ``cotam.sceneqa.tokenizer`` for transformers.

    For a CLIP it adds <s> and </s> and pads to the right; for generation it adds nothing and pads to the left.
    """
    tokenizer = build_tokenizer()
    if for_clip:
        ends = [(token, TOKEN_IDS[token]) for token in (BOS, EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        padding_side="right" if for_clip else "left",
    )


def make_processor(image_px: int, patch_px: int, mean: tuple[float, ...], std: tuple[float, ...]) -> LlavaProcessor:
    """Tokenizer, chat template, and images squashed to ``image_px``."""
    images = CLIPImageProcessor(
        size={"height": image_px, "width": image_px},
        do_center_crop=False,
        image_mean=list(mean),
        image_std=list(std),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=make_tokenizer(),
        patch_size=patch_px,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def num_image_tokens(model: LlavaForConditionalGeneration) -> int:
    """Visual tokens an image."""
    vision: Any = model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


@torch.no_grad()
def half_precision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy in float16, for packaging."""
    return {name: t.detach().cpu().to(torch.float16 if t.is_floating_point() else t.dtype) for name, t in state.items()}
