"""One thread that generates, one prompt after the other; the others wait in a queue of bounded length."""

from __future__ import annotations

import asyncio
import collections
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence

from teq_graph.errors import InputError, TeqGraphError
from teq_graph.onnx.runtime import Stream
from teq_graph.serving.protocol import ApiError

log = logging.getLogger("teq_graph.serving")


class Job:
    """The generation after one prompt, waited for in an event loop.

    `ended` is what its stream looks at between the steps of the model. `began` and `first` are when it began to run
    and when its first piece was there, on the clock of `time.monotonic`.
    """

    def __init__(
        self, stream: Stream[str], prompt_tokens: int, ended: threading.Event, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.stream = stream
        self.prompt_tokens = prompt_tokens
        self.began: float | None = None
        self.first: float | None = None
        self._ended = ended
        self._loop = loop
        # As long as the context at most: a client that reads slowly holds no more.
        self._pieces: asyncio.Queue[str | ApiError | None] = asyncio.Queue()

    @property
    def finish_reason(self) -> str:
        """OpenAI's, of one that came to its end; "length" also where its time was over."""
        return self.stream.finish_reason or "length"

    async def pieces(self) -> AsyncIterator[str]:
        """Pieces of text as they come; raises ApiError for what ended them otherwise."""
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, ApiError):
                raise piece
            yield piece

    def run(self) -> None:
        """Generate; in the worker's thread. Whatever goes wrong is the answer to this request alone."""
        self.began = time.monotonic()
        try:
            for piece in self.stream:
                self.first = self.first or time.monotonic()
                self._put(piece)
            self._put(None)
        except BaseException as error:
            self._put(failure(error))

    def cancel(self, error: ApiError) -> None:
        """Answer with `error` at once, and end before the model's next step."""
        self._ended.set()
        self._put(error)

    def finish(self) -> None:
        """End before the model's next step, with the text that there is."""
        self._ended.set()

    def _put(self, piece: str | ApiError | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed, and nobody waits
            self._ended.set()


class Worker:
    """Runs jobs in the order of their coming; at most `limit` wait."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: Job | None = None
        self._closing = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many run: 1 or 0."""
        return int(self._running is not None)

    def check(self, count: int = 0) -> None:
        """Raises ApiError 429 where `count` more do not find room, 503 where none will ever run again."""
        if self._closing:
            raise ApiError(503, "the server is shutting down", "shutting_down")
        if not self._thread.is_alive():
            raise ApiError(503, "the thread that generates has ended: the server must be started again", "dead")
        if count and len(self._waiting) + count > self.limit:
            raise ApiError(429, f"{self.limit} prompts may wait, {self.waiting} do: try again later", "queue_full")

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of one request, all or none; raises as `check`."""
        with self._change:
            self.check(len(jobs))
            self._waiting.extend(jobs)
            self._change.notify()

    def cancel(self, jobs: Sequence[Job], error: ApiError) -> None:
        """Nobody waits for these any more, or may: those that wait leave the queue, the one that runs ends."""
        with self._change:
            for job in jobs:
                job.cancel(error)
                if job in self._waiting:
                    self._waiting.remove(job)

    def close(self) -> None:
        """Refuse what waits and what comes; what runs goes on."""
        with self._change:
            self._closing = True
            self._change.notify()
        self.cancel(list(self._waiting), ApiError(503, "the server is shutting down", "shutting_down"))

    def end(self) -> None:
        """Also end what runs; returns at once."""
        self.close()
        running = self._running
        if running is not None:
            running.cancel(ApiError(503, "the server ended this generation", "cancelled"))

    def stop(self) -> None:
        """Also end what runs; returns when the thread has ended, which the model's present step may hold up."""
        self.end()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                job = self._running = self._waiting.popleft()
            try:
                job.run()
            except BaseException:  # not even the answer could be given
                log.exception("a generation failed")
            finally:
                self._running = None


def failure(error: BaseException) -> ApiError:
    """The answer to a request that ended so; what is no refusal of ours is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, MemoryError):
        return ApiError(503, "there is not enough memory for this request", "out_of_memory")
    if isinstance(error, TeqGraphError):
        return ApiError(500, str(error))
    log.error("a request failed", exc_info=error)
    return ApiError(500, f"{type(error).__name__} in the server, whose log says more")
