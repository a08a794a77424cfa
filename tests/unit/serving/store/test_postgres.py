"""The job store on a server: a connection that is lost, a server that is not there, passwords, a service on it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from store_jobs import submit

from stiv_deploy.serving.errors import ServeError, StoreError
from stiv_deploy.serving.store.opening import open_store
from stiv_deploy.serving.store.postgres import PostgresJobStore


@pytest.fixture
def store(postgres_place: str) -> Iterator[PostgresJobStore]:
    made = PostgresJobStore(postgres_place)
    yield made
    made.close()


def other(place: str) -> psycopg.Connection[Any]:
    return psycopg.connect(place, autocommit=True)


def test_a_lost_connection_is_told_and_made_anew(store: PostgresJobStore, postgres_place: str) -> None:
    """As when the server is started again: one error, and then all goes on."""
    made = submit(store)
    with other(postgres_place) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    with pytest.raises(StoreError, match="no job store now") as caught:
        store.claim(made.id, "w")
    assert not caught.value.full
    assert store.claim(made.id, "w") is not None


def test_a_transaction_waits_for_the_other(store: PostgresJobStore, postgres_place: str) -> None:
    store.database._connection.execute("SET statement_timeout = 50")  # type: ignore[attr-defined]
    with other(postgres_place) as connection, connection.transaction():
        connection.execute("UPDATE changes SET number = number + 1")
        with pytest.raises(StoreError, match="statement timeout"):
            submit(store)
        assert store.waiting() == []  # who only reads does not wait
    assert submit(store).id


def test_tables_of_another_version_are_refused(store: PostgresJobStore, postgres_place: str) -> None:
    with other(postgres_place) as connection:
        connection.execute("UPDATE changes SET version = 9")
    with pytest.raises(ServeError, match="version 9"):
        PostgresJobStore(postgres_place)


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ServeError, match="no job store") as caught:
        open_store("postgresql://127.0.0.1:9/jobs")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["postgresql://me:secret@127.0.0.1:9/jobs", "postgresql:///jobs?password=secret"])
def test_a_password_is_refused_where_others_see_it(url: str) -> None:
    with pytest.raises(ServeError, match="PGPASSWORD") as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_a_service_makes_videos_on_it(
    place_of: Callable[..., Any], bundle_path: Path, postgres_place: str, finished: Callable[..., None]
) -> None:
    place = place_of(bundle_path, store=postgres_place)
    jobs = [place.ask(seed=seed)["id"] for seed in range(3)]
    finished(place.worker())
    assert [place.look(job)["status"] for job in jobs] == ["completed"] * 3
    assert place.client.get("/metrics").text.count('stiv_requests_total{outcome="completed"} 3.0') == 1
