"""The process that serves: sockets, signals, and what happens to requests when it ends."""

from __future__ import annotations

import socket

import uvicorn

from teq_graph.errors import InputError
from teq_graph.onnx.runtime import OnnxDecoder
from teq_graph.serving.app import make_app
from teq_graph.serving.worker import Worker


class Server(uvicorn.Server):
    """uvicorn's, which on SIGINT and SIGTERM lets a running generation finish and refuses those that wait.

    What takes longer than `grace` seconds is ended. uvicorn raises the signal again afterwards, for the handler that
    was there before.
    """

    def __init__(self, app: object, worker: Worker, grace: int) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=grace))  # type: ignore[arg-type]
        self.worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.close()
        await super().shutdown(sockets)
        self.worker.stop()


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


def serve(decoder: OnnxDecoder, listening: socket.socket, model: str, queue: int, grace: int) -> None:
    """Answer requests until a signal ends it."""
    worker = Worker(queue)
    try:
        Server(make_app(decoder, worker, model), worker, grace).run(sockets=[listening])
    finally:
        worker.stop()
        listening.close()
