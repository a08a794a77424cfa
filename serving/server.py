"""A whole service in this process and its workers: opened, run until it is told to stop, ended in good order."""

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import uvicorn
from fastapi import FastAPI

from stiv_deploy.serving.api.guard import LOOPBACK, Tokens
from stiv_deploy.serving.errors import ServeError
from stiv_deploy.serving.front import Front
from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.workers.supervisor import Supervisor

CLOSING = 5
"""Seconds that open connections have when the server stops."""
REACHED = 10.0
"""Seconds that a connection may take to come."""
KEPT = 60
"""Seconds that an idle connection is kept: more than clients keep theirs, or both would end it at one time."""
CONNECTIONS = 1_000


def check_door(host: str, tokens: Tokens) -> None:
    """Raise :class:`ServeError` if others could come in at ``host`` without a token."""
    if host not in LOOPBACK and not tokens:
        raise ServeError(f"--host {host}: others could come in; give --tokens FILE, or leave the host at 127.0.0.1")


def listen(host: str, port: int, tokens: Tokens) -> socket.socket:
    """A listening socket; :class:`ServeError` if there can be none, or if others could come in without a token."""
    check_door(host, tokens)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServeError(f"{host}, port {port}: cannot listen there ({reason}); choose another --port") from None


def check_reachable(place: str, name: str) -> None:
    """Raise :class:`ServeError` if nothing listens at ``place``, HOST:PORT by the variable ``name``."""
    host, _, port = place.rpartition("//")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), REACHED).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ServeError(f"{name}={place}: nothing is reached there ({error}); want HOST:PORT") from None


def address(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def working(front: Front, supervisor: Supervisor) -> Iterator[None]:
    """Take jobs and make them, until the block ends."""
    with front.tidied():
        supervisor.start()
        try:
            yield
        finally:
            front.service.accepting = False
            supervisor.stop()


class Server:
    """The service of ``settings``, for those with one of ``tokens``; raises what :class:`Front` does."""

    def __init__(self, settings: ServeSettings, tokens: Tokens) -> None:
        self._front = Front(settings)
        config = uvicorn.Config(
            self._front.app(tokens, self._life),
            log_level="warning",
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=CLOSING,
            timeout_keep_alive=KEPT,
            limit_concurrency=CONNECTIONS,
        )
        self._server = uvicorn.Server(config)
        self._supervisor = Supervisor(settings, self._front.store, self._fail)
        self._failed = False

    @asynccontextmanager
    async def _life(self, _app: FastAPI) -> AsyncIterator[None]:
        with working(self._front, self._supervisor):
            yield

    def _fail(self) -> None:
        self._failed = True
        self._server.should_exit = True

    def run(self, listening: socket.socket) -> int:
        """Serve until SIGTERM or Ctrl-C; the exit code: 0, or 2 if no worker could start (it has said why)."""
        with suppress(KeyboardInterrupt):  # uvicorn ends well, and then raises what it was told again
            self._server.run([listening])
        self._front.close()
        return 2 if self._failed else 0
