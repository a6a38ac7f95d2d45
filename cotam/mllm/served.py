"""MLLMs behind an OpenAI-compatible endpoint: vLLM, transformers serve, or a provider's."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import openai
from openai.types.chat import ChatCompletion

from cotam.image import RGBImage, encode_image
from cotam.mllm.backend import Asked, MllmConfig, MllmError

_RETRIES = 4
_TIMEOUT_S = 120.0


class ServedMllm:
    """Asks an endpoint, ``config.batch_size`` requests at a time. The key is OPENAI_API_KEY, if there is one.

    A request that the endpoint refuses costs its own answer; an endpoint that is away, overloaded for long, or refuses
    the key or the model raises OSError.
    """

    def __init__(self, config: MllmConfig) -> None:
        if not config.served_model:
            raise ValueError(f"name the model that {config.name} serves with --served-model")
        self.config = config
        self._key = os.environ.get("OPENAI_API_KEY", "")
        self._client = openai.OpenAI(
            base_url=config.name,
            api_key=self._key or "none",
            max_retries=_RETRIES,
            timeout=_TIMEOUT_S,
        )

    def answer(self, asked: Sequence[Asked]) -> list[list[str | MllmError]]:
        """Answers. Raises OSError as described above."""
        with ThreadPoolExecutor(self.config.batch_size, thread_name_prefix="cotam-mllm") as executor:
            futures = []
            for item in asked:
                url = _data_url(item.image)
                futures.append([executor.submit(self._ask, url, question) for question in item.questions])
            try:
                return [[future.result() for future in row] for row in futures]
            except OSError:
                executor.shutdown(cancel_futures=True)
                raise

    def _ask(self, url: str, question: str) -> str | MllmError:
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": self.config.asked(question)},
        ]
        try:
            response = self._client.chat.completions.create(
                model=self.config.served_model,
                messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]  # plain dictionaries
                max_tokens=self.config.max_new_tokens,
                temperature=0.0,
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError, openai.ConflictError) as error:
            return MllmError(self._one_line(error))
        except openai.APIError as error:
            if isinstance(error, openai.APIStatusError) and error.status_code == 413:  # of an image, not of the job
                return MllmError(self._one_line(error))
            raise OSError(f"{self.config.name}: {self._one_line(error)}") from None
        if not isinstance(response, ChatCompletion):
            raise OSError(f"{self.config.name} answers, but not as an OpenAI-compatible endpoint does")
        choice = response.choices[0] if response.choices else None
        text = choice.message.content if choice is not None and choice.message is not None else None
        if not text and choice is not None and choice.finish_reason == "length":
            return MllmError("the answer had not begun where it was cut off: raise --max-new-tokens")
        return MllmError("the endpoint sent no answer") if text is None else text.strip()

    def _one_line(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return (text.replace(self._key, "***") if self._key else text)[:300]  # some endpoints repeat the key


def _data_url(image: RGBImage) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_image(image, "PNG", compress_level=1)).decode()
