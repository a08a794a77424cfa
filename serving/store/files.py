"""Files of results, and the folder that they are in by default; :mod:`~stiv_deploy.serving.store.remote` has others."""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from stiv_deploy.runtime.errors import OutputError
from stiv_deploy.runtime.files import draft, told

VIDEO, THUMBNAIL, SPRITESHEET = "video.mp4", "thumbnail.webp", "spritesheet.png"


class RemoteFile(Protocol):
    """A file that is not on this machine: its size in bytes, and a tag that differs when its content does."""

    size: int
    tag: str

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Its bytes from ``start`` to before ``stop``, in blocks."""

    def fetch(self, target: Path) -> None:
        """Make a copy of it at ``target``."""


class ResultFiles(Protocol):
    """Where the files of completed jobs are, for many processes at once: those of a job all, or not there."""

    def writing(self, job: str) -> AbstractContextManager[Path]:
        """A folder of this machine for the files of ``job``, which get their place if the block succeeds.

        Several may write at once. Raises :class:`~stiv_deploy.runtime.errors.OutputError`.
        """

    def link(self, made: str, job: str) -> bool:
        """Give ``job`` the files of the job ``made``; whether they were there."""

    def bytes(self, job: str) -> int:
        """Bytes of the files of ``job``."""

    def get(self, job: str, name: str) -> Path | RemoteFile | None:
        """One of them, if it is there."""

    def remove(self, job: str) -> None:
        """Remove them."""

    def list(self) -> list[str]:
        """Names of all that is there, by job; what is half-written begins with a dot."""


class FolderFiles:
    """:class:`ResultFiles` in the folders ``folder``/ID, each of which is renamed into its place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def writing(self, job: str) -> Iterator[Path]:
        """As the protocol says."""
        place = self._folder / job
        with told(place, ""), draft(place) as folder:
            folder.mkdir()
            yield folder
            shutil.rmtree(place, ignore_errors=True)
            folder.rename(place)

    def link(self, made: str, job: str) -> bool:
        """As the protocol says; both have the same files."""
        try:
            with self.writing(job) as folder:
                for file in (self._folder / made).iterdir():
                    os.link(file, folder / file.name)
        except OutputError:
            return False
        return self.get(job, VIDEO) is not None

    def bytes(self, job: str) -> int:
        """As the protocol says."""
        return sum(file.stat().st_size for file in (self._folder / job).iterdir())

    def get(self, job: str, name: str) -> Path | None:
        """As the protocol says."""
        path = self._folder / job / name
        return path if path.is_file() else None

    def remove(self, job: str) -> None:
        """As the protocol says."""
        shutil.rmtree(self._folder / job, ignore_errors=True)

    def list(self) -> list[str]:
        """As the protocol says."""
        return [each.name for each in self._folder.iterdir()]
