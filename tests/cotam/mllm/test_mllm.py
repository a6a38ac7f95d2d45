"""MLLM backends: the same answers in process and over HTTP, with faults, and clear errors."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tokenizers.processors import TemplateProcessing

from cotam.mllm.backend import Asked, MllmConfig, MllmError, load_mllm
from cotam.mllm.transformers import LlavaMllm, TransformersMllm
from cotam.sceneqa.questions import scene_questions
from cotam.sceneqa.render import render
from cotam.sceneqa.scene import sample_scene
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
        (MllmConfig(name="http://localhost/v1"), "--served-model"),
        (MllmConfig(name="http://localhost/v1", served_model="x", adapter="y"), "--input pixels"),
        (MllmConfig(name=tiny.clip), "cannot load MLLM"),
        (MllmConfig(adapter=tiny.adapter), "trained for"),
    ):
        with pytest.raises(ValueError, match=message):
            load_mllm(config, codec_sha256="f" * 64)
    with pytest.raises(FileNotFoundError, match="packaged: cotam-clip-tiny, cotam-vlm-tiny"):
        load_mllm(MllmConfig(name="no-such-folder"))
    with pytest.raises(ValueError, match="question"):
        MllmConfig(prompt="What is this?")
    assert "secret" not in json.dumps(MllmConfig().__dict__)
