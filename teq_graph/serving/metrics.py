"""What a server counts and measures, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teq_graph.serving.worker import Job, Worker

GONE = 499
"""Status, as nginx has it, of a request whose client left before the answer."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """Of one app, in a registry of its own."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"teq_graph_{name}_seconds", text, registry=self.registry, buckets=_SECONDS)

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"teq_graph_{name}", text, labels, registry=self.registry)

        ProcessCollector(registry=self.registry)
        self._requests = counter("requests", "Requests by route and status; 499: the client left.", ("route", "status"))
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were begun.")
        self._new_tokens = counter("generated_tokens", "Tokens generated.")
        self._queue = histogram("queue", "From the arrival of a request until its generation began.")
        self._first = histogram("first_token", "From the arrival of a request until its first piece of text.")
        self._whole = histogram("request", "From the arrival of a request until its answer was complete.")
        for name, text, value in (
            ("requests_waiting", "Prompts that wait for their generation.", lambda: worker.waiting),
            ("requests_running", "Generations that run.", lambda: worker.running),
        ):
            Gauge(f"teq_graph_{name}", text, registry=self.registry).set_function(value)

    def ended(self, jobs: Sequence[Job], arrived: float) -> None:
        """Count the generations of one request that arrived then, on the clock of `time.monotonic`."""
        for job in jobs:
            if job.began is not None:
                self._queue.observe(job.began - arrived)
                self._prompt_tokens.inc(job.prompt_tokens)
            if job.first is not None:
                self._first.observe(job.first - arrived)
            self._new_tokens.inc(len(job.stream.tokens))
        self._whole.observe(time.monotonic() - arrived)

    def answered(self, route: str, status: int) -> None:
        """Count one request of any kind."""
        self._requests.labels(route, str(status)).inc()

    def response(self) -> Response:
        """All of them, as Prometheus reads it."""
        return Response(generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


class Counted:
    """Counts the requests of `app`: by the route's pattern, "none" for those that none was reached by."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = GONE

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            self.metrics.answered(getattr(scope.get("route"), "path", "none"), status)
