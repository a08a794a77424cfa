"""The job store in a file: what is no store, a full disk, and another process that holds it."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_jobs import job, submit

from stiv_deploy.serving.errors import ServeError, StoreError
from stiv_deploy.serving.store.jobs import State
from stiv_deploy.serving.store.sqlite import SqliteJobStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteJobStore]:
    made = SqliteJobStore(tmp_path / "jobs.sqlite")
    yield made
    made.close()


def test_a_file_that_is_no_store_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, though long enough to have had a header in it" * 20)
    with pytest.raises(ServeError, match="no job store"):
        SqliteJobStore(tmp_path / "text")
    with sqlite3.connect(tmp_path / "newer") as newer:
        newer.execute("PRAGMA user_version = 9")
    with pytest.raises(ServeError, match="version 9"):
        SqliteJobStore(tmp_path / "newer")


def test_a_full_disk_changes_nothing(store: SqliteJobStore) -> None:
    """It is told, no transaction stays open, and what was stored is there."""
    known = submit(store)
    (pages,) = store.database.connection.execute("PRAGMA page_count").fetchone()
    store.database.connection.execute(f"PRAGMA max_page_count = {pages}")
    large = job(facts="x" * 100_000)
    for _ in range(2):
        with pytest.raises(StoreError, match="disk of the job store is full") as caught:
            store.submit(large, "{}", most=9)
        assert caught.value.full
    assert store.get(large.id) is None
    assert store.get(known.id) == known
    store.database.connection.execute("PRAGMA max_page_count = 10000")
    assert store.submit(large, "{}", most=9)[1]


def test_a_store_that_another_holds_is_told(store: SqliteJobStore, tmp_path: Path) -> None:
    store.database.connection.execute("PRAGMA busy_timeout = 1")
    with sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked") as caught:
            submit(store)
        other.execute("ROLLBACK")
    other.close()
    assert not caught.value.full
    assert submit(store).state == State.QUEUED
