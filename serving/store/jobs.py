"""A job as a value, and what every store of jobs can do."""

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from stiv_deploy.serving.store.tallies import Key

ATTEMPTS = 3
"""How many workers may die of a job before it fails."""
LEASE = 15.0
"""Seconds that a job stays with a worker that gives no sign of life."""
CANCELLED, DIED, LOST = "cancelled", "worker_died", "result_lost"
"""Codes of failures that are not the engine's."""


class State(StrEnum):
    """Where a job stands; the words of OpenAI's videos API, which has no other ones."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"


class Size(NamedTuple):
    """Size of a video: frames, and pixels."""

    frames: int
    height: int
    width: int

    @property
    def volume(self) -> int:
        """Pixels of all frames."""
        return self.frames * self.height * self.width


def new_id() -> str:
    """An id that nobody can guess."""
    return f"video_{secrets.token_hex(16)}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One video to make, or made.

    ``created``, ``started``, ``finished``, ``expires`` and the deadline ``due`` are Unix times. It takes
    ``evaluations`` of the model's blocks for ``steps`` steps, with ``rows`` rows each; ``step`` are done. ``facts`` is
    JSON of what clients are told: prompt, seed, frames per second, warnings. ``twin`` is equal for equal requests to
    one bundle.
    """

    id: str
    owner: str
    created: float
    frames: int
    height: int
    width: int
    rows: int
    evaluations: int
    steps: int
    facts: str = "{}"
    twin: str = ""
    priority: int = 0
    due: float | None = None
    state: State = State.QUEUED
    step: int = 0
    started: float | None = None
    finished: float | None = None
    expires: float | None = None
    worker: str | None = None
    lease: float | None = None
    attempts: int = 0
    error_code: str | None = None
    error_message: str | None = None
    bytes: int = 0

    @property
    def size(self) -> Size:
        """Size of its video."""
        return Size(self.frames, self.height, self.width)

    @property
    def skips(self) -> bool:
        """Whether some of its steps skip the blocks."""
        return self.evaluations < self.steps

    @property
    def live(self) -> bool:
        """Whether it is still to be made."""
        return self.state in (State.QUEUED, State.IN_PROGRESS)


class Page(NamedTuple):
    """Some jobs of a list, and whether there are more."""

    jobs: list[Job]
    more: bool


class WorkerState(NamedTuple):
    """A worker: when it last gave a sign of life, when it last got on with its work, and whether it takes jobs."""

    id: str
    pid: int
    beat: float
    turned: float
    ready: bool
    device: str


class Measured(NamedTuple):
    """Seconds of one call of the model over ``rows`` rows, or of decoding one clip (0 rows), at one size.

    The call is of one device, or of several that share it.
    """

    size: Size
    rows: int
    seconds: float
    devices: int = 1


class JobStore(Protocol):
    """Where jobs are kept, for many processes at once; each method is one transaction.

    A job belongs to the worker that claimed it until its lease ends. What a worker says of a job that is no longer its
    own (it was cancelled, deleted, or given to another) is refused by ``False``: of a cancel and a finish at one time
    the store decides which was first. Where the store is out of reach, or its disk full, a method raises
    :class:`~stiv_deploy.serving.errors.StoreError`, and has changed nothing.
    """

    def submit(
        self, job: Job, request: str, *, most: int, key: str | None = None, digest: str = ""
    ) -> tuple[Job, bool]:
        """Store a new ``job`` with its ``request`` (JSON), or find that of the same owner and idempotency ``key``.

        Returns the job and whether it is new. Raises :class:`~stiv_deploy.serving.errors.QueueFullError` if ``most``
        wait, :class:`~stiv_deploy.serving.errors.IdempotencyError` if the job of that key has another ``digest``.
        """

    def get(self, job: str, owner: str | None = None) -> Job | None:
        """The job of that id, if it is there, and the ``owner``'s."""

    def request(self, job: str) -> str | None:
        """The request (JSON) of the job of that id, if it is there."""

    def page(self, owner: str, after: str | None, limit: int, *, ascending: bool = False) -> Page | None:
        """The owner's jobs that were created after the job ``after`` (before it, unless ``ascending``); newest first.

        ``None`` if there is no such job.
        """

    def cancel(self, job: str) -> bool:
        """Fail a live job as cancelled."""

    def delete(self, job: str) -> bool:
        """Forget a job, in whatever state it is."""

    def waiting(self) -> list[Job]:
        """All queued jobs, in the order that they came."""

    def running(self) -> list[Job]:
        """All jobs in progress."""

    def claim(self, job: str, worker: str) -> tuple[Job, str] | None:
        """Give a queued job to ``worker``; the job and its request, or ``None`` if another was faster."""

    def owned(self, worker: str) -> set[str]:
        """Jobs in progress of ``worker``."""

    def advance(self, worker: str, steps: Mapping[str, int]) -> None:
        """Say how many steps are done of some jobs of ``worker``."""

    def complete(self, job: str, worker: str, size: int, expires: float) -> bool:
        """The result of a job is in its place, and has ``size`` bytes."""

    def fail(self, job: str, worker: str, code: str, message: str, expires: float) -> bool:
        """A job cannot be made."""

    def requeue(self, jobs: Collection[str], worker: str) -> None:
        """Give back jobs that ``worker`` did not get to finish, as if it had not tried."""

    def release(self, worker: str) -> list[str]:
        """Take its jobs from a worker that is dead: they wait again, or fail after ``ATTEMPTS`` deaths; their ids."""

    def expire_leases(self) -> list[str]:
        """The same for all jobs whose lease has ended; returns their ids."""

    def beat(self, worker: WorkerState) -> None:
        """A sign of life of a worker, which renews the leases of its jobs."""

    def workers(self) -> list[WorkerState]:
        """All workers that have not signed off."""

    def sign_off(self, worker: str) -> None:
        """Forget a worker."""

    def measure(self, bundle: str, measured: Sequence[Measured]) -> None:
        """Keep times that were measured with the bundle of that hash, in place of older ones."""

    def measurements(self, bundle: str) -> list[Measured]:
        """The newest times of each kind with that bundle."""

    def twin(self, owner: str, twin: str) -> Job | None:
        """A completed job of the owner whose result is that of an equal request."""

    def counts(self) -> dict[str, int]:
        """Number of jobs by state."""

    def finished_bytes(self) -> int:
        """Bytes of all results."""

    def outdated(self, now: float, keep_seconds: float, most_bytes: int) -> list[str]:
        """Finished jobs that have expired, and the oldest ones beyond ``most_bytes`` of results.

        Those that were cancelled, or that workers died of, expire ``keep_seconds`` after their end.
        """

    def states(self) -> dict[str, State]:
        """The state of every job, by id."""

    def lose(self, job: str) -> None:
        """A completed job whose result has gone."""

    def tally(self, found: Mapping[Key, float]) -> None:
        """Add to what was counted."""

    def tallies(self) -> dict[Key, float]:
        """All that was ever counted, how jobs ended included."""

    def version(self) -> tuple[int, int]:
        """Differs from the last one whenever something may have changed."""

    def close(self) -> None:
        """Let go of the store."""
