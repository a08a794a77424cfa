"""Everything about a service that its operator chooses, as one value that processes can be given."""

from pathlib import Path

from pydantic import Field

from stiv_deploy.runtime.bundle.contract import Frozen

MIB, GIB, DAY = 2**20, 2**30, 86_400.0


class ServeSettings(Frozen):
    """How the bundle in the folder ``bundle`` is served, with its jobs and their files in the folder ``data``.

    With the URL of a ``store`` of PostgreSQL jobs are there, and servers on several machines may share both.
    Results are at the URL ``results``, if there is one.

    ``workers`` processes make clips, worker i on GPU ``device`` + i; or one on all ``devices``, one by one and, as
    ``parallel`` says, together. Each device has up to ``slots`` clips of one size in one batch. Finished jobs go after
    ``keep_seconds``, and the oldest of them as soon as all files have more than ``keep_bytes``. Nothing is accepted
    while the disk has less than ``free_bytes``, or ``queue`` jobs are waiting.
    Latents of running clips are written every ``latents_every`` steps (0: never). A worker that stops has
    ``grace_seconds`` to finish what runs. ``rate`` new jobs a minute may come from one client. With ``log_json``
    logs are lines of JSON and tell of every job's way; with ``spans`` OpenTelemetry is told of it.
    A worker whose backend gives wrong results takes another one; it ends if ``strict``.
    """

    bundle: Path
    data: Path
    store: str | None = None
    results: str | None = None
    name: str
    workers: int = Field(default=1, ge=1, le=64)
    backend: str | None = None
    device: int = Field(default=0, ge=0)
    devices: tuple[str, ...] = ()
    parallel: str | None = None
    threads: int | None = None
    strict: bool = False
    slots: int = Field(default=8, ge=1, le=256)
    queue: int = Field(default=1_000, ge=1, le=100_000)
    body_bytes: int = Field(default=64 * MIB, ge=1_024)
    rate: float = Field(default=600.0, gt=0)
    keep_seconds: float = Field(default=DAY, gt=0)
    keep_bytes: int = Field(default=20 * GIB, ge=0)
    free_bytes: int = Field(default=GIB // 2, ge=0)
    latents_every: int = Field(default=10, ge=0)
    log_json: bool = False
    spans: bool = False
    grace_seconds: float = Field(default=15.0, ge=0, le=600)

    @property
    def jobs(self) -> str:
        """The job store: ``store``, or a file in ``data``."""
        return self.store or str(self.data / "jobs.sqlite")
