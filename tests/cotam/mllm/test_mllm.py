"""MLLM backends: the same answers in process and over HTTP, with faults, and clear errors."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

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
