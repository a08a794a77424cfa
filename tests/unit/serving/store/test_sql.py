"""The job store: each transition happens once, whoever asks for it at the same time, whichever database it is."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from store_jobs import Clock, job, submit

from stiv_deploy.serving.errors import IdempotencyError, QueueFullError
from stiv_deploy.serving.store.jobs import ATTEMPTS, LEASE, Measured, Size, State, WorkerState
from stiv_deploy.serving.store.opening import open_store
from stiv_deploy.serving.store.sql import SqlJobStore
from stiv_deploy.serving.store.tallies import Key


@pytest.fixture(params=["sqlite_place", "postgres_place"])
def place(request: pytest.FixtureRequest) -> str:
    """An empty database of either kind."""
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def store(place: str, clock: Clock) -> Iterator[SqlJobStore]:
    made = open_store(place, clock)
    yield made
    made.close()


def test_what_was_stored_comes_back_whole(store: SqlJobStore) -> None:
    made = submit(store, facts='{"a": 1}', priority=3, due=7.0)
    assert store.get(made.id) == made
    assert store.get(made.id, "me") == made
    assert store.get(made.id, "other") is None
    assert store.get("video_0") is None


def test_a_job_is_given_to_one_worker(store: SqlJobStore, place: str) -> None:
    jobs = [submit(store).id for _ in range(20)]
    stores = [open_store(place) for _ in range(4)]

    def claim_all(number: int) -> list[str]:
        return [each for each in jobs if stores[number].claim(each, f"w{number}") is not None]

    with ThreadPoolExecutor(4) as pool:
        claimed = [each for found in pool.map(claim_all, range(4)) for each in found]
    assert sorted(claimed) == sorted(jobs)
    for each in stores:
        each.close()


@pytest.mark.parametrize("what", ["cancel", "delete"])
def test_who_ends_first_wins(store: SqlJobStore, what: str) -> None:
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


def test_only_the_owner_of_the_lease_is_believed(store: SqlJobStore) -> None:
    made = submit(store)
    store.claim(made.id, "w")
    assert not store.complete(made.id, "x", 1, 2000.0)
    assert not store.fail(made.id, "x", "c", "m", 2000.0)
    store.advance("x", {made.id: 3})
    assert store.get(made.id).step == 0
    store.advance("w", {made.id: 3})
    assert store.get(made.id).step == 3


def test_a_dead_workers_jobs_wait_again_and_fail_in_the_end(store: SqlJobStore, clock: Clock) -> None:
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


def test_a_sign_of_life_renews_leases(store: SqlJobStore, clock: Clock) -> None:
    made = submit(store)
    store.claim(made.id, "w")
    clock.now += LEASE - 1
    store.beat(WorkerState("w", 1, clock.now, clock.now, True, "cpu"))
    clock.now += LEASE - 1
    assert store.expire_leases() == []
    assert [each.id for each in store.workers()] == ["w"]
    assert store.release("w") == [made.id]


def test_what_is_given_back_was_no_attempt(store: SqlJobStore) -> None:
    made = submit(store)
    for _ in range(ATTEMPTS + 1):
        store.claim(made.id, "w")
        store.requeue([made.id], "w")
    assert store.get(made.id).state == State.QUEUED


def test_the_queue_has_an_end(store: SqlJobStore) -> None:
    for _ in range(2):
        store.submit(job(), "{}", most=2)
    with pytest.raises(QueueFullError, match="2 jobs are waiting"):
        store.submit(job(), "{}", most=2)


def test_an_idempotency_key_gives_the_same_job(store: SqlJobStore) -> None:
    first, new = store.submit(job(), "{}", most=1, key="k", digest="a")
    assert new
    assert store.submit(job(), "{}", most=1, key="k", digest="a") == (first, False)  # though the queue is full
    with pytest.raises(IdempotencyError, match=first.id):
        store.submit(job(), "{}", most=1, key="k", digest="b")
    assert store.submit(job(owner="other"), "{}", most=9, key="k", digest="b")[1]


def test_one_key_at_many_places_at_once_gives_one_job(place: str) -> None:
    stores = [open_store(place) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: each.submit(job(), "{}", most=9, key="k", digest="a"), stores))
    assert len({made.id for made, _ in found}) == 1
    assert sum(new for _, new in found) == 1
    for each in stores:
        each.close()


def test_pages(store: SqlJobStore) -> None:
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


def test_the_old_and_the_many_go(store: SqlJobStore, clock: Clock) -> None:
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


def test_what_was_cancelled_or_died_goes_too(store: SqlJobStore, clock: Clock) -> None:
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


def test_everything_outlives_the_process(place: str) -> None:
    first = open_store(place)
    made = submit(first)
    first.measure("here", [Measured(Size(4, 8, 8), 2, 0.5)])
    second = open_store(place)  # while the first is open, as after kill -9
    assert second.get(made.id) == made
    assert second.measurements("elsewhere") == []
    assert second.measurements("here") == [Measured(Size(4, 8, 8), 2, 0.5)]
    both = [Measured(Size(4, 8, 8), 2, 0.4), Measured(Size(4, 8, 8), 2, 0.3, 2), Measured(Size(4, 8, 8), 2, 0.2, 4)]
    for seconds in (0.9, 0.3):
        first.measure("here", [both[0], both[1]._replace(seconds=seconds), both[2]])
    assert sorted(second.measurements("here")) == sorted(both)
    first.close()
    second.close()


def test_others_changes_are_seen(store: SqlJobStore, place: str) -> None:
    other, before = open_store(place), store.version()
    assert store.version() == before
    submit(other)
    changed = store.version()
    assert changed != before
    submit(store)
    assert store.version() != changed
    other.close()


def test_each_end_is_counted_by_who_brought_it_about(store: SqlJobStore) -> None:
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
