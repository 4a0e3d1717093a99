"""The process that serves: sockets, signals, and what happens to requests when it ends."""

from __future__ import annotations

import asyncio
import copy
import socket
from typing import Any

import uvicorn

from teq_graph.serving.worker import Worker

_LEAVE_SECONDS = 1
"""That a client has to read its answer once the grace is over."""


class Server(uvicorn.Server):
    """uvicorn's, which on SIGINT and SIGTERM lets a running generation finish and refuses those that wait.

    What takes longer than `grace` seconds is ended and told so. uvicorn raises the signal again afterwards, for the
    handler that was there before. `log_level` is uvicorn's, whose access log is at "info"; None leaves the process's
    logging as it is.
    """

    def __init__(self, app: Any, worker: Worker, grace: int, log_level: str | None = None) -> None:
        logging = None
        if log_level is not None:
            logging = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
            # It warns of each client that leaves in the middle of an answer.
            logging["loggers"]["asyncio"] = {"level": "ERROR"}
        super().__init__(uvicorn.Config(app, log_config=logging, log_level=log_level, ws="none", lifespan="off"))
        self.worker = worker
        self.grace = grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.close()
        loop = asyncio.get_running_loop()
        # Not uvicorn's own limit, which breaks the answers off with a traceback for each.
        timers = [
            loop.call_later(self.grace, self.worker.end),
            loop.call_later(self.grace + _LEAVE_SECONDS, self._leave),
        ]
        await super().shutdown(sockets)
        for timer in timers:
            timer.cancel()
        self.worker.stop()

    def _leave(self) -> None:
        for connection in list(self.server_state.connections):
            transport: asyncio.Transport = connection.transport
            transport.abort()


def serve(app: Any, worker: Worker, listening: socket.socket, grace: int, log_level: str) -> None:
    """Answer requests until a signal ends it."""
    try:
        Server(app, worker, grace, log_level).run(sockets=[listening])
    finally:
        worker.stop()
        listening.close()
