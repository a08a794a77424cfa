"""The job store that a place is: a file, or a database server."""

import time
from collections.abc import Callable
from pathlib import Path

from stiv_deploy.serving.store.sql import SqlJobStore
from stiv_deploy.serving.store.sqlite import SqliteJobStore

SCHEME = "postgresql://"
"""What a place begins with that is no file."""


def open_store(place: str, clock: Callable[[], float] = time.time) -> SqlJobStore:
    """The store in the file ``place``, or at such a URL of PostgreSQL, as ``ServeSettings.jobs`` says.

    Raises :class:`~stiv_deploy.serving.errors.ServeError`, and ``ModuleNotFoundError`` without psycopg.
    """
    if not place.startswith(SCHEME):
        return SqliteJobStore(Path(place), clock)
    from stiv_deploy.serving.store.postgres import PostgresJobStore

    return PostgresJobStore(place, clock)
