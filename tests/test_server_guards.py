"""Who may ask a server: hosts, origins, content types, and the key."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.serving import PROMPT, Served, body

from teq_graph.errors import ConfigError
from teq_graph.onnx.runtime import OnnxDecoder
from teq_graph.serving.guards import Access

KEY = "sk-a-key"
BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def decoder(stories_dir: Path) -> OnnxDecoder:
    return OnnxDecoder.load(stories_dir, threads=1)


@pytest.fixture(scope="module")
def served(decoder: OnnxDecoder) -> Iterator[Served]:
    """As `teq-graph serve` without options."""
    server = Served(decoder, access=Access.listening_on("127.0.0.1", True))
    yield server
    server.close()


@pytest.fixture(scope="module")
def open_to_some(decoder: OnnxDecoder) -> Iterator[Served]:
    """On an address that others reach, with a key, a name, and a site whose pages may ask."""
    access = Access.listening_on("0.0.0.0", False, ["Box.example"], ["https://ui.example"], KEY)
    server = Served(decoder, access=access)
    yield server
    server.close()


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"])
def test_json_is_said_to_be_json(served: Served, kind: str) -> None:
    answer = served.post(body(), **{"Content-Type": kind})
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        415,
        f"Content-Type {kind!r}: accepted is application/json",
    )
    assert served.post(body(), **{"Content-Type": "Application/JSON; charset=utf-8"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "here", "elsewhere"),
    [
        ("localhost:8000", True, True),
        ("LOCALHOST.", True, True),
        ("127.0.0.1", True, True),
        ("[::1]:99", True, True),
        ("192.168.1.5:8000", False, True),
        ("[fe80::1]", False, True),
        (socket.gethostname(), False, True),
        ("box.example:8000", False, True),
        ("evil.example", False, False),
        ("localhost.evil.example", False, False),
        ("evil.example@localhost", False, False),
        ("localhost:x", False, False),
        ("", False, False),
    ],
)
def test_hosts(served: Served, open_to_some: Served, host: str, here: bool, elsewhere: bool) -> None:
    for server, allowed in ((served, here), (open_to_some, elsewhere)):
        answers = [
            server.get("/v1/models", Host=host, **BEARER),
            server.get("/health", Host=host),
            server.post(body(), Host=host, **BEARER),
        ]
        assert [answer.status_code for answer in answers] == [200 if allowed else 403] * 3
        if not allowed:
            assert answers[0].json()["error"]["message"].startswith(f"Host {host!r}: accepted are ")


def test_a_request_without_host(served: Served) -> None:
    address = served.url.removeprefix("http://")
    connection = http.client.HTTPConnection(address)
    connection._http_vsn, connection._http_vsn_str = 10, "HTTP/1.0"  # type: ignore[attr-defined]
    connection.putrequest("GET", "/v1/models", skip_host=True)
    connection.endheaders()
    assert connection.getresponse().status == 403
    connection.close()


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost:3000", "null", "file://", "https://ui.example"]
)
def test_pages_of_other_sites(served: Served, open_to_some: Served, origin: str) -> None:
    for answer in (served.post(body(), Origin=origin), served.get("/v1/models", Origin=origin)):
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
    allowed = origin == "https://ui.example"
    answer = open_to_some.post(body(), Origin=origin, **BEARER)
    assert answer.status_code == (200 if allowed else 403)
    assert answer.headers.get("access-control-allow-origin") == (origin if allowed else None)
    asked_first = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    preflight = httpx.options(f"{open_to_some.url}/v1/completions", headers={"Origin": origin, **asked_first})
    assert preflight.status_code == (200 if allowed else 403)
    assert ("authorization" in preflight.headers.get("access-control-allow-headers", "")) == allowed
    same = served.url
    assert served.get("/v1/models", Origin=same).status_code == 200


def test_all_hosts_and_origins(decoder: OnnxDecoder) -> None:
    server = Served(decoder, access=Access.listening_on("127.0.0.1", True, ["*"], ["*"]))
    try:
        answer = server.post(body(), Host="any.example", Origin="https://other.example")
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
    finally:
        server.close()


def test_the_key(open_to_some: Served) -> None:
    for given in ("", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer \xe9"):
        for answer in (
            open_to_some.post(body(), Authorization=given.encode("latin-1")),  # type: ignore[arg-type]
            open_to_some.get("/v1/models", Authorization=given.encode("latin-1")),  # type: ignore[arg-type]
            open_to_some.get("/metrics", Authorization=given.encode("latin-1")),  # type: ignore[arg-type]
            open_to_some.get("/nothing"),
        ):
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.json()["error"]["code"] == "invalid_api_key" and KEY not in answer.text
    assert open_to_some.get("/health").status_code == 200
    assert open_to_some.get("/metrics", **BEARER).status_code == 200
    client = openai.OpenAI(base_url=f"{open_to_some.url}/v1", api_key=KEY, max_retries=0)
    assert client.completions.create(model="stories", prompt=PROMPT, max_tokens=1).choices
    wrong = openai.OpenAI(base_url=f"{open_to_some.url}/v1", api_key="other", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"hosts": ["http://box"]}, "--allowed-host http://box: accepted"),
        ({"hosts": ["box:80"]}, "--allowed-host box:80: accepted"),
        ({"hosts": [""]}, "--allowed-host : accepted"),
        ({"origins": ["box"]}, "--allow-origin box: accepted"),
        ({"origins": ["https://box/"]}, "--allow-origin https://box/: accepted"),
        ({"api_key": ""}, "--api-key: accepted"),
        ({"api_key": " x"}, "--api-key: accepted"),
        ({"api_key": "schlüssel"}, "--api-key: accepted"),
    ],
)
def test_what_is_no_host_or_origin_or_key(given: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Access.listening_on("127.0.0.1", True, **given)
    assert str(caught.value).startswith(told) and "sch" not in str(caught.value).replace("SCHEME", "").lower()
