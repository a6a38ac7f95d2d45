"""MLLM backends: the same answers in process and over HTTP, with faults, and clear errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessor

from cotam.mllm.backend import Asked, MllmConfig, MllmError, load_mllm
from cotam.mllm.identity import mllm_fingerprints, refuse_other_mllm
from cotam.mllm.transformers import LlavaMllm, TransformersMllm, seen_part
from cotam.sceneqa.questions import scene_questions
from cotam.sceneqa.render import render
from cotam.sceneqa.scene import sample_scene
from cotam.weights import model_folder
from tests.cotam.mllm.server import Served, serving
from tests.cotam.tiny_models import TinyModels

SCENES = [sample_scene("test", k) for k in range(3)]
IMAGES = [render(scene, 128 + 32 * k) for k, scene in enumerate(SCENES)]
QUESTIONS = [[q.question for q in scene_questions(scene)] for scene in SCENES]
ASKED = [Asked(image, questions) for image, questions in zip(IMAGES, QUESTIONS, strict=True)]
NUM_QUESTIONS = sum(len(asked.questions) for asked in ASKED)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("cotam-vlm-tiny") as server:
        yield server


@pytest.fixture(scope="module")
def expected() -> list[list[str | MllmError]]:
    return load_mllm(MllmConfig()).answer(ASKED)


def ask_served(served: Served, **changes: object) -> list[list[str | MllmError]]:
    config = MllmConfig(name=served.url, served_model="tiny", **{"batch_size": 2, **changes})  # type: ignore[arg-type]
    return load_mllm(config).answer(ASKED)


def test_visual_tokens_once_an_image_or_once_a_question_give_the_same_answers(
    expected: list[list[str | MllmError]],
) -> None:
    llava = load_mllm(MllmConfig())
    assert isinstance(llava, LlavaMllm)
    assert TransformersMllm(llava.config, llava.model, llava.processor).answer(ASKED) == expected
    assert [llava.answer([asked])[0] for asked in ASKED] == expected  # alone as in a batch
    assert llava.answer([Asked(ASKED[0].image, [])]) == [[]]


def test_an_endpoint_gives_the_same_answers_through_faults(
    served: Served, expected: list[list[str | MllmError]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    served.faults[:] = [503, 429, 500]
    served.most_under_way = 0
    before = served.num_requests
    assert ask_served(served) == expected
    assert served.num_requests == before + NUM_QUESTIONS + 3
    assert served.most_under_way == 2  # as many as were allowed
    assert served.keys == {"Bearer secret-key"}


def test_a_refused_question_costs_its_own_answer(served: Served, expected: list[list[str | MllmError]]) -> None:
    served.refused = ASKED[1].questions[2]
    try:
        answers = ask_served(served)
    finally:
        served.refused = ""
    refused = answers[1][2]
    assert isinstance(refused, MllmError) and "not this one" in str(refused)
    pairs = [(a, e) for got, right in zip(answers, expected, strict=True) for a, e in zip(got, right, strict=True)]
    assert all(a == e for a, e in pairs if a is not refused)


def test_options_that_an_endpoint_does_not_know_are_left_out(
    served: Served, expected: list[list[str | MllmError]]
) -> None:
    served.unknown, before = ("max_tokens", "temperature"), served.num_requests
    try:
        assert ask_served(served, batch_size=1) == expected
    finally:
        served.unknown = ()
    assert served.num_requests == before + NUM_QUESTIONS + 2  # told once


def test_a_used_up_quota_is_waited_for(
    served: Served, expected: list[list[str | MllmError]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotam.mllm.served._RETRIES", 0)
    monkeypatch.setattr("cotam.mllm.served._FIRST_WAIT_S", 0.02)
    served.faults[:] = [429] * 12
    assert ask_served(served) == expected
    monkeypatch.setattr("cotam.mllm.served._QUOTA_S", 0.1)
    served.faults[:] = [429] * 100
    with pytest.raises(OSError, match="RateLimitError"):
        ask_served(served)
    served.faults.clear()


def test_a_request_that_always_fails_costs_its_own_answer_and_one_after_another_is_an_outage(
    served: Served, expected: list[list[str | MllmError]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotam.mllm.served._RETRIES", 0)
    for broken, batch_size in ((1, 2), (3, 1), (len(ASKED[2].questions), 2)):
        served.broken = [(ASKED[2].image.shape[1], question) for question in ASKED[2].questions[-broken:]]
        try:
            answers = ask_served(served, batch_size=batch_size)
        finally:
            served.broken = ()
        assert all(isinstance(a, MllmError) and "out of memory" in str(a) for a in answers[2][-broken:])
        assert answers[:2] == expected[:2] and answers[2][:-broken] == expected[2][:-broken]
    served.faults[:] = [500]
    assert ask_served(served) == expected  # asked again at the end
    served.faults[:] = [500] * NUM_QUESTIONS
    with pytest.raises(OSError, match="busy"):
        ask_served(served)
    assert len(served.faults) > NUM_QUESTIONS // 3  # it did not try all of them
    served.faults.clear()
    served.cut = True
    try:
        with pytest.raises(OSError, match="not whole"):
            ask_served(served)
    finally:
        served.cut = False


def test_an_image_that_the_processor_does_not_take_costs_its_own_answers(
    expected: list[list[str | MllmError]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llava = load_mllm(MllmConfig())
    assert isinstance(llava, LlavaMllm)
    for mllm in (llava, TransformersMllm(llava.config, llava.model, llava.processor)):
        inputs = mllm._inputs

        def refusing(asked, pairs, inputs=inputs):  # type: ignore[no-untyped-def]
            if any(asked[k].image is IMAGES[1] for k, _ in pairs):
                raise ValueError("absolute aspect ratio must be smaller than 200")
            return inputs(asked, pairs)

        monkeypatch.setattr(mllm, "_inputs", refusing)
        answers = mllm.answer(ASKED)
        assert answers[0] == expected[0] and answers[2] == expected[2]
        assert all(isinstance(answer, MllmError) and "aspect" in str(answer) for answer in answers[1])


def test_a_batch_that_memory_does_not_hold_is_halved(
    expected: list[list[str | MllmError]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llava = load_mllm(MllmConfig())
    assert isinstance(llava, LlavaMllm)
    inputs, sizes = llava._inputs, []

    def full(asked, pairs):  # type: ignore[no-untyped-def]
        sizes.append(len(pairs))
        if len(pairs) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inputs(asked, pairs)

    monkeypatch.setattr(llava, "_inputs", full)
    assert llava.answer(ASKED) == expected
    sizes.clear()
    assert llava.answer(ASKED) == expected and max(sizes) <= 5  # it remembers


def test_local_files_identify_an_mllm_whoever_loads_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    large = tmp_path / "model.safetensors"
    large.write_bytes(bytes(70 * 2**20))
    names = [str(tmp_path), f"hf:{tmp_path}", f"vllm:{tmp_path}"]
    found = {mllm_fingerprints(MllmConfig(name=name))["mllm_sha256"] for name in names}
    assert len(found) == 1 and found != {""}
    for name in names:
        refuse_other_mllm(MllmConfig(name=name), *found, "")
    with large.open("r+b") as file:  # fine-tuned: of the same size
        file.seek(69 * 2**20)
        file.write(b"other" * 1000)
    with pytest.raises(ValueError, match="differs from the MLLM"):
        refuse_other_mllm(MllmConfig(name=names[1]), *found, "")
    assert mllm_fingerprints(MllmConfig(name="hf:some/model"))["mllm_sha256"] == ""


def test_a_revision_on_the_hub_is_the_one_that_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[list[str | MllmError]]
) -> None:
    """Of a hub's cache, as it lies on a machine without internet."""
    model, commit = tmp_path / "models--team--vlm", "0123456789abcdef0123456789abcdef01234567"
    (model / "refs").mkdir(parents=True)
    (model / "refs/v1").write_text(commit)
    (model / "snapshots").mkdir()
    (model / "snapshots" / commit).symlink_to(model_folder("cotam-vlm-tiny"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_mllm(MllmConfig(name="hf:team/vlm@v1")).answer(ASKED) == expected
    for name in ("hf:team/vlm@v2", "hf:team/vlm"):
        with pytest.raises(ValueError, match=f"cannot load MLLM {name}"):
            load_mllm(MllmConfig(name=name))
    for name, place in (("hf:/models/vlm@2", "/models/vlm@2"), ("vlm@2", "vlm@2"), ("vllm:a/b@c/1", "a/b")):
        assert MllmConfig(name=name).place == place


class FakeVllm:
    """vllm as far as it is used: refuses long prompts, and like old ones leaves behind what it queued before them."""

    def __init__(self, forgets: bool) -> None:
        self._forgets, self._queue = forgets, list[str]()

    def chat(self, conversations, sampling, use_tqdm):  # type: ignore[no-untyped-def]
        for (message,) in conversations:
            text = message["content"][1]["text"]
            if text == "too long":
                if self._forgets:
                    self._queue.clear()
                raise ValueError("longer than the maximum model length")
            self._queue.append(text)
        answers, self._queue = self._queue, []
        return [SimpleNamespace(outputs=[SimpleNamespace(text=f" {text}")]) for text in answers]


def test_vllm_costs_a_question_that_it_refuses_and_mixes_none_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for forgets in (True, False):
        module = SimpleNamespace(LLM=lambda forgets=forgets, **_: FakeVllm(forgets), SamplingParams=lambda **_: None)
        monkeypatch.setitem(sys.modules, "vllm", module)
        mllm = load_mllm(MllmConfig(name="vllm:some/model"))
        asked = [Asked(IMAGES[0], ["1", "2"]), Asked(IMAGES[1], ["3", "too long", "4"]), Asked(IMAGES[2], ["5"])]
        if forgets:
            answers = mllm.answer(asked)
            refused = answers[1].pop(1)
            assert isinstance(refused, MllmError) and "maximum" in str(refused)
            assert answers == [["1", "2"], ["3", "4"], ["5"]]
        else:
            with pytest.raises(RuntimeError, match="upgrade"):
                mllm.answer(asked)


@pytest.mark.parametrize("size", [(256, 768), (768, 256), (336, 336), (100, 1000), (20, 20)])
def test_tokens_come_from_what_the_tower_sees_of_an_image(size: tuple[int, int]) -> None:
    """LLaVA-1.5 sees the middle of an image; the latents are numbered by their positions here."""
    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    height, width = size
    rows, columns = -(-height // 16), -(-width // 16)
    y_hat = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")).float()
    gradient = np.zeros((height, width, 3), np.uint8)
    gradient[..., 0] = np.linspace(0, 255, height)[:, None]
    gradient[..., 1] = np.linspace(0, 255, width)
    still = CLIPImageProcessor(
        size=processor.size, crop_size=processor.crop_size, do_normalize=False, do_rescale=False
    )(Image.fromarray(gradient), return_tensors="np")["pixel_values"][0]
    seen = seen_part(y_hat, size, processor)
    for channel, length in enumerate(size):
        first, last = (edge / 255 * (length - 1) for edge in (still[channel].min(), still[channel].max()))
        half = 8 + length / 255  # of a position, and what 8 bits tell
        assert 16 * float(seen[channel].min()) == pytest.approx(first, abs=half)
        assert min(length, 16 * float(seen[channel].max()) + 16) == pytest.approx(last + 1, abs=half)
    assert seen_part(y_hat, size, CLIPImageProcessor(do_center_crop=False)) is y_hat


def test_an_endpoint_that_is_away_or_refuses_the_key_is_an_os_error(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotam.mllm.served._RETRIES", 0)
    with pytest.raises(OSError, match="Connection"):
        load_mllm(MllmConfig(name="http://127.0.0.1:9/v1", served_model="tiny")).answer(ASKED[:1])
    served.faults[:] = [401] * NUM_QUESTIONS
    with pytest.raises(OSError, match="busy"):
        ask_served(served)
    served.faults.clear()


def test_an_image_that_is_too_large_costs_its_own_answers(served: Served) -> None:
    served.faults[:] = [413]
    answers = [answer for row in ask_served(served, batch_size=1) for answer in row]
    assert [isinstance(answer, MllmError) for answer in answers] == [True] + [False] * (NUM_QUESTIONS - 1)


def test_an_endpoint_that_sends_something_else_is_an_os_error_and_keys_stay_secret(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    served.odd = "<html>Sign in</html>"
    with pytest.raises(OSError, match="not as an OpenAI-compatible endpoint does"):
        ask_served(served)
    served.odd = {"error": {"message": "no such key: sk-secret"}}
    with pytest.raises(OSError, match=r"no such key: \*\*\*"):
        ask_served(served)
    served.odd = None
    monkeypatch.setenv("OPENAI_API_KEY", "")
    assert len(ask_served(served)) == len(ASKED)


@pytest.mark.parametrize("visual_tokens_first", [True, False])
def test_a_text_begins_once_whatever_the_chat_template_has(
    monkeypatch: pytest.MonkeyPatch, visual_tokens_first: bool
) -> None:
    """Models read badly what begins with no first token, or with two."""
    mllm = load_mllm(MllmConfig())
    assert isinstance(mllm, LlavaMllm)
    if not visual_tokens_first:
        mllm = TransformersMllm(mllm.config, mllm.model, mllm.processor)
    tokenizer = mllm.processor.tokenizer
    first = tokenizer.convert_tokens_to_ids("the")
    assert first != tokenizer.unk_token_id
    tokenizer.bos_token = "the"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="the $A", special_tokens=[("the", first)])
    tokenize, begins = type(tokenizer).__call__, []

    def spy(self, *args, **options):  # type: ignore[no-untyped-def]
        out = tokenize(self, *args, **options)
        ids = [int(k) for k, used in zip(out["input_ids"][0], out["attention_mask"][0], strict=True) if used]
        begins.append(ids[:2].count(first))
        return out

    monkeypatch.setattr(type(tokenizer), "__call__", spy)
    prompt = mllm._prompt
    mllm.answer(ASKED[:1])
    monkeypatch.setattr(mllm, "_prompt", lambda question: "the " + prompt(question))
    mllm.answer(ASKED[:1])
    assert begins == [1, 1]


def test_what_cannot_be_says_so(tiny: TinyModels) -> None:
    for config, message in (
        (MllmConfig(name="vllm:some/model"), "vLLM is not installed"),
        (MllmConfig(name="http://localhost/v1", served_model="x", adapter="y"), "--input pixels"),
        (MllmConfig(name=tiny.clip), "cannot load MLLM"),
        (MllmConfig(adapter=tiny.adapter), "trained for"),
    ):
        with pytest.raises(ValueError, match=message):
            load_mllm(config, codec_sha256="f" * 64)
    with pytest.raises(FileNotFoundError, match="packaged: cotam-clip-tiny, cotam-vlm-tiny"):
        load_mllm(MllmConfig(name="no-such-folder"))
    with pytest.raises(ValueError, match="--served-model"):
        MllmConfig(name="http://localhost/v1")
    with pytest.raises(ValueError, match="question"):
        MllmConfig(prompt="What is this?")
    assert "secret" not in json.dumps(MllmConfig().__dict__)
