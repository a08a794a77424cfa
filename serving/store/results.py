"""Files of jobs: results, whole or not at all, and latents to go on from."""

import logging
import os
import shutil
import time
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from stiv_deploy.runtime.errors import OutputError
from stiv_deploy.runtime.files import draft, replaced_file, told
from stiv_deploy.serving.store.jobs import JobStore, State
from stiv_deploy.serving.store.previews import Previews

log = logging.getLogger(__name__)
ABANDONED = 3600.0
"""Seconds after which what is half-written belongs to nobody any more."""
VIDEO, THUMBNAIL, SPRITESHEET = "video.mp4", "thumbnail.webp", "spritesheet.png"
RESULT, LATENTS = (State.COMPLETED,), (State.QUEUED,)
"""States, besides that of being in progress, in which a job has a use for its files."""


class Results:
    """Below ``folder``: ``results/ID`` with the files of a completed job, ``latents/ID.npz``, and ``previews``."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._latents, self.previews = (
            folder / "results",
            folder / "latents",
            Previews(folder / "previews"),
        )
        for each in (self._folder, self._latents):
            each.mkdir(parents=True, exist_ok=True)

    def place(self, job: str) -> Path:
        """Folder of the result of ``job``."""
        return self._folder / job

    @contextmanager
    def writing(self, job: str) -> Iterator[Path]:
        """A folder for the result's files, which gets its place if the block succeeds; several may write at once."""
        place = self.place(job)
        with told(place, ""), draft(place) as folder:
            folder.mkdir()
            yield folder
            shutil.rmtree(place, ignore_errors=True)
            folder.rename(place)

    def link(self, made: str, job: str) -> bool:
        """Give ``job`` the files of the job ``made``; whether they were there."""
        try:
            with self.writing(job) as folder:
                for file in self.place(made).iterdir():
                    os.link(file, folder / file.name)
        except OutputError:
            return False
        return (self.place(job) / VIDEO).is_file()

    def bytes(self, job: str) -> int:
        """Bytes of the result's files."""
        return sum(file.stat().st_size for file in self.place(job).iterdir())

    def free_bytes(self) -> int:
        """Free bytes of the disk that they are on."""
        return shutil.disk_usage(self._folder).free

    def remove(self, job: str) -> None:
        """Remove all files of a job."""
        shutil.rmtree(self.place(job), ignore_errors=True)
        self.forget_latents(job)

    def save_latents(self, job: str, **arrays: np.ndarray) -> None:
        """Keep ``arrays``, from which another worker can go on with a job."""
        with replaced_file(self._saved(job)) as temporary:
            np.savez(temporary, allow_pickle=False, **arrays)

    def latents(self, job: str) -> dict[str, np.ndarray] | None:
        """The arrays that were kept; ``None`` if there are none, or they cannot be read."""
        try:
            with np.load(self._saved(job), allow_pickle=False) as file:
                return dict(file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            log.warning("the latents of %s cannot be read (%s); it begins again", job, error)
            return None

    def forget_latents(self, job: str) -> None:
        """Remove what :meth:`save_latents` kept, and the preview."""
        self._saved(job).unlink(missing_ok=True)
        self.previews.forget(job)

    def _saved(self, job: str) -> Path:
        return self._latents / f"{job}.npz"

    def sweep_abandoned(self) -> None:
        """Remove what killed processes left half-written, while others write."""
        hidden = [file for each in (self._folder, self._latents) for file in each.iterdir() if file.name[0] == "."]
        for file in [*hidden, *self.previews]:
            with suppress(FileNotFoundError):  # somebody has finished it
                if file.stat().st_mtime < time.time() - ABANDONED:
                    _remove(file)

    def sweep(self, store: JobStore) -> int:
        """Remove files whose job is gone or has no use for them, and tell the store of results that are; how many."""
        results, latents = [*self._folder.iterdir()], [*self._latents.iterdir()]
        states = store.states()  # after the files: what was made since then is in neither
        useless = [file for file in results if not _wanted(file, states, RESULT)]
        useless += [file for file in self.previews if states.get(file.stem) != State.IN_PROGRESS]
        useless += [file for file in latents if not _wanted(file, states, LATENTS)]
        for file in useless:
            _remove(file)
        for job, state in states.items():
            if state == State.COMPLETED and not (self.place(job) / VIDEO).is_file():
                store.lose(job)
        return len(useless)


def _remove(file: Path) -> None:
    shutil.rmtree(file, ignore_errors=True) if file.is_dir() else file.unlink(missing_ok=True)


def _wanted(file: Path, states: Mapping[str, State], wanted: Collection[State]) -> bool:
    """Whether a file or folder, which may be half-written, is of a job in a ``wanted`` state, or may become one's."""
    state = states.get(file.name.removeprefix(".").partition(".")[0].partition("-")[0])
    return state == State.IN_PROGRESS or (state in wanted and not file.name.startswith("."))
