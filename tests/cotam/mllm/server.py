"""An OpenAI-compatible server around the packaged MLLM, on a port of its own, with faults to order."""

from __future__ import annotations

import base64
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from cotam.image import decode_image
from cotam.mllm.backend import Asked, Mllm, MllmConfig, load_mllm


@dataclasses.dataclass
class Served:
    """A running server: its URL, the faults it still has to give, and what it saw."""

    url: str
    faults: list[int] = dataclasses.field(default_factory=list)
    refused: str = ""
    broken: Sequence[tuple[int, str]] = ()
    unknown: tuple[str, ...] = ()
    cut: bool = False
    odd: Any = None
    under_way: int = 0
    most_under_way: int = 0
    num_requests: int = 0
    keys: set[str] = dataclasses.field(default_factory=set)


def answer_of(body: dict[str, Any], answer: Any) -> dict[str, Any]:
    """The response with an answer."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}


@contextmanager
def serving(name: str) -> Iterator[Served]:
    """Serve the MLLM ``name``. ``faults``: status codes of the next requests; ``refused``: a question that gets 400.

    ``broken``: widths of images and questions that always get 500. ``unknown``: options that get 400. ``cut``: answers
    break off. ``odd``: what every request gets while it is set: text as a page, anything else as a refusal of the key.
    """
    mllm: Mllm = load_mllm(MllmConfig(name=name))
    served = Served("")
    app, lock, asking = FastAPI(), threading.Lock(), threading.Lock()

    @app.post("/v1/chat/completions")
    def complete(body: dict[str, Any], request: Request) -> Any:
        with lock:
            served.num_requests += 1
            served.under_way += 1
            served.most_under_way = max(served.most_under_way, served.under_way)
            served.keys.add(request.headers.get("authorization", ""))
            fault = served.faults.pop(0) if served.faults else 0
        try:
            time.sleep(0.05)
            if isinstance(served.odd, str):
                return HTMLResponse(served.odd)
            if served.odd is not None:
                return JSONResponse(served.odd, 401)
            if fault:
                return JSONResponse({"error": {"message": "busy"}}, fault)
            if isinstance(body["messages"][0]["content"], str):
                return answer_of(body, "Hello.")
            image, text = (part[part["type"]] for part in body["messages"][0]["content"])
            for option in set(served.unknown) & body.keys():
                instead = " Use 'max_completion_tokens' instead." if option == "max_tokens" else ""
                return JSONResponse({"error": {"message": f"Unsupported parameter: '{option}'.{instead}"}}, 400)
            if served.cut:
                return Response('{"id": "1", "choices": [{"mess', media_type="application/json")
            if text == served.refused:
                return JSONResponse({"error": {"message": "not this one"}}, 400)
            pixels = decode_image(base64.b64decode(image["url"].partition(",")[2])).pixels
            if (pixels.shape[1], text) in served.broken:
                return JSONResponse({"error": {"message": "out of memory"}}, 500)
            with asking:
                ((answer,),) = mllm.answer([Asked(pixels, [text])])
            return answer_of(body, answer)
        finally:
            with lock:
                served.under_way -= 1

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    served.url = f"http://127.0.0.1:{port}/v1"
    try:
        yield served
    finally:
        server.should_exit = True
        thread.join()
