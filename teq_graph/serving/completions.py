"""What becomes of a request for text: whole or in parts, after one prompt or several."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from teq_graph.errors import InputError
from teq_graph.onnx.runtime import OnnxDecoder
from teq_graph.serving import protocol
from teq_graph.serving.metrics import GONE, Metrics
from teq_graph.serving.protocol import ApiError
from teq_graph.serving.worker import Job, Worker, failure

Encode = Callable[[], list[int]]
"""Makes the token ids of a prompt."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one request: its new tokens (of each prompt), and the seconds that it takes from its arrival.

    What was generated until then is the answer, with "length" for a reason; 504 where there is nothing yet.
    """

    max_tokens: int = 16384
    seconds: float = 600


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
    """Answers requests with what a decoder generates."""

    def __init__(self, decoder: OnnxDecoder, worker: Worker, model: str, limits: Limits, metrics: Metrics) -> None:
        self.decoder = decoder
        self.worker = worker
        self.model = model
        self.limits = limits
        self.metrics = metrics
        # One thread: tokenizers are not made for several at once, and memory that each of them frees stays its own.
        self._preparing = ThreadPoolExecutor(1, "preparing")

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for another model than the one that is served."""
        if name != self.model:
            raise ApiError(404, f"model {name!r}: this server has {self.model!r}", "model_not_found", "model")

    async def answer(
        self, request: Request, asked: protocol.Request, prompts: Sequence[Encode], kind: Kind, arrived: float
    ) -> Response:
        """The response to a request that arrived then. Raises ApiError for what is refused.

        Also where it is asked for in parts, the first of them is waited for, so that an error before has its status.
        """
        self.check_model(asked.model)
        if len(prompts) > self.worker.limit:
            raise ApiError(
                400, f"prompt: a list of {len(prompts)}; accepted are up to {self.worker.limit}", None, "prompt"
            )
        self.worker.check(len(prompts))  # before the work of tokenizing
        loop = asyncio.get_running_loop()
        jobs = await loop.run_in_executor(self._preparing, self._prepare, prompts, asked, loop)
        self.worker.submit(jobs)
        leaving = asyncio.create_task(self._cancel_without_client(request, jobs))
        time_left = self.limits.seconds - (time.monotonic() - arrived)
        timer = loop.call_later(max(0.0, time_left), self._time_is_over, jobs)

        def ended() -> None:
            leaving.cancel()
            timer.cancel()
            self.worker.cancel(jobs, ApiError(GONE, "the client left"))
            self.metrics.ended(jobs, arrived)

        head = {"id": f"{kind.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model}
        pieces = _pieces(jobs)
        with contextlib.ExitStack() as ending:
            ending.callback(ended)
            if asked.stream:
                first = await anext(pieces)
                with_usage = asked.stream_options is not None and asked.stream_options.include_usage
                parts = _parts(first, pieces, jobs, head, kind, with_usage, ending.pop_all())
                return StreamingResponse(parts, media_type="text/event-stream")
            texts = [""] * len(jobs)
            async for index, piece in pieces:
                texts[index] += piece or ""
        choices = [
            {"index": index, **kind.choice(text), "logprobs": None, "finish_reason": job.finish_reason}
            for index, (text, job) in enumerate(zip(texts, jobs, strict=True))
        ]
        return JSONResponse({**head, "object": kind.whole, "choices": choices, "usage": _usage(jobs)})

    def _prepare(
        self, prompts: Sequence[Encode], asked: protocol.Request, loop: asyncio.AbstractEventLoop
    ) -> list[Job]:
        """The generations of a request; their arguments are checked."""
        options = asked.options()
        count, most = options.pop("max_new_tokens", None), self.limits.max_tokens
        default = self.decoder.generation_options
        if count is not None and count > most:
            _, name = asked.named("max_new_tokens=")
            raise ApiError(400, f"{name}={count}: accepted by this server are up to {most}", param=name)
        if not default.samples and not options.keys().isdisjoint(("temperature", "top_p")):
            # Not transformers' 50, of which OpenAI's clients do not know.
            options.setdefault("top_k", 0)
        jobs = []
        for encode in prompts:
            tokens: list[int] = []
            ended = threading.Event()
            try:
                tokens = encode()
                new = min(default.new_tokens(len(tokens)), most) if count is None else count
                stream = self.decoder.stream(tokens, new, text=True, cancelled=ended.is_set, **options)
            except InputError as error:
                message, name = asked.named(str(error))
                limit = self.decoder.shape.max_positions
                is_long = limit is not None and len(tokens) > limit
                raise ApiError(400, message, "context_length_exceeded" if is_long else None, name) from error
            except BaseException as error:  # a tokenizer's panics are no Exception
                raise failure(error) from error
            jobs.append(Job(stream, len(tokens), ended, loop))
        return jobs

    def _time_is_over(self, jobs: Sequence[Job]) -> None:
        late = f"no text within {self.limits.seconds:g} s, which is this server's limit"
        if jobs[0].first is None:
            self.worker.cancel(jobs, ApiError(504, late, "timeout"))
        for job in jobs:
            job.finish()

    async def _cancel_without_client(self, request: Request, jobs: Sequence[Job]) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.worker.cancel(jobs, ApiError(GONE, "the client left"))


async def _pieces(jobs: Sequence[Job]) -> AsyncIterator[tuple[int, str | None]]:
    """(number of the prompt, text), and None where that prompt's text is complete; they run one after the other."""
    for index, job in enumerate(jobs):
        async for piece in job.pieces():
            yield index, piece
        yield index, None


async def _parts(
    first: tuple[int, str | None],
    rest: AsyncIterator[tuple[int, str | None]],
    jobs: Sequence[Job],
    head: Mapping[str, Any],
    kind: Kind,
    with_usage: bool,
    ending: contextlib.ExitStack,
) -> AsyncIterator[str]:
    """The events of an answer in parts; `ending` is closed with the last of them."""

    def event(index: int, content: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}
        return _event({**head, "object": kind.part, "choices": [choice]})

    async def pieces() -> AsyncIterator[tuple[int, str | None]]:
        yield first
        async for piece in rest:
            yield piece

    with ending:
        begun = -1
        try:
            async for index, piece in pieces():
                if index > begun and kind.first is not None:
                    yield event(index, kind.first)
                begun = index
                if piece is None:
                    yield event(index, kind.last, jobs[index].finish_reason)
                else:
                    yield event(index, kind.delta(piece))
        except ApiError as error:
            yield _event(error.content)
            return
        if with_usage:
            yield _event({**head, "object": kind.part, "choices": [], "usage": _usage(jobs)})
        yield "data: [DONE]\n\n"


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _usage(jobs: Sequence[Job]) -> dict[str, int]:
    prompt, new = sum(job.prompt_tokens for job in jobs), sum(len(job.stream.tokens) for job in jobs)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
