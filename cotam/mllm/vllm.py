"""MLLMs of vLLM in process, on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from cotam.mllm.backend import Asked, MllmConfig, MllmError, answer_by_bisection


class VllmMllm:
    """vllm:NAME, a folder or a name on the hub.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(self, config: MllmConfig) -> None:
        try:
            import vllm
        except ImportError:
            raise ValueError("vLLM is not installed: pip install vllm, or use hf:NAME or an endpoint's URL") from None
        self.config = config
        self._model = vllm.LLM(model=config.place, revision=config.revision, limit_mm_per_prompt={"image": 1})
        self._sampling = vllm.SamplingParams(temperature=0.0, max_tokens=config.max_new_tokens)

    def answer(self, asked: Sequence[Asked]) -> list[list[str | MllmError]]:
        """Answers; vLLM batches as it likes. Raises RuntimeError where it mixes up its requests."""
        conversations = [self._conversation(item, question) for item in asked for question in item.questions]
        answers = iter(answer_by_bisection(self._chat, conversations, (ValueError,)) if conversations else [])
        return [[next(answers) for _ in item.questions] for item in asked]

    def _chat(self, conversations: Sequence[list[dict[str, Any]]]) -> list[str]:
        outputs = self._model.chat(list(conversations), self._sampling, use_tqdm=False)
        if len(outputs) != len(conversations):  # old ones answer what was queued before a refused request, too
            raise RuntimeError(f"vLLM gave {len(outputs)} answers to {len(conversations)} questions: upgrade it")
        return [output.outputs[0].text for output in outputs]

    def _conversation(self, item: Asked, question: str) -> list[dict[str, Any]]:
        content = [
            {"type": "image_pil", "image_pil": Image.fromarray(item.image)},
            {"type": "text", "text": self.config.prompt_for(question)},
        ]
        return [{"role": "user", "content": content}]
