"""The interface of an MLLM: images and questions in, answers out; and the choice of one by its name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor

from cotam.credentials import refuse_credentials
from cotam.errors import one_line
from cotam.image import RGBImage

Backend = Literal["served", "vllm", "hf", "local"]
_PREFIXES: tuple[Backend, ...] = ("vllm", "hf")  # of names, before a colon
_REVISION = re.compile(r"([\w.-]+/[\w.-]+)@([\w./-]+)")  # names on the hub have no @ of their own
Item = TypeVar("Item")


class Asked(NamedTuple):
    """An image, uint8 (H, W, 3), with questions about it; ``y_hat`` (M, h, w) where visual tokens are wanted."""

    image: RGBImage
    questions: Sequence[str]
    y_hat: Tensor | None = None


class MllmError(Exception):
    """One question that the MLLM did not answer; the message says why, in one line."""


class Mllm(Protocol):
    """An MLLM."""

    def answer(self, asked: Sequence[Asked]) -> list[list[str | MllmError]]:
        """Answers to the questions of each image, in order; one that cannot be answered costs no other its answer.

        Raises:
            OSError: the MLLM cannot be reached at all; worth another try.
        """
        ...


def answer_by_bisection(
    answer: Callable[[Sequence[Item]], Sequence[str]], items: Sequence[Item], faults: tuple[type[Exception], ...]
) -> list[str | MllmError]:
    """Answer all items in one call; if it raises one of ``faults``, halve them: only what fails alone is an error."""
    try:
        return [text.strip() for text in answer(items)]
    except faults as error:
        if len(items) == 1:
            return [MllmError(one_line(error)[:300])]
    half = len(items) // 2
    return [text for part in (items[:half], items[half:]) for text in answer_by_bisection(answer, part, faults)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MllmConfig:
    """Which MLLM, and how it is asked.

    Attributes:
        name: a packaged name; a folder; hf:NAME (transformers); vllm:NAME; or the URL of an OpenAI-compatible endpoint.
            A NAME on the hub may have a revision, ORGANISATION/MODEL@REVISION: a commit, tag or branch.
        served_model: the model's name at that endpoint.
        prompt: what is asked, {question} in it.
        max_new_tokens: length of an answer.
        batch_size: images at a time, and requests under way at an endpoint.
        adapter: name, path or URI; where it is given, visual tokens are added to the tower's.
    """

    name: str = "cotam-vlm-tiny"
    served_model: str = ""
    prompt: str = "{question}"
    max_new_tokens: int = 16
    batch_size: int = 8
    adapter: str = ""

    def __post_init__(self) -> None:
        refuse_credentials(self.name)
        if self.backend == "served" and not self.served_model:
            raise ValueError(f"name the model that {self.name} serves with --served-model")
        if "{question}" not in self.prompt:
            raise ValueError("the prompt has no {question} in it")

    def identity(self) -> dict[str, Any]:
        """What answers depend on: not how many at a time, nor at which address a served model is."""
        values = dataclasses.asdict(self)
        del values["batch_size"]
        return {**values, "name": "served"} if self.backend == "served" else values

    @property
    def backend(self) -> Backend:
        """Which backend answers."""
        if self.name.startswith(("http://", "https://")):
            return "served"
        return next((prefix for prefix in _PREFIXES if self.name.startswith(f"{prefix}:")), "local")

    @property
    def place(self) -> str:
        """Where that backend finds it: ``name`` without the backend's prefix and the revision."""
        return self._place_and_revision()[0]

    @property
    def revision(self) -> str | None:
        """Of a model on the hub, where ``name`` has one."""
        return self._place_and_revision()[1]

    def _place_and_revision(self) -> tuple[str, str | None]:
        place = self.name.removeprefix(f"{self.backend}:")
        on_hub = _REVISION.fullmatch(place) if self.backend in _PREFIXES else None
        return (on_hub[1], on_hub[2]) if on_hub else (place, None)

    def prompt_for(self, question: str) -> str:
        """The prompt with a question in it; other braces are text."""
        return self.prompt.replace("{question}", question)


def load_mllm(config: MllmConfig, device: str = "cpu", codec_sha256: str = "") -> Mllm:
    """The MLLM of ``config``; ``codec_sha256`` is of the codec whose latents come, for an adapter.

    Raises:
        ValueError: unknown, not installed, or without a token path though an adapter was given.
        FileNotFoundError: no such folder.
    """
    if config.adapter and config.backend in ("served", "vllm"):
        raise ValueError("visual tokens need an MLLM in process, by transformers; use --input pixels")
    if config.backend == "served":
        from cotam.mllm.served import ServedMllm

        return ServedMllm(config)
    if config.backend == "vllm":
        from cotam.mllm.vllm import VllmMllm

        return VllmMllm(config)
    from cotam.mllm.transformers import load_transformers

    return load_transformers(config, device, codec_sha256)
