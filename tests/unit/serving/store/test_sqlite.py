"""The job store: each transition happens once, whoever asks for it at the same time."""

import dataclasses
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stiv_deploy.serving.errors import IdempotencyError, QueueFullError, ServeError, StoreError
from stiv_deploy.serving.store.jobs import ATTEMPTS, LEASE, Job, Measured, Size, State, WorkerState, new_id
from stiv_deploy.serving.store.sqlite import SqliteJobStore
from stiv_deploy.serving.store.tallies import Key


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[SqliteJobStore]:
    made = SqliteJobStore(tmp_path / "jobs.sqlite", clock)
    yield made
    made.close()


def job(**changes: object) -> Job:
    plain = Job(
        id=new_id(), owner="me", created=1.0, frames=4, height=8, width=8, rows=2, evaluations=4, steps=4, twin="t"
    )
    return dataclasses.replace(plain, **changes)


def submit(store: SqliteJobStore, **changes: object) -> Job:
    return store.submit(job(**changes), "{}", most=100)[0]


def test_what_was_stored_comes_back_whole(store: SqliteJobStore) -> None:
    made = submit(store, facts='{"a": 1}', priority=3, due=7.0)
    assert store.get(made.id) == made
    assert store.get(made.id, "me") == made
    assert store.get(made.id, "other") is None
    assert store.get("video_0") is None


def test_a_job_is_given_to_one_worker(store: SqliteJobStore, tmp_path: Path) -> None:
    jobs = [submit(store).id for _ in range(20)]
    stores = [SqliteJobStore(tmp_path / "jobs.sqlite") for _ in range(4)]

    def claim_all(number: int) -> list[str]:
        return [each for each in jobs if stores[number].claim(each, f"w{number}") is not None]

    with ThreadPoolExecutor(4) as pool:
        claimed = [each for found in pool.map(claim_all, range(4)) for each in found]
    assert sorted(claimed) == sorted(jobs)
    for each in stores:
        each.close()


@pytest.mark.parametrize("what", ["cancel", "delete"])
def test_who_ends_first_wins(store: SqliteJobStore, what: str) -> None:
    """Delete or cancel against finish: one transaction decides, and the loser is told."""
    first, second = submit(store), submit(store)
    end = getattr(store, what)
    for each in (first, second):
        assert store.claim(each.id, "w") is not None
    assert end(first.id)
    assert not store.complete(first.id, "w", 10, 2000.0)
    assert store.complete(second.id, "w", 10, 2000.0)
    assert store.owned("w") == set()
    if what == "cancel":
        assert not store.cancel(second.id)
        assert store.get(first.id).error_code == "cancelled"
        assert store.get(second.id).state == State.COMPLETED


def test_only_the_owner_of_the_lease_is_believed(store: SqliteJobStore) -> None:
    made = submit(store)
    store.claim(made.id, "w")
    assert not store.complete(made.id, "x", 1, 2000.0)
    assert not store.fail(made.id, "x", "c", "m", 2000.0)
    store.advance("x", {made.id: 3})
    assert store.get(made.id).step == 0
    store.advance("w", {made.id: 3})
    assert store.get(made.id).step == 3


def test_a_dead_workers_jobs_wait_again_and_fail_in_the_end(store: SqliteJobStore, clock: Clock) -> None:
    """A request that kills whoever takes it does not kill for ever."""
    made = submit(store)
    for attempt in range(1, ATTEMPTS + 1):
        claimed = store.claim(made.id, f"w{attempt}")
        assert claimed is not None
        assert claimed[0].attempts == attempt
        assert store.expire_leases() == []
        clock.now += LEASE + 1
        assert store.expire_leases() == [made.id]
    assert (store.get(made.id).state, store.get(made.id).error_code) == (State.FAILED, "worker_died")


def test_a_sign_of_life_renews_leases(store: SqliteJobStore, clock: Clock) -> None:
    made = submit(store)
    store.claim(made.id, "w")
    clock.now += LEASE - 1
    store.beat(WorkerState("w", 1, clock.now, clock.now, True, "cpu"))
    clock.now += LEASE - 1
    assert store.expire_leases() == []
    assert [each.id for each in store.workers()] == ["w"]
    assert store.release("w") == [made.id]


def test_what_is_given_back_was_no_attempt(store: SqliteJobStore) -> None:
    made = submit(store)
    for _ in range(ATTEMPTS + 1):
        store.claim(made.id, "w")
        store.requeue([made.id], "w")
    assert store.get(made.id).state == State.QUEUED


def test_the_queue_has_an_end(store: SqliteJobStore) -> None:
    for _ in range(2):
        store.submit(job(), "{}", most=2)
    with pytest.raises(QueueFullError, match="2 jobs are waiting"):
        store.submit(job(), "{}", most=2)


def test_an_idempotency_key_gives_the_same_job(store: SqliteJobStore) -> None:
    first, new = store.submit(job(), "{}", most=1, key="k", digest="a")
    assert new
    assert store.submit(job(), "{}", most=1, key="k", digest="a") == (first, False)  # though the queue is full
    with pytest.raises(IdempotencyError, match=first.id):
        store.submit(job(), "{}", most=1, key="k", digest="b")
    assert store.submit(job(owner="other"), "{}", most=9, key="k", digest="b")[1]


def test_pages(store: SqliteJobStore) -> None:
    jobs = [submit(store).id for _ in range(5)]
    submit(store, owner="other")

    def ids(*arguments: object, ascending: bool = False) -> tuple[list[str], bool]:
        page = store.page("me", *arguments, ascending=ascending)
        return [each.id for each in page.jobs], page.more

    assert ids(None, 2) == ([jobs[4], jobs[3]], True)
    assert ids(jobs[3], 3) == ([jobs[2], jobs[1], jobs[0]], False)
    assert ids(jobs[1], 2, ascending=True) == ([jobs[2], jobs[3]], True)
    assert ids(None, 0) == ([], True)
    assert store.page("me", "video_0", 2) is None
    assert store.page("other", jobs[0], 2) is None


def test_the_old_and_the_many_go(store: SqliteJobStore, clock: Clock) -> None:
    jobs = [submit(store).id for _ in range(4)]
    for each in jobs[:3]:
        store.claim(each, "w")
        clock.now += 1
        store.complete(each, "w", 10, clock.now + 100)
    assert store.finished_bytes() == 30
    assert store.outdated(clock.now, 100, 30) == []
    assert store.outdated(clock.now, 100, 20) == jobs[:1]
    assert store.outdated(clock.now + 99.5, 100, 1000) == jobs[:2]
    assert store.outdated(clock.now + 1000, 100, 0) == jobs[:3]


def test_what_was_cancelled_or_died_goes_too(store: SqliteJobStore, clock: Clock) -> None:
    cancelled, dead, live = (submit(store).id for _ in range(3))
    store.cancel(cancelled)
    for _ in range(ATTEMPTS):
        store.claim(dead, "w")
        store.release("w")
    found = store.get(dead)
    assert found is not None
    assert found.state == State.FAILED
    assert store.outdated(clock.now + 99, 100, 0) == []
    assert set(store.outdated(clock.now + 101, 100, 0)) == {cancelled, dead}
    assert store.get(live) is not None


def test_everything_outlives_the_process(tmp_path: Path) -> None:
    first = SqliteJobStore(tmp_path / "jobs.sqlite")
    made = submit(first)
    first.measure("here", [Measured(Size(4, 8, 8), 2, 0.5)])
    second = SqliteJobStore(tmp_path / "jobs.sqlite")  # while the first is open, as after kill -9
    assert second.get(made.id) == made
    assert second.measurements("elsewhere") == []
    assert second.measurements("here") == [Measured(Size(4, 8, 8), 2, 0.5)]
    first.close()
    second.close()


def test_others_changes_are_seen(store: SqliteJobStore, tmp_path: Path) -> None:
    other, before = SqliteJobStore(tmp_path / "jobs.sqlite"), store.version()
    assert store.version() == before
    submit(other)
    changed = store.version()
    assert changed != before
    submit(store)
    assert store.version() != changed
    other.close()


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
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    large = job(facts="x" * 100_000)
    for _ in range(2):
        with pytest.raises(StoreError, match="disk of the job store is full") as caught:
            store.submit(large, "{}", most=9)
        assert caught.value.full
    assert store.get(large.id) is None
    assert store.get(known.id) == known
    store._db.execute("PRAGMA max_page_count = 10000")
    assert store.submit(large, "{}", most=9)[1]


def test_a_store_that_another_holds_is_told(store: SqliteJobStore, tmp_path: Path) -> None:
    store._db.execute("PRAGMA busy_timeout = 1")
    with sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked") as caught:
            submit(store)
        other.execute("ROLLBACK")
    other.close()
    assert not caught.value.full
    assert submit(store).state == State.QUEUED


def test_each_end_is_counted_by_who_brought_it_about(store: SqliteJobStore) -> None:
    done, cancelled, dead, gone = (submit(store).id for _ in range(4))
    submit(store, state=State.COMPLETED)
    for each in (done, gone):
        store.claim(each, "v")
    for _ in range(2):  # the second time nothing ends
        store.complete(done, "v", 1, 2.0)
        store.cancel(cancelled)
        store.delete(gone)
    store.delete(done)
    for _ in range(ATTEMPTS):
        store.claim(dead, "w")
        store.release("w")
    store.tally({Key("steps", "4"): 2.0})
    store.tally({Key("steps", "4"): 3.0})
    assert store.tallies() == {
        Key("requests", "completed"): 2,
        Key("requests", "cancelled"): 1,
        Key("requests", "deleted"): 1,
        Key("requests", "worker_died"): 1,
        Key("result_cache_hits"): 1,
        Key("taken_back"): ATTEMPTS,
        Key("steps", "4"): 5,
    }
