"""The address that is listened on, which needs nothing of what takes seconds to import."""

from __future__ import annotations

import ipaddress
import socket

from teq_graph.errors import InputError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises InputError where the address is in use or none of this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--host {host} --port {port}: {reason}; accepted is a free address of this machine"
        ) from error


def is_local(listening: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback
