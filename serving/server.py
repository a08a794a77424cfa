"""A whole service in this process and its workers: opened, run until it is told to stop, ended in good order."""

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import uvicorn
from fastapi import FastAPI

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.files import check_no_bundle, make_folder
from stiv_deploy.serving.api.app import create_app
from stiv_deploy.serving.api.guard import LOOPBACK, Tokens
from stiv_deploy.serving.api.service import Service
from stiv_deploy.serving.errors import ServeError
from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.store.opening import open_store
from stiv_deploy.serving.store.results import Results
from stiv_deploy.serving.tracing import open_spans
from stiv_deploy.serving.workers.supervisor import Supervisor

TIDY = 30.0
"""Seconds between two rounds of tidying up."""
CLOSING = 5
"""Seconds that open connections have when the server stops."""
KEPT = 60
"""Seconds that an idle connection is kept: more than clients keep theirs, or both would end it at one time."""
CONNECTIONS = 1_000
log = logging.getLogger(__name__)


def listen(host: str, port: int, tokens: Tokens) -> socket.socket:
    """A listening socket; :class:`ServeError` if there can be none, or if others could come in without a token."""
    if host not in LOOPBACK and not tokens:
        raise ServeError(f"--host {host}: others could come in; give --tokens FILE, or leave the host at 127.0.0.1")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServeError(f"{host}, port {port}: cannot listen there ({reason}); choose another --port") from None


def address(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server:
    """The service of ``settings``, for those with one of ``tokens``.

    Raises what opening a bundle does, :class:`~stiv_deploy.runtime.errors.OutputError` and :class:`ServeError`.
    """

    def __init__(self, settings: ServeSettings, tokens: Tokens) -> None:
        self._settings = settings
        bundle = Bundle.open(settings.bundle)
        prepare_folder(settings.data)
        self._store = open_store(settings.jobs)
        results = Results(settings.data)
        self._spans = open_spans(settings)
        self._service = Service(settings, bundle, self._store, results, spans=self._spans)
        swept = results.sweep(self._store)
        if swept:
            log.warning("%s: removed %d files that belong to no job", settings.data, swept)
        app = create_app(self._service, tokens, self._life)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=CLOSING,
            timeout_keep_alive=KEPT,
            limit_concurrency=CONNECTIONS,
        )
        self._server = uvicorn.Server(config)
        self._supervisor = Supervisor(settings, self._store, self._fail)
        self._failed = False

    @asynccontextmanager
    async def _life(self, _app: FastAPI) -> AsyncIterator[None]:
        ended = Event()
        tidying = Thread(target=self._tidy, args=(ended,), daemon=True)
        tidying.start()
        self._supervisor.start()
        try:
            yield
        finally:
            self._service.accepting = False
            ended.set()
            self._supervisor.stop()
            tidying.join()

    def _tidy(self, ended: Event) -> None:
        while not ended.wait(TIDY):
            try:
                self._service.tidy()
            except Exception:  # a busy store or a full disk: the next round may do better
                log.exception("cannot tidy up")

    def _fail(self) -> None:
        self._failed = True
        self._server.should_exit = True

    def run(self, listening: socket.socket) -> int:
        """Serve until SIGTERM or Ctrl-C; the exit code: 0, or 2 if no worker could start (it has said why)."""
        with suppress(KeyboardInterrupt):  # uvicorn ends well, and then raises what it was told again
            self._server.run([listening])
        self._store.close()
        self._spans.close()
        return 2 if self._failed else 0


def prepare_folder(data: Path) -> None:
    """Make the folder for jobs, and prove that it takes files; :class:`~stiv_deploy.runtime.errors.OutputError`."""
    check_no_bundle(data / "jobs")
    make_folder(data, "choose another --data")
