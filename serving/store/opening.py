"""What a place is: of jobs a file or a database server; of results a folder, or whatever fsspec knows."""

import time
from collections.abc import Callable
from pathlib import Path

from stiv_deploy.serving.store.files import FolderFiles
from stiv_deploy.serving.store.results import Results
from stiv_deploy.serving.store.sql import SqlJobStore
from stiv_deploy.serving.store.sqlite import SqliteJobStore

SCHEME = "postgresql://"
"""What a place begins with that is no file."""
LOCAL = "file://"
"""What the URL of a folder begins with."""


def open_store(place: str, clock: Callable[[], float] = time.time) -> SqlJobStore:
    """The store in the file ``place``, or at such a URL of PostgreSQL, as ``ServeSettings.jobs`` says.

    Raises :class:`~stiv_deploy.serving.errors.ServeError`, and ``ModuleNotFoundError`` without psycopg.
    """
    if not place.startswith(SCHEME):
        return SqliteJobStore(Path(place), clock)
    from stiv_deploy.serving.store.postgres import PostgresJobStore

    return PostgresJobStore(place, clock)


def open_results(folder: Path, place: str | None) -> Results:
    """Files of jobs in ``folder``, those of results at the URL ``place`` if there is one.

    Raises :class:`~stiv_deploy.serving.errors.ServeError`, and ``ModuleNotFoundError`` without fsspec.
    """
    if place is None:
        return Results(folder)
    if place.startswith(LOCAL):
        return Results(folder, FolderFiles(Path(place.removeprefix(LOCAL))))
    from stiv_deploy.serving.store.remote import FsspecFiles

    return Results(folder, FsspecFiles(place, folder / "results"))
