"""A server in a thread, and what makes a decoder slow enough to look at it while it runs."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from teq_graph.onnx.runtime import OnnxDecoder
from teq_graph.serving.app import make_app
from teq_graph.serving.completions import Limits
from teq_graph.serving.guards import Access
from teq_graph.serving.server import Server
from teq_graph.serving.sockets import listen
from teq_graph.serving.worker import Worker

PROMPT = "Once upon a time"
JSON = {"Content-Type": "application/json"}


class Served:
    """A server in a thread of its own."""

    def __init__(
        self,
        decoder: OnnxDecoder,
        queue: int = 16,
        limits: Limits | None = None,
        access: Access | None = None,
        grace: int = 5,
    ) -> None:
        listening = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.worker = Worker(queue)
        self.app = make_app(decoder, self.worker, "stories", limits, access)
        self._server = Server(self.app, self.worker, grace)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def begin_to_close(self) -> None:
        self._server.should_exit = True

    def close(self) -> float:
        """Returns the seconds that it took."""
        began = time.monotonic()
        self.begin_to_close()
        self._thread.join(30)
        assert not self._thread.is_alive()
        self.client.close()
        return time.monotonic() - began

    def post(self, content: Any, path: str = "/v1/completions", timeout: float = 60, **headers: str) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", content=content, headers={**JSON, **headers}, timeout=timeout)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=60)


def send(server: Served, content: str) -> socket.socket:
    """A request whose client decides when to leave."""
    address = server.url.removeprefix("http://")
    host, port = address.split(":")
    client = socket.create_connection((host, int(port)), timeout=60)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
    return client


class Slow:
    """A decoder that takes its time for each step, until `go` is set; `steps` counts them."""

    def __init__(self, decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.05) -> None:
        self.go = threading.Event()
        self.steps = 0
        step = type(decoder._decoding)._step

        def slow(inner: Any, *arguments: Any, **options: Any) -> Any:
            self.go.wait(seconds)
            self.steps += 1
            return step(inner, *arguments, **options)

        monkeypatch.setattr(type(decoder._decoding), "_step", slow)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def body(**fields: Any) -> str:
    return json.dumps({"model": "stories", "prompt": PROMPT, "max_tokens": 4, **fields})
