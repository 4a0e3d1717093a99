"""The routes of OpenAI's API over one exported decoder."""

from __future__ import annotations

import asyncio
import functools
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from teq_graph.onnx.runtime import OnnxDecoder
from teq_graph.serving import protocol
from teq_graph.serving.completions import CHAT, TEXT, Completions, Limits
from teq_graph.serving.guards import Access, Guard
from teq_graph.serving.metrics import GONE, Counted, Metrics
from teq_graph.serving.protocol import ApiError, ChatRequest, TextRequest
from teq_graph.serving.worker import Worker

LARGEST_BODY = 8 * 2**20
"""Bytes: many times the text of any context."""


def make_app(
    decoder: OnnxDecoder, worker: Worker, model: str, limits: Limits | None = None, access: Access | None = None
) -> FastAPI:
    """Serves `decoder` under the name `model`; to this machine alone, unless `access` says otherwise."""
    limits, access = limits or Limits(), access or Access()
    app = FastAPI(title="teq_graph", openapi_url=None)
    described = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "teq_graph"}
    metrics = Metrics(worker)
    completions = Completions(decoder, worker, model, limits, metrics)

    # None of these waits for a thread.
    @app.get("/health")
    async def health() -> dict[str, Any]:
        worker.check()
        return {"status": "ok", "waiting": worker.waiting, "running": worker.running}

    @app.get("/metrics")
    async def measured() -> Response:
        return metrics.response()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        completions.check_model(name)
        return described

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        arrived = time.monotonic()
        asked = protocol.parse(ChatRequest, await _body(request, limits.seconds))
        messages = [message.plain() for message in asked.messages]
        return await completions.answer(
            request, asked, [functools.partial(decoder.encode_chat, messages)], CHAT, arrived
        )

    @app.post("/v1/completions")
    async def text(request: Request) -> Response:
        arrived = time.monotonic()
        asked = protocol.parse(TextRequest, await _body(request, limits.seconds))
        return await completions.answer(request, asked, asked.prompts(decoder.encode), TEXT, arrived)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.content, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).content, error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=GONE)  # to nobody

    # The last is the first to see a request.
    if access.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=access.origins, allow_methods=("GET", "POST"), allow_headers=("*",)
        )
    app.add_middleware(Guard, access=access)
    app.add_middleware(Counted, metrics=metrics)
    return app


async def _body(request: Request, seconds: float) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > LARGEST_BODY:
                    raise ApiError(413, f"body: accepted are up to {LARGEST_BODY} bytes", "body_too_large")
    except TimeoutError:
        raise ApiError(408, f"body: not complete after {seconds:g} s", "timeout") from None
    return bytes(body)
