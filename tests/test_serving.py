"""The OpenAI API over an exported model, with OpenAI's own client."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.command_line import start
from support.serving import JSON, PROMPT, Served, Slow, body, wait_until

import teq_graph
from teq_graph.cli import opening, run
from teq_graph.loading import load_model
from teq_graph.onnx.runtime import OnnxDecoder
from teq_graph.serving import app as serving_app

CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}"
# a shell starts background jobs with SIGINT ignored, which children inherit
SERVE = """
import signal
from teq_graph.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


@pytest.fixture(scope="module")
def directory(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K, with a chat template that only joins."""
    loaded = load_model(data_dir / "models" / "stories260K")
    path = tmp_path_factory.mktemp("served") / "stories"
    compiled = teq_graph.compile(loaded.model, tokenizer=loaded.tokenizer, training=None)
    compiled.export_onnx(path)
    (path / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def decoder(directory: Path) -> OnnxDecoder:
    return OnnxDecoder.load(directory, threads=1)


@pytest.fixture(scope="module")
def served(decoder: OnnxDecoder) -> Iterator[Served]:
    server = Served(decoder, queue=16)
    yield server
    server.close()


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return served.client


# -------------------------------------------------------------------------------------------------------- answers


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stories"]
    assert client.models.retrieve("stories").owned_by == "teq_graph"
    with pytest.raises(openai.NotFoundError, match="model 'other': this server has 'stories'"):
        client.models.retrieve("other")


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_completions_are_the_runtime_s(client: openai.OpenAI, decoder: OnnxDecoder, sampling: dict[str, Any]) -> None:
    options = {"top_k": 0, **sampling} if sampling else {}
    expected = decoder.generate(PROMPT, 24, **options)
    asked: dict[str, Any] = dict(model="stories", max_tokens=24, **sampling)
    whole = client.completions.create(prompt=PROMPT, **asked)
    tokens = decoder.encode(PROMPT)
    assert (whole.choices[0].text, whole.choices[0].finish_reason, whole.object) == (
        expected,
        "length",
        "text_completion",
    )
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(tokens), 24)
    assert client.completions.create(prompt=tokens, **asked).choices[0].text == expected
    assert client.completions.create(prompt=[PROMPT], **asked).choices[0].text == expected
    parts = list(client.completions.create(prompt=PROMPT, stream=True, **asked))
    assert "".join(part.choices[0].text for part in parts) == expected
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert len(parts) > 10

    messages: Any = [{"role": "system", "content": "Once upon"}, {"role": "user", "content": "a time"}]
    ids = decoder.encode_chat(messages)
    expected = "".join(decoder.stream(ids, 24, text=True, **options))
    chat = client.chat.completions.create(messages=messages, **asked)
    assert (chat.choices[0].message.content, chat.choices[0].message.role) == (expected, "assistant")
    assert chat.usage is not None and chat.usage.total_tokens == len(ids) + 24
    chunks = list(
        client.chat.completions.create(messages=messages, stream=True, stream_options={"include_usage": True}, **asked)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[-2].choices[0].finish_reason == "length"
    assert (chunks[-1].choices, chunks[-1].usage) == ([], chat.usage)


def test_options(client: openai.OpenAI, decoder: OnnxDecoder) -> None:
    free = decoder.generate(PROMPT, 40)
    stop = free[20:26]
    stopped = client.completions.create(model="stories", prompt=PROMPT, max_tokens=40, stop=[stop, "never there"])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (free[: free.index(stop)], "stop")
    parts = [{"type": "text", "text": "Once upon"}, {"type": "text", "text": " a time"}]
    reply = client.chat.completions.create(
        model="stories",
        messages=[{"role": "user", "content": parts}],  # type: ignore[list-item, misc]
        max_completion_tokens=9,
        presence_penalty=0.5,
        extra_body={"repetition_penalty": 1.2, "user": "someone", "logprobs": False, "n": 1},
    )
    chat = decoder.encode_chat("Once upon a time")
    expected = decoder.stream(chat, 9, text=True, repetition_penalty=1.2, presence_penalty=0.5)
    assert reply.choices[0].message.content == "".join(expected)


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("path", "content", "status", "told"),
    [
        ("completions", "{", 400, "body: Invalid JSON"),
        ("completions", "[1]", 400, "body: [1]; accepted is an object"),
        ("completions", b"\xff", 400, "body: Invalid JSON"),
        ("completions", json.dumps({"model": "stories"}), 400, "prompt: missing; accepted is a string, a list of"),
        ("completions", body(temperature="0.5"), 400, "temperature='0.5'; accepted is a number"),
        ("completions", body(temperature=-1), 400, "temperature=-1.0: accepted are"),
        ("completions", body(max_tokens=1.5), 400, "max_tokens=1.5; accepted is an integer"),
        ("completions", body(max_tokens=-1), 400, "max_tokens=-1: accepted are"),
        ("completions", body(n=2), 400, "n=2: accepted is 1"),
        ("completions", body(logit_bias={"5": 1}), 400, "logit_bias="),
        (
            "completions",
            body(stop=["a"] * 5),
            400,
            "stop=['a', 'a', 'a', 'a', 'a']; accepted is a string, or a list of up to 4",
        ),
        ("completions", body(stop=""), 400, "stop='': accepted"),
        ("completions", body(prompt=["a", 5]), 400, "prompt=['a', 5]; accepted is a string"),
        ("completions", body(prompt=[[5], []]), 400, "prompt: it is empty"),
        ("completions", body(prompt=["a"] * 17), 400, "prompt: a list of 17; accepted are up to 16"),
        ("completions", body(prompt=[]), 400, "prompt: it is empty; accepted is at least one token"),
        ("completions", body(prompt=[5, 512]), 400, "token 512: accepted are 0 to 511"),
        ("completions", body(prompt=[5] * 513), 400, "prompt of 513 tokens"),
        ("completions", body(model="other"), 404, "model 'other'"),
        ("chat/completions", body(messages=[]), 400, "messages=[]; accepted is a list of at least one"),
        (
            "chat/completions",
            body(messages=[{"role": "user"}]),
            400,
            "messages.0.content: missing; accepted is a string, or a list",
        ),
        (
            "chat/completions",
            body(messages=[{"role": "user", "content": "x"}], tools=[{}]),
            400,
            "tools=[{}]: accepted",
        ),
        ("nothing", "{}", 404, "POST /v1/nothing: Not Found"),
        ("models", "{}", 405, "POST /v1/models: Method Not Allowed"),
    ],
)
def test_refusals(served: Served, path: str, content: bytes | str, status: int, told: str) -> None:
    streamed = content.replace('{"model', '{"stream": true, "model') if isinstance(content, str) else content
    for part in (content, streamed):
        answer = served.post(part, f"/v1/{path}")
        error = answer.json()["error"]
        assert answer.status_code == status
        assert told in error["message"] and "\n" not in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
    assert served.post(body()).status_code == 200


def test_prompts_that_are_too_long(served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="stories", prompt="word " * 2000)
    assert caught.value.code == "context_length_exceeded"
    monkeypatch.setattr(serving_app, "LARGEST_BODY", 1000)
    assert served.post(body(prompt="x" * 2000)).status_code == 413
    assert served.post(iter([b"x" * 600, b"x" * 600])).status_code == 413  # type: ignore[arg-type]
    assert served.post(body()).status_code == 200


def test_a_model_without_chat_template(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    server = Served(OnnxDecoder.load(tmp_path / "plain", threads=1), queue=1)
    try:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            server.client.chat.completions.create(model="stories", messages=[{"role": "user", "content": "x"}])
    finally:
        server.close()


# ----------------------------------------------------------------------------------------------------------- load


def test_a_client_that_leaves_stops_its_generation(
    served: Served, decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(decoder, monkeypatch)
    for fields in ({"stream": True}, {}):
        before = slow.steps
        with httpx.Client() as client:
            if fields:
                content = body(max_tokens=400, **fields)
                with client.stream(
                    "POST", f"{served.url}/v1/completions", content=content, headers=JSON, timeout=60
                ) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{served.url}/v1/completions", content=body(max_tokens=400), headers=JSON, timeout=0.5)
        wait_until(lambda: not served.worker.running)
        assert slow.steps - before < 60
    slow.go.set()
    assert served.post(body()).status_code == 200


@pytest.fixture
def busy(
    decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Served, Slow, Future[httpx.Response]]]:
    """A server with one place in its queue, slow, with a generation that runs, which must end well."""
    server, slow = Served(decoder, queue=1), Slow(decoder, monkeypatch)
    try:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.post, body(max_tokens=60))
            wait_until(lambda: server.worker.running == 1)
            yield server, slow, running
            slow.go.set()
            assert running.result().status_code == 200
    finally:
        server.close()


def test_those_who_left_while_waiting_take_no_place(busy: tuple[Served, Slow, Future[httpx.Response]]) -> None:
    server, _, _ = busy
    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", content=body(), headers=JSON, timeout=0.3)


def test_200_requests_at_once(served: Served, decoder: OnnxDecoder) -> None:
    expected = decoder.generate(PROMPT, 4)
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda _: served.post(body()), range(200)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {200, 429} and statuses.count(200) >= 17
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["text"] == expected
        else:
            assert answer.headers["retry-after"] and answer.json()["error"]["code"] == "queue_full"
    assert served.post(body()).json()["choices"][0]["text"] == expected


def test_a_full_queue_is_told(busy: tuple[Served, Slow, Future[httpx.Response]]) -> None:
    server, slow, _ = busy
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(server.post, body())
        wait_until(lambda: server.worker.waiting == 1)
        with pytest.raises(openai.RateLimitError, match="1 prompts may wait, 1 do"):
            server.client.completions.create(model="stories", prompt=PROMPT)
        slow.go.set()
        assert second.result().status_code == 200


def test_errors_while_generating(served: Served, decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise teq_graph.errors.NumericsError("logits of NaN")

    with monkeypatch.context() as patch:
        patch.setattr(type(decoder._decoding), "_step", fail)
        answer = served.post(body())
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "logits of NaN")
        streamed = served.post(body(stream=True))
        assert (streamed.status_code, streamed.json()) == (500, answer.json())
    assert served.post(body()).status_code == 200


# ---------------------------------------------------------------------------------------------------- the process


def test_shutting_down(decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Served(decoder, queue=4)
    slow = Slow(decoder, monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.post, body(max_tokens=20))
        wait_until(lambda: server.worker.running == 1)
        waiting = pool.submit(server.post, body())
        wait_until(lambda: server.worker.waiting == 1)
        server.begin_to_close()
        refused = waiting.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        slow.go.set()
        assert running.result().json()["usage"]["completion_tokens"] == 20
    server.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_a_signal(directory: Path, number: signal.Signals) -> None:
    process = start(SERVE, "serve", directory, "--port", "0", "--threads", "1")
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving stories on http://127.0.0.1:") and line.endswith("/v1\n")
        url = line.split()[-1]
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        assert client.completions.create(model="stories", prompt=PROMPT, max_tokens=3).choices[0].text
        assert httpx.get(url.replace("/v1", "/health")).json() == {"status": "ok", "waiting": 0, "running": 0}
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    said = [line for line in errors.splitlines() if not line.startswith("Loading")]
    assert (process.returncode, said) == (128 + number, [])


def test_a_key_in_the_environment_and_an_open_address(directory: Path, tmp_path: Path) -> None:
    """What the generation config asks for and is not implemented is said, too."""
    shutil.copytree(directory, tmp_path / "beams")
    (tmp_path / "beams" / "generation_config.json").write_text('{"num_beams": 4}', encoding="utf-8")
    warned: list[str] = []
    for environment in ({}, {"TEQ_GRAPH_API_KEY": "sk-x"}):
        options = ("--port", "0", "--threads", "1", "--host", "0.0.0.0", "--log-level", "info")
        process = start(SERVE, "serve", tmp_path / "beams", *options, **environment)
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{process.stdout.readline().rpartition(':')[2].partition('/')[0]}"
            assert httpx.get(f"{url}/v1/models").status_code == (401 if environment else 200)
            process.terminate()
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        warned = [line for line in errors.splitlines() if line.startswith("warning")]
        assert "generation_config.json: num_beams=4 is not implemented and has no effect" in warned[0]
        assert len(warned) == (1 if environment else 2) and ("--api-key" in warned[-1]) != bool(environment)
        assert '"GET /v1/models HTTP/1.1"' in output


def test_what_the_command_refuses(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*options: str) -> str:
        assert run(["serve", str(directory), *options]) == 2
        return capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with monkeypatch.context() as patch:  # before anything is loaded
            patch.setattr(opening, "open_decoder", None)
            assert f"error: --host 127.0.0.1 --port {port}: Address already in use" in refused("--port", port)
    assert "--port 70000: accepted are" in refused("--port", "70000")
    for option, value in (("queue", "0"), ("max-tokens", "0"), ("timeout", "0"), ("log-level", "loud")):
        assert f"--{option} {value}: accepted are" in refused(f"--{option}", value)
    for option, value in (("allowed-host", "http://x"), ("allow-origin", "x"), ("api-key", " x")):
        assert f"--{option}" in (told := refused("--port", "0", f"--{option}", value)) and "accepted are" in told
    assert "--host no.such.host.invalid --port 0: " in refused("--host", "no.such.host.invalid", "--port", "0")
    for name in [name for name in sys.modules if name.startswith(("fastapi", "teq_graph.serving"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert refused() == "error: serve: uvicorn is not installed; pip install teq-graph[serve]\n"
