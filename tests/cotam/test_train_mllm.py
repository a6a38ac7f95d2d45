"""Training of CLIP, LLaVA and adapter: resumable, and what is exported is what others load."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from cotam.adapter import Adapter, check_fit, load_adapter, packaged_adapter, tower_sha256
from cotam.codec import Codec
from cotam.importance import Attention
from cotam.importance.estimate import ImportanceEstimator
from cotam.importance.tower import AttentionTower, load_clip
from cotam.losses import token_distance
from cotam.mllm.backend import Asked, MllmConfig, load_mllm
from cotam.mllm.tiny import make_llava, num_image_tokens
from cotam.mllm.transformers import LlavaMllm, adding_tokens
from cotam.sceneqa.tokenizer import build_tokenizer
from cotam.train.clip import to_float
from cotam.train.config import SceneConfig
from cotam.train.run import train_adapter, train_clip, train_vlm
from cotam.train.scenes import make_example, scene_batches
from cotam.train.vlm import AnswerModel, collate
from tests.cotam.tiny_models import ADAPTER, CLIP, VLM, TinyModels


def test_every_run_resumes_and_exports(tiny: TinyModels, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tiny.root, root)
    looking = Attention(clip=tiny.clip, layer=1)
    for name, train in (
        ("clip", lambda out: train_clip(dataclasses.replace(CLIP, max_steps=4), out, "cpu")),
        ("vlm", lambda out: train_vlm(dataclasses.replace(VLM, max_steps=4), out, tiny.clip, "cpu")),
        (
            "adapter",
            lambda out: train_adapter(
                dataclasses.replace(ADAPTER, max_steps=4), out, "cotam-base", tiny.vlm, looking, "cpu"
            ),
        ),
    ):
        train(root / name)
        records = [json.loads(line) for line in (root / name / "log.jsonl").read_text().splitlines()]
        assert sorted({r["step"] for r in records if "evaluation" in r}) == [2, 4], name
    with pytest.raises(ValueError, match="another shape"):
        train_clip(dataclasses.replace(CLIP, width=64), root / "clip", "cpu")


def test_the_clip_is_one_for_open_clip_and_for_importance(tiny: TinyModels) -> None:
    ours = load_clip(tiny.clip)
    theirs = open_clip.create_model("local-dir:" + tiny.clip)
    theirs.eval()
    x = torch.rand(2, 3, 64, 64)
    tokens = open_clip.get_tokenizer("local-dir:" + tiny.clip)(["a red circle", 'a sign that says "bus"'])
    with torch.no_grad():
        assert torch.allclose(ours.model.eval().encode_image(x), theirs.encode_image(x), atol=1e-5)
        assert not torch.allclose(*theirs.encode_text(tokens))
    image = np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8)
    (importance,) = ImportanceEstimator(AttentionTower.load(Attention(clip=tiny.clip, layer=2)))([image])
    assert importance.ndim == 2 and 0 <= importance.min() < importance.max() <= 1
    ways = [(1, "class"), (2, "class"), (2, "all")]
    towers = [AttentionTower.load(Attention(clip=tiny.clip, layer=layer, queries=queries)) for layer, queries in ways]
    assert len({tower.fingerprint() for tower in towers}) == 3


def test_packed_questions_are_answered_as_if_each_were_alone(tiny: TinyModels) -> None:
    llava = make_llava(load_clip(tiny.clip).model.visual, 32, 2, 2, 64).eval()
    model = AnswerModel(llava)
    examples = [make_example("test", k, 64, []) for k in range(3)]
    batch = collate(examples, build_tokenizer(), num_image_tokens(llava), draws=2)
    images = batch.images.float() / 127.5 - 1
    with torch.no_grad():
        packed, _ = model(images, batch.ids, batch.owners, batch.answered)
        alone = []
        for row, asked in enumerate(batch.questions):
            assert len(asked) > 3
            for number in range(1, len(asked) + 1):
                keep = (batch.owners[row] == 0) | (batch.owners[row] == number)
                ids, answered = batch.ids[row, keep][None], batch.answered[row, keep][None]
                logits = llava(input_ids=ids, pixel_values=images[row : row + 1]).logits
                alone.append(logits[:, :-1][answered[:, 1:]])
    assert torch.allclose(packed, torch.cat(alone), atol=1e-4)


def test_held_out_accuracy_is_that_of_generated_answers() -> None:
    """Teacher forcing finds the same answers as generation, whose numbers users see."""
    mllm = load_mllm(MllmConfig(name="cotam-vlm-tiny"))
    assert isinstance(mllm, LlavaMllm)
    side = mllm.model.config.vision_config.image_size
    examples = [make_example("test", k, side, []) for k in range(8)]
    batch = collate(examples, build_tokenizer(), num_image_tokens(mllm.model), draws=1)
    with torch.no_grad():
        logits, _ = AnswerModel(mllm.model)(to_float(batch.images), batch.ids, batch.owners, batch.answered)
    wrong = logits.argmax(1) != batch.ids[:, 1:][batch.answered[:, 1:]]
    rows, columns = batch.answered.nonzero(as_tuple=True)
    missed = {(int(r), int(batch.owners[r, c])) for r, c in zip(rows[wrong], columns[wrong], strict=True)}
    asked = [Asked(e.image, [q.question for q in qs]) for e, qs in zip(examples, batch.questions, strict=True)]
    generated = {
        (row, number)
        for row, (answers, questions) in enumerate(zip(mllm.answer(asked), batch.questions, strict=True))
        for number, (answer, question) in enumerate(zip(answers, questions, strict=True), 1)
        if answer != question.answers[0]
    }
    assert generated == missed and len(missed) < sum(map(len, batch.questions)) / 2


def test_an_exported_llava_is_safetensors_in_half_precision(tiny: TinyModels) -> None:
    assert not list(Path(tiny.vlm).glob("*.bin"))
    state = load_file(Path(tiny.vlm) / "model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float16}
    assert AutoModelForImageTextToText.from_pretrained(tiny.vlm).config.image_token_id == 4


def test_a_step_sees_the_same_scenes_whatever_the_number_of_workers() -> None:
    def keys(num_workers: int, first: int, stride: int) -> list[list[str]]:
        data = SceneConfig(num_workers=num_workers)
        batches = scene_batches(data, 32, lambda examples: [e.scene.key for e in examples], 3, first, stride)
        return [next(batches) for _ in range(4)]

    alone = keys(0, 0, 1)
    assert alone == keys(2, 0, 1)
    assert [keys(0, 0, 2)[0], keys(0, 1, 2)[0]] == alone[:2]  # two ranks


def test_the_adapter_adds_nothing_until_it_is_trained_and_fits_its_models_only(
    tiny: TinyModels, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = load_adapter(tiny.adapter)
    mllm = load_mllm(MllmConfig(name=tiny.vlm))
    assert isinstance(mllm, LlavaMllm)
    check_fit(adapter, codec.sha256, mllm.tower_sha256)
    monkeypatch.setattr("cotam.mllm.transformers._dtype_on", lambda device: torch.bfloat16)  # as on a GPU
    on_gpu = load_mllm(MllmConfig(name=tiny.vlm))
    assert isinstance(on_gpu, LlavaMllm) and on_gpu.model.dtype == torch.bfloat16
    check_fit(adapter, codec.sha256, on_gpu.tower_sha256)
    with pytest.raises(ValueError, match="trained for codec"):
        check_fit(adapter, "0" * 64, mllm.tower_sha256)
    with torch.no_grad():
        next(mllm.tower.parameters()).add_(1)
    with pytest.raises(ValueError, match="trained for image tower"):
        check_fit(adapter, codec.sha256, tower_sha256(mllm.tower))

    fresh = Adapter(adapter.config)
    y_hat = torch.randn(2, adapter.config.M, 5, 9)
    assert torch.equal(fresh(y_hat, 4, 4), torch.zeros(2, 16, 32))
    pixels = torch.rand(2, 3, 64, 64)
    before = mllm.tower(pixels).last_hidden_state
    with adding_tokens(mllm.tower, fresh(y_hat, 4, 4)):
        assert torch.equal(mllm.tower(pixels).last_hidden_state, before)
    with adding_tokens(mllm.tower, torch.ones(2, 16, 32)):
        assert not torch.equal(mllm.tower(pixels).last_hidden_state, before)
    assert torch.equal(mllm.tower(pixels).last_hidden_state, before)


def test_token_distance() -> None:
    target = torch.tensor([[[0.0], [2.0], [4.0]]])
    assert token_distance(target, target) == 0
    mean = target.mean(1, keepdim=True).expand_as(target)
    assert token_distance(mean, target) == pytest.approx(1)
    only_middle = torch.tensor([[0.0, 5.0, 0.0]])
    assert token_distance(mean, target, only_middle) == 0


def test_a_codec_finds_its_packaged_adapter(packaged_codec: Codec) -> None:
    name = packaged_adapter(packaged_codec.sha256)
    mllm = load_mllm(MllmConfig(adapter=name), codec_sha256=packaged_codec.sha256)  # refuses one that does not fit
    assert isinstance(mllm, LlavaMllm)


def test_a_codec_without_a_packaged_adapter_is_told_what_to_do() -> None:
    with pytest.raises(ValueError, match="no packaged adapter is for codec 00000000: use pixels alone"):
        packaged_adapter("0" * 64)
