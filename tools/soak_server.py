"""Many requests to a real `teq-graph serve`, some of them hostile or abandoned: what they are answered, whether any is
stuck, what becomes of its memory, and how long its end takes under load.

    python tools/soak_server.py OUT [--requests 1000] [--clients 8]

OUT is an exported directory of a small model; without it, `models/stories260K` of $TEQ_GRAPH_DATA is exported.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

SECONDS = 120
"""After which a request is stuck."""
KEY = "soak"
SERVE = "from teq_graph.cli import main; main()"
CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}"
WORDS = ("Once", "upon", "a", "time", "there", "was", "the", "cat", "and", "big", "day")
# So few because a tokenizer remembers the last 10,000 texts that it has seen, some 40 MB of them.
PROMPTS = [" ".join(random.Random(index).choices(WORDS, k=1 + index % 40)) for index in range(100)]


@dataclasses.dataclass
class Result:
    """`answers` counts requests by kind and status; memory is resident, in bytes. After the signal that ends it, the
    server has answered everyone after `answered_seconds`; what follows is the interpreter's own end.
    """

    answers: collections.Counter[tuple[str, str]]
    stuck: int
    seconds: float
    memory_before: int
    memory_after: int
    answered_seconds: float
    ended_seconds: float
    exit_code: int
    errors: str

    def __str__(self) -> str:
        kinds = sorted({kind for kind, _ in self.answers})
        lines = [
            f"{kind:<12} "
            + ", ".join(f"{status}: {n}" for (other, status), n in sorted(self.answers.items()) if other == kind)
            for kind in kinds
        ]
        before, after = self.memory_before / 2**20, self.memory_after / 2**20
        lines += [
            f"{self.answers.total()} requests in {self.seconds:.1f} s, {self.stuck} stuck",
            f"memory       {before:.1f} MiB → {after:.1f} MiB",
            f"shutdown     with one running and 20 waiting: all answered after {self.answered_seconds:.2f} s, process "
            f"ended after {self.ended_seconds:.2f} s, exit code {self.exit_code}",
            f"stderr       {self.errors.strip() or 'nothing'}",
        ]
        return "\n".join(lines)


class Client:
    """Requests of every kind, each answered by its status or by what became of it."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model
        self.address = url.removeprefix("http://")
        self.headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        self.http = httpx.Client(timeout=SECONDS, limits=httpx.Limits(max_connections=None))

    def body(self, rng: random.Random, **fields: Any) -> dict[str, Any]:
        return {"model": self.model, "prompt": rng.choice(PROMPTS), "max_tokens": rng.randint(1, 24), **fields}

    def post(self, content: Any, path: str = "/v1/completions", **headers: str) -> str:
        content = json.dumps(content) if isinstance(content, dict) else content
        try:
            answer = self.http.post(self.url + path, content=content, headers={**self.headers, **headers})
        except httpx.TimeoutException:
            return "stuck"
        except httpx.TransportError:
            return "closed"
        return str(answer.status_code)

    def usual(self, rng: random.Random) -> str:
        fields = {"stream": rng.random() < 0.5}
        if rng.random() < 0.5:
            fields.update(temperature=rng.uniform(0.2, 1.5), top_p=rng.uniform(0.5, 1.0), seed=rng.randrange(99))  # type: ignore[arg-type]
        body = self.body(rng, **fields)
        kind = rng.random()
        if kind < 0.3:
            return self.post(
                {**body, "messages": [{"role": "user", "content": body.pop("prompt")}]}, "/v1/chat/completions"
            )
        if kind < 0.4:
            body["prompt"] = [body["prompt"], "The cat"]
        return self.post(body)

    def hostile(self, rng: random.Random) -> str:
        body = self.body(rng)
        cases: list[Callable[[], str]] = [
            lambda: self.post(b"{" * rng.randint(1, 9999)),
            lambda: self.post(os.urandom(200)),
            lambda: self.post(b'{"model":' + b"[" * 9999),
            lambda: self.post({**body, "prompt": rng.choice([5, {}, [None], [[]], [], [10**30], True, ["a", 1]])}),
            lambda: self.post({**body, "stop": rng.choice([["a"] * 5, 5, "", [""]])}),
            lambda: self.post({**body, "repetition_penalty": rng.choice([1e-308, 1e308, -1, 1e-3, 1e3])}),
            lambda: self.post({**body, "temperature": rng.choice([1e-320, 1e308, -1, "hot"])}),
            lambda: self.post({**body, "top_p": 5e-324, "presence_penalty": 2, "seed": 2**100}),
            lambda: self.post({**body, "max_tokens": rng.choice([10**9, 10**30, -1, 1.5, 0])}),
            lambda: self.post({**body, "prompt": "word " * 9000}),
            lambda: self.post(b" " * (9 * 2**20)),
            lambda: self.post({**body, "model": "other"}),
            lambda: self.post({**body, "tools": [{}]}),
            lambda: self.post({**body, "messages": [{"role": "user", "content": [{}]}]}, "/v1/chat/completions"),
            lambda: self.post(body, **{"Content-Type": "text/plain"}),
            lambda: self.post(body, Host="evil.example"),
            lambda: self.post(body, Origin="https://evil.example"),
            lambda: self.post(body, Authorization="Bearer other"),
            lambda: self.post(body, "/v1/nothing"),
            lambda: self.noise(rng),
        ]
        return rng.choice(cases)()

    def noise(self, rng: random.Random) -> str:
        """What is no HTTP."""
        with self.connection() as connection:
            connection.sendall(rng.randbytes(500) + b"\r\n\r\n")
            try:
                return connection.recv(100).decode("latin-1").split(" ")[1:2][0]
            except (OSError, IndexError):
                return "closed"

    def abandoned(self, rng: random.Random) -> str:
        """Left while the head or the body is sent, while it waits or runs, or after the first bytes of the answer."""
        content = json.dumps(self.body(rng, prompt="Once upon a time " * 80, max_tokens=200, stream=rng.random() < 0.7))
        request = self.request(content)
        when = rng.choice(["head", "body", "at once", "queue or prefill", "stream"])
        with self.connection() as connection:
            if when == "head":
                connection.sendall(request[:40])
            elif when == "body":
                connection.sendall(request[:-20])
            else:
                connection.sendall(request)
            if when == "stream":
                connection.recv(300)
            elif when == "queue or prefill":
                time.sleep(rng.uniform(0, 0.2))
        return f"left ({when})"

    def request(self, content: str) -> bytes:
        head = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        return (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self.address}\r\n{head}"
            f"Content-Length: {len(content)}\r\n\r\n{content}"
        ).encode()

    def connection(self) -> socket.socket:
        host, port = self.address.split(":")
        return socket.create_connection((host, int(port)), timeout=SECONDS)


def soak(directory: Path, requests: int = 1000, clients: int = 8, seed: int = 0) -> Result:
    """Send them, then end the server while one request runs and twenty wait."""
    command = [sys.executable, "-c", SERVE, "serve", str(directory), "--port", "0", "--threads", "1", "--grace", "0"]
    # The key in the environment, as its help advises.
    environment = {**os.environ, "TEQ_GRAPH_API_KEY": KEY}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"serving (.*) on (http://\S+)/v1", line)
            if found is None:
                errors.seek(0)
                raise RuntimeError(f"teq-graph serve: {errors.read()}")
            client = Client(found[2], found[1])
            with client.http:
                return _run(process, client, errors, requests, clients, seed)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _run(process: subprocess.Popen[str], client: Client, errors: Any, requests: int, clients: int, seed: int) -> Result:
    answers: collections.Counter[tuple[str, str]] = collections.Counter()

    def one(index: int) -> None:
        rng = random.Random(f"{seed} {index}")
        kind = "usual" if rng.random() < 0.9 else rng.choice(["hostile", "abandoned"])
        answers[kind, getattr(client, kind)(rng)] += 1

    with ThreadPoolExecutor(clients) as pool:
        # What is made once and kept: threads, arenas, the process of the chat template.
        list(pool.map(one, range(requests, requests + requests // 10)))
        _settle(client)
        answers.clear()
        before, began = _resident(process.pid), time.monotonic()
        list(pool.map(one, range(requests)))
        seconds = time.monotonic() - began
        _settle(client)
        after = _resident(process.pid)
    stuck = sum(count for (_, answer), count in answers.items() if answer == "stuck")
    answered, ended = _end(process, client)
    errors.seek(0)
    expected = ("Loading", "WARNING:  Invalid HTTP request received.")  # slow machines, and noise
    said = "".join(line for line in errors if not line.startswith(expected))
    return Result(answers, stuck, seconds, before, after, answered, ended, process.returncode, said)


def _settle(client: Client) -> None:
    """Wait until nothing runs any more; whoever was abandoned must have gone."""
    deadline = time.monotonic() + SECONDS
    while (health := client.http.get(f"{client.url}/health").json()) != {"status": "ok", "waiting": 0, "running": 0}:
        if time.monotonic() > deadline:
            raise RuntimeError(f"still there: {health}")
        time.sleep(0.05)


def _end(process: subprocess.Popen[str], client: Client) -> tuple[float, float]:
    """Seconds until everyone was answered and let go, and until the process was no more."""
    content = json.dumps(client.body(random.Random(0), prompt="Once upon a time " * 80, max_tokens=200))
    connections = [client.connection() for _ in range(21)]
    for connection in connections:
        connection.sendall(client.request(content))
    while client.http.get(f"{client.url}/health").json()["running"] == 0:
        time.sleep(0.01)
    for connection in connections[1::2]:
        connection.close()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    for connection in connections[::2]:
        with connection:
            while connection.recv(4096):
                pass
    answered = time.monotonic() - began
    process.wait(SECONDS)
    return answered, time.monotonic() - began


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def _export(directory: Path) -> None:
    import teq_graph
    from teq_graph.loading import load_model

    data = Path(os.environ.get("TEQ_GRAPH_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    loaded = load_model(data / "models" / "stories260K")
    teq_graph.compile(loaded.model, tokenizer=loaded.tokenizer, training=None).export_onnx(directory)
    (directory / "chat_template.jinja").write_text(CHAT, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, metavar="OUT")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = options.directory or Path(folder) / "stories"
        if options.directory is None:
            _export(directory)
        result = soak(directory, options.requests, options.clients, options.seed)
    print(result)
    sys.exit(bool(result.stuck or result.errors))


if __name__ == "__main__":
    main()
