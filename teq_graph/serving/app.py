"""The routes of OpenAI's API over one exported decoder."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from teq_graph.errors import InputError
from teq_graph.onnx.runtime import OnnxDecoder, Stream
from teq_graph.serving import protocol
from teq_graph.serving.protocol import ApiError, ChatRequest, TextRequest
from teq_graph.serving.worker import Job, Worker

LARGEST_BODY = 8 * 2**20
"""Bytes: many times the text of any context."""


def make_app(decoder: OnnxDecoder, worker: Worker, model: str) -> FastAPI:
    """Serves `decoder` under the name `model`."""
    app = FastAPI(title="teq_graph", openapi_url=None)
    started = int(time.time())
    described = {"id": model, "object": "model", "created": started, "owned_by": "teq_graph"}
    completions = Completions(decoder, worker, model)

    @app.get("/health")
    def health() -> dict[str, str]:
        if worker.is_closing:
            raise ApiError(503, "the server is shutting down", "shutting_down")
        return {"status": "ok"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [described]}

    @app.get("/v1/models/{name:path}")
    def one_model(name: str) -> dict[str, Any]:
        completions.check_model(name)
        return described

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = protocol.parse(ChatRequest, await _body(request))
        messages = [message.plain() for message in asked.messages]
        return await completions.answer(request, asked, lambda: decoder.encode_chat(messages), CHAT)

    @app.post("/v1/completions")
    async def text(request: Request) -> Response:
        asked = protocol.parse(TextRequest, await _body(request))
        return await completions.answer(request, asked, lambda: asked.tokens(decoder.encode), TEXT)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.content, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).content, error.status_code, error.headers)

    return app


@dataclasses.dataclass(frozen=True)
class Kind:
    """How one of the two APIs words its answers: their names, a whole text, the first part, a part, the last part."""

    prefix: str
    whole: str
    part: str
    choice: Callable[[str], dict[str, Any]]
    first: dict[str, Any] | None
    delta: Callable[[str], dict[str, Any]]
    last: dict[str, Any]


CHAT = Kind(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    {"delta": {"role": "assistant", "content": ""}},
    lambda text: {"delta": {"content": text}},
    {"delta": {}},
)
TEXT = Kind(
    "cmpl",
    "text_completion",
    "text_completion",
    lambda text: {"text": text},
    None,
    lambda text: {"text": text},
    {"text": ""},
)


class Completions:
    """What a request becomes, whole or in parts."""

    def __init__(self, decoder: OnnxDecoder, worker: Worker, model: str) -> None:
        self.decoder = decoder
        self.worker = worker
        self.model = model
        # Tokenizers are not made for several threads at once.
        self._preparing = threading.Lock()

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for another model than the one that is served."""
        if name != self.model:
            raise ApiError(404, f"model {name!r}: this server has {self.model!r}", "model_not_found", "model")

    async def answer(
        self, request: Request, asked: protocol.Request, encode: Callable[[], list[int]], kind: Kind
    ) -> Response:
        """The response to a request. Raises ApiError for what is refused."""
        self.check_model(asked.model)
        prompt, stream = await run_in_threadpool(self._prepare, encode, asked.options())
        job = Job(stream)
        self.worker.submit(job)
        head = {"id": f"{kind.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model}
        if asked.stream:
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            parts = self._parts(job, len(prompt), head, kind, with_usage)
            return StreamingResponse(parts, media_type="text/event-stream")
        watching = asyncio.create_task(_cancel_without_client(request, job))
        try:
            text = "".join([piece async for piece in job.pieces()])
        finally:
            watching.cancel()
            job.cancel()
        choice = {"index": 0, **kind.choice(text), "logprobs": None, "finish_reason": stream.finish_reason}
        usage = _usage(len(prompt), stream)
        return JSONResponse({**head, "object": kind.whole, "choices": [choice], "usage": usage})

    def _prepare(self, encode: Callable[[], list[int]], options: dict[str, Any]) -> tuple[list[int], Stream[str]]:
        if not self.decoder.generation_options.samples and not options.keys().isdisjoint(("temperature", "top_p")):
            # Not transformers' 50, of which OpenAI's clients do not know.
            options.setdefault("top_k", 0)
        prompt: list[int] = []
        try:
            with self._preparing:
                prompt = encode()
                return prompt, self.decoder.stream(prompt, text=True, **options)
        except InputError as error:
            limit = self.decoder.shape.max_positions
            is_long = limit is not None and len(prompt) > limit
            raise ApiError(400, str(error), "context_length_exceeded" if is_long else None) from error

    async def _parts(
        self, job: Job, prompt: int, head: Mapping[str, Any], kind: Kind, with_usage: bool
    ) -> AsyncIterator[str]:
        def event(content: dict[str, Any] | None, finish_reason: str | None = None, **fields: Any) -> str:
            choice = {"index": 0, **(content or {}), "logprobs": None, "finish_reason": finish_reason}
            chunk = {**head, "object": kind.part, "choices": [] if content is None else [choice], **fields}
            return f"data: {json.dumps(chunk)}\n\n"

        try:
            if kind.first is not None:
                yield event(kind.first)
            async for piece in job.pieces():
                yield event(kind.delta(piece))
        except ApiError as error:
            yield f"data: {json.dumps(error.content)}\n\n"
            return
        finally:
            job.cancel()
        yield event(kind.last, job.stream.finish_reason)
        if with_usage:
            yield event(None, usage=_usage(prompt, job.stream))
        yield "data: [DONE]\n\n"


def _usage(prompt: int, stream: Stream[str]) -> dict[str, int]:
    new = len(stream.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise ApiError(413, f"body: accepted are up to {LARGEST_BODY} bytes", "body_too_large")
    return bytes(body)


async def _cancel_without_client(request: Request, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()
