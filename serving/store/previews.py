"""Previews of jobs that are made, and who looks: by small files, so that processes need not know of each other."""

import time
from collections.abc import Iterator
from pathlib import Path

from stiv_deploy.runtime.files import replaced_file

LOOKED = 10.0
"""Seconds that a look at a job is good for."""


class Previews:
    """In ``folder``: ``ID.webp``, how a job looks like becoming, and ``ID.wanted``, that somebody wants to know."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def want(self, job: str) -> None:
        """Somebody looks at ``job``, and does for some seconds."""
        (self._folder / f"{job}.wanted").touch()

    def wanted(self, job: str) -> bool:
        """Whether somebody has looked a moment ago."""
        try:
            return (self._folder / f"{job}.wanted").stat().st_mtime > time.time() - LOOKED
        except FileNotFoundError:
            return False

    def save(self, job: str, picture: bytes) -> None:
        """Show how ``job`` looks like becoming; raises :class:`~stiv_deploy.runtime.errors.OutputError`."""
        with replaced_file(self._folder / f"{job}.webp") as temporary:
            temporary.write_bytes(picture)

    def get(self, job: str) -> bytes | None:
        """What was saved last, if anything."""
        try:
            return (self._folder / f"{job}.webp").read_bytes()
        except FileNotFoundError:
            return None

    def forget(self, job: str) -> None:
        """Remove what is there of a job that has ended."""
        for suffix in ("webp", "wanted"):
            (self._folder / f"{job}.{suffix}").unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Path]:
        return self._folder.iterdir()
