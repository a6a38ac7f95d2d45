"""MLLMs behind an OpenAI-compatible endpoint: vLLM, transformers serve, or a provider's."""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from openai.types.chat import ChatCompletion
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from cotam.errors import with_type
from cotam.image import RGBImage, encode_image
from cotam.mllm.backend import Asked, MllmConfig, MllmError

_RETRIES = 4
_LONGEST_WAIT_S = 8.0  # between those
_TIMEOUT_S = 120.0  # for the whole of an answer, and what it waits for in the server's queue
_TOKEN_S = 0.25  # more for each token of an answer
_QUOTA_S = 600.0  # quotas are by the minute, and shared with others
_FIRST_WAIT_S = 5.0


class ServedMllm:
    """Asks an endpoint, ``config.batch_size`` requests at a time. The key is OPENAI_API_KEY, if there is one.

    A request that the endpoint refuses, or fails on while it answers others, costs its own answer. One whose quota is
    used up is waited for. One that is away, fails on request after request and on a word without an image, or refuses
    the key or the model raises OSError.
    """

    def __init__(self, config: MllmConfig) -> None:
        self.config = config
        self._key = os.environ.get("OPENAI_API_KEY", "")
        self._client = openai.OpenAI(
            base_url=config.name,
            api_key=self._key or "none",
            max_retries=0,  # it would repeat timeouts, too, each a whole generation
            timeout=_TIMEOUT_S + _TOKEN_S * config.max_new_tokens,
        )
        self._options: dict[str, Any] = {"max_tokens": config.max_new_tokens, "temperature": 0.0}
        self._retrying = Retrying(
            retry=retry_if_exception(_is_worth_a_retry), stop=_is_enough, wait=_wait_s, reraise=True
        )
        self._lock, self._failed_in_a_row = threading.Lock(), 0

    def answer(self, asked: Sequence[Asked]) -> list[list[str | MllmError]]:
        """Answers. Raises OSError as described above."""
        with ThreadPoolExecutor(self.config.batch_size, thread_name_prefix="cotam-mllm") as executor:
            futures = []
            for item in asked:
                url = _data_url(item.image)
                futures.append([executor.submit(self._ask, url, question) for question in item.questions])
            try:
                answers = [[future.result() for future in row] for row in futures]
                for item, row in zip(asked, answers, strict=True):
                    for k, answer in enumerate(row):
                        if isinstance(answer, _Failure):  # it may have been away for a moment
                            row[k] = self._ask(_data_url(item.image), item.questions[k])
                return answers
            except OSError:
                executor.shutdown(cancel_futures=True)
                raise

    def _ask(self, url: str, question: str) -> str | MllmError:
        try:
            response = self._retrying(self._response, url, question)
        except (openai.BadRequestError, openai.UnprocessableEntityError, openai.ConflictError) as error:
            return MllmError(self._one_line(error))
        except openai.APIError as error:
            if isinstance(error, openai.APIStatusError) and error.status_code == 413:  # of an image, not of the job
                return MllmError(self._one_line(error))
            if isinstance(error, openai.InternalServerError | openai.APITimeoutError):  # perhaps of this request alone
                with self._lock:
                    self._failed_in_a_row += 1
                    if self._failed_in_a_row >= 2 * max(2, self.config.batch_size):
                        self._check_that_it_answers()
                        self._failed_in_a_row = 0
                return _Failure(self._one_line(error))
            raise OSError(f"{self.config.name}: {self._one_line(error)}") from None
        except ValueError:  # JSON that a proxy cut off
            raise OSError(f"{self.config.name} sends answers that are not whole") from None
        self._failed_in_a_row = 0
        if not isinstance(response, ChatCompletion):
            raise OSError(f"{self.config.name} answers, but not as an OpenAI-compatible endpoint does")
        choice = response.choices[0] if response.choices else None
        text = choice.message.content if choice is not None and choice.message is not None else None
        if not text and choice is not None and choice.finish_reason == "length":
            return MllmError("the answer had not begun where it was cut off: raise --max-new-tokens")
        return MllmError("the endpoint sent no answer") if text is None else text.strip()

    def _check_that_it_answers(self) -> None:
        """Raise OSError where it answers nothing: what it failed on may be questions about one image."""
        hello = [{"role": "user", "content": "Hello"}]
        try:
            self._client.chat.completions.create(
                model=self.config.served_model,
                messages=hello,  # type: ignore[arg-type]  # plain dictionaries
                **self._options,
            )
        except openai.APIStatusError as error:
            if error.status_code >= 500:
                raise OSError(f"{self.config.name}: {self._one_line(error)}") from None
        except openai.APIError as error:
            raise OSError(f"{self.config.name}: {self._one_line(error)}") from None

    def _response(self, url: str, question: str) -> object:
        """The endpoint's; what it says it does not know of our options is left out from then on."""
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": self.config.prompt_for(question)},
        ]
        options = self._options
        while True:
            try:
                return self._client.chat.completions.create(
                    model=self.config.served_model,
                    messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]  # plain dictionaries
                    **options,
                )
            except openai.BadRequestError as error:
                message = str(error)
                if "max_tokens" in options and "max_completion_tokens" in message:
                    options = {**options, "max_completion_tokens": options["max_tokens"]}
                    del options["max_tokens"]
                elif "temperature" in options and "temperature" in message:
                    options = {name: value for name, value in options.items() if name != "temperature"}
                else:
                    raise
                self._options = options

    def _one_line(self, error: Exception) -> str:
        text = with_type(error)
        return (text.replace(self._key, "***") if self._key else text)[:300]  # some endpoints repeat the key


class _Failure(MllmError):
    """A request that the endpoint failed on, rather than refused."""


def _is_quota(error: BaseException | None) -> bool:
    return isinstance(error, openai.RateLimitError) and error.code != "insufficient_quota"  # that one is not refilled


def _is_worth_a_retry(error: BaseException) -> bool:
    is_away = isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)
    return is_away or isinstance(error, openai.InternalServerError) or _is_quota(error)


def _is_enough(state: RetryCallState) -> bool:
    if _is_quota(_error(state)):
        return (state.seconds_since_start or 0.0) > _QUOTA_S
    return state.attempt_number > _RETRIES


def _wait_s(state: RetryCallState) -> float:
    if _is_quota(_error(state)):
        return wait_random_exponential(multiplier=_FIRST_WAIT_S, max=60)(state)
    return wait_random_exponential(multiplier=0.5, max=_LONGEST_WAIT_S)(state)


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None


def _data_url(image: RGBImage) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_image(image, "PNG", compress_level=1)).decode()
