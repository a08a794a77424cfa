"""Jobs in a SQLite file on a local disk: write-ahead log, so that readers and one writer never wait for each other."""

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from stiv_deploy.runtime.errors import one_line
from stiv_deploy.serving.errors import ServeError
from stiv_deploy.serving.store.sql import TABLES, VERSION, SqlJobStore, store_error

BUSY = 30.0
"""Seconds that a transaction waits for another process's."""


class SqliteFile:
    """A :class:`~stiv_deploy.serving.store.sql.Database` in the file ``path``.

    Raises ``sqlite3.Error`` if the file cannot be opened, :class:`ServeError` if it is of another version.
    """

    def __init__(self, path: Path) -> None:
        self._lock = RLock()
        self.connection = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
        self.connection.row_factory = sqlite3.Row
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = NORMAL")
        (found,) = self.connection.execute("PRAGMA user_version").fetchone()
        if found not in (0, VERSION):
            raise ServeError(f"{path}: job store of version {found}, this is {VERSION}; choose another --data folder")
        tables = TABLES.format(counted="INTEGER", counting=" AUTOINCREMENT")
        self.connection.executescript(f"BEGIN IMMEDIATE; {tables} PRAGMA user_version = {VERSION}; COMMIT;")

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """As the protocol says."""
        with self._lock, _told():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:  # of some errors, a full disk among them, it has ended by itself
                    self.connection.execute("ROLLBACK")
                raise

    def all(self, query: str, values: Sequence[Any]) -> list[sqlite3.Row]:
        """As the protocol says."""
        with self._lock, _told():
            return self.connection.execute(query, values).fetchall()

    def version(self) -> tuple[int, int]:
        """As the protocol says."""
        with self._lock, _told():
            (others,) = self.connection.execute("PRAGMA data_version").fetchone()
            return others, self.connection.total_changes

    def close(self) -> None:
        """As the protocol says."""
        with self._lock:
            self.connection.close()


class SqliteJobStore(SqlJobStore):
    """Jobs in the file ``path``; :class:`ServeError` if it cannot be opened, or is of another version."""

    database: SqliteFile

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        try:
            file = SqliteFile(path)
        except sqlite3.Error as error:
            raise ServeError(f"{path}: no job store ({one_line(str(error))}); choose another --data folder") from None
        super().__init__(file, clock)


@contextmanager
def _told() -> Iterator[None]:
    """What keeps SQLite from its file (a full disk, another process, damage), by :func:`store_error`."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise
        raise store_error(error, full=error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL) from None
