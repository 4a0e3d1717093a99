"""Requests that ask for too much, fail, take too long, or are left alone; and what is counted of all of them."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.serving import PROMPT, Served, Slow, body, send, wait_until

from teq_graph.errors import NumericsError
from teq_graph.onnx.runtime import OnnxDecoder
from teq_graph.onnx.runtime.generation import decoding
from teq_graph.serving.completions import Limits
from teq_graph.serving.worker import Worker
from teq_graph.system import memory


@pytest.fixture
def decoder(stories_dir: Path) -> OnnxDecoder:
    return OnnxDecoder.load(stories_dir, threads=1)


@pytest.fixture
def served(decoder: OnnxDecoder) -> Iterator[Served]:
    server = Served(decoder, 32)
    yield server
    server.close()


def samples(server: Served) -> dict[tuple[str, tuple[str, ...]], float]:
    text = server.get("/metrics").text
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# ----------------------------------------------------------------------------------------------------- what fails


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (NumericsError("logits of NaN"), 500, "logits of NaN"),
        (MemoryError(), 503, "there is not enough memory for this request"),
        (ValueError("what"), 500, "ValueError in the server, whose log says more"),
        (SystemExit(3), 500, "SystemExit in the server, whose log says more"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_worker_survives(
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
    status: int,
    told: str,
    streamed: bool,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(decoding.DecoderSession, "_step", fail)
        answer = served.post(body(stream=streamed))
        assert (answer.status_code, answer.json()["error"]["message"]) == (status, told)
    assert served.post(body(stream=streamed)).status_code == 200
    assert served.get("/health").json() == {"status": "ok", "waiting": 0, "running": 0}
    logged = [record.exc_info for record in caplog.records if record.name == "teq_graph.serving"]
    assert len(logged) == ("log says more" in told)


def test_a_failure_amid_a_stream(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = decoding.DecoderSession._step, []

    def fail_late(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise NumericsError("logits of NaN")
        return step(*arguments)

    monkeypatch.setattr(decoding.DecoderSession, "_step", fail_late)
    events = served.post(body(stream=True, max_tokens=9)).text.split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["message"] == "logits of NaN"
    assert "[DONE]" not in events[-2] and len(events) == 5


def test_a_dead_worker_is_told(decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_work", lambda self: None)
        server = Served(decoder)
    try:
        server.worker._thread.join()
        for answer in (server.get("/health"), server.post(body())):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "dead")
    finally:
        server.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1e-308},
        {"repetition_penalty": 1e308},
        {"temperature": 1e-320},
        {"temperature": 1e308},
        {"top_p": 5e-324, "temperature": 1},
        {"min_p": 5e-324, "top_k": 10**30},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"max_tokens": 10**30},
        {"max_tokens": 0},
        {"seed": 2**100},
        {"prompt": [10**30]},
    ],
    ids=str,
)
def test_extremes(served: Served, fields: dict[str, Any]) -> None:
    answer = served.post(body(**fields))
    assert answer.status_code in (200, 400)
    if answer.status_code == 200:
        assert answer.json()["choices"][0]["finish_reason"] in ("length", "stop")
    else:
        assert "accepted" in answer.json()["error"]["message"]
    assert served.post(body()).status_code == 200


# --------------------------------------------------------------------------------------------------------- limits


def test_tokens(decoder: OnnxDecoder) -> None:
    server = Served(decoder, limits=Limits(max_tokens=20))
    try:
        refused = server.post(body(max_tokens=21)).json()["error"]
        assert (refused["message"], refused["param"]) == (
            "max_tokens=21: accepted by this server are up to 20",
            "max_tokens",
        )
        for asked in (20, None):
            answer = server.post(body(max_tokens=asked)).json()
            assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (20, "length")
    finally:
        server.close()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_cache_without_memory(
    served: Served, decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """A model without a limit of positions."""
    monkeypatch.setattr(decoder, "shape", dataclasses.replace(decoder.shape, max_positions=None))
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**6)
    answer = served.post(body(max_tokens=10**4, stream=streamed))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("cache of 10005 positions, prompt and new tokens together: ")
    assert served.post(body(stream=streamed)).status_code == 200


def test_time(decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is, once it is over; nothing is an error."""
    server, slow = Served(decoder, limits=Limits(seconds=1)), Slow(decoder, monkeypatch, 0.3)
    try:
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(server.post, body(max_tokens=400))
            wait_until(lambda: server.worker.running == 1)
            waiting = pool.submit(server.post, body(max_tokens=400))
            answer = running.result().json()
            assert 0 < answer["usage"]["completion_tokens"] < 20
            assert answer["choices"][0]["finish_reason"] == "length" and answer["choices"][0]["text"]
            late = waiting.result()
            assert (late.status_code, late.headers["x-should-retry"]) == (504, "false")
            assert late.json()["error"]["message"] == "no text within 1 s, which is this server's limit"
        events = server.post(body(max_tokens=400, stream=True)).text.split("\n\n")
        assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert events[-2] == "data: [DONE]"
        monkeypatch.setitem(decoding.PREFILL_TOKENS, "cpu", 4)
        assert server.post(body(prompt=[5] * 400)).status_code == 504
        wait_until(lambda: not server.worker.running)
    finally:
        slow.go.set()
        server.close()


def test_a_body_that_does_not_come(decoder: OnnxDecoder) -> None:
    server = Served(decoder, limits=Limits(seconds=0.3))

    def parts() -> Iterator[bytes]:
        yield b"{"
        time.sleep(1)

    try:
        assert server.post(parts()).status_code == 408
    finally:
        server.close()


# ------------------------------------------------------------------------------------------------- those who leave


@pytest.mark.parametrize("streamed", [False, True])
def test_leaving_during_prefill(
    served: Served, decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    monkeypatch.setitem(decoding.PREFILL_TOKENS, "cpu", 4)
    slow = Slow(decoder, monkeypatch, 0.2)
    with send(served, body(prompt=[5] * 400, stream=streamed)):
        wait_until(lambda: slow.steps > 1)
    wait_until(lambda: not served.worker.running)
    assert slow.steps < 90  # of 100 parts, 20 seconds


def test_leaving_the_queue(
    decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Twenty that leave take no place, no time, and no lines in the log; nor do they when the server ends."""
    server, slow = Served(decoder, queue=20, grace=60), Slow(decoder, monkeypatch)
    monkeypatch.setitem(decoding.PREFILL_TOKENS, "cpu", 4)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, body(prompt=[5] * 300, max_tokens=100))
        wait_until(lambda: server.worker.running == 1)
        for _ in range(2):
            clients = [send(server, body(stream=bool(index % 2), prompt=[5] * 300)) for index in range(20)]
            wait_until(lambda: server.worker.waiting == 20)
            assert samples(server)["teq_graph_requests_waiting", ()] == 20
            for client in clients:
                client.close()
            wait_until(lambda: server.worker.waiting == 0)
        slow.go.set()
        assert running.result().status_code == 200
        assert slow.steps == 75 + 99  # the last part of the prompt gives the first token
    assert server.close() < 5
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_ending_with_a_grace_that_is_too_short(
    decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that run and those that wait are told; the end takes one step more."""
    server, slow = Served(decoder, grace=0), Slow(decoder, monkeypatch, 0.2)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(server.post, body(max_tokens=400, stream=stream)) for stream in (False, False, True)]
        wait_until(lambda: server.worker.waiting == 2)
        assert server.close() < 3
        codes = sorted(answer.result().json()["error"]["code"] for answer in answers)
        assert codes == ["cancelled", "shutting_down", "shutting_down"]
    assert slow.steps < 10
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_client_that_does_not_read_holds_up_nothing(decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    server, slow = Served(decoder, grace=0), Slow(decoder, monkeypatch)
    with send(server, body(max_tokens=400, stream=True)):
        wait_until(lambda: slow.steps > 3)
        assert server.close() < 5
    slow.go.set()


# ---------------------------------------------------------------------------------------------- several at a time


def test_lists_of_prompts(served: Served, decoder: OnnxDecoder) -> None:
    texts = [PROMPT, "The cat", "A big"]
    expected = [decoder.generate(text, 7) for text in texts]
    tokens = [decoder.encode(text) for text in texts]
    for prompts in (texts, tokens):
        whole = served.client.completions.create(model="stories", prompt=prompts, max_tokens=7)
        assert [(choice.index, choice.text, choice.finish_reason) for choice in whole.choices] == [
            (index, text, "length") for index, text in enumerate(expected)
        ]
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (sum(map(len, tokens)), 21)
        parts = list(
            served.client.completions.create(
                model="stories", prompt=prompts, max_tokens=7, stream=True, stream_options={"include_usage": True}
            )
        )
        said, reasons = ["", "", ""], ["", "", ""]
        for part in parts[:-1]:
            said[part.choices[0].index] += part.choices[0].text
            reasons[part.choices[0].index] += part.choices[0].finish_reason or ""
        assert (said, reasons) == (expected, ["length"] * 3)
        assert parts[-1].usage == whole.usage


def test_each_prompt_takes_a_place(decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    server, slow = Served(decoder, queue=3), Slow(decoder, monkeypatch)
    try:
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(server.post, body(max_tokens=100))
            wait_until(lambda: server.worker.running == 1)
            waiting = pool.submit(server.post, body(prompt=["a", "b"]))
            wait_until(lambda: server.worker.waiting == 2)
            full = server.post(body(prompt=["a", "b"]))
            assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
            slow.go.set()
            assert running.result().status_code == waiting.result().status_code == 200
    finally:
        server.close()


# -------------------------------------------------------------------------------------------------------- metrics


def test_metrics(served: Served, decoder: OnnxDecoder) -> None:
    for streamed in (False, True):
        assert served.post(body(stream=streamed, max_tokens=5)).status_code == 200
    served.post("{")
    served.get("/nothing")
    served.get("/health")
    found = samples(served)
    route = "/v1/completions"
    assert found["teq_graph_requests_total", (route, "200")] == 2
    assert found["teq_graph_requests_total", (route, "400")] == 1
    assert found["teq_graph_requests_total", ("none", "404")] == 1
    assert found["teq_graph_requests_total", ("/health", "200")] == 1
    assert found["teq_graph_prompt_tokens_total", ()] == 2 * len(decoder.encode(PROMPT))
    assert found["teq_graph_generated_tokens_total", ()] == 10
    for name in ("queue", "first_token", "request"):
        assert found[f"teq_graph_{name}_seconds_count", ()] == 2
    sums = [found[f"teq_graph_{name}_seconds_sum", ()] for name in ("queue", "first_token", "request")]
    assert 0 < sums[0] < sums[1] < sums[2]
    assert found["teq_graph_requests_waiting", ()] == found["teq_graph_requests_running", ()] == 0
