"""The part of a service that speaks to clients: its store, files and spans, opened, kept tidy, and closed."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.files import check_no_bundle, make_folder
from stiv_deploy.serving.api.app import Lifespan, alone, create_app
from stiv_deploy.serving.api.guard import Guard, Tokens
from stiv_deploy.serving.api.service import Service
from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.store.opening import open_results, open_store
from stiv_deploy.serving.tracing import open_spans

TIDY = 30.0
"""Seconds between two rounds of tidying up."""
log = logging.getLogger(__name__)


def prepare_folder(settings: ServeSettings) -> None:
    """Make the folder for jobs, and prove that it takes files; :class:`~stiv_deploy.runtime.errors.OutputError`."""
    check_no_bundle(settings.data / "jobs")
    make_folder(settings.data, "choose another --data")


class Front:
    """The jobs of ``settings``, for clients.

    Raises what opening a bundle does, :class:`~stiv_deploy.runtime.errors.OutputError` and
    :class:`~stiv_deploy.serving.errors.ServeError`.
    """

    def __init__(self, settings: ServeSettings) -> None:
        bundle = Bundle.open(settings.bundle)
        prepare_folder(settings)
        self.store = open_store(settings.jobs)
        results = open_results(settings.data, settings.results)
        self._spans = open_spans(settings)
        self.service = Service(settings, bundle, self.store, results, spans=self._spans)
        swept = results.sweep(self.store)
        if swept:
            log.warning("%s: removed %d files that belong to no job", settings.data, swept)

    def app(self, tokens: Tokens, lifespan: Lifespan = alone) -> Guard:
        """Its ASGI application for those with one of ``tokens``."""
        return create_app(self.service, tokens, lifespan)

    @contextmanager
    def tidied(self) -> Iterator[None]:
        """Take jobs and remove what has been kept long enough, until the block ends; then take none any more."""
        ended = Event()
        tidying = Thread(target=self._tidy, args=(ended,), daemon=True)
        tidying.start()
        try:
            yield
        finally:
            self.service.accepting = False
            ended.set()
            tidying.join()

    def _tidy(self, ended: Event) -> None:
        while not ended.wait(TIDY):
            try:
                self.service.tidy()
            except Exception:  # a busy store or a full disk: the next round may do better
                log.exception("cannot tidy up")

    def close(self) -> None:
        """Let go of the store, and send the last spans."""
        self.store.close()
        self._spans.close()
