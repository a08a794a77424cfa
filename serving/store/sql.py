"""Jobs in a database of tables: what every one of them is asked, in SQL that SQLite and PostgreSQL both speak."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any, Protocol

from stiv_deploy.runtime.errors import one_line
from stiv_deploy.serving.errors import IdempotencyError, QueueFullError, StoreError
from stiv_deploy.serving.store.jobs import (
    ATTEMPTS,
    CANCELLED,
    DIED,
    LEASE,
    LOST,
    Job,
    Measured,
    Page,
    Size,
    State,
    WorkerState,
)
from stiv_deploy.serving.store.tallies import HITS, REQUESTS, TAKEN_BACK, Key

VERSION = 1
"""Version of the tables, which the database keeps."""
COLUMNS = tuple(field.name for field in fields(Job))
TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    number {counted} PRIMARY KEY{counting}, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    created DOUBLE PRECISION NOT NULL, frames INTEGER NOT NULL, height INTEGER NOT NULL, width INTEGER NOT NULL,
    rows INTEGER NOT NULL, evaluations INTEGER NOT NULL, steps INTEGER NOT NULL, facts TEXT NOT NULL,
    twin TEXT NOT NULL, priority INTEGER NOT NULL, due DOUBLE PRECISION, state TEXT NOT NULL, step INTEGER NOT NULL,
    started DOUBLE PRECISION, finished DOUBLE PRECISION, expires DOUBLE PRECISION, worker TEXT, lease DOUBLE PRECISION,
    attempts INTEGER NOT NULL, error_code TEXT, error_message TEXT, bytes BIGINT NOT NULL, request TEXT NOT NULL,
    key TEXT, digest TEXT NOT NULL, UNIQUE (owner, key));
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, number);
CREATE INDEX IF NOT EXISTS jobs_by_owner ON jobs (owner, number);
CREATE INDEX IF NOT EXISTS jobs_by_twin ON jobs (twin);
CREATE TABLE IF NOT EXISTS workers (
    id TEXT PRIMARY KEY, pid INTEGER NOT NULL, beat DOUBLE PRECISION NOT NULL, turned DOUBLE PRECISION NOT NULL,
    ready INTEGER NOT NULL, device TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS measured (
    bundle TEXT NOT NULL, frames INTEGER NOT NULL, height INTEGER NOT NULL, width INTEGER NOT NULL,
    rows INTEGER NOT NULL, seconds DOUBLE PRECISION NOT NULL, PRIMARY KEY (bundle, frames, height, width, rows));
CREATE TABLE IF NOT EXISTS measured_together (
    bundle TEXT NOT NULL, frames INTEGER NOT NULL, height INTEGER NOT NULL, width INTEGER NOT NULL,
    rows INTEGER NOT NULL, seconds DOUBLE PRECISION NOT NULL, devices INTEGER NOT NULL,
    PRIMARY KEY (bundle, frames, height, width, rows, devices));
CREATE TABLE IF NOT EXISTS tallies (
    metric TEXT NOT NULL, label TEXT NOT NULL, part TEXT NOT NULL, value DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (metric, label, part));
"""
"""The tables; ``counted`` and ``counting`` are how a database numbers what is added."""
TALLY = """INSERT INTO tallies VALUES (?, ?, ?, ?)
    ON CONFLICT (metric, label, part) DO UPDATE SET value = tallies.value + excluded.value"""
BEAT = """INSERT INTO workers VALUES (?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET beat = excluded.beat, turned = excluded.turned, ready = excluded.ready"""
MEASURE = """INSERT INTO measured VALUES (?, ?, ?, ?, ?, ?)
    ON CONFLICT (bundle, frames, height, width, rows) DO UPDATE SET seconds = excluded.seconds"""
MEASURE_TOGETHER = """INSERT INTO measured_together VALUES (?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (bundle, frames, height, width, rows, devices) DO UPDATE SET seconds = excluded.seconds"""
MEASURED = """SELECT *, 1 AS devices FROM measured WHERE bundle = ?
    UNION ALL SELECT * FROM measured_together WHERE bundle = ?"""
AGAIN = "UPDATE jobs SET state = 'queued', worker = NULL, lease = NULL"
MINE = "id = ? AND worker = ? AND state = 'in_progress'"


class Row(Protocol):
    """Values by the names of their columns."""

    def keys(self) -> Iterable[str]:
        """The names."""

    def __getitem__(self, name: str, /) -> Any:
        """The value of one."""


class Found(Protocol):
    """What a statement did: how many rows it changed, and which it returns."""

    @property
    def rowcount(self) -> int:
        """Rows changed."""

    def fetchone(self) -> Any:
        """The next row, by names, or ``None``."""

    def fetchall(self) -> Sequence[Any]:
        """All rows that are left."""


class Writing(Protocol):
    """A transaction; values stand for the question marks of a statement."""

    def execute(self, statement: str, values: Sequence[Any] = (), /) -> Found:
        """Do ``statement``."""

    def executemany(self, statement: str, rows: Sequence[Sequence[Any]], /) -> object:
        """Do ``statement`` once for each of ``rows``."""


class Database(Protocol):
    """Tables as in :data:`TABLES`, for the threads of this process.

    While it cannot be reached, or its disk is full, everything raises
    :class:`~stiv_deploy.serving.errors.StoreError`, and nothing has changed.
    """

    def writing(self) -> AbstractContextManager[Writing]:
        """A transaction, the only one that writes at its time; all of it is done, or by an exception nothing."""

    def all(self, query: str, values: Sequence[Any]) -> Sequence[Row]:
        """Rows of a query."""

    def version(self) -> tuple[int, int]:
        """Differs from the last one whenever something may have changed."""

    def close(self) -> None:
        """Let go of it."""


class SqlJobStore:
    """A :class:`~stiv_deploy.serving.store.jobs.JobStore` in ``database``, shared by this process's threads."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self.database, self._clock = database, clock

    def _all(self, query: str, values: Sequence[Any] = ()) -> Sequence[Row]:
        return self.database.all(query, values)

    def _jobs(self, rest: str, values: Sequence[Any] = ()) -> list[Job]:
        return [_job(row) for row in self._all(f"SELECT * FROM jobs {rest}", values)]

    def _changed(self, query: str, values: Sequence[Any]) -> bool:
        with self.database.writing() as db:
            return db.execute(query, values).rowcount > 0

    def _ended(self, outcome: str, query: str, values: Sequence[Any]) -> bool:
        """Whether ``query`` has ended a job, which is then counted."""
        with self.database.writing() as db:
            ended = db.execute(query, values).rowcount > 0
            _count(db, REQUESTS, outcome, ended)
        return ended

    def submit(
        self, job: Job, request: str, *, most: int, key: str | None = None, digest: str = ""
    ) -> tuple[Job, bool]:
        """As the protocol says."""
        values = [getattr(job, name) for name in COLUMNS] + [request, key, digest]
        names = f"{', '.join(COLUMNS)}, request, key, digest"
        with self.database.writing() as db:
            known = db.execute("SELECT * FROM jobs WHERE owner = ? AND key = ?", (job.owner, key)).fetchone()
            if known is not None:
                return _same(known, digest), False
            waiting = db.execute("SELECT COUNT(*) AS jobs FROM jobs WHERE state = 'queued'").fetchone()["jobs"]
            if job.state == State.QUEUED and waiting >= most:
                raise QueueFullError(f"{waiting} jobs are waiting, and no more than {most} may; try again later")
            db.execute(f"INSERT INTO jobs ({names}) VALUES ({', '.join('?' * len(values))})", values)
            _count(db, HITS, "", job.state == State.COMPLETED)
            _count(db, REQUESTS, State.COMPLETED, job.state == State.COMPLETED)
        return job, True

    def get(self, job: str, owner: str | None = None) -> Job | None:
        """As the protocol says."""
        found = self._jobs("WHERE id = ?", (job,))
        return found[0] if found and owner in (None, found[0].owner) else None

    def request(self, job: str) -> str | None:
        """As the protocol says."""
        rows = self._all("SELECT request FROM jobs WHERE id = ?", [job])
        return str(rows[0]["request"]) if rows else None

    def page(self, owner: str, after: str | None, limit: int, *, ascending: bool = False) -> Page | None:
        """As the protocol says."""
        sign, order = (">", "ASC") if ascending else ("<", "DESC")
        start: list[Any] = []
        if after is not None:
            found = self._all("SELECT number FROM jobs WHERE id = ? AND owner = ?", (after, owner))
            if not found:
                return None
            start = [found[0]["number"]]
        where = f"WHERE owner = ? {f'AND number {sign} ?' if start else ''} ORDER BY number {order} LIMIT ?"
        jobs = self._jobs(where, (owner, *start, limit + 1))
        return Page(jobs[:limit], len(jobs) > limit)

    def cancel(self, job: str) -> bool:
        """As the protocol says."""
        query = """UPDATE jobs SET state = 'failed', error_code = ?, error_message = 'it was cancelled', finished = ?,
            worker = NULL, lease = NULL WHERE id = ? AND state IN ('queued', 'in_progress')"""
        return self._ended(CANCELLED, query, (CANCELLED, self._clock(), job))

    def delete(self, job: str) -> bool:
        """As the protocol says."""
        with self.database.writing() as db:
            row = db.execute("DELETE FROM jobs WHERE id = ? RETURNING state", (job,)).fetchone()
            _count(db, REQUESTS, "deleted", row is not None and row["state"] in (State.QUEUED, State.IN_PROGRESS))
        return row is not None

    def waiting(self) -> list[Job]:
        """As the protocol says."""
        return self._jobs("WHERE state = 'queued' ORDER BY number")

    def running(self) -> list[Job]:
        """As the protocol says."""
        return self._jobs("WHERE state = 'in_progress' ORDER BY number")

    def claim(self, job: str, worker: str) -> tuple[Job, str] | None:
        """As the protocol says."""
        now = self._clock()
        query = """UPDATE jobs SET state = 'in_progress', worker = ?, lease = ?, attempts = attempts + 1,
            started = COALESCE(started, ?) WHERE id = ? AND state = 'queued' RETURNING *"""
        with self.database.writing() as db:
            row = db.execute(query, (worker, now + LEASE, now, job)).fetchone()
        return None if row is None else (_job(row), row["request"])

    def owned(self, worker: str) -> set[str]:
        """As the protocol says."""
        return {
            row["id"] for row in self._all("SELECT id FROM jobs WHERE state = 'in_progress' AND worker = ?", [worker])
        }

    def advance(self, worker: str, steps: Mapping[str, int]) -> None:
        """As the protocol says."""
        with self.database.writing() as db:
            db.executemany(
                f"UPDATE jobs SET step = ? WHERE {MINE}", [(step, job, worker) for job, step in steps.items()]
            )

    def complete(self, job: str, worker: str, size: int, expires: float) -> bool:
        """As the protocol says."""
        query = f"""UPDATE jobs SET state = 'completed', step = steps, finished = ?, bytes = ?, expires = ?,
            worker = NULL, lease = NULL WHERE {MINE}"""
        return self._ended(State.COMPLETED, query, (self._clock(), size, expires, job, worker))

    def fail(self, job: str, worker: str, code: str, message: str, expires: float) -> bool:
        """As the protocol says."""
        query = f"""UPDATE jobs SET state = 'failed', error_code = ?, error_message = ?, finished = ?, expires = ?,
            worker = NULL, lease = NULL WHERE {MINE}"""
        return self._ended(code, query, (code, message, self._clock(), expires, job, worker))

    def requeue(self, jobs: Collection[str], worker: str) -> None:
        """As the protocol says."""
        with self.database.writing() as db:
            db.executemany(f"{AGAIN}, attempts = attempts - 1 WHERE {MINE}", [(job, worker) for job in jobs])

    def release(self, worker: str) -> list[str]:
        """As the protocol says."""
        return self._take_back("worker = ?", (worker,))

    def expire_leases(self) -> list[str]:
        """As the protocol says."""
        return self._take_back("lease < ?", (self._clock(),))

    def _take_back(self, where: str, values: Sequence[Any]) -> list[str]:
        where = f"WHERE state = 'in_progress' AND {where}"
        last = f"""UPDATE jobs SET state = 'failed', worker = NULL, lease = NULL, error_code = ?, finished = ?,
            error_message = 'workers died while they made it' {where} AND attempts >= ? RETURNING id"""
        with self.database.writing() as db:
            failed = db.execute(last, (DIED, self._clock(), *values, ATTEMPTS)).fetchall()
            waiting = db.execute(f"{AGAIN} {where} RETURNING id", values).fetchall()
            _count(db, TAKEN_BACK, "", len(failed) + len(waiting))
            _count(db, REQUESTS, DIED, len(failed))
        return [row["id"] for row in (*failed, *waiting)]

    def beat(self, worker: WorkerState) -> None:
        """As the protocol says."""
        with self.database.writing() as db:
            db.execute(BEAT, (*worker[:4], int(worker.ready), worker.device))
            lease = "UPDATE jobs SET lease = ? WHERE state = 'in_progress' AND worker = ?"
            db.execute(lease, (self._clock() + LEASE, worker.id))

    def workers(self) -> list[WorkerState]:
        """As the protocol says."""
        rows = self._all("SELECT * FROM workers ORDER BY id")
        return [WorkerState(**(dict(row) | {"ready": bool(row["ready"])})) for row in rows]

    def sign_off(self, worker: str) -> None:
        """As the protocol says."""
        self._changed("DELETE FROM workers WHERE id = ?", (worker,))

    def measure(self, bundle: str, measured: Sequence[Measured]) -> None:
        """As the protocol says."""
        alone = [(bundle, *each.size, each.rows, each.seconds) for each in measured if each.devices == 1]
        shared = [(bundle, *each.size, *each[1:]) for each in measured if each.devices > 1]
        with self.database.writing() as db:
            db.executemany(MEASURE, alone)
            db.executemany(MEASURE_TOGETHER, shared)

    def measurements(self, bundle: str) -> list[Measured]:
        """As the protocol says."""
        rows = self._all(MEASURED, (bundle, bundle))
        names = ("rows", "seconds", "devices")
        return [
            Measured(Size(row["frames"], row["height"], row["width"]), *(row[name] for name in names)) for row in rows
        ]

    def twin(self, owner: str, twin: str) -> Job | None:
        """As the protocol says."""
        found = self._jobs("WHERE twin = ? AND owner = ? AND state = 'completed' LIMIT 1", (twin, owner))
        return found[0] if found else None

    def counts(self) -> dict[str, int]:
        """As the protocol says."""
        found = self._all("SELECT state, COUNT(*) AS jobs FROM jobs GROUP BY state")
        return dict.fromkeys(State, 0) | {State(row["state"]): row["jobs"] for row in found}

    def finished_bytes(self) -> int:
        """As the protocol says."""
        return int(self._all("SELECT COALESCE(SUM(bytes), 0) AS bytes FROM jobs")[0]["bytes"])

    def outdated(self, now: float, keep_seconds: float, most_bytes: int) -> list[str]:
        """As the protocol says."""
        found = self._all("SELECT id FROM jobs WHERE COALESCE(expires, finished + ?) < ?", (keep_seconds, now))
        sums = """SELECT id FROM (SELECT id, SUM(bytes) OVER (ORDER BY finished DESC, number DESC) AS upto FROM jobs
            WHERE state = 'completed') AS sums WHERE upto > ?"""
        return list(dict.fromkeys(row["id"] for row in (*found, *self._all(sums, (most_bytes,)))))

    def states(self) -> dict[str, State]:
        """As the protocol says."""
        return {row["id"]: State(row["state"]) for row in self._all("SELECT id, state FROM jobs")}

    def lose(self, job: str) -> None:
        """As the protocol says."""
        query = """UPDATE jobs SET state = 'failed', error_code = ?, error_message = 'its result is no longer there',
            bytes = 0 WHERE id = ? AND state = 'completed'"""
        self._changed(query, (LOST, job))

    def tally(self, found: Mapping[Key, float]) -> None:
        """As the protocol says."""
        with self.database.writing() as db:
            db.executemany(TALLY, [(*key, value) for key, value in found.items()])

    def tallies(self) -> dict[Key, float]:
        """As the protocol says."""
        rows = self._all("SELECT * FROM tallies")
        return {Key(row["metric"], row["label"], row["part"]): row["value"] for row in rows}

    def version(self) -> tuple[int, int]:
        """As the protocol says."""
        return self.database.version()

    def close(self) -> None:
        """As the protocol says."""
        self.database.close()


def store_error(error: Exception, *, full: bool) -> StoreError:
    """``error`` of a database, whose disk may be ``full``, as clients and workers are told of it."""
    message = "the disk of the job store is full" if full else f"no job store now ({one_line(str(error))})"
    return StoreError(message, full=full)


def _count(db: Writing, metric: str, label: str, amount: int) -> None:
    if amount:
        db.execute(TALLY, (*Key(metric, label), int(amount)))


def _job(row: Row) -> Job:
    return Job(**({name: row[name] for name in COLUMNS} | {"state": State(row["state"])}))


def _same(row: Row, digest: str) -> Job:
    """The job of ``row``, whose idempotency key has come again; :class:`IdempotencyError` with another request."""
    if row["digest"] != digest:
        raise IdempotencyError(
            f"the Idempotency-Key was used for {row['id']} with another request; give each request a key of its own"
        )
    return _job(row)
