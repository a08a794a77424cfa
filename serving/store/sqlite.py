"""Jobs in a SQLite file on a local disk: write-ahead log, so that readers and one writer never wait for each other."""

import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from threading import RLock
from typing import Any

from stiv_deploy.runtime.errors import one_line
from stiv_deploy.serving.errors import IdempotencyError, QueueFullError, ServeError, StoreError
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

BUSY = 30.0
"""Seconds that a transaction waits for another process's."""
VERSION = 1
"""Version of the tables, which the file keeps as its ``user_version``."""
COLUMNS = tuple(field.name for field in fields(Job))
TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, created REAL NOT NULL,
    frames INTEGER NOT NULL, height INTEGER NOT NULL, width INTEGER NOT NULL, rows INTEGER NOT NULL,
    evaluations INTEGER NOT NULL, steps INTEGER NOT NULL, facts TEXT NOT NULL, twin TEXT NOT NULL,
    priority INTEGER NOT NULL, due REAL, state TEXT NOT NULL, step INTEGER NOT NULL, started REAL, finished REAL,
    expires REAL, worker TEXT, lease REAL, attempts INTEGER NOT NULL, error_code TEXT, error_message TEXT,
    bytes INTEGER NOT NULL, request TEXT NOT NULL, key TEXT, digest TEXT NOT NULL, UNIQUE (owner, key));
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, number);
CREATE INDEX IF NOT EXISTS jobs_by_owner ON jobs (owner, number);
CREATE INDEX IF NOT EXISTS jobs_by_twin ON jobs (twin);
CREATE TABLE IF NOT EXISTS workers (
    id TEXT PRIMARY KEY, pid INTEGER NOT NULL, beat REAL NOT NULL, turned REAL NOT NULL, ready INTEGER NOT NULL,
    device TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS measured (
    bundle TEXT NOT NULL, frames INTEGER NOT NULL, height INTEGER NOT NULL, width INTEGER NOT NULL,
    rows INTEGER NOT NULL, seconds REAL NOT NULL, PRIMARY KEY (bundle, frames, height, width, rows));
CREATE TABLE IF NOT EXISTS tallies (
    metric TEXT NOT NULL, label TEXT NOT NULL, part TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (metric, label, part));
"""
TALLY = """INSERT INTO tallies VALUES (?, ?, ?, ?)
    ON CONFLICT (metric, label, part) DO UPDATE SET value = value + excluded.value"""
AGAIN = "UPDATE jobs SET state = 'queued', worker = NULL, lease = NULL"
MINE = "id = ? AND worker = ? AND state = 'in_progress'"


class SqliteJobStore:
    """A :class:`~stiv_deploy.serving.store.jobs.JobStore` in the file ``path``, shared by this process's threads.

    Raises :class:`ServeError` if the file cannot be opened, or is of another version. Every method raises
    :class:`StoreError` if the file cannot be used now; nothing has changed then.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._lock, self._clock = RLock(), clock
        try:
            self._open(path)
        except sqlite3.Error as error:
            raise ServeError(f"{path}: no job store ({one_line(str(error))}); choose another --data folder") from None

    def _open(self, path: Path) -> None:
        self._db = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if found not in (0, VERSION):
            raise ServeError(f"{path}: job store of version {found}, this is {VERSION}; choose another --data folder")
        self._db.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _told():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # of some errors, a full disk among them, it has ended by itself
                    self._db.execute("ROLLBACK")
                raise

    def _all(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._lock, _told():
            return self._db.execute(query, values).fetchall()

    def _jobs(self, rest: str, values: Sequence[Any] = ()) -> list[Job]:
        return [_job(row) for row in self._all(f"SELECT * FROM jobs {rest}", values)]

    def _changed(self, query: str, values: Sequence[Any]) -> bool:
        with self._writing() as db:
            return db.execute(query, values).rowcount > 0

    def _ended(self, outcome: str, query: str, values: Sequence[Any]) -> bool:
        """Whether ``query`` has ended a job, which is then counted."""
        with self._writing() as db:
            ended = db.execute(query, values).rowcount > 0
            _count(db, REQUESTS, outcome, ended)
        return ended

    def submit(
        self, job: Job, request: str, *, most: int, key: str | None = None, digest: str = ""
    ) -> tuple[Job, bool]:
        """As the protocol says."""
        values = [getattr(job, name) for name in COLUMNS] + [request, key, digest]
        names = f"{', '.join(COLUMNS)}, request, key, digest"
        with self._writing() as db:
            known = db.execute("SELECT * FROM jobs WHERE owner = ? AND key = ?", (job.owner, key)).fetchone()
            if known is not None:
                return _same(known, digest), False
            (waiting,) = db.execute("SELECT COUNT(*) FROM jobs WHERE state = 'queued'").fetchone()
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
        with self._writing() as db:
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
        with self._writing() as db:
            row = db.execute(query, (worker, now + LEASE, now, job)).fetchone()
        return None if row is None else (_job(row), row["request"])

    def owned(self, worker: str) -> set[str]:
        """As the protocol says."""
        return {
            row["id"] for row in self._all("SELECT id FROM jobs WHERE state = 'in_progress' AND worker = ?", [worker])
        }

    def advance(self, worker: str, steps: Mapping[str, int]) -> None:
        """As the protocol says."""
        with self._writing() as db:
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
        with self._writing() as db:
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
        with self._writing() as db:
            failed = db.execute(last, (DIED, self._clock(), *values, ATTEMPTS)).fetchall()
            waiting = db.execute(f"{AGAIN} {where} RETURNING id", values).fetchall()
            _count(db, TAKEN_BACK, "", len(failed) + len(waiting))
            _count(db, REQUESTS, DIED, len(failed))
        return [row["id"] for row in (*failed, *waiting)]

    def beat(self, worker: WorkerState) -> None:
        """As the protocol says."""
        with self._writing() as db:
            db.execute("REPLACE INTO workers VALUES (?, ?, ?, ?, ?, ?)", worker)
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
        rows = [(bundle, *each.size, each.rows, each.seconds) for each in measured]
        with self._writing() as db:
            db.executemany("REPLACE INTO measured VALUES (?, ?, ?, ?, ?, ?)", rows)

    def measurements(self, bundle: str) -> list[Measured]:
        """As the protocol says."""
        rows = self._all("SELECT * FROM measured WHERE bundle = ?", (bundle,))
        return [Measured(Size(row["frames"], row["height"], row["width"]), row["rows"], row["seconds"]) for row in rows]

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
            WHERE state = 'completed') WHERE upto > ?"""
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
        with self._writing() as db:
            db.executemany(TALLY, [(*key, value) for key, value in found.items()])

    def tallies(self) -> dict[Key, float]:
        """As the protocol says."""
        rows = self._all("SELECT * FROM tallies")
        return {Key(row["metric"], row["label"], row["part"]): row["value"] for row in rows}

    def version(self) -> tuple[int, int]:
        """As the protocol says."""
        with self._lock, _told():
            (others,) = self._db.execute("PRAGMA data_version").fetchone()
            return others, self._db.total_changes

    def close(self) -> None:
        """As the protocol says."""
        with self._lock:
            self._db.close()


@contextmanager
def _told() -> Iterator[None]:
    """What keeps SQLite from its file (a full disk, another process, damage) as :class:`StoreError`."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise
        full = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL
        message = "the disk of the job store is full" if full else f"no job store now ({one_line(str(error))})"
        raise StoreError(message, full=full) from None


def _count(db: sqlite3.Connection, metric: str, label: str, amount: int) -> None:
    if amount:
        db.execute(TALLY, (*Key(metric, label), int(amount)))


def _job(row: sqlite3.Row) -> Job:
    return Job(**({name: row[name] for name in COLUMNS} | {"state": State(row["state"])}))


def _same(row: sqlite3.Row, digest: str) -> Job:
    """The job of ``row``, whose idempotency key has come again; :class:`IdempotencyError` with another request."""
    if row["digest"] != digest:
        raise IdempotencyError(
            f"the Idempotency-Key was used for {row['id']} with another request; give each request a key of its own"
        )
    return _job(row)
