"""Who may ask: what keeps the pages of other sites from driving a server on the reader's own machine, and the key.

A browser lets any page send requests to `localhost`, and reach it under a name that the page's owner points there (DNS
rebinding). It always says, however, under which `Host` it asks, for which `Origin`, and it asks the server first
before it sends JSON as JSON to another site.
"""

from __future__ import annotations

import dataclasses
import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Self

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from teq_graph.errors import ConfigError
from teq_graph.serving.protocol import ApiError

ALL = "*"
WITHOUT_KEY = ("/health",)
"""For those that look whether the server is alive; it tells nothing of what is asked and answered."""

_HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^:\[\]/@\s]+))(?P<port>:\d*)?", re.IGNORECASE)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Access:
    """`hosts`: names, in small letters, under which the server is asked, `*` for any; `addresses`: also under any
    address in numbers, which no page can claim. `origins`: sites whose pages may ask, as browsers name them, `*` for
    all. `api_key`: None if nobody needs one.
    """

    hosts: frozenset[str] = frozenset({"localhost", "127.0.0.1", "::1"})
    addresses: bool = False
    origins: frozenset[str] = frozenset()
    api_key: str | None = None

    @classmethod
    def listening_on(
        cls, host: str, local: bool, hosts: Iterable[str] = (), origins: Iterable[str] = (), api_key: str | None = None
    ) -> Self:
        """For a server that listens on `host`, which is `local` where other machines do not reach it.

        Where they do, it is asked under any of its addresses, and under the machine's name. Raises ConfigError for
        what is no host, no origin, or no key.
        """
        names = {host.lower(), *cls.hosts, *(() if local else (socket.gethostname().lower(),))}
        for given in hosts:
            found = _HOST.fullmatch(given)
            if found is None or found["port"]:
                raise ConfigError(f"--allowed-host {given}: accepted are names and addresses without a port, and *")
            names.add((found["address"] or found["name"]).lower())
        for given in origins:
            if given != ALL and not _ORIGIN.fullmatch(given):
                raise ConfigError(f"--allow-origin {given}: accepted are SCHEME://HOST, with :PORT or without, and *")
        if api_key is not None and not (
            api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""
        ):
            raise ConfigError("--api-key: accepted are visible ASCII characters, without spaces around them")
        return cls(frozenset(names), not local, frozenset(map(str.lower, origins)), api_key)

    def check(self, scope: Scope) -> None:
        """Raises ApiError for a request that is not to be answered, before its body is read."""
        headers = Headers(scope=scope)
        self._check_host(headers)
        self._check_origin(headers)
        asks_first = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if self.api_key is not None and scope["path"] not in WITHOUT_KEY and not asks_first:
            self._check_key(headers.get("authorization", ""))
        kind = headers.get("content-type", "")
        if scope["method"] == "POST" and kind.partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, f"Content-Type {kind!r}: accepted is application/json", "unsupported_media_type")

    def _check_host(self, headers: Headers) -> None:
        if ALL in self.hosts:
            return
        given = headers.getlist("host")
        found = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        name = (found["address"] or found["name"]).lower().removesuffix(".") if found else ""
        if name not in self.hosts and not (self.addresses and _is_address(name)):
            accepted = f"{', '.join(sorted(self.hosts))}, and what --allowed-host names"
            raise ApiError(403, f"Host {', '.join(given)!r}: accepted are {accepted}", "host_not_allowed")

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or ALL in self.origins or origin.lower() in self.origins:
            return
        if origin.lower().partition("://")[2] != headers.get("host", "").lower():
            raise ApiError(403, f"Origin {origin!r}: accepted is what --allow-origin names", "origin_not_allowed")

    def _check_key(self, authorization: str) -> None:
        assert self.api_key is not None
        scheme, _, key = authorization.partition(" ")
        # In a time that says nothing about how much of it is right.
        is_right = hmac.compare_digest(key.strip().encode(), self.api_key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise ApiError(401, "Authorization: accepted is Bearer and this server's API key", "invalid_api_key")


class Guard:
    """Answers for the app where `access` refuses."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self.access.check(scope)
            except ApiError as error:
                await JSONResponse(error.content, error.status, error.headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
