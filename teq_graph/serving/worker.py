"""One thread that generates, one request after the other; the others wait in a queue of bounded length."""

from __future__ import annotations

import asyncio
import collections
import threading
from collections.abc import AsyncIterator

from teq_graph.errors import TeqGraphError
from teq_graph.onnx.runtime import Stream
from teq_graph.serving.protocol import ApiError


class Job:
    """A generation that is waited for in an event loop."""

    def __init__(self, stream: Stream[str]) -> None:
        self.stream = stream
        self._cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        # As long as the context at most: a client that reads slowly holds no more.
        self._pieces: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    def cancel(self) -> None:
        """Nobody waits for it any more; it ends before its next token."""
        self._cancelled.set()

    async def pieces(self) -> AsyncIterator[str]:
        """Pieces of text as they come; raises what ended them otherwise."""
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def run(self) -> None:
        """Generate; in the worker's thread."""
        try:
            while not self._cancelled.is_set():
                piece = next(self.stream, None)
                self._put(piece)
                if piece is None:
                    return
        except TeqGraphError as error:
            self._put(ApiError(500, str(error)))
        except Exception as error:
            self._put(ApiError(500, f"{type(error).__name__} while generating"))
            raise
        self._put(ApiError(503, "the server ended this generation", "cancelled"))

    def refuse(self, error: ApiError) -> None:
        """Answer with an error before it has begun."""
        self._put(error)

    def _put(self, piece: str | Exception | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed, and nobody waits
            self.cancel()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()


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
    def is_closing(self) -> bool:
        return self._closing

    def submit(self, job: Job) -> None:
        """Queue a job. Raises ApiError 429 where too many wait, 503 where the server is shutting down."""
        with self._change:
            if self._closing:
                raise _closing()
            # Those whose clients have gone take no place.
            self._waiting = collections.deque(other for other in self._waiting if not other.is_cancelled)
            if len(self._waiting) >= self.limit:
                raise ApiError(429, f"{self.limit} requests are waiting already: try again later", "queue_full")
            self._waiting.append(job)
            self._change.notify()

    def close(self) -> None:
        """Refuse what waits and what comes; what runs goes on."""
        with self._change:
            self._closing = True
            while self._waiting:
                self._waiting.popleft().refuse(_closing())
            self._change.notify()

    def stop(self) -> None:
        """Also end what runs; returns when the thread has ended."""
        self.close()
        running = self._running
        if running is not None:
            running.cancel()
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
            finally:
                self._running = None


def _closing() -> ApiError:
    return ApiError(503, "the server is shutting down", "shutting_down")
